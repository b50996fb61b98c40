"""Common subexpressions: merged where equal, left alone where a difference could be seen."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusionc.passes.cse import CommonSubexpressions
from tests.passes.helpers import check_values, refusals, rewritten

TWICE = """
%x: f64[2, 3] = input
%a: f64[2, 3] = aten.sin(%x)
%b: f64[2, 3] = aten.sin(%x)
%c: f64[2, 3] = aten.add(%a, %b)
return (%c)
"""


def test_rewrite() -> None:
    assert rewritten(CommonSubexpressions(), TWICE) == """
%x: f64[2, 3] = input
%a: f64[2, 3] = aten.sin(%x)
%c: f64[2, 3] = aten.add(%a, %a)
return (%c)
"""
    check_values(CommonSubexpressions(), TWICE, fired=1)


def test_chains_merge_in_one_run() -> None:
    check_values(CommonSubexpressions(), """
%x: f64[2, 3] = input
%a: f64[2, 3] = aten.sin(%x)
%b: f64[2, 3] = aten.sin(%x)
%c: f64[2, 3] = aten.cos(%a)
%d: f64[2, 3] = aten.cos(%b)
%e: f64[2, 3] = aten.add(%c, %d)
return (%e)
""", fired=2)


@pytest.mark.parametrize(("first", "second"), [
    ("aten.mul.Tensor(%x, 1)", "aten.mul.Tensor(%x, 1.0)"), ("aten.add(%x, 0.0)", "aten.add(%x, -0.0)"),
    ("aten.sin(%x)", "aten.cos(%x)"), ("aten.sum.dim_IntList(%x, [0], True)", "aten.sum.dim_IntList(%x, [1], True)"),
    ("aten.rand_like(%x)", "aten.rand_like(%x)"), ("aten.empty_like(%x)", "aten.empty_like(%x)"),
    ("aten.bernoulli(%x)", "aten.bernoulli(%x)"),
])
def test_different_things_stay(first: str, second: str) -> None:
    text = f"""
%x: f64[3, 3] = input
%a = {first}
%b = {second}
return (%a, %b)
"""
    import torch

    from fusionc.graph.text import parse
    from fusionc.passes.manager import run

    gm = parse(text)
    with torch.no_grad():
        _, (record,) = run([(1, CommonSubexpressions())], gm, "graph", None)
    assert record.fired == 0 and record.refusals == []


def test_refuses_two_results() -> None:
    assert refusals(CommonSubexpressions(), """
%x: f64[2, 3] = input
%a: f64[2, 3] = aten.sin(%x)
%b: f64[2, 3] = aten.sin(%x)
return (%a, %b)
""") == ["both results leave the graph and must not share memory (b)"]


def test_refuses_results_through_views_and_chains() -> None:
    # a leaves through its view; after b is merged into a third equal node that one leaves too
    assert refusals(CommonSubexpressions(), """
%x: f64[2, 3] = input
%a: f64[2, 3] = aten.sin(%x)
%v: f64[3, 2] = aten.view(%a, [3, 2])
%b: f64[2, 3] = aten.sin(%x)
return (%v, %b)
""") == ["both results leave the graph and must not share memory (b)"]
    assert refusals(CommonSubexpressions(), """
%x: f64[2, 3] = input
%a: f64[2, 3] = aten.sin(%x)
%b: f64[2, 3] = aten.sin(%x)
%c: f64[2, 3] = aten.sin(%x)
%d: f64[2, 3] = aten.cos(%a)
return (%b, %c, %d)
""") == ["both results leave the graph and must not share memory (c)"]


def test_refuses_across_a_write() -> None:
    text = """
%x: f64[2, 3] = input
%y: f64[2, 3] = input
%a: f64[2, 3] = aten.sin(%x)
%w: f64[2, 3] = aten.copy_(%x, %y)
%b: f64[2, 3] = aten.sin(%x)
%c: f64[2, 3] = aten.add(%a, %b)
return (%c)
"""
    assert refusals(CommonSubexpressions(), text) == ["memory that it reads is written between the two (b)"]
    check_values(CommonSubexpressions(), text, fired=0)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["sin", "cos", "neg", "add", "mul"]), st.integers(0, 20), st.integers(0, 20)),
                min_size=1, max_size=12), st.lists(st.integers(0, 20), min_size=1, max_size=3))
def test_random_graphs(steps: list[tuple[str, int, int]], results: list[int]) -> None:
    lines, names = ["%x: f64[2, 3] = input", "%y: f64[2, 3] = input"], ["x", "y"]
    for index, (op, a, b) in enumerate(steps):
        left, right = names[a % len(names)], names[b % len(names)]
        args = f"%{left}, %{right}" if op in ("add", "mul") else f"%{left}"
        overload = ".Tensor" if op in ("add", "mul") else ""
        lines.append(f"%n{index}: f64[2, 3] = aten.{op}{overload}({args})")
        names.append(f"n{index}")
    out = ", ".join(f"%{names[i % len(names)]}" for i in results)
    check_values(CommonSubexpressions(), "\n".join([*lines, f"return ({out},)"]))
