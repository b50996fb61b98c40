"""Head and loss as one operator: spellings of models, Hugging Face, each refusal, values through the whole compiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusionc
from fusionc.graph.text import show
from fusionc.passes.linear_cross_entropy import LinearCrossEntropy
from fusionc.passes.manager import run, static_inputs

PASS = LinearCrossEntropy(("cpu",), least=0)


class Backend:
    """Runs the pass on Dynamo's graph and then the graph as it is."""

    def __call__(self, gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        from fusionc.graph.edit import copy_module

        gm = copy_module(gm)
        static = static_inputs(inputs)
        gm, (self.record,) = run([(1, PASS)], gm, "model", None, inputs, stage="forward", static=static)
        self.gm, before = gm, show(gm)
        _, (again,) = run([(1, PASS)], gm, "model", None, inputs, stage="forward", static=static)
        assert again.fired == 0 and show(gm) == before
        return gm


class Head(nn.Module):
    def __init__(self, loss: Callable[..., Tensor], bias: bool = False, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.head, self.loss = nn.Linear(8, 11, bias=bias, dtype=dtype), loss

    def forward(self, x: Tensor, target: Tensor) -> Any:
        return self.loss(self.head, x, target)


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    return (
        torch.randn(2, 6, 8, generator=rng, dtype=torch.float64).to(dtype).requires_grad_(),
        torch.randint(11, (2, 6), generator=rng),
    )


def seen(loss: Callable[..., Any], bias: bool = False, dtype: torch.dtype = torch.float64) -> Backend:
    """Loss and gradients as in eager; returns what the pass did."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, backend = Head(loss, bias, dtype), Backend()
    x, target = inputs(dtype)
    wanted = [x, *model.parameters()]
    expected = model(x, target)
    found = torch.compile(model, backend=backend)(x, target)
    torch.testing.assert_close(found, expected)
    if isinstance(found, Tensor) and found.dim() == 0 and found.requires_grad:
        torch.testing.assert_close(torch.autograd.grad(found * 2, wanted), torch.autograd.grad(expected * 2, wanted))
    return backend


def shifted(head: Any, x: Tensor, target: Tensor) -> Tensor:
    logits = head(x).float()
    return F.cross_entropy(logits[..., :-1, :].contiguous().view(-1, 11), target[..., 1:].contiguous().view(-1))


SPELLINGS: dict[str, Callable[..., Tensor]] = {
    "reshape": lambda head, x, t: F.cross_entropy(head(x).reshape(-1, 11), t.flatten()),
    "view of a tuple": lambda head, x, t: F.cross_entropy(head(x).view((12, -1)), t.view(-1), reduction="sum"),
    "flatten": lambda head, x, t: F.cross_entropy(head(x).flatten(0, 1), t.flatten(), ignore_index=3),
    "cut": lambda head, x, t: F.cross_entropy(
        head(x)[:, :-1].reshape(-1, 11), t[:, 1:].reshape(-1), label_smoothing=0.1
    ),
    "before": lambda head, x, t: F.cross_entropy(head(x.view(-1, 8)), t.view(-1)),
    "matmul": lambda head, x, t: F.cross_entropy((x @ head.weight.t()).view(-1, 11), t.view(-1)),
    "T": lambda head, x, t: F.cross_entropy(torch.matmul(x, head.weight.T).view(-1, 11), t.view(-1)),
    "transpose": lambda head, x, t: F.cross_entropy(x.view(-1, 8).mm(head.weight.transpose(0, 1)), t.view(-1)),
    "to": lambda head, x, t: F.cross_entropy(head(x).to(x.dtype).view(-1, 11), t.view(-1)),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name: str) -> None:
    assert seen(SPELLINGS[name], bias=name in ("reshape", "cut")).record.fired == 1


def test_text() -> None:
    backend = seen(shifted, dtype=torch.float32)
    assert backend.record.fired == 1
    lines = [line.split("  #")[0] for line in show(backend.gm).splitlines()]
    assert lines[-4:-1] == [
        "%reshape: f32[10, 8] = torch.reshape(%getitem_2, (-1, 8))",
        "%linear_cross_entropy: (f32[], f32[10, 8], f32[11, 8], f32[0]) = fusionc.linear_cross_entropy(%reshape, "
        "%l_self_modules_head_parameters_weight_, None, %view_1, -100, True, 0.0, torch.float32, [True, True, False])",
        "%getitem_3: f32[] = getitem(%linear_cross_entropy, 0)",
    ], "\n".join(lines)


def test_bfloat16_and_frozen_head() -> None:
    def loss(head: Any, x: Tensor, t: Tensor) -> Tensor:
        return (
            F.cross_entropy(F.linear(x, head.weight.detach()).float().view(-1, 11), t.view(-1)) + 0 * head.weight.sum()
        )

    backend = seen(loss, dtype=torch.bfloat16)
    assert backend.record.fired == 1 and "torch.float32, [True, False, False]" in show(backend.gm)


@torch.no_grad()
def written(head: Any, x: Tensor, target: Tensor) -> Tensor:
    logits = head(x).view(-1, 11)
    x.mul_(2)
    return F.cross_entropy(logits, target.view(-1))


REFUSED: dict[str, Callable[..., Any]] = {
    "class weights": lambda head, x, t: F.cross_entropy(
        head(x).view(-1, 11), t.view(-1), weight=torch.ones(11).double()
    ),
    "old reduction arguments": lambda head, x, t: F.cross_entropy(head(x).view(-1, 11), t.view(-1), reduce=True),
    "a view of the logits to another dtype": lambda head, x, t: F.cross_entropy(
        head(x).view(torch.float64).view(-1, 11), t.view(-1)
    ),
    "the weight is not a matrix of fixed size": lambda head, x, t: F.cross_entropy(
        F.linear(x, head.weight[0])[:, :, None].view(-1, 1), 0 * t.view(-1)
    ),
    "one loss for each token: its gradient is not known before the backward": lambda head, x, t: F.cross_entropy(
        head(x).view(-1, 11), t.view(-1), reduction="none"
    ),
    "the logits have another reader": lambda head, x, t: (lambda y: (F.cross_entropy(y.view(-1, 11), t.view(-1)), y))(
        head(x)
    ),
    "the targets are not int64": lambda head, x, t: F.cross_entropy(
        head(x).view(-1, 11), F.one_hot(t, 11).double().view(-1, 11)
    ),
    "the words are not the last of two dimensions": lambda head, x, t: F.cross_entropy(
        head(x).view(6, 2, 11), t.new_zeros(6, 11)
    ),
    "a view cuts or mixes the words": lambda head, x, t: F.cross_entropy(
        head(x)[..., :10].reshape(-1, 10), t.view(-1) % 10
    ),
    "the logits are indexed": lambda head, x, t: F.cross_entropy(head(x)[0], t[0]),
    "the logits are rounded or widened to float64 before the loss": lambda head, x, t: F.cross_entropy(
        head(x).float().view(-1, 11), t.view(-1)
    ),
    "memory of an operand is written before the loss is taken": lambda head, x, t: written(head, x.detach().clone(), t),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refusals(reason: str) -> None:
    record = seen(REFUSED[reason]).record
    assert record.fired == 0 and [each.reason for each in record.refusals] == [reason]


def test_more_refusals() -> None:
    record = seen(lambda head, x, t: F.cross_entropy(head(x).view(-1, 11), t.view(-1)), dtype=torch.float16).record
    assert [each.reason for each in record.refusals] == ["float16 gradients would lose the loss scale"]
    global PASS
    default, PASS = PASS, LinearCrossEntropy(("cpu",))
    try:
        assert seen(SPELLINGS["before"]).record.refusals[0].reason == "the logits are small"
        PASS = LinearCrossEntropy()
        assert seen(SPELLINGS["before"]).record.refusals[0].reason == "not on a CUDA device"
    finally:
        PASS = default


def compiled(model: nn.Module) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend="fusionc", options={"passes": [PASS], "cache": False})


def fired() -> int:
    return max(p.fired for record in fusionc.report()[-2:] for p in record.passes if p.name == PASS.name)


def test_hugging_face() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=33,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).train()
    ids = torch.randint(33, (2, 8))
    more = {"num_items_in_batch": torch.tensor(5)}  # sum / 5 instead of the mean
    wanted = list(model.parameters())
    expected = torch.autograd.grad(model(input_ids=ids, labels=ids, **more).loss, wanted)
    step = compiled(fusionc.loss_only(model))
    for _ in range(2):  # the gradient handed out by the first step is not the second's
        found = torch.autograd.grad(step(input_ids=ids, labels=ids, **more), wanted)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert fired() == 1


def test_whole_compiler() -> None:
    torch.manual_seed(0)
    model = Head(SPELLINGS["before"], True)
    x, target = inputs()
    wanted = [x, *model.parameters()]
    expected = torch.autograd.grad(model(x, target), wanted)
    step = compiled(model)
    loss = step(x, target)
    assert fired() == 1
    for factor in (1.0, 3.0):
        found = torch.autograd.grad(loss * factor, wanted, retain_graph=True)
        torch.testing.assert_close(found, tuple(g * factor for g in expected))
    loss.backward()
    torch.testing.assert_close([p.grad for p in wanted], list(expected))
    with torch.no_grad():
        torch.testing.assert_close(step(x, target), model(x, target))


def test_autocast() -> None:
    torch.manual_seed(0)
    model = Head(lambda head, x, t: F.cross_entropy(head(x).float().view(-1, 11), t.view(-1)), dtype=torch.float32)
    x, target = inputs(torch.float32)
    wanted = [x, *model.parameters()]
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(x, target)
        found = compiled(model)(x, target)
    assert fired() == 1 and found.dtype == torch.float32
    torch.testing.assert_close(found, expected)
    got, base = torch.autograd.grad(found, wanted), torch.autograd.grad(expected, wanted)
    torch.testing.assert_close(got, base, rtol=2e-2, atol=1e-3)


def test_loss_only() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return x.sum(), x

    class Nothing(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return {"logits": x, "loss": None}

    x = torch.ones(3)
    assert fusionc.loss_only(Two())(x) == 3
    with pytest.raises(ValueError, match="returned no loss"):
        fusionc.loss_only(Nothing())(x)
