"""Depthwise convolutions as one operator with kernels of ours: parallel branches merged, bias and activation inside.

Math       Σ_b conv(x, W_b, β_b) = conv(x, W, Σ β_b),  W[i d_b − p_b + P, …] += W_b[i, …]; then f
Exactness  reassociates: the branches' sum is taken before the products; one rounding where ATen rounds each step
Legality   on CUDA, floating, one or two dimensions, groups = channels = output channels (or a multiple of them,
           channels-last), not transposed; the result has the layout of a dense input (contiguous, if of one dimension), and
           another input is copied first, as ATen does;
           branches read one input with one stride, give one size, have frozen weights, and one of them covers the others;
           nobody reads the values between
Cost       ATen's kernels take 8 to 70 ms for a 31×31 filter where the matrix units need 0.3; bias, activation and the
           branches' sums were a read and a write each
Source     Ding et al., RepLKNet (arXiv 2203.06717), structural re-parameterisation found from the graph
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch.fx import Node

from ..graph import edit
from ..graph.facts import Facts, dtype, same_layout, shape, tensor
from ..ops.layout import is_last
from .activation import taken_in
from .base import Match, Pass, Reassociates, Refuse

aten = torch.ops.aten
_FLOATING = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
Placement = tuple[int, int, int, int]  # of a branch's first tap in the merged filter, and its dilation


class Depthwise(Pass):
    """[sum of] depthwise convolution(s) [+ activation] → fusionc::depthwise_conv."""

    name = "depthwise"
    exactness = Reassociates(rtol=1e-6)
    devices: ClassVar[tuple[str, ...]] = ("cuda",)
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.bfloat16, torch.float16, torch.float32)

    def find(self, facts: Facts) -> Iterator[Match]:
        """Every depthwise convolution, or the largest sum of them that is one convolution."""
        if not facts.gm.graph.find_nodes(op="call_function", target=aten.convolution.default):
            return
        sums: dict[Node, list[Node]] = {}
        for node in facts.gm.graph.nodes:
            found = _branches(node, facts, sums)
            if found is not None:
                sums[node] = found
        inner = {a for node in sums if node.target is aten.add.Tensor for a in node.all_input_nodes}
        for node, convs in list(sums.items()):
            like = tensor(node)
            if node in inner or like is None or like.device.type not in self.devices:
                continue
            last, activation = taken_in(node)
            yield Match({"root": node, "convs": tuple(convs), "last": last, "activation": activation}, (last,))

    def check(self, match: Match, facts: Facts) -> Refuse | None:
        """See Legality."""
        root, conv = match.root, match.convs[0]
        x, like = tensor(conv.args[0]), tensor(root)
        if x is None or like is None or like.dtype not in self.dtypes or x.dtype != like.dtype:
            return Refuse("not of one floating dtype", root)
        for each in match.convs:
            if any(dtype(a) != like.dtype for a in each.args[1:3] if isinstance(a, Node)):
                return Refuse("a weight or bias has another dtype", each)
        filters = shape(conv.args[1]) or ()
        if not all(isinstance(n, int) for n in (*x.shape[1:], *filters, *conv.args[3], *conv.args[4])):
            return Refuse("a size is symbolic", root)
        if max(filters[2:]) == 1 and len(match.convs) == 1:
            return Refuse("one tap is a product", root)
        last, dense = is_last(x), is_last(x) or x.is_contiguous()
        if not dense:  # some of the channels of a larger image, say
            last = is_last(like)
        if not last and like.shape[1] != x.shape[1]:
            return Refuse("no kernel of ours for contiguous images with several results a channel", root)
        large = len(filters) == 4 and filters[2] * filters[3] >= 121 and filters[3] <= 32  # worth a transposition each way
        if not last and not large and (max(conv.args[3]) != 1 or like.dtype not in self.dtypes[:2]):
            return Refuse("no kernel of ours for contiguous images of this dtype and stride", root)
        if not like.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format):
            return Refuse("the result has another layout than the input", root)
        match.bound["copied"] = None if dense else torch.channels_last if last else torch.contiguous_format
        return None

    def replace(self, match: Match, facts: Facts) -> None:
        """One call; frozen weights become derived ones with the taps of all channels side by side."""
        from ..ops import load

        load("depthwise_conv")
        gm, convs, root, last = facts.gm, match.convs, match.root, match.last
        size, padding, dilation, places = _merged(convs)
        weights = [conv.args[1] for conv in convs]
        biases = [conv.args[2] for conv in convs if conv.args[2] is not None]
        like = tensor(weights[0])
        assert like is not None
        channels = like.shape[0]
        before = convs[0] if len(convs) == 1 else root
        frozen = all(_frozen(w, facts) for w in weights)
        kind = torch.promote_types(like.dtype, torch.float32)  # no conversion in the kernel, sums of branches unrounded
        with gm.graph.inserting_before(before):
            bias = biases[0] if biases else None
            if len(biases) > 1:  # wide: rounded once, in the kernel
                bias = edit.insert(gm.graph, aten._to_copy.default, (bias,), {"dtype": kind}, origin=convs)
                for each in biases[1:]:
                    bias = edit.insert(gm.graph, aten.add.Tensor, (bias, each), origin=convs)
            if not frozen:
                wide = weights[0]
                if like.dtype != kind:
                    wide = edit.insert(gm.graph, aten._to_copy.default, (wide,), {"dtype": kind}, origin=convs)
                if len(like.shape) == 3:
                    wide = edit.insert(gm.graph, aten.unsqueeze.default, (wide, 2), origin=convs)
                turned = edit.insert(gm.graph, aten.permute.default, (wide, [2, 3, 0, 1]), origin=convs)
                flat = edit.insert(gm.graph, aten.clone.default, (turned,), {"memory_format": torch.contiguous_format},
                                   origin=convs)  # fmt: skip
                taps = edit.insert(gm.graph, aten.view.default, (flat, [*size, channels]), origin=convs)
        if frozen:
            sources = [facts.position(w) for w in weights]
            recipe = ["depthwise_taps", list(size), [list(p) for p in places], str(kind)[6:]]
            taps = edit.add_derived(gm, sources, _taps(size, places, kind), edit.fake_empty(like, [*size, channels], dtype=kind),
                                    f"taps {size} {places} {kind}", convs, recipe=recipe)  # fmt: skip
        with gm.graph.inserting_before(before):
            x, stride = convs[0].args[0], list(lifted(convs[0].args[3], 1))
            line = len(like.shape) == 3  # an image of height one
            if match.copied is not None:
                x = edit.insert(gm.graph, aten.clone.default, (x,), {"memory_format": match.copied}, origin=convs)
            if line:
                x = edit.insert(gm.graph, aten.unsqueeze.default, (x, 2), origin=convs)
            known: dict[str, Any] = {} if line else {"val": tensor(last)}
            made = edit.insert(gm.graph, torch.ops.fusionc.depthwise_conv.default,
                               (x, taps, bias, stride, list(padding), list(dilation), match.activation),
                               origin=(*convs, last), **known)  # fmt: skip
            if line:
                made = edit.insert(gm.graph, aten.squeeze.dim, (made, 2), origin=(*convs, last), val=tensor(last))
        edit.replace(last, made)


def lifted(values: Any, of_height: int) -> tuple[int, int]:
    """Two numbers for two dimensions; one number (of a line) after that of its height."""
    return tuple(values) if len(values) == 2 else (of_height, *values)  # type: ignore[return-value]


def _depthwise(node: Node) -> bool:
    if node.op != "call_function" or node.target is not aten.convolution.default:
        return False
    x, w, transposed, groups = shape(node.args[0]), shape(node.args[1]), node.args[6], node.args[8]
    return (
        x is not None and w is not None and len(x) == len(w) in (3, 4) and not transposed and isinstance(groups, int)
        and groups == x[1] and w[1] == 1 and (w[0] == groups or groups > 1 and w[0] in (2 * groups, 3 * groups, 4 * groups))
    )  # fmt: skip


def _branches(node: Node, facts: Facts, sums: dict[Node, list[Node]]) -> list[Node] | None:
    """Depthwise convolutions whose sum the node is, if they can be one convolution."""
    if _depthwise(node):
        return [node]
    if node.op != "call_function" or node.target is not aten.add.Tensor or node.kwargs or len(node.args) != 2:
        return None
    parts = [sums.get(a) if isinstance(a, Node) and len(a.users) == 1 else None for a in node.args]
    if parts[0] is None or parts[1] is None or node.args[0] is node.args[1]:
        return None
    convs = parts[0] + parts[1]
    first = convs[0]
    alike = all(c.args[0] is first.args[0] and c.args[3] == first.args[3] and same_layout(tensor(c), tensor(node)) for c in convs)
    whole = all(isinstance(n, int) for c in convs for a in (shape(c.args[1]), *c.args[3:6]) for n in a)  # type: ignore[union-attr]
    if not alike or not whole or not all(_frozen(c.args[1], facts) for c in convs):
        return None
    size, padding, _, _ = _merged(convs)
    reaches = [lifted([(k - 1) * d + 1 for k, d in zip(shape(c.args[1])[2:], c.args[5])], 1) for c in convs]  # type: ignore[index]
    height, width = lifted(shape(first.args[0])[2:], 1)  # type: ignore[index]
    out = [(n + 2 * p - k) // s + 1 for n, p, k, s in zip((height, width), padding, size, lifted(first.args[3], 1))]
    return convs if size in reaches and out == list(lifted(shape(node)[2:], 1)) else None  # type: ignore[index]


def _frozen(weight: Any, facts: Facts) -> bool:
    """Does the weight stay as it is for many calls? In training it changes with each."""
    return facts.stage == "inference" and isinstance(weight, Node) and facts.constant(weight)


def _merged(convs: Any) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int], list[Placement]]:
    """Size, padding and dilation of the one filter that stands for all, and where each branch's taps lie in it."""
    kernels = [lifted(shape(conv.args[1])[2:], 1) for conv in convs]  # type: ignore[index]
    paddings, dilations = [lifted(conv.args[4], 0) for conv in convs], [lifted(conv.args[5], 1) for conv in convs]
    if len(convs) == 1:
        return kernels[0], paddings[0], dilations[0], [(0, 0, 1, 1)]
    padding = [max(p[axis] for p in paddings) for axis in (0, 1)]
    size = [max((k[axis] - 1) * d[axis] - p[axis] for k, d, p in zip(kernels, dilations, paddings)) + padding[axis] + 1
            for axis in (0, 1)]  # fmt: skip
    places = [(padding[0] - p[0], padding[1] - p[1], d[0], d[1]) for p, d in zip(paddings, dilations)]
    return (size[0], size[1]), (padding[0], padding[1]), (1, 1), places


def _taps(size: tuple[int, int], places: list[Placement], kind: torch.dtype) -> Callable[[list[torch.Tensor]], torch.Tensor]:
    """Weights [C, 1, kh, kw] or [C, 1, kw] → the sum of their taps [KH, KW, C]."""

    def compute(weights: list[torch.Tensor]) -> torch.Tensor:
        weights = [weight.unsqueeze(2) if weight.dim() == 3 else weight for weight in weights]
        if len(weights) == 1:
            return weights[0].squeeze(1).permute(1, 2, 0).to(kind).contiguous()
        total = torch.zeros((*size, weights[0].shape[0]), dtype=kind, device=weights[0].device)
        for weight, (i, j, di, dj) in zip(weights, places):
            kh, kw = weight.shape[2:]
            total[i : i + (kh - 1) * di + 1 : di, j : j + (kw - 1) * dj + 1 : dj] += weight.squeeze(1).permute(1, 2, 0)
        return total

    return compute


def rebuild(size: Any, places: Any, kind: Any, count: int) -> Callable[[list[torch.Tensor]], torch.Tensor]:
    """The computation of a recipe for ``count`` sources. Raises ValueError or TypeError for what is none."""
    numbers = [*size, *(n for place in places for n in place)]
    if len(size) != 2 or len(places) != count or any(len(place) != 4 for place in places) or \
            any(type(n) is not int or not 0 <= n <= 4096 for n in numbers) or kind not in {str(d)[6:] for d in _FLOATING}:
        raise ValueError("not the taps of depthwise convolutions")
    return _taps((size[0], size[1]), [tuple(place) for place in places], getattr(torch, kind))
