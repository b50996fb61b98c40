"""The C++ renderer against the loop interpreter, over a table of kernels compiled together."""

from __future__ import annotations

import ctypes
import math
import platform
from dataclasses import replace
from functools import lru_cache

import pytest
import torch

from fusionc.codegen import cpp_nest
from fusionc.codegen.cpp import PRELUDE, render
from fusionc.ir import interp
from fusionc.ir.loop import Kernel, evaluate
from fusionc.ir.text import parse_kernel
from fusionc.runtime.cache import environment_key, open_cache
from fusionc.runtime.compile_cpp import build
from fusionc.schedule.rules_cpp import default_plan

SIZES = {"s0": 37, "s1": 70}

KERNELS = {
    "pointwise": """kernel
  in    in0: f32[1000]
  in    in1: f32[1000]
  out   out0: f32[1000]
  for   x0 < 1000
    row out0[x0] = div(in0[x0], add(f32(1.0), exp(neg(mul(in0[x0], in1[x0])))))
""",
    "scalar": """kernel
  in    in0: f32[1]
  out   out0: f32[1]
    row out0[0] = add(in0[0], f32(1.5))
""",
    "broadcast_dynamic": """kernel
  size  s0 >= 2
  size  s1 >= 2
  in    in0: f32[s0*s1]
  in    in1: f32[s1]
  in    in2: f32[s0]
  out   out0: f32[s0*s1]
  for   x0 < s0
  for   x1 < s1
    row out0[s1*x0 + x1] = add(mul(in0[s1*x0 + x1], in1[x1]), sqrt(abs(in2[x0])))
""",
    "softmax": """kernel
  in    in0: f32[3700]
  out   out0: f32[3700]
  for   x0 < 37
  axis  r0 < 100
    t0 = in0[100*x0 + r0]
    t1 = exp(sub(t0, max[r0](t0)))
    inner out0[100*x0 + r0] = div(t1, sum[r0](t1))
""",
    "softmax_dynamic": """kernel
  size  s0 >= 2
  size  s1 >= 2
  in    in0: bf16[s0*s1]
  out   out0: bf16[s0*s1]
  for   x0 < s0
  axis  r0 < s1
    t0 = cast.f32(in0[s1*x0 + r0])
    t1 = exp(sub(t0, max[r0](t0)))
    inner out0[s1*x0 + r0] = cast.bf16(div(t1, sum[r0](t1)))
""",
    "softmax_columns": """kernel
  in    in0: f32[7000]
  out   out0: f32[7000]
  for   x0 < 10
  for   x1 < 70
  axis  r0 < 10
    t0 = in0[700*x0 + x1 + 70*r0]
    t1 = exp(sub(t0, max[r0](t0)))
    inner out0[700*x0 + x1 + 70*r0] = div(t1, sum[r0](t1))
""",
    "layernorm": """kernel
  in    in0: f32[5000]
  in    in1: f32[100]
  in    in2: f32[100]
  out   out0: f32[5000]
  out   out1: f32[50]
  out   out2: f32[50]
  for   x0 < 50
  axis  r0 < 100
    t0 = in0[100*x0 + r0]
    t1 = div(sum[r0](t0), f32(100.0))
    t2 = sub(t0, t1)
    t3 = rsqrt(add(div(sum[r0](mul(t2, t2)), f32(100.0)), f32(1e-05)))
    row out1[x0] = t1
    row out2[x0] = t3
    inner out0[100*x0 + r0] = add(mul(mul(t2, t3), in1[r0]), in2[r0])
""",
    "rmsnorm_silu_long": """kernel
  in    in0: f32[30000]
  in    in1: f32[6000]
  out   out0: f32[30000]
  for   x0 < 5
  axis  r0 < 6000
    t0 = in0[6000*x0 + r0]
    t1 = mul(mul(t0, rsqrt(add(div(sum[r0](mul(t0, t0)), f32(6000.0)), f32(1e-06)))), in1[r0])
    inner out0[6000*x0 + r0] = mul(t1, sigmoid(t1))
""",
    "gelu_norm": """kernel
  in    in0: f32[5000]
  out   out0: f32[5000]
  for   x0 < 50
  axis  r0 < 100
    t0 = in0[100*x0 + r0]
    t1 = mul(mul(t0, f32(0.5)), add(f32(1.0), erf(mul(t0, f32(0.7071067811865476)))))
    inner out0[100*x0 + r0] = sub(t1, div(sum[r0](t1), f32(100.0)))
""",
    "cross_entropy": """kernel
  in    in0: f32[5000]
  in    in1: i64[50]
  out   out0: f32[50]
  for   x0 < 50
  axis  r0 < 100
    t0 = in0[100*x0 + r0]
    t1 = max[r0](t0)
    t2 = log(sum[r0](exp(sub(t0, t1))))
    t3 = check_index(idx(in1[x0]), 100)
    row out0[x0] = sub(t2, sub(in0[100*x0 + t3], t1))
""",
    "argmax": """kernel
  in    in0: f32[5000]
  out   out0: i64[50]
  out   out1: f32[50]
  out   out2: i64[50]
  for   x0 < 50
  axis  r0 < 100
    t0 = round(mul(in0[100*x0 + r0], f32(4.0)))
    row out0[x0] = argmax[r0](t0)
    row out1[x0] = max[r0](t0)
    row out2[x0] = argmin[r0](t0)
""",
    "argmax_2d": """kernel
  in    in0: f32[6000]
  out   out0: i64[10]
  for   x0 < 10
  axis  r0 < 20
  axis  r1 < 30
    row out0[x0] = argmax[r0, r1](in0[20*30*x0 + 30*r0 + r1])
""",
    "argmax_columns": """kernel
  in    in0: f32[7000]
  out   out0: i64[70]
  for   x0 < 70
  axis  r0 < 100
    row out0[x0] = argmax[r0](round(in0[x0 + 70*r0]))
""",
    "argmax_int": """kernel
  in    in0: i32[7000]
  out   out0: i64[70]
  out   out1: i64[70]
  for   x0 < 70
  axis  r0 < 100
    row out0[x0] = argmax[r0](in0[100*x0 + r0])
    row out1[x0] = sum[r0](cast.i64(in0[100*x0 + r0]))
""",
    "cumsum": """kernel
  in    in0: f32[5000]
  out   out0: f32[5000]
  for   x0 < 50
  axis  r0 < 100
    inner out0[100*x0 + r0] = scan_sum[r0](in0[100*x0 + r0])
""",
    "cumsum_dynamic": """kernel
  size  s0 >= 2
  size  s1 >= 2
  in    in0: i64[s0*s1]
  out   out0: i64[s0*s1]
  for   x0 < s1
  axis  r0 < s0
    inner out0[s1*r0 + x0] = scan_sum[r0](in0[s1*r0 + x0])
""",
    "cumsum_columns": """kernel
  in    in0: f32[5000]
  in    in1: i64[5000]
  out   out0: f32[5000]
  out   out1: i64[5000]
  for   x0 < 50
  axis  r0 < 100
    inner out0[x0 + 50*r0] = scan_sum[r0](in0[x0 + 50*r0])
    inner out1[x0 + 50*r0] = add(scan_sum[r0](in1[x0 + 50*r0]), i64(1))
""",
    "cummax": """kernel
  in    in0: f32[5000]
  out   out0: f32[5000]
  for   x0 < 50
  axis  r0 < 100
    inner out0[100*x0 + r0] = scan_max[r0](in0[100*x0 + r0])
""",
    "cat": """kernel
  in    in0: f32[300]
  in    in1: bf16[200]
  out   out0: f32[500]
  for   x0 < 10
  for   x1 < 50
    t0 = lt(x1, 30)
    t1 = cast.f32(in1[20*x0 + x1 - 30 if ge(x1, 30) else bf16(0.0)])
    row out0[50*x0 + x1] = where(t0, in0[30*x0 + x1 if t0 else f32(0.0)], t1)
""",
    "pad_inf": """kernel
  in    in0: f32[100]
  out   out0: f32[144]
  for   x0 < 12
  for   x1 < 12
    t0 = and_(and_(ge(x0, 1), lt(x0, 11)), and_(ge(x1, 1), lt(x1, 11)))
    row out0[12*x0 + x1] = in0[10*x0 + x1 - 11 if t0 else f32(-inf)]
""",
    "permute": """kernel
  in    in0: f32[6000]
  out   out0: f32[6000]
  for   x0 < 20
  for   x1 < 10
  for   x2 < 30
    row out0[300*x0 + 30*x1 + x2] = in0[x0 + 20*x1 + 200*x2]
""",
    "permute_guarded": """kernel
  size  s0 >= 2
  size  s1 >= 2
  in    in0: bf16[s0*s1]
  in    in1: f64[s0*s1]
  out   out0: bf16[s0*s1 + 2*s0]
  out   out1: f64[s0*s1 + 2*s0]
  for   x0 < s0
  for   x1 < s1 + 2
    t0 = lt(x1, s1)
    row out0[(s1 + 2)*x0 + x1] = cast.bf16(mul(cast.f32(in0[s0*x1 + x0 if t0 else bf16(1.5)]), f32(3.0)))
    row out1[(s1 + 2)*x0 + x1] = exp(in1[s0*x1 + x0 if t0 else f64(0.0)])
""".replace("(s1 + 2)*x0", "s1*x0 + 2*x0"),
    "float64": """kernel
  in    in0: f64[3700]
  out   out0: f64[3700]
  out   out1: f64[37]
  for   x0 < 37
  axis  r0 < 100
    t0 = in0[100*x0 + r0]
    t1 = exp(sub(t0, max[r0](t0)))
    row out1[x0] = sum[r0](t0)
    inner out0[100*x0 + r0] = div(tanh(t1), sum[r0](t1))
""",
    "scan_and_reduce": """kernel
  in    in0: f32[5000]
  out   out0: f32[5000]
  out   out1: f32[50]
  for   x0 < 50
  axis  r0 < 100
    t0 = in0[100*x0 + r0]
    t1 = scan_sum[r0](exp(sub(t0, max[r0](t0))))
    row out1[x0] = max[r0](t1)
    inner out0[100*x0 + r0] = log(scan_max[r0](t1))
""",
    "norm_backward": """kernel
  in    in0: f32[5000]
  in    in1: f32[5000]
  in    in2: f32[50]
  in    in3: f32[100]
  out   out0: f32[5000]
  out   out1: bf16[5000]
  for   x0 < 50
  axis  r0 < 100
    t0 = mul(in0[100*x0 + r0], in3[r0])
    t1 = mul(in1[100*x0 + r0], in2[x0])
    t2 = div(add(sum[r0](t0), mul(t1, sum[r0](mul(t0, t1)))), f32(100.0))
    t3 = mul(in2[x0], sub(t0, t2))
    inner out0[100*x0 + r0] = t3
    inner out1[100*x0 + r0] = cast.bf16(add(cast.f32(cast.bf16(t3)), f32(1.0)))
""",
    "inplace_row": """kernel
  inout in0: f32[5000]
  inout in1: f32[50]
  for   x0 < 50
  axis  r0 < 100
    t0 = in0[100*x0 + r0]
    row in1[x0] = add(in1[x0], sum[r0](t0))
    inner in0[100*x0 + r0] = sub(t0, in1[x0])
""",
    "max_pool": """kernel
  in    in0: f32[6400]
  out   out0: f32[1600]
  out   out1: i64[1600]
  for   x0 < 40
  for   x1 < 40
  axis  r0 < 2
  axis  r1 < 2
    t0 = in0[160*x0 + 2*x1 + 80*r0 + r1]
    row out0[40*x0 + x1] = max[r0, r1](t0)
    row out1[40*x0 + x1] = argmax[r0, r1](t0)
""",
    "column_sum": """kernel
  in    in0: f32[70000]
  out   out0: f32[70]
  for   x0 < 70
  axis  r0 < 1000
    row out0[x0] = sum[r0](in0[x0 + 70*r0])
""",
    "column_stats_dynamic": """kernel
  size  s0 >= 2
  size  s1 >= 2
  in    in0: f32[s0*s1]
  out   out0: f32[s1]
  out   out1: f32[s1]
  for   x0 < s1
  axis  r0 < s0
    t0 = in0[s1*r0 + x0]
    t1 = div(sum[r0](t0), cast.f32(s0))
    t2 = sub(t0, t1)
    row out0[x0] = t1
    row out1[x0] = div(sum[r0](mul(t2, t2)), cast.f32(s0))
""",
    "channel_stats": """kernel
  in    in0: f32[3000]
  out   out0: f32[6]
  out   out1: f32[3000]
  for   x0 < 6
  axis  r0 < 5
  axis  r1 < 100
    t0 = in0[100*x0 + 600*r0 + r1]
    t1 = div(sum[r0, r1](t0), f32(500.0))
    row out0[x0] = t1
    inner out1[100*x0 + 600*r0 + r1] = sub(t0, t1)
""",
    "full_sum": """kernel
  in    in0: f32[100000]
  out   out0: f32[1]
  axis  r0 < 100000
    row out0[0] = sum[r0](in0[r0])
""",
    "full_norm_dynamic": """kernel
  size  s0 >= 2
  size  s1 >= 2
  in    in0: f32[s0*s1]
  out   out0: f32[1]
  out   out1: f32[s0*s1]
  axis  r0 < s0*s1
    t0 = in0[r0]
    t1 = sqrt(sum[r0](mul(t0, t0)))
    row out0[0] = t1
    inner out1[r0] = div(t0, t1)
""",
    "matvec": """kernel
  in    in0: f32[576]
  in    in1: f32[55296]
  out   out0: f32[96]
  for   x0 < 96
  axis  r0 < 576
    row out0[x0] = sum[r0](mul(in0[r0], in1[576*x0 + r0]))
""",
    "any_all": """kernel
  in    in0: b1[5000]
  in    in1: f32[5000]
  out   out0: b1[50]
  out   out1: b1[50]
  out   out2: f32[50]
  out   out3: f32[50]
  for   x0 < 50
  axis  r0 < 100
    row out0[x0] = any[r0](in0[100*x0 + r0])
    row out1[x0] = all[r0](or_(in0[100*x0 + r0], lt(in1[100*x0 + r0], f32(1.0))))
    row out2[x0] = prod[r0](in1[100*x0 + r0])
    row out3[x0] = min[r0](in1[100*x0 + r0])
""",
    "embedding": """kernel
  in    in0: i64[20]
  in    in1: f32[500]
  out   out0: f32[1000]
  for   x0 < 20
  for   x1 < 50
    row out0[50*x0 + x1] = in1[50*check_index(idx(in0[x0]), 10) + x1]
""",
    "gather": """kernel
  in    in0: i64[200]
  in    in1: f32[500]
  out   out0: f32[200]
  for   x0 < 200
    row out0[x0] = in1[check_index(idx(in0[x0]), 10)]
""",
    "inplace": """kernel
  inout in0: f32[1000]
  in    in1: f32[1000]
  for   x0 < 1000
    row in0[x0] = add(in0[x0], in1[x0])
""",
    "repeat": """kernel
  in    in0: f32[300]
  out   out0: f32[2100]
  for   x0 < 2100
    row out0[x0] = in0[(x0//7)]
""",
    "roll": """kernel
  in    in0: f32[300]
  out   out0: f32[300]
  for   x0 < 300
    row out0[x0] = add(in0[((x0 + 17) % 300)], cast.f32(((x0 - 20)//7)))
""",
    "convert": """kernel
  in    in0: f32[1000]
  out   out0: f16[1000]
  out   out1: bf16[1000]
  out   out2: f64[1000]
  out   out3: i32[1000]
  out   out4: b1[1000]
  out   out5: u8[1000]
  out   out6: i8[1000]
  for   x0 < 1000
    t0 = in0[x0]
    row out0[x0] = cast.f16(t0)
    row out1[x0] = cast.bf16(t0)
    row out2[x0] = cast.f64(t0)
    row out3[x0] = cast.i32(t0)
    row out4[x0] = cast.b1(t0)
    row out5[x0] = cast.u8(abs(t0))
    row out6[x0] = cast.i8(t0)
""",
    "half_in": """kernel
  in    in0: f16[1000]
  in    in1: bf16[1000]
  out   out0: f32[1000]
  for   x0 < 1000
    row out0[x0] = add(cast.f32(in0[x0]), cast.f32(in1[x0]))
""",
    "integers": """kernel
  in    in0: i32[1000]
  in    in1: i32[1000]
  out   out0: i32[1000]
  out   out1: i32[1000]
  out   out2: i32[1000]
  out   out3: i32[1000]
  out   out4: i32[1000]
  for   x0 < 1000
    t0 = in0[x0]
    t1 = add(or_(in1[x0], i32(1)), i32(0))
    row out0[x0] = floordiv(t0, t1)
    row out1[x0] = mod(t0, t1)
    row out2[x0] = truncdiv(t0, t1)
    row out3[x0] = maximum(xor(t0, t1), shl(t0, i32(3)))
    row out4[x0] = mul(mul(t0, t1), sub(t0, neg(t1)))
""",
}


def inputs(kernel: Kernel, seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    out = {}
    for b in kernel.buffers:
        n = evaluate(b.size, SIZES)
        dtype = interp.TORCH_DTYPE[b.dtype]
        if b.dtype == "b1":
            t = torch.rand(n, generator=g) < 0.02
        elif dtype.is_floating_point:
            t = torch.randn(n, generator=g, dtype=torch.float64).to(dtype)
        else:
            t = torch.randint(-10, 10, (n,), generator=g).to(dtype)
        out[b.name] = t
    return out


def variants(name: str) -> list[str]:
    """ "" the default plan, _c the other vectorised variable, _p threads and a cut axis however small the kernel; with an s what
    can be is written past the caches."""
    axis = "axis" in KERNELS[name]
    found = ["", "_c", "_p"] if axis else [""]
    streams = ("inner out" if axis else "row out") in KERNELS[name]
    return found + [f"_s{suffix[1:]}" for suffix in found if streams]


def source(name: str, suffix: str) -> str:
    kernel = parse_kernel(KERNELS[name])
    plan = replace(default_plan(kernel, SIZES), stream=suffix.startswith("_s"))
    with pytest.MonkeyPatch.context() as patch:
        if suffix.endswith("p"):
            patch.setattr(cpp_nest, "_PARALLEL", 1)
            plan = replace(plan, rblock=16)
        elif suffix.endswith("c"):
            plan = replace(plan, columns=not plan.columns, xblock=32)
        return render(kernel, plan, name + suffix)


CASES = [(name, suffix) for name in KERNELS for suffix in variants(name)]


@lru_cache(maxsize=1)
def library() -> dict[str, int]:
    sources = [(name + suffix, source(name, suffix)) for name, suffix in CASES]
    result = build(sources, open_cache(False), environment_key("cpu"), PRELUDE)
    assert not result.errors, next(iter(result.errors.items()))
    return result.addresses


@lru_cache(maxsize=1)
def kernels() -> dict[str, Kernel]:
    return {name: parse_kernel(text) for name, text in KERNELS.items()}


def call(symbol: str, kernel: Kernel, buffers: dict[str, torch.Tensor]) -> int:
    args = [ctypes.c_void_p(buffers[b.name].data_ptr()) for b in kernel.buffers]
    args += [ctypes.c_int64(SIZES[s.name]) for s in kernel.sizes]
    return ctypes.CFUNCTYPE(ctypes.c_int)(library()[symbol])(*args)


def run_both(
    name: str, suffix: str, data: dict[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    kernel = kernels()[name]
    mine = {n: t.clone() for n, t in data.items()}
    theirs = {n: t.clone() for n, t in data.items()}
    interp.run(kernel, theirs, SIZES)
    assert call(name + suffix, kernel, mine) == 0
    return mine, theirs


@pytest.mark.parametrize(("name", "suffix"), CASES)
def test_same_as_interpreter(name: str, suffix: str) -> None:
    kernel = kernels()[name]
    for seed in range(2):
        mine, theirs = run_both(name, suffix, inputs(kernel, seed))
        for b in kernel.buffers:
            a, c = mine[b.name], theirs[b.name]
            assert a.dtype == c.dtype
            rtol = {torch.bfloat16: 0.01, torch.float16: 1e-3}.get(a.dtype, 2e-5)
            torch.testing.assert_close(a, c, rtol=rtol, atol=2e-5, equal_nan=True, msg=lambda m: f"{b.name}: {m}")


@pytest.mark.parametrize("name", ["argmax", "argmax_2d", "argmax_columns", "any_all", "softmax", "cummax", "cumsum"])
@pytest.mark.parametrize("suffix", ["", "_c", "_p"])
def test_nan_and_infinity(name: str, suffix: str) -> None:
    kernel = kernels()[name]
    data = inputs(kernel)
    for t in data.values():
        if t.is_floating_point():
            t[::97] = float("nan")
            t[::31] = float("inf")
            t[5::41] = -0.0
            t[7::53] = float("-inf")
    mine, theirs = run_both(name, suffix, data)
    for b in kernel.buffers:
        torch.testing.assert_close(mine[b.name], theirs[b.name], rtol=2e-5, atol=2e-5, equal_nan=True)


def test_conversion_is_bit_exact() -> None:
    special = [
        0.0,
        -0.0,
        math.inf,
        -math.inf,
        math.nan,
        65504.0,
        65519.9,
        65520.0,
        1e-8,
        6e-8,
        5.9604645e-08,
        6.1e-5,
        1e-40,
    ]
    for name in ("convert", "half_in"):
        data = inputs(kernels()[name])
        for t in data.values():
            if t.is_floating_point():
                t[: len(special)] = torch.tensor(special, dtype=torch.float64).to(t.dtype)
                t[100:110] = (2.0 ** torch.arange(-30, -20, dtype=torch.float64) * 1.3).to(t.dtype)
        mine, theirs = run_both(name, "", data)
        for b in kernels()[name].buffers:
            a, c = mine[b.name], theirs[b.name]
            if a.dtype in (torch.float16, torch.bfloat16, torch.float32):
                assert torch.equal(a.isnan(), c.isnan())
                bits = {2: torch.int16, 4: torch.int32}[a.element_size()]
                keep = ~c.isnan()
                assert torch.equal(a[keep].view(bits), c[keep].view(bits)), b.name
            elif a.dtype == torch.bool:
                assert torch.equal(a, c)


@pytest.mark.parametrize("name", ["embedding", "gather", "cross_entropy"])
@pytest.mark.parametrize("suffix", ["", "_p"])
def test_an_index_out_of_range_is_reported(name: str, suffix: str) -> None:
    kernel = kernels()[name]
    if suffix not in variants(name):
        pytest.skip("one variant only")
    data = inputs(kernel)
    which = next(b.name for b in kernel.buffers if b.dtype == "i64")
    data[which][3] = 1 << 40
    assert call(name + suffix, kernel, data) == 1


def test_text_is_stable() -> None:
    kernel = kernels()["softmax_dynamic"]
    plan = default_plan(kernel, SIZES)
    again = parse_kernel(kernel.text)
    assert render(kernel, plan, "k") == render(again, plan, "k")


# -- results written past the caches ------------------------------------------------------------------------------------

EVERY_TYPE = KERNELS["convert"].replace("1000", "2345")


def streamed(text: str, symbol: str) -> tuple[Kernel, str]:
    kernel = parse_kernel(text)
    return kernel, render(kernel, replace(default_plan(kernel, SIZES), columns=False, stream=True), symbol)


def test_only_what_is_written_and_not_read_is_streamed() -> None:
    counts = {name: source(name, "_s").count("fc_stream(") for name in KERNELS}
    assert {n: c for n, c in counts.items() if n in ("softmax", "layernorm", "norm_backward", "convert")} == {
        "softmax": 1, "layernorm": 1, "norm_backward": 2, "convert": 7}  # fmt: skip
    assert not any(counts[n] for n in ("inplace", "inplace_row", "scalar", "argmax", "full_sum", "column_sum"))
    assert all("fc_stream" not in source(name, "") for name in KERNELS)


def test_every_thread_ends_its_stream_before_the_others_go_on() -> None:
    text = source("norm_backward", "_sp")
    regions = [r.split("\n  }\n")[0] for r in text.split("#pragma omp parallel")[1:]]
    assert [r.endswith("\n    fc_fence();") for r in regions] == ["fc_stream" in r for r in regions]
    assert text.count("fc_fence();") == 1 and len(regions) == 2


@pytest.mark.parametrize("tool", ["", "-mno-avx512f", "-mno-avx"])
def test_a_stream_writes_its_elements_and_no_others(tool: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the element's size and wherever the buffers begin; with each of the widths that the prelude knows."""
    if tool:
        if platform.machine() != "x86_64":
            pytest.skip("instructions of x86")
        monkeypatch.setenv("CXX", f"g++ {tool}")
    kernel, text = streamed(EVERY_TYPE, "every_type")
    result = build([("every_type", text)], open_cache(False), environment_key("cpu"), PRELUDE)
    assert not result.errors, result.errors
    function = ctypes.CFUNCTYPE(ctypes.c_int)(result.addresses["every_type"])
    expected = inputs(kernel)
    interp.run(kernel, expected, {})
    for shift in (0, 1, 7, 16, 61):
        whole = {n: torch.full((len(t) + 128,), 3).to(t.dtype) for n, t in expected.items()}
        mine = {n: t[shift : shift + len(expected[n])] for n, t in whole.items()}
        mine["in0"].copy_(expected["in0"])
        assert function(*[ctypes.c_void_p(mine[b.name].data_ptr()) for b in kernel.buffers]) == 0
        for n, t in whole.items():
            assert torch.equal(mine[n], expected[n]), (n, shift)
            others = torch.cat([t[:shift], t[shift + len(expected[n]) :]])
            assert torch.equal(others, torch.full((128,), 3).to(t.dtype)), (n, shift)


def test_nothing_to_stream() -> None:
    kernel, text = streamed(KERNELS["softmax"].replace("3700", "0").replace("r0 < 100", "r0 < 0"), "empty")
    assert "fc_stream" in text
    result = build([("empty", text)], open_cache(False), environment_key("cpu"), PRELUDE)
    assert not result.errors
    guard = torch.ones(64)
    pointer = ctypes.c_void_p(guard.data_ptr())
    assert ctypes.CFUNCTYPE(ctypes.c_int)(result.addresses["empty"])(pointer, pointer) == 0
    assert guard.eq(1).all()


@pytest.mark.parametrize("block", [100, 200, 512])
def test_chunks_end_where_blocks_of_columns_end(block: int) -> None:
    kernel = parse_kernel("""kernel
  in    in0: f32[8192]
  out   out0: f32[8192]
  for   x0 < 1024
  axis  r0 < 8
    t0 = in0[x0 + 1024*r0]
    inner out0[x0 + 1024*r0] = sub(t0, sum[r0](t0))
""")
    name = f"blocks_{block}"
    text = render(kernel, replace(default_plan(kernel, {}), columns=True, xblock=block, stream=True), name)
    result = build([(name, text)], open_cache(False), environment_key("cpu"), PRELUDE)
    mine = inputs(kernel)
    theirs = {n: t.clone() for n, t in mine.items()}
    interp.run(kernel, theirs, {})
    arguments = [ctypes.c_void_p(t.data_ptr()) for t in mine.values()]
    assert "fc_stream" in text and ctypes.CFUNCTYPE(ctypes.c_int)(result.addresses[name])(*arguments) == 0
    torch.testing.assert_close(mine["out0"], theirs["out0"])
