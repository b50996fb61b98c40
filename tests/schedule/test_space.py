"""The list of plans to measure: the rule's first, legal, short, the same each time, and ranked sensibly."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fusionc.codegen.triton import refusal
from fusionc.ir.expr import Load, Reduce, Var, index
from fusionc.ir.loop import Buffer, Kernel, Store
from fusionc.ir.ops import cast, op
from fusionc.runtime.device import known
from fusionc.schedule import space
from fusionc.schedule.plan import Plan
from fusionc.schedule.rules_triton import default_plan
from tests.codegen import kernels

H200 = known("sm_90")
CASES = kernels.cases()


def pointwise(n: int) -> Kernel:
    (x,) = (Var("x0", index(n)),)
    value = cast(op("exp", (cast(Load("in0", index(x), "bf16"), "f32"),), "f32"), "bf16")
    buffers = (Buffer("in0", "bf16", index(n)), Buffer("out0", "bf16", index(n), "out"))
    return Kernel(buffers, (), (x,), (), (Store("out0", index(x), value, False),))


def rows(outer: int, inner: int) -> Kernel:
    x, r = Var("x0", index(outer)), Var("r0", index(inner))
    at = index(x) * inner + r
    load = cast(Load("in0", at, "bf16"), "f32")
    total = Reduce("sum", (r,), load, "f32")
    value = cast(op("div", (load, total), "f32"), "bf16")
    n = index(outer * inner)
    buffers = (Buffer("in0", "bf16", n), Buffer("out0", "bf16", n, "out"))
    return Kernel(buffers, (), (x,), (r,), (Store("out0", at, value, True),))


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_list_is_short_legal_and_starts_with_the_rule(case: kernels.Case) -> None:
    rule = default_plan(case.kernel, case.sizes, H200)
    found = space.candidates(case.kernel, rule, case.sizes, H200, 8)
    assert found[0] == rule and len(found) <= 8 and len(set(found)) == len(found)
    assert found == space.candidates(case.kernel, rule, case.sizes, H200, 8)
    for plan in found[1:]:
        assert space.legal(plan) and refusal(case.kernel, plan) is None
        assert Plan.from_dict(__import__("json").loads(plan.to_json())) == plan


def test_more_are_asked_for_more_are_given() -> None:
    k = rows(4096, 4096)
    rule = default_plan(k, {}, H200)
    few, many = (space.candidates(k, rule, {}, H200, n) for n in (8, 24))
    assert len(few) == 8 and len(many) == 24 and many[:8] == few


def test_a_large_copy_takes_about_its_bytes() -> None:
    k = pointwise(1 << 26)
    us = space.estimate(k, default_plan(k, {}, H200), {}, H200)
    bound = space.lower_bound(k, {}, H200)
    assert bound == pytest.approx(4 * (1 << 26) / H200.bandwidth * 1e6)
    assert bound <= us < 1.3 * bound


def test_model_dislikes_what_is_slow() -> None:
    k = pointwise(1 << 26)
    good = Plan("triton", xblock=1024, warps=4)
    narrow = Plan("triton", xblock=64, warps=2)  # 2 bytes a thread and access
    assert space.estimate(k, narrow, {}, H200) > space.estimate(k, good, {}, H200)
    long = rows(4096, 65536)
    once, twice = Plan("triton", rblock=0, warps=8), Plan("triton", rblock=4096, warps=16)
    assert space.limit(long, once, {}, H200) is not None  # 256 elements of a row in each thread
    assert space.limit(long, twice, {}, H200) is None
    assert space.limit(k, Plan("triton", xblock=64, warps=8), {}, H200) == "threads without work"
    few = rows(8, 4096)  # eight programs: the more threads each, the better
    assert space.estimate(few, Plan("triton", warps=16), {}, H200) < space.estimate(
        few, Plan("triton", warps=2), {}, H200
    )


@pytest.mark.parametrize(
    "plan", [Plan("triton", xblock=3), Plan("triton", rblock=48), Plan("triton", warps=3), Plan("cpp")]
)
def test_illegal_plans(plan: Plan) -> None:
    assert not space.legal(plan)


def test_steps_of_several_large_tiles_are_not_offered() -> None:
    """A softmax of 65536 columns by 4 × 16384 in 8 warps took 1 s to compile, in 16 it spilled."""
    x, r = Var("x0", index(4096)), Var("r0", index(65536))
    n = index(4096 * 65536)
    value = Reduce("max", (r,), Load("in0", index(x) * 65536 + r, "bf16"), "bf16")
    buffers = (Buffer("in0", "bf16", n), Buffer("out0", "bf16", index(4096), "out"))
    k = Kernel(buffers, (), (x,), (r,), (Store("out0", index(x), value, False),))
    rule = Plan("triton", xblock=1, rblock=4096, warps=16, unroll=4)
    found = space.candidates(k, rule, {}, H200, 24)
    assert rule in found and all(p.xblock * p.rblock * 4 <= 64 * 32 * p.warps for p in found if p.rblock)
    assert space.limit(k, replace(rule, rblock=16384), {}, H200) is not None
    assert space.limit(k, replace(rule, rblock=16384, unroll=1), {}, H200) is None


def test_sums_of_columns_are_offered_plans_that_run_along_columns() -> None:
    """dweight of a norm: a per-row factor beside the two matrices once made the rule walk down columns (4× slower)."""
    x, r = Var("x0", index(4096)), Var("r0", index(16384))
    at = index(r) * 4096 + x
    value = op("mul", (cast(Load("in0", at, "bf16"), "f32"), Load("in1", index(r), "f32")), "f32")
    n = index(16384 * 4096)
    buffers = (Buffer("in0", "bf16", n), Buffer("in1", "f32", index(16384)), Buffer("out0", "f32", index(4096), "out"))
    store = Store("out0", index(x), Reduce("sum", (r,), value, "f32"), False)
    k = Kernel(buffers, (), (x,), (r,), (store,))
    found = space.candidates(k, Plan("triton", xblock=1, rblock=4096, warps=16), {}, H200)
    assert all(p.xblock >= 16 for p in found[1:4])
