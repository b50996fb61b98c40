"""A whole training step: forward, loss, backward and optimizer, compiled, against the same step run eagerly.

torch splits the graph into a forward and a backward part and decides what is kept between them and what is computed
again; fusionc gets both parts. The optimizer's arithmetic over all parameters is a third graph.

    python examples/training_step.py
"""

from __future__ import annotations

import copy
import logging
import time

import torch
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    """One pre-norm transformer block: [batch, length, width] in and out."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Model(nn.Module):
    """Predicts the next of ``vocabulary`` tokens."""

    def __init__(self, vocabulary: int, width: int, layers: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList([Block(width, 4) for _ in range(layers)])
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens[:, :-1])
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), tokens[:, 1:].flatten())


def train(model: nn.Module, backend: str | None, tokens: torch.Tensor, steps: int) -> tuple[list[float], float]:
    """Losses of ``steps`` steps on the same batch, and the seconds of the last one."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loss_of, update = model, optimizer.step
    if backend:
        loss_of, update = torch.compile(model, backend=backend), torch.compile(optimizer.step, backend=backend)
    losses, seconds = [], 0.0
    for _ in range(steps):
        start = time.perf_counter()
        loss = loss_of(tokens)
        loss.backward()
        update()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds = time.perf_counter() - start
    return losses, seconds


def main(backend: str = "fusionc", width: int = 256, layers: int = 4, length: int = 128, steps: int = 6) -> float:
    """Train both ways, print the losses and return the largest difference between them."""
    torch._logging.set_logs(dynamo=logging.ERROR)  # tracing an optimizer notes that its profiler mark is left out
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Model(1000, width, layers).to(device)
    tokens = torch.randint(1000, (8, length), device=device)
    eager, eager_s = train(copy.deepcopy(model), None, tokens, steps)
    ours, ours_s = train(copy.deepcopy(model), backend, tokens, steps)
    print(f"{'step':>4} {'eager':>10} {backend:>10}")
    for i, (a, b) in enumerate(zip(eager, ours)):
        print(f"{i:4} {a:10.6f} {b:10.6f}")
    print(f"last step: eager {eager_s * 1e3:.1f} ms, {backend} {ours_s * 1e3:.1f} ms")
    return max(abs(a - b) for a, b in zip(eager, ours))


if __name__ == "__main__":
    main()
