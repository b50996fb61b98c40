"""A key of a group of nodes: groups with equal keys are built into equal kernels.

The layers of a model are alike, so most groups of a graph are copies of an earlier one.  The key describes what
`Builder` reads: operators, constants, sizes, strides and dtypes of the nodes that a kernel inlines and of those it
loads, and how they hang together; not their names.  Making it costs a few percent of building and simplifying a kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Node

from .build import inlined
from .expr import Index, Var, index, substitute
from .value import Idx


class Alike:
    """Keys of the groups of one graph, and what was built for the first of each."""

    def __init__(self) -> None:
        self.found: dict[tuple[Any, ...], Any] = {}
        self.checked: dict[tuple[Any, ...], str | None] = {}  # node key -> why it cannot be lowered
        self._facts: dict[Node, Any] = {}

    def facts(self, node: Node) -> Any:
        """What building may ask of a node's value."""
        known = self._facts.get(node)
        if known is None:
            known = self._facts[node] = _facts(node.meta.get("val"))
        return known

    def node_key(self, node: Node) -> tuple[Any, ...]:
        """Key of one node: its operator, constants and the facts of its operands and its result."""
        kwargs = [(k, _literal(v, self.facts)) for k, v in node.kwargs.items()]
        return (node.target, self.facts(node), *[_literal(a, self.facts) for a in node.args], *kwargs)

    def key(self, nodes: Sequence[Node], loops: Sequence[Var], axis: Sequence[Var], idx: dict[Node, Idx],
            axis_index: dict[Node, dict[int, Index]], inline: set[Node], is_lowered: Callable[[Node], bool],
            stored: Sequence[Node], device_type: str) -> tuple[tuple[Any, ...], list[Node]]:  # fmt: skip
        """The key of a group (arguments as `Builder` takes them), and every node it speaks of, in an order that is the
        same for groups with the same key."""
        members = set(nodes)
        seats: dict[Node, int] = {}
        lines: list[Any] = []

        def seat(node: Node) -> int:
            known = seats.get(node)
            if known is None:
                known = seats[node] = len(seats)
                if inlined(node, members, inline, is_lowered):
                    args = [_literal(a, seat) for a in node.args]
                    if node.kwargs:
                        args += [(k, _literal(v, seat)) for k, v in node.kwargs.items()]
                    lines.append((known, node.target, node in members, self.facts(node), *args))
                else:
                    lines.append((known, self.facts(node)))
            return known

        rename = {v: index(Var(f"x{k}", v.extent)) for k, v in enumerate(loops)}
        rename.update({v: index(Var(f"r{k}", v.extent)) for k, v in enumerate(axis)})
        places = [tuple([substitute(i, rename).uid for i in idx[n]]) for n in stored]
        wanted = [seat(n) for n in stored]
        for n in nodes:
            if n in axis_index:
                along = [(d, substitute(i, rename).uid) for d, i in axis_index[n].items()]
                lines.append((seat(n), "axis", *along))
        shape = (*[v.extent.uid for v in loops], -1, *[v.extent.uid for v in axis])
        return (device_type, shape, tuple(wanted), tuple(places), tuple(lines)), list(seats)


def _literal(a: Any, of_node: Callable[[Node], Any]) -> Any:
    if isinstance(a, Node):
        return ("node", of_node(a))
    if isinstance(a, (list, tuple)):
        return (type(a).__name__, *[_literal(x, of_node) for x in a])
    if isinstance(a, slice):
        return ("slice", *[_literal(x, of_node) for x in (a.start, a.stop, a.step)])
    if isinstance(a, torch.SymInt):
        return ("size", str(a.node.expr))
    return (type(a).__name__, repr(a))  # 1, 1.0 and True are equal but not alike; so are 0.0 and -0.0


def _facts(val: Any) -> Any:
    if isinstance(val, torch.Tensor):
        if val.layout is not torch.strided:
            return ("tensor", val.dtype, _sizes(val.shape), str(val.layout), val.device)
        flags = (val.is_conj(), val.is_neg(), val.is_nested, val.is_quantized)
        return ("tensor", val.dtype, _sizes(val.shape), _sizes(val.stride()), val.device, *flags)
    if isinstance(val, torch.SymInt):
        return ("size", str(val.node.expr))
    if isinstance(val, (list, tuple)):
        return (type(val).__name__, *[_facts(v) for v in val])
    return (type(val).__name__, repr(val))


def _sizes(xs: Sequence[Any]) -> tuple[Any, ...]:
    return tuple([x if type(x) is int else str(x.node.expr) for x in xs])


__all__ = ["Alike"]
