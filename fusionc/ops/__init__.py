"""Custom operators ``fusionc::*``: one file each, with the schema, the reference in ATen, and the shape rule.

``load`` registers all of them: passes that emit one import its file; a warm start, which runs no pass, calls ``load``
before it looks an operator up.  Kernels live to the right of here (``codegen.templates``, launched by ``targets``), so
the implementation for a GPU is fetched by name when it first runs.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable
from typing import Any


@functools.lru_cache(maxsize=1)
def load() -> None:
    """Register every operator of this package; repeated calls cost nothing."""
    for found in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{found.name}")


def late(module: str, name: str) -> Callable[..., Any]:
    """A function that imports ``fusionc.<module>`` at its first call and then is its ``name``."""
    ready: list[Callable[..., Any]] = []

    def call(*args: Any) -> Any:
        if not ready:
            ready.append(getattr(importlib.import_module(f"fusionc.{module}"), name))
        return ready[0](*args)

    return call
