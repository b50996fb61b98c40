"""Grouped convolutions of channels-last images by a kernel of ours, with bias and activation inside.

Math       f(conv(x, W, groups = G) + b): for each group a product of matrices over channels and taps (``ops/grouped_conv.py``)
Exactness  reassociates: the same products, summed in another order; one rounding where product, bias and activation have three
Legality   on CUDA, float16 or bfloat16, two dimensions, channels-last, known sizes, not transposed; 2 groups or more of 16 to 128
           channels, at most 31 taps; bias and activation are taken in where nothing else reads the values between and no
           kernel that follows takes them in for nothing
Cost       cuDNN copies images and result into another layout around its kernels: RegNetY-3.2G (batch 64, bfloat16, H200) spent
           4.0 of 7.5 ms in these copies, and takes 3.2 ms so. 9×24 channels at 64×28²: 335 → 66 µs, 32×16 at 14² 46 → 35 (8 a
           group: 96 → 118, so not those); measured at the first call, the library stays unless another is faster
Source     ResNeXt (arXiv 1611.05431), RegNet (arXiv 2003.13678)
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
_TAPS = 31


class GroupedConv(Pass):
    """aten.convolution with groups → fusionc::grouped_conv."""

    name = "grouped_conv"
    atomic = True
    exactness = Reassociates(rtol=1e-6)
    devices: ClassVar[tuple[str, ...]] = ("cuda",)
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.bfloat16, torch.float16)
    widths: ClassVar[range] = range(16, 129)  # channels of a group, in and out: of 4 or 8 the library was faster

    def find(self, facts: Facts) -> Iterator[Match]:
        """Convolutions in groups of several channels."""
        for node in list(facts.gm.graph.find_nodes(op="call_function", target=aten.convolution.default)):
            like, w, groups = tensor(node), shape(node.args[1]), node.args[8]
            if like is not None and like.device.type in self.devices and groups != 1 and w is not None and not same(w[1], 1):
                last, word = activation.taken_in(node)
                yield Match({"conv": node, "activation": word}, (node, last) if word else (node,))

    def check(self, match: Match, facts: Facts) -> Refuse | None:
        """See Legality."""
        conv: Node = match.conv
        x, weight, bias, stride, padding, dilation, transposed, _, groups = conv.args
        like, given, w = tensor(conv), tensor(x), shape(weight)
        assert like is not None and given is not None and w is not None
        if transposed or like.dim() != 4:
            return Refuse("not a plain convolution of two dimensions", conv)
        if like.dtype not in self.dtypes or any(dtype(a) != like.dtype for a in (x, weight, bias) if a is not None):
            return Refuse("not of one half-precision dtype", conv)
        sizes = (*given.shape, *w, *stride, *padding, *dilation, groups)
        if not all(isinstance(n, int) for n in sizes):
            return Refuse("a size is symbolic", conv)
        if not all(t.is_contiguous(memory_format=torch.channels_last) for t in (like, given)):
            return Refuse("input and result are not channels-last", conv)
        if not all(n in self.widths for n in (w[1], w[0] // groups)):
            return Refuse("its groups are too narrow or wide enough for the library", conv)
        if w[2] * w[3] > _TAPS:
            return Refuse("too many taps", conv)
        return None

    def replace(self, match: Match, facts: Facts) -> None:
        """One call, in the activation's place where that is taken in."""
        from ..ops import load

        load("grouped_conv")
        conv, word, last, graph = match.conv, match.activation, match.nodes[-1], facts.gm.graph
        x, weight, bias, stride, padding, dilation, _, _, groups = conv.args
        outside = None
        if activation.read_by_arithmetic(last):  # for nothing, and the library would leave it to a kernel of its own
            last, word, bias, outside = conv, "", None, bias
        origin = (conv,) if last is conv else (conv, last)
        with graph.inserting_before(last):
            made = edit.insert(graph, torch.ops.fusionc.grouped_conv.default,
                               (x, weight, bias, list(stride), list(padding), list(dilation), groups, word), origin=origin,
                               val=tensor(last))  # fmt: skip
            if outside is not None:
                column = edit.insert(graph, aten.view.default, (outside, [shape(conv)[1], 1, 1]), origin=origin)  # type: ignore[index]
                made = edit.insert(graph, aten.add.Tensor, (made, column), origin=origin, val=tensor(last))
        edit.replace(last, made)


__all__ = ["GroupedConv"]
