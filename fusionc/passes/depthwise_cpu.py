"""Depthwise convolutions on the CPU in a C++ kernel of ours where the library is slower, with bias and activation inside.

Math       f(conv(x, W, b)) = depthwise_cpu(x, W, b, f)
Exactness  reassociates: float32 sums in the order of the taps, one rounding at the end
Legality   on the CPU; float32, bfloat16 or float16; one or two dimensions; groups = channels = output channels; not
           transposed; known kernel sizes of at most 63; not strided and dilated at once; an input that is a part of
           another tensor is copied to the result's layout; nobody else reads what the activation reads
Cost       measured on one core of an EPYC (AVX-512) against oneDNN and ATen, by sizes alone (see ``worth``)
Source     ``codegen/templates/depthwise_cpp.py``
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch.fx import Node

from ..graph import edit
from ..graph.facts import Facts, dtype, shape, tensor
from ..ops.layout import is_last, layout_of
from .activation import taken_in
from .base import Match, Pass, Reassociates, Refuse

aten = torch.ops.aten
_LARGEST = 63


class DepthwiseCPU(Pass):
    """aten.convolution [+ activation] → fusionc::depthwise_cpu."""

    name = "depthwise_cpu"
    atomic = True
    exactness = Reassociates(rtol=1e-6)

    def find(self, facts: Facts) -> Iterator[Match]:
        """Depthwise convolutions on the CPU."""
        for node in list(facts.gm.graph.find_nodes(op="call_function", target=aten.convolution.default)):
            x, w, groups, like = shape(node.args[0]), shape(node.args[1]), node.args[8], tensor(node)
            if like is None or like.device.type != "cpu" or x is None or w is None or len(x) not in (3, 4) or node.args[6]:
                continue
            if isinstance(groups, int) and groups == x[1] == w[0] > 1:
                last, activation = taken_in(node)
                yield Match({"conv": node, "last": last, "activation": activation}, (last,))

    def check(self, match: Match, facts: Facts) -> Refuse | None:
        """See Legality."""
        conv = match.conv
        like = tensor(conv)
        assert like is not None
        if like.dtype not in (torch.float32, torch.bfloat16, torch.float16) or \
                any(dtype(a) != like.dtype for a in conv.args[:3] if isinstance(a, Node)):  # fmt: skip
            return Refuse("not of one floating dtype of at most 32 bits", conv)
        kernel, (stride, padding, dilation) = (shape(conv.args[1]) or ())[2:], conv.args[3:6]
        if not all(isinstance(n, int) for n in (*kernel, *stride, *padding, *dilation, *like.shape[2:])):
            return Refuse("a size is symbolic", conv)
        if max(kernel) > _LARGEST:
            return Refuse("the filter is too large", conv)
        if max(stride) > 1 and max(dilation) > 1:
            return Refuse("strided and dilated at once", conv)
        if not worth(kernel, stride, like.shape[-1], is_last(like)):
            return Refuse("the library is as fast", conv)
        return None

    def replace(self, match: Match, facts: Facts) -> None:
        """One call in place of the last of the two; a row of pixels is an image of one row."""
        from ..ops import load

        load("depthwise_cpu")
        graph, conv, last = facts.gm.graph, match.conv, match.last
        x, weight, bias, stride, padding, dilation = conv.args[:6]
        flat, origin = len(shape(x) or ()) == 3, (conv, last)
        given, like = tensor(x), tensor(conv)
        assert given is not None and like is not None
        layout = layout_of(like)
        with graph.inserting_before(last):
            if not given.is_contiguous(memory_format=layout):
                x = edit.insert(graph, aten.clone.default, (x,), {"memory_format": layout}, origin=origin)
            if flat:
                x, weight = (edit.insert(graph, aten.unsqueeze.default, (a, 2), origin=origin) for a in (x, weight))
                stride, padding, dilation = [1, *stride], [0, *padding], [1, *dilation]
            args = (x, weight, bias, stride, padding, dilation, match.activation)
            made = edit.insert(graph, torch.ops.fusionc.depthwise_cpu.default, args, origin=origin)
            if flat:
                made = edit.insert(graph, aten.squeeze.dim, (made, 2), origin=origin, val=tensor(last))
        edit.replace(last, made)


def worth(kernel: tuple[int, ...], stride: tuple[int, ...], columns: int, last: bool) -> bool:
    """Is our kernel the faster one? Measured on one core, library's time over ours, float32 / bfloat16.

    Contiguous: from 17×17 the library has no vector code (90 to 117× / 39 to 67×); below, long rows fill our vectors
    (1.25 to 6× / 1.2 to 1.7×), rows of 14 or 7 pixels do not (0.8 to 1.3× / 0.65 to 1.25×), strided ones lose to 0.45×.
    Channels-last: 9×9 to 15×15 1.3 to 2.9×; smaller 0.74 to 1.3×, larger 0.9 to 1.3×.
    """
    taps = math.prod(kernel)
    if last:
        return 81 <= taps < 289
    return taps >= 289 or taps > 1 and max(stride) == 1 and columns > 16
