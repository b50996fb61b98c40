"""``fusionc.remove_attention`` on small models of a few families: ranking, plans, refusals, budget."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import fusionc
from fusionc.accuracy import Plan
from fusionc.errors import FallbackWarning, OptionError
from fusionc.removal.surgery import Removed

from .models import inputs, make, values


def coupled(kind: str) -> Any:
    """A model whose attention is far from uniform, which that of freshly initialised weights is not."""
    model = make(kind)
    with torch.no_grad():
        for path, p in model.named_parameters():
            if p.dim() == 2 and any(n in path for n in ("attn", "attention")):
                p.mul_(15)
    return model


@pytest.mark.filterwarnings("ignore::fusionc.errors.FallbackWarning")
@pytest.mark.parametrize("kind", ["Llama", "OPT", "Bert"])
def test_uniform_equals_zero_queries(kind: str) -> None:
    model, batch = coupled(kind), inputs(kind)
    reference, original = copy.deepcopy(model), values(model, batch)
    with torch.no_grad():
        for path, p in reference.named_parameters():
            if ".3." in path and any(f".{n}." in path for n in ("q_proj", "query")):
                p.zero_()
    report = fusionc.remove_attention(model, [3], inputs=batch, mode="uniform")
    torch.testing.assert_close(values(model, batch), values(reference, batch), rtol=1e-5, atol=1e-6)
    assert report.freed_bytes > 0 and (values(model, batch) - original).abs().max() > 3e-4
    names = [path for path, _ in model.named_parameters() if ".3." in path]
    assert not [n for n in names if "q_proj" in n or "query" in n or "k_proj" in n or ".key." in n]


@pytest.mark.filterwarnings("ignore::fusionc.errors.FallbackWarning")
@pytest.mark.parametrize("kind, heads", [("GPT2", "plain"), ("Phi3", "grouped"), ("GPTNeoX", "mixed")])
def test_uniform_of_a_fused_projection(kind: str, heads: str) -> None:
    """The value rows of q/k/v in one weight stay, in whatever order they lie."""
    model, batch = coupled(kind), inputs(kind)
    reference, original = copy.deepcopy(model), values(model, batch)
    (fused,) = [m for path, m in reference.named_modules()
                if ".3." in path and path.endswith(("c_attn", "qkv_proj", "query_key_value"))]  # fmt: skip
    rows = {"plain": range(32), "grouped": range(32), "mixed": [24 * h + i for h in range(4) for i in range(8)]}[heads]
    with torch.no_grad():
        for p in fused.parameters():
            (p.T if p.dim() == 2 and kind == "GPT2" else p)[list(rows)] = 0
    report = fusionc.remove_attention(model, [3], inputs=batch, mode="uniform")
    found = values(model, batch)
    torch.testing.assert_close(found, values(reference, batch), rtol=1e-5, atol=1e-6)
    assert (found - original).abs().max() > 1e-3
    gone = 32 + (16 if heads == "grouped" else 32)  # rows of queries and keys, with their biases
    assert report.freed_bytes == 4 * gone * (32 + (kind != "Phi3"))


@pytest.mark.filterwarnings("ignore::fusionc.errors.FallbackWarning")
def test_uniform_refuses_modules_that_other_layers_share() -> None:
    model, batch = coupled("Albert"), inputs("Albert")
    before = values(model, batch)
    with pytest.raises(OptionError, match="disagree"):
        fusionc.remove_attention(model, [3], inputs=batch, mode="uniform")
    assert (values(model, batch) - before).abs().max() == 0


@pytest.mark.filterwarnings("ignore::fusionc.errors.FallbackWarning")
@pytest.mark.parametrize("kind, method", [("Llama", "rope"), ("GPT2", "layer"), ("GPTNeoX", "rope"), ("FalconNew", "heads"),
                                          ("Bert", "layer")])  # fmt: skip
def test_planted_layer(kind: str, method: str) -> None:
    model, batch = make(kind), inputs(kind)
    query = {
        "GPT2": "h.3.attn.c_attn",
        "GPTNeoX": "layers.3.attention.query_key_value",
        "FalconNew": "h.3.self_attention.query_key_value",
        "Bert": "layer.3.attention.self.query",
    }.get(kind, "3.self_attn.q_proj")
    (planted,) = [m for path, m in model.named_modules() if path.endswith(query)]
    with torch.no_grad():
        for p in planted.parameters():
            p.mul_(1e-3)
    assert fusionc.remove_attention(model, 1, inputs=batch, method=method).plan.layers == (3,)


@pytest.mark.filterwarnings("ignore::fusionc.errors.FallbackWarning")
def test_blind_to_the_output_projection() -> None:
    """The score's known limit: it looks at queries and keys only. The data-driven scorer sees it."""
    model, batch = make("Llama"), inputs("Llama")
    with torch.no_grad():
        for n, scale in ((2, 1e-3), (4, 1e-6)):
            model.model.layers[n].self_attn.q_proj.weight.mul_(scale if n == 2 else 1)
            model.model.layers[n].self_attn.o_proj.weight.mul_(scale if n == 4 else 1)
    other = copy.deepcopy(model)
    assert fusionc.remove_attention(model, 1, inputs=batch).plan.layers == (2,)
    assert fusionc.remove_attention(other, 1, calibration=[batch], scorer="cosine").plan.layers == (4,)


@pytest.mark.filterwarnings("ignore::fusionc.errors.FallbackWarning")
def test_counts_fractions_and_protection() -> None:
    for what, count in ((0, 0), (2, 2), (0.5, 3), (6, 3)):
        report = fusionc.remove_attention(make("Llama"), what, inputs=inputs("Llama"))
        assert len(report.plan.entries) == count and set(report.plan.layers) <= {2, 3, 4}
    assert "protected" in report.refusals[1] and "counts the tokens" in report.refusals[0]
    report = fusionc.remove_attention(make("Bert"), 6, inputs=inputs("Bert"), protect=(0, 0))
    assert report.plan.layers == (0, 1, 2, 3, 4, 5)


def test_refuses_qk_norm() -> None:
    report = fusionc.remove_attention(make("Qwen3"), 2, inputs=inputs("Qwen3"))
    assert not report.plan.entries and all(why.startswith("QK-norm") for n, why in report.refusals.items() if n)


def test_refuses_cross_attention() -> None:
    from fusionc.removal.capture import _run
    from fusionc.removal.find import Finder

    found: list[str] = []

    def backend(gm: Any, real: list[Any]) -> Any:
        nodes = dict(zip(gm.graph.find_nodes(op="placeholder"), real))
        subs = Finder(gm, nodes, {n for n, t in nodes.items() if isinstance(t, torch.nn.Parameter)}).sublayers()
        found.extend(s.refusal for s in subs)
        return gm.forward

    class Cross(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.o = (torch.nn.Linear(16, 16) for _ in range(4))

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            q, k, v = (f(z).view(1, -1, 2, 8).transpose(1, 2) for f, z in ((self.q, x), (self.k, y), (self.v, y)))
            a = torch.nn.functional.scaled_dot_product_attention(q, k, v)
            return x + self.o(a.transpose(1, 2).reshape(1, -1, 16))

    _run(Cross().eval(), (torch.randn(1, 4, 16), torch.randn(1, 5, 16)), backend)
    assert found == ["cross-attention: queries and keys are made of different tensors"]


def test_refuses_layers_that_share_one_graph() -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.o = (torch.nn.Linear(16, 16) for _ in range(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = (f(x).view(1, -1, 2, 8).transpose(1, 2) for f in (self.q, self.k, self.v))
            a = torch.nn.functional.scaled_dot_product_attention(q, k, v)
            return x + self.o(a.transpose(1, 2).reshape(1, -1, 16))

    class Cut(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList(Layer() for _ in range(3))

        @torch._dynamo.disable(recursive=False)
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    model = Cut().eval()
    with pytest.raises(OptionError, match="3 graphs with attention"):
        fusionc.remove_attention(model, [0], inputs=torch.randn(1, 4, 16))
    assert not [m for m in model.modules() if isinstance(m, Removed)]


class Named(NamedTuple):
    hidden: torch.Tensor
    weights: torch.Tensor | None


@pytest.mark.parametrize("form", ["named", "dict"])
def test_results_that_are_no_plain_tuple(form: str) -> None:
    class Attention(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.o = (torch.nn.Linear(16, 16) for _ in range(4))

        def forward(self, x: torch.Tensor) -> Any:
            q, k, v = (f(x).view(1, -1, 2, 8).transpose(1, 2) for f in (self.q, self.k, self.v))
            a = torch.nn.functional.scaled_dot_product_attention(q, k, v)
            y = self.o(a.transpose(1, 2).reshape(1, -1, 16))
            return Named(y, None) if form == "named" else {"hidden": y}

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList(Attention() for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                y = layer(x)
                x = x + (y.hidden if form == "named" else y["hidden"])
            return x

    model, x = Net().eval(), torch.randn(1, 4, 16)
    want = x + (model.layers[0](x).hidden if form == "named" else 0)
    if form == "named":
        fusionc.remove_attention(model, [1], inputs=x)
        torch.testing.assert_close(model(x), want)
        return
    with pytest.raises(OptionError, match="returns no tensor"):
        fusionc.remove_attention(model, [1], inputs=x)
    assert not [m for m in model.modules() if isinstance(m, Removed)]


def test_refuses_training_mode_and_wrong_requests() -> None:
    model, batch = make("Llama"), inputs("Llama")
    with pytest.raises(OptionError, match="training mode"):
        fusionc.remove_attention(model.train(), 1, inputs=batch)
    model.eval()
    for what in (True, None, -1, 1.0, [1, 1], [9], "", {"format": "x"}):
        with pytest.raises((OptionError, OSError)):
            fusionc.remove_attention(model, what, inputs=batch)
    with pytest.raises(OptionError, match="calibration"):
        fusionc.remove_attention(model, 1, inputs=batch, error_budget=0.1)
    with pytest.raises(OptionError, match="calibration"):
        fusionc.remove_attention(model, 1, inputs=batch, scorer="cosine")
    assert not [m for m in model.modules() if isinstance(m, Removed)]


def test_plan_file_replays_and_is_checked(tmp_path: Path) -> None:
    model, batch = make("Llama"), inputs("Llama")
    twin, other = copy.deepcopy(model), make("Llama", seed=5)
    with pytest.warns(FallbackWarning, match="unverified"):
        report = fusionc.remove_attention(model, 2, inputs=batch)
    report.plan.save(tmp_path / "plan.json")
    again = fusionc.remove_attention(twin, tmp_path / "plan.json", calibration=[batch])
    assert again.plan == report.plan == Plan.load(tmp_path / "plan.json") and not again.unverified
    assert (values(model, batch) - values(twin, batch)).abs().max() == 0
    with pytest.raises(OptionError, match="not those that the plan was made for"):
        fusionc.remove_attention(other, report.plan, inputs=batch)
    assert json.loads(json.dumps(again.to_json()))["agreement"]["top1"] <= 1


def test_measured_and_rolled_back() -> None:
    model, batch = make("Llama"), inputs("Llama")
    original = values(model, batch)
    report = fusionc.remove_attention(model, [2, 3, 4], calibration=[batch])
    assert report.agreement is not None and report.agreement.kl > 0 and set(report.changes) == {2, 3, 4}
    budget, model = report.agreement.kl * 0.9, make("Llama")
    some = fusionc.remove_attention(model, [2, 3, 4], calibration=[batch], error_budget=budget)
    worst = max(report.changes, key=lambda n: report.changes[n].relative_l2)
    assert some.rolled_back[0] == worst and some.agreement is not None and some.agreement.kl <= budget
    none = fusionc.remove_attention(model := make("Llama"), [2, 3], calibration=[batch], error_budget=0.0)
    assert not none.plan.entries and none.freed_bytes == 0 and (values(model, batch) - original).abs().max() == 0
    assert "rolled back" in str(none)
