"""Pooling as unrolled windows, in the C++ and (smaller) in the Triton renderer, against ATen."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from fusionc.ir.lowering import pooling
from fusionc.passes.max_pool import MaxPool
from fusionc.record import collect


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pooling, "_LEFT_TO_ATEN", ())
    monkeypatch.setattr(MaxPool, "devices", ("cpu",))


def run(f, *args: torch.Tensor, target: str = "auto") -> tuple[torch.Tensor, list[str], int]:
    torch._dynamo.reset()
    with collect() as graphs, torch.no_grad():
        out = torch.compile(f, backend="fusionc", dynamic=False, options={"target": target})(*args)
    (graph,) = graphs
    assert not graph.fallbacks
    return out, [c.op for c in graph.calls], sum(k.uses for k in graph.kernels)


WINDOWS = [
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": (2, 3)},
    {"kernel_size": 3, "stride": 1, "padding": 1},
    {"kernel_size": (3, 2), "stride": (2, 3), "padding": (1, 0), "ceil_mode": True},
]


@pytest.mark.parametrize("target", ["auto", "interpret"])
@pytest.mark.parametrize("extra", [*WINDOWS, {"kernel_size": 2, "stride": 2, "dilation": 2}], ids=str)
def test_max(extra: dict, target: str) -> None:
    x = torch.randn(2, 3, 9, 8).to(memory_format=torch.channels_last)
    x[0, 0, 0, 0], x[1, 1, 4] = float("nan"), -float("inf")
    f = lambda x: F.max_pool2d(x, **extra)  # noqa: E731
    out, calls, kernels = run(f, x, target=target)
    torch.testing.assert_close(out, f(x), rtol=0, atol=0, equal_nan=True)
    assert out.stride() == f(x).stride() and calls == [] and kernels == 1


@pytest.mark.parametrize("target", ["auto", "interpret"])
@pytest.mark.parametrize("extra", [*WINDOWS, {"kernel_size": 3, "padding": 1, "count_include_pad": False},
                                   {"kernel_size": 3, "padding": 1, "ceil_mode": True, "count_include_pad": False},
                                   {"kernel_size": 2, "divisor_override": 3}], ids=str)
def test_average(extra: dict, target: str) -> None:
    if extra.get("ceil_mode") and extra.get("count_include_pad", True):
        extra = extra | {"padding": 0}
    x = torch.randn(2, 3, 9, 8)
    f = lambda x: F.avg_pool2d(x, **extra)  # noqa: E731
    out, calls, kernels = run(f, x, target=target)
    torch.testing.assert_close(out, f(x), rtol=1e-6, atol=1e-6)
    assert calls == [] and kernels == 1


def test_adaptive_and_fused() -> None:
    x = torch.randn(2, 3, 8, 6)
    f = lambda x: F.adaptive_avg_pool2d(x, (4, 3)).sigmoid() * 2  # noqa: E731
    out, calls, kernels = run(f, x)
    torch.testing.assert_close(out, f(x), rtol=1e-6, atol=1e-6)
    assert calls == [] and kernels == 1


@pytest.mark.parametrize("f", [
    lambda x: F.adaptive_avg_pool2d(x, 5), lambda x: F.avg_pool2d(x, 9, 1, 4), lambda x: F.max_pool2d(x, 9, 1, 4),
    lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True),
], ids=["uneven", "large", "large max", "half padded"])  # fmt: skip
def test_left_to_aten(f) -> None:
    x = torch.randn(2, 3, 18, 18)
    with collect() as graphs, torch.no_grad():
        torch._dynamo.reset()
        out = torch.compile(f, backend="fusionc", dynamic=False)(x)
    torch.testing.assert_close(out, f(x))
    assert len(graphs[0].calls) == 1


def test_not_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pooling, "_LEFT_TO_ATEN", ("cpu",))
    x = torch.randn(2, 3, 9, 8)
    out, calls, _ = run(lambda x: F.max_pool2d(x, 2), x)
    torch.testing.assert_close(out, F.max_pool2d(x, 2))
    assert len(calls) == 1
