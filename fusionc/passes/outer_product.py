"""A matrix product over an inner dimension of one is a multiplication.

Math       bmm(a [B, M, 1], b [B, 1, N])  =  a · b;  mm likewise
Exactness  exact (a library that rounds its inputs to TF32 was less so)
Legality   the inner size is known to be 1; real floating point, one dtype; same layout
Cost       saves a library call, which costs more than the work, and joins the kernel around it
Source     rotary angles: Hugging Face computes inv_freq [32, 1] @ positions [1, T]
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.fx import Node

from ..graph import edit
from ..graph.facts import Facts, dtype, same_layout, shape, tensor
from .base import Exact, Match, Pass, Refuse

aten = torch.ops.aten


class OuterProduct(Pass):
    """bmm and mm of a column and a row."""

    name = "outer_product"
    atomic = True
    exactness = Exact()

    def find(self, facts: Facts) -> Iterator[Match]:
        """Products whose inner size is 1."""
        for node in list(facts.gm.graph.nodes):
            if node.op == "call_function" and node.target in (aten.bmm.default, aten.mm.default):
                inner = (shape(node.args[0]) or (0,))[-1]
                if isinstance(inner, int) and inner == 1:
                    yield Match({"node": node, "value": []}, (node,))

    def check(self, match: Match, facts: Facts) -> Refuse | None:
        """See Legality."""
        node: Node = match.node
        kind = dtype(node)
        if node.kwargs or kind is None or not kind.is_floating_point or {dtype(a) for a in node.args} != {kind}:
            return Refuse("its operands are not real numbers of one dtype", node)
        match.value.append(edit.compute_value(aten.mul.Tensor, node.args, {}))
        if not same_layout(match.value[0], tensor(node)):
            return Refuse("a multiplication would give another layout", node)
        return None

    def replace(self, match: Match, facts: Facts) -> None:
        """One multiplication."""
        node: Node = match.node
        graph = facts.gm.graph
        with graph.inserting_before(node):
            new = edit.insert(graph, aten.mul.Tensor, node.args, origin=[node], val=match.value[0])
        edit.replace(node, new)
