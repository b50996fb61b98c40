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
    if x.device.type == "cpu":  # (where var_mean adds up float64, as ATen's does, and ATen's group norm float32)
        mean = rows.mean((2, 3), keepdim=True)
        var = (rows - mean).square().mean((2, 3), keepdim=True)
        if x.is_contiguous():  # the rounding of large means counts beside small variances
            rest = (rows - mean).mean((2, 3), keepdim=True)
            var = (var - rest * rest).clamp_min(0)
            mean = mean + rest
    else:
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


# `_foreach_…` operators work on lists of tensors; their parts fuse vertically and become one launch again.
_UNARY = """abs acos asin atan ceil cos cosh erf erfc exp expm1 floor frac lgamma log log10 log1p log2 neg reciprocal round
    rsqrt sigmoid sign sin sinh sqrt tan tanh trunc""".split()
_BINARY = {
    **{n: getattr(torch, n) for n in ("add", "sub", "mul", "div", "pow", "clamp_max", "clamp_min")},
    "maximum": torch.maximum,
    "minimum": torch.minimum,
}
_WITH_NUMBER = {"maximum": torch.clamp_min, "minimum": torch.clamp_max}
_WITH_LIST = {"clamp_max": torch.minimum, "clamp_min": torch.maximum}
_TERNARY = {"addcmul": torch.addcmul, "addcdiv": torch.addcdiv}


def _foreach(name: str, overload: str) -> Callable[..., Any] | None:
    """`_foreach_<name>.<overload>` as one operator a tensor, or None if it is not one of those taken apart."""
    if name in _UNARY and overload == "default":
        one = getattr(torch, name)
        return lambda xs: [one(x) for x in xs]
    if name in _BINARY:
        op = _BINARY[name]
        scalar, tensor = _WITH_NUMBER.get(name, op), _WITH_LIST.get(name, op)
        return {
            "Scalar": lambda xs, y: [scalar(x, y) for x in xs],
            "ScalarList": lambda xs, ys: [scalar(x, y) for x, y in zip(xs, ys, strict=True)],
            "List": lambda xs, ys, **more: [tensor(x, y, **more) for x, y in zip(xs, ys, strict=True)],
            "Tensor": lambda xs, y, **more: [tensor(x, y, **more) for x in xs],
            "ScalarAndTensor": lambda x, ys: [op(x, y) for y in ys],
        }.get(overload)
    if name in _TERNARY:
        ternary = _TERNARY[name]

        def with_number(xs: list[Tensor], a: list[Tensor], b: list[Tensor], value: float = 1) -> list[Tensor]:
            return [ternary(*t, value=value) for t in zip(xs, a, b, strict=True)]

        def with_numbers(xs: list[Tensor], a: list[Tensor], b: list[Tensor], values: list[float]) -> list[Tensor]:
            return [ternary(*t, value=n) for *t, n in zip(xs, a, b, values, strict=True)]

        return with_number if overload == "Scalar" else with_numbers if overload == "ScalarList" else None
    if name == "lerp":
        return {
            "List": lambda xs, ends, w: [torch.lerp(*t) for t in zip(xs, ends, w, strict=True)],
            "Scalar": lambda xs, ends, w: [torch.lerp(x, e, w) for x, e in zip(xs, ends, strict=True)],
        }.get(overload)
    return None


def _foreach_rules() -> dict[Any, Callable[..., Any]]:
    out: dict[Any, Callable[..., Any]] = {}
    for name in (*_UNARY, *_BINARY, *_TERNARY, "lerp"):
        packet = getattr(torch.ops.aten, f"_foreach_{name}", None)
        for overload in packet.overloads() if packet is not None else ():
            found = _foreach(name, overload)
            if found is not None:
                out[getattr(packet, overload)] = found
    return out


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a · b + c; how often it is rounded is the business of the kernel's compiler."""
    return a * b + c


def select(x: Tensor, dim: int, index: int) -> Any:
    """The only element of a dimension is a squeeze, through which kernels fuse; others stay what they are."""
    if type(x.shape[dim]) is int and x.shape[dim] == 1:
        return torch.ops.aten.squeeze.dim(x, dim)
    return NotImplemented


def vector_norm(x: Tensor, ord: float = 2, dim: list[int] | None = None, keepdim: bool = False, **more: Any) -> Any:
    """Dimensions counted from the front: fake tensors of torch 2.11 keep others of size 1 in the result."""
    if x.dim() and any(d < 0 for d in dim or ()):
        return torch.ops.aten.linalg_vector_norm.default(x, ord, [d % x.dim() for d in dim or ()], keepdim, **more)
    return NotImplemented


def _into(op: Any) -> Callable[..., Any]:
    """`op`, which writes into a copy of its first argument, with that copy dense.

    Fake tensors of torch 2.11 say that the result of an expanded tensor is expanded: its elements would be one.
    """

    def scatter(x: Tensor, *args: Any, **more: Any) -> Any:
        if any(type(s) is int and s == 0 for s in x.stride()):
            dense = x.clone()
            if dense.stride() != x.stride():  # (empty tensors keep theirs)
                return op(dense, *args, **more)
        return NotImplemented

    return scatter


def rules() -> dict[Any, Callable[..., Any]]:
    """Overload → function."""
    out: dict[Any, Callable[..., Any]] = {
        torch.ops.aten.native_group_norm.default: native_group_norm,
        **_foreach_rules(),
    }
    out[torch.ops.aten.select.int] = select
    out[torch.ops.aten.linalg_vector_norm.default] = vector_norm
    for packet in (torch.ops.aten.slice_scatter, torch.ops.aten.select_scatter, torch.ops.aten.diagonal_scatter):
        out[packet.default] = _into(packet.default)
    if hasattr(torch.ops.prims, "fma"):
        out[torch.ops.prims.fma.default] = fma
    return out
