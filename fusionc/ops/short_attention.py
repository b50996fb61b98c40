"""``fusionc::short_attention``: softmax(scale · q kᵀ + bias + mask) v over so few keys that a program holds them all.

q [B, H, L, D], k and v [B, H/g, S, D] (any strides with dense rows): g query heads share a key head.  ``causal``: query i
sees keys 0 … i, and L = S.  Returns [B, H, L, D] in q's dtype, in memory as [B, L, H, D].

``bias`` and ``mask`` are both [P, H|1, L|1, S'|1] of any strides (0 too), P a divisor of B, S' ≥ S: batch entry b reads part
b mod P (Swin's masks differ by a window's place in its image), and columns from S on are not used (they may be there to
align rows). Floats are added to the scores; a bool says whether the key counts. A row without any key is 0 if ``safe``, as
in scaled_dot_product_attention, else NaN, as a softmax is.

Scores and sums are float32, weights are rounded to q's dtype before they meet v, as in the flash kernels of the library.
The kernel takes 16 bits, D of 16 to 128 and up to 128 keys; the rest, and a CPU, is computed by ATen.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import late
from .fake import register_fake

KEYS = 128  # at most: 197, padded to 256, measured slower in a model than the library
WIDTHS = (16, 32, 64, 128)

_library = torch.library.Library("fusionc", "FRAGMENT")
_library.define("short_attention(Tensor q, Tensor k, Tensor v, float scale, bool causal, Tensor? bias=None, "
                "Tensor? mask=None, bool safe=True) -> Tensor")  # fmt: skip


def reference(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, bias: Tensor | None = None,
              mask: Tensor | None = None, safe: bool = True) -> Tensor:  # fmt: skip
    """The operator in ATen: the library's attention where that means the same, else one operator after the other."""
    biases = added(bias, mask)
    shared = q.shape[1] != k.shape[1]
    if not biases:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=shared)
    elif safe and not causal and len(biases) == 1 and biases[0].dtype in (q.dtype, torch.bool):
        out = F.scaled_dot_product_attention(q, k, v, _spread(biases[0], q, k), scale=scale, enable_gqa=shared)
    else:
        out = _written_out(q, k, v, scale, causal, biases, safe)
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def added(bias: Tensor | None, mask: Tensor | None) -> list[Tensor]:
    """Those that are given."""
    return [x for x in (bias, mask) if x is not None]


def _spread(bias: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """[B|1, H|1, L|1, S|1], copied only where it is neither one for all nor one for each of the batch."""
    bias = bias[..., : k.shape[2]]
    if bias.shape[0] in (1, q.shape[0]):
        return bias
    return bias.expand(q.shape[0] // bias.shape[0], *bias.shape).flatten(0, 1)


def _written_out(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, biases: Sequence[Tensor],
                 safe: bool) -> Tensor:  # fmt: skip
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (q @ k.transpose(-1, -2)).to(wide) * scale
    kept = [torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()] if causal else []
    by_place = [b for b in biases if 1 < b.shape[0] < q.shape[0]]
    parts = scores.unflatten(0, (-1, by_place[0].shape[0])) if len({b.shape[0] for b in by_place}) == 1 else None
    for bias in biases:
        if bias.dtype == torch.bool:
            kept.append(_spread(bias, q, k))
        elif parts is not None and bias.shape[0] == parts.shape[1]:  # read by strides, as eager does
            parts += bias[..., : k.shape[2]]
        else:
            scores += _spread(bias, q, k)
    for each in kept:
        scores = scores.masked_fill(~each, float("-inf"))
    weights = torch.softmax(scores, -1)
    if safe:
        weights = weights.masked_fill((scores == float("-inf")).all(-1, keepdim=True), 0)
    return weights.to(q.dtype) @ v


def _shape(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, bias: Tensor | None = None,
           mask: Tensor | None = None, safe: bool = True) -> Tensor:  # fmt: skip
    b, h, n, _ = q.shape
    return q.new_empty((b, n, h, v.shape[3])).transpose(1, 2)


_library.impl("short_attention", reference, "CPU")
_library.impl(
    "short_attention",
    late(lambda: importlib.import_module("fusionc.targets.short_attention").attention, "short_attention", reference),
    "CUDA",
)
register_fake("fusionc::short_attention", _shape, _library)
