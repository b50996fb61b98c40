"""Launching a linear layer with its activation: ("library",) or ("tile", BM, BN, BK, warps, stages), by measurement."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..codegen.templates import linear_act as template
from ..ops.activation import activate_
from .launch import load_module

Candidate = tuple[Any, ...]


@functools.lru_cache(maxsize=512)
def candidates(rows: int, out: int, inner: int, scaled: bool = False) -> tuple[Candidate, ...]:
    """The library first: ours is for where the result, not the product, takes the time. It has no scale, so then last."""
    wide, depth = 128 if out > 64 else 64, 64 if inner > 32 else 32
    found: list[Candidate] = [("library",), ("tile", 128, wide, depth, 8, 3), ("tile", 128, 64, depth, 4, 3)]
    if inner > 256:
        found.append(("tile", 128, wide, depth, 8, 4))
    found.append(("tile", 64, wide, depth, 4, 4))
    return (*found[1:], found[0]) if scaled else tuple(found)


def launch(how: Candidate, x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, activation: str, *,
           interpret: bool = False, warm_up: bool = False) -> Tensor:  # fmt: skip
    """Run one candidate (``warm_up``: compile it only)."""
    if how[0] == "library":
        return x.new_empty(0) if warm_up else library(x, weight, scale, bias, activation)
    if interpret:
        from . import interpreter
        from . import launch as launching

        with interpreter.lock, launching._loading, interpreter.repaired(), launching._interpreting(True):
            return _launch(how, x, weight, scale, bias, activation, True, False)
    return _launch(how, x, weight, scale, bias, activation, False, warm_up)


def _launch(how: Candidate, x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, activation: str,
            interpret: bool, warm_up: bool) -> Tensor:  # fmt: skip
    _, bm, bn, bk, warps, stages = how
    rows, inner = x.shape
    out = weight.shape[0]
    y = torch.empty((rows, out), dtype=x.dtype, device=x.device)
    fn = load_module(template.TEXT, interpret=interpret).linear
    grid = (-(-rows // bm) * -(-out // bn),)
    args = (x, weight, weight if scale is None else scale, weight if bias is None else bias, y, rows)
    options: dict[str, Any] = {"LINE": x.stride(0), "N": out, "K": inner, "BM": bm, "BN": bn, "BK": bk,
                               "SCALE": scale is not None, "BIAS": bias is not None, "ACTIVATION": activation,
                               "num_warps": warps, "num_stages": stages}  # fmt: skip
    if warm_up:
        fn.warmup(*args, grid=grid, **options)
    else:
        fn[grid](*args, **options)
    return y


def library(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, activation: str) -> Tensor:
    """ATen's product, then the activation in place."""
    if scale is not None or bias is not None and bias.dtype != x.dtype:
        wide = torch.promote_types(x.dtype, torch.float32)
        y = torch.mm(x, weight.t()).to(wide)
        y = y if scale is None else y.mul_(scale)
        return activate_(y if bias is None else y.add_(bias), activation).to(x.dtype)
    return activate_(torch.mm(x, weight.t()) if bias is None else torch.addmm(bias, x, weight.t()), activation)


@functools.lru_cache(maxsize=1024)
def _key(rows: int, line: int, out: int, inner: int, dtype: torch.dtype, kinds: str, activation: str) -> str:
    return f"linear_act {rows} {line} {out} {inner} {dtype} {kinds} {activation}"


def linear_act(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, activation: str) -> Tensor:
    """fusionc::linear_act on a GPU: the fastest candidate for this shape."""
    from .tune import choose

    x = x if x.stride(1) == 1 else x.contiguous()
    weight = weight.contiguous()
    scale = scale if scale is None else scale.contiguous()
    bias = bias if bias is None else bias.contiguous()
    (rows, inner), out = x.shape, weight.shape[0]
    if rows * inner * out == 0:
        return library(x, weight, scale, bias, activation)

    def right(how: Candidate) -> bool:
        want = library(x, weight, scale, bias, activation).float()
        return bool((launch(how, x, weight, scale, bias, activation).float() - want).norm() <= 0.02 * want.norm())

    kinds = " ".join("-" if t is None else str(t.dtype)[6:] for t in (scale, bias))
    key = _key(rows, x.stride(0), out, inner, x.dtype, kinds, activation)
    how = choose(key, candidates(rows, out, inner, scale is not None),
                 lambda each: launch(each, x, weight, scale, bias, activation), device=x.device, check=right,
                 prepare=lambda each: launch(each, x, weight, scale, bias, activation, warm_up=True))  # fmt: skip
    return launch(how, x, weight, scale, bias, activation)
