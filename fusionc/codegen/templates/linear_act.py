"""Triton text of a linear layer with its activation: tiles on matrix instructions, the activation on the accumulator.

A program owns BM × BN places of the result and walks along K. Programs of one row of tiles follow each other, so that the
rows of x come from memory once and then from the L2 cache, where the whole weight lies anyway.

Source: Triton's matrix multiplication tutorial; the pipeline is Triton's (``num_stages``).
"""

from __future__ import annotations

from .depthwise_conv import ACTIVATE

TEXT = ACTIVATE + '''

@triton.jit
def linear(x, w, scale, bias, y, M, LINE: tl.constexpr, N: tl.constexpr, K: tl.constexpr, BM: tl.constexpr,
           BN: tl.constexpr, BK: tl.constexpr, SCALE: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr):
    """y[M, N] = activation(scale[N] · (x[M, K] @ w[N, K]ᵀ) + bias[N]); rows of x lie LINE apart."""
    tiles: tl.constexpr = (N + BN - 1) // BN
    pid = tl.program_id(0)
    rows = pid // tiles * BM + tl.arange(0, BM)
    columns = pid % tiles * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    left = x + rows.to(tl.int64)[:, None] * LINE + k[None, :]
    right = w + columns[None, :] * K + k[:, None]
    total = tl.full((BM, BN), 0.0, tl.float32)
    for start in range(0, K, BK):
        if K % BK == 0:
            a = tl.load(left, mask=(rows < M)[:, None], other=0.0)
            b = tl.load(right) if N % BN == 0 else tl.load(right, mask=(columns < N)[None, :], other=0.0)
        else:
            inside = k < K - start
            a = tl.load(left, mask=(rows < M)[:, None] & inside[None, :], other=0.0)
            b = tl.load(right, mask=(columns < N)[None, :] & inside[:, None], other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
        left += BK
        right += BK
    if SCALE:
        total *= tl.load(scale + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    if BIAS:
        total += tl.load(bias + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    place = y + rows.to(tl.int64)[:, None] * N + columns[None, :]
    tl.store(place, activate(total, ACTIVATION).to(y.dtype.element_ty), mask=(rows < M)[:, None] & (columns < N)[None, :])
'''
