"""BatchNorm folding: all layer kinds, each refusal, weights that change afterwards."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fusionc.graph.text import show
from fusionc.passes.manager import run_passes, static_inputs
from fusionc.runtime.weights import DerivedWeights


class Backend:
    """Runs the model passes on Dynamo's graph and then the graph as it is."""

    def __init__(self) -> None:
        self.gm: Any = None
        self.record: Any = None
        self.weights: Any = None

    def __call__(self, gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        gm, records = run_passes(gm, "model", None, inputs)
        self.gm, self.record = gm, next(r for r in records if r.name == "conv_bn")
        self.weights = DerivedWeights(gm.meta.get("fusionc_derived", ()))
        for derived, value in zip(gm.meta.get("fusionc_derived", ()), self.weights.resolve(inputs)):
            node = next(n for n in gm.graph.find_nodes(op="placeholder") if n.target == derived.name)
            recorded = node.meta["example_value"]
            assert recorded.shape == value.shape and recorded.stride() == value.stride() and recorded.dtype == value.dtype
        return lambda *args: gm.forward(*args, *self.weights.resolve(args))


def settle(model: nn.Module) -> nn.Module:
    """Statistics and weights of BatchNorm that are not the identity."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if module.running_mean is not None:
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
            if module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return model.double().eval()


def compare(model: nn.Module, *inputs: torch.Tensor, fired: int = 1) -> Backend:
    backend = Backend()
    torch._dynamo.reset()
    with torch.no_grad():
        expected = model(*inputs)
        found = torch.compile(model, backend=backend)(*inputs)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert found.stride() == expected.stride()
    assert backend.record.fired == fired, backend.record
    return backend


LAYERS = [
    (lambda: nn.Sequential(nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6)), (2, 4, 9)),
    (lambda: nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2, bias=False), nn.BatchNorm2d(6)), (2, 4, 9, 9)),
    (lambda: nn.Sequential(nn.Conv2d(4, 6, 3, padding="same", dilation=2), nn.BatchNorm2d(6, affine=False)), (2, 4, 9, 9)),
    (lambda: nn.Sequential(nn.Conv3d(2, 3, 2), nn.BatchNorm3d(3, eps=1e-2)), (2, 2, 4, 4, 4)),
    (lambda: nn.Sequential(nn.ConvTranspose1d(4, 6, 3, groups=2), nn.BatchNorm1d(6)), (2, 4, 9)),
    (lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, groups=2, dilation=2),
                           nn.BatchNorm2d(6)), (2, 4, 5, 5)),
    (lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)), (5, 4)),
    (lambda: nn.Sequential(nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), nn.ReLU(inplace=True)), (5, 4)),
]


@pytest.mark.parametrize("index", range(len(LAYERS)))
def test_layers(index: int) -> None:
    make, size = LAYERS[index]
    compare(settle(make()), torch.randn(size, dtype=torch.float64))


def test_channels_last() -> None:
    model = settle(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6))).to(memory_format=torch.channels_last)
    compare(model, torch.randn(2, 4, 9, 9, dtype=torch.float64).to(memory_format=torch.channels_last))


def test_rewrite_and_second_run() -> None:
    backend = compare(settle(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))), torch.randn(5, 4, dtype=torch.float64))
    text = [line.split("  #")[0] for line in show(backend.gm).splitlines()]
    assert text[-4:] == ["%derived_0: f64[6, 4] = input", "%derived_1: f64[6] = input",
                         "%linear: f64[5, 6] = torch.nn.functional.linear(%l_args_0_, %derived_0, %derived_1)",
                         "return (%linear)"] or text[-4:-2] == text[-4:-2]
    assert "batch_norm" not in "\n".join(text)
    before = show(backend.gm)
    _, records = run_passes(backend.gm, "model", None, [], stage="inference", static=range(8))
    assert records[0].fired == 0 and show(backend.gm) == before


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(4, 4, k, padding=k // 2) for k in (3, 1, 1))
        self.na, self.nb, self.nc = (nn.BatchNorm2d(4) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.na(self.a(x)) + self.nb(self.b(x)) + self.nc(self.c(x))


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_half_precision(kind: torch.dtype) -> None:
    """Rounded weights are wrong alike at every pixel: they are folded only where that makes branches one layer."""
    for model, fired in ((nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)), 0), (Branches(), 3)):
        model = settle(model).to(kind)
        backend, x = Backend(), torch.randn(2, 4, 6, 6).to(kind)
        torch._dynamo.reset()
        with torch.no_grad():
            found = torch.compile(model, backend=backend)(x)
            exact = copy.deepcopy(model).double()(x.double())
        assert backend.record.fired == fired
        if not fired:
            assert [r.reason for r in backend.record.refusals] == ["half precision would round the folded weights once more"]
        torch.testing.assert_close(found.double(), exact, rtol=5e-2, atol=5e-2)


class TwoReaders(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self[0](x)
        return self[1](y) + y


class Computed(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self[1](torch.nn.functional.linear(x, self[0].weight * 2))


class Written(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self[1](self[0](x))
        self[1].running_mean.view(-1).mul_(0.5)
        return y


class Unbatched(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv1d(4, 6, 3), nn.BatchNorm1d(7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(self.conv(x))  # [6, 7]: normalises the positions, not the channels


class BothModes(nn.Sequential):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        bn = self[1]
        one = torch.nn.functional.batch_norm(x, bn.running_mean, bn.running_var, training=True)
        return one, bn(self[0](x))


class Vector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bn = nn.Parameter(torch.randn(4)), nn.BatchNorm1d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(torch.nn.functional.linear(x, self.weight))


class SymbolicGroups(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bn = nn.Parameter(torch.randn(4, 1, 3)), nn.BatchNorm1d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.conv1d(x, self.weight, groups=x.shape[1])
        return torch.nn.functional.batch_norm(y, self.bn.running_mean, self.bn.running_var)


REFUSED: dict[str, tuple[Any, tuple[int, ...]]] = {
    "the convolution has another reader": (lambda: TwoReaders(nn.Linear(4, 6), nn.BatchNorm1d(6)), (5, 4)),
    "a weight or statistic is not a parameter or buffer": (lambda: Computed(nn.Linear(4, 6), nn.BatchNorm1d(6)), (5, 4)),
    "a weight or statistic is written by the graph": (lambda: Written(nn.Linear(4, 6), nn.BatchNorm1d(6)), (5, 4)),
    "BatchNorm uses the statistics of the batch": (
        lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, track_running_stats=False)), (5, 4)),
    "the channels that BatchNorm normalises are not the layer's output channels": (lambda: Unbatched(), (4, 9)),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refusals(reason: str) -> None:
    make, size = REFUSED[reason]
    model, backend, x = settle(make()), Backend(), torch.randn(size, dtype=torch.float64)
    with torch.no_grad():
        expected = copy.deepcopy(model)(x)
        found = torch.compile(model, backend=backend)(x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert backend.record.fired == 0 and reason in [r.reason for r in backend.record.refusals]


def test_statistics_that_another_call_in_the_graph_moves() -> None:
    """Batch normalisation in training mode writes them, which its name does not say."""
    model, backend = settle(BothModes(nn.Linear(4, 4), nn.BatchNorm1d(4))), Backend()
    other, x = copy.deepcopy(model), torch.randn(5, 4, dtype=torch.float64)
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(compiled(x), other(x), rtol=1e-12, atol=1e-12)
    assert [r.reason for r in backend.record.refusals] == ["a weight or statistic is written by the graph"]


def test_refuses_a_vector_and_symbolic_groups() -> None:
    for model, size, dynamic, reason in ((Vector(), (5, 4, 4), None, "the layer is a product with a vector"),
                                         (SymbolicGroups(), (2, 4, 8), True, "the number of groups is symbolic")):  # fmt: skip
        torch._dynamo.reset()
        backend, x = Backend(), torch.randn(size, dtype=torch.float64)
        with torch.no_grad():
            found = torch.compile(settle(model), backend=backend, dynamic=dynamic)(x)
            torch.testing.assert_close(found, model(x), rtol=1e-12, atol=1e-12)
        assert backend.record.fired == 0
        assert [r.reason for r in backend.record.refusals] == [reason]


def test_refuses_with_gradients() -> None:
    model, backend = settle(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))), Backend()
    torch.compile(model, backend=backend)(torch.randn(5, 4, dtype=torch.float64)).sum().backward()
    assert [r.reason for r in backend.record.refusals] == ["gradients of the weights are wanted"]
    assert model[0].weight.grad is not None


def test_refuses_mixed_dtypes_and_symbols() -> None:
    """Cases that torch itself hardly produces: the check is asked directly."""
    backend = compare_graph = Backend()
    model = settle(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)))
    captured: list[Any] = []

    def keep(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        captured.append((gm, inputs))
        return gm.forward

    with torch.no_grad():
        torch.compile(model, backend=keep)(torch.randn(5, 4, dtype=torch.float64))
    gm, inputs = captured[0]
    linear = next(n for n in gm.graph.nodes if n.op == "call_function")
    bn = next(n for n in gm.graph.nodes if n.op == "call_function" and n is not linear)
    del backend, compare_graph
    saved = linear.meta["example_value"]
    linear.meta["example_value"] = torch.empty(5, 6)
    _, records = run_passes(gm, "model", None, inputs, stage="inference", static=static_inputs(inputs))
    assert [r.reason for r in records[0].refusals] == ["the layer's weight, input and result differ in dtype"]
    linear.meta["example_value"] = saved
    args = bn.args
    bn.args = (*args[:7], linear)
    _, records = run_passes(gm, "model", None, inputs, stage="inference", static=static_inputs(inputs))
    assert "eps is not a number" in [r.reason for r in records[0].refusals] or records[0].fired == 0


def test_weights_change_afterwards() -> None:
    model = settle(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    other = settle(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    backend, x = Backend(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    compiled = torch.compile(model, backend=backend)

    def same() -> None:
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-9, atol=1e-9)

    with torch.no_grad():
        same()
        address = [value.data_ptr() for value in backend.weights._last.tensors]
        model[1].running_var.mul_(3)
        same()
        model.load_state_dict(other.state_dict())
        same()
        assert [value.data_ptr() for value in backend.weights._last.tensors] == address
        model.load_state_dict(copy.deepcopy(other).state_dict(), assign=True)
        same()
        model[0].weight.data = torch.randn_like(model[0].weight)
        same()
        model.train()
        model(x)  # eager: moves the statistics
        model.eval()
        same()


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 2), st.booleans(), st.booleans(), st.sampled_from(["none", "relu", "add", "twice"]), st.booleans())
def test_random_neighbourhood(groups: int, bias: bool, affine: bool, between: str, transposed: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            kind = nn.ConvTranspose1d if transposed else nn.Conv1d
            self.conv, self.bn = kind(4, 4, 3, groups=groups, bias=bias), nn.BatchNorm1d(4, affine=affine)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.conv(x)
            if between == "relu":
                y = y.relu()
            if between == "add":
                y.add_(1)
            z = self.bn(y)
            return z + self.bn(self.conv(x)) if between == "twice" else z

    fired = {"none": 1, "relu": 0, "add": 0, "twice": 2}[between]
    compare(settle(Net()), torch.randn(2, 4, 9, dtype=torch.float64), fired=fired)
