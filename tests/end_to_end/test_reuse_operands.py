"""A pointwise kernel writes over a matmul's result where nobody else looks at it again, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fusionc import inplace, program_cache
from fusionc.passes.conv_add_relu import ConvAddRelu
from fusionc.record import collect


def alone(x: Tensor, w: Tensor, v: Tensor) -> Any:
    return F.gelu(x @ w) @ v


def returned(x: Tensor, w: Tensor, v: Tensor) -> Any:
    h = x @ w
    return F.gelu(h), h


def read_later(x: Tensor, w: Tensor, v: Tensor) -> Any:
    h = x @ w
    return F.gelu(h) @ v, h.t() @ x


def seen_through_a_view(x: Tensor, w: Tensor, v: Tensor) -> Any:
    h = x @ w
    return F.gelu(h) @ v, h.view(-1)[::3]


def other_place(x: Tensor, w: Tensor, v: Tensor) -> Any:
    h = x @ w
    return (h + h.flip(0)) @ v


def transposed(x: Tensor, w: Tensor, v: Tensor) -> Any:
    return torch.exp(-(x @ w).abs()).t().contiguous()


def reshaped(x: Tensor, w: Tensor, v: Tensor) -> Any:
    h = F.gelu((x @ w).view(8, 64, 640))
    return h.view(512, 640) @ v


def reshaped_and_returned(x: Tensor, w: Tensor, v: Tensor) -> Any:
    return F.gelu((x @ w).view(8, 64, 640))


def twice(x: Tensor, w: Tensor, v: Tensor) -> Any:
    return F.gelu((F.relu(x @ w) @ v) @ w)


@pytest.mark.parametrize(
    "f, times",
    [
        (alone, 1),
        (returned, 0),
        (read_later, 0),
        (seen_through_a_view, 0),
        (other_place, 0),
        (transposed, 0),
        (reshaped, 1),
        (reshaped_and_returned, 1),
        (twice, 2),
    ],
)
def test_reuse(f: Callable[..., Any], times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[int] = []
    whole = inplace.reuse_operands
    monkeypatch.setattr(inplace, "reuse_operands", lambda *a: found.append(0) or _count(whole(*a), found))
    torch.manual_seed(0)
    x, w, v = torch.randn(512, 64), torch.randn(64, 640), torch.randn(640, 64)
    compiled = torch.compile(f, backend="fusionc", options={"strict": True, "cache": False})
    kept = []
    for _ in range(3):
        y = torch.randn_like(x)
        got, want = compiled(y, w, v), f(y, w, v)
        kept.append((got, want))
    for got, want in kept:  # a later call must not write over an earlier one's result
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)
    assert sum(found) == times


def test_a_result_over_an_operand_has_its_own_strides() -> None:
    """Also where they differ in sizes of one only, which say nothing of the memory."""
    def f(x: Tensor, w: Tensor, z: Tensor) -> Tensor:
        return torch.tanh(F.conv2d(x, w) + z)

    x, w = torch.randn(512, 64, 1, 1), torch.randn(640, 64, 1, 1)
    z = torch.randn(512, 640).as_strided((512, 640, 1, 1), (640, 1, 640, 640))
    got, want = torch.compile(f, backend="fusionc", options={"strict": True, "cache": False})(x, w, z), f(x, w, z)
    with FakeTensorMode() as mode:  # (what graphs are made of; ATen's convolution itself may be of another mind)
        assert got.stride() == f(*(mode.from_tensor(t) for t in (x, w, z))).stride() == z.stride()
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)


def test_a_result_over_an_operand_may_be_changed_by_the_caller() -> None:
    """It is no view for autograd, and what backward needs is not lost with it."""
    def f(x: Tensor, w: Tensor) -> Tensor:
        return torch.sin((x @ w).view(8, 64, 640))

    torch.manual_seed(0)
    found = []
    for g in (f, torch.compile(f, backend="fusionc", options={"cache": False})):
        x, w = torch.ones(512, 64, requires_grad=True), torch.full((64, 640), 0.01, requires_grad=True)
        y = g(x, w)
        assert not y._is_view()
        y.mul_(2)
        y.sum().backward(retain_graph=True)
        y.sum().backward()
        found.append((y, x.grad, w.grad))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)


def gated(x: Tensor, w: Tensor, v: Tensor) -> Any:
    return (F.silu(x @ w) * (x @ (w + 1))) @ v


def both_terms_stay(x: Tensor, w: Tensor, v: Tensor) -> Any:
    h, k = x @ w, x @ (w + 1)
    return h + k, h, k


def siblings(x: Tensor, w: Tensor, v: Tensor) -> Any:
    """The first gelu shares a launch with the sum, on a GPU."""
    return F.gelu(x @ w) @ v, F.gelu(x @ (w + 1)) @ v


def convolution(x: Tensor, w: Tensor, v: Tensor) -> Any:
    y = x.view(8, 64, 8, 8)
    return F.relu(F.conv2d(y, w.view(640, 64, 1, 1)) + F.conv2d(y, v.view(640, 64, 1, 1)))


@pytest.mark.parametrize("target", ["cpp", pytest.param("interpret", marks=pytest.mark.interpret), "sm_90"])
@pytest.mark.parametrize(
    "f, reused", [(alone, 1), (returned, 0), (twice, 2), (gated, 1), (both_terms_stay, 0), (siblings, 2), (convolution, 1)]
)
def test_reuse_on_every_target(f: Callable[..., Any], reused: int, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[int] = []
    whole = inplace.reuse_operands
    monkeypatch.setattr(inplace, "reuse_operands", lambda *a: _count(whole(*a), found))
    torch.manual_seed(0)
    x, w, v = torch.randn(512, 64), torch.randn(64, 640), torch.randn(640, 64)
    options = {"strict": True, "cache": False, "verify": True, "target": target}
    got, want = torch.compile(f, backend="fusionc", options=options)(x, w, v), f(x, w, v)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)
    assert found[-1] == reused


class OnCpu(ConvAddRelu):
    name = "conv_add_relu_on_cpu"
    devices = ("cpu",)
    dtypes = (torch.float32,)


def _step(x: Tensor, w: Tensor, z: Tensor) -> Tensor:
    return F.relu(F.conv2d(x, w) + z.new_ones(8).view(-1, 1, 1) + z)


def block(x: Tensor, w: Tensor, z: Tensor) -> Any:
    return _step(x, w, torch.exp(z))


def two_blocks(x: Tensor, w: Tensor, z: Tensor) -> Any:
    """What the first one returns is read by a convolution, and then written over by the second."""
    y = _step(x, w, F.conv2d(x, w * 2))
    return _step(F.conv2d(y, w[:, :4].transpose(0, 1).contiguous()), w, y)


def of_an_input(x: Tensor, w: Tensor, z: Tensor) -> Any:
    return _step(x, w, z)


def read_after_it(x: Tensor, w: Tensor, z: Tensor) -> Any:
    y = torch.exp(z)
    return F.conv2d(_step(x, w, y), w[:, :4].transpose(0, 1).contiguous()) + F.conv2d(y, w[:, :4].transpose(0, 1).contiguous())


def returned_too(x: Tensor, w: Tensor, z: Tensor) -> Any:
    y = torch.exp(z)
    return _step(x, w, y), y


def seen_by_a_view(x: Tensor, w: Tensor, z: Tensor) -> Any:
    y = torch.exp(z)
    return _step(x, w, y), y[:, :3]


def in_an_input(x: Tensor, w: Tensor, z: Tensor) -> Any:
    """The other term is what an input holds in the end."""
    y = z.mul_(0.5)
    return _step(x, w, y)


def itself(x: Tensor, w: Tensor, z: Tensor) -> Any:
    y = torch.exp(z)
    return _step(y, torch.cat([w, w], 1), y)


@pytest.mark.parametrize(
    "f, over",
    [(block, 1), (two_blocks, 2), (of_an_input, 0), (read_after_it, None), (returned_too, 0), (seen_by_a_view, 0),
     (in_an_input, 0), (itself, 0)],
)  # fmt: skip
def test_calls_that_write_over_an_argument(f: Callable[..., Any], over: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[int] = []
    whole = inplace.reuse_calls
    monkeypatch.setattr(inplace, "reuse_calls", lambda *a: _count(whole(*a), found))
    monkeypatch.setattr(inplace, "_WORTH", 1)
    torch.manual_seed(0)
    x, w, z = torch.randn(2, 4, 24, 24), torch.randn(8, 4, 1, 1), torch.randn(2, 8, 24, 24)
    x, z = (t.to(memory_format=torch.channels_last) for t in (x, z))
    with torch.no_grad():
        compiled = torch.compile(f, backend="fusionc", options={"strict": True, "cache": False, "passes": [OnCpu()]})
        for _ in range(2):
            mine, theirs = z.clone(), z.clone()
            got, want = compiled(x, w, mine), f(x, w, theirs)
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(mine, theirs)
    assert over is None or sum(found) == over


def test_a_call_that_writes_over_an_argument_is_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator that is called is none of the graph's."""
    monkeypatch.setattr(inplace, "_WORTH", 1)
    monkeypatch.setattr(program_cache, "refusal", lambda config: "")  # a pass of ours stands among the user's here
    torch.manual_seed(0)
    x, w, z = torch.randn(2, 4, 24, 24), torch.randn(8, 4, 1, 1), torch.randn(2, 8, 24, 24)
    x, z = (t.to(memory_format=torch.channels_last) for t in (x, z))
    program_cache.stats.clear()
    results = []
    for _ in range(2):
        torch._dynamo.reset()
        options = {"strict": True, "cache": str(tmp_path), "passes": [OnCpu()]}
        with torch.no_grad(), collect() as records:
            results.append(torch.compile(block, backend="fusionc", options=options)(x, w, z))
    assert program_cache.stats["hit"] == 1, (dict(program_cache.stats), [r.cache for r in records])
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


def _count(result: dict[Any, Any], found: list[int]) -> dict[Any, Any]:
    found.append(len(result))
    return result


def test_gradients() -> None:
    torch.manual_seed(0)
    x, w, v = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((512, 64), (64, 640), (640, 64)))
    want = torch.autograd.grad(alone(x, w, v).square().sum(), (x, w, v))
    got = torch.autograd.grad(torch.compile(alone, backend="fusionc")(x, w, v).square().sum(), (x, w, v))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
