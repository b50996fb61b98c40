"""``fusionc::decode_attention``: attention of one query per sequence over keys and values of any length, and
``fusionc::decode_attention_update``, which before that rotates query and new key and writes the new row into the cache.

q       [B, H, 1, D]               key, value  [B, HKV, S, D], HKV divides H (query head h reads head h // (H / HKV))
mask    None, or [B or 1, H or 1, 1, S]: bool (True is visible) or numbers that are added to the scores
k, v    [B, HKV, 1, D]: the new row, for position ``index`` (int64, one element, the same for all sequences)
cos, sin  both None, or [B or 1, 1, 1, D] in q's dtype: q and k become x · cos + (−x₂, x₁) · sin, each product rounded
chained   see ``skinny_linear``; the cache counts as a weight that only this operator writes

Returns [B, 1, H, D], contiguous.  A row that sees nothing (all −inf) gives 0.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import late
from .fake import register_fake

_library = torch.library.Library("fusionc", "FRAGMENT")
_library.define("decode_attention(Tensor q, Tensor key, Tensor value, Tensor? mask, float scale, bool chained) -> Tensor")
_library.define(
    "decode_attention_update(Tensor q, Tensor k, Tensor v, Tensor? cos, Tensor? sin, Tensor(a!) key, Tensor(b!) value, "
    "Tensor index, Tensor? mask, float scale, bool chained) -> Tensor"
)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE as Llama writes it, x [..., D]."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def attention(q: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, chained: bool = False) -> Tensor:
    """The operator in ATen."""
    groups = q.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if mask is not None and mask.dtype is not torch.bool:
        mask = mask.to(q.dtype)
    out = F.scaled_dot_product_attention(q, key, value, mask, scale=scale)
    return out.transpose(1, 2).contiguous()


def update(q: Tensor, k: Tensor, v: Tensor, cos: Tensor | None, sin: Tensor | None, key: Tensor, value: Tensor,
           index: Tensor, mask: Tensor | None, scale: float, chained: bool = False) -> Tensor:  # fmt: skip
    """The operator in ATen."""
    if cos is not None and sin is not None:
        q, k = rotated(q, cos, sin), rotated(k, cos, sin)
    key.index_copy_(2, index.reshape(1), k)
    value.index_copy_(2, index.reshape(1), v)
    return attention(q, key, value, mask, scale)


def _shape(q: Tensor, *rest: object) -> Tensor:
    return q.new_empty((q.shape[0], 1, q.shape[1], q.shape[3]))


def _kernel(name: str) -> Callable[..., Any]:
    return getattr(importlib.import_module("fusionc.targets.decode"), name)


for _name, _reference in (("decode_attention", attention), ("decode_attention_update", update)):
    _library.impl(_name, _reference, "CPU")
    _library.impl(_name, late(functools.partial(_kernel, _name), _name, _reference), "CUDA")
    register_fake(f"fusionc::{_name}", _shape, _library)
