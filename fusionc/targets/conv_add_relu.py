"""`fusionc::conv_add_relu` on a GPU: our kernel for 1×1 filters, cuDNN's, or the library's parts; the fastest for each shape."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ..codegen.templates import pointwise_conv as texts
from ..codegen.templates.pointwise_conv import Tile
from ..ops.conv_add_relu import reference
from ..runtime.templates import POINTER, Template, template
from ..runtime.tune import Wanted, agree, choose, stand_ins

How = Tile | str  # a tile of our kernel, "cudnn" or "library"


def fresh(x: Tensor, weight: Tensor, bias: Tensor, z: Tensor, stride: Sequence[int], padding: Sequence[int],
          dilation: Sequence[int]) -> Tensor:  # fmt: skip
    """The result in a tensor of its own."""
    return _run(x, weight, bias, z, tuple(stride), tuple(padding), tuple(dilation), False)


def over(x: Tensor, weight: Tensor, bias: Tensor, z: Tensor, stride: Sequence[int], padding: Sequence[int],
         dilation: Sequence[int]) -> Tensor:  # fmt: skip
    """The result over z, where the fastest way to compute it can do that."""
    return _run(x, weight, bias, z, tuple(stride), tuple(padding), tuple(dilation), True)


def _run(x: Tensor, weight: Tensor, bias: Tensor, z: Tensor, stride: tuple[int, ...], padding: tuple[int, ...],
         dilation: tuple[int, ...], gone: bool) -> Tensor:  # fmt: skip
    def call(how: How, x: Tensor, weight: Tensor, bias: Tensor, z: Tensor, out: Tensor | None = None) -> Tensor:
        if isinstance(how, Tile):
            return launch(how, x, weight, bias, z, torch.empty_like(z) if out is None else out)
        if how == "cudnn":
            filters = weight.contiguous(memory_format=torch.channels_last)
            return torch.cudnn_convolution_add_relu(x, filters, z, 1.0, bias, stride, padding, dilation, 1)
        return reference(x, weight, bias, z, stride, padding, dilation)

    def run(how: How) -> Tensor:
        return call(how, x, weight, bias, z)

    def right(how: How) -> bool:
        image, filters, offset, more = stand_ins(x, weight, bias, z)
        want = reference(image, filters, offset, more, stride, padding, dilation)
        return agree(call(how, image, filters, offset, more), want)

    at = wanted(x, weight, bias, z, stride, padding, dilation, data=True)
    how = choose(at.key, at.candidates, run, device=x.device, check=right, prepare=at.prepare)
    return call(how, x, weight, bias, z, z if gone else None)  # only now, for measuring must not change z


def wanted(x: Tensor, weight: Tensor, bias: Tensor, z: Tensor, stride: Sequence[int], padding: Sequence[int],
           dilation: Sequence[int], data: bool = False) -> Wanted:  # fmt: skip
    """What a call will choose from; without ``data`` by tensors that have none."""
    stride, padding, dilation = tuple(stride), tuple(padding), tuple(dilation)
    tiled = fits(x, weight, bias, z, stride, padding, data)
    key = f"conv_add_relu {x.dtype} {tuple(x.shape)} {tuple(weight.shape)} {stride} {padding} {dilation} {tiled}"
    return Wanted(key, candidates(weight.shape[0], weight.shape[1], tiled), lambda how: _prepare(how, x, weight))


def fits(x: Tensor, weight: Tensor, bias: Tensor, z: Tensor, stride: tuple[int, ...], padding: tuple[int, ...],
         data: bool = True) -> bool:  # fmt: skip
    """Is it a product of dense rows, on a GPU that has the instructions?  Without ``data`` alignment is believed."""
    if tuple(weight.shape[2:]) != (1, 1) or set(stride) != {1} or set(padding) != {0} or torch.version.hip:
        return False
    if not z.numel() or x.dtype not in (torch.bfloat16, torch.float16) or any(t.dtype != x.dtype for t in (weight, bias, z)):
        return False
    dense = all(t.is_contiguous(memory_format=torch.channels_last) for t in (x, z)) and bias.is_contiguous()
    if not dense or weight.stride()[:2] != (weight.shape[1], 1):
        return False
    if data and any(t.data_ptr() & 15 for t in (x, weight, bias, z)):
        return False
    return x.device.type != "cuda" or torch.cuda.get_device_capability(x.device) >= (8, 0)


@functools.lru_cache(maxsize=512)
def candidates(width: int, inner: int, tiled: bool) -> tuple[How, ...]:
    """Ways to compute it, a good default first."""
    return (*(texts.tiles(width, inner) if tiled else ()), "cudnn", "library")


def _kernel(tile: Tile, x: Tensor, weight: Tensor) -> Template:
    width, inner = weight.shape[:2]
    constants = (("N", width), ("K", inner), ("BM", tile.bm), ("BN", tile.bn), ("BK", tile.bk), ("STAGES", tile.stages))
    return template(texts.TEXT, "pointwise", (POINTER[x.dtype],) * 5 + ("i32",), constants, x.device, tile.warps, tile.stages)


def _prepare(how: How, x: Tensor, weight: Tensor) -> None:
    if isinstance(how, Tile):
        _kernel(how, x, weight).prepare()


def launch(tile: Tile, x: Tensor, weight: Tensor, bias: Tensor, z: Tensor, out: Tensor) -> Tensor:
    """Run our kernel; `out` may be z."""
    rows = z.shape[0] * z.shape[2] * z.shape[3]
    stream = torch._C._cuda_getCurrentRawStream(x.device.index)
    grid = -(-rows // tile.bm) * (weight.shape[0] // tile.bn)
    pointers = [t.data_ptr() for t in (x, weight, bias, z, out)]
    _kernel(tile, x, weight).launch(grid, stream, *pointers, rows)
    return out
