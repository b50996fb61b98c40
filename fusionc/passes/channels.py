"""Where a channel dimension goes through views: BatchNorm and the layer it folds into may have some between them.

A channel of C values sits in dimension ``axis`` of a tensor, whose size is outer · C · inner (both 1 until a reshape merges
dimensions). Reshapes keep the row-major order of elements, so the product of all sizes after the channel finds it again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from ..graph.facts import Facts, dtype, shape

_RESHAPES = {"flatten", "view", "reshape", "unsqueeze", "squeeze", "unflatten", "contiguous",
             torch.flatten, torch.reshape, torch.unsqueeze, torch.squeeze, torch.unflatten}  # fmt: skip
_SWAPS = {"transpose", "swapaxes", torch.transpose, torch.swapaxes}
_PERMUTES = {"permute", torch.permute}


@dataclass(frozen=True)
class Place:
    """Dimension ``axis`` has size outer · channels · inner."""

    axis: int
    channels: int
    outer: int = 1
    inner: int = 1


def is_view(node: Any) -> bool:
    """A call (torch level) that only rearranges one tensor, or does nothing."""
    if not isinstance(node, Node) or node.op not in ("call_function", "call_method") or len(node.all_input_nodes) != 1:
        return False
    if node.target is torch.nn.functional.dropout:
        return node.args[2:3] == (False,) or node.kwargs.get("training") is False
    return node.target in _RESHAPES | _SWAPS | _PERMUTES and isinstance(node.args[0] if node.args else None, Node)


def views_before(node: Any) -> tuple[list[Node], Any]:
    """The views, each read by one node only, that end in ``node``, in the graph's order, and what they start from."""
    found: list[Node] = []
    while is_view(node) and len(node.users) == 1:
        found.insert(0, node)
        node = node.args[0]
    return found, node


def follow(view: Node, place: Place) -> Place | None:
    """Where the channels are in the view's result; None if they are torn apart or it cannot be told."""
    before, after = shape(view.args[0]), shape(view)
    if before is None or after is None or dtype(view) != dtype(view.args[0]):
        return None
    if view.target is torch.nn.functional.dropout:
        return place
    if view.target in _SWAPS | _PERMUTES:
        given = view.args[1:]
        flat = list(given[0]) if len(given) == 1 and isinstance(given[0], (list, tuple)) else list(given)
        rank = len(before)
        if (
            view.kwargs
            or not all(isinstance(d, int) for d in flat)
            or len(flat) != (2 if view.target in _SWAPS else rank)
        ):
            return None
        order = [d % rank for d in flat]
        if view.target in _SWAPS:
            swap = {order[0]: order[1], order[1]: order[0]}
            order = [swap.get(d, d) for d in range(rank)]
        return Place(order.index(place.axis), place.channels, place.outer, place.inner)
    behind = [place.inner, *before[place.axis + 1 :]]
    if not all(isinstance(n, int) for n in behind) or place.channels < 2:
        return None
    suffix, passed = math.prod(behind), 1
    for axis in range(len(after) - 1, -1, -1):
        size = after[axis]
        if not isinstance(size, int) or suffix % passed:
            return None
        inner = suffix // passed
        if size % (inner * place.channels) == 0 and size:
            return Place(axis, place.channels, size // (inner * place.channels), inner)
        passed *= size
    return None


def through(views: list[Node], place: Place | None) -> Place | None:
    """``follow`` through all of them."""
    for view in views:
        place = None if place is None else follow(view, place)
    return place


def written_between(node: Node, first: Node, last: Node, facts: Facts) -> Node | None:
    """Who writes the node's memory after ``first`` and before ``last``."""
    for root in facts.roots(node):
        for writer in facts.writers.get(root, ()):
            if not writer._erased and first < writer < last:
                return writer
    return None
