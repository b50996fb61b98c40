"""Where a torch-level graph has large depthwise convolutions, and the values of their weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..graph.edit import DERIVED_KEY, Derived
from ..graph.facts import Facts, dtype, shape, tensor
from .build import Geometry

LARGE = 7  # taps along a side from which a kernel is looked at
_NAMES = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass
class Site:
    """One convolution. ``refusal``: why it stays whatever its weights are, or "". ``sources``: placeholder positions that the
    weight comes from; ``compute`` makes it from their tensors (a folded weight is itself derived)."""

    index: int
    node: Node
    refusal: str = ""
    given: dict[str, Any] = field(default_factory=dict)
    geometry: Geometry | None = None
    sources: tuple[int, ...] = ()
    volatile: tuple[int, ...] = ()
    compute: Callable[[list[Tensor]], Tensor] | None = None
    share: str | None = ""

    def weight(self, real: Mapping[Node, Any], inputs: Sequence[Node]) -> Tensor | None:
        """The weight's value, if real tensors are at hand."""
        found = [real.get(inputs[i]) for i in self.sources]
        if self.compute is None or any(type(f) not in (Tensor, torch.nn.Parameter) for f in found):
            return None
        with torch.no_grad():
            return self.compute([f.detach() for f in found])  # type: ignore[union-attr]

    @property
    def name(self) -> str:
        """The module's path, or the node's name where there is none."""
        stack = list((self.node.meta.get("nn_module_stack") or {}).values())
        path = str(stack[-1][0]) if stack else ""
        words = re.sub(r"^L\['\w+'\]|_modules\b|['\[\]]", ".", path)  # L['self'].layers.0
        return re.sub(r"\.+", ".", words).strip(".") or self.node.name


def sites(facts: Facts) -> list[Site]:
    """All convolutions of two dimensions with a large kernel, in graph order; those that cannot be changed with the reason."""
    out: list[Site] = []
    derived = _derived(facts.gm)
    for node in facts.gm.graph.find_nodes(op="call_function", target=torch.conv2d):
        given = dict(zip(_NAMES, (None, None, None, 1, 0, 1, 1)))
        given.update(zip(_NAMES, node.args))
        given.update({k: v for k, v in node.kwargs.items() if k in given})
        kernel = shape(given["weight"])
        if kernel is None or len(kernel) != 4 or not all(isinstance(n, int) for n in kernel) or max(kernel[2:]) < LARGE:
            continue
        if min(kernel[2:]) == 1:  # a row or a column is what others are taken apart into
            continue
        site = Site(len(out), node, given=given)
        site.refusal = _describe(site, facts, derived)
        out.append(site)
    return out


def _derived(gm: GraphModule) -> dict[str, Derived]:
    return {d.name: d for d in gm.meta.get(DERIVED_KEY) or ()}


def _describe(site: Site, facts: Facts, derived: Mapping[str, Derived]) -> str:
    """Fill in the site; why it must stay, or ""."""
    given = site.given
    x, weight = tensor(given["input"]), tensor(given["weight"])
    if x is None or weight is None or x.dim() != 4:
        return "the input is not a batch of images"
    channels, kernel = weight.shape[0], (int(weight.shape[2]), int(weight.shape[3]))
    if weight.shape[1] != 1 or given["groups"] != channels or x.shape[1] != channels:
        return "not depthwise: channels are decomposed one by one"
    if weight.dtype not in _FLOATING or x.dtype != weight.dtype or dtype(site.node) != weight.dtype:
        return "the input, weight and result are not of one floating dtype"
    stride, dilation = _pair(given["stride"]), _pair(given["dilation"])
    padding = given["padding"]
    if padding == "valid":
        padding = 0
    elif padding == "same":
        reach = [d * (k - 1) for d, k in zip(dilation or (), kernel)]
        padding = tuple(n // 2 for n in reach) if all(n % 2 == 0 for n in reach) else None
    padding = _pair(padding)
    if stride is None or padding is None or dilation is None:
        return "its stride, padding or dilation is not two numbers"
    site.geometry = Geometry(kernel, stride, padding, dilation, int(channels))
    if facts.stage != "inference":
        return "gradients of the weights are wanted"
    node = given["weight"]
    if node in facts.mutated:
        return "the weight is written by the graph"
    if facts.constant(node) and node.op == "placeholder":
        site.sources, site.compute, site.share = (facts.position(node),), _itself, ""
        return ""
    made = derived.get(str(node.target)) if node.op == "placeholder" else None
    if made is None:
        return "the weight is not a parameter or buffer"
    site.sources, site.compute, site.volatile, site.share = made.sources, made.compute, made.volatile, made.share
    return ""


def _itself(sources: list[Tensor]) -> Tensor:
    return sources[0]


def _pair(given: Any) -> tuple[int, int] | None:
    if type(given) is int:
        return given, given
    if isinstance(given, (list, tuple)) and 1 <= len(given) <= 2 and all(type(n) is int for n in given):
        return (given[0], given[-1])
    return None


__all__ = ["LARGE", "Site", "sites"]
