"""`fusionc::short_attention` on a GPU: which tile, and the launch."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..codegen.templates.short_attention import TEXT, Tile, tiles
from ..ops.short_attention import KEYS, WIDTHS, reference
from ..runtime.device import properties
from ..runtime.templates import POINTER, Template, template
from ..runtime.tune import Wanted, choose
from .skinny import dependent, generation


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
    """See `ops.short_attention`; ATen where the kernel does not apply or is slower."""
    if not _fits(q, k, v, causal):
        return reference(q, k, v, scale, causal)
    batch, heads, queries, width = q.shape
    out = torch.empty((batch, queries, heads, width), dtype=q.dtype, device=q.device)
    plan = _plan_of(q, k, v, scale, causal)
    stream = torch._C._cuda_getCurrentRawStream(q.device.index)

    def run(tile: Tile | None) -> Tensor:
        if tile is None:
            return reference(q, k, v, scale, causal)
        programs = batch * heads * -(-queries // tile.queries)
        plan.kernel(tile).launch(programs, stream, q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr())
        return out.transpose(1, 2)

    return run(choose(plan.key, plan.tiles, run, device=q.device, prepare=plan.prepare))


def wanted(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Wanted | None:
    """What `attention` will choose from, by tensors without data; None where that is ATen."""
    if not _fits(q, k, v, causal, data=False):
        return None
    plan = _plan_of(q, k, v, scale, causal)
    return Wanted(plan.key, plan.tiles, plan.prepare)


def _plan_of(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> _Plan:
    batch, heads, queries, width = q.shape
    return _plan(q.dtype, batch, heads, k.shape[1], queries, k.shape[2], width, scale, causal,
                 (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3]), q.device)  # fmt: skip


class _Plan:
    """Everything about one shape of the operator but the tile."""

    def __init__(self, dtype: torch.dtype, batch: int, heads: int, shared: int, queries: int, keys: int, width: int,
                 scale: float, causal: bool, strides: tuple[int, ...], device: torch.device) -> None:  # fmt: skip
        self.device, self.early = device, dependent(device)
        names = "QB QH QN KB KH KN VB VH VN".split()
        self.constants: tuple[tuple[str, Any], ...] = (
            ("H", heads), ("HKV", shared), ("L", queries), ("S", keys), ("D", width), ("SCALE", scale), ("CAUSAL", causal),
            *zip(names, strides), ("PDL", self.early), ("BS", max(16, 1 << (keys - 1).bit_length())),
        )  # fmt: skip
        self.kinds = (POINTER[dtype],) * 4
        # the last candidate is the library
        self.tiles = (*tiles(batch * heads, queries, properties(device).processors), None)
        what = [dtype, batch, heads, shared, queries, keys, width, causal]
        self.key = f"short_attention {' '.join(map(str, what))}"
        self._kernels: dict[Tile, Template] = {}

    def kernel(self, tile: Tile) -> Template:
        found = self._kernels.get(tile)
        if found is None:
            found = self._kernels[tile] = template(
                TEXT, "short", self.kinds, (*self.constants, ("BM", tile.queries)), self.device, tile.warps,
                dependent=self.early,
            )  # fmt: skip
        return found

    def prepare(self, tile: Tile | None) -> None:
        """Compile it."""
        if tile is not None:
            self.kernel(tile).prepare()


_plan = functools.lru_cache(maxsize=1024)(_Plan)


def _fits(q: Tensor, k: Tensor, v: Tensor, causal: bool, data: bool = True) -> bool:
    """Types, layouts and alignment that the kernel assumes; see `skinny.fits` for ``data``."""
    width = q.shape[3]
    if q.dtype not in (torch.bfloat16, torch.float16) or width not in WIDTHS or torch.version.hip:
        return False
    if not 1 <= k.shape[2] <= KEYS or k.shape[1] == 0 or q.shape[1] % k.shape[1] or causal and q.shape[2] != k.shape[2]:
        return False
    if v.shape != k.shape or k.shape[3] != width or q.numel() == 0 or k.shape[0] != q.shape[0]:
        return False
    bits = 0
    for t in (q, k, v):
        if t.dtype is not q.dtype or t.stride(3) != 1:
            return False
        bits |= t.data_ptr() if data else 0
        for size, step in zip(t.shape[:3], t.stride()[:3]):
            bits |= step * 2 if size > 1 else 0
            if size * step >= 1 << 31:
                return False
    return not bits & 15 and generation(q.device) >= 80
