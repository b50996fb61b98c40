"""What a form costs against the convolution it stands for: seconds by a model of each machine, for decisions only.

A depthwise convolution reads its input, writes its output and makes ``taps`` products per output; branches are added in one
kernel. What the products cost was measured, µs for 32×256×56×56 on an H200 with ``fusionc::depthwise_conv``, half precision:

    filter          31×31  13×13  31×1  1×31  13×1  1×13  3×3  5×5 dilated
    contiguous        385    199   381    64   198    80   67           91    the row-Toeplitz kernel: rows count, columns hardly
    channels-last     437           135   116              56                 small ones directly, large ones turned round

so that a column filter costs as much as the square there, and low rank pays in channels-last only, at rank 1. What goes to ATen
(float32) takes 7862 for 31×31, 1135 for 31×1, 495 for 1×31, 244 for 3×3; its bilinear interpolation 2894, padding 104.
One thread of our CPU takes for an output in float32, channels-last, 0.4 ns for 3×3, 1.1 for 7×7, 11 for 13×13, 19 for 31×31, 0.8
for 1×31, 1.3 for 31×1; contiguous 3 to 4 for 3×3 to 7×7, 6 to 12 for 13×13, 19 for 1×31, up to 7 for 31×1, 584 for 31×31.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from .build import Geometry
from .forms import Branches, Form, LowRank

WORTH = 0.95  # a form must be at least this much cheaper than the exact one: the model is not better than that


@dataclass(frozen=True)
class Machine:
    """Bytes a second; seconds for an output: by taps, or by rows of the filter (matrix units) but at least ``floor``, and besides
    ``fixed`` or ``turn``; ``slow``: (taps from which the library has no good kernel, seconds a tap then); ``launch``: seconds a
    kernel; ``interpolate``: seconds an output of an interpolation; ``merges``: the depthwise pass makes branches one again where
    one of them covers the others."""

    bandwidth: float
    tap: float
    fixed: float = 0.0
    row: float = math.inf
    floor: float = 0.0
    turn: float = 0.0
    slow: tuple[int, float] = (1 << 30, 0.0)
    launch: float = 1e-6
    interpolate: float = 0.0
    merges: bool = False


_CPU_LAST = Machine(25e9, 0.02e-9)  # one thread
_CPU = Machine(25e9, 0.04e-9, fixed=3e-9, slow=(512, 0.6e-9))
_LIBRARY = Machine(4.2e12, 0.31e-12, fixed=25e-12, launch=2e-6, interpolate=113e-12)
_CONTIGUOUS = Machine(4.2e12, math.inf, row=0.46e-12, floor=1.5e-12, launch=2e-6, interpolate=113e-12, merges=True)
_LAST = Machine(4.2e12, 0.135e-12, row=0.46e-12, turn=2.3e-12, launch=2e-6, interpolate=113e-12, merges=True)


def machine(kind: str, half: bool, last: bool = False, threads: int = 1) -> Machine:
    """The figures for a device type ("cpu", "cuda", …), with or without half precision and channels-last images."""
    if kind == "cpu":
        one = _CPU_LAST if last else _CPU
        return replace(one, bandwidth=one.bandwidth * threads, tap=one.tap / threads, fixed=one.fixed / threads,
                       slow=(one.slow[0], one.slow[1] / threads))  # fmt: skip
    return _LIBRARY if not half else _LAST if last else _CONTIGUOUS


def convolution(m: Machine, size: tuple[int, int], read: float, written: float, bytes_each: int) -> float:
    """Seconds of one depthwise convolution with this filter, for so many elements of input and output."""
    by_rows = max(size[0] * math.ceil(size[1] / 32) * m.row, m.floor) + m.turn
    taps = size[0] * size[1]
    work = min(taps * (m.tap if taps < m.slow[0] else m.slow[1]) + m.fixed, by_rows)
    return m.launch + (read + written) * bytes_each / m.bandwidth + written * work


def exact(m: Machine, g: Geometry, batch: int, image: Sequence[int], bytes_each: int) -> float:
    """Seconds of the convolution as it is."""
    read, written = _counts(g, batch, image)
    return convolution(m, g.kernel, read, written, bytes_each)


def cost(form: Form, m: Machine, g: Geometry, batch: int, image: Sequence[int], bytes_each: int) -> float:
    """Seconds of the form in the place of that convolution."""
    read, written = _counts(g, batch, image)
    if isinstance(form, LowRank):
        half = batch * g.channels * g.output(image)[0] * image[1]
        pair = convolution(m, (g.kernel[0], 1), read, half, bytes_each) + \
            convolution(m, (1, g.kernel[1]), half, written, bytes_each)  # fmt: skip
        square = convolution(m, (form.dense, form.dense), read, written, bytes_each) if form.dense else 0.0
        return form.rank * pair + square + _add(m, form.rank + bool(form.dense), written, bytes_each)
    if isinstance(form, Branches):
        whole = (max(b.reach[0] for b in form.branches), max(b.reach[1] for b in form.branches))
        if m.merges and any(b.reach == whole for b in form.branches):
            return convolution(m, whole, read, written, bytes_each)
        total = 0.0
        for b in form.branches:
            total += convolution(m, b.size, read, written, bytes_each)
            if (b.at[0] + (b.reach[0] - 1) / 2, b.at[1] + (b.reach[1] - 1) / 2) != tuple((k - 1) / 2 for k in g.kernel):
                total += m.launch + 2 * read * bytes_each / m.bandwidth  # a shifted copy
        return total + _add(m, len(form.branches), written, bytes_each)
    total = convolution(m, (form.dense, form.dense), read, written, bytes_each) if form.dense else 0.0
    for taps, factor in form.levels:
        small = read / factor**2
        total += 3 * m.launch + (4 * read + 2 * small) * bytes_each / m.bandwidth  # pad, average, interpolate
        total += written * m.interpolate
        total += convolution(m, (taps, taps), small, small, bytes_each)
    return total + _add(m, bool(form.dense) + len(form.levels), written, bytes_each)


def _add(m: Machine, parts: int, written: float, bytes_each: int) -> float:
    return m.launch + (parts + 1) * written * bytes_each / m.bandwidth if parts > 1 else 0.0


def _counts(g: Geometry, batch: int, image: Sequence[int]) -> tuple[float, float]:
    out = g.output(image)
    return float(batch * g.channels * image[0] * image[1]), float(batch * g.channels * out[0] * out[1])


__all__ = ["WORTH", "Machine", "convolution", "cost", "exact", "machine"]
