"""Convolutions over one axis in channels-last: the rewrite, a stack of two, each refusal."""

from __future__ import annotations

import pytest
import torch

from fusionc.passes.conv1d_layout import Conv1dLayout
from tests.passes.helpers import check_values, refusals, rewritten

PASS = Conv1dLayout(("cpu",), (torch.float64,))
TEXT = """
%x: f64[2, 64, 2048] = input
%w: f64[128, 64, 3] = input
%u: f64[64, 128, 3] = input
%b: f64[128] = input
%p: f64[1, 128, 2048] = input
%c: f64[2, 128, 2048] = aten.convolution(%x, %w, %b, [1], [1], [1], False, [0], 1)
%g: f64[2, 128, 2048] = aten.gelu(%c)
%q: f64[2, 128, 2048] = aten.mul(%g, %p)
%d: f64[2, 64, 1024] = aten.convolution(%q, %u, None, [2], [1], [1], False, [0], 1)
%t: f64[2, 1024, 64]{65536, 1, 1024} = aten.permute(%d, [0, 2, 1])
%y: f64[2, 1024, 1] = aten.amax(%t, [2], True)
return (%y)
"""


def test_a_stack_is_turned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fusionc.passes.conv1d_layout._LEAST", 1)
    done = rewritten(PASS, TEXT)
    assert done.count("memory_format=torch.channels_last") == 3  # the first input and both filters
    assert "%t: f64[2, 1024, 64] = aten.permute" in done and "%q: f64[2, 128, 2048]{262144, 1, 128} = aten.mul" in done
    check_values(PASS, TEXT, fired=2, exact=False)


@pytest.mark.parametrize("text, reason", [
    (TEXT.replace("(%y)", "(%y, %c)"), "it leaves the graph or is written (c)"),
    (TEXT.replace("(%y)", "(%y, %q)"), "its layout leaves the graph (q)"),
    (TEXT.replace("%p: f64[1,", "%p: f64[2,"), "another operand lies the other way (q)"),
])  # fmt: skip
def test_refusals(text: str, reason: str) -> None:
    assert refusals(PASS, text)[0] == reason


@pytest.mark.parametrize("text", [
    TEXT.replace("64, 3]", "60, 3]").replace("f64[2, 64, 2048]", "f64[2, 60, 2048]"),  # not a multiple of 8, and narrow
    TEXT.replace("2048]", "204]").replace("1024", "102").replace("65536", "6528"),  # small
])  # fmt: skip
def test_not_worth_it(text: str) -> None:
    assert "channels_last" not in rewritten(PASS, text) and refusals(PASS, text) == []


def test_other_devices_and_types() -> None:
    assert "channels_last" not in rewritten(Conv1dLayout(), TEXT)
    assert "channels_last" not in rewritten(Conv1dLayout(("cpu",)), TEXT)
