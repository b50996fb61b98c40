"""Parallel convolutions merged: the blocks of RepVGG, MobileOne, RepLKNet, UniRepLKNet and ACNet, each refusal, weights that change."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from fusionc.graph.text import show
from fusionc.passes import recipes
from fusionc.passes.manager import run_passes
from fusionc.runtime.weights import DerivedWeights

CONVOLUTIONS = {torch.conv1d, torch.conv2d, torch.conv3d}


class Backend:
    """Runs the model passes on Dynamo's graph and then the graph as it is, derived weights rebuilt from their recipes."""

    def __init__(self) -> None:
        self.gm: Any = None
        self.record: Any = None
        self.weights: Any = None

    def __call__(self, gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        gm, records = run_passes(gm, "model", None, inputs)
        self.gm, self.record = gm, next(r for r in records if r.name == "conv_branches")
        derived = gm.meta.get("fusionc_derived", ())
        self.weights = DerivedWeights(derived)
        for each, value in zip(derived, self.weights.resolve(inputs)):
            node = next(n for n in gm.graph.find_nodes(op="placeholder") if n.target == each.name)
            recorded = node.meta["example_value"]
            assert recorded.shape == value.shape and recorded.stride() == value.stride() and recorded.dtype == value.dtype
            again = recipes.rebuild(each.recipe, len(each.sources))([inputs[i].detach() for i in each.sources])
            assert torch.equal(again, value) and again.stride() == value.stride()
        return lambda *args: gm.forward(*args, *self.weights.resolve(args))

    def count(self, targets: Any = CONVOLUTIONS) -> int:
        """Calls of these functions in the rewritten graph."""
        return sum(node.target in targets for node in self.gm.graph.nodes)


def settle(model: nn.Module) -> nn.Module:
    """Statistics and weights of BatchNorm that are not the identity."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return model.double().eval()


def compare(model: nn.Module, *inputs: Tensor, fired: int | None = 1, dynamic: bool | None = None) -> Backend:
    backend = Backend()
    torch._dynamo.reset()
    with torch.no_grad():
        expected = model(*[x.clone() for x in inputs])
        found = torch.compile(model, backend=backend, dynamic=dynamic)(*[x.clone() for x in inputs])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12 * max(1.0, float(expected.abs().max())))
    assert found.stride() == expected.stride()
    assert fired is None or backend.record.fired == fired, backend.record
    return backend


def conv_norm(channels: int, out: int, k: int | tuple[int, ...], stride: int = 1, groups: int = 1, dilation: int = 1) -> nn.Module:
    size = (k, k) if isinstance(k, int) else k
    padding = tuple(dilation * (n - 1) // 2 for n in size)
    return nn.Sequential(nn.Conv2d(channels, out, size, stride, padding, dilation, groups, bias=False), nn.BatchNorm2d(out))


class RepVGG(nn.Module):
    """3×3, 1×1 and, where shapes allow, identity, each with its BatchNorm."""

    def __init__(self, channels: int, out: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.dense, self.point = (conv_norm(channels, out, k, stride, groups) for k in (3, 1))
        self.skip = nn.BatchNorm2d(channels) if channels == out and stride == 1 else None

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.dense(x) + self.point(x) + (0 if self.skip is None else self.skip(x)))


class MobileOne(nn.Module):
    """k over-parameterised branches, a 1×1 scale branch and a skip branch, summed one after another in place."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int = 1, groups: int = 1, branches: int = 4) -> None:
        super().__init__()
        self.skip = nn.BatchNorm2d(channels) if channels == out and stride == 1 else None
        self.scale = conv_norm(channels, out, 1, stride, groups) if kernel > 1 else None
        self.branches = nn.ModuleList(conv_norm(channels, out, kernel, stride, groups) for _ in range(branches))

    def forward(self, x: Tensor) -> Tensor:
        out: Any = 0 if self.scale is None else self.scale(x)
        if self.skip is not None:
            out = out + self.skip(x)
        for branch in self.branches:
            out += branch(x)
        return F.relu(out)


class RepLKNet(nn.Module):
    """1×1, large and small depthwise kernel, 1×1, BatchNorm in front, and a shortcut."""

    def __init__(self, channels: int, kernel: int, small: int) -> None:
        super().__init__()
        self.before = nn.BatchNorm2d(channels)
        self.enter, self.leave = conv_norm(channels, channels, 1), conv_norm(channels, channels, 1)
        self.large, self.small = (conv_norm(channels, channels, k, groups=channels) for k in (kernel, small))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.enter(self.before(x)))
        out = self.large(y)
        out += self.small(y)
        return x + self.leave(F.relu(out))


class UniRepLKNet(nn.Module):
    """A large kernel and several dilated ones, BatchNorm after each and after the sum, scale by SE is left out."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.large = conv_norm(channels, channels, 13, groups=channels)
        self.dilated = nn.ModuleList(
            conv_norm(channels, channels, k, groups=channels, dilation=r) for k, r in zip((5, 7, 3, 3, 3), (1, 2, 3, 4, 5))
        )
        self.after = nn.BatchNorm2d(channels)
        self.wide, self.narrow = nn.Conv2d(channels, 4 * channels, 1), nn.Conv2d(4 * channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        out = self.large(x)
        for each in self.dilated:
            out = out + each(x)
        return x + self.narrow(F.gelu(self.wide(self.after(out))))


class AsymmetricBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(conv_norm(channels, channels, k) for k in ((3, 3), (1, 3), (3, 1)))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(sum(branch(x) for branch in self.branches))


BLOCKS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {  # model, channels of the input, convolutions left
    "RepVGG": (lambda: nn.Sequential(RepVGG(3, 8, 2), RepVGG(8, 8), RepVGG(8, 8, groups=4), RepVGG(8, 12, 2)), 3, 4),
    "MobileOne": (lambda: nn.Sequential(MobileOne(3, 8, 3, 2), MobileOne(8, 8, 3, groups=8), MobileOne(8, 7, 1),
                                        MobileOne(7, 7, 3, 2, groups=7), MobileOne(7, 7, 1)), 3, 5),
    "RepLKNet": (lambda: nn.Sequential(RepLKNet(6, 13, 5), RepLKNet(6, 31, 5)), 6, 6),
    "UniRepLKNet": (lambda: nn.Sequential(UniRepLKNet(5), UniRepLKNet(5)), 5, 6),
    "ACNet": (lambda: AsymmetricBlock(6), 6, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("last", [False, True])
def test_deploy_form(name: str, last: bool) -> None:
    make, channels, left = BLOCKS[name]
    layout = torch.channels_last if last else torch.contiguous_format
    x = torch.randn(2, channels, 17, 15, dtype=torch.float64).to(memory_format=layout)
    backend = compare(settle(make()).to(memory_format=layout), x, fired=None)
    assert backend.count() == left and backend.record.fired > 0
    if name != "RepLKNet":  # its first BatchNorm goes into the 1×1 convolution: norm_conv's work
        assert backend.count({F.batch_norm}) == 0
