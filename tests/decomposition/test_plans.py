"""fusionc.plan_large_kernels: predicted and measured errors, budgets, replay, wrong requests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fusionc
from fusionc.decomposition.cost import Machine
from fusionc.errors import FallbackWarning, OptionError, reset_warnings

WHAT = {"method": "low_rank", "error": 5e-2}


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fusionc.decomposition.cost.machine", lambda *_: Machine(1e15, 1e-9, launch=0.0))
    torch._dynamo.reset()
    reset_warnings()
    torch.manual_seed(0)


class Net(nn.Module):
    """Three depthwise layers: rank 2 and a little noise, rank 1 and more noise, random."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 1)
        self.layers = nn.ModuleList(nn.Conv2d(6, 6, k, padding=k // 2, groups=6) for k in (9, 11, 7))
        self.norms = nn.ModuleList(nn.BatchNorm2d(6) for _ in range(3))
        self.head = nn.Linear(6, 10)
        for layer, rank, noise in zip(self.layers, (2, 1, 0), (1e-3, 3e-2, 1.0)):
            k = layer.kernel_size[0]
            made = sum((torch.randn(6, 1, k, 1) * torch.randn(6, 1, 1, k) for _ in range(rank)), torch.zeros(6, 1, k, k))
            layer.weight.data.copy_(made + noise * torch.randn(6, 1, k, k))
        for norm in self.norms:
            norm.running_var.uniform_(20, 100)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer, norm in zip(self.layers, self.norms):
            x = x + torch.relu(norm(layer(x)))
        return self.head(x.mean((2, 3)))


def batches(count: int = 2) -> list[Tensor]:
    return [torch.randn(2, 3, 20, 20) for _ in range(count)]


def test_measured_report(tmp_path: Path) -> None:
    model = Net()
    report = fusionc.plan_large_kernels(model, WHAT, calibration=batches())
    assert report.plan.total == 3 and [e.form for e in report.plan.entries] == ["low_rank 2", "low_rank 1"]
    assert list(report.refusals) == [2] and "not reachable with low_rank" in report.refusals[2]
    for e in report.plan.entries:
        assert 1e-4 < report.changes[e.layer].relative_l2 < 3 * e.score  # the input is not white noise, but near it
        assert report.changes[e.layer].cosine > 0.99
    assert report.agreement is not None and not report.unverified and 0 < report.agreement.kl < 1e-2
    text = str(report)
    assert "layer 0" in text and "low_rank 2" in text and "layer 2 kept" in text and "final outputs" in text
    assert "layer 0 layers.0: low_rank 2, error" in text
    report.plan.save(tmp_path / "plan.json")
    again = fusionc.plan_large_kernels(model, str(tmp_path / "plan.json"), calibration=batches(1))
    assert again.plan == report.plan
    x = batches(1)[0]
    with torch.no_grad():
        found = torch.compile(model, backend="fusionc", options={"large_kernel": report.plan, "cache": False})(x)
        torch.testing.assert_close(found, model(x), rtol=0.05, atol=0.05)
    record = next(p for p in fusionc.report()[-1].passes if p.name == "large_kernel")
    assert record.fired == 2 and not record.refusals


def test_budget_puts_the_worst_layer_back() -> None:
    model = Net()
    free = fusionc.plan_large_kernels(model, WHAT, calibration=batches())
    assert free.agreement is not None
    report = fusionc.plan_large_kernels(model, WHAT, calibration=batches(), error_budget=free.agreement.kl / 50)
    assert report.rolled_back == (1,) and report.plan.layers == (0,) and set(report.changes) == {0}
    assert report.agreement is not None and report.agreement.kl <= free.agreement.kl / 50


def test_unverified() -> None:
    with pytest.warns(FallbackWarning, match="unverified"):
        report = fusionc.plan_large_kernels(Net(), WHAT, inputs=batches(1)[0])
    assert report.unverified and not report.changes and "unverified" in str(report)


def test_decides_for_another_device() -> None:
    seen: list[str] = []

    def machine(kind: str, *_: object) -> Machine:
        seen.append(kind)
        return Machine(1e15, 1e-9, launch=0.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fusionc.decomposition.cost.machine", machine)
        fusionc.plan_large_kernels(Net(), WHAT, calibration=batches(1), device="cuda")
    assert set(seen) == {"cuda"}


def test_wrong_requests() -> None:
    model = Net()
    with pytest.raises(OptionError, match="inputs= or calibration="):
        fusionc.plan_large_kernels(model, WHAT)
    with pytest.raises(OptionError, match="error_budget needs"):
        fusionc.plan_large_kernels(model, WHAT, inputs=batches(1)[0], error_budget=0.1)
    with pytest.raises(OptionError, match="eval mode"):
        fusionc.plan_large_kernels(Net().train(), WHAT, inputs=batches(1)[0])
    with pytest.raises(OptionError, match="no large kernel"):
        fusionc.plan_large_kernels(nn.Linear(3, 3).eval(), WHAT, inputs=torch.randn(2, 3))


def test_measured_is_not_called_unverified(recwarn: pytest.WarningsRecorder) -> None:
    fusionc.plan_large_kernels(Net(), WHAT, calibration=batches(1))
    assert not [w for w in recwarn if "unverified" in str(w.message)]
