"""Pooling over windows of two dimensions: the loads of one window, unrolled and guarded at the border.

On a GPU neighbouring windows meet in the L1 cache, so that the kernel moves its input about once; ATen's pooling of
channels-last bf16 takes three times as long (NOTES.md). On a CPU, and for large windows, it stays ATen's.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch.fx import Node

from ...ops import max_pool  # noqa: F401  (registers the operators of training)
from ..expr import FLOATS, ZERO, Const, Expr, Index, floordiv
from ..ops import cast, compute_dtype, op
from ..sizes import Unsupported, size_index, sizes_index
from ..value import Context, Idx, Value
from .pointwise import add, binary, div, fc, mul
from .registry import dtype_of, register, shape_of

_MOST = 64  # loads of one window
_LEFT_TO_ATEN = ("cpu",)  # devices where ATen's pooling is at least as fast


def _pair(given: Any, default: tuple[int, int] | None = None) -> tuple[int, int]:
    """One or two integers as two; an empty list stands for the default. Raises Unsupported for anything symbolic."""
    parts = list(given) if isinstance(given, (list, tuple)) else [given]
    if not parts and default is not None:
        return default
    parts = parts * 2 if len(parts) == 1 else parts
    if len(parts) != 2 or not all(type(p) is int for p in parts):
        raise Unsupported("window that is not of two known sizes")
    return parts[0], parts[1]


class _Windows:
    """Which input elements the window of each output element holds."""

    def __init__(self, node: Node, x: Value, kernel: Any, stride: Any, padding: Any, dilation: Any):
        val = node.args[0].meta["val"]  # type: ignore[union-attr]
        if val.device.type in _LEFT_TO_ATEN:
            raise Unsupported("")  # and no fallback
        self.x = x
        self.size = _pair(kernel)
        self.step = _pair(stride, self.size)
        self.pad = _pair(padding)
        self.dilation = _pair(dilation)
        if self.size[0] * self.size[1] > _MOST:
            raise Unsupported(f"window of more than {_MOST} elements")
        if len(x.shape) < 3 or compute_dtype(x.dtype) not in FLOATS:
            raise Unsupported("pooling of integers")

    def at(self, idx: Idx) -> list[tuple[Expr, Idx]]:
        """(inside, input index) of every element of the window; row by row."""
        out: list[tuple[Expr, Idx]] = []
        rows, columns = ([self._along(axis, idx[axis - 2], k) for k in range(self.size[axis])] for axis in (0, 1))
        for inside_row, i in rows:
            for inside_column, j in columns:
                out.append((op("and", (inside_row, inside_column), "b1"), (*idx[:-2], i, j)))
        return out

    def _along(self, axis: int, i: Index, k: int) -> tuple[Expr, Index]:
        at = i * self.step[axis] + (k * self.dilation[axis] - self.pad[axis])
        low = op("ge", (at, ZERO), "b1")
        return op("and", (low, op("lt", (at, self.x.shape[axis - 2]), "b1")), "b1"), at

    def inside(self, axis: int, i: Index) -> list[Expr]:
        return [self._along(axis, i, k)[0] for k in range(self.size[axis])]


@register("aten.max_pool2d.default", "gather", loose=(0,), windowed=True)
def _max_pool(ctx: Context, node: Node, x: Value, kernel: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1,
              ceil_mode: bool = False) -> Value:  # fmt: skip
    windows = _Windows(node, x, kernel, stride, padding, dilation)
    dtype = dtype_of(node)
    work = compute_dtype(dtype)

    return Value(ctx, shape_of(node), dtype, lambda idx: _largest(ctx, windows, x, idx, work))


def _largest(ctx: Context, windows: _Windows, x: Value, idx: Idx, work: str) -> Expr:
    best: Expr | None = None
    for inside, where in windows.at(idx):
        item = ctx.guarded(inside, partial(x.at, where), Const(-float("inf"), work))
        best = item if best is None else binary("maximum", best, item)
    assert best is not None
    return best


@register("fusionc.max_pool2d_with_places.default", "gather", loose=(0,), windowed=True)
def _max_pool_with_places(ctx: Context, node: Node, x: Value, kernel: Any, stride: Any, padding: Any,
                          ceil_mode: bool) -> tuple[Value, Value]:  # fmt: skip
    windows = _Windows(node, x, kernel, stride, padding, 1)
    work = compute_dtype(x.dtype)
    shape = sizes_index(node.meta["val"][0].shape)

    def largest(idx: Idx) -> Expr:
        return _largest(ctx, windows, x, idx, work)

    def place(idx: Idx) -> Expr:
        place: Expr = Const(0, "i32")
        best: Expr | None = None
        for k, (inside, where) in enumerate(windows.at(idx)):
            item = ctx.guarded(inside, partial(x.at, where), Const(-float("inf"), work))
            if best is None:  # where it lies in the padding, the first that does not is taken even if it is −∞
                best, seen = item, inside
                continue
            larger = op("or", (op("gt", (item, best), "b1"), op("ne", (item, item), "b1")), "b1")
            taken = op("and", (inside, op("or", (larger, op("not", (seen,), "b1")), "b1")), "b1")
            place = op("where", (taken, Const(k, "i32"), place), "i32")
            best = op("where", (taken, item, best), work)
            seen = op("or", (seen, inside), "b1")
        return cast(place, "i8")

    return Value(ctx, shape, x.dtype, largest), Value(ctx, shape, "i8", place)


@register("fusionc.max_pool2d_gradient.default", "gather", loose=(0, 1), windowed=True)
def _max_pool_gradient(ctx: Context, node: Node, grad: Value, places: Value, size: Any, kernel: Any, stride: Any,
                       padding: Any) -> Value:  # fmt: skip
    """The windows that hold an element are the last ⌈k / s⌉ that begin at or before it."""
    if node.args[0].meta["val"].device.type in _LEFT_TO_ATEN:  # type: ignore[union-attr]
        raise Unsupported("")
    dtype = dtype_of(node)
    work = compute_dtype(dtype)

    def along(axis: int, i: Index) -> list[tuple[Expr, Index, Index]]:
        """(inside, window, place in it) of each."""
        found = []
        for back in range(-(-kernel[axis] // stride[axis])):
            window = floordiv(i + padding[axis], size_index(stride[axis])) - back
            place = i + padding[axis] - window * stride[axis]
            held = op("and", (op("ge", (window, ZERO), "b1"), op("lt", (window, grad.shape[axis - 2]), "b1")), "b1")
            found.append((op("and", (held, op("lt", (place, size_index(kernel[axis])), "b1")), "b1"), window, place))
        return found

    def at(idx: Idx) -> Expr:
        total: Expr = Const(0, work)
        for row_held, row, i in along(0, idx[-2]):
            for column_held, column, j in along(1, idx[-1]):
                inside, where = op("and", (row_held, column_held), "b1"), (*idx[:-2], row, column)
                place = ctx.guarded(inside, partial(places.at, where), Const(-1, "i8"))
                here = op("and", (inside, op("eq", (cast(place, "i32"), cast(i * kernel[1] + j, "i32")), "b1")), "b1")
                total = add(total, ctx.guarded(here, partial(grad.at, where), Const(0, work)))
        return total

    return Value(ctx, shape_of(node), dtype, at)


@register("aten.avg_pool2d.default", "gather", loose=(0,), windowed=True)
def _avg_pool(ctx: Context, node: Node, x: Value, kernel: Any, stride: Any = (), padding: Any = 0,
              ceil_mode: bool = False, count_include_pad: bool = True, divisor_override: Any = None) -> Value:  # fmt: skip
    windows = _Windows(node, x, kernel, stride, padding, 1)
    if ceil_mode and count_include_pad and divisor_override is None and windows.pad != (0, 0):
        raise Unsupported("average that counts some of its padding")
    if divisor_override is not None and type(divisor_override) is not int:
        raise Unsupported("symbolic divisor")
    dtype = dtype_of(node)
    work = compute_dtype(dtype)
    area = windows.size[0] * windows.size[1]
    whole = windows.pad == (0, 0) and not ceil_mode or count_include_pad and not ceil_mode

    def at(idx: Idx) -> Expr:
        total: Expr | None = None
        for inside, where in windows.at(idx):
            item = ctx.guarded(inside, partial(x.at, where), Const(0, work))
            total = item if total is None else add(total, item)
        assert total is not None
        if divisor_override is not None or whole:
            return div(total, fc(divisor_override or area, total))
        counts = [_count(windows.inside(axis, idx[axis - 2]), work) for axis in (0, 1)]
        return div(total, mul(counts[0], counts[1]))

    return Value(ctx, shape_of(node), dtype, at)


def _count(conditions: list[Expr], work: str) -> Expr:
    total = cast(conditions[0], work)
    for each in conditions[1:]:
        total = add(total, cast(each, work))
    return total


@register("aten._adaptive_avg_pool2d.default", "gather", loose=(0,), windowed=True)
def _adaptive_avg_pool(ctx: Context, node: Node, x: Value, size: Any) -> Value:
    wanted, given = node.meta["val"].shape[-2:], node.args[0].meta["val"].shape[-2:]  # type: ignore[union-attr]
    if not all(type(n) is int for n in (*wanted, *given)) or any(g % w for g, w in zip(given, wanted, strict=True)):
        raise Unsupported("windows of different sizes")
    return _avg_pool(ctx, node, x, [g // w for g, w in zip(given, wanted, strict=True)])
