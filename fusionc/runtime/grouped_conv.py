"""Launching grouped convolutions of channels-last images: which kernel, with which tiles, by measurement.

A candidate is ("library",) or ("grouped", unroll, BP, BO, BK, warps, stages), see ``codegen/templates/grouped_conv.py``. The
library comes first: it stays unless another is clearly faster.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..codegen.templates import grouped_conv as template
from ..ops.activation import activate_
from ..ops.layout import out_sizes
from .templates import Start
from .tune import Wanted, fastest

Candidate = tuple[Any, ...]
Run = Callable[[Tensor, Tensor, Tensor | None], Tensor]

DTYPES = (torch.bfloat16, torch.float16)
_LARGEST = 1 << 31  # elements of x and y: offsets are 32 bits wide
_TAPS = 31  # bits of an integer, but for the sign
_UNROLLED = 32  # steps that are written out
_BLOCK = 2048  # elements that a program of ``finish`` takes


@dataclass(frozen=True)
class Shape:
    """One call, but for its tensors. ``channels`` and ``out_channels`` are a group's; ``strides`` the filters' of O, C, taps."""

    images: int
    groups: int
    channels: int
    out_channels: int
    size: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    strides: tuple[int, int, int]
    dtype: torch.dtype
    bias: bool
    activation: str

    @property
    def out(self) -> tuple[int, int]:
        """Lines and columns of the result."""
        height, width = out_sizes(self.size, self.kernel, self.stride, self.padding, self.dilation)
        return height, width

    @property
    def pixels(self) -> int:
        """Those of all results."""
        return self.images * math.prod(self.out)


# -- candidates -------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=512)
def candidates(shape: Shape) -> tuple[Candidate, ...]:
    """Implementations, the default first."""
    taps = math.prod(shape.kernel)
    found: list[Candidate] = [("library",)]
    if taps > _TAPS:
        return tuple(found)
    bk, bo = (min(64, max(16, 1 << (n - 1).bit_length())) for n in (shape.channels, shape.out_channels))
    if taps * -(-shape.channels // bk) <= _UNROLLED:
        found += [("grouped", True, 128, bo, bk, 4, 1), ("grouped", True, 256, bo, bk, 8, 1)]
    return (*found, ("grouped", False, 128, bo, bk, 4, 3))


# -- launches ---------------------------------------------------------------------------------------------------------


def launch(how: Candidate, shape: Shape, x: Tensor, weight: Tensor, bias: Tensor | None, *, interpret: bool = False) -> Tensor:
    """Run one candidate; x is channels-last, the filters have the strides of the shape."""
    return _plan(how, shape, None if interpret else x.device)[0](x, weight, bias)


def prepare(how: Candidate, shape: Shape, device: torch.device) -> None:
    """Compile the kernel of one candidate without running it; no memory of the device is used."""
    start = _plan(how, shape, device)[1]
    if start is not None:
        start.prepare()


@functools.lru_cache(maxsize=1024)
def _plan(how: Candidate, shape: Shape, device: torch.device | None) -> tuple[Run, Start | None]:
    """What runs, and the kernel that it starts."""
    (oh, ow), width = shape.out, shape.groups * shape.out_channels
    word = shape.activation
    if how[0] == "library":
        finish = None
        if shape.bias or word:
            elements = shape.pixels * width
            finish = Start(template.FINISH, "finish", (shape.dtype,) * 2, -(-elements // _BLOCK), device, numbers=(elements,),
                           warps=4, early=True, C=width, BLOCK=_BLOCK, BIAS=shape.bias, ACTIVATION=word)  # fmt: skip
        return partial(_finished, shape, finish), finish
    _, unroll, bp, bo, bk, warps, stages = how
    (kh, kw), (sh, sw), (ph, pw), (dh, dw) = shape.kernel, shape.stride, shape.padding, shape.dilation
    programs = shape.groups * -(-shape.out_channels // bo) * -(-shape.pixels // bp)
    conv = Start(
        template.GROUPED, "grouped", (shape.dtype,) * 4, programs, device, numbers=(shape.pixels,), warps=warps, stages=stages,
        early=True, C=shape.channels, H=shape.size[0], W=shape.size[1], O=shape.out_channels, OH=oh, OW=ow, G=shape.groups,
        KH=kh, KW=kw, SH=sh, SW=sw, PH=ph, PW=pw, DH=dh, DW=dw, **dict(zip(("WO", "WC", "WT"), shape.strides)), BP=bp, BO=bo,
        BK=bk, UNROLL=unroll, BIAS=shape.bias, ACTIVATION=word,
    )  # fmt: skip

    def run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = torch.empty((shape.images, width, oh, ow), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        conv(x, weight, weight if bias is None else bias, y)
        return y

    return run, conv


def _finished(shape: Shape, finish: Start | None, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The library's convolution, then what it leaves undone in one pass over the result."""
    y = _convolution(shape, x, weight, None)
    if finish is not None:
        finish(y, y if bias is None else bias)
    return y


def _convolution(shape: Shape, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = torch.ops.aten.convolution(x, weight, bias, shape.stride, shape.padding, shape.dilation, False, [0, 0], shape.groups)
    return y.contiguous(memory_format=torch.channels_last)


def library(x: Tensor, weight: Tensor, bias: Tensor | None, shape: Shape) -> Tensor:
    """ATen's convolution, then the activation in place."""
    return activate_(_convolution(shape, x, weight, bias), shape.activation)


# -- the operator -----------------------------------------------------------------------------------------------------


def grouped_conv(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int],
                 dilation: Sequence[int], groups: int, activation: str) -> Tensor:  # fmt: skip
    """fusionc::grouped_conv on a GPU: the fastest candidate for this shape."""
    x = x.contiguous(memory_format=torch.channels_last)
    shape, at = _call(x.shape, weight.shape, weight.stride(), x.dtype, bias is not None, *stride, *padding, *dilation, groups,
                      activation, x.device)  # fmt: skip
    bias = bias if bias is None else bias.contiguous()
    if at is None or weight.dtype != x.dtype or bias is not None and bias.dtype != x.dtype:
        return library(x, weight, bias, shape)

    return fastest(at, lambda how, *given: launch(how, shape, *given), partial(library, shape=shape), x, weight, bias)


def wanted(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int],
           dilation: Sequence[int], groups: int, activation: str) -> Wanted | None:  # fmt: skip
    """What `grouped_conv` will choose from, by tensors without data; None where that is ATen."""
    return _call(x.shape, weight.shape, weight.stride(), x.dtype, bias is not None, *stride, *padding, *dilation, groups,
                 activation, x.device)[1]  # fmt: skip


@functools.lru_cache(maxsize=1024)
def _call(size: tuple[int, ...], filters: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, bias: bool, sh: int,
          sw: int, ph: int, pw: int, dh: int, dw: int, groups: int, activation: str,
          device: torch.device) -> tuple[Shape, Wanted | None]:  # fmt: skip
    """What a call of `grouped_conv` can do; None: only ATen."""
    (images, _, h, w), (out, inner, kh, kw) = size, filters
    shape = Shape(images, groups, inner, out // groups, (h, w), (kh, kw), (sh, sw), (ph, pw), (dh, dw),
                  (strides[0], strides[1], strides[3] if kw > 1 else strides[2]), dtype, bias, activation)  # fmt: skip
    even = kh == 1 or kw == 1 or strides[2] == kw * strides[3]  # taps at equal steps
    largest = max(math.prod(size), shape.pixels * out)
    if 0 in (*size, *filters) or min(shape.out) <= 0 or largest >= _LARGEST or dtype not in DTYPES or not even:
        return shape, None
    return shape, Wanted(f"grouped_conv {shape}", candidates(shape), partial(prepare, shape=shape, device=device))
