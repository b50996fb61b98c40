"""Attention leaves Dynamo's graph: same numbers as eager without it, every way to write it, every reason to refuse."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusionc.accuracy import Entry, Plan
from fusionc.config import Config
from fusionc.errors import OptionError, reset_warnings
from fusionc.graph.text import show
from fusionc.passes.manager import run_passes
from fusionc.passes.remove_attention import RemoveAttention
from fusionc.removal.capture import logits
from tests.removal.models import Backend, inputs, make, run, zeroed

pytestmark = pytest.mark.filterwarnings("ignore::fusionc.errors.FallbackWarning")


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    reset_warnings()


@pytest.mark.parametrize("kind, attention", [("Llama", "sdpa"), ("Llama", "eager"), ("GPT2", "sdpa"), ("Phi", "eager"),
                                             ("FalconNew", "sdpa"), ("Bert", "eager")])  # fmt: skip
def test_same_as_zero_attention(kind: str, attention: str) -> None:
    model, batch = make(kind), inputs(kind)
    model.set_attn_implementation(attention)
    backend = Backend([2, 3])
    found = run(backend, model, **batch)
    with torch.no_grad():
        expected = logits(zeroed(copy.deepcopy(model), (2, 3))(**batch))
    assert backend.record.fired == 2 and backend.attentions == 4
    assert (found - expected).abs().max() == 0


def test_whole_backend() -> None:
    model, batch = make("Llama"), inputs("Llama")
    with torch.no_grad():
        expected = logits(zeroed(copy.deepcopy(model), (2, 3))(**batch))
        found = logits(
            torch.compile(model, backend="fusionc", options={"remove_attention": [2, 3], "cache": False})(**batch)
        )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_dynamic_length_compiles_once() -> None:
    model, backend, graphs = make("Llama"), Backend([2]), []

    def counting(gm: torch.fx.GraphModule, given: list[Any]) -> Any:
        graphs.append(gm)
        return backend(gm, given)

    compiled, reference = torch.compile(model, backend=counting, dynamic=True), zeroed(copy.deepcopy(model), (2,))
    for length in (9, 7, 5):
        ids = torch.arange(3, 3 + length)[None]
        with torch.no_grad():
            found, expected = compiled(ids, use_cache=False).logits, reference(ids, use_cache=False).logits
        assert backend.record.fired == 1 and (found - expected).abs().max() == 0
    assert len(graphs) == 1


def test_static_cache_is_not_written() -> None:
    """Of the removed layers neither keys nor values reach their buffers; the other layers and the length count go on."""
    from transformers import StaticCache

    model = make("Llama")
    tokens = inputs("Llama")["input_ids"]
    caches = [StaticCache(config=model.config, max_cache_len=12) for _ in range(2)]
    for cache in caches:
        with torch.no_grad():
            model(tokens[:, :8], past_key_values=cache)
    before = [layer.keys.clone() for layer in caches[0].layers]
    backend, token = Backend([2, 4]), tokens[:, 8:]
    found = run(backend, model, token, past_key_values=caches[0])
    assert backend.record.fired == 2, backend.reasons
    changed = [n for n, layer in enumerate(caches[0].layers) if not torch.equal(layer.keys, before[n])]
    assert changed == [0, 1, 3, 5]
    with torch.no_grad():
        expected = logits(zeroed(copy.deepcopy(model), (2, 4))(token, past_key_values=caches[1]))
    assert (found - expected).abs().max() == 0


def test_growing_cache_is_refused() -> None:
    model, batch = make("Llama"), inputs("Llama")
    backend = Backend([2])
    with torch.no_grad():
        torch.compile(model, backend=backend)(input_ids=batch["input_ids"], use_cache=True)
    assert backend.record.fired == 0
    assert backend.reasons == ["its keys or values leave the graph: use fusionc.remove_attention on the module"]


class Block(nn.Module):
    """One residual attention with every switch that a refusal needs."""

    def __init__(self, kind: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.norm, self.inner = kind, nn.LayerNorm(16), nn.LayerNorm(8)
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        other = torch.relu(x) if self.kind == "cross" else h
        q, k, v = (f(z).view(2, 5, 2, 8).transpose(1, 2) for f, z in ((self.q, h), (self.k, other), (self.v, other)))
        if self.kind == "qk norm":
            q = self.inner(q)
        if self.kind == "squashed":
            q = torch.tanh(q)
        a = nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=0.5 if self.kind == "dropout" else 0.0)
        a = a.transpose(1, 2).reshape(2, 5, 16)
        if self.kind == "gate":
            a = a * torch.sigmoid(h)
        a = self.o(a)
        if self.kind == "post norm":
            a = self.norm(a)
        if self.kind == "read twice":
            return x + a + a.sum()
        if self.kind == "no residual":
            return torch.relu(x) + a
        if self.kind == "in place":
            y = x + a
            y += 1
            return y * x
        return x + a


REFUSED = {
    "qk norm": "QK-norm: queries or keys are normalised",
    "cross": "cross-attention",
    "squashed": "pass through tanh",
    "dropout": "it is in training mode",
    "gate": "its output is not a plain residual addend: mul comes first",
    "post norm": "its output is not a plain residual addend: layer_norm comes first",
    "read twice": "its output has other readers",
    "no residual": "the stream that it reads is not what it is added to",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refusals(kind: str) -> None:
    backend, model, x = Backend([0]), Block(kind).eval(), torch.randn(2, 5, 16)
    run(backend, model, x)
    assert backend.record.fired == 0 and any(REFUSED[kind] in r for r in backend.reasons), backend.reasons


def test_refuses_training() -> None:
    backend, model = Backend([0]), Block()
    torch.compile(model, backend=backend)(torch.randn(2, 5, 16))
    assert backend.record.fired == 0 and backend.reasons == ["it is in training mode"]


def test_refuses_the_uniform_mode() -> None:
    backend = Backend(Plan("remove_attention", 1, (Entry(0),), mode="uniform"))
    run(backend, Block().eval(), torch.randn(2, 5, 16))
    assert backend.record.fired == 0 and "on the module only" in backend.reasons[0]


def test_protected_layers_are_named() -> None:
    backend = Backend(2)
    run(backend, Block().eval(), torch.randn(2, 5, 16))
    assert backend.record.fired == 0 and backend.reasons == ["protected: the first 2 and the last 1 stay unless named"]


def test_stream_written_in_place_later_keeps_its_own_copy() -> None:
    model, x = Block("in place").eval(), torch.randn(2, 5, 16)
    assert (run(Backend([0]), model, x) - (x + 1) * x).abs().max() == 0


def test_count_ranks_like_the_module_form() -> None:
    import fusionc

    model, batch = make("GPT2"), inputs("GPT2")
    backend = Backend(2)
    found = run(backend, model, **batch)
    report = fusionc.remove_attention(model, 2, inputs=batch)
    assert backend.record.fired == 2 and len(report.plan.entries) == 2
    with torch.no_grad():
        assert (found - logits(model(**batch))).abs().max() == 0


def test_text_and_second_run() -> None:
    backend = Backend([0])
    run(backend, Block().eval(), torch.randn(2, 5, 16))
    assert show(backend.gm).splitlines()[-1].startswith("return (%l_x_")
    before = show(backend.gm)
    _, records = run_passes(backend.gm, "model", Backend([0]).config, backend.inputs, static={})
    assert not next(r for r in records if r.name == "remove_attention").fired and show(backend.gm) == before


def test_off_unless_asked_for() -> None:
    config = Config.parse(None, {})
    assert config.remove_attention is None
    from fusionc.passes import pipeline

    assert "remove_attention" not in [item.name for _, item in pipeline("model", config)]
    assert "remove_attention" in [
        item.name for _, item in pipeline("model", Config.parse(None, {"passes": [RemoveAttention(1)]}))
    ]
    for wrong in (True, -1, 1.5, [0, 0], ["a"], "x", Plan("other", 1)):
        with pytest.raises(OptionError, match="remove_attention"):
            Config.parse(None, {"remove_attention": wrong})
