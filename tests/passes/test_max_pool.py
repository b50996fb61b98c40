"""Max pooling: positions dropped, order-preserving operators moved behind it, refusals."""

from __future__ import annotations

import pytest

from fusionc.passes.max_pool import MaxPool
from tests.passes.helpers import check_values, refusals, rewritten


class OnCpu(MaxPool):
    devices = ("cpu",)


STEM = """
%x: f64[2, 3, 8, 8]{192, 1, 24, 3} = input
%b: f64[3, 1, 1] = input
%a: f64[2, 3, 8, 8]{192, 1, 24, 3} = aten.add(%x, %b)
%r: f64[2, 3, 8, 8]{192, 1, 24, 3} = aten.relu(%a)
%p: (f64[2, 3, 4, 4]{48, 1, 12, 3}, i64[2, 3, 4, 4]{48, 1, 12, 3}) = aten.max_pool2d_with_indices(%r, [3, 3], [2, 2], [1, 1])
%v: f64[2, 3, 4, 4]{48, 1, 12, 3} = getitem(%p, 0)
%o: f64[2, 3, 4, 4]{48, 1, 12, 3} = aten.mul(%v, 2)
return (%o)
"""


def test_moves_in_front_of_bias_and_relu() -> None:
    assert rewritten(OnCpu(), STEM) == """
%x: f64[2, 3, 8, 8]{192, 1, 24, 3} = input
%b: f64[3, 1, 1] = input
%max_pool2d: f64[2, 3, 4, 4]{48, 1, 12, 3} = aten.max_pool2d(%x, [3, 3], [2, 2], [1, 1])
%add: f64[2, 3, 4, 4]{48, 1, 12, 3} = aten.add(%max_pool2d, %b)
%relu: f64[2, 3, 4, 4]{48, 1, 12, 3} = aten.relu(%add)
%o: f64[2, 3, 4, 4]{48, 1, 12, 3} = aten.mul(%relu, 2)
return (%o)
"""
    check_values(OnCpu(), STEM, fired=1)


@pytest.mark.parametrize(("old", "new"), [
    ("return (%o)", "return (%o, %r)"),  # read elsewhere: only the positions go
    ("aten.relu(%a)", "aten.neg(%a)"),  # turns the order round
    ("%b: f64[3, 1, 1] = input", "%b: f64[3, 8, 1] = input"),  # not constant over a window
])
def test_stays_behind(old: str, new: str) -> None:
    text = rewritten(OnCpu(), STEM.replace(old, new))
    assert "max_pool2d(%" in text and "max_pool2d(%x" not in text
    check_values(OnCpu(), STEM.replace(old, new), fired=1)


@pytest.mark.parametrize(("old", "new", "reason"), [
    ("return (%o)", "%i: i64[2, 3, 4, 4]{48, 1, 12, 3} = getitem(%p, 1)\nreturn (%o, %i)",
     "the positions of the maxima are read (p)"),
])
def test_refusals(old: str, new: str, reason: str) -> None:
    assert refusals(OnCpu(), STEM.replace(old, new)) == [reason]


def test_windows_of_nothing_but_padding() -> None:
    """Their maximum is -inf, also after relu: a window of taps at -1 and 2 over two pixels."""
    text = """
%x: f64[1, 1, 2, 2] = input
%r: f64[1, 1, 2, 2] = aten.relu(%x)
%p: (f64[1, 1, 1, 1], i64[1, 1, 1, 1]) = aten.max_pool2d_with_indices(%r, [2, 2], [1, 1], [1, 1], [3, 3])
%v: f64[1, 1, 1, 1] = getitem(%p, 0)
return (%v)
"""
    assert refusals(OnCpu(), text) == ["a window may hold nothing but padding, which relu would change (p)"]
    check_values(OnCpu(), text, fired=0)


def test_integers_and_dtype_changes() -> None:
    integers = STEM.replace("f64", "i64")
    assert refusals(OnCpu(), integers) == ["what is pooled is not floating point (p)"]
    mixed = STEM.replace("%x: f64", "%x: f32").replace("%b: f64", "%b: f64")
    assert refusals(OnCpu(), mixed.replace("%b: f64[3, 1, 1]", "%b: f32[3, 1, 1]").replace("f64", "f32")) == []


def test_elsewhere_nothing_changes() -> None:
    check_values(MaxPool(), STEM, fired=0)
