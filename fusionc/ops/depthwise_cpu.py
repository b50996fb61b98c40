"""fusionc::depthwise_cpu: depthwise convolution with bias and activation in one C++ kernel of ours.

Math       y[n, c, p, q] = f(b[c] + Σᵢⱼ w[c, 0, i, j] x[n, c, s p + d i − P, s q + d j − P]),  zero outside of x
Shapes     x [N, C, H, W] contiguous or channels-last; w [C, 1, kh, kw] and b [C] of x's dtype (float32, bfloat16, float16);
           activation "", "relu", "gelu", "gelu_tanh", "silu" → [N, C, H', W'] of x's dtype and layout
Gradient   none: it stands in graphs after AOTAutograd
Source     ``codegen/templates/depthwise_cpp.py`` has the kernel
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import torch
from torch import Tensor

from . import late
from .activation import activate_
from .fake import register_fake
from .layout import layout_of, out_sizes

_LIBRARY = torch.library.Library("fusionc", "FRAGMENT")
_LIBRARY.define("depthwise_cpu(Tensor x, Tensor weight, Tensor? bias, SymInt[] stride, SymInt[] padding, SymInt[] dilation, "
                "str activation) -> Tensor")  # fmt: skip


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int],
              dilation: Sequence[int], activation: str) -> Tensor:  # fmt: skip
    """The operator in ATen."""
    y = torch.ops.aten.convolution(x, weight, bias, stride, padding, dilation, False, [0, 0], x.shape[1])
    y = activate_(y, activation)
    return y.contiguous(memory_format=layout_of(x))


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int],
          dilation: Sequence[int], activation: str) -> Tensor:  # fmt: skip
    sizes = out_sizes(x.shape[2:], weight.shape[2:], stride, padding, dilation)
    return x.new_empty((x.shape[0], x.shape[1], *sizes)).contiguous(memory_format=layout_of(x))


_LIBRARY.impl("depthwise_cpu", late(lambda: importlib.import_module("fusionc.runtime.depthwise_cpu").depthwise, "depthwise_cpu",
                                    reference), "CPU")  # fmt: skip
register_fake("fusionc::depthwise_cpu", _fake, _LIBRARY)
