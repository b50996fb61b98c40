"""The verifier finds each kind of fault, names the node, and accepts what is right."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fusionc.errors import VerifyError
from fusionc.graph import edit
from fusionc.graph.text import parse
from fusionc.graph.verify import mutations, verify

GOOD = """
%x: f32[2, 3] = input
%a: f32[2, 3] = aten.sin(%x)
%b: f32[3, 2]{1, 3} = aten.t(%a)
return (%b)
"""


def broken(change: Any, text: str = GOOD, before: Any = None) -> str:
    gm = parse(text)
    change(gm, {node.name: node for node in gm.graph.nodes})
    with pytest.raises(VerifyError) as error:
        verify(gm, "here", before)
    return str(error.value)


def test_good_graphs_pass() -> None:
    verify(parse(GOOD))
    verify(parse("""
%x: f32[4] = input
%y: f32[4] = input
%a: f32[4] = aten.sin(%x)
%w: f32[4] = aten.copy_(%x, %y)
return (%a)
"""))


def test_used_before_defined() -> None:
    def change(gm: Any, nodes: Any) -> None:
        nodes["a"].args = (nodes["b"],)

    assert "node a: b is used before it is defined" in broken(change)


def test_wrong_layout() -> None:
    def change(gm: Any, nodes: Any) -> None:
        nodes["b"].meta["val"] = edit.fake_empty(nodes["b"].meta["val"], (3, 2))

    assert "recorded f32[3, 2] with strides ('2', '1')" in broken(change)


def test_missing_value_and_refusing_operator() -> None:
    def missing(gm: Any, nodes: Any) -> None:
        del nodes["a"].meta["val"]

    assert "node a: it has no recorded value" in broken(missing)

    def refusing(gm: Any, nodes: Any) -> None:
        nodes["b"].target = torch.ops.aten.mm.default

    assert "refuses its inputs" in broken(refusing)


def test_inputs_out_of_place() -> None:
    def late(gm: Any, nodes: Any) -> None:
        with gm.graph.inserting_after(nodes["a"]):
            gm.graph.placeholder("z")

    assert "an input stands after a computation" in broken(late)

    def derived(gm: Any, nodes: Any) -> None:
        edit.add_derived(gm, [0], lambda s: s[0], nodes["x"].meta["val"])
        edit.add_input(gm, "z", nodes["x"].meta["val"])

    assert "are not the last inputs" in broken(derived)


def test_lost_write() -> None:
    text = "%x: f32[4] = input\n%y: f32[4] = input\n%w: f32[4] = aten.copy_(%x, %y)\nreturn ()"
    before = mutations(parse(text))

    def change(gm: Any, nodes: Any) -> None:
        gm.graph.erase_node(nodes["w"])

    assert "inputs are not written any more" in broken(change, text, before)


def test_read_of_an_old_view_after_a_write() -> None:
    assert "a view of x made before w wrote it" in broken(lambda gm, nodes: None, """
%x: f32[4] = input
%y: f32[4] = input
%v: f32[2, 2] = aten.view(%x, [2, 2])
%w: f32[4] = aten.copy_(%x, %y)
%r: f32[2, 2] = aten.sin(%v)
return (%r)
""")
