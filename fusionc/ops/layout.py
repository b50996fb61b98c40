"""Which of the two layouts of images a tensor has, and how large a window's result is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def is_last(x: torch.Tensor) -> bool:
    """Are these images channels-last and nothing else? Lines (three dimensions) are not."""
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def layout_of(x: torch.Tensor) -> torch.memory_format:
    """Channels-last where x is and contiguous where it is not known better."""
    return torch.channels_last if is_last(x) else torch.contiguous_format


def out_sizes(size: Sequence[Any], kernel: Sequence[Any], stride: Sequence[Any], padding: Sequence[Any],
              dilation: Sequence[Any]) -> tuple[Any, ...]:  # fmt: skip
    """Sizes of the result of a convolution of these sizes, one for each dimension of the image."""
    return tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in zip(size, kernel, stride, padding, dilation))
