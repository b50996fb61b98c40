"""A batched product whose right operand is one matrix, repeated for the whole batch, is one product of matrices.

Math       (a[b] · w)[m] = (a viewed as [B·M, K] · w)[b M + m]
Exactness  reassociates: the same products in an order that the library may choose otherwise
Legality   known sizes; the right operand repeats by a stride of 0; the left one's rows are evenly spaced over the whole batch
Cost       a linear layer of a permuted image is traced as 3584 products of 56 rows each (ATen folds contiguous inputs only),
           and its copy in front of it is contiguous by then: one product of 200704 rows fills the device
Source     school
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Node

from ..graph import edit
from ..graph.facts import Facts, shape, tensor
from .base import Match, Pass, Reassociates, Refuse

aten = torch.ops.aten
_REPEATS = (aten.view.default, aten.expand.default, aten.unsqueeze.default, aten._unsafe_view.default)


class SharedBmm(Pass):
    """aten.bmm(a, one matrix for all) → aten.mm between views."""

    name = "shared_bmm"
    exactness = Reassociates(rtol=1e-6)

    def find(self, facts: Facts) -> Iterator[Match]:
        """Products whose right operand has batch stride 0."""
        for node in list(facts.gm.graph.find_nodes(op="call_function", target=aten.bmm.default)):
            right = tensor(node.args[1])
            if right is not None and all(isinstance(n, int) for n in right.stride()) and right.stride(0) == 0 and \
                    isinstance(node.args[1], Node):  # fmt: skip
                yield Match({"bmm": node}, (node,))

    def check(self, match: Match, facts: Facts) -> Refuse | None:
        """See Legality."""
        node = match.bmm
        left, right = tensor(node.args[0]), tensor(node.args[1])
        assert left is not None and right is not None
        if not all(isinstance(n, int) for n in (*left.shape, *left.stride(), *right.shape)):
            return Refuse("a size is symbolic", node)
        if right.shape[0] < 2 or 0 in left.shape or 0 in right.shape:
            return Refuse("a batch of one, or nothing", node)
        if left.shape[1] > 1 and left.stride(0) != left.shape[1] * left.stride(1):
            return Refuse("the left operand's rows are not evenly spaced", node)
        return None

    def replace(self, match: Match, facts: Facts) -> None:
        """One product in the batched one's place."""
        node, graph = match.bmm, facts.gm.graph
        left, right = node.args
        batch, rows, inner = shape(left)  # type: ignore[misc]

        def call(target: Any, *args: Any) -> Node:
            return edit.insert(graph, target, args, origin=(node,))

        with graph.inserting_before(node):
            flat = call(aten.view.default, left, [batch * rows, inner])
            matrix = _repeated(right)
            matrix = call(aten.select.int, right, 0, 0) if matrix is None else matrix
            made = call(aten.view.default, call(aten.mm.default, flat, matrix), [batch, rows, shape(right)[2]])  # type: ignore[index]
        edit.replace(node, made)


def _repeated(node: Node) -> Node | None:
    """The matrix itself, if views that repeat it are all that lies between: later passes know weights by their nodes."""
    like, found = tensor(node), node
    while found.target in _REPEATS and isinstance(found.args[0], Node):
        found = found.args[0]
        value = tensor(found)
        assert like is not None
        if value is not None and value.shape == like.shape[1:] and value.stride() == like.stride()[1:] and \
                value.storage_offset() == like.storage_offset():  # fmt: skip
            return found
    return None
