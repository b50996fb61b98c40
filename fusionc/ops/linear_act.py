"""fusionc::linear_act: a linear layer of many rows and its activation in one kernel, where that is faster.

Math       f(s ⊙ (x Wᵀ) + b)
Shapes     x [M, K] of rows with dense elements; weight [N, K]; one half-precision dtype (any on a CPU); scale and bias [N]
           of that dtype or float32, or none; activation "relu", "gelu", "gelu_tanh", "silu" → [M, N] of that dtype
Gradient   no autograd rule: it stands in inference graphs
Source     ``codegen/templates/linear_act.py``; the library's product and ATen's activation are a candidate, too
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from torch import Tensor

from . import late, on_device
from .activation import activate_
from .fake import register_fake

_LIBRARY = torch.library.Library("fusionc", "FRAGMENT")
_LIBRARY.define("linear_act(Tensor x, Tensor weight, Tensor? scale, Tensor? bias, str activation) -> Tensor")


def _reference(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, activation: str) -> Tensor:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = x.to(wide) @ weight.to(wide).t()
    y = y if scale is None else y * scale.to(wide)
    y = y if bias is None else y + bias.to(wide)
    y = activate_(y, activation)
    return y.to(x.dtype).contiguous()


def _launcher() -> Callable[..., Tensor]:
    return on_device(importlib.import_module("fusionc.runtime.linear_act").linear_act)


def _fake(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, activation: str) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


_LIBRARY.impl("linear_act", _reference, "CPU")
_LIBRARY.impl("linear_act", late(_launcher, "linear_act", _reference), "CUDA")
register_fake("fusionc::linear_act", _fake, _LIBRARY)
