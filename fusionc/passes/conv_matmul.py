"""Convolutions that are products of matrices, where the product is faster: one tap, and patches that tile the image.

Math       kernel = stride, no padding: every pixel belongs to one output, y[n, :, p, q] = W · (patch p, q of image n) + b
Exactness  reassociates: the same products in another order
Legality   groups 1, not transposed, no padding, known sizes that the stride divides; one floating dtype of at most 32 bits;
           input dense in one layout that the result shares
Cost       patches are copied once, in a kernel that takes in what made them; by sizes, layout and device (see ``form``)
Source     vision transformers' patch embeddings; measured, not assumed: oneDNN's and cuDNN's 1×1 kernels are products already
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Node

from ..graph import edit
from ..graph.facts import Facts, dtype, is_view, shape, tensor
from ..ops.layout import is_last, layout_of
from .base import Match, Pass, Reassociates, Refuse

aten = torch.ops.aten
LIBRARY = (aten.convolution.default, aten.mm.default, aten.addmm.default, aten.bmm.default, aten.max_pool2d_with_indices.default)
_HALF = (torch.bfloat16, torch.float16)


class ConvMatmul(Pass):
    """aten.convolution → mm, addmm or bmm between views."""

    name = "conv_matmul"
    atomic = True
    exactness = Reassociates(rtol=1e-6)

    def find(self, facts: Facts) -> Iterator[Match]:
        """Convolutions of images with kernel = stride and no padding."""
        for node in list(facts.gm.graph.find_nodes(op="call_function", target=aten.convolution.default)):
            _, weight, _, stride, padding, dilation, transposed, _, groups = node.args
            sizes = shape(weight) or ()
            if len(sizes) == 4 and list(sizes[2:]) == list(stride) and groups == 1 and not transposed and \
                    all(p == 0 for p in padding) and all(d == 1 or k == 1 for d, k in zip(dilation, sizes[2:])):  # fmt: skip
                yield Match({"conv": node}, (node,))

    def check(self, match: Match, facts: Facts) -> Refuse | None:
        """See Legality."""
        conv = match.conv
        x, like = tensor(conv.args[0]), tensor(conv)
        sizes, stride = shape(conv.args[1]) or (), conv.args[3]
        if x is None or like is None or x.dim() != 4 or like.dtype not in (*_HALF, torch.float32) or \
                any(dtype(a) != like.dtype for a in conv.args[:3] if isinstance(a, Node)):  # fmt: skip
            return Refuse("not images of one floating dtype of at most 32 bits", conv)
        if not all(isinstance(n, int) for n in (*x.shape, *sizes)):
            return Refuse("a size is symbolic", conv)
        if any(n % s for n, s in zip(x.shape[2:], stride)) or 0 in x.shape:
            return Refuse("patches do not tile the image", conv)
        last, layout = is_last(x), layout_of(x)
        if not x.is_contiguous(memory_format=layout) or not like.is_contiguous(memory_format=layout):
            return Refuse("input and result are not dense in one layout", conv)
        alone = conv.args[2] is not None and _only_libraries_read(conv)
        wanted = form(x.device.type, like.dtype, last, sizes[1], tuple(stride), like.shape[2] * like.shape[3], alone)
        if not wanted:
            return Refuse("the library's convolution is as fast", conv)
        match.bound.update(last=last, form=wanted)
        return None

    def replace(self, match: Match, facts: Facts) -> None:
        """The product takes the convolution's place and has its layout."""
        conv, graph = match.conv, facts.gm.graph
        x, weight, bias, (s, t), *_ = conv.args
        n, channels, height, width = shape(x)  # type: ignore[misc]
        out, rows, columns = shape(weight)[0], height // s, width // t  # type: ignore[index]

        def call(target: Any, *args: Any, **kwargs: Any) -> Node:
            return edit.insert(graph, target, args, kwargs, origin=(conv,))

        with graph.inserting_before(conv):
            if match.form == "columns":
                size = channels * s * t
                wide = call(aten.expand.default, call(aten.view.default, weight, [1, out, size]), [n, out, size])
                split = call(aten.view.default, x, [n, channels, rows, s, columns, t])
                turned = call(aten.permute.default, split, [0, 1, 3, 5, 2, 4]) if s * t > 1 else split
                dense = call(aten.clone.default, turned, memory_format=torch.contiguous_format) if s * t > 1 else turned
                made = call(aten.bmm.default, wide, call(aten.view.default, dense, [n, size, rows * columns]))
                if bias is not None:
                    made = call(aten.add.Tensor, made, call(aten.view.default, bias, [out, 1]))
                made = call(aten.view.default, made, [n, out, rows, columns])
            else:
                pixels = call(aten.permute.default, x, [0, 2, 3, 1])  # patches as rows, taps in the order of the memory
                split = call(aten.view.default, x, [n, channels, rows, s, columns, t]) if not match.last else \
                    call(aten.view.default, pixels, [n, rows, s, columns, t, channels])  # fmt: skip
                turned = call(aten.permute.default, split, [0, 2, 4, 1, 3, 5] if not match.last else [0, 1, 3, 2, 4, 5])
                taps = weight if not match.last else call(aten.permute.default, weight, [0, 2, 3, 1])
                left, right = (
                    call(aten.view.default, call(aten.clone.default, part, memory_format=torch.contiguous_format),
                         [count, channels * s * t])
                    for part, count in ((turned, n * rows * columns), (taps, out))
                )  # fmt: skip
                args = (left, call(aten.t.default, right))
                flat = call(aten.mm.default, *args) if bias is None else call(aten.addmm.default, bias, *args)
                made = call(aten.permute.default, call(aten.view.default, flat, [n, rows, columns, out]), [0, 3, 1, 2])
                if not match.last:
                    made = call(aten.clone.default, made, memory_format=torch.contiguous_format)
        edit.replace(conv, made)


def _only_libraries_read(node: Node) -> bool:
    """Do only library calls and the graph's caller read it, through views at most? They cannot add a bias."""
    return all(
        user.op == "output" or user.target in LIBRARY or is_view(user) and _only_libraries_read(user) for user in node.users
    )


def form(device: str, kind: torch.dtype, last: bool, channels: int, stride: tuple[int, ...], places: int, alone: bool) -> str:
    """The faster product: "rows" (a patch is a row of the left operand), "columns" (of the right one), or "" for none.

    ``alone``: there is a bias and no pointwise kernel follows that could add it.
    CPU (one core of an EPYC): never for one tap (0.7 to 1.2×, no pattern); channels-last patches of 8×8 or of 256 channels
    1.0 to 5×; contiguous ones from 14×14 in half precision (1.1 to 4.5×) and 32×32 in float32 (1.9×); smaller ones lose.
    H200, half precision: channels-last, one tap: as fast as cuDNN, but adds the bias for 0 to 40 % where ATen takes as long
    again (1.4 to 3.8×); contiguous patches of 16×16 4.9×, 4×4 2.0×, 2×2 1.2×, for 7×7 places 0.25×; float32 (TF32) loses.
    """
    side = min(stride)
    if device == "cpu":
        large = side >= 8 or side >= 2 and channels >= 256 if last else side >= (14 if kind in _HALF else 32)
        return "rows" if large else ""
    if device != "cuda" or kind not in _HALF:
        return ""
    if last:  # patches are ``strided_conv``'s
        return "rows" if max(stride) == 1 and alone else ""
    return "columns" if side > 1 and places >= 196 else ""
