"""The loop interpreter against torch, on the shared table of kernels."""

from __future__ import annotations

import pytest
import torch

from fusionc.ir import interp
from fusionc.ir.expr import Const, Load, Reduce, Var, index
from fusionc.ir.loop import Buffer, Kernel, Store
from fusionc.ir.ops import op
from tests.codegen import kernels

CASES = {c.name: c for c in kernels.cases()}


def check(case: kernels.Case, **options: bool) -> None:
    buffers = case.inputs()
    expected = case.expected({n: t.clone() for n, t in buffers.items()})
    interp.run(case.kernel, buffers, case.sizes, **options)
    for name, want in expected.items():
        torch.testing.assert_close(buffers[name], want, equal_nan=True)


@pytest.mark.parametrize("name", CASES)
def test_matches_torch(name: str) -> None:
    check(CASES[name])


@pytest.mark.parametrize("name", ["softmax_f32_5_100", "broadcast_3_4_5", "layernorm_f32_4_96", "argmax_f32_4_45"])
def test_in_small_chunks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interp, "_CHUNK", 64)
    check(CASES[name])


def test_upcast_computes_in_float64() -> None:
    case = CASES["softmax_f32_5_100"]
    buffers = case.inputs()
    buffers["out0"] = buffers["out0"].double()
    interp.run(case.kernel, buffers, upcast=True)
    want = buffers["in0"].double().view(5, 100).softmax(-1).reshape(-1)
    torch.testing.assert_close(buffers["out0"], want, rtol=1e-14, atol=0)


def unary(name: str, dtype: str, result: str | None = None) -> Kernel:
    x = Var("x0", 9)
    e = op(name, (Load("in0", index(x), dtype),), result or dtype)
    buffers = (Buffer("in0", dtype, index(9)), Buffer("out0", result or dtype, index(9), "out"))
    return Kernel(buffers, (), (x,), (), (Store("out0", index(x), e, False),))


SPECIAL = torch.tensor([0.0, -0.0, 1.5, -2.5, 2.5, float("inf"), float("-inf"), float("nan"), 1e-40])


def test_signs_and_nan() -> None:
    def one(name: str, result: str = "f32") -> torch.Tensor:
        dtype = torch.bool if result == "b1" else torch.float32
        out = torch.empty(9, dtype=dtype)
        interp.run(unary(name, "f32", result), {"in0": SPECIAL, "out0": out})
        return out

    assert one("sign")[7].isnan()
    assert one("round").tolist()[2:5] == [2.0, -2.0, 2.0]
    assert one("neg").signbit().tolist() == (~SPECIAL.signbit()).tolist()[:7] + [one("neg")[7].signbit().item(), True]
    assert one("signbit", "b1")[1] and not one("signbit", "b1")[0]


def test_integer_division_by_zero_does_not_trap() -> None:
    x = Var("x0", 4)
    for name in ("floordiv", "mod", "truncdiv", "fmod"):
        e = op(name, (Load("in0", index(x), "i32"), Load("in1", index(x), "i32")), "i32")
        k = Kernel(
            (Buffer("in0", "i32", index(4)), Buffer("in1", "i32", index(4)), Buffer("out0", "i32", index(4), "out")),
            (),
            (x,),
            (),
            (Store("out0", index(x), e, False),),
        )
        out = torch.zeros(4, dtype=torch.int32)
        a, b = torch.tensor([7, -7, 7, -7], dtype=torch.int32), torch.tensor([0, 2, -2, -2], dtype=torch.int32)
        interp.run(k, {"in0": a, "in1": b, "out0": out})
        mode = {"floordiv": "floor", "truncdiv": "trunc"}.get(name)
        tail = slice(1, None)
        torch_fn = {"mod": torch.remainder, "fmod": torch.fmod}.get(name)
        want = torch.div(a[tail], b[tail], rounding_mode=mode) if mode else torch_fn(a[tail], b[tail])
        assert torch.equal(out[tail], want), name


def test_out_of_bounds_is_an_error() -> None:
    x = Var("x0", 4)
    k = Kernel(
        (Buffer("in0", "f32", index(4)), Buffer("out0", "f32", index(4), "out")),
        (),
        (x,),
        (),
        (Store("out0", index(x), Load("in0", index(x) + 1, "f32"), False),),
    )
    with pytest.raises(IndexError, match="reads elements 1..4 of in0, which has 4"):
        interp.run(k, {"in0": torch.zeros(4), "out0": torch.zeros(4)})


def test_guard_keeps_memory_untouched() -> None:
    x = Var("x0", 4)
    never = op("lt", (Load("in1", index(x), "i64"), Const(0, "i64")), "b1")
    e = Load("in0", index(x) + 100, "f32", never, Const(5.0, "f32"))
    buffers = (
        Buffer("in0", "f32", index(0)),
        Buffer("in1", "i64", index(4)),
        Buffer("out0", "f32", index(4), "out"),
    )
    k = Kernel(buffers, (), (x,), (), (Store("out0", index(x), e, False),))
    out = torch.zeros(4)
    interp.run(k, {"in0": torch.zeros(0), "in1": torch.arange(4), "out0": out})
    assert out.tolist() == [5.0] * 4


@pytest.mark.parametrize("kind,value", [("sum", 0.0), ("prod", 1.0)])
def test_empty_axis(kind: str, value: float) -> None:
    x, r = Var("x0", 3), Var("r0", 0)
    e = Reduce(kind, (r,), Load("in0", index(r), "f32"), "f32")
    k = Kernel(
        (Buffer("in0", "f32", index(0)), Buffer("out0", "f32", index(3), "out")),
        (),
        (x,),
        (r,),
        (Store("out0", index(x), e, False),),
    )
    out = torch.full((3,), 9.0)
    interp.run(k, {"in0": torch.zeros(0), "out0": out})
    assert out.tolist() == [value] * 3


def test_empty_loops_write_nothing() -> None:
    interp.run(CASES["rmsnorm_f32_64"].kernel, {}, {"s0": 0})


def test_missing_size_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        interp.run(CASES["rmsnorm_f32_64"].kernel, CASES["rmsnorm_f32_64"].inputs(), {})
