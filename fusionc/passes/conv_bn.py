"""Fold inference BatchNorm into the convolution or linear layer before it.

Math       y = (conv(x, W) + b − μ) · γ/√(σ² + ε) + β
             = conv(x, s·W) + (b − μ)·s + β,   s = γ/√(σ² + ε), along W's output channels
Exactness  reassociates: products are rounded once more (folded in float64, rounded to W's dtype once)
Legality   inference, running statistics in use; weights and statistics are parameters or buffers that the graph does
           not write, or derived from such; the convolution has no other reader; the output channels are dimension 1,
           where views stand between as well; one floating dtype. In half precision only where it opens the way for more: a
           depthwise kernel of ours (it reads float32 taps), a relu that cuDNN's call takes in, branches that become one
Cost       saves one read and one write of the activation; a copy of W, kept up to date at run time
Source     the standard folding; derived at run time, so that ``load_state_dict`` and other instances stay right
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.fx import Node

from ..graph import edit
from ..graph.facts import Facts, dtype, same_layout, shape, tensor, value
from . import constants
from .base import Match, Pass, Reassociates, Refuse
from .channels import Place, through, views_before

CONVOLUTIONS = {torch.conv1d, torch.conv2d, torch.conv3d}
_TRANSPOSED = {torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d}
LINEAR = {torch._C._nn.linear, torch.nn.functional.linear}
_BN_NAMES = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
_RELU = {torch.relu, torch.relu_, torch.nn.functional.relu, torch.nn.functional.relu_}
_ADD = {operator.add, operator.iadd, torch.add}
_HALF = (torch.float16, torch.bfloat16)
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
        refusal = check_parts(bn, conv, given, layer, facts)
        if refusal is not None:
            return refusal
        if len(conv.users) != 1:
            return Refuse("the convolution has another reader", conv)
        sizes, rank = shape(layer["weight"]), len(shape(conv) or ())
        assert sizes is not None
        out = sizes[0] if conv.target not in _TRANSPOSED else _groups(conv) * sizes[1]
        place = through(match.views, Place(rank - 1 if conv.target in LINEAR else 1, out))
        if place != Place(1, out) or conv.target not in LINEAR and rank != len(sizes):
            return Refuse("the channels that BatchNorm normalises are not the layer's output channels", conv)
        if dtype(layer["weight"]) in _HALF and not _pays_in_half(bn, conv, layer["weight"]):
            return Refuse("half precision would round the folded weights once more", conv)
        found, made = value(bn), value(given["input"])
        if match.views and not same_layout(found, made) and not found.is_contiguous():
            return Refuse("BatchNorm changes the layout", bn)
        return None

    def replace(self, match: Match, facts: Facts) -> None:
        """The layer reads the folded weight and bias; BatchNorm goes."""
        gm, conv, bn, given, layer = facts.gm, match.conv, match.bn, match.given, match.layer
        like = tensor(layer["weight"])
        assert like is not None
        groups = _groups(conv)
        out = groups * like.shape[1] if conv.target in _TRANSPOSED else like.shape[0]
        parts = parts_of(layer, given)
        present = tuple(part is not None for part in parts)
        sources = [part for part in parts if part is not None]
        eps, axis = float(given["eps"]), 1 if conv.target in _TRANSPOSED else 0
        share = f"conv_bn {present} {eps!r} {axis} {groups} "
        recipe = ["fold_batch_norm", list(present), eps.hex(), axis, groups]
        key = edit.value_key(gm.graph)
        moving = [given[name] for name in ("running_mean", "running_var")]
        weight = constants.add(facts, sources, _fold(present, eps, axis, groups, False),
                               edit.fake_empty(like, like.shape, layout(like)), share + "w", [*recipe, False],
                               (conv, bn), moving)  # fmt: skip
        bias = constants.add(facts, sources, _fold(present, eps, axis, groups, True), edit.fake_empty(like, [out]),
                             share + "b", [*recipe, True], (conv, bn), moving)  # fmt: skip
        names_in = ("input", "weight", "bias")
        args = (*[layer["input"], weight, bias], *conv.args[3:])
        kwargs = {name: part for name, part in conv.kwargs.items() if name not in names_in}
        with gm.graph.inserting_before(conv):  # not later: the input may be written between the two
            val = value(conv) if match.views else value(bn)
            folded = edit.insert(gm.graph, conv.target, args, kwargs, origin=(conv, bn), val=val, key=key)
        if match.views:
            edit.replace(conv, folded)
            last = match.views[-1]
            if not same_layout(value(last), value(bn)):
                with gm.graph.inserting_before(bn):
                    last = edit.insert(gm.graph, torch.clone, (last,), {"memory_format": torch.contiguous_format},
                                       origin=(bn,), val=value(bn), key=key)  # fmt: skip
            bn.replace_all_uses_with(last)
            edit.erase_dead([bn])
        else:
            edit.replace(bn, folded)
            edit.erase_dead([conv])
        constants.drop_unused(gm, parts)


def _pays_in_half(bn: Node, conv: Node, weight: Any) -> bool:
    """Does folding spare more than the few instructions of BatchNorm in the kernel that follows a convolution anyway?

    A rounded weight is wrong by the same amount at every pixel, so that pooling does not average its error out as it does that
    of rounded results: MobileNetV3 with all of them folded had 2 to 5 times eager's error (bfloat16; CPU and H200).
    """
    like = tensor(weight)
    assert like is not None
    if conv.target in CONVOLUTIONS and like.is_cuda and like.shape[1] == 1 and _groups(conv) == like.shape[0] > 1:
        return True
    node = bn
    while len(node.users) == 1:
        (user,) = node.users
        if user.target in _RELU or user.op == "call_method" and user.target in ("relu", "relu_"):
            return like.is_cuda
        if user.target not in _ADD:
            return False
        others = [a for a in user.all_input_nodes if a is not node]
        if any(_branch(a, arguments(conv, ("input",), (None,))["input"]) for a in others):
            return True
        node = user
    return False


def _branch(node: Any, x: Any, depth: int = 8) -> bool:
    """Is it computed from x by a convolution, a BatchNorm or both, or a sum with such a value?"""
    if not isinstance(node, Node) or depth == 0:
        return False
    if node.target in _ADD:
        return any(_branch(a, x, depth - 1) for a in node.all_input_nodes)
    if node.target is torch.nn.functional.batch_norm:
        inner = norm_arguments(node)["input"]
        return inner is x or _branch(inner, x, 1)
    return node.target in CONVOLUTIONS and arguments(node, ("input",), (None,))["input"] is x


def folding(bn: Node) -> Match | None:
    """BatchNorm and the layer that it follows."""
    given = norm_arguments(bn)
    views, conv = views_before(given["input"])
    if not isinstance(conv, Node) or conv.op != "call_function" or conv.target not in CONVOLUTIONS | _TRANSPOSED | LINEAR:
        return None
    layer = arguments(conv, ("input", "weight", "bias"), (None, None, None))
    return Match({"bn": bn, "conv": conv, "given": given, "layer": layer, "views": views}, (conv, bn))


def parts_of(layer: dict[str, Any], given: dict[str, Any]) -> list[Node | None]:
    """Weight, bias, mean, variance, γ and β of a layer and a BatchNorm."""
    return [layer["weight"], layer["bias"], *(given[name] for name in ("running_mean", "running_var", "weight", "bias"))]


def check_parts(bn: Node, conv: Node, given: dict[str, Any], layer: dict[str, Any], facts: Facts) -> Refuse | None:
    """Inference, running statistics in use, constants all of them, one dtype, known sizes."""
    if facts.stage != "inference":
        return Refuse("gradients of the weights are wanted", bn)
    if given["training"] is not False or given["running_mean"] is None or given["running_var"] is None:
        return Refuse("BatchNorm uses the statistics of the batch", bn)
    for part in parts_of(layer, given):
        if part is None:
            continue
        if part in facts.mutated:
            return Refuse("a weight or statistic is written by the graph", part)
        if constants.constant(part, facts) is None:
            return Refuse("a weight or statistic is not a parameter or buffer", part if isinstance(part, Node) else bn)
    if not isinstance(given["eps"], (int, float)):
        return Refuse("eps is not a number", bn)
    weight = layer["weight"]
    if dtype(weight) not in _FLOATING or dtype(conv) != dtype(weight) or dtype(bn) != dtype(weight):
        return Refuse("the layer's weight, input and result differ in dtype", conv)
    sizes = shape(weight)
    if sizes is None or not all(isinstance(size, int) for size in sizes):
        return Refuse("the weight has a symbolic size", weight)
    if conv.target in LINEAR and len(sizes) != 2:
        return Refuse("the layer is a product with a vector", conv)
    if not isinstance(_groups(conv), int):
        return Refuse("the number of groups is symbolic", conv)
    return None


def norm_arguments(bn: Node) -> dict[str, Any]:
    """Arguments of a call of ``batch_norm`` by name."""
    return arguments(bn, _BN_NAMES, (None, None, None, None, None, False, 0.1, 1e-5))


def arguments(node: Node, names: tuple[str, ...], defaults: tuple[Any, ...]) -> dict[str, Any]:
    found = dict(zip(names, defaults))
    found.update(zip(names, node.args))
    found.update({name: part for name, part in node.kwargs.items() if name in found})
    return found


def _groups(conv: Node) -> Any:
    if conv.target in LINEAR:
        return 1
    # input, weight, bias, stride, padding, dilation, groups; transposed: …, padding, output_padding, groups, dilation
    return conv.args[6] if len(conv.args) > 6 else conv.kwargs.get("groups", 1)


def _fold(present: tuple[bool, ...], eps: float, axis: int, groups: int,
          want_bias: bool) -> Callable[[list[torch.Tensor]], torch.Tensor]:
    """Folded weight or bias from (weight, bias?, mean, var, gamma?, beta?)."""

    def compute(sources: list[torch.Tensor]) -> torch.Tensor:
        weight, bias, scale, shift = scale_and_shift(sources, present, eps)
        wide = scale.dtype
        if want_bias:
            return (shift if bias is None else shift + bias.to(wide) * scale).to(weight.dtype)
        if axis == 1:  # transposed: [C_in, C_out / groups, …]; a group's inputs see its own output channels
            split = weight.to(wide).unflatten(0, (groups, -1))
            factor = scale.view(groups, 1, -1, *[1] * (weight.dim() - 2))
            folded = (split * factor).flatten(0, 1)
        else:
            folded = weight.to(wide) * scale.view(-1, *[1] * (weight.dim() - 1))
        place = torch.empty_strided(weight.shape, layout(weight), dtype=weight.dtype, device=weight.device)
        return place.copy_(folded)

    return compute


def scale_and_shift(sources: list[torch.Tensor], present: Sequence[bool], eps: float
                    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Weight, bias, and BatchNorm as x · scale + shift (float64) from (weight, bias?, mean, var, γ?, β?)."""
    given = iter(sources)
    weight, bias, mean, var, gamma, beta = [next(given) if there else None for there in present]
    assert weight is not None and mean is not None and var is not None
    scale = torch.rsqrt(var.double() + eps)
    if gamma is not None:
        scale = scale * gamma.double()
    shift = -mean.double() * scale
    return weight, bias, scale, shift if beta is None else shift + beta.double()


def check_recipe(flags: Sequence[Any], count: int) -> None:
    """Six parts of which weight, mean and variance are there, and one more flag. Raises ValueError."""
    if len(flags) != 7 or not all(type(flag) is bool for flag in flags) or sum(flags[:6]) != count or \
            not (flags[0] and flags[2] and flags[3]):
        raise ValueError("not a folded BatchNorm")


def rebuild(present: Any, eps: Any, axis: Any, groups: Any, want_bias: Any,
            count: int) -> Callable[[list[torch.Tensor]], torch.Tensor]:
    """The computation of a recipe for ``count`` sources. Raises ValueError or TypeError for what is none."""
    check_recipe([*present, want_bias], count)
    if axis not in (0, 1) or type(groups) is not int or groups < 1:
        raise ValueError("not a folded BatchNorm")
    return _fold(tuple(present), float.fromhex(eps), axis, groups, want_bias)


def layout(weight: torch.Tensor) -> tuple[int, ...]:
    """The weight's strides if they are dense, else contiguous ones."""
    expected = 1
    for step, size in sorted((step, size) for step, size in zip(weight.stride(), weight.shape) if size != 1):
        if step != expected:
            return tuple(torch._prims_common.make_contiguous_strides_for(weight.shape))
        expected *= size
    return tuple(weight.stride())
