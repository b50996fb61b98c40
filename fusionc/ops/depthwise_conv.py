"""fusionc::depthwise_conv: one filter a channel, bias and activation, with kernels for large filters.

Math       y[n, c, p, q] = f(b[c] + Σᵢⱼ taps[i, j, c] x[n, c / m, s p + d i − P, s q + d j − P]),  zero outside of x
Shapes     x [N, C / m, H, W] contiguous or channels-last, floating; taps [kh, kw, C] and bias [C] of x's dtype or float32;
           activation "", "relu", "gelu", "gelu_tanh", "silu" → [N, C, H', W'] of x's dtype and layout; m is 1 nearly always
Gradient   of the taps: ``depthwise_conv_weight`` (stride 1); of x: the same operator with the taps turned round; no
           autograd rule: they stand in inference graphs and, after AOTAutograd, in forward and backward graphs
Source     ``codegen/templates/depthwise_conv.py`` has the kernels and their sources
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import late, on_device
from .activation import activate_
from .fake import register_fake
from .layout import layout_of, out_sizes

_LIBRARY = torch.library.Library("fusionc", "FRAGMENT")
_LIBRARY.define("depthwise_conv(Tensor x, Tensor taps, Tensor? bias, SymInt[] stride, SymInt[] padding, "
                "SymInt[] dilation, str activation) -> Tensor")  # fmt: skip


def _reference(x: Tensor, taps: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int],
               dilation: Sequence[int], activation: str) -> Tensor:  # fmt: skip
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight = taps.to(wide).permute(2, 0, 1).unsqueeze(1).contiguous()
    y = torch.ops.aten.convolution(x.to(wide), weight, None if bias is None else bias.to(wide), stride, padding, dilation,
                                   False, [0, 0], x.shape[1])  # fmt: skip
    y = activate_(y, activation)
    return y.to(x.dtype).contiguous(memory_format=layout_of(x))


def _launcher(name: str) -> Callable[..., Tensor]:
    return on_device(getattr(importlib.import_module("fusionc.runtime.depthwise_conv"), name))


def _fake(x: Tensor, taps: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int],
          dilation: Sequence[int], activation: str) -> Tensor:  # fmt: skip
    sizes = out_sizes(x.shape[2:], taps.shape[:2], stride, padding, dilation)
    return x.new_empty((x.shape[0], taps.shape[2], *sizes)).contiguous(memory_format=layout_of(x))


_LIBRARY.define("depthwise_conv_weight(Tensor grad, Tensor x, SymInt[] kernel, SymInt[] padding, SymInt[] dilation) -> Tensor")


def _weight_reference(grad: Tensor, x: Tensor, kernel: Sequence[int], padding: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """Gradient of the taps [kh, kw, C] of a convolution of stride 1, in float32 or wider."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight = torch.empty((x.shape[1], 1, *kernel), dtype=wide, device=x.device)
    found = torch.ops.aten.convolution_backward(grad.to(wide), x.to(wide), weight, None, [1, 1], padding, dilation, False,
                                                [0, 0], x.shape[1], [False, True, False])[1]  # fmt: skip
    return found.squeeze(1).permute(1, 2, 0).contiguous()


def _weight_fake(grad: Tensor, x: Tensor, kernel: Sequence[int], padding: Sequence[int], dilation: Sequence[int]) -> Tensor:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty((*kernel, x.shape[1]), dtype=wide)


_LIBRARY.impl("depthwise_conv", _reference, "CPU")
_LIBRARY.impl("depthwise_conv_weight", _weight_reference, "CPU")
_LIBRARY.impl("depthwise_conv_weight", late(lambda: _launcher("depthwise_conv_weight"), "depthwise_conv_weight",
                                             _weight_reference), "CUDA")  # fmt: skip
register_fake("fusionc::depthwise_conv_weight", _weight_fake, _LIBRARY)
_LIBRARY.impl("depthwise_conv", late(lambda: _launcher("depthwise_conv"), "depthwise_conv", _reference), "CUDA")
register_fake("fusionc::depthwise_conv", _fake, _LIBRARY)
