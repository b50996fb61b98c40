"""Registers what an operator of ours gives for fake tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["register_fake"]


def register_fake(name: str, made: Callable[..., Any], library: torch.library.Library) -> None:
    """As ``torch.library.register_fake(name, made, lib=library)``, in a microsecond.

    Torch looks up the source line of the caller for its messages, which reads the names of all modules twice: 12 ms an
    operator where transformers is loaded, in every process.  Where torch is not as expected its own function is called.
    """
    try:
        entry = torch._library.simple_registry.singleton.find(name)
        handle = entry.fake_impl.register(made, "fusionc", lib=library, allow_override=False)
        library._registration_handles.append(handle)
    except (AttributeError, TypeError):
        torch.library.register_fake(name, made, lib=library)
