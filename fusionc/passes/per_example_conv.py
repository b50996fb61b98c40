"""Convolutions with weights for each example, written as one grouped convolution, become a batched product of matrices.

Math       conv(x as [1, B·C, H, W], w as [B·O, C, 1, 1], groups = B) = w [B, O, C] × x [B, C, H·W], then + b
Exactness  reassociates: the same products, summed in another order
Legality   one example (the batch is folded into the channels), 1×1, stride 1, no padding, groups ≥ 2 with at least two channels
           each, contiguous, known sizes; larger kernels stay: on the CPU, patches and a product took 1.1 to 10 times as long
Cost       8 examples of 40 → 120 channels at 28×28: 0.92 → 0.71 ms on one thread, 32 of 192 → 64 at 14×14: 3.0 → 2.3; the
           weights' mixture before it stays a product of matrices
Source     Yang et al., CondConv (arXiv 1904.04971), whose usual form folds the batch into groups
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.fx import Node

from ..graph import edit
from ..graph.facts import Facts, dtype, shape, tensor
from .base import Match, Pass, Reassociates, Refuse

aten = torch.ops.aten


class PerExampleConv(Pass):
    """aten.convolution of one example with groups → bmm."""

    name = "per_example_conv"
    exactness = Reassociates(rtol=1e-6)
    atomic = True

    def find(self, facts: Facts) -> Iterator[Match]:
        """Grouped 1×1 convolutions of a batch of one."""
        for node in list(facts.gm.graph.find_nodes(op="call_function", target=aten.convolution.default)):
            x, w, groups = shape(node.args[0]), shape(node.args[1]), node.args[8]
            if x is None or w is None or len(x) != 4 or x[0] != 1 or not isinstance(groups, int) or groups < 2:
                continue
            if isinstance(w[1], int) and w[1] >= 2 and w[0] != groups:
                yield Match({"conv": node}, (node,))

    def check(self, match: Match, facts: Facts) -> Refuse | None:
        """See Legality."""
        conv: Node = match.conv
        x, weight, bias, stride, padding, _, transposed, _, _ = conv.args
        sizes = (*(shape(x) or ()), *(shape(weight) or ()))
        if not all(isinstance(n, int) for n in sizes):
            return Refuse("a size is symbolic", conv)
        if tuple(sizes[6:]) != (1, 1):
            return Refuse("larger kernels are faster in the library", conv)
        if transposed or any(s != 1 for s in stride) or any(padding):
            return Refuse("transposed, strided or padded", conv)
        like, given, w = tensor(conv), tensor(x), tensor(weight)
        assert like is not None and given is not None and w is not None
        if not (like.is_contiguous() and given.is_contiguous() and w.is_contiguous()):
            return Refuse("not contiguous", conv)
        if any(dtype(a) != like.dtype for a in (x, weight, bias) if a is not None):
            return Refuse("not of one dtype", conv)
        return None

    def replace(self, match: Match, facts: Facts) -> None:
        """Views, the product, a view; the bias is added to the result."""
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


__all__ = ["PerExampleConv"]
