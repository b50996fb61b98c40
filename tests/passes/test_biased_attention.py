"""Attention with a bias over short sequences: what is found, what it becomes, layouts, hazards, each refusal."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from fusionc.graph import edit
from fusionc.graph.text import show
from fusionc.passes.biased_attention import BiasedAttention
from fusionc.passes.manager import run

O, W, H, N, D = 8, 4, 2, 20, 16  # images, windows, heads, tokens, width
B = O * W
KIND = torch.float64
PASS = BiasedAttention(devices=("cpu",), dtypes=(KIND,), small=3200)
INF = float("inf")


class Backend:
    """Runs the pass on Dynamo's graph and then the graph as it is."""

    def __init__(self, item: BiasedAttention = PASS, stage: str = "inference") -> None:
        self.item, self.stage = item, stage
        self.fired, self.refusals, self.calls, self.text = 0, list[str](), list[Any](), ""

    def __call__(self, gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        gm = edit.copy_module(gm)
        gm, (record,) = run([(1, self.item)], gm, "model", None, inputs, stage=self.stage)
        self.fired += record.fired
        self.refusals += [r.reason for r in record.refusals]
        gm, (record,) = run([(1, self.item)], gm, "model", None, inputs, stage=self.stage)
        assert record.fired == 0
        for node in gm.graph.nodes:
            if "short_attention" in str(node.target):
                shapes = [x if x is None else tuple(x.meta["example_value"].shape) for x in node.args[5:7]]
                self.calls.append((round(node.args[3], 4), node.args[4], *shapes, node.args[7]))
        self.text = show(gm)
        return gm.forward


def found(f: Callable[..., Tensor], *inputs: Tensor, fired: int = 1) -> Backend:
    """Same values and strides with the pass and without."""
    backend = Backend()
    torch._dynamo.reset()
    with torch.no_grad():
        expected, made = f(*inputs), torch.compile(f, backend=backend, fullgraph=True, dynamic=False)(*inputs)
    assert backend.fired == fired, backend.refusals
    torch.testing.assert_close(made, expected, rtol=1e-9, atol=1e-9, equal_nan=True)
    assert made.stride() == expected.stride()
    return backend


def refused(f: Callable[..., Tensor], *inputs: Tensor, stage: str = "inference") -> str:
    backend = Backend(stage=stage)
    torch._dynamo.reset()
    with torch.no_grad():
        expected, made = f(*inputs), torch.compile(f, backend=backend, fullgraph=True, dynamic=False)(*inputs)
    assert backend.fired == 0 and len(backend.refusals) == 1, backend.refusals
    torch.testing.assert_close(made, expected, equal_nan=True)
    return backend.refusals[0]


def data(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed), dtype=KIND)


def qkv(batch: int = B, heads: int = H, rows: int = N, width: int = D) -> tuple[Tensor, ...]:
    return data(batch, rows, 3, heads, width).permute(2, 0, 3, 1, 4).unbind(0)


TABLE = data(50, H, seed=5).float()
INDEX = torch.randint(0, 50, (N, N), generator=torch.Generator().manual_seed(1))
SHIFT = torch.where(torch.rand(W, N, N, generator=torch.Generator().manual_seed(2)) < 0.3, -100.0, 0.0)


def relative(table: Tensor) -> Tensor:
    return table[INDEX.view(-1)].view(N, N, -1).permute(2, 0, 1).contiguous().unsqueeze(0)


def swin(x: Tensor, table: Tensor, mask: Tensor | None = None, scores_first: bool = False) -> Tensor:
    """timm's (Hugging Face's scales the scores instead)."""
    b = x.shape[0]
    q, k, v = x.reshape(b, N, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)
    attn = q @ k.transpose(-2, -1) / math.sqrt(D) if scores_first else q * D**-0.5 @ k.transpose(-2, -1)
    attn = attn + relative(table)
    if mask is not None:
        w = mask.shape[0]
        attn = attn.view(-1, w, H, N, N) + mask.unsqueeze(1).unsqueeze(0)
        attn = attn.view(-1, H, N, N)
    attn = F.dropout(attn.softmax(-1), 0.1, training=False)
    return (attn @ v).transpose(1, 2).reshape(b, N, H * D)


@pytest.mark.parametrize("scores_first", [True, False])
def test_windows(scores_first: bool) -> None:
    x = data(B, N, 3 * H * D)
    backend = found(lambda x, t: swin(x, t, None, scores_first), x, TABLE)
    assert backend.calls == [(0.25, False, (1, H, N, 24), None, False)]
    backend = found(lambda x, t, m: swin(x, t, m, scores_first), x, TABLE, SHIFT)
    assert backend.calls == [(0.25, False, (W, H, N, 24), None, False)]
    assert "softmax" not in backend.text and "matmul" not in backend.text
    assert backend.text.count("contiguous(") == 1, "the bias's own: the result lies as its reader wants it"


@pytest.mark.parametrize("batch", [1, W, 2 * W])
def test_numbers_of_images_and_windows(batch: int) -> None:
    x = data(batch, N, 3 * H * D)
    places = 1 if batch == 1 else W
    assert found(swin, x, TABLE, SHIFT[:places]).calls == [(0.25, False, (places, H, N, 24), None, False)]


def test_a_call_of_the_library_reads_small_tensors() -> None:
    """timm expands the mask over images and heads for it, in memory."""

    def fused(q: Tensor, k: Tensor, v: Tensor, table: Tensor, mask: Tensor) -> Tensor:
        wide = mask.view(1, W, 1, N, N).expand(O, -1, H, -1, -1).reshape(-1, H, N, N)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=relative(table) + wide)

    backend = found(fused, *qkv(), TABLE.to(KIND), SHIFT.to(KIND))
    assert backend.calls == [(0.25, False, (W, H, N, 24), None, True)]
    assert "expand" not in backend.text and "reshape" not in backend.text


def test_calls_of_the_library_with_masks() -> None:
    keep = torch.arange(N)[None] < torch.tensor([N, 7, 1, 5] * O)[:, None]

    def padded(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, keep[:, None, None, :], scale=0.5)

    assert found(padded, *qkv(), keep).calls == [(0.5, False, (B, 1, 1, N), None, True)]
    keep[2] = False  # rows without a key are 0
    found(padded, *qkv(), keep)
    grouped = (*qkv(heads=4)[:1], *qkv()[1:])
    bias = data(4, N, N)
    f = lambda q, k, v, b: F.scaled_dot_product_attention(q, k, v, b, enable_gqa=True)  # noqa: E731
    assert found(f, *grouped, bias).calls == [(0.25, False, (1, 4, N, N), None, True)]


def test_large_tensors_are_read_where_they_lie() -> None:
    """Not copied, not summed: two of them."""

    def f(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return (q @ k.mT * 0.5 + a + b[:, None, None]).softmax(-1) @ v

    backend = found(f, *qkv(), data(B, H, N, N), data(B, N))
    assert backend.calls == [(0.5, False, (B, H, N, N), (B, 1, 1, N), False)] and "pad" not in backend.text
    turned = data(B, N, N, H).permute(0, 3, 1, 2)
    assert found(f, *qkv(), turned, data(B, N)).text.count("contiguous(") == 2  # its rows are not dense, and the result


def test_bools_causal_and_three_axes() -> None:
    keep = torch.rand(B, 1, 1, N, generator=torch.Generator().manual_seed(3)) < 0.7
    keep[..., 0] = True

    def f(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, bias: Tensor) -> Tensor:
        scores = (q @ k.mT * 0.5 - 2 * bias).masked_fill(torch.ones(N, N, dtype=torch.bool).triu(1), -INF)
        return scores.masked_fill(~keep, -INF).softmax(-1) @ v

    assert found(f, *qkv(), keep, data(H, N, N)).calls == [(0.5, True, (1, H, N, 24), (B, 1, 1, N), False)]

    def merged(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        return torch.bmm((torch.bmm(q, k.transpose(1, 2)) + bias[0]).softmax(-1), v)

    assert found(merged, *qkv(), data(H, N, N)).calls == [(1.0, False, (1, 1, N, N), None, False)]

    def einsum(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        p = (torch.einsum("bhid,bhjd->bhij", q, k) * 0.5 + bias).softmax(-1)
        return torch.einsum("bhij,bhjd->bihd", p, v)

    assert found(einsum, *qkv(), data(H, N, N)).calls == [(0.5, False, (1, H, N, N), None, False)]


def test_nothing_is_added() -> None:
    assert found(lambda q, k, v: (q @ k.mT * 0.5).softmax(-1) @ v, *qkv()).calls == [(0.5, False, None, None, False)]


def test_rows_without_a_key_and_finite_masks() -> None:
    """NaN, and uniform over all keys: as in eager."""
    f = lambda q, k, v, m: (q @ k.mT * 0.5 + m).softmax(-1) @ v  # noqa: E731
    for dead in (-INF, -1e9, -1e4, torch.finfo(torch.float32).min):
        mask = torch.zeros(B, 1, 1, N)
        mask[3], mask[5, ..., 4:] = dead, dead
        out = found(f, *qkv(), mask)
        assert out.calls == [(0.5, False, (B, 1, 1, N), None, False)]


@hypothesis.settings(max_examples=15, deadline=None)
@hypothesis.given(st.sampled_from([1, H]), st.sampled_from([1, N]), st.sampled_from([1, N]), st.sampled_from([1, W, B]),
                  st.booleans(), st.floats(0.1, 2.0))  # fmt: skip
def test_any_broadcast(heads: int, rows: int, columns: int, places: int, minus: bool, scale: float) -> None:
    bias = data(places, heads, rows, columns)

    def f(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        scores = q @ k.mT * scale
        if places == W:
            scores = scores.view(O, W, H, N, N)
        scores = scores - bias if minus else bias + scores
        return scores.view(B, H, N, N).softmax(-1) @ v

    found(f, *qkv(), bias)


MASK = data(H, N, N)
CASES: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...], str]] = {
    "probabilities": (lambda q, k, v: (p := (q @ k.mT + MASK).softmax(-1)) @ v + p.sum(), qkv(), "also reads"),
    "dropout": (lambda q, k, v: F.dropout((q @ k.mT + MASK).softmax(-1), 0.0 * 0.5 + 0.5) @ v * 0, qkv(), "dropout is active"),
    "library's dropout": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, MASK, dropout_p=0.5) * 0, qkv(),
                          "dropout, or a causal flag beside a mask"),
    "softcap": (lambda q, k, v: (torch.tanh(q @ k.mT) + MASK).softmax(-1) @ v, qkv(),
                "the scores are more than a product, a factor and tensors that are added"),
    "a factor a head": (lambda q, k, v: (q @ k.mT * MASK[:, :1, :1]).softmax(-1) @ v, qkv(),
                        "the scores are more than a product, a factor and tensors that are added"),
    "finite fill": (lambda q, k, v: (q @ k.mT).masked_fill(MASK > 0, -1e9).softmax(-1) @ v, qkv(),
                    "keys are left out otherwise than by -inf at a bool"),
    "positions": (lambda q, k, v: (q @ k.mT + MASK).masked_fill(torch.ones(N, N, dtype=torch.bool).tril(), -INF).softmax(-1) @ v,
                  qkv(), "keys are chosen by position otherwise than up to the query's own"),
    "finite and causal": (
        lambda q, k, v: (q @ k.mT + MASK).masked_fill(torch.ones(N, N, dtype=torch.bool).triu(1), -1e9).softmax(-1) @ v, qkv(),
        "a finite number in place of later keys, which counts in a row that has no other"),
    "groups": (lambda q, k, v, m: ((q @ k.mT).view(O, W, H, N, N) + m).view(B, H, N, N).softmax(-1) @ v,
               (*qkv(), data(O, 1, H, N, N)), "a tensor is added by the group that a batch entry belongs to"),
    "three": (lambda q, k, v, a, b, c: (q @ k.mT + a + b + c).softmax(-1) @ v,
              (*qkv(), data(B, H, N, N), data(B, 1, N, N), data(B, 1, 1, N)), "more than two tensors are added to the scores"),
    "width": (lambda q, k, v: (q @ k.mT + MASK).softmax(-1) @ v, qkv(width=24),
              "it has one query, more than 128 keys or a width of heads without a kernel"),
    "keys": (lambda q, k, v: (q @ k.mT + MASK[:, :1, :1]).softmax(-1) @ v, qkv(rows=130),
             "it has one query, more than 128 keys or a width of heads without a kernel"),
    "layout": (lambda q, k, v: (q @ k.mT + MASK).softmax(-1) @ v, (data(B, H, D, N).mT, *qkv()[1:]),
               "queries, keys or values are not dense rows at multiples of 16 bytes"),
    "the library's": (lambda q, k, v: (q @ k.mT).softmax(-1) @ v, qkv(rows=64),
                      "nothing is added to the scores: it becomes a call of the library"),
    "other widths": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v[..., :8], MASK), qkv(),
                     "it is no attention of one width over four dimensions in 16 bits"),
    "values": (lambda q, k, v: (q @ k.mT + MASK).softmax(-1) @ v[..., :8], qkv(), "keys and values differ in width"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_refusals(name: str) -> None:
    f, inputs, reason = CASES[name]
    assert reason in refused(f, *inputs)


def test_refuses_a_tensor_that_is_written_before_the_values_are_read() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        bias = bias.clone()
        p = (q @ k.mT + bias).softmax(-1)
        bias.zero_()
        return p @ v

    assert "before the values are read" in refused(f, *qkv(), MASK)


def test_refuses_training_unknown_sizes_and_leaves_other_devices_alone() -> None:
    f = lambda q, k, v: (q @ k.mT + MASK).softmax(-1) @ v  # noqa: E731
    assert refused(f, *qkv(), stage="forward") == "training needs the gradient of what is added"
    backend = Backend()
    torch._dynamo.reset()
    torch.compile(f, backend=backend, dynamic=True)(*qkv())
    assert "not numbers" in backend.refusals[0]
    backend = Backend(BiasedAttention())
    torch._dynamo.reset()
    torch.compile(f, backend=backend)(*qkv())
    assert (backend.fired, backend.refusals) == (0, [])


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("written_out", [True, False])
def test_error_is_no_larger_than_eagers(kind: torch.dtype, written_out: bool) -> None:
    """Specification: at most twice eager's, plus 1e-6."""
    q, k, v = (x.to(kind) for x in qkv(rows=49, width=32))
    bias, mask = data(H, 49, 49, seed=3).to(kind), torch.where(data(W, 49, 49, seed=4) < -0.5, -100.0, 0.0).to(kind)

    def f(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
        if not written_out:
            wide = (bias + mask[:, None]).repeat(O, 1, 1, 1)
            return F.scaled_dot_product_attention(q, k, v, wide)
        scores = (q * 32**-0.5 @ k.mT + bias).view(O, W, H, 49, 49) + mask[:, None]
        return scores.view(B, H, 49, 49).softmax(-1) @ v

    backend = Backend(BiasedAttention(devices=("cpu",)))
    torch._dynamo.reset()
    with torch.no_grad():
        made = torch.compile(f, backend=backend, dynamic=False)(q, k, v, bias, mask)
        eager, exact = f(q, k, v, bias, mask), f(*(x.double() for x in (q, k, v, bias, mask)))
    assert backend.fired == 1, backend.refusals
    mine, its = ((x.double() - exact).norm() / exact.norm() for x in (made, eager))
    assert mine <= 2 * its + 1e-6


def test_a_mask_that_was_written_is_read_as_it_is() -> None:
    """It began as zeros."""

    def called(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = torch.zeros(N, N, dtype=q.dtype)
        mask[:, 3:] = -INF
        return F.scaled_dot_product_attention(q, k, v, mask)

    def added(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        mask = torch.zeros(1, N, N, dtype=q.dtype)
        mask[:, :, 3:] = -INF
        return torch.bmm(torch.baddbmm(mask, q, k.mT).softmax(-1), v)

    found(called, *qkv())
    found(added, *qkv())


def test_a_tensor_with_other_heads_than_the_scores() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        scores = (torch.bmm(q, k.mT).view(4, 4, N, N) + mask).view(16, N, N)
        return torch.bmm((scores + bias.view(16, N, N)).softmax(-1), v)

    found(f, *qkv(8, 2), data(4, 1, 1, N), data(2, 8, N, N))  # its view is read


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_refuses_a_mask_that_autocast_rounds_to_minus_infinity(kind: torch.dtype) -> None:
    """A row without any key is then 0, not a mean."""
    mask = torch.zeros(B, 1, N, N)
    mask[:, :, 1] = torch.finfo(torch.float32).min
    backend = Backend(BiasedAttention(devices=("cpu",), dtypes=(kind,), small=3200))

    def f(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        with torch.autocast("cpu", kind):
            return F.scaled_dot_product_attention(q, k, v, mask)

    inputs = [x.to(kind) for x in qkv()]
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(f, backend=backend, dynamic=False)(*inputs, mask), f(*inputs, mask))
    assert backend.fired == 0 and "autocast" in backend.refusals[0]
