"""Products of one row become reductions with their epilogue; everything else stays a library call."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from fusionc.record import collect


def run(f, *args: torch.Tensor) -> tuple[torch.Tensor, list[str], int]:
    with collect() as graphs, torch.no_grad():
        out = torch.compile(f, backend="fusionc", dynamic=False)(*args)
    (graph,) = graphs
    assert not graph.fallbacks
    return out, [c.op for c in graph.calls], sum(k.uses for k in graph.kernels)


def test_one_row_with_bias_activation_and_residual_is_one_kernel() -> None:
    x, w, b, r = torch.randn(1, 1, 96), torch.randn(160, 96), torch.randn(160), torch.randn(1, 1, 160)
    f = lambda x, w, b, r: r + F.silu(F.linear(x, w, b))  # noqa: E731
    out, calls, kernels = run(f, x, w, b, r)
    torch.testing.assert_close(out.double(), f(x.double(), w.double(), b.double(), r.double()), rtol=1e-5, atol=1e-5)
    assert calls == [] and kernels == 1


@pytest.mark.parametrize(
    ("x", "w", "why"),
    [
        (torch.randn(2, 96), torch.randn(160, 96), "two rows"),
        (torch.randn(1, 96), torch.randn(96, 160).t(), "the weight does not run along K"),
        (torch.randn(1, 8), torch.randn(8, 8), "too small to matter"),
        (torch.randn(1, 96).bfloat16(), torch.randn(160, 96).bfloat16(), "the library has faster bf16 instructions"),
    ],
    ids=lambda v: v.replace(" ", "_") if isinstance(v, str) else "",
)
def test_library_calls(x: torch.Tensor, w: torch.Tensor, why: str) -> None:
    out, calls, _ = run(F.linear, x, w)
    torch.testing.assert_close(out, F.linear(x, w), rtol=2e-2 if x.dtype == torch.bfloat16 else 1e-5, atol=1e-2)
    assert calls == ["aten.mm.default"], why


def test_inf_and_nan_pass_through() -> None:
    x, w = torch.randn(1, 96), torch.randn(160, 96)
    w[3, 5], w[7, 1] = float("inf"), float("nan")
    out, _, _ = run(F.linear, x, w)
    torch.testing.assert_close(out, F.linear(x, w), equal_nan=True, rtol=1e-5, atol=1e-5)
