"""Families that no list names: each gives eager's numbers with that attention replaced by zero, or says truly why not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import fusionc
from fusionc.removal.capture import captured
from tests.sampled import sampled

from .models import Backend, inputs, make, run, values, zeroed

WORK = ("StableLm", "Gemma", "Cohere", "Mpt", "Bloom", "GPTJ", "Phi3", "Granite", "GPTBigCode", "Mixtral", "OpenAIGPT",
        "Roberta", "DistilBert", "MPNet", "DeiT", "Beit")  # fmt: skip
QK_NORM = "QK-norm: queries or keys are normalised after their projection, which erases the scale of the weights"
REFUSE = {
    "Qwen3": QK_NORM,
    "Olmo2": QK_NORM,
    "Gemma3": QK_NORM,
    "Gemma2": "its output is not a plain residual addend: a norm comes first",
    "Albert": "no module holds it alone: the rest of the model needs its weights",
}
pytestmark = pytest.mark.filterwarnings("ignore::fusionc.errors.FallbackWarning")


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", sampled(WORK, 5))
def test_equals_zero_attention(kind: str) -> None:
    model, batch = make(kind), inputs(kind)
    expected = values(zeroed(copy.deepcopy(model), (2, 4)), batch)
    report = fusionc.remove_attention(model, [2, 4], inputs=batch)
    assert report.plan.layers == (2, 4) and (values(model, batch) - expected).abs().max() == 0


@pytest.mark.parametrize("kind", sampled(["Gemma", "Bloom", "MPNet", "Mixtral"], 2))
def test_graph_form_equals_zero_attention(kind: str) -> None:
    model, batch, backend = make(kind), inputs(kind), Backend([2, 4])
    expected = values(zeroed(copy.deepcopy(model), (2, 4)), batch)
    assert (run(backend, model, **batch) - expected).abs().max() == 0 and backend.record.fired == 2


@pytest.mark.parametrize("kind", sampled(REFUSE, 3))
def test_says_why_not(kind: str) -> None:
    model, batch = make(kind), inputs(kind)
    original = values(model, batch)
    report = fusionc.remove_attention(model, [2, 3], inputs=batch)
    assert report.refusals == {2: REFUSE[kind], 3: REFUSE[kind]} and not report.plan.entries and not report.freed_bytes
    assert (values(model, batch) - original).abs().max() == 0


@pytest.mark.parametrize("kind", sampled(["T5", "Bart", "Whisper"], 1))
def test_cross_attention_stays(kind: str) -> None:
    """Three encoder layers, then three decoder layers of self- and cross-attention."""
    model, batch = make(kind), inputs(kind)
    with captured(model, batch) as finder:
        refusals = [s.refusal for s in finder.sublayers()]
    cross = "cross-attention: queries and keys are made of different tensors"
    assert refusals == ["", "", "", *["", cross] * 3]
    report = fusionc.remove_attention(model, [4, 6], inputs=batch)
    assert report.refusals == {4: cross, 6: cross} and not report.plan.entries


def test_a_count_takes_none_of_a_model_that_refuses() -> None:
    model: Any = make("Qwen3")
    report = fusionc.remove_attention(model, 3, inputs=inputs("Qwen3"))
    assert not report.plan.entries and set(report.refusals.values()) >= {QK_NORM}
