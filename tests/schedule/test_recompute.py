"""Values computed where they are read: what kernels of whole graphs write, that results stay, and what is left in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusionc.backend import fusionc
from fusionc.record import GraphRecord, collect
from fusionc.schedule import recompute

OPTIONS = {"target": "cpp", "verify": True, "cache": False}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recompute, "SMALLEST", 1 << 10)


def compiled(fn: Callable[..., Any], *args: Tensor, target: str = "cpp") -> tuple[Any, list[GraphRecord]]:
    torch._dynamo.reset()
    with collect() as records:
        got = torch.compile(fn, backend=fusionc, options={**OPTIONS, "target": target})(*args)
    return got, records


def written(record: GraphRecord) -> set[str]:
    return {n for g in record.groups for n in g.outputs}


def rand(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


class Block(nn.Module):
    """A convolution (a call), batch norm and relu: the backward needs dy and x − μ of every element twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)))


@pytest.mark.parametrize("target", ["cpp", "sm_90"])
def test_backward_of_batch_norm_writes_the_gradient_alone(target: str) -> None:
    torch.manual_seed(1)
    model = Block().to(torch.bfloat16).to(memory_format=torch.channels_last)
    x, dy = (rand(8, 16, 16, 16, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last) for _ in range(2))
    x.requires_grad_()

    def step(x: Tensor) -> Tensor:
        return model(x)

    torch._dynamo.reset()
    leaves = [x, *model.parameters()]
    with collect() as records:
        out = torch.compile(step, backend=fusionc, options={**OPTIONS, "target": target})(x)
        got = torch.autograd.grad(out, leaves, dy)
    (record,) = [r for r in records if r.stage == "backward"]
    written = sum(k.bytes_written for k in record.kernels)
    # the gradient and, on a GPU, partial sums; two float32 images would be eight bytes an element more
    assert written < (3 if target == "cpp" else 5) * x.numel()
    wide = Block().double()
    wide.load_state_dict(model.state_dict())
    wanted = torch.autograd.grad(wide(x.double()), [x, *wide.parameters()], dy.double())
    eager = torch.autograd.grad(model(x), leaves, dy)
    for mine, theirs, exact in zip(got, eager, wanted, strict=True):
        assert (mine.double() - exact).norm() <= 2 * (theirs.double() - exact).norm() + 1e-3 * exact.norm()


def half(x: Tensor) -> Tensor:
    return (x.float() * 2 + 1) * 0.5


def test_a_value_of_half_precision_inputs_is_made_in_both_kernels() -> None:
    x = rand(64, 96, dtype=torch.bfloat16)

    def fn(x: Tensor) -> tuple[Tensor, Tensor]:
        y = half(x)
        return y.sum(0), y.flip(0).cumsum(1).sum(1)

    got, (record,) = compiled(fn, x)
    assert not any(n.startswith("mul") for n in written(record))
    for mine, want in zip(got, fn(x), strict=True):
        torch.testing.assert_close(mine, want, rtol=1e-4, atol=1e-3)


def sums(y: Tensor) -> tuple[Tensor, Tensor]:
    """Two kernels that read y."""
    return y.sum(0), y.cumsum(1).sum(1)


def escapes(x: Tensor) -> Any:
    y = half(x)
    return (*sums(y), y)


def goes_to_a_library(x: Tensor) -> Any:
    y = half(x)
    return (*sums(y), y @ y.t())


def many_sources(x: Tensor) -> Any:
    a, b, c, d = x.float().chunk(4, 1)
    return sums((a * b + c * d).to(torch.bfloat16).float().sin())


def dear(x: Tensor) -> Any:
    return sums(torch.exp(x.float()))


@pytest.mark.parametrize("fn", [escapes, goes_to_a_library, many_sources, dear], ids=lambda f: f.__name__)
def test_what_stays_in_memory(fn: Callable[..., Any]) -> None:
    x = rand(64, 96, dtype=torch.bfloat16)
    got, (record,) = compiled(fn, x)
    y = half(x) if fn in (escapes, goes_to_a_library) else fn(x)[0]
    assert max(k.bytes_written for k in record.kernels) >= y.numel()
    assert any(n.startswith(("mul", "sin", "exp")) for n in written(record))
    for mine, want in zip(got, fn(x), strict=True):
        torch.testing.assert_close(mine, want, rtol=1e-3, atol=1e-2)


def test_a_source_that_is_written_later_is_read_before() -> None:
    def fn(x: Tensor) -> tuple[Tensor, Tensor]:
        y = half(x)
        a = y.sum(0)
        x.mul_(2)
        return a, y.cumsum(1).sum(1)

    x = rand(64, 96, dtype=torch.bfloat16)
    mine = x.clone()
    got, _ = compiled(fn, mine)
    want = fn(x)
    assert torch.equal(mine, x)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


def test_small_values_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recompute, "SMALLEST", 1 << 20)
    _, (record,) = compiled(lambda x: sums(half(x)), rand(64, 96, dtype=torch.bfloat16))
    assert any(n.startswith("mul") for n in written(record))


def test_an_alias_that_is_written_later_is_read_before() -> None:
    def fn(x: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        y = x.view(torch.int16) * 2 + 1
        a = y.sum(0)
        x.index_put_((torch.tensor([1, 2]),), value)
        return a, y.cumsum(1).sum(1)

    x, value = rand(64, 96, dtype=torch.bfloat16), rand(2, 96, dtype=torch.bfloat16)
    mine = x.clone()
    got, _ = compiled(fn, mine, value)
    for a, b in zip(got, fn(x, value), strict=True):
        assert torch.equal(a, b)


def test_no_guard_is_added() -> None:
    """Sizes are compared without asking for their values: 3 is a batch like any other."""

    def fn(v: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        y = (v.cumsum(0) * 2 + 1) + c
        return y.sum(1), y.cumsum(2).sum(2)

    torch._dynamo.reset()
    call, c = torch.compile(fn, backend=fusionc, dynamic=True, options=OPTIONS), rand(3, 1, 1)
    with collect() as records:
        for n in (7, 3, 4):
            v = rand(n, 96)
            for a, b in zip(call(v, c), fn(v, c), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)
    assert len(records) == 1 and not records[0].fallbacks
