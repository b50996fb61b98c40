"""Scales, shifts and the input itself behind a depthwise convolution: rewritten text, values, refusals."""

from __future__ import annotations

import pytest

from fusionc.ops import load
from fusionc.passes.depthwise_affine import DepthwiseAffine
from tests.passes.helpers import check_values, refusals, rewritten

load("depthwise_conv")
L = "{288, 1, 32, 4}"
HEAD = f"""
%x: f64[2, 4, 9, 8]{L} = input
%w: f64[3, 3, 4] = input  # static
%b: f64[4] = input  # static
%m: f64[4, 1, 1] = input  # static
%s: f64[4, 1, 1] = input  # static
%d: f64[2, 4, 9, 8]{L} = fusionc.depthwise_conv(%x, %w, %b, [1, 1], [1, 1], [1, 1], "")
"""
REPVIT = HEAD + f"""%a: f64[2, 4, 9, 8]{L} = aten.add(%d, %x)
%c: f64[2, 4, 9, 8]{L} = aten.sub(%a, %m)
%e: f64[2, 4, 9, 8]{L} = aten.mul(%c, %s)
return (%e)
"""
FASTVIT = HEAD + f"""%n: f64[2, 4, 9, 8]{L} = aten.sub(%x, %m)
%o: f64[2, 4, 9, 8]{L} = aten.mul(%n, %s)
%p: f64[2, 4, 9, 8]{L} = aten.add(%o, 0)
%q: f64[2, 4, 9, 8]{L} = aten.sub(%d, %p)
%r: f64[2, 4, 9, 8]{L} = aten.mul(%s, %q)
%e: f64[2, 4, 9, 8]{L} = aten.add(%x, %r)
%g: f64[2, 4, 9, 8]{L} = aten.gelu(%e)
return (%g)
"""


def test_the_input_itself_and_a_norm() -> None:
    assert rewritten(DepthwiseAffine(), REPVIT) == """
%x: f64[2, 4, 9, 8]{288, 1, 32, 4} = input
%w: f64[3, 3, 4] = input  # static
%b: f64[4] = input  # static
%m: f64[4, 1, 1] = input  # static
%s: f64[4, 1, 1] = input  # static
%view: f64[4] = aten.view(%s, [4])
%mul: f64[3, 3, 4] = aten.mul(%w, %view)
%mul_1: f64[4] = aten.mul(%b, %view)
%view_1: f64[1, 1, 4] = aten.view(%view, [1, 1, 4])
%constant_pad_nd: f64[3, 3, 4] = aten.constant_pad_nd(%view_1, [0, 0, 1, 1, 1, 1])
%add: f64[3, 3, 4] = aten.add(%mul, %constant_pad_nd)
%view_2: f64[4] = aten.view(%m, [4])
%mul_2: f64[4] = aten.mul(%view_2, -1.0)
%mul_3: f64[4] = aten.mul(%mul_2, %view)
%add_1: f64[4] = aten.add(%mul_1, %mul_3)
%depthwise_conv: f64[2, 4, 9, 8]{288, 1, 32, 4} = fusionc.depthwise_conv(%x, %add, %add_1, [1, 1], [1, 1], [1, 1], "")
return (%depthwise_conv)
"""
    check_values(DepthwiseAffine(), REPVIT, fired=1, exact=False)
    check_values(DepthwiseAffine(), REPVIT.replace("%w, %b", "%w, None").replace("%b: f64[4] = input  # static\n", ""),
                 fired=1, exact=False)  # fmt: skip


def test_the_input_on_both_sides_and_an_activation() -> None:
    text = rewritten(DepthwiseAffine(), FASTVIT)
    assert text.count("fusionc.depthwise_conv") == 1 and '"gelu")' in text and "f64[2, 4, 9, 8]" in text
    assert sum("f64[2, 4, 9, 8]" in line for line in text.splitlines()) == 2  # the input and the result
    check_values(DepthwiseAffine(), FASTVIT, fired=1, exact=False)
    check_values(DepthwiseAffine(), FASTVIT.replace("aten.add(%x, %r)", "aten.add(%r, %x)"), fired=1, exact=False)


@pytest.mark.parametrize(("old", "new"), [
    ("[1, 1], [1, 1], [1, 1]", "[1, 1], [2, 2], [2, 2]"),  # dilated
    ("aten.add(%d, %x)", "aten.mul(%d, 2.5)"),
    ("aten.add(%d, %x)", "aten.sub(%x, %d)"),
    ("aten.mul(%c, %s)", "aten.add(%c, %c)"),  # twice the same
    ("aten.sub(%a, %m)", "aten.sub(%m, %a)"),
], ids=str)  # fmt: skip
def test_other_sums(old: str, new: str) -> None:
    check_values(DepthwiseAffine(), REPVIT.replace(old, new), fired=1, exact=False)


def test_with_a_stride_only_scales_and_shifts_go_in() -> None:
    even = HEAD.replace("[1, 1], [1, 1], [1, 1]", "[2, 2], [1, 1], [1, 1]").replace(
        "%d: f64[2, 4, 9, 8]{288, 1, 32, 4}", "%d: f64[2, 4, 5, 4]{80, 1, 16, 4}")  # fmt: skip
    even += "%c: f64[2, 4, 5, 4]{80, 1, 16, 4} = aten.sub(%d, %m)\nreturn (%c)\n"
    check_values(DepthwiseAffine(), even, fired=1, exact=False)


@pytest.mark.parametrize(("old", "new", "reason"), [
    ("return (%e)", f"%f: f64[2, 4, 9, 8]{L} = aten.sin(%e)\nreturn (%f)", "a kernel that follows takes it in (e)"),
], ids=str)  # fmt: skip
def test_refusals(old: str, new: str, reason: str) -> None:
    assert refusals(DepthwiseAffine(), REPVIT.replace(old, new)) == [reason]


@pytest.mark.parametrize(("old", "new"), [
    ("return (%e)", "return (%e, %d)"),  # read elsewhere
    ("aten.add(%d, %x)", "aten.mul(%d, %x)"),  # a product
    ('[1, 1], "")', '[1, 1], "relu")'),
    ("aten.add(%d, %x)", "aten.add(%d, %x, alpha=2)"),
], ids=str)  # fmt: skip
def test_others_are_not_looked_at(old: str, new: str) -> None:
    text = REPVIT.replace(old, new)
    check_values(DepthwiseAffine(), text, fired=0)
    assert "depthwise_conv(%x, %w, %b" in rewritten(DepthwiseAffine(), REPVIT, "forward")
