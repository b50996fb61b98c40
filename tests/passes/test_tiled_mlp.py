"""Two products with an activation between them, some rows at a time: the rewrite, its values and each refusal."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusionc.ops import load
from fusionc.passes.tiled_mlp import TiledMLP
from tests.passes.helpers import check_values, refusals, rewritten

PASS = TiledMLP()
TEXT = """
%x: f32[8192, 24] = input
%w1: f32[24, 256] = input
%b1: f32[256] = input
%w2: f32[256, 40] = input
%b2: f32[40] = input
%h: f32[8192, 256] = aten.addmm(%b1, %x, %w1)
%v: f32[2, 4096, 256] = aten.view(%h, [2, 4096, 256])
%g: f32[2, 4096, 256] = aten.gelu(%v)
%u: f32[8192, 256] = aten.view(%g, [8192, 256])
%y: f32[8192, 40] = aten.addmm(%b2, %u, %w2)
return (%y)
"""
PLAIN = """
%x: f32[8192, 24] = input
%w1: f32[24, 256] = input
%w2: f32[256, 40] = input
%h: f32[8192, 256] = aten.mm(%x, %w1)
%g: f32[8192, 256] = aten.relu(%h)
%y: f32[8192, 40] = aten.mm(%g, %w2)
return (%y)
"""


def test_biases_and_views() -> None:
    assert rewritten(PASS, TEXT) == """
%x: f32[8192, 24] = input
%w1: f32[24, 256] = input
%b1: f32[256] = input
%w2: f32[256, 40] = input
%b2: f32[40] = input
%tiled_mlp: f32[8192, 40] = fusionc.tiled_mlp(%x, %w1, %b1, %w2, %b2, "gelu", 4096)
return (%tiled_mlp)
"""
    check_values(PASS, TEXT, fired=1)


@pytest.mark.parametrize("f", ["relu(%h)", "silu(%h)", "gelu(%h)", 'gelu(%h, approximate="tanh")'])
def test_activations(f: str) -> None:
    check_values(PASS, PLAIN.replace("relu(%h)", f), fired=1)


@pytest.mark.parametrize(
    "text, reason",
    [
        (PLAIN.replace("f32", "f64"), "not float32 (y)"),
        (TEXT.replace("%x, %w1)", "%x, %w1, alpha=2)"), "addmm scales its bias or product (h)"),
        (TEXT.replace("%b1: f32[256]", "%b1: f32[1, 256]"), "its bias is no vector (h)"),
        (PLAIN.replace("return (%y)", "return (%y, %g)"), "something else reads the hidden layer (g)"),
        (PLAIN.replace("return (%y)", "return (%y, %h)"), "something else reads the hidden layer (h)"),
        (TEXT.replace("%u: f32[8192, 256]", "%u: f32[4096, 512]").replace("%g, [8192, 256]", "%g, [4096, 512]").replace(
            "%w2: f32[256, 40]", "%w2: f32[512, 40]").replace("%y: f32[8192", "%y: f32[4096"),
         "the rows are arranged anew between the products (y)"),
        (PLAIN.replace("8192", "4096"), "the hidden layer fits into the cache (y)"),
        (PLAIN.replace("40]", "4096]"), "the weights are not small beside a block of rows (y)"),
    ],
)  # fmt: skip
def test_refusals(text: str, reason: str) -> None:
    assert refusals(PASS, text) == [reason]


@settings(max_examples=25, deadline=None)
@given(m=st.integers(0, 40), rows=st.integers(1, 50), biases=st.tuples(st.booleans(), st.booleans()),
       activation=st.sampled_from(["relu", "silu", "gelu", "gelu_tanh"]))  # fmt: skip
def test_operator(m: int, rows: int, biases: tuple[bool, bool], activation: str) -> None:
    """Every number of rows, blocks that do not divide it included, equals the products one by one."""
    load("tiled_mlp")
    x, w1, w2, *b = (torch.randn(n, dtype=torch.float64) for n in ((m, 5), (7, 5), (7, 3), (7,), (3,)))
    b1, b2 = (each if given else None for each, given in zip(b, biases))
    found = torch.ops.fusionc.tiled_mlp(x, w1.t(), b1, w2, b2, activation, rows)
    h = torch.nn.functional.linear(x, w1, b1)
    h = {"relu": torch.relu, "silu": torch.nn.functional.silu, "gelu": torch.nn.functional.gelu,
         "gelu_tanh": lambda t: torch.nn.functional.gelu(t, approximate="tanh")}[activation](h)  # fmt: skip
    torch.testing.assert_close(found, torch.nn.functional.linear(h, w2.t(), b2), rtol=1e-12, atol=1e-12)
    assert found.is_contiguous()


def test_symbolic_rows_are_refused() -> None:
    from fusionc.record import collect

    def f(x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
        return torch.relu(x @ w1) @ w2

    inputs = torch.randn(8192, 24), torch.randn(24, 256), torch.randn(256, 40)
    torch._dynamo.reset()
    torch._dynamo.mark_dynamic(inputs[0], 0)
    with torch.no_grad(), collect() as records:
        torch.testing.assert_close(torch.compile(f, backend="fusionc")(*inputs), f(*inputs), rtol=1e-4, atol=1e-3)
    (record,) = [p for r in records for p in r.passes if p.name == "tiled_mlp"]
    assert record.fired == 0 and [r.reason for r in record.refusals] == ["a size is symbolic"]
