"""Triton texts of grouped convolutions of channels-last images: an implicit product on matrix instructions for each group.

    y[q, g O + o] = Σₜ Σ_c x[q shifted by tap t, g C + c] w[g O + o, c, t]        q = (image, line, column) of the result

grouped  a program owns BP pixels of one group's BO channels. A group's channels of one pixel lie side by side, so a tap's
         patch is BP short rows; neighbouring programs take the other groups of the same pixels, whose rows lie in the same lines
         of the cache. With UNROLL the taps' patches come through the L1 cache, which their overlap lies in, else as asynchronous
         copies. Which taps of a pixel lie inside of the image is one bit each, as in ``per_example_conv``.
finish   adds the bias and applies the activation in place: what the library's convolution leaves undone.

Source: implicit GEMM as in Chetlur et al., cuDNN (arXiv 1410.0759); ResNeXt (arXiv 1611.05431) and RegNet (arXiv 2003.13678)
for the shapes.
"""

from __future__ import annotations

from .depthwise_conv import ACTIVATE
from .per_example_conv import TAPS

GROUPED = ACTIVATE + TAPS + '''

@triton.jit
def add_step(acc, right, left, bits, k, o, step, C: tl.constexpr, W: tl.constexpr, O: tl.constexpr, G: tl.constexpr,
             KW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr, WC: tl.constexpr, WT: tl.constexpr, BK: tl.constexpr):
    """The product of one tap and BK channels."""
    blocks: tl.constexpr = (C + BK - 1) // BK
    t = step // blocks
    c = step % blocks * BK
    inside = ((bits >> t) & 1) != 0
    shift = (t // KW * (DH * W) + t % KW * DW) * (G * C) + c
    a = tl.load(right + shift, mask=inside[:, None] & (k < C - c)[None, :], other=0.0)
    b = tl.load(left + (t * WT + c * WC), mask=(k < C - c)[:, None] & (o < O)[None, :], other=0.0)
    return tl.dot(a, b, acc)


@triton.jit
def grouped(x, w, bias, y, total, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, O: tl.constexpr, OH: tl.constexpr,
            OW: tl.constexpr, G: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
            PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr, WO: tl.constexpr, WC: tl.constexpr,
            WT: tl.constexpr, BP: tl.constexpr, BO: tl.constexpr, BK: tl.constexpr, UNROLL: tl.constexpr, BIAS: tl.constexpr,
            ACTIVATION: tl.constexpr):
    """In w an output is WO, a channel WC and a tap WT elements from the next."""
    P: tl.constexpr = OH * OW
    blocks: tl.constexpr = (C + BK - 1) // BK
    high: tl.constexpr = (O + BO - 1) // BO
    pid = tl.program_id(0)
    g = pid % G
    o = pid // G % high * BO + tl.arange(0, BO)
    q = pid // (G * high) * BP + tl.arange(0, BP)
    k = tl.arange(0, BK)
    p = tl.where(q < total, q % P, P)
    pixels = q // P * (H * W) + (p // OW * SH - PH) * W + p % OW * SW - PW
    bits = taps_inside(p, H, W, P, OW, KH, KW, SH, SW, PH, PW, DH, DW)
    right = x + pixels[:, None] * (G * C) + (g * C + k)[None, :]
    left = w + (g * O + o)[None, :] * WO + k[:, None] * WC
    acc = tl.full((BP, BO), 0.0, tl.float32)
    if UNROLL:
        for step in tl.static_range(KH * KW * blocks):
            acc = add_step(acc, right, left, bits, k, o, step, C, W, O, G, KW, DH, DW, WC, WT, BK)
    else:
        for step in range(0, KH * KW * blocks):
            acc = add_step(acc, right, left, bits, k, o, step, C, W, O, G, KW, DH, DW, WC, WT, BK)
    if BIAS:
        acc += tl.load(bias + g * O + o, mask=o < O, other=0.0).to(tl.float32)[None, :]
    place = y + q[:, None] * (G * O) + (g * O + o)[None, :]
    tl.store(place, activate(acc, ACTIVATION).to(y.dtype.element_ty), mask=(q < total)[:, None] & (o < O)[None, :])
'''

FINISH = ACTIVATE + '''

@triton.jit
def finish(y, bias, count, C: tl.constexpr, BLOCK: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr):
    """y[pixel, C] = activation(y + bias[C]), of ``count`` elements."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(y + at, mask=at < count).to(tl.float32)
    if BIAS:
        value += tl.load(bias + at % C, mask=at < count, other=0.0).to(tl.float32)
    tl.store(y + at, activate(value, ACTIVATION).to(y.dtype.element_ty), mask=at < count)
'''
