"""Which of the two layouts of images a tensor has."""

from __future__ import annotations

import torch


def is_last(x: torch.Tensor) -> bool:
    """Are these images channels-last and nothing else? Lines (three dimensions) are not."""
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def layout_of(x: torch.Tensor) -> torch.memory_format:
    """Channels-last where x is and contiguous where it is not known better."""
    return torch.channels_last if is_last(x) else torch.contiguous_format
