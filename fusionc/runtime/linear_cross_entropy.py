"""Launches the kernels of ``fusionc::linear_cross_entropy`` (text: ``codegen.templates.cross_entropy``) on a GPU."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..codegen.templates.cross_entropy import TEXT
from ..ops.linear_cross_entropy import chunk_rows, padded
from .templates import Start
from .tune import Wanted

_SCALE_BLOCK = 8192


def rows(logits: Tensor, target: Tensor, scale: Tensor, losses: Tensor, ignore_index: int, label_smoothing: float,
         gradient: bool) -> None:  # fmt: skip
    """Fill ``losses`` [n] and, with ``gradient``, overwrite ``logits`` [n, V] (rows contiguous) by their gradient · scale."""
    start = _rows(*logits.shape, logits.stride(0), logits.dtype, ignore_index, label_smoothing, gradient, logits.device)
    with torch.cuda.device(logits.device):
        start(logits, target, scale, losses)


def scale(t: Tensor, factor: Tensor) -> None:
    """``t *= factor`` in place (both on the GPU, t contiguous); t is not touched if the factor is 1. No host sync."""
    if t.numel() >> 31 and t.numel() % 16:  # the kernel counts in 32 bits
        t.mul_(factor)
    elif t.numel():
        with torch.cuda.device(t.device):
            _scale(t.numel(), t.dtype, factor.dtype, t.device)(t, factor)


def wanted(x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, ignore_index: int, mean: bool,
           label_smoothing: float, dtype: torch.dtype, wanted: Sequence[bool]) -> Wanted:  # fmt: skip
    """The kernel that a call of the operator needs, by tensors without data."""
    words, full = weight.shape[0], padded(weight.shape[0])
    count = chunk_rows(x.shape[0], x.shape[1], wanted[1])
    start = _rows(count, words, full, x.dtype, ignore_index, label_smoothing, any(wanted), x.device)
    key = f"cross_entropy_rows {x.dtype} {words} {full} {ignore_index} {label_smoothing} {any(wanted)}"
    return Wanted(key, (None,), lambda _: start.prepare())


def wanted_backward(grad: Tensor, dx: Tensor, dw: Tensor, db: Tensor) -> Wanted:
    """The kernels that a call of the backward needs."""
    given = [t for t in (dx, dw, db) if t.numel()]
    starts = [_scale(t.numel(), t.dtype, grad.dtype, t.device) for t in given]

    def prepare(_: Any) -> None:
        for start in starts:
            start.prepare()

    key = f"scale_in_place {grad.dtype} {[(t.numel(), t.dtype) for t in given]}"
    return Wanted(key, (None,), prepare)


@functools.lru_cache(maxsize=256)
def _rows(count: int, words: int, stride: int, dtype: torch.dtype, ignore_index: int, label_smoothing: float,
          gradient: bool, device: torch.device) -> Start:  # fmt: skip
    # measured (H200, 8192 rows): 128256 words 1.53 ms with 16384, 1.61 with 8192; 50257 words, whose last block goes
    # element by element, 0.80 and 0.63
    block = min(8192 if words % 16 else 16384, max(1024, 1 << (words - 1).bit_length()))
    wide, unit = torch.promote_types(dtype, torch.float32), math.gcd(words, 16)
    return Start(TEXT, "cross_entropy_rows", (dtype, torch.int64, wide, wide), count, device, numbers=(words // unit,),
                 warps=max(4, block // 512), stages=3, UNIT=unit, row_stride=stride, ignore=ignore_index,
                 smoothing=label_smoothing, BLOCK=block, GROUP=8, GRADIENT=gradient)  # fmt: skip


@functools.lru_cache(maxsize=256)
def _scale(count: int, dtype: torch.dtype, factor: torch.dtype, device: torch.device) -> Start:
    unit = math.gcd(count, 16)  # the kernel is that of other counts; what it must know is how wide accesses may be
    return Start(TEXT, "scale_in_place", (dtype, factor), -(-count // _SCALE_BLOCK), device, numbers=(count // unit,),
                 warps=8, stages=3, UNIT=unit, BLOCK=_SCALE_BLOCK)  # fmt: skip
