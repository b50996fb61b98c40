"""Custom operators ``fusionc::*``: a reference on the CPU, fake tensors, gradients, and kernels on a GPU; one file each.

A pass inserts a call of such an operator; a Program read from the cache names it. ``load`` registers it for either.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

_HOMES = {  # operator -> file
    "decode_attention": "decode_attention",
    "decode_attention_update": "decode_attention",
    "linear_cross_entropy": "linear_cross_entropy",
    "linear_cross_entropy_backward": "linear_cross_entropy",
    "skinny_linear": "skinny_linear",
}


def load(name: str) -> None:
    """Register the operators of the file that ``fusionc::<name>`` lives in; unknown names are left to the caller."""
    home = _HOMES.get(name)
    if home is not None:
        importlib.import_module(f"{__name__}.{home}")


def late(module: str, name: str) -> Callable[..., Any]:
    """A function that imports ``fusionc.<module>`` at its first call and then is its ``name``.

    Kernels are launched by packages to the right of this one.
    """
    ready: list[Callable[..., Any]] = []

    def call(*args: Any) -> Any:
        if not ready:
            ready.append(getattr(importlib.import_module(f"fusionc.{module}"), name))
        return ready[0](*args)

    return call
