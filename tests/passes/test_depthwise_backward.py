"""Gradients of depthwise convolutions: text, values, refusals."""

from __future__ import annotations

import pytest
import torch

from fusionc.passes.depthwise_backward import DepthwiseBackward
from tests.passes.helpers import check_values, refusals, rewritten


class OnCpu(DepthwiseBackward):
    devices = ("cpu",)
    dtypes = (torch.float64,)


LAST = "{224, 1, 32, 4}"
BACKWARD = """
%g: f64[2, 4, 7, 8]L = input
%x: f64[2, 4, 7, 8]L = input
%w: f64[4, 1, 5, 3] = input
%p: (f64[2, 4, 7, 8]L, f64[4, 1, 5, 3], f64[4]) = aten.convolution_backward(%g, %x, %w, [4], [1, 1], [2, 1], [1, 1], False, [0, 0], 4, [True, True, True])
%i: f64[2, 4, 7, 8]L = getitem(%p, 0)
%f: f64[4, 1, 5, 3] = getitem(%p, 1)
%b: f64[4] = getitem(%p, 2)
return (%i, %f, %b)
""".replace("L,", LAST + ",").replace("L =", LAST + " =")  # noqa: E501


def test_rewrite() -> None:
    assert rewritten(OnCpu(), BACKWARD) == """
%g: f64[2, 4, 7, 8]{224, 1, 32, 4} = input
%x: f64[2, 4, 7, 8]{224, 1, 32, 4} = input
%w: f64[4, 1, 5, 3] = input
%flip: f64[4, 1, 5, 3] = aten.flip(%w, [2, 3])
%permute: f64[5, 3, 4, 1]{3, 1, 15, 15} = aten.permute(%flip, [2, 3, 0, 1])
%clone: f64[5, 3, 4, 1] = aten.clone(%permute, memory_format=torch.contiguous_format)
%view: f64[5, 3, 4] = aten.view(%clone, [5, 3, 4])
%depthwise_conv: f64[2, 4, 7, 8]{224, 1, 32, 4} = fusionc.depthwise_conv(%g, %view, None, [1, 1], [2, 1], [1, 1], "")
%depthwise_conv_weight: f64[5, 3, 4] = fusionc.depthwise_conv_weight(%g, %x, [5, 3], [2, 1], [1, 1])
%permute_1: f64[4, 5, 3]{1, 12, 4} = aten.permute(%depthwise_conv_weight, [2, 0, 1])
%clone_1: f64[4, 5, 3] = aten.clone(%permute_1, memory_format=torch.contiguous_format)
%view_1: f64[4, 1, 5, 3] = aten.view(%clone_1, [4, 1, 5, 3])
%sum_1: f64[4] = aten.sum.dim_IntList(%g, [0, 2, 3])
return (%depthwise_conv, %view_1, %sum_1)
"""
    check_values(OnCpu(), BACKWARD, fired=1, exact=False)


def test_only_what_is_read() -> None:
    new = check_values(OnCpu(), BACKWARD.replace("return (%i, %f, %b)", "return (%f)").replace("%i: ", "%unused: "), fired=1,
                       exact=False)  # fmt: skip
    assert len([n for n in new.graph.nodes if "depthwise" in n.name]) >= 1


def test_dilated_and_contiguous() -> None:
    check_values(OnCpu(), BACKWARD.replace(LAST, "").replace("[2, 1], [1, 1]", "[4, 2], [2, 2]"), fired=1, exact=False)


def test_lines() -> None:
    text = BACKWARD.replace(LAST, "").replace("7, 8]", "8]").replace("5, 3]", "3]")
    text = text.replace("[1, 1], [2, 1], [1, 1], False, [0, 0]", "[1], [2], [2], False, [0]")
    check_values(OnCpu(), text, fired=1, exact=False)


@pytest.mark.parametrize(("changes", "reason"), [
    ({"f64": "f32"}, "not of one half-precision dtype (p)"),
    ({"%g: f64[2, 4, 7, 8]": "%g: f64[2, 4, 4, 4]", "[4], [1, 1]": "[4], [2, 2]", LAST: ""},
     "strided, or padded by more than the filter reaches (p)"),
    ({"%g: f64[2, 4, 7, 8]{224, 1, 32, 4}": "%g: f64[2, 4, 7, 8]"},
     "the gradient of the result and the input are not dense in one layout (p)"),
    ({"%x: f64[2, 4, 7, 8]{224, 1, 32, 4}": "%x: f64[2, 4, 7, 8]{448, 112, 16, 2}", LAST: ""},
     "the gradient of the result and the input are not dense in one layout (p)"),
])  # fmt: skip
def test_refusals(changes: dict[str, str], reason: str) -> None:
    text = BACKWARD
    for old, new in changes.items():
        text = text.replace(old, new)
    from fusionc.graph.facts import Facts
    from fusionc.graph.text import parse

    facts = Facts(parse(text))  # CPU and CUDA differ in the layouts they give: the graph is not verified
    (match,) = OnCpu().find(facts)
    refused = OnCpu().check(match, facts)
    assert refused is not None and f"{refused.reason} ({refused.node})" == reason


def test_refusals_of_odd_values() -> None:
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    from fusionc.graph.facts import Facts
    from fusionc.graph.text import parse

    size = ShapeEnv().create_unbacked_symint()
    for name, change, reason in (
        ("i", lambda n: n.meta.update(val=torch.empty(2, 4, 7, 8)),
         "the gradient of the input has another layout than the input"),
        ("f", lambda n: n.meta.update(val=torch.empty(1, 5, 3, 4).permute(3, 0, 1, 2)),
         "the gradient of the filter is not contiguous"),
        ("p", lambda n: setattr(n, "args", (*n.args[:4], [size, size], *n.args[5:])), "a size is symbolic"),
        ("b", lambda n: setattr(n, "target", torch.ops.aten.neg.default), "the gradients are read as a whole"),
    ):  # fmt: skip
        gm = parse(BACKWARD)
        change(next(n for n in gm.graph.nodes if n.name == name))
        facts = Facts(gm)
        (match,) = OnCpu().find(facts)
        refused = OnCpu().check(match, facts)
        assert refused is not None and refused.reason == reason


def test_elsewhere_nothing_changes() -> None:
    check_values(DepthwiseBackward(), BACKWARD, fired=0)
    assert refusals(DepthwiseBackward(), BACKWARD) == []
