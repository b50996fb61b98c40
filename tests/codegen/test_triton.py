"""Rendered Triton kernels in Triton's interpreter, against the loop interpreter, on the shared table."""

from __future__ import annotations

import pytest
import torch

from fusionc.codegen.triton import Unrenderable, index_width, parameters, refusal, render, supports
from fusionc.ir import interp
from fusionc.ir.expr import FLOATS, Load, Scan, index
from fusionc.ir.loop import Buffer, Kernel, Store
from fusionc.ir.ops import ARITY, BINARY, COMPARE, FLOAT_ONLY, PREDICATE, UNARY, op
from fusionc.ir.text import parse_kernel
from fusionc.runtime.device import known
from fusionc.runtime.launch import interpret, load_module, needs_wide
from fusionc.schedule.plan import Plan
from fusionc.schedule.rules_triton import default_plan
from tests.codegen import kernels

pytestmark = pytest.mark.interpret
CASES = {c.name: c for c in kernels.cases()}
POINTWISE, WHOLE, STEPS = Plan("triton", 64), Plan("triton", 2, 0), Plan("triton", 2, 16)


def plans(k: Kernel) -> list[Plan]:
    if not k.axis:
        return [POINTWISE]
    return [STEPS, WHOLE] if k.inner.is_const else [STEPS]


def compare(case: kernels.Case, plan: Plan) -> None:
    source = render(case.kernel, plan, "k0")
    got, want = case.inputs(), case.inputs()
    interp.run(case.kernel, want, case.sizes)
    interpret(source, "k0", case.kernel, plan, list(got.values()), case.sizes)
    for name in want:
        if case.exact:
            torch.testing.assert_close(got[name], want[name], rtol=0, atol=0, equal_nan=True)
        else:
            torch.testing.assert_close(got[name], want[name], equal_nan=True)


@pytest.mark.parametrize(
    "name,plan", [(c.name, p) for c in CASES.values() for p in plans(c.kernel)], ids=lambda v: getattr(v, "rblock", v)
)
def test_interpreter(name: str, plan: Plan) -> None:
    compare(CASES[name], plan)


@pytest.mark.parametrize("name", ["softmax_f32_5_100", "column_sum_f32_50_24", "cumsum_f32_3_50", "cat_6_3_2"])
def test_default_plans(name: str) -> None:
    case = CASES[name]
    compare(case, default_plan(case.kernel, case.sizes, known("sm_90")))


def test_a_position_that_is_put_together_again_is_contiguous() -> None:
    text = """kernel
  in    in0: f32[15]
  in    in1: f32[3]
  out   out0: f32[15]
  for   x0 < 5
  for   x1 < 3
    row out0[3*x0 + x1] = mul(in0[3*x0 + x1], in1[x1])
"""
    source = render(parse_kernel(text), POINTWISE, "k0")
    assert "tl.load(in0 + x," in source and "tl.store(out0 + x," in source and "tl.load(in1 + x1" in source


def test_zero_is_no_position_where_there_are_no_loops() -> None:
    kernel = parse_kernel("kernel\n  out   out0: i64[1]\n    row out0[0] = 0\n")
    out = torch.ones(1, dtype=torch.int64)
    source = render(kernel, POINTWISE, "k0")
    interpret(source, "k0", kernel, POINTWISE, [out])
    assert out.item() == 0 and "tl.full([], x" not in source


# -- every operation ----------------------------------------------------------------------------------------------

SPECIAL = [0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 1.5, 2.5, -2.5, 3.7, -3.7, 1e-30, 1e30, 88.0, -88.0]
SPECIAL += [float("inf"), float("-inf"), float("nan"), 0.3, -0.3]
INTEGERS = [0, 1, -1, 2, -2, 7, -7, 100, -100, 3, -3, 50, 13, -13, 64, -64, 5, -5, 10, 127]


def operands(dtype: str) -> torch.Tensor:
    if dtype in FLOATS:
        return torch.tensor(SPECIAL, dtype=interp.TORCH_DTYPE[dtype])
    if dtype == "b1":
        return torch.tensor([i % 3 == 0 for i in range(20)])
    return (
        torch.tensor(INTEGERS).abs().to(torch.uint8)
        if dtype == "u8"
        else torch.tensor(INTEGERS).to(interp.TORCH_DTYPE[dtype])
    )


def operation(name: str, dtype: str, result: str) -> Kernel:
    n = len(SPECIAL)
    if ARITY[name] == 1:
        (x,) = kernels.loop(n)
        args, at = (Load("in0", index(x), dtype),), index(x)
    else:
        x, y = kernels.loop(n, n)
        args, at = (Load("in0", index(x), dtype), Load("in1", index(y), dtype)), index(x) * n + y
    loops = tuple(v for v in at.free)
    buffers = [Buffer(f"in{i}", dtype, index(n)) for i in range(len(args))]
    size = n ** len(args)
    return Kernel(
        (*buffers, Buffer("out0", result, index(size), "out")),
        (),
        tuple(sorted(loops, key=lambda v: v.name)),
        (),
        (Store("out0", at, op(name, args, result), False),),
    )


def all_operations() -> list[tuple[str, str, str]]:
    out = []
    for name in sorted((UNARY | BINARY) - {"cast", "check_index", "where"}):
        if name in ("and", "or", "xor", "not"):
            dtypes = ["b1", "i32"]
        elif name in ("shl", "shr", "truncdiv"):
            dtypes = ["i32"]
        elif name in FLOAT_ONLY or name in PREDICATE or name in ("round", "floor", "ceil", "trunc"):
            dtypes = ["f32", "f64"]
        elif name in ("fmax", "fmin"):
            dtypes = ["f32", "f64"]
        else:
            dtypes = ["f32", "f64", "i32", "i8", "u8"]
        if name in COMPARE or name in ("maximum", "minimum"):
            dtypes = ["b1", *dtypes]
        for d in dtypes:
            out.append((name, d, "b1" if name in COMPARE or name in PREDICATE else d))
    return out


def ulps(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    if not a.is_floating_point():
        return (a.long() - b.long()).abs()
    both = (a == b) | (a.isnan() & b.isnan())
    scale = torch.finfo(a.dtype).eps * b.abs().clamp_min(torch.finfo(a.dtype).tiny)
    return torch.where(both, 0, (a - b).abs() / scale)


@pytest.mark.parametrize("name,dtype,result", all_operations())
def test_operation(name: str, dtype: str, result: str) -> None:
    assert supports(name, dtype)
    k = operation(name, dtype, result)
    a = operands(dtype)
    b = a % 7 if name in ("shl", "shr") else a
    if name in ("fmod", "mod") and dtype == "f32":
        b = torch.where(b == 1e-30, 1e-3, b)  # torch's vectorised fmod gives NaN for quotients beyond 2^53
    out, want = (torch.zeros(k.outer.value, dtype=interp.TORCH_DTYPE[result]) for _ in range(2))
    ins = {"in0": a, "in1": b}
    interp.run(k, {x.name: ins.get(x.name, want) for x in k.buffers})
    interpret(render(k, POINTWISE, "k0"), "k0", k, POINTWISE, [ins.get(x.name, out) for x in k.buffers])
    if name in ("floordiv", "mod", "truncdiv", "fmod") and dtype not in FLOATS:
        keep = (b != 0).repeat(len(a))  # any value may result of a division by zero
        out, want = out[keep], want[keep]
    worst = ulps(out, want).nan_to_num(nan=1e9)
    assert worst.max() <= (0 if result not in FLOATS else 4), (out[worst.argmax()], want[worst.argmax()])
    if result in FLOATS and name not in ("lgamma", "pow", "maximum", "minimum", "fmax", "fmin"):
        zero = want == 0
        assert torch.equal(out[zero].signbit(), want[zero].signbit()), "sign of zero"


CASTS = [(a, b) for a in interp.TORCH_DTYPE for b in interp.TORCH_DTYPE if a != b]


def test_casts() -> None:
    """All pairs of dtypes in one go: one kernel a source."""
    n = 8
    (x,) = kernels.loop(n)
    for src in interp.TORCH_DTYPE:
        a = torch.tensor([0, 1, 2, 3, 100, 7, 0, 50]).to(interp.TORCH_DTYPE[src])
        if src in FLOATS:
            a = a * 0.75
        targets = [d for d in interp.TORCH_DTYPE if d != src]
        buffers = [Buffer("in0", src, index(n))]
        buffers += [Buffer(f"out{i}", d, index(n), "out") for i, d in enumerate(targets)]
        value = Load("in0", index(x), src)
        stores = tuple(Store(f"out{i}", index(x), op("cast", (value,), d), False) for i, d in enumerate(targets))
        k = Kernel(tuple(buffers), (), (x,), (), stores)
        outs = [torch.zeros(n, dtype=interp.TORCH_DTYPE[d]) for d in targets]
        interpret(render(k, POINTWISE, "k0"), "k0", k, POINTWISE, [a, *outs])
        for d, got in zip(targets, outs):
            assert torch.equal(got, a.to(interp.TORCH_DTYPE[d])), (src, d)


def test_bf16_is_rounded_to_nearest_even() -> None:
    n = 64
    (x,) = kernels.loop(n)
    value = kernels.f("mul", kernels.load("in0", index(x)), kernels.const(1.0009765625))
    k = Kernel(
        (Buffer("in0", "f32", index(n)), Buffer("out0", "bf16", index(n), "out")),
        (),
        (x,),
        (),
        (Store("out0", index(x), value, False),),
    )
    torch.manual_seed(0)
    a, out = torch.randn(n), torch.zeros(n, dtype=torch.bfloat16)
    interpret(render(k, POINTWISE, "k0"), "k0", k, POINTWISE, [a, out])
    assert torch.equal(out, (a * 1.0009765625).bfloat16())


def test_constants_are_exact() -> None:
    values = [0.1, -0.0, 1e-45, 3.4028234663852886e38, float("inf"), float("-inf"), float("nan"), 1 / 3]
    (x,) = kernels.loop(4)
    for dtype in ("f32", "f64"):
        rounded = torch.tensor(values, dtype=interp.TORCH_DTYPE[dtype])
        buffers = tuple(Buffer(f"out{i}", dtype, index(4), "out") for i in range(len(values)))
        consts = [kernels.const(v.item(), dtype) for v in rounded]
        k = Kernel(buffers, (), (x,), (), tuple(Store(f"out{i}", index(x), c, False) for i, c in enumerate(consts)))
        outs = [torch.ones(4, dtype=rounded.dtype) for _ in values]
        interpret(render(k, POINTWISE, "k0"), "k0", k, POINTWISE, outs)
        for got, want in zip(outs, rounded):
            assert torch.equal(got.view(torch.uint8), want.expand(4).clone().view(torch.uint8)), want


# -- text ---------------------------------------------------------------------------------------------------------


def test_text_is_a_function_of_kernel_and_plan() -> None:
    case = CASES["softmax_f32_5_100"]
    assert render(case.kernel, STEPS, "k0") == render(case.kernel, STEPS, "k0")
    assert render(case.kernel, WHOLE, "k0") == SOFTMAX


SOFTMAX = """import triton
import triton.language as tl
from triton.language.extra import libdevice


@triton.jit
def _max(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _sum(a, b):
    return a + b


@triton.jit
def k0(in0, out0):
    XBLOCK: tl.constexpr = 2
    RBLOCK: tl.constexpr = 128
    pid = tl.program_id(0)
    x = pid * XBLOCK + tl.arange(0, XBLOCK)[:, None]
    xmask = x < 5
    rbase = tl.arange(0, RBLOCK)[None, :]
    rmask = rbase < 100
    t0 = tl.load(in0 + (x * 100 + rbase), mask=xmask & rmask)
    t1 = tl.where(rmask, t0, float("-inf"))
    t2 = tl.reduce(t1, 1, _max, keep_dims=True)
    t3 = t0 - t2
    t4 = libdevice.exp(t3)
    t5 = tl.where(rmask, t4, 0.0)
    t6 = tl.reduce(t5, 1, _sum, keep_dims=True)
    t7 = tl.div_rn(t4, t6)
    tl.store(out0 + (x * 100 + rbase), t7, mask=xmask & rmask)
"""


def test_passes_are_merged() -> None:
    """LayerNorm in steps: mean, then variance, then the output: three loops; max and argmax share one."""
    assert render(CASES["layernorm_f32_4_96"].kernel, STEPS, "k0").count("for offset in") == 3
    assert render(CASES["argmax_f32_4_45"].kernel, STEPS, "k0").count("for offset in") == 1
    # the side output of rmsnorm needs no reduction: it is written in the first of two passes
    text = render(CASES["rmsnorm_f32_64"].kernel, STEPS, "k0")
    assert text.count("for offset in") == 2
    assert text.index("tl.store(out1") < text.index("tl.store(out0")


def test_small_tiles_are_read_before_the_first_reduction() -> None:
    kernel = CASES["layernorm_f32_4_96"].kernel
    assert len(kernel.buffers) > 3, "weight and bias are read for the result only"
    small, large = (render(kernel, Plan("triton", rows, 0), "k0") for rows in (2, 64))
    assert small.rindex("tl.load(") < small.index("tl.reduce(")
    assert large.rindex("tl.load(") > large.rindex("tl.reduce("), "64 elements a thread: registers are worth more"


@pytest.mark.parametrize(("inputs", "first"), [(4, True), (20, False)])
def test_many_inputs_are_not_all_held_during_a_reduction(inputs: int, first: bool) -> None:
    added = "mul(in0[512*x0 + r0], sum[r0](in0[512*x0 + r0]))"
    for i in range(1, inputs):
        added = f"add({added}, in{i}[512*x0 + r0])"
    lines = [f"  in    in{i}: f32[2048]" for i in range(inputs)]
    loops = ["  out   out0: f32[2048]", "  for   x0 < 4", "  axis  r0 < 512", f"    inner out0[512*x0 + r0] = {added}"]
    text = render(parse_kernel("\n".join(["kernel", *lines, *loops, ""])), Plan("triton", 1, 0, warps=2), "k0")
    assert (text.rindex("tl.load(") < text.index("tl.reduce(")) is first, "8 registers of each"


def test_index_width() -> None:
    assert index_width(kernels.pointwise(1 << 20, "f32").kernel) == 32
    assert index_width(kernels.pointwise(1 << 31, "f32").kernel) == 64
    assert "to(tl.int64)" in render(kernels.pointwise(1 << 31, "f32").kernel, POINTWISE, "k0")
    k = CASES["rmsnorm_f32_64"].kernel
    assert index_width(k) is None
    assert not needs_wide(k, {"s0": 1 << 20}) and needs_wide(k, {"s0": 1 << 25})
    assert parameters(k)[-1] == ("s0", "size") and "WIDE: tl.constexpr" in render(k, STEPS, "k0")


def test_constant_offset_beyond_32_bits() -> None:
    """Small buffers do not make small offsets: the width follows the final index."""
    (x,) = kernels.loop(8)
    k = Kernel(
        (Buffer("in0", "f32", index((1 << 31) + 8)), Buffer("out0", "f32", index(8), "out")),
        (),
        (x,),
        (),
        (Store("out0", index(x), Load("in0", index(x) + (1 << 31), "f32"), False),),
    )
    assert index_width(k) == 64


def test_refusals() -> None:
    k = CASES["dynamic_axis_3_50"].kernel
    assert "needs an rblock" in str(refusal(k, WHOLE))
    with pytest.raises(Unrenderable, match="needs an rblock"):
        render(k, WHOLE, "k0")
    assert "too large" in str(refusal(kernels.softmax(4, 1 << 20).kernel, WHOLE))
    x, r = kernels.loop(2), kernels.axis(3, 4)
    at = kernels.flat(x + r)
    scan = Kernel(
        (Buffer("in0", "f32", index(24)), Buffer("out0", "f32", index(24), "out")),
        (),
        x,
        r,
        (Store("out0", at, Scan("sum", r[1], Load("in0", at, "f32"), "f32"), True),),
    )
    assert "scan" in str(refusal(scan, WHOLE))
    assert not supports("add", "bf16") and not supports("frobnicate", "f32")


def test_long_chains_do_not_recurse() -> None:
    (x,) = kernels.loop(16)
    e = kernels.load("in0", index(x))
    for _ in range(3000):
        e = kernels.f("mul", e, kernels.const(1.0000001))
    k = Kernel(
        (Buffer("in0", "f32", index(16)), Buffer("out0", "f32", index(16), "out")),
        (),
        (x,),
        (),
        (Store("out0", index(x), e, False),),
    )
    assert render(k, POINTWISE, "k0").count("\n    t") == 3002  # load, products, store


def test_modules_are_private_and_shared() -> None:
    import inspect
    import os

    source = render(CASES["boolean_100"].kernel, POINTWISE, "k0")
    module = load_module(source)
    assert module is load_module(source)
    folder = os.stat(os.path.dirname(str(module.__file__)))
    assert folder.st_mode & 0o777 == 0o700 and folder.st_uid == os.getuid()
    assert "def k0" in inspect.getsource(module.k0.fn)


def test_zero_points_launch_nothing() -> None:
    k = CASES["rmsnorm_f32_64"].kernel
    empty = [torch.zeros(0)] * 5
    interpret(render(k, STEPS, "k0"), "k0", k, STEPS, empty, {"s0": 0})


@pytest.mark.parametrize("name", ["rmsnorm_f32_64", "dynamic_axis_3_50"])
def test_wide_variant(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fusionc.runtime.launch.needs_wide", lambda kernel, sizes: True)
    compare(CASES[name], STEPS)


# -- on a GPU -----------------------------------------------------------------------------------------------------


def on_gpu(k: Kernel, plan: Plan, buffers: dict[str, torch.Tensor], sizes: dict[str, int]) -> None:
    from fusionc.runtime.launch import TritonKernel

    tensors = [buffers[b.name] if b.scalar else buffers[b.name].cuda() for b in k.buffers]
    TritonKernel(render(k, plan, "k0"), "k0", k, plan).launch(tensors, sizes)
    for b, t in zip(k.buffers, tensors):
        if not b.scalar:
            buffers[b.name].copy_(t)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_gpu(name: str) -> None:
    case = CASES[name]
    device = known("sm_90")
    for plan in [*plans(case.kernel), default_plan(case.kernel, case.sizes, device)]:
        got, want = case.inputs(), case.inputs()
        interp.run(case.kernel, want, case.sizes)
        on_gpu(case.kernel, plan, got, case.sizes)
        for n in want:
            torch.testing.assert_close(got[n], want[n], equal_nan=True)


@pytest.mark.gpu
@pytest.mark.parametrize("name,dtype,result", all_operations())
def test_gpu_operation(name: str, dtype: str, result: str) -> None:
    k = operation(name, dtype, result)
    a = operands(dtype)
    b = a % 7 if name in ("shl", "shr") else a
    if name in ("fmod", "mod") and dtype == "f32":
        b = torch.where(b == 1e-30, 1e-3, b)
    ins = {"in0": a, "in1": b}
    out, want = (torch.zeros(k.outer.value, dtype=interp.TORCH_DTYPE[result]) for _ in range(2))
    interp.run(k, {x.name: ins.get(x.name, want) for x in k.buffers})
    got = {x.name: ins.get(x.name, out) for x in k.buffers}
    on_gpu(k, POINTWISE, got, {})
    if name in ("floordiv", "mod", "truncdiv", "fmod") and dtype not in FLOATS:
        keep = (b != 0).repeat(len(a))
        out, want = out[keep], want[keep]
    torch.testing.assert_close(out, want, equal_nan=True, rtol=2e-6 if dtype == "f32" else 1e-13, atol=1e-37)


@pytest.mark.gpu
def test_gpu_library_of_sizes_and_streams() -> None:
    from fusionc.runtime.launch import TritonKernel

    case = kernels.rmsnorm(64)
    plan = default_plan(case.kernel, case.sizes, known("sm_90"))
    tk = TritonKernel(render(case.kernel, plan, "k0"), "k0", case.kernel, plan)
    stream = torch.cuda.Stream()
    for rows in (2, 7, 100):
        case.sizes["s0"] = rows
        buffers = case.inputs()
        gpu = [t.cuda() for t in buffers.values()]
        torch.cuda.synchronize()
        tk.launch(gpu, {"s0": rows}, stream.cuda_stream)
        stream.synchronize()
        for name, want in case.expected(buffers).items():
            torch.testing.assert_close(gpu[list(buffers).index(name)].cpu(), want)


def test_the_text_does_not_depend_on_what_was_read_before() -> None:
    import subprocess
    import sys

    text = (
        "kernel\n  in    in0: f32[70000]\n  out   out0: f32[70000]\n  for   x0 < 700\n  axis  r0 < 100\n"
        "    inner out0[100*x0 + r0] = div(in0[100*x0 + r0], sum[r0](in0[100*x0 + r0]))\n"
    )
    program = (
        "import sys; from fusionc.codegen.triton import render; from fusionc.ir.expr import Var, index;"
        "from fusionc.ir.text import parse_kernel; from fusionc.schedule.plan import Plan;"
        "before = [index(Var('r0', index(100))) for _ in sys.argv[1:]];"
        f"print(render(parse_kernel({text!r}), Plan('triton', 1, 128), 'k'))"
    )
    first, second = (
        subprocess.run([sys.executable, "-c", program, *more], capture_output=True, text=True, check=True).stdout
        for more in ([], ["other"])
    )
    assert first == second and "100" in first


@pytest.mark.parametrize("body", ["xor(gt(in0[0], f64(0.0)), gt(in1[x0], f64(0.0)))", "gt(maximum(in0[0], in1[x0]), f64(1.0))"])
def test_a_comparison_of_numbers_in_a_block_is_bits(body: str) -> None:
    """Triton's interpreter takes it for floats, and then has no `^` for them."""
    k = parse_kernel(f"""kernel
  in    in0: f64[1]
  in    in1: f64[40]
  out   out0: b1[40]
  for   x0 < 40
    row out0[x0] = {body}
""")
    got = {"in0": torch.ones(1, dtype=torch.float64), "in1": torch.arange(-20.0, 20.0, dtype=torch.float64)}
    got["out0"] = torch.zeros(40, dtype=torch.bool)
    want = {n: t.clone() for n, t in got.items()}
    interp.run(k, want, {})
    interpret(render(k, POINTWISE, "k0"), "k0", k, POINTWISE, list(got.values()))
    assert torch.equal(got["out0"], want["out0"])


@pytest.mark.parametrize(
    "dtype, text", [("u8", "mod(in0[x0], u8(-3))"), ("u8", "add(in0[x0], u8(300))"), ("i8", "mul(in0[x0], i8(200))")]
)
def test_literals_wrap_as_their_type_does(dtype: str, text: str) -> None:
    """Triton takes no negative number beside unsigned ones, and no number beyond the range of the other operand."""
    k = parse_kernel(f"""kernel
  in    in0: {dtype}[40]
  out   out0: {dtype}[40]
  for   x0 < 40
    row out0[x0] = {text}
""")
    x = torch.arange(40).to(torch.uint8 if dtype == "u8" else torch.int8)
    out = torch.empty_like(x)
    interpret(render(k, POINTWISE, "k0"), "k0", k, POINTWISE, [x, out])
    wide = {"u8(-3)": x % 253, "u8(300)": x + 44, "i8(200)": x * -56}[text[text.index(", ") + 2 : -1]]
    assert torch.equal(out, wide)


@pytest.mark.parametrize("kind", ["sum", "min", "max", "argmin", "argmax", "prod"])
@pytest.mark.parametrize("body", ["r0 + 5*x0", "where(lt(r0, 2), r0, 2*r0)", "add(in0[r0], r0)"])
@pytest.mark.parametrize("plan", [WHOLE, STEPS], ids=["whole", "steps"])
def test_reductions_of_positions(kind: str, body: str, plan: Plan) -> None:
    """A row's end is masked by the reduction's identity, which is 64 bits wide."""
    lines = ["kernel", "  in    in0: i64[5]", "  out   out0: i64[3]", "  for   x0 < 3", "  axis  r0 < 5"]
    k = parse_kernel("\n".join([*lines, f"    row out0[x0] = {kind}[r0]({body})", ""]))
    values, out = torch.tensor([3, 1, 4, 1, 5]), torch.zeros(3, dtype=torch.int64)
    interpret(render(k, plan, "k0"), "k0", k, plan, [out] if len(k.buffers) == 1 else [values, out])
    r, x = torch.arange(5)[None], torch.arange(3)[:, None]
    rows = {"r": r + 5 * x, "w": torch.where(r < 2, r, 2 * r).expand(3, 5), "a": (values + r).expand(3, 5)}[body[0]]
    name = {"min": "amin", "max": "amax"}.get(kind, kind)
    assert torch.equal(out, getattr(rows, name)(1))
