"""Every family: the edited module gives eager's numbers with that attention replaced by zero, and its parameters are gone."""

from __future__ import annotations

import copy

import pytest

import fusionc

from .models import DECODERS, ENCODERS, inputs, make, values, zeroed

ALL = (*DECODERS, *ENCODERS)


@pytest.mark.filterwarnings("ignore::fusionc.errors.FallbackWarning")
@pytest.mark.parametrize("kind", ALL)
def test_same_numbers_as_zero_attention(kind: str) -> None:
    model, batch = make(kind), inputs(kind)
    original = values(model, batch)
    expected = values(zeroed(copy.deepcopy(model), (2, 3)), batch)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    report = fusionc.remove_attention(model, [2, 3], inputs=batch)
    found = values(model, batch)
    assert report.plan.layers == (2, 3) and not report.refusals and report.unverified
    assert (found - expected).abs().max() == 0 and (found - original).abs().max() > 1e-4
    assert report.freed_bytes == size - sum(p.numel() * p.element_size() for p in model.parameters())
    # at least the query, key, value and output matrices of two layers
    assert report.freed_bytes >= 2 * 4 * (2 * 32 * 32 + 2 * 32 * 8)
