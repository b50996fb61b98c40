"""Numbers that the graph makes on the CPU out of nothing but literals become literals, wherever they are used.

Math       f(c₁, c₂, …) with literals cᵢ is a literal
Exactness  exact: the same operators compute it on the same device, once
Legality   tensors without dimensions that the trace itself made (``torch.tensor(3.0)``, ``full``); nothing random, nothing
           that writes; sizes are no literals. What leaves the graph is left as it is
Cost       saves a few microseconds of host time each, a copy to the GPU that waits for it, and what forbids a CUDA graph:
           a kernel that takes a number from the CPU
Source     DeBERTa: log(torch.tensor((511 - 1) / 128)) and sqrt(torch.tensor(64.0) * 3) in every layer
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from ..graph import edit
from ..graph.facts import Facts, dtype, nodes_of, packet_name, tensor
from .base import Exact, Match, Pass, Refuse

aten = torch.ops.aten
_LITERALS = {aten.full.default, aten.scalar_tensor.default}
_CPU = torch.device("cpu")


class KnownNumbers(Pass):
    """Folding of CPU arithmetic on literals."""

    name = "known_numbers"
    atomic = True
    exactness = Exact()

    def find(self, facts: Facts) -> Iterator[Match]:
        """Where a known number is read by something else; what only leads there goes with it."""
        known: dict[Node, torch.Tensor] = {}
        for node in list(facts.gm.graph.nodes):
            if not _number(node):
                continue
            made = _computed(node, known) if any(a in known for a in node.all_input_nodes) else _literal(node, facts)
            if made is not None and not any(root in facts.writers for root in facts.roots(node)):
                known[node] = made
        for node in reversed(list(known)):
            if node.target in _LITERALS and tensor(node).device == _CPU:  # type: ignore[union-attr]
                continue
            if any(user not in known for user in node.users):
                yield Match({"node": node, "number": known[node]}, (node,))

    def check(self, match: Match, facts: Facts) -> Refuse | None:
        """See Legality."""
        node, number = match.node, match.number.item()
        if node in facts.escaping:
            return Refuse("it leaves the graph", node)
        if isinstance(number, float) and not math.isfinite(number):
            return Refuse("not a finite number", node)
        return None

    def replace(self, match: Match, facts: Facts) -> None:
        """A ``full`` without dimensions, which kernels take in as a constant."""
        node: Node = match.node
        val, graph = tensor(node), facts.gm.graph
        assert val is not None
        with graph.inserting_before(node):
            new = edit.insert(graph, aten.full.default, ([], match.number.item()),
                              {"dtype": val.dtype, "device": val.device, "pin_memory": False}, origin=[node], val=val)
        edit.replace(node, new)


def _number(node: Node) -> bool:
    """An operator's or attribute's one real, strided tensor without dimensions."""
    val = tensor(node)
    return val is not None and node.op in ("call_function", "get_attr") and val.dim() == 0 and not val.is_complex() \
        and val.layout is torch.strided and not val.requires_grad  # fmt: skip


def _literal(node: Node, facts: Facts) -> torch.Tensor | None:
    """The value of a literal: ``torch.tensor(number)``, traced as a fresh copy of an attribute, or a creation."""
    if node.op != "call_function":
        return None
    if node.target in _LITERALS:
        fill: Any = node.args[1] if node.target is aten.full.default else node.args[0]
        val = tensor(node)
        if val is None or val.device != _CPU or not isinstance(fill, (bool, int, float)):
            return None
        return torch.full((), fill, dtype=val.dtype)
    source = node.args[0] if node.args else None
    if packet_name(node) != "lift_fresh_copy" or not isinstance(source, Node) or source.op != "get_attr":
        return None
    found: Any = facts.gm
    for part in str(source.target).split("."):
        found = getattr(found, part, None)
    plain = type(found) is torch.Tensor and found.device == _CPU and found.dim() == 0 and found.dtype == dtype(node)
    return found.detach().clone() if plain and source not in facts.writers else None


def _computed(node: Node, known: dict[Node, torch.Tensor]) -> torch.Tensor | None:
    """The value of an operator all of whose operands are known numbers."""
    op = node.target
    if not isinstance(op, torch._ops.OpOverload) or op.namespace not in ("aten", "prims") or op._schema.is_mutable:
        return None
    if torch.Tag.nondeterministic_seeded in op.tags or not all(a in known for a in nodes_of((node.args, node.kwargs))):
        return None
    args, kwargs = map_arg((node.args, node.kwargs), lambda n: known[n])
    if "device" in kwargs:  # a copy to the GPU has the same value
        kwargs = {**kwargs, "device": _CPU, "non_blocking": False}
    elif tensor(node).device != _CPU:  # type: ignore[union-attr]
        return None
    try:
        with torch.no_grad():
            made = op(*args, **kwargs)
    except Exception:  # noqa: BLE001 - an operator that refuses such operands will say so at run time
        return None
    val = tensor(node)
    plain = type(made) is torch.Tensor and val is not None and made.dim() == 0 and made.dtype == val.dtype
    return made if plain else None
