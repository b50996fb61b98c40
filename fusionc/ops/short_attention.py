"""``fusionc::short_attention``: softmax(scale · q kᵀ) v over so few keys that a program holds them all.

q [B, H, L, D], k and v [B, H/g, S, D] (any strides with dense rows): g query heads share a key head.  ``causal``: query i
sees keys 0 … i, and L = S.  Returns [B, H, L, D] in q's dtype, in memory as [B, L, H, D].

Scores and sums are float32, weights are rounded to q's dtype before they meet v, as in the flash kernels of the library.
The kernel takes 16 bits, D of 16 to 128 and up to 128 keys; the rest, and a CPU, is computed by ATen.
"""

from __future__ import annotations

import importlib

import torch
import torch.nn.functional as F
from torch import Tensor

from . import late

KEYS = 128  # at most: 197, padded to 256, measured slower in a model than the library
WIDTHS = (16, 32, 64, 128)

_library = torch.library.Library("fusionc", "FRAGMENT")
_library.define("short_attention(Tensor q, Tensor k, Tensor v, float scale, bool causal) -> Tensor")


def reference(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
    """The operator in ATen."""
    shared = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=shared)
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def _shape(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
    b, h, n, _ = q.shape
    return q.new_empty((b, n, h, v.shape[3])).transpose(1, 2)


_library.impl("short_attention", reference, "CPU")
_library.impl(
    "short_attention",
    late(lambda: importlib.import_module("fusionc.targets.short_attention").attention, "short_attention", reference),
    "CUDA",
)
torch.library.register_fake("fusionc::short_attention", _shape, lib=_library)
