"""Triton text of cross entropy over rows of logits: loss, and the gradient written over the logits.

One program a row. The first sweep keeps a running maximum and a running sum for each group of 8 neighbours (one
exponential an element and one a group; the groups meet once, at the end); the second sweep rewrites the row. Few wide
programs run at a time and the second sweep goes backwards, so that it finds some of the row (256 KB for 128k words in
bfloat16) in the L2 cache. Whole blocks go without a mask: a mask on a width that is not a multiple of 16 would make
every access one element wide.

Source: the online softmax (Milakov and Gimelshein, arXiv 1805.02867); the gradient in place of the logits as in Liger
Kernel (arXiv 2410.10989).
"""

from __future__ import annotations

# Running maximum and sum of exp(x - maximum) of every group, with one more block x. (Reductions take functions of ours:
# those of triton.language are not interpreted unless TRITON_INTERPRET was set before Triton was imported.)
_TAKE = """\
            parts = tl.reshape(x, (BLOCK // GROUP, GROUP))
            top = tl.maximum(high, tl.reduce(parts, 1, _larger))
            # a group of -inf only: subtracting 0 keeps exp(-inf) = 0, where -inf - -inf would be NaN
            base = tl.where(top == float("-inf"), 0.0, top)
            low = low * tl.exp(high - base) + tl.reduce(tl.exp(parts - base[:, None]), 1, _plus)
            high = top"""

TEXT = '''
import triton
import triton.language as tl


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _plus(a, b):
    return a + b


@triton.jit
def _slope(x, cols, t, lse, share, smoothing, SMOOTH: tl.constexpr):
    """d loss / d x, of a row with target t; share: smoothing over the number of words."""
    g = tl.exp(x - lse)
    if SMOOTH:
        g = g - share
        return tl.where(cols == t, g - (1.0 - smoothing), g)  # (a tile of constants alone would be float32)
    return tl.where(cols == t, g - 1.0, g)


@triton.jit
def cross_entropy_rows(logits, target, scale, losses, units, UNIT: tl.constexpr, row_stride: tl.constexpr,
                       ignore: tl.constexpr, smoothing: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
                       GRADIENT: tl.constexpr):
    """losses[r] of logits[r, :words], words = units * UNIT; with GRADIENT also logits[r] = d(losses[r] * scale) / d logits[r].

    (The number of words is no constant, although it could be: with a constant number of steps Triton 3.6 takes 32
    registers in place of 62, then two programs share a multiprocessor, and their rows do not stay in the L2 cache.)
    """
    WIDE: tl.constexpr = losses.dtype.element_ty
    SMOOTH: tl.constexpr = smoothing != 0
    words = units * UNIT
    share = tl.full((), smoothing, WIDE) / words
    r = tl.program_id(0).to(tl.int64)
    row = logits + r * row_stride
    t = tl.load(target + r)
    whole = words // BLOCK * BLOCK
    span = tl.arange(0, BLOCK)
    if t != ignore:
        high = tl.full((BLOCK // GROUP,), float("-inf"), WIDE)
        low = tl.full((BLOCK // GROUP,), 0.0, WIDE)
        plain = tl.full((BLOCK // GROUP,), 0.0, WIDE)
        for start in range(0, whole, BLOCK):
            x = tl.load(row + start + span).to(WIDE)
<TAKE>
            if SMOOTH:
                plain += tl.reduce(parts, 1, _plus)
        if whole < words:
            cols = whole + span
            x = tl.load(row + cols, mask=cols < words, other=float("-inf")).to(WIDE)
<TAKE>
            if SMOOTH:
                seen = tl.where(cols < words, x, 0.0)
                plain += tl.reduce(tl.reshape(seen, (BLOCK // GROUP, GROUP)), 1, _plus)
        peak = tl.reduce(high, 0, _larger)
        lse = peak + tl.log(tl.reduce(low * tl.exp(high - peak), 0, _plus))
        known = (t >= 0) & (t < words)
        at = tl.load(row + tl.where(known, t, 0)).to(WIDE)
        loss = lse - tl.where(known, at, float("nan"))  # eager stops the device for a target that is no word
        if SMOOTH:
            loss = (1.0 - smoothing) * loss + smoothing * (lse - tl.reduce(plain, 0, _plus) / words)
        tl.store(losses + r, loss)
        if GRADIENT:
            tl.debug_barrier()  # the score of the target is read before it is written over
            factor = tl.load(scale).to(WIDE)
            kind = logits.dtype.element_ty
            # backwards: what was read last is in the cache still
            if whole < words:
                cols = whole + span
                x = tl.load(row + cols, mask=cols < words, other=float("-inf")).to(WIDE)
                g = _slope(x, cols, t, lse, share, smoothing, SMOOTH) * factor
                tl.store(row + cols, g.to(kind), mask=cols < words)
            for done in range(0, whole, BLOCK):
                cols = whole - BLOCK - done + span
                x = tl.load(row + cols).to(WIDE)
                tl.store(row + cols, (_slope(x, cols, t, lse, share, smoothing, SMOOTH) * factor).to(kind))
    else:
        tl.store(losses + r, 0.0)
        if GRADIENT:
            for start in range(0, words, BLOCK):
                cols = start + span
                tl.store(row + cols, tl.full((BLOCK,), 0.0, logits.dtype.element_ty), mask=cols < words)


@triton.jit
def scale_in_place(buffer, factor, units, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    """buffer[: units * UNIT] *= factor, which lies on the device; nothing is touched if it is 1."""
    WIDE: tl.constexpr = tl.float64 if buffer.dtype.element_ty == tl.float64 else tl.float32
    f = tl.load(factor).to(WIDE)
    if f != 1.0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < tl.full((), UNIT, tl.int64) * units
        x = tl.load(buffer + at, mask=inside)
        tl.store(buffer + at, (x.to(WIDE) * f).to(buffer.dtype.element_ty), mask=inside)
'''.replace("<TAKE>", _TAKE)
