"""Fold inference BatchNorm into the convolution or linear layer before it.

Math       y = (conv(x, W) + b − μ) · γ/√(σ² + ε) + β
             = conv(x, s·W) + (b − μ)·s + β,   s = γ/√(σ² + ε), along W's output channels
Exactness  reassociates: products are rounded once more (folded in float32 or wider, rounded to W's dtype once)
Legality   inference, running statistics in use; weights and statistics are parameters or buffers that the graph does
           not write; the convolution has no other reader; the output channels are dimension 1; one floating dtype
Cost       saves one read and one write of the activation; a copy of W, kept up to date at run time
Source     the standard folding; derived at run time, so that ``load_state_dict`` and other instances stay right
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.fx import Node

from ..graph import edit
from ..graph.facts import Facts, dtype, shape, tensor, value
from . import constants
from .base import Match, Pass, Reassociates, Refuse

_CONVOLUTIONS = {torch.conv1d, torch.conv2d, torch.conv3d}
_TRANSPOSED = {torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d}
_LINEAR = {torch._C._nn.linear, torch.nn.functional.linear}
_BN_NAMES = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
_FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class ConvBatchNorm(Pass):
    """Model-level folding with derived weights."""

    name = "conv_bn"
    exactness = Reassociates(rtol=1e-5)
    level = "model"

    def find(self, facts: Facts) -> Iterator[Match]:
        """batch_norm calls whose input is a convolution or linear call."""
        for node in list(facts.gm.graph.find_nodes(op="call_function", target=torch.nn.functional.batch_norm)):
            found = folding(node)
            if found is not None:
                yield found

    def check(self, match: Match, facts: Facts) -> Refuse | None:
        """See Legality."""
        bn, conv, given, layer = match.bn, match.conv, match.given, match.layer
        if facts.stage != "inference":
            return Refuse("gradients of the weights are wanted", bn)
        if given["training"] is not False or given["running_mean"] is None or given["running_var"] is None:
            return Refuse("BatchNorm uses the statistics of the batch", bn)
        if len(conv.users) != 1:
            return Refuse("the convolution has another reader", conv)
        weight = layer["weight"]
        parts = [weight, layer["bias"], given["running_mean"], given["running_var"], given["weight"], given["bias"]]
        for part in parts:
            if part is None:
                continue
            if part in facts.mutated:
                return Refuse("a weight or statistic is written by the graph", part)
            if constants.constant(part, facts) is None:
                return Refuse("a weight or statistic is not a parameter or buffer", part if isinstance(part, Node) else bn)
        if not isinstance(given["eps"], (int, float)):
            return Refuse("eps is not a number", bn)
        if dtype(weight) not in _FLOATING or dtype(conv) != dtype(weight) or dtype(bn) != dtype(weight):
            return Refuse("the layer's weight, input and result differ in dtype", conv)
        sizes, rank = shape(weight), len(shape(conv) or ())
        if sizes is None or not all(isinstance(size, int) for size in sizes):
            return Refuse("the weight has a symbolic size", weight)
        if conv.target in _LINEAR and rank != 2 or conv.target not in _LINEAR and rank != len(sizes):
            return Refuse("the channels that BatchNorm normalises are not the layer's output channels", conv)
        return None

    def replace(self, match: Match, facts: Facts) -> None:
        """The layer reads the folded weight and bias; BatchNorm goes."""
        gm, conv, bn, given, layer = facts.gm, match.conv, match.bn, match.given, match.layer
        like = tensor(layer["weight"])
        assert like is not None
        groups = _groups(conv)
        out = groups * like.shape[1] if conv.target in _TRANSPOSED else like.shape[0]
        names = ("running_mean", "running_var", "weight", "bias")
        parts = [layer["weight"], layer["bias"], *[given[name] for name in names]]
        present = tuple(part is not None for part in parts)
        sources = [part for part in parts if part is not None]
        eps, axis = float(given["eps"]), 1 if conv.target in _TRANSPOSED else 0
        share = f"conv_bn {present} {eps!r} {axis} {groups} "
        recipe = ["fold_batch_norm", list(present), eps.hex(), axis, groups]
        key = edit.value_key(gm.graph)
        moving = [given[name] for name in ("running_mean", "running_var")]
        weight = constants.add(facts, sources, _fold(present, eps, axis, groups, False),
                               edit.fake_empty(like, like.shape, _layout(like)), share + "w", [*recipe, False],
                               (conv, bn), moving)  # fmt: skip
        bias = constants.add(facts, sources, _fold(present, eps, axis, groups, True), edit.fake_empty(like, [out]),
                             share + "b", [*recipe, True], (conv, bn), moving)  # fmt: skip
        names_in = ("input", "weight", "bias")
        args = (*[layer["input"], weight, bias], *conv.args[3:])
        kwargs = {name: part for name, part in conv.kwargs.items() if name not in names_in}
        with gm.graph.inserting_before(conv):  # not later: the input may be written between the two
            folded = edit.insert(gm.graph, conv.target, args, kwargs, origin=(conv, bn), val=value(bn), key=key)
        edit.replace(bn, folded)
        edit.erase_dead([conv])
        constants.drop_unused(gm)


def folding(bn: Node) -> Match | None:
    """BatchNorm and the layer that it follows."""
    given = norm_arguments(bn)
    conv = given["input"]
    if not isinstance(conv, Node) or conv.op != "call_function" or conv.target not in _CONVOLUTIONS | _TRANSPOSED | _LINEAR:
        return None
    layer = arguments(conv, ("input", "weight", "bias"), (None, None, None))
    return Match({"bn": bn, "conv": conv, "given": given, "layer": layer}, (conv, bn))


def norm_arguments(bn: Node) -> dict[str, Any]:
    """Arguments of a call of ``batch_norm`` by name."""
    return arguments(bn, _BN_NAMES, (None, None, None, None, None, False, 0.1, 1e-5))


def arguments(node: Node, names: tuple[str, ...], defaults: tuple[Any, ...]) -> dict[str, Any]:
    found = dict(zip(names, defaults))
    found.update(zip(names, node.args))
    found.update({name: part for name, part in node.kwargs.items() if name in found})
    return found


def _groups(conv: Node) -> int:
    if conv.target in _LINEAR:
        return 1
    # input, weight, bias, stride, padding, dilation, groups; transposed: …, padding, output_padding, groups, dilation
    found = conv.args[6] if len(conv.args) > 6 else conv.kwargs.get("groups", 1)
    return int(found)  # type: ignore[arg-type]


def _fold(present: tuple[bool, ...], eps: float, axis: int, groups: int,
          want_bias: bool) -> Callable[[list[torch.Tensor]], torch.Tensor]:
    """Folded weight or bias from (weight, bias?, mean, var, gamma?, beta?)."""

    def compute(sources: list[torch.Tensor]) -> torch.Tensor:
        given = iter(sources)
        weight, bias, mean, var, gamma, beta = [next(given) if there else None for there in present]
        assert weight is not None and mean is not None and var is not None
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        scale = torch.rsqrt(var.to(wide) + eps)
        if gamma is not None:
            scale = scale * gamma.to(wide)
        if want_bias:
            shift = -mean.to(wide) if bias is None else bias.to(wide) - mean.to(wide)
            shift = shift * scale
            return (shift if beta is None else shift + beta.to(wide)).to(weight.dtype)
        if axis == 1:  # transposed: [C_in, C_out / groups, …]; a group's inputs see its own output channels
            split = weight.to(wide).unflatten(0, (groups, -1))
            factor = scale.view(groups, 1, -1, *[1] * (weight.dim() - 2))
            folded = (split * factor).flatten(0, 1)
        else:
            folded = weight.to(wide) * scale.view(-1, *[1] * (weight.dim() - 1))
        layout = _layout(weight)  # a channels-last weight stays one
        place = torch.empty_strided(weight.shape, layout, dtype=weight.dtype, device=weight.device)
        return place.copy_(folded)

    return compute


def rebuild(present: Any, eps: Any, axis: Any, groups: Any, want_bias: Any,
            count: int) -> Callable[[list[torch.Tensor]], torch.Tensor]:
    """The computation of a recipe for ``count`` sources. Raises ValueError or TypeError for what is none."""
    flags = [*present, want_bias]
    if len(present) != 6 or not all(type(flag) is bool for flag in flags) or sum(present) != count or \
            not (present[0] and present[2] and present[3]) or axis not in (0, 1) or type(groups) is not int or groups < 1:
        raise ValueError("not a folded BatchNorm")
    return _fold(tuple(present), float.fromhex(eps), axis, groups, want_bias)


def _layout(weight: torch.Tensor) -> tuple[int, ...]:
    """The weight's strides if they are dense, else contiguous ones."""
    expected = 1
    for step, size in sorted((step, size) for step, size in zip(weight.stride(), weight.shape) if size != 1):
        if step != expected:
            return tuple(torch._prims_common.make_contiguous_strides_for(weight.shape))
        expected *= size
    return tuple(weight.stride())
