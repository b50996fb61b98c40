"""Attention reads queries, keys and values where they lie, and takes a factor of the queries into its scale.

Math       attention(contiguous(q · c), contiguous(k), contiguous(v); s) = attention(q, k, v; s · c)
Exactness  reassociates: q · c is not rounded on its own (where c is a power of two, 1/8 for heads of 64, it never was)
Legality   on a GPU; the copies and the product are not written; their sources have their last dimension in order, as all
           fused kernels want it; the kernel that torch picks then is no slower kind; the readers accept its strides. The
           factor: a finite number, not 0; only attention reads the product
Cost       saves a read and a write each of q, k and v, and one of the result: it comes in the layout of q, which is then the
           one that the next linear layer wants
Source     Hugging Face's Whisper and BART: (q_proj(x) · scaling).view(…).transpose(1, 2).contiguous()
"""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch.fx import Node

from ..graph import edit
from ..graph.facts import Facts, device, dtype, same_layout, stride, value
from . import sdpa
from .base import Match, Pass, Reassociates, Refuse
from .channels import views_before

_PRODUCTS = {operator.mul, torch.mul, "mul"}


class AttentionInputs(Pass):
    """Model-level removal of copies and factors in front of attention."""

    name = "attention_inputs"
    exactness = Reassociates(rtol=1e-3)
    level = "model"
    atomic = True

    def __init__(self, devices: Collection[str] = ("cuda",)) -> None:
        self.devices = tuple(devices)

    def find(self, facts: Facts) -> Iterator[Match]:
        """Attention calls with a copy or a factor in front."""
        probe = sdpa.Probe()
        for node in sdpa.calls(facts.gm):
            place = device(node)
            if place is None or place.type not in self.devices:
                continue
            given = sdpa.arguments(node)
            sources = {name: _copied(given[name]) for name in ("query", "key", "value")}
            found = {name: source for name, source in sources.items() if source is not None}
            product = _product(given["query"]) if sum(a is given["query"] for a in given.values()) == 1 else None
            if found or product is not None:
                yield Match({"call": node, "given": given, "sources": found, "product": product, "probe": probe,
                             "result": []}, (node,))  # fmt: skip

    def check(self, match: Match, facts: Facts) -> Refuse | None:
        """See Legality."""
        node, given, product = match.call, match.given, match.product
        parts = [*match.sources.values(), *(given[name] for name in match.sources), *(product[:2] if product is not None else ())]
        for source in parts:
            if facts.writers and any(root in facts.writers for root in facts.roots(source)):
                return Refuse("what it copies, or the copy, is written in place", source)
        for source in match.sources.values():
            if (stride(source) or (0,))[-1] != 1:
                return Refuse("the copy puts the last dimension in order", source)
        new = {**given, **match.sources}
        if product is not None:
            width = value(given["query"]).shape[-1]
            scale = given["scale"]
            if scale is None and isinstance(width, int):
                scale = 1 / math.sqrt(width)
            if not isinstance(scale, (int, float)):
                return Refuse("its scale is not known", node)
            new["scale"] = scale * product[2]
        return sdpa.settle(match, new, "torch would choose a slower kernel")

    def replace(self, match: Match, facts: Facts) -> None:
        """The call reads what was copied, and the factor's operand."""
        ((new, values),) = match.result
        copies = [match.given[name] for name in match.sources]
        sdpa.rewrite(match.call, new, values)
        edit.erase_dead(copy for copy in copies if not copy._erased and not copy.users)
        if match.product is not None:
            product, operand, _ = match.product
            product.replace_all_uses_with(operand)
            edit.provenance(operand, [product])
            edit.erase_dead([product])


def _copied(node: Any) -> Node | None:
    """x of x.contiguous(), where that moves data."""
    if not isinstance(node, Node) or node.op != "call_method" or node.target != "contiguous":
        return None
    if len(node.args) != 1 or node.kwargs.get("memory_format", torch.contiguous_format) is not torch.contiguous_format:
        return None
    source = node.args[0]
    return source if isinstance(source, Node) and not same_layout(value(source), value(node)) else None


def _product(query: Any) -> tuple[Node, Node, float] | None:
    """(x · c, x, c) behind views that nothing else reads."""
    if not isinstance(query, Node) or len(query.users) != 1:
        return None
    node = views_before(query)[1]
    if not isinstance(node, Node) or node.op not in ("call_function", "call_method") or node.target not in _PRODUCTS:
        return None
    if len(node.users) != 1 or len(node.args) != 2 or node.kwargs:
        return None
    operand, factor = node.args if isinstance(node.args[0], Node) else node.args[::-1]
    if not isinstance(operand, Node) or isinstance(factor, bool) or not isinstance(factor, (int, float)):
        return None
    if not math.isfinite(factor) or factor <= 0 or not same_layout(value(operand), value(node)):
        return None
    kind = dtype(operand)
    return (node, operand, float(factor)) if kind is not None and kind.is_floating_point else None
