"""Launching the depthwise convolution: which kernels serve a shape, which of them is the fastest, and their calls.

Candidates are plain tuples, so that a choice can be remembered on disk:

    ("library",)                                            ATen or cuDNN, then the activation
    ("direct", strip, block, rows, warps)                   channels-last, any stride and dilation
    ("toeplitz", group, ahead, held, TW, KD, BM, warps, stages)   contiguous, stride 1, half precision
    ("turned", group, ahead, held, TW, KD, BM, warps, stages)     the same for channels-last, between two transpositions
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..codegen.templates import depthwise_conv as template
from ..ops.activation import activate_
from .launch import load_module
from .tune import Wanted, choose

Candidate = tuple[Any, ...]
_HALF = (torch.bfloat16, torch.float16)
_TEXT = 15  # lines of a kernel that may all stand in a text
_PRODUCTS = 52  # of matrices that may stand in a text: ptxas takes 3.9 s for 52 (0.5 for 26), which 13×13 is worth: H200
# 32×256×56×56 0.161 ms unrolled, 0.212 in a loop
_UNROLLED = 128  # multiply-adds of a strip and kernel row that may stand in a text


@dataclass(frozen=True)
class Shape:
    """All that the kernels depend on, except the number of images."""

    channels: int  # of the result
    size: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    dtype: torch.dtype
    last: bool  # channels-last?
    bias: bool
    activation: str
    times: int = 1  # results of one channel of the input

    @property
    def out(self) -> tuple[int, int]:
        """Height and width of the result."""
        return template.out_sizes(self.size, self.kernel, self.stride, self.padding, self.dilation)


# -- candidates -------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=512)
def candidates(shape: Shape, images: int) -> tuple[Candidate, ...]:
    """Implementations for a shape, a good default first."""
    found: list[Candidate] = []
    wide = shape.kernel[0] * shape.kernel[1] > 81
    if shape.times > 1:
        found += _direct(shape, images)
    elif shape.last:
        ours = _direct(shape, images)
        turned = [("turned", *c) for c in _toeplitz(shape, images)] if wide else []
        found += turned if turned and shape.kernel[0] * shape.kernel[1] > 169 else turned + ours
    else:
        found += [("toeplitz", *c) for c in _toeplitz(shape, images)]
    found.append(("library",))
    return tuple(found)


def _tiles(shape: Shape) -> list[tuple[int, int]]:
    """(TW, KD): whole lines where they fit, else windows with 16-byte aligned starts."""
    if shape.stride != (1, 1) or shape.dtype not in _HALF:
        return []
    width, out = shape.size[1], shape.out[1]
    reach = (shape.kernel[1] - 1) * shape.dilation[1] + 1
    side = _power(max(width, out, 16))
    if side <= 64:
        return [(side, side)]
    ahead = -(-shape.padding[1] // 8) * 8
    windows = [(tw, _power(ahead + tw + reach - 1 - shape.padding[1])) for tw in (64, 32, 16)]
    return [w for w in windows if w[1] <= 64][:1] or [w for w in windows if w[1] <= 128][:1]


def _toeplitz(shape: Shape, images: int) -> list[Candidate]:
    """(group, ahead, held, TW, KD, BM, warps, stages).

    H200, 32×256×56×56: with all lines in the text 7×7 takes 0.103 ms and 13×13 0.152, in a loop 0.115 and 0.166; 31×31
    0.318 in a loop by two lines, 0.423 by one. Eight warps want 128 registers, so that two programs share a
    multiprocessor: with 134 it is 0.140 for 7×7. Narrow images like low tiles, and large kernels there groups of four.
    """
    found: list[Candidate] = []
    kernel, many = shape.kernel[0], images * shape.out[0] >= 512
    for tw, kd in _tiles(shape):
        tall = 128 if many and kd <= 64 else 64
        warps = tall // 16
        if kernel < 3:
            found.append((1, 0, False, tw, kd, tall, 4, 3))
            continue
        if kd >= 64 and kernel <= _TEXT:
            found.append((2, 3 if kernel < 9 and tall > 64 else 1, False, tw, kd, tall, warps, 1))
            if tw < kd:
                found.append((2, 1, True, tw, kd, tall, warps, 1))
            else:
                found.append((4, 2, False, tw, kd, 64, 4, 1) if 4 * kernel <= _PRODUCTS else (4, 0, False, tw, kd, 64, 4, 2))
        if kd <= 32:
            groups = (2, 4) if kernel <= _TEXT else (4, 2)
            found += [(group, 0, True, tw, kd, 64, 4, 2) for group in groups]
        if kd > 32 or tall > 64:
            found.append((2, 0, tw < kd, tw, kd, tall, warps, 2))
    return found


def _direct(shape: Shape, images: int) -> list[Candidate]:
    """("direct", strip, block, rows, warps): strips that waste little of a line, two or four channels a thread.

    H200, 7×7, 32×256×56×56: 0.1005 ms with two channels a thread, 0.106 with four; narrow images want short strips.
    """
    out, kw = shape.out[1], shape.kernel[1]
    if kw * 4 > _UNROLLED or not shape.last:
        return []
    fitting = [s for s in (14, 8, 7, 4) if kw * s <= _UNROLLED and -(-out // s) * s <= 1.25 * out] or [4]
    if {14, 7} <= set(fitting):  # one of them won wherever both fit
        fitting = [14, 7]
    strips = sorted(fitting, key=lambda s: abs(s - (14 if out >= 56 else 7 if out > 7 else 4)))
    block = 64 if shape.channels % 64 == 0 else min(32, _power(shape.channels))
    found: list[Candidate] = [("direct", s, block, 2 * 128 // block, 4) for s in strips[:2]]
    return [*found, ("direct", strips[0], min(block, 32), 4 * 128 // min(block, 32), 4)]


def _power(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def _activation(shape: Shape) -> str:
    """The kernels' word: a shorter gelu serves results of half precision."""
    return "gelu_erf" if shape.activation == "gelu" and shape.dtype not in _HALF else shape.activation


# -- launches ---------------------------------------------------------------------------------------------------------


def launch(how: Candidate, shape: Shape, x: Tensor, taps: Tensor, bias: Tensor | None, *, interpret: bool = False) -> Tensor:
    """Run one candidate. x is dense in the layout that ``shape`` names; taps [kh, kw, C] is contiguous."""
    if interpret:
        from . import interpreter
        from . import launch as launching

        with interpreter.lock, launching._loading, interpreter.repaired(), launching._interpreting(True):
            return _launch(how, shape, x, taps, bias, True)
    return _launch(how, shape, x, taps, bias, False)


def _launch(how: Candidate, shape: Shape, x: Tensor, taps: Tensor, bias: Tensor | None, interpret: bool) -> Tensor:
    if how[0] == "library":
        return library(x, taps, bias, shape)
    sizes = (x.shape[0], shape.channels, *shape.out)
    layout = torch.channels_last if shape.last else torch.contiguous_format
    if how[0] == "turned":
        module = _module(template.TURN, interpret)
        flat = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        _turn(module, x, flat, shape.size[0] * shape.size[1], shape.channels)
        result = torch.empty(sizes, dtype=x.dtype, device=x.device)
        _run_toeplitz(how, shape, flat, taps, bias, result, interpret)
        del flat  # the result takes its place: two images stand beside the given one, not three
        y = torch.empty(sizes, dtype=x.dtype, device=x.device, memory_format=layout)
        _turn(module, result, y, shape.channels, shape.out[0] * shape.out[1])
        return y
    y = torch.empty(sizes, dtype=x.dtype, device=x.device, memory_format=layout)
    run = _run_direct if how[0] == "direct" else _run_toeplitz
    run(how, shape, x, taps, bias, y, interpret)
    return y


_compiling = threading.local()  # .on: kernels are compiled, not started


def _start(fn: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    if getattr(_compiling, "on", False):
        kinds = [a.dtype if isinstance(a, Tensor) else a for a in args]  # a dtype stands for an aligned pointer
        fn.warmup(*kinds, grid=grid, **options)
    else:
        fn[grid](*args, **options)


def prepare(how: Candidate, shape: Shape, images: int, taps: torch.dtype, bias: torch.dtype | None,
            device: torch.device) -> None:  # fmt: skip
    """Compile the kernels of one candidate without running them; no memory of the device is used."""
    x = _without_data(shape, images, shape.size)
    with _compiles(device):
        if how != ("library",):
            launch(how, shape, x, torch.empty((*shape.kernel, shape.channels), dtype=taps, device="meta"),
                   None if bias is None else torch.empty(shape.channels, dtype=bias, device="meta"))  # fmt: skip


def prepare_weight(how: Candidate, shape: Shape, images: int, device: torch.device) -> None:
    """The same for one candidate of the gradient of the taps."""
    with _compiles(device):
        if how != ("library",):
            launch_weight(how, shape, _without_data(shape, images, shape.out), _without_data(shape, images, shape.size))


def _without_data(shape: Shape, images: int, size: tuple[int, int]) -> Tensor:
    layout = torch.channels_last if shape.last else torch.contiguous_format
    return torch.empty((images, shape.channels // shape.times, *size), dtype=shape.dtype, device="meta", memory_format=layout)


@contextlib.contextmanager
def _compiles(device: torch.device) -> Iterator[None]:
    """What this thread starts is compiled for ``device`` only."""
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        _compiling.on = True
        try:
            yield
        finally:
            _compiling.on = False


# Texts take longer to write and to hash than kernels to run: each is looked up by what it was made from.


@functools.lru_cache(maxsize=64)
def _module(text: str, interpret: bool) -> Any:
    return load_module(text, interpret=interpret)


@functools.lru_cache(maxsize=512)
def _direct_module(shape: Shape, strip: int, block: int, interpret: bool) -> Any:
    text = template.direct(shape.channels, *shape.size, shape.kernel, shape.stride, shape.padding, shape.dilation, strip, block,
                           shape.times)
    return load_module(text, interpret=interpret)


@functools.lru_cache(maxsize=512)
def _toeplitz_module(kernel: int, group: int, ahead: int, held: bool, interpret: bool) -> Any:
    return load_module(template.toeplitz(kernel, group, ahead, held), interpret=interpret)


def _turn(module: Any, x: Tensor, y: Tensor, a: int, b: int) -> None:
    grid = (-(-a // 64) * -(-b // 64), x.shape[0])
    _start(module.turn, grid, x, y, A=a, B=b, TA=64, TB=64, num_warps=4)


def turn(x: Tensor, y: Tensor, *, interpret: bool = False) -> None:
    """y[n, b, a] = x[n, a, b], both contiguous."""
    _turn(_module(template.TURN, interpret), x, y, x.shape[1], x.shape[2])


def _run_direct(how: Candidate, shape: Shape, x: Tensor, taps: Tensor, bias: Tensor | None, y: Tensor,
                interpret: bool) -> None:  # fmt: skip
    _, strip, block, rows, warps = how
    module = _direct_module(shape, strip, block, interpret)
    strips = x.shape[0] * shape.out[0] * -(-shape.out[1] // strip)
    grid = (-(-strips // rows) * -(-shape.channels // block),)
    _start(module.conv, grid, x, taps, taps if bias is None else bias, y, strips, BR=rows, BIAS=bias is not None,
                      ACTIVATION=_activation(shape), num_warps=warps, num_stages=1)  # fmt: skip


def _run_toeplitz(how: Candidate, shape: Shape, x: Tensor, taps: Tensor, bias: Tensor | None, y: Tensor,
                  interpret: bool) -> None:  # fmt: skip
    _, group, ahead, held, tw, kd, bm, warps, stages = how
    (h, w), (oh, ow), (kh, kw), dh = shape.size, shape.out, shape.kernel, shape.dilation[0]
    c, left = shape.channels, _left(shape, tw, kd)
    length, lead = _power(tw + kd), 0 if ahead else group - 1
    lines = kh if ahead else -(-(kh + group - 1) // group) * group + lead
    packed = torch.empty(c * lines * 8 * length, dtype=x.dtype, device=x.device)
    _start(
        _module(template.PACK, interpret).pack, (lines * -(-c // 8),), taps, packed,
        KH=kh, KW=kw, C=c, DW=shape.dilation[1], FIRST=kd - 1 + shape.padding[1] - left, L=length, LEAD=lead, LINES=lines,
        BC=8, num_warps=4,
    )  # fmt: skip
    across = -(-oh // (group * dh)) * dh  # rows of an image
    rows, tiles = x.shape[0] * across, -(-ow // tw)
    _start(
        _toeplitz_module(kh, group, ahead, held and not interpret, interpret).conv, (-(-rows // bm) * tiles * c,),
        x, packed, packed if bias is None else bias, y, rows,
        C=c, H=h, W=w, OH=oh, OW=ow, G=across, DH=dh, PH=shape.padding[0], PA=left, L=length, LINES=lines, TILES=tiles,
        TW=tw, KD=kd, BM=bm, STAGES=stages, BIAS=bias is not None, ACTIVATION=_activation(shape), num_warps=warps,
        num_stages=stages, maxnreg=128 if warps == 8 else None,
    )  # fmt: skip


def _left(shape: Shape, tw: int, kd: int) -> int:
    """By how much windows begin before their columns: not at all where they hold whole lines."""
    return 0 if kd >= shape.size[1] and tw >= shape.out[1] else -(-shape.padding[1] // 8) * 8


def library(x: Tensor, taps: Tensor, bias: Tensor | None, shape: Shape) -> Tensor:
    """ATen's convolution, then the activation in place."""
    weight = taps.to(x.dtype).permute(2, 0, 1).unsqueeze(1).contiguous()
    if shape.last:
        weight = weight.contiguous(memory_format=torch.channels_last)
    bias = bias if bias is None else bias.to(x.dtype)
    y = torch.ops.aten.convolution(x, weight, bias, shape.stride, shape.padding, shape.dilation, False, [0, 0],
                                   shape.channels // shape.times)  # fmt: skip
    return activate_(y, shape.activation)


# -- the operator -----------------------------------------------------------------------------------------------------


def depthwise_conv(x: Tensor, taps: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int],
                   dilation: Sequence[int], activation: str) -> Tensor:  # fmt: skip
    """fusionc::depthwise_conv on a GPU: the fastest candidate for this shape."""
    shape = _shape(x, taps, bias, stride, padding, dilation, activation)
    if not shape.last:
        x = x.contiguous()
    taps = taps.contiguous()
    bias = bias.contiguous() if bias is not None else None
    if x.numel() == 0 or min(shape.out) <= 0:
        return library(x, taps, bias, shape)
    at = _wanted(shape, x.shape[0], taps.dtype, None if bias is None else bias.dtype, x.device)

    def right(how: Candidate) -> bool:
        want = library(x, taps, bias, shape).float()
        return bool((launch(how, shape, x, taps, bias).float() - want).norm() <= 0.02 * want.norm())

    how = choose(at.key, at.candidates, lambda each: launch(each, shape, x, taps, bias), device=x.device, check=right,
                 prepare=at.prepare)  # fmt: skip
    return launch(how, shape, x, taps, bias)


def wanted(x: Tensor, taps: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int],
           dilation: Sequence[int], activation: str) -> Wanted | None:  # fmt: skip
    """What `depthwise_conv` will choose from, by tensors without data; None where that is ATen."""
    shape = _shape(x, taps, bias, stride, padding, dilation, activation)
    if x.numel() == 0 or min(shape.out) <= 0:
        return None
    return _wanted(shape, x.shape[0], taps.dtype, None if bias is None else bias.dtype, x.device)


def _shape(x: Tensor, taps: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int],
           dilation: Sequence[int], activation: str) -> Shape:  # fmt: skip
    c, h, w = x.shape[1:]
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    kh, kw, made = taps.shape
    return Shape(made, (h, w), (kh, kw), (stride[0], stride[1]), (padding[0], padding[1]), (dilation[0], dilation[1]), x.dtype,
                 last, bias is not None, activation, made // max(c, 1))  # fmt: skip


@functools.lru_cache(maxsize=1024)
def _wanted(shape: Shape, images: int, taps: torch.dtype, bias: torch.dtype | None, device: torch.device) -> Wanted:
    compiled = partial(prepare, shape=shape, images=images, taps=taps, bias=bias, device=device)
    return Wanted(f"depthwise_conv {images} {shape} {taps}", candidates(shape, images), compiled)


# -- the gradient of the taps -----------------------------------------------------------------------------------------


def launch_weight(how: Candidate, shape: Shape, grad: Tensor, x: Tensor, *, interpret: bool = False) -> Tensor:
    """The gradient of the taps [kh, kw, C] in float32 by one candidate: ("library",), or
    ("toeplitz" or "turned", TW, KD, BM, warps, stages, parts)."""
    if how[0] == "library":
        return _library_weight(shape, grad, x)
    if interpret:
        from . import interpreter
        from . import launch as launching

        with interpreter.lock, launching._loading, interpreter.repaired(), launching._interpreting(True):
            return _run_weight(how, shape, grad, x, True)
    return _run_weight(how, shape, grad, x, False)


def _run_weight(how: Candidate, shape: Shape, grad: Tensor, x: Tensor, interpret: bool) -> Tensor:
    kind, tw, kd, bm, warps, stages, parts = how
    (h, w), (oh, ow), (kh, kw), c = shape.size, shape.out, shape.kernel, shape.channels
    if kind == "turned":
        turning = _module(template.TURN, interpret)
        flat = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (grad, x)]
        for source, place in zip((grad, x), flat):
            _turn(turning, source, place, source.shape[2] * source.shape[3], c)
        grad, x = flat
    module = _module(template.WEIGHT, interpret)
    out = torch.empty((parts, kh, kw, c), dtype=torch.float32, device=x.device)
    _start(
        module.weight, (kh * parts, c), x, grad, out, x.shape[0] * oh,
        C=c, H=h, W=w, OH=oh, OW=ow, KH=kh, KW=kw, DH=shape.dilation[0], DW=shape.dilation[1], PH=shape.padding[0],
        PW=shape.padding[1], PA=_left(shape, tw, kd), TILES=-(-ow // tw), TW=tw, KD=kd, KP=_power(kw), BM=bm, PARTS=parts,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out[0] if parts == 1 else out.sum(0)


def _library_weight(shape: Shape, grad: Tensor, x: Tensor) -> Tensor:
    weight = torch.empty((shape.channels, 1, *shape.kernel), dtype=x.dtype, device=x.device)
    found = torch.ops.aten.convolution_backward(grad, x, weight, None, shape.stride, shape.padding, shape.dilation, False,
                                                [0, 0], shape.channels, [False, True, False])[1]  # fmt: skip
    return found.squeeze(1).permute(1, 2, 0).float().contiguous()


@functools.lru_cache(maxsize=512)
def weight_candidates(shape: Shape, images: int) -> tuple[Candidate, ...]:
    """Implementations of the gradient of the taps, a good default first."""
    found: list[Candidate] = []
    for tw, kd in _tiles(shape)[:1]:
        steps = -(-images * shape.out[0] // 64) * -(-shape.out[1] // tw)
        parts = max(1, min(steps // 4, 8, 512 // (shape.channels * shape.kernel[0])))
        for bm, warps in ((64, 4), (128, 4), (128, 8)):
            found.append(("turned" if shape.last else "toeplitz", tw, kd, bm, warps, 3, parts))
    return (*found, ("library",))


def depthwise_conv_weight(grad: Tensor, x: Tensor, kernel: Sequence[int], padding: Sequence[int],
                          dilation: Sequence[int]) -> Tensor:  # fmt: skip
    """fusionc::depthwise_conv_weight on a GPU: the fastest candidate for this shape."""
    shape = _weight_shape(x, kernel, padding, dilation)
    layout = torch.channels_last if shape.last else torch.contiguous_format
    x, grad = x.contiguous(memory_format=layout), grad.contiguous(memory_format=layout)
    if x.numel() == 0 or min(shape.out) <= 0:
        return _library_weight(shape, grad, x)
    at = _weight_wanted(shape, x.shape[0], x.device)

    def right(how: Candidate) -> bool:
        want = _library_weight(shape, grad, x)
        return bool((launch_weight(how, shape, grad, x) - want).norm() <= 0.02 * want.norm())

    how = choose(at.key, at.candidates, lambda each: launch_weight(each, shape, grad, x), device=x.device, check=right,
                 prepare=at.prepare)  # fmt: skip
    return launch_weight(how, shape, grad, x)


def wanted_weight(grad: Tensor, x: Tensor, kernel: Sequence[int], padding: Sequence[int],
                  dilation: Sequence[int]) -> Wanted | None:  # fmt: skip
    """What `depthwise_conv_weight` will choose from, by tensors without data; None where that is ATen."""
    shape = _weight_shape(x, kernel, padding, dilation)
    if x.numel() == 0 or min(shape.out) <= 0:
        return None
    return _weight_wanted(shape, x.shape[0], x.device)


def _weight_shape(x: Tensor, kernel: Sequence[int], padding: Sequence[int], dilation: Sequence[int]) -> Shape:
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return Shape(x.shape[1], (x.shape[2], x.shape[3]), (kernel[0], kernel[1]), (1, 1), (padding[0], padding[1]),
                 (dilation[0], dilation[1]), x.dtype, last, False, "")  # fmt: skip


@functools.lru_cache(maxsize=1024)
def _weight_wanted(shape: Shape, images: int, device: torch.device) -> Wanted:
    compiled = partial(prepare_weight, shape=shape, images=images, device=device)
    return Wanted(f"depthwise_conv_weight {images} {shape} {shape.dtype}", weight_candidates(shape, images), compiled)
