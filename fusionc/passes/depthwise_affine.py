"""What is scaled, shifted and added by channels behind a depthwise convolution goes into its taps and bias.

Math       a ⊙ conv(x, W, β) + b ⊙ x + c = conv(x, a ⊙ W + b ⊙ δ, a ⊙ β + c), δ the tap at the pixel itself
Exactness  reassociates: sums of taps in float32, one rounding of the result where each step had one
Legality   a, b, c are numbers or vectors of the channels; nobody reads a value between. With b: stride 1, a tap at the pixel
           itself, a result of x's size
Cost       a kernel that reads the convolution's result and mostly x too, and writes: 26 µs for 64×64×56×56 on an H200; new taps
           are made at each call, all layers' in one launch
Source     timm's ``reparameterize``: RepViT (x + conv, then BatchNorm), FastViT (x + s (conv − BatchNorm(x))); here in half
           precision, too, whose weights could not hold 1 + w: the kernel's taps are float32
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Node

from ..graph import edit
from ..graph.facts import Facts, dtype, shape, tensor
from .base import Match, Pass, Reassociates, Refuse
from .depthwise import _activation
from .linear_act import _taken_in

aten = torch.ops.aten
_FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_DEPTH = 16
Coefficient = Any  # None (zero), a number, a Node (a vector of the channels), or (word, left, right)
Form = tuple[Coefficient, Coefficient, Coefficient]  # of the convolution, of x, alone


class DepthwiseAffine(Pass):
    """fusionc::depthwise_conv and an affine function of it and its input, by channels → fusionc::depthwise_conv."""

    name = "depthwise_affine"
    exactness = Reassociates(rtol=1e-6)

    def find(self, facts: Facts) -> Iterator[Match]:
        """Each such convolution without activation that something affine follows."""
        if facts.stage != "inference" or not hasattr(torch.ops.fusionc, "depthwise_conv"):
            return
        for conv in list(facts.gm.graph.find_nodes(op="call_function", target=torch.ops.fusionc.depthwise_conv.default)):
            sizes = shape(conv)
            if conv.args[6] != "" or sizes is None or not all(isinstance(n, int) for n in sizes[1:]):
                continue
            known: dict[Node, Form | None] = {conv: (1.0, None, None)}
            if shape(conv.args[0]) == sizes and _at_itself(conv) is not None:
                known[conv.args[0]] = (None, 1.0, None)
            root, last = conv, conv
            while len(last.users) == 1:
                (last,) = last.users
                if _form(last, known, sizes, 0) is None:
                    break
                if dtype(last) == dtype(conv) and tensor(last).stride() == tensor(conv).stride():  # type: ignore[union-attr]
                    root = last
            if root is not conv:
                yield Match({"conv": conv, "root": root, "form": known[root]}, (root,))

    def check(self, match: Match, facts: Facts) -> Refuse | None:
        """See Legality."""
        if not _activation(match.root)[1] and _taken_in(match.root):
            return Refuse("a kernel that follows takes it in", match.root)
        return None

    def replace(self, match: Match, facts: Facts) -> None:
        """The taps and the bias in front of the new convolution, which stands where the last value was made."""
        conv, (a, b, c), graph = match.conv, match.form, facts.gm.graph
        x, taps, bias, *rest = conv.args
        last, activation = _activation(match.root)
        wide, like = dtype(taps), tensor(taps)
        assert like is not None and wide is not None
        height, width, channels = like.shape
        made: dict[Any, Any] = {}

        def call(target: Any, *args: Any, **kwargs: Any) -> Node:
            return edit.insert(graph, target, args, kwargs, origin=(conv, match.root))

        def value(given: Coefficient) -> Any:
            """A number or a vector [C] in the taps' dtype."""
            if given not in made:
                if isinstance(given, Node):
                    flat = call(aten.view.default, given, [channels])
                    made[given] = flat if dtype(flat) == wide else call(aten._to_copy.default, flat, dtype=wide)
                elif isinstance(given, tuple):
                    left, right = value(given[1]), value(given[2])
                    if not isinstance(left, Node):
                        left, right = right, left  # both sums and products commute
                    if isinstance(left, Node):
                        made[given] = call(aten.mul.Tensor if given[0] == "mul" else aten.add.Tensor, left, right)
                    else:
                        made[given] = left * right if given[0] == "mul" else left + right
                else:
                    made[given] = float(given)
            return made[given]

        def vector(given: Coefficient) -> Node:
            found = value(given)
            if isinstance(found, Node):
                return found
            kwargs = {"dtype": wide, "device": like.device, "pin_memory": False}
            return edit.insert(graph, aten.full.default, ([channels], found), kwargs, origin=(conv, match.root),
                               val=edit.fake_empty(like, [channels], dtype=wide))  # fmt: skip

        with graph.inserting_before(match.root):
            if a != 1.0:
                taps = call(aten.mul.Tensor, taps, value(a))
                if bias is not None:
                    bias = call(aten.mul.Tensor, bias if dtype(bias) == wide else call(aten._to_copy.default, bias, dtype=wide),
                                value(a))  # fmt: skip
            if b is not None:
                i, j = _at_itself(conv)  # type: ignore[misc]
                one = call(aten.view.default, vector(b), [1, 1, channels])
                window = call(aten.constant_pad_nd.default, one, [0, 0, j, width - 1 - j, i, height - 1 - i])
                taps = call(aten.add.Tensor, taps, window)
            if c is not None:
                alone = vector(c)
                if bias is not None and dtype(bias) != wide:
                    bias = call(aten._to_copy.default, bias, dtype=wide)
                bias = alone if bias is None else call(aten.add.Tensor, bias, alone)
            new = edit.insert(graph, torch.ops.fusionc.depthwise_conv.default, (x, taps, bias, *rest[:3], activation),
                              origin=(conv, last), val=tensor(last))  # fmt: skip
        edit.replace(last, new)


def _at_itself(conv: Node) -> tuple[int, int] | None:
    """The tap that reads the pixel whose result is made."""
    sizes = shape(conv.args[1])
    assert sizes is not None
    at = []
    for k, s, p, d in zip(sizes[:2], *conv.args[3:6]):
        if s != 1 or p % d or p // d >= k:
            return None
        at.append(p // d)
    return at[0], at[1]


def _form(node: Any, known: dict[Node, Form | None], sizes: Any, depth: int) -> Form | None:
    """The node as a ⊙ conv + b ⊙ x + c, if it is that."""
    if node in known:
        return known[node]
    known[node] = None
    if node.op != "call_function" or shape(node) != sizes or dtype(node) not in _FLOATING or depth > _DEPTH:
        return None
    if node.target is aten._to_copy.default and set(node.kwargs) == {"dtype"}:
        inner = node.args[0]
        known[node] = _form(inner, known, sizes, depth + 1) if isinstance(inner, Node) and dtype(inner) in _FLOATING else None
        return known[node]
    if node.target not in (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor) or node.kwargs or len(node.args) != 2:
        return None
    sides: list[Form] = []
    for arg in node.args:
        constant = _constant(arg, sizes)
        found = (None, None, constant) if constant is not None else \
            _form(arg, known, sizes, depth + 1) if isinstance(arg, Node) else None  # fmt: skip
        if found is None:
            return None
        sides.append(found)
    left, right = sides
    if node.target is aten.mul.Tensor:
        if _constant(node.args[0], sizes) is not None:
            left, right = right, left
        if right[0] is not None or right[1] is not None or right[2] is None:
            return None
        known[node] = tuple(_times(term, right[2]) for term in left)  # type: ignore[assignment]
    else:
        if node.target is aten.sub.Tensor:
            right = tuple(_times(term, -1.0) for term in right)  # type: ignore[assignment]
        known[node] = tuple(_plus(p, q) for p, q in zip(left, right))  # type: ignore[assignment]
    return known[node]


def _constant(given: Any, sizes: Any) -> Coefficient:
    """A number or a vector of the channels."""
    if isinstance(given, (int, float)) and not isinstance(given, bool):
        return float(given)
    if isinstance(given, Node) and dtype(given) in _FLOATING and shape(given) in ((sizes[1], 1, 1), (1, sizes[1], 1, 1)) \
            and sizes[1] > 1:  # fmt: skip
        return given
    return None


def _times(a: Coefficient, b: Coefficient) -> Coefficient:
    if a is None or b is None:
        return None
    return b if a == 1.0 else a if b == 1.0 else ("mul", a, b)


def _plus(a: Coefficient, b: Coefficient) -> Coefficient:
    if a is None or a == 0.0:
        return b if b != 0.0 else None
    return a if b is None or b == 0.0 else ("add", a, b)
