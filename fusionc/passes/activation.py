"""Activations that operators of ours take in: the word that the operator has for one."""

from __future__ import annotations

import torch
from torch.fx import Node

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
