"""Default plans of kernels that would spill, or take seconds to compile, with the usual number of elements a thread."""

from __future__ import annotations

import pytest

from fusionc.ir.text import parse_kernel
from fusionc.runtime.device import known
from fusionc.schedule import space
from fusionc.schedule.rules_triton import MOST_LONG, accumulators, default_plan, long_functions

H200 = known("sm_90")
N = 1 << 22


def chain(dtype: str, times: int, mask: bool = False) -> str:
    value = "in0[x0]"
    for _ in range(times):
        value = f"sin(erf({value}))"
    extra = f"  out   out1: b1[{N}]\n" if mask else ""
    more = f"    row out1[x0] = gt(in0[x0], {dtype}(0.0))\n" if mask else ""
    return f"""kernel
  in    in0: {dtype}[{N}]
  out   out0: {dtype}[{N}]
{extra}  for   x0 < {N}
    row out0[x0] = {value}
{more}"""


@pytest.mark.parametrize("dtype, times, points", [("f32", 1, 8), ("f32", 20, 4), ("f64", 1, 8), ("f64", 20, 1)])
def test_long_functions_leave_few_points_to_a_thread(dtype: str, times: int, points: int) -> None:
    k = parse_kernel(chain(dtype, times))
    assert long_functions(k) == 2 * times * (4 if dtype == "f64" else 1)
    rule = default_plan(k, {}, H200)
    assert rule.xblock == points * 32 * rule.warps
    for p in space.candidates(k, rule, {}, H200, 24)[1:]:
        assert p.xblock * long_functions(k) <= MOST_LONG * 32 * p.warps


@pytest.mark.parametrize("dtype, points", [("f32", 16), ("f64", 8)])
def test_bytes_beside_float64_are_no_reason_for_more_points(dtype: str, points: int) -> None:
    rule = default_plan(parse_kernel(chain(dtype, 1, mask=True)), {}, H200)
    assert rule.xblock == points * 32 * rule.warps


@pytest.mark.parametrize("kinds, block", [(("sum",), 8192), (("sum", "max", "argmax", "prod"), 4096)])
def test_many_accumulators_leave_registers_to_each_thread(kinds: tuple[str, ...], block: int) -> None:
    dtypes = ["i64" if kind == "argmax" else "f64" for kind in kinds]
    outs = "".join(f"  out   out{i}: {d}[1]\n" for i, d in enumerate(dtypes))
    rows = "".join(f"    row out{i}[0] = {kind}[r0](in0[r0])\n" for i, kind in enumerate(kinds))
    k = parse_kernel(f"kernel\n  in    in0: f64[{N}]\n{outs}  axis  r0 < {N}\n{rows}")
    assert accumulators(k) == (2 if len(kinds) == 1 else 9)
    rule = default_plan(k, {}, H200)
    assert (rule.rblock, rule.warps) == (block, block // 256)
