"""Add a convolution's bias in the kernel that follows it.

Math       conv(x, W, b) = conv(x, W) + b[C, 1, …]
Exactness  reassociates in name only: ATen's CUDA convolution computes exactly this, rounding the product first; the sum
           that follows (activation, residual) now starts from the unrounded biased value
Legality   on CUDA, floating, dense result; not a depthwise convolution in contiguous layout, whose kernel in ATen adds the
           bias itself
Cost       saves one read and one write of the result per convolution: after BatchNorm folding every convolution has a bias
Source     aten/src/ATen/native/Convolution.cpp: cudnn_convolution, then output.add_(bias); torch's Inductor does the same
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from torch.fx import Node

from ..graph import edit
from ..graph.facts import Facts, dtype, shape, stride, tensor
from .base import Match, Pass, Reassociates, Refuse

aten = torch.ops.aten


class ConvBias(Pass):
    """convolution with bias → convolution, view of the bias, add."""

    name = "conv_bias"
    atomic = True
    exactness = Reassociates(rtol=1e-6)
    devices: ClassVar[tuple[str, ...]] = ("cuda",)

    def find(self, facts: Facts) -> Iterator[Match]:
        """Every convolution with a bias, on a device where the library adds it apart."""
        for node in list(facts.gm.graph.find_nodes(op="call_function", target=aten.convolution.default)):
            like = tensor(node)
            if like is not None and like.device.type in self.devices and isinstance(node.args[2], Node):
                yield Match({"conv": node}, (node,))

    def check(self, match: Match, facts: Facts) -> Refuse | None:
        """See Legality."""
        conv: Node = match.conv
        like = tensor(conv)
        assert like is not None
        if not like.dtype.is_floating_point:
            return Refuse("the convolution is not of real floating-point numbers", conv)
        if dtype(conv.args[2]) != like.dtype:
            return Refuse("the bias has another dtype than the result", conv)
        if not _dense(like):
            return Refuse("the result has gaps in memory", conv)
        groups, into = conv.args[8], shape(conv.args[0])
        if groups != 1 and into is not None and groups == into[1] and not conv.args[6] and _row_major(conv):
            return Refuse("ATen's depthwise kernel adds the bias itself", conv)
        return None

    def replace(self, match: Match, facts: Facts) -> None:
        """The sum takes the convolution's place; both have its layout."""
        conv: Node = match.conv
        like = tensor(conv)
        assert like is not None
        graph = facts.gm.graph
        x, weight, bias, *rest = conv.args
        with graph.inserting_before(conv):
            plain = edit.insert(graph, conv.target, (x, weight, None, *rest), origin=(conv,), val=like)
            column = edit.insert(graph, aten.view.default, (bias, [-1] + [1] * (like.dim() - 2)), origin=(conv,))
            total = edit.insert(graph, aten.add.Tensor, (plain, column), origin=(conv,), val=like)
        edit.replace(conv, total)


def _dense(like: torch.Tensor) -> bool:
    """Are the strides those of a permuted contiguous tensor? (then a sum with a broadcast operand keeps them)"""
    if not all(isinstance(n, int) for n in (*like.shape, *like.stride())):
        return True  # symbolic sizes: a convolution's result always is
    expected = 1
    for step, size in sorted((step, size) for step, size in zip(like.stride(), like.shape) if size != 1):
        if step != expected:
            return False
        expected *= size
    return True


def _row_major(conv: Node) -> bool:
    """Does the result's last dimension move fastest? Channels-last results come from cuDNN."""
    found = stride(conv)
    return found is None or found[-1] is not None and not (isinstance(found[1], int) and found[1] == 1)
