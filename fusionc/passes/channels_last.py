"""Images of contiguous layout become channels-last for the whole network, where its convolutions are worth the copies.

Math       the same values, stored with the channels of a pixel side by side
Exactness  reassociates: the library has other kernels for this layout
Legality   inference on CUDA, half precision, two dimensions, known sizes. Every value after the first convolution gets the
           layout that ATen's own rules give it; a view that cannot be one any more, an operator of another library, and
           what leaves the graph get a contiguous copy, as do convolutions with filters for each example; operators that are told
           strides are refused
Cost       cuDNN's half-precision kernels are channels-last: contiguous images are transposed before and after each call
           (ResNet-like blocks on an H200: 1.3 to 2.3 times as long), a product of matrices takes a 1×1 convolution with its
           activation, and linear layers of permuted images need no copy. Bytes that dense convolutions read and write are
           counted against those of the copies
Source     PyTorch's channels-last tutorial; TorchInductor has a layout pass of this kind
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree

from ..graph import edit
from ..graph.facts import Facts, is_view, nodes_of, tensor
from .base import Match, Pass, Reassociates, Refuse

aten = torch.ops.aten
_LAST = torch.channels_last
_STRIDES = {aten.as_strided.default, aten.as_strided_copy.default, aten.empty_strided.default, aten.new_empty_strided.default,
            aten.as_strided_scatter.default, aten._reshape_alias.default}  # fmt: skip
_VIEWS = {aten.view.default, aten._unsafe_view.default}
_COPIES = {aten._to_copy.default, aten.clone.default}
_OURS = ("aten", "prims", "fusionc")


class _Refused(Exception):
    """Why the graph stays as it is, and where."""

    def __init__(self, reason: str, node: Node) -> None:
        super().__init__(reason)
        self.reason, self.node = reason, node


class ChannelsLast(Pass):
    """Convolutions' inputs are copied to channels-last; the layout spreads from there."""

    name = "channels_last"
    exactness = Reassociates(rtol=1e-6)
    devices: ClassVar[tuple[str, ...]] = ("cuda",)
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.bfloat16, torch.float16)
    gain: ClassVar[float] = 2.0  # bytes of dense convolutions for a byte that is copied

    def find(self, facts: Facts) -> Iterator[Match]:
        """The whole graph, if a dense convolution reads contiguous images."""
        if facts.stage != "inference":
            return
        first = next((n for n in facts.gm.graph.nodes if self._convertible(n) and _dense(n) and not _is_last(n.args[0])), None)
        if first is not None:
            yield Match({"first": first}, (first,))

    def check(self, match: Match, facts: Facts) -> Refuse | None:
        """Tries it on a copy."""
        names = {node.name: node for node in facts.gm.graph.nodes}
        try:
            saved, paid = self._convert(edit.copy_graph(facts.gm.graph), _copied)
        except _Refused as e:
            return Refuse(e.reason, names.get(e.node.name, match.first))
        if saved <= self.gain * paid:
            return Refuse(f"dense convolutions move {saved} bytes, copies {paid}", match.first)
        return None

    def replace(self, match: Match, facts: Facts) -> None:
        """In place; weights that stay are rearranged once."""

        def weight(node: Node, user: Node) -> Node:
            like = tensor(node)
            assert like is not None
            if not facts.constant(node):
                return _copied(node, user)
            strides = torch.empty(like.shape, device="meta", memory_format=_LAST).stride()
            return edit.add_derived(facts.gm, [facts.position(node)], rebuild(1), edit.fake_empty(like, like.shape, strides),
                                    "channels_last", (user,), recipe=["channels_last"])  # fmt: skip

        self._convert(facts.gm.graph, weight)

    def _convertible(self, node: Node) -> bool:
        if node.op != "call_function" or node.target is not aten.convolution.default or node.args[6] or _of_examples(node):
            return False
        x, w = tensor(node.args[0]), tensor(node.args[1])
        return (
            x is not None and w is not None and x.dim() == 4 and x.device.type in self.devices and x.dtype in self.dtypes
            and w.dtype == x.dtype and all(isinstance(n, int) for t in (x, w) for n in (*t.shape, *t.stride()))
        )  # fmt: skip

    def _convert(self, graph: Graph, weight: Callable[[Node, Node], Node]) -> tuple[int, int]:
        """Bytes that dense convolutions read and write, and bytes that copies do. Raises _Refused half way."""
        changed: dict[Node, Any] = {}  # node: its value with the old layout
        copies: dict[tuple[Node, Any], Node] = {}
        weights: dict[Node, Node] = {}
        saved = paid = 0

        def copy(node: Node, user: Node, layout: torch.memory_format) -> Node:
            nonlocal paid
            if (node, layout) not in copies:
                paid += _bytes(node)
                with graph.inserting_before(user):
                    copies[node, layout] = edit.insert(graph, aten.clone.default, (node,), {"memory_format": layout},
                                                       origin=(node,))  # fmt: skip
            return copies[node, layout]

        def restore(user: Node) -> None:
            """Its inputs as they were."""
            for node in dict.fromkeys(nodes_of((user.args, user.kwargs))):
                old = changed.get(node)
                if old is None:
                    continue
                if not isinstance(old, torch.Tensor) or not old.is_contiguous():
                    raise _Refused("a value that must keep its layout is not contiguous", node)
                user.replace_input_with(node, copy(node, user, torch.contiguous_format))

        for node in list(graph.nodes):
            if node.op == "output":
                restore(node)
            if node.op != "call_function":
                continue
            conv = self._convertible(node)
            if conv:
                x, w = node.args[0], node.args[1]
                if _dense(node) and not _is_last(x, changed):
                    saved += _bytes(x) + _bytes(node)
                if not _is_last(x):
                    node.args = (copy(x, node, _LAST), *node.args[1:])
                if not _is_last(w):
                    if w not in weights:
                        weights[w] = weight(w, node)
                    node.args = (node.args[0], weights[w], *node.args[2:])
            elif not any(n in changed for n in node.all_input_nodes):
                continue
            if node.target in _STRIDES:
                raise _Refused("an operator is told strides", node)
            if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace not in _OURS or _of_examples(node):
                restore(node)
                continue
            try:
                made = edit.compute_value(node.target, node.args, node.kwargs)
                if node.target in _VIEWS:
                    _possible(node)
            except Exception:  # a view of memory that is not there any more
                restore(node)
                continue
            old, node.meta["val"] = node.meta["val"], made
            if _strides(old) != _strides(made):
                changed[node] = old
        return saved, paid


def _possible(node: Node) -> None:
    """Raises where memory of this layout has no such view: fake tensors of channels-last images one pixel high claim it has."""
    like, sizes = tensor(node.args[0]), node.args[1]
    assert like is not None
    if not all(isinstance(n, int) for n in (*like.shape, *like.stride(), *sizes)):  # type: ignore[misc]
        raise ValueError("a size is symbolic")
    torch.empty_strided(like.shape, like.stride(), device="meta").view(sizes)


def _of_examples(node: Node) -> bool:
    """Is it a convolution of one image with groups, whose filters the graph computes? Those are examples with filters of their
    own, the batch folded into the channels (CondConv), which channels-last would interleave."""
    if node.target is not aten.convolution.default or node.args[8] == 1:
        return False
    x, weight = tensor(node.args[0]), node.args[1]
    while isinstance(weight, Node) and weight.op == "call_function" and (is_view(weight) or weight.target in _COPIES):
        weight = weight.args[0]
    return x is not None and isinstance(x.shape[0], int) and x.shape[0] == 1 and \
        isinstance(weight, Node) and weight.op == "call_function"  # fmt: skip


def _copied(node: Node, user: Node) -> Node:
    """A weight, rearranged at each call."""
    with user.graph.inserting_before(user):
        return edit.insert(user.graph, aten.clone.default, (node,), {"memory_format": _LAST}, origin=(user,))


def _is_last(node: Any, before: dict[Node, Any] | None = None) -> bool:
    """Are these images channels-last (``before``: were they, before the pass)?"""
    found = before.get(node) if before is not None and node in before else tensor(node)
    return isinstance(found, torch.Tensor) and found.is_contiguous(memory_format=_LAST)


def _dense(conv: Node) -> bool:
    """Several channels in and out of each group, and no patches that tile the image: those are products in either layout."""
    w = tensor(conv.args[1])
    assert w is not None
    return w.shape[1] > 1 and not (max(w.shape[2:]) > 1 and list(w.shape[2:]) == list(conv.args[3]))


def _bytes(node: Any) -> int:
    found = tensor(node)
    assert found is not None
    return int(found.numel() * found.element_size()) if all(isinstance(n, int) for n in found.shape) else 0


def _strides(value: Any) -> list[Any]:
    return [t.stride() for t in pytree.tree_leaves(value) if isinstance(t, torch.Tensor)]


def rebuild(count: int) -> Callable[[list[torch.Tensor]], torch.Tensor]:
    """The computation of a recipe. Raises ValueError for more than one source."""
    if count != 1:
        raise ValueError("one weight becomes channels-last")

    def compute(sources: list[torch.Tensor]) -> torch.Tensor:
        if sources[0].dim() != 4:
            raise ValueError("not the weight of a convolution of two dimensions")
        return sources[0].clone(memory_format=_LAST)

    return compute
