"""Convolution, bias and relu as one call: text, values, refusals."""

from __future__ import annotations

import pytest
import torch

from fusionc.passes.conv_relu import ConvRelu
from tests.passes.helpers import check_values, refusals, rewritten


class OnCpu(ConvRelu):
    devices = ("cpu",)
    dtypes = (torch.float64,)


CONV = """
%x: f64[2, 4, 6, 6]{144, 1, 24, 4} = input
%w: f64[8, 4, 3, 3]{36, 1, 12, 4} = input
%b: f64[8] = input
%c: f64[2, 8, 3, 3]{72, 1, 24, 8} = aten.convolution(%x, %w, None, [2, 2], [1, 1], [1, 1], False, [0, 0], 1)
%v: f64[8, 1, 1] = aten.view(%b, [-1, 1, 1])
%a: f64[2, 8, 3, 3]{72, 1, 24, 8} = aten.add(%c, %v)
%r: f64[2, 8, 3, 3]{72, 1, 24, 8} = aten.relu(%a)
return (%r)
"""


def test_rewrite() -> None:
    assert rewritten(OnCpu(), CONV) == """
%x: f64[2, 4, 6, 6]{144, 1, 24, 4} = input
%w: f64[8, 4, 3, 3]{36, 1, 12, 4} = input
%b: f64[8] = input
%conv_relu: f64[2, 8, 3, 3]{72, 1, 24, 8} = fusionc.conv_relu(%x, %w, %b, [2, 2], [1, 1], [1, 1])
return (%conv_relu)
"""
    check_values(OnCpu(), CONV, fired=1, exact=False)


@pytest.mark.parametrize(("old", "new", "reason"), [
    ("return (%r)", "return (%r, %c)", "a value between is read elsewhere (c)"),
    ("return (%r)", "return (%r, %a)", "a value between is read elsewhere (a)"),
    ("%b: f64[8] = input\n", "%b: f64[1] = input\n", "what is added is not a bias of the channels (v)"),
    ("f64", "f32", "cuDNN fuses only convolutions of one half-precision dtype (c)"),
    ("{72, 1, 24, 8}", "", "input and result are not channels-last of known sizes (c)"),
    (None, None, "not a plain convolution of two dimensions (c)"),
])
def test_refusals(old: str | None, new: str, reason: str) -> None:
    text = CONV
    if old is None:
        text = text.replace("[8, 4, 3, 3]{36, 1, 12, 4}", "[8, 1, 3, 3]").replace("], 1)", "], 4)")
    else:
        text = text.replace(old, new)
    if "channels-last" in reason:
        text = text.replace("{144, 1, 24, 4}", "").replace("{36, 1, 12, 4}", "")
    if "b: f64[1]" in text:
        text = text.replace("%v: f64[8, 1, 1]", "%v: f64[1, 1, 1]")
    assert refusals(OnCpu(), text) == [reason]


def test_elsewhere_nothing_changes() -> None:
    check_values(ConvRelu(), CONV, fired=0)
