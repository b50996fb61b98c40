"""Launches the kernels of ``fusionc::linear_cross_entropy`` (text: ``codegen.templates.cross_entropy``) on a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..codegen.templates.cross_entropy import TEXT
from .launch import load_module


def rows(logits: Tensor, target: Tensor, scale: Tensor, losses: Tensor, ignore_index: int, label_smoothing: float,
         gradient: bool) -> None:  # fmt: skip
    """Fill ``losses`` [n] and, with ``gradient``, overwrite ``logits`` [n, V] (rows contiguous) by their gradient · scale."""
    words = logits.shape[1]
    # measured (H200, 8192 rows): 128256 words 1.53 ms with 16384, 1.61 with 8192; 50257 words, whose last block goes
    # element by element, 0.80 and 0.63
    block = min(8192 if words % 16 else 16384, max(1024, 1 << (words - 1).bit_length()))
    with torch.cuda.device(logits.device):
        load_module(TEXT).cross_entropy_rows[(logits.shape[0],)](
            logits, target, scale, losses, logits.stride(0), words, ignore_index, label_smoothing, BLOCK=block, GROUP=8,
            GRADIENT=gradient, SMOOTH=label_smoothing != 0, WIDE=_wide(losses.dtype), num_warps=max(4, block // 512))  # fmt: skip


def scale(t: Tensor, factor: Tensor) -> None:
    """``t *= factor`` in place (both on the GPU, t contiguous); t is not touched if the factor is 1. No host sync."""
    block = 8192
    if t.numel():
        with torch.cuda.device(t.device):
            load_module(TEXT).scale_in_place[(-(-t.numel() // block),)](
                t, factor, t.numel(), BLOCK=block, WIDE=_wide(t.dtype), num_warps=8)  # fmt: skip


def _wide(dtype: torch.dtype) -> Any:
    import triton.language as tl

    return tl.float64 if dtype == torch.float64 else tl.float32
