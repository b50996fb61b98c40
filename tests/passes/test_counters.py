"""Counters: one launch for all, and each refusal."""

from __future__ import annotations

import pytest

from fusionc.passes.counters import Counters
from tests.passes.helpers import check_values, refusals, rewritten

PASS = Counters(devices=("cpu",))
TEXT = """
%a: i64[] = input
%b: i64[] = input
%x: f32[4] = input
%i: f32[4] = aten.add(%x, %a)
%a1: i64[] = aten.add(%a, 1)
%b1: i64[] = aten.add(%b, 1)
%ca: i64[] = aten.copy_(%a, %a1)
%cb: i64[] = aten.copy_(%b, %b1)
return (%i)
"""


def test_two() -> None:
    assert rewritten(PASS, TEXT) == """
%a: i64[] = input
%b: i64[] = input
%x: f32[4] = input
%i: f32[4] = aten.add(%x, %a)
%_foreach_add_ = aten._foreach_add_.Scalar([%a, %b], 1)
return (%i)
"""
    check_values(PASS, TEXT, fired=1)


@pytest.mark.parametrize(
    "text, reason",
    [
        (TEXT.replace("return (%i)", "return (%i, %a1)"), "the new value is read (ca)"),
        (TEXT.replace("return (%i)", "return (%i, %a)"), "the counter is read after its write (ca)"),
        (TEXT.replace("return (%i)", "%l: f32[4] = aten.add(%x, %b)\nreturn (%i, %l)"),
         "the counter is read after its write (cb)"),
        (TEXT.replace("return (%i)", "%cc: i64[] = aten.copy_(%b, %x2)\nreturn (%i)").replace(
            "%x:", "%x2: i64[] = input\n%x:"),
         "a counter is no input or is written elsewhere too (cb)"),
        (TEXT.replace("%cb: i64[] = aten.copy_(%b, %b1)", "%c: i64[] = aten.add(%a, 1)\n%cb: i64[] = aten.copy_(%a, %c)"),
         "one counter is written twice (cb)"),
    ],
)  # fmt: skip
def test_refusals(text: str, reason: str) -> None:
    assert refusals(PASS, text) == [reason]


def test_other_numbers_stay_apart() -> None:
    assert "copy_" in rewritten(PASS, TEXT.replace("aten.add(%b, 1)", "aten.add(%b, 2)"))
