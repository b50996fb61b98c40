"""Indirect and piecewise reads: embedding, indexing, cat, pad, roll, repeat, and the functional writes of slices."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from ..expr import ONE, ZERO, Const, Expr, Index, floordiv, index, mod
from ..ops import cast, compute_dtype, op
from ..sizes import Unsupported, position, size_index
from ..value import Context, Idx, Value, normalize_dim, view
from .registry import dtype_of, register, scalar, shape_of


def checked(i: Expr, size: Index) -> Index:
    """An index loaded from a tensor: negative counts from the end, and must lie inside."""
    return index(op("check_index", (cast(i, "i64"), size), "i64"))


@register("aten.embedding.default", "gather", loose=(0,))
def _embedding(ctx: Context, node: Node, weight: Value, ids: Value, *_: Any) -> Value:
    n = len(ids.shape)
    return view(weight, shape_of(node), lambda idx: (checked(ids.at(idx[:n]), weight.shape[0]), idx[n]))


@register("aten.index_select.default", "gather", loose=(0, 2))
def _index_select(ctx: Context, node: Node, x: Value, dim: int, ids: Value) -> Value:
    if not x.shape:
        raise Unsupported("index_select of a scalar")
    d = normalize_dim(dim, len(x.shape))

    def remap(idx: Idx) -> Idx:
        at = ids.at((idx[d],) if ids.shape else ())
        return idx[:d] + (checked(at, x.shape[d]),) + idx[d + 1 :]

    return view(x, shape_of(node), remap)


@register("aten.gather.default", "gather", loose=(0,))
def _gather(ctx: Context, node: Node, x: Value, dim: int, ids: Value, **_: Any) -> Value:
    if not x.shape or not ids.shape:
        raise Unsupported("gather of a scalar")
    d = normalize_dim(dim, len(x.shape))
    return view(x, shape_of(node), lambda idx: idx[:d] + (checked(ids.at(idx), x.shape[d]),) + idx[d + 1 :])


@register(["aten.index.Tensor", "aten._unsafe_index.Tensor"], "gather", loose=(0, 1))
def _index(ctx: Context, node: Node, x: Value, indices: list[Value | None]) -> Value:
    used = [d for d, t in enumerate(indices) if t is not None]
    if not used:
        raise Unsupported("index without tensors")
    for d in used:
        if indices[d].dtype not in ("i64", "i32", "i16", "i8"):  # type: ignore[union-attr]
            raise Unsupported("boolean or byte mask index (its size depends on data)")
    rank = max(len(indices[d].shape) for d in used)  # type: ignore[union-attr]
    adjacent = used == list(range(used[0], used[-1] + 1))
    front = used[0] if adjacent else 0

    def remap(idx: Idx) -> Idx:
        selected = idx[front : front + rank]
        rest = iter(idx[:front] + idx[front + rank :])
        out: list[Index] = []
        for d in range(len(x.shape)):
            t = indices[d] if d < len(indices) else None
            out.append(
                next(rest) if t is None else checked(t.at_broadcast(selected, compute_dtype(t.dtype)), x.shape[d])
            )
        return tuple(out)

    return view(x, shape_of(node), remap)


@register("aten.cat.default", "gather", loose=(0,))
def _cat(ctx: Context, node: Node, parts: list[Value], dim: int = 0) -> Value:
    dtype = dtype_of(node)
    work = compute_dtype(dtype)
    shape = shape_of(node)
    live = [p for p in parts if not (len(p.shape) == 1 and p.shape[0] is ZERO and len(shape) != 1)]
    d = normalize_dim(dim, len(shape))
    if not live:
        raise Unsupported("cat of nothing")

    def at(idx: Idx) -> Expr:
        lo = ZERO
        pieces: list[tuple[Index, Index, Value]] = []
        for p in live:
            pieces.append((lo, lo + p.shape[d], p))
            lo = lo + p.shape[d]
        out: Expr | None = None
        for lo, hi, p in reversed(pieces):

            def read(lo: Index = lo, p: Value = p) -> Expr:
                return cast(p.at(idx[:d] + (idx[d] - lo,) + idx[d + 1 :]), work)

            below = op("lt", (idx[d], hi), "b1")
            above = op("ge", (idx[d], lo), "b1")
            inside = op("and", (above, below), "b1")
            if out is None:
                out = ctx.guarded(inside, read, Const(0, work))
            else:
                mine = ctx.guarded(inside, read, Const(0, work))
                out = op("where", (below, mine, out), work)
        assert out is not None
        return out

    return Value(ctx, shape, dtype, at)


@register("aten.constant_pad_nd.default", "gather", loose=(0,))
def _pad(ctx: Context, node: Node, x: Value, pad: list[Any], value: Any = 0) -> Value:
    dtype = dtype_of(node)
    work = compute_dtype(dtype)
    shape = shape_of(node)
    rank = len(shape)
    low = [ZERO] * rank
    for k in range(len(pad) // 2):
        p = pad[2 * k]
        low[rank - 1 - k] = p if isinstance(p, Index) else size_index(p)
    fill = cast(cast(scalar(ctx, value, work), dtype), work)

    def at(idx: Idx) -> Expr:
        cond: Expr = Const(True, "b1")
        inner: list[Index] = []
        for i, lo, size, out in zip(idx, low, x.shape, shape, strict=True):
            j = i - lo
            inner.append(j)
            if out is not size or lo is not ZERO:
                cond = op("and", (cond, op("ge", (j, ZERO), "b1")), "b1")
                cond = op("and", (cond, op("lt", (j, size), "b1")), "b1")
        return ctx.guarded(cond, lambda: x.at(tuple(inner)), fill)

    return Value(ctx, shape, dtype, at)


@register(["aten.scatter.value", "aten.scatter.src"], "pointwise")
def _scatter(ctx: Context, node: Node, x: Value, dim: int, ids: Value, src: Any) -> Value:
    """One position a row (the gradient of a loss's picked element): a comparison with the position decides."""
    if not x.shape or len(ids.shape) != len(x.shape):
        raise Unsupported("scatter of a scalar")
    d = normalize_dim(dim, len(x.shape))
    if ids.shape[d] is not ONE or any(
        i is not s for k, (i, s) in enumerate(zip(ids.shape, x.shape, strict=True)) if k != d
    ):
        raise Unsupported("scatter of more than one position a row")
    if isinstance(src, Value) and src.shape != ids.shape:
        raise Unsupported("scatter from a larger source")
    work = compute_dtype(x.dtype)

    def at(idx: Idx) -> Expr:
        row = tuple([ZERO if k == d else i for k, i in enumerate(idx)])
        position = checked(ids.at(row), x.shape[d])
        new = cast(src.at(row), work) if isinstance(src, Value) else cast(cast(scalar(ctx, src, work), x.dtype), work)
        return op("where", (op("eq", (idx[d], position), "b1"), new, x.at(idx)), work)

    return Value(ctx, x.shape, x.dtype, at)


@register("aten.roll.default", "gather", loose=(0,))
def _roll(ctx: Context, node: Node, x: Value, shifts: list[Any], dims: list[int] = []) -> Value:  # noqa: B006
    shifts = shifts if isinstance(shifts, (list, tuple)) else [shifts]
    dims = dims if isinstance(dims, (list, tuple)) else [dims]
    if not dims or len(shifts) != len(dims) or any(not isinstance(s, int) for s in shifts):
        raise Unsupported("roll of the flattened tensor")
    if any(s.is_const and s.value == 0 for s in x.shape):
        raise Unsupported("empty")
    move = {normalize_dim(d, len(x.shape)): s for d, s in zip(dims, shifts, strict=True)}
    if len(move) != len(dims):
        raise Unsupported("roll of a repeated dimension")

    def remap(idx: Idx) -> Idx:
        return tuple([(i - move[d]) % x.shape[d] if d in move else i for d, i in enumerate(idx)])

    return view(x, x.shape, remap)


@register("aten.repeat.default", "gather", loose=(0,))
def _repeat(ctx: Context, node: Node, x: Value, repeats: list[Any]) -> Value:
    shape = shape_of(node)
    lead = len(shape) - len(x.shape)
    if any(s.is_const and s.value == 0 for s in (*shape, *x.shape)):
        raise Unsupported("empty")

    def remap(idx: Idx) -> Idx:
        return tuple(
            [
                i if o is s else (ZERO if s is ONE else i % s)
                for i, s, o in zip(idx[lead:], x.shape, shape[lead:], strict=True)
            ]
        )

    return view(x, shape, remap)


@register("aten.slice_scatter.default", "gather", loose=(1,))
def _slice_scatter(
    ctx: Context, node: Node, x: Value, src: Value, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> Value:
    from .views import _clamp

    if not isinstance(step, int):
        raise Unsupported("slice_scatter with a symbolic step")
    d = normalize_dim(dim, len(x.shape))
    base: Node = node.args[0]  # type: ignore[assignment]
    raw = node.args[3] if len(node.args) > 3 else node.kwargs.get("start")
    raw = raw.meta["val"] if isinstance(raw, Node) else raw
    lo = size_index(_clamp(raw, base.meta["val"].shape[d], 0))
    work = compute_dtype(x.dtype)

    def at(idx: Idx) -> Expr:
        j = idx[d] - lo
        inside = op("and", (op("ge", (j, ZERO), "b1"), op("lt", (j, src.shape[d] * step), "b1")), "b1")
        if step != 1:  # below lo the remainder may be anything
            inside = op("and", (inside, op("eq", (mod(j, index(step)), ZERO), "b1")), "b1")
            j = floordiv(j, index(step))
        return ctx.guarded(inside, lambda: cast(src.at(idx[:d] + (j,) + idx[d + 1 :]), work), x.at(idx))

    return Value(ctx, x.shape, x.dtype, at)


@register("aten.select_scatter.default", "gather", loose=(1,))
def _select_scatter(ctx: Context, node: Node, x: Value, src: Value, dim: int, at_index: Any) -> Value:
    d = normalize_dim(dim, len(x.shape))
    pos = position(at_index, x.shape[d])
    work = compute_dtype(x.dtype)

    def at(idx: Idx) -> Expr:
        return ctx.guarded(op("eq", (idx[d], pos), "b1"), lambda: cast(src.at(idx[:d] + idx[d + 1 :]), work), x.at(idx))

    return Value(ctx, x.shape, x.dtype, at)
