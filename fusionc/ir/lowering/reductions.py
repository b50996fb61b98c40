"""Reductions, whole-row operators (softmax, norms and their gradients) and scans.

A lowering never invents loop variables: grouping decides which variables form the axis and hands each reducing node the
index of its reduced dimensions over them (`Context.axis_of`), so that several reductions over one axis share a kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch.fx import Node

from ..expr import FLOATS, ONE, ZERO, Const, Expr, Index, Reduce, Scan
from ..ops import cast, compute_dtype, op
from ..sizes import Unsupported
from ..value import Context, Idx, Value, normalize_dim
from .pointwise import E, add, binary, compare, div, fc, mul, sub, truth, unary, where
from .registry import DTYPE_NAME, dtype_of, register, scalar, shape_of


def _rank(node: Node) -> int:
    return len(node.args[0].meta["val"].shape)  # type: ignore[union-attr]


def _dims_arg(node: Node, position: int = 1, name: str = "dim") -> tuple[int, ...]:
    rank = _rank(node)
    dims = node.args[position] if len(node.args) > position else node.kwargs.get(name)
    if dims is None or (isinstance(dims, (list, tuple)) and not dims):
        return tuple(range(rank))
    if isinstance(dims, int):
        dims = [dims]
    return tuple(sorted(normalize_dim(d, rank) for d in dims)) if rank else ()  # type: ignore[union-attr]


def _all_dims(node: Node) -> tuple[int, ...]:
    return tuple(range(_rank(node)))


def _last_dims(count: int | None = None, position: int = 1) -> Callable[[Node], tuple[int, ...]]:
    def dims(node: Node) -> tuple[int, ...]:
        n = len(node.args[position])  # type: ignore[arg-type]
        rank = _rank(node)
        return tuple(range(rank - n, rank))

    return dims


class Rows:
    """The reduced dimensions of one node and how to evaluate its operands along the axis."""

    def __init__(self, ctx: Context, node: Node, dims: tuple[int, ...], shape: Idx):
        self.ctx, self.node, self.dims, self.shape = ctx, node, dims, shape
        self.count = ONE
        for d in dims:
            self.count = self.count * shape[d]

    def full(self, kept: Idx) -> Idx:
        """A row's index (rank of the input, reduced dimensions arbitrary) with the reduced dimensions along the axis."""
        along = self.ctx.axis_of[self.node]
        return tuple([along.get(d, ZERO) if d in self.dims else i for d, i in enumerate(kept)])

    def position(self) -> Index:
        """Row-major position over the reduced dimensions."""
        along = self.ctx.axis_of[self.node]
        flat = ZERO
        for d in self.dims:
            flat = flat * self.shape[d] + along.get(d, ZERO)
        return flat

    def reduce(self, kind: str, body: Expr) -> Expr:
        dtype = "i64" if kind.startswith("arg") else body.dtype
        if not self.ctx.axis_of[self.node]:  # every reduced dimension has size 1
            if kind == "sum" and body.dtype in FLOATS:
                return add(body, fc(0, body))  # the sum of -0.0 alone is 0.0
            return Const(0, "i64") if kind.startswith("arg") else body
        _not_captured(self.ctx)
        return Reduce(kind, self.ctx.axis_vars, body, dtype)

    def sum(self, body: Expr) -> Expr:
        return self.reduce("sum", body)

    def mean(self, body: Expr) -> Expr:
        return div(self.sum(body), self.size(body))

    def size(self, like: Expr) -> Expr:
        return cast(self.count, like.dtype)


def _not_captured(ctx: Context) -> None:
    """A guard of where along the axis the reader stands is about that place, and would be taken for one about each element."""
    if ctx.guard is not None and ctx.guard.free.intersection(ctx.axis_vars):
        raise Unsupported("a reduction is read under a guard along its own axis")


def _kept_index(idx: Idx, dims: tuple[int, ...], rank: int, keepdim: bool) -> Idx:
    """A result index of a reduction as an index of the input's rank (zeros at the reduced dimensions)."""
    if keepdim:
        return tuple([ZERO if d in dims else i for d, i in enumerate(idx)])
    it = iter(idx)
    return tuple([ZERO if d in dims else next(it) for d in range(rank)])


def _keepdim(node: Node, rank: int, dims: tuple[int, ...]) -> bool:
    val = node.meta["val"]
    val = val[0] if isinstance(val, (tuple, list)) else val
    return len(val.shape) == rank and bool(dims)


def _not_empty(x: Value, dims: tuple[int, ...]) -> None:
    for d in dims:
        if x.shape[d] is ZERO:
            raise Unsupported("reduction over nothing")


def _reduction(
    ctx: Context,
    node: Node,
    x: Value,
    dims: tuple[int, ...],
    make: Callable[[Rows, Callable[[], Expr]], Expr],
    work: str,
    dtype: str | None = None,
    shape: Idx | None = None,
) -> Value:
    """A reduce node: make(rows, body) builds the row's expression from the element expression."""
    rank = len(x.shape)
    rows = Rows(ctx, node, dims, x.shape)
    keep = _keepdim(node, rank, dims)

    def at(idx: Idx) -> Expr:
        full = rows.full(_kept_index(idx, dims, rank, keep))
        return make(rows, lambda: cast(x.at(full), work))

    return Value(ctx, shape_of(node) if shape is None else shape, dtype or dtype_of(node), at)


@register(["aten.sum.dim_IntList", "aten.sum.default", "aten.prod.default", "aten.prod.dim_int"], "reduce", dims=lambda n: (
    _all_dims(n) if n.target.overloadpacket.__name__ == "prod" and len(n.args) == 1 else _dims_arg(n)))  # fmt: skip
def _sum(ctx: Context, node: Node, x: Value, *_: Any, **__: Any) -> Value:
    kind = node.target.overloadpacket.__name__  # type: ignore[union-attr]
    work = compute_dtype(dtype_of(node))
    dims = _all_dims(node) if kind == "prod" and len(node.args) == 1 else _dims_arg(node)
    return _reduction(ctx, node, x, dims, lambda r, body: r.reduce(kind, body()), work)


@register(["aten.mean.dim", "aten.mean.default"], "reduce", dims=_dims_arg)
def _mean(ctx: Context, node: Node, x: Value, *_: Any, **__: Any) -> Value:
    work = compute_dtype(dtype_of(node))
    if work not in FLOATS:
        raise Unsupported("mean of integers")
    return _reduction(ctx, node, x, _dims_arg(node), lambda r, body: r.mean(body()), work)


@register(["aten.amax.default", "aten.amin.default", "aten.max.default", "aten.min.default"], "reduce",
          dims=lambda n: _dims_arg(n) if n.target.overloadpacket.__name__.startswith("am") else _all_dims(n))  # fmt: skip
def _extremum(ctx: Context, node: Node, x: Value, *_: Any, **__: Any) -> Value:
    name = node.target.overloadpacket.__name__  # type: ignore[union-attr]
    dims = _dims_arg(node) if name.startswith("am") else _all_dims(node)
    _not_empty(x, dims)
    work = compute_dtype(dtype_of(node))
    kind = "max" if "max" in name else "min"
    if work == "b1":
        kind = "any" if kind == "max" else "all"
    return _reduction(ctx, node, x, dims, lambda r, body: r.reduce(kind, body()), work)


@register(["aten.max.dim", "aten.min.dim"], "reduce", dims=_dims_arg)
def _extremum_with_position(ctx: Context, node: Node, x: Value, *_: Any, **__: Any) -> tuple[Value, Value]:
    dims = _dims_arg(node)
    _not_empty(x, dims)
    kind = node.target.overloadpacket.__name__  # type: ignore[union-attr]
    work = compute_dtype(x.dtype)
    if work == "b1":
        raise Unsupported("extremum of booleans")
    shape = tuple(shape_of_val(node.meta["val"][0]))
    value = _reduction(ctx, node, x, dims, lambda r, body: r.reduce(kind, body()), work, x.dtype, shape)
    where_ = _reduction(ctx, node, x, dims, lambda r, body: r.reduce("arg" + kind, body()), work, "i64", shape)
    return value, where_


def shape_of_val(val: Any) -> Idx:
    from ..sizes import sizes_index

    return sizes_index(val.shape)


@register(["aten.argmax.default", "aten.argmin.default"], "reduce", dims=_dims_arg)
def _arg_extremum(ctx: Context, node: Node, x: Value, *_: Any, **__: Any) -> Value:
    dims = _dims_arg(node)
    _not_empty(x, dims)
    kind = node.target.overloadpacket.__name__  # type: ignore[union-attr]
    work = compute_dtype(x.dtype)
    if work == "b1":
        raise Unsupported("extremum of booleans")
    return _reduction(ctx, node, x, dims, lambda r, body: r.reduce(kind, body()), work)


@register(
    ["aten.any.default", "aten.any.dim", "aten.any.dims", "aten.all.default", "aten.all.dim", "aten.all.dims"],
    "reduce",
    dims=_dims_arg,
)
def _any(ctx: Context, node: Node, x: Value, *_: Any, **__: Any) -> Value:
    kind = node.target.overloadpacket.__name__  # type: ignore[union-attr]
    if dtype_of(node) != "b1":
        raise Unsupported("any of bytes")
    return _reduction(
        ctx, node, x, _dims_arg(node), lambda r, body: r.reduce(kind, truth(body())), compute_dtype(x.dtype)
    )


def _correction(node: Node) -> Any:
    if "correction" in node.kwargs:
        c = node.kwargs["correction"]
        return 1 if c is None else c
    return 1


def _variance(r: Rows, body: Callable[[], Expr], correction: Any) -> tuple[Expr, Expr]:
    """Two-pass variance and the mean: nothing of it cancels, unlike in E[x²] - E[x]²."""
    x = body()
    mean = r.mean(x)
    d = sub(x, mean)
    n = r.size(x)
    denominator = sub(n, fc(correction, x)) if correction else n
    if correction:
        denominator = binary("maximum", denominator, fc(0, x))
    return div(r.sum(mul(d, d)), denominator), mean


def _as_in_aten(node: Node, x: Value) -> str:
    """The type of variances' sums: of float32, ATen adds up float64 on a CPU."""
    on_cpu = node.args[0].meta["val"].device.type == "cpu"  # type: ignore[union-attr]
    return "f64" if on_cpu and x.dtype == "f32" else compute_dtype(x.dtype)


@register(["aten.var.correction", "aten.std.correction"], "reduce", dims=_dims_arg)
def _var(ctx: Context, node: Node, x: Value, *_: Any, **__: Any) -> Value:
    work = _as_in_aten(node, x)
    c = _correction(node)
    root = node.target.overloadpacket.__name__ == "std"  # type: ignore[union-attr]

    def make(r: Rows, body: Callable[[], Expr]) -> Expr:
        v, _ = _variance(r, body, c)
        return unary("sqrt", v) if root else v

    return _reduction(ctx, node, x, _dims_arg(node), make, work)


@register("aten.var_mean.correction", "reduce", dims=_dims_arg)
def _var_mean(ctx: Context, node: Node, x: Value, *_: Any, **__: Any) -> tuple[Value, Value]:
    work = _as_in_aten(node, x)
    c = _correction(node)
    shape = shape_of_val(node.meta["val"][0])
    dims = _dims_arg(node)
    return (
        _reduction(ctx, node, x, dims, lambda r, body: _variance(r, body, c)[0], work, x.dtype, shape),
        _reduction(ctx, node, x, dims, lambda r, body: r.mean(body()), work, x.dtype, shape),
    )


@register("aten.logsumexp.default", "reduce", dims=_dims_arg)
def _logsumexp(ctx: Context, node: Node, x: Value, *_: Any, **__: Any) -> Value:
    work = compute_dtype(dtype_of(node))
    dims = _dims_arg(node)
    _not_empty(x, dims)

    def make(r: Rows, body: Callable[[], Expr]) -> Expr:
        e = body()
        top = r.reduce("max", e)
        safe = where(op("isinf", (top,), "b1"), fc(0, e), top)
        return add(unary("log", r.sum(unary("exp", sub(e, safe)))), safe)

    return _reduction(ctx, node, x, dims, make, work)


@register("aten.linalg_vector_norm.default", "reduce", dims=lambda n: _dims_arg(n, 2))
def _vector_norm(ctx: Context, node: Node, x: Value, ord: Any = 2, *_: Any, **__: Any) -> Value:
    work = compute_dtype(dtype_of(node))
    dims = _dims_arg(node, 2)
    if ord not in (1, 2):
        raise Unsupported(f"vector norm of order {ord}")

    def make(r: Rows, body: Callable[[], Expr]) -> Expr:
        e = body()
        return r.sum(unary("abs", e)) if ord == 1 else unary("sqrt", r.sum(mul(e, e)))

    return _reduction(ctx, node, x, dims, make, work)


# -- whole rows -----------------------------------------------------------------------------------------------------


def _row(ctx: Context, node: Node, args: list[Value], dims: tuple[int, ...], work: str, dtype: str,
         make: Callable[..., Expr], shape: Idx | None = None) -> Value:  # fmt: skip
    """A row node: make(rows, at_axis elements, at_idx elements) with one element expression per argument.

    `at_axis[k]` is argument k along the axis (inside reductions), `at_idx[k]` at the requested element.
    """
    shape = args[0].shape if shape is None else shape
    rows = Rows(ctx, node, dims, args[0].shape)

    def at(idx: Idx) -> Expr:
        full = rows.full(idx)
        return make(rows, [a.at_broadcast(full, work) for a in args], [a.at_broadcast(idx, work) for a in args])

    return Value(ctx, shape, dtype, at)


def _dim1(node: Node) -> tuple[int, ...]:
    rank = _rank(node)
    return (normalize_dim(node.args[1], rank),) if rank else ()  # type: ignore[arg-type]


def _dim2(node: Node) -> tuple[int, ...]:
    rank = _rank(node)
    return (normalize_dim(node.args[2], rank),) if rank else ()  # type: ignore[arg-type]


@register(["aten._softmax.default", "aten._safe_softmax.default"], "row", dims=_dim1)
def _softmax(ctx: Context, node: Node, x: Value, dim: int, *_: Any) -> Value:
    dtype = dtype_of(node)
    work = compute_dtype(dtype)
    safe = node.target.overloadpacket.__name__ == "_safe_softmax"  # type: ignore[union-attr]

    def make(r: Rows, a: list[E], i: list[E]) -> E:
        top = r.reduce("max", a[0])
        total = r.sum(unary("exp", sub(a[0], top)))
        y = div(unary("exp", sub(i[0], top)), total)
        if safe:  # rows that are all -inf give zeros
            y = where(compare("eq", top, fc(-math.inf, top)), fc(0, y), y)
        return y

    return _row(ctx, node, [x], _dim1(node), work, dtype, make)


@register("aten._log_softmax.default", "row", dims=_dim1)
def _log_softmax(ctx: Context, node: Node, x: Value, dim: int, *_: Any) -> Value:
    dtype = dtype_of(node)

    def make(r: Rows, a: list[E], i: list[E]) -> E:
        top = r.reduce("max", a[0])
        return sub(sub(i[0], top), unary("log", r.sum(unary("exp", sub(a[0], top)))))

    return _row(ctx, node, [x], _dim1(node), compute_dtype(dtype), dtype, make)


@register("aten._softmax_backward_data.default", "row", dims=_dim2)
def _softmax_backward(ctx: Context, node: Node, g: Value, y: Value, dim: int, *_: Any) -> Value:
    dtype = dtype_of(node)

    def make(r: Rows, a: list[E], i: list[E]) -> E:
        return mul(i[1], sub(i[0], r.sum(mul(a[0], a[1]))))

    return _row(ctx, node, [g, y], _dim2(node), compute_dtype(dtype), dtype, make)


@register("aten._log_softmax_backward_data.default", "row", dims=_dim2)
def _log_softmax_backward(ctx: Context, node: Node, g: Value, y: Value, dim: int, *_: Any) -> Value:
    dtype = dtype_of(node)

    def make(r: Rows, a: list[E], i: list[E]) -> E:
        return sub(i[0], mul(unary("exp", i[1]), r.sum(a[0])))

    return _row(ctx, node, [g, y], _dim2(node), compute_dtype(dtype), dtype, make)


def _at_dims(x: Value, dims: tuple[int, ...], idx: Idx, work: str) -> Expr:
    """A per-feature parameter (weight, bias) at the normalized dimensions of `idx`."""
    return cast(x.at(tuple([idx[d] for d in dims])), work)


@register("aten.native_layer_norm.default", "row", dims=_last_dims(), loose=(2, 3))
def _layer_norm(
    ctx: Context, node: Node, x: Value, shape: Any, weight: Value | None, bias: Value | None, eps: Any
) -> tuple[Value, ...]:
    dims = _last_dims()(node)
    if not dims:
        raise Unsupported("layer_norm over nothing")
    work = compute_dtype(x.dtype)
    rows = Rows(ctx, node, dims, x.shape)
    mean_val, rstd_val = node.meta["val"][1], node.meta["val"][2]

    def stats(full: Idx) -> tuple[E, E]:
        v, mean = _variance(rows, lambda: cast(x.at(full), work), 0)
        return mean, unary("rsqrt", add(v, scalar(ctx, eps, work)))

    def y(idx: Idx) -> E:
        mean, rstd = stats(rows.full(idx))
        e = mul(sub(cast(x.at(idx), work), mean), rstd)
        if weight is not None:
            e = mul(e, _at_dims(weight, dims, idx, work))
        if bias is not None:
            e = add(e, _at_dims(bias, dims, idx, work))
        return e

    stat_dtype = DTYPE_NAME[mean_val.dtype]
    return (
        Value(ctx, x.shape, x.dtype, y),
        Value(
            ctx,
            shape_of_val(mean_val),
            stat_dtype,
            lambda idx: cast(stats(rows.full(idx))[0], compute_dtype(stat_dtype)),
        ),
        Value(
            ctx,
            shape_of_val(rstd_val),
            stat_dtype,
            lambda idx: cast(stats(rows.full(idx))[1], compute_dtype(stat_dtype)),
        ),
    )


# -- scans ----------------------------------------------------------------------------------------------------------


@register(["aten.cumsum.default", "aten.cumprod.default"], "scan", dims=_dim1)
def _cumulative(ctx: Context, node: Node, x: Value, dim: int, **_: Any) -> Value:
    if not x.shape:
        raise Unsupported("scan of a scalar")
    work = compute_dtype(dtype_of(node))
    d = normalize_dim(dim, len(x.shape))
    kind = "sum" if node.target.overloadpacket.__name__ == "cumsum" else "prod"  # type: ignore[union-attr]

    def at(idx: Idx) -> Expr:
        var = idx[d].single_var()
        if var is None:
            if x.shape[d] is ONE:
                return cast(x.at(idx), work)
            raise Unsupported("scan read at another position")
        _not_captured(ctx)
        return Scan(kind, var, cast(x.at(idx), work), work)

    return Value(ctx, x.shape, dtype_of(node), at)
