"""Split reductions: both kernels verify, and together they compute what the one kernel did."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fusionc.ir import interp
from fusionc.ir.expr import Reduce, Size, Var, index
from fusionc.ir.loop import Buffer, Kernel, Store, evaluate
from fusionc.ir.verify import verify
from fusionc.runtime.device import TARGETS, known
from fusionc.schedule.plan import Plan
from fusionc.schedule.rules_triton import contiguous_in_loops, default_plan
from fusionc.schedule.split import legal, should_split, split
from tests.codegen import kernels

CASES = kernels.cases()
LEGAL = [c for c in CASES if legal(c.kernel)]


def run_both(case: kernels.Case, pair: tuple[Kernel, Kernel]) -> dict[str, torch.Tensor]:
    buffers = case.inputs()
    for b in pair[0].buffers:
        if b.name.startswith("part"):
            buffers[b.name] = torch.zeros(evaluate(b.size, case.sizes), dtype=interp.TORCH_DTYPE[b.dtype])
    for k in pair:
        mine = {b.name: buffers[b.name] for b in k.buffers}
        interp.run(k, mine, {s.name: case.sizes[s.name] for s in k.sizes})
    return buffers


@pytest.mark.parametrize("parts", [2, 4, 7])
@pytest.mark.parametrize("case", LEGAL, ids=lambda c: c.name)
def test_same_values(case: kernels.Case, parts: int) -> None:
    pair = split(case.kernel, parts)
    assert pair is not None
    for k in pair:
        verify(k)
    got = run_both(case, pair)
    for name, want in case.expected(case.inputs()).items():
        torch.testing.assert_close(got[name], want, equal_nan=True)


def test_what_is_legal() -> None:
    names = {c.name for c in LEGAL}
    assert {"column_sum_f32_50_24", "full_sum_f32_1000", "full_argmin_i32_500", "any_all_4_37"} <= names
    assert not names & {c.name for c in CASES if c.name.startswith(("softmax", "layernorm", "rmsnorm", "cum"))}
    for c in CASES:
        if c.name not in names:
            assert split(c.kernel, 4) is None
    assert split(LEGAL[0].kernel, 1) is None


def test_side_output_of_the_axis() -> None:
    """A store that needs no reduction moves to the first kernel, if no guard is needed."""
    base = kernels.full("sum", 64)
    k = base.kernel
    (r,) = k.axis
    value = k.reductions[0].body
    side = replace(
        k,
        buffers=(*k.buffers, Buffer("out1", "f32", index(64), "out")),
        stores=(*k.stores, Store("out1", index(r), kernels.f("neg", value), True)),
    )
    assert split(side, 5) is None
    pair = split(side, 4)
    assert pair is not None and [s.buffer for s in pair[0].stores] == ["out1", "part0"]
    case = replace(base, kernel=side)
    got = run_both(case, pair)
    assert torch.equal(got["out1"], -got["in0"])
    torch.testing.assert_close(got["out0"][0], got["in0"].sum())


def test_unknown_length() -> None:
    s = Size("s0", 1)
    r = Var("r0", index(s))
    e = Reduce("argmax", (r,), kernels.load("in0", index(r)), "i64")
    k = Kernel(
        (Buffer("in0", "f32", index(s)), Buffer("out0", "i64", index(1), "out")),
        (s,),
        (),
        (r,),
        (Store("out0", index(0), e, False),),
    )
    pair = split(k, 8)
    assert pair is not None and pair[0].sizes == (s,) and pair[1].sizes == ()
    for n in (3, 8, 50):
        case = kernels.Case("", k, lambda t: {}, {"s0": n})
        assert int(run_both(case, pair)["out0"][0]) == int(case.inputs()["in0"].argmax())


def test_when_to_split() -> None:
    assert should_split(kernels.full("sum", 1 << 24).kernel, {}, "triton", 132) >= 128
    assert should_split(kernels.full("sum", 1 << 10).kernel, {}, "triton", 132) == 1
    assert should_split(kernels.column_sum(1 << 16, 64).kernel, {}, "triton", 132) > 32
    assert should_split(kernels.column_sum(64, 1 << 16).kernel, {}, "triton", 132) == 1
    assert should_split(kernels.softmax(2, 1 << 20).kernel, {}, "triton", 132) == 1
    assert should_split(kernels.full("sum", 1 << 24).kernel, {}, "cpp", 8) == 8
    assert should_split(kernels.column_sum(64, 1 << 10).kernel, {}, "cpp", 8) == 1


@pytest.mark.parametrize("target", TARGETS)
def test_default_plans_are_valid(target: str) -> None:
    device = known(target)
    big = [
        kernels.pointwise(1 << 24, "bf16"),
        kernels.softmax(4096, 1024),
        kernels.softmax(16, 100_000, "bf16"),
        kernels.layernorm(4096, 8192, "bf16"),
        kernels.column_sum(4096, 4096, "bf16"),
    ]
    for case in CASES + big:
        plan = default_plan(case.kernel, case.sizes, device)
        assert Plan.from_dict(__import__("json").loads(plan.to_json())) == plan
        for n in (plan.xblock, plan.rblock or 1, plan.warps):
            assert n & (n - 1) == 0
        assert plan.warps * device.warp <= 1024


def test_rules_see_the_direction() -> None:
    device = known("sm_90")
    column = kernels.column_sum(4096, 8192, "bf16").kernel
    assert contiguous_in_loops(column, {}) and default_plan(column, {}, device).xblock >= 32
    row = kernels.layernorm(4096, 1024, "bf16").kernel
    pair = split(column, 64)
    assert pair is not None and all(contiguous_in_loops(k, {}) for k in pair)
    assert not contiguous_in_loops(row, {}) and default_plan(row, {}, device).rblock == 0
    assert default_plan(kernels.softmax(64, 1 << 17).kernel, {}, device).rblock > 0
