"""What a form costs against the convolution it stands for: seconds by a model of each machine, for decisions only.

A depthwise convolution reads its input, writes its output and makes ``taps`` products per output; branches are added in one
kernel. Rates are measured where we could (H200: a K × K filter by the row-Toeplitz kernel took 65 µs + 11.8 µs · K for
32×256×56×56 in half precision, so what counts there is the number of rows; direct kernels reach about half of the peak rate;
one thread of the CPU of our machine: 0.3 ns + 0.02 ns a tap and output in float32).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .build import Geometry
from .forms import Branches, Form, LowRank

WORTH = 0.95  # a form must be at least this much cheaper than the exact one: the model is not better than that


@dataclass(frozen=True)
class Machine:
    """Bytes a second, operations a second, seconds for an output and a filter's row by matrix units, seconds a launch."""

    bandwidth: float
    rate: float
    row: float = math.inf
    launch: float = 1e-6


_CPU = Machine(25e9, 100e9)  # one thread
_GPU = Machine(4.2e12, 31e12, launch=2e-6)
_ROW = 0.46e-12


def machine(kind: str, half: bool, threads: int = 1) -> Machine:
    """The figures for a device type ("cpu", "cuda", …), with or without half precision."""
    if kind == "cpu":
        return Machine(_CPU.bandwidth * threads, _CPU.rate * threads)
    return Machine(_GPU.bandwidth, _GPU.rate, _ROW if half else math.inf, _GPU.launch)


def convolution(m: Machine, size: tuple[int, int], read: float, written: float, bytes_each: int) -> float:
    """Seconds of one depthwise convolution with this filter, for so many elements of input and output."""
    work = min(2 * size[0] * size[1] / m.rate, size[0] * math.ceil(size[1] / 32) * m.row)
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
        return form.rank * pair + _add(m, form.rank, written, bytes_each)
    if isinstance(form, Branches):
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
        total += convolution(m, (taps, taps), small, small, bytes_each)
    return total + _add(m, bool(form.dense) + len(form.levels), written, bytes_each)


def _add(m: Machine, parts: int, written: float, bytes_each: int) -> float:
    return m.launch + (parts + 1) * written * bytes_each / m.bandwidth if parts > 1 else 0.0


def _counts(g: Geometry, batch: int, image: Sequence[int]) -> tuple[float, float]:
    out = g.output(image)
    return float(batch * g.channels * image[0] * image[1]), float(batch * g.channels * out[0] * out[1])


__all__ = ["WORTH", "Machine", "convolution", "cost", "exact", "machine"]
