"""`fusionc::skinny_linear` on a GPU: which kernel, which tile, and the launch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..codegen.templates import skinny_linear as texts
from ..codegen.templates.skinny_linear import Tile
from ..ops.skinny_linear import reference
from ..runtime.device import properties
from ..runtime.templates import POINTER, Template, template
from ..runtime.tune import Wanted, choose


def linear(x: Tensor, weight: Tensor, norm: Tensor | None, eps: float, rounds: bool, bias: Tensor | None,
           activation: str, residual: Tensor | None, chained: bool, more: Sequence[Tensor] | None = None,
           gated: bool = True, turned: bool = False, ahead: Sequence[Tensor] | None = None) -> Tensor:  # fmt: skip
    """The operator's implementation for CUDA; ATen where the kernels do not apply.  See `ops.skinny_linear`."""
    if x.shape[0] != 1 or turned or activation and not gated:
        from .few_rows import few_rows

        return few_rows(x, weight, norm, eps, rounds, bias, activation, residual, more, gated, turned)
    if not fits(x, weight, norm, bias, residual, more, 8):
        return reference(x, weight, norm, eps, rounds, bias, activation, residual, False, more)
    parts = (weight, *(more or ()))
    plan = _plan_of(x, parts, norm, eps, rounds, bias, activation, residual, chained, ahead)
    out = torch.empty((1, plan.width), dtype=x.dtype, device=x.device)
    spare = out.data_ptr()
    args: list[int] = [
        x.data_ptr(),
        weight.data_ptr(),
        parts[len(parts) // 2].data_ptr(),
        parts[-1].data_ptr(),
        spare if norm is None else norm.data_ptr(),
        spare if bias is None else bias.data_ptr(),
        spare if residual is None else residual.data_ptr(),
        spare,
        *([t.data_ptr() & -16 for t in ahead[:2]] if ahead else ()),
    ]
    args += [spare] * (len(plan.kinds) - len(args))
    stream = torch._C._cuda_getCurrentRawStream(x.device.index)

    def run(tile: Tile) -> None:
        plan.kernel(tile).launch(plan.grid(tile), stream, *args)

    run(plan.choose(run))
    return out


def wanted(x: Tensor, weight: Tensor, norm: Tensor | None, eps: float, rounds: bool, bias: Tensor | None,
           activation: str, residual: Tensor | None, chained: bool, more: Sequence[Tensor] | None = None,
           gated: bool = True, turned: bool = False, ahead: Sequence[Tensor] | None = None) -> Wanted | None:  # fmt: skip
    """What `linear` will choose from, by tensors without data; None where that is ATen."""
    if x.shape[0] != 1 or turned or activation and not gated:
        from .few_rows import wanted as wanted_by_few_rows

        return wanted_by_few_rows(x, weight, norm, bias, activation, residual, more, gated, turned)
    if not fits(x, weight, norm, bias, residual, more, 8, data=False):
        return None
    plan = _plan_of(x, (weight, *(more or ())), norm, eps, rounds, bias, activation, residual, chained, ahead)
    return Wanted(plan.key, plan.tiles, plan.prepare)


def _plan_of(x: Tensor, parts: Sequence[Tensor], norm: Tensor | None, eps: float, rounds: bool, bias: Tensor | None,
             activation: str, residual: Tensor | None, chained: bool, ahead: Sequence[Tensor] | None) -> _Plan:  # fmt: skip
    kind = 0 if norm is None else 1 if rounds else 2
    return _plan(tuple(part.shape[0] for part in parts), x.shape[1], x.dtype, norm.dtype if norm is not None else x.dtype,
                 eps, kind, activation, bias is not None, residual is not None, chained and dependent(x.device),
                 tuple(t.numel() * t.element_size() if t.is_contiguous() and t.device == x.device else 0
                       for t in (ahead or ())[:2]),
                 x.device)  # fmt: skip


class _Plan:
    """Everything about one shape of the operator but the tile."""

    def __init__(self, heights: tuple[int, ...], inner: int, dtype: torch.dtype, norm_dtype: torch.dtype, eps: float,
                 kind: int, activation: str, bias: bool, residual: bool, chained: bool, ahead: tuple[int, ...],
                 device: torch.device) -> None:  # fmt: skip
        width = sum(heights) // (2 if activation else 1)
        self.width, self.device, self.chained, gated = width, device, chained, activation != ""
        self.ahead = ahead if chained else ()  # bytes
        self.own = sum(heights) * inner * dtype.itemsize
        self.inner = inner
        wide = sum(heights) * inner >= 1 << 31
        several = len(heights) > 1 and not activation
        ends = (heights[0], heights[0] + heights[1]) if several else (0, 0)
        self.constants: tuple[tuple[str, Any], ...] = (
            ("N0", ends[0]), ("N1", ends[1]), ("UP", width if len(heights) == 1 else 0), ("N", width),
            ("K", inner), ("EPS", eps), ("NORM", kind), ("ACT", activation), ("HAS_BIAS", bias),
            ("HAS_RESIDUAL", residual), ("WIDE", wide), ("PDL", chained),
            ("NEXT", dependent(device)),
        )  # fmt: skip
        p, n = POINTER[dtype], POINTER[norm_dtype]
        self.kinds = (p, p, p, p, n, p, p, p, "*i8", "*i8")
        heavy = kind != 0 and norm_dtype.itemsize > 2 or gated and bias
        self.tiles = texts.one_row_tiles(width, inner, gated, kind != 0, heavy)
        if chained:  # a measurement of the kernel alone knows nothing of what runs beside it: H200, Llama 3B, 3 % slower a step
            self.tiles = self.tiles[:1]
        what = [dtype, norm_dtype, "+".join(map(str, heights)), inner, kind, activation, bias, residual, chained, *self.ahead]
        self.key = f"skinny_linear {' '.join(map(str, what))}"
        self._kernels: dict[Tile, Template] = {}

    def kernel(self, tile: Tile) -> Template:
        found = self._kernels.get(tile)
        if found is None:
            (step0, share0), (step1, share1) = self.shares(tile)
            constants = (
                *self.constants, ("OWN", bool(self.ahead)), ("STEP0", step0), ("SHARE0", share0), ("STEP1", step1),
                ("SHARE1", share1), ("BN", tile.bn), ("BK", tile.bk),
                ("EVEN", self.width % tile.bn == 0 and self.inner % (tile.bk * tile.depth) == 0),
            )  # fmt: skip
            found = self._kernels[tile] = template(
                texts.text(tile.depth), "one_row", self.kinds, constants, self.device, tile.warps, dependent=self.chained,
                registers=tile.registers,
            )  # fmt: skip
        return found

    def shares(self, tile: Tile) -> list[tuple[int, int]]:
        """(step, bytes of it) for each of the two weights: what L2 has no room for beside the layer's own would leave it
        before it is read, and be read twice."""
        whole = sum(self.ahead)
        if whole == 0:
            return [(0, 0), (0, 0)]
        room = max(0, properties(self.device).cache - self.own)
        return [texts.share(n, self.grid(tile), room * n // whole) for n in (*self.ahead, 0)[:2]]

    def grid(self, tile: Tile) -> int:
        return -(-self.width // tile.bn)

    def prepare(self, tile: Tile) -> None:
        """Compile it."""
        self.kernel(tile).prepare()

    def choose(self, run: Callable[[Tile], None]) -> Tile:
        if len(self.tiles) == 1:
            return self.tiles[0]
        return choose(self.key, self.tiles, run, device=self.device, prepare=self.prepare)


_plan = functools.lru_cache(maxsize=4096)(_Plan)


def fits(x: Tensor, weight: Tensor, norm: Tensor | None, bias: Tensor | None, residual: Tensor | None,
         more: Sequence[Tensor] | None, block: int, data: bool = True) -> bool:  # fmt: skip
    """Types, layouts and alignment that the kernels assume; a block of rows must lie in one of the weights.

    Without ``data`` the tensors have none, and their alignment is believed.
    """
    if x.dtype not in (torch.bfloat16, torch.float16) or weight.dtype != x.dtype:
        return False
    if x.stride(1) != 1 or not weight.is_contiguous() or torch.version.hip:
        return False
    bits = x.shape[1] * 2 | (x.stride(0) * 2 if x.shape[0] > 1 else 0)
    for part in more or ():
        if part.dtype != x.dtype or not part.is_contiguous() or part.shape[0] % block or weight.shape[0] % block:
            return False
    for t, allowed in ((norm, (x.dtype, torch.float32)), (bias, (x.dtype,)), (residual, (x.dtype,))):
        if t is not None:
            if not t.is_contiguous() or t.dtype not in allowed:
                return False
    if data:
        for t in (x, weight, *(more or ()), norm, bias, residual):
            bits |= 0 if t is None else t.data_ptr()
    return not bits & 15 and generation(x.device) >= 80


@functools.lru_cache(maxsize=64)
def generation(device: torch.device) -> int:
    """80 for sm_80, and so on; 0 where there is no NVIDIA GPU."""
    arch = properties(device).arch
    return int(arch[3:]) if arch.startswith("sm_") else 0


def dependent(device: torch.device) -> bool:
    """Programmatic dependent launch and its instructions exist from sm_90 on."""
    return generation(device) >= 90
