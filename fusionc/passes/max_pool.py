"""Max pooling without its positions, and before what preserves order.

Math       max_pool(f(x)) = f(max_pool(x)) for f that never decreases along the window: relu, x + b[C, 1, 1]
Exactness  exact: rounding never decreases either, and NaN stays NaN (unless an infinite bias meets its opposite)
Legality   the positions are not read; the value that is pooled has no other reader; b is constant over each window
Cost       the positions' 8 bytes an element; f runs on a quarter of the elements, and its result is never stored
Source     max is a lattice homomorphism of monotone maps; the positions exist for the gradient only
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch.fx import Node

from ..graph import edit
from ..graph.facts import Facts, shape, tensor
from .base import Exact, Match, Pass, Refuse

aten = torch.ops.aten


class MaxPool(Pass):
    """max_pool2d_with_indices → max_pool2d, moved in front of bias and relu."""

    name = "max_pool"
    atomic = True
    exactness = Exact()
    devices: ClassVar[tuple[str, ...]] = ("cuda",)

    def find(self, facts: Facts) -> Iterator[Match]:
        """Every max pooling, with the chain of order-preserving operators before it."""
        for node in list(facts.gm.graph.find_nodes(op="call_function", target=aten.max_pool2d_with_indices.default)):
            like = tensor(node.args[0])
            if like is None or like.device.type not in self.devices:
                continue
            chain: list[Node] = []
            source = node.args[0]
            while isinstance(source, Node) and len(source.users) == 1 and _monotone(source):
                chain.append(source)
                source = source.args[0]
            yield Match({"pool": node, "chain": tuple(reversed(chain)), "source": source}, (node,))

    def check(self, match: Match, facts: Facts) -> Refuse | None:
        """See Legality."""
        like = tensor(match.source)
        if any(user.target is not operator.getitem or user.args[1] != 0 for user in match.pool.users):
            return Refuse("the positions of the maxima are read", match.pool)
        if like is None or not like.dtype.is_floating_point:
            return Refuse("what is pooled is not floating point", match.pool)
        if shape(match.source) != shape(match.pool.args[0]) or like.dtype != match.pool.args[0].meta["val"].dtype:
            return Refuse("an operator before it changes shape or dtype", match.pool)
        padding, dilation = (_numbers(match.pool, place, default) for place, default in ((3, 0), (4, 1)))
        if match.chain and any(n != 0 for n in padding) and any(n != 1 for n in dilation):
            return Refuse("a window may hold nothing but padding, which relu would change", match.pool)
        return None

    def replace(self, match: Match, facts: Facts) -> None:
        """Pool what the chain starts from, then run the chain on the result."""
        graph, pool = facts.gm.graph, match.pool
        val = pool.meta["val"][0]
        with graph.inserting_before(pool):
            made = edit.insert(graph, aten.max_pool2d.default, (match.source, *pool.args[1:]), origin=(pool,), val=val)
            for old in match.chain:
                args: list[Any] = [made, *old.args[1:]]
                made = edit.insert(graph, old.target, args, dict(old.kwargs), origin=(old,), val=val)
        for user in list(pool.users):
            edit.replace(user, made)


def _numbers(pool: Node, place: int, default: int) -> list[Any]:
    given: Any = pool.args[place] if len(pool.args) > place else default
    return list(given) if isinstance(given, (list, tuple)) else [given]


def _monotone(node: Node) -> bool:
    """relu(x), or x + b with b the same over each plane."""
    if node.target is aten.relu.default:
        return True
    if node.target is not aten.add.Tensor or node.kwargs or len(node.args) != 2:
        return False
    whole, part = (shape(a) if isinstance(a, Node) else None for a in node.args)
    return whole is not None and part is not None and len(whole) == 4 and len(part) == 3 and \
        tuple(part[1:]) == (1, 1) and tuple(whole) == tuple(shape(node) or ())
