"""Arithmetic on literals: the rewrite, what it leaves alone, and that a GPU's kernels take the numbers in."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.fx import GraphModule

import fusionc.record
from fusionc.graph.text import parse, show
from fusionc.passes.known_numbers import KnownNumbers
from fusionc.passes.manager import run
from tests.passes.helpers import check_values, refusals, rewritten

PASS = KnownNumbers()
TEXT = """
%x: bf16[4] = input
%c: f32[] = aten.full([], 64.0, dtype=torch.float32)
%m: f32[] = aten.mul(%c, 3)
%s: f32[] = aten.sqrt(%m)
%t: bf16[] = aten._to_copy(%s, dtype=torch.bfloat16)
%y: bf16[4] = aten.div(%x, %t)
return (%y)
"""


def test_a_chain_becomes_one_number() -> None:
    assert rewritten(PASS, TEXT) == """
%x: bf16[4] = input
%full: bf16[] = aten.full([], 13.875, dtype=torch.bfloat16, device=device("cpu"), pin_memory=False)
%y: bf16[4] = aten.div(%x, %full)
return (%y)
"""
    check_values(PASS, TEXT, fired=1)


@pytest.mark.parametrize("number, kind", [
    ("-0.0", "f32"), ("3", "i64"), ("True", "b8"), ("0.1", "f64"), ("9007199254740993", "i64"), ("0.1", "f16"),
])  # fmt: skip
def test_values_keep_their_bits(number: str, kind: str) -> None:
    dtype = {"f32": "float32", "i64": "int64", "b8": "bool", "f64": "float64", "f16": "float16"}[kind]
    text = f"""
%x: {kind}[4] = input
%c: {kind}[] = aten.full([], {number}, dtype=torch.{dtype})
%d: {kind}[] = aten.clone(%c)
%y: {kind}[4] = aten.where(%x, %x, %d)
return (%y)
""".replace("aten.where(%x, %x, %d)", "aten.maximum(%x, %d)")
    check_values(PASS, text, fired=1)


@pytest.mark.parametrize("text, expected", [
    (TEXT.replace("return (%y)", "return (%y, %t)"), ["it leaves the graph (t)"]),
    (TEXT.replace("64.0", "-64.0"), ["not a finite number (t)"]),
    (TEXT.replace("%m: f32[] = aten.mul(%c, 3)", "%m: f32[] = aten.bernoulli(%c)"), []),
    (TEXT.replace("%c: f32[] = aten.full([], 64.0, dtype=torch.float32)", "%c: f32[] = input"), []),
])  # fmt: skip
def test_what_stays(text: str, expected: list[str]) -> None:
    assert refusals(PASS, text) == expected
    assert "aten.div(%x, %t)" in rewritten(PASS, text)


def traced() -> GraphModule:
    """As AOTAutograd writes ``torch.tensor(4.0)``."""
    gm = parse(TEXT)
    (full,) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.full.default)
    gm._tensor_constant0 = torch.tensor(4.0)
    with gm.graph.inserting_before(full):
        source = gm.graph.get_attr("_tensor_constant0")
        fresh = gm.graph.call_function(torch.ops.aten.lift_fresh_copy.default, (source,))
    source.meta["val"] = fresh.meta["val"] = full.meta["val"]
    full.replace_all_uses_with(fresh)
    gm.graph.erase_node(full)
    gm.recompile()
    return gm


def test_what_the_trace_made_is_known_and_other_attributes_are_not() -> None:
    gm, (record,) = run([(1, PASS)], traced(), "graph", None)
    assert record.fired == 1 and f"aten.full([], {torch.tensor(math.sqrt(12)).bfloat16().item()}" in show(gm)
    gm = traced()
    (fresh,) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.lift_fresh_copy.default)
    fresh.replace_all_uses_with(fresh.args[0])  # type: ignore[arg-type]
    gm.graph.erase_node(fresh)
    gm, (record,) = run([(1, PASS)], gm, "graph", None)
    assert record.fired == 0


def test_end_to_end() -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        scale = torch.sqrt(torch.tensor(x.size(-1), dtype=torch.float) * 3)
        far = torch.ceil(torch.log(x.abs() + 1) / torch.log(torch.tensor(511 / 128)))
        return x / scale.to(x.dtype) + far

    x = torch.randn(3, 5, dtype=torch.bfloat16)
    with fusionc.record.collect() as records:
        got = torch.compile(model, backend="fusionc", dynamic=False, options={"cache": False})(x)
    torch.testing.assert_close(got, model(x))
    (record,) = records
    assert not record.fallbacks and len(record.kernels) == 1 and not record.calls


def on_gpu(text: str) -> Any:
    """Units of the grouper for a graph whose tensors with dimensions are said to lie on a GPU."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from fusionc.schedule.group import Call, Grouper

    gm, _ = run([(1, PASS)], parse(text), "graph", None)
    gpu = torch.device("cuda:0")
    mode = FakeTensorMode()
    for node in gm.graph.nodes:
        val = node.meta.get("val")
        if isinstance(val, torch.Tensor):
            meta = torch.empty_strided(val.shape, val.stride(), dtype=val.dtype, device="meta")
            place = gpu if val.dim() else torch.device("cpu")
            node.meta["val"] = torch._subclasses.FakeTensor(mode, meta, place)
    grouper = Grouper(gm.graph, gpu)
    units = grouper.run()
    groups = [u for u in units if not isinstance(u, Call)]
    return [u.node.name for u in units if isinstance(u, Call)], [n.name for u in groups for n in u.nodes]


def test_a_kernel_on_a_gpu_takes_the_number_in() -> None:
    assert on_gpu(TEXT) == ([], ["y"])


def test_a_number_that_a_call_reads_stays_a_tensor() -> None:
    text = TEXT.replace("return (%y)", "%z: bf16[4] = aten.bucketize(%t, %x)\nreturn (%y, %z)").replace(
        "%z: bf16[4]", "%z: i64[]").replace("aten.bucketize(%t, %x)", "aten.bucketize.Tensor(%t, %x)")  # fmt: skip
    calls, kernels = on_gpu(text)
    assert "full" in calls and kernels == ["y"]
