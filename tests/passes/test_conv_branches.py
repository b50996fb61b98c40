"""Parallel convolutions merged: blocks of RepVGG, MobileOne, RepLKNet, UniRepLKNet and ACNet; refusals; weights that change."""

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
from tests.passes.model_backend import ModelBackend

CONVOLUTIONS = {torch.conv1d, torch.conv2d, torch.conv3d}


class Backend(ModelBackend):
    @property
    def record(self) -> Any:
        """What conv_branches did."""
        return self.records["conv_branches"]

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


def conv_norm(
    channels: int, out: int, k: int | tuple[int, ...], stride: int = 1, groups: int = 1, dilation: int = 1
) -> nn.Module:
    size = (k, k) if isinstance(k, int) else k
    padding = tuple(dilation * (n - 1) // 2 for n in size)
    return nn.Sequential(
        nn.Conv2d(channels, out, size, stride, padding, dilation, groups, bias=False), nn.BatchNorm2d(out)
    )


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

    def __init__(
        self, channels: int, out: int, kernel: int, stride: int = 1, groups: int = 1, branches: int = 4
    ) -> None:
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
            conv_norm(channels, channels, k, groups=channels, dilation=r)
            for k, r in zip((5, 7, 3, 3, 3), (1, 2, 3, 4, 5))
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


class Sum(nn.Module):
    """A sum written by a function of the layers' results."""

    def __init__(self, layers: list[nn.Module], total: Callable[..., Tensor]) -> None:
        super().__init__()
        self.layers, self.total = nn.ModuleList(layers), total

    def forward(self, x: Tensor) -> Tensor:
        return self.total(x, *self.layers)


def nested(x: Tensor, a: nn.Module, b: nn.Module, c: nn.Module) -> Tensor:
    return (torch.sin(x) + (b(x) + torch.cos(x))).add((c(x) + 0).add_(a(x)))


def test_text_nesting_and_second_run() -> None:
    layers = [
        nn.Conv2d(4, 4, k, padding=p, dilation=d, groups=g) for k, p, d, g in ((5, 2, 1, 2), (3, 2, 2, 2), (1, 0, 1, 4))
    ]
    backend = compare(settle(Sum(layers, nested)), torch.randn(2, 4, 7, 6, dtype=torch.float64))
    text = "\n".join(line.split("  #")[0] for line in show(backend.gm).splitlines() if "= input" not in line)
    assert "torch.conv2d(%l_x_, %derived_0, %derived_1, [1, 1], [2, 2], [1, 1], 2)" in text.replace(
        "(1, 1)", "[1, 1]"
    ).replace("(2, 2)", "[2, 2]"), text
    assert text.count("torch.add") == 2 and backend.count() == 1
    before = show(backend.gm)
    _, records = run_passes(backend.gm, "model", None, [], stage="inference", static=range(7))
    assert all(r.fired == 0 for r in records) and show(backend.gm) == before


def conv(*args: Any, **kwargs: Any) -> nn.Module:
    return nn.Conv2d(*args, **kwargs)


EQUAL: dict[str, tuple[list[Callable[[], nn.Module]], Callable[..., Tensor], tuple[int, ...], int]] = {
    "same padding": ([lambda: conv(3, 5, 5, padding="same"), lambda: conv(3, 5, 3, padding="same", dilation=2)],
                     lambda x, a, b: a(x) + b(x), (2, 3, 7, 8), 1),
    "valid": ([lambda: conv(3, 5, 3), lambda: conv(3, 5, 3, padding="valid", bias=False)], lambda x, a, b: a(x) + b(x),
              (1, 3, 7, 8), 1),
    "one dilation stays": ([lambda: conv(3, 5, 3, padding=4, dilation=4), lambda: conv(3, 5, 1)],
                           lambda x, a, b: torch.add(a(x), b(x)), (1, 3, 9, 8), 1),
    "groups 6, 3 and 1": ([lambda: conv(6, 12, 3, padding=1, groups=g) for g in (6, 3, 1)],
                          lambda x, a, b, c: a(x) + b(x) + c(x), (1, 6, 5, 5), 1),
    "1-d": ([lambda: nn.Conv1d(3, 3, 7, padding=3, groups=3), lambda: nn.Conv1d(3, 3, 3, padding=1, groups=3),
             lambda: nn.BatchNorm1d(3)], lambda x, a, b, c: a(x) + b(x) + c(x) + x, (2, 3, 11), 1),
    "3-d": ([lambda: nn.Conv3d(2, 2, 3, padding=1), lambda: nn.Conv3d(2, 2, 1), lambda: nn.BatchNorm3d(2)],
            lambda x, a, b, c: a(x) + b(x) + c(x), (2, 2, 4, 3, 5), 1),
    "stride 2, even size": ([lambda: conv(3, 4, 3, 2, 1), lambda: conv(3, 4, 1, 2)], lambda x, a, b: a(x) + b(x),
                            (1, 3, 8, 10), 1),
    "one layer twice": ([lambda: conv(3, 4, 3, padding=1)], lambda x, a: a(x) + a(x), (1, 3, 8, 8), 1),
    "one result twice": ([lambda: conv(3, 4, 3, padding=1), lambda: conv(3, 4, 1)],
                         lambda x, a, b: (lambda y: y + y)(a(x)) + b(x), (1, 3, 8, 8), 1),
    "x itself": ([lambda: conv(4, 4, 3, padding=1, groups=4)], lambda x, a: x + a(x), (2, 4, 5, 5), 1),
    "two inputs": ([lambda: conv(4, 4, k, padding=k // 2) for k in (3, 1, 3, 1)],
                   lambda x, a, b, c, d: (lambda y: (a(x) + c(y)) + (b(x) + d(y)))(x.sin()), (2, 4, 5, 5), 2),
    "no saving": ([lambda: conv(4, 4, 3, padding=1), lambda: conv(4, 4, 3, padding=4, dilation=4)],
                  lambda x, a, b: a(x) + b(x), (2, 4, 9, 9), 2),
    "crossed bands": ([lambda: conv(4, 4, (51, 5), padding=(25, 2), groups=4),
                       lambda: conv(4, 4, (5, 51), padding=(2, 25), groups=4),
                       lambda: conv(4, 4, 5, padding=2, groups=4)], lambda x, a, b, c: a(x) + b(x) + c(x), (1, 4, 12, 12), 2),
    "depthwise and dense": ([lambda: conv(4, 4, 3, padding=1, groups=4), lambda: conv(4, 4, 1)], lambda x, a, b: a(x) + b(x),
                            (2, 4, 9, 9), 2),
    "sum after a sum": ([lambda: conv(4, 4, 3, padding=1), lambda: conv(4, 4, 1), lambda: nn.BatchNorm2d(4),
                         lambda: conv(4, 4, 1)],
                        lambda x, a, b, c, d: c(a(x) + b(x)) + d(x), (2, 4, 9, 9), 1),
    "window too short": ([lambda: conv(4, 4, 2, 2), lambda: conv(4, 4, 1, 2)],
                         lambda x, a, b: a(x) + b(x)[..., :4, :4], (1, 4, 9, 9), 2),
    "written in place after": ([lambda: conv(4, 4, 3, padding=1), lambda: conv(4, 4, 1)],
                               lambda x, a, b: (a(x) + b(x)).relu_() + x.mul_(2), (1, 4, 9, 9), 1),
}  # fmt: skip


@pytest.mark.parametrize("name", EQUAL)
def test_equal(name: str) -> None:
    layers, total, size, left = EQUAL[name]
    backend = compare(
        settle(Sum([make() for make in layers], total)), torch.randn(size, dtype=torch.float64), fired=None
    )
    assert backend.count() == left


@pytest.mark.parametrize("stride", [1, 2])
def test_dynamic_sizes(stride: int) -> None:
    model = settle(Sum([conv(3, 4, 3, stride, 1), conv(3, 4, 1, stride)], lambda x, a, b: a(x) + b(x)))
    backend = Backend()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, dynamic=True)
    with torch.no_grad():
        for size in ((2, 3, 8, 9), (5, 3, 11, 6)):
            x = torch.randn(size, dtype=torch.float64)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-12, atol=1e-12)
    assert backend.count() == 1


def write_between(x: Tensor, a: nn.Module, b: nn.Module) -> Tensor:
    y = a(x)
    x.mul_(2)
    return y + b(x)


def add_into_input(x: Tensor, a: nn.Module, b: nn.Module) -> Tensor:
    x += a(x)
    x += b(x)
    return x


def write_addend(x: Tensor, a: nn.Module, b: nn.Module) -> Tensor:
    y = x.sin()
    z = y + a(x)
    y.mul_(3)
    return z + b(x) + y


def write_early_addend(x: Tensor, a: nn.Module, b: nn.Module) -> Tensor:
    y = x.sin()
    z = y + x.cos()
    y.mul_(3)  # before the first branch, after what reads it
    return z + (a(x) + b(x)) + y


def reflect(x: Tensor, a: nn.Module, b: nn.Module) -> Tensor:
    return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), a.weight, a.bias) + b(x)


def used_elsewhere(x: Tensor, a: nn.Module, b: nn.Module) -> Tensor:
    y = b(x)
    return a(x) + y + y.sin()


def batch_statistics(x: Tensor, a: nn.Module, b: nn.Module) -> Tensor:
    return a(x) + F.batch_norm(x, None, None, training=True)


REFUSED: dict[str, tuple[str, Callable[..., Tensor]]] = {
    "write between": ("a value is written between the branches", write_between),
    "write an addend": ("a value is written between the branches", write_addend),
    "write an early addend": ("a value is written between the branches", write_early_addend),
    "computed weight": ("a weight or statistic is no parameter or buffer that stays as it is",
                        lambda x, a, b: a(x) + F.conv2d(x, b.weight * 2)),
    "used elsewhere": ("a branch has another reader", used_elsewhere),
    "batch statistics": ("BatchNorm uses the statistics of the batch", batch_statistics),
    "nothing saved": ("no two branches are one cheaper convolution",
                      lambda x, a, b: a(x) + F.conv2d(x, a.weight, padding=5, dilation=5)),
    "no batch": ("a branch has no batch dimension", lambda x, a, b: (lambda y: a(y) + b(y))(x[0])),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str) -> None:
    reason, total = REFUSED[name]
    model = settle(Sum([conv(4, 4, 3, padding=1), conv(4, 4, 1)], total))
    backend = compare(model, torch.randn(2, 4, 8, 8, dtype=torch.float64), fired=0)
    assert [r.reason for r in backend.record.refusals] == [reason]


@pytest.mark.parametrize("total", [add_into_input, reflect])
def test_not_even_looked_at(total: Callable[..., Tensor]) -> None:
    """The sum is written into memory that others see; the padded image is another input."""
    model = settle(Sum([conv(4, 4, 3, padding=1), conv(4, 4, 1)], total))
    assert compare(model, torch.randn(2, 4, 8, 8, dtype=torch.float64), fired=0).count() == 2


def test_refuses_with_gradients_and_mixed_dtypes() -> None:
    model = Sum(
        [conv(4, 4, 3, padding=1), conv(4, 4, 1), nn.BatchNorm2d(4)], lambda x, a, b, c: a(x) + b(x) + c(x)
    ).eval()
    backend, x = Backend(), torch.randn(2, 4, 5, 5)

    def reasons(model: nn.Module) -> list[str]:
        torch._dynamo.reset()
        torch.compile(model, backend=backend)(x).sum()
        return [r.reason for r in backend.record.refusals]

    assert reasons(model) == ["gradients of the weights are wanted"]
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            assert reasons(Sum([*model.layers[:2]], lambda x, a, b: a(x) + b(x))) == [
                "a branch computes in more than one dtype"
            ]
        assert reasons(model) == []
        assert backend.count() == 1 and backend.record.fired == 1
        assert reasons(model.train()) == []  # the convolutions are merged, the norm stays
        assert backend.count() == 1 and backend.count({F.batch_norm}) == 1


def test_half_precision() -> None:
    """One rounding of the merged weight: no farther from the exact result than eager; x itself is left to the sum."""
    model = settle(nn.Sequential(RepVGG(16, 16), MobileOne(16, 16, 3, groups=16))).to(torch.bfloat16)
    backend, x = Backend(), torch.randn(2, 16, 12, 12).bfloat16()
    torch._dynamo.reset()
    with torch.no_grad():
        found, eager = torch.compile(model, backend=backend)(x), model(x)
        exact = copy.deepcopy(model).double()(x.double())
    assert backend.record.fired == 2 and backend.count() == 2
    assert (found - exact).norm() <= 1.5 * (eager - exact).norm()
    residual = Sum([conv(4, 4, 3, padding=1, groups=4)], lambda x, a: x + a(x)).bfloat16().eval()
    with torch.no_grad():
        torch.compile(residual, backend=backend)(torch.randn(1, 4, 5, 5).bfloat16())
    assert [r.reason for r in backend.record.refusals] == ["no two branches are one cheaper convolution"]


def test_weights_change_afterwards() -> None:
    model, other = settle(UniRepLKNet(3)), settle(UniRepLKNet(3))
    backend, x = Backend(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend)

    def same() -> None:
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-10, atol=1e-10)

    with torch.no_grad():
        same()
        address = [value.data_ptr() for value in backend.weights._last.tensors]
        model.dilated[2][1].running_var.mul_(3)
        same()
        model.after.weight.mul_(-2)
        same()
        model.load_state_dict(other.state_dict())
        same()
        assert [value.data_ptr() for value in backend.weights._last.tensors] == address
        model.load_state_dict(copy.deepcopy(other).state_dict(), assign=True)
        same()
        model.large[0].weight.data = torch.randn_like(model.large[0].weight)
        same()
        model.train()
        model(x)  # eager: moves the statistics
        model.eval()
        same()
        assert len(backend.weights.derived) == 2  # nothing is kept of what stood between


def test_two_instances_share_one_graph() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([RepVGG(4, 4), RepVGG(4, 4)])

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks[1](self.blocks[0](x))

    one, two = settle(Pair()), settle(Pair())
    two.blocks[1] = two.blocks[0]  # one block's weights serve both places
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    for model in (one, two):
        assert compare(model, x, fired=2).count() == 2


@pytest.mark.parametrize("last", [False, True])
def test_the_layout_is_that_of_the_first_addend(last: bool) -> None:
    """compare() checks strides: addends and weights of several layouts, and weights of which torch says the layout by strides."""
    formats = (torch.contiguous_format, torch.channels_last)
    wide, small = conv(4, 4, 3, padding=1), conv(4, 4, 1)
    wide.to(memory_format=torch.channels_last)
    deep = [conv(4, 4, k, padding=k // 2, groups=4).to(memory_format=torch.channels_last) for k in (3, 5)]
    x, y = (torch.randn(2, 4, 6, 7, dtype=torch.float64).contiguous(memory_format=f) for f in (formats[last], formats[not last]))
    compare(settle(Sum([small, wide], lambda x, a, b: a(x) + b(x))), x)
    compare(settle(Sum([nn.BatchNorm2d(4), wide], lambda x, a, b: a(x) + b(x))), x)
    compare(settle(Sum(deep, lambda x, a, b: a(x) + b(x))), x)

    class Addend(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = conv(4, 4, 3, padding=1), conv(4, 4, 1)

        def forward(self, y: Tensor, x: Tensor) -> Tensor:
            return y + self.a(x) + x + self.b(x) + x

    compare(settle(Addend()), y, x)


def test_identity_with_a_symbolic_number_of_channels() -> None:
    model = settle(Sum([conv(4, 4, 3, padding=1), conv(4, 4, 1)], lambda x, a, b: x + a(x) + b(x)))
    assert compare(model, torch.randn(3, 4, 7, 9, dtype=torch.float64), dynamic=True).count() == 1


def test_a_sum_added_to_itself_is_not_taken_apart() -> None:
    def doubled(x: Tensor, a: nn.Module, b: nn.Module) -> Tensor:
        y = a(x) + b(x)
        for _ in range(40):  # 2⁴⁰ addends
            y = y + y
        return y

    model = settle(Sum([conv(4, 4, 3, padding=1), conv(4, 4, 1)], doubled))
    assert compare(model, torch.randn(2, 4, 5, 5, dtype=torch.float64)).count() == 1


def test_recipes_are_checked() -> None:
    backend = compare(settle(RepVGG(4, 4)), torch.randn(2, 4, 5, 5, dtype=torch.float64))
    (weight, _), count = backend.gm.meta["fusionc_derived"], len(backend.gm.meta["fusionc_derived"][0].sources)
    for change in (lambda r: r[1].__setitem__(1, 0), lambda r: r[1][5][0].__setitem__(0, "pool"),
                   lambda r: r[1].__setitem__(6, 1), lambda r: r[1][5][0][4][0].__setitem__(0, 9),
                   lambda r: r[1][5][0].__setitem__(1, [False, True]), lambda r: r[1][5][0].__setitem__(1, [2, 0]),
                   lambda r: r[2].pop(), lambda r: r[2][0][0].__setitem__(0, 99),
                   lambda r: r.__setitem__(3, "int8")):  # fmt: skip
        broken = copy.deepcopy(weight.recipe)
        change(broken)
        with pytest.raises((ValueError, TypeError)):
            recipes.rebuild(broken, count)


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_random_sums(data: st.DataObject) -> None:
    channels, axes = data.draw(st.sampled_from([3, 4, 6])), data.draw(st.integers(1, 2))
    stride = data.draw(st.integers(1, 2))
    kind = nn.Conv1d if axes == 1 else nn.Conv2d
    layers: list[nn.Module] = []
    for _ in range(data.draw(st.integers(2, 4))):
        k = tuple(data.draw(st.sampled_from([1, 3, 5])) for _ in range(axes))
        d = data.draw(st.integers(1, 2))
        layers.append(kind(channels, channels, k, stride, tuple(d * (n - 1) // 2 for n in k), d,
                           data.draw(st.sampled_from([1, channels])), data.draw(st.booleans())))  # fmt: skip
    order = data.draw(st.permutations(range(len(layers))))
    extra = data.draw(st.booleans())

    def total(x: Tensor, *layers: nn.Module) -> Tensor:
        out = layers[order[0]](x)
        for i in order[1:]:
            out = layers[i](x) + out if i % 2 else out + layers[i](x)
        return out + out.detach().shape[0] * 0 + (x.sum() if extra else 0)

    compare(settle(Sum(layers, total)), torch.randn(2, channels, *[9, 8][:axes], dtype=torch.float64), fired=None)
