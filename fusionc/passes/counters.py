"""Counters that a model keeps, one a layer: all additions to them in one launch.

Math       copy_(p, p + c), copy_(q, q + c), …   →   _foreach_add_([p, q, …], c)
Exactness  exact
Legality   integers; p are inputs of one element on one GPU that nothing reads after its write, nor writes elsewhere; the
           sum has no other reader; c a number
Cost       one launch instead of two for each counter (16 layers of a static cache: 32 launches of a microsecond)
Source     Hugging Face static caches count the tokens of each layer in a tensor
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch.fx import Node

from ..graph import edit
from ..graph.facts import Facts, device, dtype, shape
from .base import Exact, Match, Pass, Refuse

aten = torch.ops.aten


class Counters(Pass):
    """Additions of a number to inputs of one element."""

    name = "counters"
    atomic = True
    exactness = Exact()

    def __init__(self, devices: Collection[str] = ("cuda",)) -> None:
        self.devices = tuple(devices)

    def find(self, facts: Facts) -> Iterator[Match]:
        """Groups of at least two counters with one dtype, device and number."""
        groups: dict[tuple[object, ...], list[Node]] = {}
        for node in facts.gm.graph.nodes:
            if node.op != "call_function" or node.target is not aten.copy_.default:
                continue
            target, total = node.args[:2]
            where = device(target)
            if not isinstance(total, Node) or total.target is not aten.add.Tensor or total.kwargs or where is None:
                continue
            if where.type not in self.devices or shape(target) not in ((), (1,)) or dtype(target) is not dtype(total):
                continue
            if total.args[0] is target and type(total.args[1]) is int and not dtype(target).is_floating_point:  # type: ignore[union-attr]
                groups.setdefault((dtype(target), where, shape(target), total.args[1]), []).append(node)
        for nodes in groups.values():
            if len(nodes) > 1:
                yield Match({"copies": nodes}, tuple(nodes))

    def check(self, match: Match, facts: Facts) -> Refuse | None:
        """See Legality."""
        targets = [copy.args[0] for copy in match.copies]
        if len(set(targets)) < len(targets):
            return Refuse("one counter is written twice", match.copies[-1])
        for copy in match.copies:
            target, total = copy.args[:2]
            if target.op != "placeholder" or facts.writers.get(target) != [copy]:
                return Refuse("a counter is no input or is written elsewhere too", copy)
            if copy.users or set(total.users) != {copy}:
                return Refuse("the new value is read", copy)
            for holder in facts.aliases(target):
                if holder in facts.escaping or any(copy < user for user in holder.users):
                    return Refuse("the counter is read after its write", copy)
        return None

    def replace(self, match: Match, facts: Facts) -> None:
        """One call where the last copy was."""
        copies = match.copies
        graph, last = facts.gm.graph, max(copies)
        number = last.args[1].args[1]
        with graph.inserting_before(last):
            edit.insert(graph, aten._foreach_add_.Scalar, ([copy.args[0] for copy in copies], number), origin=copies, val=None)
        totals = [copy.args[1] for copy in copies]
        for copy in copies:
            graph.erase_node(copy)
        edit.erase_dead(totals)
