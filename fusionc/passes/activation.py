"""Activations that operators of ours take in: the word that the operator has for one, and where that is worth it."""

from __future__ import annotations

import torch
from torch.fx import Node

from ..graph.facts import is_view, tensor
from .conv_matmul import LIBRARY

aten = torch.ops.aten


def word(node: Node) -> str:
    """The operators' word for the activation that the node is, or ""."""
    if node.op != "call_function" or len(node.args) != 1 or not isinstance(node.args[0], Node):
        return ""
    if node.target is aten.gelu.default and set(node.kwargs) <= {"approximate"}:
        return "gelu_tanh" if node.kwargs.get("approximate") == "tanh" else "gelu"
    return {aten.relu.default: "relu", aten.silu.default: "silu"}.get(node.target, "") if not node.kwargs else ""


def taken_in(node: Node) -> tuple[Node, str]:
    """The node after which the value is complete, and the word of the activation, if that alone reads ``node``."""
    if len(node.users) == 1:
        (user,) = node.users
        found = word(user)
        if found:
            return user, found
    return node, ""


def read_by_arithmetic(node: Node) -> bool:
    """Is one kernel that does arithmetic place by place all that reads it, through views? It takes in for nothing what an
    operator of ours would take in."""
    readers: list[Node] = []

    def walk(found: Node) -> None:
        for user in found.users:
            if user.op != "output" and is_view(user):
                walk(user)
            else:
                readers.append(user)

    walk(node)
    if len(readers) != 1 or readers[0].op == "output":
        return False
    target, value, like = readers[0].target, tensor(readers[0]), tensor(node)
    library = target in LIBRARY or getattr(target, "namespace", "") == "fusionc"
    return not library and value is not None and like is not None and value.numel() * 4 > like.numel()
