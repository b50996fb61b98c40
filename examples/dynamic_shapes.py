"""One compilation for every length: with ``dynamic=True`` the sizes are arguments of the kernels.

Padding each batch to its own longest sentence gives a new length nearly every step. Compiled statically each length
would be a new compilation. Here one graph serves them all; ``fusionc.report()`` shows that nothing was compiled again.

    python examples/dynamic_shapes.py
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from fusionc.record import collect


def pooled(x: torch.Tensor, mask: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Normalise, weigh and average the valid positions: x [B, L, D], mask [B, L] of bool, weight [D] -> [B, D]."""
    x = F.silu(F.layer_norm(x, (x.shape[-1],), weight))
    score = (x.mean(-1) / 0.1).masked_fill(~mask, float("-inf"))
    return (x * score.softmax(-1).unsqueeze(-1)).sum(1)


def main(backend: str = "fusionc", lengths: tuple[int, ...] = (17, 64, 100, 33, 257, 8)) -> int:
    """Run every length with one compiled function; return how many graphs fusionc compiled for it."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight = torch.rand(96, device=device)
    compiled = torch.compile(pooled, backend=backend, dynamic=True, fullgraph=True)
    with collect() as graphs:  # every graph that is compiled while this block runs
        for number, length in enumerate(lengths):
            x = torch.randn(4 + number % 3, length, 96, device=device)
            mask = torch.arange(length, device=device) < torch.randint(1, length + 1, (len(x), 1), device=device)
            got, want = compiled(x, mask, weight), pooled(x, mask, weight)
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
            error = (got - want).abs().max().item()
            print(f"batch {len(x)}, length {length:4}: largest difference {error:.1e}, graphs so far {len(graphs)}")
    return len(graphs)


if __name__ == "__main__":
    main()
