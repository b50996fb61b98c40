"""Correctness probes: three-line programs on which torch.compile backends are known to go wrong, or could.

Numbers are issues of pytorch/pytorch; the programs are written anew from what the issue describes.  Each probe runs
eager and compiled on equal copies of its inputs and compares results, inputs afterwards, and which results share
memory with which inputs.  ``python -m tests.sweeps.probes --backend inductor`` prints the table for any backend.
"""

from __future__ import annotations

import argparse
import functools
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch._dynamo
import torch.nn.functional as F
from torch.utils import _pytree as pytree

from tests.sweeps.backends import Counting, prepare
from tests.sweeps.compare import compare, copy_tree, widen_tree

INF, NAN = float("inf"), float("nan")


@dataclass(frozen=True)
class Probe:
    """One probe.

    calls       argument tuples; the compiled function is called with each in turn
    graphs      how many graphs may be compiled over all calls (None: any number)
    dynamic     torch.compile's argument
    backward    compare gradients of the inputs that require them, instead of running under no_grad
    exact       results must be equal to the last bit; only where each result is one operator away from the inputs,
                since a fused kernel may contract a multiplication and an addition
    zeros       zeros must have eager's sign; not with maximum and minimum, where eager's depends on the position
    aliases     also compare which tensors share storage
    dynamo_bug  the number of an issue that no backend can repair
    """

    name: str
    function: Callable[..., Any]
    calls: Callable[[], list[tuple[Any, ...]]]
    graphs: int | None = None
    dynamic: bool | None = None
    backward: bool = False
    exact: bool = False
    zeros: bool = False
    aliases: bool = False
    dynamo_bug: int | None = None


PROBES: dict[str, Probe] = {}


def probe(*calls: Callable[[], tuple[Any, ...]], **settings: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as a probe; each argument makes the arguments of one call (seeded before)."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        name = function.__name__
        assert name not in PROBES, name
        PROBES[name] = Probe(name, function, lambda: [make() for make in calls], **settings)
        return function

    return register


def special(*shape: int) -> torch.Tensor:
    """Random float32 values with NaN, infinities, both zeros, a subnormal and the largest number sprinkled in."""
    out = torch.randn(shape)
    values = torch.tensor([NAN, INF, -INF, 0.0, -0.0, 1e-45, -1e-45, 3.4028235e38])
    flat = out.view(-1)
    flat[: values.numel()] = values
    return flat[torch.randperm(flat.numel())].view(shape)


# --- mutation and aliasing: the largest silent class ---


@probe(lambda: (torch.randn(6, 3), torch.tensor([1, 4]), torch.randn(2, 3)), exact=True)
def issue_198270_index_put_then_flip(x: Any, i: Any, v: Any) -> Any:
    x.index_put_((i,), v)
    x.add_(x.flip(0))
    return x * 1


@probe(lambda: (torch.arange(6.0),), exact=True)
def issue_198033_foreach_add_reads_itself(x: Any) -> Any:
    torch._foreach_add_([x], [x.flip(0)])
    return x.clone()


@probe(lambda: (torch.zeros(3, 4), torch.arange(12.0).view(3, 4)), exact=True)
def issue_198131_copy_then_source_changes(d: Any, s: Any) -> Any:
    d[0:, :] = s[0:, :]
    s.add_(1)
    return s


@probe(lambda: (torch.arange(-12, 12).reshape(4, 6),), exact=True)
def issue_198101_dtype_view_then_base_changes(x: Any) -> Any:
    y = x.view(torch.int32) * 2
    y.sub_(-4)
    x[:, 2:5] = 2
    return y.view(torch.int64)


@probe(lambda: (torch.ones(2, 2),), dynamo_bug=195422)
def issue_195422_in_place_on_dropout_in_eval(x: Any) -> Any:
    y = F.dropout(x, 0.5, False)
    y += y
    return y


@probe(lambda: (torch.randn(8, 4),))
def issue_94777_write_through_two_views(x: Any) -> Any:
    a, b = x[::2], x.t()[1:3]
    a.mul_(2)
    b.add_(a.sum())
    return x.clone(), a.clone()


@probe(lambda: (torch.zeros(4, 2),))
def issue_122457_reuse_with_several_views(x: Any) -> Any:
    z = torch.view_as_complex(x + 1)
    a = torch.view_as_real(z)
    return a + 1, torch.view_as_real(z + 1)


@probe(lambda: (torch.randn(4, 4),), aliases=True)
def issue_138908_view_of_input_and_its_update(x: Any) -> Any:
    y = x.view(-1)
    x.add_(1)
    z = y[2:6]
    z.mul_(3)
    return y, z, x + 1


@probe(lambda: (torch.randn(3, 4),))
def shifted_self_read(x: Any) -> Any:
    x[1:] += x[:-1].clone()
    x[:, :-1].mul_(x[:, 1:])
    return x.sum()


@probe(lambda: (torch.randn(5),), exact=True, aliases=True)
def input_returned_as_is(x: Any) -> Any:
    return x, x.view(5, 1), x + 1


@probe(lambda: (torch.randn(4, 6),), exact=True, aliases=True)
def outputs_alias_each_other(x: Any) -> Any:
    y = x + 1
    return y, y.t(), y[1:], y.detach()


@probe(lambda: (torch.randn(4, 6),), exact=True)
def one_result_twice(x: Any) -> Any:
    y = x * 2
    return y, y, [y, (y,)]


def _overlapping() -> tuple[torch.Tensor, torch.Tensor]:
    base = torch.arange(10.0)
    return base[:6], base[4:]


@probe(_overlapping, exact=True)
def two_inputs_share_memory(a: Any, b: Any) -> Any:
    a.mul_(2)
    return a[-2:] + b[:2]


@probe(lambda: (torch.randn(4, 6),), exact=True)
def input_changed_and_result_unused(x: Any) -> None:
    x.add_(1)
    x.t_()


@probe(lambda: (torch.randn(4, 6), torch.randn(6)), exact=True)
def out_argument(x: Any, v: Any) -> Any:
    out = torch.empty(4, 6)
    torch.add(x, v, out=out)
    return out


@probe(lambda: (torch.randn(6, 3), torch.tensor([0, 2, 2, 5]), torch.ones(4, 3)))
def duplicate_indices_accumulate(x: Any, i: Any, v: Any) -> Any:
    return x.index_add(0, i, v), x.index_put((i,), v, accumulate=True), x.index_put_((i,), v, accumulate=True)


# --- NaN, infinities, signed zeros ---


@probe(lambda: (special(5, 7), special(5, 7)), exact=True)
def nan_and_inf_in_min_max_clamp(x: Any, y: Any) -> Any:
    results = [torch.maximum(x, y), torch.minimum(x, y), torch.fmax(x, y), torch.fmin(x, y)]
    results += [x.clamp(-1, 1), x.clamp(min=0.0), x.clamp(max=y), x.amax(1), x.amin(0), x.max(), F.relu(x), F.relu6(x)]
    return results, x.max(1), F.hardtanh(x), F.leaky_relu(x), F.threshold(x, 0.5, 0.0), x.nan_to_num()


@probe(lambda: (torch.tensor([-0.0, 0.0, -1.0, 1.0, -1e-45, 1e-45, 3.7, -3.7, 0.5, -0.5]),), zeros=True)
def signed_zeros(x: Any) -> Any:
    results = [x * 0.0, -x, x + 0.0, x - 0.0, 0.0 - x, x * -1.0, x.abs(), torch.sign(x), x / INF, torch.copysign(x, -x)]
    results += [x.round(), x.ceil(), x.floor(), x.trunc(), F.relu(x), torch.fmod(x, 2.0), torch.remainder(x, 2.0)]
    return results, torch.signbit(x), torch.atan2(x, -x), 1.0 / x, torch.where(x > 0, x, -x), x.sqrt(), x.rsqrt()


@probe(*[lambda n=n: (torch.full((n,), -0.0),) for n in (1, 33)], zeros=True)
def signed_zeros_at_a_bound(x: Any) -> Any:
    results = [
        F.relu(x),
        x.clamp(min=0.0),
        x.clamp(0.0, 6.0),
        F.relu6(x),
        F.hardtanh(x, 0.0, 1.0),
        (-x).clamp(max=-0.0),
    ]
    return results, F.leaky_relu(x), F.threshold(x, 0.0, 0.0), x.sum(), torch.sign(x), x.sum() * x


@probe(lambda: (special(4, 9),))
def nan_through_reductions(x: Any) -> Any:
    finite = torch.where(torch.isfinite(x), x, torch.zeros_like(x)).clamp(-10, 10)
    results = [x.sum(1), torch.sign(x), x.mean(0), x.softmax(1), x.logsumexp(0), x.cumsum(1), x.var(1), x.norm(dim=0)]
    return results, x.nansum(1), x.any(1), x.all(0), finite.log_softmax(0), x.isnan().sum(), x.count_nonzero(1)


@probe(lambda: (special(6, 5),), exact=True)
def nan_in_argmax_sort_and_compare(x: Any) -> Any:
    return x.argmax(1), x.argmin(0), x.max(1), x.min(0), x.sort(1), x.topk(2, 1), x == x, x > 0, x.isinf(), x != x  # noqa: PLR0124


@probe(lambda: (torch.full((3, 4), -INF), torch.tensor([[True, False], [False, False]])))
def rows_of_minus_infinity(x: Any, mask: Any) -> Any:
    scores = torch.zeros(2, 2).masked_fill(~mask, -INF)
    return x.softmax(1), x.logsumexp(1), scores.softmax(1), x.amax(1), x.log_softmax(0)


# --- shapes ---


@probe(lambda: (torch.empty(0, 4), torch.empty(3, 0)))
def no_elements(x: Any, y: Any) -> Any:
    results = [x + 1, x.sum(), x.sum(0), x.sum(1), x.prod(0), x.t() * 2, x.all(), x.any(0), x.cumsum(0), x.softmax(1)]
    return results, y.sum(1), torch.cat([x, torch.ones(2, 4)]), x @ torch.ones(4, 2), y @ torch.ones(0, 2), y.mean(0)


@probe(lambda: (torch.tensor(2.5), torch.tensor(3), torch.randn(3)))
def zero_dimensional(s: Any, i: Any, v: Any) -> Any:
    return s * 2, s + i, v * s, v * i, s.sum(), s.view(1), v.sum() * s, torch.stack([s, s]), i // 2, s.argmax()


@probe(lambda: (torch.tensor(0.1, dtype=torch.float64), torch.randn(4), torch.arange(4)))
def zero_dimensional_does_not_promote(s: Any, v: Any, i: Any) -> Any:
    return v * s, v + s, i * s, i + 1.5, v.to(torch.bfloat16) * s, torch.where(v > 0, v, s)


@probe(lambda: (torch.randn(4, 1, 3).expand(4, 5, 3), torch.randn(40)[3:18].view(5, 3), torch.randn(3, 5).t()))
def strides_of_every_kind(e: Any, o: Any, t: Any) -> Any:
    return e + o, o * t, e.sum(1), t.contiguous(), e.reshape(-1) * 2, torch.cat([o, t]), t.softmax(0), e.mean((0, 2))


@probe(lambda: (torch.as_strided(torch.randn(64), (3, 4), (9, 2), 5), torch.randn(4, 3, 2).permute(2, 0, 1)))
def gaps_between_elements(a: Any, p: Any) -> Any:
    return a.exp(), a.sum(0), p.sum(2) + 1, p.permute(1, 2, 0).reshape(12, 2) * 2, a.flip(1), a.roll(1, 0)


@probe(lambda: (torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last), torch.randn(3)))
def channels_last(x: Any, scale: Any) -> Any:
    y = F.relu(x * scale.view(1, 3, 1, 1))
    return y, y.mean((2, 3)), F.avg_pool2d(y, 2), y.contiguous(), F.group_norm(y, 3), y.sum(1)


@probe(lambda: (torch.randn(1, 5), torch.randn(4, 1), torch.randn(1)), exact=True)
def sizes_of_one(a: Any, b: Any, c: Any) -> Any:
    return a + b, a * c, b.squeeze(1) + a.squeeze(0)[:4], a.expand(3, 5) * c, torch.cat([a, a]), b.sum(1), a.amax(0)


@probe(lambda: (torch.randn(3, 4), torch.randn(2, 4), torch.randn(5, 2)))
def views_of_views(a: Any, b: Any, c: Any) -> Any:
    joined = torch.cat([a, b], 0)[1:].t()
    padded = F.pad(c, (1, 2, 0, 1), value=2.0)
    return (
        joined.reshape(2, 8).unsqueeze(1) + 1,
        padded[:, ::2].flip(0),
        torch.stack([a[0], b[1]]).sum(0),
        c.t().roll(2, 1),
    )


# --- dtypes ---


def _all_kinds() -> tuple[torch.Tensor, ...]:
    return (
        torch.randn(7),
        torch.randn(7).to(torch.bfloat16),
        torch.randn(7).half(),
        torch.randn(7, dtype=torch.float64),
        torch.arange(-3, 4),
        torch.arange(-3, 4, dtype=torch.int32),
        torch.arange(7, dtype=torch.uint8),
        torch.tensor([True, False, True, True, False, False, True]),
    )


@probe(_all_kinds, exact=True)
def promotion_of_every_pair(*tensors: Any) -> Any:
    return [a + b for a in tensors for b in tensors], [a * 2 for a in tensors], [a * 0.5 for a in tensors]


@probe(_all_kinds, exact=True)
def casts_of_every_pair(*tensors: Any) -> Any:
    return [
        a.to(b.dtype) for a in tensors[:6] for b in tensors if not (a.is_floating_point() and b.dtype is torch.uint8)
    ]


@probe(
    lambda: (torch.tensor([-7, -6, -1, 0, 1, 6, 7, -(2**63)]), torch.tensor([2, -4, 3, 5, -2, 4, -3, 1])),
    lambda: (torch.tensor([-7.5, -6.0, -1.0, -0.0, 1.0, 6.0, 7.5, INF]), torch.tensor([2.0, -4, 3, 5, -2, 4, -3, 1])),
    exact=True,
)
def division_of_every_kind(a: Any, b: Any) -> Any:
    results = [a // b, a % b, torch.fmod(a, b), torch.remainder(a, b), a / b, torch.div(a, b, rounding_mode="trunc")]
    return results, torch.div(a, b, rounding_mode="floor"), a // 2, a % -3, torch.floor_divide(a, 3)


@probe(lambda: (torch.tensor([2**63 - 1, -(2**63), 5, -5]), torch.tensor([1, 2, 40, 63])), exact=True)
def integer_extremes_and_shifts(a: Any, s: Any) -> Any:
    results = [a + 1, a * 3, -a, a.abs(), a >> s, a << s, ~a, a & 255, a | 1, a ^ a.flip(0), a.sum(), a.cumsum(0)]
    return results, a.to(torch.int32), a.to(torch.float32), a.clamp(-10, 10), torch.sign(a), a.max(), (a > s).sum()


@probe(
    lambda: (torch.tensor([200, 100, 255], dtype=torch.uint8), torch.tensor([100, -100, 127], dtype=torch.int8)),
    exact=True,
)
def small_integers_wrap(u: Any, i: Any) -> Any:
    return u + u, i + i, u * 2, -u, i - 100, u.sum(), u.prod(), u + i, u // 3, i >> 1, u << 1, i.to(torch.uint8), ~u


@probe(lambda: (torch.rand(5) > 0.5, torch.rand(5) > 0.5), exact=True)
def booleans(a: Any, b: Any) -> Any:
    results = [a & b, a | b, a ^ b, ~a, a == b, a.sum(), a.any(), a.all(), a + b, a * b, a.to(torch.float32) * 2]
    return results, torch.where(a, 1, 0), a.cumsum(0), a.logical_not(), a.int().argmax(), a < b, a.int() - b.int()


@probe(lambda: (torch.randn(4, 3, dtype=torch.complex64), torch.randn(4, 3)))
def complex_numbers(z: Any, x: Any) -> Any:
    w = z * torch.exp(1j * x)
    return (
        w,
        w.abs(),
        w.real + 1,
        w.imag,
        w.conj() * 2,
        torch.view_as_real(w).sum(-1),
        z.mT @ z,
        torch.complex(x, x),
        z.angle(),
    )


@probe(lambda: (torch.randn(64, 33).to(torch.bfloat16), torch.randn(33).to(torch.bfloat16)))
def bfloat16_norm_and_softmax(x: Any, w: Any) -> Any:
    norm = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    return w * norm.to(torch.bfloat16), x.softmax(-1), F.layer_norm(x, (33,), w, w), F.gelu(x), x.sum(), F.silu(x) * x


@probe(lambda: (torch.randn(4, 8), torch.randn(8, 8)))
def autocast(x: Any, w: Any) -> Any:
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        y = F.linear(x, w)
        return y, y.softmax(-1), F.layer_norm(y, (8,)), (y + x).sum()


@probe(lambda: (torch.randn(16), torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 1e10, -1e-8, 88.8, -104.0])))
def elementary_functions(x: Any, y: Any) -> Any:
    results = [
        f(x) for f in (torch.exp, torch.tanh, torch.sigmoid, torch.erf, torch.sin, torch.cos, F.gelu, F.softplus)
    ]
    results += [f(y) for f in (torch.exp, torch.expm1, torch.tanh, torch.sigmoid, torch.round, F.mish, F.elu, F.silu)]
    positive = x.abs() + 1e-3
    return (
        results,
        positive.log(),
        positive.log1p(),
        positive.rsqrt(),
        positive.pow(x),
        positive.pow(0.5),
        x.pow(3),
        x.atan2(x.flip(0)),
    )


# --- state: random numbers, gradients, dynamic shapes ---


@probe(lambda: (torch.randn(32, 8),), exact=True)
def random_numbers_equal_eager(x: Any) -> Any:
    noise = torch.rand_like(x) + torch.randn(8)
    return F.dropout(x, 0.5, True), noise, torch.bernoulli(x.sigmoid()), torch.randint(0, 9, (4,)), torch.randperm(7)


@probe(lambda: (torch.randn(64, 8, requires_grad=True),), backward=True)
def dropout_gradient_uses_the_same_mask(x: Any) -> Any:
    return F.dropout(x * 2, 0.3, True)


@probe(
    lambda: (torch.randn(6, 8, requires_grad=True), torch.randn(8, requires_grad=True), torch.randn(8)), backward=True
)
def gradients_of_a_norm(x: Any, w: Any, b: Any) -> Any:
    y = F.layer_norm(x, (8,), w, b)
    return F.gelu(y), y.detach() + 1


@probe(lambda: (torch.randn(6, 10, requires_grad=True), torch.tensor([1, 9, -100, 0, 3, 3])), backward=True)
def gradients_of_cross_entropy(x: Any, t: Any) -> Any:
    return F.cross_entropy(x, t), F.cross_entropy(x, t, reduction="none", label_smoothing=0.1)


@probe(lambda: (torch.randn(9, 4, requires_grad=True), torch.tensor([[1, 1, 3], [0, 8, 1]])), backward=True)
def gradients_of_an_embedding(w: Any, i: Any) -> Any:
    return F.embedding(i, w, padding_idx=3) * 2, w[i[0]], torch.index_select(w, 1, i[0])


@probe(lambda: (torch.randn(4, 4, requires_grad=True),), backward=True)
def gradients_with_in_place_and_views(x: Any) -> Any:
    y = x * 2
    y[1:] += x[:1] * x[1:]
    return y.t().clone().relu_(), y.max(1).values, y.cumsum(0)


@probe(*[lambda n=n: (torch.randn(n, 6),) for n in (4, 5, 7, 12)], dynamic=True, graphs=1)
def symbolic_batch_compiles_once(x: Any) -> Any:
    return x.softmax(-1) + x.mean(0), x.sum(1), torch.cat([x, x * 2]), x.view(-1)[1:] * 2


@probe(*[lambda n=n: (torch.randn(3, n, 8), torch.randn(8, 8)) for n in (5, 6, 9, 17)], dynamic=True, graphs=1)
def symbolic_length_compiles_once(x: Any, w: Any) -> Any:
    scores = (x @ w) @ x.transpose(1, 2)
    mask = torch.ones(x.size(1), x.size(1), dtype=torch.bool, device=x.device).tril()
    return scores.masked_fill(~mask, -INF).softmax(-1) @ x, x.size(1) * 2, torch.arange(x.size(1)) + 1


@probe(
    *[lambda n=n: (torch.randn(n, 4, requires_grad=True),) for n in (3, 5, 8)], dynamic=True, graphs=1, backward=True
)
def symbolic_batch_training_compiles_once(x: Any) -> Any:
    return F.layer_norm(x, (4,)).tanh().sum(0), x.logsumexp(0)


@probe(*[lambda n=n: (torch.randn(n, 4),) for n in (3, 2, 1, 0)], dynamic=True)
def symbolic_sizes_down_to_zero(x: Any) -> Any:
    return x.sum(0), x + 1, torch.cat([x, x]), x.t().reshape(-1)


@probe(lambda: (torch.randn(4), 3, 2.5, True), lambda: (torch.randn(4), 4, 3.5, False))
def python_numbers(x: Any, i: int, f: float, b: bool) -> Any:
    return x * i + f if b else x - i * f, i + 1, f * 2


@probe(lambda: (torch.randn(4, 6),))
def graph_break_in_the_middle(x: Any) -> Any:
    y = x.softmax(1)
    torch._dynamo.graph_break()
    y.mul_(2)
    return y.sum(0) if y.sum() > 0 else y


@probe(lambda: (torch.tensor([1, 0, 2, 0, 3]),), exact=True)
def sizes_that_depend_on_data(x: Any) -> Any:
    return x.nonzero(), x[x > 0] * 2, x.unique()


@probe(lambda: (torch.randn(4, 5), {"a": torch.randn(5), "b": [torch.randn(4, 1), None]}), exact=True)
def nested_arguments_and_results(x: Any, d: Any) -> Any:
    return {"sum": x + d["a"], "list": [x * d["b"][0], None, (d["a"],)], "number": 3}


def _sharing(tree: Any, inputs: Any) -> list[int]:
    """For each tensor of the results and then the inputs, the index of the first one with the same storage."""
    tensors = [t for t in pytree.tree_leaves((tree, inputs)) if isinstance(t, torch.Tensor)]
    seen: dict[int, int] = {}
    return [seen.setdefault(t.untyped_storage()._cdata, index) for index, t in enumerate(tensors)]


def _run(function: Any, args: Any, backward: bool, seed: int) -> tuple[Any, ...]:
    torch.manual_seed(seed)
    if not backward:
        with torch.no_grad():
            return function(*args), args
    out = function(*args)
    outputs = [t for t in pytree.tree_leaves(out) if isinstance(t, torch.Tensor) and t.requires_grad]
    inputs = [t for t in args if isinstance(t, torch.Tensor) and t.requires_grad]
    generator = torch.Generator().manual_seed(seed)
    cotangents = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.device, t.dtype) for t in outputs]
    return out, args, torch.autograd.grad(outputs, inputs, cotangents)


def _oracle(item: Probe, given: Any, index: int) -> Any:
    return _run(item.function, widen_tree(given), item.backward, index)


def run_probe(item: Probe, backend: Any, device: str = "cpu") -> str | None:
    """None when the compiled program does what eager does, else one line that says what it does instead.

    ``backend`` is what torch.compile takes, with an attribute ``graphs`` that counts graphs.
    """
    torch._dynamo.reset()
    before = backend.graphs
    compiled = torch.compile(item.function, backend=backend, dynamic=item.dynamic)
    torch.manual_seed(0)
    for index, made in enumerate(item.calls()):
        given = pytree.tree_map_only(torch.Tensor, lambda t: t.to(device) if device != "cpu" else t, made)
        with torch.device(device):
            args = copy_tree(given)
            want = _run(item.function, args, item.backward, index)
            shared = _sharing(want[0], args)
            args = copy_tree(given)
            got = _run(compiled, args, item.backward, index)
            problem = compare(
                got,
                want,
                functools.partial(_oracle, item, given, index),
                signed_zeros=item.zeros,
            )
            if problem is None and item.exact:
                problem = _unequal(got, want)
        if problem is None and item.aliases and _sharing(got[0], args) != shared:
            problem = f"shares memory as {_sharing(got[0], args)}, eager as {shared}"
        if problem is not None:
            return f"call {index}: {problem}"
    if backend.graphs == before:
        return "no graph reached the backend"
    if item.graphs is not None and backend.graphs - before > item.graphs:
        return f"compiled {backend.graphs - before} graphs, at most {item.graphs} are needed"
    return None


def _unequal(got: Any, want: Any) -> str | None:
    for index, (a, b) in enumerate(zip(pytree.tree_leaves(got), pytree.tree_leaves(want), strict=True)):
        if isinstance(b, torch.Tensor) and not torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)):
            return f"result {index} is close to eager's but not equal"
    return None


def main(argv: list[str] | None = None) -> int:
    """Run all probes in this process and print one line each."""
    parser = argparse.ArgumentParser(prog="python -m tests.sweeps.probes", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backend", default="fusionc")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--match", default="", help="only probes whose name contains this")
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    prepare(args.backend)
    wrong = 0
    chosen = [item for item in PROBES.values() if args.match in item.name]
    for item in chosen:
        try:
            problem = run_probe(item, Counting(args.backend), args.device)
        except Exception as error:
            problem = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
        word, text = ("wrong", f": {problem}") if problem else ("right", "")
        if problem and item.dynamo_bug:
            text += f" (Dynamo's bug {item.dynamo_bug}; no backend can repair it)"
        wrong += bool(problem) and not item.dynamo_bug
        print(f"{word:6s} {item.name}{text}", flush=True)
    print(f"{args.backend} on {args.device}: {len(chosen)} probes, {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
