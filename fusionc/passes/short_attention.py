"""Attention over a short sequence is one kernel without a loop.

Math       softmax(scale · q kᵀ + causal mask) v   →   fusionc::short_attention(q, k, v, scale, causal)
Exactness  reassociates: sums in another order than the library's; scores and sums are float32 in both
Legality   inference on a GPU; bfloat16 or float16; heads of 16 to 128; 2 to 128 keys, known; no dropout, no bias; only the
           result itself is read, which lies in memory as [B, L, H, D]
Cost       the library's kernels for long sequences take as long to start as a short one takes to compute; which is
           faster is measured at the first call
Source     FlashAttention (Dao et al. 2022) without its loop; measured in NOTES.md
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch.fx import Node

from ..graph import edit
from ..graph.facts import Facts, device, dtype, is_static_shape, shape, stride
from ..ops import short_attention as op
from .base import Match, Pass, Reassociates, Refuse
from .skinny_linear import served

aten = torch.ops.aten
# names of the positional arguments after query, key and value
_CALLS: dict[Any, tuple[str, ...]] = {
    aten._scaled_dot_product_cudnn_attention.default: ("bias", "lse", "dropout", "causal", "debug"),
    aten._scaled_dot_product_flash_attention.default: ("dropout", "causal", "debug"),
    aten._scaled_dot_product_efficient_attention.default: ("bias", "lse", "dropout", "causal"),
    aten._scaled_dot_product_flash_attention_for_cpu.default: ("dropout", "causal"),  # in tests
}


class ShortAttention(Pass):
    """Calls of the library's fused attention kernels."""

    name = "short_attention"
    exactness = Reassociates(rtol=1e-5)

    def __init__(self, devices: Collection[str] = ("cuda",)) -> None:
        self.devices = tuple(devices)

    def find(self, facts: Facts) -> Iterator[Match]:
        """Every such call on one of the devices."""
        for node in list(facts.gm.graph.nodes):
            if node.op == "call_function" and node.target in _CALLS and served(device(node.args[0]), self.devices):
                yield Match({"call": node}, (node,))

    def check(self, match: Match, facts: Facts) -> Refuse | None:
        """See Legality."""
        call: Node = match.call
        if facts.stage != "inference":
            return Refuse("training keeps the statistics of its rows", call)
        q, k, v = call.args[:3]
        given = dict(zip(_CALLS[call.target], call.args[3:]))
        if given.get("bias") is not None or call.kwargs.get("attn_mask") is not None:
            return Refuse("it has a bias or mask", call)
        if given.get("dropout") or given.get("debug") or set(call.kwargs) - {"scale", "attn_mask"}:
            return Refuse("it has dropout or options", call)
        if not all(is_static_shape(t) for t in (q, k, v)):
            return Refuse("its sizes are not known", call)
        sizes, keys = shape(q), shape(k)
        assert sizes is not None and keys is not None
        if dtype(q) not in (torch.bfloat16, torch.float16) or sizes[3] not in op.WIDTHS or shape(v) != keys:
            return Refuse("its type or width of heads has no kernel", call)
        if not 2 <= keys[2] <= op.KEYS or sizes[2] < 2 or given.get("causal") and sizes[2] != keys[2]:
            return Refuse(f"it has one query, more than {op.KEYS} keys or a causal mask that is not square", call)
        result = _result(call)
        if result is None:
            return Refuse("more than its result is read", call)
        _, h, n, d = sizes
        wanted = (n * h * d, d, h * d, 1)
        if any(size > 1 and a != w for size, a, w in zip(sizes, stride(result) or (), wanted)):
            return Refuse("its result lies otherwise in memory", call)
        return None

    def replace(self, match: Match, facts: Facts) -> None:
        """One call in place of the library's."""
        call: Node = match.call
        result = _result(call)
        assert result is not None
        given = dict(zip(_CALLS[call.target], call.args[3:]))
        scale = call.kwargs.get("scale")
        if scale is None:
            scale = shape(call.args[0])[3] ** -0.5  # type: ignore[index]
        with facts.gm.graph.inserting_before(result):
            new = edit.insert(
                facts.gm.graph, torch.ops.fusionc.short_attention.default,
                (*call.args[:3], float(scale), bool(given.get("causal"))), origin=[call, result],  # type: ignore[arg-type]
                val=result.meta["val"])  # fmt: skip
        result.replace_all_uses_with(new)
        edit.erase_dead([*call.users])
        if not call.users:  # dropout makes it random to torch, and what is random does not go by itself
            facts.gm.graph.erase_node(call)


def _result(call: Node) -> Node | None:
    """The one part of the call's results that is read, if that is the first."""
    users = [u for u in call.users if u.users]
    if len(users) != 1 or users[0].target is not operator.getitem or users[0].args[1] != 0:
        return None
    return users[0]
