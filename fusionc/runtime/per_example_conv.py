"""Launching convolutions with filters for each example: which kernel, with which tiles, by measurement.

A candidate is ("library",), ("bmm",), ("direct", ahead, BO, BP, BK, warps, stages) or ("turned", relaid, BO, BP, BK, warps,
stages): the last copies the images to [H, W, C] first, and with ``relaid`` the filters to [O, kh kw, C]; ``ahead``: patches
are loaded one step ahead. The library comes first: it stays unless another is clearly faster.
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

from ..codegen.templates import depthwise_conv as shared
from ..codegen.templates import per_example_conv as template
from ..ops.activation import activate_
from ..ops.layout import out_sizes
from .templates import Start
from .tune import Wanted, fastest

Candidate = tuple[Any, ...]
Run = Callable[[Tensor, Tensor, Tensor | None], Tensor]
Plan = tuple[Run, tuple[Start, ...]]  # what runs, and the kernels that it starts

_HALF = (torch.bfloat16, torch.float16)
_LARGEST = 1 << 30  # elements of one example: offsets inside of it are 32 bits wide
_TAPS = 31  # bits of an integer, but for the sign
_MULTIPROCESSORS = 132
_TILES = ((128, 128, 8), (128, 64, 4), (64, 128, 4), (64, 64, 4))  # BO, BP, warps


@dataclass(frozen=True)
class Shape:
    """One call, but for its tensors. ``channels`` and ``out_channels`` are one example's; ``precision`` that of float32."""

    examples: int
    channels: int
    out_channels: int
    size: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    dtype: torch.dtype
    bias: bool
    activation: str
    precision: str = "ieee"

    @property
    def out(self) -> tuple[int, int]:
        """Lines and columns of the result."""
        height, width = out_sizes(self.size, self.kernel, self.stride, self.padding, self.dilation)
        return height, width

    @property
    def product(self) -> bool:
        """Is it a batched product of matrices as it is?"""
        return self.kernel == self.stride == (1, 1) and self.padding == (0, 0)


# -- candidates -------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=512)
def candidates(shape: Shape, bmm: bool = True) -> tuple[Candidate, ...]:
    """Implementations, the default first. ``bmm``: torch's product keeps the precision that is asked for."""
    found: list[Candidate] = [("library",)]
    taps, half = math.prod(shape.kernel), shape.dtype in _HALF
    if shape.product and bmm:
        found.append(("bmm",))
    if taps > _TAPS:
        return tuple(found)
    if not half and shape.precision == "ieee":  # no matrix instructions: small tiles, for all operands are in registers
        return (*found, ("direct", False, 64, 64, 16, 4, 2), ("direct", False, 32, 64, 16, 4, 2))
    depth = 64 if half and shape.channels * taps > 32 else 32
    for i, (bo, bp, warps) in enumerate(_tiles(shape, 64 if shape.product else 160)):
        alone = half and not shape.product  # elements of 2 bytes at odd places: no asynchronous copies
        found += [("direct", ahead, bo, bp, depth, warps, 3) for ahead in ((True, False) if alone and i == 0 else (alone,))]
    if taps > 1 and shape.channels % (8 if half else 4) == 0:
        image, filters = shape.channels * math.prod(shape.size), shape.out_channels * shape.channels * taps
        depth = min(depth, max(16, _power(shape.channels)))
        tiles = _tiles(shape, 64)
        found += [("turned", True, bo, bp, depth, warps, 4) for bo, bp, warps in tiles]
        if filters > image:  # then a copy of the filters takes longer than that of the images
            found.append(("turned", False, *tiles[0][:2], depth, tiles[0][2], 3))
    return tuple(found)


def _tiles(shape: Shape, patches: int) -> list[tuple[int, int, int]]:
    """The two best tiles by a model: in products of one multiprocessor, what a row of w (64) and one of patches cost to load.

    64 is 2 bytes at 64 bytes a cycle from the L2 cache, beside about 2100 products; patches that are loaded element by element
    take the instructions of that element on top.
    """
    pixels = math.prod(shape.out)

    def cost(tile: tuple[int, int, int]) -> float:
        bo, bp, _ = tile
        programs = shape.examples * -(-shape.out_channels // bo) * -(-pixels // bp)
        return -(-programs // _MULTIPROCESSORS) * (bo * bp + 64 * bo + patches * bp)

    fitting = [t for t in _TILES if t[0] <= max(64, _power(shape.out_channels)) and t[1] <= max(64, _power(pixels))]
    return sorted(fitting, key=cost)[:2]


def _power(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


# -- launches ---------------------------------------------------------------------------------------------------------


def launch(how: Candidate, shape: Shape, x: Tensor, weight: Tensor, bias: Tensor | None, *, interpret: bool = False) -> Tensor:
    """Run one candidate. All tensors are contiguous."""
    return _plan(how, shape, None if interpret else x.device)[0](x, weight, bias)


def prepare(how: Candidate, shape: Shape, device: torch.device) -> None:
    """Compile the kernels of one candidate without running them; no memory of the device is used."""
    for start in _plan(how, shape, device)[1]:
        start.prepare()


@functools.lru_cache(maxsize=1024)
def _plan(how: Candidate, shape: Shape, device: torch.device | None) -> Plan:
    if how[0] in ("library", "bmm"):
        finish = _finish(shape, device) if shape.bias or shape.activation else None
        product = _bmm if how[0] == "bmm" else _convolution
        return partial(_finished, shape, product, finish), () if finish is None else (finish,)
    (oh, ow), dtype = shape.out, shape.dtype
    turns: list[tuple[int, Start]] = []  # which argument, and what copies it
    constants: dict[str, Any] = {"AHEAD": how[1]}
    text, name = template.DIRECT, "direct"
    if how[0] == "turned":
        text, name, relaid = template.TURNED, "turned", how[1]
        (h, w), taps, rows = shape.size, math.prod(shape.kernel), shape.examples * shape.out_channels
        turns.append((0, _turn(dtype, shape.examples, shape.channels, h * w, 64, device)))
        if relaid:
            turns.append((1, _turn(dtype, rows, shape.channels, taps, max(8, _power(taps)), device)))
        constants = {"ST": shape.channels if relaid else 1, "SC": 1 if relaid else taps}
    bo, bp, bk, warps, stages = how[-5:]
    (kh, kw), (sh, sw), (ph, pw), (dh, dw) = shape.kernel, shape.stride, shape.padding, shape.dilation
    programs = shape.examples * -(-shape.out_channels // bo) * -(-(oh * ow) // bp)
    conv = Start(
        text, name, (dtype,) * 4, programs, device, warps=warps, stages=stages, early=True,
        C=shape.channels, H=shape.size[0], W=shape.size[1], O=shape.out_channels, OH=oh, OW=ow, KH=kh, KW=kw, SH=sh, SW=sw,
        PH=ph, PW=pw, DH=dh, DW=dw, **constants, BO=bo, BP=bp, BK=bk, BIAS=shape.bias, ACTIVATION=_activation(shape),
        PRECISION=shape.precision,
    )  # fmt: skip

    def run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        given = [x, weight]
        for argument, turn in turns:
            copy = torch.empty_like(given[argument])
            turn(given[argument], copy)
            given[argument] = copy
        y = x.new_empty((1, shape.examples * shape.out_channels, oh, ow))
        conv(*given, weight if bias is None else bias, y)
        return y

    return run, (*(turn for _, turn in turns), conv)


def _activation(shape: Shape) -> str:
    """The kernels' word: a shorter gelu serves results of half precision."""
    return "gelu_erf" if shape.activation == "gelu" and shape.dtype not in _HALF else shape.activation


def _turn(dtype: torch.dtype, images: int, a: int, b: int, across: int, device: torch.device | None) -> Start:
    """y[n, b, a] = x[n, a, b], in tiles of 64 × ``across``."""
    return Start(shared.TURN, "turn", (dtype, dtype), images * -(-a // 64) * -(-b // across), device, warps=4, early=True,
                 A=a, B=b, FROM=0, TO=0, WIDE=0, TA=64, TB=across)  # fmt: skip


def _finish(shape: Shape, device: torch.device | None) -> Start | None:
    """Bias and activation in place; None on a CPU."""
    if device is not None and device.type == "cpu":
        return None
    planes, pixels = shape.examples * shape.out_channels, math.prod(shape.out)
    bp = min(1024, _power(pixels))
    bc = max(1, 2048 // bp)
    return Start(template.FINISH, "finish", (shape.dtype, shape.dtype), -(-planes // bc) * -(-pixels // bp), device,
                 numbers=(planes,), warps=4, early=True, P=pixels, BC=bc, BP=bp, BIAS=shape.bias,
                 ACTIVATION=_activation(shape))  # fmt: skip


def _convolution(shape: Shape, x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.aten.convolution(x, weight, None, shape.stride, shape.padding, shape.dilation, False, [0, 0], shape.examples)


def _bmm(shape: Shape, x: Tensor, weight: Tensor) -> Tensor:
    left = weight.view(shape.examples, shape.out_channels, shape.channels)
    return torch.bmm(left, x.view(shape.examples, shape.channels, -1))


def _finished(shape: Shape, product: Callable[[Shape, Tensor, Tensor], Tensor], finish: Start | None, x: Tensor, weight: Tensor,
              bias: Tensor | None) -> Tensor:  # fmt: skip
    """The library's product, then what it leaves undone in one pass over the result, as a kernel behind it would have done."""
    y = product(shape, x, weight).view(1, shape.examples * shape.out_channels, *shape.out)
    if finish is not None:
        finish(y, y if bias is None else bias)
        return y
    return activate_(y if bias is None else y.add_(bias.view(-1, 1, 1)), shape.activation)


def library(x: Tensor, weight: Tensor, bias: Tensor | None, shape: Shape) -> Tensor:
    """ATen's convolution, then the activation in place."""
    y = torch.ops.aten.convolution(x, weight, bias, shape.stride, shape.padding, shape.dilation, False, [0, 0], shape.examples)
    return activate_(y, shape.activation)


# -- the operator -----------------------------------------------------------------------------------------------------


def per_example_conv(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int],
                     dilation: Sequence[int], groups: int, activation: str) -> Tensor:  # fmt: skip
    """fusionc::per_example_conv on a GPU: the fastest candidate for this shape."""
    shape, at = _call(x.shape, weight.shape, x.dtype, bias is not None, *stride, *padding, *dilation, groups, activation,
                      *_precisions(x.dtype), x.device)  # fmt: skip
    x, weight = x.contiguous(), weight.contiguous()
    bias = bias if bias is None else bias.contiguous()
    if at is None or weight.dtype != x.dtype or bias is not None and bias.dtype != x.dtype:
        return library(x, weight, bias, shape)

    return fastest(at, lambda how, *given: launch(how, shape, *given), partial(library, shape=shape), x, weight, bias)


def wanted(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int],
           dilation: Sequence[int], groups: int, activation: str) -> Wanted | None:  # fmt: skip
    """What `per_example_conv` will choose from, by tensors without data; None where that is ATen."""
    return _call(x.shape, weight.shape, x.dtype, bias is not None, *stride, *padding, *dilation, groups, activation,
                 *_precisions(x.dtype), x.device)[1]  # fmt: skip


def _precisions(dtype: torch.dtype) -> tuple[str, bool]:
    """Of float32 products: as torch's settings allow it for convolutions, and whether those for ``bmm`` are as exact."""
    if dtype != torch.float32:
        return "ieee", True
    if torch.backends.cudnn.conv.fp32_precision == "tf32":  # type: ignore[attr-defined]
        return "tf32", True
    return "ieee", torch.backends.cuda.matmul.fp32_precision != "tf32"


@functools.lru_cache(maxsize=1024)
def _call(size: tuple[int, ...], filters: tuple[int, ...], dtype: torch.dtype, bias: bool, sh: int, sw: int, ph: int, pw: int,
          dh: int, dw: int, groups: int, activation: str, precision: str, bmm: bool,
          device: torch.device) -> tuple[Shape, Wanted | None]:  # fmt: skip
    """What a call of `per_example_conv` can do; None: only ATen."""
    (h, w), (out, inner, kh, kw) = size[2:], filters
    shape = Shape(groups, inner, out // groups, (h, w), (kh, kw), (sh, sw), (ph, pw), (dh, dw), dtype, bias, activation,
                  precision)  # fmt: skip
    largest = max(inner * h * w, shape.out_channels * max(inner * kh * kw, math.prod(shape.out)))
    if 0 in (*size, *filters) or min(shape.out) <= 0 or largest > _LARGEST or dtype not in (*_HALF, torch.float32):
        return shape, None
    return shape, Wanted(f"per_example_conv {shape} {bmm}", candidates(shape, bmm), partial(prepare, shape=shape, device=device))
