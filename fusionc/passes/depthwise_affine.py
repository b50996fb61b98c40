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

import torch
from torch.fx import Node

from ..graph import edit
from ..graph.facts import Facts, dtype, shape, tensor
from .activation import read_by_arithmetic, taken_in
from .affine import Form, Vectors, form
from .base import Match, Pass, Reassociates, Refuse

aten = torch.ops.aten


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
                found = form(last, known, sizes)
                if found is None or found[0] is None:
                    break
                if dtype(last) == dtype(conv) and tensor(last).stride() == tensor(conv).stride():  # type: ignore[union-attr]
                    root = last
            if root is not conv:
                yield Match({"conv": conv, "root": root, "form": known[root]}, (root,))

    def check(self, match: Match, facts: Facts) -> Refuse | None:
        """See Legality."""
        if not taken_in(match.root)[1] and read_by_arithmetic(match.root):
            return Refuse("a kernel that follows takes it in", match.root)
        return None

    def replace(self, match: Match, facts: Facts) -> None:
        """The taps and the bias in front of the new convolution, which stands where the last value was made."""
        conv, (a, b, c), graph = match.conv, match.form, facts.gm.graph
        x, taps, bias, *rest = conv.args
        last, activation = taken_in(match.root)
        wide, like = dtype(taps), tensor(taps)
        assert like is not None and wide is not None
        height, width, channels = like.shape
        made = Vectors(graph, channels, like, wide, (conv, match.root))
        with graph.inserting_before(match.root):
            if a != 1.0:
                taps = made.call(aten.mul.Tensor, taps, made.value(a))
                if bias is not None:
                    bias = made.call(aten.mul.Tensor, made.widened(bias), made.value(a))
            if b is not None:
                i, j = _at_itself(conv)  # type: ignore[misc]
                one = made.call(aten.view.default, made.vector(b), [1, 1, channels])
                window = made.call(aten.constant_pad_nd.default, one, [0, 0, j, width - 1 - j, i, height - 1 - i])
                taps = made.call(aten.add.Tensor, taps, window)
            if c is not None:
                alone = made.vector(c)
                bias = alone if bias is None else made.call(aten.add.Tensor, made.widened(bias), alone)
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
