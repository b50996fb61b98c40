"""Rows that norms run along are stored in order, where a permutation far above left the activations the other way round.

Math       the identity: the same values in another order in memory
Exactness  exact
Legality   the values do not leave the graph, nobody writes them, and every reader down to where strides agree again is an
           ATen operator that looks at values only (``as_strided`` does not)
Cost       torch hands strides on from operand to result, so one transposed convolution in front makes the residual stream of a
           whole network lie across its rows: each norm and each sum of it then touches 16 times the memory it needs.
           One kernel reads across instead. Not where another operand of a sum lies across too
Source     Whisper's encoder: conv1d(x).permute(0, 2, 1) + positions, then 12 norms; patch embeddings without a class token
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from ..graph import edit
from ..graph.facts import Facts, nodes_of, packet_name, same_layout, same_sizes, shape, tensor, value
from .base import Exact, Match, Pass, Refuse

aten = torch.ops.aten
_LEAST = 1 << 16  # elements: smaller tensors stay in the cache whichever way they lie
_ROUGH = {"as_strided", "as_strided_scatter", "as_strided_copy", "set_", "_reshape_alias"}


class RowMajor(Pass):
    """Insertion of one copy, which the kernel that makes the values takes in."""

    name = "row_major"
    atomic = True
    exactness = Exact()

    def find(self, facts: Facts) -> Iterator[Match]:
        """Pointwise results that a layer norm reads across their rows, and that something else reads too."""
        for node in list(facts.gm.graph.nodes):
            if packet_name(node) != "native_layer_norm":
                continue
            rows = node.args[0]
            if isinstance(rows, Node) and len(rows.users) > 1 and _pointwise(rows) and _across(rows):
                yield Match({"rows": rows, "values": {}}, (node, rows))

    def check(self, match: Match, facts: Facts) -> Refuse | None:
        """See Legality."""
        rows: Node = match.rows
        val = tensor(rows)
        assert val is not None
        straight = edit.fake_empty(val, tuple(val.shape))
        found, refusal = _downstream(rows, straight, facts)
        match.values.update(found)
        return refusal

    def replace(self, match: Match, facts: Facts) -> None:
        """A contiguous copy, and the strides of everything behind it."""
        rows: Node = match.rows
        graph = facts.gm.graph
        with graph.inserting_after(rows):
            copy = edit.insert(graph, aten.clone.default, (rows,), {"memory_format": torch.contiguous_format},
                               origin=[rows], val=match.values[rows])  # fmt: skip
        rows.replace_all_uses_with(copy, delete_user_cb=lambda user: user is not copy)
        for node, made in match.values.items():
            if node is not rows:
                node.meta["val"] = made


def _pointwise(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags


def _across(node: Any) -> bool:
    """A dense tensor whose last dimension is not the one that is contiguous in memory."""
    val = tensor(node)
    if val is None or val.layout is not torch.strided or not all(isinstance(s, int) for s in (*val.shape, *val.stride())):
        return False
    if val.dim() < 2 or val.numel() < _LEAST or val.shape[-1] < 2 or val.stride(-1) == 1:
        return False
    return torch.ops.aten.is_non_overlapping_and_dense.default(val) if not val.is_contiguous() else False


def _downstream(node: Node, new: torch.Tensor, facts: Facts) -> tuple[dict[Node, Any], Refuse | None]:
    """New fake values of ``node`` and what reads it, to where layouts agree again; or why that cannot be."""
    found: dict[Node, Any] = {node: new}
    stack = set(node.users)
    if node in facts.escaping or any(root in facts.writers for root in facts.roots(node)):
        return found, Refuse("it leaves the graph or is written", node)
    while stack:
        user = min(stack)  # graph order: all of its inputs are known then
        stack.discard(user)
        if user.op != "call_function":
            return found, Refuse("it leaves the graph", node)
        args, kwargs = map_arg((user.args, user.kwargs), lambda n: found.get(n, value(n)))
        target: Any = user.target
        if isinstance(target, torch._ops.OpOverload):
            if target.namespace not in ("aten", "prims") or packet_name(user) in _ROUGH:
                return found, Refuse("a reader looks at strides", user)
            if target._schema.is_mutable:
                return found, Refuse("a reader writes", user)
            if _pointwise(user) and any(_across(a) for a in nodes_of(user.args) if a not in found and
                                        same_sizes(shape(a), shape(user))):  # fmt: skip
                return found, Refuse("another operand lies across the rows too", user)
        mode = edit.fake_mode_of(list(found.values()))
        try:
            with torch.no_grad(), mode if mode is not None else nullcontext():
                made = target(*args, **kwargs)
        except Exception:  # noqa: BLE001 - whatever torch says: the reader depends on the layout
            return found, Refuse("a reader depends on the layout", user)
        if _same(value(user), made):
            continue
        if user in facts.escaping:
            return found, Refuse("its layout leaves the graph", user)
        found[user] = made
        stack.update(user.users)
    return found, None


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return same_layout(a, b)
    return True
