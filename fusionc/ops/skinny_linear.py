"""``fusionc::skinny_linear``: a linear layer of a few rows with what stands around it, y = epilogue(norm(x) Wᵀ).

x [M, K] (any row stride), weight [N, K] or with a gate [2 N, K] (gate rows above up rows).  The rows may lie in up to
three tensors, ``weight`` and ``more``, as if those were concatenated: sibling weights are read where they are.

norm        RMSNorm over K with weight ``norm`` [K]: norm(x) = x · rsqrt(mean(x²) + eps) in float32; ``rounds`` says
            whether it is rounded to x's dtype before it is multiplied with the weight (as Llama does) or only after
bias        [N], added before the product is rounded
activation  "" or silu, gelu, gelu_tanh, relu: y = activation(gate) · up if ``gated``, else activation(product), each
            rounded as separate operators would
residual    [M, N], added last
chained     launch on a GPU so that reading the weight may start before the kernel in front has finished: legal only
            where a kernel of the same Program stands in front and nothing in the Program writes the weight
turned      the weight is stored [K, N] or [K, 2 N]
ahead       weights that a later call reads: a hint without effect on results.  While the kernel in front leaves the
            memory idle, a kernel of one row that is ``chained`` asks for its own weight and for part of these

Returns [M, N], contiguous, in x's dtype.  Kernels take one row with all of this, up to 128 rows of 16 bits without a norm,
and many rows of 16 bits with sibling weights and a bias; the rest, and a CPU, is computed by ATen.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import late
from .fake import register_fake

ROWS = 128  # that kernels take at most
SIBLING_ROWS = 1 << 15  # with sibling weights, which a copy would have to lay side by side for the library
BLOCK = 64  # sibling weights are multiples of it, if there is more than one row

_library = torch.library.Library("fusionc", "FRAGMENT")
_library.define(
    "skinny_linear(Tensor x, Tensor weight, Tensor? norm, float eps, bool rounds, Tensor? bias, str activation, "
    "Tensor? residual, bool chained, Tensor[]? more=None, bool gated=True, bool turned=False, "
    "Tensor[]? ahead=None) -> Tensor"
)


def reference(x: Tensor, weight: Tensor, norm: Tensor | None, eps: float, rounds: bool, bias: Tensor | None,
              activation: str, residual: Tensor | None, chained: bool = False, more: Sequence[Tensor] | None = None,
              gated: bool = True, turned: bool = False, ahead: Sequence[Tensor] | None = None) -> Tensor:  # fmt: skip
    """The operator in ATen, rounding by rounding."""
    dtype = x.dtype
    if norm is not None:
        h = x.to(torch.promote_types(dtype, torch.float32))
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
        x = norm * h.to(dtype) if rounds else (h * norm).to(dtype)
    if more:
        parts = [weight, *more]
        biases = [None] * len(parts) if bias is None else bias.split([part.shape[0] for part in parts])
        y = torch.cat([F.linear(x, *pair) for pair in zip(parts, biases)], -1)
    else:
        y = F.linear(x, weight.t() if turned else weight, bias)
    if activation and gated:
        gate, up = y.chunk(2, -1)
        y = _activated(gate, activation) * up
    elif activation:
        y = _activated(y, activation)
    if residual is not None:
        y = residual + y
    return y.contiguous()


def _activated(y: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return F.silu(y)
    if activation == "relu":
        return F.relu(y)
    return F.gelu(y, approximate="tanh" if activation == "gelu_tanh" else "none")


def _shape(x: Tensor, weight: Tensor, norm: Tensor | None, eps: float, rounds: bool, bias: Tensor | None,
           activation: str, residual: Tensor | None, chained: bool, more: Sequence[Tensor] | None = None,
           gated: bool = True, turned: bool = False, ahead: Sequence[Tensor] | None = None) -> Tensor:  # fmt: skip
    width = sum(part.shape[int(turned)] for part in (weight, *(more or ()))) // (2 if activation and gated else 1)
    return x.new_empty((x.shape[0], width))


_library.impl("skinny_linear", reference, "CPU")
_library.impl(
    "skinny_linear",
    late(lambda: importlib.import_module("fusionc.targets.skinny").linear, "skinny_linear", reference),
    "CUDA",
)
register_fake("fusionc::skinny_linear", _shape, _library)
