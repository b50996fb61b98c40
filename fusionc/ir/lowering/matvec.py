"""Matrix products of one row, as reductions: on a CPU they move the weight once and do nothing else.

The library's matrix-vector product reaches about a third of the memory bandwidth there (NOTES.md); as a reduction the
product is ours, and what follows it (bias, activation, residual) joins its kernel.  More rows stay library calls.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from ..expr import ZERO, Expr
from ..ops import cast
from ..sizes import Unsupported, sizes_index
from ..value import Context, Idx, Value
from .pointwise import add, mul
from .reductions import Rows
from .registry import dtype_of, register, shape_of


def _operands(node: Node) -> tuple[Node, Node]:
    """The row [1, K] and the weight [K, N] of mm or addmm."""
    x, w = node.args[-2:]
    return x, w  # type: ignore[return-value]


def _domain(node: Node) -> Idx:
    """[1, N, K]: what the reduction runs over."""
    _, w = _operands(node)
    return sizes_index((1, w.meta["val"].shape[1], w.meta["val"].shape[0]))


def _legal(node: Node) -> None:
    x, w = (o.meta["val"] for o in _operands(node))
    sizes = (*x.shape, *w.shape)
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64) or not all(type(s) is int for s in sizes):
        raise Unsupported("")  # a library call, and no fallback
    if x.shape[0] != 1 or w.stride(0) != 1 or w.numel() < 4096:
        raise Unsupported("")


@register(["aten.mm.default", "aten.addmm.default"], "reduce", dims=lambda n: (2,), domain=_domain, loose=(0, 1, 2))
def _matvec(ctx: Context, node: Node, *operands: Any, **scales: Any) -> Value:
    _legal(node)
    if any(v != 1 for v in scales.values()):
        raise Unsupported("")
    *bias, x, w = operands
    shape = _domain(node)
    rows = Rows(ctx, node, (2,), shape)
    dtype = dtype_of(node)

    def at(idx: Idx) -> Expr:
        k = ctx.axis_of[node].get(2, ZERO)
        total = rows.sum(mul(x.at((ZERO, k)), w.at((k, idx[1]))))
        return add(total, bias[0].at_broadcast(idx, dtype)) if bias else cast(total, dtype)

    return Value(ctx, shape_of(node), dtype, at)
