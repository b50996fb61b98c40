"""Make one node of equal computations (common subexpressions).

Math       f(a, b) computed twice → computed once
Exactness  exact
Legality   the operator is pure (writes nothing, draws no random numbers) and allocates nothing uninitialised; the two do
           not both leave the graph (the caller may write to one of two results); no write to memory they read lies between
Cost       saves the second computation; keeps the first value alive longer
Source     textbook value numbering
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Node

from ..graph import edit
from ..graph.facts import Facts, is_pure, packet_name
from .base import Exact, Match, Pass, Refuse

_UNINITIALISED = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "empty_permuted", "empty_quantized"}


class CommonSubexpressions(Pass):
    """Value numbering over pure ATen operators."""

    name = "cse"
    atomic = True
    exactness = Exact()

    def find(self, facts: Facts) -> Iterator[Match]:
        """Pairs (kept, again) in graph order, found while earlier ones are being merged."""
        seen: dict[Any, Node] = {}
        for node in list(facts.gm.graph.nodes):
            if node.op != "call_function":
                continue
            target = node.target
            if target is not operator.getitem and not isinstance(target, torch._ops.OpOverload):
                continue
            if not is_pure(node) or packet_name(node) in _UNINITIALISED:
                continue
            key = (target, _key(node.args), _key(node.kwargs) if node.kwargs else None)
            kept = seen.setdefault(key, node)
            if kept is not node:
                yield Match({"kept": kept, "again": node}, (node,))

    def check(self, match: Match, facts: Facts) -> Refuse | None:
        """See Legality."""
        kept, again = match.kept, match.again
        if kept in facts.escaping and again in facts.escaping:
            return Refuse("both results leave the graph and must not share memory", again)
        if facts.writers and any(
            kept < writer < again for source in again.all_input_nodes for root in facts.roots(source)
            for writer in facts.writers.get(root, ())
        ):
            return Refuse("memory that it reads is written between the two", again)
        return None

    def replace(self, match: Match, facts: Facts) -> None:
        """The later node's readers read the earlier one."""
        kept, again = match.kept, match.again
        if again in facts.escaping:
            facts.escaping.update((kept, *_view_sources(kept)))
        edit.replace(again, kept)


def _view_sources(node: Node) -> list[Node]:
    from ..graph.facts import aliased_by

    found, stack = [], [node]
    while stack:
        for source in aliased_by(stack.pop()):
            found.append(source)
            stack.append(source)
    return found


def _key(argument: Any) -> Any:
    """Hashable identity of an argument: 1, 1.0 and True differ, so do 0.0 and -0.0; nodes by identity."""
    kind = type(argument)
    if kind is Node or kind is str or argument is None:
        return argument
    if kind is int or kind is bool:
        return (kind, argument)
    if kind is float or kind is complex:
        return (kind, repr(argument))
    if isinstance(argument, (list, tuple)):
        return tuple([_key(part) for part in argument])
    if isinstance(argument, dict):
        return tuple([(name, _key(part)) for name, part in argument.items()])
    if isinstance(argument, slice):
        return ("slice", _key(argument.start), _key(argument.stop), _key(argument.step))
    try:
        hash(argument)
    except TypeError:  # symbolic numbers as direct arguments: by identity
        return (kind, id(argument))
    return (kind, argument)
