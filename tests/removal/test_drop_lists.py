"""Lists of attention sublayers, MLPs and blocks to drop: both forms equal eager with those sublayers replaced by zero."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import fusionc
from fusionc.accuracy import Entry, Plan
from fusionc.errors import OptionError
from fusionc.removal.choose import Drop, check
from tests.sampled import sampled

from .models import Backend, inputs, make, run, values, zeroed

DROP = {"mlp": [1], "block": [3], "attention": [4]}
pytestmark = pytest.mark.filterwarnings("ignore::fusionc.errors.FallbackWarning")


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


def without(model: Any, mlps: tuple[int, ...]) -> Any:
    """Eager oracle: the last linear map of these layers' MLPs set to zero, by the families' names."""
    names = ("down_proj", "mlp.c_proj", "mlp.dense_4h_to_h", "fc2", "output.dense", "mlp.down_proj")
    with torch.no_grad():
        for n in mlps:
            found = [m for path, m in model.named_modules()
                     if f".{n}." in path and path.endswith(names) and "attention" not in path]  # fmt: skip
            assert len(found) == 1
            for p in found[0].parameters():
                p.zero_()
    return model


@pytest.mark.parametrize("kind", sampled(["Llama", "GPT2", "GPTNeoX", "Falcon", "Phi", "OPT", "Bert", "ViT"], 3))
def test_both_forms_equal_zero(kind: str) -> None:
    model, batch = make(kind), inputs(kind)
    expected = values(without(zeroed(copy.deepcopy(model), (3, 4)), (1, 3)), batch)
    backend, before = Backend(DROP), sum(p.nbytes for p in model.parameters())
    assert (run(backend, model, **batch) - expected).abs().max() == 0 and backend.record.fired == 4
    report = fusionc.remove_attention(model, DROP, inputs=batch)
    assert (values(model, batch) - expected).abs().max() == 0 and not report.refusals
    assert report.plan.layers == (3, 4) and report.plan.of("mlp") == (1, 3)
    # two MLPs of at least 2 · 32 · 48 and two attentions, in float32
    assert (
        before - sum(p.nbytes for p in model.parameters()) == report.freed_bytes >= 4 * 2 * (2 * 32 * 48 + 3 * 32 * 32)
    )


def test_generate_without_a_block() -> None:
    model, prompt = make("Llama"), inputs("Llama")["input_ids"][:1]
    reference = without(zeroed(copy.deepcopy(model), (2,)), (2, 5))
    fusionc.remove_attention(model, {"block": [2], "mlp": [5]}, inputs={"input_ids": prompt})
    given = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    assert model.generate(prompt, **given).tolist() == reference.generate(prompt, **given).tolist()


def test_plan_file_measured_and_rolled_back(tmp_path: Path) -> None:
    model, batch = make("Llama"), inputs("Llama")
    twin = copy.deepcopy(model)
    report = fusionc.remove_attention(model, DROP, calibration=[batch])
    assert set(report.changes) == {3, 4, "mlp 1", "mlp 3"} and "mlp 3" in str(report)
    report.plan.save(tmp_path / "plan.json")
    again = fusionc.remove_attention(twin, tmp_path / "plan.json", inputs=batch)
    assert again.plan == report.plan and (values(twin, batch) - values(model, batch)).abs().max() == 0
    with pytest.raises(OptionError, match="weights of layer mlp 1 are not"):
        fusionc.remove_attention(
            make("Llama", seed=3), Plan.from_json(_only(report.plan.to_json(), "mlp")), inputs=batch
        )
    assert report.agreement is not None
    some = fusionc.remove_attention(make("Llama"), DROP, calibration=[batch], error_budget=report.agreement.kl * 0.9)
    worst = max(report.changes, key=lambda n: report.changes[n].relative_l2)
    assert some.rolled_back[0] == worst and worst not in [e.place for e in some.plan.entries]


def _only(data: dict[str, Any], part: str) -> dict[str, Any]:
    return data | {"entries": [e for e in data["entries"] if e.get("part") == part]}


def test_plans_of_before_name_no_part() -> None:
    plan = Plan("remove_attention", 6, (Entry(2),))
    data = plan.to_json()
    assert "part" not in data["entries"][0] and Plan.from_json(data) == plan
    assert Plan.from_json({**data, "entries": [data["entries"][0] | {"part": "attention"}]}) == plan
    data["entries"][0]["part"] = "norm"
    with pytest.raises(OptionError, match="the part 'norm'"):
        Plan.from_json(data)
    assert Plan("remove_attention", 6, (Entry(2), Entry(2, part="mlp"))).without("mlp 2") == plan


def test_requests() -> None:
    assert check("x", {"block": [1], "mlp": [0]}) == Drop((1,), (0, 1)) and check("x", Drop((1,))) == Drop((1,))
    assert check("x", [3, 1]) == Drop((3, 1)) and check("x", Drop((3,), (2,)).to_json()) == Drop((3,), (2,))
    for wrong in ({"block": [1], "mlp": [1]}, {"mlp": 1}, {"mlp": [-1]}, {"mlp": [True]}, {"norm": [1]}, {}):
        with pytest.raises(OptionError):
            check("x", wrong)
    model, batch = make("Llama"), inputs("Llama")
    with pytest.raises(OptionError, match="has 6 mlp sublayers"):
        fusionc.remove_attention(model, {"mlp": [6]}, inputs=batch)
    with pytest.raises(OptionError, match="an MLP can only be dropped"):
        fusionc.remove_attention(model, {"mlp": [1]}, inputs=batch, mode="uniform")
    with pytest.raises(OptionError, match="has 0 mlp sublayers"):  # its MLPs end in a norm
        fusionc.remove_attention(make("Gemma2"), {"mlp": [1]}, inputs=inputs("Gemma2"))


class Branches(torch.nn.Module):
    """A residual MLP, a gate that is none (one linear map), and one that reads something else, too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.one, self.a, self.b = (torch.nn.Linear(8, 8) for _ in range(5))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = x + self.down(torch.relu(self.up(x)))
        x = x + self.one(x)
        return x + self.b(self.a(x) * y)


def test_what_is_an_mlp() -> None:
    model, x, y = Branches().eval(), torch.randn(2, 8), torch.randn(2, 8)
    expected = x + model.one(x)
    expected = expected + model.b(model.a(expected) * y)
    report = fusionc.remove_attention(model, {"mlp": [0]}, inputs=(x, y))
    assert [e.place for e in report.plan.entries] == ["mlp 0"] and report.plan.total == 1
    with torch.no_grad():
        assert (model(x, y) - expected).abs().max() == 0
