"""No-op removal: each spelling, each refusal, and casts that must stay."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusionc.passes.strip import Strip
from tests.passes.helpers import apply, check_values, refusals, rewritten


def unary(step: str, kind: str = "f64[2, 3]", source: str = "f64[2, 3]") -> str:
    return f"""
%x: {source} = input
%a: {source} = aten.neg(%x)
%b: {kind} = {step}
%c: {kind} = aten.neg(%b)
return (%c)
"""


NOTHING = ["aten.alias(%a)", "aten.clone(%a)", "aten.detach(%a)", "aten.view(%a, [2, 3])", "aten._unsafe_view(%a, [2, 3])",
           "aten.expand(%a, [2, 3])", "aten.slice(%a, 0, 0, 9223372036854775807)", "aten.permute(%a, [0, 1])",
           "aten.mul(%a, 1)", "aten.mul(%a, 1.0)", "aten.div(%a, 1)", "aten.sub(%a, 0)", "aten.pow.Tensor_Scalar(%a, 1)",
           "aten._to_copy(%a, dtype=torch.float64)", "prims.convert_element_type(%a, torch.float64)",
           "aten.dropout(%a, 0.5, False)", "aten.clone(%a, memory_format=torch.contiguous_format)",
           "aten.as_strided(%a, [2, 3], [3, 1])"]


@pytest.mark.parametrize("step", NOTHING)
def test_each_spelling(step: str) -> None:
    text = unary(step)
    assert rewritten(Strip(), text) == """
%x: f64[2, 3] = input
%a: f64[2, 3] = aten.neg(%x)
%c: f64[2, 3] = aten.neg(%a)
return (%c)
"""
    check_values(Strip(), text, fired=1)


@pytest.mark.parametrize(("step", "kind"), [
    ("aten.add(%a, 0)", "f64[2, 3]"), ("aten.sub(%a, -0.0)", "f64[2, 3]"), ("aten.mul(%a, -1)", "f64[2, 3]"),
    ("aten.sub(%a, 1, alpha=0)", "f64[2, 3]"), ("aten.slice(%a, 0, 0, 1)", "f64[1, 3]"),
    ("aten.view(%a, [3, 2])", "f64[3, 2]"), ("aten._to_copy(%a, dtype=torch.float32)", "f32[2, 3]"),
    ("aten.clone(%a, memory_format=torch.preserve_format)", "f64[2, 3]{1, 2}"),
    ("aten.dropout(%a, 0.5, True)", "f64[2, 3]"), ("aten.mul(%a, True)", "f64[2, 3]"),
])
def test_what_does_something_stays(step: str, kind: str) -> None:
    from fusionc.graph.text import parse
    from fusionc.passes.manager import run

    _, (record,) = run([(1, Strip())], parse(unary(step, kind)), "graph", None)
    assert record.fired == 0 and record.refusals == []


def test_strides_that_are_told_as_they_are() -> None:
    """What adaptive pooling of channels-last images leaves; not where memory begins elsewhere."""
    text = """
%x: f64[2, 3, 4, 5]{60, 1, 15, 3} = input
%m: f64[2, 3, 1, 1] = aten.mean.dim(%x, [-1, -2], True)
%a: f64[2, 3, 1, 1]{3, 1, 3, 3} = aten.as_strided(%m, [2, 3, 1, 1], [3, 1, 3, 3])
%v: f64[2, 3] = aten.view(%a, [2, 3])
%n: f64[2, 3] = aten.neg(%v)
return (%n)
"""
    assert "as_strided" not in rewritten(Strip(), text)
    check_values(Strip(), text, fired=1)
    text = """
%x: f64[4, 3] = input
%a: f64[4, 3] = aten.neg(%x)
%s: f64[2, 3] = aten.slice.Tensor(%a, 0, 0, 2)
%b: f64[2, 3] = aten.as_strided(%s, [2, 3], [3, 1], 3)
%c: f64[2, 3] = aten.neg(%b)
return (%c)
"""
    check_values(Strip(), text, fired=0)


def test_concatenation_of_one_part() -> None:
    """A first key-value cache: a copy into another layout, or nothing at all."""
    text = """
%x: f64[2, 3, 4] = input
%e: f64[0] = input
%a: f64[2, 3, 4] = aten.neg(%x)
%t: f64[3, 2, 4]{4, 12, 1} = aten.transpose.int(%a, 0, 1)
%b: f64[3, 2, 4] = aten.cat([%e, %t], -2)
%c: f64[2, 3, 4] = aten.cat([%a, %e], 1)
%d: f64[2, 3, 4] = aten.exp(%c)
return (%b, %d)
"""
    assert rewritten(Strip(), text) == """
%x: f64[2, 3, 4] = input
%e: f64[0] = input
%a: f64[2, 3, 4] = aten.neg(%x)
%t: f64[3, 2, 4]{4, 12, 1} = aten.transpose.int(%a, 0, 1)
%clone: f64[3, 2, 4] = aten.clone(%t, memory_format=torch.contiguous_format)
%d: f64[2, 3, 4] = aten.exp(%a)
return (%clone, %d)
"""
    check_values(Strip(), text, fired=2)


@pytest.mark.parametrize("parts", ["[%a, %a]", "[%e, %f]"])
def test_concatenation_that_does_something_stays(parts: str) -> None:
    kind = "f64[2, 6]" if "%a" in parts else "f64[2, 3]"
    text = f"""
%a: f64[2, 3] = input
%e: f64[0] = input
%f: f32[2, 3] = input
%b: {kind} = aten.cat({parts}, -1)
%c: {kind} = aten.neg(%b)
return (%c)
"""
    assert apply(Strip(), text)[1].fired == 0


def test_complex_times_one_stays() -> None:
    assert apply(Strip(), unary("aten.mul(%a, 1.0)", "c128[2, 3]", "c128[2, 3]"))[1].fired == 0


def test_cast_there_and_back() -> None:
    text = """
%x: bf16[4] = input
%a: f32[4] = aten._to_copy(%x, dtype=torch.float32)
%b: bf16[4] = aten._to_copy(%a, dtype=torch.bfloat16)
%c: f64[4] = aten._to_copy(%a, dtype=torch.float64)
%d: f64[4] = aten.add(%c, %b)
return (%d)
"""
    assert rewritten(Strip(), text) == """
%x: bf16[4] = input
%c: f64[4] = aten._to_copy(%x, dtype=torch.float64)
%d: f64[4] = aten.add(%c, %x)
return (%d)
"""
    check_values(Strip(), text)


def test_refuses_a_cast_that_rounds() -> None:
    text = """
%x: f32[4] = input
%a: bf16[4] = aten._to_copy(%x, dtype=torch.bfloat16)
%b: f32[4] = aten._to_copy(%a, dtype=torch.float32)
return (%b)
"""
    assert refusals(Strip(), text) == ["the cast between rounds (a)"]
    check_values(Strip(), text, fired=0)


def test_refuses_what_the_caller_can_tell_apart() -> None:
    reason = "both leave the graph, or one is an input: the caller may tell them apart"
    assert refusals(Strip(), """
%x: f64[4] = input
%a: f64[4] = aten.clone(%x)
return (%a)
""") == [f"{reason} (a)"]
    assert refusals(Strip(), """
%x: f64[4] = input
%a: f64[4] = aten.neg(%x)
%b: f64[4] = aten.clone(%a)
return (%a, %b)
""") == [f"{reason} (b)"]
    # `repeat_interleave(1)` beside its source: views of the two leave
    assert refusals(Strip(), """
%x: f64[4] = input
%a: f64[4] = aten.neg(%x)
%u: f64[4, 1] = aten.unsqueeze(%a, 1)
%b: f64[4, 1] = aten.clone(%u, memory_format=torch.contiguous_format)
%v: f64[4] = aten.squeeze(%b)
return (%v, %a)
""") == [f"{reason} (b)"]


def test_refuses_a_copy_of_what_is_written() -> None:
    # a swap: without the copies y would get its own value back
    text = """
%x: f64[4] = input
%y: f64[4] = input
%a: f64[4] = aten.clone(%x)
%b: f64[4] = aten.clone(%y)
%c: f64[4] = aten.copy_(%x, %b)
%d: f64[4] = aten.copy_(%y, %a)
return ()
"""
    reason = "the source is written by the graph: the copy may hold the old value"
    assert refusals(Strip(), text) == [f"{reason} (a)", f"{reason} (b)"]
    check_values(Strip(), text, fired=0)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([*NOTHING, "aten.neg(%a)", "aten.sin(%a)"]), st.integers(0, 9)), max_size=8),
       st.lists(st.integers(0, 9), min_size=1, max_size=3), st.booleans())
def test_random_graphs(steps: list[tuple[str, int]], results: list[int], write: bool) -> None:
    lines, names = ["%x: f64[2, 3] = input"], ["x"]
    for index, (step, which) in enumerate(steps):
        lines.append(f"%n{index}: f64[2, 3] = {step.replace('%a', '%' + names[which % len(names)])}")
        names.append(f"n{index}")
    if write:
        lines.append(f"%w: f64[2, 3] = aten.copy_(%x, %{names[-1]})")
    lines.append(f"return ({', '.join('%' + names[i % len(names)] for i in results)},)")
    check_values(Strip(), "\n".join(lines))


def window(stride: str, padding: str, dilation: str, rest: str = "False, [0, 0], 1") -> str:
    return f"""
%x: f64[2, 3, 9, 9] = input
%w: f64[4, 3, 3, 3] = input
%y: f64[2, 4, 5, 5] = aten.convolution(%x, %w, None, {stride}, {padding}, {dilation}, {rest})
return (%y)
"""


def test_one_number_for_all_dimensions_of_a_convolution() -> None:
    """ATen takes it so, and passes would read the window of a line."""
    text, full = window("[2]", "[1]", "[1]", "False, [0], 1"), window("[2, 2]", "[1, 1]", "[1, 1]")
    assert rewritten(Strip(), text) == full
    check_values(Strip(), text, fired=1)
    check_values(Strip(), full, fired=0)
    line = full.replace(", 9, 9]", ", 9]").replace("3, 3, 3]", "3, 3]").replace(", 5, 5]", ", 5]")
    for pair, one in (("2, 2", "2"), ("1, 1", "1"), ("0, 0", "0")):
        line = line.replace(f"[{pair}]", f"[{one}]")
    check_values(Strip(), line, fired=0)


def test_one_number_for_all_dimensions_of_a_backward() -> None:
    text = """
%g: f64[2, 4, 5, 5] = input
%x: f64[2, 3, 9, 9] = input
%w: f64[4, 3, 3, 3] = input
%p: (f64[2, 3, 9, 9], ?, ?) = aten.convolution_backward(%g, %x, %w, [0], [2], [1], [1], False, [0], 1, [True, False, False])
%a: f64[2, 3, 9, 9] = getitem(%p, 0)
return (%a)
"""
    assert "[0], [2, 2], [1, 1], [1, 1], False, [0, 0], 1, [True, False, False])" in rewritten(Strip(), text)
    check_values(Strip(), text, fired=1)


@pytest.mark.parametrize("dynamic", [False, True])
def test_views_of_what_was_a_copy_of_a_part(dynamic: bool) -> None:
    """A copy begins at 0 in its storage, the input that is read in its place where the caller says."""

    def fn(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return x.clone().t() @ w, (x * 1)[1:] @ w, torch.cat([x])[:, 2:].sort()[0], x.clone().split(3)[1] @ w

    base = torch.randn(40, generator=torch.Generator().manual_seed(0))
    x, w = base[4:].view(6, 6), torch.eye(6)
    with torch.no_grad():
        got = torch.compile(fn, backend="fusionc", dynamic=dynamic, options={"cache": False, "target": "cpp"})(x, w)
    torch.testing.assert_close(got, fn(x, w))
