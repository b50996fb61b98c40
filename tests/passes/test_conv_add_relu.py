"""Convolution, bias, sum and relu as one call: text, values, refusals."""

from __future__ import annotations

import pytest
import torch

from fusionc.passes.conv_add_relu import ConvAddRelu
from tests.passes.helpers import check_values, refusals, rewritten


class OnCpu(ConvAddRelu):
    devices = ("cpu",)
    dtypes = (torch.float64,)


BLOCK = """
%x: f64[2, 4, 6, 6]{144, 1, 24, 4} = input
%w: f64[8, 4, 1, 1] = input
%b: f64[8] = input
%z: f64[2, 8, 6, 6]{288, 1, 48, 8} = input
%c: f64[2, 8, 6, 6]{288, 1, 48, 8} = aten.convolution(%x, %w, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)
%v: f64[8, 1, 1] = aten.view(%b, [-1, 1, 1])
%a: f64[2, 8, 6, 6]{288, 1, 48, 8} = aten.add(%c, %v)
%s: f64[2, 8, 6, 6]{288, 1, 48, 8} = aten.add(%a, %z)
%r: f64[2, 8, 6, 6]{288, 1, 48, 8} = aten.relu(%s)
return (%r)
"""
# the other term is a convolution with 3×3 filters and a bias of its own, and stands first
TWO = BLOCK.replace("%z: f64[2, 8, 6, 6]{288, 1, 48, 8} = input", """%w2: f64[8, 4, 3, 3]{36, 1, 12, 4} = input
%b2: f64[8] = input
%d: f64[2, 8, 6, 6]{288, 1, 48, 8} = aten.convolution(%x, %w2, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)
%u: f64[8, 1, 1] = aten.view(%b2, [-1, 1, 1])
%z: f64[2, 8, 6, 6]{288, 1, 48, 8} = aten.add(%d, %u)""").replace("aten.add(%a, %z)", "aten.add(%z, %a)")


def test_rewrite() -> None:
    for text in (BLOCK, BLOCK.replace("aten.add(%a, %z)", "aten.add(%z, %a)")):
        assert rewritten(OnCpu(), text) == """
%x: f64[2, 4, 6, 6]{144, 1, 24, 4} = input
%w: f64[8, 4, 1, 1] = input
%b: f64[8] = input
%z: f64[2, 8, 6, 6]{288, 1, 48, 8} = input
%conv_add_relu: f64[2, 8, 6, 6]{288, 1, 48, 8} = fusionc.conv_add_relu(%x, %w, %b, %z, [1, 1], [0, 0], [1, 1])
return (%conv_add_relu)
"""
        check_values(OnCpu(), text, fired=1, exact=False)


def test_two_convolutions() -> None:
    found = rewritten(OnCpu(), TWO)
    assert "= aten.add(%b, %b2)" in found and "fusionc.conv_add_relu(%x, %w, %add, %d, [1, 1], [0, 0], [1, 1])" in found
    assert found.count("aten.add") == 1 and "aten.view" not in found
    check_values(OnCpu(), TWO, fired=1, exact=False)
    read = TWO.replace("return (%r)", "return (%r, %z)")  # its sum stays then
    assert "fusionc.conv_add_relu(%x, %w, %b, %z, " in rewritten(OnCpu(), read)
    check_values(OnCpu(), read, fired=1, exact=False)


@pytest.mark.parametrize(("old", "new", "reason"), [
    ("return (%r)", "return (%r, %c)", "a value between is read elsewhere (c)"),
    ("return (%r)", "return (%r, %a)", "a value between is read elsewhere (a)"),
    ("return (%r)", "return (%r, %s)", "a value between is read elsewhere (s)"),
    ("%b: f64[8] = input\n", "%b: f64[1] = input\n", "what is added is not a bias of the channels (v)"),
    ("f64", "f32", "only convolutions of one half-precision dtype are fused (c)"),
    ("{288, 1, 48, 8}", "", "input and result are not channels-last of known sizes (c)"),
    ("%z: f64[2, 8, 6, 6]{288, 1, 48, 8}", "%z: f64[1, 8, 6, 6]{288, 1, 48, 8}", "the other term has another layout (z)"),
    ("%z: f64[2, 8, 6, 6]{288, 1, 48, 8}", "%z: f64[2, 8, 6, 6]", "the other term has another layout (z)"),
    (None, "", "not a plain convolution of two dimensions (c)"),
])
def test_refusals(old: str | None, new: str, reason: str) -> None:
    if old is None:
        text = BLOCK.replace("[8, 4, 1, 1]", "[8, 1, 1, 1]").replace("], 1)", "], 4)")
    else:
        text = BLOCK.replace(old, new)
    if "channels-last" in reason:
        text = text.replace("{144, 1, 24, 4}", "")
    if "b: f64[1]" in text:
        text = text.replace("%v: f64[8, 1, 1]", "%v: f64[1, 1, 1]")
    assert refusals(OnCpu(), text) == [reason]


def test_elsewhere_nothing_changes() -> None:
    check_values(ConvAddRelu(), BLOCK, fired=0)
