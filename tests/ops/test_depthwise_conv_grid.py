"""Depthwise convolution and both gradients, whatever the sizes: all candidates in the interpreter against F.conv in float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from fusionc.ops import load
from fusionc.runtime import depthwise_conv as runtime
from fusionc.runtime.depthwise_conv import Candidate, Shape

load("depthwise_conv")
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
# (dtype, channels-last, images, channels, size, kernel, stride, padding, dilation)
GRID = [
    (BF16, False, 2, 3, (9, 11), (7, 7), (1, 1), (3, 3), (1, 1)),
    (F16, True, 2, 5, (9, 11), (7, 7), (1, 1), (3, 3), (1, 1)),
    (F16, False, 3, 1, (5, 17), (13, 13), (1, 1), (6, 6), (1, 1)),
    (BF16, True, 1, 3, (6, 9), (11, 11), (1, 1), (5, 5), (1, 1)),
    (F16, False, 1, 1, (4, 6), (31, 31), (1, 1), (15, 15), (1, 1)),
    (F16, False, 2, 2, (7, 9), (5, 3), (1, 1), (4, 3), (2, 3)),
    (BF16, False, 1, 2, (6, 70), (3, 5), (1, 1), (0, 2), (1, 1)),
    (F16, False, 2, 3, (1, 37), (1, 9), (1, 1), (0, 4), (1, 1)),  # a line
    (F16, False, 2, 2, (8, 6), (4, 2), (1, 1), (0, 1), (1, 1)),
    (F32, True, 2, 3, (9, 10), (3, 3), (2, 2), (1, 1), (1, 1)),
    (F32, True, 1, 33, (5, 6), (5, 5), (1, 1), (2, 2), (1, 1)),
    (BF16, True, 1, 6, (9, 9), (3, 5), (2, 3), (2, 4), (2, 2)),
]


def shrunk(how: Candidate) -> Candidate:
    """The same form with few lines per program: the interpreter's time is that of the programs' sizes."""
    if how[0] in ("turned", "widened"):
        return (*how[:2], *shrunk(how[2:]))
    return (*how[:5], 16, *how[6:]) if how[0] == "toeplitz" else (*how[:4], 16, *how[5:]) if how[0] == "streamed" else how


def forms(candidates: tuple[Candidate, ...]) -> list[Candidate]:
    """One candidate of each form, without the library."""
    found: dict[tuple, Candidate] = {}
    for how in candidates:
        if how[0] != "library":
            inner = how[2:] if how[0] in ("turned", "widened") else how
            found.setdefault(inner[:1] if inner[0] == "direct" else inner[:3], shrunk(how))
    return list(found.values())


@pytest.mark.interpret
@pytest.mark.parametrize("case", GRID, ids=str)
def test_forward_and_gradients(case: tuple) -> None:
    dtype, last, images, channels, size, kernel, stride, padding, dilation = case
    layout = torch.channels_last if last else torch.contiguous_format
    shape = Shape(channels, size, kernel, stride, padding, dilation, dtype, last, True, "")
    rng = torch.Generator().manual_seed(3)
    x = torch.randn(images, channels, *size, generator=rng).to(dtype).contiguous(memory_format=layout)
    taps = torch.randn(*kernel, channels, generator=rng).to(dtype)
    bias = torch.randn(channels, generator=rng).to(dtype)
    wide, weight = x.double().requires_grad_(), taps.double().permute(2, 0, 1).unsqueeze(1).contiguous().requires_grad_()
    want = F.conv2d(wide, weight, bias.double(), stride, padding, dilation, channels)
    grad = torch.randn(want.shape, generator=rng).to(dtype).contiguous(memory_format=layout)
    want.backward(grad.double())
    rounding = {BF16: 4e-3, F16: 6e-4, F32: 1e-6}[dtype]

    def close(got: torch.Tensor, right: torch.Tensor, tolerance: float) -> bool:
        return bool((got.double() - right).norm() <= tolerance * right.norm())

    tried = 0
    for how in forms(runtime.candidates(shape, images)):
        got = runtime.launch(how, shape, x, taps, bias, interpret=True)
        assert got.is_contiguous(memory_format=layout) and close(got, want, rounding), how
        tried += 1
    if stride != (1, 1):
        assert tried
        return
    rest = tuple(d * (k - 1) - p for d, k, p in zip(dilation, kernel, padding))
    back = Shape(channels, (want.shape[2], want.shape[3]), kernel, stride, rest, dilation, dtype, last, False, "")  # type: ignore[arg-type]
    turned = taps.flip([0, 1]).contiguous()
    assert wide.grad is not None and weight.grad is not None
    for how in forms(runtime.candidates(back, images))[:2]:
        assert close(runtime.launch(how, back, grad, turned, None, interpret=True), wide.grad, rounding), how
        tried += 1
    plain = Shape(channels, size, kernel, stride, padding, dilation, dtype, last, False, "")
    ways = {how[0]: how for how in runtime.weight_candidates(plain, images)[:-1]}
    for how in ways.values():
        at = 5 if how[0] == "widened" else 3
        how = (*how[:5], min(how[5], 3)) if how[0] == "direct" else (*how[:at], 16, *how[at + 1 :])
        found = runtime.launch_weight(how, plain, grad, x, interpret=True)
        assert torch.equal(found, runtime.launch_weight(how, plain, grad, x, interpret=True))  # no order left to chance
        assert close(found, weight.grad.squeeze(1).permute(1, 2, 0), 1e-5), how
        tried += 1
    assert ("direct" in ways) == (last and kernel[0] * kernel[1] <= 49)
    assert tried >= 3
