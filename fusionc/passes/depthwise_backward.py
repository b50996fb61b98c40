"""Gradients of depthwise convolutions by our kernels: the input's as a convolution, the filter's on matrix units or in registers.

Math       y = conv(x, W), stride 1:   dx = conv(dy, W turned round, padding d(k − 1) − P);   db = Σ dy;
           dW[c, i, j] = Σ dy[n, c, p, q] x[n, c, p + d i − P, q + d j − P]
Exactness  reassociates: the same products, summed in float32
Legality   on CUDA, float16 or bfloat16, one or two dimensions, groups = channels = output channels, stride 1, padding at most
           d(k − 1); dy and x dense in one layout, the gradients in the layouts of x and W
Cost       the gradient of the filter reads dy and x once per line of the filter (few taps, channels-last: dy once), ATen's once
           per tap
Source     the gradients of a correlation; kernels in ``codegen/templates/depthwise_conv.py``
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch.fx import Node

from ..graph import edit
from ..graph.facts import Facts, same_layout, shape, tensor
from ..ops.layout import is_last
from .base import Match, Pass, Reassociates, Refuse
from .depthwise import lifted

aten = torch.ops.aten


class DepthwiseBackward(Pass):
    """convolution_backward → depthwise_conv, depthwise_conv_weight, sum."""

    name = "depthwise_backward"
    exactness = Reassociates(rtol=1e-6)
    devices: ClassVar[tuple[str, ...]] = ("cuda",)
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.bfloat16, torch.float16)

    def find(self, facts: Facts) -> Iterator[Match]:
        """Every backward of a depthwise convolution of more than one tap."""
        for node in list(facts.gm.graph.find_nodes(op="call_function", target=aten.convolution_backward.default)):
            x, w, transposed, groups = shape(node.args[1]), shape(node.args[2]), node.args[7], node.args[9]
            like = tensor(node.args[1])
            if like is None or like.device.type not in self.devices or x is None or w is None or transposed:
                continue
            if len(x) == len(w) in (3, 4) and groups == x[1] == w[0] and w[1] == 1 and max(w[2:]) > 1:
                parts = {user.args[1]: user for user in node.users if user.target is operator.getitem}
                yield Match({"node": node, "parts": parts}, (node,))

    def check(self, match: Match, facts: Facts) -> Refuse | None:
        """See Legality."""
        node = match.node
        grad, x, weight = (tensor(a) for a in node.args[:3])
        stride, padding, dilation = node.args[4:7]
        assert grad is not None and x is not None and weight is not None
        if len(match.parts) != len(node.users):
            return Refuse("the gradients are read as a whole", node)
        if any(t.dtype != x.dtype or t.dtype not in self.dtypes for t in (grad, x, weight)):
            return Refuse("not of one half-precision dtype", node)
        if not all(isinstance(n, int) for n in (*x.shape[1:], *grad.shape[1:], *stride, *padding, *dilation)):
            return Refuse("a size is symbolic", node)
        if max(stride) != 1 or any(p > d * (k - 1) for p, d, k in zip(padding, dilation, weight.shape[2:])):
            return Refuse("strided, or padded by more than the filter reaches", node)
        last = is_last(x)
        layout = torch.channels_last if last else torch.contiguous_format
        if not x.is_contiguous(memory_format=layout) or not grad.is_contiguous(memory_format=layout):
            return Refuse("the gradient of the result and the input are not dense in one layout", node)
        if last and grad.is_contiguous():
            return Refuse("the gradient of the result and the input are not dense in one layout", node)
        if 0 in match.parts and not same_layout(tensor(match.parts[0]), x):
            return Refuse("the gradient of the input has another layout than the input", node)
        found = tensor(match.parts.get(1))
        if found is not None and not found.is_contiguous():
            return Refuse("the gradient of the filter is not contiguous", node)
        return None

    def replace(self, match: Match, facts: Facts) -> None:
        """One operator for each gradient that is read."""
        from ..ops import load

        load("depthwise_conv")
        node, parts, graph = match.node, match.parts, facts.gm.graph
        grad, x, weight, _, _, padding, dilation = node.args[:7]
        kind = tensor(weight).dtype  # type: ignore[union-attr]
        wide = torch.promote_types(kind, torch.float32)
        line = len(shape(weight)) == 3  # type: ignore[arg-type]  # a line is an image of height one
        channels = shape(weight)[0]  # type: ignore[index]
        kernel = lifted(shape(weight)[2:], 1)  # type: ignore[index]
        padding, dilation = list(lifted(padding, 0)), list(lifted(dilation, 1))

        def call(target: Any, *args: Any, **kwargs: Any) -> Node:
            return edit.insert(graph, target, args, kwargs, origin=(node,))

        def cast(of: Node, to: torch.dtype) -> Node:
            return of if wide == kind else call(aten._to_copy.default, of, dtype=to)

        ops = torch.ops.fusionc
        with graph.inserting_before(node):
            given = grad
            if line:
                grad, x, weight = (call(aten.unsqueeze.default, each, 2) for each in (grad, x, weight))
            if 0 in parts:
                turned = call(aten.permute.default, cast(call(aten.flip.default, weight, [2, 3]), wide), [2, 3, 0, 1])
                dense = call(aten.clone.default, turned, memory_format=torch.contiguous_format)
                taps = call(aten.view.default, dense, [*kernel, channels])
                rest = [d * (k - 1) - p for d, k, p in zip(dilation, kernel, padding)]
                found = call(ops.depthwise_conv.default, grad, taps, None, [1, 1], rest, dilation, "")
                edit.replace(parts[0], call(aten.squeeze.dim, found, 2) if line else found)
            if 1 in parts:
                found = call(ops.depthwise_conv_weight.default, grad, x, list(kernel), padding, dilation)
                back = call(aten.permute.default, cast(found, kind), [2, 0, 1])
                dense = call(aten.clone.default, back, memory_format=torch.contiguous_format)
                edit.replace(parts[1], call(aten.view.default, dense, [channels, 1, *kernel[line:]]))
            if 2 in parts:
                edit.replace(parts[2], call(aten.sum.dim_IntList, given, [0, 2] if line else [0, 2, 3]))
