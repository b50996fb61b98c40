"""From a kernel's weights to the filters of a form, by least squares, and how far the result is from the kernel.

Let K be the kernel of one channel and K' what the filters amount to (their response to an impulse). The error of a channel is
‖K' − K‖ / ‖K‖ (Frobenius); for white noise as input it is also the relative root mean square error of the output, and for any
input |y' − y| ≤ ‖K' − K‖₁ max|x|. The bound that the user gives holds for every channel, so that a norm behind the layer, which
scales channels, cannot enlarge it. Per form:

* low_rank: the singular value decomposition of each channel, cut off (Eckart-Young: no better filters of that rank exist);
  with a dense square, whose taps are free, the rest is fitted by alternating projections (a local optimum);
* branches: filters that cover some taps, so the best fit is the kernel at these taps, and the error what lies elsewhere;
* recursive: linear in the filters; normal equations over one period of positions (the form varies with the position by
  the coarsest factor; the error is the root mean square over that period).

All arithmetic is float64 on the CPU; filters are rounded to the weight's dtype before their error is taken.
"""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict

import torch
from torch import Tensor

from fusionc.accuracy import weight_hash

from .forms import Branches, Form, LowRank, Recursive, centred

_TINY = 1e-300
_memo: OrderedDict[tuple[str, str], list[Tensor]] = OrderedDict()
_lock = threading.Lock()


def wide(weight: Tensor) -> Tensor:
    """[C, 1, kh, kw] → [C, kh, kw] in float64 on the CPU."""
    return weight.detach().cpu().double().squeeze(1)


def filters(form: Form, weight: Tensor) -> list[Tensor]:
    """The form's filters, each [C, 1, h, w] of the weight's dtype, on the CPU.

    low_rank: column, row, column, row, …, square; branches: in their order; recursive: the dense one (if any), then the levels'.
    The filters of the last few weights are kept (each filter of a layer is a derived weight of its own): do not write them.
    """
    key = (str(form), weight_hash([weight]))
    with _lock:
        found = _memo.get(key)
        if found is not None:
            _memo.move_to_end(key)
            return found
    with torch.no_grad():
        # the strides of axes of size 1 are those of a new tensor, too
        made = [f.to(weight.dtype).flatten().view(f.shape[0], 1, *f.shape[1:]) for f in _solve(form, wide(weight))]
    with _lock:
        _memo[key] = made
        while len(_memo) > 64:
            _memo.popitem(last=False)
    return made


def _solve(form: Form, kernel: Tensor) -> list[Tensor]:
    if isinstance(form, LowRank):
        u, v = _pairs(kernel) if not form.dense else _completed(kernel, form.rank, form.dense)
        root = v.norm(dim=2, keepdim=True).sqrt()  # equal parts on both: nothing under- or overflows in half precision
        out = []
        for i in range(form.rank):
            out += [u[:, :, i : i + 1] * root[:, i : i + 1], v[:, i : i + 1] / root[:, i : i + 1].clamp_min(_TINY)]
        return [*out, (kernel - u @ v)[_middle(kernel, form.dense)]] if form.dense else out
    if isinstance(form, Branches):
        rest, out = kernel.clone(), []
        for b in form.branches:
            part = rest[:, b.at[0] : b.at[0] + b.reach[0] : b.dilation[0], b.at[1] : b.at[1] + b.reach[1] : b.dilation[1]]
            out.append(part.clone())
            part.zero_()  # a tap that two branches cover belongs to the first
        return out
    theta = _fitted(form, kernel)[0]
    sides = [form.dense] * bool(form.dense) + [k for k, _ in form.levels]
    return [p.unflatten(1, (k, k)) for p, k in zip(theta.split([k * k for k in sides], 1), sides)]


def _fitted(form: Recursive, kernel: Tensor) -> tuple[Tensor, Tensor]:
    """The best filters of a recursive form, [C, their taps], and their mean square error [C] in closed form."""
    gram, summed, count, pad = _normal(form, (kernel.shape[1], kernel.shape[2]))
    target = torch.nn.functional.pad(kernel, (pad[1], pad[1], pad[0], pad[0])).flatten(1)
    right = target @ summed
    theta = right @ torch.linalg.pinv(gram, hermitian=True, rtol=1e-12)
    return theta, target.square().sum(1) + ((theta @ gram) * theta - 2 * theta * right).sum(1) / count


def recursive_error(form: Recursive, kernel: Tensor) -> float:
    """The worst channel's error before rounding, for kernels [C, kh, kw]: much cheaper than ``errors``."""
    square = _fitted(form, kernel)[1] / kernel.square().sum((1, 2)).clamp_min(_TINY)
    return float(square.clamp_min(0).max().sqrt())


def _pairs(kernel: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal columns [C, kh, r] and rows [C, r, kw], scaled, whose product is the kernel."""
    u, s, v = torch.linalg.svd(kernel, full_matrices=False)
    return u, v * s.unsqueeze(2)


def _middle(kernel: Tensor, side: int) -> tuple[slice, slice, slice]:
    b = centred((kernel.shape[1], kernel.shape[2]), (side, side))
    return slice(None), slice(b.at[0], b.at[0] + side), slice(b.at[1], b.at[1] + side)


def _completed(kernel: Tensor, rank: int, dense: int, steps: int = 60) -> tuple[Tensor, Tensor]:
    """As ``_pairs``, for the kernel without its middle: what the fit says there replaces it, and so on (hard imputation, each
    step one of subspace iteration instead of a decomposition)."""
    at, rest = _middle(kernel, dense), kernel.clone()
    rest[at] = 0
    v = torch.linalg.svd(rest, full_matrices=False)[2][:, :rank].mT
    for _ in range(steps):
        u = torch.linalg.qr(rest @ v)[0]
        v, last = torch.linalg.qr(rest.mT @ u)[0], rest[at].clone()
        rest[at] = (u @ (u.mT @ rest))[at]
        if float((rest[at] - last).norm()) <= 1e-9 * float(rest.norm()):
            break
    u = torch.linalg.qr(rest @ v)[0]
    return u, u.mT @ rest


def errors(form: Form, pieces: list[Tensor], weight: Tensor) -> Tensor:
    """Relative error of each channel [C] (float64): see the module's docstring. A channel of zeros has none."""
    kernel = wide(weight)
    made = [wide(p) for p in pieces]
    if isinstance(form, Recursive):
        matrices, pad = _responses(form, (kernel.shape[1], kernel.shape[2]))
        target = torch.nn.functional.pad(kernel, (pad[1], pad[1], pad[0], pad[0])).flatten(1)
        theta = torch.cat([m.flatten(1) for m in made], 1)
        square = torch.stack([(theta @ a.T - target).square().sum(1) for a in matrices]).mean(0)
    else:
        square = (effective(form, made, kernel.shape) - kernel).square().sum((1, 2))
    return square.sqrt() / kernel.square().sum((1, 2)).sqrt().clamp_min(_TINY)


def effective(form: Form, made: list[Tensor], shape: tuple[int, ...]) -> Tensor:
    """The kernel [C, kh, kw] that filters [C, h, w] of a form without coarse levels amount to."""
    out = torch.zeros(tuple(shape), dtype=torch.float64)
    if isinstance(form, LowRank):
        for column, row in zip(made[: 2 * form.rank : 2], made[1 : 2 * form.rank : 2]):
            out += column * row
        if form.dense:
            out[_middle(out, form.dense)] += made[-1]
        return out
    assert isinstance(form, Branches)
    for b, m in zip(form.branches, made):
        out[:, b.at[0] : b.at[0] + b.reach[0] : b.dilation[0], b.at[1] : b.at[1] + b.reach[1] : b.dilation[1]] += m
    return out


# -- the recursive form -----------------------------------------------------------------------------------------------


def line(taps: int, factor: int, reach: int) -> Tensor:
    """[phase, position −reach … reach, tap]: response, along one axis, of averaging ``factor`` pixels, a filter of ``taps``
    on the result, and linear interpolation back, for each position modulo ``factor``."""
    out = torch.zeros(factor, 2 * reach + 1, taps, dtype=torch.float64)
    lead = factor + factor * (taps // 2)  # zeros that ``build`` puts in front of the image, less those it cuts off again
    for phase in range(factor):
        at = phase + factor
        source = (at + 0.5) / factor - 0.5
        below = int(source // 1)
        for block, share in ((below, 1 - (source - below)), (below + 1, source - below)):
            for tap in range(taps):
                for b in range(factor):
                    out[phase, factor * (block + tap) + b - lead - phase + reach, tap] += share / factor
    return out


@functools.lru_cache(maxsize=16)
def _responses(form: Recursive, kernel: tuple[int, int]) -> tuple[list[Tensor], tuple[int, int]]:
    """One matrix [taps of the window, filter taps] for each position of the period; the window's rim around the kernel."""
    reach = max([k // 2 for k in kernel] + [f * (k // 2) + 2 * f for k, f in form.levels])
    side = 2 * reach + 1
    period = max(f for _, f in form.levels)
    dense = torch.zeros(side * side, form.dense**2, dtype=torch.float64)
    if form.dense:
        b = centred((side, side), (form.dense, form.dense))
        rows = torch.arange(side * side).view(side, side)[b.at[0] : b.at[0] + form.dense, b.at[1] : b.at[1] + form.dense]
        dense[rows.flatten(), torch.arange(form.dense**2)] = 1
    lines = [line(k, f, reach) for k, f in form.levels]
    out = []
    for i in range(period):
        for j in range(period):
            parts = [dense] if form.dense else []
            for (k, f), one in zip(form.levels, lines):
                parts.append(torch.einsum("as,bt->abst", one[i % f], one[j % f]).reshape(side * side, k * k))
            out.append(torch.cat(parts, 1))
    return out, (reach - kernel[0] // 2, reach - kernel[1] // 2)


@functools.lru_cache(maxsize=16)
def _normal(form: Recursive, kernel: tuple[int, int]) -> tuple[Tensor, Tensor, int, tuple[int, int]]:
    matrices, pad = _responses(form, kernel)
    gram, summed = torch.zeros(2 * [matrices[0].shape[1]], dtype=torch.float64), torch.zeros_like(matrices[0])
    for a in matrices:
        gram += a.T @ a
        summed += a
    return gram, summed, len(matrices), pad


__all__ = ["effective", "errors", "filters", "line", "recursive_error", "wide"]
