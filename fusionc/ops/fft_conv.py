"""fusionc::fft_conv: a convolution along one axis, stride 1, through the Fourier transform.

Math       y[b, o, t] = β[o] + Σ_c Σ_k w[o, c, k] x[b, c, t + k − p] = β + F⁻¹(F(x) · F(w turned round)), rows padded with zeros
           to a length n ≥ L + K − 1 so that nothing wraps around; groups = channels (one filter each) or 1
Shapes     x [B, C, L], weight [C, 1, K] or [O, C, K], bias [O] → [B, O, L + 2p − K + 1]; floating; half precision is transformed
           in float32
Rounding   relative to the largest values of a whole row, not to those that an output sees: see ``passes/fft_conv.py``
Source     the convolution theorem; torch.fft (MKL, pocketfft, cuFFT)
"""

from __future__ import annotations

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("fusionc", "FRAGMENT")
_LIBRARY.define("fft_conv(Tensor x, Tensor weight, Tensor? bias, SymInt padding, SymInt groups) -> Tensor")


def length(n: int) -> int:
    """The smallest length from ``n`` on that is 1, 3, 5, 9 or 15 times a power of two: transforms of such lengths are fast."""
    return min(factor << max(0, (-(-n // factor) - 1).bit_length()) for factor in (1, 3, 5, 9, 15))


def _compute(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int, groups: int) -> Tensor:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    taps = weight.shape[2]
    out = x.shape[2] + 2 * padding - taps + 1
    n = length(x.shape[2] + taps - 1)
    a, b = torch.fft.rfft(x.to(wide), n), torch.fft.rfft(weight.to(wide).flip(2), n)
    # one product of matrices for each frequency where channels mix
    product = a * b[:, 0] if groups != 1 else torch.einsum("bcf,ocf->bof", a, b)
    y = torch.fft.irfft(product, n)[:, :, taps - 1 - padding : taps - 1 - padding + out]
    if bias is not None:
        y = y + bias.to(wide)[:, None]
    return y.to(x.dtype).contiguous()


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int, groups: int) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0], x.shape[2] + 2 * padding - weight.shape[2] + 1))


_LIBRARY.impl("fft_conv", _compute, "CPU")
_LIBRARY.impl("fft_conv", _compute, "CUDA")
torch.library.register_fake("fusionc::fft_conv", _fake, lib=_LIBRARY)
