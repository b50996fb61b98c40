"""Counters for kernels whose last program of a group finishes the work: 0 before a launch, left at 0 by it."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

_SLAB = 1 << 16  # counters of a device that recorded graphs share: each launch has its own for ever, so replays never meet
_counters: dict[tuple[int, int], Tensor] = {}
_slabs: dict[int, tuple[Tensor, int]] = {}
_lock = threading.Lock()


def zeros(count: int, device: torch.device, stream: int) -> Tensor:
    """Counters that are 0 now, and that the kernel leaves at 0.

    Kernels of one stream run one after the other and share theirs.  A recorded graph may be replayed on any stream, so
    each recorded launch gets counters that nothing else uses.
    """
    index = device.index
    with _lock:
        if torch.cuda.is_current_stream_capturing():
            found = _slabs.get(index)
            if found is None or found[1] + count > _SLAB:
                return torch.zeros(count, dtype=torch.int32, device=device)  # recorded too: set to 0 at each replay
            _slabs[index] = (found[0], found[1] + -(-count // 4) * 4)
            return found[0][found[1] :]
        if index not in _slabs:
            _slabs[index] = (torch.zeros(_SLAB, dtype=torch.int32, device=device), 0)
        mine = _counters.get((index, stream))
        if mine is None or mine.numel() < count:
            mine = _counters[index, stream] = torch.zeros(max(count, 1024), dtype=torch.int32, device=device)
        return mine
