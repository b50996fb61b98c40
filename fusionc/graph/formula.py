"""Integer expressions that are affine in indices, and formulas over them: what ``positions`` computes with.

Axes are counted from the right. A formula is True, False, or conjunctions and disjunctions of "this expression is ≥ 0".
Constants may be symbolic sizes; nothing here adds a guard.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from .facts import value

INTEGERS = (torch.int64, torch.int32)
_LARGE = 2**31  # integers beyond this might wrap around in the real computation
_MOST_PARTS = 24


class Unproven(Exception):
    """The tensor is not (known to be) a function of its indices; ``node`` is where that shows."""

    def __init__(self, reason: str, node: Node | None = None) -> None:
        super().__init__(reason)
        self.reason, self.node = reason, node


@dataclass(frozen=True)
class Affine:
    """``constant + Σ factor · index[axis]``: integer factors, axes counted from the right; the constant may be symbolic."""

    factors: tuple[tuple[int, int], ...] = ()
    constant: Any = 0

    def __add__(self, other: Affine) -> Affine:
        merged = dict(self.factors)
        for axis, factor in other.factors:
            merged[axis] = merged.get(axis, 0) + factor
        return Affine(tuple(sorted((a, f) for a, f in merged.items() if f)), plain(self.constant + other.constant))

    def times(self, factor: int) -> Affine:
        """All of it multiplied by a number."""
        return Affine(tuple((a, f * factor) for a, f in self.factors if factor), plain(self.constant * factor))

    def __sub__(self, other: Affine) -> Affine:
        return self + other.times(-1)


@dataclass(frozen=True)
class AtLeastZero:
    """The atom of formulas: an integer expression is ≥ 0."""

    of: Affine


@dataclass(frozen=True)
class Both:
    """Conjunction."""

    parts: frozenset[Any]


@dataclass(frozen=True)
class Either:
    """Disjunction."""

    parts: frozenset[Any]


Formula = Any  # bool | AtLeastZero | Both | Either
Cases = dict[Affine, Formula]  # expression → when the element has this value; the formulas are a partition
ZERO, ONE = Affine(), Affine((), 1)


def both(*parts: Formula) -> Formula:
    """Conjunction, flattened; False and True are absorbed."""
    return _join(Both, parts, False)


def either(*parts: Formula) -> Formula:
    """Disjunction, flattened; True and False are absorbed."""
    return _join(Either, parts, True)


def _join(kind: Any, parts: Iterable[Formula], decisive: bool) -> Formula:
    found: set[Formula] = set()
    for part in parts:
        if part is decisive:
            return decisive
        if part is not (not decisive):
            found |= part.parts if isinstance(part, kind) else {part}
    if any(negated(part) in found for part in found if isinstance(part, AtLeastZero)):
        return decisive
    if len(found) > _MOST_PARTS:
        raise Unproven("the formula grows too large")
    if not found:
        return not decisive
    return next(iter(found)) if len(found) == 1 else kind(frozenset(found))


def negated(formula: Formula) -> Formula:
    """Negation, pushed down to the atoms."""
    if isinstance(formula, bool):
        return not formula
    if isinstance(formula, AtLeastZero):
        return AtLeastZero(Affine((), -1) - formula.of)  # integers: not (e ≥ 0) is −e − 1 ≥ 0
    join = either if isinstance(formula, Both) else both
    return join(*map(negated, formula.parts))


def plain(constant: Any) -> Any:
    """Integral floats as integers, symbolic expressions expanded: equal constants compare equal."""
    if isinstance(constant, float):
        if math.isnan(constant):
            raise Unproven("not a number")
        return int(constant) if math.isfinite(constant) and constant.is_integer() else constant
    if isinstance(constant, int):
        return constant
    found = constant.expand()
    return int(found) if found.is_Integer else found


def number(given: Any) -> Any:
    """A size, a number or a node that holds one, as int, float or symbolic expression; raises Unproven for others."""
    found = value(given) if isinstance(given, Node) else given
    if isinstance(found, (bool, int)):
        return int(found)
    if isinstance(found, float):
        return plain(found)
    if isinstance(found, torch.SymInt):
        return plain(found.node.expr)
    raise Unproven("a number is computed from data", given if isinstance(given, Node) else None)


def at_least_zero(found: Any) -> bool:
    """Provably ≥ 0 (never guards)."""
    return bool(found >= 0) if isinstance(found, (int, float)) else bool(found.is_nonnegative)


def order(a: Affine, b: Affine) -> Formula:
    """a ≥ b."""
    constants = (a.constant, b.constant)
    if any(isinstance(c, float) for c in constants):  # infinities and fractions compare with constants only
        if a.factors or b.factors or not all(isinstance(c, (int, float)) for c in constants):
            raise Unproven("positions are compared with a fraction")
        return bool(a.constant >= b.constant)
    difference = a - b
    if not difference.factors and isinstance(difference.constant, int):
        return difference.constant >= 0
    return AtLeastZero(difference)


def rounded(found: Affine, kind: torch.dtype | None) -> Affine:
    """The expression as the dtype holds it: only constants may be rounded, integers must not wrap around."""
    if kind == torch.bool:
        if found not in (ZERO, ONE):
            raise Unproven("a truth value that is a number")
        return found
    if kind in INTEGERS:
        steepest = max((abs(factor) for _, factor in found.factors), default=0)
        if (
            isinstance(found.constant, float)
            or isinstance(found.constant, int)
            and abs(found.constant) > _LARGE
            or steepest > (1 if kind == torch.int32 else _LARGE)
        ):  # times a size it must not wrap around
            raise Unproven("an integer that is too large or none")
        return found
    if kind is None or not kind.is_floating_point or found.factors or not isinstance(found.constant, (int, float)):
        raise Unproven(f"positions in {kind}")
    return Affine((), plain(torch.tensor(float(found.constant), dtype=kind).item()))
