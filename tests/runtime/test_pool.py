"""Large CPU buffers are handed out again only when nobody holds their memory, in whatever form."""

from __future__ import annotations

import torch

from fusionc.runtime.pool import allocate, release

SIZE = (1 << 18,)


def _pointer() -> int:
    return allocate(SIZE, (1,), torch.float32).data_ptr()


def test_idle_memory_is_used_again() -> None:
    release()
    assert _pointer() == _pointer()


def test_what_is_held_is_left_alone() -> None:
    release()
    view = allocate(SIZE, (1,), torch.float32)[5:]
    storage = allocate(SIZE, (1,), torch.float32).untyped_storage()  # the object that the pool itself remembers
    assert _pointer() not in (view.untyped_storage().data_ptr(), storage.data_ptr())
