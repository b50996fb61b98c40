"""fusionc::fft_conv and fft_conv_backward: against ATen in float64, rounding, half precision, what is wanted, fake tensors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fusionc.ops import load
from fusionc.ops.fft_conv import length

load("fft_conv_backward")
ours, aten = torch.ops.fusionc, torch.ops.aten

# B, C, O, L, K, padding, groups
CASES = [
    (2, 3, 3, 70, 70, 69, 3), (2, 3, 3, 70, 33, 16, 3), (1, 3, 3, 33, 70, 69, 3), (1, 4, 4, 40, 70, 15, 4),
    (3, 4, 4, 50, 50, 0, 4), (2, 3, 5, 70, 33, 0, 1), (1, 3, 4, 40, 70, 20, 1), (2, 3, 2, 64, 40, 39, 1),
    (2, 1, 1, 64, 32, 31, 1), (1, 2, 2, 1, 5, 4, 2), (1, 1, 1, 3, 1, 0, 1),
]  # fmt: skip
Case = tuple[int, int, int, int, int, int, int]


def operands(case: Case, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of the result, input, filter."""
    batch, channels, outputs, size, taps, padding, groups = case
    rng = torch.Generator().manual_seed(0)
    sizes = (batch, outputs, size + 2 * padding - taps + 1), (batch, channels, size), (outputs, channels // groups, taps)
    grad, x, w = (torch.randn(*of, generator=rng, dtype=torch.float64) for of in sizes)
    return grad.to(dtype), x.to(dtype), (w / taps**0.5).to(dtype)


def direct(grad: Tensor, x: Tensor, w: Tensor, padding: int, groups: int) -> tuple[Tensor, Tensor]:
    mask = [True, True, False]
    dx, dw, _ = aten.convolution_backward(grad, x, w, None, [1], [padding], [1], False, [0], groups, mask)
    return dx, dw


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_aten_in_float64(case: Case) -> None:
    grad, x, w = operands(case)
    padding, groups = case[5:]
    y = aten.convolution(x, w, None, [1], [padding], [1], False, [0], groups)
    found = (ours.fft_conv(x, w, None, padding, groups), *ours.fft_conv_backward(grad, x, w, padding, groups, [True, True]))
    for each, right in zip(found, (y, *direct(grad, x, w, padding, groups)), strict=True):
        assert each.shape == right.shape and each.is_contiguous()
        assert (each - right).abs().max() <= 1e-12 * right.abs().max()


@pytest.mark.parametrize("case", [(2, 8, 8, 512, 512, 511, 8), (2, 8, 8, 1024, 100, 50, 8), (2, 4, 6, 300, 200, 199, 1)], ids=str)
def test_gradients_round_in_norm_no_worse_than_eagers_doubled(case: Case) -> None:
    grad, x, w = operands(case, torch.float32)
    exact = direct(grad.double(), x.double(), w.double(), *case[5:])
    found = ours.fft_conv_backward(grad, x, w, *case[5:], [True, True])
    for each, theirs, right in zip(found, direct(grad, x, w, *case[5:]), exact, strict=True):
        assert (each - right).norm() <= 2 * (theirs - right).norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_of_half_precision_are_summed_in_float32(dtype: torch.dtype) -> None:
    case = (4, 4, 4, 128, 128, 127, 4)
    grad, x, w = operands(case, dtype)
    exact = direct(grad.double(), x.double(), w.double(), *case[5:])
    for each, right in zip(ours.fft_conv_backward(grad, x, w, *case[5:], [True, True]), exact, strict=True):
        assert each.dtype == dtype and (each - right).norm() <= 1.01 * (right.to(dtype) - right).norm()


def test_only_what_is_wanted_and_any_strides() -> None:
    case = CASES[1]
    grad, x, w = operands(case)
    both = ours.fft_conv_backward(grad, x, w, *case[5:], [True, True])
    turned = x.transpose(0, 2).contiguous().transpose(0, 2)
    for mask in ([True, False], [False, True]):
        found = ours.fft_conv_backward(grad, turned, w, *case[5:], mask)
        for each, wanted, right in zip(found, mask, both, strict=True):
            assert each is None if not wanted else torch.equal(each, right) and each.is_contiguous()
    spread = torch.ones((), dtype=torch.float64).expand_as(grad)  # what sum().backward() hands in
    torch.testing.assert_close(ours.fft_conv_backward(spread, x, w, *case[5:], [True, True]), direct(spread, x, w, *case[5:]))


def test_nothing_is_written() -> None:
    given = operands(CASES[0])
    kept = [t.clone() for t in given]
    ours.fft_conv(given[1], given[2], None, 69, 3)
    ours.fft_conv_backward(*given, 69, 3, [True, True])
    assert all(map(torch.equal, given, kept))


@pytest.mark.parametrize("case", [CASES[1], CASES[6], (1, 1, 1, 70, 33, 16, 1)], ids=str)
def test_schema_and_fake_tensors(case: Case) -> None:
    grad, x, w = operands(case)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(ours.fft_conv.default, (x, w, None, *case[5:]), test_utils=checks)
    torch.library.opcheck(ours.fft_conv_backward.default, (grad, x, w, *case[5:], [True, True]), test_utils=checks)
    torch.library.opcheck(ours.fft_conv_backward.default, (grad, x, w, *case[5:], [False, True]), test_utils=checks)


def test_length() -> None:
    given = ((4096, 4096, 4095), (70, 70, 69), (70, 33, 16), (40, 70, 15), (1, 1, 0))
    assert [length(*of) for of in given] == [8192, 144, 96, 72, 1]
