"""Writing into inputs: rewrites, each refusal, and random graphs against the functional form."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusionc.graph.text import parse
from fusionc.passes.reinplace import Reinplace
from tests.passes.helpers import apply, check_values, refusals, rewritten

CACHE = """
%cache: f64[1, 2, 8, 4] = input
%pos: i64[1] = input
%k: f64[1, 2, 1, 4] = input
%new: f64[1, 2, 8, 4] = aten.index_copy(%cache, 2, %pos, %k)
%u: f64[1, 2, 8, 4] = aten.mul(%new, 2)
%w: f64[1, 2, 8, 4] = aten.copy_(%cache, %new)
return (%u)
"""


def test_static_cache() -> None:
    assert rewritten(Reinplace(), CACHE) == """
%cache: f64[1, 2, 8, 4] = input
%pos: i64[1] = input
%k: f64[1, 2, 1, 4] = input
%index_copy_: f64[1, 2, 8, 4] = aten.index_copy_(%cache, 2, %pos, %k)
%u: f64[1, 2, 8, 4] = aten.mul(%index_copy_, 2)
return (%u)
"""
    check_values(Reinplace(), CACHE, fired=1)


def test_region() -> None:
    text = """
%x: f64[6, 4] = input
%a: f64[2, 4] = aten.slice(%x, 0, 1, 3)
%b: f64[2, 4] = aten.add(%a, 1)
%c: f64[6, 4] = aten.slice_scatter(%x, %b, 0, 1, 3)
%w: f64[6, 4] = aten.copy_(%x, %c)
return ()
"""
    assert rewritten(Reinplace(), text) == """
%x: f64[6, 4] = input
%a: f64[2, 4] = aten.slice(%x, 0, 1, 3)
%b: f64[2, 4] = aten.add(%a, 1)
%slice_1: f64[2, 4] = aten.slice(%x, 0, 1, 3)
%copy_: f64[2, 4] = aten.copy_(%slice_1, %b)
return ()
"""
    check_values(Reinplace(), text, fired=1)


def test_chain() -> None:
    check_values(Reinplace(), """
%x: f64[6, 4] = input
%i: i64[1] = input
%s: f64[1, 4] = input
%a: f64[6, 4] = aten.index_put(%x, [%i], %s)
%b: f64[6, 4] = aten.index_add(%a, 0, %i, %s)
%r: f64[4] = input
%c: f64[6, 4] = aten.select_scatter(%b, %s2, 0, 2)
%u: f64[6, 4] = aten.sin(%c)
%w: f64[6, 4] = aten.copy_(%x, %c)
return (%u)
""".replace("%r: f64[4] = input\n", "").replace("%s: f64[1, 4] = input\n", "%s: f64[1, 4] = input\n%s2: f64[4] = input\n"),
                 fired=1)


def graph(body: str, inputs: str = "", result: str = "") -> str:
    return f"""
%x: f64[6, 4] = input
%i: i64[1] = input
%s: f64[1, 4] = input
{inputs}{body}
return ({result})
"""


PUT = "%a: f64[6, 4] = aten.index_copy(%x, 0, %i, %s)\n"
BACK = "%w: f64[6, 4] = aten.copy_(%x, %a)\n"

REFUSED = {
    "the copied value does not start from the input it is copied to": graph(
        "%a: f64[6, 4] = aten.index_copy(%y, 0, %i, %s)\n" + BACK, "%y: f64[6, 4] = input\n"),
    "dtype or layout differ between the input and the result": """
%x: f64[6, 4]{1, 6} = input
%i: i64[1] = input
%s: f64[1, 4] = input
%a: f64[6, 4] = aten.index_copy(%x, 0, %i, %s)
%w: f64[6, 4]{1, 6} = aten.copy_(%x, %a)
return ()
""",
    "the input may overlap itself": """
%x: f64[6, 4]{0, 1} = input
%i: i64[1] = input
%s: f64[1, 4] = input
%a: f64[6, 4]{0, 1} = aten.index_copy(%x, 0, %i, %s)
%w: f64[6, 4]{0, 1} = aten.copy_(%x, %a)
return ()
""",
    "the input is written elsewhere too": graph(PUT + BACK + "%w2: f64[6, 4] = aten.add_.Tensor(%x, 1)\n"),
    "the result of copy_ is read": graph(PUT + BACK + "%r: f64[6, 4] = aten.sin(%w)\n", result="%r"),
    "what is written may share memory with the input": graph(
        "%v: f64[1, 4] = aten.slice(%x, 0, 5, 6)\n%a: f64[6, 4] = aten.index_copy(%x, 0, %i, %v)\n" + BACK),
    "a value between leaves the graph": graph(
        PUT + "%b: f64[6, 4] = aten.index_add(%a, 0, %i, %s)\n%w: f64[6, 4] = aten.copy_(%x, %b)\n", result="%a"),
    "the old value is read after the write": graph(PUT + "%r: f64[6, 4] = aten.sin(%x)\n" + BACK, result="%r"),
    "the result leaves the graph, where it must not share memory with the input": graph(PUT + BACK, result="%a"),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refusals(reason: str) -> None:
    import torch

    from fusionc.graph.text import parse
    from fusionc.passes.manager import run

    with torch.no_grad():
        _, (record,) = run([(1, Reinplace())], parse(REFUSED[reason]), "graph", None)
    assert record.fired == 0 and reason in [each.reason for each in record.refusals]


def test_old_value_through_an_early_view() -> None:
    text = graph("%v: f64[24] = aten.view(%x, [24])\n" + PUT + "%r: f64[24] = aten.sin(%v)\n" + BACK, result="%r")
    assert refusals(Reinplace(), text) == ["the old value is read after the write (r)"]
    check_values(Reinplace(), text, fired=0)


def test_one_cache_feeds_the_other() -> None:
    # y's new rows come from x before x is written: legal for both; from x after its write: still the new value
    check_values(Reinplace(), graph(
        "%old: f64[1, 4] = aten.slice(%x, 0, 0, 1)\n%b: f64[6, 4] = aten.index_copy(%y, 0, %i, %old)\n" + PUT + BACK
        + "%w2: f64[6, 4] = aten.copy_(%y, %b)\n", "%y: f64[6, 4] = input\n"), fired=2)
    check_values(Reinplace(), graph(
        PUT + "%row: f64[1, 4] = aten.slice(%a, 0, 0, 1)\n%b: f64[6, 4] = aten.index_copy(%y, 0, %i, %row)\n" + BACK
        + "%w2: f64[6, 4] = aten.copy_(%y, %b)\n", "%y: f64[6, 4] = input\n"), fired=2)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["put", "add", "region", "sin", "view", "row"]), st.integers(0, 9)), max_size=8),
       st.integers(0, 9), st.lists(st.integers(0, 9), max_size=2), st.booleans())
def test_random_graphs(steps: list[tuple[str, int]], copied: int, results: list[int], both: bool) -> None:
    lines = ["%x: f64[6, 4] = input", "%y: f64[6, 4] = input", "%i: i64[1] = input", "%s: f64[1, 4] = input"]
    full, rows = ["x", "y"], ["s"]
    for n, (kind, which) in enumerate(steps):
        source, row = full[which % len(full)], rows[which % len(rows)]
        made = {"put": f"aten.index_copy(%{source}, 0, %i, %{row})", "add": f"aten.index_add(%{source}, 0, %i, %{row})",
                "region": f"aten.slice_scatter(%{source}, %{row}, 0, 1, 2)", "sin": f"aten.sin(%{source})",
                "view": f"aten.view(%{source}, [6, 4])", "row": f"aten.slice(%{source}, 0, 2, 3)"}[kind]
        (rows if kind == "row" else full).append(f"n{n}")
        lines.append(f"%n{n}: f64[{1 if kind == 'row' else 6}, 4] = {made}")
    # like AOTAutograd: only fresh values are copied into inputs and returned
    fresh = [name for name in full if f"%{name}: f64[6, 4] = aten" in "\n".join(lines) and "view" not in
             next(line for line in lines if line.startswith(f"%{name}:"))]
    if not fresh:
        return
    lines.append(f"%w1: f64[6, 4] = aten.copy_(%x, %{fresh[copied % len(fresh)]})")
    if both:
        lines.append(f"%w2: f64[6, 4] = aten.copy_(%y, %{fresh[(copied + 1) % len(fresh)]})")
    lines.append(f"return ({', '.join('%' + fresh[r % len(fresh)] for r in results)}{',' if len(results) == 1 else ''})")
    check_values(Reinplace(), "\n".join(lines))


def test_views_of_an_input_that_is_a_part() -> None:
    """Readers of the result read the input, which begins where the caller says and not at 0 as the result did."""

    def fn(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x[2:] *= 2
        return x.t() @ w, x[1:] @ w

    base, w = torch.arange(81.0).view(9, 9), torch.eye(6)
    with torch.no_grad():
        mine, theirs = base.clone(), base.clone()
        run = torch.compile(fn, backend="fusionc", options={"cache": False, "target": "cpp"})
        torch.testing.assert_close(run(mine[2:8, 1:7], w), fn(theirs[2:8, 1:7], w))
    torch.testing.assert_close(mine, theirs)


def test_what_is_written_in_place_is_laid_out_as_the_input() -> None:
    """A copy may have other strides where a size is 1 (index_fill's on a GPU): a program would restride what it wrote to."""
    gm = parse("""
%x: f64[1, 7, 1] = input
%i: i64[1] = input
%s: f64[1, 7, 1] = input
%a: f64[1, 7, 1] = aten.index_fill.int_Scalar(%x, 0, %i, 2)
%b: f64[1, 7, 1] = aten.index_add(%a, 0, %i, %s)
%w: f64[1, 7, 1] = aten.copy_(%x, %b)
return ()
""")
    x, _, _, a, *_ = gm.graph.nodes
    x.meta["val"] = x.meta["val"].as_strided((1, 7, 1), (1, 1, 7))
    assert a.meta["val"].stride() == (7, 1, 1)
    new, record = apply(Reinplace(), gm)
    assert record.fired == 1
    written = [n for n in new.graph.nodes if n.name.startswith("index_")]
    assert [n.meta["val"].stride() for n in written] == [(1, 1, 7)] * 2
