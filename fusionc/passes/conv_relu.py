"""Convolution, bias and relu as one call of cuDNN.

Math       relu(conv(x, W) + b[C, 1, 1]) = conv_relu(x, W, b)
Exactness  reassociates in name only: one rounding where ATen's convolution, sum and relu have two
Legality   on CUDA, float16 or bfloat16, two dimensions, channels-last, groups 1, not transposed; nobody reads the values between
Cost       saves a read and a write of the result
Source     cuDNN's runtime-fused engines through ``aten::cudnn_convolution_relu``
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch.fx import Node

from ..graph import edit
from ..graph.facts import Facts, dtype, shape, tensor
from .base import Match, Pass, Reassociates, Refuse

aten = torch.ops.aten


class ConvRelu(Pass):
    """What ``conv_bias`` split off, joined to the convolution where relu is all that follows."""

    name = "conv_relu"
    atomic = True
    exactness = Reassociates(rtol=1e-6)
    devices: ClassVar[tuple[str, ...]] = ("cuda",)
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.bfloat16, torch.float16)

    def find(self, facts: Facts) -> Iterator[Match]:
        """relu of a sum of a convolution without bias and a view of a vector."""
        for relu in list(facts.gm.graph.find_nodes(op="call_function", target=aten.relu.default)):
            total, like = relu.args[0], tensor(relu)
            if like is not None and like.device.type in self.devices and biased(total):
                conv, view = total.args
                yield Match({"conv": conv, "view": view, "total": total, "relu": relu}, (conv, total, relu))

    def check(self, match: Match, facts: Facts) -> Refuse | None:
        """See Legality."""
        for between in (match.conv, match.total):
            if len(between.users) != 1:
                return Refuse("a value between is read elsewhere", between)
        return unfit(match, self.dtypes, "cuDNN fuses only convolutions of one half-precision dtype")

    def replace(self, match: Match, facts: Facts) -> None:
        """One call in relu's place."""
        from ..ops import load

        load("conv_relu")
        conv, relu = match.conv, match.relu
        x, weight, _, stride, padding, dilation, *_ = conv.args
        with facts.gm.graph.inserting_before(relu):
            made = edit.insert(facts.gm.graph, torch.ops.fusionc.conv_relu.default,
                               (x, weight, match.view.args[0], stride, padding, dilation),
                               origin=(conv, relu), val=tensor(relu))
        edit.replace(relu, made)


def sum_of_two(node: Any) -> bool:
    """A sum without a factor."""
    return isinstance(node, Node) and node.target is aten.add.Tensor and not node.kwargs and len(node.args) == 2


def biased(node: Any) -> bool:
    """convolution without bias + view of something."""
    if not sum_of_two(node):
        return False
    conv, view = node.args
    return isinstance(conv, Node) and isinstance(view, Node) and conv.target is aten.convolution.default and \
        conv.args[2] is None and view.target is aten.view.default  # fmt: skip


def unfit(match: Match, dtypes: tuple[torch.dtype, ...], other: str, *more: Any) -> Refuse | None:
    """Why the convolution and what is added to it are not what one call computes; ``other`` if dtypes differ, ``more``'s too."""
    conv, bias = match.conv, match.view.args[0]
    x, weight, _, _, _, _, transposed, _, groups = conv.args
    channels = (shape(conv) or (0, 0))[1]
    if tuple(shape(match.view) or ()) != (channels, 1, 1) or tuple(shape(bias) or ()) != (channels,):
        return Refuse("what is added is not a bias of the channels", match.view)
    like, given = tensor(conv), tensor(x)
    if like is None or given is None or like.dim() != 4 or transposed or groups != 1:
        return Refuse("not a plain convolution of two dimensions", conv)
    if like.dtype not in dtypes or any(dtype(a) != like.dtype for a in (x, weight, bias, *more)):
        return Refuse(other, conv)
    if any(not isinstance(n, int) for n in like.shape) or not all(
        t.is_contiguous(memory_format=torch.channels_last) for t in (like, given)
    ):
        return Refuse("input and result are not channels-last of known sizes", conv)
    return None
