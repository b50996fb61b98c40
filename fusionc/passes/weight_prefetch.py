"""While attention over a cache leaves the memory idle, the weights that come next are brought into L2.

Math       skinny_linear(decode_attention(…), W, …), …, skinny_linear(…, W₂, …)   →   the first with ahead=[W₂]
Exactness  exact
Legality   one row; W₂ are parameters that the graph does not write, lie densely, and on the device of W
Cost       instructions: the kernel after attention waits anyhow, and asks for its own weight and half of W₂
           meanwhile. Llama 1B on an H200: 0.795 → 0.753 ms a step. Only there: with the memory busy it costs time
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
from ..ops import decode_attention, skinny_linear  # noqa: F401  register the operators
from .base import Exact, Match, Pass, Refuse
from .skinny_linear import _VIEWS

aten = torch.ops.aten
_ATTENTION = (torch.ops.fusionc.decode_attention.default, torch.ops.fusionc.decode_attention_update.default)
_LINEAR = torch.ops.fusionc.skinny_linear.default
_DEFAULTS = (None, True, False)  # of the arguments between ``chained`` and ``ahead``
_FIXED = 9  # arguments without a default


class WeightPrefetch(Pass):
    """Layers of one row that read what attention over a cache has made."""

    name = "weight_prefetch"
    atomic = True
    exactness = Exact()

    def __init__(self, devices: Collection[str] = ("cuda",)) -> None:
        self.devices = tuple(devices)

    def find(self, facts: Facts) -> Iterator[Match]:
        """Each such layer that asks for nothing yet, with the one that comes next."""
        layers = [n for n in facts.gm.graph.nodes if n.op == "call_function" and n.target is _LINEAR]
        for layer, following in itertools.pairwise(layers):
            where = device(layer)
            if where is not None and where.type in self.devices and len(layer.args) <= _FIXED + len(_DEFAULTS):
                if _of_attention(layer.args[0]):
                    yield Match({"layer": layer, "next": following}, (layer,))

    def check(self, match: Match, facts: Facts) -> Refuse | None:
        """See Legality."""
        layer: Node = match.layer
        if shape(layer.args[0])[0] != 1:  # type: ignore[index]
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
        given = layer.args[_FIXED:]
        with facts.gm.graph.inserting_before(layer):
            new = edit.insert(facts.gm.graph, _LINEAR, (*layer.args, *_DEFAULTS[len(given) :], _weights(match.next)),
                              origin=[layer], val=layer.meta["val"])  # fmt: skip
        layer.replace_all_uses_with(new)
        edit.erase_dead([layer])


def _weights(layer: Node) -> list[Node]:
    """All of the layer's weights."""
    more: Any = layer.args[_FIXED] if len(layer.args) > _FIXED else None
    return [layer.args[1], *(more or ())]  # type: ignore[list-item]


def _of_attention(x: Any) -> bool:
    """It is the result of attention over a cache, in another shape."""
    while isinstance(x, Node) and x.op == "call_function" and (x.target in _VIEWS or x.target is aten.transpose.int):
        x = x.args[0]
    return isinstance(x, Node) and x.op == "call_function" and x.target in _ATTENTION
