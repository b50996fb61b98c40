"""Decompositions of our own: those that correct what fake tensors say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fusionc.decompose import rules

aten = torch.ops.aten
INTO: dict[Any, tuple[Any, ...]] = {
    aten.slice_scatter.default: (torch.full((2, 4), 7.0), 0, 0, None, 2),
    aten.select_scatter.default: (torch.full((4,), 7.0), 0, 1),
    aten.diagonal_scatter.default: (torch.full((3,), 7.0),),
}


@pytest.mark.parametrize("op", INTO, ids=str)
@pytest.mark.parametrize("shape", [(1, 4), (3, 1), (1, 1)])
def test_a_scatter_into_an_expanded_tensor_has_a_dense_result(op: Any, shape: tuple[int, int]) -> None:
    x = torch.randn(shape).expand(3, 4)
    want = op(x, *INTO[op])
    got = rules()[op](x, *INTO[op])
    assert torch.equal(got, want) and got.stride() == want.stride()
    with torch._subclasses.FakeTensorMode() as mode:
        fake = rules()[op](mode.from_tensor(x), mode.from_tensor(INTO[op][0]), *INTO[op][1:])
    assert fake.stride() == want.stride(), "torch 2.11 alone says that it is expanded"
    assert rules()[op](x.clone(), *INTO[op]) is NotImplemented


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("target", ["cpp", pytest.param("interpret", marks=pytest.mark.interpret)])
def test_compiled(target: str, dynamic: bool) -> None:
    def f(x: Tensor) -> tuple[Tensor, ...]:
        return (
            x.slice_scatter(x[::2] * 2, 0, 0, None, 2),
            x.select_scatter(x[0] * 3, 0, 1),
            x.diagonal_scatter(-x.diagonal()),
        )

    x = torch.randn(1, 4).expand(3, 4)
    with torch.no_grad():
        got = torch.compile(f, backend="fusionc", dynamic=dynamic, options={"target": target, "cache": False})(x)
    for a, b in zip(got, f(x), strict=True):
        assert torch.equal(a, b) and a.stride() == b.stride()


@pytest.mark.parametrize("dim", [-1, (0, -1), (-2, -1), 0, None])
@pytest.mark.parametrize("keepdim", [False, True])
def test_norms_of_dimensions_counted_from_the_end(dim: Any, keepdim: bool) -> None:
    """Where a dimension of size 1 is reduced, torch 2.11's fake tensors keep it."""
    x = torch.randn(3, 1)
    rule = rules()[aten.linalg_vector_norm.default]
    dims = [dim] if isinstance(dim, int) else None if dim is None else list(dim)
    made = rule(x, 2, dims, keepdim)
    assert (made is NotImplemented) == (dim in (0, None))
    for y in (x, x.t(), torch.randn(1, 1), torch.randn(4, 5)):

        def f(y: Tensor) -> Tensor:
            return torch.linalg.vector_norm(y, 2, dim, keepdim)

        torch._dynamo.reset()
        got = torch.compile(f, backend="fusionc", options={"target": "cpp", "cache": False})(y)
        torch.testing.assert_close(got, f(y))


@pytest.mark.parametrize("target", ["cpp", pytest.param("interpret", marks=pytest.mark.interpret)])
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_scatter_into_overlapping_windows_is_atens(target: str, dynamic: bool) -> None:
    """Its result's windows overlap as well, so what it writes shows in several places."""

    def f(x: Tensor) -> tuple[Tensor, ...]:
        windows = x.unfold(0, 3, 1)
        made = windows.slice_scatter(windows[::2] * 2, 0, 0, None, 2)
        return made.square(), made.select_scatter(made[0] * 3, 0, 1) + 1

    x = torch.randn(9)
    with torch.no_grad():
        got = torch.compile(f, backend="fusionc", dynamic=dynamic, options={"target": target, "cache": False})(x)
    for a, b in zip(got, f(x), strict=True):
        assert torch.equal(a, b)
