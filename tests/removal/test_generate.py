"""generate() goes on after removal, and the removed layers hold no cache."""

from __future__ import annotations

import copy

import pytest
import torch

import fusionc
from fusionc.errors import reset_warnings
from tests.sampled import sampled

from .models import DECODERS, inputs, make, zeroed


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    reset_warnings()


@pytest.mark.filterwarnings("ignore::fusionc.errors.FallbackWarning")
@pytest.mark.parametrize("kind", sampled(DECODERS, 3))
def test_generate(kind: str) -> None:
    model, prompt = make(kind), inputs(kind)["input_ids"][:1]
    reference = zeroed(copy.deepcopy(model), (2, 4))
    fusionc.remove_attention(model, [2, 4], inputs={"input_ids": prompt})
    common = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True,
              "attention_mask": torch.ones_like(prompt)}  # fmt: skip
    found, expected = model.generate(prompt, **common), reference.generate(prompt, **common)
    assert found.sequences.tolist() == expected.sequences.tolist()
    held = [getattr(layer, "keys", None) for layer in found.past_key_values.layers]
    assert [n for n, keys in enumerate(held) if keys is None or keys.numel() == 0] == [2, 4]  # their cache is gone


@pytest.mark.filterwarnings("ignore::fusionc.errors.FallbackWarning")
@pytest.mark.parametrize("kind", sampled(DECODERS, 3))
def test_generate_with_a_static_cache(kind: str) -> None:
    model, prompt = make(kind), inputs(kind)["input_ids"][:1]
    reference = zeroed(copy.deepcopy(model), (2, 4))
    fusionc.remove_attention(model, [2, 4], inputs={"input_ids": prompt})
    common = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(prompt), "disable_compile": True,
              "cache_implementation": "static", "return_dict_in_generate": True}  # fmt: skip
    found, expected = model.generate(prompt, **common), reference.generate(prompt, **common)
    assert found.sequences.tolist() == expected.sequences.tolist()
    sizes = [
        [layer.keys.nbytes if layer.is_initialized else 0 for layer in x.past_key_values.layers]
        for x in (found, expected)
    ]
    assert sizes[0] == [0 if n in (2, 4) else size for n, size in enumerate(sizes[1])] and min(sizes[1]) > 0
