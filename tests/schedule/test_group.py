"""Grouping as users feel it: how many kernel launches a small function becomes, and that the result is eager's.

The bounds are upper bounds: fewer launches are always welcome.  The second half are traps, where joining nodes that
look alike would give a wrong kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fusionc.backend import fusionc
from fusionc.graph.text import parse
from fusionc.record import GraphRecord, collect
from fusionc.schedule.group import Grouper

Tensors = tuple[torch.Tensor, ...]


def compiled(
    fn: Callable[..., Any], *args: Any, dynamic: bool | None = False, grad: bool = False
) -> tuple[Any, Any, list[GraphRecord]]:
    """(eager's result, ours, the records) of one call; with `grad` the result is (loss, gradients of float operands)."""
    torch._dynamo.reset()

    def run(f: Callable[..., Any]) -> Any:
        if not grad:
            with torch.no_grad():
                return f(*args)
        mine = [
            a.detach().clone().requires_grad_(a.is_floating_point()) if isinstance(a, torch.Tensor) else a for a in args
        ]
        out = f(*mine)
        leaves = [m for m in mine if isinstance(m, torch.Tensor) and m.requires_grad]
        scale = torch.linspace(0.5, 1.5, out.numel()).reshape(out.shape)
        return out.detach(), torch.autograd.grad((out * scale).sum(), leaves)

    want = run(fn)
    with collect() as records:
        got = run(
            torch.compile(
                fn, backend=fusionc, dynamic=dynamic, options={"target": "cpp", "verify": True, "cache": False}
            )
        )
    for record in records:
        assert not record.fallbacks, record.fallbacks
    return want, got, records


def launches(record: GraphRecord) -> int:
    return len(record.groups)


def rms_norm(x: torch.Tensor, w: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * w


def rotary(q: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = q.shape[-1] // 2
    turned = torch.cat((-q[..., half:], q[..., :half]), dim=-1)
    return q * cos + turned * sin


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@dataclass
class Case:
    """A function, its operands and the most launches it may become (forward, and backward where given)."""

    name: str
    fn: Callable[..., Any]
    args: tuple[Any, ...]
    most: int = 1
    backward: int | None = None
    tolerance: float = 2e-5
    records: list[GraphRecord] = field(default_factory=list)


ANGLES = torch.arange(9)[:, None] * torch.linspace(1, 0.01, 16)
COS, SIN = ANGLES.cos(), ANGLES.sin()
IDS = torch.arange(24) % 50
CASES = [
    Case("gelu chain", lambda x, y: F.gelu(x * 2 + y, approximate="tanh") * torch.sigmoid(y) - 1, (rand(6, 33), rand(6, 33)), 1, 1),
    Case("bias gelu dropoutless", lambda x, b: F.gelu(x + b), (rand(6, 33), rand(33)), 1, 2),
    Case("swiglu", lambda a, b: F.silu(a) * b, (rand(6, 33), rand(6, 33)), 1, 1),
    Case("softmax", lambda x: torch.softmax(x, -1), (rand(9, 40),), 1, 1),
    Case("masked scaled softmax", lambda x, m: torch.softmax(x * 0.125 + m, -1), (rand(2, 3, 9, 9), rand(9, 9).triu() * 9), 1),
    Case("softmax over rows", lambda x: torch.softmax(x, 0), (rand(9, 40),), 1, 1),
    Case("log_softmax", lambda x: F.log_softmax(x, -1), (rand(9, 40),), 1, 1),
    Case("layer_norm", lambda x, w, b: F.layer_norm(x, (64,), w, b), (rand(9, 64), rand(64), rand(64)), 1, 3),
    Case("layer_norm of a sum", lambda x, r, w, b: F.layer_norm(x + r, (64,), w, b), (rand(9, 64), rand(9, 64), rand(64), rand(64)), 1),
    Case("layer_norm written out",
         lambda x, w: (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-5) * w, (rand(9, 64), rand(64)), 1),
    Case("rms_norm", rms_norm, (rand(2, 9, 64), rand(64)), 1, 3),
    Case("rms_norm and residual", lambda x, r, w: (rms_norm(x + r, w), x + r), (rand(2, 9, 64), rand(2, 9, 64), rand(64)), 1),
    Case("functional rms_norm", lambda x, w: F.rms_norm(x, (64,), w), (rand(2, 9, 64), rand(64)), 1, 3),
    Case("rotary", rotary, (rand(2, 4, 9, 16), rand(9, 16), rand(9, 16)), 1),
    Case("rotary of fixed angles", lambda q: rotary(q, COS, SIN), (rand(2, 4, 9, 16),), 1, 1),
    Case("rotary after a head split", lambda x, c, s: rotary(x.view(2, 9, 4, 16).transpose(1, 2), c, s), (rand(2, 9, 64), rand(9, 16), rand(9, 16)), 1),
    Case("rotary of queries and keys", lambda q, k, c, s: (rotary(q, c, s), rotary(k, c, s)),
         (rand(2, 4, 9, 16), rand(2, 2, 9, 16), rand(9, 16), rand(9, 16)), 2),
    Case("cross entropy", lambda x, t: F.cross_entropy(x, t), (rand(24, 50), IDS), 2, 2),
    Case("cross entropy with an ignored index", lambda x, t: F.cross_entropy(x, t.where(t > 3, -100)), (rand(24, 50), IDS), 3, 3),
    Case("causal lm loss", lambda x, t: F.cross_entropy(x[:, :-1].flatten(0, 1), t[:, 1:].flatten()), (rand(3, 8, 50), IDS.view(3, 8)), 3),
    Case("mse", lambda x, y: F.mse_loss(x, y), (rand(9, 40), rand(9, 40)), 1, 1),
    Case("var_mean", lambda x: torch.var_mean(x, -1), (rand(9, 40),), 1),
    Case("argmax and max", lambda x: (x.argmax(-1), x.amax(-1)), (rand(9, 40),), 1),
    Case("sums of one input", lambda x: (x.sum(-1), (x * x).sum(-1), x.abs().amax(-1)), (rand(9, 40),), 1),
    Case("embedding and norm", lambda i, e, w: rms_norm(e[i] * 8, w), (IDS, rand(50, 64), rand(64)), 1),
    Case("embeddings summed and normed", lambda i, e, p, w, b: F.layer_norm(F.embedding(i, e) + p[: i.shape[0]], (64,), w, b),
         (IDS, rand(50, 64), rand(32, 64), rand(64), rand(64)), 1),
    Case("causal mask", lambda x: torch.softmax(x.masked_fill(torch.ones(9, 9, dtype=torch.bool).triu(1), -1e30), -1), (rand(2, 9, 9),), 1),
    Case("cat of pointwise", lambda x, y: torch.cat([x * 2, y + 1], -1).relu(), (rand(6, 33), rand(6, 5)), 1),
    Case("group norm", lambda x, w, b: F.group_norm(x, 2, w, b), (rand(2, 8, 5, 5), rand(8), rand(8)), 1),
    Case("cumsum", lambda x: (x * 2).cumsum(-1), (rand(9, 40),), 1),
    Case("log-sum-exp", lambda x: torch.logsumexp(x, -1), (rand(9, 40),), 1),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_launches(case: Case) -> None:
    want, got, records = compiled(case.fn, *case.args)
    torch.testing.assert_close(got, want, rtol=case.tolerance, atol=case.tolerance)
    (record,) = records
    assert launches(record) <= case.most, [g.nodes for g in record.groups]
    assert not [c for c in record.calls if c.reason], record.calls


@pytest.mark.parametrize("case", [c for c in CASES if c.backward is not None], ids=lambda c: c.name)
def test_launches_of_the_backward(case: Case) -> None:
    want, got, records = compiled(case.fn, *case.args, grad=True)
    torch.testing.assert_close(got, want, rtol=5 * case.tolerance, atol=5 * case.tolerance)
    (record,) = [r for r in records if r.stage == "backward"]
    assert case.backward is not None and launches(record) <= case.backward, [g.nodes for g in record.groups]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_symbolic_sizes_give_the_same(case: Case) -> None:
    want, got, _ = compiled(case.fn, *case.args, dynamic=True)
    torch.testing.assert_close(got, want, rtol=case.tolerance, atol=case.tolerance)


TRAPS: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "outer comparison of one vector": (lambda x: x[:, None] <= x[None, :], (rand(7),)),
    "outer difference of a computed vector": (lambda x: (x * 2)[:, None] - (x * 2)[None, :], (rand(7),)),
    "matrix plus its transpose": (lambda x: (x + 1) + (x + 1).t(), (rand(7, 7),)),
    "softmax plus its transpose": (lambda x: torch.softmax(x, -1) + torch.softmax(x, -1).t(), (rand(7, 7),)),
    "row sums as a row": (lambda x: x - x.sum(1), (rand(7, 7),)),
    "column and row sums": (lambda x: (x.sum(0), x.sum(1)), (rand(7, 7),)),
    "softmax both ways": (lambda x: torch.softmax(torch.softmax(x, 0), 1), (rand(7, 9),)),
    "total used in each element": (lambda x: x / x.sum(), (rand(7, 9),)),
    "mean of row norms": (lambda x: (x - x.mean(-1, keepdim=True)).pow(2).sum(-1).sqrt().mean(), (rand(7, 9),)),
    "norm then rolled": (lambda x: torch.softmax(x, -1).roll(1, -1) * x, (rand(7, 9),)),
    "norm then flipped": (lambda x: torch.softmax(x, -1).flip(-1) + torch.softmax(x, -1), (rand(7, 9),)),
    "overlapping slices": (lambda x: (x * 2)[1:] - (x * 2)[:-1], (rand(9, 5),)),
    "reshape across the axis": (lambda x: torch.softmax(x, -1).view(3, -1).sum(-1), (rand(9, 4),)),
    "two row lengths": (lambda x, y: (torch.softmax(x, -1).sum(0), torch.softmax(y, -1)), (rand(7, 9), rand(7, 5))),
    "softmax of slices of a norm": (lambda x: torch.softmax(F.layer_norm(x, (8,)).view(4, 2, 4), -1), (rand(4, 8),)),
    "variance feeds broadcasts of both sides": (lambda x: x.var(0)[:, None] * x.var(0)[None, :], (rand(9, 7),)),
    "expanded then summed": (lambda x: (x[:, None, :].expand(5, 4, 3) * 2).sum(1) + x, (rand(5, 3),)),
    "cumsum then sum": (lambda x: x.cumsum(-1) / x.cumsum(-1)[:, -1:], (rand(5, 6).abs() + 1,)),
    "reduction of size one": (lambda x: x.sum(1, keepdim=True) + x.amax(1, keepdim=True), (rand(7, 1),)),
    "select after softmax": (lambda x: torch.softmax(x, -1)[:, 0] + torch.softmax(x, -1)[:, -1], (rand(7, 9),)),
    "argmax as an index": (lambda x: x.gather(1, x.argmax(1, keepdim=True)) * 2, (rand(7, 9),)),
    "diagonal of an outer product": (lambda x: torch.diagonal(x[:, None] * (x + 1)[None, :]) + x, (rand(7),)),
    "strided views of one result": (lambda x: (x * 3)[::2] + (x * 3)[1::2], (rand(8, 5),)),
    "result viewed and changed": (lambda x: (x * 2).view(-1).add_(1).view(5, 4).t() + 1, (rand(5, 4),)),
    "a scalar of everything twice": (lambda x: (x - x.mean()) / (x.std() + 1e-5), (rand(6, 70),)),
    "two pointwise readers with a call between": (lambda x: (x.exp(), (x.exp() @ x).relu() + x), (rand(7, 7),)),
    "siblings, transposed": (lambda x: (x * 2, x.t() + 1, x.sum(0), x.sum(1)), (rand(7, 7),)),
    "siblings of a few long rows": (lambda x: (x * 2, x.sum(-1), x.amax(-1)), (rand(2, 9000),)),
    "sliced in steps and written": (lambda x: torch.slice_scatter(x * 2, x[:, 1::3] - 1, 1, 1, None, 3), (rand(5, 9),)),
    "few long rows": (lambda x: torch.softmax(x, -1) + x.sum(-1, keepdim=True), (rand(2, 9000),)),
    "parts of a table made of positions": (
        lambda x: torch.cat([p * a for p, a in zip(x.chunk(2, -1), torch.arange(8.0).split(4))], -1),
        (rand(5, 8),),
    ),
    "long total then elementwise": (lambda x: x * x.pow(2).sum().rsqrt(), (rand(20000),)),
}  # fmt: skip


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", TRAPS)
def test_traps(name: str, dynamic: bool) -> None:
    fn, args = TRAPS[name]
    want, got, _ = compiled(fn, *args, dynamic=dynamic)
    torch.testing.assert_close(got, want, rtol=3e-5, atol=3e-5)


def test_no_recompile_per_length() -> None:
    """Batch and sequence symbolic: one graph for all sizes, kernels that take them at run time."""
    torch._dynamo.reset()

    def block(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        h = rms_norm(x, w)
        scores = torch.softmax(h @ h.transpose(1, 2) / 8, -1)
        return F.gelu(scores @ h) + x

    with collect() as records, torch.no_grad():
        run = torch.compile(
            block, backend=fusionc, dynamic=True, options={"target": "cpp", "verify": True, "cache": False}
        )
        for batch, length in ((2, 7), (3, 16), (2, 65), (5, 8)):
            x, w = rand(batch, length, 64), rand(64)
            torch.testing.assert_close(run(x, w), block(x, w), rtol=1e-4, atol=1e-4)
    assert len(records) == 1, [r.name for r in records]


WRITTEN = {
    "a cast": (lambda x: x.float(), lambda y, x: y.cumsum(1)),
    "a cast of a view": (lambda x: x.t().float(), lambda y, x: y.cumsum(1)),
    "a cast of another dtype's view": (lambda x: x.view(torch.int16).float(), lambda y, x: y.cumsum(1)),
    "a chain with two readers": (lambda x: x.float() * 2 + 1, lambda y, x: (y.sum(0), y.cumsum(1))),
    "and the new value": (lambda x: x.float() * 2 + 1, lambda y, x: (y.t() + x, y + x.float())),
    "gathered": (lambda x: x[torch.tensor([0, 1, 2, 3, 0])].float(), lambda y, x: (y + 1, x + 1)),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_what_was_read_before_a_write_is_the_old_value(name: str) -> None:
    before, after = WRITTEN[name]

    def fn(x: torch.Tensor, value: torch.Tensor) -> Any:
        y = before(x)
        x.index_put_((torch.tensor([1, 3]),), value)
        return after(y, x)

    x, value = rand(4, 4).to(torch.bfloat16), rand(2, 4).to(torch.bfloat16)
    mine = x.clone()
    torch._dynamo.reset()
    with torch.no_grad():
        got = torch.compile(fn, backend=fusionc, options={"target": "cpp", "verify": True, "cache": False})(mine, value)
        want = fn(x, value)
    assert torch.equal(mine, x)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


# -- many parts, many operators -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "numbers", "target", "calls"),
    [(4, 1 << 15, "cpp", 0), (5, 1 << 15, "cpp", 1), (20, 64, "cpp", 0), (33, 64, "cpp", 1), (20, 1 << 15, "sm_90", 0), (33, 64, "sm_90", 1)],
)
def test_a_concatenation_of_many_parts_is_the_librarys(parts: int, numbers: int, target: str, calls: int) -> None:
    torch._dynamo.reset()
    xs = [rand(k % 2 + 1, numbers) for k in range(parts)]

    def f(xs: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat(xs) * 2

    with torch.no_grad(), collect() as records:
        got = torch.compile(f, backend=fusionc, options={"target": target, "cache": False})(xs)
    assert torch.equal(got, f(xs))
    assert ["cat" in c.op for r in records for c in r.calls] == [True] * calls
    assert not records[0].fallbacks and len(records[0].kernels) == 1


def test_a_chain_that_no_memory_ends_is_looked_at_without_recursion() -> None:
    lines = ["%t0: f32[8] = aten.full([8], 1.0)"]
    lines += [f"%t{k}: f32[8] = aten.add(%t{k - 1}, 1)" for k in range(1, 3000)]
    gm = parse("\n".join([*lines, "%u: f32[8] = aten.mul(%t2999, %t2999)", "return (%u)", ""]))
    grouper = Grouper(gm.graph, torch.device("cpu"))
    grouper.classify()
    chain = list(gm.graph.nodes)
    assert grouper._closed(chain[2999]) is None
    assert [grouper._closed(n) for n in chain[:18]] == [*range(17), None]
