"""Symbolic sizes: torch's SymInt / sympy on one side, `Index` on the other.  sympy stays on this page."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .expr import ONE, Expr, Index, Size, bounds, floordiv, index, mod, nonnegative


class Unsupported(Exception):
    """This node cannot be expressed in the loop IR; the text says why.  The caller leaves it to ATen."""


_LEAST = -(2**63)  # what a symbol without a lower bound is at least

_static: dict[tuple[int, ...], tuple[Index, ...]] = {}  # most sizes are plain numbers, asked for again and again


def size_index(x: Any) -> Index:
    """An int, SymInt or sympy integer expression as an `Index` over `Size` symbols.

    Raises Unsupported for unbacked symbols and functions the IR has no node for.
    """
    if isinstance(x, int):
        return index(x)
    if isinstance(x, torch.SymInt):
        node = x.node
        if node.is_constant():
            return index(int(node.maybe_as_int()))
        if not node.expr.is_Symbol and node.hint == 1 and statically_known_true(x == 1):
            return ONE  # torch has broadcast by it, under a guard
        return _convert(node.expr, node.shape_env)
    raise Unsupported(f"size {x!r} is neither an int nor a SymInt")


def sizes_index(xs: Any) -> tuple[Index, ...]:
    xs = tuple(xs)
    try:
        found = _static.get(xs)
    except TypeError:  # symbolic sizes have no hash
        return tuple([index(x) if type(x) is int else size_index(x) for x in xs])
    if found is None:
        found = tuple([index(x) if type(x) is int else size_index(x) for x in xs])
        if all(type(x) is int for x in xs):
            _static[xs] = found
    return found


def strides_index(xs: Any) -> tuple[Index, ...]:
    """The strides of a tensor.  torch writes those of a contiguous one as products of Max(1, size), and where such a
    size is 0 the tensor is empty and has no addresses, so here Max(1, e) is e."""
    xs = tuple(xs)
    if all(type(x) is int for x in xs):
        return sizes_index(xs)
    return tuple([index(x) if type(x) is int else _stride(x) for x in xs])


def _stride(x: Any) -> Index:
    if not isinstance(x, torch.SymInt) or x.node.is_constant():
        return size_index(x)
    e = x.node.expr
    if "Max" in str(e):
        e = e.replace(lambda m: type(m).__name__ == "Max" and len(m.args) == 2 and m.args[0] == 1, lambda m: m.args[1])
    return _convert(e, x.node.shape_env)


def _convert(e: Any, env: Any) -> Index:
    if e.is_Integer:
        return index(int(e))
    if e.is_Symbol:
        name = str(e)
        if not name.startswith("s"):
            raise Unsupported(f"size {name} depends on data")
        lower = 0
        found = env.var_to_range.get(e) if env is not None else None
        if found is not None:  # sizes are at least 0; a number that the user passes may be negative
            lower = int(found.lower) if found.lower.is_Integer else _LEAST
        return index(Size(name, lower))
    if e.is_Add:
        total = index(0)
        for a in e.args:
            total = total + _convert(a, env)
        return total
    if e.is_Mul:
        total = index(1)
        for a in e.args:
            if a.is_Rational and not a.is_Integer:
                raise Unsupported(f"size {e} has a fraction")
            total = total * _convert(a, env)
        return total
    if e.is_Pow and e.exp.is_Integer and int(e.exp) > 0:
        base = _convert(e.base, env)
        total = base
        for _ in range(int(e.exp) - 1):
            total = total * base
        return total
    kind = type(e).__name__
    if kind in ("FloorDiv", "CleanDiv"):
        return floordiv(_convert(e.args[0], env), _positive(_convert(e.args[1], env)))
    if kind in ("Mod", "PythonMod"):
        return mod(_convert(e.args[0], env), _positive(_convert(e.args[1], env)))
    raise Unsupported(f"size {e} uses {kind}")


def position(at: Any, size: Index) -> Index:
    """Where ``at`` (an int, SymInt or Index, perhaps counted from the end) lies along a dimension of this size.

    Raises Unsupported for one that depends on sizes and is not known to lie there.
    """
    where = at if isinstance(at, Index) else size_index(at)
    if where.is_const and where.value < 0:
        where = where + size
    if not where.is_const and not (nonnegative(where) and nonnegative(size - 1 - where)):
        raise Unsupported("a position that may be negative or out of range")
    return where


def _positive(d: Index) -> Index:
    low = bounds(d)[0]
    if low is None or low < 0 or (d.is_const and d.value == 0):
        raise Unsupported("division of a size by a number that may be negative or zero")
    return d


def free_sizes(e: Expr, into: dict[str, Size]) -> None:
    """Collect the Size symbols of an expression by name."""
    if isinstance(e, Size):
        into[e.name] = e
    for c in e.children():
        free_sizes(c, into)
