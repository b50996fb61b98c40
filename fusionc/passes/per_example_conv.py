"""Convolutions with weights for each example, written as one grouped convolution, become batched products of matrices.

Math       conv(x as [1, B·C, H, W], w as [B·O, C, k, k], groups = B)[b] = w[b] [O, C·k·k] × patches(x[b]) [C·k·k, H'·W'], then
           + bias and f, one of relu, gelu, silu
Exactness  reassociates: the same products, summed in another order; one rounding where product, bias and activation have three
Legality   one example (the batch is folded into the channels), groups ≥ 2 with at least two channels each, contiguous, known
           sizes, one dtype, not transposed. On the CPU 1×1, stride 1, no padding: larger kernels stay, for patches and a product
           took up to 10 times as long. On CUDA weights that are computed, float16, bfloat16 or float32, any filter; bias and
           activation are taken in where nothing else reads the values between and no kernel that follows takes them in
Cost       CPU: 8 examples of 40 → 120 channels at 28×28: 0.92 → 0.71 ms on one thread, 32 of 192 → 64 at 14×14: 3.0 → 2.3; the
           weights' mixture before it stays a product of matrices. CUDA: 32 examples, H200, bfloat16: 64 → 64 channels, 3×3 at
           56² 764 → 37 µs, 256 → 256 at 14² 258 → 70, 240 → 40, 1×1 602 → 7.5; the library stays unless another is faster
Source     Yang et al., CondConv (arXiv 1904.04971), whose usual form folds the batch into groups
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from torch.fx import Node

from ..graph import edit
from ..graph.facts import Facts, dtype, same, shape, tensor
from . import activation
from .base import Match, Pass, Reassociates, Refuse

aten = torch.ops.aten
_VIEWS = (aten.view.default, aten._unsafe_view.default, aten.permute.default, aten.squeeze.dim, aten.unsqueeze.default)


class PerExampleConv(Pass):
    """aten.convolution of one example with groups → bmm, or fusionc::per_example_conv."""

    name = "per_example_conv"
    exactness = Reassociates(rtol=1e-6)
    atomic = True
    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda")
    kernels: ClassVar[tuple[str, ...]] = ("cuda",)  # where kernels of ours are launched
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.bfloat16, torch.float16, torch.float32)  # of those

    def find(self, facts: Facts) -> Iterator[Match]:
        """Grouped convolutions of a batch of one."""
        for node in list(facts.gm.graph.find_nodes(op="call_function", target=aten.convolution.default)):
            like = tensor(node)
            if like is not None and like.device.type in self.devices and _per_example(node):
                ours = like.device.type in self.kernels
                last, word, views = _followed(node) if ours else (node, "", [])
                yield Match({"conv": node, "ours": ours, "activation": word, "views": views}, (last,))

    def check(self, match: Match, facts: Facts) -> Refuse | None:
        """See Legality."""
        conv: Node = match.conv
        x, weight, bias, stride, padding, dilation, transposed, _, _ = conv.args
        sizes = (*(shape(x) or ()), *(shape(weight) or ()))
        if not all(isinstance(n, int) for n in (*sizes, *stride, *padding, *dilation, conv.args[8])):
            return Refuse("a size is symbolic", conv)
        like, given, w = tensor(conv), tensor(x), tensor(weight)
        assert like is not None and given is not None and w is not None
        if match.ours:
            if transposed:
                return Refuse("transposed", conv)
            if facts.constant(weight):
                return Refuse("the weights are no example's own", conv)
            if like.dtype not in self.dtypes:
                return Refuse("no kernel of ours for this dtype", conv)
        else:
            if tuple(sizes[6:]) != (1, 1):
                return Refuse("larger kernels are faster in the library", conv)
            if transposed or any(s != 1 for s in stride) or any(padding):
                return Refuse("transposed, strided or padded", conv)
        if not (like.is_contiguous() and given.is_contiguous() and w.is_contiguous()):
            return Refuse("not contiguous", conv)
        if any(dtype(a) != like.dtype for a in (x, weight, bias) if a is not None):
            return Refuse("not of one dtype", conv)
        return None

    def replace(self, match: Match, facts: Facts) -> None:
        """On a GPU one call; else views, the product, a view, and the bias is added to the result."""
        if match.ours:
            _call(match, facts)
            return
        conv: Node = match.conv
        x, weight, bias, *_, groups = conv.args
        _, channels, height, width = shape(x)  # type: ignore[misc]
        out, inner = shape(weight)[:2]  # type: ignore[index]
        graph = facts.gm.graph
        with graph.inserting_before(conv):
            left = edit.insert(graph, aten.view.default, (weight, [groups, out // groups, inner]), origin=(conv,))
            right = edit.insert(graph, aten.view.default, (x, [groups, channels // groups, height * width]), origin=(conv,))
            made = edit.insert(graph, aten.bmm.default, (left, right), origin=(conv,))
            made = edit.insert(graph, aten.view.default, (made, [1, out, height, width]), origin=(conv,))
            if bias is not None:
                wide = edit.insert(graph, aten.view.default, (bias, [out, 1, 1]), origin=(conv,))
                made = edit.insert(graph, aten.add.Tensor, (made, wide), origin=(conv,))
        edit.replace(conv, made)


def _per_example(node: Node) -> bool:
    """Is it a convolution of one example, with groups of several channels that give several each?"""
    x, w, groups = shape(node.args[0]), shape(node.args[1]), node.args[8]
    if x is None or w is None or len(x) != 4 or not isinstance(x[0], int) or x[0] != 1:
        return False
    if not isinstance(groups, int):
        return True  # a batch of unknown size
    return groups >= 2 and isinstance(w[1], int) and w[1] >= 2 and not same(w[0], groups)


def _followed(conv: Node) -> tuple[Node, str, list[Node]]:
    """The activation that alone reads the convolution through views, its word and the views; the convolution itself if none."""
    views: list[Node] = []
    node = conv
    while len(node.users) == 1:
        (user,) = node.users
        word = activation.word(user)
        if word:
            return user, word, views
        if user.op != "call_function" or user.target not in _VIEWS:
            break
        views.append(user)
        node = user
    return conv, "", []


def _call(match: Match, facts: Facts) -> None:
    """fusionc::per_example_conv, and the views behind it where they led to the activation."""
    from ..ops import load

    load("per_example_conv")
    conv, word, views, (last,) = match.conv, match.activation, match.views, match.nodes
    x, weight, bias, stride, padding, dilation, _, _, groups = conv.args
    out, graph = shape(weight)[0], facts.gm.graph  # type: ignore[index]
    outside = None
    if activation.read_by_arithmetic(last):  # for nothing, and the library would leave it to a kernel of its own
        last, word, views, bias, outside = conv, "", [], None, bias

    def call(target: object, *args: object) -> Node:
        return edit.insert(graph, target, args, origin=(conv, last))

    with graph.inserting_before(last):
        made = call(torch.ops.fusionc.per_example_conv.default, x, weight, bias, list(stride), list(padding),
                    list(dilation), groups, word)  # fmt: skip
        if outside is not None:
            made = call(aten.add.Tensor, made, call(aten.view.default, outside, [out, 1, 1]))
        for view in views:
            made = call(view.target, made, *view.args[1:])
    edit.replace(last, made)


__all__ = ["PerExampleConv"]
