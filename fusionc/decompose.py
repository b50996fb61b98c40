"""Our own decompositions, where torch's produces a form that does not fuse into one kernel.

Each function has the signature of its ATen operator and is traced by AOTAutograd.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def native_group_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, n: int, c: int, points: int, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Group norm of x [n, c, ...] (`points` elements a channel): the result, mean and 1/σ of each group [n, groups].

    A contiguous x is normalised as rows of [n, groups, c / groups · points], one kernel; another layout keeps its
    strides and takes mean and 1/σ per channel.
    """
    work = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
    stats = weight.dtype if weight is not None and x.device.type == "cpu" else x.dtype
    rows = x.reshape(n, groups, c // groups, points).to(work)
    var, mean = torch.var_mean(rows, dim=(2, 3), correction=0, keepdim=True)
    rstd = torch.rsqrt(var + eps)
    lead = [1, c] + [1] * (x.dim() - 2)
    if x.is_contiguous():
        y = ((rows - mean) * rstd).view(x.shape)
    else:
        spread = [n, c] + [1] * (x.dim() - 2)
        each = (n, groups, c // groups)
        y = (x - mean.squeeze(3).expand(each).reshape(spread)) * rstd.squeeze(3).expand(each).reshape(spread)
    if weight is not None:
        y = y * weight.view(lead)
    if bias is not None:
        y = y + bias.view(lead)
    return y.to(x.dtype), mean.view(n, groups).to(stats), rstd.view(n, groups).to(stats)


def rules() -> dict[Any, Callable[..., Any]]:
    """ATen overload → function."""
    return {torch.ops.aten.native_group_norm.default: native_group_norm}
