"""Windows with a bias and a mask through the whole backend: cold, and warm from the cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fusionc
from fusionc import warm
from fusionc.passes import PIPELINE

HEADS, SIDE, WIDTH = 2, 7, 16
TOKENS = SIDE * SIDE


class Windows(nn.Module):
    """Attention of Swin Transformer."""

    def __init__(self, windows: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(HEADS * WIDTH, 3 * HEADS * WIDTH)
        self.table = nn.Parameter(torch.randn((2 * SIDE - 1) ** 2, HEADS))
        at = torch.stack(torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")).flatten(1)
        away = (at[:, :, None] - at[:, None, :]).permute(1, 2, 0) + SIDE - 1
        self.register_buffer("index", away[..., 0] * (2 * SIDE - 1) + away[..., 1])
        self.register_buffer("mask", torch.where(torch.rand(windows, TOKENS, TOKENS) < 0.3, -100.0, 0.0))

    def forward(self, x: Tensor) -> Tensor:
        b = x.shape[0]
        q, k, v = self.qkv(x).reshape(b, TOKENS, 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4).unbind(0)
        bias = self.table[self.index.view(-1)].view(TOKENS, TOKENS, HEADS).permute(2, 0, 1).contiguous()
        scores = (q * WIDTH**-0.5) @ k.transpose(-2, -1) + bias[None]
        scores = scores.view(-1, len(self.mask), HEADS, TOKENS, TOKENS) + self.mask[:, None][None]
        scores = scores.view(-1, HEADS, TOKENS, TOKENS)
        return (scores.softmax(-1) @ v).transpose(1, 2).reshape(b, TOKENS, HEADS * WIDTH)


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pass works on CPU tensors, where the operator runs its reference."""
    (item,) = [step.item for step in PIPELINE if step.item is not None and step.item.name == "biased_attention"]
    monkeypatch.setattr(item, "devices", ("cpu",))


def test_windows_cold_and_warm(fresh_cache: Path) -> None:
    torch.manual_seed(0)
    model = Windows(4).bfloat16()
    x = torch.randn(12, TOKENS, HEADS * WIDTH).bfloat16()
    for start in range(2):
        torch._dynamo.reset()
        warm.stats.clear()
        with torch.no_grad(), fusionc.record.collect() as records:
            made = torch.compile(model, backend="fusionc", fullgraph=True, options={"strict": True, "verify": False})(x)
            eager = model(x).double()
        assert warm.stats["hit" if start else "stored"] == 1, warm.stats
        if not start:
            assert [p.fired for r in records for p in r.passes if p.name == "biased_attention"] == [1]
        assert (made.double() - eager).norm() < 0.02 * eager.norm()


def test_training_is_left_alone(fresh_cache: Path) -> None:
    model, x = Windows(4).bfloat16(), torch.randn(4, TOKENS, HEADS * WIDTH).bfloat16()
    torch._dynamo.reset()
    with fusionc.record.collect() as records:
        torch.compile(model, backend="fusionc", fullgraph=True)(x).sum().backward()
    assert model.table.grad is not None
    assert [p.fired for r in records for p in r.passes if p.name == "biased_attention"][:1] == [0]
