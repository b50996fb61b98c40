"""Which sums of exponentials can be taken in the pass that finds their maximum.

    m = max_r b(r)        s = Σ_r exp(b(r) - m)

needs one pass: whenever the running maximum grows from m to m', the running sum is scaled by exp(m - m').  With whole
tiles compared before the scale is applied, that costs little more than one exponential an element.

Source: M. Milakov, N. Gimelshein, "Online normalizer calculation for softmax", 2018 (arXiv:1805.02867).
"""

from __future__ import annotations

from .expr import Op, Reduce
from .loop import Kernel


def online_pairs(kernel: Kernel) -> dict[Reduce, Reduce]:
    """Sum → maximum for every second-level reduction over the axis; empty unless each is such a sum.

    Unless all are, the second pass is needed anyway.
    """
    second = [r for r in kernel.reductions if r.level == 2]
    out: dict[Reduce, Reduce] = {}
    for r in second:
        top = _maximum(r)
        if top is None:
            return {}
        out[r] = top
    return out


def _maximum(r: Reduce) -> Reduce | None:
    """The maximum m of b, where r is Σ exp(b - m) in float32."""
    e = r.body
    if r.kind != "sum" or r.dtype != "f32" or not isinstance(e, Op) or e.name != "exp":
        return None
    d = e.args[0]
    if not isinstance(d, Op) or d.name != "sub":
        return None
    b, m = d.args
    return m if isinstance(m, Reduce) and m.kind == "max" and m.body is b and m.vars == r.vars else None
