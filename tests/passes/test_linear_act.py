"""Products with bias and activation as one call: rewritten text, values, refusals."""

from __future__ import annotations

import pytest
import torch

from fusionc.passes.linear_act import LinearActivation
from tests.passes.helpers import check_values, refusals, rewritten


class OnCpu(LinearActivation):
    devices = ("cpu",)
    dtypes = (torch.float64, torch.float64)
    rows = 4


MLP = """
%x: f64[2, 3, 16] = input
%w: f64[8, 16] = input  # static
%b: f64[8] = input  # static
%v: f64[8, 4] = input  # static
%f: f64[6, 16] = aten.view(%x, [6, 16])
%t: f64[16, 8]{1, 16} = aten.t(%w)
%p: f64[6, 8] = aten.addmm(%b, %f, %t)
%r: f64[2, 3, 8] = aten.view(%p, [2, 3, 8])
%g: f64[2, 3, 8] = aten.gelu(%r)
%h: f64[6, 8] = aten.view(%g, [6, 8])
%y: f64[6, 4] = aten.mm(%h, %v)
return (%y)
"""
COLUMN = """
%x: f64[6, 16] = input
%w: f64[8, 16] = input  # static
%b: f64[8] = input  # static
%t: f64[16, 8]{1, 16} = aten.t(%w)
%p: f64[6, 8] = aten.mm(%x, %t)
%r: f64[48, 1] = aten.view(%p, [48, 1])
%s: f64[48, 8] = aten.add(%r, %b)
%g: f64[48, 8] = aten.relu(%s)
return (%g)
"""
SUM = MLP.replace("aten.addmm(%b, %f, %t)", "aten.mm(%f, %t)").replace(
    "%g: f64[2, 3, 8] = aten.gelu(%r)", "%s: f64[2, 3, 8] = aten.add(%r, %b)\n%g: f64[2, 3, 8] = aten.silu(%s)")  # fmt: skip
CONV = """
%x: f64[2, 16, 3, 5]{240, 1, 80, 16} = input
%w: f64[8, 16, 1, 1] = input  # static
%b: f64[8] = input  # static
%c: f64[2, 8, 3, 5]{120, 1, 40, 8} = aten.convolution(%x, %w, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)
%v: f64[8, 1, 1] = aten.view(%b, [-1, 1, 1])
%s: f64[2, 8, 3, 5]{120, 1, 40, 8} = aten.add(%c, %v)
%g: f64[2, 8, 3, 5]{120, 1, 40, 8} = aten.gelu(%s, approximate="tanh")
return (%g)
"""


def test_a_linear_layer() -> None:
    assert rewritten(OnCpu(), MLP) == """
%x: f64[2, 3, 16] = input
%w: f64[8, 16] = input  # static
%b: f64[8] = input  # static
%v: f64[8, 4] = input  # static
%f: f64[6, 16] = aten.view(%x, [6, 16])
%linear_act: f64[6, 8] = fusionc.linear_act(%f, %w, None, %b, "gelu")
%view: f64[2, 3, 8] = aten.view(%linear_act, [2, 3, 8])
%h: f64[6, 8] = aten.view(%view, [6, 8])
%y: f64[6, 4] = aten.mm(%h, %v)
return (%y)
"""
    check_values(OnCpu(), MLP, fired=1, exact=False)


def test_a_bias_that_is_added_afterwards_and_none() -> None:
    assert 'fusionc.linear_act(%f, %w, None, %b, "silu")' in rewritten(OnCpu(), SUM)
    check_values(OnCpu(), SUM, fired=1, exact=False)
    check_values(OnCpu(), SUM.replace("aten.add(%r, %b)", "aten.add(%b, %r)"), fired=1, exact=False)
    check_values(OnCpu(), MLP.replace("aten.addmm(%b, %f, %t)", "aten.mm(%f, %t)"), fired=1, exact=False)


def test_a_convolution() -> None:
    assert rewritten(OnCpu(), CONV).splitlines()[4:] == [
        "%permute: f64[2, 3, 5, 16] = aten.permute(%x, [0, 2, 3, 1])",
        "%view: f64[30, 16] = aten.view(%permute, [30, 16])",
        "%view_1: f64[8, 16] = aten.view(%w, [8, 16])",
        '%linear_act: f64[30, 8] = fusionc.linear_act(%view, %view_1, None, %b, "gelu_tanh")',
        "%view_2: f64[2, 3, 5, 8] = aten.view(%linear_act, [2, 3, 5, 8])",
        "%permute_1: f64[2, 8, 3, 5]{120, 1, 40, 8} = aten.permute(%view_2, [0, 3, 1, 2])",
        "return (%permute_1)",
    ]
    check_values(OnCpu(), CONV, fired=1, exact=False)
    lines = [line for line in CONV.splitlines() if not line.startswith(("%v", "%s"))]
    inside = "\n".join(lines).replace("%w, None", "%w, %b").replace("aten.gelu(%s", "aten.gelu(%c")
    check_values(OnCpu(), inside, fired=1, exact=False)


NORM = """
%x: f64[2, 16, 3, 5]{240, 1, 80, 16} = input
%w: f64[8, 16, 1, 1] = input  # static
%m: f64[8, 1, 1] = input  # static
%r: f64[8, 1, 1] = input  # static
%c: f64[2, 8, 3, 5]{120, 1, 40, 8} = aten.convolution(%x, %w, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)
%d: f64[2, 8, 3, 5]{120, 1, 40, 8} = aten.sub(%c, %m)
%e: f64[2, 8, 3, 5]{120, 1, 40, 8} = aten.mul(%d, %r)
%g: f64[2, 8, 3, 5]{120, 1, 40, 8} = aten.silu(%e)
return (%g)
"""


def test_a_norm_whose_folding_would_round_the_weights() -> None:
    text = rewritten(OnCpu(), NORM)
    assert 'fusionc.linear_act(%view_3, %view_4, %view, %mul_1, "silu")' in text or text.count("fusionc.linear_act") == 1
    assert "aten.convolution" not in text and sum("f64[2, 8, 3, 5]" in line for line in text.splitlines()) == 1
    check_values(OnCpu(), NORM, fired=1, exact=False)
    own = NORM.replace("%w, None", "%w, %b").replace("%m: f64", "%b: f64[8] = input  # static\n%m: f64", 1)
    check_values(OnCpu(), own, fired=1, exact=False)
    check_values(OnCpu(), NORM.replace("aten.mul(%d, %r)", "aten.add(%d, 1.5)"), fired=1, exact=False)
    check_values(OnCpu(), NORM.replace("aten.mul(%d, %r)", "aten.mul(%d, %d)"), fired=0)
    assert refusals(OnCpu(), NORM.replace("return (%g)", "return (%g, %d)")) == ["a value between is read elsewhere (d)"]


@pytest.mark.parametrize(("text", "changes", "reason"), [
    (MLP, {"return (%y)": "return (%y, %r)"}, "a value between is read elsewhere (r)"),
    (MLP, {"%w: f64[8, 16]": "%t: f64[16, 8]", "%t: f64[16, 8]{1, 16} = aten.t(%w)\n": ""}, "the weight is not turned (p)"),
    (MLP, {"%b: f64[8] ": "%b: f64[6, 8] "}, "what is added is not a bias of the columns (p)"),
    (COLUMN, {}, "what is added is not a bias of the columns (p)"),
    (MLP, {"f64[8]": "f64[1]"}, "what is added is not a bias of the columns (p)"),
    (MLP, {"2, 3, 16]": "1, 3, 16]", "2, 3, 8]": "1, 3, 8]", "[6, ": "[3, "},
     "few rows, or a width that is no multiple of 8 (p)"),
    (MLP, {"16]": "12]", "f64[16, 8]{1, 16}": "f64[12, 8]{1, 12}"}, "an operand is not dense along its rows (p)"),
    (MLP, {"%x: f64[2, 3, 16] = input": "%x: f64[2, 3, 16]{51, 17, 1} = input", "%f: f64[6, 16]": "%f: f64[6, 16]{17, 1}"},
     "an operand is not dense along its rows (p)"),
    (MLP, {"%h: f64[6, 8] = aten.view(%g": "%i: f64[2, 3, 8] = aten.mul(%g, 3.0)\n%h: f64[6, 8] = aten.view(%i"},
     "a kernel that follows takes the activation in (g)"),
    (CONV, {"{240, 1, 80, 16}": "", "{120, 1, 40, 8}": ""}, "the images are not channels-last (c)"),
    (CONV, {"16, 1, 1] = input": "8, 1, 1] = input", "[0, 0], 1)": "[0, 0], 2)"}, "not a convolution of one tap (c)"),
], ids=str)  # fmt: skip
def test_refusals(text: str, changes: dict[str, str], reason: str) -> None:
    for old, new in changes.items():
        text = text.replace(old, new)
    assert refusals(OnCpu(), text) == [reason]


def test_refusals_of_odd_values() -> None:
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    from fusionc.graph.facts import Facts
    from fusionc.graph.text import parse

    size = ShapeEnv().create_unbacked_symint()
    for name, value, reason in (
        ("f", torch.empty(size, 16, device="meta", dtype=torch.float64), "a size is symbolic"),
        ("b", torch.empty(8), "not of one dtype"),
    ):
        gm = parse(MLP)
        next(n for n in gm.graph.nodes if n.name == name).meta["val"] = value
        facts = Facts(gm, stage="inference")
        (match,) = OnCpu().find(facts)
        refused = OnCpu().check(match, facts)
        assert refused is not None and refused.reason == reason


@pytest.mark.parametrize(("text", "old", "new"), [
    (MLP, "aten.gelu(%r)", "aten.sin(%r)"),
    (MLP, "aten.addmm(%b, %f, %t)", "aten.addmm(%b, %f, %t, alpha=2)"),
    (SUM, "aten.add(%r, %b)", "aten.add(%r, %b, alpha=2)"),
    (SUM, "aten.add(%r, %b)", "aten.add(%r, %r)"),
    (CONV, "aten.add(%c, %v)", "aten.add(%c, %x)"),
    (CONV, "aten.convolution(%x, %w, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)", "aten.mul(%z, 2.0)"),
], ids=str)  # fmt: skip
def test_others_are_not_looked_at(text: str, old: str, new: str) -> None:
    text = text.replace(old, new)
    if "%x)" in new:
        text = text.replace("16, 3, 5]{240, 1, 80, 16}", "8, 3, 5]{120, 1, 40, 8}").replace("[8, 16, 1", "[8, 8, 1")
    text = text.replace("%w: f64[8, 16, 1, 1] = input  # static", "%z: f64[2, 8, 3, 5]{120, 1, 40, 8} = input") \
        if "%z" in new else text  # fmt: skip
    check_values(OnCpu(), text, fired=0)
    assert refusals(OnCpu(), text) == []


def test_training_and_other_devices_are_left_alone() -> None:
    assert "linear_act" not in rewritten(OnCpu(), MLP, "forward")
    check_values(LinearActivation(), MLP, fired=0)
