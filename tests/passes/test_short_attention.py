"""Attention over short sequences: the rewrite, equal values, each refusal."""

from __future__ import annotations

import pytest
import torch

from fusionc.graph.text import parse
from fusionc.passes.manager import run
from fusionc.passes.short_attention import ShortAttention
from tests.passes.helpers import apply, call, check_values, inputs_for, refusals, rewritten

PASS = ShortAttention(devices=("cpu",))
TEXT = """
%x: bf16[2, 8, 96] = input
%q: bf16[2, 8, 32]{768, 96, 1} = aten.slice(%x, 2, 0, 32)
%k: bf16[2, 8, 32]{768, 96, 1} = aten.slice(%x, 2, 32, 64)
%v: bf16[2, 8, 32]{768, 96, 1} = aten.slice(%x, 2, 64, 96)
%q4: bf16[2, 8, 2, 16]{768, 96, 16, 1} = aten.view(%q, [2, 8, 2, 16])
%k4: bf16[2, 8, 2, 16]{768, 96, 16, 1} = aten.view(%k, [2, 8, 2, 16])
%v4: bf16[2, 8, 2, 16]{768, 96, 16, 1} = aten.view(%v, [2, 8, 2, 16])
%qt: bf16[2, 2, 8, 16]{768, 16, 96, 1} = aten.transpose.int(%q4, 1, 2)
%kt: bf16[2, 2, 8, 16]{768, 16, 96, 1} = aten.transpose.int(%k4, 1, 2)
%vt: bf16[2, 2, 8, 16]{768, 16, 96, 1} = aten.transpose.int(%v4, 1, 2)
%a: (bf16[2, 2, 8, 16]{256, 16, 32, 1}, f32[2, 2, 8]{16, 1, 2}) = aten._scaled_dot_product_flash_attention_for_cpu(%qt, %kt, %vt, 0.0, True, scale=0.5)
%o: bf16[2, 2, 8, 16]{256, 16, 32, 1} = getitem(%a, 0)
%y: bf16[2, 8, 2, 16] = aten.transpose.int(%o, 1, 2)
return (%y)
"""  # noqa: E501


def test_rewrite() -> None:
    text = rewritten(PASS, TEXT)
    assert "= fusionc.short_attention(%qt, %kt, %vt, 0.5, True)\n" in text and "_scaled_dot" not in text
    assert "%short_attention: bf16[2, 2, 8, 16]{256, 16, 32, 1}" in text
    check_values(PASS, TEXT, fired=1)
    old = parse(TEXT)
    new, _ = apply(PASS, TEXT)
    inputs = inputs_for(old)
    torch.testing.assert_close(call(new, inputs)[0], call(old, inputs)[0], rtol=2e-2, atol=2e-2)


def test_default_scale_and_no_mask() -> None:
    text = TEXT.replace(", 0.0, True, scale=0.5)", ")")
    assert "fusionc.short_attention(%qt, %kt, %vt, 0.25, False)" in rewritten(PASS, text)
    check_values(PASS, text, fired=1)


@pytest.mark.parametrize(
    "text, reason",
    [
        (TEXT.replace("scale=0.5", "attn_mask=%m").replace("%q: ", "%m: bf16[8, 8] = input\n%q: ", 1),
         "it has a bias or mask (a)"),
        (TEXT.replace("0.0, True", "0.1, True"), "it has dropout or options (a)"),
        (TEXT.replace("bf16", "f32"), "its type or width of heads has no kernel (a)"),
        (TEXT.replace("return (%y)", "%l: f32[2, 2, 8]{16, 1, 2} = getitem(%a, 1)\nreturn (%y, %l)"),
         "more than its result is read (a)"),
        (TEXT.replace("8, 96]", "300, 96]").replace("[2, 8, ", "[2, 300, ").replace("[2, 2, 8, ", "[2, 2, 300, ").replace(
            "[2, 2, 8]{16", "[2, 2, 300]{600").replace("{768,", "{28800,").replace("{256,", "{9600,"),
         "it has one query, more than 128 keys or a causal mask that is not square (a)"),
    ],
)  # fmt: skip
def test_refusals(text: str, reason: str) -> None:
    assert refusals(PASS, text) == [reason]


def test_refuses_a_result_that_lies_otherwise() -> None:
    gm = parse(TEXT)
    (result,) = [n for n in gm.graph.nodes if n.name == "o"]
    result.meta["val"] = result.meta["val"].contiguous()
    _, (record,) = run([(1, PASS)], gm, "graph", None, stage="inference")
    assert [r.reason for r in record.refusals] == ["its result lies otherwise in memory"]


def test_refuses_training_and_leaves_other_devices_alone() -> None:
    assert refusals(PASS, TEXT, stage="forward") == ["training keeps the statistics of its rows (a)"]
    assert apply(ShortAttention(), TEXT)[1].fired == 0
