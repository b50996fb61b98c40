"""A convolution's bias as a sum of its own: text, values, each refusal."""

from __future__ import annotations

import pytest

from fusionc.passes.conv_bias import ConvBias
from tests.passes.helpers import check_values, refusals, rewritten


class OnCpu(ConvBias):
    devices = ("cpu",)


CONV = """
%x: f64[2, 4, 6, 6] = input
%w: f64[8, 4, 3, 3] = input
%b: f64[8] = input
%c: f64[2, 8, 6, 6] = aten.convolution(%x, %w, %b, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)
%r: f64[2, 8, 6, 6] = aten.relu(%c)
return (%r)
"""


def test_rewrite() -> None:
    assert rewritten(OnCpu(), CONV) == """
%x: f64[2, 4, 6, 6] = input
%w: f64[8, 4, 3, 3] = input
%b: f64[8] = input
%convolution: f64[2, 8, 6, 6] = aten.convolution(%x, %w, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)
%view: f64[8, 1, 1] = aten.view(%b, [-1, 1, 1])
%add: f64[2, 8, 6, 6] = aten.add(%convolution, %view)
%r: f64[2, 8, 6, 6] = aten.relu(%add)
return (%r)
"""
    check_values(OnCpu(), CONV, fired=1, exact=False)


def test_channels_last_keeps_its_layout() -> None:
    text = CONV.replace("[2, 8, 6, 6]", "[2, 8, 6, 6]{288, 1, 48, 8}").replace("[2, 4, 6, 6]", "[2, 4, 6, 6]{144, 1, 24, 4}")
    assert "%add: f64[2, 8, 6, 6]{288, 1, 48, 8} = aten.add" in rewritten(OnCpu(), text)
    check_values(OnCpu(), text, fired=1, exact=False)


def test_transposed_and_one_dimension() -> None:
    check_values(OnCpu(), """
%x: f64[2, 4, 6] = input
%w: f64[4, 3, 3] = input
%b: f64[3] = input
%c: f64[2, 3, 13] = aten.convolution(%x, %w, %b, [2], [0], [1], True, [0], 1)
return (%c)
""", fired=1, exact=False)


@pytest.mark.parametrize(("changes", "reason"), [
    ({"f64": "c128", "%r: c128[2, 8, 6, 6] = aten.relu(%c)": "%r: c128[2, 8, 6, 6] = aten.neg(%c)"},
     "the convolution is not of real floating-point numbers (c)"),
    ({"[8, 4, 3, 3]": "[4, 1, 3, 3]", "[2, 8, 6, 6]": "[2, 4, 6, 6]", "b: f64[8]": "b: f64[4]", ", 1)": ", 4)"},
     "ATen's depthwise kernel adds the bias itself (c)"),
])
def test_refusals(changes: dict[str, str], reason: str) -> None:
    text = CONV
    for old, new in changes.items():
        text = text.replace(old, new)
    assert refusals(OnCpu(), text) == [reason]


def test_refusals_of_odd_values() -> None:
    """Layouts and dtypes that a real convolution does not have, so the graph is not verified."""
    import torch

    from fusionc.graph.facts import Facts
    from fusionc.graph.text import parse

    for val, bias, reason in (
        (torch.empty_strided((2, 8, 6, 6), (999, 36, 6, 1), dtype=torch.float64, device="cpu"), torch.float64,
         "the result has gaps in memory"),
        (torch.empty(2, 8, 6, 6, dtype=torch.float64), torch.float32, "the bias has another dtype than the result"),
    ):
        gm = parse(CONV)
        nodes = {n.name: n for n in gm.graph.nodes}
        nodes["c"].meta["val"] = val
        nodes["b"].meta["val"] = torch.empty(8, dtype=bias)
        facts = Facts(gm)
        (match,) = OnCpu().find(facts)
        refused = OnCpu().check(match, facts)
        assert refused is not None and refused.reason == reason


def test_without_bias_or_elsewhere_nothing_is_found() -> None:
    check_values(OnCpu(), CONV.replace("%w, %b", "%w, None"), fired=0)
    check_values(ConvBias(), CONV, fired=0)
