"""Taking sublayers out of a torch-level graph: the addition goes, and cache writes that nobody reads any more."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from ..graph.facts import aliased_by, nodes_of, written_by
from .find import Sublayer
from .parts import op

_QUIET = {"log_api_usage_once"}


def remove(s: Sublayer) -> None:
    """Let the readers of ``x + sublayer(x)`` read ``x`` (bit for bit what adding zero gives, up to the sign of zero)."""
    assert s.add is not None and s.keep is not None
    keep = s.keep
    in_place = op(s.add) in ("iadd", "add_") and s.add.args[0] is keep  # whoever writes the sum wrote x before, too
    if not in_place and written_later(s.add):  # or x itself would be overwritten
        with s.add.graph.inserting_before(s.add):
            clone = s.add.graph.call_function(torch.clone, (keep,))
        clone.meta.update({k: v for k, v in s.add.meta.items() if k in ("val", "example_value", "nn_module_stack")})
        keep = clone
    s.add.replace_all_uses_with(keep)
    s.add.graph.erase_node(s.add)


def written_later(node: Node) -> bool:
    """Somebody writes into the node's memory after it was made."""
    stack, seen = [node], {node}
    while stack:
        n = stack.pop()
        for user in n.users:
            if n in written_by(user):
                return True
            if n in aliased_by(user) and user not in seen:
                seen.add(user)
                stack.append(user)
    return False


def dead(gm: GraphModule) -> set[Node]:
    """Nodes whose values reach neither a result nor a write that counts. A write into an input counts unless everything else
    that reads the input is dead too: that is the cache of a removed sublayer. A write into a tensor of the graph's own counts
    if somebody alive reads the tensor."""
    order = list(gm.graph.nodes)
    writes = {n: list(nodes_of(written_by(n))) for n in order if written_by(n)}
    gone: set[Node] = set()
    while True:
        found: set[Node] = set()
        for n in reversed(order):
            if n.op == "output" or n.op == "placeholder":
                continue
            if any(u not in found for u in n.users):
                continue
            if n in writes:
                if all(_root(w) in gone for w in writes[n]):
                    found.add(n)
                continue
            if op(n) not in _QUIET:
                found.add(n)
        caches = {_root(w) for n in writes for w in writes[n]}
        more = {c for c in caches - gone if (_only_written if c.op == "placeholder" else _unread)(c, found, writes)}
        if not more:
            unread = {p for p in order if p.op == "placeholder" and all(u in found for u in p.users)}
            return found | unread | {c for c in gone if c.op == "placeholder"}
        gone |= more


def _unread(own: Node, found: set[Node], writes: dict[Node, list[Node]]) -> bool:
    """Nobody alive reads this tensor or a view of it: they are only made, viewed and written."""
    stack, seen = [own], {own}
    while stack:
        n = stack.pop()
        for user in n.users:
            if user in found or user in seen:
                continue
            if user.op == "output" or not (n in aliased_by(user) or set(writes.get(user, ())) == {n}):
                return False
            if n in aliased_by(user):
                seen.add(user)
                stack.append(user)
    return True


def _root(node: Node) -> Node:
    while (sources := aliased_by(node)) and node.op != "placeholder":
        node = sources[0]
    return node


def _only_written(cache: Node, found: set[Node], writes: dict[Node, list[Node]]) -> bool:
    readers = [u for u in cache.users if u not in found]
    return (
        bool(readers)
        and len(readers) < len(cache.users)
        and all(
            u in writes and not [x for x in u.users if x not in found] and op(u).startswith("index_copy")
            for u in readers
        )
    )


def erase_writes(gm: GraphModule) -> list[str]:
    """Erase writes into caches that only removed sublayers read; returns the names of these inputs. Pure dead nodes stay:
    AOTAutograd drops them."""
    lost = [n for n in dead(gm) if n.op != "placeholder" and written_by(n)]
    caches = sorted({_root(w).name for n in lost for w in nodes_of(written_by(n))})
    for n in sorted(lost, key={n: i for i, n in enumerate(gm.graph.nodes)}.__getitem__, reverse=True):
        _erase_tree(n)
    return caches


def _erase_tree(node: Node) -> None:
    for user in list(node.users):
        _erase_tree(user)
    if not node._erased:
        node.graph.erase_node(node)
