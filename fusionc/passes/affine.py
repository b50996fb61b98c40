"""Values that are affine functions of one or two tensors by channels: a ⊙ u + b ⊙ v + c, and the nodes that make a, b, c."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from ..graph import edit
from ..graph.facts import dtype, shape

aten = torch.ops.aten
_FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_DEPTH = 16
Coefficient = Any  # None (zero), a number, a Node (a vector of the channels), or (word, left, right)
Form = tuple[Coefficient, Coefficient, Coefficient]  # of u, of v, alone


class Vectors:
    """Makes coefficients where the graph's insertion point is: numbers, or vectors of the dtype ``wide``."""

    def __init__(self, graph: Graph, channels: int, like: torch.Tensor, wide: torch.dtype, origin: tuple[Node, ...]) -> None:
        self.graph, self.channels, self.like, self.wide, self.origin = graph, channels, like, wide, origin
        self.made: dict[Any, Any] = {}

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """A node here."""
        return edit.insert(self.graph, target, args, kwargs, origin=self.origin)

    def widened(self, node: Node) -> Node:
        """In the dtype of the vectors."""
        return node if dtype(node) == self.wide else self.call(aten._to_copy.default, node, dtype=self.wide)

    def value(self, given: Coefficient) -> Any:
        """A number, or the node of a vector [C]."""
        if given not in self.made:
            if isinstance(given, Node):
                self.made[given] = self.widened(self.call(aten.view.default, given, [self.channels]))
            elif isinstance(given, tuple):
                left, right = self.value(given[1]), self.value(given[2])
                if not isinstance(left, Node):
                    left, right = right, left  # both sums and products commute
                if isinstance(left, Node):
                    self.made[given] = self.call(aten.mul.Tensor if given[0] == "mul" else aten.add.Tensor, left, right)
                else:
                    self.made[given] = left * right if given[0] == "mul" else left + right
            else:
                self.made[given] = float(given)
        return self.made[given]

    def vector(self, given: Coefficient) -> Node:
        """The node of a vector [C]."""
        found = self.value(given)
        if isinstance(found, Node):
            return found
        kwargs = {"dtype": self.wide, "device": self.like.device, "pin_memory": False}
        return edit.insert(self.graph, aten.full.default, ([self.channels], found), kwargs, origin=self.origin,
                           val=edit.fake_empty(self.like, [self.channels], dtype=self.wide))  # fmt: skip


def form(node: Any, known: dict[Node, Form | None], sizes: Any, depth: int = 0) -> Form | None:
    """The node as a ⊙ u + b ⊙ v + c, if it is that; ``known`` says what u and v are."""
    if node in known:
        return known[node]
    known[node] = None
    if node.op != "call_function" or shape(node) != sizes or dtype(node) not in _FLOATING or depth > _DEPTH:
        return None
    if node.target is aten._to_copy.default and set(node.kwargs) == {"dtype"}:
        inner = node.args[0]
        known[node] = form(inner, known, sizes, depth + 1) if isinstance(inner, Node) and dtype(inner) in _FLOATING else None
        return known[node]
    if node.target not in (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor) or node.kwargs or len(node.args) != 2:
        return None
    sides: list[Form] = []
    for arg in node.args:
        constant = None if isinstance(arg, Node) and known.get(arg) is not None else _constant(arg, sizes)
        found = (None, None, constant) if constant is not None else \
            form(arg, known, sizes, depth + 1) if isinstance(arg, Node) else None  # fmt: skip
        if found is None:
            return None
        sides.append(found)
    left, right = sides
    if node.target is aten.mul.Tensor:
        if _constant(node.args[0], sizes) is not None:
            left, right = right, left
        if right[0] is not None or right[1] is not None or right[2] is None:
            return None
        known[node] = tuple(_times(term, right[2]) for term in left)  # type: ignore[assignment]
    else:
        if node.target is aten.sub.Tensor:
            right = tuple(_times(term, -1.0) for term in right)  # type: ignore[assignment]
        known[node] = tuple(_plus(p, q) for p, q in zip(left, right))  # type: ignore[assignment]
    return known[node]


def _constant(given: Any, sizes: Any) -> Coefficient:
    """A number or a vector of the channels."""
    if isinstance(given, (int, float)) and not isinstance(given, bool):
        return float(given)
    if isinstance(given, Node) and dtype(given) in _FLOATING and shape(given) in ((sizes[1], 1, 1), (1, sizes[1], 1, 1)) \
            and sizes[1] > 1:  # fmt: skip
        return given
    return None


def _times(a: Coefficient, b: Coefficient) -> Coefficient:
    if a is None or b is None:
        return None
    return b if a == 1.0 else a if b == 1.0 else ("mul", a, b)


def _plus(a: Coefficient, b: Coefficient) -> Coefficient:
    if a is None or a == 0.0:
        return b if b != 0.0 else None
    return a if b is None or b == 0.0 else ("add", a, b)
