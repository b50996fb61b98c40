"""Filters with zeros or of rank one: what is left of them, refusals, other weights behind the same compiled function."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusionc.config import Config
from fusionc.errors import reset_warnings
from fusionc.graph.text import show
from fusionc.passes.manager import run_passes
from fusionc.passes.recipes import RECIPES
from fusionc.runtime.weights import DerivedWeights

FROZEN = Config(weights="frozen")
CONVOLUTIONS = {torch.conv1d, torch.conv2d, torch.conv3d}


class Backend:
    def __init__(self, config: Any = FROZEN) -> None:
        self.config, self.gm, self.record = config, None, None

    def __call__(self, gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        gm, records = run_passes(gm, "model", self.config, inputs)
        self.gm, self.record = gm, next((r for r in records if r.name == "conv_values"), None)
        weights = DerivedWeights(gm.meta.get("fusionc_derived", ()))
        return lambda *args: gm.forward(*args, *weights.resolve(args))

    def kernels(self) -> list[tuple[int, ...]]:
        """Sizes of the filters, padding and dilation of each convolution."""
        return [(*n.args[1].meta["example_value"].shape[2:], *n.args[4], *n.args[5]) for n in self.gm.graph.nodes
                if n.target in CONVOLUTIONS]  # fmt: skip


def compare(model: nn.Module, x: Tensor, tolerance: float = 1e-12) -> Backend:
    backend, model = Backend(), model.eval()
    torch._dynamo.reset()
    with torch.no_grad():
        expected = model(x)
        found = torch.compile(model, backend=backend)(x)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * max(1.0, float(expected.abs().max())))
    assert found.stride() == expected.stride()
    return backend


def masked(layer: nn.Module, mask: Callable[[Tensor], None]) -> nn.Module:
    layer = layer.double()
    with torch.no_grad():
        mask(layer.weight)
    return layer


def border(n: int, m: int) -> Callable[[Tensor], None]:
    def zero(w: Tensor) -> None:
        w[:, :, :n], w[:, :, w.shape[2] - m :] = 0, 0

    return zero


def odd(w: Tensor) -> None:
    w[..., 1::2, :], w[..., 1::2] = 0, 0


def gauss(w: Tensor) -> None:
    t = torch.linspace(-2, 2, w.shape[-1], dtype=w.dtype)
    g = torch.exp(-t * t / torch.rand(w.shape[0], 1, dtype=w.dtype).add(0.5))
    w.copy_((g[:, :, None] * g[:, None, :]).unsqueeze(1))


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], list[tuple[int, ...]]]] = {
    "border": (lambda: masked(nn.Conv2d(3, 5, 7, padding=3), border(2, 2)), (2, 3, 9, 8), [(3, 7, 1, 3, 1, 1)]),
    "uneven border": (lambda: masked(nn.Conv2d(3, 5, 7, padding=3, groups=1), border(3, 1)), (2, 3, 9, 8), [(5, 7, 2, 3, 1, 1)]),
    "border without padding": (lambda: masked(nn.Conv1d(3, 5, 5, bias=False), border(0, 2)), (2, 3, 9), []),
    "strided": (lambda: masked(nn.Conv1d(3, 5, 5, 2, 2), border(0, 2)), (2, 3, 10), []),
    "dilated": (lambda: masked(nn.Conv2d(4, 4, 5, padding=2, groups=4), odd), (2, 4, 9, 8), [(3, 3, 2, 2, 2, 2)]),
    "dilated more": (lambda: masked(nn.Conv2d(4, 4, 5, padding=4, dilation=2), odd), (2, 4, 9, 8), [(3, 3, 4, 4, 4, 4)]),
    "one tap left": (lambda: masked(nn.Conv3d(2, 3, 3, padding=1), lambda w: w.copy_(w * torch.eye(3)[1].outer(torch.eye(3)[1])
                     .view(1, 1, 1, 3, 3) * torch.eye(3)[1].view(3, 1, 1))), (1, 2, 4, 4, 4), [(1, 1, 1, 0, 0, 0, 1, 1, 1)]),
    "separable": (lambda: masked(nn.Conv2d(3, 3, 9, 2, 4, groups=3), gauss), (2, 3, 12, 15),
                  [(9, 1, 4, 0, 1, 1), (1, 9, 0, 4, 1, 1)]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_less(name: str) -> None:
    make, size, kernels = CASES[name]
    backend = compare(make(), torch.randn(size, dtype=torch.float64))
    if kernels:
        assert backend.kernels() == kernels and backend.record.fired == 1
        before = show(backend.gm)
        assert all(each.recipe is None for each in backend.gm.meta["fusionc_derived"]) and "conv_values" not in RECIPES
        _, records = run_passes(backend.gm, "model", FROZEN, [], stage="inference", static=range(3))
        assert not any(r.fired for r in records) and show(backend.gm) == before
    else:
        assert backend.record.fired == 0


def test_after_merging() -> None:
    """The merged filter of a folded BatchNorm is looked at, not its parts."""
    model = nn.Sequential(masked(nn.Conv2d(4, 4, 9, padding=4, groups=4, bias=False), gauss), nn.BatchNorm2d(4).double())
    model[1].running_var.uniform_(0.5, 2)
    backend = compare(model, torch.randn(1, 4, 12, 12, dtype=torch.float64))
    assert len(backend.kernels()) == 2
    single = copy.deepcopy(model).float()
    with torch.no_grad():
        found = torch.compile(single, backend=Backend())(x := torch.randn(1, 4, 12, 12))
        exact = single.double()(x.double())
    assert (found - exact).norm() <= 3e-7 * exact.norm()


def refusal(model: nn.Module, x: Tensor, grad: bool = False) -> list[str]:
    backend = Backend()
    torch._dynamo.reset()
    with torch.set_grad_enabled(grad):
        torch.compile(model, backend=backend)(x)
    assert backend.record.fired == 0
    return [r.reason for r in backend.record.refusals]


def test_refusals() -> None:
    x = torch.randn(1, 3, 9, 9)
    assert refusal(nn.Conv2d(3, 3, 3), x) == ["no zeros to leave out, no product of vectors"]
    assert refusal(nn.Conv2d(3, 3, 3), x, grad=True) == ["gradients of the weights are wanted"]
    small = masked(nn.Conv2d(3, 3, 5, groups=3), gauss).float()  # two passes cost more than 25 products
    assert refusal(small, x) == ["no zeros to leave out, no product of vectors"]
    half = masked(nn.Conv2d(3, 3, 9, padding=4, groups=3), gauss).bfloat16()
    assert refusal(half, x.bfloat16()) == ["no zeros to leave out, no product of vectors"]

    class Computed(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return torch.conv2d(x, self.weight * 0)

    assert refusal(Computed(3, 3, 3), x) == ["the weight is no parameter or buffer that stays as it is"]


def test_values_not_at_hand() -> None:
    kept: list[Any] = []
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(nn.Conv2d(3, 3, 3), backend=lambda gm, _: kept.append(gm) or gm.forward)(torch.randn(1, 3, 9, 9))
    _, records = run_passes(kept[0], "model", FROZEN, [], stage="inference", static=range(3))
    (record,) = [r for r in records if r.name == "conv_values"]
    assert [r.reason for r in record.refusals] == ["the weights' values are not at hand"]


def test_only_with_frozen_weights() -> None:
    backend = Backend(Config())
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(masked(nn.Conv2d(4, 4, 5, padding=2), odd), backend=backend)(torch.randn(1, 4, 8, 8, dtype=torch.float64))
    assert backend.record is None


def test_another_instance_without_the_zeros() -> None:
    """The compiled function serves it by the graph as it was, and says so once."""
    torch._dynamo.reset()
    x = torch.randn(1, 4, 8, 8)
    one, two = masked(nn.Conv2d(4, 4, 5, padding=2), odd).float(), nn.Conv2d(4, 4, 5, padding=2)

    class Net(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).relu()

    reset_warnings()
    with torch.no_grad(), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for model in (Net(one), Net(two), Net(one)):
            compiled = torch.compile(model, backend="fusionc", options={"weights": "frozen"})
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
    assert ["not zero any more" in str(w.message) for w in told if "eager mode" in str(w.message)] == [True]
