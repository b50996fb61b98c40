"""Keys of groups: copies of a layer share one, and whatever changes a kernel changes the key."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from fusionc import compiler
from fusionc.config import Config
from fusionc.ir.alike import Alike

x, y = torch.randn(4, 6), torch.randn(4, 6)


def aten(f: Callable[..., object], *args: Tensor) -> GraphModule:
    """The ATen graph of a function, with a fake value on every node."""
    return make_fx(f, tracing_mode="fake")(*args)


def keys(f: Callable[..., object], *args: Tensor) -> list[object]:
    """Node keys of a function's graph, in order."""
    alike = Alike()
    return [alike.node_key(n) for n in aten(f, *args).graph.nodes if n.op == "call_function"]


@pytest.mark.parametrize(
    "f, g, args",
    [
        (lambda a, b: a + 1, lambda a, b: a + 2, None),
        (lambda a, b: a + 1, lambda a, b: a + 1.0, None),
        (lambda a, b: a * 0.0, lambda a, b: a * -0.0, None),
        (lambda a, b: a + True, lambda a, b: a + 1, None),
        (lambda a, b: a.sum(0), lambda a, b: a.sum(1), None),
        (lambda a, b: a + b, lambda a, b: a + b, (x.double(), y.double())),
        (lambda a, b: a + b, lambda a, b: a + b, (x, torch.randn(6, 4).t())),
        (lambda a, b: a + b, lambda a, b: a + b, (x, y[0])),
    ],
)
def test_what_changes_a_kernel_changes_the_key(f: Callable, g: Callable, args: tuple[Tensor, ...] | None) -> None:
    assert keys(f, x, y) == keys(f, x, y)
    assert keys(f, x, y) != keys(g, *(args or (x, y)))


def compiled_groups(f: Callable[..., object], *args: Tensor, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """(groups of f's graph, kernels that were built for them); the results must be eager's."""
    built: list[object] = []
    whole = compiler._build_new
    monkeypatch.setattr(compiler, "_build_new", lambda *a: built.append(a) or whole(*a))
    call, record = compiler.compile_graph(aten(f, *args), args, Config(cache=False, strict=True))
    want = f(*args)
    for got, expected in zip(call(list(args)), want if isinstance(want, tuple) else (want,), strict=True):
        torch.testing.assert_close(got, expected)
    return len(record.groups), len(built)


def test_equal_layers_are_built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    w = torch.randn(6, 6)

    def layers(a: Tensor, w: Tensor) -> Tensor:
        for _ in range(5):
            a = torch.softmax(a @ w, -1) + a
        return a

    groups, built = compiled_groups(layers, x, w, monkeypatch=monkeypatch)
    assert groups == 5 and built == 1


def test_operands_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """a·a, a·b and b·a hang together in different ways although each reads tensors of the same shape."""
    w = torch.randn(6, 6)

    def f(a: Tensor, b: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        one = (a * a).tanh() @ w
        two = (one * b).tanh() @ w
        three = (b - two).tanh() @ w
        return (two - three).tanh(), three

    groups, built = compiled_groups(f, x, y, w, monkeypatch=monkeypatch)
    assert groups == 4 and built == 3  # b − two and two − three are alike


def test_constants_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    w = torch.randn(6, 6)

    def f(a: Tensor, w: Tensor) -> Tensor:
        return torch.relu(torch.relu(a * 2 @ w) * 3 @ w) * 2 @ w

    groups, built = compiled_groups(f, x, w, monkeypatch=monkeypatch)
    assert groups == built == 3
