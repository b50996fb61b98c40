"""A kernel for attention over so few keys that they need no loop: one program holds all keys of a head and BM queries.

There is no loop and no running maximum, so of a short sequence nothing is left but reading q, k and v once, two products
and the launch, which programmatic dependent launch hides.

Up to two tensors are added to the scores (or say by bools which keys count). They are the same for batch entries that lie
PERIOD apart (Swin: a window's place in each image); a program may do several of those and read its part of them once.

Source: the softmax of FlashAttention's last step (Dao et al. 2022); times in NOTES.md.
"""

from __future__ import annotations

from dataclasses import dataclass

TEXT = '''
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def tile_of(x, b, head, m, n, L: tl.constexpr, P: tl.constexpr, XB: tl.constexpr, XH: tl.constexpr, XL: tl.constexpr,
            XN: tl.constexpr, WIDTH: tl.constexpr):
    at = (b % P).to(tl.int64) * XB + head * XH + m[:, None] * XL + n[None, :] * XN
    return tl.load(x + at, mask=(m < L)[:, None] & (n < WIDTH)[None, :], other=0)


@triton.jit
def short(q, k, v, out, x0, x1,
          H: tl.constexpr, HKV: tl.constexpr, L: tl.constexpr, S: tl.constexpr, D: tl.constexpr, SCALE: tl.constexpr,
          CAUSAL: tl.constexpr, QB: tl.constexpr, QH: tl.constexpr, QN: tl.constexpr, KB: tl.constexpr, KH: tl.constexpr,
          KN: tl.constexpr, VB: tl.constexpr, VH: tl.constexpr, VN: tl.constexpr,
          ADDED0: tl.constexpr, P0: tl.constexpr, XB0: tl.constexpr, XH0: tl.constexpr, XL0: tl.constexpr, XN0: tl.constexpr,
          WIDTH0: tl.constexpr, ADDED1: tl.constexpr, P1: tl.constexpr, XB1: tl.constexpr, XH1: tl.constexpr,
          XL1: tl.constexpr, XN1: tl.constexpr, WIDTH1: tl.constexpr, SAFE: tl.constexpr, BATCH: tl.constexpr,
          PERIOD: tl.constexpr, EACH: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr, BM: tl.constexpr,
          BS: tl.constexpr):
    TM: tl.constexpr = (L + BM - 1) // BM
    pid = tl.program_id(0)
    head = (pid // TM) % H
    place = pid // (TM * H)
    first = (place // PERIOD) * (EACH * PERIOD) + place % PERIOD
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
    seen = n_ok[None, :]
    if CAUSAL:
        seen = seen & (n[None, :] <= m[:, None])
    if ADDED0 == 1:
        bias = tile_of(x0, first, head, m, n, L, P0, XB0, XH0, XL0, XN0, WIDTH0).to(tl.float32)
    if ADDED0 == 2:
        seen = seen & (tile_of(x0, first, head, m, n, L, P0, XB0, XH0, XL0, XN0, WIDTH0) != 0)
    if ADDED1 == 1:  # the second is added only where the first is
        bias += tile_of(x1, first, head, m, n, L, P1, XB1, XH1, XL1, XN1, WIDTH1).to(tl.float32)
    if ADDED1 == 2:
        seen = seen & (tile_of(x1, first, head, m, n, L, P1, XB1, XH1, XL1, XN1, WIDTH1) != 0)
    for i in tl.range(0, EACH, num_stages=STAGES):
        b = (first + i * PERIOD).to(tl.int64)
        x_ok, y_ok = m_ok, n_ok
        if BATCH % (EACH * PERIOD) != 0:
            x_ok = x_ok & (b < BATCH)
            y_ok = y_ok & (b < BATCH)
        x = tl.load(q + b * QB + head * QH + m[:, None] * QN + d[None, :], mask=x_ok, other=0.0)
        y = tl.load(k + b * KB + shared * KH + n[None, :] * KN + d[:, None], mask=y_ok[None, :], other=0.0)
        z = tl.load(v + b * VB + shared * VH + n[:, None] * VN + d[None, :], mask=y_ok[:, None], other=0.0)
        if ADDED0 == 1:  # to the base 2 only after the maximum is off: float32's lowest number times log2(e) is infinite
            score = tl.where(seen, tl.dot(x, y) * SCALE + bias, float("-inf"))
        else:
            score = tl.where(seen, tl.dot(x, y) * (SCALE * 1.4426950408889634), float("-inf"))
        top = tl.max(score, 1)
        if SAFE:  # a row without any key is 0, else NaN
            top = tl.where(top == float("-inf"), 0.0, top)
        if ADDED0 == 1:
            weight = tl.exp2((score - top[:, None]) * 1.4426950408889634)
        else:
            weight = tl.exp2(score - top[:, None])
        total = tl.sum(weight, 1)
        if SAFE:
            total = tl.where(total == 0.0, 1.0, total)
        acc = tl.dot(weight.to(z.dtype), z) / total[:, None]
        at = ((b * L + m[:, None]) * H + head) * D + d[None, :]
        tl.store(out + at, acc.to(out.dtype.element_ty), mask=x_ok)
'''


@dataclass(frozen=True)
class Tile:
    """Queries of a program, its warps, and how many batch entries it does, one after the other."""

    queries: int
    warps: int
    each: int = 1


def tiles(heads: int, queries: int, processors: int, repeated: int = 1) -> tuple[Tile, ...]:
    """Candidates, the default first; ``heads`` counts those of the whole batch, ``repeated`` the batch entries to which the
    same tensors are added (1: nothing is)."""
    if heads * -(-queries // 64) < processors:
        return (Tile(32, 4), Tile(16, 4))
    found: tuple[Tile, ...] = (Tile(64, 4), Tile(128, 8)) if queries > 64 else (Tile(64, 4), Tile(32, 4))
    for each in (2, 4, 8):  # while there are programs enough
        if repeated >= each and heads * -(-queries // 64) >= 4 * processors * each:
            found += (Tile(64, 4, each),)
    return found
