"""Sibling matmuls: rewrites of q/k/v and gate/up, each refusal, odd views, random graphs."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusionc.graph.text import parse, show
from fusionc.passes.horizontal_matmul import HorizontalMatmul, view_strides
from tests.passes.helpers import apply, call, check_values, refusals, rewritten

PASS = HorizontalMatmul()
QKV = """
%x: f64[6, 8] = input
%wq: f64[8, 8] = input  # static
%wk: f64[4, 8] = input  # static
%wv: f64[4, 8] = input  # static
%tq: f64[8, 8]{1, 8} = aten.t(%wq)
%q: f64[6, 8] = aten.mm(%x, %tq)
%vq: f64[2, 3, 2, 4] = aten.view(%q, [2, 3, 2, 4])
%pq: f64[2, 2, 3, 4]{24, 4, 8, 1} = aten.transpose.int(%vq, 1, 2)
%tk: f64[8, 4]{1, 8} = aten.t(%wk)
%k: f64[6, 4] = aten.mm(%x, %tk)
%vk: f64[2, 3, 1, 4] = aten._unsafe_view(%k, [2, 3, 1, 4])
%tv: f64[8, 4]{1, 8} = aten.t(%wv)
%v: f64[6, 4] = aten.mm(%x, %tv)
%s: f64[6, 4] = aten.sin(%v)
%sq: f64[2, 2, 3, 4]{24, 4, 8, 1} = aten.sin(%pq)
%sk: f64[2, 3, 1, 4] = aten.sin(%vk)
return (%sq, %sk, %s)
"""


def test_qkv_of_unequal_widths() -> None:
    assert rewritten(PASS, QKV) == """
%x: f64[6, 8] = input
%wq: f64[8, 8] = input  # static
%wk: f64[4, 8] = input  # static
%wv: f64[4, 8] = input  # static
%derived_0: f64[16, 8] = input
%t: f64[8, 16]{1, 8} = aten.t(%derived_0)
%mm: f64[6, 16] = aten.mm(%x, %t)
%slice_1: f64[6, 8]{16, 1} = aten.slice(%mm, 1, 0, 8)
%slice_2: f64[6, 4]{16, 1} = aten.slice(%mm, 1, 8, 12)
%slice_3: f64[6, 4]{16, 1} = aten.slice(%mm, 1, 12, 16)
%vq: f64[2, 3, 2, 4]{48, 16, 4, 1} = aten.view(%slice_1, [2, 3, 2, 4])
%pq: f64[2, 2, 3, 4]{48, 4, 16, 1} = aten.transpose.int(%vq, 1, 2)
%vk: f64[2, 3, 1, 4]{48, 16, 4, 1} = aten._unsafe_view(%slice_2, [2, 3, 1, 4])
%s: f64[6, 4] = aten.sin(%slice_3)
%sq: f64[2, 2, 3, 4]{24, 4, 8, 1} = aten.sin(%pq)
%sk: f64[2, 3, 1, 4] = aten.sin(%vk)
return (%sq, %sk, %s)
"""
    check_values(PASS, QKV, fired=1, exact=False)


def test_biases_and_untransposed_weights() -> None:
    new = check_values(PASS, """
%x: f64[6, 8] = input
%w1: f64[8, 5] = input  # static
%w2: f64[8, 3] = input  # static
%b1: f64[5] = input  # static
%b2: f64[3] = input  # static
%a: f64[6, 5] = aten.addmm(%b1, %x, %w1)
%b: f64[6, 3] = aten.addmm(%b2, %x, %w2)
%c: f64[6, 5] = aten.neg(%a)
%d: f64[6, 3] = aten.neg(%b)
return (%c, %d)
""", fired=1, exact=False)
    assert "%addmm: f64[6, 8] = aten.addmm(%derived_1, %x, %derived_0)" in show(new)


def test_casts_of_autocast_join_the_derivation() -> None:
    new = check_values(PASS, """
%x: f32[6, 8] = input
%w1: f64[5, 8] = input  # static
%w2: f64[3, 8] = input  # static
%c1: f32[5, 8] = aten._to_copy(%w1, dtype=torch.float32)
%c2: f32[3, 8] = aten._to_copy(%w2, dtype=torch.float32)
%t1: f32[8, 5]{1, 8} = aten.t(%c1)
%t2: f32[8, 3]{1, 8} = aten.t(%c2)
%a: f32[6, 5] = aten.mm(%x, %t1)
%b: f32[6, 3] = aten.mm(%x, %t2)
%c: f32[6, 5] = aten.sign(%a)
%d: f32[6, 3] = aten.sign(%b)
return (%c, %d)
""", fired=1)
    assert "%derived_0: f32[8, 8] = input" in show(new)


def pair(one: str = "", two: str = "", tail: str = "", inputs: str = "", result: str = "%c, %d") -> str:
    one = one or "aten.mm(%x, %w1)"
    two = two or "aten.mm(%x, %w2)"
    return f"""
%x: f64[6, 8] = input
%w1: f64[8, 5] = input  # static
%w2: f64[8, 4] = input  # static
{inputs}%a: f64[6, 5] = {one}
%b: f64[6, 4] = {two}
{tail or '%c: f64[6, 5] = aten.neg(%a)' + chr(10) + '%d: f64[6, 4] = aten.neg(%b)'}
return ({result})
"""


REFUSED = {
    "some siblings have a bias and some have none": pair(
        "aten.addmm(%b1, %x, %w1)", inputs="%b1: f64[5] = input  # static\n"),
    "its weight is computed in the graph": pair(
        two="aten.mm(%x, %w3)", inputs="%w3: f64[8, 4] = aten.neg(%w2)\n"),
    "its weight is not a parameter": pair(two="aten.mm(%x, %y)", inputs="%y: f64[8, 4] = input\n"),
    "its weight is written by the graph": pair(
        tail="%c: f64[6, 5] = aten.neg(%a)\n%d: f64[6, 4] = aten.neg(%b)\n%w: f64[8, 4] = aten.mul_.Tensor(%w2, 2)"),
    "addmm scales its bias or product": pair(
        "aten.addmm(%b1, %x, %w1, beta=2)", "aten.addmm(%b2, %x, %w2)",
        inputs="%b1: f64[5] = input  # static\n%b2: f64[4] = input  # static\n"),
    "its bias is not a constant parameter": pair(
        "aten.addmm(%b1, %x, %w1)", "aten.addmm(%b2, %x, %w2)",
        inputs="%b1: f64[5] = input\n%b2: f64[4] = input  # static\n"),
    "its bias is not one vector of its width": pair(
        "aten.addmm(%b1, %x, %w1)", "aten.addmm(%b2, %x, %w2)",
        inputs="%b1: f64[1] = input  # static\n%b2: f64[4] = input  # static\n"),
    "two siblings use one weight": pair(tail="%c: f64[6, 5] = aten.neg(%a)\n%d: f64[6, 4] = aten.neg(%b)").replace(
        "%b: f64[6, 4] = aten.mm(%x, %w2)", "%b: f64[6, 5] = aten.mm(%x, %w1)").replace("%d: f64[6, 4]", "%d: f64[6, 5]"),
    "its result leaves the graph": pair(result="%c, %d, %b"),
    "a view of its result needs contiguous memory": pair(
        tail="%c: f64[6, 5] = aten.neg(%a)\n%v: f64[24] = aten.view(%b, [24])\n%d: f64[24] = aten.neg(%v)"),
    "a reader gives another layout for strided input": pair(
        tail="%c: f64[6, 5] = aten.neg(%a)\n%d: f64[6, 4] = aten.as_strided_copy(%b, [6, 4], [4, 1])\n"
             "%e: f64[6, 4] = aten.neg(%d)",
        result="%c, %e"),
    "a reader is a view of another kind": pair(
        tail="%c: f64[6, 5] = aten.neg(%a)\n%p: (f64[6, 2]{4, 1}, f64[6, 2]{4, 1}) = aten.split.Tensor(%b, 2, 1)\n"
             "%g: f64[6, 2]{4, 1} = getitem(%p, 0)\n%d: f64[6, 2] = aten.neg(%g)"),
    "memory is written between the siblings": pair(
        inputs="%z: f64[2] = input\n", two="aten.mm(%x, %w2)").replace(
        "%b: f64[6, 4]", "%w: f64[2] = aten.mul_.Tensor(%z, 2)\n%b: f64[6, 4]"),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refusals(reason: str) -> None:
    _, record = apply(PASS, REFUSED[reason])
    found = {each.reason for each in record.refusals}
    assert record.fired == 0 and reason in found
    check_values(PASS, REFUSED[reason], fired=0)


def test_refuses_in_training() -> None:
    assert refusals(PASS, pair(), stage="forward") == ["weights change every step in training (a)"]
    assert refusals(PASS, pair(), stage="backward") == ["weights change every step in training (a)"]


def test_refuses_many_rows_on_a_cpu() -> None:
    many = pair().replace("[6, 8]", "[33, 8]").replace("[6, 5]", "[33, 5]").replace("[6, 4]", "[33, 4]")
    assert refusals(PASS, many) == ["on a CPU a wider product of many rows is no faster (a)"]
    assert apply(PASS, many.replace("[33, ", "[32, "))[1].fired == 1


@pytest.mark.parametrize("rows, inner, width, kind, busy", [
    (8192, 64, 512, torch.bfloat16, True),  # 64 x 2 tiles fill a wave of 132
    (8192, 64, 640, torch.bfloat16, False),  # 64 x 3 do not fill two
    (8192, 64, 1024, torch.bfloat16, True),  # 64 x 4
    (8192, 64, 1280, torch.bfloat16, True),  # 64 x 5
    (4096, 768, 768, torch.bfloat16, True),  # 32 x 4 tiles of 192 columns
    (2048, 768, 768, torch.bfloat16, False),
    (4096, 768, 800, torch.bfloat16, False),
    (17, 4096, 4096, torch.bfloat16, True),  # 32 MiB of weight
    (17, 4096, 4000, torch.bfloat16, False),
    (1, 4096, 14336, torch.bfloat16, True),
    (1, 4096, 14336, torch.float32, True),
])
def test_products_that_keep_a_gpu_busy_stay_apart(rows: int, inner: int, width: int, kind: torch.dtype, busy: bool) -> None:
    from torch._subclasses import FakeTensorMode

    from fusionc.passes.horizontal_matmul import _busy

    graph = torch.fx.Graph()
    x, w = graph.placeholder("x"), graph.placeholder("w")
    y = graph.call_function(torch.ops.aten.mm.default, (x, w))
    with FakeTensorMode(allow_non_fake_inputs=True):
        for node, sizes in ((x, (rows, inner)), (w, (inner, width)), (y, (rows, width))):
            node.meta["val"] = torch.empty(sizes, dtype=kind, device="cuda")
    assert _busy(y) is busy


@pytest.mark.parametrize("count, kind, where, groups", [
    (2, torch.bfloat16, "cuda", [2]), (3, torch.bfloat16, "cuda", [3]), (4, torch.float16, "cuda", [2, 2]),
    (7, torch.bfloat16, "cuda", [2, 2, 3]), (7, torch.float32, "cuda", [7]), (7, torch.bfloat16, "cpu", [7]),
])
def test_groups_of_as_many_siblings_as_a_kernel_reads_apart(count: int, kind: torch.dtype, where: str, groups: list[int]) -> None:
    from torch._subclasses import FakeTensorMode

    from fusionc.passes.horizontal_matmul import _together

    graph = torch.fx.Graph()
    x, w = graph.placeholder("x"), graph.placeholder("w")
    members = [graph.call_function(torch.ops.aten.mm.default, (x, w)) for _ in range(count)]
    with FakeTensorMode():
        for node in members:
            node.meta["val"] = torch.empty(4, 4, dtype=kind, device=where)
    found = _together(members)
    assert [len(each) for each in found] == groups and [node for each in found for node in each] == members


def test_refuses_other_dtypes() -> None:
    # not two matmuls of one input in practice, but the check must not depend on that
    from fusionc.passes.horizontal_matmul import Sibling, Weight, _fits

    gm = parse("""
%x: f64[6, 8] = input
%w1: f64[8, 5] = input  # static
%w2: f32[8, 4] = input  # static
%a: f64[6, 5] = aten.mm(%x, %w1)
%b: f32[6, 4] = aten.mm(%x, %w2)
return (%a, %b)
""")
    nodes = {node.name: node for node in gm.graph.nodes}
    refusal = _fits(Sibling(nodes["a"], Weight(nodes["w1"]), None), Sibling(nodes["b"], Weight(nodes["w2"]), None))
    assert refusal is not None and refusal.reason == "its dtype or device differs from its siblings'"


def test_the_others_merge_without_the_refused_one() -> None:
    text = QKV.replace("return (%sq, %sk, %s)", "return (%sq, %sk, %s, %v)")
    new, record = apply(PASS, text)
    assert record.fired == 1 and [d.sources for d in new.meta["fusionc_derived"]] == [(1, 2)]
    check_values(PASS, text, fired=1, exact=False)


def test_symbolic_rows() -> None:
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    w = [torch.nn.Parameter(torch.randn(8, 8)), torch.nn.Parameter(torch.randn(4, 8))]

    def f(x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q = (x.view(-1, 8) @ w1.t()).view(x.shape[0], x.shape[1], 2, 4).transpose(1, 2)
        return q.sin(), (x.view(-1, 8) @ w2.t()).view(x.shape[0], x.shape[1], 4).cos()

    from torch.fx.experimental.proxy_tensor import make_fx

    from fusionc.passes.cse import CommonSubexpressions
    from fusionc.passes.manager import run

    env = ShapeEnv()
    mode = FakeTensorMode(shape_env=env)
    context = StatelessSymbolicContext([DimDynamic.DYNAMIC, DimDynamic.DYNAMIC, DimDynamic.STATIC])
    fakes = [mode.from_tensor(torch.randn(2, 3, 8), symbolic_context=context),
             *[mode.from_tensor(each, static_shapes=True) for each in w]]
    with mode:
        gm = make_fx(f)(*fakes)
    guards = len(env.guards)
    gm, records = run([(1, CommonSubexpressions()), (2, HorizontalMatmul())], gm, "graph", None, static=(1, 2))
    assert records[1].fired == 1, records
    assert len(env.guards) == guards
    for sizes in ((2, 3), (5, 4)):
        x = torch.randn(*sizes, 8)
        with torch.no_grad():
            got, _ = call(gm, [x, *w])
            torch.testing.assert_close(tuple(got), f(x, *w))


@pytest.mark.parametrize(("sizes", "strides", "wanted"), [
    ((6, 8), (16, 1), (2, 3, 8)), ((6, 8), (16, 1), (6, 2, 4)), ((6, 8), (16, 1), (2, 3, 2, 4)), ((1, 8), (16, 1), (8,)),
    ((6, 8), (16, 1), (48,)), ((6, 8), (16, 1), (3, 16)), ((1, 8), (16, 1), (1, 1, 8)), ((6, 1), (16, 1), (6,)),
    ((2, 3, 8), (48, 16, 1), (6, 8)), ((2, 3, 8), (48, 16, 1), (6, 1, 8)), ((4, 6), (1, 4), (24,)), ((), (), (1, 1)),
    ((1,), (5,), ()), ((4, 1, 6), (12, 7, 1), (4, 6)), ((6, 8), (16, 1), (4, 12)),
])
def test_view_strides_agree_with_torch(sizes: tuple[int, ...], strides: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    base = torch.empty_strided(sizes, strides, device="meta")
    found = view_strides(sizes, strides, wanted)
    try:
        made = base.view(wanted)
    except RuntimeError:
        assert found is None
        return
    assert found is not None
    assert [s for s, n in zip(found, wanted) if n != 1] == [s for s, n in zip(made.stride(), wanted) if n != 1]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_view_strides_random(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.sampled_from([1, 2, 3, 4]), min_size=1, max_size=4))
    steps, reach = [], 1
    for size in reversed(sizes):
        steps.append(reach * data.draw(st.sampled_from([1, 1, 2])))
        reach = steps[-1] * size
    count = torch.Size(sizes).numel()
    wanted = []
    while count > 1:
        part = data.draw(st.sampled_from([d for d in range(1, count + 1) if count % d == 0]))
        wanted.append(part)
        count //= part
        if len(wanted) > 5:
            wanted.append(count)
            break
    test_view_strides_agree_with_torch(tuple(sizes), tuple(reversed(steps)), tuple(wanted))


READERS = ["neg(%N)", "view(%N, [2, 3, W])", "t(%N)", "slice(%N, 1, 1, 3)", "unsqueeze(%N, 1)", "select.int(%N, 0, 2)",
           "expand(%N, [2, 6, W])", "sum(%N)", "clone(%N)", "_softmax(%N, 1, False)", "view(%N, [V])", "select.int(%N, 1, -1)"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([2, 4, 5]), st.booleans(), st.booleans(), st.sampled_from(READERS),
                          st.sampled_from(["neg", "view", "clone"])), min_size=1, max_size=4), st.booleans(), st.booleans())
def test_random_neighbourhood(members: list[tuple[int, bool, bool, str, str]], bias: bool, leaves: bool) -> None:
    inputs, body, results = ["%x: f64[6, 8] = input"], [], []
    for n, (width, transposed, static, reader, after) in enumerate(members):
        note = "  # static" if static else ""
        inputs.append(f"%w{n}: f64[{f'{width}, 8' if transposed else f'8, {width}'}] = input{note}")
        if bias:
            inputs.append(f"%b{n}: f64[{width}] = input  # static")
        if transposed:
            body.append(f"%t{n}: f64[8, {width}]{{1, 8}} = aten.t(%w{n})")
        operand = f"%{'t' if transposed else 'w'}{n}"
        body.append(f"%m{n}: f64[6, {width}] = aten." + (f"addmm(%b{n}, %x, {operand})" if bias else f"mm(%x, {operand})"))
        text = reader.replace("%N", f"%m{n}").replace("W", str(width)).replace("V", str(6 * width))
        body.append(f"%r{n} = aten.{text}")
        if after == "view":
            body.append(f"%s{n} = aten.unsqueeze(%r{n}, 0)")
        body.append(f"%u{n} = aten.{'clone' if after == 'clone' else 'neg'}(%{'s' if after == 'view' else 'r'}{n})")
        results.append(f"%u{n}")
    if leaves:
        results.append("%m0")
    text = "\n".join([*inputs, *body, f"return ({', '.join(results)},)"])
    gm = parse(text)
    _fill(gm)
    check_values(PASS, show(gm, gm.meta["fusionc_static"]), exact=False)


def _fill(gm: torch.fx.GraphModule) -> None:
    """Values of the nodes written without a type."""
    from fusionc.graph import edit

    for node in gm.graph.nodes:
        if node.op == "call_function" and "val" not in node.meta:
            node.meta["val"] = edit.compute_value(node.target, node.args, node.kwargs)


def _large(rows: int, widths: tuple[int, ...], inner: int = 4096, turned: bool = False, cast: bool = False,
           step: int | None = None) -> str:  # fmt: skip
    lines, results = [], []
    kind = "f32" if cast else "bf16"
    for i, n in enumerate(widths):
        lines.append(f"%w{i}: {kind}[{f'{inner}, {n}' if turned else f'{n}, {inner}'}] = input  # static")
    lines.insert(0, f"%x: bf16[{rows}, {inner}]{f'{{{step}, 1}}' if step else ''} = input")
    for i, n in enumerate(widths):
        name = f"%w{i}"
        if cast:
            name = f"%c{i}"
            lines.append(f"{name}: bf16[{n}, {inner}] = aten._to_copy(%w{i}, dtype=torch.bfloat16)")
        if not turned:
            lines.append(f"%t{i}: bf16[{inner}, {n}]{{1, {inner}}} = aten.t({name})")
        lines.append(f"%y{i}: bf16[{rows}, {n}] = aten.mm(%x, {f'%w{i}' if turned else f'%t{i}'})")
        lines.append(f"%s{i}: bf16[{rows}, {n}] = aten.sin(%y{i})")
        results.append(f"%s{i}")
    return "\n" + "\n".join(lines) + f"\nreturn ({', '.join(results)})\n"


@pytest.mark.parametrize("why, text, apart, merged, copied", [
    ("read where they are", _large(16, (14336, 14336)), True, 2, 0),
    ("one row", _large(1, (14336, 14336, 8)), True, 3, 0),
    ("skinny_linear is disabled", _large(16, (14336, 14336)), False, 0, 0),
    ("stored the other way", _large(16, (14336, 14336), turned=True), True, 0, 0),
    ("stored the other way, one row", _large(1, (14336, 14336), turned=True), True, 0, 0),
    ("more rows", _large(17, (14336, 14336)), True, 0, 0),
    ("a router beside them", _large(16, (14336, 14336, 8)), True, 2, 0),
    ("a router beside one", _large(16, (14336, 8)), True, 0, 0),
    ("a gate of one column beside one", _large(1, (14336, 1)), True, 0, 0),
    ("columns that no kernel takes", _large(16, (14340, 14340)), True, 0, 0),
    ("rows of x that are not aligned", _large(16, (14336, 14336), step=4100), True, 0, 0),
    ("cast, one row: less than casting them", _large(1, (14336, 14336), cast=True), True, 2, 1),
    ("cast", _large(16, (14336, 14336), cast=True), True, 0, 0),
    ("small ones of any kind", _large(16, (512, 512), inner=512, turned=True), True, 2, 1),
])  # fmt: skip
def test_large_weights_are_merged_only_to_be_read_where_they_are(
    why: str, text: str, apart: bool, merged: int, copied: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fusionc.passes import horizontal_matmul, skinny_linear
    from fusionc.passes.manager import run
    from fusionc.passes.skinny_linear import SkinnyLinear

    monkeypatch.setattr(horizontal_matmul, "device", lambda _: torch.device("cuda", 0))
    monkeypatch.setattr(skinny_linear, "served", lambda *_: True)
    gm = parse(text)
    static = tuple(k for k, n in enumerate(gm.graph.find_nodes(op="placeholder")) if n.name != "x")
    passes = [(1, HorizontalMatmul(apart=apart)), (2, SkinnyLinear(rows=16, devices=("cpu",)))]
    new, (record, _) = run(passes, gm, "graph", None, static=static)
    assert record.fired == (merged > 0), record.refusals
    products = [n for n in new.graph.nodes if n.target in (torch.ops.aten.mm.default, torch.ops.fusionc.skinny_linear.default)]
    assert len(products) == len(static) - max(0, merged - 1)
    assert len(new.meta.get("fusionc_derived") or ()) == copied


def test_without_skinny_linear_nothing_large_is_merged() -> None:
    from fusionc.passes import pipeline

    def made(**options: Any) -> bool:
        (found,) = [item for _, item in pipeline("graph", types.SimpleNamespace(**options)) if item.name == PASS.name]
        return found.apart  # type: ignore[attr-defined, no-any-return]

    assert made() and made(disable=("cse",)) and not made(disable=("skinny_linear",))
