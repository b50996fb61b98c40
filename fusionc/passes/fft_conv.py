"""Very long convolutions along one axis, and their gradients, go through the Fourier transform where that is cheaper.

Math       Σ_k w[k] x[t + k − p] = F⁻¹(F(x) F(w turned round)); its gradients are a convolution of dy with w and a correlation of
           x with dy, see ``ops/fft_conv.py``; O(L log L) instead of O(L K). The gradients share the transform of dy
Exactness  Approximate: runs only with options={"fft_conv": True}. In norm it rounds as well as the library does or better
           (float32, L = K = 4096: all 2.4e-7; ATen's result 9.4e-7, gradients 1.1e-6 and 4.1e-7), but its errors are relative
           to the largest value of a row wherever it stands: a value of 1e4 in a row of ones leaves 4e-5 in outputs that it
           does not reach (ATen: 1.3e-7), and one NaN or infinity spoils the row
Legality   one axis, stride and dilation 1, not transposed, padding below the kernel's length, groups = channels = outputs or 1,
           results contiguous, known sizes; weights may be anything, also made by a network (continuous kernels)
Cost       a model with measured figures: on one thread of our CPU ATen takes 0.5 ns a product of a depthwise result, 0.62 of its
           filter's gradient and 0.03 of the input's (0.03 for all where channels mix), the transforms 0.2 ns for each n·log₂ n
           of a row. Forward and backward there: 4×64×4096 depthwise, K = 4096: 11400 ms, 24 here; K = 64 of 2048: 44
           and 6.6; 4×16×512 to 16 channels, K = 512: 93 and 2.6. H200, float32, forward: 4×64×8192, K = 8192: 6.3 ms and
           0.1; 4×256×8192, K = 512: 1.3 and 0.29; 4×256×4096, K = 64: 0.11 and 0.15; gradients not measured on a GPU
Source     the convolution theorem; long convolutions of state-space models and CKConv (Romero et al., arXiv 2102.02611)
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.fx import Node

from ..graph import edit
from ..graph.facts import Facts, dtype, shape, tensor, value
from .base import Approximate, Match, Pass, Refuse

aten = torch.ops.aten
_FEW = 32  # taps below which nothing is looked at
_FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_WORTH = 0.5
_CALLS = 50e-6  # seconds of the transforms' calls, for each result


@dataclass(frozen=True)
class Rates:
    """Seconds on one thread. The direct ones are a product's, depthwise and where channels mix."""

    result: tuple[float, float]
    input: tuple[float, float]
    weight: tuple[float, float]
    transform: float  # for each n·log₂ n of a row of n
    product: float  # of two complex numbers, where channels mix
    copy: float  # of a complex number to where products of matrices want it


# CPU: float32, the lowest of ten shapes. CUDA: depthwise results and transforms measured, the gradients taken to be like results,
# the rest guessed so that the library keeps what it is good at
_RATES = {
    "cpu": Rates((5e-10, 2.7e-11), (3e-11, 2.5e-11), (6.2e-10, 3.4e-11), transform=2e-10, product=2.5e-10, copy=5e-9),
    "cuda": Rates((3e-13, 1e-14), (3e-13, 1e-14), (3e-13, 1e-14), transform=5.5e-13, product=3e-13, copy=1e-11),
}
# what each result is made from (x, w: the filter, y: the convolution's result or its gradient), and what it is like
_PARTS = {"result": ("xw", "y"), "input": ("yw", "x"), "weight": ("xy", "w")}


class FftConv(Pass):
    """aten.convolution over one axis → fusionc::fft_conv; convolution_backward → fusionc::fft_conv_backward, sum."""

    name = "fft_conv"
    atomic = True
    exactness = Approximate("rounding is relative to the largest value of a row")

    def find(self, facts: Facts) -> Iterator[Match]:
        """Convolutions of one axis with many taps, and their backwards: ``grad``, None in a forward."""
        for target in (aten.convolution.default, aten.convolution_backward.default):
            for node in list(facts.gm.graph.find_nodes(op="call_function", target=target)):
                if target is aten.convolution.default:
                    grad, (x, weight, bias, *rest) = None, node.args
                else:
                    grad, x, weight, _, *rest = node.args
                    bias = None
                w = shape(weight)
                if w is not None and len(w) == 3 and isinstance(w[2], int) and w[2] >= _FEW:
                    yield Match({"conv": node, "grad": grad, "x": x, "weight": weight, "bias": bias, "rest": rest}, (node,))

    def check(self, match: Match, facts: Facts) -> Refuse | None:
        """See Legality and Cost."""
        conv: Node = match.conv
        stride, padding, dilation, transposed, _, groups = match.rest[:6]
        of, w = shape(match.x), shape(match.weight)
        assert of is not None and w is not None
        if transposed or list(stride) != [1] or list(dilation) != [1]:
            return Refuse("transposed, strided or dilated", conv)
        if not all(isinstance(n, int) for n in (*of, *w, *padding, groups)):
            return Refuse("a size is symbolic", conv)
        if len(of) != 3 or groups != 1 and not (groups == of[1] == w[0] and w[1] == 1):
            return Refuse("its groups are neither one nor the channels", conv)
        if padding[0] > w[2] - 1:
            return Refuse("the padding is as long as the kernel", conv)
        kind = dtype(match.x)
        if kind not in _FLOATING or any(dtype(a) != kind for a in (match.weight, match.bias, match.grad) if a is not None):
            return Refuse("not of one floating dtype", conv)
        device = tensor(conv if match.grad is None else match.grad).device.type  # type: ignore[union-attr]
        results = [tensor(conv)] if match.grad is None else value(conv)
        if device not in _RATES or not all(t.is_contiguous() for t in results if t is not None):
            return Refuse("no figures for this device, or a result is not contiguous", conv)
        if match.grad is not None and not all(u.target is operator.getitem and match.rest[6][u.args[1]] for u in conv.users):
            return Refuse("the gradients are read as a whole, or one that is not computed is", conv)
        parts = ["result"] if match.grad is None else [p for p, read in zip(("input", "weight"), _read(conv)) if read]
        if not parts:
            return Refuse("neither the input's nor the filter's gradient is read", conv)
        threads = torch.get_num_threads() if device == "cpu" else 1
        direct, transformed = costs(device, of, w, padding[0], groups, parts, threads)
        if transformed > _WORTH * direct:
            return Refuse(f"the transforms would take {transformed * 1e3:.2g} ms, the direct way {direct * 1e3:.2g}", conv)
        return None

    def replace(self, match: Match, facts: Facts) -> None:
        """One call; a gradient of the bias is a sum of its own, which may join a kernel."""
        from ..ops import load

        load("fft_conv")
        conv: Node = match.conv
        padding, groups = match.rest[1][0], match.rest[5]
        graph, ops = facts.gm.graph, torch.ops.fusionc
        if match.grad is None:
            with graph.inserting_before(conv):
                made = edit.insert(graph, ops.fft_conv.default, (match.x, match.weight, match.bias, padding, groups),
                                   origin=(conv,), val=tensor(conv))  # fmt: skip
            edit.replace(conv, made)
            return
        read = _read(conv)
        with graph.inserting_before(conv):
            found = tuple(val if wanted else None for val, wanted in zip(value(conv), read))
            args = (match.grad, match.x, match.weight, padding, groups, list(read))
            made = edit.insert(graph, ops.fft_conv_backward.default, args, origin=(conv,), val=found)
            bias = [u for u in conv.users if u.args[1] == 2]
            total = edit.insert(graph, aten.sum.dim_IntList, (match.grad, [0, 2]), origin=(conv,)) if bias else None
        for user in list(conv.users):
            if user not in bias:
                user.replace_input_with(conv, made)
        for user in bias:
            edit.replace(user, total)
        if not bias:
            edit.erase_dead([conv])


def _read(backward: Node) -> tuple[bool, bool]:
    """Is the gradient of the input read, is that of the filter?"""
    places = {user.args[1] for user in backward.users}
    return 0 in places, 1 in places


def costs(kind: str, x: Sequence[int], weight: Sequence[int], padding: int, groups: int, parts: Sequence[str] = ("result",),
          threads: int = 1) -> tuple[float, float]:
    """Seconds to ``parts`` of ``_PARTS``, ATen's direct way and by transforms; x [B, C, L], weight [O, C / groups, K]."""
    rates = _RATES[kind]
    batch, channels, size = x
    outputs, inner, taps = weight
    out, n = size + 2 * padding - taps + 1, max(size + padding, taps)
    rows = {"x": batch * channels, "w": outputs * inner, "y": batch * outputs}
    products = batch * outputs * inner
    direct = sum(products * taps * (size if part == "input" else out) * getattr(rates, part)[groups == 1] for part in parts)
    transformed = [*{each for part in parts for each in _PARTS[part][0]}, *(_PARTS[part][1] for part in parts)]
    seconds = sum(rows[each] for each in transformed) * n * math.log2(n) * rates.transform
    if groups == 1:
        seconds += len(parts) * n / 2 * (products * rates.product + sum(rows.values()) * rates.copy)
    return direct / threads, seconds / threads + len(parts) * _CALLS


__all__ = ["FftConv", "Rates", "costs"]
