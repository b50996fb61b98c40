"""Attention of one query over a cache: with update and rotation, without, and each refusal."""

from __future__ import annotations

import pytest
import torch

from fusionc.graph.text import parse
from fusionc.passes.decode_attention import DecodeAttention
from tests.passes.helpers import apply, call, inputs_for, refusals, rewritten

PASS = DecodeAttention(devices=("cpu",))


def rope(x: str, heads: int) -> str:
    return f"""%{x}_c: bf16[1, {heads}, 1, 16] = aten.mul(%{x}, %cos)
%{x}_l: bf16[1, {heads}, 1, 8]{{{16 * heads}, 16, 16, 1}} = aten.slice(%{x}, 3, 0, 8)
%{x}_h: bf16[1, {heads}, 1, 8]{{{16 * heads}, 16, 16, 1}} = aten.slice(%{x}, 3, 8, 9223372036854775807)
%{x}_n: bf16[1, {heads}, 1, 8] = aten.neg(%{x}_h)
%{x}_t: bf16[1, {heads}, 1, 16] = aten.cat([%{x}_n, %{x}_l], -1)
%{x}_s: bf16[1, {heads}, 1, 16] = aten.mul(%{x}_t, %sin)
%{x}r: bf16[1, {heads}, 1, 16] = aten.add(%{x}_c, %{x}_s)
"""


def repeated(name: str, source: str) -> str:
    return f"""%{name}1: bf16[1, 2, 1, 24, 16] = aten.unsqueeze(%{source}, 2)
%{name}2: bf16[1, 2, 2, 24, 16]{{768, 384, 0, 16, 1}} = aten.expand(%{name}1, [1, 2, 2, 24, 16])
%{name}3: bf16[1, 2, 2, 24, 16] = aten.clone(%{name}2, memory_format=torch.contiguous_format)
%{name}4: bf16[1, 4, 24, 16] = aten._unsafe_view(%{name}3, [1, 4, 24, 16])
"""


SDPA = "aten._scaled_dot_product_flash_attention_for_cpu"
HEAD = """
%q: bf16[1, 4, 1, 16] = input
%k: bf16[1, 2, 1, 16] = input
%v: bf16[1, 2, 1, 16] = input
%cos: bf16[1, 1, 1, 16] = input
%sin: bf16[1, 1, 1, 16] = input
%kc: bf16[1, 2, 24, 16] = input
%vc: bf16[1, 2, 24, 16] = input
%past: i64[] = input
%mask: bf16[1, 1, 1, 24] = input
"""
TAIL = f"""%o: (bf16[1, 4, 1, 16], f32[1, 4, 1]) = {SDPA}(%qr, %ku4, %vu4, attn_mask=%mask, scale=0.25)
%y: bf16[1, 4, 1, 16] = getitem(%o, 0)
return (%y)
"""
UPDATE = f"""{HEAD}{rope("q", 4)}{rope("k", 2)}%zero: i64[1] = aten.arange(1, device=device("cpu"), pin_memory=False)
%index: i64[1] = aten.add(%zero, %past)
%ku: bf16[1, 2, 24, 16] = aten.index_copy_(%kc, 2, %index, %kr)
%vu: bf16[1, 2, 24, 16] = aten.index_copy_(%vc, 2, %index, %v)
{repeated("ku", "ku")}{repeated("vu", "vu")}{TAIL}"""


def same(text: str) -> None:
    old = parse(text)
    new, record = apply(PASS, text)
    assert record.fired == 1
    inputs = inputs_for(old)
    found, expected = call(new, inputs), call(old, inputs)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
    again, record = apply(PASS, new)
    assert record.fired == 0


def test_update_with_rotation() -> None:
    inputs = HEAD.strip()
    assert rewritten(PASS, UPDATE) == f"""
{inputs}
%decode_attention_update: bf16[1, 1, 4, 16] = fusionc.decode_attention_update(%q, %k, %v, %cos, %sin, %kc, %vc, %past, \
%mask, 0.25, False)
%transpose: bf16[1, 4, 1, 16] = aten.transpose.int(%decode_attention_update, 1, 2)
return (%transpose)
"""
    same(UPDATE)


def test_rotation_of_another_form_is_left_outside() -> None:
    text = UPDATE.replace("aten.slice(%q, 3, 0, 8)", "aten.slice(%q, 3, 4, 12)")
    out = rewritten(PASS, text)
    assert "decode_attention_update(%qr, %kr, %v, None, None, %kc" in out
    same(text)


def test_cache_that_others_read_is_updated_apart() -> None:
    text = UPDATE.replace("return (%y)", "return (%y, %vu)")
    out = rewritten(PASS, text)
    assert "index_copy_(%vc" in out and "fusionc.decode_attention(%qr, %ku, %vu, %mask, 0.25, False)" in out
    same(text)


def test_without_a_cache() -> None:
    text = f"""{HEAD}{repeated("ku", "kc")}{repeated("vu", "vc")}{TAIL}""".replace("%qr,", "%q,")
    assert "fusionc.decode_attention(%q, %kc, %vc, %mask, 0.25, False)" in rewritten(PASS, text)
    same(text)


PLAIN = f"""
%q: bf16[1, 4, 1, 16] = input
%k: bf16[1, 4, 24, 16] = input
%v: bf16[1, 4, 24, 16] = input
%o: (bf16[1, 4, 1, 16], f32[1, 4, 1]) = {SDPA}(%q, %k, %v)
%y: bf16[1, 4, 1, 16] = getitem(%o, 0)
return (%y)
"""


@pytest.mark.parametrize(
    "text, reason",
    [
        (PLAIN.replace("4, 1, 16]", "4, 2, 16]").replace("f32[1, 4, 1]", "f32[1, 4, 2]{8, 1, 4}"),
         "it has more than one query, or sizes are not known (o)"),
        (PLAIN.replace("bf16", "f32"), "dtype or head size that the kernel does not take (o)"),
        (PLAIN.replace("(%q, %k, %v)", "(%q, %k, %v, 0.0, True)"), "dropout or a causal flag (o)"),
        (PLAIN.replace("return (%y)", "%l: f32[1, 4, 1] = getitem(%o, 1)\nreturn (%y, %l)"),
         "more than its first result is used (o)"),
        (PLAIN.replace("(%q, %k, %v)", "(%q, %k, %v, attn_mask=%m)").replace("%q:", "%m: bf16[1, 24] = input\n%q:"),
         "a mask of another form (o)"),
        (PLAIN.replace("(%q, %k, %v)", "(%q, %k, %v, attn_mask=%m)").replace("%q:", "%m: bf16[1, 1, 1, 1] = input\n%q:"),
         "a mask of another form (o)"),
    ],
)  # fmt: skip
def test_refusals(text: str, reason: str) -> None:
    assert refusals(PASS, text) == [reason]


def test_refuses_training() -> None:
    assert refusals(PASS, PLAIN, stage="forward") == ["training needs its backward (o)"]


def test_other_devices_are_left_alone() -> None:
    assert apply(DecodeAttention(), PLAIN)[1].fired == 0
