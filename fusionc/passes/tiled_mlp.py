"""Two matrix products with an activation between them run some rows at a time, where the hidden layer outgrows the cache.

Math       f(x W₁ + b₁) W₂ + b₂, rows by rows        x [M, K]   W₁ [K, N]   W₂ [N, P]
Exactness  reassociates: the library may cut the sums of fewer rows otherwise
Legality   on the CPU, float32; known sizes; plain products with one bias vector or none; f is relu, gelu or silu, reads
           nothing but the first product, as does the second of f; between them at most views that keep the order
Cost       the hidden layer is written and read four times, from the cache in place of memory; each block of rows reads the
           weights again: only where they are small beside it
Source     ConvNeXt's blocks on two cores (AMD EPYC, 12544 rows, 96 → 384 → 96): 14.5 ms, in blocks of 1568 to 3136 rows 12.2
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Node

from ..graph import edit
from ..graph.facts import Facts, dtype, shape, tensor
from . import activation
from .base import Match, Pass, Reassociates, Refuse

aten = torch.ops.aten
_PRODUCTS = (aten.mm.default, aten.addmm.default)
_VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
_CACHE = 8 << 20  # bytes of a hidden layer that memory is not needed for, as a rule
_BLOCK = 4 << 20  # bytes of a block of it


class TiledMLP(Pass):
    """mm or addmm, activation, mm or addmm → fusionc::tiled_mlp."""

    name = "tiled_mlp"
    atomic = True
    exactness = Reassociates(rtol=1e-6)

    def find(self, facts: Facts) -> Iterator[Match]:
        """Products on the CPU whose left operand is an activation of a product."""
        for node in list(facts.gm.graph.nodes):
            if node.op != "call_function" or node.target not in _PRODUCTS:
                continue
            like = tensor(node)
            if like is None or like.device.type != "cpu":
                continue
            active, between = _through_views(_operands(node)[0])
            f = activation.word(active)
            if f:
                first, more = _through_views(active.args[0])
                if first.op == "call_function" and first.target in _PRODUCTS:
                    yield Match({"second": node, "first": first, "f": f, "inside": [first, *more, active, *between]}, (node,))

    def check(self, match: Match, facts: Facts) -> Refuse | None:
        """See Legality."""
        first, second = match.first, match.second
        (x, w1, b1), (_, w2, b2) = _operands(first), _operands(second)
        if any(dtype(a) != torch.float32 for a in (first, second)):
            return Refuse("not float32", second)
        for node in (first, second):
            if node.kwargs:
                return Refuse("addmm scales its bias or product", node)
        for bias, node in ((b1, first), (b2, second)):
            if bias is not None and len(shape(bias) or ()) != 1:
                return Refuse("its bias is no vector", node)
        if any(len(node.users) != 1 for node in match.inside):
            return Refuse("something else reads the hidden layer", next(n for n in match.inside if len(n.users) != 1))
        sizes = (*(shape(x) or ()), *(shape(w1) or ()), *(shape(w2) or ()))
        if not all(isinstance(n, int) for n in sizes):
            return Refuse("a size is symbolic", second)
        m, k, _, n, inner, p = sizes
        if inner != n or shape(_operands(second)[0]) != (m, n):
            return Refuse("the rows are arranged anew between the products", second)
        if 4 * m * n < _CACHE:
            return Refuse("the hidden layer fits into the cache", second)
        if 2 * (k + p) > _rows(m, n):
            return Refuse("the weights are not small beside a block of rows", second)
        return None

    def replace(self, match: Match, facts: Facts) -> None:
        """One call in place of the second product."""
        from ..ops import load

        load("tiled_mlp")
        first, second = match.first, match.second
        (x, w1, b1), (_, w2, b2) = _operands(first), _operands(second)
        m, n = shape(first) or ()
        with facts.gm.graph.inserting_before(second):
            args = (x, w1, b1, w2, b2, match.f, _rows(m, n))
            made = edit.insert(facts.gm.graph, torch.ops.fusionc.tiled_mlp.default, args, origin=(*match.inside, second))
        edit.replace(second, made)


def _operands(node: Node) -> tuple[Any, Any, Any]:
    """Left operand, right operand and bias of a product."""
    return (*node.args, None) if node.target is aten.mm.default else (*node.args[1:3], node.args[0])  # type: ignore[return-value]


def _through_views(node: Node) -> tuple[Node, list[Node]]:
    """What views of other shape but the same order of elements look at, and these views."""
    passed: list[Node] = []
    while node.op == "call_function" and node.target in _VIEWS:
        passed.append(node)
        node = node.args[0]  # type: ignore[assignment]
    return node, passed


def _rows(m: int, n: int) -> int:
    """Rows of a block: blocks of about equal size."""
    blocks = max(1, round(4 * m * n / _BLOCK))
    return -(-m // blocks)
