"""Rules for positions: scatters, gathers, sorts, windows, repeats, and writes through views.

Importing this module adds its rules to those of ``rules``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from tests.fuzz.choose import Chooser, Value
from tests.fuzz.rules import Arguments, is_float, is_int, named, positions, rule


def _picked(c: Chooser, test: Callable[[Value], bool], **params: Any) -> Arguments:
    return named(c.value(test), **params)


def _full(v: Value) -> bool:
    return v.tensor.ndim > 0 and v.tensor.numel() > 0


def _number(v: Value) -> bool:
    return v.tensor.dtype is not torch.bool


def _any_dim(c: Chooser, test: Callable[[Value], bool] = _full, **params: Any) -> Arguments:
    x = c.value(lambda v: _full(v) and test(v))
    return None if x is None else ((x.name,), {"dim": c.integer(-x.tensor.ndim, x.tensor.ndim - 1), **params})


def _exact_dim(c: Chooser) -> Arguments:
    return _any_dim(c, lambda v: v.exact and _number(v))


# --- gathers, sorts, counts ---
rule("sort", lambda x, dim: x.sort(dim=dim, stable=True)[0], _exact_dim, keeps=True, ties=True)
rule("argsort", lambda x, dim: x.argsort(dim=dim, stable=True), _exact_dim, smooth=False)
rule("argmin", lambda x, dim: x.argmin(dim), _exact_dim, smooth=False)
rule("maxdim", lambda x, dim: x.max(dim)[0], _exact_dim, keeps=True, ties=True)
rule("cummax", lambda x, dim: x.cummax(dim)[0], _exact_dim, keeps=True, ties=True)
rule("extremes", lambda x, dim: x.amin(dim) + x.amax(dim), _exact_dim, smooth=False)
rule("topk", lambda x, dim: x.topk(min(2, x.shape[dim]), dim)[0], _exact_dim, keeps=True, ties=True)
rule("cumprod", lambda x, dim: (x.tanh() + 1.5).cumprod(dim), lambda c: _any_dim(c, is_float), smooth=False)
rule("logcumsumexp", lambda x, dim: x.logcumsumexp(dim), lambda c: _any_dim(c, is_float))
rule("diff", lambda x, dim: x.diff(dim=dim), lambda c: _any_dim(c, _number), keeps=True)
rule("onehot", lambda i: F.one_hot(positions(i, 5), 5), lambda c: _picked(c, is_int), smooth=False)
rule("bucketize", lambda x: torch.bucketize(x, torch.arange(-2, 3, device=x.device).to(x.dtype)),
     lambda c: _picked(c, lambda v: v.exact and v.tensor.dtype in (torch.float32, torch.int64)), smooth=False)  # fmt: skip
rule("argminarange", lambda x: torch.arange(x.numel(), device=x.device).sub(3).abs().argmin(), lambda c: _picked(c, _full),
     smooth=False)  # fmt: skip


def _take(x: torch.Tensor, i: torch.Tensor, dim: int) -> torch.Tensor:
    index = (torch.arange(x.numel(), device=x.device).view(x.shape) + i.long().sum()).remainder(x.shape[dim])
    return x.gather(dim, index)


def _spread(x: torch.Tensor, i: torch.Tensor, dim: int) -> torch.Tensor:
    index = (torch.arange(x.shape[dim], device=x.device) + i.long().sum()).remainder(x.shape[dim])
    shape = [1] * x.ndim
    shape[dim] = -1
    return torch.zeros_like(x).scatter(dim, index.view(shape).expand(x.shape), x)


def _heaped(x: torch.Tensor, i: torch.Tensor, dim: int) -> torch.Tensor:
    index = (torch.arange(x.numel(), device=x.device).view(x.shape) + i.long().sum()).remainder(x.shape[dim])
    return torch.zeros_like(x).scatter_reduce(dim, index, x, "amax", include_self=True)


def _with_index(c: Chooser) -> Arguments:
    x, index = c.value(_full), c.value(lambda v: is_int(v) and v.tensor.numel() > 0)
    if x is None or index is None:
        return None
    return (x.name, index.name), {"dim": c.integer(0, x.tensor.ndim - 1)}


rule("take", _take, _with_index, keeps=True)
rule("spread", _spread, _with_index, keeps=True)
rule("heaped", _heaped, _with_index, keeps=True, ties=True)
rule("indexadd", lambda x, i, dim: x.index_add(dim, positions(i.reshape(-1)[:1], x.shape[dim]),
                                               x.narrow(dim, 0, 1)), _with_index)  # fmt: skip


# --- windows, repeats, parts ---
def _few(x: torch.Tensor, dim: int) -> torch.Tensor:
    return x.narrow(dim, 0, min(7, x.shape[dim]))


def _repeated(c: Chooser) -> Arguments:
    return _any_dim(c, times=c.pick([1, 1, 2, 3]))


def _windows(c: Chooser) -> Arguments:
    x = c.value(lambda v: v.tensor.ndim in (1, 2) and v.tensor.shape[-1] >= 2)
    return (
        None if x is None else ((x.name,), {"size": c.integer(1, min(3, x.tensor.shape[-1])), "step": c.pick([1, 2])})
    )


def _strided(x: torch.Tensor, skip: int) -> torch.Tensor:
    """Every second element of the storage behind a contiguous copy, or of a tensor's own where it is contiguous."""
    flat = x.contiguous()
    return flat.as_strided(((flat.numel() - skip + 1) // 2,), (2,), flat.storage_offset() + skip)


rule("repeat", lambda x, dim, times: x.repeat_interleave(times, dim), _repeated, keeps=True)
rule("tile", lambda x, dim, times: torch.cat([x] * times, dim), _repeated, keeps=True)
rule("repeatall", lambda x: x.repeat(2, *[1] * x.ndim), lambda c: _picked(c, lambda v: v.tensor.ndim < 4), keeps=True)
rule("windows", lambda x, size, step: x.unfold(-1, size, step), _windows, keeps=True)
rule("windowsum", lambda x, size, step: x.unfold(-1, size, step).sum(-1), _windows)
rule("asstrided", _strided, lambda c: _picked(c, lambda v: v.tensor.numel() > 1, skip=c.pick([0, 1])), keeps=True)
rule("triu", lambda x, k: x.triu(k), lambda c: _picked(c, lambda v: v.tensor.ndim >= 2, k=c.integer(-2, 2)), keeps=True)
rule("diag", lambda x: torch.diag_embed(x), lambda c: _picked(c, lambda v: v.tensor.ndim in (1, 2)), keeps=True)
rule("rot", lambda x: x.rot90(1, (0, 1)), lambda c: _picked(c, lambda v: v.tensor.ndim >= 2), keeps=True)
rule(
    "unbound",
    lambda x, dim: torch.stack([2 * t for t in _few(x, dim).unbind(dim)]),
    lambda c: _any_dim(c, _number),
    keeps=True,
)
rule("split", lambda x, dim: torch.cat([t + i for i, t in enumerate(_few(x, dim).split(2, dim))], dim),
     lambda c: _any_dim(c, lambda v: v.tensor.dtype not in (torch.bool, torch.uint8)), keeps=True)  # fmt: skip
rule("swapped", lambda x, dim: torch.cat(list(reversed(x.chunk(3, dim))), dim), _any_dim, keeps=True)
rule("outer", lambda x: torch.outer(x, x), lambda c: _picked(c, lambda v: v.tensor.ndim == 1 and _number(v)))
rule("flatten", lambda x: x.flatten(), lambda c: _picked(c, lambda v: v.tensor.ndim > 1), keeps=True)
rule("pool3", lambda x, dim: (x + x.roll(1, dim) + x.roll(-1, dim)) / 3, lambda c: _any_dim(c, is_float))


# --- scatters that return a copy ---
def _scattered(c: Chooser) -> Arguments:
    x = c.value(lambda v: _full(v) and v.tensor.shape[0] >= 2 and _number(v))
    return None if x is None else ((x.name,), {"index": c.integer(0, x.tensor.shape[0] - 1)})


rule("selectscatter", lambda x, index: x.select_scatter(x[0] + 1, 0, index), _scattered, keeps=True)
rule("slicescatter", lambda x, index: x.slice_scatter(x[index:] * 2, 0, index), _scattered, keeps=True)
rule("diagscatter", lambda x: x.diagonal_scatter(x.diagonal() + 1),
     lambda c: _picked(c, lambda v: _full(v) and v.tensor.ndim >= 2 and _number(v)), keeps=True)  # fmt: skip


# --- writes through views, of inputs too ---
def _changes(name: str, write: Callable[..., torch.Tensor], test: Callable[[Value], bool]) -> None:
    rule(
        name,
        write,
        lambda c: _picked(c, lambda v: _full(v) and _number(v) and test(v)),
        keeps=True,
        mutates=True,
        smooth=False,
    )


def _setitem(x: torch.Tensor, where: Any, value: Any) -> torch.Tensor:
    x[where] = value
    return x


_flat: Callable[[Value], bool] = lambda v: v.tensor.is_contiguous()  # noqa: E731
_changes("halves", lambda x: x.view(-1)[::2].mul_(2), _flat)
_changes("addtransposed", lambda x: x.transpose(0, -1).add_(1), lambda v: True)
_changes("stridedinto", lambda x: x.as_strided((max(1, x.numel() // 2),), (2,), x.storage_offset()).add_(1), _flat)
_changes("filldiagonal", lambda x: x.fill_diagonal_(3), lambda v: v.tensor.ndim == 2)
_changes("setrow", lambda x: _setitem(x, -1, 2), lambda v: True)
_changes("setslice", lambda x: _setitem(x, slice(1, None), x[:-1].clone()), lambda v: True)
_changes("setcolumn", lambda x: _setitem(x, (Ellipsis, slice(None, 1)), 0.0), lambda v: True)
_changes("setmask", lambda x: _setitem(x, x > 0, 1), lambda v: v.exact)
_changes("setnegative", lambda x: x.masked_fill_(x < 0, 4), lambda v: v.exact)
_changes("shiftinto", lambda x: x.narrow(0, 0, 1).copy_(x.narrow(0, x.shape[0] - 1, 1)), lambda v: True)
_changes("indexfillinto", lambda x: x.index_fill_(0, torch.tensor([0], device=x.device), 2), lambda v: True)
_changes("zerofirst", lambda x: x.select(-1, 0).zero_(), lambda v: True)


def _add_into(x: torch.Tensor, i: torch.Tensor, dim: int) -> torch.Tensor:
    return x.index_add_(dim, positions(i.reshape(-1)[:1], x.shape[dim]), x.narrow(dim, 0, 1).clone())


def _put_into(x: torch.Tensor, i: torch.Tensor, dim: int) -> torch.Tensor:
    rows = positions(i.reshape(-1)[:3], x.shape[0])
    return x.index_put_((rows,), torch.ones_like(x[rows]), accumulate=True)


rule("indexaddinto", _add_into, _with_index, mutates=True, smooth=False)
rule("putinto", _put_into, _with_index, mutates=True, smooth=False)
