"""Copies and factors in front of attention: which go, each refusal, values and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusionc.passes.attention_inputs import AttentionInputs
from fusionc.passes.manager import run

SDPA = F.scaled_dot_product_attention
PASS = AttentionInputs(("cpu",))


def heads(x: Tensor) -> Tensor:
    return x.view(2, 5, 3, 8).transpose(1, 2)


def out(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().view(2, 5, 24)


class Backend:
    """Runs the pass on Dynamo's graph and then the graph as it is."""

    def __init__(self, item: AttentionInputs = PASS) -> None:
        self.item, self.record, self.targets = item, None, []  # type: ignore[var-annotated]
        self.scale: Any = None

    def __call__(self, gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        from fusionc.graph import edit

        gm, (self.record,) = run([(1, self.item)], edit.copy_module(gm), "model", None, inputs)
        self.targets = [n.target for n in gm.graph.nodes if n.op in ("call_function", "call_method")]
        calls = gm.graph.find_nodes(op="call_function", target=SDPA)
        self.scale = calls[0].kwargs.get("scale") if calls else None
        return gm.forward

    @property
    def reasons(self) -> list[str]:
        return [refusal.reason for refusal in self.record.refusals]  # type: ignore[attr-defined]


def compare(fn: Callable[..., Tensor], fired: int = 1, item: AttentionInputs = PASS) -> Backend:
    """Same values, strides and gradients as without the pass, in float64."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    inputs = [torch.randn(2, 5, 24, dtype=torch.float64) for _ in range(3)]
    backend = Backend(item)
    mine, other = ([x.clone().requires_grad_() for x in inputs] for _ in range(2))
    found, expected = torch.compile(fn, backend=backend)(*mine), fn(*other)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert found.stride() == expected.stride()
    direction = torch.randn_like(expected)
    found.backward(direction)
    expected.backward(direction)
    for a, b in zip(mine, other):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-9)
    assert backend.record.fired == fired, backend.record  # type: ignore[attr-defined]
    return backend


def test_as_whisper_writes_it() -> None:
    def whisper(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = heads(torch.relu(q) * 8**-0.5).contiguous()
        return out(SDPA(q, heads(k).contiguous(), heads(v).contiguous(), scale=1.0))

    backend = compare(whisper)
    assert backend.targets.count("contiguous") == 1 and backend.scale == 8**-0.5
    assert not {"mul", torch.mul} & set(backend.targets) and all("mul" not in str(t) for t in backend.targets)


@pytest.mark.parametrize("fn, scale", [
    (lambda q, k, v: out(SDPA(heads(3 * q), heads(k), heads(v))), 3 / 8**0.5),
    (lambda q, k, v: out(SDPA(heads(torch.mul(q, 0.5)), heads(k), heads(v), is_causal=True)), 0.5 / 8**0.5),
    (lambda q, k, v: out(SDPA(heads(q), heads(k).contiguous(), heads(v), scale=0.3)), 0.3),
])  # fmt: skip
def test_other_spellings(fn: Callable[..., Tensor], scale: float) -> None:
    assert compare(fn).scale == pytest.approx(scale)


def shared(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k = heads(k).contiguous()
    return out(SDPA(heads(q), k, heads(v)) + k)


def test_a_copy_that_others_read_stays() -> None:
    assert compare(shared).targets.count("contiguous") == 2


def stays(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = heads(q) * 2
    return out(SDPA(s, heads(k), heads(v)) + s)


def nothing(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return out(SDPA(heads(q) * 0.0, heads(k), heads(v)))


def by_tensor(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return out(SDPA(heads(q * v), heads(k), heads(v)))


def twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = heads(q * 3.0)
    return out(SDPA(s, s, heads(v)))


def negative(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return out(SDPA(heads(q * -3.0), heads(k), heads(v)))


@pytest.mark.parametrize("fn", [stays, nothing, by_tensor, twice, negative])
def test_factors_that_stay(fn: Callable[..., Tensor]) -> None:
    assert compare(fn, fired=0).reasons == []


def turned(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k = k.view(2, 3, 8, 5).transpose(2, 3).contiguous()
    return out(SDPA(heads(q), k, heads(v)))


def written(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k = k * 2
    c = heads(k).contiguous()
    k.mul_(0.5)
    return out(SDPA(heads(q), c, heads(v))) + k


def written_copy(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    c = heads(k * 2).contiguous()
    c[:, :, 0] = 0
    return out(SDPA(heads(q), c, heads(v)))


def told(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return SDPA(heads(q).contiguous(), heads(k), heads(v)).as_strided((2, 3, 5, 8), (120, 40, 8, 1)) * 2


def seen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return SDPA(heads(q).contiguous(), heads(k), heads(v))


def wide(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.zeros(5, 5, dtype=torch.float64).requires_grad_()
    return out(SDPA(heads(q).contiguous(), heads(k), heads(v), attn_mask=mask))


@pytest.mark.parametrize("fn, reason", [
    (turned, "the copy puts the last dimension in order"),
    (written, "what it copies, or the copy, is written in place"),
    (written_copy, "what it copies, or the copy, is written in place"),
    (told, "a reader of the result depends on its strides"),
    (seen, "a reader of the result depends on its strides"),
    (wide, "torch would choose a slower kernel"),
])  # fmt: skip
def test_refusals(fn: Callable[..., Tensor], reason: str) -> None:
    assert compare(fn, fired=0).reasons == [reason]


def test_only_where_asked() -> None:
    assert compare(shared, fired=0, item=AttentionInputs()).reasons == []
