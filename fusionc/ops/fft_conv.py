"""fusionc::fft_conv, fft_conv_backward: a convolution along one axis, stride 1, and its gradients through the Fourier transform.

Math       y[b, o, t] = β[o] + Σ_c Σ_k w[o, c, k] x[b, c, t + k − p] = β + F⁻¹(F(x) · F(w turned round))
           dx[b, c, s] = Σ_o Σ_k w[o, c, k] dy[b, o, s − k + p] = F⁻¹(F(dy) · F(w)) at s + p
           dw[o, c, k] = Σ_b Σ_t dy[b, o, t] x[b, c, t + k − p] = F⁻¹(Σ_b conj F(dy) · F(x)) at k − p
           groups = channels (one filter each) or 1; p < K. Rows are padded with zeros to one length n ≥ max(L + p, K) for all:
           what wraps around lands on elements that are cut off (y: index < K − 1 − p; dx: < p; dw: x is zero from L on)
Shapes     x [B, C, L], weight [C, 1, K] or [O, C, K], bias [O] → y [B, O, T], T = L + 2p − K + 1; grad [B, O, T] → dx like x,
           dw like weight, each None unless wanted; results are dense, no size may be 0. One floating dtype; half precision is
           transformed and summed in float32
Rounding   relative to the largest values of a whole row, not to those that an output sees: see ``passes/fft_conv.py``
Source     the convolution theorem; torch.fft (MKL, pocketfft, cuFFT)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .fake import register_fake

_LIBRARY = torch.library.Library("fusionc", "FRAGMENT")
_LIBRARY.define("fft_conv(Tensor x, Tensor weight, Tensor? bias, SymInt padding, SymInt groups) -> Tensor")
_LIBRARY.define("fft_conv_backward(Tensor grad, Tensor x, Tensor weight, SymInt padding, SymInt groups, bool[2] output_mask)"
                " -> (Tensor, Tensor)")  # fmt: skip


def length(size: int, taps: int, padding: int) -> int:
    """The length n of the transforms: 1, 3, 5, 9 or 15 times a power of two, of which transforms are fast."""
    least = max(size + padding, taps)
    return min(factor << max(0, (-(-least // factor) - 1).bit_length()) for factor in (1, 3, 5, 9, 15))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _products(a: Tensor, b: Tensor) -> Tensor:
    """[i, k, F] by [k, j, F] → [i, j, F]: one product of matrices for each frequency.

    Both are copied to have the frequency outermost: torch.einsum does not, and took 1.6 ms where this takes 0.18.
    """
    return torch.matmul(a.permute(2, 0, 1).contiguous(), b.permute(2, 0, 1).contiguous()).permute(1, 2, 0)


def _compute(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int, groups: int) -> Tensor:
    wide, taps = _wide(x.dtype), weight.shape[2]
    out = x.shape[2] + 2 * padding - taps + 1
    n = length(x.shape[2], taps, padding)
    a, b = torch.fft.rfft(x.to(wide), n), torch.fft.rfft(weight.to(wide).flip(2), n)
    product = a.mul_(b[:, 0]) if groups != 1 else _products(a, b.transpose(0, 1))
    y = torch.fft.irfft(product, n)[:, :, taps - 1 - padding : taps - 1 - padding + out]
    if bias is None:
        return _cut(y, x.dtype)
    return (y + bias.to(wide)[:, None]).to(x.dtype).contiguous()


def _cut(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Memory of its own for a part of longer rows: of a single row ``contiguous`` would hand out the part itself."""
    return rows.to(dtype, memory_format=torch.contiguous_format, copy=True)


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int, groups: int) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0], x.shape[2] + 2 * padding - weight.shape[2] + 1))


def _backward(grad: Tensor, x: Tensor, weight: Tensor, padding: int, groups: int,
              output_mask: Sequence[bool]) -> tuple[Tensor | None, Tensor | None]:
    n = length(x.shape[2], weight.shape[2], padding)
    g = torch.fft.rfft(grad.to(_wide(x.dtype)), n)  # one for both
    dx = dw = None
    if output_mask[0]:
        dx = _cut(_input_gradient(g, weight, n, groups)[:, :, padding : padding + x.shape[2]], x.dtype)
    if output_mask[1]:
        dw = _weight_gradient(g, x, n, groups, padding, weight.shape[2]).to(x.dtype)
    return dx, dw


def _input_gradient(g: Tensor, weight: Tensor, n: int, groups: int) -> Tensor:
    """Rows of n, of which dx starts at p. ``g`` is dy's transform."""
    b = torch.fft.rfft(weight.to(_wide(weight.dtype)), n)
    return torch.fft.irfft(g * b[:, 0] if groups != 1 else _products(g, b), n)


def _weight_gradient(g: Tensor, x: Tensor, n: int, groups: int, padding: int, taps: int) -> Tensor:
    """dw, wide and dense. ``g`` is dy's transform; products are summed over the batch before the way back."""
    a = torch.fft.rfft(x.to(_wide(x.dtype)), n)
    product = a.mul_(g.conj()).sum(0)[:, None] if groups != 1 else _products(g.conj().transpose(0, 1), a)
    lags = torch.fft.irfft(product, n)
    # lags from −p on; the negative ones have wrapped around
    return torch.cat((lags[:, :, n - padding :], lags[:, :, : taps - padding]), 2)


def _fake_backward(grad: Tensor, x: Tensor, weight: Tensor, padding: int, groups: int,
                   output_mask: Sequence[bool]) -> tuple[Tensor | None, Tensor | None]:
    dx, dw = (t.new_empty(t.shape) if wanted else None for t, wanted in zip((x, weight), output_mask))
    return dx, dw


for _key in ("CPU", "CUDA"):
    _LIBRARY.impl("fft_conv", _compute, _key)
    _LIBRARY.impl("fft_conv_backward", _backward, _key)
register_fake("fusionc::fft_conv", _fake, _LIBRARY)
register_fake("fusionc::fft_conv_backward", _fake_backward, _LIBRARY)
