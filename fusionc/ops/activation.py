"""The activations that operators take by name: "" (none), "relu", "silu", "gelu", "gelu_tanh"."""

from __future__ import annotations

import torch
from torch import Tensor


def activate_(y: Tensor, name: str) -> Tensor:
    """f(y), written over y."""
    if name == "relu":
        return torch.relu_(y)
    if name == "silu":
        return torch.ops.aten.silu_(y)
    if name in ("gelu", "gelu_tanh"):
        return torch.ops.aten.gelu_(y, approximate="tanh" if name == "gelu_tanh" else "none")
    if name:
        raise ValueError(f"no activation is called {name!r}")
    return y
