"""Give attention its causal flag back: a mask that is proved causal, or proved to mask nothing, is no tensor.

Math       softmax(q kᵀ + m) v with m = 0 where j ≤ i and −∞ elsewhere = causal attention; m = 0 everywhere = no mask
Exactness  reassociates: another kernel sums in another order
Legality   the mask is made of arange, sizes and constants only, and is true (or 0) exactly where j ≤ i, or everywhere;
           q and k have provably equal lengths if causal (torch aligns the flag to the upper left); an added mask holds −∞
           or at most −65504, the lowest float16, where it masks: every row sees its own position, so those
           probabilities are 0 either way; no dropout (another kernel draws other numbers); the kernel that torch picks
           then is not a slower kind; the readers accept its strides
Cost       saves the mask and half of the products; flash and cuDNN kernels take no broadcast mask: an expanded one sends
           attention to plain operators in float32. Costs nothing.
Source     Hugging Face's masking_utils builds a mask whenever it is traced, though eager calls with is_causal
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Node

from ..graph import edit
from ..graph.facts import Facts, dtype, same, shape
from ..graph.formula import Affine, AtLeastZero, Unproven, either
from ..graph.positions import Positions
from . import sdpa
from .base import Match, Pass, Reassociates, Refuse

_CAUSAL = AtLeastZero(Affine(((-2, 1), (-1, -1))))  # query index − key index ≥ 0
_MASKED = -65504


class CausalMask(Pass):
    """Model-level removal of masks that say nothing, or only "causal"."""

    name = "causal_mask"
    exactness = Reassociates(rtol=1e-5)
    level = "model"
    atomic = True

    def find(self, facts: Facts) -> Iterator[Match]:
        """Attention calls with a mask."""
        positions, probe = Positions(facts), sdpa.Probe()
        for node in sdpa.calls(facts.gm):
            given = sdpa.arguments(node)
            if isinstance(given["attn_mask"], Node):
                yield Match({"call": node, "given": given, "mask": given["attn_mask"], "positions": positions,
                             "probe": probe, "result": []}, (node,))  # fmt: skip

    def check(self, match: Match, facts: Facts) -> Refuse | None:
        """See Legality."""
        node, given, mask = match.call, match.given, match.mask
        if given["dropout_p"] != 0 or given["is_causal"] is not False:
            return Refuse("attention drops probabilities out", node)
        try:
            kind = _kind(match.positions, mask)
        except Unproven as error:
            return Refuse(f"the mask cannot be proved causal: {error.reason}", error.node or mask)
        if kind == "other":
            return Refuse("the mask is neither causal nor empty", mask)
        lengths = (shape(given["query"]) or (0,))[-2:-1], (shape(given["key"]) or (0,))[-2:-1]
        if kind == "causal" and not same(lengths[0][0], lengths[1][0]):
            return Refuse("queries and keys differ in number", mask)
        new = {**given, "attn_mask": None, "is_causal": kind == "causal"}
        return sdpa.settle(match, new, "torch would choose a slower kernel without the mask", fused=False)

    def replace(self, match: Match, facts: Facts) -> None:
        """The call without its mask; the mask's computation goes if nothing else reads it."""
        dead = match.positions.used(match.mask)
        ((new, values),) = match.result
        sdpa.rewrite(match.call, new, values)
        for node in sorted(dead, reverse=True):
            if not node._erased:
                edit.erase_dead([node])


def _kind(positions: Positions, mask: Node) -> str:
    """ "empty", "causal" or "other"; raises Unproven."""
    if dtype(mask) == torch.bool:
        seen = positions.truth(mask)
    else:
        cases: dict[Affine, Any] = positions(mask)
        for added in cases:
            low = not added.factors and isinstance(added.constant, (int, float)) and added.constant <= _MASKED
            if added != Affine() and not low:
                raise Unproven("it adds other numbers than 0 and -inf", mask)
        seen = either(*[when for added, when in cases.items() if added == Affine()])
    return "empty" if seen is True else "causal" if seen == _CAUSAL else "other"
