"""Which loop of a C++ kernel is vectorised, and which results are written past the caches, by rule."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from fusionc.ir.text import parse_kernel
from fusionc.schedule.plan import Plan
from fusionc.schedule.rules_cpp import default_plan

# LayerNorm of a transposed image: what is read runs along the pixels, what is written along the channels
NORM = """kernel
  in    in0: f32[1204224]
  in    in1: f32[96]
  out   out0: f32[1204224]
  for   x0 < 4
  for   x1 < 3136
  axis  r0 < 96
    t0 = in0[READ]
    t1 = sub(t0, div(sum[r0](t0), f32(96.0)))
    t2 = mul(mul(t1, rsqrt(add(div(sum[r0](mul(t1, t1)), f32(96.0)), f32(1e-06)))), in1[r0])
    inner out0[WRITE] = t2
"""
ACROSS, ALONG = "301056*x0 + 3136*r0 + x1", "301056*x0 + 96*x1 + r0"


@pytest.mark.parametrize("read, write, columns", [(ACROSS, ALONG, True), (ALONG, ALONG, False), (ALONG, ACROSS, False),
                                                  (ACROSS, ACROSS, True)])  # fmt: skip
def test_what_is_read_in_three_passes_outweighs_what_is_written_once(read: str, write: str, columns: bool) -> None:
    kernel = parse_kernel(NORM.replace("READ", read).replace("WRITE", write))
    assert default_plan(kernel, {}).columns is columns


def test_a_single_pass_weighs_as_much_as_its_store() -> None:
    """A softmax-free map keeps the old rule: on a tie the axis is vectorised."""
    kernel = parse_kernel(f"""kernel
  in    in0: f32[1204224]
  in    in1: f32[96]
  out   out0: f32[1204224]
  for   x0 < 4
  for   x1 < 3136
  axis  r0 < 96
    inner out0[{ALONG}] = add(in0[{ACROSS}], sum[r0](in1[r0]))
""")
    assert not default_plan(kernel, {}).columns


def _rows(width: int, value: str = "mul(t0, rsqrt(sum[r0](mul(t0, t0))))", out: str = "f32", rows: int = 1000) -> str:
    return f"""kernel
  in    in0: f32[{rows * width}]
  out   out0: {out}[{rows * width}]
  for   x0 < {rows}
  axis  r0 < {width}
    t0 = in0[{width}*x0 + r0]
    inner out0[{width}*x0 + r0] = {value}
"""


TWO = """kernel
  in    in0: f32[64000]
  out   out0: f32[64000]
  out   out1: b1[64000]
  for   x0 < 64000
    row out0[x0] = maximum(in0[x0], f32(0.0))
    row out1[x0] = gt(in0[x0], f32(0.0))
"""
ADD = """kernel
  in    in0: f32[64000]
  out   out0: f32[64000]
  for   x0 < 500
  for   x1 < 128
    row out0[INDEX] = add(in0[128*x0 + x1], f32(1.0))
"""
STREAMED = {
    "rows": _rows(256),
    "an exponential that a reduction has computed": _rows(256, "div(exp(t0), sum[r0](exp(t0)))"),
    "two results": TWO,
    "pointwise rows": ADD.replace("INDEX", "128*x0 + x1"),
    "along the last loop": """kernel
  in    in0: f32[65536]
  out   out0: f32[65536]
  for   x0 < 8
  for   x1 < 128
  axis  r0 < 64
    t0 = in0[8192*x0 + x1 + 128*r0]
    inner out0[8192*x0 + x1 + 128*r0] = sub(t0, sum[r0](t0))
""",
}
ORDINARY = {
    "busy with arithmetic": _rows(256, "mul(sigmoid(mul(t0, rsqrt(sum[r0](mul(t0, t0))))), t0)"),
    "rows that begin inside a line": _rows(257),
    "rows shifted by part of a line": ADD.replace("INDEX", "128*x0 + x1 + 3").replace("out0: f32[64000]", "out0: f32[64003]"),
    "rows of one line": _rows(16, rows=16000),
    "columns written one by one": ADD.replace("INDEX", "x0 + 500*x1"),
    "read as well": """kernel
  inout in0: f32[64000]
  for   x0 < 64000
    row in0[x0] = add(in0[x0], f32(1.0))
""",
    "two writers": """kernel
  in    in0: f32[64000]
  out   out0: f32[128000]
  for   x0 < 64000
    row out0[x0] = add(in0[x0], f32(1.0))
    row out0[x0 + 64000] = mul(in0[x0], f32(2.0))
""",
    "one element a row": """kernel
  in    in0: f32[6400000]
  out   out0: f32[64000]
  for   x0 < 64000
  axis  r0 < 100
    row out0[x0] = sum[r0](in0[100*x0 + r0])
""",
    "a scan": _rows(256, "scan_sum[r0](t0)"),
    "a size known at run time": """kernel
  size  s0 >= 2
  in    in0: f32[s0]
  out   out0: f32[s0]
  for   x0 < s0
    row out0[x0] = add(in0[x0], f32(1.0))
""",
    "a scalar": """kernel
  in    in0: f32[1]
  out   out0: f32[1]
    row out0[0] = add(in0[0], f32(1.5))
""",
    "nothing": _rows(256, rows=0),
}


@pytest.mark.parametrize("name", STREAMED)
def test_large_results_of_kernels_that_wait_for_memory_are_streamed(name: str) -> None:
    kernel = parse_kernel(STREAMED[name])
    assert default_plan(kernel, {}, 200_000).stream
    assert not default_plan(kernel, {}, 2_000_000).stream
    assert not default_plan(kernel, {}).stream


def test_results_count_together() -> None:
    kernel = parse_kernel(TWO)
    assert default_plan(kernel, {}, 5 * 64000).stream and not default_plan(kernel, {}, 5 * 64000 + 1).stream


@pytest.mark.parametrize("name", ORDINARY)
def test_others_are_not(name: str) -> None:
    kernel = parse_kernel(ORDINARY[name])
    assert not default_plan(kernel, {s.name: 1 << 30 for s in kernel.sizes}, 0).stream


def test_a_plan_that_streams_survives_json() -> None:
    plan = Plan("cpp", stream=True)
    assert Plan.from_dict(json.loads(plan.to_json())) == plan
    with pytest.raises(ValueError, match="wrong type"):
        Plan.from_dict({**asdict(plan), "stream": 1})
