"""A kernel for attention over so few keys that they need no loop: one program holds all keys of a head and BM queries.

There is no loop and no running maximum, so of a short sequence nothing is left but reading q, k and v once, two products
and the launch, which programmatic dependent launch hides.

Source: the softmax of FlashAttention's last step (Dao et al. 2022); times in NOTES.md.
"""

from __future__ import annotations

from dataclasses import dataclass

TEXT = '''
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def short(q, k, v, out,
          H: tl.constexpr, HKV: tl.constexpr, L: tl.constexpr, S: tl.constexpr, D: tl.constexpr, SCALE: tl.constexpr,
          CAUSAL: tl.constexpr, QB: tl.constexpr, QH: tl.constexpr, QN: tl.constexpr, KB: tl.constexpr, KH: tl.constexpr,
          KN: tl.constexpr, VB: tl.constexpr, VH: tl.constexpr, VN: tl.constexpr, PDL: tl.constexpr,
          BM: tl.constexpr, BS: tl.constexpr):
    TM: tl.constexpr = (L + BM - 1) // BM
    pid = tl.program_id(0)
    head = (pid // TM) % H
    b = (pid // (TM * H)).to(tl.int64)
    shared = head // (H // HKV)
    m = (pid % TM) * BM + tl.arange(0, BM)
    n = tl.arange(0, BS)
    d = tl.arange(0, D)
    m_ok = (m < L)[:, None]
    n_ok = n < S
    if CAUSAL:  # later keys need not be read
        n_ok = n_ok & (n < (pid % TM) * BM + BM)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    x = tl.load(q + b * QB + head * QH + m[:, None] * QN + d[None, :], mask=m_ok, other=0.0)
    y = tl.load(k + b * KB + shared * KH + n[None, :] * KN + d[:, None], mask=n_ok[None, :], other=0.0)
    z = tl.load(v + b * VB + shared * VH + n[:, None] * VN + d[None, :], mask=n_ok[:, None], other=0.0)
    seen = n_ok[None, :]
    if CAUSAL:
        seen = seen & (n[None, :] <= m[:, None])
    score = tl.where(seen, tl.dot(x, y) * (SCALE * 1.4426950408889634), float("-inf"))
    weight = tl.exp2(score - tl.max(score, 1)[:, None])
    total = tl.sum(weight, 1)
    acc = tl.dot(weight.to(z.dtype), z) / total[:, None]
    at = ((b * L + m[:, None]) * H + head) * D + d[None, :]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=m_ok)
'''


@dataclass(frozen=True)
class Tile:
    """Queries of a program, and its warps."""

    queries: int
    warps: int


def tiles(heads: int, queries: int, processors: int) -> tuple[Tile, ...]:
    """Candidates, the default first; ``heads`` counts those of the whole batch."""
    if heads * -(-queries // 64) >= processors:
        return (Tile(64, 4), Tile(128, 8)) if queries > 64 else (Tile(64, 4), Tile(32, 4))
    return (Tile(32, 4), Tile(16, 4))
