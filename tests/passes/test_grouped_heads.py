"""Repeated heads of keys and values: each spelling, each refusal, values and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusionc.graph.text import show
from fusionc.passes import sdpa
from fusionc.passes.grouped_heads import GroupedHeads
from fusionc.passes.manager import run, run_passes

SDPA = F.scaled_dot_product_attention
SPELLINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "repeat_kv": lambda x: x[:, :, None, :, :].expand(2, 2, 3, x.shape[2], 8).reshape(2, 6, x.shape[2], 8),
    "short": lambda x: x[:, :, None].expand(-1, -1, 3, -1, -1).reshape(2, -1, x.shape[2], 8),
    "unsqueeze": lambda x: x.unsqueeze(2).expand(2, 2, 3, x.shape[2], 8).reshape(2, 6, x.shape[2], 8),
    "interleave": lambda x: x.repeat_interleave(3, dim=1),
    "function": lambda x: torch.repeat_interleave(x, 3, dim=-3),
}
repeat = SPELLINGS["repeat_kv"]


class Backend:
    """Runs the model passes on Dynamo's graph and then the graph as it is."""

    def __init__(self) -> None:
        self.gm: Any = None
        self.record: Any = None

    def __call__(self, gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        gm, records = run_passes(gm, "model", None, inputs)
        self.gm, self.record = gm, next(r for r in records if r.name == "grouped_heads")
        return gm.forward


def compare(fn: Callable[..., Tensor], *inputs: Tensor, fired: int = 1, dynamic: bool = False) -> Backend:
    """Same values and gradients as without the pass, in float64."""
    backend = Backend()
    torch._dynamo.reset()
    mine, other = ([x.clone().requires_grad_() for x in inputs] for _ in range(2))
    found, expected = torch.compile(fn, backend=backend, dynamic=dynamic)(*mine), fn(*other)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    direction = torch.randn_like(expected)
    found.backward(direction)
    expected.backward(direction)
    for a, b in zip(mine, other):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-9)
    assert backend.record.fired == fired, backend.record
    return backend


def qkv(n: int = 5, heads: int = 6, groups: int = 2) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, count, n, 8, dtype=torch.float64) for count in (heads, groups, groups)]


def reasons(backend: Backend) -> list[str]:
    return [refusal.reason for refusal in backend.record.refusals]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", SPELLINGS)
def test_each_spelling(name: str, dynamic: bool) -> None:
    more = SPELLINGS[name]
    backend = compare(lambda q, k, v: SDPA(q, more(k), more(v), is_causal=True, scale=0.2), *qkv(), dynamic=dynamic)
    text = "\n".join(line.split("  #")[0] for line in show(backend.gm).splitlines())
    assert "is_causal=True, scale=0.2, enable_gqa=True)" in text and "expand" not in text and "interleave" not in text


def test_after_the_mask_went_and_second_run() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i = torch.arange(q.shape[2])
        return SDPA(q, repeat(k), repeat(v), attn_mask=i[:, None] >= i)

    backend = compare(fn, *qkv())
    before = show(backend.gm)
    _, (record,) = run([(4, GroupedHeads())], backend.gm, "model", None)
    assert record.fired == 0 and show(backend.gm) == before


def test_repeated_keys_with_another_reader_stay() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        more = repeat(k)
        return SDPA(q, more, repeat(v)) * more.sum()

    assert show(compare(fn, *qkv()).gm).count("expand(") == 1


NOT_REPEATED: dict[str, Callable[[Tensor], Tensor]] = {
    "tiled": lambda x: x.repeat(1, 3, 1, 1),
    "head after head": lambda x: x[:, None].expand(2, 3, 2, x.shape[2], 8).reshape(2, 6, x.shape[2], 8),
    "positions": lambda x: x[:, :, None].expand(2, 2, 3, 5, 8).reshape(2, 2, 15, 8).repeat(1, 3, 1, 1),
    "interleaved positions": lambda x: x.repeat_interleave(3, dim=2).repeat(1, 3, 1, 1),
}


@pytest.mark.parametrize("name", NOT_REPEATED)
def test_other_rearrangements_stay(name: str) -> None:
    more = NOT_REPEATED[name]
    backend = compare(lambda q, k, v: SDPA(q, more(k), more(v)), *qkv(), fired=0)
    assert reasons(backend) == []


REFUSED: dict[str, tuple[Callable[..., Tensor], str]] = {
    "a mask or dropout: kernels that group heads may not take it": (
        lambda q, k, v: SDPA(q, repeat(k), repeat(v), attn_mask=q[..., :5] > -9), ""),
    "heads are grouped on top of the repetition": (
        lambda q, k, v: SDPA(torch.cat([q, q], 1), repeat(k), repeat(v), enable_gqa=True), ""),
    "queries, keys and values differ in heads": (
        lambda q, k, v: SDPA(q, repeat(k), v[:, :1].repeat_interleave(6, dim=1)), ""),
}  # fmt: skip


@pytest.mark.parametrize("reason", REFUSED)
def test_refusals(reason: str) -> None:
    assert reasons(compare(REFUSED[reason][0], *qkv(), fired=0)) == [reason]


def test_refuses_what_is_written() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k = k * 1
        more = repeat(k)
        k.mul_(2)
        return SDPA(q, more, repeat(v))

    assert reasons(compare(fn, *qkv(), fired=0)) == ["the repeated tensor is written in place"]


@pytest.mark.parametrize(
    ("ranks", "reason"),
    [
        ((2, 1), "torch has no fused kernel that groups these heads"),
        ((0, 0), "torch has no fused kernel that groups these heads"),
        (None, "torch cannot choose a kernel: RuntimeError"),
    ],
)
def test_refuses_by_torchs_choice(ranks: tuple[int, int] | None, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = sdpa.Probe.__call__

    def probe(self: Any, given: Any) -> Any:
        if ranks is None:
            raise RuntimeError("no")
        return ranks[given["enable_gqa"]], plain(self, given)[1]

    monkeypatch.setattr(sdpa.Probe, "__call__", probe)
    assert reasons(compare(lambda q, k, v: SDPA(q, repeat(k), repeat(v)), *qkv(), fired=0)) == [reason]


def test_refuses_readers_of_strides(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = sdpa.Probe.__call__

    def probe(self: Any, given: Any) -> Any:
        rank, result = plain(self, given)
        return rank, result.contiguous() if given["enable_gqa"] else result

    monkeypatch.setattr(sdpa.Probe, "__call__", probe)
    inputs = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv()]
    backend = compare(lambda q, k, v: SDPA(q, repeat(k), repeat(v)).transpose(1, 2).view(2, 5, 48), *inputs, fired=0)
    assert reasons(backend) == ["a reader of the result depends on its strides"]
