"""Patterns: one spelling matches all, commutativity, repeated arguments, readers outside."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import symbolic_trace

from fusionc.graph.pattern import Pattern, canonical
from fusionc.graph.text import parse


def names(pattern: Any, text: str) -> list[dict[str, Any]]:
    return [{k: getattr(v, "name", v) for k, v in found.bound.items()} for found in Pattern(pattern).find(parse(text))]


def scaled(x: Any, s: Any) -> Any:
    return torch.relu(x) * s


def test_commuted_and_constant() -> None:
    text = """
%x: f32[4] = input
%y: f32[4] = input
%r: f32[4] = aten.relu(%x)
%m: f32[4] = aten.mul(%y, %r)
%q: f32[4] = aten.relu(%m)
%n: f32[4] = aten.mul(%q, 2.0)
return (%n)
"""
    assert names(scaled, text) == [{"x": "x", "s": "y"}, {"x": "m", "s": 2.0}]


def test_inner_values_must_not_be_read_outside() -> None:
    assert names(scaled, """
%x: f32[4] = input
%r: f32[4] = aten.relu(%x)
%m: f32[4] = aten.mul(%r, 2.0)
return (%m, %r)
""") == []


def test_repeated_argument() -> None:
    def square(x: Any) -> Any:
        return x * x + 1

    text = """
%x: f32[4] = input
%y: f32[4] = input
%a: f32[4] = aten.mul(%x, {})
%b: f32[4] = aten.add(%a, 1)
return (%b)
"""
    assert names(square, text.format("%x")) == [{"x": "x"}]
    assert names(square, text.format("%y")) == []
    assert names(square, text.replace("%a, 1", "%a, 2").format("%x")) == []
    assert names(square, text.replace("%a, 1", "%a, 1, alpha=2").format("%x")) == []
    assert names(square, text.replace("%a, 1", "%a, 1, alpha=1").format("%x")) == [{"x": "x"}]


def test_backtracking_over_both_orders() -> None:
    def f(x: Any, y: Any) -> Any:
        return (torch.sin(x) + torch.sin(y)) * torch.cos(y)

    assert names(f, """
%a: f32[4] = input
%b: f32[4] = input
%sa: f32[4] = aten.sin(%a)
%sb: f32[4] = aten.sin(%b)
%s: f32[4] = aten.add(%sb, %sa)
%c: f32[4] = aten.cos(%b)
%m: f32[4] = aten.mul(%c, %s)
return (%m)
""") == [{"x": "a", "y": "b"}]


def test_all_spellings_of_torch_level_graphs() -> None:
    def pattern(x: Any, y: Any) -> Any:
        return torch.add(x, y).relu()

    found = Pattern(pattern)
    for f in (lambda a, b: torch.relu(a + b), lambda a, b: (b.add(a)).relu(), lambda a, b: torch.nn.functional.relu(a + b),
              lambda a, b: torch.relu(torch.add(input=a, other=b)), lambda a, b: torch.add(a, b, alpha=1).relu()):
        assert len(list(found.find(symbolic_trace(f)))) == 1, f
    for f in (lambda a, b: torch.relu(a - b), lambda a, b: torch.add(a, b, alpha=2).relu()):
        assert not list(found.find(symbolic_trace(f)))


def test_canonical_names() -> None:
    gm = symbolic_trace(lambda x: (x + 1).neg() / torch.sub(x, 2))
    assert [canonical(n) for n in gm.graph.nodes if n.op.startswith("call")] == ["add", "neg", "sub", "div"]
