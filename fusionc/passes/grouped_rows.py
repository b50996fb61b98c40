"""A few rows times the matrices of their groups (tokens and experts) go to a kernel for few rows.

Math       grouped_mm(x, Wᵀ, ends)   →   fusionc::grouped_rows(x, W, ends)
Exactness  reassociates: products are summed in another order
Legality   inference on a GPU; bfloat16 or float16; x [R, K] with R known and small; W [E, N, K] stored densely; no bias and
           no other type of result
Cost       the library's tiles are 64 and more rows high, most of them empty: 2 to 2.6 TB/s of weights on an H200, where ours
           read 3.2 to 3.7 (4 with more tokens); which is faster is measured at the first call
Source     decode of mixtures of experts is bound by reading the experts (Gale et al. 2022); measured in NOTES.md
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch.fx import Node

from ..graph import edit
from ..graph.facts import Facts, device, dtype, is_static_shape, shape, stride, tensor
from ..ops import grouped_rows as op
from .base import Match, Pass, Reassociates, Refuse
from .skinny_linear import served

aten = torch.ops.aten


class GroupedRows(Pass):
    """Calls of the library's grouped product with few rows."""

    name = "grouped_rows"
    exactness = Reassociates(rtol=1e-5)

    def __init__(self, devices: Collection[str] = ("cuda",)) -> None:
        self.devices = tuple(devices)

    def find(self, facts: Facts) -> Iterator[Match]:
        """Every such call on one of the devices."""
        for node in list(facts.gm.graph.nodes):
            if node.op == "call_function" and node.target is aten._grouped_mm.default and served(device(node), self.devices):
                yield Match({"call": node}, (node,))

    def check(self, match: Match, facts: Facts) -> Refuse | None:
        """See Legality."""
        call: Node = match.call
        if facts.stage != "inference":
            return Refuse("its gradients read what it reads", call)
        x, right, *rest = call.args
        named = {k: v for k, v in call.kwargs.items() if v is not None}
        if len(rest) != 1 or named or not isinstance(rest[0], Node):
            return Refuse("it has a bias, another type of result, or no groups of rows", call)
        if not all(isinstance(t, Node) and is_static_shape(t) for t in (x, right, rest[0])):
            return Refuse("its sizes are not known", call)
        sizes, steps = shape(right), stride(right)
        if len(shape(x) or ()) != 2 or sizes is None or len(sizes) != 3 or steps is None:
            return Refuse("its groups are not groups of rows", call)
        if not 1 <= shape(x)[0] <= op.ROWS:  # type: ignore[index]
            return Refuse(f"it has more than {op.ROWS} rows", call)
        if dtype(x) not in (torch.bfloat16, torch.float16) or dtype(rest[0]) is not torch.int32:
            return Refuse("its type has no kernel", call)
        _, inner, width = sizes
        if steps != (inner * width, 1, inner) or inner % 8 or (stride(x) or (0, 0))[1] != 1 or stride(x)[0] % 8:  # type: ignore[index]
            return Refuse("its matrices are not stored densely by rows, or rows are not multiples of 16 bytes", call)
        if stride(call) != (width, 1):
            return Refuse("its result is not stored densely", call)
        return None

    def replace(self, match: Match, facts: Facts) -> None:
        """One call in place of the library's."""
        call: Node = match.call
        x, right, ends = call.args
        assert isinstance(right, Node)
        with facts.gm.graph.inserting_before(call):
            like = tensor(right)
            assert like is not None
            if right.target is aten.transpose.int and sorted(n % 3 for n in right.args[1:]) == [1, 2]:  # type: ignore[operator]
                weight = right.args[0]
            else:
                weight = edit.insert(facts.gm.graph, aten.transpose.int, (right, 1, 2), origin=[call], val=like.transpose(1, 2))
            new = edit.insert(facts.gm.graph, torch.ops.fusionc.grouped_rows.default, (x, weight, ends), origin=[call],
                              val=call.meta["val"])  # fmt: skip
        call.replace_all_uses_with(new)
        edit.erase_dead([call])
