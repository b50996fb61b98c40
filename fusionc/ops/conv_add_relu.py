"""fusionc::conv_add_relu: convolution, bias, sum with another tensor and relu in one kernel; the end of a residual block.

Math       relu(conv(x, W) + b + z)
Shapes     x [N, C, H, W] channels-last; weight [O, C, kh, kw]; bias [O]; z [N, O, H', W'] channels-last; one floating
           dtype, groups 1 → [N, O, H', W'] channels-last
In place   ``conv_add_relu_over`` may write its result over z and return it: only for a Program that knows that nobody
           reads z afterwards (``inplace.reuse_calls``). The result is z, as the schema says, or, where another way to
           compute it is faster, a new tensor: nothing but such a Program may call it
Source     cuDNN's fused operation graph (``torch.cudnn_convolution_add_relu``), and for 1×1 filters a kernel of ours, for
           which z and the result are the only large tensors: at ResNet-50's widths it is bound by reading and writing them
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import torch
from torch import Tensor

from . import late
from .fake import register_fake

_LIBRARY = torch.library.Library("fusionc", "FRAGMENT")
_SIZES = "SymInt[] stride, SymInt[] padding, SymInt[] dilation"
_LIBRARY.define(f"conv_add_relu(Tensor x, Tensor weight, Tensor bias, Tensor z, {_SIZES}) -> Tensor")
_LIBRARY.define(f"conv_add_relu_over(Tensor x, Tensor weight, Tensor bias, Tensor(a!) z, {_SIZES}) -> Tensor(a!)")


def reference(x: Tensor, weight: Tensor, bias: Tensor, z: Tensor, stride: Sequence[int], padding: Sequence[int],
              dilation: Sequence[int]) -> Tensor:  # fmt: skip
    """The operator in ATen."""
    out = torch.ops.aten.convolution(x, weight, bias, stride, padding, dilation, False, [0] * len(stride), 1)
    return out.add_(z).relu_().contiguous(memory_format=torch.channels_last)


def _over(x: Tensor, weight: Tensor, bias: Tensor, z: Tensor, stride: Sequence[int], padding: Sequence[int],
          dilation: Sequence[int]) -> Tensor:  # fmt: skip
    return z.copy_(reference(x, weight, bias, z, stride, padding, dilation))


def _fake(x: Tensor, weight: Tensor, bias: Tensor, z: Tensor, stride: Sequence[int], padding: Sequence[int],
          dilation: Sequence[int]) -> Tensor:  # fmt: skip
    return z.new_empty(z.shape).contiguous(memory_format=torch.channels_last)


def _kernels() -> object:
    return importlib.import_module("fusionc.targets.conv_add_relu")


_LIBRARY.impl("conv_add_relu", reference, "CPU")
_LIBRARY.impl("conv_add_relu_over", _over, "CPU")
_LIBRARY.impl("conv_add_relu", late(lambda: _kernels().fresh, "conv_add_relu", reference), "CUDA")  # type: ignore[attr-defined]
_LIBRARY.impl("conv_add_relu_over", late(lambda: _kernels().over, "conv_add_relu_over", _over),  # type: ignore[attr-defined]
              "CUDA")
register_fake("fusionc::conv_add_relu", _fake, _LIBRARY)
register_fake("fusionc::conv_add_relu_over", _fake, _LIBRARY)
