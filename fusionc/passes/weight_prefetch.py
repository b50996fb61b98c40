"""While attention over a cache leaves the memory idle, the weights that come next are brought into L2.

Math       skinny_linear(decode_attention(…), W, …), …, skinny_linear(…, W₂, …)   →   the first with ahead=[W₂]
Exactness  exact
Legality   one row; W₂ are parameters that the graph does not write, lie densely, and on the device of W
Cost       instructions: the kernel after attention waits anyhow, and asks for its own weight and a fifth of W₂
           meanwhile. Llama 1B on an H200: 5 % of a step. Only there: with the memory busy it costs time
Source     weights loaded while one waits for results: Spector et al., "Look Ma, No Bubbles!" (2025); measured in NOTES.md
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch.fx import Node

from ..graph import edit
from ..graph.facts import Facts, device, shape, tensor
from .base import Exact, Match, Pass, Refuse
from .decode_attention import _arguments
from .skinny_linear import _VIEWS, _is

aten = torch.ops.aten
_ATTENTION = (torch.ops.fusionc.decode_attention.default, torch.ops.fusionc.decode_attention_update.default)
_LINEAR = torch.ops.fusionc.skinny_linear.default


class WeightPrefetch(Pass):
    """Layers of one row that read what attention over a cache has made."""

    name = "weight_prefetch"
    atomic = True
    exactness = Exact()

    def __init__(self, devices: Collection[str] = ("cuda",)) -> None:
        self.devices = tuple(devices)

    def find(self, facts: Facts) -> Iterator[Match]:
        """Each such layer that asks for nothing yet, with the one that comes next."""
        layers = [n for n in facts.gm.graph.nodes if _is(n, _LINEAR)]
        for layer, following in itertools.pairwise(layers):
            given, where = _arguments(layer), device(layer)
            if where is None or where.type not in self.devices:
                continue
            if "ahead" not in given and _of_attention(given["x"]):
                yield Match({"layer": layer, "next": following}, (layer,))

    def check(self, match: Match, facts: Facts) -> Refuse | None:
        """See Legality."""
        layer: Node = match.layer
        if shape(layer)[0] != 1:  # type: ignore[index]
            return Refuse("it has more than one row", layer)
        for weight in _weights(match.next):
            like = tensor(weight)
            if weight.op != "placeholder" or weight in facts.writers or like is None or not like.is_contiguous():
                return Refuse("the next layer's weight is computed, written or not dense", layer)
            if like.device != device(layer):
                return Refuse("the next layer's weight is on another device", layer)
        return None

    def replace(self, match: Match, facts: Facts) -> None:
        """The same call with one more argument."""
        layer: Node = match.layer
        given = {**_arguments(layer), "ahead": _weights(match.next)}
        args = [given.get(a.name, a.default_value) for a in _LINEAR._schema.arguments]
        with facts.gm.graph.inserting_before(layer):
            new = edit.insert(facts.gm.graph, _LINEAR, args, origin=[layer], val=layer.meta["val"])
        layer.replace_all_uses_with(new)
        edit.erase_dead([layer])


def _weights(layer: Node) -> list[Node]:
    """All of the layer's weights."""
    given = _arguments(layer)
    return [given["weight"], *(given.get("more") or ())]


def _of_attention(x: Any) -> bool:
    """It is the result of attention over a cache, in another shape."""
    while _is(x, aten.transpose.int, *_VIEWS):
        x = x.args[0]
    return _is(x, *_ATTENTION)
