"""Contiguous networks become channels-last: rewritten text, values, copies at the borders, refusals."""

from __future__ import annotations

import pytest
import torch

from fusionc.passes import recipes
from fusionc.passes.channels_last import ChannelsLast
from tests.passes.helpers import apply, check_values, refusals, rewritten


class OnCpu(ChannelsLast):
    devices = ("cpu",)
    dtypes = (torch.float64, torch.float64)
    gain = 0.5


def conv(x: str, w: str, p: int = 1, s: int = 1, groups: int = 1) -> str:
    return f"aten.convolution(%{x}, %{w}, None, [{s}, {s}], [{p}, {p}], [1, 1], False, [0, 0], {groups})"


NET = f"""
%x: f64[2, 3, 8, 8] = input
%w: f64[4, 3, 3, 3] = input  # static
%v: f64[6, 4, 1, 1] = input  # static
%m: f64[5, 64] = input  # static
%a: f64[2, 4, 8, 8] = {conv("x", "w")}
%r: f64[2, 4, 8, 8] = aten.relu(%a)
%b: f64[2, 6, 8, 8] = {conv("r", "v", 0)}
%c: f64[2, 6, 64] = aten.view(%b, [2, 6, 64])
%d: f64[12, 64] = aten.view(%b, [12, 64])
%t: f64[64, 5]{{1, 64}} = aten.t(%m)
%e: f64[12, 5] = aten.mm(%d, %t)
return (%e, %c, %r)
"""


def test_a_view_that_images_one_pixel_high_have_only_by_name() -> None:
    """Torch's fake tensors give channels-last memory of height 1 views that it has not."""
    text = f"""
%x: f64[2, 8, 1, 8] = input
%w: f64[8, 8, 3, 3] = input  # static
%m: f64[64, 8] = input  # static
%a: f64[2, 8, 1, 8] = {conv("x", "w")}
%v: f64[2, 64] = aten.view(%a, [2, 64])
%y: f64[2, 8] = aten.mm(%v, %m)
return (%y)
"""
    check_values(OnCpu(), text, fired=1, exact=False)


def test_a_network() -> None:
    assert rewritten(OnCpu(), NET) == """
%x: f64[2, 3, 8, 8] = input
%w: f64[4, 3, 3, 3] = input  # static
%v: f64[6, 4, 1, 1] = input  # static
%m: f64[5, 64] = input  # static
%derived_0: f64[4, 3, 3, 3]{27, 1, 9, 3} = input
%clone: f64[2, 3, 8, 8]{192, 1, 24, 3} = aten.clone(%x, memory_format=torch.channels_last)
%a: f64[2, 4, 8, 8]{256, 1, 32, 4} = aten.convolution(%clone, %derived_0, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)
%r: f64[2, 4, 8, 8]{256, 1, 32, 4} = aten.relu(%a)
%b: f64[2, 6, 8, 8]{384, 1, 48, 6} = aten.convolution(%r, %v, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)
%c: f64[2, 6, 64]{384, 1, 6} = aten.view(%b, [2, 6, 64])
%clone_1: f64[2, 6, 8, 8] = aten.clone(%b, memory_format=torch.contiguous_format)
%d: f64[12, 64] = aten.view(%clone_1, [12, 64])
%t: f64[64, 5]{1, 64} = aten.t(%m)
%e: f64[12, 5] = aten.mm(%d, %t)
%clone_2: f64[2, 6, 64] = aten.clone(%c, memory_format=torch.contiguous_format)
%clone_3: f64[2, 4, 8, 8] = aten.clone(%r, memory_format=torch.contiguous_format)
return (%e, %clone_2, %clone_3)
"""
    check_values(OnCpu(), NET, fired=1, exact=False)


def test_weights_that_change_are_rearranged_in_the_graph() -> None:
    text = rewritten(OnCpu(), NET.replace("%w: f64[4, 3, 3, 3] = input  # static", "%w: f64[4, 3, 3, 3] = input"))
    assert "derived" not in text and "aten.clone(%w, memory_format=torch.channels_last)" in text
    check_values(OnCpu(), NET.replace("  # static", ""), fired=1, exact=False)


def test_tuples_and_branches_keep_their_values() -> None:
    text = NET.replace("%r: f64[2, 4, 8, 8] = aten.relu(%a)", """
%p: (f64[2, 2, 8, 8]{256, 64, 8, 1}, f64[2, 2, 8, 8]{256, 64, 8, 1}) = aten.split_with_sizes(%a, [2, 2], 1)
%p0: f64[2, 2, 8, 8]{256, 64, 8, 1} = getitem(%p, 0)
%p1: f64[2, 2, 8, 8]{256, 64, 8, 1} = getitem(%p, 1)
%r: f64[2, 4, 8, 8] = aten.cat([%p1, %p0], 1)""")
    check_values(OnCpu(), text, fired=1, exact=False)


@pytest.mark.parametrize(("old", "new", "reason"), [
    ("aten.relu(%a)", "aten.as_strided(%a, [2, 4, 8, 8], [256, 64, 8, 1])", "an operator is told strides (r)"),
    ("return (%e, %c, %r)", "%i: f64[2, 8, 8, 4]{256, 8, 1, 64} = aten.permute(%r, [0, 2, 3, 1])\nreturn (%e, %i)",
     "a value that must keep its layout is not contiguous (i)"),
], ids=str)  # fmt: skip
def test_refusals(old: str, new: str, reason: str) -> None:
    assert refusals(OnCpu(), NET.replace(old, new)) == [reason]


def test_too_many_copies() -> None:
    class Dear(OnCpu):
        gain = 2.0

    (found,) = refusals(Dear(), NET)
    assert found.startswith("dense convolutions move ") and found.endswith(" (a)")
    deep = NET.replace("return (%e, %c, %r)", "return (%e)")
    assert apply(OnCpu(), deep)[1].fired == 1


ALREADY = f"""
%x: f64[2, 3, 8, 8]{{192, 1, 24, 3}} = input
%w: f64[4, 3, 3, 3] = input  # static
%a: f64[2, 4, 8, 8]{{256, 1, 32, 4}} = {conv("x", "w")}
return (%a)
"""
DEPTHWISE = f"""
%x: f64[2, 4, 8, 8] = input
%w: f64[4, 1, 3, 3] = input  # static
%a: f64[2, 4, 8, 8] = {conv("x", "w", groups=4)}
return (%a)
"""


@pytest.mark.parametrize("text", [ALREADY, DEPTHWISE], ids=["channels-last already", "depthwise only"])
def test_nothing_to_do(text: str) -> None:
    assert refusals(OnCpu(), text) == []
    check_values(OnCpu(), text, fired=0)


def test_training_and_other_devices_are_left_alone() -> None:
    assert "clone" not in rewritten(OnCpu(), NET, "forward")
    check_values(ChannelsLast(), NET, fired=0)


def test_recipe() -> None:
    weight = torch.randn(4, 3, 3, 3)
    made = recipes.rebuild(["channels_last"], 1)([weight])
    assert torch.equal(made, weight) and made.is_contiguous(memory_format=torch.channels_last)
    with pytest.raises(ValueError):
        recipes.rebuild(["channels_last"], 2)
    with pytest.raises(ValueError):
        recipes.rebuild(["channels_last"], 1)([weight[0]])


EXAMPLES = f"""
%x: f64[2, 3, 8, 8] = input
%w: f64[4, 3, 3, 3] = input  # static
%r: f64[2, 5] = input
%e: f64[5, 108] = input  # static
%v: f64[2, 6, 3, 3] = input  # static
%m: f64[2, 108] = aten.mm(%r, %e)
%f: f64[12, 2, 3, 3] = aten.view(%m, [12, 2, 3, 3])
%a: f64[2, 4, 8, 8] = {conv("x", "w")}
%g: f64[1, 8, 8, 8] = aten.view(%a, [1, 8, 8, 8])
%b: f64[1, 12, 8, 8] = {conv("g", "f", groups=4)}
%h: f64[2, 6, 8, 8] = aten.view(%b, [2, 6, 8, 8])
%c: f64[2, 2, 8, 8] = {conv("h", "v")}
return (%c)
"""


def test_examples_with_filters_of_their_own_stay_contiguous() -> None:
    text = rewritten(OnCpu(), EXAMPLES)
    assert text.count("memory_format=torch.contiguous_format") == 2, "in front of them, and the result"
    assert "%b: f64[1, 12, 8, 8] = aten.convolution(%g, %f, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 4)" in text
    assert "aten.clone(%h, memory_format=torch.channels_last)" in text
    check_values(OnCpu(), EXAMPLES, fired=1, exact=False)
    alone = EXAMPLES[: EXAMPLES.index("%h")].replace(conv("x", "w"), "aten.cat([%x, %x1], 1)").replace(
        "%w: f64[4, 3, 3, 3] = input  # static", "%x1: f64[2, 1, 8, 8] = input") + "return (%b)\n"  # fmt: skip
    check_values(OnCpu(), alone, fired=0)
