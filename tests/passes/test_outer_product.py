"""Products over an inner dimension of one: the rewrite and each refusal."""

from __future__ import annotations

import pytest

from fusionc.passes.outer_product import OuterProduct
from tests.passes.helpers import check_values, refusals, rewritten

PASS = OuterProduct()
TEXT = """
%a: f32[1, 8, 1] = input
%b: f32[1, 1, 5] = input
%y: f32[1, 8, 5] = aten.bmm(%a, %b)
return (%y)
"""


def test_bmm() -> None:
    assert rewritten(PASS, TEXT) == """
%a: f32[1, 8, 1] = input
%b: f32[1, 1, 5] = input
%mul: f32[1, 8, 5] = aten.mul(%a, %b)
return (%mul)
"""
    check_values(PASS, TEXT, fired=1)


def test_mm() -> None:
    check_values(PASS, TEXT.replace("[1, 8", "[8").replace("[1, 1, 5", "[1, 5").replace("bmm", "mm"), fired=1)


@pytest.mark.parametrize(
    "text, reason",
    [
        (TEXT.replace("f32", "i64"), "its operands are not real numbers of one dtype (y)"),
        (TEXT.replace("%a: f32[1, 8, 1]", "%a: f32[2, 8, 1]{1, 2, 2}").replace("%b: f32[1", "%b: f32[2").replace(
            "%y: f32[1", "%y: f32[2").replace("%b: f32[2, 1, 5]", "%b: f32[2, 1, 5]{1, 10, 2}"),
         "a multiplication would give another layout (y)"),
    ],
)  # fmt: skip
def test_refusals(text: str, reason: str) -> None:
    assert refusals(PASS, text) == [reason]
