"""Very long convolutions along one axis (kernels as long as the sequence) go through the Fourier transform where that is cheaper.

Math       Σ_k w[k] x[t + k − p] = F⁻¹(F(x) F(w turned round)), see ``ops/fft_conv.py``; O(L log L) instead of O(L K)
Exactness  Approximate: runs only with options={"fft_conv": True}. In norm it rounds as well as the library does or better
           (float32, L = K = 4096: 2.4e-7, ATen's sum 9.4e-7), but its errors are relative to the largest value of a
           row wherever it stands: a value of 1e4 in a row of ones leaves 4e-5 in outputs that it does not reach (ATen:
           1.3e-7), and one NaN or infinity spoils the row
Legality   one axis, stride and dilation 1, not transposed, padding below the kernel's length, groups = channels = outputs or 1,
           contiguous, known sizes; weights may be anything, also made by a network (continuous kernels)
Cost       a model with measured figures: ATen's direct convolution takes 0.65 ns a product on one thread of our CPU, the
           transforms 0.4 ns for each n·log₂ n of a row; 4×64×4096 with K = 4096: 5409 ms direct, 9 ms here; K = 64: 44
           and 5. H200, float32: 4×64×8192, K = 8192: 6.3 ms and 0.1; 4×256×8192, K = 512: 1.3 and 0.29; 4×256×4096,
           K = 64: 0.11 and 0.15
Source     the convolution theorem; long convolutions of state-space models and CKConv (Romero et al., arXiv 2102.02611)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Node

from ..graph import edit
from ..graph.facts import Facts, dtype, shape, tensor
from .base import Approximate, Match, Pass, Refuse

aten = torch.ops.aten
_FEW = 32  # taps below which nothing is looked at
_FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_RATES = {"cpu": (0.65e-9, 0.4e-9), "cuda": (3e-13, 1.1e-12)}  # seconds a product; seconds for each n·log₂ n of a row
_WORTH = 0.5
_CALLS = 50e-6  # seconds of the transforms' calls


class FftConv(Pass):
    """aten.convolution over one axis → fusionc::fft_conv. ``wanted``: None, nothing to do."""

    name = "fft_conv"
    atomic = True
    exactness = Approximate("rounding is relative to the largest value of a row")

    def find(self, facts: Facts) -> Iterator[Match]:
        """Convolutions of one axis with many taps."""
        for node in list(facts.gm.graph.find_nodes(op="call_function", target=aten.convolution.default)):
            w = shape(node.args[1])
            if w is not None and len(w) == 3 and isinstance(w[2], int) and w[2] >= _FEW:
                yield Match({"conv": node}, (node,))

    def check(self, match: Match, facts: Facts) -> Refuse | None:
        """See Legality and Cost."""
        conv: Node = match.conv
        x, weight, bias, stride, padding, dilation, transposed, _, groups = conv.args
        like, of, w = tensor(conv), shape(x), shape(weight)
        assert like is not None and of is not None and w is not None
        if transposed or list(stride) != [1] or list(dilation) != [1]:
            return Refuse("transposed, strided or dilated", conv)
        if not all(isinstance(n, int) for n in (*of, *w, *padding, groups)):
            return Refuse("a size is symbolic", conv)
        if len(of) != 3 or groups != 1 and not (groups == of[1] == w[0] and w[1] == 1):
            return Refuse("its groups are neither one nor the channels", conv)
        if padding[0] > w[2] - 1:
            return Refuse("the padding is as long as the kernel", conv)
        if like.dtype not in _FLOATING or any(dtype(a) != like.dtype for a in (x, weight, bias) if a is not None):
            return Refuse("not of one floating dtype", conv)
        if like.device.type not in _RATES or not like.is_contiguous():
            return Refuse("no figures for this device, or the result is not contiguous", conv)
        direct, transformed = costs(like.device.type, of, w, int(like.shape[2]), int(groups), threads=torch.get_num_threads())
        if transformed > _WORTH * direct:
            return Refuse(f"the transforms would take {transformed / direct:.2g} of the direct time", conv)
        return None

    def replace(self, match: Match, facts: Facts) -> None:
        """One call."""
        from ..ops import load

        load("fft_conv")
        conv: Node = match.conv
        x, weight, bias, _, padding, _, _, _, groups = conv.args
        with facts.gm.graph.inserting_before(conv):
            made = edit.insert(facts.gm.graph, torch.ops.fusionc.fft_conv.default, (x, weight, bias, padding[0], groups),
                               origin=(conv,), val=tensor(conv))  # fmt: skip
        edit.replace(conv, made)


def costs(kind: str, x: Any, weight: Any, out: int, groups: int, threads: int = 1) -> tuple[float, float]:
    """Seconds of ATen's direct convolution and of the transforms, for x [B, C, L] and weight [O, C / groups, K]."""
    product, step = _RATES[kind]
    batch, channels, _ = x
    outputs, inner, taps = weight
    direct = batch * outputs * out * inner * taps * product
    n = x[2] + taps - 1
    rows = batch * channels + outputs * inner + batch * outputs
    mixed = 0 if groups != 1 else 4 * batch * outputs * inner * (n / 2) * product / 4  # the library's products are faster ones
    return direct / threads, (rows * n * math.log2(n) * step / 2 + mixed) / threads + _CALLS


__all__ = ["FftConv", "costs"]
