"""A strided convolution of few channels as a dense convolution of many: space to depth.

Math       y[o, p, q] = Σ w[o, c, i, j] x[c, s·p + i − P, s·q + j − P]; with i = s·a + b and blocks of s × s pixels as
           channels this is a convolution of stride 1 over s²·C channels with ⌈k / s⌉ × ⌈k / s⌉ taps. Further, f
           neighbouring columns q become f·O output channels over blocks of s × f·s pixels: channels-last memory of the
           result is the same, so that this is a view.
Exactness  reassociates: the same products in another order, and products with zeros
Legality   on CUDA, half precision, channels-last, groups 1, dilation 1, stride ≥ 2, known sizes; at most 4 channels, or
           patches that tile the image (kernel = stride, no padding)
Cost       one read and write of the input, often that of the kernel before; the library's kernels for 3 channels leave
           most of their matrix instructions idle, those for patches gather (H200: 2×2 patches of 96 channels 54 µs,
           as a product of matrices 22)
Source     space-to-depth stems (Ridnik et al., TResNet, arXiv 2003.13630, section 2.1), here exact for given weights
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
_FEW = 4
_WIDE = 256  # output channels from which the library's tiles are full (H200, 7×7 stem of 64 channels: 172, 162, 118 µs)


class StridedConv(Pass):
    """pad, blocks to channels, dense convolution, view."""

    name = "strided_conv"
    atomic = True
    exactness = Reassociates(rtol=1e-6)
    devices: ClassVar[tuple[str, ...]] = ("cuda",)
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.bfloat16, torch.float16)

    def find(self, facts: Facts) -> Iterator[Match]:
        """Strided convolutions of few channels, without bias (``conv_bias`` has split it off)."""
        for node in list(facts.gm.graph.find_nodes(op="call_function", target=aten.convolution.default)):
            x, w = (shape(a) for a in node.args[:2])
            like = tensor(node)
            if like is None or like.device.type not in self.devices or x is None or w is None or len(x) != 4:
                continue
            strided = all(isinstance(s, int) and s > 1 for s in node.args[3])
            if strided and isinstance(w[1], int) and (w[1] <= _FEW or _patches(node)):
                yield Match({"conv": node}, (node,))

    def check(self, match: Match, facts: Facts) -> Refuse | None:
        """See Legality."""
        conv: Node = match.conv
        x, weight, bias, stride, padding, dilation, transposed, _, groups = conv.args
        like = tensor(conv)
        assert like is not None
        if bias is not None:
            return Refuse("the bias is part of the convolution", conv)
        if transposed or groups != 1 or any(d != 1 for d in dilation):
            return Refuse("transposed, grouped or dilated", conv)
        if like.dtype not in self.dtypes:
            return Refuse("the library has no matrix instructions to fill for this dtype", conv)
        sizes = (*like.shape, *(shape(x) or ()), *(shape(weight) or ()), *stride, *padding)
        if not all(isinstance(n, int) for n in sizes):
            return Refuse("a size is symbolic", conv)
        if not like.is_contiguous(memory_format=torch.channels_last):
            return Refuse("the result is not channels-last", conv)
        return None

    def replace(self, match: Match, facts: Facts) -> None:
        """The new convolution between views; the weight is rearranged in the graph (it is small)."""
        conv: Node = match.conv
        x, weight, _, (s, t), (p, q), *_ = conv.args
        n, channels, height, width = shape(x)  # type: ignore[misc]
        out, _, kh, kw = shape(weight)  # type: ignore[misc]
        _, _, rows, columns = shape(conv)  # type: ignore[misc]
        f = 1 if kh <= s and kw <= t else _columns_together(out, columns)
        t_ = t * f
        wide = columns // f
        depth = next(c for c in range(channels, channels + 9) if s * t_ * c % 8 == 0)
        taps = -(-kh // s), -(-(kw + t * (f - 1)) // t_)
        high, long = rows + taps[0] - 1, wide + taps[1] - 1
        graph = facts.gm.graph

        def call(target: Any, *args: Any, **kwargs: Any) -> Node:
            return edit.insert(graph, target, args, kwargs, origin=(conv,))

        def pad(of: Node, *given: int) -> Node:
            return call(aten.constant_pad_nd.default, of, list(given)) if any(given) else of

        def blocks(of: Node, first: int, h: int, w: int) -> Node:
            """[first, depth, h·s, w·t'] → [first, h, w, s·t'·depth], contiguous."""
            split = call(aten.view.default, of, [first, depth, h, s, w, t_])
            turned = call(aten.permute.default, split, [0, 2, 4, 3, 5, 1])
            dense = call(aten.clone.default, turned, memory_format=torch.contiguous_format)
            return call(aten.view.default, dense, [first, h, w, s * t_ * depth])

        with graph.inserting_before(conv):
            padded = pad(x, q, t_ * long - width - q, p, s * high - height - p, 0, depth - channels)
            weights = [pad(weight, t * k, t_ * taps[1] - kw - t * k, 0, s * taps[0] - kh, 0, depth - channels)
                       for k in range(f)]  # fmt: skip
            stacked = call(aten.cat.default, weights) if f > 1 else weights[0]
            pixels, filters = blocks(padded, n, high, long), blocks(stacked, f * out, *taps)
            if taps == (1, 1):  # a product of matrices, which may take the bias along
                left = call(aten.view.default, pixels, [n * high * long, s * t_ * depth])
                right = call(aten.t.default, call(aten.view.default, filters, [f * out, s * t_ * depth]))
                total, bias = _bias_after(conv)
                dense = call(aten.mm.default, left, right) if bias is None or f > 1 else \
                    call(aten.addmm.default, bias, left, right)  # fmt: skip
                conv = conv if bias is None or f > 1 else total
                last = call(aten.view.default, dense, [n, rows, columns, out])
            else:
                args = [call(aten.permute.default, each, [0, 3, 1, 2]) for each in (pixels, filters)]
                dense = call(aten.convolution.default, *args, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)
                last = call(aten.permute.default, dense, [0, 2, 3, 1])
                if f > 1:
                    last = call(aten.view.default, last, [n, rows, columns, out])
            made = call(aten.permute.default, last, [0, 3, 1, 2])
        edit.replace(conv, made)


def _bias_after(conv: Node) -> tuple[Node, Node | None]:
    """The sum with a bias that is the convolution's only reader, and the bias; (conv, None) if there is none."""
    user = next(iter(conv.users), conv)
    if len(conv.users) != 1 or user.target is not aten.add.Tensor or user.kwargs or len(user.args) != 2:
        return conv, None
    view = user.args[1]
    if user.args[0] is not conv or not isinstance(view, Node) or view.target is not aten.view.default:
        return conv, None
    bias, channels = view.args[0], (shape(conv) or (0, 0))[1]
    fits = shape(view) == (channels, 1, 1) and shape(bias) == (channels,) and dtype(bias) == dtype(conv)
    before = isinstance(bias, Node) and (bias.op == "placeholder" or bias < conv)
    return (user, bias) if fits and before else (conv, None)  # type: ignore[return-value]


def _patches(conv: Node) -> bool:
    """Does every pixel belong to exactly one output?"""
    x, w = shape(conv.args[0]), shape(conv.args[1])
    assert x is not None and w is not None
    exact = all(isinstance(n, int) and n % s == 0 for n, s in zip(x[2:], conv.args[3]))
    return exact and list(w[2:]) == list(conv.args[3]) and not any(conv.args[4])


def _columns_together(out: int, columns: int) -> int:
    """How many neighbouring columns share a block: enough to make the output channels wide."""
    f = 1
    while f < 4 and f * out < _WIDE and columns % (2 * f) == 0:
        f *= 2
    return f
