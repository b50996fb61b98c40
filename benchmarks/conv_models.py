"""Convolutional networks for `benchmarks.gpu --conv-models`: whole models, inference, 64 images of 224 pixels, bfloat16.

Random weights.  Batch norms get the statistics of one batch that went through, each then moved (`settled`): activations stay
finite as in a trained network, and a wrong fold shows.  Networks stand as they are trained, with all their parallel
branches: whether a compiler merges them is part of the question.

A network's rule is the layout in which its best peer is fastest: channels-last, but contiguous where depthwise filters are
large, because cuDNN takes 76 ms for what ATen's contiguous kernel does in 8.5 (31×31).  ``OTHER`` has each network in the other
layout.  timm lacks RepLKNet and UniRepLKNet, so they are written out here with the operators of the authors' code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import models
from .common import Case
from .gpu_workloads import Where, Workload


def _conv(
    given: int, made: int, size: int, stride: int = 1, groups: int = 1, dilation: int = 1, bias: bool = False
) -> nn.Conv2d:
    return nn.Conv2d(given, made, size, stride, dilation * (size // 2), dilation, groups, bias)


def _conv_norm(
    given: int, made: int, size: int, stride: int = 1, groups: int = 1, dilation: int = 1
) -> list[nn.Module]:
    return [_conv(given, made, size, stride, groups, dilation), nn.BatchNorm2d(made)]


class LargeKernelUnit(nn.Module):
    """RepLKNet's block: norm, 1×1, large and 5×5 depthwise in parallel, 1×1, each convolution with a norm; residual."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(width)
        self.first = nn.Sequential(*_conv_norm(width, width, 1), nn.ReLU())
        self.large = nn.Sequential(*_conv_norm(width, width, size, groups=width))
        self.small = nn.Sequential(*_conv_norm(width, width, 5, groups=width))
        self.second = nn.Sequential(*_conv_norm(width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(self.norm(x))
        return x + self.second(F.relu(self.large(y) + self.small(y)))


class ConvFeedForward(nn.Module):
    """RepLKNet's MLP of 1×1 convolutions: norm, 1×1, GELU, 1×1, each convolution with a norm; residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = 4 * width
        self.mlp = nn.Sequential(
            nn.BatchNorm2d(width), *_conv_norm(width, inner, 1), nn.GELU(), *_conv_norm(inner, width, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x)


class RepLKNet(nn.Module):
    """RepLKNet (arXiv 2203.06717) before merging; the default is 31B."""

    def __init__(self, depths: Sequence[int] = (2, 2, 18, 2), widths: Sequence[int] = (128, 256, 512, 1024),
                 sizes: Sequence[int] = (31, 29, 27, 13)) -> None:  # fmt: skip
        super().__init__()
        width = widths[0]
        layers: list[nn.Module] = [*_conv_norm(3, width, 3, 2), nn.ReLU()]
        layers += [*_conv_norm(width, width, 3, 1, width), nn.ReLU(), *_conv_norm(width, width, 1), nn.ReLU()]
        layers += [*_conv_norm(width, width, 3, 2, width), nn.ReLU()]
        for i, (depth, size) in enumerate(zip(depths, sizes)):
            for _ in range(depth):
                layers += [LargeKernelUnit(widths[i], size), ConvFeedForward(widths[i])]
            if i + 1 < len(depths):
                after = widths[i + 1]
                layers += [
                    *_conv_norm(widths[i], after, 1),
                    nn.ReLU(),
                    *_conv_norm(after, after, 3, 2, after),
                    nn.ReLU(),
                ]
        self.features = nn.Sequential(*layers, nn.BatchNorm2d(widths[-1]))
        self.head = nn.Linear(widths[-1], 1000)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.flatten(F.adaptive_avg_pool2d(self.features(x), 1), 1))


class FirstNorm(nn.Module):
    """LayerNorm over the channels of NCHW in plain operators."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        variance = (x - mean).pow(2).mean(1, keepdim=True)
        x = (x - mean) / torch.sqrt(variance + 1e-6)
        return self.weight.view(-1, 1, 1) * x + self.bias.view(-1, 1, 1)


_BRANCHES = {13: ((5, 1), (7, 2), (3, 3), (3, 4), (3, 5))}  # size: (size, dilation) of the parallel branches


class DilatedBranches(nn.Module):
    """UniRepLKNet's dilated re-parameterised block: one large and several dilated depthwise convolutions, each with a norm."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        every = [(size, 1), *_BRANCHES[size]]
        self.branches = nn.ModuleList(nn.Sequential(*_conv_norm(width, width, k, 1, width, r)) for k, r in every)

    def forward(self, x: Tensor) -> Tensor:
        total = self.branches[0](x)
        for branch in self.branches[1:]:
            total = total + branch(x)
        return total


class SqueezeExcite(nn.Module):
    """x · sigmoid(1×1(relu(1×1(mean of x))))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.down, self.up = _conv(width, width // 4, 1, bias=True), _conv(width // 4, width, 1, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.down(F.adaptive_avg_pool2d(x, 1)))
        return x * torch.sigmoid(self.up(y)).view(-1, x.shape[1], 1, 1)


class ResponseNorm(nn.Module):
    """ConvNeXt-V2's global response normalisation of NHWC."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.zeros(1, 1, 1, width)), nn.Parameter(torch.zeros(1, 1, 1, width))
        nn.init.normal_(self.gamma, 0.0, 0.3)
        nn.init.normal_(self.beta, 0.0, 0.1)

    def forward(self, x: Tensor) -> Tensor:
        norm = torch.norm(x, p=2, dim=(1, 2), keepdim=True)
        return (self.gamma * (norm / (norm.mean(dim=-1, keepdim=True) + 1e-6)) + 1) * x + self.beta


class UniUnit(nn.Module):
    """UniRepLKNet's block: depthwise, norm, squeeze-excite, MLP with response norm, norm, layer scale; residual."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.depthwise = DilatedBranches(width, size) if size > 3 else _conv(width, width, size, groups=width)
        self.norm, self.excite = nn.BatchNorm2d(width), SqueezeExcite(width)
        self.up, self.response = nn.Linear(width, 4 * width), ResponseNorm(4 * width)
        self.down, self.last = nn.Linear(4 * width, width, bias=False), nn.BatchNorm2d(width)
        self.gamma = nn.Parameter(torch.full((width,), 0.3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.excite(self.norm(self.depthwise(x)))
        y = self.response(F.gelu(self.up(y.permute(0, 2, 3, 1))))
        y = self.last(self.down(y).permute(0, 3, 1, 2))
        return x + self.gamma.view(1, -1, 1, 1) * y


class UniRepLKNet(nn.Module):
    """UniRepLKNet (arXiv 2311.15599) before merging; the default is T."""

    def __init__(self, depths: Sequence[int] = (3, 3, 18, 3), widths: Sequence[int] = (80, 160, 320, 640)) -> None:
        super().__init__()
        half = widths[0] // 2
        layers: list[nn.Module] = [_conv(3, half, 3, 2, bias=True), FirstNorm(half), nn.GELU(),
                                   _conv(half, widths[0], 3, 2, bias=True), FirstNorm(widths[0])]  # fmt: skip
        for i, (depth, width) in enumerate(zip(depths, widths)):
            if i:
                layers += [_conv(widths[i - 1], width, 3, 2, bias=True), FirstNorm(width)]
            layers += [UniUnit(width, 3 if i == 0 or (i == 2 and j % 2) else 13) for j in range(depth)]
        self.features = nn.Sequential(*layers)
        self.norm, self.head = nn.LayerNorm(widths[-1], eps=1e-6), nn.Linear(widths[-1], 1000)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.features(x).mean([-2, -1])))


# ------------------------------------------------------------------------------------------------------------ workloads


def settled(module: nn.Module, x: Tensor) -> nn.Module:
    """Batch norms with the statistics of ``x`` and random weights; then all statistics somewhat moved. In evaluation mode."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.0)
        nn.init.normal_(norm.bias, 0.0, 0.1)
        norm.momentum = 1.0
    with torch.no_grad():
        if norms:
            module.train()(x)
        for norm in norms:
            mean, variance = norm.running_mean, norm.running_var
            assert mean is not None and variance is not None
            variance.clamp_(
                min=float(variance.mean()) / 8
            )  # a channel that few values happen to leave alone stays small
            variance.mul_(torch.empty_like(variance).uniform_(0.7, 1.4)).add_(1e-3)
            mean.add_(0.1 * variance.sqrt() * torch.randn_like(mean))
    return module.eval()


def network(make: Callable[[Where], nn.Module], last: bool, filters: int = 0) -> Callable[[Where], Case]:
    """``last``: channels-last. ``filters``: size of the largest depthwise filter, if any is large."""

    def build(w: Where) -> Case:
        layout = torch.channels_last if last else torch.contiguous_format
        count, side = w.pick(64, 8, 2), w.pick(224, 224, 64)

        def inputs(s: int) -> tuple[Tensor, ...]:
            return (w.x(count, 3, side, side, seed=s).to(memory_format=layout),)

        with w.building():
            module = models.lively(make(w)).to(memory_format=layout)
            module = settled(module, w.x(w.pick(16, 16, 8), 3, side, side, seed=99).to(memory_format=layout))
        case = Case(module, inputs)
        if w.device == "cuda" and filters > 7:  # ATen's float64 kernels for such filters take tens of seconds
            torch.backends.cudnn.conv.fp32_precision = "ieee"
            case.reference_dtype = torch.float32
        return case

    return build


def _timm(name: str, w: Where) -> nn.Module:
    import timm

    return timm.create_model(name, pretrained=False)


def _convnext(w: Where) -> nn.Module:
    return models.ConvNeXt((1, 1, 1, 1), (8, 16, 16, 16)) if w.tiny else models.ConvNeXt()


def _replknet(w: Where) -> nn.Module:
    return RepLKNet((1, 1, 1, 1), (8, 16, 16, 16), (13, 9, 7, 5)) if w.tiny else RepLKNet()


def _unireplknet(w: Where) -> nn.Module:
    return UniRepLKNet((1, 1, 2, 1), (8, 16, 16, 16)) if w.tiny else UniRepLKNet()


_NETWORKS: tuple[
    tuple[str, Any, bool, int, int], ...
] = (  # name, how to make it, channels-last, largest filter, weight
    ("convnext_tiny", _convnext, True, 0, 2),
    ("replknet_31b", _replknet, False, 31, 5),
    ("unireplknet_t", _unireplknet, False, 13, 5),
    ("inception_next_tiny", partial(_timm, "inception_next_tiny"), True, 0, 3),
    ("fastvit_t12", partial(_timm, "fastvit_t12"), True, 0, 3),
    ("repvit_m1_1", partial(_timm, "repvit_m1_1"), True, 0, 3),
    ("mobileone_s1", partial(_timm, "mobileone_s1"), True, 0, 4),
    ("effnet_b0", partial(_timm, "efficientnet_b0"), True, 0, 3),
)

CONV_MODELS: tuple[Workload, ...] = tuple(
    Workload(name, network(make, last, filters), None, weight) for name, make, last, filters, weight in _NETWORKS
)
OTHER: tuple[Workload, ...] = tuple(
    Workload(f"{name}_{'nchw' if last else 'nhwc'}", network(make, not last, filters), None, weight)
    for name, make, last, filters, weight in _NETWORKS
)
