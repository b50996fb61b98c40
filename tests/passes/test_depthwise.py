"""Depthwise convolutions as one operator: branches, bias, activation, values, refusals."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import fusionc
from fusionc.passes import recipes
from fusionc.passes.depthwise import Depthwise
from tests.passes.helpers import apply, check_values, refusals, rewritten


class OnCpu(Depthwise):
    devices = ("cpu",)
    dtypes = (torch.float64, torch.float64)


def conv(x: str, w: str, b: str = "None", p: int = 3, s: int = 1, d: int = 1, groups: int = 4) -> str:
    return f"aten.convolution(%{x}, %{w}, {b}, [{s}, {s}], [{p}, {p}], [{d}, {d}], False, [0, 0], {groups})"


ONE = f"""
%x: f64[2, 4, 9, 8]{{288, 1, 32, 4}} = input
%w: f64[4, 1, 7, 7] = input  # static
%b: f64[4] = input
%y: f64[2, 4, 9, 8]{{288, 1, 32, 4}} = {conv("x", "w", "%b")}
%g: f64[2, 4, 9, 8]{{288, 1, 32, 4}} = aten.gelu(%y)
return (%g)
"""
BLOCK = f"""
%x: f64[2, 4, 9, 8] = input
%w7: f64[4, 1, 7, 7] = input  # static
%b7: f64[4] = input  # static
%w5: f64[4, 1, 5, 5] = input  # static
%b5: f64[4] = input  # static
%w3: f64[4, 1, 3, 3] = input  # static
%y7: f64[2, 4, 9, 8] = {conv("x", "w7", "%b7")}
%y5: f64[2, 4, 9, 8] = {conv("x", "w5", "%b5", 2)}
%a: f64[2, 4, 9, 8] = aten.add(%y7, %y5)
%y3: f64[2, 4, 9, 8] = {conv("x", "w3", p=3, d=3)}
%s: f64[2, 4, 9, 8] = aten.add(%y3, %a)
%r: f64[2, 4, 9, 8] = aten.relu(%s)
return (%r)
"""


def test_frozen_weight_bias_and_activation() -> None:
    assert rewritten(OnCpu(), ONE) == """
%x: f64[2, 4, 9, 8]{288, 1, 32, 4} = input
%w: f64[4, 1, 7, 7] = input  # static
%b: f64[4] = input
%derived_0: f64[7, 7, 4] = input
%depthwise_conv: f64[2, 4, 9, 8]{288, 1, 32, 4} = fusionc.depthwise_conv(%x, %derived_0, %b, [1, 1], [3, 3], [1, 1], "gelu")
return (%depthwise_conv)
"""
    check_values(OnCpu(), ONE, fired=1, exact=False)


def test_branches_merge() -> None:
    assert rewritten(OnCpu(), BLOCK).splitlines()[7:] == [
        "%derived_0: f64[7, 7, 4] = input",
        "%_to_copy: f64[4] = aten._to_copy(%b7, dtype=torch.float64)",
        "%add: f64[4] = aten.add(%_to_copy, %b5)",
        '%depthwise_conv: f64[2, 4, 9, 8] = fusionc.depthwise_conv(%x, %derived_0, %add, [1, 1], [3, 3], [1, 1], "relu")',
        "return (%depthwise_conv)",
    ]
    check_values(OnCpu(), BLOCK, fired=1, exact=False)


@pytest.mark.parametrize(("old", "new", "fired"), [
    ("%w5: f64[4, 1, 5, 5] = input  # static", "%w5: f64[4, 1, 5, 5] = input", 3),  # not frozen
    ("%w5: f64[4, 1, 5, 5] = input", "%w5: f64[4, 1, 9, 1] = input", 3),  # neither covers the other
    ("aten.add(%y7, %y5)", "aten.add(%y7, %y5, alpha=2)", 3),
    ("return (%r)", "return (%r, %y7)", 3),  # read elsewhere
    ("return (%r)", "return (%r, %s)", 1),  # the activation stays apart
], ids=str)
def test_branches_that_do_not_merge(old: str, new: str, fired: int) -> None:
    text = BLOCK.replace(old, new)
    if "9, 1]" in new:
        text = text.replace('%w5, %b5, [1, 1], [2, 2]', '%w5, %b5, [1, 1], [4, 0]')
    check_values(OnCpu(), text, fired=fired, exact=False)


@pytest.mark.parametrize("activation", ["aten.relu(%y)", "aten.silu(%y)", 'aten.gelu(%y, approximate="tanh")', "aten.sin(%y)"])
def test_activations_of_weights_in_training(activation: str) -> None:
    text = ONE.replace("aten.gelu(%y)", activation).replace("  # static", "")
    new = check_values(OnCpu(), text, fired=1, exact=False)
    assert len(list(new.graph.find_nodes(op="call_function", target=torch.ops.aten.clone.default))) == 1


def test_training_has_no_derived_weights() -> None:
    assert "derived" not in rewritten(OnCpu(), ONE, "forward")
    assert rewritten(OnCpu(), BLOCK, "forward").count("fusionc.depthwise_conv") == 3


def test_stride_dilation_and_other_paddings() -> None:
    check_values(OnCpu(), ONE.replace("[2, 4, 9, 8]{288, 1, 32, 4} = aten", "[2, 4, 4, 4]{64, 1, 16, 4} = aten")
                 .replace("[1, 1], [3, 3], [1, 1]", "[2, 2], [6, 6], [2, 2]")
                 .replace("aten.gelu(%y)", "aten.sin(%y)").replace("[2, 4, 4, 4]{64, 1, 16, 4}", "[2, 4, 5, 4]{80, 1, 16, 4}"),
                 fired=1, exact=False)  # fmt: skip


SPLIT = f"""
%x: f64[2, 12, 9, 8]{{864, 1, 96, 12}} = input
%w3: f64[4, 1, 3, 3] = input  # static
%w11: f64[4, 1, 1, 11] = input  # static
%b: f64[4] = input  # static
%s3: f64[2, 4, 9, 8]{{864, 1, 96, 12}} = aten.slice.Tensor(%x, 1, 4, 8)
%s11: f64[2, 4, 9, 8]{{864, 1, 96, 12}} = aten.slice.Tensor(%x, 1, 8, 12)
%y3: f64[2, 4, 9, 8]{{288, 1, 32, 4}} = {conv("s3", "w3", "%b", 1)}
%y11: f64[2, 4, 9, 8]{{288, 1, 32, 4}} = {conv("s11", "w11", "%b").replace("[3, 3]", "[0, 5]")}
%c: f64[2, 8, 9, 8]{{576, 1, 64, 8}} = aten.cat([%y3, %y11], 1)
return (%c)
"""


def test_some_of_the_channels_of_an_image_are_copied() -> None:
    """InceptionNeXt's convolutions of slices: the library copies them, too."""
    lines = rewritten(OnCpu(), SPLIT).splitlines()
    copies = [line for line in lines if "aten.clone" in line]
    assert [c.split(" = ")[1] for c in copies] == [f"aten.clone(%{s}, memory_format=torch.channels_last)" for s in ("s3", "s11")]
    assert all(c.split(" = ")[0].endswith("f64[2, 4, 9, 8]{288, 1, 32, 4}") for c in copies)
    check_values(OnCpu(), SPLIT, fired=2, exact=False)
    first = SPLIT.replace("{864, 1, 96, 12}", "", 1).replace("{864, 1, 96, 12}", "{864, 72, 8, 1}")
    check_values(OnCpu(), first.replace("{288, 1, 32, 4}", "").replace("{576, 1, 64, 8}", ""), fired=2, exact=False)


def test_several_results_of_one_channel() -> None:
    text = ONE.replace("%w: f64[4, 1, 7, 7]", "%w: f64[8, 1, 7, 7]").replace("%b: f64[4]", "%b: f64[8]")
    text = text.replace("%y: f64[2, 4, 9, 8]{288, 1, 32, 4}", "%y: f64[2, 8, 9, 8]{576, 1, 64, 8}")
    text = text.replace("%g: f64[2, 4, 9, 8]{288, 1, 32, 4}", "%g: f64[2, 8, 9, 8]{576, 1, 64, 8}")
    assert "%derived_0: f64[7, 7, 8]" in rewritten(OnCpu(), text)
    check_values(OnCpu(), text, fired=1, exact=False)
    contiguous = text.replace("{288, 1, 32, 4}", "").replace("{576, 1, 64, 8}", "")
    reason = "no kernel of ours for contiguous images with several results a channel (y)"
    assert refusals(OnCpu(), contiguous) == [reason]
    gray = text.replace("[2, 4, 9, 8]{288, 1, 32, 4}", "[2, 1, 9, 8]").replace("[0, 0], 4)", "[0, 0], 1)")
    check_values(OnCpu(), gray.replace("{576, 1, 64, 8}", ""), fired=0)


LINES = """
%x: f64[2, 4, 20] = input
%w9: f64[4, 1, 9] = input  # static
%w3: f64[4, 1, 3] = input  # static
%b: f64[4] = input
%y9: f64[2, 4, 20] = aten.convolution(%x, %w9, %b, [1], [4], [1], False, [0], 4)
%y3: f64[2, 4, 20] = aten.convolution(%x, %w3, None, [1], [3], [3], False, [0], 4)
%s: f64[2, 4, 20] = aten.add(%y9, %y3)
%r: f64[2, 4, 20] = aten.silu(%s)
return (%r)
"""


def test_lines() -> None:
    assert rewritten(OnCpu(), LINES).splitlines()[5:] == [
        "%derived_0: f64[1, 9, 4] = input",
        "%unsqueeze: f64[2, 4, 1, 20] = aten.unsqueeze(%x, 2)",
        '%depthwise_conv: f64[2, 4, 1, 20] = fusionc.depthwise_conv(%unsqueeze, %derived_0, %b, [1, 1], [0, 4], [1, 1], "silu")',
        "%squeeze: f64[2, 4, 20] = aten.squeeze.dim(%depthwise_conv, 2)",
        "return (%squeeze)",
    ]
    check_values(OnCpu(), LINES, fired=1, exact=False)
    check_values(OnCpu(), LINES.replace("  # static", ""), fired=2, exact=False)


@pytest.mark.parametrize(("changes", "fires"), [
    ({"[4, 1, 7, 7]": "[4, 1, 13, 13]", "[3, 3]": "[6, 6]"}, 1),  # float32
    ({"[4, 1, 7, 7]": "[4, 1, 13, 13]", "9, 8] = aten": "5, 4] = aten", "[1, 1], [3, 3]": "[2, 2], [6, 6]"}, 1),
    ({"[4, 1, 7, 7]": "[4, 1, 3, 51]", "[3, 3]": "[1, 25]"}, 0),  # too wide for the direct kernel
    ({}, 0),
], ids=str)  # fmt: skip
def test_large_contiguous_filters_of_any_stride_and_float32(changes: dict[str, str], fires: int) -> None:
    text = ONE.replace("{288, 1, 32, 4}", "").replace("f64", "f32")
    for old, new in changes.items():
        text = text.replace(old, new)

    class Real(OnCpu):
        dtypes = Depthwise.dtypes

    assert apply(Real(), text)[1].fired == fires


@pytest.mark.parametrize(("changes", "reason"), [
    ({"f64": "i64", "aten.gelu(%y)": "aten.neg(%y)"}, "not of one floating dtype (y)"),
    ({"[4, 1, 7, 7]": "[4, 1, 1, 1]", "[3, 3]": "[0, 0]"}, "one tap is a product (y)"),
    ({"{288, 1, 32, 4}": "", "9, 8] = aten": "5, 4] = aten", "[1, 1], [3, 3]": "[2, 2], [3, 3]"},
     "no kernel of ours for contiguous images of this dtype and stride (y)"),
])  # fmt: skip
def test_refusals(changes: dict[str, str], reason: str) -> None:
    text = ONE
    for old, new in changes.items():
        text = text.replace(old, new)
    assert refusals(OnCpu(), text) == [reason]


def test_refusals_of_odd_values() -> None:
    """Values that ATen does not give on a CPU, so the graph is not verified."""
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    from fusionc.graph.facts import Facts
    from fusionc.graph.text import parse

    size = ShapeEnv().create_unbacked_symint()
    for name, change, reason in (
        ("y", lambda n: n.meta.update(val=torch.empty(2, 4, 9, 8, dtype=torch.float64)),
         "the result has another layout than the input"),
        ("b", lambda n: n.meta.update(val=torch.empty(4)), "a weight or bias has another dtype"),
        ("y", lambda n: setattr(n, "args", (*n.args[:3], [size, size], *n.args[4:])), "a size is symbolic"),
    ):
        gm = parse(ONE)
        change(next(n for n in gm.graph.nodes if n.name == name))
        facts = Facts(gm)
        (match,) = OnCpu().find(facts)
        refused = OnCpu().check(match, facts)
        assert refused is not None and refused.reason == reason


def test_recipe() -> None:
    weights = [torch.randn(4, 1, 7, 7), torch.randn(4, 1, 3, 3)]
    made = recipes.rebuild(["depthwise_taps", [7, 7], [[0, 0, 1, 1], [0, 0, 3, 3]], "float32"], 2)(weights)
    want = weights[0].squeeze(1).permute(1, 2, 0).clone()
    want[::3, ::3] += weights[1].squeeze(1).permute(1, 2, 0)
    torch.testing.assert_close(made, want, rtol=0, atol=0)
    for wrong in ([[7], [[0, 0, 1, 1]], "float32"], [[7, 7], [[0, 0, 1]], "float32"], [[7, 7], [[0, 0, 1, -1]], "float32"],
                  [[7, 7], [[0, 0, 1, 1]], "int8"], [[7, 7], [], "float32"]):
        with pytest.raises((ValueError, TypeError)):
            recipes.rebuild(["depthwise_taps", *wrong], 1)


def test_elsewhere_nothing_changes() -> None:
    check_values(Depthwise(), ONE, fired=0)


CONTINUOUS = f"""
%x: f64[2, 4, 9, 8] = input
%at: f64[49, 2] = input  # static
%w1: f64[2, 5] = input  # static
%w2: f64[5, 4] = input  # static
%h: f64[49, 5] = aten.mm(%at, %w1)
%t: f64[49, 5] = aten.tanh(%h)
%k: f64[49, 4] = aten.mm(%t, %w2)
%kt: f64[4, 49]{{1, 4}} = aten.t(%k)
%kc: f64[4, 49] = aten.clone(%kt, memory_format=torch.contiguous_format)
%w: f64[4, 1, 7, 7] = aten.view(%kc, [4, 1, 7, 7])
%y: f64[2, 4, 9, 8] = {conv("x", "w")}
%r: f64[2, 4, 9, 8] = aten.silu(%y)
return (%r)
"""


def test_kernels_made_by_a_network() -> None:
    # CKConv, FlexConv: the taps are turned in the graph, and the operator takes them as any others
    gm = check_values(OnCpu(), CONTINUOUS, fired=1, exact=False)
    assert "fusionc_derived" not in gm.meta
    assert "= fusionc.depthwise_conv(%x, %view" in rewritten(OnCpu(), CONTINUOUS).splitlines()[-2]


def test_one_number_for_both_dimensions(monkeypatch: pytest.MonkeyPatch) -> None:
    """ATen lets (2,) stand for (2, 2), which this pass would read as a line's: the pipeline writes both numbers before it."""
    monkeypatch.setattr(Depthwise, "devices", OnCpu.devices)
    monkeypatch.setattr(Depthwise, "dtypes", OnCpu.dtypes)
    torch._dynamo.reset()
    x = torch.randn(2, 4, 12, 12, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    w = torch.randn(4, 1, 7, 7, dtype=torch.float64)
    with torch.no_grad():
        found = torch.compile(lambda x: F.conv2d(x, w, None, (2,), (1,), (1,), 4), backend="fusionc", options={"cache": False})(x)
    torch.testing.assert_close(found, F.conv2d(x, w, None, 2, 1, 1, 4))
    assert next(p for p in fusionc.report()[-1].passes if p.name == "depthwise").fired == 1
