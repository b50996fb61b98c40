"""fusionc::max_pool2d_with_places and its gradient: the references against ATen, fake tensors, layouts."""

from __future__ import annotations

import pytest
import torch

from fusionc.ops import load

load("max_pool2d_gradient")
ours, aten = torch.ops.fusionc, torch.ops.aten


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize("shape", [(2, 3, 9, 8), (3, 9, 8)], ids=str)
@pytest.mark.parametrize("window", [([3, 3], [2, 2], [1, 1], False), ([3, 2], [2, 3], [1, 0], True),
                                    ([2, 2], [3, 3], [0, 0], False)], ids=str)  # fmt: skip
def test_against_aten(window: tuple, shape: tuple[int, ...], last: bool) -> None:
    if last and len(shape) == 3:
        return
    kernel, stride, padding, ceil_mode = window
    x = torch.randn(shape).round()
    x = x.to(memory_format=torch.channels_last) if last else x
    want, indices = aten.max_pool2d_with_indices(x, kernel, stride, padding, (1, 1), ceil_mode)
    y, places = ours.max_pool2d_with_places(x, *window)
    assert torch.equal(y, want) and places.dtype == torch.int8 and places.stride() == want.stride()
    assert int(places.min()) >= 0 and int(places.max()) < kernel[0] * kernel[1]
    grad = torch.randn_like(want)
    args = (grad, places, list(x.shape[-2:]), kernel, stride, padding)
    got = ours.max_pool2d_gradient(*args)
    right = aten.max_pool2d_with_indices_backward(grad, x, kernel, stride, padding, (1, 1), ceil_mode, indices)
    torch.testing.assert_close(got, right)
    assert got.stride() == right.stride()
    for op, given in ((ours.max_pool2d_with_places.default, (x, *window)), (ours.max_pool2d_gradient.default, args)):
        torch.library.opcheck(op, given, test_utils=("test_schema", "test_faketensor"))
