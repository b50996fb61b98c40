"""Computations of derived weights as data: JSON recipes and the functions they stand for, so that a graph can be cached.

A pass that adds a derived weight gives its recipe along (``edit.add_derived(..., recipe=)``) and names the rebuilding
function here. A recipe is a list: a word of ``RECIPES``, then arguments that the function checks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import bn_conv, channels_last, conv_bn, conv_branches, depthwise, horizontal_matmul, pad_matmul
from .constants import composed

Compute = Callable[[list[torch.Tensor]], torch.Tensor]
RECIPES: dict[str, tuple[int, Callable[..., Compute]]] = {  # word: number of arguments, function
    "depthwise_taps": (3, depthwise.rebuild),
    "channels_last": (0, channels_last.rebuild),
    "concatenate": (3, horizontal_matmul.rebuild),
    "fold_into_next": (6, bn_conv.rebuild),
    "fold_batch_norm": (5, conv_bn.rebuild),
    "merge_branches": (7, conv_branches.rebuild),
    "pad": (5, pad_matmul.rebuild),
}


def rebuild(recipe: Any, count: int) -> Compute:
    """The computation that ``recipe`` describes, for ``count`` source tensors. Raises ValueError or TypeError."""
    if isinstance(recipe, list) and recipe[:1] == ["compose"]:
        _, outer, parts, kind = recipe
        return _compose(outer, parts, kind, count)
    if not isinstance(recipe, list) or not recipe or not isinstance(recipe[0], str) or recipe[0] not in RECIPES:
        raise ValueError("not a recipe for a derived weight")
    arguments, function = RECIPES[recipe[0]]
    if len(recipe) != arguments + 1:
        raise ValueError(f"recipe {recipe[0]} has another number of arguments")
    return function(*recipe[1:], count=count)


def _compose(outer: Any, parts: Any, kind: Any, count: int) -> Compute:
    """A computation over the results of others (``constants.add``)."""
    made = []
    for indices, inner in parts:
        if not indices or not all(type(i) is int and 0 <= i < count for i in indices) or inner is None and len(indices) > 1:
            raise ValueError("a part names a source that is not there")
        made.append((list(indices), None if inner is None else rebuild(inner, len(indices))))
    if kind not in ("float64", "float32", "float16", "bfloat16"):
        raise ValueError("not a floating dtype")
    return composed(rebuild(outer, len(made)), made, getattr(torch, kind))
