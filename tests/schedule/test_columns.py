"""Column sums beside row results: the loop IR, its stages, and where graphs get them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusionc.codegen.triton import refusal, render
from fusionc.errors import VerifyError
from fusionc.ir import interp
from fusionc.ir.expr import Reduce, Size, Var, flat, index
from fusionc.ir.loop import ColumnStore, Kernel, evaluate
from fusionc.ir.simplify import simplify
from fusionc.ir.text import parse_kernel
from fusionc.ir.verify import verify
from fusionc.record import collect
from fusionc.runtime.device import TARGETS, known
from fusionc.runtime.launch import cross_compile, grid_of, interpret
from fusionc.schedule.columns import stage
from fusionc.schedule.plan import Plan
from fusionc.schedule.rules_triton import column_parts, default_plan
from tests.codegen.kernels import Buffers, Case, axis, const, f, inp, kernel, load, loop, outp, st

H200 = known("sm_90")


def norm_backward(rows: Any, n: int, dtype: str = "f32", *, stride: int = 0, batch: int = 0, **sizes: int) -> Case:
    """dx = (dy·w - mean(dy·w·x)·x)·s of each row; dw = Σ dy·x·s, db = Σ dy in the dtype of the data.

    `stride` spreads the rows of x, `batch` makes two loops of which x is read in the other order.
    """
    stride = stride or n
    (*outer, x), (r,) = loop(*([batch] if batch else []), rows), axis(n)
    loops = (*outer, x)
    row = flat(loops)
    place = row if not batch else index(x) * batch + outer[0]
    dy, xv = load("in0", row * n + r, dtype), load("in1", place * stride + r, dtype)
    w, s = load("in2", index(r), dtype), load("in3", row)
    g = f("mul", dy, w)
    mean = f("div", Reduce("sum", (r,), f("mul", g, xv), "f32"), const(float(n)))
    dx = f("mul", f("sub", g, f("mul", mean, xv)), s)

    def total(e: Any) -> Any:
        return (
            f("cast", Reduce("sum", loops, e, "f32"), dtype=dtype) if dtype != "f32" else Reduce("sum", loops, e, "f32")
        )

    def expected(t: Buffers) -> Buffers:
        m = t["in3"].numel()
        at = torch.arange(m)
        if batch:
            at = at.view(batch, -1)
            at = (torch.arange(at.shape[1])[None] * batch + torch.arange(batch)[:, None]).reshape(-1)
        xs = torch.stack([t["in1"][i * stride : i * stride + n] for i in at.tolist()]).double()
        dys, ws, ss = t["in0"].view(m, n).double(), t["in2"].double(), t["in3"].double()[:, None]
        gs = dys * ws
        got = {
            "out0": (gs - (gs * xs).mean(1, keepdim=True) * xs) * ss,
            "out1": (dys * xs * ss).sum(0),
            "out2": dys.sum(0),
        }
        return {k: v.reshape(-1).to(t["in0"].dtype) for k, v in got.items()}

    count = index(rows) * (batch or 1)
    cast = f("cast", dx, dtype=dtype) if dtype != "f32" else dx
    k = kernel(
        [
            *(inp("in0", count * n, dtype), inp("in1", (count - 1) * stride + n, dtype), inp("in2", n, dtype)),
            *(inp("in3", count), outp("out0", count * n, dtype), outp("out1", n, dtype), outp("out2", n, dtype)),
        ],
        loops,
        (r,),
        [st("out0", row * n + r, cast, True)],
        tuple(Size(name, 2) for name in sizes),
    )
    sums = ColumnStore("out1", index(r), total(f("mul", f("mul", dy, xv), s))), ColumnStore("out2", index(r), total(dy))
    return Case(f"norm_backward_{dtype}_{n}", replace(k, columns=sums), expected, dict(sizes))


CASES = {
    "f32": norm_backward(13, 24),
    "bf16": norm_backward(13, 20, "bf16"),
    "f16": norm_backward(9, 32, "f16"),
    "strided": norm_backward(11, 24, stride=40),
    "transposed": norm_backward(5, 16, batch=3),
    "dynamic": norm_backward(Size("s0", 2), 24, s0=17),
}
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}


def check(got: Buffers, want: Buffers) -> None:
    for name, t in want.items():
        tol = TOLERANCE[t.dtype]
        torch.testing.assert_close(got[name], t, rtol=tol, atol=tol)


@pytest.mark.parametrize("name", CASES)
def test_interpreter_values_and_text(name: str) -> None:
    case = CASES[name]
    verify(case.kernel)
    assert parse_kernel(case.kernel.text) == case.kernel
    assert simplify(case.kernel) is case.kernel
    got = case.inputs()
    interp.run(case.kernel, got, case.sizes)
    check(got, case.expected(case.inputs()))


def run_stages(case: Case, parts: int, xblock: int | None = None) -> Buffers:
    """Both stages: by the loop interpreter, or (xblock) rendered, in Triton's interpreter."""
    got = case.inputs()
    for k in stage(case.kernel, parts):
        verify(k)
        assert parse_kernel(k.text) == k
        for b in k.buffers:
            if b.name not in got:
                got[b.name] = torch.full((evaluate(b.size, case.sizes),), 77.0)
        mine = {b.name: got[b.name] for b in k.buffers}
        sizes = {s.name: case.sizes[s.name] for s in k.sizes}
        if xblock is None:
            interp.run(k, mine, sizes)
        else:
            plan = Plan("triton", xblock if k.columns else 4, 0)
            interpret(render(k, plan, "k0"), "k0", k, plan, list(mine.values()), sizes)
    return got


@pytest.mark.parametrize("parts", [1, 3, 20])  # 20: more than rows, so that some shares are empty
@pytest.mark.parametrize("name", CASES)
def test_stages(name: str, parts: int) -> None:
    check(run_stages(CASES[name], parts), CASES[name].expected(CASES[name].inputs()))


@pytest.mark.interpret
@pytest.mark.parametrize("xblock", [1, 4])
@pytest.mark.parametrize("name", CASES)
def test_rendered(name: str, xblock: int) -> None:
    """Rows not a multiple of parts × XBLOCK; partial sums are those of the loop interpreter, share by share."""
    got, want = run_stages(CASES[name], 3, xblock), run_stages(CASES[name], 3)
    check(got, CASES[name].expected(CASES[name].inputs()))
    torch.testing.assert_close(got["part0"], want["part0"], rtol=1e-5, atol=1e-5)
    again = run_stages(CASES[name], 3, xblock)
    assert all(torch.equal(got[n], again[n]) for n in got)


def test_what_the_verifier_refuses() -> None:
    case = CASES["f32"]
    k = case.kernel
    (x,), (r,) = k.loops, k.axis
    dy = load("in0", index(x) * 24 + r)
    bad = {
        "depends on x0": replace(k, columns=(ColumnStore("out1", index(r), dy), k.columns[1])),
        "columns are summed": replace(
            k, columns=(ColumnStore("out1", index(r), Reduce("max", (x,), dy, "f32")), k.columns[1])
        ),
        "every point of r0": replace(k, columns=(ColumnStore("out1", index(0), k.columns[0].value), k.columns[1])),
        "outside its": replace(k, columns=(ColumnStore("out1", index(r) + 1, k.columns[0].value), k.columns[1])),
        "no column store": replace(k, columns=(), buffers=k.buffers[:-2], part=Var("p0", 3)),
        "reads a column sum": replace(k, stores=(st("out0", index(x) * 24 + r, k.columns[0].value, True),)),
        "both loops and an axis": replace(k, loops=(), stores=()),
    }
    for message, broken in bad.items():
        with pytest.raises(VerifyError, match=message):
            verify(broken)
    with pytest.raises(ValueError, match="one part"):
        parse_kernel(k.text.replace("  for ", "  part  p0 < 3\n  part  p1 < 3\n  for "))


def test_what_cannot_be_rendered() -> None:
    whole, (staged, _) = CASES["f32"].kernel, stage(CASES["f32"].kernel, 3)
    assert "staged" in (refusal(whole, Plan("triton", 1, 0)) or "")
    assert "whole rows" in (refusal(staged, Plan("triton", 1, 16)) or "")
    assert refusal(staged, Plan("triton", 1, 0)) is None
    assert grid_of(staged, Plan("triton", 1, 0), {}) == 3


def test_parts() -> None:
    """Long rows and few rows are left alone; the row count may be known at run time only."""
    assert column_parts(norm_backward(16384, 4096, "bf16").kernel, {}, H200) >= H200.processors
    assert column_parts(norm_backward(Size("s0", 2), 4096, "bf16", s0=4096).kernel, {"s0": 4096}, H200)
    assert column_parts(norm_backward(128, 4096, "bf16").kernel, {}, H200) == 0
    assert column_parts(norm_backward(16384, 32768, "bf16").kernel, {}, H200) == 0


@pytest.mark.cross
@pytest.mark.parametrize("target", TARGETS)
def test_builds(target: str) -> None:
    case = norm_backward(16384, 2048, "bf16")
    for k in stage(case.kernel, column_parts(case.kernel, {}, known(target))):
        plan = default_plan(k, {}, known(target))
        built = cross_compile(render(k, plan, "k0"), "k0", k, plan, target)
        assert built.spills == 0


@pytest.mark.cross
@pytest.mark.slow
@pytest.mark.parametrize("n,dtype", [(768, "bf16"), (1024, "f32"), (4096, "bf16"), (8192, "bf16"), (4096, "f32")])
def test_no_spills_on_hopper(n: int, dtype: str) -> None:
    k, _ = stage(norm_backward(16384, n, dtype).kernel, 132)
    plan = default_plan(k, {}, H200)
    assert cross_compile(render(k, plan, "k0"), "k0", k, plan, "sm_90").spills == 0


# -- in graphs ----------------------------------------------------------------------------------------------------


class PlainRMS(nn.Module):
    """RMSNorm in plain operators, after a residual sum that is a result too."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + 0.1 * torch.randn(width))

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        x = x + residual
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
        return x, self.weight * h.to(x.dtype)


class Norm(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.norm(x) + residual


def gradients(model: nn.Module, inputs: list[Tensor], call: Any) -> list[Tensor]:
    torch.manual_seed(1)
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    out = call(*inputs)
    out = out if isinstance(out, tuple) else (out,)
    torch.autograd.backward(out, [torch.randn(o.shape, dtype=torch.float64).to(o.dtype) for o in out])
    grads = [x.grad for x in inputs] + [p.grad for p in model.parameters()]
    for p in model.parameters():
        p.grad = None
    return [g for g in grads if g is not None]


def backward_kernels(
    model: nn.Module, inputs: list[Tensor], dump: Path, target: str = "interpret"
) -> tuple[list[Kernel], list[Tensor]]:
    torch._dynamo.reset()
    options = {"target": target, "cache": False, "verify": True, "dump": str(dump), "strict": True}
    with collect() as records:
        got = gradients(model, inputs, torch.compile(model, backend="fusionc", options=options))
    (record,) = [r for r in records if r.stage == "backward"]
    return [parse_kernel(k.loop_text) for k in record.kernels], got


MODELS = {
    "layer_norm": lambda: Norm(nn.LayerNorm(24)),
    "rms_norm": lambda: Norm(nn.RMSNorm(24)),
    "plain_rms": lambda: PlainRMS(24),
}


@pytest.mark.interpret
@pytest.mark.parametrize("name", MODELS)
def test_norm_backward_is_one_pass(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MODELS[name]()
    x, residual = torch.randn(4, 150, 24), torch.randn(4, 150, 24)
    kernels, got = backward_kernels(model, [x, residual], tmp_path)
    first, finish = kernels
    assert first.part is not None and len(first.columns) == sum(1 for _ in model.parameters())
    # nothing but inputs of the backward is read, and no float32 product reaches memory
    assert [b.name for b in finish.buffers if b.kind == "in"] == [f"part{i}" for i in range(len(first.columns))]
    want = gradients(model.double(), [x.double(), residual.double()], model)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.double(), w, rtol=1e-4, atol=1e-4)


def test_cpu_keeps_two_kernels(tmp_path: Path) -> None:
    kernels, _ = backward_kernels(PlainRMS(64), [torch.randn(600, 64), torch.randn(600, 64)], tmp_path, "cpp")
    assert not any(k.columns for k in kernels)


class Through(nn.Module):
    """The sum over rows needs a product of the row results: no single pass."""

    def forward(self, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.softmax(x, -1)
        return y, (y @ w).sum(0)


class MaxOfColumns(nn.Module):
    def forward(self, x: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        return torch.softmax(x, -1), x.amax(0)


class OtherOrder(nn.Module):
    """The sum reads the row results at other points than those that make them."""

    def forward(self, x: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.softmax(x, -1)
        return y, y.flip(0).sum(0)


class Sums(nn.Module):
    def forward(self, x: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.softmax(x, -1)
        return y, y.sum(0)


def inference_kernels(model: nn.Module, x: Tensor, w: Tensor, dump: Path) -> list[Kernel]:
    torch._dynamo.reset()
    options = {"target": "sm_90", "cache": False, "verify": True, "dump": str(dump)}
    with torch.no_grad(), collect() as records:
        torch.compile(model, backend="fusionc", options=options)(x, w)
    return [parse_kernel(k.loop_text) for r in records for k in r.kernels]


class BiasedMLP(nn.Module):
    """The bias's gradient is a sum over rows of what the activation's backward stores for the matmul."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.gelu(self.up(x)))


@pytest.mark.interpret
def test_pointwise_kernels_are_cut_into_rows(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = BiasedMLP(), torch.randn(3, 200, 32)
    kernels, got = backward_kernels(model, [x], tmp_path)
    (k,) = [k for k in kernels if k.columns]
    assert not k.reductions and len(k.stores) == len(k.columns) == 1
    want = gradients(model.double(), [x.double()], model)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.double(), w, rtol=1e-4, atol=1e-4)


class Permuted(nn.Module):
    """Heads put back in order, and the sum over rows of the result: rows and columns have two variables each."""

    def forward(self, x: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        y = (x.view(150, 4, 8, 8) * 2).transpose(1, 2).reshape(-1, 32)
        return y, y.sum(0)


@pytest.mark.cross
@pytest.mark.parametrize(
    "model,rows,merged",
    [
        (Sums(), 600, True),
        (Through(), 600, False),
        (MaxOfColumns(), 600, False),
        (OtherOrder(), 600, False),
        (Sums(), 64, False),
        (Permuted(), 600, True),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else str(v),
)
def test_where_it_is_formed(model: nn.Module, rows: int, merged: bool, tmp_path: Path) -> None:
    kernels = inference_kernels(model, torch.randn(rows, 64), torch.randn(64, 64), tmp_path)
    assert any(k.columns for k in kernels) is merged


@pytest.mark.cross
def test_dynamic_rows(tmp_path: Path) -> None:
    x = torch.randn(1000, 64)
    torch._dynamo.mark_dynamic(x, 0)
    kernels = inference_kernels(Sums(), x, torch.randn(64, 64), tmp_path)
    (k,) = [k for k in kernels if k.columns]
    assert k.sizes and all(v.extent.is_const for v in k.axis)
