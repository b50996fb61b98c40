"""Sweeps of which CI runs a part: the rest is marked slow (`make test-slow`)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def sampled(values: Iterable[Any], keep: int) -> list[Any]:
    """The values as parameters of a test; ``keep`` of them, spread evenly from the first on, stay in CI."""
    found = list(values)
    kept = {k * len(found) // keep for k in range(keep)} if keep < len(found) else set(range(len(found)))
    return [v if k in kept else pytest.param(v, marks=pytest.mark.slow) for k, v in enumerate(found)]
