"""fusionc::grouped_conv: a grouped convolution of channels-last images with bias and activation.

Math       y[n, g O + o, p, q] = f(b[g O + o] + Σ_c,i,j w[g O + o, c, i, j] x[n, g C + c, s p + d i − P, s q + d j − P])
Shapes     x [N, G C, H, W] channels-last, weight [G O, C, kh, kw] of any strides, bias [G O], of one floating dtype; activation
           "", "relu", "gelu", "gelu_tanh", "silu" → [N, G O, H', W'] of that dtype, channels-last
Errors     those of ``aten.convolution`` for sizes that do not fit; ValueError for another activation
Gradient   no autograd rule: it stands in inference graphs and, after AOTAutograd, in forward graphs, whose backward is ATen's
Source     kernels in ``codegen/templates/grouped_conv.py``
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import late
from .activation import activate_

_LIBRARY = torch.library.Library("fusionc", "FRAGMENT")
_LIBRARY.define("grouped_conv(Tensor x, Tensor weight, Tensor? bias, SymInt[] stride, SymInt[] padding, SymInt[] dilation, "
                "SymInt groups, str activation) -> Tensor")  # fmt: skip


def _reference(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int],
               dilation: Sequence[int], groups: int, activation: str) -> Tensor:  # fmt: skip
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = torch.ops.aten.convolution(x.to(wide), weight.to(wide), None if bias is None else bias.to(wide), stride, padding,
                                   dilation, False, [0, 0], groups)  # fmt: skip
    return activate_(y, activation).to(x.dtype).contiguous(memory_format=torch.channels_last)


def _launcher() -> Callable[..., Tensor]:
    found = importlib.import_module("fusionc.runtime.grouped_conv").grouped_conv

    def launch(x: Tensor, *args: Any) -> Tensor:
        with torch.cuda.device_of(x):
            return found(x, *args)

    return launch


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int],
          dilation: Sequence[int], groups: int, activation: str) -> Tensor:  # fmt: skip
    sizes = [(n + 2 * p - d * (k - 1) - 1) // s + 1
             for n, k, s, p, d in zip(x.shape[2:], weight.shape[2:], stride, padding, dilation)]  # fmt: skip
    return torch.empty((x.shape[0], weight.shape[0], *sizes), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


_LIBRARY.impl("grouped_conv", _reference, "CPU")
_LIBRARY.impl("grouped_conv", late(_launcher, "grouped_conv", _reference), "CUDA")
torch.library.register_fake("fusionc::grouped_conv", _fake, lib=_LIBRARY)
