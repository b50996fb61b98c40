"""Which loop of a C++ kernel is vectorised, by rule."""

from __future__ import annotations

import pytest

from fusionc.ir.text import parse_kernel
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
