"""Remove operators that do nothing: copies nobody needs, full slices, same-shape views, x·1, casts there and back.

A concatenation of one tensor and empty ones (a key-value cache at its first step) becomes the copy that it is, which a
kernel can do on the side. A convolution whose stride, padding or dilation is one number for all dimensions gets one for each, as
the passes behind this one read them.

Math       alias(x) = clone(x) = cat([empty, x]) = x;  x[0:n] = x;  view(x, x.shape) = x;  x·1 = x;
           cast(cast(x, wider), t) = cast(x, t)
Exactness  exact
Legality   same dtype, device, sizes and strides as the input; a copy may be dropped only if no write can tell the two
           apart (source not written by the graph) and they do not leave the graph as separate results; a cast between
           may be dropped only if it holds every value of the first type
Cost       saves a pass over the data where it was a copy
Source     what AOTAutograd and Hugging Face models leave behind
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Node

from ..graph import edit
from ..graph.facts import Facts, aliased_by, dtype, is_dense, packet_name, same_layout, same_sizes, shape, value
from .base import Exact, Match, Pass, Refuse

_VIEWS = {"alias", "detach", "view", "_unsafe_view", "reshape", "expand", "slice", "permute", "transpose", "squeeze",
          "lift_fresh"}
_COPIES = {"clone", "lift_fresh_copy", "dropout", "contiguous"}
_CASTS = {"_to_copy", "convert_element_type"}
_NEUTRAL = {"mul": (1,), "div": (1,), "sub": (0,), "pow": (1,), "add": ()}
_LOOKED_AT = {*_VIEWS, *_COPIES, *_CASTS, *_NEUTRAL, "as_strided", "cat"}
_WINDOWS = {"convolution": (3, 4, 5, 7), "convolution_backward": (4, 5, 6, 8)}  # arguments with a number for each dimension
# Every value of the key is a value of each type listed: going through it loses nothing.
_HOLDS: dict[torch.dtype, tuple[torch.dtype, ...]] = {
    torch.float16: (torch.float32, torch.float64),
    torch.bfloat16: (torch.float32, torch.float64),
    torch.float32: (torch.float64,),
    torch.bool: (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16,
                 torch.float32, torch.float64),
    torch.uint8: (torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64),
    torch.int8: (torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64),
    torch.int16: (torch.int32, torch.int64, torch.float32, torch.float64),
    torch.int32: (torch.int64, torch.float64),
}


class Strip(Pass):
    """No-op removal on the ATen graph."""

    name = "strip"
    atomic = True
    exactness = Exact()

    def find(self, facts: Facts) -> Iterator[Match]:
        """Candidates by operator name; whether they really do nothing is for ``check``, except what is plainly not."""
        for node in list(facts.gm.graph.nodes):
            if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload) or not node.args:
                continue
            name, source = packet_name(node), node.args[0]
            if name in _WINDOWS and _widened(node) != node.args:
                yield Match({"conv": node}, (node,))
            if name not in _LOOKED_AT:
                continue
            if name == "cat":
                source = _only_part(node)
                if source is not None and not same_layout(value(node), value(source)):
                    yield Match({"cat": node, "part": source}, (node,))
                    continue
            if not isinstance(source, Node):
                continue
            if name in _CASTS and packet_name(source) in _CASTS and isinstance(source.args[0], Node) and \
                    not _moves(node) and not _moves(source):
                yield Match({"outer": node, "inner": source, "source": source.args[0]}, (node,))
                if node._erased:
                    continue
                source = node.args[0]
            told = name == "as_strided" and len(node.args) == 3 and not node.kwargs  # from the source's own beginning
            if (name in _VIEWS or told or name == "cat" or name in _COPIES and _plain_copy(node, name) or
                    name in _CASTS and not _moves(node) or _neutral(node, name)) and same_layout(value(node), value(source)):
                yield Match({"node": node, "source": source, "copies": name not in (*_VIEWS, "as_strided")}, (node,))

    def check(self, match: Match, facts: Facts) -> Refuse | None:
        """See Legality."""
        if "outer" in match.bound:
            first, between = dtype(match.source), dtype(match.inner)
            if first != between and between not in _HOLDS.get(first, ()):  # type: ignore[arg-type]
                return Refuse("the cast between rounds", match.inner)
            return None
        if "cat" in match.bound or "conv" in match.bound:
            return None
        node, source = match.node, match.source
        behind = facts.roots(source)  # (of which another view may leave)
        both_leave = node in facts.escaping and (source in facts.escaping or any(r.op == "placeholder" for r in behind) or
                                                 match.copies and not facts.escaping.isdisjoint(behind))  # fmt: skip
        if both_leave:
            return Refuse("both leave the graph, or one is an input: the caller may tell them apart", node)
        if match.copies and facts.writers and any(root in facts.writers for root in behind):
            return Refuse("the source is written by the graph: the copy may hold the old value", node)
        return None

    def replace(self, match: Match, facts: Facts) -> None:
        """Readers read the source; a double cast becomes one cast from the first type."""
        if "conv" in match.bound:
            match.conv.args = _widened(match.conv)
            return
        if "outer" in match.bound:
            outer, inner, source = match.outer, match.inner, match.source
            outer.replace_input_with(inner, source)
            edit.erase_dead([inner])
            return
        if "cat" in match.bound:
            node, graph = match.cat, facts.gm.graph
            with graph.inserting_before(node):
                copy = edit.insert(graph, torch.ops.aten.clone.default, (match.part,),
                                   {"memory_format": torch.contiguous_format}, origin=(node,), val=value(node),
                                   key=edit.value_key(graph))  # fmt: skip
            edit.replace(node, copy)
            return
        node, source = match.node, match.source
        if node in facts.escaping:
            stack = [source]
            while stack:
                current = stack.pop()
                facts.escaping.add(current)
                stack.extend(aliased_by(current))
        edit.provenance(source, [node])
        edit.redirect(node, source)
        facts.gm.graph.erase_node(node)  # not erase_dead: a dropout that does nothing draws nothing


def _widened(conv: Node) -> tuple[Any, ...]:
    """The arguments with as many numbers in each list as the image has dimensions: ATen takes one number for all."""
    args, places = list(conv.args), _WINDOWS[packet_name(conv)]
    dimensions = len(shape(args[places[0] - 2]) or ()) - 2  # the filter stands two places before the first list
    for place in places:
        given = args[place]
        if isinstance(given, (list, tuple)) and len(given) == 1 < dimensions:
            args[place] = [*given] * dimensions
    return tuple(args)


def _only_part(node: Node) -> Node | None:
    """The one part of a concatenation that has elements, if the result is a contiguous tensor of its dtype and sizes."""
    parts: Any = node.args[0]
    if not isinstance(parts, (list, tuple)):
        return None
    full = [part for part in parts if not any(isinstance(size, int) and size == 0 for size in shape(part) or ())]
    result = value(node)
    if len(full) != 1 or not isinstance(result, torch.Tensor) or dtype(full[0]) != result.dtype:
        return None
    return full[0] if is_dense(result) and same_sizes(shape(full[0]), result.shape) else None


def _plain_copy(node: Node, name: str) -> bool:
    if name == "dropout":  # dropout(x, p, train)
        return len(node.args) > 2 and node.args[2] is False
    return True


def _moves(node: Node) -> bool:
    """A cast that also changes device, memory format or pinning is more than a cast."""
    if packet_name(node) == "convert_element_type":
        return False
    extra = {name for name, given in node.kwargs.items() if given is not None} - {"dtype", "layout"}
    source = value(node.args[0])
    if "device" in extra and source is not None and node.kwargs["device"] == source.device:
        extra.discard("device")
    return bool(extra - {"non_blocking"})


def _neutral(node: Node, name: str) -> bool:
    """x·1, x/1, x−0, x¹ with a Python number (x+0 is not: it turns −0 into +0)."""
    if name not in _NEUTRAL or len(node.args) != 2 or node.kwargs:
        return False
    if dtype(node).is_complex:  # type: ignore[union-attr]  # complex · 1 multiplies by 1+0i: Inf becomes NaN
        return False
    other: Any = node.args[1]
    if isinstance(other, bool) or not isinstance(other, (int, float)) or other not in _NEUTRAL[name]:
        return False
    return not (name == "sub" and str(other).startswith("-"))  # x − (−0.0) turns −0 into +0
