"""Convolutions whose filters hold less than their size says: zeros around or between the taps, products of two vectors.

Math       taps that are zero in every filter at the border are left out, W[a:b] with padding P − a d; if only every g-th is
           not zero, W[::g] with dilation g d; a depthwise W_c = u_c v_cᵀ is conv(conv(x, u), v)
Exactness  zeros: reassociates (0 · x is left out: where x is infinite or NaN the zero tap would have spread NaN further);
           products: within 4 roundings of each tap, checked tap by tap in float64, so float32 and float64 only: bfloat16
           filters of rank one cannot be told from others, whose singular values differ by the same 1e-3
Legality   inference; ``weights="frozen"``: the decision is made once, from the values at compile time. It is checked whenever
           the derived weight is computed: for another instance of the model that lacks the property the compiled function
           runs the graph as it was (``errors.StaleDecision``); results are not cached on disk
Cost       fewer multiplications; for products 2 k in place of k², worth a second pass over the image from 7×7 on (CPU)
Source     school; UniRepLKNet's dilated branches are the second, blurs and pruned or masked filters the others
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from ..errors import StaleDecision
from ..graph import edit
from ..graph.facts import Facts, shape, tensor, value
from . import constants, conv_bn
from .base import Match, Pass, Reassociates, Refuse

_NAMES = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_SEPARABLE = 7  # taps a side
_ROUNDINGS = 4


@dataclass(frozen=True)
class _Axis:
    """Taps first, first + step, …, last of one axis are kept."""

    first: int
    last: int
    step: int
    padding: int


class ConvValues(Pass):
    """Model-level, from the real weights."""

    name = "conv_values"
    exactness = Reassociates(rtol=1e-6)
    level = "model"

    def find(self, facts: Facts) -> Iterator[Match]:
        """Convolutions with more than one tap."""
        for node in list(facts.gm.graph.nodes):
            if node.op == "call_function" and node.target in conv_bn.CONVOLUTIONS:
                layer = conv_bn.arguments(node, _NAMES, (None, None, None, 1, 0, 1, 1))
                sizes = shape(layer["weight"])
                if sizes is not None and all(isinstance(n, int) for n in sizes) and math.prod(sizes[2:]) > 1:
                    yield Match({"conv": node, "layer": layer}, (node,))

    def check(self, match: Match, facts: Facts) -> Refuse | None:
        """See Legality. Leaves what to do in ``match``."""
        conv, layer = match.conv, match.layer
        if facts.stage != "inference":
            return Refuse("gradients of the weights are wanted", conv)
        known = constants.constant(layer["weight"], facts)
        if known is None:
            return Refuse("the weight is no parameter or buffer that stays as it is", conv)
        real = [facts.real.get(facts.inputs[position]) for position in known.sources]
        if not all(isinstance(each, torch.Tensor) and not isinstance(each, torch._subclasses.FakeTensor) for each in real):
            return Refuse("the weights' values are not at hand", conv)
        with torch.no_grad():
            tensors = [each.detach() for each in real]  # type: ignore[union-attr]
            weight = tensors[0] if known.compute is None else known.compute(tensors)
            axes = _axes(conv, layer, weight)
            if axes is not None:
                match.bound["axes"] = axes
            elif not _separable(conv, layer, weight):
                return Refuse("no zeros to leave out, no product of vectors", conv)
        return None

    def replace(self, match: Match, facts: Facts) -> None:
        """One smaller convolution, or two of one dimension each."""
        conv, layer, graph = match.conv, match.layer, facts.gm.graph
        like, weight = tensor(layer["weight"]), layer["weight"]
        assert like is not None
        axes, key = match.bound.get("axes"), edit.value_key(graph)
        rank = like.dim() - 2
        stride, padding, dilation = (_tuple(layer[name], rank) for name in ("stride", "padding", "dilation"))

        def derive(outer: Callable[[list[torch.Tensor]], torch.Tensor], sizes: tuple[int, ...], what: str) -> Node:
            # no recipe: a decision by values is not for a cache
            return constants.add(facts, [weight], outer, edit.fake_empty(like, sizes), f"conv_values {what} ", None, (conv,))

        def call(x: Any, w: Node, bias: Any, *rest: Any, val: Any) -> Node:
            args = (x, w, bias, *rest, layer["groups"])
            return edit.insert(graph, conv.target, args, origin=(conv,), key=key, **({} if val is None else {"val": val}))

        if axes is not None:
            sizes = (*like.shape[:2], *((a.last - a.first) // a.step + 1 for a in axes))
            made = derive(_kept(axes), sizes, repr(axes))
            with graph.inserting_before(conv):
                spread = tuple(d * a.step for d, a in zip(dilation, axes))
                new = call(layer["input"], made, layer["bias"], stride, tuple(a.padding for a in axes), spread, val=value(conv))
        else:
            high, wide = like.shape[2:]
            column = derive(_vector(0, like.dtype), (like.shape[0], 1, high, 1), "column")
            row = derive(_vector(1, like.dtype), (like.shape[0], 1, 1, wide), "row")
            (p, q), (s, t), (d, e) = padding, stride, dilation
            with graph.inserting_before(conv):
                half = call(layer["input"], column, None, (s, 1), (p, 0), (d, 1), val=None)
                new = call(half, row, layer["bias"], (1, t), (0, q), (1, e), val=value(conv))
        edit.replace(conv, new)
        constants.drop_unused(facts.gm, [weight])


def _tuple(given: Any, axes: int) -> tuple[Any, ...]:
    found = tuple(given) if isinstance(given, (tuple, list)) else (given,)
    return found * axes if len(found) == 1 else found


def _axes(conv: Node, layer: dict[str, Any], weight: torch.Tensor) -> list[_Axis] | None:
    """Which taps to keep, if not all."""
    rank = weight.dim() - 2
    if isinstance(layer["padding"], str) or not weight.any():
        return None
    stride, padding, dilation = (_tuple(layer[name], rank) for name in ("stride", "padding", "dilation"))
    before, after = shape(layer["input"]) or (), shape(conv) or ()
    if not all(isinstance(n, int) for n in (*stride, *padding, *dilation)) or len(before) != rank + 2:
        return None
    found = []
    for axis, (s, p, d, k) in enumerate(zip(stride, padding, dilation, weight.shape[2:])):
        there = weight.movedim(axis + 2, 0).flatten(1).ne(0).any(1).nonzero().flatten().tolist()
        size, out = before[axis + 2], after[axis + 2]
        first, last = min(there[0], p // d), there[-1]
        middle = min(first, k - 1 - last)
        for a, b in ((first, last), (middle, k - 1 - middle)):
            step = math.gcd(*(i - a for i in (*there, b))) or 1
            reach, left = (b - a) * d, p - a * d
            same = 2 * left - reach == 2 * p - (k - 1) * d  # as many places, whatever the size
            if same or isinstance(size, int) and isinstance(out, int) and (size + 2 * left - reach - 1) // s + 1 == out:
                found.append(_Axis(a, b, step, left))
                break
        else:
            return None
    fewer = any((a.last - a.first) // a.step + 1 < k for a, k in zip(found, weight.shape[2:]))
    return found if fewer else None


def _separable(conv: Node, layer: dict[str, Any], weight: torch.Tensor) -> bool:
    if weight.dim() != 4 or isinstance(layer["padding"], str) or layer["groups"] != weight.shape[0] or weight.shape[1] != 1:
        return False
    if min(weight.shape[2:]) < _SEPARABLE or weight.dtype not in (torch.float32, torch.float64) or weight.device.type != "cpu":
        return False
    return len(shape(layer["input"]) or ()) == 4 and _vectors(weight, weight.dtype) is not None


def _vectors(weight: torch.Tensor, kind: torch.dtype) -> tuple[torch.Tensor, torch.Tensor] | None:
    """u [C, kh] and v [C, kw] in float64 with W_c = u_c v_cᵀ but for roundings of ``kind``."""
    wide = weight.double().squeeze(1)
    if not wide.isfinite().all():
        return None
    # the cross through the largest tap, not singular vectors: those have the large taps' errors in the small ones
    at = wide.flatten(1).abs().argmax(1)
    row = wide[torch.arange(len(wide)), at // wide.shape[2]]
    pivot = row.gather(1, (at % wide.shape[2])[:, None])
    column = wide.gather(2, (at % wide.shape[2])[:, None, None].expand(-1, wide.shape[1], 1)).squeeze(2)
    root = pivot.abs().sqrt().where(pivot != 0, 1)  # both of one size
    column, row = column / root * pivot.sign(), row / root
    close = (column[:, :, None] * row[:, None] - wide).abs() <= _ROUNDINGS * torch.finfo(kind).eps * wide.abs()
    return (column, row) if close.all() else None


def _kept(axes: list[_Axis]) -> Callable[[list[torch.Tensor]], torch.Tensor]:
    def compute(sources: list[torch.Tensor]) -> torch.Tensor:
        (weight,) = sources
        taps = (slice(None),) * 2 + tuple(slice(a.first, a.last + 1, a.step) for a in axes)
        kept = weight[taps]
        if kept.count_nonzero() != weight.count_nonzero():
            raise StaleDecision("a filter's taps that were zero when it was compiled are not zero any more")
        return kept.contiguous(memory_format=torch.contiguous_format).clone()

    return compute


def _vector(which: int, kind: torch.dtype) -> Callable[[list[torch.Tensor]], torch.Tensor]:
    def compute(sources: list[torch.Tensor]) -> torch.Tensor:
        found = _vectors(sources[0], kind)
        if found is None:
            raise StaleDecision("a filter that was a product of two vectors when it was compiled is none any more")
        vector = found[which][:, None, :, None] if which == 0 else found[which][:, None, None, :]
        return vector.to(sources[0].dtype).contiguous()

    return compute
