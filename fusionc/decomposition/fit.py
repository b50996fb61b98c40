"""From a kernel's weights to the filters of a form, by least squares, and how far the result is from the kernel.

Let K be the kernel of one channel and K' what the filters amount to (their response to an impulse). The error of a channel is
‖K' − K‖ / ‖K‖ (Frobenius); for white noise as input it is also the relative root mean square error of the output, and for any
input |y' − y| ≤ ‖K' − K‖₁ max|x|. The bound that the user gives holds for every channel, so that a norm behind the layer, which
scales channels, cannot enlarge it. Per form:

* low_rank: the singular value decomposition of each channel, cut off (Eckart-Young: no better filters of that rank exist);
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

    low_rank: column, row, column, row, …; branches: in their order; recursive: the dense one (if any), then the levels'.
    The filters of the last few weights are kept: each filter of a layer is a derived weight of its own.
    """
    key = (str(form), weight_hash([weight]))
    with _lock:
        found = _memo.get(key)
        if found is not None:
            _memo.move_to_end(key)
            return found
    with torch.no_grad():
        made = [f.unsqueeze(1).to(weight.dtype).contiguous() for f in _solve(form, wide(weight))]
    with _lock:
        _memo[key] = made
        while len(_memo) > 64:
            _memo.popitem(last=False)
    return made


def _solve(form: Form, kernel: Tensor) -> list[Tensor]:
    if isinstance(form, LowRank):
        u, s, v = torch.linalg.svd(kernel, full_matrices=False)
        root = s.sqrt()
        out = []
        for i in range(form.rank):  # the singular value in equal parts on both: nothing under- or overflows in half precision
            out += [(u[:, :, i] * root[:, i, None]).unsqueeze(2), (v[:, i, :] * root[:, i, None]).unsqueeze(1)]
        return out
    if isinstance(form, Branches):
        rest, out = kernel.clone(), []
        for b in form.branches:
            part = rest[:, b.at[0] : b.at[0] + b.reach[0] : b.dilation[0], b.at[1] : b.at[1] + b.reach[1] : b.dilation[1]]
            out.append(part.clone())
            part.zero_()  # a tap that two branches cover belongs to the first
        return out
    gram, summed, pad = _normal(form, (kernel.shape[1], kernel.shape[2]))
    target = torch.nn.functional.pad(kernel, (pad[1], pad[1], pad[0], pad[0])).flatten(1)
    theta = (torch.linalg.pinv(gram, hermitian=True, rtol=1e-12) @ (summed.T @ target.T)).T
    sides = [form.dense] * bool(form.dense) + [k for k, _ in form.levels]
    return [p.unflatten(1, (k, k)) for p, k in zip(theta.split([k * k for k in sides], 1), sides)]


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
        for column, row in zip(made[::2], made[1::2]):
            out += column * row
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
def _normal(form: Recursive, kernel: tuple[int, int]) -> tuple[Tensor, Tensor, tuple[int, int]]:
    matrices, pad = _responses(form, kernel)
    gram, summed = torch.zeros(2 * [matrices[0].shape[1]], dtype=torch.float64), torch.zeros_like(matrices[0])
    for a in matrices:
        gram += a.T @ a
        summed += a
    return gram, summed, pad


__all__ = ["effective", "errors", "filters", "line", "wide"]
