"""Grouped convolutions as one operator: text, values, refusals, what is taken in."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import fusionc
from fusionc.graph.facts import Facts
from fusionc.graph.text import parse
from fusionc.passes.grouped_conv import GroupedConv
from tests.passes.helpers import check_values, refusals, rewritten


class OnCpu(GroupedConv):
    devices = ("cpu",)
    dtypes = (torch.float64,)
    widths = range(4, 9)


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


@pytest.mark.parametrize("name, sizes", [("x", (-1, 8, 6, 6)), ("w", (8, -1, 3, 3)), ("w", (8, 4, -1, 3))])
def test_sizes_that_are_not_known(name: str, sizes: tuple[int, ...]) -> None:
    gm, unknown = parse(CONV), ShapeEnv().create_unbacked_symint()
    node = next(n for n in gm.graph.nodes if n.name == name)
    node.meta["val"] = torch.empty([unknown if n < 0 else n for n in sizes], dtype=torch.float64, device="meta")
    (match,) = OnCpu().find(Facts(gm))
    refused = OnCpu().check(match, Facts(gm))
    assert refused is not None and refused.reason == "a size is symbolic"


def test_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """It stands in forward graphs, whose backward is ATen's: relu's gradient needs its result, silu's its argument."""
    monkeypatch.setattr(GroupedConv, "devices", OnCpu.devices)
    monkeypatch.setattr(GroupedConv, "dtypes", OnCpu.dtypes)
    monkeypatch.setattr(GroupedConv, "widths", OnCpu.widths)
    torch._dynamo.reset()
    torch.manual_seed(0)
    first, second = nn.Conv2d(8, 16, 3, 1, 1, groups=2), nn.Conv2d(16, 8, (1, 3), 2, (0, 1), groups=2)
    model = nn.Sequential(first, nn.ReLU(), second, nn.SiLU())
    model = model.double().to(memory_format=torch.channels_last)
    x = torch.randn(2, 8, 6, 5, dtype=torch.float64).contiguous(memory_format=torch.channels_last).requires_grad_()
    leaves = [x, *model.parameters()]
    found = torch.compile(model, backend="fusionc", options={"cache": False})(x)
    record = next(g for g in reversed(fusionc.report()) if g.stage == "forward")
    assert next(p for p in record.passes if p.name == "grouped_conv").fired == 2
    torch.testing.assert_close(found, model(x))
    torch.testing.assert_close(torch.autograd.grad(found.sin().sum(), leaves), torch.autograd.grad(model(x).sin().sum(), leaves))
