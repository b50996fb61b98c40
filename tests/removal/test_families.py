"""Families of models: the edited module and the graph without it give eager's numbers with that sublayer replaced by zero."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import fusionc
from fusionc.errors import reset_warnings
from tests.sampled import sampled

from .models import DECODERS, ENCODERS, Backend, inputs, make, run, values, zeroed

ALL = (*DECODERS, *ENCODERS)
pytestmark = pytest.mark.filterwarnings("ignore::fusionc.errors.FallbackWarning")


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    reset_warnings()


def size(model: Any) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


@pytest.mark.parametrize("kind", sampled(ALL, 4))
def test_both_forms_equal_zero_attention(kind: str) -> None:
    model, batch = make(kind), inputs(kind)
    original, before = values(model, batch), size(model)
    expected = values(zeroed(copy.deepcopy(model), (2, 3)), batch)
    backend = Backend([2, 3])
    assert (run(backend, model, **batch) - expected).abs().max() == 0 and backend.record.fired == 2
    report = fusionc.remove_attention(model, [2, 3], inputs=batch)
    found = values(model, batch)
    assert report.plan.layers == (2, 3) and not report.refusals and report.unverified
    assert (found - expected).abs().max() == 0 and (found - original).abs().max() > 1e-4
    assert report.freed_bytes == before - size(model)
    # at least the query, key, value and output matrices of two layers
    assert report.freed_bytes >= 2 * 4 * (2 * 32 * 32 + 2 * 32 * 8)
