"""Lazy tensors: a shape, a dtype and a function from an index tuple to a scalar expression.

Lowering composes these functions, so views cost nothing and fusion is inlining.  Where a part of a tensor must not be
touched (the other inputs of a `cat`, the border of a `pad`), the reader evaluates it under a guard: `Context.guarded`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .expr import ONE, ZERO, Const, Expr, Index, Var, floordiv, index, mod
from .ops import and_, cast, compute_dtype, op

Idx = tuple[Index, ...]


class Context:
    """What evaluation depends on besides the index: the guard in force and the axis of each reducing node."""

    def __init__(self) -> None:
        self.guard: Expr | None = None
        self.axis_vars: tuple[Var, ...] = ()
        self.axis_of: dict[Any, dict[int, Index]] = {}

    def guarded(self, cond: Expr, make: Callable[[], Expr], other: Expr) -> Expr:
        """where(cond, make(), other), with no memory access of `make` happening where cond is false."""
        if isinstance(cond, Const):
            return make() if cond.value else other
        saved = self.guard
        self.guard = and_(saved, cond)
        try:
            inner = make()
        finally:
            self.guard = saved
        if other.dtype != inner.dtype:
            other = cast(other, inner.dtype)
        return op("where", (cond, inner, other), inner.dtype)

    def unguarded(self, make: Callable[[], Expr]) -> Expr:
        """``make()`` as if no guard were in force: for what may be read anywhere."""
        saved, self.guard = self.guard, None
        try:
            return make()
        finally:
            self.guard = saved


class Value:
    """A tensor that is not (necessarily) in memory.  `at(idx)` is in `compute_dtype(dtype)`."""

    __slots__ = ("shape", "dtype", "_at", "_memo", "ctx")

    def __init__(self, ctx: Context, shape: Idx, dtype: str, at: Callable[[Idx], Expr]):
        self.ctx, self.shape, self.dtype, self._at = ctx, shape, dtype, at
        self._memo: dict[tuple, Expr] = {}

    def at(self, idx: Idx) -> Expr:
        guard = self.ctx.guard
        key = (-1 if guard is None else guard.uid, *[i.uid for i in idx])
        out = self._memo.get(key)
        if out is None:
            out = self._memo[key] = self._at(idx)
        return out

    def at_broadcast(self, idx: Idx, dtype: str) -> Expr:
        """The element that broadcasting to a result index `idx` reads, cast to `dtype`."""
        shape = self.shape
        n = len(shape)
        if n:
            tail = idx[len(idx) - n :]
            if ONE in shape:
                tail = tuple([ZERO if s is ONE else i for s, i in zip(shape, tail, strict=True)])
        else:
            tail = ()
        return cast(self.at(tail), dtype)


def numel(shape: Sequence[Index]) -> Index:
    known, symbolic = 1, ONE
    for s in shape:
        if s.is_const:
            known *= s.value
        else:
            symbolic = symbolic * s
    return symbolic * known


def linearize(idx: Sequence[Index], shape: Sequence[Index]) -> Index:
    flat = ZERO
    for i, s in zip(idx, shape, strict=True):
        flat = flat * s + i
    return flat


def delinearize(flat: Index, shape: Sequence[Index]) -> Idx:
    out: list[Index] = []
    for k, s in enumerate(reversed(shape)):
        if k == len(shape) - 1:
            out.append(flat)
        elif s is ONE:
            out.append(ZERO)
        else:
            out.append(mod(flat, s))
            flat = floordiv(flat, s)
    return tuple(reversed(out))


def reshape_index(idx: Idx, src: Idx, dst: Idx) -> Idx:
    """`idx` over shape `src` → the index over `dst` of the same element in row-major order (equal numel).

    Dimensions are matched in the smallest groups with equal products, so that only real merges and splits cost
    divisions.
    """
    if src == dst:
        return idx
    full = [i for i, n in zip(idx, src, strict=True) if n is not ONE]
    src = tuple([n for n in src if n is not ONE])
    wide = [d for d, n in enumerate(dst) if n is not ONE]
    sizes = [dst[d] for d in wide]
    at: dict[Index, list[int]] = {}  # product of the first dimensions of dst -> how many they are
    product = ONE
    for j, n in enumerate(sizes, 1):
        product = product * n
        at.setdefault(product, []).append(j)
    found: list[Index] = []
    i0 = j0 = 0
    product = ONE
    for i, n in enumerate(src, 1):
        product = product * n
        end = len(sizes) if i == len(src) else next((j for j in at.get(product, ()) if j > j0), None)
        if end is not None:
            found += delinearize(linearize(full[i0:i], src[i0:i]), sizes[j0:end])
            i0, j0 = i, end
    found += [ZERO] * (len(sizes) - len(found))
    out = [ZERO] * len(dst)
    for d, i_d in zip(wide, found, strict=True):
        out[d] = i_d
    return tuple(out)


def view(x: Value, shape: Idx, remap: Callable[[Idx], Idx]) -> Value:
    """A Value of another shape that reads `x` at `remap(idx)`."""
    return Value(x.ctx, shape, x.dtype, lambda idx: x.at(remap(idx)))


def pointwise(
    ctx: Context, shape: Idx, dtype: str, args: Sequence[Value], fn: Callable[..., Expr], arg_dtype: str
) -> Value:
    """fn over the broadcast arguments, each cast to `arg_dtype` first; the result is cast to compute_dtype(dtype)."""
    out = compute_dtype(dtype)

    def at(idx: Idx) -> Expr:
        return cast(fn(*[a.at_broadcast(idx, arg_dtype) for a in args]), out)

    return Value(ctx, shape, dtype, at)


def const(ctx: Context, value: Any, dtype: str, shape: Idx = ()) -> Value:
    c = Const(value, compute_dtype(dtype))
    rounded = cast(cast(c, dtype), compute_dtype(dtype))
    return Value(ctx, shape, dtype, lambda idx: rounded)


def from_index(ctx: Context, i: Index, dtype: str = "i64") -> Value:
    e = cast(i, compute_dtype(dtype))
    return Value(ctx, (), dtype, lambda idx: e)


def normalize_dim(dim: int, rank: int) -> int:
    return dim + max(rank, 1) if dim < 0 else dim


__all__ = [
    "Context",
    "Idx",
    "Value",
    "const",
    "delinearize",
    "from_index",
    "index",
    "linearize",
    "normalize_dim",
    "numel",
    "pointwise",
    "reshape_index",
    "view",
]
