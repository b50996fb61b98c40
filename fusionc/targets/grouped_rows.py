"""`fusionc::grouped_rows` on a GPU: which tile, and the launch."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..codegen.templates.grouped_rows import TEXT, Tile, tiles
from ..ops.grouped_rows import ROWS, reference
from ..runtime.templates import POINTER, Template, template
from ..runtime.tune import Wanted, choose
from .skinny import dependent, generation


def grouped_rows(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """See `ops.grouped_rows`; ATen where the kernel does not apply or is slower."""
    if not _fits(x, weight, ends):
        return reference(x, weight, ends)
    plan = _plan_of(x, weight)
    stream = torch._C._cuda_getCurrentRawStream(x.device.index)

    def run(tile: Tile | None) -> Tensor:
        if tile is None:
            return reference(x, weight, ends)
        out = torch.empty((x.shape[0], plan.width), dtype=x.dtype, device=x.device)
        plan.kernel(tile).launch(plan.programs(tile), stream, x.data_ptr(), weight.data_ptr(), ends.data_ptr(),
                                 out.data_ptr(), x.shape[0])  # fmt: skip
        return out

    return run(choose(plan.key, plan.tiles, run, device=x.device, prepare=plan.prepare))


def wanted(x: Tensor, weight: Tensor, ends: Tensor) -> Wanted | None:
    """What `grouped_rows` will choose from, by tensors without data; None where that is ATen."""
    if not _fits(x, weight, ends, data=False):
        return None
    plan = _plan_of(x, weight)
    return Wanted(plan.key, plan.tiles, plan.prepare)


def _plan_of(x: Tensor, weight: Tensor) -> _Plan:
    return _plan(x.dtype, x.shape[0], x.stride(0), *weight.shape, x.device)


class _Plan:
    """Everything about one shape of the operator but the tile."""

    def __init__(self, dtype: torch.dtype, rows: int, step: int, groups: int, width: int, inner: int,
                 device: torch.device) -> None:  # fmt: skip
        self.device, self.early, self.groups, self.width = device, dependent(device), groups, width
        self.constants: tuple[tuple[str, Any], ...] = (
            ("N", width), ("K", inner), ("XS", step), ("WIDE", groups * width * inner >= 1 << 31), ("PDL", self.early),
            ("BM", 16),
        )  # fmt: skip
        p = POINTER[dtype]
        self.kinds = (p, p, "*i32", p, "i32")
        self.tiles = (*tiles(inner), None)  # the last candidate is the library
        self.key = f"grouped_rows {dtype} {rows} {groups} {width} {inner}"
        self._kernels: dict[Tile, Template] = {}

    def programs(self, tile: Tile) -> int:
        """How many are launched."""
        return self.groups * -(-self.width // tile.bn)

    def kernel(self, tile: Tile) -> Template:
        found = self._kernels.get(tile)
        if found is None:
            own = (("BN", tile.bn), ("BK", tile.bk), ("STAGES", tile.stages))
            found = self._kernels[tile] = template(TEXT, "grouped_rows", self.kinds, (*self.constants, *own), self.device,
                                                   tile.warps, tile.stages, dependent=self.early)  # fmt: skip
        return found

    def prepare(self, tile: Tile | None) -> None:
        """Compile it."""
        if tile is not None:
            self.kernel(tile).prepare()


_plan = functools.lru_cache(maxsize=1024)(_Plan)


def _fits(x: Tensor, weight: Tensor, ends: Tensor, data: bool = True) -> bool:
    """Types, layouts and alignment that the kernel assumes; see `skinny.fits` for ``data``."""
    if x.dtype not in (torch.bfloat16, torch.float16) or weight.dtype is not x.dtype or ends.dtype is not torch.int32:
        return False
    if x.dim() != 2 or weight.dim() != 3 or ends.shape != weight.shape[:1] or x.shape[1] != weight.shape[2]:
        return False
    if not weight.is_contiguous() or ends.stride(0) != 1 or x.stride(1) != 1 or not 1 <= x.shape[0] <= ROWS:
        return False
    if x.stride(0) * x.shape[0] >= 1 << 31 or x.shape[0] * weight.shape[1] >= 1 << 31 or weight.numel() == 0:
        return False
    bits = x.shape[1] * 2 | x.stride(0) * 2
    if data:
        for t in (x, weight, ends):
            bits |= t.data_ptr()
    return not bits & 15 and generation(x.device) >= 80
