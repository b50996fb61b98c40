"""The end of a residual block, convolution, bias, sum and relu, as one call.

Math       relu((conv(x, W) + b) + z) = conv_add_relu(x, W, b, z);   z + b₂ for a z that has a bias of its own: b + b₂
Exactness  reassociates in name only: one rounding where ATen's convolution, sums and relu have three
Legality   on CUDA, float16 or bfloat16, two dimensions, channels-last, groups 1, not transposed, known sizes; nobody reads
           the values between; z has the result's layout
Cost       saves a write and a read of the result, and its memory where nobody else reads z
Source     cuDNN's runtime-fused engines through ``aten::cudnn_convolution_add_relu``; a kernel of ours for 1×1 filters
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from torch.fx import Node

from ..graph import edit
from ..graph.facts import Facts, shape, stride, tensor
from .base import Match, Pass, Reassociates, Refuse
from .conv_relu import biased, sum_of_two, unfit

aten = torch.ops.aten


class ConvAddRelu(Pass):
    """relu of a sum, one term of which is a convolution whose bias ``conv_bias`` split off."""

    name = "conv_add_relu"
    atomic = True
    exactness = Reassociates(rtol=1e-6)
    devices: ClassVar[tuple[str, ...]] = ("cuda",)
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.bfloat16, torch.float16)

    def find(self, facts: Facts) -> Iterator[Match]:
        """relu(a + z) or relu(z + a) with a = convolution + view of a vector; of two, the one with 1×1 filters."""
        for relu in list(facts.gm.graph.find_nodes(op="call_function", target=aten.relu.default)):
            total, like = relu.args[0], tensor(relu)
            if like is None or like.device.type not in self.devices or not sum_of_two(total):
                continue
            sides = [(a, z) for a, z in (total.args, total.args[::-1]) if biased(a) and isinstance(z, Node) and a is not z]
            if sides:
                a, z = min(sides, key=lambda side: _taps(side[0].args[0]))
                conv, view = a.args
                yield Match({"conv": conv, "view": view, "part": a, "z": z, "total": total, "relu": relu},
                            (conv, a, total, relu))  # fmt: skip

    def check(self, match: Match, facts: Facts) -> Refuse | None:
        """See Legality."""
        conv, z = match.conv, match.z
        for between in (conv, match.part, match.total):
            if len(between.users) != 1:
                return Refuse("a value between is read elsewhere", between)
        refusal = unfit(match, self.dtypes, "only convolutions of one half-precision dtype are fused", z)
        if refusal is not None:
            return refusal
        if shape(z) != shape(conv) or stride(z) != stride(conv):
            return Refuse("the other term has another layout", z)
        return None

    def replace(self, match: Match, facts: Facts) -> None:
        """One call in relu's place; a bias of the other term joins that of the convolution."""
        from ..ops import load

        load("conv_add_relu")
        conv, relu, z, bias = match.conv, match.relu, match.z, match.view.args[0]
        x, weight, _, strides, padding, dilation, *_ = conv.args
        graph, other = facts.gm.graph, None
        if biased(z) and len(z.users) == 1 and tuple(shape(z.args[1].args[0]) or ()) == tuple(shape(bias) or ()):
            other, z = z.args[1].args[0], z.args[0]
        with graph.inserting_before(relu):
            if other is not None:
                bias = edit.insert(graph, aten.add.Tensor, (bias, other), origin=(match.total,))
            made = edit.insert(graph, torch.ops.fusionc.conv_add_relu.default,
                               (x, weight, bias, z, strides, padding, dilation),
                               origin=(conv, relu), val=tensor(relu))  # fmt: skip
        edit.replace(relu, made)


def _taps(conv: Node) -> int:
    """Filter positions; a stride counts as more, since only plain 1×1 filters are a product."""
    sizes = shape(conv.args[1]) or (0, 0, 9, 9)
    strides = conv.args[3]
    return max(int(sizes[-1]), 1) * max(int(sizes[-2]), 1) + (max(strides) > 1)  # type: ignore[type-var, arg-type]
