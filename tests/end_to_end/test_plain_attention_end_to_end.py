"""Plain attention through the whole backend: training, inference, dynamic lengths, and a warm start from the cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fusionc import warm
from fusionc.passes import PIPELINE


def attention(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    distance = torch.arange(k.shape[2])[None, :] - torch.arange(q.shape[2])[:, None]
    scores = q @ k.transpose(-1, -2) * 0.3 + slopes[:, None, None] * distance
    return torch.softmax(scores.masked_fill(distance > 0, float("-inf")), -1) @ v


def inputs(length: int = 24) -> list[Tensor]:
    rng = torch.Generator().manual_seed(length)
    made = [torch.randn(2, 3, length, 8, generator=rng, dtype=torch.float64) for _ in range(3)]
    return [x.requires_grad_() for x in (*made, torch.rand(3, generator=rng, dtype=torch.float64))]


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pass works on CPU tensors, where the operator runs its reference."""
    (item,) = [step.item for step in PIPELINE if step.item is not None and step.item.name == "plain_attention"]
    for name, value in (("devices", ("cpu",)), ("dtypes", (torch.float64,)), ("smallest", 1)):
        monkeypatch.setattr(item, name, value)


def test_training_cold_and_warm(fresh_cache: Path) -> None:
    mine, yours = inputs(), inputs()
    expected = attention(*yours)
    expected.sin().sum().backward()
    for start in range(2):
        torch._dynamo.reset()
        warm.stats.clear()
        for x in mine:
            x.grad = None
        options = {"strict": True, "verify": False}
        made = torch.compile(attention, backend="fusionc", fullgraph=True, options=options)(*mine)
        made.sin().sum().backward()
        torch.testing.assert_close(made, expected)
        for a, b in zip(mine, yours):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-6)  # δ is kept in float32
        assert warm.stats["hit" if start else "stored"] == 1, warm.stats


def test_inference_of_any_length(fresh_cache: Path) -> None:
    compiled = torch.compile(attention, backend="fusionc", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for length in (20, 33):
            torch.testing.assert_close(compiled(*inputs(length)), attention(*inputs(length)))
