"""Training through the backend: gradients, accumulation, retained graphs, autocast, dropout seeds, optimizer steps."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)
        self.dropout = dropout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.down(F.gelu(self.up(self.norm(x))))
        return x + F.dropout(h, self.dropout, self.training)


def gradients(model: nn.Module, call, x: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    call(x).square().mean().backward()
    return [p.grad.clone() for p in model.parameters()]


@pytest.fixture
def model() -> Block:
    torch.manual_seed(0)
    return Block()


def test_gradients(model: Block) -> None:
    x = torch.randn(8, 32)
    torch.testing.assert_close(gradients(model, torch.compile(model, backend="fusionc"), x), gradients(model, model, x))


@pytest.mark.parametrize("dynamic", [False, True])
def test_backward_twice_with_retained_graph(model: Block, dynamic: bool) -> None:
    torch._dynamo.reset()
    x = torch.randn(8, 32)
    loss = torch.compile(model, backend="fusionc", dynamic=dynamic)(x).square().mean()
    loss.backward(retain_graph=True)
    first = [p.grad.clone() for p in model.parameters()]
    loss.backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], [2 * g for g in first])


def test_steps_of_an_optimizer(model: Block) -> None:
    twin = copy.deepcopy(model)
    fast = torch.compile(model, backend="fusionc")
    x = torch.randn(8, 32)
    for net, call in ((model, fast), (twin, twin)):
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
        for _ in range(4):
            optimizer.zero_grad()
            call(x).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(list(model.parameters()), list(twin.parameters()), rtol=1e-4, atol=1e-5)


def test_dropout_draws_what_eager_draws() -> None:
    torch.manual_seed(0)
    model = Block(0.5)
    fast = torch.compile(model, backend="fusionc")
    x = torch.randn(8, 32)
    torch.manual_seed(1)
    got = gradients(model, fast, x)
    torch.manual_seed(1)
    torch.testing.assert_close(got, gradients(model, model, x))


def test_autocast(model: Block) -> None:
    x = torch.randn(8, 32)
    fast = torch.compile(model, backend="fusionc")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, want = fast(x), model(x)
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


def test_double_backward_of_the_input(model: Block) -> None:
    """torch refuses higher derivatives of a compiled function; eager's answer or an error, never a wrong number."""
    x = torch.randn(4, 32, requires_grad=True)
    (g,) = torch.autograd.grad(torch.compile(model, backend="fusionc")(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        g.sum().backward()


def test_batch_norm_in_bfloat16() -> None:
    """Its statistics are a tuple made from a cast that no memory holds: such a graph once went to ATen whole."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1))
    x, exact = torch.randn(4, 3, 8, 8).bfloat16(), copy.deepcopy(net).bfloat16().double()
    net.bfloat16()
    eager = copy.deepcopy(net)
    call = torch.compile(net, backend="fusionc", options={"strict": True})
    found, given, wanted = gradients(net, call, x), gradients(eager, eager, x), gradients(exact, exact, x.double())
    for a, b, c in zip(found, given, wanted):
        assert (a - c).norm() <= 2 * (b - c).norm() + 0.005 * c.norm()
    for a, b in zip(net.buffers(), eager.buffers()):
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02)
