"""Strided convolutions of few channels as dense ones: values for many shapes, text of one, refusals."""

from __future__ import annotations

import pytest
import torch

from fusionc.graph.text import parse
from fusionc.passes import strided_conv
from fusionc.passes.strided_conv import StridedConv
from tests.passes.helpers import apply, call, check_values, inputs_for, refusals, rewritten


class OnCpu(StridedConv):
    devices = ("cpu",)
    dtypes = (torch.float64,)


def text(n: int = 2, c: int = 3, size: tuple[int, int] = (16, 16), out: int = 8, kernel: tuple[int, int] = (7, 7),
         stride: int = 2, padding: int = 3, bias: str = "None", extra: str = "[1, 1], False, [0, 0], 1") -> str:
    h, w = ((s + 2 * padding - k) // stride + 1 for s, k in zip(size, kernel))
    return f"""
%x: f64[{n}, {c}, {size[0]}, {size[1]}]{{{c * size[0] * size[1]}, 1, {c * size[1]}, {c}}} = input
%w: f64[{out}, {c}, {kernel[0]}, {kernel[1]}] = input
%b: f64[{out}] = input
%y: f64[{n}, {out}, {h}, {w}]{{{out * h * w}, 1, {out * w}, {out}}} = aten.convolution(%x, %w, {bias}, [{stride}, {stride}], [{padding}, {padding}], {extra})
return (%y)
"""  # noqa: E501


def test_patches() -> None:
    assert rewritten(OnCpu(), text(size=(8, 8), kernel=(4, 4), stride=4, padding=0, out=256)) == """
%x: f64[2, 3, 8, 8]{192, 1, 24, 3} = input
%w: f64[256, 3, 4, 4] = input
%b: f64[256] = input
%view: f64[2, 3, 2, 4, 2, 4]{192, 1, 96, 24, 12, 3} = aten.view(%x, [2, 3, 2, 4, 2, 4])
%permute: f64[2, 2, 2, 4, 4, 3]{192, 96, 12, 24, 3, 1} = aten.permute(%view, [0, 2, 4, 3, 5, 1])
%clone: f64[2, 2, 2, 4, 4, 3] = aten.clone(%permute, memory_format=torch.contiguous_format)
%view_1: f64[2, 2, 2, 48] = aten.view(%clone, [2, 2, 2, 48])
%view_2: f64[256, 3, 1, 4, 1, 4] = aten.view(%w, [256, 3, 1, 4, 1, 4])
%permute_1: f64[256, 1, 1, 4, 4, 3]{48, 16, 4, 4, 1, 16} = aten.permute(%view_2, [0, 2, 4, 3, 5, 1])
%clone_1: f64[256, 1, 1, 4, 4, 3] = aten.clone(%permute_1, memory_format=torch.contiguous_format)
%view_3: f64[256, 1, 1, 48] = aten.view(%clone_1, [256, 1, 1, 48])
%view_4: f64[8, 48] = aten.view(%view_1, [8, 48])
%view_5: f64[256, 48] = aten.view(%view_3, [256, 48])
%t: f64[48, 256]{1, 48} = aten.t(%view_5)
%mm: f64[8, 256] = aten.mm(%view_4, %t)
%view_6: f64[2, 2, 2, 256] = aten.view(%mm, [2, 2, 2, 256])
%permute_2: f64[2, 256, 2, 2]{1024, 1, 512, 256} = aten.permute(%view_6, [0, 3, 1, 2])
return (%permute_2)
"""


@pytest.mark.parametrize(("bias", "reader", "product"), [
    ("b", "return (%s)", "addmm"), ("b", "return (%s, %y)", "mm"), ("wide", "return (%s)", "mm"),
])  # fmt: skip
def test_patches_take_their_bias(bias: str, reader: str, product: str) -> None:
    given = text(size=(8, 8), kernel=(4, 4), stride=4, padding=0, out=8).replace("return (%y)", f"""\
%wide: f64[1, 8, 1] = aten.view(%b, [1, 8, 1])
%v: f64[8, 1, 1] = aten.view(%{bias}, [-1, 1, 1])
%s: f64[2, 8, 2, 2]{{32, 1, 16, 8}} = aten.add(%y, %v)
{reader}""")
    new = check_values(OnCpu(), given, fired=1, exact=False)
    assert len(list(new.graph.find_nodes(op="call_function", target=getattr(torch.ops.aten, product).default))) == 1


@pytest.mark.parametrize("shape", [
    {}, {"c": 1}, {"c": 4, "size": (15, 18)}, {"size": (17, 13), "kernel": (3, 5), "padding": 1},
    {"stride": 3, "kernel": (2, 4), "padding": 0, "size": (20, 23)}, {"kernel": (4, 4), "stride": 4, "padding": 0},
    {"out": 256}, {"n": 1, "c": 2, "size": (9, 9), "kernel": (1, 1), "padding": 0},
], ids=str)  # fmt: skip
def test_values(shape: dict) -> None:
    check_values(OnCpu(), text(**shape), fired=1, exact=False)


def test_columns_share_a_block() -> None:
    assert [strided_conv._columns_together(*each) for each in ((64, 112), (32, 112), (96, 55), (128, 112), (16, 6))] == \
        [4, 4, 1, 2, 2]


@pytest.mark.parametrize(("shape", "reason"), [
    ({"bias": "%b"}, "the bias is part of the convolution (y)"),
    ({"extra": "[1, 1], False, [0, 0], 3", "out": 9}, "transposed, grouped or dilated (y)"),
])
def test_refusals(shape: dict, reason: str) -> None:
    given = text(**shape)
    if "out" in shape:
        given = given.replace("[9, 3, 7, 7]", "[9, 1, 7, 7]")
    assert refusals(OnCpu(), given) == [reason]


def test_refusals_of_layout_and_dtype() -> None:
    plain = text().replace("{768, 1, 48, 3}", "").replace("{512, 1, 64, 8}", "")
    assert refusals(OnCpu(), plain) == ["the result is not channels-last (y)"]
    assert refusals(OnCpu(), text().replace("f64", "f32")) == [
        "the library has no matrix instructions to fill for this dtype (y)"
    ]


def test_refuses_symbolic_sizes() -> None:
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    gm = parse(text())
    size = ShapeEnv().create_unbacked_symint()
    x = next(iter(gm.graph.nodes))
    x.meta["val"] = torch.empty(2, 3, 16, 16, device="meta")
    like = next(n for n in gm.graph.nodes if n.name == "y")

    from fusionc.graph.facts import Facts

    facts = Facts(gm)
    (match,) = OnCpu().find(facts)
    match.conv.args = (*match.conv.args[:4], [size, size], *match.conv.args[5:])
    refused = OnCpu().check(match, facts)
    assert refused is not None and refused.reason == "a size is symbolic" and refused.node is like


def test_elsewhere_nothing_changes() -> None:
    check_values(StridedConv(), text(), fired=0)
    check_values(OnCpu(), text(c=12, kernel=(2, 2), padding=0, size=(15, 16)), fired=0)  # a line is left over
    gm, _ = apply(OnCpu(), text(c=5))  # enough channels
    assert call(gm, inputs_for(gm)) and len(gm.graph.nodes) == 5
