"""Fold inference BatchNorm into the convolution or linear layer after it.

Math       conv(s x + t, W) + b = conv(x, s W) + (b + Σᵢ W[:, i, …] tᵢ),  s = γ/√(σ² + ε), t = β − μ s along W's inputs;
           with padding, whose zeros are not normalised, the last term is an image: conv(s x, W) + (b + conv(t everywhere, W))
Exactness  reassociates: folded in float64, rounded once
Legality   as for ``conv_bn``; only this layer reads the normalised value, through views at most; with padding, known sizes and
           a result that is no larger than the input; where values are known and narrower than float64, means are not far from
           zero: the rounding of s W meets x, eager's only x − μ (bfloat16, |μ| = 3 σ: 3.1 times eager's error, 10 σ: 9.4 times)
Cost       saves a read and a write of the activation; a copy of W
Source     RepLKNet and UniRepLKNet fold the norm in front of 1×1 convolutions when they deploy
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.fx import Node

from ..graph import edit
from ..graph.facts import Facts, dtype, each, same_layout, shape, tensor, value
from . import constants, conv_bn
from .base import Match, Pass, Reassociates, Refuse
from .channels import Place, through, views_before, written_between

_NAMES = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")


class BatchNormConv(Pass):
    """Model-level folding with derived weights."""

    name = "bn_conv"
    exactness = Reassociates(rtol=1e-5)
    level = "model"

    def find(self, facts: Facts) -> Iterator[Match]:
        """Convolutions and linear layers that read a batch_norm call, maybe through views."""
        if not facts.gm.graph.find_nodes(op="call_function", target=torch.nn.functional.batch_norm):
            return
        for node in list(facts.gm.graph.nodes):
            if node.op == "call_function" and node.target in conv_bn.CONVOLUTIONS | conv_bn.LINEAR:
                layer = conv_bn.arguments(node, _NAMES, (None, None, None, 1, 0, 1, 1))
                views, bn = views_before(layer["input"])
                if isinstance(bn, Node) and bn.op == "call_function" and bn.target is torch.nn.functional.batch_norm:
                    given = conv_bn.norm_arguments(bn)
                    yield Match({"bn": bn, "views": views, "layer": layer, "given": given, "conv": node}, (bn, node))

    def check(self, match: Match, facts: Facts) -> Refuse | None:
        """See Legality."""
        bn, conv, given, layer = match.bn, match.conv, match.given, match.layer
        refusal = conv_bn.check_parts(bn, conv, given, layer, facts)
        if refusal is not None:
            return refusal
        if len(bn.users) != 1:
            return Refuse("the normalised value has another reader", bn)
        sizes, channels = shape(layer["weight"]), (shape(bn) or (0, 0))[1]
        assert sizes is not None
        linear = conv.target in conv_bn.LINEAR
        match.bound["border"] = None
        if not linear:
            padding = layer["padding"]
            listed = padding if isinstance(padding, (list, tuple)) else [0 if padding == "valid" else padding]
            if any(p != 0 for p in listed) and not (padding == "same" and all(k == 1 for k in sizes[2:])):
                image, result = shape(bn) or (), shape(conv) or ()
                if padding == "same" or not all(type(n) is int for n in (*image[1:], *result[1:])):
                    return Refuse("the zeros of a padding are not normalised, and sizes are not known", conv)
                if len(image) != len(sizes) or math.prod(result[1:]) > math.prod(image[1:]):
                    return Refuse("the zeros of a padding are not normalised, and the image of what they change is large", conv)
                window = ([int(n) for n in each(layer[name], len(sizes) - 2)] for name in ("stride", "padding", "dilation"))
                match.bound["border"] = [list(image[2:]), *window]
        place = through(match.views, Place(1, channels)) if isinstance(channels, int) else None
        rank = len(shape(layer["input"]) or ())
        if place is None or (place.axis != rank - 1 if linear else (place.axis, place.outer, place.inner) != (1, 1, 1)) or \
                not linear and rank != len(sizes):  # fmt: skip
            return Refuse("the channels that BatchNorm normalises are not the layer's input channels", conv)
        if not same_layout(value(bn), value(given["input"])):
            return Refuse("BatchNorm changes the layout", bn)
        writer = written_between(given["input"], bn, conv, facts)
        if writer is not None:
            return Refuse("the input is written before the layer reads it", writer)
        if blurs(bn, facts.real):
            return Refuse("means are large against deviations: the weights' rounding would show", bn)
        match.bound["place"] = place
        return None

    def replace(self, match: Match, facts: Facts) -> None:
        """The layer reads what BatchNorm read, with the folded weight and bias."""
        graph, conv, bn, given, layer = facts.gm.graph, match.conv, match.bn, match.given, match.layer
        like, place = tensor(layer["weight"]), match.place
        assert like is not None
        parts = conv_bn.parts_of(layer, given)
        present = [part is not None for part in parts]
        numbers = (layer["groups"], place.outer, place.inner)
        recipe: list[Any] = ["fold_into_next", present, float(given["eps"]).hex(), *numbers]
        sources = [part for part in parts if part is not None]
        moving = [given["running_mean"], given["running_var"]]
        border = match.border
        map_or_bias = [1, *(shape(conv) or ())[1:]] if border else [like.shape[0]]
        made: list[Node | None] = [
            constants.add(facts, sources, rebuild(present, recipe[2], *numbers, want, count=len(sources)), val,
                          f"{recipe} {want} ", [*recipe, want], (bn, conv), moving)
            for want, val in ((False, edit.fake_empty(like, like.shape, conv_bn.layout(like))),
                              (border or True, edit.fake_empty(like, map_or_bias)))
        ]  # fmt: skip
        image = made[1] if border else None
        if border:
            made[1] = None
        bn.replace_all_uses_with(given["input"])
        start, key = given["input"], edit.value_key(graph)
        for view in match.views:  # of other memory than before
            view.meta[key] = edit.compute_value(view.target, view.args, view.kwargs, view.op)
            start = view
        kwargs = {name: part for name, part in conv.kwargs.items() if name not in _NAMES[:3]}
        with graph.inserting_before(conv):
            folded = edit.insert(graph, conv.target, (start, *made, *conv.args[3:]), kwargs, origin=(bn, conv),
                                 val=value(conv), key=key)  # fmt: skip
            if image is not None:
                folded = edit.insert(graph, torch.add, (folded, image), origin=(bn, conv), val=value(conv), key=key)
        edit.replace(conv, folded)
        edit.erase_dead([bn])
        constants.drop_unused(facts.gm, parts)


def blurs(bn: Node, real: Mapping[Node, Any]) -> bool:
    """Would folding lose digits, by the statistics in ``real`` (graph inputs → tensors)? False where they are not known."""
    given = conv_bn.norm_arguments(bn)
    if given["training"] is not False or not isinstance(given["eps"], (int, float)) or dtype(bn) == torch.float64:
        return False
    found = [real.get(given[name]) for name in ("running_mean", "running_var", "weight", "bias")]
    if any(type(f) not in (torch.Tensor, torch.nn.Parameter) for f, name in zip(found, "mvwb") if f is not None or name in "mv"):
        return False
    if any(f is None and given[name] is not None for f, name in zip(found[2:], ("weight", "bias"))):
        return False
    with torch.no_grad():
        mean, var, gamma, beta = (None if f is None else f.detach().double() for f in found)
        assert mean is not None and var is not None
        spread = (1.0 if gamma is None else gamma.square()) / (var + float(given["eps"]))
        ours, eager = (spread * (var + mean.square())).sum(), (spread * var + (0.0 if beta is None else beta.square())).sum()
        return bool(ours > 3 * eager)


def decides(bn: Node, real: Mapping[Node, Any]) -> bool:
    """What this pass looks at in the values of a graph that no pass has seen: part of the key of a stored start."""
    before = conv_bn.folding(bn)
    return (before is None or len(before.conv.users) != 1) and blurs(bn, real)


def rebuild(present: Any, eps: Any, groups: Any, outer: Any, inner: Any, want_bias: Any,
            count: int) -> Callable[[list[torch.Tensor]], torch.Tensor]:  # fmt: skip
    """The computation of a recipe for ``count`` sources. Raises ValueError or TypeError for what is none."""
    border = want_bias if isinstance(want_bias, list) else None
    conv_bn.check_recipe([*present, want_bias if border is None else True], count)
    if any(type(n) is not int or n < 1 for n in (groups, outer, inner)):
        raise ValueError("not a BatchNorm folded into the next layer")
    if border is not None and (len(border) != 4 or not all(
        isinstance(part, list) and len(part) == len(border[0]) and all(type(n) is int and n >= 0 for n in part) for part in border
    )):
        raise ValueError("not the image of a padding's zeros")
    small = float.fromhex(eps)

    def compute(sources: list[torch.Tensor]) -> torch.Tensor:
        weight, bias, scale, shift = conv_bn.scale_and_shift(sources, tuple(present), small)
        wide = scale.dtype
        scale, shift = (part.repeat_interleave(inner).repeat(outer) for part in (scale, shift))
        split = weight.to(wide).unflatten(0, (groups, -1))  # [groups, O / groups, I / groups, …]
        form = (groups, 1, -1, *[1] * (weight.dim() - 2))
        if border is not None:
            size, stride, padding, dilation = border
            everywhere = shift.view(1, -1, *[1] * len(size)).expand(1, -1, *size)
            image = torch.ops.aten.convolution(everywhere, weight.to(wide), None if bias is None else bias.to(wide), stride,
                                               padding, dilation, False, [0] * len(size), groups)  # fmt: skip
            return image.to(weight.dtype).contiguous()
        if want_bias:
            added = (split * shift.view(form)).flatten(2).sum(2).flatten()
            return (added if bias is None else added + bias.to(wide)).to(weight.dtype)
        place = torch.empty_strided(weight.shape, conv_bn.layout(weight), dtype=weight.dtype, device=weight.device)
        return place.copy_((split * scale.view(form)).flatten(0, 1))

    return compute
