"""Attention in plain operators: spellings that are found, what they become, what is refused, gradients, hazards."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusionc.graph.text import show
from fusionc.passes import PlainAttention
from fusionc.passes.manager import run

B, H, N, D = 2, 4, 20, 8
PASS = PlainAttention(devices=("cpu",), dtypes=(torch.float64,), smallest=1)


class Backend:
    """Runs the pass on Dynamo's graph and then the graph as it is."""

    def __init__(self, item: PlainAttention = PASS) -> None:
        self.item = item
        self.fired, self.refusals, self.calls = 0, [], []  # type: ignore[var-annotated]

    def __call__(self, gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        from fusionc.graph import edit

        gm = edit.copy_module(gm)
        gm, (record,) = run([(1, self.item)], gm, "model", None, inputs)
        self.fired += record.fired
        self.refusals += [r.reason for r in record.refusals]
        again, (record,) = run([(1, self.item)], gm, "model", None, inputs)
        assert record.fired == 0
        for node in gm.graph.nodes:
            if "scaled_dot" in str(node.target):
                self.calls.append(f"sdpa {node.kwargs}")
            elif "fusionc.attention" in str(node.target):
                self.calls.append(node.args[4])
        self.text = show(gm)
        return gm.forward


def data(heads: int = H, rows: int = N, seed: int = 0, width: int = D, **kwargs: Any) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(B, heads, rows, width, generator=rng, dtype=torch.float64, **kwargs)


def qkv(heads: int = H) -> list[Tensor]:
    return [data(seed=1), data(heads, seed=2), data(heads, seed=3)]


def found(f: Callable[..., Tensor], *inputs: Tensor, fired: int = 1) -> Backend:
    """Same values and gradients with the pass and without."""
    backend = Backend()
    torch._dynamo.reset()
    mine, yours = ([x.clone().requires_grad_(x.is_floating_point()) for x in inputs] for _ in range(2))
    expected, made = f(*yours), torch.compile(f, backend=backend, fullgraph=True)(*mine)
    assert backend.fired == fired, backend.refusals
    torch.testing.assert_close(made, expected, rtol=1e-9, atol=1e-9, equal_nan=True)
    assert made.stride() == expected.stride()
    grad = torch.randn(expected.shape, dtype=expected.dtype, generator=torch.Generator().manual_seed(9))
    (expected * grad).sum().backward()
    (made * grad).sum().backward()
    for a, b in zip(mine, yours):
        if a.grad is not None or b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-6, equal_nan=True)  # δ is kept in float32
    return backend


def attend(scores: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(scores, -1) @ v


def alibi(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    position = torch.arange(N)
    distance = position[None, :] - position[:, None]
    slopes = 2.0 ** (-8.0 * torch.arange(1, H + 1, dtype=torch.float64) / H)
    scores = q @ k.transpose(-1, -2) * D**-0.5 + slopes[:, None, None] * distance
    return attend(scores.masked_fill(distance > 0, float("-inf")), v)


def hugging_face(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    def repeat(x: Tensor, n: int) -> Tensor:
        b, h, s, d = x.shape
        return x[:, :, None, :, :].expand(b, h, n, s, d).reshape(b, h * n, s, d)

    k, v = repeat(k, 2), repeat(v, 2)
    weights = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(D)
    mask = torch.full((N, N), torch.finfo(torch.float32).min, dtype=q.dtype).triu(1)
    weights = F.softmax(weights + mask[None, None], dim=-1, dtype=torch.float64).to(q.dtype)
    return torch.matmul(F.dropout(weights, 0.1, training=False), v).transpose(1, 2).contiguous()


def softcap(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = 5 * torch.tanh((q / math.sqrt(D)) @ k.mT / 5)
    return attend(torch.where(torch.ones(N, N, dtype=torch.bool).tril(), scores, torch.finfo(torch.float64).min), v)


def window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i = torch.arange(N)
    scores = torch.einsum("bhid,bhjd->bhij", q, k) * 0.3
    scores = scores.masked_fill_(~((i[:, None] - i[None]).abs() <= 4), -1e9)
    scores += i.to(q.dtype).view(1, 1, 1, N) * 0.1
    return torch.einsum("bhij,bhjd->bihd", scores.softmax(dim=-1), v)


def padding(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    mask = (1.0 - keep[:, None, None, :].to(q.dtype)) * -10000.0
    return attend(q @ k.mT + mask, v)


def causal_padding(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    mask = torch.ones(N, N, dtype=torch.bool).tril()[None, None] & keep[:, None, None, :]
    return attend((q @ k.mT * 0.5).masked_fill(mask == 0, -1e9), v)


def relative(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    i = torch.arange(N)
    bias = table[(i[:, None] - i[None]).clamp(-3, 3) + 3].permute(2, 0, 1)
    return attend(q @ k.mT * 0.5 + bias, v)


def three_axes(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    i = torch.arange(N, dtype=torch.float64)
    return torch.bmm(torch.baddbmm(-(i - i[:, None]).abs()[None] / 3, q, k.transpose(1, 2), alpha=0.3).softmax(-1), v)


def merged(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # as Bloom writes it
    slopes = (torch.arange(B * H, dtype=q.dtype) / 9)[:, None, None] * torch.arange(N)[None, None]
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    scores = slopes.baddbmm(q, k.mT, beta=1.0, alpha=0.3).view(B, H, N, N)
    mask = torch.full((N, N), -1e30, dtype=q.dtype).triu(1)
    probabilities = F.softmax(scores + mask, -1).view(B * H, N, N)
    return torch.bmm(probabilities, v).view(B, H, N, D).transpose(1, 2).flatten(2)


def kerple(q: Tensor, k: Tensor, v: Tensor, a: Tensor) -> Tensor:
    d = torch.arange(N)[:, None] - torch.arange(N)
    bias = -a[:H, None, None] * torch.log1p(a[H:, None, None].square() * d.clamp(min=0))
    return attend((q @ k.mT * 0.5 + bias).masked_fill(d < 0, float("-inf")), v)


def shared_key(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # one key head for all
    return attend((q * 0.2) @ k.mT + torch.arange(N).to(q.dtype), v)


def test_alibi() -> None:
    (call,) = found(alibi, *qkv()).calls
    assert call == ("(where (gt (sub k q) 0) -inf (add (mul s 0.3535533905932738) (mul xf0 (sub (float k) (float q)))))")


@pytest.mark.parametrize("f", [softcap, window, three_axes, merged])
def test_masks_and_caps(f: Any) -> None:
    assert len(found(f, *qkv()).calls) == 1


def test_grouped_heads() -> None:
    assert found(hugging_face, *qkv(2)).calls == ["sdpa {'is_causal': True, 'scale': 0.35355339059327373}"]
    backend = found(shared_key, data(seed=1), *[data(1, seed=s) for s in (2, 3)])
    assert backend.calls == ["(add (mul s 0.2) (float k))"]


def test_masks_of_tensors() -> None:
    keep = torch.rand(B, N, generator=torch.Generator().manual_seed(4)) > 0.4
    assert found(padding, *qkv(), keep).calls == ["(add s xf0)"]
    keep[1] = False  # all keys masked: uniform over what is masked
    assert found(causal_padding, *qkv(), keep).calls == ["(where (and (le (sub k q) 0) xb0) (mul s 0.5) -1000000000.0)"]


def test_gradients_of_biases() -> None:
    table = torch.randn(7, H, dtype=torch.float64)
    assert found(relative, *qkv(), table).calls == ["(add (mul s 0.5) xf0)"]
    assert len(found(kerple, *qkv(), torch.rand(2 * H, dtype=torch.float64) + 0.1).calls) == 1


def test_plain_and_causal_go_to_the_library() -> None:
    f = lambda q, k, v: attend(q @ k.mT * 0.25, v)  # noqa: E731
    assert found(f, *qkv()).calls == ["sdpa {'is_causal': False, 'scale': 0.25}"]

    def g(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i = torch.arange(N)
        return attend(torch.where(i[:, None] >= i, q @ k.mT, -torch.inf), v)

    assert found(g, *qkv()).calls == ["sdpa {'is_causal': True, 'scale': 1.0}"]

    def early(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # rows without a key are NaN, which the library's are not
        i = torch.arange(N)
        return attend(torch.where(i[:, None] > i, q @ k.mT, -torch.inf), v)

    assert found(early, *qkv()).calls == ["(where (gt q k) s -inf)"]


def test_text() -> None:
    backend = found(lambda q, k, v: attend(q @ k.mT * 0.25 + torch.arange(N), v), *qkv())
    lines = [line.split("  #")[0] for line in backend.text.splitlines()]
    assert lines == [
        "%l_k_: f64[2, 4, 20, 8] = input",
        "%l_q_: f64[2, 4, 20, 8] = input",
        "%l_v_: f64[2, 4, 20, 8] = input",
        "%attention: (f64[2, 4, 20, 8], f32[2, 4, 2, 20]) = fusionc.attention(%l_q_, %l_k_, %l_v_, [], "
        '"(add (mul s 0.25) (float k))")',
        "%getitem: f64[2, 4, 20, 8] = getitem(%attention, 0)",
        "return (%getitem)",
    ]


def refused(f: Callable[..., Any], *inputs: Tensor, item: PlainAttention = PASS) -> str:
    backend = Backend(item)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(f, backend=backend)(*inputs), f(*inputs), rtol=1e-9, atol=1e-9)
    assert backend.fired == 0
    return "; ".join(backend.refusals)


def test_refusals() -> None:
    q, k, v = qkv()
    plain = lambda q, k, v: attend(q @ k.mT * 0.25, v)  # noqa: E731
    assert "not on a GPU" in refused(plain, q, k, v, item=PlainAttention())
    assert "types are mixed" in refused(plain, q.float(), k.float(), v.float())
    assert "so small" in refused(plain, q, k, v, item=PlainAttention(("cpu",), (torch.float64,)))
    assert "head sizes" in refused(plain, *[data(width=300, seed=s) for s in (1, 2, 3)])

    def escaping(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        p = torch.softmax(q @ k.mT, -1)
        return p @ v, p

    assert "also reads" in refused(escaping, q, k, v)
    assert "not over the last" in refused(lambda q, k, v: torch.softmax(q @ k.mT, -2) @ v, q, k, v)
    assert "no product" in refused(lambda x, v: torch.softmax(x, -1) @ v, data(width=N), v)
    assert "not understood" in refused(lambda q, k, v: attend((q @ k.mT).cumsum(-1), v), q, k, v)
    assert "more batches" in refused(lambda q, k, v: attend(q[0, 0] @ k[0, 0].mT, v), q, k, v)

    def written(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k = k.clone()
        p = torch.softmax(q @ k.mT, -1)
        k.zero_()
        return p @ v + k.sum()

    assert "before the values are read" in refused(written, q, k, v)

    def part(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = q @ k.mT
        s[:, :, :, 3:] = -1.0
        return attend(s, v)

    assert "writes part" in refused(part, q, k, v)
    assert "reshaped" in refused(lambda q, k, v: attend((q @ k.mT).mT, v), q, k, v)


def test_dropout_is_refused() -> None:
    drop = nn.Dropout(0.5)
    backend = Backend()
    torch._dynamo.reset()
    torch.compile(lambda q, k, v: drop(torch.softmax(q @ k.mT, -1)) @ v, backend=backend)(*qkv())
    assert backend.fired == 0 and "dropout is active" in backend.refusals
    drop.p = 0.0
    assert found(lambda q, k, v: drop(torch.softmax(q @ k.mT, -1)) @ v, *qkv()).fired == 1


def test_memory_written_elsewhere_does_not_matter() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache = torch.zeros_like(k)
        cache.copy_(k)
        mask = torch.zeros(N, N, dtype=torch.bool)
        mask[:, 5:] = True
        return attend((q @ cache.mT * 0.3).masked_fill(mask, -1e9), v)

    assert len(found(f, *qkv()).calls) == 1


def _random_chain(seed: int) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """Scores through a random chain of masks, biases and caps, in random spellings; every row keeps its diagonal."""
    import random

    pick = random.Random(seed)
    masks = [
        lambda i, j, keep: j > i,
        lambda i, j, keep: (i - j).abs() > 5,
        lambda i, j, keep: torch.ones(N, N, dtype=torch.bool).triu(2),
        lambda i, j, keep: ~torch.ones(N, N, dtype=torch.bool).tril(3),
        lambda i, j, keep: (~keep[:, None, None, :]) & (i != j),
        lambda i, j, keep: (j >= i + 3) | (j < i - 7),
        lambda i, j, keep: (i // 4 != j // 4) | (j > i),
        lambda i, j, keep: torch.logical_and(j > i, ~keep[:, None, None, :]),
    ]
    fills = (float("-inf"), -1e9, torch.finfo(torch.float32).min)

    def mask(s: Tensor, i: Tensor, j: Tensor, keep: Tensor, bias: Tensor, kind: int, which: int, fill: float) -> Tensor:
        dead = masks[which](i, j, keep)
        if kind == 0:
            return s.masked_fill(dead, fill)
        if kind == 1:
            return torch.where(dead.logical_not(), s, fill)
        if kind == 2:
            return s + torch.zeros(N, N, dtype=s.dtype).masked_fill(dead, fill)
        s.masked_fill_(dead, fill)
        return s

    steps: list[Callable[..., Tensor]] = []
    for _ in range(pick.randint(1, 4)):
        kind, which, fill = pick.randrange(4), pick.randrange(len(masks)), pick.choice(fills)
        steps.append(pick.choice([
            lambda s, i, j, keep, bias: s * 0.5,
            lambda s, i, j, keep, bias: s / 3 + 1,
            lambda s, i, j, keep, bias: 4 * torch.tanh(s / 4),
            lambda s, i, j, keep, bias: s + bias,
            lambda s, i, j, keep, bias: s.add_(bias[:, :, :1]),
            lambda s, i, j, keep, bias: s - bias[:, :1, :, :1] * (i - j).abs(),
            lambda s, i, j, keep, bias: torch.minimum(s, bias[0, :, 0, 0][:, None, None] + 2.5),
        ] + 3 * [lambda s, i, j, keep, bias, k=kind, w=which, f=fill: mask(s, i, j, keep, bias, k, w, f)]))  # fmt: skip

    def f(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, keep: Tensor) -> Tensor:
        i, j = torch.arange(N)[:, None], torch.arange(N)[None]
        s = q @ k.transpose(2, 3) * 0.4
        for step in steps:
            s = step(s, i, j, keep, bias)
        return F.softmax(s, dim=-1) @ v

    rng = torch.Generator().manual_seed(seed)
    bias = torch.randn(1, H, N, N, generator=rng, dtype=torch.float64)
    return f, [*qkv(), bias, torch.rand(B, N, generator=rng) > 0.3]


@pytest.mark.parametrize("seed", range(24))
def test_random_chains(seed: int) -> None:
    f, given = _random_chain(seed)
    found(f, *given)
