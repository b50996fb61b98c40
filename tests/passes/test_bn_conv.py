"""BatchNorm folded into the layer after it, and into the one before it through views: layer kinds, refusals, changed weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusionc.graph.text import show
from fusionc.passes.manager import run_passes
from tests.passes.model_backend import ModelBackend


class Backend(ModelBackend):
    def norms(self) -> int:
        """BatchNorms left."""
        return sum(node.target is F.batch_norm for node in self.gm.graph.nodes)

    def fired(self) -> dict[str, int]:
        """How often each pass fired."""
        return {name: r.fired for name, r in self.records.items() if r.fired}


def settle(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return model.double().eval()


def compare(model: nn.Module, *inputs: Tensor) -> Backend:
    backend = Backend()
    torch._dynamo.reset()
    with torch.no_grad():
        expected = model(*[x.clone() for x in inputs])
        found = torch.compile(model, backend=backend)(*[x.clone() for x in inputs])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12 * max(1.0, float(expected.abs().max())))
    # eager's BatchNorm turns a permuted input into a contiguous result, the fake one (and so what follows) does not
    recorded = backend.gm.graph.output_node().args[0][0].meta["example_value"]
    assert found.stride() == expected.stride() or found.stride() == recorded.stride()
    return backend


class Chain(nn.Module):
    """Layers and functions one after another."""

    def __init__(self, *parts: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList([p for p in parts if isinstance(p, nn.Module)])
        self.parts = [p if not isinstance(p, nn.Module) else None for p in parts]

    def forward(self, x: Tensor) -> Tensor:
        layers = iter(self.layers)
        for part in self.parts:
            x = next(layers)(x) if part is None else part(x)
        return x


def swap(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


AFTER: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1×1": (lambda: Chain(nn.BatchNorm2d(5), nn.Conv2d(5, 7, 1)), (2, 5, 4, 3)),
    "3×3 without padding": (lambda: Chain(nn.BatchNorm2d(6, affine=False), nn.Conv2d(6, 9, 3, 2, groups=3, bias=False)),
                            (2, 6, 8, 7)),
    "depthwise": (lambda: Chain(nn.BatchNorm2d(6), nn.Conv2d(6, 12, 3, dilation=2, groups=6)), (2, 6, 8, 7)),
    "valid": (lambda: Chain(nn.BatchNorm1d(6), nn.Conv1d(6, 5, 3, padding="valid")), (2, 6, 8)),
    "same, one tap": (lambda: Chain(nn.BatchNorm3d(3), nn.Conv3d(3, 5, 1, padding="same")), (2, 3, 2, 3, 4)),
    "linear": (lambda: Chain(nn.BatchNorm1d(5), nn.Linear(5, 7)), (4, 5)),
    "linear of images": (lambda: Chain(nn.BatchNorm2d(5), nn.Flatten(), nn.Dropout(), nn.Linear(5 * 6, 7, bias=False)),
                         (4, 5, 2, 3)),
    "linear of turned images": (lambda: Chain(nn.BatchNorm2d(5), lambda x: x.permute(0, 2, 3, 1).flatten(1), nn.Linear(5 * 6, 7)),
                                (4, 5, 2, 3)),
    "linear of tokens": (lambda: Chain(nn.BatchNorm2d(5), lambda x: x.flatten(2).transpose(1, 2), nn.Linear(5, 7)),
                         (4, 5, 2, 3)),
    "convolution of a view": (lambda: Chain(nn.BatchNorm1d(5), lambda x: x.unsqueeze(-1), nn.Conv2d(5, 3, (3, 1))), (4, 5, 6)),
}  # fmt: skip


@pytest.mark.parametrize("name", AFTER)
def test_into_the_next_layer(name: str) -> None:
    make, size = AFTER[name]
    backend = compare(settle(make()), torch.randn(size, dtype=torch.float64))
    assert backend.fired() == {"bn_conv": 1} and backend.norms() == 0
    before = show(backend.gm)
    _, records = run_passes(backend.gm, "model", None, [], stage="inference", static=range(8))
    assert not any(r.fired for r in records) and show(backend.gm) == before


BEFORE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "tokens to channels": (lambda: Chain(nn.Linear(5, 7), swap, nn.BatchNorm1d(7)), (2, 4, 5)),
    "tokens to rows": (lambda: Chain(nn.Linear(5, 7), lambda x: x.reshape(-1, 7), nn.BatchNorm1d(7)), (2, 4, 5)),
    "and back": (lambda: Chain(nn.Linear(5, 7), swap, nn.BatchNorm1d(7), swap, nn.Linear(7, 3)), (2, 4, 5)),
    "images to points": (lambda: Chain(nn.Conv2d(3, 4, 2), lambda x: torch.flatten(x, 2), nn.BatchNorm1d(4)), (2, 3, 4, 5)),
    "unflattened": (lambda: Chain(nn.Linear(4, 6), lambda x: x.unflatten(0, (2, 3)).permute(0, 2, 1), nn.BatchNorm1d(6)), (6, 4)),
    "transposed 3-d": (lambda: Chain(nn.ConvTranspose3d(2, 4, 2, stride=2, groups=2), nn.BatchNorm3d(4)), (1, 2, 2, 3, 2)),
}  # fmt: skip


@pytest.mark.parametrize("name", BEFORE)
def test_into_the_layer_before_through_views(name: str) -> None:
    make, size = BEFORE[name]
    backend = compare(settle(make()), torch.randn(size, dtype=torch.float64))
    assert backend.fired() == {"conv_bn": 1} and backend.norms() == 0


def test_both_sides_of_one_layer() -> None:
    """Two norms in one weight, made in one go: nothing is kept of what stood between."""
    model = settle(Chain(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6)))
    backend = compare(model, torch.randn(2, 4, 5, 5, dtype=torch.float64))
    assert backend.fired() == {"conv_bn": 1, "bn_conv": 1} and len(backend.weights.derived) == 2
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    other = settle(Chain(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6)))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        for change in (lambda: model.layers[0].running_mean.add_(1), lambda: model.layers[2].weight.mul_(3),
                       lambda: model.load_state_dict(other.state_dict()), lambda: model.load_state_dict(
                           copy.deepcopy(other).state_dict(), assign=True), lambda: model.layers[1].bias.zero_()):  # fmt: skip
            change()
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(torch.compile(other, backend=backend)(x), other(x), rtol=1e-11, atol=1e-11)


def test_dynamic_batch() -> None:
    model = settle(Chain(nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(5 * 6, 7), nn.BatchNorm1d(7)))
    backend = Backend()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        for batch in (4, 9):
            x = torch.randn(batch, 5, 2, 3, dtype=torch.float64)
            torch._dynamo.mark_dynamic(x, 0)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-11, atol=1e-11)
    assert backend.norms() == 0


def test_half_precision() -> None:
    model = settle(Chain(nn.BatchNorm1d(64), nn.Linear(64, 32))).to(torch.bfloat16)
    backend, x = Backend(), torch.randn(16, 64).bfloat16()
    with torch.no_grad():
        found, eager = torch.compile(model, backend=backend)(x), model(x)
        exact = copy.deepcopy(model).double()(x.double())
    assert backend.fired() == {"bn_conv": 1}
    assert (found - exact).norm() <= 2 * (eager - exact).norm()


@pytest.mark.parametrize("affine", [False, True])
def test_large_means_stay(affine: bool) -> None:
    """The folded weights' rounding would be multiplied by the mean; in float64 it does not matter."""
    model = settle(Chain(nn.BatchNorm1d(64, affine=affine), nn.Linear(64, 32)))
    model.layers[0].running_mean.fill_(6)
    x = torch.randn(16, 64, dtype=torch.float64) + 6
    assert compare(copy.deepcopy(model), x).fired() == {"bn_conv": 1}
    for kind in (torch.bfloat16, torch.float32):
        torch._dynamo.reset()
        narrow, given, backend = copy.deepcopy(model).to(kind), x.to(kind), Backend()
        with torch.no_grad():
            found, eager = torch.compile(narrow, backend=backend)(given), narrow(given)
            exact = copy.deepcopy(narrow).double()(given.double())
        reason = "means are large against deviations: the weights' rounding would show"
        assert [r.reason for r in backend.records["bn_conv"].refusals] == [reason]
        assert (found - exact).norm() <= 2 * (eager - exact).norm()


class Vector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn, self.weight = nn.BatchNorm1d(4), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.bn(x), self.weight)


class Twice(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        y = self[0](x)
        return self[1](y) + y.sum()


class WrittenBetween(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        y = self[0](x)
        x.mul_(2)
        return self[1](y)


def padded(x: Tensor) -> Tensor:
    return F.pad(x, (1, 1, 1, 1), mode="reflect")


NEXT_REFUSED: dict[str, tuple[str, Callable[[], nn.Module], tuple[int, ...]]] = {
    "large": ("the zeros of a padding are not normalised, and the image of what they change is large",
        lambda: Chain(nn.BatchNorm2d(4), nn.Conv2d(4, 8, 3, padding=1)), (1, 4, 5, 5)),
    "same": ("the zeros of a padding are not normalised, and sizes are not known",
        lambda: Chain(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding="same")), (1, 4, 5, 5)),
    "readers": ("the normalised value has another reader", lambda: Twice(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)), (1, 4, 5, 5)),
    "batch": ("BatchNorm uses the statistics of the batch",
              lambda: Chain(lambda x: F.batch_norm(x, None, None, training=True), nn.Conv2d(4, 4, 1)), (2, 4, 5, 5)),
    "channels": ("the channels that BatchNorm normalises are not the layer's input channels",
                 lambda: Chain(nn.BatchNorm1d(4), nn.Linear(6, 3)), (2, 4, 6)),
    "torn": ("the channels that BatchNorm normalises are not the layer's input channels",
             lambda: Chain(nn.BatchNorm1d(4), lambda x: x.transpose(1, 2).reshape(2, 4, 6), nn.Conv1d(4, 3, 1)), (2, 4, 6)),
    "written": ("the input is written before the layer reads it",
        lambda: WrittenBetween(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)), (1, 4, 5, 5)),
    "vector": ("the layer is a product with a vector", Vector, (4, 4)),
    "layout": ("BatchNorm changes the layout",
        lambda: Chain(lambda x: x[..., ::2], nn.BatchNorm1d(4), nn.Conv1d(4, 4, 1)), (2, 4, 6)),
}  # fmt: skip


PADDED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "plain": (lambda: nn.Conv2d(4, 4, 3, padding=1), (2, 4, 5, 6)),
    "no bias, strided": (lambda: nn.Conv2d(4, 9, 5, padding=(2, 1), stride=2, bias=False), (2, 4, 7, 8)),
    "dilated groups": (lambda: nn.Conv2d(4, 4, 3, padding=(2, 3), dilation=(2, 3), groups=2), (1, 4, 8, 9)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 13, padding=6, groups=4), (3, 4, 6, 5)),
    "line": (lambda: nn.Conv1d(4, 3, 3, padding=1), (2, 4, 7)),
    "volume": (lambda: nn.Conv3d(4, 2, 3, padding=1), (1, 4, 3, 4, 5)),
}


@pytest.mark.parametrize("name", PADDED)
def test_zeros_of_a_padding_are_an_image_of_their_own(name: str) -> None:
    make, size = PADDED[name]
    norm = {3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(size)]
    model = settle(Chain(norm(4), make()))
    for layout in (torch.contiguous_format, torch.channels_last) if len(size) == 4 else (torch.contiguous_format,):
        torch._dynamo.reset()
        x = torch.randn(size, dtype=torch.float64).contiguous(memory_format=layout)
        assert compare(copy.deepcopy(model), x).fired() == {"bn_conv": 1}
        with torch.no_grad():
            for _ in range(2):  # from the cache, too
                torch._dynamo.reset()
                found = torch.compile(model.double(), backend="fusionc")(x)
                torch.testing.assert_close(found, model(x), rtol=1e-12, atol=1e-12)
                assert found.stride() == model(x).stride()


def test_unknown_sizes_keep_a_padded_convolution() -> None:
    model, backend = settle(Chain(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1))), Backend()
    torch._dynamo.reset()
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    torch._dynamo.mark_dynamic(x, 2)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model.double(), backend=backend)(x), model(x))
    assert backend.fired() == {}


@pytest.mark.parametrize("name", NEXT_REFUSED)
def test_refusals(name: str) -> None:
    reason, make, size = NEXT_REFUSED[name]
    backend = compare(settle(make()), torch.randn(size, dtype=torch.float64))
    assert backend.fired() == {} and [r.reason for r in backend.records["bn_conv"].refusals] == [reason]


@pytest.mark.parametrize("between", [padded, torch.relu, lambda x: x * 2])
def test_not_even_looked_at(between: Callable[[Tensor], Tensor]) -> None:
    model = settle(Chain(nn.BatchNorm2d(4), between, nn.Conv2d(4, 4, 3)))
    assert compare(model, torch.randn(2, 4, 5, 5, dtype=torch.float64)).fired() == {}


def test_gradients_refuse() -> None:
    model, backend = settle(Chain(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))), Backend()
    torch._dynamo.reset()
    torch.compile(model, backend=backend)(torch.randn(1, 4, 5, 5, dtype=torch.float64)).sum().backward()
    assert [r.reason for r in backend.records["bn_conv"].refusals] == ["gradients of the weights are wanted"]
