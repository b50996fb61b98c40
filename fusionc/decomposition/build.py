"""How a form runs: torch calls through a hook that either makes them or writes them into a graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .forms import Branch, Branches, Form, LowRank, centred

Call = Callable[..., Any]  # call(function, *args, **kwargs)


@dataclass(frozen=True)
class Geometry:
    """A depthwise convolution's fixed arguments: kernel sides, stride, padding, dilation, channels."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    channels: int

    def output(self, image: Sequence[int]) -> tuple[int, int]:
        """Sides of the result for an image of these sides."""
        a, b = ((n + 2 * p - d * (k - 1) - 1) // s + 1
                for n, k, s, p, d in zip(image, self.kernel, self.stride, self.padding, self.dilation))  # fmt: skip
        return a, b


def run(form: Form, g: Geometry, x: Any, pieces: Sequence[Any], bias: Any, call: Call, image: Sequence[int] = ()) -> Any:
    """The form's result on ``x`` [N, C, H, W] with filters ``pieces`` (see ``fit.filters``) and ``bias`` ([C] or None).

    ``image``: H and W, needed for recursive forms only. Same zero padding at the border as the convolution it stands for.
    """
    if isinstance(form, LowRank):
        parts = []
        for i, (column, row) in enumerate(zip(pieces[: 2 * form.rank : 2], pieces[1 : 2 * form.rank : 2])):
            half = call(torch.conv2d, x, column, None, (g.stride[0], 1), (g.padding[0], 0), (g.dilation[0], 1), g.channels)
            parts.append(call(torch.conv2d, half, row, bias if i == 0 else None, (1, g.stride[1]), (0, g.padding[1]),
                              (1, g.dilation[1]), g.channels))  # fmt: skip
        if form.dense:
            parts.append(_branch(centred(g.kernel, (form.dense, form.dense)), g, x, pieces[-1], None, call))
        return _sum(parts, call)
    if isinstance(form, Branches):
        return _sum([_branch(b, g, x, p, bias if i == 0 else None, call) for i, (b, p) in
                     enumerate(zip(form.branches, pieces))], call)  # fmt: skip
    rest = list(pieces)
    parts = []
    if form.dense:
        side = form.dense // 2
        parts.append(call(torch.conv2d, x, rest.pop(0), bias, 1, (side, side), 1, g.channels))
    for (taps, factor), piece in zip(form.levels, rest):
        parts.append(_level(taps, factor, g, x, piece, image, call))
    out = _sum(parts, call)
    if bias is not None and not form.dense:
        out = call(torch.add, out, call(torch.reshape, bias, (1, g.channels, 1, 1)))
    return out


def _sum(parts: Sequence[Any], call: Call) -> Any:
    total = parts[0]
    for part in parts[1:]:
        total = call(torch.add, total, part)
    return total


def _branch(b: Branch, g: Geometry, x: Any, weight: Any, bias: Any, call: Call) -> Any:
    """One filter at its place in the kernel: the zeros around the image move with it (and where they are negative, it is cut)."""
    before = [p - a * d for p, a, d in zip(g.padding, b.at, g.dilation)]
    after = [p - (k - a - r) * d for p, k, a, r, d in zip(g.padding, g.kernel, b.at, b.reach, g.dilation)]
    dilation = (b.dilation[0] * g.dilation[0], b.dilation[1] * g.dilation[1])
    if before == after and min(before) >= 0:
        return call(torch.conv2d, x, weight, bias, g.stride, tuple(before), dilation, g.channels)
    padded = call(torch.nn.functional.pad, x, [before[1], after[1], before[0], after[0]])
    return call(torch.conv2d, padded, weight, bias, g.stride, (0, 0), dilation, g.channels)


def _level(taps: int, factor: int, g: Geometry, x: Any, weight: Any, image: Sequence[int], call: Call) -> Any:
    """Average ``factor`` × ``factor`` pixels, filter, interpolate back. Zeros around make the rim like all else."""
    lead = factor + factor * (taps // 2)
    pads: list[int] = []
    for n in reversed(list(image)):  # the last axis comes first in a padding
        blocks = (n - 1 + factor) // factor + 2 + taps - 1  # of the averaged image
        pads += [lead, factor * blocks - n - lead]
    padded = call(torch.nn.functional.pad, x, pads)
    small = call(torch.nn.functional.avg_pool2d, padded, factor)
    made = call(torch.conv2d, small, weight, None, 1, 0, 1, g.channels)
    wide = call(torch.nn.functional.interpolate, made, scale_factor=factor, mode="bilinear", align_corners=False)
    for axis, n in zip((2, 3), image):
        wide = call(torch.narrow, wide, axis, factor, n)
    return wide


def plain(function: Any, *args: Any, **kwargs: Any) -> Any:
    """The hook that makes the calls."""
    return function(*args, **kwargs)


__all__ = ["Geometry", "plain", "run"]
