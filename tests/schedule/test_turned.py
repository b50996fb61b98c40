"""Rows read twice: rotary embedding in the kernel of the norm before it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fusionc.record
from fusionc.schedule import group


@pytest.fixture(autouse=True)
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group, "_NO_TURNS", ())
    torch._dynamo.reset()


def rms(x: Tensor, w: Tensor) -> Tensor:
    h = x.float()
    return w * (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def half(x: Tensor) -> Tensor:
    n = x.shape[-1] // 2
    return torch.cat((-x[..., n:], x[..., :n]), dim=-1)


def qwen(x: Tensor, w: Tensor, c: Tensor, s: Tensor) -> Tensor:
    q = rms(x.view(2, 7, 3, 16), w).transpose(1, 2)
    return q * c + half(q) * s


def stored(x: Tensor, w: Tensor, c: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    q = rms(x.view(2, 7, 3, 16), w).transpose(1, 2)
    return q * c + half(q) * s, q


def thirds(x: Tensor, w: Tensor, c: Tensor, s: Tensor) -> Tensor:
    q = rms(x.view(2, 7, 3, 16), w)
    return torch.cat((q[..., 10:], q[..., :3].abs(), q[..., 3:10]), -1) * 2


def softmax(x: Tensor, w: Tensor, c: Tensor, s: Tensor) -> Tensor:
    h = x.view(2, 7, 3, 16)
    e = torch.exp(h - h.amax(-1, keepdim=True))
    return half(e / e.sum(-1, keepdim=True)) * w


def run(fn: Callable[..., Any], target: str, dynamic: bool = False) -> Any:
    torch.manual_seed(0)
    given = torch.randn(2, 7, 48), torch.randn(16), torch.randn(7, 16), torch.randn(7, 16)
    with fusionc.record.collect() as records:
        options = {"cache": False, "verify": True, "strict": True, "target": target}
        got = torch.compile(fn, backend="fusionc", dynamic=dynamic, options=options)(*given)
    torch.testing.assert_close(got, fn(*given), rtol=1e-5, atol=1e-5)
    (record,) = records
    return record


@pytest.mark.parametrize("target", ["cpp", "interpret"])
@pytest.mark.parametrize("fn", [qwen, stored, thirds, softmax])
def test_one_kernel(fn: Callable[..., Any], target: str) -> None:
    if target == "interpret":
        pytest.importorskip("triton")
    record = run(fn, target)
    assert len(record.groups) == 1 and not record.fallbacks


def test_with_unknown_sizes() -> None:
    run(lambda x, w, c, s: half(rms(x.unflatten(-1, (3, 16)), w)) * s[:, None], "cpp", dynamic=True)


def rows(x: Tensor, w: Tensor, c: Tensor, s: Tensor) -> Tensor:
    q = rms(x.view(2, 7, 3, 16), w)
    return torch.cat((q[:, 4:], q[:, :4]), 1) * c[:, None]


def layer_norm(x: Tensor, w: Tensor, c: Tensor, s: Tensor) -> Tensor:
    return half(F.layer_norm(x.view(2, 7, 3, 16), (16,), w)) * s[:, None]


def other(x: Tensor, w: Tensor, c: Tensor, s: Tensor) -> Tensor:
    q = rms(x.view(2, 7, 3, 16), w)
    return torch.cat((q[..., :8], c[:, None, :8].expand(2, 7, 3, 8)), -1) + q


def stepped(x: Tensor, w: Tensor, c: Tensor, s: Tensor) -> Tensor:
    q = rms(x.view(2, 7, 3, 16), w)
    return torch.cat((q[..., 1::2], q[..., ::2]), -1) * s[:, None]


def scanned(x: Tensor, w: Tensor, c: Tensor, s: Tensor) -> Tensor:
    return half(torch.cumsum(x.view(2, 7, 3, 16), -1)) * s[:, None]


@pytest.mark.parametrize("fn", [rows, layer_norm, other, stepped, scanned])
def test_what_is_stored_first(fn: Callable[..., Any]) -> None:
    assert len(run(fn, "cpp").groups) == 2


def test_not_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group, "_NO_TURNS", ("cpu",))
    assert len(run(qwen, "cpp").groups) == 2


def test_gradients() -> None:
    torch.manual_seed(0)
    given = [torch.randn(2, 7, 48), torch.randn(16), torch.randn(7, 16), torch.randn(7, 16)]
    mine, theirs = ([g.clone().requires_grad_() for g in given] for _ in range(2))
    torch.compile(qwen, backend="fusionc", options={"cache": False, "verify": True})(*mine).square().sum().backward()
    qwen(*theirs).square().sum().backward()
    for a, b in zip(mine, theirs):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)
