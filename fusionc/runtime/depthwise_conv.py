"""Launching the depthwise convolution: which kernels serve a shape, which of them is the fastest, and their calls.

Candidates are plain tuples, so that a choice can be remembered on disk:

    ("library",)                                            ATen or cuDNN, then the activation
    ("direct", strip, block, rows, warps)                   channels-last, any stride and dilation
    ("streamed", P, K, PA, BM, warps, stages, unroll)      contiguous, stride 1, half precision, few lines of the kernel
    ("toeplitz", group, held, TW, KD, BM, warps, stages)   the same, any number of lines
    ("turned", wide, "streamed" or "toeplitz", ...)        either for channels-last, between two transpositions, which make
                                                           lines ``wide`` pixels wide where that is not 0
    ("laid", "direct", ...)                                for contiguous, large filters of float32 or with strides
    ("widened", wide, "streamed" or "toeplitz", ...)       either for contiguous lines of odd widths, of a copy with wider ones
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..codegen.templates import depthwise_conv as template
from ..ops.activation import activate_
from ..ops.layout import is_last, out_sizes
from .templates import Start
from .tune import Wanted, agree, fastest, stand_ins

Candidate = tuple[Any, ...]
_HALF = (torch.bfloat16, torch.float16)
_SUMS = 112  # of a thread, in registers: lines of a kernel times its share of a program's pixels
_PROGRAMS = 8 * 132  # that fill an H200
_LARGE = 121  # taps, from which on two transpositions are little beside what the library takes
_PORTIONS = 4  # of a batch, whose images are turned around one after the other
_MUCH = 32 << 20  # bytes of a result, from which on its copies are worth saving
_SLOW = 441  # taps, from which on the launches of portions are little beside the products
_TAPS = 49  # sums of their gradients that fit into a thread's registers
_LOADS = 150  # of pixels for a strip that may stand in a text (7×7: 140)
_LARGEST = 1 << 30  # elements of an image: offsets inside of one are 32 bits wide
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
    columns: int = 0  # of the result, where they are not what the sizes say: lines of the image were lengthened

    @property
    def out(self) -> tuple[int, int]:
        """Height and width of the result."""
        height, width = out_sizes(self.size, self.kernel, self.stride, self.padding, self.dilation)
        return height, self.columns or width


# -- candidates -------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=512)
def candidates(shape: Shape, images: int) -> tuple[Candidate, ...]:
    """Implementations for a shape, a good default first."""
    found: list[Candidate] = []
    if shape.times > 1:
        found += _direct(shape, images)
    elif not shape.last:
        found += _contiguous(shape, images)
        if not found and shape.kernel[0] * shape.kernel[1] >= _LARGE:
            found += [("laid", *how) for how in _direct(replace(shape, last=True), images)]
    else:
        taps, ours = shape.kernel[0] * shape.kernel[1], _direct(shape, images)
        turned = [("turned", _wide(shape, how), *how) for how in _contiguous(shape, images)] if taps > 49 else []
        found += turned if turned and taps > 169 else turned + ours
    found.append(("library",))
    return tuple(found)


def most(shape: Shape, images: int) -> int:
    """How many of them to compile and time where time counts: two of the direct form, where the library need not be asked.

    H200, channels-last, 3×3 to 7×7, 28 shapes of three models: the library takes 2.2 to 3.6 times as long as the best strip,
    and 0.15 to 0.7 s to find an algorithm for each shape; four channels a thread gain at most 1 %.
    """
    found = candidates(shape, images)
    known = shape.dtype in _HALF and shape.times == 1 and shape.dilation == (1, 1) and torch.version.hip is None
    known &= min(shape.kernel) >= 3 and max(shape.kernel) <= 7
    return 2 if known and found[0][0] == "direct" and len(found) > 2 else len(found)


def _contiguous(shape: Shape, images: int) -> list[Candidate]:
    """Forms for contiguous images of half precision without strides."""
    wide = 0 if shape.last or images * shape.channels * shape.size[0] >= 1 << 31 else _wider(shape, shape.size[1] % 2)
    if wide:
        shape = replace(shape, size=(shape.size[0], wide), columns=shape.out[1])
    streamed = _streamed(shape, images)
    found = streamed if streamed and shape.kernel[0] <= 15 else streamed + _toeplitz(shape, images)
    return [("widened", wide, *how) for how in found] if wide else found


def _wide(shape: Shape, how: Candidate) -> int:
    """To how many pixels a transposition should lengthen lines, 0 for not at all: asynchronous copies like aligned lines.

    Free where a form's tiles hold that many anyway. H200, 31×31, 32×256×56×56 0.335 ms with lines of 64 pixels, 0.376 not.
    """
    whole = how[0] == "toeplitz" and how[3] == how[4] and shape.size[1] == shape.out[1]
    return whole and _wider(shape, how[3]) or _wider(shape, shape.size[1] % 8)


def _wider(shape: Shape, wanted: int) -> int:
    """Lines of at least ``wanted`` pixels, a multiple of eight; 0 where they are so, or would be twice as long or too many."""
    width = shape.size[1]
    wide = -(-max(width, wanted) // 8) * 8 if wanted else 0
    fits = shape.channels * max(shape.size[0], shape.out[0]) * wide <= _LARGEST
    return wide if width < wide < 2 * width and fits else 0


def _streamed(shape: Shape, images: int) -> list[Candidate]:
    """("streamed", P, K, PA, BM, warps, stages, unroll).

    H200, 32×256×56×56 (best tile of the Toeplitz form): 7×7 0.052 ms (0.110), 9×9 0.057 (0.126), 13×13 0.094 (0.155), 17×17
    0.115, 25×25 0.199. By one line at a step 7×7 takes 0.057, two stages 0.055.
    """
    found: list[Candidate] = []
    for p, k, ahead in _windows(shape):
        few = images * -(-shape.out[1] // p) <= 16
        for tall, warps in ((16, 1),) if few else ((32, 2), (64, 2)) if (p, k) == (8, 32) else ((32, 2), (64, 2), (16, 1)):
            if shape.kernel[0] * tall * p // (32 * warps) <= _SUMS:
                found.append(("streamed", p, k, ahead, tall, warps, 3, 2))
    return found


def _windows(shape: Shape) -> list[tuple[int, int, int]]:
    """(P, K, PA): windows of K pixels, PA of them before its P results, which must be a multiple of four for wide copies."""
    if shape.stride != (1, 1) or shape.dtype not in _HALF or shape.kernel[0] < 3:
        return []
    found = [(16, 16, 0)] if max(shape.size[1], shape.out[1]) <= 16 else []
    reach, pad = (shape.kernel[1] - 1) * shape.dilation[1], shape.padding[1]
    for p, k in ((16, 32),) if torch.version.hip else ((8, 16), (8, 32), (16, 32)):  # AMD's matrices have no eight columns
        fitting = [ahead for ahead in (-(-pad // 8) * 8, -(-pad // 4) * 4) if ahead - pad + p + reach <= k]
        found += [(p, k, ahead) for ahead in fitting[:1]]
        if fitting and k == 16:
            break
    return found


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
    """("toeplitz", group, held, TW, KD, BM, warps, stages).

    H200, 32×256×56×56: 31×31 0.318 ms by two lines, 0.423 by one. Eight warps want 128 registers, so that two programs share
    a multiprocessor. Narrow images like low tiles, and large kernels there groups of four.
    """
    found: list[Candidate] = []
    kernel, many = shape.kernel[0], images * shape.out[0] >= 512
    for tw, kd in _tiles(shape):
        tall = 128 if many and kd <= 64 and shape.out[1] % 2 == 0 else 64  # each pixel of an odd line has its own address
        if kernel < 3:
            found.append(("toeplitz", 1, False, tw, kd, tall, 4, 3))
            continue
        if kd <= 32:
            found += [("toeplitz", group, True, tw, kd, 64, 4, 2) for group in (4, 2)]
        if kd > 32 or tall > 64:
            found.append(("toeplitz", 2, tw < kd, tw, kd, tall, tall // 16, 2))
    return found


def _direct(shape: Shape, images: int) -> list[Candidate]:
    """("direct", strip, block, rows, warps): strips that waste little of a line, two or four channels a thread.

    H200, 7×7, 32×256×56×56: 0.1005 ms with two channels a thread, 0.106 with four; narrow images want short strips.
    """
    out, kw = shape.out[1], shape.kernel[1]
    if kw * 4 > _UNROLLED or not shape.last:
        return []
    fitting = [s for s in (14, 8, 7, 4) if kw * s <= _UNROLLED and -(-out // s) * s <= 1.25 * out] or [4]
    strips = sorted(fitting, key=lambda s: (-(-out // s) * s, -s))  # the least waste, then the longest
    if {14, 7} <= set(fitting):  # one of them won wherever both fit
        strips = [14, 7]
    block = 64 if shape.channels % 64 == 0 else min(32, _power(shape.channels))
    found: list[Candidate] = [("direct", s, block, 2 * 128 // block, 4) for s in strips[:2]]
    few = 7 if strips[0] == 8 and 7 in fitting else strips[0]  # four channels a thread: eight sums of each spill at odd widths
    return [*found, ("direct", few, min(block, 32), 4 * 128 // min(block, 32), 4)]


def _power(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def _activation(shape: Shape) -> str:
    """The kernels' word: a shorter gelu serves results of half precision."""
    return "gelu_erf" if shape.activation == "gelu" and shape.dtype not in _HALF else shape.activation


# -- launches ---------------------------------------------------------------------------------------------------------

# One text for all numbers of images.
_direct_text = functools.lru_cache(maxsize=256)(template.direct)
_direct_weight_text = functools.lru_cache(maxsize=256)(template.direct_weight)
_toeplitz_text = functools.lru_cache(maxsize=256)(template.toeplitz)
_streamed_text = functools.lru_cache(maxsize=256)(template.streamed)

Run = Callable[[Tensor, Tensor, Tensor | None], Tensor]
Plan = tuple[Run, tuple[Start, ...]]  # what runs, and the kernels that it starts


def launch(how: Candidate, shape: Shape, x: Tensor, taps: Tensor, bias: Tensor | None, *, interpret: bool = False) -> Tensor:
    """Run one candidate. x is dense in the layout that ``shape`` names; taps [kh, kw, C] is contiguous."""
    device = None if interpret else x.device
    run, _ = _plan(how, shape, x.shape[0], taps.dtype, None if bias is None else bias.dtype, device)
    return run(x, taps, bias)


def prepare(how: Candidate, shape: Shape, images: int, taps: torch.dtype, bias: torch.dtype | None,
            device: torch.device) -> None:  # fmt: skip
    """Compile the kernels of one candidate without running them; no memory of the device is used."""
    for start in _plan(how, shape, images, taps, bias, device)[1]:
        start.prepare()


@functools.lru_cache(maxsize=1024)
def _plan(how: Candidate, shape: Shape, images: int, taps: torch.dtype, bias: torch.dtype | None,
          device: torch.device | None) -> Plan:  # fmt: skip
    """Everything about one candidate that does not depend on data: texts and constants take longer to make than to run."""
    if how[0] == "library":
        return partial(library, shape=shape), ()
    sizes = (images, shape.channels, *shape.out)
    layout = torch.channels_last if shape.last else torch.contiguous_format
    (h, w), (oh, ow), c = shape.size, shape.out, shape.channels
    if how[0] == "widened":
        longer = _widen(shape.dtype, images * c * h, w, how[1], device)
        inside = replace(shape, size=(h, how[1]), columns=ow)
        fill, starts = _FORMS[how[2]](how[2:], inside, images, taps, bias, device)

        def widened(x: Tensor, taps: Tensor, bias: Tensor | None) -> Tensor:
            lines = torch.empty((images, c, h, how[1]), dtype=x.dtype, device=x.device)
            longer(x, lines)
            y = torch.empty(sizes, dtype=x.dtype, device=x.device)
            fill(lines, taps, bias, y)
            return y

        return widened, (longer, *starts)
    some = _portion(images, shape)
    if how[0] == "laid":
        there, back = turning(shape.dtype, some, c, h * w, device), turning(shape.dtype, some, oh * ow, c, device)
        given, result = (h, w, c), (oh, ow, c)
        inner = how[1:], replace(shape, last=True)
    elif how[0] == "turned":
        wide = how[1]
        cut = wide if w == ow else 0  # then results are as wide as the image's lines
        there = turning(shape.dtype, some, h * (wide or w), c, device, padded=w if wide else 0, wide=wide)
        back = turning(shape.dtype, some, c, oh * (cut or ow), device, cut=ow if cut else 0, wide=cut)
        given, result = (c, h, wide or w), (c, oh, cut or ow)
        inner = how[2:], replace(shape, size=(h, wide or w), last=False, columns=cut or ow)
    else:
        fill, starts = _FORMS[how[0]](how, shape, images, taps, bias, device)

        def run(x: Tensor, taps: Tensor, bias: Tensor | None) -> Tensor:
            y = torch.empty(sizes, dtype=x.dtype, device=x.device, memory_format=layout)
            fill(x, taps, bias, y)
            return y

        return run, starts
    fill, starts = _FORMS[inner[0][0]](*inner, some, taps, bias, device)

    def turned(x: Tensor, taps: Tensor, bias: Tensor | None) -> Tensor:
        before = torch.empty((some, *given), dtype=x.dtype, device=x.device)
        there(x, before)
        after = torch.empty((some, *result), dtype=x.dtype, device=x.device)
        fill(before, taps, bias, after)
        del before  # the result takes its place: two images stand beside the given one, not three
        y = torch.empty(sizes, dtype=x.dtype, device=x.device, memory_format=layout)
        back(after, y)
        return y

    def by_portions(x: Tensor, taps: Tensor, bias: Tensor | None) -> Tensor:
        y = torch.empty(sizes, dtype=x.dtype, device=x.device, memory_format=layout)
        step = fill
        if isinstance(fill, _Packed):
            packed = fill.matrices(taps, x.dtype)
            step = partial(fill.convolve, packed)
        before = torch.empty((some, *given), dtype=x.dtype, device=x.device)
        after = torch.empty((some, *result), dtype=x.dtype, device=x.device)
        for x_part, y_part in zip(x.split(some), y.split(some), strict=True):
            there(x_part, before)
            step(before, taps, bias, after)
            back(after, y_part)
        return y

    return turned if some == images else by_portions, (there, *starts, back)


def _portion(images: int, shape: Shape) -> int:
    """How many images are turned around at a time: a part of large batches, so that the copies take less than the result."""
    result = images * shape.channels * math.prod(shape.out) * shape.dtype.itemsize
    apart = result >= _MUCH and math.prod(shape.kernel) >= _SLOW and images % _PORTIONS == 0
    return images // _PORTIONS if apart else images


Fill = Callable[[Tensor, Tensor, Tensor | None, Tensor], None]


def _direct_plan(how: Candidate, shape: Shape, images: int, taps: torch.dtype, bias: torch.dtype | None,
                 device: torch.device | None) -> tuple[Fill, tuple[Start, ...]]:  # fmt: skip
    _, strip, block, rows, warps = how
    text = _direct_text(shape.channels, *shape.size, shape.kernel, shape.stride, shape.padding, shape.dilation, strip, block,
                           shape.times)
    strips = images * shape.out[0] * -(-shape.out[1] // strip)
    conv = Start(text, "conv", (shape.dtype, taps, bias or taps, shape.dtype), -(-strips // rows) * -(-shape.channels // block),
                 device, numbers=(strips,), warps=warps, early=True, BR=rows, BIAS=bias is not None,
                 ACTIVATION=_activation(shape))  # fmt: skip

    def fill(x: Tensor, taps: Tensor, bias: Tensor | None, y: Tensor) -> None:
        conv(x, taps, taps if bias is None else bias, y)

    return fill, (conv,)


def _toeplitz_plan(how: Candidate, shape: Shape, images: int, taps: torch.dtype, bias: torch.dtype | None,
                   device: torch.device | None) -> tuple[Fill, tuple[Start, ...]]:  # fmt: skip
    _, group, held, tw, kd, bm, warps, stages = how
    (h, w), (oh, ow), kh, dh = shape.size, shape.out, shape.kernel[0], shape.dilation[0]
    c, left, dtype, lead = shape.channels, _left(shape, tw, kd), shape.dtype, group - 1
    lines = -(-(kh + lead) // group) * group + lead
    pack, packed_size, length = _pack(shape, taps, kd, tw, left, lines, lead, device)
    across = -(-oh // (group * dh)) * dh  # rows of an image
    rows, tiles = images * across, -(-ow // tw)
    held = held and device is not None and not torch.version.hip  # an instruction of PTX's
    conv = Start(
        _toeplitz_text(kh, group, held), "conv", (dtype, dtype, bias or dtype, dtype),
        -(-rows // bm) * tiles * c, device, numbers=(rows,), warps=warps, stages=stages, registers=128 if warps == 8 else None,
        early=True, C=c, H=h, W=w, OH=oh, OW=ow, G=across, DH=dh, PH=shape.padding[0], PA=left, L=length, LINES=lines,
        TILES=tiles, TW=tw, KD=kd, BM=bm, STAGES=stages, BIAS=bias is not None, ACTIVATION=_activation(shape),
    )  # fmt: skip
    return _Packed(pack, conv, packed_size), (pack, conv)


def _streamed_plan(how: Candidate, shape: Shape, images: int, taps: torch.dtype, bias: torch.dtype | None,
                   device: torch.device | None) -> tuple[Fill, tuple[Start, ...]]:  # fmt: skip
    _, p, k, ahead, bm, warps, stages, unroll = how
    (h, w), (oh, ow), kh, dh = shape.size, shape.out, shape.kernel[0], shape.dilation[0]
    c, dtype = shape.channels, shape.dtype
    pack, packed_size, length = _pack(shape, taps, k, p, ahead, kh, 0, device)
    tiles = -(-ow // p)
    programs = -(-images * tiles // bm) * c * dh
    parts = max(1, min(-(-_PROGRAMS // programs), oh // (dh * kh)))
    conv = Start(
        _streamed_text(kh, unroll), "conv", (dtype, dtype, bias or dtype, dtype), programs * parts, device,
        numbers=(images * tiles,), warps=warps, stages=stages, early=True, registers=255 if warps == 1 else None,  # ptxas: 128
        C=c, H=h, W=w, OH=oh, OW=ow, DH=dh,
        PH=shape.padding[0], PA=ahead, L=length, LINES=kh, TILES=tiles, P=p, K=k, BM=bm, PARTS=parts, STAGES=stages,
        BIAS=bias is not None, ACTIVATION=_activation(shape),
    )  # fmt: skip
    return _Packed(pack, conv, packed_size), (pack, conv)


def _pack(shape: Shape, taps: torch.dtype, wide: int, tall: int, left: int, lines: int, lead: int,
          device: torch.device | None) -> tuple[Start, int, int]:  # fmt: skip
    """What lays out the Toeplitz matrices [wide, tall], the number of its elements, and the length of one copy."""
    (kh, kw), c = shape.kernel, shape.channels
    length = _power(tall + wide)
    pack = Start(
        template.PACK, "pack", (taps, shape.dtype), lines * -(-c // 8), device, warps=4, early=True, KH=kh, KW=kw, C=c,
        DW=shape.dilation[1], FIRST=wide - 1 + shape.padding[1] - left, L=length, LEAD=lead, LINES=lines, BC=8,
    )  # fmt: skip
    return pack, c * lines * 8 * length, length


@dataclass(frozen=True)
class _Packed:
    """Fills y by Toeplitz matrices of the taps, which another kernel lays out first: ``size`` elements."""

    pack: Start
    conv: Start
    size: int

    def matrices(self, taps: Tensor, dtype: torch.dtype) -> Tensor:
        packed = torch.empty(self.size, dtype=dtype, device=taps.device)
        self.pack(taps, packed)
        return packed

    def convolve(self, packed: Tensor, x: Tensor, taps: Tensor, bias: Tensor | None, y: Tensor) -> None:
        """With matrices of these taps that are at hand."""
        self.conv(x, packed, packed if bias is None else bias, y)

    def __call__(self, x: Tensor, taps: Tensor, bias: Tensor | None, y: Tensor) -> None:
        self.convolve(self.matrices(taps, x.dtype), x, taps, bias, y)


_FORMS = {"direct": _direct_plan, "toeplitz": _toeplitz_plan, "streamed": _streamed_plan}


@functools.lru_cache(maxsize=1024)
def turning(dtype: torch.dtype, images: int, a: int, b: int, device: torch.device | None, padded: int = 0, cut: int = 0,
            wide: int = 0) -> Start:  # fmt: skip
    """The launch of ``turn`` for a tensor [images, a, b]; device None: in Triton's interpreter."""
    return Start(template.TURN, "turn", (dtype, dtype), images * -(-a // 64) * -(-b // 64), device, warps=4, early=True,
                 A=a, B=b, FROM=padded, TO=cut, WIDE=wide, TA=64, TB=64)  # fmt: skip


@functools.lru_cache(maxsize=1024)
def _widen(dtype: torch.dtype, lines: int, width: int, wide: int, device: torch.device | None) -> Start:
    across = _power(wide)
    block = max(1, 2048 // across)
    return Start(template.WIDEN, "widen", (dtype, dtype), -(-lines // block), device, numbers=(lines,), warps=4, early=True,
                 W=width, WIDE=wide, BL=block, BW=across)  # fmt: skip


def turn(x: Tensor, y: Tensor, *, interpret: bool = False) -> None:
    """y[n, b, a] = x[n, a, b], both contiguous."""
    images, a, b = x.shape
    turning(x.dtype, images, a, b, None if interpret else x.device)(x, y)


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


def by_taps(x: Tensor, taps: Tensor, bias: Tensor | None, shape: Shape) -> Tensor:
    """The result in float32, one tap after the other: slow to run, but ready at once, which cuDNN for a new shape is not."""
    (kh, kw), (sh, sw), (ph, pw), (dh, dw), (oh, ow) = shape.kernel, shape.stride, shape.padding, shape.dilation, shape.out
    x = F.pad(x.float(), (pw, pw, ph, ph))
    x = x if shape.times == 1 else x.repeat_interleave(shape.times, 1)
    y = torch.zeros((x.shape[0], shape.channels, oh, ow), dtype=torch.float32, device=x.device)
    if bias is not None:
        y += bias.float().view(-1, 1, 1)
    for i in range(kh):
        for j in range(kw):
            seen = x[:, :, i * dh : i * dh + (oh - 1) * sh + 1 : sh, j * dw : j * dw + (ow - 1) * sw + 1 : sw]
            y.addcmul_(seen, taps[i, j].float().view(-1, 1, 1))
    return activate_(y, shape.activation)


# -- the operator -----------------------------------------------------------------------------------------------------


def depthwise_conv(x: Tensor, taps: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int],
                   dilation: Sequence[int], activation: str) -> Tensor:  # fmt: skip
    """fusionc::depthwise_conv on a GPU: the fastest candidate for this shape."""
    shape, at = _call(*_facts(x, taps, bias), *stride, *padding, *dilation, activation)
    if not shape.last:
        x = x.contiguous()
    taps = taps.contiguous()
    bias = bias.contiguous() if bias is not None else None
    if at is None:
        return library(x, taps, bias, shape)

    def start(how: Candidate, *given: Any) -> Tensor:
        return launch(how, shape, *given)

    def right(how: Candidate) -> bool:
        image, weight, shift = stand_ins(x, taps, bias)
        ends = slice(None, None, max(1, x.shape[0] - 1))  # the first and the last image
        return agree(start(how, image, weight, shift)[ends], by_taps(image[ends], weight, shift, shape))

    check = None if at.most == len(at.candidates) else right
    return fastest(at, start, partial(library, shape=shape), x, taps, bias, check=check)


def wanted(x: Tensor, taps: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int],
           dilation: Sequence[int], activation: str) -> Wanted | None:  # fmt: skip
    """What `depthwise_conv` will choose from, by tensors without data; None where that is ATen."""
    return _call(*_facts(x, taps, bias), *stride, *padding, *dilation, activation)[1]


def _facts(x: Tensor, taps: Tensor, bias: Tensor | None) -> tuple[Any, ...]:
    return x.shape, x.dtype, x.device, is_last(x), taps.shape, taps.dtype, None if bias is None else bias.dtype


@functools.lru_cache(maxsize=1024)
def _call(size: tuple[int, ...], dtype: torch.dtype, device: torch.device, last: bool, taps: tuple[int, ...],
          kind: torch.dtype, bias: torch.dtype | None, sh: int, sw: int, ph: int, pw: int, dh: int, dw: int,
          activation: str) -> tuple[Shape, Wanted | None]:  # fmt: skip
    """What a call of `depthwise_conv` can do; None: only ATen."""
    images, c, h, w = size
    kh, kw, made = taps
    shape = Shape(made, (h, w), (kh, kw), (sh, sw), (ph, pw), (dh, dw), dtype, last, bias is not None, activation,
                  made // max(c, 1))  # fmt: skip
    if 0 in size or min(shape.out) <= 0 or max(c, made) * max(h * w, math.prod(shape.out)) > _LARGEST:
        return shape, None
    compiled = partial(prepare, shape=shape, images=images, taps=kind, bias=bias, device=device)
    key = f"depthwise_conv {images} {shape} {kind} {bias}"
    return shape, Wanted(key, candidates(shape, images), compiled, most(shape, images))


# -- the gradient of the taps -----------------------------------------------------------------------------------------


def launch_weight(how: Candidate, shape: Shape, grad: Tensor, x: Tensor, *, interpret: bool = False) -> Tensor:
    """The gradient of the taps [kh, kw, C] in float32 by one candidate: ("library",), ("direct", strip, block, rows, warps,
    parts), or ("toeplitz" or "turned", TW, KD, BM, warps, stages, parts)."""
    run, _ = _weight_plan(how, shape, x.shape[0], None if interpret else x.device)
    return run(grad, x)


def prepare_weight(how: Candidate, shape: Shape, images: int, device: torch.device) -> None:
    """`prepare` for the gradient of the taps."""
    for start in _weight_plan(how, shape, images, device)[1]:
        start.prepare()


@functools.lru_cache(maxsize=1024)
def _weight_plan(how: Candidate, shape: Shape, images: int,
                 device: torch.device | None) -> tuple[Callable[[Tensor, Tensor], Tensor], tuple[Start, ...]]:  # fmt: skip
    if how[0] == "library":
        return partial(_library_weight, shape), ()
    if how[0] == "widened":
        (h, w), (oh, _), c, wide = shape.size, shape.out, shape.channels, how[1]
        inside, starts = _weight_plan(how[2:], replace(shape, size=(h, wide), columns=wide), images, device)
        longer = [_widen(shape.dtype, images * c * rows, w, wide, device) for rows in (oh, h)]
        return partial(_of_copies, longer, wide, inside), (*longer, *starts)
    (h, w), (oh, ow), (kh, kw), c, dtype = shape.size, shape.out, shape.kernel, shape.channels, shape.dtype
    kinds, parts = (dtype, dtype, torch.float32), how[-1]
    if how[0] == "direct":
        _, strip, block, rows, warps, _ = how
        text = _direct_weight_text(c, h, w, shape.kernel, shape.padding, shape.dilation, strip, block)
        weight = Start(text, "weight", kinds, -(-c // block) * parts, device, numbers=(images * oh * -(-ow // strip),),
                       warps=warps, BR=rows, PARTS=parts)  # fmt: skip
    else:
        _, tw, kd, bm, warps, stages, _ = how
        weight = Start(
            template.WEIGHT, "weight", kinds, kh * parts * c, device, numbers=(images * oh,), warps=warps, stages=stages,
            C=c, H=h, W=w, OH=oh, OW=ow, KH=kh, KW=kw, DH=shape.dilation[0], DW=shape.dilation[1],
            PH=shape.padding[0], PW=shape.padding[1], PA=_left(shape, tw, kd), TILES=-(-ow // tw), TW=tw, KD=kd, KP=_power(kw),
            BM=bm, PARTS=parts,
        )  # fmt: skip

    def run(grad: Tensor, x: Tensor) -> Tensor:
        out = torch.empty((parts, kh, kw, c), dtype=torch.float32, device=x.device)
        weight(x, grad, out)
        return out[0] if parts == 1 else out.sum(0)

    if how[0] != "turned":
        return run, (weight,)
    turns = [turning(dtype, images, size[0] * size[1], c, device) for size in (shape.out, shape.size)]
    return partial(_of_copies, turns, 0, run), (*turns, weight)


def _of_copies(starts: Sequence[Start], wide: int, run: Callable[..., Tensor], *given: Tensor) -> Tensor:
    """``run`` of the contiguous copies that ``starts`` make of its arguments, with lines of ``wide`` pixels (0: as they are)."""
    copies = [torch.empty((*t.shape[:3], wide or t.shape[3]), dtype=t.dtype, device=t.device) for t in given]
    for start, source, place in zip(starts, given, copies):
        start(source, place)
    return run(*copies)


def _library_weight(shape: Shape, grad: Tensor, x: Tensor) -> Tensor:
    weight = torch.empty((shape.channels, 1, *shape.kernel), dtype=x.dtype, device=x.device)
    found = torch.ops.aten.convolution_backward(grad, x, weight, None, shape.stride, shape.padding, shape.dilation, False,
                                                [0, 0], shape.channels, [False, True, False])[1]  # fmt: skip
    return found.squeeze(1).permute(1, 2, 0).float().contiguous()


def _direct_weight(shape: Shape, images: int) -> list[Candidate]:
    """("direct", strip, block, rows, warps, parts): two channels a thread or one, and one wave of programs on an H200.

    There, channels-last: 7×7, 32×256×56×56 0.116 ms (three programs to a multiprocessor, which has registers for two: 0.138;
    cuDNN 0.159; between transpositions 0.193), 5×5 0.073 (0.108, 0.161), 64×96×56×56 0.098 (0.137, 0.157). All of a strip
    stands in the text: 7×7 compiles for 7 s, so there is one such candidate, and none for longer texts.
    """
    (kh, kw), width = shape.kernel, shape.out[1]
    if kh * kw > _TAPS:
        return []
    reach = (kw - 1) * shape.dilation[1]
    strips = [s for s in (14, 8, 7, 4) if -(-width // s) * s <= 1.25 * width] or [4]
    strip = next((s for s in strips if kh * (s + reach) <= _LOADS), 0)
    if not strip:
        return []
    steps = -(-images * shape.out[0] * -(-width // strip) // 4)
    waves = {64: 3, 32: 5}  # programs of a multiprocessor
    if kh * kw > 25:
        waves = {64: 2} if shape.channels % 64 == 0 else {32: 2}
    return [("direct", strip, block, 4, 4, max(1, min(steps, 132 * wave // -(-shape.channels // block))))
            for block, wave in waves.items() if block == 32 or shape.channels > 32]  # fmt: skip


@functools.lru_cache(maxsize=512)
def weight_candidates(shape: Shape, images: int) -> tuple[Candidate, ...]:
    """Implementations of the gradient of the taps, a good default first."""
    found: list[Candidate] = []
    if shape.last:
        found += _direct_weight(shape, images)
    odd = shape.size[1] % 2
    many = images * shape.channels * max(shape.size[0], shape.out[0]) >= 1 << 31
    wide = _wider(shape, odd) if not shape.last and not many and shape.size[1] == shape.out[1] else 0
    if wide:
        shape, odd = replace(shape, size=(shape.size[0], wide)), 0
    form = ("widened", wide, "toeplitz") if wide else ("turned",) if shape.last else ("toeplitz",)
    for tw, kd in _tiles(shape)[:1]:
        steps = -(-images * shape.out[0] // 64) * -(-shape.out[1] // tw)
        parts = max(1, min(steps // 4, 8, 512 // (shape.channels * shape.kernel[0])))
        for bm, warps in ((64, 4), (128, 8)) if odd else ((64, 4), (128, 4), (128, 8)):  # pixels that are loaded one by one
            found.append((*form, tw, kd, bm, warps, 3, parts))  # take up registers
    return (*found, ("library",))


def depthwise_conv_weight(grad: Tensor, x: Tensor, kernel: Sequence[int], padding: Sequence[int],
                          dilation: Sequence[int]) -> Tensor:  # fmt: skip
    """fusionc::depthwise_conv_weight on a GPU: the fastest candidate for this shape."""
    shape, at = _weight_call(x.shape, x.dtype, x.device, is_last(x), *kernel, *padding, *dilation)
    grad = grad.to(x.dtype)
    layout = torch.channels_last if shape.last else torch.contiguous_format
    x, grad = x.contiguous(memory_format=layout), grad.contiguous(memory_format=layout)
    if at is None:
        return _library_weight(shape, grad, x)

    return fastest(at, lambda how, *given: launch_weight(how, shape, *given), partial(_library_weight, shape), grad, x)


def wanted_weight(grad: Tensor, x: Tensor, kernel: Sequence[int], padding: Sequence[int],
                  dilation: Sequence[int]) -> Wanted | None:  # fmt: skip
    """What `depthwise_conv_weight` will choose from, by tensors without data; None where that is ATen."""
    return _weight_call(x.shape, x.dtype, x.device, is_last(x), *kernel, *padding, *dilation)[1]


@functools.lru_cache(maxsize=1024)
def _weight_call(size: tuple[int, ...], dtype: torch.dtype, device: torch.device, last: bool, kh: int, kw: int, ph: int, pw: int,
                 dh: int, dw: int) -> tuple[Shape, Wanted | None]:  # fmt: skip
    images, c, h, w = size
    shape = Shape(c, (h, w), (kh, kw), (1, 1), (ph, pw), (dh, dw), dtype, last, False, "")
    if 0 in size or min(shape.out) <= 0 or c * max(h * w, math.prod(shape.out)) > _LARGEST:
        return shape, None
    compiled = partial(prepare_weight, shape=shape, images=images, device=device)
    return shape, Wanted(f"depthwise_conv_weight {images} {shape} {dtype}", weight_candidates(shape, images), compiled)
