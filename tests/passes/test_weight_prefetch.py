"""Weights brought into L2 behind attention over a cache: rewritten, repeated, and each refusal."""

from __future__ import annotations

import re

from fusionc.passes.weight_prefetch import WeightPrefetch
from tests.passes.helpers import check_values, refusals, rewritten

PASS = WeightPrefetch(devices=("cpu",))


def step(rows: int = 1, next_weight: str = "%w1", more: str = ", [%w2]", write: str = "", between: str = "") -> str:
    return f"""
%q: bf16[{rows}, 4, 1, 16] = input
%k: bf16[{rows}, 2, 24, 16] = input
%v: bf16[{rows}, 2, 24, 16] = input
%w0: bf16[32, 64] = input
%w1: bf16[64, 32] = input
%w2: bf16[64, 32] = input
%a: bf16[{rows}, 1, 4, 16] = fusionc.decode_attention(%q, %k, %v, None, 0.25, True)
%t: bf16[{rows}, 4, 1, 16] = aten.transpose.int(%a, 1, 2)
%u: bf16[{rows}, 1, 4, 16] = aten.transpose.int(%t, 1, 2)
%x: bf16[{rows}, 64] = aten.view(%u, [{rows}, 64])
{between}%o: bf16[{rows}, 32] = fusionc.skinny_linear(%x, %w0, None, 0.0, False, None, "", None, True)
{write}%y: bf16[{rows}, 64] = fusionc.skinny_linear(%o, {next_weight}, None, 0.0, False, None, "silu", None, True{more})
return (%y)
"""


def test_the_layer_after_attention_asks_for_the_next_ones_weights() -> None:
    old = step()
    call = 'fusionc.skinny_linear(%x, %w0, None, 0.0, False, None, "", None, True'
    new = rewritten(PASS, old)
    assert f"{call}, None, True, False, [%w1, %w2])" in new
    assert new.count("skinny_linear(") == old.count("skinny_linear(") and new.count("[%w1") == 1, "the last one asks for nothing"
    check_values(PASS, old, fired=1)


def test_one_weight_and_a_gate_in_front() -> None:
    text = step(more="").replace("%w1: bf16[64, 32]", "%w1: bf16[128, 32]")
    assert "[%w1])" in rewritten(PASS, text)
    gated = text.replace('"", None, True)', '"", None, True, None, False)')
    assert "True, None, False, False, [%w1])" in rewritten(PASS, gated), "arguments that are given are kept"


def test_more_rows() -> None:
    assert refusals(PASS, step(rows=2)) == ["it has more than one row (o)"]


def test_weights_that_are_computed_or_written() -> None:
    why = "the next layer's weight is computed, written or not dense (o)"
    computed = step(next_weight="%w3", write="%w3: bf16[64, 32] = aten.neg(%w1)\n")
    assert refusals(PASS, computed) == [why]
    written = step(write="%w3: bf16[64, 32] = aten.copy_(%w1, %w2)\n")
    assert refusals(PASS, written) == [why]
    sparse = step().replace("%w1: bf16[64, 32]", "%w1: bf16[64, 32]{1, 64}")
    assert refusals(PASS, sparse) == [why]


def test_weights_of_another_gpu() -> None:
    here = re.sub(r"^(%\w+: bf16\[[^\]]*\])", r"\1@cuda:0", step(), flags=re.M)
    there = re.sub(r"^%(w1|w2|y): (.*?)@cuda:0", r"%\1: \2@cuda:1", here, flags=re.M)
    there = there.replace("%y:", '%p: bf16[1, 32]@cuda:1 = aten._to_copy(%o, device=device("cuda:1"))\n%y:')
    there = there.replace("skinny_linear(%o", "skinny_linear(%p")
    on_gpu = WeightPrefetch()
    assert "[%w1, %w2])" in rewritten(on_gpu, here)
    assert refusals(on_gpu, there) == ["the next layer's weight is on another device (o)"]


def test_what_no_attention_made_is_left_alone() -> None:
    other = step().replace("fusionc.decode_attention(%q, %k, %v, None, 0.25, True)", "aten.transpose.int(%q, 1, 2)")
    other = other.replace("%a: bf16[1, 1, 4, 16]", "%a: bf16[1, 1, 4, 16]{64, 16, 16, 1}")
    assert refusals(PASS, other) == [] and "[%w1" not in rewritten(PASS, other).split("%y")[0]
