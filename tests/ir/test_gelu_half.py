"""The short gelu of half-precision results on a GPU: its expression, evaluated by the interpreter of the loop IR."""

from __future__ import annotations

import math

import pytest
import torch

from fusionc.ir.expr import Const
from fusionc.ir.lowering import pointwise
from fusionc.ir.lowering.pointwise import _gelu_of_half


def evaluate(e, x: torch.Tensor) -> torch.Tensor:
    """A constant or operator tree over one variable, in float32."""
    if e is X:
        return x
    if isinstance(e, Const):
        return torch.full_like(x, e.value)
    args = [evaluate(a, x) if getattr(a, "dtype", "") != "b1" else compare(a, x) for a in e.args]
    one = {"abs": torch.abs, "rsqrt": torch.rsqrt, "exp2": torch.exp2}
    two = {"add": torch.add, "sub": torch.sub, "mul": torch.mul}
    if e.name in one:
        return one[e.name](*args)
    return torch.where(*args) if e.name == "where" else two[e.name](*args)


def compare(e, x: torch.Tensor) -> torch.Tensor:
    assert e.name == "lt"
    return evaluate(e.args[0], x) < evaluate(e.args[1], x)


from fusionc.ir.expr import Load, index  # noqa: E402

X = Load("x", index(0), "f32", None)


def test_close_to_gelu_in_float64() -> None:
    x = torch.cat([torch.linspace(-5, 9, 20001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 300.0])])
    got = evaluate(_gelu_of_half(X), x).double()
    want = x.double() * 0.5 * torch.erfc(-x.double() * math.sqrt(0.5))
    assert ((got - want).abs() <= 2e-3 * want.abs() + 1e-40).all()  # below half a unit of bfloat16
    narrow = x[:20001].abs() < 3
    assert ((got - want)[:20001][narrow].abs() <= 1e-4 * want[:20001][narrow].abs() + 1e-40).all()


def test_specials() -> None:
    x = torch.tensor([float("inf"), float("nan"), -200.0])
    got = evaluate(_gelu_of_half(X), x)
    assert got[0] == float("inf") and got[1].isnan() and got[2] == 0


@pytest.mark.parametrize("target", ["auto", "interpret"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rendered(target: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pointwise, "_LONG_GELU", ())
    torch._dynamo.reset()
    x = torch.linspace(-6, 6, 501).to(dtype)
    with torch.no_grad():
        got = torch.compile(torch.nn.functional.gelu, backend="fusionc", dynamic=False, options={"target": target})(x)
    want = torch.nn.functional.gelu(x.double())
    eager = torch.nn.functional.gelu(x).double()
    assert (got.double() - want).norm() <= 1.1 * (eager - want).norm()
