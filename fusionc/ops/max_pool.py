"""fusionc::max_pool2d_with_places and fusionc::max_pool2d_gradient: max pooling in training with one byte a result.

Math       places: number i · kw + j of the element (i, j) of each window that max_pool2d_with_indices takes; the first of equals,
           the last NaN
           gradient: the sum of grad over the windows that took an element
Shapes     x [..., C, H, W], results [..., C, H', W'], places in int8 (windows of at most 49 elements), no dilation
Why        ATen's positions are int64, four times the image in bfloat16, and its gradient asks for the image itself although it
           reads the sizes only: an activation that is made anew for nothing or kept
Source     Inductor's `_low_memory_max_pool_with_offsets` is the same thought
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .fake import register_fake
from .layout import layout_of

_library = torch.library.Library("fusionc", "FRAGMENT")
_library.define("max_pool2d_with_places(Tensor x, int[] kernel, int[] stride, int[] padding, bool ceil_mode)"
                " -> (Tensor, Tensor)")  # fmt: skip
_library.define("max_pool2d_gradient(Tensor grad, Tensor places, int[] size, int[] kernel, int[] stride, int[] padding)"
                " -> Tensor")  # fmt: skip
LARGEST = 49  # elements of a window: each is a step of an expression that is walked recursively


def _corners(t: Tensor, stride: Sequence[int], padding: Sequence[int]) -> tuple[Tensor, Tensor]:
    """First row and column of each window: [H', 1] and [W']."""
    rows, columns = (torch.arange(n, device=t.device) * s - p for n, s, p in zip(t.shape[-2:], stride, padding))
    return rows[:, None], columns


def with_places(x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
                ceil_mode: bool) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The reference."""
    y, indices = torch.ops.aten.max_pool2d_with_indices(x, kernel, stride, padding, (1, 1), ceil_mode)
    top, left = _corners(indices, stride, padding)
    return y, ((indices // x.shape[-1] - top) * kernel[1] + indices % x.shape[-1] - left).to(torch.int8)


def gradient(grad: Tensor, places: Tensor, size: Sequence[int], kernel: Sequence[int], stride: Sequence[int],
             padding: Sequence[int]) -> Tensor:  # fmt: skip
    """The reference."""
    top, left = _corners(places, stride, padding)
    at = places.long()
    indices = (top + at // kernel[1]) * size[1] + left + at % kernel[1]
    whole = [(n + 2 * p - k) // s + 1 for n, k, s, p in zip(size, kernel, stride, padding)]
    like = _like(grad, size)
    layout = layout_of(like)
    return torch.ops.aten.max_pool2d_with_indices_backward(
        grad.contiguous(memory_format=layout), like, kernel, stride, padding, (1, 1), list(grad.shape[-2:]) != whole,
        indices.contiguous(memory_format=layout))  # fmt: skip


def _like(grad: Tensor, size: Sequence[int]) -> Tensor:
    """An image without values: channels-last as the gradient is."""
    return grad.new_empty((*grad.shape[:-2], *size)).contiguous(memory_format=layout_of(grad))


def _fake_with_places(x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
                      ceil_mode: bool) -> tuple[Tensor, Tensor]:  # fmt: skip
    y, indices = torch.ops.aten.max_pool2d_with_indices(x, kernel, stride, padding, (1, 1), ceil_mode)
    return y, indices.to(torch.int8)


def _fake_gradient(grad: Tensor, places: Tensor, size: Sequence[int], kernel: Sequence[int], stride: Sequence[int],
                   padding: Sequence[int]) -> Tensor:  # fmt: skip
    return _like(grad, size)


_library.impl("max_pool2d_with_places", with_places, "CompositeExplicitAutograd")
_library.impl("max_pool2d_gradient", gradient, "CompositeExplicitAutograd")
register_fake("fusionc::max_pool2d_with_places", _fake_with_places, _library)
register_fake("fusionc::max_pool2d_gradient", _fake_gradient, _library)
