"""Triton texts of convolutions with filters of their own for each example: implicit products on matrix instructions.

For one example (a group of the grouped convolution) the result is a product

    y[o, p] = Σₖ w[o, k] x[k, p]        k = (channel, tap),  p = (line, column) of the result

whose right side, the patches, is never stored: a program owns BO × BP places of one example's result, walks along k and
finds each x[k, p] in the image, zero outside of it. Which taps of a pixel lie inside of the image is one bit each of an
integer, made once: a step then shifts instead of comparing lines and columns of BK × BP elements.

direct  reads images [C, H, W] and filters [O, C, kh, kw] as they are, in the filters' own order of k: a row of w is dense,
        a row of patches runs along the pixels; shifted by a tap it is not aligned, so its elements are loaded one by one.
        A 1×1 filter has neither shifts nor borders: this is the batched product, with an epilogue.
turned  reads images [H, W, C] (``depthwise_conv.TURN`` makes the copy), a tap after the other, so that all loads are
        asynchronous copies of 16 bytes; filters are re-laid, too, or (``SC`` > 1) gathered from the cache, taps innermost,
        where there are more of them than pixels.
finish  adds the bias and applies the activation in place: what the library's convolution leaves undone.

Source: implicit GEMM as in Chetlur et al., cuDNN (arXiv 1410.0759); Yang et al., CondConv (arXiv 1904.04971) for why.
"""

from __future__ import annotations

from .depthwise_conv import ACTIVATE

TAPS = '''

@triton.jit
def taps_inside(p, H: tl.constexpr, W: tl.constexpr, P: tl.constexpr, OW: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
                SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr):
    """Bit t of the result: does tap t of pixel p lie inside of the image?"""
    row = p // OW * SH - PH
    column = p % OW * SW - PW
    bits = tl.full(p.shape, 0, tl.int32)
    for t in tl.static_range(KH * KW):
        h = row + t // KW * DH
        v = column + t % KW * DW
        bits |= ((h >= 0) & (h < H) & (v >= 0) & (v < W)).to(tl.int32) << t
    return tl.where(p < P, bits, 0)
'''

_KEEP = '''

@triton.jit
def keep(y, bias, total, g, o, p, O: tl.constexpr, P: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr):
    """The end of both kernels: bias, activation, one rounding."""
    if BIAS:
        total += tl.load(bias + g * O + o, mask=o < O, other=0.0).to(tl.float32)[:, None]
    place = y + g * (O * P) + o[:, None] * P + p[None, :]
    tl.store(place, activate(total, ACTIVATION).to(y.dtype.element_ty), mask=(o < O)[:, None] & (p < P)[None, :])
'''

DIRECT = ACTIVATE + TAPS + _KEEP + '''

@triton.jit
def patches(image, at, bits, n, p, K: tl.constexpr, P: tl.constexpr, H: tl.constexpr, W: tl.constexpr, KH: tl.constexpr,
            KW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr, BORDERED: tl.constexpr, TAIL: tl.constexpr):
    """x[k, p] for rows n of k; those from K on are zeros (TAIL: are there any?)."""
    if KH * KW == 1:
        right = image + (n * (H * W))[:, None] + at[None, :]
        inside = ((bits & 1) != 0 if BORDERED else p < P)[None, :]
        if TAIL:
            inside = inside & (n < K)[:, None]
    else:
        t = n % (KH * KW)
        right = image + (n // (KH * KW) * (H * W) + t // KW * (DH * W) + t % KW * DW)[:, None] + at[None, :]
        if BORDERED:
            if TAIL:
                t = tl.where(n < K, t, 31)  # no tap has that bit
            inside = ((bits[None, :] >> t[:, None]) & 1) != 0
        else:
            inside = (p < P)[None, :]
            if TAIL:
                inside = inside & (n < K)[:, None]
    return tl.load(right, mask=inside, other=0.0)


@triton.jit
def direct(x, w, bias, y, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, O: tl.constexpr, OH: tl.constexpr,
           OW: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr,
           PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr, AHEAD: tl.constexpr, BO: tl.constexpr, BP: tl.constexpr,
           BK: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr):
    """AHEAD: a step loads the next step's patches while its product runs, for they are no asynchronous copies."""
    P: tl.constexpr = OH * OW
    K: tl.constexpr = C * KH * KW
    high: tl.constexpr = (O + BO - 1) // BO
    wide: tl.constexpr = (P + BP - 1) // BP
    pid = tl.program_id(0)
    o = pid % high * BO + tl.arange(0, BO)
    p = pid // high % wide * BP + tl.arange(0, BP)
    g = (pid // (high * wide)).to(tl.int64)
    k = tl.arange(0, BK)
    left = w + g * (O * K) + o[:, None] * K + k[None, :]
    image = x + g * (C * H * W)
    same: tl.constexpr = SH == 1 and SW == 1 and OW == W
    bordered: tl.constexpr = PH > 0 or PW > 0
    at = p - (PH * W + PW) if same else (p // OW * SH - PH) * W + p % OW * SW - PW
    bits = taps_inside(p, H, W, P, OW, KH, KW, SH, SW, PH, PW, DH, DW) if bordered else p
    total = tl.full((BO, BP), 0.0, tl.float32)
    if AHEAD:
        b = patches(image, at, bits, k, p, K, P, H, W, KH, KW, DH, DW, bordered, K < BK)
    for start in range(0, K, BK):
        if K % BK == 0:
            a = tl.load(left) if O % BO == 0 else tl.load(left, mask=(o < O)[:, None], other=0.0)
        else:
            a = tl.load(left, mask=(o < O)[:, None] & (k < K - start)[None, :], other=0.0)
        if AHEAD:
            following = patches(image, at, bits, start + BK + k, p, K, P, H, W, KH, KW, DH, DW, bordered, True)
            total = tl.dot(a, b, total, input_precision=PRECISION)
            b = following
        else:
            b = patches(image, at, bits, start + k, p, K, P, H, W, KH, KW, DH, DW, bordered, K % BK != 0)
            total = tl.dot(a, b, total, input_precision=PRECISION)
        left += BK
    keep(y, bias, total, g, o, p, O, P, BIAS, ACTIVATION)
'''

TURNED = ACTIVATE + TAPS + _KEEP + '''

@triton.jit
def turned(x, w, bias, y, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, O: tl.constexpr, OH: tl.constexpr,
           OW: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr,
           PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr, ST: tl.constexpr, SC: tl.constexpr, BO: tl.constexpr,
           BP: tl.constexpr, BK: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr):
    """x [G, H, W, C]; in w a tap is ST and a channel SC elements from the next."""
    P: tl.constexpr = OH * OW
    T: tl.constexpr = KH * KW
    blocks: tl.constexpr = (C + BK - 1) // BK
    high: tl.constexpr = (O + BO - 1) // BO
    wide: tl.constexpr = (P + BP - 1) // BP
    pid = tl.program_id(0)
    o = pid % high * BO + tl.arange(0, BO)
    p = pid // high % wide * BP + tl.arange(0, BP)
    g = (pid // (high * wide)).to(tl.int64)
    k = tl.arange(0, BK)
    left = w + g * (O * C * T) + o[:, None] * (C * T) + k[None, :] * SC
    pixels = (p // OW * SH - PH) * W + p % OW * SW - PW
    right = x + g * (H * W * C) + pixels[:, None] * C + k[None, :]
    bits = taps_inside(p, H, W, P, OW, KH, KW, SH, SW, PH, PW, DH, DW)
    total = tl.full((BO, BP), 0.0, tl.float32)
    for step in range(0, T * blocks):
        if SC == 1:
            t = step // blocks
            c = step % blocks * BK
        else:  # what a line of the cache holds is used while it is there
            t = step % T
            c = step // T * BK
        inside = ((bits >> t) & 1) != 0
        shift = (t // KW * (DH * W) + t % KW * DW) * C + c
        if C % BK == 0:
            a = tl.load(left + (t * ST + c * SC), mask=(o < O)[:, None], other=0.0)
            b = tl.load(right + shift, mask=inside[:, None], other=0.0)
        else:
            left_over = k < C - c
            a = tl.load(left + (t * ST + c * SC), mask=(o < O)[:, None] & left_over[None, :], other=0.0)
            b = tl.load(right + shift, mask=inside[:, None] & left_over[None, :], other=0.0)
        total = tl.dot(a, tl.trans(b), total, input_precision=PRECISION)
    keep(y, bias, total, g, o, p, O, P, BIAS, ACTIVATION)
'''

FINISH = ACTIVATE + '''

@triton.jit
def finish(y, bias, planes, P: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr):
    """y[plane, P] = activation(y + bias[plane])."""
    wide: tl.constexpr = (P + BP - 1) // BP
    c = tl.program_id(0) // wide * BC + tl.arange(0, BC)
    p = tl.program_id(0) % wide * BP + tl.arange(0, BP)
    place = y + c.to(tl.int64)[:, None] * P + p[None, :]
    ok = (c < planes)[:, None] & (p < P)[None, :]
    value = tl.load(place, mask=ok).to(tl.float32)
    if BIAS:
        value += tl.load(bias + c, mask=c < planes, other=0.0).to(tl.float32)[:, None]
    tl.store(place, activate(value, ACTIVATION).to(y.dtype.element_ty), mask=ok)
'''
