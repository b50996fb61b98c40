"""Convolution, bias and relu as one call of cuDNN.

Math       relu(conv(x, W) + b[C, 1, 1]) = conv_relu(x, W, b)
Exactness  reassociates in name only: one rounding where ATen's convolution, sum and relu have two
Legality   on CUDA, float16 or bfloat16, two dimensions, channels-last, groups 1, not transposed; nobody reads the values between
Cost       saves a read and a write of the result
Source     cuDNN's runtime-fused engines through ``aten::cudnn_convolution_relu``
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

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
            total = relu.args[0]
            like = tensor(relu)
            if like is None or like.device.type not in self.devices or not isinstance(total, Node):
                continue
            if total.target is not aten.add.Tensor or total.kwargs or len(total.args) != 2:
                continue
            conv, view = total.args
            if isinstance(conv, Node) and isinstance(view, Node) and conv.target is aten.convolution.default and \
                    conv.args[2] is None and view.target is aten.view.default:
                yield Match({"conv": conv, "view": view, "total": total, "relu": relu}, (conv, total, relu))

    def check(self, match: Match, facts: Facts) -> Refuse | None:
        """See Legality."""
        conv, total, bias = match.conv, match.total, match.view.args[0]
        x, weight, _, _, _, _, transposed, _, groups = conv.args
        if len(conv.users) != 1 or len(total.users) != 1:
            return Refuse("a value between is read elsewhere", conv if len(conv.users) != 1 else total)
        channels = (shape(conv) or (0, 0))[1]
        if tuple(shape(match.view) or ()) != (channels, 1, 1) or tuple(shape(bias) or ()) != (channels,):
            return Refuse("what is added is not a bias of the channels", match.view)
        like = tensor(conv)
        if like is None or like.dim() != 4 or transposed or groups != 1:
            return Refuse("not a plain convolution of two dimensions", conv)
        if like.dtype not in self.dtypes or any(dtype(a) != like.dtype for a in (x, weight, bias)):
            return Refuse("cuDNN fuses only convolutions of one half-precision dtype", conv)
        if any(not isinstance(n, int) for n in like.shape) or not all(
            t is not None and t.is_contiguous(memory_format=torch.channels_last) for t in (like, tensor(x))
        ):
            return Refuse("input and result are not channels-last of known sizes", conv)
        return None

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
