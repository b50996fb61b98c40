"""Sweeps of which CI runs a part: the rest is marked slow (`make test-slow`)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def sampled(values: Iterable[Any], keep: int) -> list[Any]:
    """The values as parameters of a test (tuples: of several); ``keep`` of them, spread evenly from the first on, stay in CI."""
    found = list(values)
    kept = {k * len(found) // keep for k in range(keep)} if keep < len(found) else set(range(len(found)))
    whole = [v if isinstance(v, tuple) else (v,) for v in found]
    return [pytest.param(*v, marks=[] if k in kept else [pytest.mark.slow]) for k, v in enumerate(whole)]
