"""Custom operators ``fusionc::*``: what a pass puts into a graph where torch has no operator for it.

One file an operator: schema, plain formulas (any device), fake implementation, autograd rule. Kernels are reached when
an operator is called on a GPU. A module registers its operators when it is imported; ``load`` imports all of them.
"""

from __future__ import annotations

from importlib import import_module

MODULES = ("linear_cross_entropy", "padded_mm")


def load() -> None:
    """Register every operator: for whoever meets their names in stored programs before a pass has used them."""
    for name in MODULES:
        import_module(f"{__name__}.{name}")
