"""Launching a linear layer with its activation: ("library",) or ("tile", BM, BN, BK, warps, stages), by measurement."""

from __future__ import annotations

import functools
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..codegen.templates import linear_act as template
from ..ops.activation import activate_
from .templates import Start
from .tune import Wanted, fastest

Candidate = tuple[Any, ...]
_PROCESSORS = 132  # of an H200
_FLAT = 512  # inner


@functools.lru_cache(maxsize=512)
def candidates(rows: int, out: int, inner: int, scaled: bool = False) -> tuple[Candidate, ...]:
    """The likeliest first, see `most`. The library comes before them, but has no scale, which costs it reads and writes of the
    result in float32: then last where these are what takes the time, and second where the product is."""
    wide, depth = 128 if out > 64 else 64, 64 if inner > 32 else 32
    found: list[Candidate] = [("tile", 128, wide, depth, 8, 3), ("tile", 64, wide, depth, 4, 4), ("tile", 128, 64, depth, 4, 3)]
    if inner > 256:
        found.append(("tile", 128, wide, depth, 8, 4))
    found.insert(0 if not scaled else 1 if inner > _FLAT else len(found), ("library",))
    return tuple(found)


def most(rows: int, out: int, inner: int, scaled: bool) -> int:
    """How many of them to compile, 0.5 to 1.4 s each, where time counts.

    H200, 18 products of five models: where tiles of 128 columns fit (13), the first one is the fastest or 2 % behind, others
    mostly 7 to 40 %, unless there are too few for all processors; else (16→96, 24→144, 40→240, 80→480, 112→672) each of the
    first three is ahead somewhere, by 1 to 55 %.  With a scale to apply, to 320 inner, the library takes 4 to 10 times as long.
    """
    if out % 128:
        tiles = 3
    else:
        tiles = 1 if -(-rows // 128) * (out // 128) >= _PROCESSORS else 2
    return tiles + (not scaled or inner > _FLAT)


def launch(how: Candidate, x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, activation: str, *,
           interpret: bool = False) -> Tensor:  # fmt: skip
    """Run one candidate."""
    if how[0] == "library":
        return library(x, weight, scale, bias, activation)
    start = _start(how, *x.shape, x.stride(0), weight.shape[0], x.dtype, None if scale is None else scale.dtype,
                   None if bias is None else bias.dtype, activation, None if interpret else x.device)  # fmt: skip
    y = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype, device=x.device)
    start(x, weight, weight if scale is None else scale, weight if bias is None else bias, y)
    return y


@functools.lru_cache(maxsize=1024)
def _start(how: Candidate, rows: int, inner: int, line: int, out: int, dtype: torch.dtype, scale: torch.dtype | None,
           bias: torch.dtype | None, activation: str, device: torch.device | None) -> Start:  # fmt: skip
    _, bm, bn, bk, warps, stages = how
    return Start(template.TEXT, "linear", (dtype, dtype, scale or dtype, bias or dtype, dtype), -(-rows // bm) * -(-out // bn),
                 device, numbers=(rows,), warps=warps, stages=stages, LINE=line, N=out, K=inner, BM=bm, BN=bn, BK=bk,
                 SCALE=scale is not None, BIAS=bias is not None, ACTIVATION=activation)  # fmt: skip


def library(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, activation: str) -> Tensor:
    """ATen's product, then the activation in place."""
    if scale is not None or bias is not None and bias.dtype != x.dtype:
        wide = torch.promote_types(x.dtype, torch.float32)
        y = torch.mm(x, weight.t()).to(wide)
        y = y if scale is None else y.mul_(scale)
        return activate_(y if bias is None else y.add_(bias), activation).to(x.dtype)
    return activate_(torch.mm(x, weight.t()) if bias is None else torch.addmm(bias, x, weight.t()), activation)


@functools.lru_cache(maxsize=1024)
def _call(rows: int, inner: int, line: int, out: int, dtype: torch.dtype, scale: torch.dtype | None, bias: torch.dtype | None,
          activation: str, device: torch.device) -> Wanted:  # fmt: skip
    def prepare(how: Candidate) -> None:
        if how[0] != "library":
            _start(how, rows, inner, line, out, dtype, scale, bias, activation, device).prepare()

    kinds = " ".join("-" if t is None else str(t)[6:] for t in (scale, bias))
    key = f"linear_act {rows} {line} {out} {inner} {dtype} {kinds} {activation}"
    return Wanted(key, candidates(rows, out, inner, scale is not None), prepare, most(rows, out, inner, scale is not None))


def wanted(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, activation: str) -> Wanted | None:
    """What `linear_act` will choose from, by tensors without data; None where that is ATen."""
    (rows, inner), out = x.shape, weight.shape[0]
    if rows * inner * out == 0 or weight.dtype != x.dtype:
        return None
    return _call(rows, inner, x.stride(0) if x.stride(1) == 1 else inner, out, x.dtype, None if scale is None else scale.dtype,
                 None if bias is None else bias.dtype, activation, x.device)  # fmt: skip


def linear_act(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, activation: str) -> Tensor:
    """fusionc::linear_act on a GPU: the fastest candidate for this shape."""
    x = x if x.stride(1) == 1 else x.contiguous()
    weight = weight.contiguous()
    scale = scale if scale is None else scale.contiguous()
    bias = bias if bias is None else bias.contiguous()
    (rows, inner), out = x.shape, weight.shape[0]
    if rows * inner * out == 0 or weight.dtype != x.dtype:
        return library(x, weight, scale, bias, activation)

    at = _call(rows, inner, x.stride(0), out, x.dtype, None if scale is None else scale.dtype,
               None if bias is None else bias.dtype, activation, x.device)  # fmt: skip
    return fastest(at, lambda how, x, w, s, b: launch(how, x, w, s, b, activation), partial(library, activation=activation),
                   x, weight, scale, bias)  # fmt: skip
