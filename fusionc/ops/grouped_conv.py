"""fusionc::grouped_conv and per_example_conv: grouped convolutions with bias and activation, in the layout of images.

Math       y[n, g O + o, p, q] = f(b[g O + o] + Σ_c,i,j w[g O + o, c, i, j] x[n, g C + c, s p + d i − P, s q + d j − P])
Shapes     grouped_conv: x [N, G C, H, W] channels-last, weight [G O, C, kh, kw] of any strides → [N, G O, H', W'] channels-last.
           per_example_conv: groups are examples, filters are computed for each: x [1, G C, H, W], weight contiguous →
           [1, G O, H', W'] contiguous. bias [G O]; all of one floating dtype; activation "", "relu", "gelu", "gelu_tanh", "silu"
Errors     those of ``aten.convolution`` for sizes that do not fit; ValueError for another activation
Gradient   no autograd rule: they stand in inference graphs and, after AOTAutograd, in forward graphs, whose backward is ATen's
Source     Yang et al., CondConv (arXiv 1904.04971) for filters of each example; kernels in ``codegen/templates``
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from . import late, on_device
from .activation import activate_
from .fake import register_fake
from .layout import out_sizes

_LIBRARY = torch.library.Library("fusionc", "FRAGMENT")


def _reference(layout: torch.memory_format, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int],
               padding: Sequence[int], dilation: Sequence[int], groups: int, activation: str) -> Tensor:  # fmt: skip
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = torch.ops.aten.convolution(x.to(wide), weight.to(wide), None if bias is None else bias.to(wide), stride, padding,
                                   dilation, False, [0, 0], groups)  # fmt: skip
    return activate_(y, activation).to(x.dtype).contiguous(memory_format=layout)


def _fake(layout: torch.memory_format, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int],
          padding: Sequence[int], dilation: Sequence[int], groups: int, activation: str) -> Tensor:  # fmt: skip
    sizes = out_sizes(x.shape[2:], weight.shape[2:], stride, padding, dilation)
    return torch.empty((x.shape[0], weight.shape[0], *sizes), dtype=x.dtype, device=x.device, memory_format=layout)


def _grouped() -> Callable[..., Tensor]:
    return on_device(importlib.import_module("fusionc.runtime.grouped_conv").grouped_conv)


def _per_example() -> Callable[..., Tensor]:
    return on_device(importlib.import_module("fusionc.runtime.per_example_conv").per_example_conv)


for _name, _layout, _find in (("grouped_conv", torch.channels_last, _grouped),
                              ("per_example_conv", torch.contiguous_format, _per_example)):  # fmt: skip
    _LIBRARY.define(f"{_name}(Tensor x, Tensor weight, Tensor? bias, SymInt[] stride, SymInt[] padding, SymInt[] dilation, "
                    "SymInt groups, str activation) -> Tensor")  # fmt: skip
    _here = partial(_reference, _layout)
    _LIBRARY.impl(_name, _here, "CPU")
    _LIBRARY.impl(_name, late(_find, _name, _here), "CUDA")
    register_fake(f"fusionc::{_name}", partial(_fake, _layout), _LIBRARY)
