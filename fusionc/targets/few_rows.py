"""`fusionc::skinny_linear` for more than one row, and for what its kernel of one row does not know: tile, scratch, launch."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..codegen.templates import few_rows as texts
from ..codegen.templates.few_rows import Tile
from ..ops.skinny_linear import BLOCK, ROWS, SIBLING_ROWS, reference
from ..runtime.counters import zeros
from ..runtime.depthwise_conv import turn, turning
from ..runtime.device import properties
from ..runtime.templates import POINTER, Template, template
from ..runtime.tune import Sampler, Wanted, choose, cuda_sampler
from .skinny import dependent, fits

_BETWEEN = 0.002  # ms that the library's kernel costs between two of ours, which start while the one in front still runs


def few_rows(x: Tensor, weight: Tensor, norm: Tensor | None, eps: float, rounds: bool, bias: Tensor | None,
             activation: str, residual: Tensor | None, more: Sequence[Tensor] | None, gated: bool,
             turned: bool) -> Tensor:  # fmt: skip
    """See `ops.skinny_linear`; ATen where the kernel does not apply or is slower."""

    def library(out: Tensor | None = None) -> Tensor:
        grad = torch.is_grad_enabled()  # (out= has no gradient)
        if more and not activation and norm is None and residual is None and not grad:
            return apart(x, (weight, *more), bias, out)
        if _by_columns(x, weight, norm, bias, activation, residual, more, turned):
            return by_columns(x, weight, out)
        return reference(x, weight, norm, eps, rounds, bias, activation, residual, False, more, gated, turned)

    plan = _plan_of(x, weight, norm, bias, activation, residual, more, gated, turned)
    if plan is None:
        return library()
    parts = (weight, *(more or ()))
    out = torch.empty((plan.rows, plan.width), dtype=x.dtype, device=x.device)
    spare = out.data_ptr()
    args: list[int] = [
        x.data_ptr(),
        weight.data_ptr(),
        parts[len(parts) // 2].data_ptr(),
        parts[-1].data_ptr(),
        *[spare if t is None else t.data_ptr() for t in (bias, residual)],
        spare,
    ]
    stream = torch._C._cuda_getCurrentRawStream(x.device.index)

    def run(tile: Tile | None) -> Tensor:
        if tile is None:
            return library(out)
        part = counters = out
        tiles = plan.tiles_of(tile)
        if tile.split > 1:
            part = torch.empty(plan.scratch(tile), dtype=torch.float32, device=x.device)
            counters = zeros(tiles, x.device, stream)
        plan.kernel(tile).launch(tiles * tile.split, stream, *args, part.data_ptr(), counters.data_ptr())
        return out

    return run(plan.choose(run))


def wanted(x: Tensor, weight: Tensor, norm: Tensor | None, bias: Tensor | None, activation: str,
           residual: Tensor | None, more: Sequence[Tensor] | None, gated: bool, turned: bool) -> Wanted | None:  # fmt: skip
    """What `few_rows` will choose from, by tensors without data; None where that is ATen."""
    plan = _plan_of(x, weight, norm, bias, activation, residual, more, gated, turned, data=False)
    if not _by_columns(x, weight, norm, bias, activation, residual, more, turned):
        return None if plan is None else Wanted(plan.key, plan.tiles, plan.prepare)

    def prepare(tile: Tile | None) -> None:
        if plan is not None and tile is not None:
            plan.prepare(tile)
        else:
            turning(x.dtype, 1, weight.shape[0], x.shape[0], x.device).prepare()

    if plan is None:
        return Wanted(f"by_columns {x.dtype} {weight.shape[0]} {x.shape[0]}", (None,), prepare)
    return Wanted(plan.key, plan.tiles, prepare)


def _plan_of(x: Tensor, weight: Tensor, norm: Tensor | None, bias: Tensor | None, activation: str,
             residual: Tensor | None, more: Sequence[Tensor] | None, gated: bool, turned: bool,
             data: bool = True) -> _Plan | None:  # fmt: skip
    """None where the kernel does not apply."""
    most = SIBLING_ROWS if more and not activation and residual is None else ROWS
    if norm is not None or x.shape[0] > most or not fits(x, weight, norm, bias, residual, more, BLOCK, data):
        return None
    heights = tuple(part.shape[int(turned)] for part in (weight, *(more or ())))
    width = sum(heights) // (2 if activation and gated else 1)
    if turned and (more or width % 8):
        return None
    rows, inner = x.shape
    if rows * width >= 1 << 31:  # places in the result are 32 bits wide
        return None
    return _plan(rows, heights, inner, x.stride(0), x.dtype, activation, bool(activation) and gated, bias is not None,
                 residual is not None, turned, x.device)  # fmt: skip


def _by_columns(x: Tensor, weight: Tensor, norm: Tensor | None, bias: Tensor | None, activation: str,
                residual: Tensor | None, more: Sequence[Tensor] | None, turned: bool) -> bool:  # fmt: skip
    """Does ATen's part go through `by_columns`?"""
    alone = not turned and not more and norm is None and bias is None and not activation and residual is None
    return alone and odd(x.shape[0], weight.shape[0])


def odd(rows: int, width: int) -> bool:
    """The library is slow for a result of this width and fast for one that is `rows` wide."""
    return rows > 8 and rows % 8 == 0 and width % 8 != 0


def by_columns(x: Tensor, weight: Tensor, out: Tensor | None = None, *, interpret: bool = False) -> Tensor:
    """x Wᵀ as the transpose of W xᵀ: the library looks at how wide the result is, not at how high."""
    made = torch.mm(weight, x.t())
    if out is None:
        out = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype, device=x.device)
    turn(made[None], out[None], interpret=interpret)
    return out


def apart(x: Tensor, weights: Sequence[Tensor], bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """x Wᵀ of weights [Nᵢ, K] beside each other, each by the library into its columns of the result."""
    heights = [w.shape[0] for w in weights]
    if out is None:
        out = torch.empty((x.shape[0], sum(heights)), dtype=x.dtype, device=x.device)
    biases = [None] * len(heights) if bias is None else bias.split(heights)
    for w, b, columns in zip(weights, biases, out.split(heights, 1)):
        if b is None:
            torch.mm(x, w.t(), out=columns)
        else:
            torch.addmm(b, x, w.t(), out=columns)
    return out


class _Plan:
    """Everything about one shape of the operator but the tile."""

    def __init__(self, rows: int, heights: tuple[int, ...], inner: int, step: int, dtype: torch.dtype, activation: str,
                 gated: bool, bias: bool, residual: bool, turned: bool, device: torch.device) -> None:  # fmt: skip
        self.rows, self.width, self.gated = rows, sum(heights) // (2 if gated else 1), gated
        self.device, self.early = device, dependent(device)
        several = len(heights) > 1 and not gated
        ends = (heights[0], heights[0] + heights[1]) if several else (0, 0)
        self.constants: tuple[tuple[str, Any], ...] = (
            ("N0", ends[0]), ("N1", ends[1]), ("APART", gated and len(heights) > 1), ("M", rows), ("N", self.width),
            ("K", inner), ("XS", step), ("ACT", activation), ("GATED", gated), ("HAS_BIAS", bias),
            ("HAS_RESIDUAL", residual), ("KN", turned), ("WIDE", sum(heights) * inner >= 1 << 31), ("PDL", self.early),
            ("FETCH", texts.ahead(rows, self.width, inner, gated)),
        )  # fmt: skip
        p = POINTER[dtype]
        self.kinds = (p,) * 7 + ("*fp32", "*i32")
        # the last candidate is the library
        processors = properties(device).processors
        if rows > ROWS:
            found = texts.sibling_tiles(rows, self.width, inner, math.gcd(*heights), processors)
        else:
            found = texts.tiles(rows, self.width, inner, gated, processors)
        self.tiles = (*found, None)
        what = [dtype, rows, "+".join(map(str, heights)), inner, activation, gated, bias, residual, turned]
        self.key = f"few_rows {' '.join(map(str, what))}"
        self._kernels: dict[Tile, Template] = {}

    def kernel(self, tile: Tile) -> Template:
        found = self._kernels.get(tile)
        if found is None:
            own = (("SPLIT", tile.split), ("BM", tile.bm), ("BN", tile.bn), ("BK", tile.bk), ("STAGES", tile.stages))
            found = self._kernels[tile] = template(
                texts.TEXT, "few_rows", self.kinds, (*self.constants, *own), self.device, tile.warps, tile.stages,
                dependent=self.early,
            )  # fmt: skip
        return found

    def tiles_of(self, tile: Tile) -> int:
        return -(-self.rows // tile.bm) * -(-self.width // tile.bn)

    def scratch(self, tile: Tile) -> int:
        return self.tiles_of(tile) * tile.split * tile.bm * tile.bn * (2 if self.gated else 1)

    def prepare(self, tile: Tile | None) -> None:
        """Compile it."""
        if tile is not None:
            self.kernel(tile).prepare()

    def choose(self, run: Callable[[Tile | None], Tensor]) -> Tile | None:
        sampler = in_company if self.early else cuda_sampler
        return choose(self.key, self.tiles, run, device=self.device, prepare=self.prepare, sampler=sampler)


def in_company(launches: Sequence[Callable[[], Any]], device: torch.device) -> Sampler:
    """`cuda_sampler`, the last of ``launches`` being the library's, with what alone it does not show (`_BETWEEN`).

    GPT-2's q/k/v for 128 tokens on an H200: the library's kernel is the faster one alone, and 2.3 µs slower in the model.
    """
    alone, library = cuda_sampler(launches, device), len(launches) - 1

    def sample(left: Sequence[int], count: int) -> dict[int, list[float]]:
        found = alone(left, count)
        return {i: [ms + _BETWEEN for ms in times] if i == library else times for i, times in found.items()}

    return sample


_plan = functools.lru_cache(maxsize=4096)(_Plan)
