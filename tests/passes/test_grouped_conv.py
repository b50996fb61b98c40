"""Grouped convolutions as one operator: text, values, refusals, what is taken in."""

from __future__ import annotations

import pytest
import torch

from fusionc.passes.grouped_conv import GroupedConv
from tests.passes.helpers import check_values, refusals, rewritten


class OnCpu(GroupedConv):
    devices = ("cpu",)
    dtypes = (torch.float64,)


CONV = """
%x: f64[2, 8, 6, 6]{288, 1, 48, 8} = input
%w: f64[8, 4, 3, 3]{36, 1, 12, 4} = input
%b: f64[8] = input
%c: f64[2, 8, 3, 3]{72, 1, 24, 8} = aten.convolution(%x, %w, %b, [2, 2], [1, 1], [1, 1], False, [0, 0], 2)
%r: f64[2, 8, 3, 3]{72, 1, 24, 8} = aten.relu(%c)
return (%r)
"""


def test_bias_and_activation_are_taken_in() -> None:
    assert rewritten(OnCpu(), CONV) == """
%x: f64[2, 8, 6, 6]{288, 1, 48, 8} = input
%w: f64[8, 4, 3, 3]{36, 1, 12, 4} = input
%b: f64[8] = input
%grouped_conv: f64[2, 8, 3, 3]{72, 1, 24, 8} = fusionc.grouped_conv(%x, %w, %b, [2, 2], [1, 1], [1, 1], 2, "relu")
return (%grouped_conv)
"""
    check_values(OnCpu(), CONV, fired=1, exact=False)


def test_a_kernel_that_follows_takes_them_in_for_nothing() -> None:
    text = CONV.replace("return (%r)", "%s: f64[2, 8, 3, 3]{72, 1, 24, 8} = aten.sin(%r)\nreturn (%s)")
    found = rewritten(OnCpu(), text)
    assert 'fusionc.grouped_conv(%x, %w, None, [2, 2], [1, 1], [1, 1], 2, "")' in found
    assert "aten.add(%grouped_conv, %view)" in found and "aten.relu(%add)" in found
    check_values(OnCpu(), text, fired=1, exact=False)


def test_an_activation_with_other_readers_of_its_argument_stays() -> None:
    text = CONV.replace("return (%r)", "return (%r, %c)")
    assert 'fusionc.grouped_conv(%x, %w, %b, [2, 2], [1, 1], [1, 1], 2, "")' in rewritten(OnCpu(), text)
    check_values(OnCpu(), text, fired=1, exact=False)


def changed(*pairs: tuple[str, str]) -> str:
    text = CONV
    for old, new in pairs:
        assert old in text
        text = text.replace(old, new)
    return text


RESULT, FILTER = "[2, 8, 3, 3]{72, 1, 24, 8}", "[8, 4, 3, 3]{36, 1, 12, 4}"


@pytest.mark.parametrize(("text", "reason"), [
    (changed(("f64", "f32")), "not of one half-precision dtype (c)"),
    (changed(("{288, 1, 48, 8}", ""), ("{72, 1, 24, 8}", ""), ("{36, 1, 12, 4}", "")),
     "input and result are not channels-last (c)"),
    (changed(("False, [0, 0], 2", "True, [0, 0], 2"), (RESULT, "[2, 8, 11, 11]{968, 1, 88, 8}")),
     "not a plain convolution of two dimensions (c)"),
    (changed((FILTER, "[8, 2, 3, 3]{18, 1, 6, 2}"), ("], 2)", "], 4)")),
     "its groups are too narrow or wide enough for the library (c)"),
    (changed((FILTER, "[8, 4, 6, 6]{144, 1, 24, 4}"), (RESULT, "[2, 8, 2, 2]{32, 1, 16, 8}")), "too many taps (c)"),
])
def test_refusals(text: str, reason: str) -> None:
    assert refusals(OnCpu(), text) == [reason]


@pytest.mark.parametrize("text", [
    changed((FILTER, "[8, 8, 3, 3]{72, 1, 24, 8}"), ("], 2)", "], 1)")),
    changed((FILTER, "[8, 1, 3, 3]"), ("], 2)", "], 8)")),
], ids=["dense", "depthwise"])
def test_others_are_no_candidates(text: str) -> None:
    assert refusals(OnCpu(), text) == [] and "grouped_conv" not in rewritten(OnCpu(), text)
