"""A kernel for groups of a few rows, each times a matrix of its own, where reading the matrices is the work.

`grouped_rows` multiplies on the tensor cores.  A program owns BN columns of one group's result and goes through its rows BM
at a time, which is once for nearly all groups; programs of groups without rows end at once.

Source: grouped matrix products as in MegaBlocks (Gale et al. 2022); tiles measured on an H200 (NOTES.md).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

TEXT = '''
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def grouped_rows(x, w, ends, out, rows, N: tl.constexpr, K: tl.constexpr, XS: tl.constexpr, WIDE: tl.constexpr,
                 PDL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr):
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    BLOCKS: tl.constexpr = (N + BN - 1) // BN
    group = tl.program_id(0) // BLOCKS
    n = tl.program_id(0) % BLOCKS * BN + tl.arange(0, BN)
    # whatever stands there, nothing outside is read or written
    end = tl.minimum(tl.load(ends + group), rows)
    start = tl.maximum(tl.load(ends + group - 1, mask=group > 0, other=0), 0)
    c = tl.arange(0, BK)
    n_ok = n < N
    if WIDE:
        group = group.to(tl.int64)
        n = n.to(tl.int64)
    at_w = w + group * (N * K) + n[None, :] * K + c[:, None]
    for first in range(start, end, BM):
        m = first + tl.arange(0, BM)
        m_ok = m < end
        at_x = x + m[:, None] * XS + c[None, :]
        acc = tl.zeros([BM, BN], tl.float32)
        for i in tl.range((K + BK - 1) // BK, num_stages=STAGES):
            k = i * BK + c
            if K % BK == 0:
                a = tl.load(at_x + i * BK, mask=m_ok[:, None], other=0.0, eviction_policy="evict_last")
                b = tl.load(at_w + i * BK, mask=n_ok[None, :], other=0.0, eviction_policy="evict_first")
            else:
                a = tl.load(at_x + i * BK, mask=m_ok[:, None] & (k < K)[None, :], other=0.0, eviction_policy="evict_last")
                b = tl.load(at_w + i * BK, mask=n_ok[None, :] & (k < K)[:, None], other=0.0, eviction_policy="evict_first")
            acc = tl.dot(a, b, acc)
        tl.store(out + m[:, None] * N + n[None, :], acc.to(out.dtype.element_ty), mask=m_ok[:, None] & n_ok[None, :])
'''


@dataclass(frozen=True)
class Tile:
    """One way to cut the work: columns and depth of a step, warps, steps in flight."""

    bn: int
    bk: int
    warps: int
    stages: int


def tiles(inner: int) -> tuple[Tile, ...]:
    """Candidates, the default first."""
    most = max(16, 1 << (inner - 1).bit_length())
    return tuple(dict.fromkeys(replace(t, bk=min(t.bk, most)) for t in (Tile(32, 256, 2, 3), Tile(64, 128, 4, 4))))
