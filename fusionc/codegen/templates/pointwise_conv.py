"""A kernel for relu(x W + b + z) of many rows, W small: a 1×1 convolution of channels-last images that ends a residual block.

A program owns BM rows and BN columns. Programs of one block of rows follow each other, so that x comes from memory once;
z is read, and the result written, once and by one program only: they may be the same tensor.

Source: the blocked product of Triton's tutorial; which tiles, by counting bytes in flight (ResNet-50's shapes are bound by
memory: 4 × 64 to 512 columns of x against 256 to 2048 of z and of the result).
"""

from __future__ import annotations

from dataclasses import dataclass

TEXT = '''
import triton
import triton.language as tl


@triton.jit
def pointwise(x, w, bias, z, out, M, N: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
              BK: tl.constexpr, STAGES: tl.constexpr):
    TN: tl.constexpr = N // BN
    pid = tl.program_id(0)
    n = pid % TN * BN + tl.arange(0, BN)
    m = pid // TN * BM + tl.arange(0, BM)
    ok = (m < M)[:, None]
    row = m.to(tl.int64)[:, None]
    k = tl.arange(0, BK)
    acc = tl.full([BM, BN], 0.0, tl.float32)
    at_x = x + row * K + k[None, :]
    at_w = w + n[None, :] * K + k[:, None]
    for i in tl.range(K // BK, num_stages=STAGES):
        acc = tl.dot(tl.load(at_x, mask=ok, other=0.0), tl.load(at_w), acc)
        at_x += BK
        at_w += BK
    at = row * N + n[None, :]
    acc += tl.load(bias + n).to(tl.float32)[None, :]
    acc += tl.load(z + at, mask=ok, other=0.0).to(tl.float32)
    tl.store(out + at, tl.where(acc < 0.0, 0.0, acc).to(out.dtype.element_ty), mask=ok)  # keeps NaN
'''


@dataclass(frozen=True)
class Tile:
    """Rows, columns, depth of a step, warps, steps in flight."""

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int


def tiles(width: int, inner: int) -> tuple[Tile, ...]:
    """Candidates for N = width and K = inner, a good default first; none where they are no multiples of 64."""
    if width % 64 or inner % 64:
        return ()
    found = [Tile(128, 64, 64, 4, 3)]
    if width % 128 == 0:
        found.insert(0 if inner >= 256 else 1, Tile(128, 128, 64, 8, 3))
    return tuple(found)
