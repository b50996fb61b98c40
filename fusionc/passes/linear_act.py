"""A linear layer or 1×1 convolution of many rows takes in its bias, norm and activation, where a measurement says that it pays.

Math       f(s ⊙ (x Wᵀ) + b), f one of relu, gelu, silu; s and b hold an inference BatchNorm whose folding would round W: on the
           accumulator, before the result is written for the first time
Exactness  reassociates in name only: one rounding where the product, the bias and the activation have three
Legality   inference on CUDA, float16 or bfloat16, known sizes that are multiples of 8; W contiguous; a convolution has one tap,
           stride 1, no groups and channels-last images; nobody reads the values between
Cost       the activation was a read and a write of the result, often the widest value of its block (first stage of ConvNeXt:
           308 MB or 72 µs a block, the product itself 45). Which kernel runs is measured at the first call: the library's
           product and ATen's activation are a candidate. Not where another kernel takes the activation in for nothing
Source     epilogue fusion as in CUTLASS; cuBLASLt has it for relu and the tanh form of gelu only
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch.fx import Node

from ..graph import edit
from ..graph.facts import Facts, dtype, shape, tensor
from . import activation
from .affine import Vectors, form
from .base import Match, Pass, Reassociates, Refuse

aten = torch.ops.aten
_VIEWS = (aten.view.default, aten._unsafe_view.default)
ROWS = 512  # below, a launch counts for more than the traffic


class LinearActivation(Pass):
    """addmm, mm + bias or 1×1 convolution + bias, then an activation → fusionc::linear_act."""

    name = "linear_act"
    exactness = Reassociates(rtol=1e-6)
    devices: ClassVar[tuple[str, ...]] = ("cuda",)
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.bfloat16, torch.float16)
    rows: ClassVar[int] = ROWS

    def find(self, facts: Facts) -> Iterator[Match]:
        """Activations whose input is a product, through views and one sum with a bias."""
        if facts.stage != "inference":
            return
        for node in list(facts.gm.graph.nodes):
            word, like = activation.word(node), tensor(node)
            if not word or like is None or like.device.type not in self.devices or like.dtype not in self.dtypes:
                continue
            found = _product(node.args[0]) or _normalised(node.args[0])
            if found is not None:
                yield Match({"act": node, "activation": word, **found}, (node,))

    def check(self, match: Match, facts: Facts) -> Refuse | None:
        """See Legality. Leaves the two operands in ``match``."""
        act, product = match.act, match.product
        conv = product.target is aten.convolution.default
        for node in match.between:
            if len(node.users) != 1:
                return Refuse("a value between is read elsewhere", node)
        like, made = tensor(act), tensor(product)
        x, weight = (product.args[0], product.args[1]) if conv else product.args[-2:]
        if not conv:
            turned = weight.target is aten.permute.default and list(weight.args[1]) == [1, 0]
            if not turned and weight.target is not aten.t.default:
                return Refuse("the weight is not turned", product)
            weight = weight.args[0]
        left, right = tensor(x), tensor(weight)
        assert like is not None and made is not None and left is not None and right is not None
        if not all(isinstance(n, int) for t in (like, left, right) for n in (*t.shape, *t.stride())):
            return Refuse("a size is symbolic", product)
        bias = match.bias
        if any(dtype(a) != like.dtype for a in (act.args[0], x, weight, product, *([bias] if bias is not None else []))):
            return Refuse("not of one dtype", product)
        if conv:
            _, _, _, stride, padding, _, transposed, _, groups = product.args
            last = torch.channels_last
            if max(right.shape[2:]) > 1 or max(stride) > 1 or max(padding) > 0 or transposed or groups != 1:
                return Refuse("not a convolution of one tap", product)
            if left.dim() != 4 or not all(t.is_contiguous(memory_format=last) for t in (left, made, like)):
                return Refuse("the images are not channels-last", product)
        elif left.stride(1) != 1 or left.stride(0) % 8 or not right.is_contiguous() or not like.is_contiguous() or \
                not made.is_contiguous():  # fmt: skip
            return Refuse("an operand is not dense along its rows", product)
        out, inner = right.shape[:2]
        if out % 8 or inner % 8 or like.numel() < self.rows * out:
            return Refuse("few rows, or a width that is no multiple of 8", product)
        if like.numel() != made.numel() or like.shape[1 if conv else -1] != out or \
                bias is not None and tuple(shape(bias) or ()) != (out,):  # fmt: skip
            return Refuse("what is added is not a bias of the columns", product)
        if activation.read_by_arithmetic(act):
            return Refuse("a kernel that follows takes the activation in", act)
        match.bound.update(x=x, weight=weight, conv=conv)
        return None

    def replace(self, match: Match, facts: Facts) -> None:
        """One call in the activation's place, between views."""
        from ..ops import load

        load("linear_act")
        act, graph = match.act, facts.gm.graph
        sizes, weight = shape(act), match.weight
        assert sizes is not None
        out, inner = shape(weight)[:2]  # type: ignore[index]

        def call(target: Any, *args: Any) -> Node:
            return edit.insert(graph, target, args, origin=(match.product, act))

        with graph.inserting_before(act):
            x = match.x
            if match.conv:
                x = call(aten.view.default, call(aten.permute.default, x, [0, 2, 3, 1]), [math.prod(sizes) // out, inner])
                weight = call(aten.view.default, weight, [out, inner])
            scale, bias = None, match.bias
            if match.form is not None:
                made = tensor(match.product)
                assert made is not None
                vectors = Vectors(graph, out, made, torch.promote_types(made.dtype, torch.float32), (match.product, act))
                (a, _, c), own = match.form, bias
                scale = None if a == 1.0 else vectors.vector(a)
                if own is not None and scale is not None:
                    own = call(aten.mul.Tensor, vectors.widened(own), scale)
                bias = own if c is None else vectors.vector(c) if own is None else \
                    call(aten.add.Tensor, vectors.vector(c), own)  # fmt: skip
            made = call(torch.ops.fusionc.linear_act.default, x, weight, scale, bias, match.activation)
            if match.conv:
                made = call(aten.view.default, made, [sizes[0], *sizes[2:], out])
                made = call(aten.permute.default, made, [0, 3, 1, 2])
            elif len(sizes) != 2:
                made = call(aten.view.default, made, list(sizes))
        edit.replace(act, made)


def _product(node: Any) -> dict[str, Any] | None:
    """The product, its bias and all nodes from it on: views [+ bias] views product."""
    between: list[Node] = []
    bias: Node | None = None
    while isinstance(node, Node) and node.op == "call_function":
        between.append(node)
        if node.target in _VIEWS:
            node = node.args[0]
        elif node.target is aten.add.Tensor and bias is None and not node.kwargs:
            sides = [(node.args[0], node.args[1]), (node.args[1], node.args[0])]
            found = [(v, b) for v, b in sides if isinstance(b, Node) and isinstance(v, Node) and _vector(b) is not None]
            if not found or found[0][0] is found[0][1]:
                return None
            value, given = found[0]
            bias = _vector(given)
            of_channels = given is not bias
            if of_channels != _is(value, aten.convolution.default):
                return None
            node = value
        elif node.target is aten.addmm.default:
            ok = bias is None and not node.kwargs and isinstance(node.args[2], Node)
            return {"product": node, "form": None, "bias": node.args[0], "between": tuple(between)} if ok else None
        elif node.target is aten.mm.default:
            ok = isinstance(node.args[1], Node)
            return {"product": node, "form": None, "bias": bias, "between": tuple(between)} if ok else None
        elif node.target is aten.convolution.default:
            if node.args[2] is not None and bias is not None or any(n.target in _VIEWS for n in between):
                return None
            return {"product": node, "form": None, "bias": bias or node.args[2], "between": tuple(between)}
        else:
            return None
    return None


def _normalised(node: Node) -> dict[str, Any] | None:
    """A convolution, and the numbers by which its channels are scaled and shifted afterwards."""
    sizes, between = shape(node), [node]
    if sizes is None or len(sizes) != 4:
        return None
    while between[-1].target is not aten.convolution.default:
        inner = [n for n in between[-1].all_input_nodes if shape(n) == sizes]
        if between[-1].op != "call_function" or len(inner) != 1 or len(between) > 12:
            return None
        between.append(inner[0])
    conv = between[-1]
    found = form(node, {conv: (1.0, None, None)}, sizes) if node is not conv else None
    if found is None or found[0] is None:
        return None
    return {"product": conv, "form": found, "bias": conv.args[2], "between": tuple(between)}


def _is(node: Node, target: Any) -> bool:
    return node.op == "call_function" and node.target is target


def _vector(node: Node) -> Node | None:
    """The vector that is added to the columns, or (as a view [N, 1, 1]) to the channels."""
    sizes = shape(node) or ()
    if len(sizes) == 1:
        return node
    if len(sizes) != 3 or tuple(sizes[1:]) != (1, 1) or node.target is not aten.view.default:
        return None
    return node.args[0] if isinstance(node.args[0], Node) and len(shape(node.args[0]) or ()) == 1 else None
