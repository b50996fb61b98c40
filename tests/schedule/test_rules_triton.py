"""Default plans: kernels that would spill, or take seconds to compile, with the usual number of elements a thread; hints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fusionc import warm
from fusionc.ir.text import parse_kernel
from fusionc.record import collect
from fusionc.runtime import device
from fusionc.runtime.device import known
from fusionc.schedule import space
from fusionc.schedule.rules_triton import MOST_LONG, accumulators, default_plan, long_functions, streams
from fusionc.targets import triton

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


@pytest.mark.parametrize(
    "arch, read, written, hint",
    [("sm_90", 1, 1, True), ("sm_90", 4, 1, True), ("sm_90", 6, 1, False), ("gfx942", 16, 16, False)],
)
def test_what_streams(arch: str, read: int, written: int, hint: bool) -> None:
    n = known(arch).cache // (2 if read == 1 else 4)
    ins = "".join(f"  in    in{i}: f32[{n}]\n" for i in range(read))
    outs = "".join(f"  out   out{i}: f32[{n}]\n" for i in range(written))
    total = "in0[x0]"
    for i in range(1, read):
        total = f"add({total}, in{i}[x0])"
    rows = "".join(f"    row out{i}[x0] = {total}\n" for i in range(written))
    k = parse_kernel(f"kernel\n{ins}{outs}  for   x0 < {n}\n{rows}")
    assert streams(k, {}, known(arch)) is hint
    half = parse_kernel(f"kernel\n{ins}{outs}  for   x0 < {n}\n{rows}".replace(str(n), str(n // 8)))
    assert not streams(half, {}, known(arch)), "less than twice the cache"


def rms_norm(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    h = x + r
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6) * w, h


def twice(x: Tensor, r: Tensor, w: Tensor) -> Tensor:
    return rms_norm(rms_norm(x, r, w)[0].flip(0), r, w)[0]


def gated(x: Tensor, r: Tensor, w: Tensor) -> Tensor:
    return torch.tanh(x) * r + w


def beside(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    return gated(x, r, w), torch.sort(w)[0]


INPUTS = (torch.randn(64, 256), torch.randn(64, 256), torch.randn(256))


@pytest.fixture
def small_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(device._KNOWN, "sm_90", replace(known("sm_90"), cache=1 << 15))


@pytest.mark.parametrize("f, hints", [(rms_norm, 2), (twice, 0), (gated, 3), (beside, 0)])
def test_only_a_kernel_that_is_all_of_its_graph_streams(small_cache: None, f: Callable[..., Any], hints: int) -> None:
    torch._dynamo.reset()
    with torch.no_grad(), collect() as records:
        torch.compile(f, backend="fusionc", options={"target": "sm_90", "cache": False})(*INPUTS)
    texts = [k.source for r in records for k in r.kernels]
    assert [t.count('eviction_policy="evict_last"') for t in texts] == ([hints] if hints else [0] * len(texts))


def test_a_forward_graph_does_not_stream(small_cache: None) -> None:
    torch._dynamo.reset()
    inputs = [t.clone().requires_grad_() for t in INPUTS]
    with collect() as records:
        torch.compile(gated, backend="fusionc", options={"target": "sm_90", "cache": False})(*inputs)
    assert [r.stage for r in records] and all("evict" not in k.source for r in records for k in r.kernels)


@pytest.mark.interpret
def test_a_graph_from_the_cache_streams_too(small_cache: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm.Warm, "load", lambda self: None)
    plans: list[bool] = []
    render = triton.codegen.render
    monkeypatch.setattr(triton.codegen, "render", lambda k, plan, *a: plans.append(plan.stream) or render(k, plan, *a))
    for _ in range(2):
        torch._dynamo.reset()
        with torch.no_grad(), collect() as records:
            options = {"target": "interpret", "cache": str(tmp_path), "verify": False}
            got = torch.compile(rms_norm, backend="fusionc", options=options)(*INPUTS)
        torch.testing.assert_close(got, rms_norm(*INPUTS))
    assert records[0].cache == "hit" and plans == [True, True]
