"""Tensors that are functions of their own indices: what an attention mask is, as a formula, without computing it.

A causal mask is a few lines of ``arange``, comparison and broadcast. Whoever wants to know whether it *is* causal can list
spellings, compute it (16 million elements, sizes known), or evaluate it once with the indices left symbolic, which is done
here: a value is a small set of integer expressions, affine in the indices, each with the formula under which it holds.

    arange(n)[:, None] >= arange(m)      →   {1: i₋₂ − i₋₁ ≥ 0,  0: otherwise}

Axes are counted from the right, so that broadcasting renames nothing, and an axis of size 1 has index 0. A formula is
simplified by the ranges of the indices: a window of 4096 over 2048 positions, or ``position >= 0``, is no condition at
all. Sizes may be symbolic; nothing here adds a guard. Only tensors made of constants, sizes and ``arange`` have a value:
an input's elements raise ``Unproven``, as does any operator that is not listed.

Idea: abstract interpretation over affine index expressions (Feautrier, "Dataflow analysis of array and scalar references",
1991), here for a handful of operators.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.fx import Node

from .facts import Facts, dtype, same, same_sizes, shape, tensor
from .formula import (
    INTEGERS,
    ONE,
    ZERO,
    Affine,
    AtLeastZero,
    Both,
    Cases,
    Either,
    Formula,
    Unproven,
    at_least_zero,
    both,
    either,
    negated,
    number,
    order,
    plain,
    rounded,
)

_MOST_CASES = 6


class Positions:
    """Values of a graph's nodes as ``Cases``. Raises Unproven; ``used`` are the nodes that values were derived from."""

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self.known: dict[Node, Cases | Unproven] = {}

    def __call__(self, node: Node) -> Cases:
        """The value of one tensor node."""
        found = self.known.get(node)
        if found is None:
            try:
                found = self._evaluate(node)
            except Unproven as error:
                found = Unproven(error.reason, error.node or node)
            except (TypeError, IndexError, KeyError, AttributeError, RecursionError, OverflowError, ZeroDivisionError):
                found = Unproven("an operator is called in an unknown way", node)
            self.known[node] = found
        if isinstance(found, Unproven):
            raise found
        return found

    def truth(self, node: Node) -> Formula:
        """When an element is not zero."""
        return either(*[both(when, negated(self._equal(node, e, ZERO))) for e, when in self(node).items()])

    def used(self, node: Node) -> set[Node]:
        """The evaluated nodes that this one's value was derived from, itself included."""
        found: set[Node] = set()
        stack = [node]
        while stack:
            current = stack.pop()
            if current not in found and isinstance(self.known.get(current), dict):
                found.add(current)
                stack.extend(current.all_input_nodes)
        return found

    # ------------------------------------------------------------------------------------------------- one operator

    def _evaluate(self, node: Node) -> Cases:
        if node.op not in ("call_function", "call_method") or shape(node) is None:
            raise Unproven("it depends on data", node)
        if any(root in self.facts.writers for root in self.facts.roots(node)):
            raise Unproven("it is written in place", node)
        name = str(node.target) if node.op == "call_method" else _name(node.target)
        rule = _RULES.get(name.strip("_") if name.startswith("__") else name)  # __eq__ is eq
        if rule is None:
            raise Unproven(f"{name or node.target} is not understood", node)
        return self._settled(node, rule(self, node, *node.args, **node.kwargs))

    def _settled(self, node: Node, cases: Cases | Formula) -> Cases:
        """Cases in the node's dtype, formulas decided where the index ranges decide them."""
        if not isinstance(cases, dict):
            cases = {ONE: cases, ZERO: negated(cases)}
        found: Cases = {}
        kind = dtype(node)
        for expression, when in cases.items():
            when = self._decided(node, when)
            if when is not False:
                made = rounded(self._reduced(node, expression), kind)
                found[made] = either(found[made], when) if made in found else when
        if len(found) > _MOST_CASES:
            raise Unproven("too many different values", node)
        return found

    def _reduced(self, node: Node, found: Affine) -> Affine:
        sizes = shape(node) or ()
        return Affine(tuple((a, f) for a, f in found.factors if not same(sizes[a], 1)), found.constant)

    def _decided(self, node: Node, formula: Formula) -> Formula:
        if isinstance(formula, AtLeastZero):
            reduced = self._reduced(node, formula.of)
            low, high = self._range(node, reduced)
            if at_least_zero(low):
                return True
            return False if at_least_zero(-1 - high) else AtLeastZero(reduced)
        if isinstance(formula, (Both, Either)):
            join = both if isinstance(formula, Both) else either
            return join(*[self._decided(node, part) for part in formula.parts])
        return formula

    def _range(self, node: Node, found: Affine) -> tuple[Any, Any]:
        sizes = shape(node) or ()
        low = high = found.constant
        for axis, factor in found.factors:
            reach = factor * (number(sizes[axis]) - 1)
            low, high = (low, high + reach) if factor > 0 else (low + reach, high)
        return plain(low), plain(high)

    def _equal(self, node: Node, a: Affine, b: Affine) -> Formula:
        return both(order(a, b), order(b, a))

    def _operand(self, node: Node, given: Any) -> Cases:
        if isinstance(given, Node) and shape(given) is not None:
            return self(given)
        return {Affine((), number(given)): True}

    def _pairs(self, node: Node, a: Any, b: Any, combine: Callable[[Affine, Affine], Any]) -> list[tuple[Any, Formula]]:
        left, right = self._operand(node, a), self._operand(node, b)
        common = torch.result_type(*[tensor(x) if tensor(x) is not None else 0.5 if isinstance(x, float) else 0
                                     for x in (a, b)])  # fmt: skip
        if common.is_floating_point and any(rounded(e, common) != e for e in (*left, *right)):
            raise Unproven("a constant is rounded", node)
        return [(combine(x, y), both(p, q)) for x, p in left.items() for y, q in right.items()]

    def _merged(self, pairs: Iterable[tuple[Affine, Formula]]) -> Cases:
        found: Cases = {}
        for expression, when in pairs:
            found[expression] = either(found[expression], when) if expression in found else when
        return found

    def _moved(self, cases: Cases, move: Callable[[Affine], Affine]) -> Cases:
        """The same value with its indices replaced."""

        def rename(formula: Formula) -> Formula:
            if isinstance(formula, AtLeastZero):
                return AtLeastZero(move(formula.of))
            if isinstance(formula, (Both, Either)):
                return (both if isinstance(formula, Both) else either)(*map(rename, formula.parts))
            return formula

        return self._merged((move(e), rename(when)) for e, when in cases.items())

    def _renumbered(self, cases: Cases, axes: dict[int, int]) -> Cases:
        """Axes moved: {old: new}, both from the right; axes of size 1 have no factor and need none."""
        return self._moved(cases, lambda e: Affine(tuple(sorted((axes[a], f) for a, f in e.factors)), e.constant))

    def _substituted(self, cases: Cases, indices: dict[int, Affine]) -> Cases:
        """Every index replaced by an expression in the new ones."""

        def move(e: Affine) -> Affine:
            total = Affine((), e.constant)
            for axis, factor in e.factors:
                total = total + indices[axis].times(factor)
            return total

        return self._moved(cases, move)


def _name(target: Any) -> str:
    """A torch or operator function's name, "" for anything else that happens to be called so."""
    name = getattr(target, "__name__", "")
    homes = (torch, operator, torch.nn.functional, torch.Tensor)
    return name if any(getattr(home, name, None) is target for home in homes) else ""


# ------------------------------------------------------------------------------------------------------------ the rules
# Each takes (positions, node, *the node's arguments) and returns the cases, or a formula for a truth value.


def _arange(p: Positions, node: Node, *bounds: Any, start: Any = 0, end: Any = None, step: Any = 1, **_: Any) -> Cases:
    if len(bounds) > 1:
        start = bounds[0]
    if len(bounds) > 2:
        step = bounds[2]
    first, by = number(start), number(step)
    if not isinstance(by, int) or isinstance(first, float):
        raise Unproven("a fractional or symbolic step", node)
    return {Affine(((-1, by),) if by else (), first): True}


def _filled(position: int | None, fixed: int = 0) -> Callable[..., Cases]:
    def rule(p: Positions, node: Node, *given: Any, fill_value: Any = None, **_: Any) -> Cases:
        if position is None:
            return {Affine((), fixed): True}
        return {Affine((), number(given[position] if len(given) > position else fill_value)): True}

    return rule


def _tensor(p: Positions, node: Node, data: Any, **_: Any) -> Cases:
    return {Affine((), number(data)): True}


def _compared(swap: bool, strict: bool) -> Callable[..., Formula]:
    def rule(p: Positions, node: Node, a: Any, b: Any) -> Formula:
        def holds(x: Affine, y: Affine) -> Formula:
            big, small = (y, x) if swap else (x, y)
            return negated(order(small, big)) if strict else order(big, small)

        return either(*[both(truth, when) for truth, when in p._pairs(node, a, b, holds)])

    return rule


def _equality(wanted: bool) -> Callable[..., Formula]:
    def rule(p: Positions, node: Node, a: Any, b: Any) -> Formula:
        pairs = p._pairs(node, a, b, lambda x, y: p._equal(node, x, y))
        equal = either(*[both(truth, when) for truth, when in pairs])
        return equal if wanted else negated(equal)

    return rule


def _logical(join: Callable[..., Formula], only_bool: bool) -> Callable[..., Formula]:
    def rule(p: Positions, node: Node, a: Any, b: Any) -> Formula:
        sides = []
        for given in (a, b):
            if isinstance(given, Node) and shape(given) is not None:
                if only_bool and dtype(given) != torch.bool:
                    raise Unproven("bits of integers", node)
                sides.append(p.truth(given))
            else:
                if not isinstance(given, bool):
                    raise Unproven("bits of integers", node)
                sides.append(given)
        return join(*sides)

    return rule


def _not(p: Positions, node: Node, a: Node) -> Formula:
    if dtype(node) != torch.bool:
        raise Unproven("bits of integers", node)
    return negated(p.truth(a))


def _sum(sign: int, turned: bool = False) -> Callable[..., Cases]:
    def rule(p: Positions, node: Node, a: Any, b: Any, *, alpha: Any = 1) -> Cases:
        if alpha != 1:
            raise Unproven("alpha", node)
        a, b = (b, a) if turned else (a, b)
        if dtype(node) == torch.bool:
            raise Unproven("a sum of truth values", node)
        return p._merged(p._pairs(node, a, b, lambda x, y: x + y.times(sign)))

    return rule


def _product(p: Positions, node: Node, a: Any, b: Any) -> Cases:
    def multiply(x: Affine, y: Affine) -> Affine:
        if x.factors:
            x, y = y, x
        if x.factors or y.factors and not isinstance(x.constant, int):
            raise Unproven("a product of positions", node)
        if isinstance(x.constant, int):
            return y.times(x.constant)
        return Affine((), plain(x.constant * y.constant))

    return p._merged(p._pairs(node, a, b, multiply))


def _negative(p: Positions, node: Node, a: Node) -> Cases:
    return p._merged((e.times(-1), when) for e, when in p(a).items())


def _absolute(p: Positions, node: Node, a: Node) -> Cases:
    pairs = []
    for e, when in p(a).items():
        above = order(e, ZERO)
        pairs += [(e, both(when, above)), (e.times(-1), both(when, negated(above)))]
    return p._merged(pairs)


def _chosen(p: Positions, node: Node, condition: Node, yes: Any, no: Any) -> Cases:
    when = p.truth(condition)
    taken = [(e, both(w, when)) for e, w in p._operand(node, yes).items()]
    return p._merged(taken + [(e, both(w, negated(when))) for e, w in p._operand(node, no).items()])


def _masked_fill(p: Positions, node: Node, x: Node, mask: Node, value: Any) -> Cases:
    return _chosen(p, node, mask, value, x)


def _triangle(sign: int) -> Callable[..., Cases]:
    def rule(p: Positions, node: Node, x: Node, diagonal: Any = 0) -> Cases:
        at = Affine((), number(diagonal))
        distance = Affine(((-2, 1), (-1, -1))) + at  # tril keeps column − row ≤ diagonal, triu ≥
        kept = AtLeastZero(distance if sign > 0 else distance.times(-1))
        return p._merged([*[(e, both(w, kept)) for e, w in p(x).items()], (ZERO, negated(kept))])

    return rule


def _diff(
    p: Positions, node: Node, x: Node, n: int = 1, dim: int = -1, prepend: Any = None, append: Any = None
) -> Cases:
    if n != 1 or append is not None or dtype(x) not in INTEGERS:
        raise Unproven("a difference that is not understood", node)
    axis = dim - len(shape(x) or ()) if dim >= 0 else dim
    found = _only(p(x), node)
    step = Affine((), dict(found.factors).get(axis, 0))
    if prepend is None:
        return {step: True}
    before = _only(p(prepend), node)
    if not same((shape(prepend) or ())[axis], 1):
        raise Unproven("a difference that is not understood", node)
    first = Affine(tuple((a, f) for a, f in found.factors if a != axis), found.constant) - before
    later = AtLeastZero(Affine(((axis, 1),), -1))
    return p._merged([(step, later), (first, negated(later))])


def _cumsum(p: Positions, node: Node, x: Node, dim: int, **_: Any) -> Cases:
    found = _only(p(x), node)
    if found.factors or not isinstance(found.constant, int):
        raise Unproven("a running sum of several values", node)
    axis = dim - len(shape(x) or ()) if dim >= 0 else dim
    return {Affine(((axis, found.constant),) if found.constant else (), found.constant): True}


def _only(cases: Cases, node: Node) -> Affine:
    if len(cases) != 1:
        raise Unproven("several cases at once", node)
    return next(iter(cases))


def _same(p: Positions, node: Node, x: Node, *_: Any, **__: Any) -> Cases:
    """The same elements, perhaps in another dtype, broadcast or copied."""
    cases = p(x)
    if dtype(node) == torch.bool and dtype(x) != torch.bool:
        truth = p.truth(x)
        return {ONE: truth, ZERO: negated(truth)}
    if dtype(node) in INTEGERS and dtype(x) is not None and dtype(x).is_floating_point:  # type: ignore[union-attr]
        raise Unproven("a cast that truncates", node)
    return cases


def _repeat(p: Positions, node: Node, x: Node, *times: Any) -> Cases:
    """Repetition along axes of size 1 is broadcasting."""
    counts = times[0] if len(times) == 1 and isinstance(times[0], (tuple, list)) else times
    sizes = shape(x) or ()
    for axis in range(-len(sizes), 0):
        if number(counts[axis]) != 1 and not same(sizes[axis], 1):
            raise Unproven("positions are repeated", node)
    return p(x)


def _unsqueeze(p: Positions, node: Node, x: Node, dim: int) -> Cases:
    rank = len(shape(node) or ())
    at = dim % rank
    old = [i for i in range(rank) if i != at]
    return p._renumbered(p(x), {k - (rank - 1): i - rank for k, i in enumerate(old)})


def _reordered(p: Positions, node: Node, x: Node, axes: Sequence[int]) -> Cases:
    rank = len(axes)
    return p._renumbered(p(x), {old % rank - rank: new - rank for new, old in enumerate(axes)})


def _transpose(p: Positions, node: Node, x: Node, a: int, b: int) -> Cases:
    axes = list(range(len(shape(x) or ())))
    axes[a], axes[b] = axes[b], axes[a]
    return _reordered(p, node, x, axes)


def _permute(p: Positions, node: Node, x: Node, *dims: Any) -> Cases:
    return _reordered(p, node, x, dims[0] if len(dims) == 1 and not isinstance(dims[0], int) else dims)


def _reshaped(p: Positions, node: Node, x: Node, *_: Any, **__: Any) -> Cases:
    """Axes of size 1 come and go; anything else only if all elements are equal."""
    cases = p(x)
    if dtype(node) != dtype(x):
        raise Unproven("bits are read as another type", node)
    if len(cases) == 1 and not next(iter(cases)).factors:
        return cases
    old, new = shape(x) or (), shape(node) or ()
    before = [i for i, size in enumerate(old) if not same(size, 1)]
    after = [i for i, size in enumerate(new) if not same(size, 1)]
    if not same_sizes([old[i] for i in before], [new[i] for i in after]):
        raise Unproven("positions are reshaped", node)
    return p._renumbered(cases, {a - len(old): b - len(new) for a, b in zip(before, after)})


def _item(p: Positions, node: Node, x: Node, index: Any) -> Cases:
    parts = list(index) if isinstance(index, tuple) else [index]
    sizes, rank = shape(x) or (), len(shape(node) or ())
    tensors = [part for part in parts if isinstance(part, Node) and shape(part) is not None]
    if tensors:
        return _gathered(p, node, x, parts)
    if any(part is True or part is False for part in parts):
        raise Unproven("an index that is a truth value", node)
    spread = len(sizes) - sum(part is not None and part is not Ellipsis for part in parts)
    where = next((i for i, part in enumerate(parts) if part is Ellipsis), len(parts))
    parts[where : where + 1] = [slice(None)] * spread
    indices: dict[int, Affine] = {}
    old = new = 0
    for part in parts:
        if part is None:
            new += 1
            continue
        axis, size = old - len(sizes), number(sizes[old])
        old += 1
        if isinstance(part, slice):
            step = 1 if part.step is None else number(part.step)
            if not isinstance(step, int):
                raise Unproven("a symbolic step", node)
            begin = 0 if part.start is None else _clamped(number(part.start), size, node)
            indices[axis] = Affine(((new - rank, step),), begin)
            new += 1
        else:
            indices[axis] = Affine((), _clamped(number(part), size, node))
    return p._substituted(p(x), indices)


def _clamped(start: Any, size: Any, node: Node) -> Any:
    """A start counted from the left (one beyond the end selects nothing, so it needs no clamp)."""
    if at_least_zero(start):
        return start
    if isinstance(start, int) and isinstance(size, int):
        return max(start + size, 0)
    if isinstance(start, int) and at_least_zero(size + start):
        return plain(size + start)
    raise Unproven("a start that may be negative", node)


def _gathered(p: Positions, node: Node, x: Node, parts: list[Any]) -> Cases:
    """x[i, j, …] with integer tensors for all axes: their broadcast shape is the result's."""
    sizes = shape(x) or ()
    if len(parts) != len(sizes) or any(dtype(part) not in INTEGERS for part in parts):
        raise Unproven("an index by tensors that is not understood", node)
    cases = p(x)
    if len(cases) == 1 and not next(iter(cases)).factors:
        for part in parts:
            p(part)
        return cases
    indices: dict[int, Affine] = {}
    for k, part in enumerate(parts):
        indices[k - len(sizes)] = found = _only(p(part), node)
        low, high = p._range(part, found)
        if not (at_least_zero(low) and at_least_zero(number(sizes[k]) - 1 - high)):
            raise Unproven("an index that may be out of range", node)
    return p._substituted(cases, indices)


_RULES: dict[str, Callable[..., Any]] = {
    "arange": _arange,
    "full": _filled(1), "full_like": _filled(1), "new_full": _filled(2), "tensor": _tensor,
    "where": _chosen, "masked_fill": _masked_fill, "tril": _triangle(1), "triu": _triangle(-1),
    "diff": _diff, "cumsum": _cumsum, "getitem": _item, "mul": _product, "multiply": _product,
    "neg": _negative, "abs": _absolute, "repeat": _repeat, "unsqueeze": _unsqueeze, "transpose": _transpose, "permute": _permute,
    "add": _sum(1), "radd": _sum(1), "sub": _sum(-1), "rsub": _sum(-1, True), "rmul": _product,
}  # fmt: skip
_RULES |= dict.fromkeys(("ones", "ones_like", "new_ones"), _filled(None, 1))
_RULES |= dict.fromkeys(("zeros", "zeros_like", "new_zeros"), _filled(None, 0))
_RULES |= dict.fromkeys(("ge", "greater_equal"), _compared(False, False))
_RULES |= dict.fromkeys(("le", "less_equal"), _compared(True, False))
_RULES |= dict.fromkeys(("gt", "greater"), _compared(False, True))
_RULES |= dict.fromkeys(("lt", "less"), _compared(True, True))
_RULES |= {"eq": _equality(True), "ne": _equality(False), "not_equal": _equality(False)}
_RULES |= dict.fromkeys(("and_", "and", "bitwise_and"), _logical(both, True))
_RULES |= dict.fromkeys(("or_", "or", "bitwise_or"), _logical(either, True))
_RULES |= {"logical_and": _logical(both, False), "logical_or": _logical(either, False)}
_RULES |= dict.fromkeys(("invert", "logical_not", "bitwise_not"), _not)
_RULES |= dict.fromkeys(("expand", "expand_as", "broadcast_to", "contiguous", "clone", "detach", "to", "type", "type_as",
                         "bool", "float", "half", "bfloat16", "double", "int", "long"), _same)  # fmt: skip
_RULES |= dict.fromkeys(("view", "reshape", "squeeze", "flatten"), _reshaped)
