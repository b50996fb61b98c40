"""A maximum and the sum of exponentials below it in one pass over a looped axis; cheap float32 functions before bf16."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import gelu as gelu_of

from fusionc.codegen.triton import render
from fusionc.ir import interp
from fusionc.ir.expr import Reduce, index
from fusionc.ir.online import online_pairs
from fusionc.runtime.device import TARGETS, known
from fusionc.runtime.launch import cross_compile, interpret
from fusionc.schedule.plan import Plan
from fusionc.schedule.rules_triton import default_plan
from tests.codegen import kernels
from tests.codegen.kernels import Case, axis, const, f, inp, kernel, load, loop, outp, st


def passes(case: Case, plan: Plan) -> int:
    return len(re.findall(r"^    for offset", render(case.kernel, plan, "k0"), re.M))


def run(case: Case, plan: Plan, data: torch.Tensor) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Outputs rendered and by the loop interpreter, for `data` as in0."""
    got, want = case.inputs(), case.inputs()
    got["in0"][: data.numel()] = want["in0"][: data.numel()] = data.to(got["in0"].dtype)
    interp.run(case.kernel, want, case.sizes)
    interpret(render(case.kernel, plan, "k0"), "k0", case.kernel, plan, list(got.values()), case.sizes)
    return got, want


def rows_with_everything(n: int) -> torch.Tensor:
    """Rows [7, n]: plain, growing, large, lanes of -inf alone, all -inf, with +inf, with NaN."""
    torch.manual_seed(3)
    x = torch.randn(7, n) * 3
    x[1] = torch.arange(n) * 0.5
    x[2] += 300
    x[3, ::2] = -math.inf
    x[4] = -math.inf
    x[5, n // 2] = math.inf
    x[6, 1] = math.nan
    return x


@pytest.mark.interpret
@pytest.mark.parametrize("unroll", [1, 2, 4])
@pytest.mark.parametrize("n", [64, 100])
def test_values(n: int, unroll: int) -> None:
    case = kernels.softmax(7, n)
    plan = Plan("triton", 2, 16, unroll=unroll)
    assert passes(case, plan) == 2 and passes(case, replace(plan, rblock=0)) == 0
    got, want = run(case, plan, rows_with_everything(n).reshape(-1))
    torch.testing.assert_close(got["out0"], want["out0"], equal_nan=True, rtol=1e-5, atol=1e-7)
    assert want["out0"].view(7, n)[4].isnan().all() and not want["out0"].view(7, n)[3].isnan().any()


@pytest.mark.interpret
def test_half_precision() -> None:
    got, want = run(kernels.softmax(7, 100, "bf16"), Plan("triton", 2, 16, unroll=2), torch.randn(700))
    torch.testing.assert_close(got["out0"], want["out0"], rtol=8e-3, atol=0)


LOOPED = {c.name: c for c in kernels.cases() if c.kernel.axis}


@pytest.mark.interpret
@pytest.mark.parametrize("name", LOOPED)
def test_tiles_loaded_at_once(name: str) -> None:
    """Every kernel with an axis: scans and positions pass from tile to tile, the last tiles may lie beyond the end."""
    case = LOOPED[name]
    plan = Plan("triton", 2, 16, unroll=3)
    got, want = case.inputs(), case.inputs()
    interp.run(case.kernel, want, case.sizes)
    interpret(render(case.kernel, plan, "k0"), "k0", case.kernel, plan, list(got.values()), case.sizes)
    for n in want:
        torch.testing.assert_close(got[n], want[n], equal_nan=True)


def test_pairs() -> None:
    """Only if every reduction of the second level is such a sum."""
    k = kernels.softmax(4, 64).kernel
    ((total, top),) = online_pairs(k).items()
    assert total.kind == "sum" and top.kind == "max" and total in k.reductions
    assert not online_pairs(kernels.layernorm(4, 64).kernel)
    (x,), (r,) = loop(4), axis(64)
    v = load("in0", index(x) * 64 + r)
    top = Reduce("max", (r,), v, "f32")
    below = f("exp", f("sub", v, top))
    other = f("exp", f("sub", f("mul", v, const(2.0)), top))  # the maximum is of something else
    buffers = [inp("in0", 256), outp("out0", 4), outp("out1", 4)]
    for body in (other, f("mul", below, below)):
        stores = [st("out0", x, Reduce("sum", (r,), below, "f32")), st("out1", x, Reduce("sum", (r,), body, "f32"))]
        assert not online_pairs(kernel(buffers, (x,), (r,), stores))


def test_plan() -> None:
    plan = default_plan(kernels.softmax(4096, 65536, "bf16").kernel, {}, known("sm_90"))
    assert (plan.rblock, plan.unroll, plan.warps) == (4096, 4, 16)
    assert Plan.from_dict({**vars(plan)}) == plan
    with pytest.raises(ValueError, match="unroll"):
        Plan.from_dict({**vars(plan), "unroll": 0})


@pytest.mark.cross
@pytest.mark.parametrize("target", TARGETS)
def test_builds(target: str) -> None:
    case = kernels.softmax(4096, 65536, "bf16")
    plan = default_plan(case.kernel, {}, known(target))
    assert cross_compile(render(case.kernel, plan, "k0"), "k0", case.kernel, plan, target).spills == 0


# -- quick functions ----------------------------------------------------------------------------------------------


def gelu(n: int, dtype: str, *, bare: bool = False, tanh: bool = False) -> Case:
    """x/2·(1 + erf(x/√2)) or its approximation by tanh, or erf(x) alone."""
    (x,) = loop(n)
    v = load("in0", index(x), dtype)
    if tanh:
        cube = f("mul", f("mul", f("mul", v, v), v), const(0.044715))
        e = f("tanh", f("mul", f("add", v, cube), const(math.sqrt(2 / math.pi))))
    else:
        e = f("erf", v if bare else f("mul", v, const(math.sqrt(0.5))))
    if not bare:
        e = f("mul", f("mul", v, const(0.5)), f("add", e, const(1.0)))
    out = e if dtype == "f32" else f("cast", e, dtype=dtype)
    return Case(
        "gelu", kernel([inp("in0", n, dtype), outp("out0", n, dtype)], (x,), (), [st("out0", x, out)]), lambda t: {}
    )


def test_where_quick_functions_are_used() -> None:
    plan = Plan("triton", 64)
    assert "_erf(" in render(gelu(64, "bf16").kernel, plan, "k0")
    assert "_tanh(" in render(gelu(64, "bf16", tanh=True).kernel, plan, "k0")
    assert "_erf(" not in render(gelu(64, "f32").kernel, plan, "k0")
    # near zero erf itself needs its relative error
    assert "_erf(" not in render(gelu(64, "bf16", bare=True).kernel, plan, "k0")
    assert "libdevice.exp" in render(kernels.softmax(4, 64).kernel, Plan("triton", 1, 0), "k0")
    for rblock in (0, 16):  # and one division a row
        text = render(kernels.softmax(4, 64, "bf16").kernel, Plan("triton", 1, rblock, unroll=2), "k0")
        (line,) = [part for part in text.splitlines() if " / " in part]
        assert "libdevice" not in text and "1.0 / " in line and line.startswith("    t")


@pytest.mark.parametrize("step", ["floor", "lt", "cast", None])
def test_not_before_a_step(step: str | None) -> None:
    """A quotient that is a little less than 3 is 2 after floor, and less than 3."""
    (x,) = loop(64)
    e = f("div", load("in0", index(x), "bf16"), load("in1", index(x), "bf16"))
    if step == "floor":
        e = f("floor", e)
    elif step == "lt":
        e = f("where", f("lt", e, const(3.0), dtype="b1"), e, const(0.0))
    elif step == "cast":
        e = f("cast", f("cast", e, dtype="i32"), dtype="f32")
    out = st("out0", x, f("cast", e, dtype="bf16"))
    k = kernel([inp("in0", 64, "bf16"), inp("in1", 64, "bf16"), outp("out0", 64, "bf16")], (x,), (), [out])
    assert ("div_rn" in render(k, Plan("triton", 64), "k0")) is (step is not None)


@pytest.mark.interpret
@pytest.mark.parametrize("tanh", [False, True], ids=["erf", "tanh"])
@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_gelu(dtype: str, tanh: bool) -> None:
    """No worse than eager against float64, up to one rounding of the result; special values as eager has them."""
    case, n, form = gelu(4096, dtype, tanh=tanh), 4096, "tanh" if tanh else "none"
    x = torch.cat([torch.linspace(-9, 9, n - 6), torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-6])])
    got, _ = run(case, Plan("triton", 1024), x)
    x = x.to(got["in0"].dtype)
    want, eager = gelu_of(x.double(), approximate=form), gelu_of(x, approximate=form)
    finite = want.isfinite()
    ours, theirs = (got["out0"].double() - want).abs()[finite], (eager.double() - want).abs()[finite]
    assert ours.max() <= 1.01 * theirs.max() and ours.mean() <= 1.01 * theirs.mean()
    special = got["out0"][-6:]
    assert torch.equal(special[:3], torch.tensor([0.0, -0.0, math.inf], dtype=x.dtype)) and special[3:5].isnan().all()
