"""Rendered kernels built for GPUs that are not there: they compile on every target, vectorise, and spill nothing."""

from __future__ import annotations

import json
import re

import pytest

from fusionc.codegen.triton import render
from fusionc.errors import CompileError
from fusionc.runtime import launch
from fusionc.runtime.device import TARGETS, known
from fusionc.runtime.launch import Compiled, compile_many, cross_compile, early_start
from fusionc.schedule.plan import Plan
from fusionc.schedule.rules_triton import default_plan
from tests.codegen import kernels

pytestmark = pytest.mark.cross

# The shapes that real models have: default plans must not spill on them.
LARGE = [
    kernels.pointwise(1 << 20, "f32"),
    kernels.pointwise(1 << 20, "bf16"),
    kernels.broadcast(64, 128, 256),
    kernels.cat(512, 256, 64),
    kernels.softmax(4096, 1024),
    kernels.softmax(64, 50_304, "bf16"),
    kernels.softmax(512, 16_384, "bf16"),
    kernels.layernorm(4096, 768, "bf16"),
    kernels.layernorm(4096, 8192, "bf16"),
    kernels.rmsnorm(4096, 2048, "bf16"),
    kernels.rmsnorm(576, 2048, "f32"),
    kernels.dynamic_axis(8, 1000),
    kernels.arg("argmax", 16, 49_152),
    kernels.column_sum(4096, 4096, "bf16"),
    kernels.full("sum", 1 << 20),
    kernels.multi_axis(16, 64, 3136),
    kernels.cumulative("sum", 64, 4096),
    kernels.cumulative("sum", 64, 50_000),
]
CASES = kernels.cases() + LARGE


def build(case: kernels.Case, target: str, plan: Plan | None = None) -> Compiled:
    plan = plan or default_plan(case.kernel, case.sizes, known(target))
    return cross_compile(render(case.kernel, plan, "k0"), "k0", case.kernel, plan, target)


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> object:
    patch = pytest.MonkeyPatch()
    patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
    yield
    patch.undo()


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_builds_for_hopper_without_spills(case: kernels.Case) -> None:
    built = build(case, "sm_90")
    assert built.asm["cubin"] and 0 < built.registers <= 255
    assert built.spills == 0


@pytest.mark.slow
@pytest.mark.parametrize("target", [t for t in TARGETS if t != "sm_90"])
def test_builds_for_other_targets(target: str) -> None:
    """A sample: every third kernel on each target, another third on the next."""
    start = TARGETS.index(target) % 3
    failed = {}
    for case in CASES[start::3]:
        try:
            build(case, target)
        except CompileError as e:
            failed[case.name] = str(e)
    assert not failed


@pytest.mark.parametrize("target", TARGETS)
def test_sample_builds_everywhere(target: str) -> None:
    """What the default run keeps of the two tests above."""
    for case in (kernels.layernorm(4096, 768, "bf16"), kernels.arg("argmax", 4, 45), kernels.cumulative("max", 3, 50)):
        assert build(case, target).spills == 0


def count(pattern: str, built: Compiled) -> int:
    return len(re.findall(pattern, built.asm["ptx"]))


def test_accesses_are_vectorised() -> None:
    f32, bf16 = build(LARGE[0], "sm_90"), build(LARGE[1], "sm_90")
    assert count(r"ld\.global\S*\.v4\.b32", f32) == 4 and count(r"st\.global\S*\.v4\.b32", f32) == 2
    assert count(r"ld\.global\S*\.v4\.b32", bf16) == 2  # 8 elements of 2 bytes each
    for case in (kernels.softmax(4096, 1024), kernels.layernorm(4096, 768, "bf16")):
        built = build(case, "sm_90")
        assert count(r"ld\.global\S*\.v[48]\.b32", built) and not count(r"ld\.global\S*\.b(8|16) ", built), case.name


def test_unaligned_pointers_are_respected() -> None:
    case = LARGE[0]
    plan = default_plan(case.kernel, {}, known("sm_90"))
    source = render(case.kernel, plan, "k0")
    built = cross_compile(source, "k0", case.kernel, plan, "sm_90", aligned=(False, False, False))
    assert not count(r"ld\.global\S*\.v", built)


def test_float64_stays_float64() -> None:
    built = build(kernels.softmax(3, 40, "f64"), "sm_90")
    assert count(r"\.f64", built) and not count(r"(mul|add|fma|div)\S*\.f32", built)


def test_wide_and_narrow_variants() -> None:
    case = kernels.rmsnorm(64)
    plan = default_plan(case.kernel, case.sizes, known("sm_90"))
    source = render(case.kernel, plan, "k0")
    for wide in (False, True):
        assert cross_compile(source, "k0", case.kernel, plan, "sm_90", wide=wide).asm["cubin"]


@pytest.mark.parametrize("case", [LARGE[0], LARGE[5], kernels.dynamic_axis(8, 1000)], ids=lambda c: c.name)
def test_kernels_that_start_early_wait_before_they_touch_memory(case: kernels.Case) -> None:
    from triton.backends.compiler import GPUTarget

    plan = default_plan(case.kernel, case.sizes, known("sm_90"))
    source = render(case.kernel, plan, "k0")
    early = early_start(source, "k0", GPUTarget("cuda", 90, 32))
    ptx = cross_compile(early, "k0", case.kernel, plan, "sm_90").asm["ptx"]
    wait = ptx.index("griddepcontrol.wait")
    touch = re.search(r"\b(ld|st|atom|red)\.\S*global|\bcp\.async", ptx)
    assert touch is not None and wait < ptx.index("griddepcontrol.launch_dependents") < touch.start()
    assert early_start(source, "k0", GPUTarget("cuda", 80, 32)) is source
    assert early_start(source, "k0", GPUTarget("hip", "gfx942", 64)) is source
    assert early_start(source, "other", GPUTarget("cuda", 90, 32)) is source


@pytest.mark.parametrize(
    "case, instruction",
    [(kernels.layernorm(4096, 768, "bf16"), "rsqrt.approx.ftz.f32"), (kernels.exp2(1 << 14, "f32"), "ex2.approx.ftz.f32")],
    ids=lambda c: getattr(c, "name", c),
)
def test_single_instructions_need_no_library(case: kernels.Case, instruction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are the library's own, to the bit, and linking the library is what compiles of other threads wait for."""
    from triton.backends.compiler import GPUTarget

    built = build(case, "sm_90")
    assert instruction in built.asm["ptx"] and "__nv_" not in built.asm["llir"]
    source = render(case.kernel, default_plan(case.kernel, case.sizes, known("sm_90")), "k0")
    assert launch.without_library(source, GPUTarget("hip", "gfx942", 64)) is source
    assert launch.without_library("import triton\n", GPUTarget("cuda", 90, 32)) == "import triton\n"
    monkeypatch.setattr(launch, "without_library", lambda text, gpu: text)
    linked = build(case, "sm_90")
    assert "__nv_" in linked.asm["llir"] and instruction in linked.asm["ptx"]


@pytest.mark.parametrize("call", ["rsqrt", "exp2"])
@pytest.mark.parametrize("kind", ["fp32", "fp16", "bf16", "fp64", "i32"])
def test_single_instructions_take_float32_only(call: str, kind: str) -> None:
    """Bits of another type would be read as a float32's, without a word."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    head = "import triton\nimport triton.language as tl\n\n\n@triton.jit\n"
    text = f"{head}def k(x, y):\n    i = tl.arange(0, 64)\n    tl.store(y + i, tl.{call}(tl.load(x + i)))\n"
    gpu = GPUTarget("cuda", 90, 32)
    fn = launch.load_module(launch.without_library(text, gpu)).k
    source = ASTSource(fn=fn, signature={"x": f"*{kind}", "y": "*fp32"}, constexprs={}, attrs={})
    if kind == "fp32":
        assert ".approx.ftz.f32" in triton.compile(source, target=gpu).asm["ptx"]
    else:
        with pytest.raises(triton.CompilationError) as caught:
            triton.compile(source, target=gpu)
        assert f"tl.{call} of float32 only" in str(caught.value.__cause__)


def test_errors_name_the_kernel() -> None:
    case = LARGE[0]
    plan = Plan("triton", 1024)
    source = render(case.kernel, plan, "k0")
    with pytest.raises(CompileError, match="k0"):
        cross_compile(source.replace("tl.store(", "tl.nothing("), "k0", case.kernel, plan, "sm_90")
    with pytest.raises(CompileError, match="sm_12"):
        cross_compile(source, "k0", case.kernel, plan, "sm_12")


def test_many_at_once_keep_order_and_errors() -> None:
    cases = [kernels.pointwise(128 * (i + 1), "f32") for i in range(4)]
    jobs = [lambda c=c: build(c, "sm_90") for c in cases]
    jobs.insert(2, lambda: (_ for _ in ()).throw(CompileError("bad")))
    out = compile_many(jobs, workers=2)
    assert [type(o).__name__ for o in out] == ["Compiled", "Compiled", "CompileError", "Compiled", "Compiled"]


def test_plans_round_trip() -> None:
    for case in LARGE:
        plan = default_plan(case.kernel, case.sizes, known("sm_90"))
        assert Plan.from_dict(json.loads(plan.to_json())) == plan
