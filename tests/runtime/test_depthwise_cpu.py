"""The C++ depthwise kernel against float64: sizes, strides, dilations, layouts, dtypes, odd channels, tails, NaN and Inf."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from fusionc.ops import depthwise_cpu as operator
from fusionc.runtime.depthwise_cpu import depthwise, strip_rows, variant

ACTIVATIONS = {
    "": lambda y: y,
    "relu": torch.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
}


def check(
    size: tuple[int, ...],
    kernel: tuple[int, int],
    stride: tuple[int, int] = (1, 1),
    dilation: tuple[int, int] = (1, 1),
    padding: tuple[int, int] | None = None,
    last: bool = False,
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    activation: str = "",
) -> None:
    """No farther from the exact result than twice eager's error."""
    rng = torch.Generator().manual_seed(sum(size) + sum(kernel))
    padding = padding or (kernel[0] // 2 * dilation[0], kernel[1] // 2 * dilation[1])
    x = (
        torch.randn(size, generator=rng)
        .to(dtype)
        .to(memory_format=torch.channels_last if last else torch.contiguous_format)
    )
    w = torch.randn(size[1], 1, *kernel, generator=rng).to(dtype)
    b = torch.randn(size[1], generator=rng).to(dtype) if bias else None
    found = depthwise(x, w, b, stride, padding, dilation, activation)
    f = ACTIVATIONS[activation]
    wide = None if b is None else b.double()
    exact = f(F.conv2d(x.double(), w.double(), wide, stride, padding, dilation, size[1]))
    eager = f(F.conv2d(x, w, b, stride, padding, dilation, size[1]))
    assert found.shape == exact.shape and found.dtype == dtype
    assert found.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    fake = operator._fake(x, w, b, stride, padding, dilation, activation)
    assert fake.shape == found.shape and fake.stride() == found.stride()
    assert (found - exact).norm() <= 2 * (eager - exact).norm() + 1e-7 * exact.norm()
    torch.testing.assert_close(operator.reference(x, w, b, stride, padding, dilation, activation), eager)


@pytest.mark.parametrize("kernel", [(3, 3), (1, 5), (5, 1), (2, 4), (7, 7), (13, 13), (31, 31), (63, 63)])
@pytest.mark.parametrize("last", [False, True])
def test_sizes(kernel: tuple[int, int], last: bool) -> None:
    for size in ((1, 3, 7, 9), (2, 19, 20, 33)):
        check(size, kernel, last=last, bias=kernel != (7, 7))


@pytest.mark.parametrize(
    "stride, dilation, padding",
    [
        ((2, 2), (1, 1), (0, 0)),
        ((1, 1), (2, 3), (3, 1)),
        ((1, 3), (1, 1), (3, 1)),
        ((3, 1), (1, 1), (1, 0)),
        ((1, 1), (4, 1), None),
        ((2, 1), (1, 1), None),
    ],
)
@pytest.mark.parametrize("last", [False, True])
def test_strides_and_dilations(
    stride: tuple[int, int], dilation: tuple[int, int], padding: tuple[int, int] | None, last: bool
) -> None:
    check((2, 5, 21, 18), (3, 5), stride, dilation, padding, last)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("last", [False, True])
def test_half_precision(dtype: torch.dtype, last: bool) -> None:
    for activation in ACTIVATIONS:
        check((2, 17, 10, 12), (5, 5), last=last, dtype=dtype, activation=activation)


@pytest.mark.parametrize("last", [False, True])
def test_activations(last: bool) -> None:
    for activation in ACTIVATIONS:
        check((2, 5, 8, 19), (3, 3), last=last, activation=activation)


@pytest.mark.parametrize("last", [False, True])
def test_several_strips(last: bool) -> None:
    size = (1, 2, 300, 500) if not last else (1, 17, 150, 120)
    for kernel, stride in (((5, 5), (1, 1)), ((3, 3), (2, 2))):
        rows = (size[2] - 1) // stride[0] + 1
        chosen = variant("float32", "float32", kernel, stride, (1, 1), last, "", rows, (size[3] - 1) // stride[0] + 1)
        assert strip_rows(chosen, rows, size[3] + 4) < rows
        check(size, kernel, stride, last=last)


@pytest.mark.parametrize("last", [False, True])
def test_infinities_stay_where_they_are(last: bool) -> None:
    x = torch.randn(1, 3, 12, 14)
    x[0, 1, 5, 6], x[0, 2, 0, 0] = float("inf"), float("nan")
    x = x.to(memory_format=torch.channels_last if last else torch.contiguous_format)
    w = torch.randn(3, 1, 3, 3)
    for activation in ("", "relu", "gelu_tanh", "silu"):
        found = depthwise(x, w, None, (1, 1), (1, 1), (1, 1), activation)
        expected = ACTIVATIONS[activation](F.conv2d(x, w, None, 1, 1, 1, 3))
        assert torch.equal(found.isnan(), expected.isnan()) and torch.equal(found.isinf(), expected.isinf())


def test_empty_batch() -> None:
    assert depthwise(torch.randn(0, 3, 8, 8), torch.randn(3, 1, 3, 3), None, (1, 1), (1, 1), (1, 1), "").shape == (
        0,
        3,
        8,
        8,
    )
