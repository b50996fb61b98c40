"""Graph text: what it looks like, that it parses back, and that hostile text is refused and nothing runs."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from fusionc.graph.text import ParseError, graph_text, parse, show

TEXT = """
%x: f32[2, 3] = input
%w: f32[4, 3] = input  # static
%i: i64[2] = input
%t: f32[3, 4]{1, 3} = aten.t(%w)
%m: f32[2, 4] = aten.mm(%x, %t)
%a: f32[2, 4] = aten.add(%m, 1.5)
%g: f32[2, 4] = aten.index(%a, [%i, None])
%p: (f32[2, 2]{4, 1}, f32[2, 2]{4, 1}) = aten.split.Tensor(%g, 2, -1)
%p0: f32[2, 2]{4, 1} = getitem(%p, 0)
%c: bf16[2, 2] = aten._to_copy(%p0, dtype=torch.bfloat16)
%e: f32[2, 2] = aten.full([2, 2], -inf, dtype=torch.float32, device=device("cpu"), pin_memory=False)
%k: f32[2, 2] = aten.clone(%e, memory_format=torch.contiguous_format)
%s: f32[] = aten.sum(%k)
%d: f64[3]@cuda:0 = input
return (%c, %s, None)
"""


def test_round_trip() -> None:
    gm = parse(TEXT)
    assert "\n" + show(gm) == TEXT
    assert gm.meta["fusionc_static"] == {1}
    assert graph_text is show
    out = gm.forward(torch.randn(2, 3), torch.randn(4, 3), torch.tensor([1, 0]), None)
    assert out[0].dtype == torch.bfloat16


def test_traced_graph_round_trips_and_computes_the_same() -> None:
    def f(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        z = torch.nn.functional.layer_norm(x @ y.t(), (5,))
        return torch.softmax(z, -1), z.transpose(0, 1)[1:3].flatten(), (z > 0).any(1), torch.where(z > 0, z, float("nan"))

    x, y = torch.randn(4, 3), torch.randn(5, 3)
    gm = make_fx(f, tracing_mode="fake")(x, y)
    again = parse(show(gm))
    assert show(again) == show(gm)
    torch.testing.assert_close(again.forward(x, y), gm.forward(x, y), rtol=0, atol=0, equal_nan=True)


def test_symbols() -> None:
    gm = make_fx(lambda x: x.view(-1).sin(), tracing_mode="symbolic")(torch.randn(3, 4))
    text = show(gm)
    assert re.search(r"%x_1: f32\[s\d+, s\d+\] = input", text) and re.search(r"f32\[s\d+\*s\d+\] = aten.sin", text)
    with pytest.raises(ParseError, match="symbolic; give it a number"):
        parse("%x: f32[s0, 2] = input\nreturn (%x)")
    assert parse("%x: f32[s0, 2*s0 + 1] = input\nreturn (%x)", {"s0": 3}).graph.find_nodes(
        op="placeholder")[0].meta["val"].shape == (3, 7)


def test_names_are_sanitized_and_unique() -> None:
    gm = make_fx(lambda x, y: x + y)(torch.randn(2), torch.randn(2))
    for node, name in zip(gm.graph.nodes, ["évil\n); import os", "évil\n); import os!", "x" * 200]):
        node.name = name
    text = show(gm)
    assert text.isascii() and len(text.splitlines()) == 4
    assert len({line.split(":")[0] for line in text.splitlines()[:3]}) == 3


def test_users_line_without_path() -> None:
    gm = make_fx(lambda x: x.sin())(torch.randn(2))
    node = next(n for n in gm.graph.nodes if n.op == "call_function")
    node.meta["stack_trace"] = 'File "/secret/place/model.py", line 12, in forward\n    x.sin()\n'
    assert "  # model.py:12\n" in show(gm) and "secret" not in show(gm)
    node.meta["stack_trace"] = 'File "C:\\dir\\mo\u202ee.py", line 3, in f'
    assert "  # mo_e.py:3\n" in show(gm)


HOSTILE = [
    "", "return", "%x = input", "%x: f32[2] = input\nreturn (%y)", "%x: f32[2] = input\n%x: f32[2] = input\nreturn (%x)",
    "%x: f32[2] = input\nreturn (%x)\n%y: f32[2] = input", "%x: f33[2] = input\nreturn (%x)", "%x: f32[-2] = input\nreturn (%x)",
    "%x: f32[2]{1, 1} = input\nreturn (%x)", f"%x: f32[{'9' * 60}] = input\nreturn (%x)", "%x: f32[2**9] = input\nreturn (%x)",
    "%x = __import__(\"os\")\nreturn (%x)", "%x = os.system(\"x\")\nreturn (%x)", "%x = aten.nothing(1)\nreturn (%x)",
    "%x = aten.__class__(1)\nreturn (%x)", "%x = aten.add.__class__(1)\nreturn (%x)", "%x = aten.add.Tensr(1)\nreturn (%x)",
    "%x = aten.sin(open(\"f\"))\nreturn (%x)", "%x = aten.sin([i for i in 9])\nreturn (%x)", "%x = aten.sin(*%y)\nreturn (%x)",
    "%x = aten.sin(**{})\nreturn (%x)", "%x = aten.sin(lambda: 0)\nreturn (%x)", "%x = aten.sin(torch.ops)\nreturn (%x)",
    "%x = aten.sin(torch.os.system)\nreturn (%x)",
    "%x = aten.sin(device(\"rm\"))\nreturn (%x)", "%x = aten.sin(1 + 1)\nreturn (%x)",
    "%x = torch.load(\"f\")\nreturn (%x)", "%x = operator.attrgetter(\"x\")\nreturn (%x)", "%x = prim.Print(1)\nreturn (%x)",
    "%x = aten.sin(" + "(" * 5000 + ")" * 5000 + ")\nreturn (%x)", "%x = aten.sin(f\"{1}\")\nreturn (%x)",
    "%x: sym(1 // 0) = input\nreturn (%x)", "%x = aten.sin(\0)\nreturn (%x)", "return (%x", "%é: f32[2] = input\nreturn ()",
    "%x = aten.sin(sym(\"__import__('os')\"))\nreturn (%x)", "%x: f32[2]@nowhere = input\nreturn (%x)",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text(text: str) -> None:
    with pytest.raises(ParseError):
        parse(text)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, len(TEXT) - 1), st.integers(1, 12), st.text(alphabet="%()[]{}=:,.\"'\\ \nx0aé\0@#-", max_size=6))
def test_damaged_text_parses_or_is_refused(start: int, length: int, new: str) -> None:
    try:
        gm = parse(TEXT[:start] + new + TEXT[start + length:])
    except ParseError:
        return
    show(gm)
