"""A batched product with one matrix for all: rewritten text, values, refusals."""

from __future__ import annotations

import pytest
import torch

from fusionc.passes.shared_bmm import SharedBmm
from tests.passes.helpers import check_values, refusals, rewritten

LINEAR = """
%x: f64[2, 3, 4, 5] = input
%w: f64[6, 5] = input  # static
%t: f64[5, 6]{1, 5} = aten.t(%w)
%e: f64[2, 3, 5, 6]{0, 0, 1, 5} = aten.expand(%t, [2, 3, 5, 6])
%a: f64[6, 4, 5] = aten.view(%x, [6, 4, 5])
%v: f64[6, 5, 6]{0, 1, 5} = aten.view(%e, [6, 5, 6])
%y: f64[6, 4, 6] = aten.bmm(%a, %v)
%z: f64[2, 3, 4, 6] = aten.view(%y, [2, 3, 4, 6])
return (%z)
"""


def test_a_linear_layer_of_a_permuted_image() -> None:
    assert rewritten(SharedBmm(), LINEAR) == """
%x: f64[2, 3, 4, 5] = input
%w: f64[6, 5] = input  # static
%t: f64[5, 6]{1, 5} = aten.t(%w)
%a: f64[6, 4, 5] = aten.view(%x, [6, 4, 5])
%view: f64[24, 5] = aten.view(%a, [24, 5])
%mm: f64[24, 6] = aten.mm(%view, %t)
%view_1: f64[6, 4, 6] = aten.view(%mm, [6, 4, 6])
%z: f64[2, 3, 4, 6] = aten.view(%view_1, [2, 3, 4, 6])
return (%z)
"""
    check_values(SharedBmm(), LINEAR, fired=1, exact=False)


def test_a_matrix_that_no_node_holds_is_selected() -> None:
    text = """
%a: f64[3, 4, 5] = input
%w: f64[5, 8] = input
%u: f64[1, 5, 8] = aten.unsqueeze(%w, 0)
%e: f64[3, 5, 8]{0, 8, 1} = aten.expand(%u, [3, 5, 8])
%s: f64[3, 5, 6]{0, 8, 1} = aten.slice.Tensor(%e, 2, 1, 7)
%y: f64[3, 4, 6] = aten.bmm(%a, %s)
return (%y)
"""
    assert "aten.select.int(%s, 0, 0)" in rewritten(SharedBmm(), text)
    check_values(SharedBmm(), text, fired=1, exact=False)


@pytest.mark.parametrize(("old", "new", "reason"), [
    ("%a: f64[6, 4, 5] = aten.view(%x, [6, 4, 5])", "%p: f64[4, 6, 5] = aten.view(%x, [4, 6, 5])\n"
     "%a: f64[6, 4, 5]{5, 30, 1} = aten.permute(%p, [1, 0, 2])", "the left operand's rows are not evenly spaced (y)"),
    ("[6, 4, 5]", "[6, 0, 5]", "a batch of one, or nothing (y)"),
], ids=str)  # fmt: skip
def test_refusals(old: str, new: str, reason: str) -> None:
    text = LINEAR.replace(old, new)
    if "0, 5]" in new:
        text = text.replace("[2, 3, 4, ", "[2, 3, 0, ").replace("[6, 4, 6]", "[6, 0, 6]")
    assert refusals(SharedBmm(), text) == [reason]


def test_symbolic_sizes_are_refused() -> None:
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    from fusionc.graph.facts import Facts
    from fusionc.graph.text import parse

    gm = parse(LINEAR)
    (match,) = SharedBmm().find(Facts(gm))
    size = ShapeEnv().create_unbacked_symint()
    left = next(n for n in gm.graph.nodes if n.name == "a")
    left.meta["val"] = torch.empty(6, size, 5, device="meta", dtype=torch.float64)
    refused = SharedBmm().check(match, Facts(gm))
    assert refused is not None and refused.reason == "a size is symbolic"


def test_an_ordinary_batched_product_is_not_looked_at() -> None:
    text = """
%a: f64[3, 4, 5] = input
%b: f64[3, 5, 6] = input
%y: f64[3, 4, 6] = aten.bmm(%a, %b)
return (%y)
"""
    check_values(SharedBmm(), text, fired=0)
    assert refusals(SharedBmm(), text) == []
