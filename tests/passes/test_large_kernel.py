"""Large kernels: the graph with each form, the error of the rewritten graph, every refusal, plans, weights that change."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusionc
from fusionc.accuracy import Plan
from fusionc.config import Config
from fusionc.decomposition.cost import Machine, machine
from fusionc.errors import FallbackWarning, OptionError, reset_warnings
from fusionc.graph.text import show
from fusionc.passes.large_kernel import BOUNDS_KEY, PLAN_KEY, LargeKernel
from fusionc.passes.manager import run_passes
from fusionc.runtime.weights import DerivedWeights

pytestmark = pytest.mark.filterwarnings("ignore::fusionc.errors.FallbackWarning")
LOW_RANK = {"method": "low_rank", "error": 1e-2}


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    # a machine where only products cost time: the images of these tests are small
    monkeypatch.setattr("fusionc.decomposition.cost.machine", lambda *_: Machine(1e15, 1e-9, launch=0.0))
    torch._dynamo.reset()
    reset_warnings()
    torch.manual_seed(0)


class Net(nn.Module):
    """Depthwise K × K of a rank, BatchNorm, relu."""

    def __init__(self, kernel: int = 13, rank: int = 2, channels: int = 4, norm: bool = True, **options: Any) -> None:
        super().__init__()
        options = {"padding": kernel // 2, "groups": channels} | options
        self.conv = nn.Conv2d(channels, channels, kernel, **options)
        self.norm = nn.BatchNorm2d(channels) if norm else nn.Identity()
        self.double().eval()
        weight = self.conv.weight.data
        if weight.shape[1] == 1:
            parts = [torch.randn(channels, 2, kernel, dtype=torch.float64) for _ in range(rank)]
            weight.copy_(sum(p[:, :1, :, None] * p[:, 1:, None] for p in parts))
        if norm:
            self.norm.running_mean.normal_()
            self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.conv(x)))


class Backend:
    """Runs the model passes on Dynamo's graph and then the graph as it is."""

    def __init__(self, what: Any, **options: Any) -> None:
        self.config = Config.parse(None, {"large_kernel": what, "verify": True, "strict": True} | options)
        self.gm: Any = None

    def __call__(self, gm: torch.fx.GraphModule, given: list[Any]) -> Any:
        self.gm, records = run_passes(gm, "model", self.config, given)
        self.record = next(r for r in records if r.name == "large_kernel")
        weights = DerivedWeights(self.gm.meta.get("fusionc_derived", ()))
        for derived, value in zip(self.gm.meta.get("fusionc_derived", ()), weights.resolve(given)):
            node = next(n for n in self.gm.graph.find_nodes(op="placeholder") if n.target == derived.name)
            like = node.meta["example_value"]
            assert like.shape == value.shape and like.stride() == value.stride() and like.dtype == value.dtype
        return lambda *args: self.gm.forward(*args, *weights.resolve(args))

    @property
    def reasons(self) -> list[str]:
        return [r.reason for r in self.record.refusals]

    @property
    def plan(self) -> Plan:
        return self.gm.meta[PLAN_KEY][0]


def image(*sizes: int) -> Tensor:
    return torch.randn(*(sizes or (2, 4, 24, 22)), dtype=torch.float64)


def run(backend: Any, model: nn.Module, x: Tensor, **options: Any) -> Tensor:
    with torch.no_grad():
        return torch.compile(model, backend=backend, **options)(x)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_text() -> None:
    backend = Backend(LOW_RANK)
    run(backend, Net(norm=False, kernel=7, rank=1, bias=False), image(1, 4, 9, 8))
    assert "\n" + re.sub(r"  # .*", "", show(backend.gm)) == """
%l_self_modules_conv_parameters_weight_: f64[4, 1, 7, 7] = input
%l_x_: f64[1, 4, 9, 8] = input
%derived_0: f64[4, 1, 7, 1] = input
%derived_1: f64[4, 1, 1, 7] = input
%conv2d_1: f64[1, 4, 9, 8] = torch.conv2d(%l_x_, %derived_0, None, (1, 1), (3, 0), (1, 1), 4)
%conv2d_2: f64[1, 4, 9, 8] = torch.conv2d(%conv2d_1, %derived_1, None, (1, 1), (0, 3), (1, 1), 4)
%relu: f64[1, 4, 9, 8] = torch.relu(%conv2d_2)
return (%relu)
"""


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"stride": 2}, {"dilation": 2, "padding": "same"},
                                     {"padding": "valid"}, {"padding": (6, 3)}], ids=str)  # fmt: skip
def test_low_rank_kernels_give_the_same_numbers(norm: bool, options: dict[str, Any]) -> None:
    model, x = Net(norm=norm, **options), image()
    backend = Backend(LOW_RANK)
    found = run(backend, model, x)
    assert backend.record.fired == 1 and [e.form for e in backend.plan.entries] == ["low_rank 2"]
    with torch.no_grad():
        assert relative(found, model(x)) < 1e-12


def test_channels_last_stays() -> None:
    model, x = Net().to(memory_format=torch.channels_last), image().to(memory_format=torch.channels_last)
    assert run(Backend(LOW_RANK), model, x).is_contiguous(memory_format=torch.channels_last)


FORMS = {"inception": "inception 3x3 1x13", "dilated_sparse": "dilated_sparse 3x3 3x3@6", "shiftwise": "shiftwise 3x3+2+8 3x3"}


@pytest.mark.parametrize("method", FORMS)
def test_impulse_response_of_the_rewritten_graph(method: str) -> None:
    model = Net(norm=False, bias=False)
    weight = model.conv.weight.data
    weight.normal_(std=2e-4)
    weight[:, :, 5:8, 5:8].normal_()
    if method == "inception":
        weight[:, :, 6].normal_()
    elif method == "dilated_sparse":
        weight[:, :, ::6, ::6].normal_()
    else:
        weight[:, :, 2:5, 8:11].normal_()
    model.norm, backend = nn.Identity(), Backend({"method": method, "error": 1e-2})
    model.forward = lambda x: model.norm(model.conv(x))  # type: ignore[method-assign]
    x = torch.zeros(1, 4, 25, 25, dtype=torch.float64)
    x[:, :, 12, 12] = 1
    found = run(backend, model, x)[0, :, 6:19, 6:19].flip(1, 2)
    (entry,) = backend.plan.entries
    assert entry.form == FORMS[method]
    error = (found - weight[:, 0]).flatten(1).norm(dim=1) / weight.flatten(1).norm(dim=1)
    assert 1e-4 < error.max() <= 1e-2 and error.max() == pytest.approx(entry.score, rel=1e-6)


def test_recursive_graph() -> None:
    model = Net(norm=False)
    at = torch.arange(13) - 6.0
    model.conv.weight.data.copy_(torch.exp(-(at[:, None] ** 2 + at**2) / 12).expand(4, 1, -1, -1))
    x, backend = image(2, 4, 33, 30), Backend({"method": "recursive", "error": 0.3})
    found = run(backend, model, x)
    assert backend.plan.entries[0].form.startswith("recursive")
    with torch.no_grad():
        assert 1e-3 < relative(found, model(x)) < 0.3


def test_auto_takes_the_cheapest() -> None:
    model = Net(norm=False)
    model.conv.weight.data.zero_()[:, :, 6, 6] = 1
    backend = Backend({"error": 1e-2})
    run(backend, model, image())
    assert backend.plan.entries[0].form == "inception 1x1" and backend.plan.scorer == "auto"


@pytest.mark.parametrize("model, reason", [
    (Net(kernel=7, groups=1), "not depthwise: channels are decomposed one by one"),
    (Net(kernel=7, groups=2), "not depthwise: channels are decomposed one by one"),
], ids=["dense", "grouped"])  # fmt: skip
def test_refusals_by_structure(model: Net, reason: str) -> None:
    backend = Backend(LOW_RANK)
    run(backend, model, image())
    assert backend.reasons == [reason] and backend.record.fired == 0


def test_refused_by_weights_with_the_users_line() -> None:
    model = Net(rank=9)
    backend = Backend(LOW_RANK)
    x = image()
    found = run(backend, model, x)
    (reason,) = backend.reasons
    assert reason.startswith("error bound 0.01 not reachable with low_rank at less than the convolution's cost: best 0.")
    assert "at rank" in reason and "would reach it at" in reason and "(test_large_kernel.py:" in reason
    assert backend.record.refusals[0].node.startswith("conv2d")
    with torch.no_grad():
        assert relative(found, model(x)) < 1e-12


def test_refused_in_training() -> None:
    backend = Backend(LOW_RANK)
    torch.compile(Net(norm=False), backend=backend)(image())
    assert backend.reasons == ["gradients of the weights are wanted"]


def test_refused_for_weights_that_are_computed_or_written() -> None:
    class Made(Net):
        def forward(self, x: Tensor) -> Tensor:
            return torch.conv2d(x, self.conv.weight * 2, None, 1, 6, 1, 4)

    class Written(Net):
        def forward(self, x: Tensor) -> Tensor:
            self.conv.weight.add_(1)
            return self.conv(x)

    for model, reason in ((Made(), "the weight is not a parameter or buffer"), (Written(), "the weight is written by the graph")):
        backend = Backend(LOW_RANK)
        run(backend, model, image())
        assert backend.reasons == [reason]


def test_refused_for_symbolic_images_and_mixed_dtypes() -> None:
    backend = Backend({"method": "recursive", "error": 0.5})
    run(backend, Net(), image(), dynamic=True)
    assert backend.reasons[0].startswith("recursive: the image's size is symbolic")
    backend = Backend(LOW_RANK)
    run(backend, Net(), image(), dynamic=True)
    assert backend.record.fired == 1


def test_second_run_changes_nothing() -> None:
    backend = Backend(LOW_RANK)
    run(backend, Net(), image())
    text = show(backend.gm)
    gm, records = run_passes(backend.gm, "model", backend.config, [])
    assert show(gm) == text and not [r for r in records if r.name == "large_kernel" and r.fired]


def test_refused_where_it_costs_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fusionc.decomposition.cost.machine", machine)
    backend = Backend(LOW_RANK)
    run(backend, Net(), image(1, 4, 14, 14))
    assert "low_rank 2 would reach it at" in backend.reasons[0]


def test_nothing_without_the_option() -> None:
    from fusionc.passes import pipeline

    assert not [p for _, p in pipeline("model", Config()) if isinstance(p, LargeKernel)]


# -- plans ------------------------------------------------------------------------------------------------------------


def test_plan_replays(tmp_path: Path) -> None:
    model, x = Net(), image()
    first = Backend(LOW_RANK)
    expected = run(first, model, x)
    assert first.plan.mode == "error 0.01" and first.plan.scorer == "low_rank" and first.plan.entries[0].score < 1e-6
    first.plan.save(tmp_path / "p.json")
    for what in (first.plan, str(tmp_path / "p.json"), json.loads((tmp_path / "p.json").read_text())):
        torch._dynamo.reset()
        again = Backend(what)
        assert torch.equal(run(again, model, x), expected) and again.plan == first.plan


def test_plans_that_do_not_fit() -> None:
    model, x = Net(), image()
    first = Backend(LOW_RANK)
    run(first, model, x)
    data = first.plan.to_json()
    with pytest.raises(OptionError, match="mode"):
        Config.parse(None, {"large_kernel": {**data, "mode": "identity"}})
    with pytest.raises(OptionError, match="plan for 'remove_attention'"):
        Config.parse(None, {"large_kernel": {**data, "kind": "remove_attention"}})
    with pytest.raises(OptionError, match="a kernel has none"):
        Config.parse(None, {"large_kernel": {**data, "entries": [{**data["entries"][0], "part": "mlp"}]}})
    for change, words in (
        ({"total": 2}, "made for 2 large kernels"),
        ({"entries": [{**data["entries"][0], "form": "low_rank 99"}]}, "layer 0 of the plan"),
        ({"entries": [{**data["entries"][0], "weights": "0" * 32}]}, "not those that the plan was made for"),
    ):
        torch._dynamo.reset()
        with pytest.raises(Exception, match=words):
            run(Backend({**data, **change}), model, x)
    torch._dynamo.reset()
    worse = Backend({**data, "entries": [{**data["entries"][0], "form": "low_rank 1"}]})
    run(worse, model, x)
    assert worse.record.fired == 0 and "above the plan's bound 0.01" in worse.reasons[0]


# -- the whole backend ------------------------------------------------------------------------------------------------


def test_weights_that_change() -> None:
    model, x = Net(channels=4), image()
    other = Net(channels=4, rank=2)
    with torch.no_grad():
        compiled = torch.compile(model, backend="fusionc", options={"large_kernel": LOW_RANK, "cache": False})
        assert relative(compiled(x), model(x)) < 1e-12
        calls = fusionc.report()[-1].calls
        assert sum(c.op == "aten.convolution.default" for c in calls) == 4
        model.conv.weight.mul_(2)  # still of rank 2: the filters follow
        assert relative(compiled(x), model(x)) < 1e-12
        model.load_state_dict(other.state_dict())
        assert relative(compiled(x), model(x)) < 1e-12
        kept = model.conv.weight.clone()
        with pytest.warns(FallbackWarning, match="does not hold any more"):
            model.conv.weight.normal_()  # of full rank: back to the exact form
            assert relative(compiled(x), model(x)) < 1e-12
        model.conv.weight.copy_(kept)
        assert relative(compiled(x), model(x)) < 1e-12
        model.conv.weight[0, 0, 0, 0] = torch.nan
        assert bool(compiled(x)[:, 0].isnan().any()) and not bool(compiled(x)[:, 1:].isnan().any())


@pytest.mark.parametrize("policy", ["checked", "manual"])
def test_writers_that_hide_need_refresh(policy: str) -> None:
    model, x = Net(), image()
    compiled = torch.compile(model, backend="fusionc", options={"large_kernel": LOW_RANK, "weights": policy, "cache": False})
    with torch.no_grad():
        assert relative(compiled(x), model(x)) < 1e-12
        model.conv.weight.data.normal_()
        assert fusionc.refresh(model) > 0
        assert relative(compiled(x), model(x)) < 1e-12


def test_no_bounds_where_nothing_was_changed() -> None:
    backend = Backend(LOW_RANK)
    run(backend, Net(rank=9), image())
    assert BOUNDS_KEY not in backend.gm.meta


def test_explained_with_the_error_and_the_users_line() -> None:
    from fusionc.explanation import explain_with

    model, x = Net(), image()
    with torch.no_grad():
        text = str(explain_with(model, (x,), options={"large_kernel": LOW_RANK}))
    assert "large_kernel: conv (test_large_kernel.py:" in text and "becomes low_rank 2: error " in text and "unverified" in text


def test_filters_that_are_kept_are_not_written() -> None:
    model, x = Net(), image()
    kept = model.conv.weight.clone()
    with torch.no_grad():
        for _ in range(2):  # the second time the filters of these weights are known
            torch._dynamo.reset()
            model.conv.weight.copy_(kept)
            compiled = torch.compile(model, backend="fusionc", options={"large_kernel": LOW_RANK, "cache": False})
            compiled(x)
            record = next(p for p in fusionc.report()[-1].passes if p.name == "large_kernel")
            assert "becomes low_rank 2: error " in record.notes[0]
            model.conv.weight.mul_(-3)
            assert relative(compiled(x), model(x)) < 1e-12
        model.conv.weight.copy_(kept)
        assert relative(compiled(x), model(x)) < 1e-12


def test_another_instance_of_the_class_decides_for_itself() -> None:
    # Dynamo reuses compiled code for it: parameters are inputs of the graph
    def call(model: nn.Module, x: Tensor) -> Tensor:
        return model(x)

    first, second, third, x = Net(), Net(rank=9), Net(), image()
    compiled = torch.compile(call, backend="fusionc", options={"large_kernel": LOW_RANK, "cache": False})
    with torch.no_grad():
        for model in (first, second, third, first, second):
            assert relative(compiled(model, x), model(x)) < 1e-12


def test_unverified_is_said() -> None:
    with pytest.warns(FallbackWarning, match="large_kernel changes the model's results and nobody measured"):
        run(Backend(LOW_RANK), Net(), image())
