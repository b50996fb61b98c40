"""Sums over a short axis that a stack has just made are additions of what was stacked: no stack in memory.

Math       Σᵢ (stack(x₀, x₁)ᵢ · aᵢ) = x₀·a₀ + x₁·a₁, also without a, and with further pointwise operators between
Exactness  reassociates: the sum of two to four terms in their order
Legality   the axis has 2 to 4 elements, all of it contiguous; between stack and sum only +, −, ×, ÷ that nobody else reads;
           in half precision two terms (a longer sum is rounded once there)
Cost       of a selective kernel unit with two branches: 11 maps read or written become 5, and two kernels of six go
Source     Li et al., Selective Kernel Networks (arXiv 1903.06586), as it is usually written
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.fx import Node

from ..graph import edit
from ..graph.facts import Facts, dtype, same, same_sizes, shape, tensor
from .base import Match, Pass, Reassociates, Refuse

aten = torch.ops.aten
_POINTWISE = (aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.div.Tensor)
_VIEWS = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)
Part = Callable[[int], Any]  # number along the axis → node or number


class StackedSum(Pass):
    """aten.sum over a stacked axis → additions."""

    name = "stacked_sum"
    exactness = Reassociates(rtol=1e-6)
    atomic = True

    def find(self, facts: Facts) -> Iterator[Match]:
        """Sums over one axis of two to four elements with a stack behind."""
        for node in list(facts.gm.graph.find_nodes(op="call_function", target=aten.sum.dim_IntList)):
            of = shape(node.args[0])
            if of is None or len(node.args) < 2 or len(node.args[1] or ()) != 1 or not of:
                continue
            axis = node.args[1][0] % len(of)
            if isinstance(of[axis], int) and 2 <= of[axis] <= 4 and _stacked(node.args[0], axis, len(of)):
                yield Match({"sum": node, "axis": axis, "count": of[axis]}, (node,))

    def check(self, match: Match, facts: Facts) -> Refuse | None:
        """See Legality."""
        node: Node = match.sum
        kind = dtype(node)
        if node.kwargs or kind is None or not kind.is_floating_point:
            return Refuse("the sum has another dtype than its terms", node)
        if match.count > 2 and kind not in (torch.float32, torch.float64):
            return Refuse("a longer sum in half precision is rounded once, additions each time", node)
        for each in (node, *_leaves(node.args[0], match.axis, len(shape(node.args[0]) or ()))):
            like = tensor(each)
            if like is None or like.dtype != kind or not like.is_contiguous():
                return Refuse("a part is not contiguous or has another dtype", each)
        return None

    def replace(self, match: Match, facts: Facts) -> None:
        """The terms, then their sum."""
        node, axis, count = match.sum, match.axis, match.count
        graph, rank = facts.gm.graph, len(shape(node.args[0]) or ())
        keep = len(node.args) > 2 and node.args[2]

        def call(target: Any, *args: Any) -> Node:
            return edit.insert(graph, target, args, origin=(node,))

        def term(of: Any, i: int) -> Any:
            d, sizes = _axis(of, axis, rank), shape(of)
            if d is None or sizes is None:
                return of
            parts = _parts(of, d)
            if parts is not None:
                return parts[i]
            if same(sizes[d], 1):
                return call(aten.select.int, of, d, 0)
            if _inner(of):
                return call(of.target, *(term(a, i) for a in of.args))
            return call(aten.select.int, of, d, i)

        with graph.inserting_before(node):
            total = term(node.args[0], 0)
            for i in range(1, count):
                total = call(aten.add.Tensor, total, term(node.args[0], i))
            if keep:
                total = call(aten.unsqueeze.default, total, axis)
        edit.replace(node, total)


def _axis(of: Any, axis: int, rank: int) -> int | None:
    """The axis in an operand that is broadcast to ``rank`` axes; None if it has none there."""
    sizes = shape(of)
    d = -1 if sizes is None else axis - (rank - len(sizes))
    return d if d >= 0 else None


def _parts(of: Any, d: int) -> tuple[Node, ...] | None:
    """What was stacked along axis ``d``, if ``of`` is a stack: cat and a view, or cat of views with a new axis."""
    if not isinstance(of, Node) or of.op != "call_function":
        return None
    sizes = shape(of)
    assert sizes is not None
    if of.target in _VIEWS and isinstance(of.args[0], Node) and of.args[0].target is aten.cat.default:
        cat = of.args[0]
        parts, along = cat.args[0], (cat.args[1] if len(cat.args) > 1 else 0)
        made = (*sizes[:d], *sizes[d + 1 :])
        along = along % len(made) if made else 0
        if same(len(parts), sizes[d]) and along == d and all(same_sizes(shape(p), made) for p in parts):
            return tuple(parts)
    if of.target is aten.stack.default and (of.args[1] if len(of.args) > 1 else 0) % len(sizes) == d:
        return tuple(of.args[0])
    if of.target is aten.cat.default and (of.args[1] if len(of.args) > 1 else 0) % len(sizes) == d:
        given = of.args[0]
        new = all(isinstance(p, Node) and p.target is aten.unsqueeze.default and p.args[1] % len(sizes) == d for p in given)
        return tuple(p.args[0] for p in given) if new else None
    return None


def _inner(of: Node) -> bool:
    """A pointwise operator that one other reads: looked into, unless both operands are one (work would double each time)."""
    return of.target in _POINTWISE and not of.kwargs and len(of.users) == 1 and of.args[0] is not of.args[1]


def _stacked(of: Any, axis: int, rank: int) -> bool:
    """Is there a stack behind pointwise operators that only the sum reads?"""
    d = _axis(of, axis, rank)
    if d is None:
        return False
    if _parts(of, d) is not None:
        return True
    return _inner(of) and any(isinstance(a, Node) and _stacked(a, axis, rank) for a in of.args)


def _leaves(of: Any, axis: int, rank: int) -> Iterator[Node]:
    if not isinstance(of, Node):
        return
    d = _axis(of, axis, rank)
    parts = _parts(of, d) if d is not None else None
    if parts is not None:
        yield from parts
    elif d is not None and _inner(of):
        for a in of.args:
            yield from _leaves(a, axis, rank)
    else:
        yield of


__all__ = ["StackedSum"]
