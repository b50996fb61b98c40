"""fusionc::tiled_mlp: two matrix products with an activation between them, some rows at a time.

Math       y = f(x W₁ + b₁) W₂ + b₂
Shapes     x [M, K], W₁ [K, N], b₁ [N], W₂ [N, P], b₂ [P] of one dtype; f "relu", "gelu", "gelu_tanh", "silu"; ``rows`` of x at
           a time → [M, P], contiguous
Gradient   none: it stands in graphs after AOTAutograd
Source     the hidden layer of a block of rows stays in the cache (loop tiling)
"""

from __future__ import annotations

import torch
from torch import Tensor

from .activation import activate_
from .fake import register_fake

_LIBRARY = torch.library.Library("fusionc", "FRAGMENT")
_LIBRARY.define("tiled_mlp(Tensor x, Tensor first, Tensor? first_bias, Tensor second, Tensor? second_bias, str activation, "
                "int rows) -> Tensor")  # fmt: skip


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(x, weight, out=out)
    else:
        torch.addmm(bias, x, weight, out=out)


def tiled_mlp(x: Tensor, first: Tensor, first_bias: Tensor | None, second: Tensor, second_bias: Tensor | None, activation: str,
              rows: int) -> Tensor:  # fmt: skip
    """The operator; its arguments are what the top of this file says."""
    out = x.new_empty(x.shape[0], second.shape[1])
    hidden = x.new_empty(min(rows, x.shape[0]), first.shape[1])
    for begin in range(0, x.shape[0], rows):
        part, done = x[begin : begin + rows], out[begin : begin + rows]
        block = hidden[: part.shape[0]]
        _product(part, first, first_bias, block)
        activate_(block, activation)
        _product(block, second, second_bias, done)
    return out


def _fake(x: Tensor, first: Tensor, first_bias: Tensor | None, second: Tensor, second_bias: Tensor | None, activation: str,
          rows: int) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], second.shape[1])


_LIBRARY.impl("tiled_mlp", tiled_mlp, "CPU")
register_fake("fusionc::tiled_mlp", _fake, _LIBRARY)
