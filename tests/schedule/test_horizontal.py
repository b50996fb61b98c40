"""Which launches become one, and the value that describes them."""

from __future__ import annotations

import json

import pytest

from fusionc.ir.text import parse_kernel
from fusionc.schedule.horizontal import MAX_FAMILIES, MAX_PARAMETERS, Item, Many, Step, bundles, parse_many, template

SCALE = """kernel
  in    in0: f32[{n}]
  in    in1: f32[3]
  out   out0: f16[{n}]
  for   x0 < {rows}
  for   x1 < 3
    row out0[3*x0 + x1] = cast.f16(mul(add(in0[3*x0 + x1], f32(2.0)), in1[x1]))
"""
ROW = """kernel
  in    in0: f32[{n}]
  out   out0: f32[{rows}]
  for   x0 < {rows}
  axis  r0 < {width}
    row out0[x0] = sum[r0](in0[{width}*x0 + r0])
"""


def scale(rows: int) -> str:
    return SCALE.format(n=3 * rows, rows=rows)


def row(rows: int, width: int) -> str:
    return ROW.format(n=rows * width, rows=rows, width=width)


def many(*texts: str) -> Many:
    kernels = tuple(parse_kernel(t) for t in texts)
    at, items = 0, []
    for n, k in enumerate(kernels):
        items.append(Item(n, tuple((at + i, 8 * i) for i in range(len(k.buffers)))))
        at += len(k.buffers)
    return Many(kernels, tuple(items))


def test_a_family_has_sizes_for_what_differs() -> None:
    (family,) = many(scale(5), scale(7), scale(9)).families
    assert [s.name for s in family.kernel.sizes] == ["s0"]
    assert family.values == ((5,), (7,), (9,)) and family.kernel.sizes[0].lower == 5
    assert "x0 < s0" in family.kernel.text and "x1 < 3" in family.kernel.text and "f32(2.0)" in family.kernel.text
    assert [family.points(k) for k in range(3)] == [15, 21, 27]


def test_equal_kernels_need_no_sizes() -> None:
    value = many(scale(5))
    twice = Many(value.kernels, (value.items[0], Item(0, ((3, 0), (1, 0), (4, 0)))))
    (family,) = twice.families
    assert not family.kernel.sizes and family.items == (0, 1) and family.kernel.text == value.kernels[0].text


def test_another_constant_or_another_axis_is_another_family() -> None:
    assert len(many(scale(5), scale(7).replace("f32(2.0)", "f32(3.0)")).families) == 2
    assert len(many(row(4, 16), row(4, 32)).families) == 2
    assert len(many(row(4, 16), row(8, 16)).families) == 1


def test_integers_of_arithmetic_are_no_holes() -> None:
    text, holes = template(parse_kernel(scale(5)))
    assert "f32(2.0)" in text and holes == (15, 3, 15, 5, 3, 3, 3)


def test_text_reads_back() -> None:
    value = many(scale(5), row(4, 16))
    assert parse_many(value.text) == value
    assert [b.dtype for b in value.parameters] == ["f32", "f32", "f16", "f32", "f32"]
    assert value.symbol != many(scale(5), row(4, 32)).symbol


@pytest.mark.parametrize("change", [
    lambda d: d["items"][0].__setitem__(0, 7),
    lambda d: d["items"][0][1].__setitem__(0, [-1, 0]),
    lambda d: d["items"][0][1].__setitem__(0, [9, 0]),
    lambda d: d["items"][0][1].pop(),
    lambda d: d["kernels"].__setitem__(0, "kernel\n  nonsense"),
    lambda d: d.pop("items"),
    lambda d: d.update(more=1),
])  # fmt: skip
def test_nothing_else_is_read(change: object) -> None:
    data = json.loads(many(scale(5)).text)
    change(data)  # type: ignore[operator]
    with pytest.raises(ValueError):
        parse_many(json.dumps(data, separators=(",", ":")))


def test_a_parameter_has_one_dtype() -> None:
    value = many(scale(5))
    with pytest.raises(ValueError, match="is used as"):
        _ = Many(value.kernels, (Item(0, ((0, 0), (1, 0), (0, 0))),)).parameters


# -- which launches ---------------------------------------------------------------------------------------------------


def small(*reads: int, kind: str = "w", **more: object) -> Step:
    return Step(frozenset(reads), kind, **more)  # type: ignore[arg-type]


def test_independent_launches_meet() -> None:
    assert bundles([small(), small(), small(kind="other"), small()]) == [[0, 1, 3]]


def test_one_is_none() -> None:
    assert bundles([small(), small(kind="other"), Step(frozenset())]) == []


def test_chains_of_several_images_meet_level_by_level() -> None:
    #          a0       a1        b0       b1
    assert bundles([small(), small(0), small(), small(2)]) == [[0, 2], [1, 3]]


def test_a_launch_never_passes_what_it_reads() -> None:
    call = Step(frozenset({0}))
    assert bundles([small(), call, small(1)]) == []
    assert bundles([small(), small(0), small(1)]) == []


def test_nothing_passes_a_write() -> None:
    assert bundles([small(), Step(frozenset(), writes=True), small()]) == []


def test_limits() -> None:
    half = [small(slots=frozenset((k, i) for i in range(MAX_PARAMETERS // 2 + 1))) for k in range(2)]
    assert bundles(half) == []
    assert bundles([small(family=str(k)) for k in range(MAX_FAMILIES + 2)]) == [
        list(range(MAX_FAMILIES)), [MAX_FAMILIES, MAX_FAMILIES + 1]]  # fmt: skip
    assert bundles([small(held=60), small(held=60), small(held=60)], held_limit=100) == [[0, 1]]
