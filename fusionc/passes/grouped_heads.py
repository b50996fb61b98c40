"""Grouped-query attention without copies of K and V: undo the repetition of heads in front of attention.

Math       attention(q, repeat(k, r), repeat(v, r)) = attention(q, k, v, enable_gqa): query head h reads key head h // r
Exactness  reassociates: gradients of k and v are summed over r heads inside the kernel
Legality   k and v are each repeated r times head by head (``x[:, :, None].expand(...).reshape(...)`` or
           ``repeat_interleave``); no mask and no dropout; the kernel that torch picks then is not a slower kind
           (some cannot group); the readers accept its strides
Cost       saves writing and reading r copies of K and V, and their gradients
Source     Hugging Face's repeat_kv, which eager avoids by the same flag
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.fx import Node

from ..graph import edit
from ..graph.facts import Facts, same, same_sizes, shape
from . import sdpa
from .base import Match, Pass, Reassociates, Refuse

_ALL = slice(None, None, None)


class GroupedHeads(Pass):
    """Model-level removal of repeat_kv."""

    name = "grouped_heads"
    exactness = Reassociates(rtol=1e-5)
    level = "model"
    atomic = True

    def find(self, facts: Facts) -> Iterator[Match]:
        """Attention calls on repeated keys."""
        probe = sdpa.Probe()
        for node in sdpa.calls(facts.gm):
            given = sdpa.arguments(node)
            key, value = _repeated(given["key"]), _repeated(given["value"])
            if key is not None and value is not None:
                yield Match({"call": node, "given": given, "key": key, "value": value, "probe": probe, "result": []},
                            (node,))  # fmt: skip

    def check(self, match: Match, facts: Facts) -> Refuse | None:
        """See Legality."""
        node, given = match.call, match.given
        if given["attn_mask"] is not None or given["dropout_p"] != 0:
            return Refuse("a mask or dropout: kernels that group heads may not take it", node)
        if given["enable_gqa"] is not False:
            return Refuse("heads are grouped on top of the repetition", node)
        heads = [(shape(source) or ())[1] for source in (match.key[0], match.value[0])]
        if not same(*heads) or not same((shape(given["query"]) or (0, 0))[1], (shape(given["key"]) or (0, 0))[1]):
            return Refuse("queries, keys and values differ in heads", node)
        for source, used in (match.key, match.value):
            if any(root in facts.writers for part in (source, *used) for root in facts.roots(part)):
                return Refuse("the repeated tensor is written in place", source)
        new = {**given, "key": match.key[0], "value": match.value[0], "enable_gqa": True}
        return sdpa.settle(match, new, "torch has no fused kernel that groups these heads")

    def replace(self, match: Match, facts: Facts) -> None:
        """The call reads the heads as they were."""
        ((new, values),) = match.result
        sdpa.rewrite(match.call, new, values)
        edit.erase_dead(node for _, used in (match.key, match.value) for node in used if not node._erased)


def _repeated(node: Node) -> tuple[Node, tuple[Node, ...]] | None:
    """(what is repeated, the nodes that repeat it: last first) of [b, heads · r, n, d], or None."""
    if not isinstance(node, Node) or not node.args or not isinstance(node.args[0], Node) or len(shape(node) or ()) != 4:
        return None
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    source = node.args[0]
    if name == "repeat_interleave" and (node.op == "call_method" or node.target is torch.repeat_interleave):
        rest = {**dict(zip(("repeats", "dim"), node.args[1:])), **node.kwargs}
        plain = isinstance(rest.get("repeats"), int) and rest.get("dim") in (1, -3)
        return (source, (node,)) if plain and set(rest) <= {"repeats", "dim", "output_size"} else None
    if name not in ("reshape", "view") or node.op != "call_method" or source.op != "call_method":
        return None
    inner = source.args[0]
    if source.target != "expand" or not isinstance(inner, Node) or not _opened(inner):
        return None
    origin = inner.args[0]
    before, spread, after = shape(origin), shape(source), shape(node)
    if not isinstance(origin, Node) or before is None or spread is None or after is None or len(spread) != 5:
        return None
    kept = (*before[:2], *before[2:])
    if (
        not same_sizes((*spread[:2], *spread[3:]), kept)
        or not same(after[1], spread[1] * spread[2])
        or not same_sizes((after[0], *after[2:]), (before[0], *before[2:]))
    ):
        return None
    return origin, (node, source, inner)


def _opened(node: Node) -> bool:
    """x[:, :, None] or x.unsqueeze(2) of a 4-dimensional x."""
    if not node.args or len(shape(node.args[0]) or ()) != 4:
        return False
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    if name == "unsqueeze":
        return node.args[1:] in ((2,), (-3,)) and not node.kwargs
    index = node.args[1] if name == "getitem" and len(node.args) == 2 else None
    return (
        isinstance(index, tuple)
        and index[:3] == (_ALL, _ALL, None)
        and all(part == _ALL or part is Ellipsis for part in index[3:])
    )
