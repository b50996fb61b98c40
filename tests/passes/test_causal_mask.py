"""Masks that are proved causal or empty: each spelling, each refusal, values and gradients, hazards of attention."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusionc.graph.text import show
from fusionc.passes.causal_mask import CausalMask
from fusionc.passes.manager import run, run_passes

SDPA = F.scaled_dot_product_attention
LOW = torch.finfo(torch.float32).min


class Backend:
    """Runs the pass on Dynamo's graph and then the graph as it is."""

    def __init__(self) -> None:
        self.gm: Any = None
        self.record: Any = None
        self.inputs: Any = None

    def __call__(self, gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        gm, records = run_passes(gm, "model", None, inputs)
        self.gm, self.record, self.inputs = gm, next(r for r in records if r.name == "causal_mask"), inputs
        return gm.forward

    @property
    def masks(self) -> list[tuple[Any, Any]]:
        """(attn_mask, is_causal) of each attention call after the pass."""
        calls = self.gm.graph.find_nodes(op="call_function", target=SDPA)
        return [(n.kwargs.get("attn_mask", n.args[3] if len(n.args) > 3 else None), n.kwargs.get("is_causal", False))
                for n in calls]  # fmt: skip

    @property
    def reasons(self) -> list[str]:
        return [refusal.reason for refusal in self.record.refusals]


def compare(fn: Callable[..., Tensor], *inputs: Any, fired: int = 1, dynamic: bool = False) -> Backend:
    """Same values and gradients as without the pass, in float64."""
    backend = Backend()
    torch._dynamo.reset()
    mine = [x.clone().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]
    other = [x.clone().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]
    found, expected = torch.compile(fn, backend=backend, dynamic=dynamic)(*mine), fn(*other)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9, equal_nan=True)
    direction = torch.randn_like(expected)
    found.backward(direction)
    expected.backward(direction)
    for a, b in zip(mine, other):
        if isinstance(a, Tensor) and a.is_floating_point():
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-9, equal_nan=True)
    assert backend.record.fired == fired, backend.record
    return backend


def qkv(n: int = 5, m: int | None = None, batch: int = 2, heads: int = 3) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(batch, heads, size, 8, dtype=torch.float64) for size in (n, m or n, m or n)]


def row(q: Tensor) -> Tensor:
    return torch.arange(q.shape[-2])[:, None]


def column(k: Tensor) -> Tensor:
    return torch.arange(k.shape[-2])[None, :]


def packed(q: Tensor, k: Tensor) -> Tensor:
    """As Hugging Face writes it when no mask is given: positions in sequence, one sequence only, causal."""
    position = (torch.arange(q.shape[2]) + 0).unsqueeze(0).expand(q.shape[0], -1)
    sequence = (torch.diff(position, prepend=position[:, :1] - 1, dim=-1) != 1).cumsum(-1)
    batch = torch.arange(q.shape[0])[:, None, None, None]
    i, j = torch.arange(q.shape[2])[None, None, :, None], torch.arange(k.shape[2])[None, None, None, :]
    seen = i.new_ones((), dtype=torch.bool) & (j <= i) & (sequence[batch, i] == sequence[batch, j])
    return seen.expand(q.shape[0], -1, q.shape[2], k.shape[2])


def triangle(q: Tensor, k: Tensor) -> Tensor:
    low = torch.full((q.shape[2], k.shape[2]), torch.finfo(q.dtype).min, dtype=q.dtype)
    return torch.triu(low, diagonal=1)[None, None].expand(q.shape[0], 1, -1, -1)


CAUSAL: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "packed": packed,
    "triu of the lowest": triangle,
    "greater": lambda q, k: row(q) >= column(k),
    "not above": lambda q, k: ~(column(k) > row(q)),
    "tril": lambda q, k: torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(),
    "-inf": lambda q, k: torch.zeros(q.shape[2], k.shape[2], dtype=q.dtype).masked_fill(column(k) > row(q), -torch.inf),
    "where": lambda q, k: torch.where(column(k) <= row(q), torch.tensor(0.0, dtype=q.dtype), torch.finfo(q.dtype).min),
    "methods": lambda q, k: row(q).__ge__(column(k)).__and__(row(q).__eq__(row(q))).__invert__().__invert__(),
    "inverted": lambda q, k: (1.0 - (column(k) <= row(q)).to(q.dtype)) * -1e9,
    "by head": lambda q, k: (column(k) <= row(q)).expand(q.shape[0], q.shape[1], -1, -1),
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", CAUSAL)
def test_causal(name: str, dynamic: bool) -> None:
    backend = compare(lambda q, k, v: SDPA(q, k, v, attn_mask=CAUSAL[name](q, k)), *qkv(), dynamic=dynamic)
    assert backend.masks == [(None, True)]
    assert not any("arange" in str(node.target) or "full" in str(node.target) for node in backend.gm.graph.nodes)


def test_wide_window_is_causal() -> None:
    backend = compare(lambda q, k, v: SDPA(q, k, v, (column(k) <= row(q)) & (column(k) > row(q) - 5)), *qkv())
    assert backend.masks == [(None, True)]


EMPTY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "expanded": lambda q, k: (row(q)[None, None] >= 0).expand(q.shape[0], -1, q.shape[2], k.shape[2]),
    "ones": lambda q, k: torch.ones(q.shape[2], k.shape[2], dtype=torch.bool),
    "zeros": lambda q, k: torch.zeros(q.shape[2], k.shape[2], dtype=q.dtype),
    "all before": lambda q, k: column(k) <= row(q) + k.shape[2] - 1,
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", EMPTY)
def test_empty(name: str, dynamic: bool) -> None:
    backend = compare(lambda q, k, v: SDPA(q, k, v, attn_mask=EMPTY[name](q, k)), *qkv(5, 7), dynamic=dynamic)
    assert backend.masks == [(None, False)]


def test_one_query_after_a_cache() -> None:
    """A growing cache: the only query is the last position and sees all keys."""

    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return SDPA(q, k, v, attn_mask=column(k) <= row(q) + k.shape[2] - q.shape[2])

    for dynamic in (False, True):
        assert compare(step, *qkv(1, 7), dynamic=dynamic).masks == [(None, False)]


def test_text_and_second_run() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen = row(q) >= column(k)
        return SDPA(q, k, v, attn_mask=seen, dropout_p=0.0, scale=0.3, is_causal=False) + SDPA(q, k, q, seen)

    backend = compare(fn, *qkv(), fired=2)
    text = [line.split("  #")[0].replace("torch._C._nn.", "").replace("torch.nn.functional.", "")
            for line in show(backend.gm).splitlines()]  # fmt: skip
    assert text[3:] == [
        "%scaled_dot_product_attention_2: f64[2, 3, 5, 8] = "
        "scaled_dot_product_attention(%l_q_, %l_k_, %l_v_, is_causal=True, scale=0.3)",
        "%scaled_dot_product_attention_3: f64[2, 3, 5, 8] = "
        "scaled_dot_product_attention(%l_q_, %l_k_, %l_q_, is_causal=True)",
        "%add: f64[2, 3, 5, 8] = operator.add(%scaled_dot_product_attention_2, %scaled_dot_product_attention_3)",
        "return (%add)",
    ]
    before = show(backend.gm)
    _, (record,) = run([(3, CausalMask())], backend.gm, "model", None, backend.inputs)
    assert record.fired == 0 and show(backend.gm) == before


def test_mask_with_another_reader_stays() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen = row(q) >= column(k)
        return SDPA(q, k, v, attn_mask=seen) * seen.sum()

    assert "sum" in show(compare(fn, *qkv()).gm)


REFUSED: dict[str, tuple[Callable[..., Tensor], str]] = {
    "window": (lambda q, k: (column(k) <= row(q)) & (column(k) > row(q) - 3), "the mask is neither causal nor empty"),
    "first row masked": (lambda q, k: column(k) < row(q), "the mask is neither causal nor empty"),
    "first row lowest": (
        lambda q, k: torch.where(column(k) < row(q), 0.0, LOW).to(q.dtype),
        "the mask is neither causal nor empty",
    ),
    "all masked": (lambda q, k: column(k) < 0, "the mask is neither causal nor empty"),
    "reversed": (lambda q, k: column(k) >= row(q), "the mask is neither causal nor empty"),
    "penalty": (lambda q, k: torch.where(column(k) <= row(q), 0.0, -1e4).to(q.dtype), "it adds other numbers"),
    "bias": (lambda q, k: (column(k) - row(q)).to(q.dtype), "positions in torch.float64"),
    "padding": (lambda q, k: (column(k) <= row(q)) & (k[:, :1, None, :, 0] > -9), "it depends on data"),
    "position": (lambda q, k: column(k) <= q[0, 0, 0, 0].long() + 2, "it depends on data"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_masks(name: str) -> None:
    make, reason = REFUSED[name]
    backend = compare(lambda q, k, v: SDPA(q, k, v, attn_mask=make(q, k)), *qkv(), fired=0)
    assert any(reason in found for found in backend.reasons), backend.reasons


def test_refuses_unequal_lengths() -> None:
    """torch's flag is aligned to the upper left: j ≤ i is that, but flash kernels take no such flag for n ≠ m."""
    backend = compare(lambda q, k, v: SDPA(q, k, v, attn_mask=row(q) >= column(k)), *qkv(4, 6), fired=0)
    assert backend.reasons == ["queries and keys differ in number"]
    backend = compare(lambda q, k, v: SDPA(q, k, v, attn_mask=row(q) + 2 >= column(k)), *qkv(4, 6), fired=0)
    assert backend.reasons == ["the mask is neither causal nor empty"]


def test_symbolic_lengths_that_may_differ() -> None:
    backend = compare(lambda q, k, v: SDPA(q, k, v, attn_mask=row(q) >= column(k)), *qkv(4, 6), fired=0, dynamic=True)
    assert backend.reasons == ["queries and keys differ in number"]


def test_refuses_dropout() -> None:
    backend = Backend()
    torch._dynamo.reset()
    torch.compile(lambda q, k, v: SDPA(q, k, v, row(q) >= column(k), 0.5), backend=backend)(*qkv())
    assert backend.record.fired == 0 and backend.reasons == ["attention drops probabilities out"]


def test_refuses_a_mask_written_in_place() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen = row(q) >= column(k)
        seen[0, 1] = True
        return SDPA(q, k, v, attn_mask=seen)

    assert any("written in place" in reason for reason in compare(fn, *qkv(), fired=0).reasons)


def test_static_cache_position_is_data() -> None:
    """One query at a position that only the run knows: keys behind it hold garbage and must stay masked."""

    def step(q: Tensor, k: Tensor, v: Tensor, at: Tensor) -> Tensor:
        return SDPA(q, k, v, attn_mask=column(k) <= row(q) + at)

    backend = compare(step, *qkv(1, 7), torch.tensor([3]), fired=0)
    assert any("it depends on data" in reason for reason in backend.reasons)


def test_readers_of_the_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """If torch's other kernel lays its result out otherwise, readers that need strides forbid it, others adapt."""
    from fusionc.passes import sdpa

    plain = sdpa.Probe.__call__

    def swapped(self: Any, given: Any) -> Any:
        rank, result = plain(self, given)
        if given["attn_mask"] is None:
            result = result.transpose(1, 2).contiguous().transpose(1, 2)
        else:
            result = result.contiguous()
        return rank, result

    monkeypatch.setattr(sdpa.Probe, "__call__", swapped)
    inputs = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv()]

    def heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return SDPA(q, k, v, attn_mask=row(q) >= column(k)).transpose(1, 2).reshape(2, 5, 24) * 2

    assert compare(heads, *inputs).masks == [(None, True)]

    def stays(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return SDPA(q, k, v, attn_mask=row(q) >= column(k))

    backend = Backend()
    torch._dynamo.reset()
    from fusionc.graph.facts import value

    def contiguous(gm: torch.fx.GraphModule, given: list[Any]) -> Any:
        (call,) = gm.graph.find_nodes(op="call_function", target=SDPA)
        call.meta["example_value"] = value(call).contiguous()
        return backend(gm, given)

    torch.compile(stays, backend=contiguous)(*inputs)
    assert backend.reasons == ["a reader of the result depends on its strides"]


def test_refuses_a_slower_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    from fusionc.passes import sdpa

    plain = sdpa.Probe.__call__
    monkeypatch.setattr(sdpa.Probe, "__call__",
                        lambda self, given: (0 if given["attn_mask"] is None else 2, plain(self, given)[1]))  # fmt: skip
    backend = compare(lambda q, k, v: SDPA(q, k, v, attn_mask=row(q) >= column(k)), *qkv(), fired=0)
    assert backend.reasons == ["torch would choose a slower kernel without the mask"]


def test_refuses_where_torch_cannot_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    from fusionc.passes import sdpa

    def fail(self: Any, given: Any) -> Any:
        raise RuntimeError("no")

    monkeypatch.setattr(sdpa.Probe, "__call__", fail)
    backend = compare(lambda q, k, v: SDPA(q, k, v, attn_mask=row(q) >= column(k)), *qkv(), fired=0)
    assert backend.reasons == ["torch cannot choose a kernel: RuntimeError"]


@pytest.mark.parametrize("kind", ["llama", "mistral", "bert"])
def test_hugging_face(kind: str) -> None:
    """The whole way: what the backend compiles has the values of eager, and no mask is left in its graph."""
    transformers = pytest.importorskip("transformers")
    shape = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }
    if kind != "bert":
        shape["num_key_value_heads"] = 2
    name = {"llama": "Llama", "mistral": "Mistral", "bert": "Bert"}[kind]
    config = getattr(transformers, name + "Config")(**shape, **({"sliding_window": 4} if kind == "mistral" else {}))
    torch.manual_seed(0)
    model = getattr(transformers, name + "Model")(config).double().eval()
    tokens = torch.randint(64, (2, 9))
    backend = Backend()
    torch._dynamo.reset()
    compiled = torch.compile(copy.copy(model), backend=backend)
    extra = {} if kind == "bert" else {"use_cache": False}
    with torch.no_grad():
        found = compiled(input_ids=tokens, **extra).last_hidden_state
        expected = model(input_ids=tokens, **extra).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    ((mask, causal),) = backend.masks
    assert (mask is None, causal) == {"llama": (True, True), "bert": (True, False), "mistral": (False, False)}[kind]
