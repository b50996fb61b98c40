"""A linear layer with its activation: the kernel in Triton's interpreter against float64; compiled for sm_90."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from fusionc.codegen.templates import linear_act as template
from fusionc.ops import load
from fusionc.runtime import linear_act as runtime

load("linear_act")
ACT = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "gelu_tanh": lambda y: F.gelu(y, approximate="tanh")}


def make(rows=70, out=40, inner=48, bias=True, activation="gelu", dtype=torch.float16, apart=0, scaled=False):
    rng = torch.Generator().manual_seed(rows + out)
    x = torch.randn(rows, inner + apart, generator=rng).to(dtype)[:, :inner]
    w = (torch.randn(out, inner, generator=rng) / inner**0.5).to(dtype)
    b = torch.randn(out, generator=rng).to(dtype) if bias else None
    y = x.double() @ w.double().t()
    scale = torch.rand(out, generator=rng) + 0.5 if scaled else None
    y = y if scale is None else y * scale.double()
    return x, w, scale, b, activation, ACT[activation](y if b is None else y + b.double())


@pytest.mark.interpret
@pytest.mark.parametrize("given", [
    {}, {"activation": "silu", "bias": False}, {"activation": "relu", "inner": 64, "out": 64},
    {"activation": "gelu_tanh", "rows": 5, "inner": 8, "out": 8}, {"rows": 33, "apart": 16, "inner": 96},
    {"scaled": True},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("tile", [(32, 32, 32), (16, 64, 64)], ids=str)
def test_kernel(given: dict, tile: tuple[int, int, int]) -> None:
    *args, want = make(**given)
    got = runtime.launch(("tile", *tile, 4, 2), *args, interpret=True)
    assert got.shape == want.shape and got.dtype == torch.float16 and got.is_contiguous()
    assert (got.double() - want).norm() <= 1e-3 * want.norm()


@pytest.mark.parametrize("activation", list(ACT))
@pytest.mark.parametrize("scaled", [False, True])
def test_reference_and_library(activation: str, scaled: bool) -> None:
    x, w, s, b, _, want = make(activation=activation, scaled=scaled)
    got = torch.ops.fusionc.linear_act(x, w, s, b, activation)
    assert (got.double() - want).norm() <= 1e-3 * want.norm()
    assert (runtime.library(x, w, s, b, activation).double() - want).norm() <= 3e-3 * want.norm()
    torch.library.opcheck(torch.ops.fusionc.linear_act.default, (x, w, s, b, activation),
                          test_utils=("test_schema", "test_faketensor"))  # fmt: skip


def test_nothing_in_nothing_out() -> None:
    x, w, s, b, _, _ = make()
    assert runtime.linear_act(x[:0], w, s, b, "gelu").shape == (0, 40)


def test_the_library_is_what_runs_without_a_measurement() -> None:
    for rows, out, inner in ((200704, 384, 96), (50176, 64, 16), (3136, 3072, 768), (12544, 1536, 384)):
        found = runtime.candidates(rows, out, inner)
        assert found[0] == ("library",) and 3 < len(found) <= 5
        assert len(set(found)) == len(found)
    assert [runtime.most(50176, n, 96, False) for n in (384, 144, 64)] == [2, 4, 4]
    assert runtime.most(512, 3072, 768, False) == 3, "96 tiles for 132 processors"
    assert runtime.most(3136, 1280, 320, True) == 1 and runtime.most(3136, 1280, 2048, True) == 2
    assert runtime.candidates(3136, 1280, 2048, True)[1] == ("library",) == runtime.candidates(3136, 1280, 320, True)[-1]
    assert runtime.candidates(3136, 1280, 320, True)[0] == ("tile", 128, 128, 64, 8, 3)


@pytest.mark.cross
@pytest.mark.parametrize(("out", "inner"), [(384, 96), (3072, 768), (64, 24)])
def test_compiles_for_a_gpu_without_spills(out: int, inner: int) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fusionc.runtime.launch import _usage, load_module

    for how in runtime.candidates(50176, out, inner)[1:]:
        _, bm, bn, bk, warps, stages = how
        constants = {"LINE": inner, "N": out, "K": inner, "BM": bm, "BN": bn, "BK": bk}
        constants |= {"SCALE": True, "BIAS": True, "ACTIVATION": "gelu"}
        fn = load_module(template.TEXT).linear
        kinds = {n: "constexpr" if n in constants else "i32" if n == "M" else "*bf16" for n in fn.arg_names}
        attrs = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(fn.arg_names) if n not in constants}
        source = ASTSource(fn=fn, signature=kinds, constexprs=constants, attrs=attrs)
        built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, "num_stages": stages})
        registers, spills = _usage(built)
        assert spills <= 0 and registers <= 255, (how, registers, spills)
        assert "wgmma" in built.asm["ptx"], how
        assert "cp.async.cg.shared.global" in built.asm["ptx"] or inner <= bk, how
        assert built.metadata.shared <= 227 * 1024
