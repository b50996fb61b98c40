"""Linear layers of a few rows: norm, gate and residual taken in, each refusal, what must stay apart."""

from __future__ import annotations

import pytest
import torch

from fusionc.graph.text import graph_text, parse
from fusionc.passes.skinny_linear import SkinnyLinear
from tests.passes.helpers import apply, call, check_values, inputs_for, refusals, rewritten

PASS = SkinnyLinear(rows=16, devices=("cpu",))
NORM = """%w32: f32[1, 1, 16] = aten._to_copy(%x, dtype=torch.float32)
%sq: f32[1, 1, 16] = aten.pow.Tensor_Scalar(%w32, 2)
%mean: f32[1, 1, 1] = aten.mean.dim(%sq, [-1], True)
%eps: f32[1, 1, 1] = aten.add(%mean, 1e-05)
%r: f32[1, 1, 1] = aten.rsqrt(%eps)
%h: f32[1, 1, 16] = aten.mul(%w32, %r)
%h16: bf16[1, 1, 16] = aten._to_copy(%h, dtype=torch.bfloat16)
%n: bf16[1, 1, 16] = aten.mul(%nw, %h16)
%n2: bf16[1, 16] = aten.view(%n, [1, 16])
"""
GATED = f"""
%x: bf16[1, 1, 16] = input
%nw: bf16[16] = input  # static
%w: bf16[32, 16] = input  # static
%d: bf16[16, 16] = input  # static
{NORM}%t: bf16[16, 32]{{1, 16}} = aten.t(%w)
%m: bf16[1, 32] = aten.mm(%n2, %t)
%g: bf16[1, 16]{{32, 1}} = aten.slice(%m, 1, 0, 16)
%u: bf16[1, 16]{{32, 1}} = aten.slice(%m, 1, 16, 32)
%g3: bf16[1, 1, 16]{{64, 32, 1}} = aten._unsafe_view(%g, [1, 1, 16])
%s: bf16[1, 1, 16] = aten.silu(%g3)
%u3: bf16[1, 1, 16]{{64, 32, 1}} = aten._unsafe_view(%u, [1, 1, 16])
%p: bf16[1, 1, 16] = aten.mul(%s, %u3)
%p2: bf16[1, 16] = aten.view(%p, [1, 16])
%td: bf16[16, 16]{{1, 16}} = aten.t(%d)
%m2: bf16[1, 16] = aten.mm(%p2, %td)
%m3: bf16[1, 1, 16] = aten._unsafe_view(%m2, [1, 1, 16])
%y: bf16[1, 1, 16] = aten.add(%x, %m3)
return (%y)
"""


def close(text: str, item: SkinnyLinear = PASS) -> None:
    """Same values but for the order of sums (bfloat16)."""
    same_values(apply(item, text)[0], text)


def same_values(new: torch.fx.GraphModule, text: str) -> None:
    old = parse(text)
    inputs = inputs_for(old)
    torch.testing.assert_close(call(new, inputs)[0], call(old, inputs)[0], rtol=2e-2, atol=2e-2)


def test_norm_gate_and_residual() -> None:
    assert rewritten(PASS, GATED) == """
%x: bf16[1, 1, 16] = input
%nw: bf16[16] = input  # static
%w: bf16[32, 16] = input  # static
%d: bf16[16, 16] = input  # static
%view: bf16[1, 16] = aten.view(%x, [1, 16])
%skinny_linear: bf16[1, 16] = fusionc.skinny_linear(%view, %w, %nw, 1e-05, True, None, "silu", None, False)
%view_1: bf16[1, 1, 16] = aten.view(%skinny_linear, [1, 1, 16])
%p2: bf16[1, 16] = aten.view(%view_1, [1, 16])
%view_2: bf16[1, 16] = aten.view(%x, [1, 16])
%skinny_linear_1: bf16[1, 16] = fusionc.skinny_linear(%p2, %d, None, 0.0, False, None, "", %view_2, True)
%view_3: bf16[1, 1, 16] = aten.view(%skinny_linear_1, [1, 1, 16])
return (%view_3)
"""
    check_values(PASS, GATED, fired=2)
    close(GATED.replace("aten.silu(%g3)", 'aten.gelu(%g3, approximate="tanh")'))


def test_weight_of_the_norm_in_float32() -> None:
    text = GATED.replace("%nw: bf16[16]", "%nw: f32[16]").replace(
        "%h16: bf16[1, 1, 16] = aten._to_copy(%h, dtype=torch.bfloat16)\n%n: bf16[1, 1, 16] = aten.mul(%nw, %h16)",
        "%h16: f32[1, 1, 16] = aten.mul(%h, %nw)\n%n: bf16[1, 1, 16] = aten._to_copy(%h16, dtype=torch.bfloat16)")
    assert "%nw, 1e-05, False" in rewritten(PASS, text)
    close(text)


def test_norm_of_several_rows_stays() -> None:
    text = GATED.replace("[1, 1, ", "[1, 2, ").replace("bf16[1, ", "bf16[2, ").replace("bf16[2, 2, ", "bf16[1, 2, ").replace(
        "[1, 16])", "[2, 16])")
    new = rewritten(PASS, text)
    assert "aten.rsqrt" in new and new.count("fusionc.skinny_linear(") == 2 and '"silu"' in new
    close(text)


def test_bias() -> None:
    text = """
%x: bf16[3, 16] = input
%b: bf16[8] = input  # static
%w: bf16[8, 16] = input  # static
%t: bf16[16, 8]{1, 16} = aten.t(%w)
%y: bf16[3, 8] = aten.addmm(%b, %x, %t)
return (%y)
"""
    assert "fusionc.skinny_linear(%x, %w, None, 0.0, False, %b" in rewritten(PASS, text)
    close(text)


def test_norm_with_another_reader_stays() -> None:
    text = GATED.replace("return (%y)", "return (%y, %n)")
    assert "%skinny_linear: bf16[1, 16] = fusionc.skinny_linear(%n2, %w, None" in rewritten(PASS, text)
    close(text)


def test_residual_with_another_reader_of_the_product_stays() -> None:
    text = GATED.replace("return (%y)", "return (%y, %m3)")
    assert "%y: bf16[1, 1, 16] = aten.add(%x, " in rewritten(PASS, text)
    close(text)


def test_gate_whose_product_is_read_elsewhere_stays() -> None:
    text = GATED.replace("return (%y)", "return (%y, %m)")
    assert "aten.silu" in rewritten(PASS, text)
    close(text)


PLAIN = """
%x: bf16[4, 16] = input
%w: bf16[8, 16] = input  # static
%t: bf16[16, 8]{1, 16} = aten.t(%w)
%y: bf16[4, 8] = aten.mm(%x, %t)
return (%y)
"""


@pytest.mark.parametrize(
    "text, reason",
    [
        (PLAIN.replace("[4, ", "[17, "), "it has more than 16 rows (y)"),
        (PLAIN.replace("bf16", "f32"), "it is neither bfloat16 nor float16 (y)"),
        (PLAIN.replace("  # static", ""), "its weight is not a parameter (y)"),
        (PLAIN.replace("%w: bf16[8, 16]", "%w: bf16[16, 8]").replace("{1, 16}", "").replace("aten.t(%w)", "aten.clone(%w)"),
         "its weight is computed in the graph (y)"),
        (PLAIN.replace("%w: bf16[8, 16]", "%w: bf16[8, 16]{1, 8}").replace("{1, 16}", "{8, 1}"),
         "its weight is not stored densely (y)"),
        (PLAIN.replace("%w: bf16[8, 16]", "%w: bf16[16, 8]").replace("%t: bf16[16, 8]{1, 16} = aten.t(%w)\n", "").replace(
            "%t", "%w"), "its rows are not multiples of 16 bytes (y)"),
        (PLAIN.replace("16", "12").replace("bf12", "bf16"), "its rows are not multiples of 16 bytes (y)"),
        (PLAIN.replace("return (%y)", "%v: bf16[8, 16] = aten.copy_(%w, %o)\nreturn (%y)").replace(
            "%w:", "%o: bf16[8, 16] = input\n%w:"), "its weight is not a parameter (y)"),
        (PLAIN.replace("%y: bf16[4, 8] = aten.mm(%x, %t)", "%y: bf16[4, 8] = aten.addmm(%b, %x, %t)").replace(
            "%w:", "%b: bf16[4, 8] = input\n%w:"), "its bias is not one vector of its width (y)"),
        (PLAIN.replace("%y: bf16[4, 8] = aten.mm(%x, %t)", "%y: bf16[4, 8] = aten.addmm(%b, %x, %t, alpha=2)").replace(
            "%w:", "%b: bf16[8] = input\n%w:"), "addmm scales its bias or product (y)"),
    ],
)  # fmt: skip
def test_refusals(text: str, reason: str) -> None:
    assert refusals(PASS, text) == [reason]


@pytest.mark.parametrize("rows, fires", [(16, True), (17, False)])
def test_more_rows_only_with_small_weights(rows: int, fires: bool) -> None:
    text = PLAIN.replace("[4, ", f"[{rows}, ").replace("16]", "4096]").replace("{1, 16}", "{1, 4096}").replace(
        "[8, 4096]", "[2048, 4096]").replace("[16, 8]{", "[4096, 2048]{").replace(f"[{rows}, 8]", f"[{rows}, 2048]")
    found = refusals(SkinnyLinear(devices=("cpu",)), text)
    assert found == ([] if fires else ["its weight is large and it has more than 16 rows (y)"])


@pytest.mark.parametrize("rows, width, fires", [(128, 2057, True), (129, 2057, False), (17, 2056, False)])
def test_more_rows_with_a_large_weight_of_odd_width(rows: int, width: int, fires: bool) -> None:
    text = PLAIN.replace("[4, ", f"[{rows}, ").replace("16]", "2048]").replace("{1, 16}", "{1, 2048}").replace(
        "[8, 2048]", f"[{width}, 2048]").replace("[16, 8]{", f"[2048, {width}]{{").replace(f"[{rows}, 8]", f"[{rows}, {width}]")
    assert (refusals(SkinnyLinear(devices=("cpu",)), text) == []) is fires


def test_refuses_training() -> None:
    assert refusals(PASS, PLAIN, stage="forward") == ["training keeps what lies between (y)"]


def test_refuses_a_write_between() -> None:
    text = """
%x: bf16[4, 16] = input
%w: bf16[8, 16] = input  # static
%r: bf16[4, 8] = input
%t: bf16[16, 8]{1, 16} = aten.t(%w)
%y: bf16[4, 8] = aten.mm(%x, %t)
%c: bf16[4, 16] = aten.copy_(%x, %x)
%z: bf16[4, 8] = aten.add(%r, %y)
return (%z)
"""
    assert refusals(PASS, text) == ["memory is written between the product and what follows it (y)"]


def test_other_devices_are_left_alone() -> None:
    assert apply(SkinnyLinear(), PLAIN)[1].fired == 0


GPT2 = """
%x: bf16[1, 2, 16] = input
%g: bf16[16] = input  # static
%s: bf16[16] = input  # static
%w: bf16[16, 32] = input  # static
%b: bf16[32] = input  # static
%w2: bf16[32, 16] = input  # static
%b2: bf16[16] = input  # static
%ln: (bf16[1, 2, 16], bf16[1, 2, 1], bf16[1, 2, 1]) = aten.native_layer_norm(%x, [16], %g, %s, 1e-05)
%n: bf16[1, 2, 16] = getitem(%ln, 0)
%n2: bf16[2, 16] = aten.view(%n, [-1, 16])
%m: bf16[2, 32] = aten.addmm(%b, %n2, %w)
%v: bf16[1, 2, 32] = aten.view(%m, [1, 2, 32])
%half: bf16[1, 2, 32] = aten.mul(%v, 0.5)
%cube: bf16[1, 2, 32] = aten.pow.Tensor_Scalar(%v, 3.0)
%c1: bf16[1, 2, 32] = aten.mul(%cube, 0.044715)
%c2: bf16[1, 2, 32] = aten.add(%v, %c1)
%c3: bf16[1, 2, 32] = aten.mul(%c2, 0.7978845608028654)
%c4: bf16[1, 2, 32] = aten.tanh(%c3)
%c5: bf16[1, 2, 32] = aten.add(%c4, 1.0)
%a: bf16[1, 2, 32] = aten.mul(%half, %c5)
%a2: bf16[2, 32] = aten.view(%a, [-1, 32])
%m2: bf16[2, 16] = aten.addmm(%b2, %a2, %w2)
%m3: bf16[1, 2, 16] = aten.view(%m2, [1, 2, 16])
%y: bf16[1, 2, 16] = aten.add(%x, %m3)
return (%y)
"""


def test_bias_activation_residual_and_weights_stored_by_columns() -> None:
    text = rewritten(PASS, GPT2)
    assert text[text.index("%n2"):] == """%n2: bf16[2, 16] = aten.view(%n, [-1, 16])
%skinny_linear: bf16[2, 32] = fusionc.skinny_linear(%n2, %w, None, 0.0, False, %b, "gelu_tanh", None, False, None, False, True)
%view: bf16[1, 2, 32] = aten.view(%skinny_linear, [1, 2, 32])
%a2: bf16[2, 32] = aten.view(%view, [-1, 32])
%view_1: bf16[2, 16] = aten.view(%x, [2, 16])
%skinny_linear_1: bf16[2, 16] = fusionc.skinny_linear(%a2, %w2, None, 0.0, False, %b2, "", %view_1, True, None, True, True)
%view_2: bf16[1, 2, 16] = aten.view(%skinny_linear_1, [1, 2, 16])
return (%view_2)
"""
    close(GPT2)


@pytest.mark.parametrize(
    "old, new",
    [
        ("aten.mul(%cube, 0.044715)", "aten.mul(%cube, 0.05)"),
        ("aten.pow.Tensor_Scalar(%v, 3.0)", "aten.pow.Tensor_Scalar(%v, 2.0)"),
        ("aten.add(%v, %c1)", "aten.add(%v, %c1, alpha=2)"),
        ("aten.add(%v, %c1)", "aten.add(%half, %c1)"),
        ("aten.tanh(%c3)", "aten.sigmoid(%c3)"),
        ("aten.mul(%half, %c5)", "aten.mul(%v, %c5)"),
        ("return (%y)", "return (%y, %c4)"),
        ("return (%y)", "return (%y, %m)"),
    ],
)
def test_what_is_not_quite_gelu_stays(old: str, new: str) -> None:
    text = GPT2.replace(old, new)
    assert text != GPT2 and "gelu" not in rewritten(PASS, text)
    close(text)


@pytest.mark.parametrize("word", ["aten.relu(%v)", "aten.silu(%v)", "aten.gelu(%v)", 'aten.gelu(%v, approximate="tanh")'])
def test_other_activations(word: str) -> None:
    head, rest = GPT2.split("%half:")
    text = head + f"%a: bf16[1, 2, 32] = {word}\n" + rest[rest.index("%a2:"):]
    assert rewritten(PASS, text).count("aten.") == 6  # the norm and views
    close(text)


SIBLINGS = """
%x: bf16[1, 16] = input
%w1: bf16[8, 16] = input  # static
%w2: bf16[16, 16] = input  # static
%w3: bf16[8, 16] = input  # static
%t1: bf16[16, 8]{1, 16} = aten.t(%w1)
%y1: bf16[1, 8] = aten.mm(%x, %t1)
%t2: bf16[16, 16]{1, 16} = aten.transpose.int(%w2, 0, 1)
%y2: bf16[1, 16] = aten.mm(%x, %t2)
%t3: bf16[16, 8]{1, 16} = aten.permute(%w3, [1, 0])
%y3: bf16[1, 8] = aten.mm(%x, %t3)
%a: bf16[1, 8] = aten.sin(%y1)
%b: bf16[1, 16] = aten.sin(%y2)
%c: bf16[1, 8] = aten.sin(%y3)
return (%a, %b, %c)
"""


def _after_merging(text: str) -> torch.fx.GraphModule:
    from fusionc.passes.horizontal_matmul import HorizontalMatmul
    from fusionc.passes.manager import run

    gm = parse(text)
    static = tuple(k for k, n in enumerate(gm.graph.find_nodes(op="placeholder")) if n.name != "x")
    new, records = run([(1, HorizontalMatmul()), (2, PASS)], gm, "graph", None, static=static)
    assert [record.fired for record in records] == [1, 1]
    return new


def test_sibling_weights_are_read_where_they_are() -> None:
    new = _after_merging(SIBLINGS)
    text = graph_text(new)
    assert "fusionc.skinny_linear(%x, %w1, None, 0.0, False, None, \"\", None, False, [%w2, %w3])" in text
    assert "derived" not in text and not new.meta["fusionc_derived"]
    same_values(new, SIBLINGS)


def test_siblings_are_read_where_they_are_without_what_follows_a_write() -> None:
    text = """
%x: bf16[1, 16] = input
%w1: bf16[8, 16] = input  # static
%w2: bf16[8, 16] = input  # static
%t1: bf16[16, 8]{1, 16} = aten.t(%w1)
%y1: bf16[1, 8] = aten.mm(%x, %t1)
%t2: bf16[16, 8]{1, 16} = aten.t(%w2)
%y2: bf16[1, 8] = aten.mm(%x, %t2)
%s: bf16[1, 8] = aten.silu(%y1)
%c: bf16[1, 16] = aten.copy_(%x, %x)
%z: bf16[1, 8] = aten.mul(%s, %y2)
return (%z)
"""
    new = _after_merging(text)
    shown = graph_text(new)
    assert "fusionc.skinny_linear(%x, %w1, None, 0.0, False, None, \"\", None, False, [%w2])" in shown and "aten.silu" in shown
    assert not new.meta["fusionc_derived"] and shown.index("skinny_linear") < shown.index("copy_")
    same_values(new, text)


MANY = """
%x: bf16[20, 16] = input
%w1: bf16[64, 16] = input  # static
%w2: bf16[128, 16] = input  # static
%t1: bf16[16, 64]{1, 16} = aten.t(%w1)
%y1: bf16[20, 64] = aten.mm(%x, %t1)
%t2: bf16[16, 128]{1, 16} = aten.t(%w2)
%y2: bf16[20, 128] = aten.mm(%x, %t2)
%a: bf16[20, 64] = aten.relu(%y1)
%b: bf16[20, 128] = aten.sin(%y2)
return (%a, %b)
"""


def test_siblings_of_many_rows_are_read_where_they_are() -> None:
    new = _after_merging(MANY)
    text = graph_text(new)  # the pass takes 16 rows of other weights
    assert "fusionc.skinny_linear(%x, %w1, None, 0.0, False, None, \"\", None, False, [%w2])" in text and "aten.relu" in text
    assert not new.meta["fusionc_derived"]
    same_values(new, MANY)


def test_siblings_of_many_rows_that_cannot_be_read_apart_keep_the_copy() -> None:
    from fusionc.passes.horizontal_matmul import HorizontalMatmul
    from fusionc.passes.manager import run

    text = MANY.replace("64", "72").replace("128", "56")
    new, records = run([(1, HorizontalMatmul()), (2, PASS)], parse(text), "graph", None, static=(1, 2))
    assert [record.fired for record in records] == [1, 0] and len(new.meta["fusionc_derived"]) == 1
    assert [str(refusal.reason) for refusal in records[1].refusals] == ["it has more than 16 rows"]


@pytest.mark.parametrize(
    "why, text",
    [
        ("a height that is no multiple of 8", SIBLINGS.replace("%w1: bf16[8,", "%w1: bf16[12,").replace(
            "%t1: bf16[16, 8]", "%t1: bf16[16, 12]").replace("%y1: bf16[1, 8]", "%y1: bf16[1, 12]").replace(
            "%a: bf16[1, 8]", "%a: bf16[1, 12]")),
        ("a cast", SIBLINGS.replace("%t1: bf16[16, 8]{1, 16} = aten.t(%w1)",
         "%u1: bf16[8, 16] = aten._to_copy(%w1, dtype=torch.bfloat16)\n%t1: bf16[16, 8]{1, 16} = aten.t(%u1)")),
    ],
)
def test_siblings_that_cannot_be_read_apart_keep_the_copy(why: str, text: str) -> None:
    new = _after_merging(text)
    assert len(new.meta["fusionc_derived"]) == 1 and "fusionc.skinny_linear(%x, %derived_0, " in graph_text(new), why


def test_inputs_added_later_have_names_of_their_own() -> None:
    from fusionc.graph import edit

    gm = parse(SIBLINGS)
    like = torch.empty(2)
    made = [edit.add_derived(gm, [1], lambda found: found[0], like) for _ in range(3)]
    edit.drop_derived(gm, made[1])
    last = edit.add_derived(gm, [1], lambda found: found[0], like)
    assert [each.name for each in gm.meta["fusionc_derived"]] == ["derived_0", "derived_2", "derived_3"]
    assert last.name == "derived_3"
    edit.drop_derived(gm, gm.graph.find_nodes(op="placeholder")[0])
    assert len(gm.graph.find_nodes(op="placeholder")) == 7
    for node in (made[0], made[2], last):
        edit.drop_derived(gm, node)
    more = [edit.add_derived(gm, [1], lambda found: found[0], like) for _ in range(2)]  # all had gone
    assert [each.name for each in gm.meta["fusionc_derived"]] == [node.name for node in more] == [n.target for n in more]
    assert edit.derived(gm, more[0]) is gm.meta["fusionc_derived"][0]
