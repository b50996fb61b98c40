"""Memory that generated programs allocate: large CPU buffers are kept and handed out again.

Fresh memory from the system costs a page fault for every 4 KiB on first touch, more than a kernel that writes it once.  So
storages of a megabyte and more are remembered, and reused as soon as nobody else holds them (the storage's reference
count says so: outputs that the caller keeps, views of them and tensors saved for backward are never touched).  A thread
has its own list; at most `LIMIT` bytes of idle memory are kept, oldest dropped first.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from sys import getrefcount
from typing import Any

import torch

SMALL = 1 << 20
LIMIT = 1 << 30

_use_count = torch._C._storage_Use_Count
_empty_strided = torch.empty_strided


class _Local(threading.local):
    def __init__(self) -> None:
        self.lists: OrderedDict[int, list[Any]] = OrderedDict()
        self.bytes = 0


_local = _Local()


def allocate(size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised CPU tensor of this size, stride and dtype (like `torch.empty_strided`)."""
    count = 1
    for n, s in zip(size, stride, strict=True):
        if n == 0:
            return _empty_strided(size, stride, dtype=dtype)
        count += (n - 1) * s
    nbytes = count * dtype.itemsize
    if nbytes < SMALL:
        return _empty_strided(size, stride, dtype=dtype)
    local = _local
    known = local.lists.get(nbytes)
    if known is None:
        known = local.lists[nbytes] = []
    else:
        local.lists.move_to_end(nbytes)
        for storage in reversed(known):
            # a storage object that the caller keeps without a tensor is the one in our list: known, loop and argument hold it
            if _use_count(storage._cdata) == 1 and getrefcount(storage) <= 3:
                out = torch.empty((), dtype=dtype)
                return out.set_(storage, 0, size, stride)
    tensor = _empty_strided(size, stride, dtype=dtype)
    storage = tensor.untyped_storage()
    if len(known) >= 64:  # the caller keeps them all: stop remembering the oldest
        del known[0]
        local.bytes -= nbytes
    known.append(storage)
    local.bytes += nbytes
    if local.bytes > LIMIT:
        _shrink(local, nbytes)
    return tensor


def _shrink(local: _Local, keep: int) -> None:
    for nbytes in list(local.lists):
        if nbytes == keep and len(local.lists) > 1:
            continue
        local.bytes -= nbytes * len(local.lists.pop(nbytes))
        if local.bytes <= LIMIT // 2:
            break


def release() -> int:
    """Give back the idle memory this thread keeps; the number of bytes that were remembered."""
    freed = _local.bytes
    _local.lists.clear()
    _local.bytes = 0
    return freed


# Runs of rows as tensors of their own: unlike `split` they share no version counter and are no views for autograd.
split = torch.unsafe_split_with_sizes


def carve(whole: torch.Tensor, places: tuple[tuple[tuple[int, ...], tuple[int, ...], int], ...]) -> list[torch.Tensor]:
    """Tensors of (size, stride, first element) in the memory of a flat tensor, without autograd's knowing."""
    from torch._C._dynamo.guards import _reinterpret_tensor  # type: ignore[attr-defined]

    return [_reinterpret_tensor(whole, size, stride, first) for size, stride, first in places]


def wrote(tensors: tuple[torch.Tensor, ...]) -> None:
    """Count the versions of tensors that kernels wrote, as an in-place operator would."""
    torch.autograd.graph.increment_version([t for t in tensors if not t.is_inference()])
