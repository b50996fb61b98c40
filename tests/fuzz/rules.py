"""The fuzzer's operators, and for each the typed rule that chooses its arguments.

A rule looks at the values that exist (real tensors, since programs are run by eager while they grow) and returns
argument names and parameters, or None when nothing fits.  Two facts are known about each value besides its tensor:

* ``exact``: no rounding happened on the way.  Operators with jumps (comparison, floor, casts to integers, argmax,
  indices) take only exact floats: on rounded ones a right compiler may give another answer than eager.
* that it is finite and small; results that overflow are thrown away by the generator, so that a wider intermediate
  in a fused kernel is not mistaken for an error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from tests.fuzz.choose import Chooser, Value

Arguments = tuple[tuple[str, ...], dict[str, Any]] | None
Pick = Callable[[Chooser], Arguments]


@dataclass(frozen=True)
class Rule:
    """``keeps``: floats stay exact; ``smooth``: has a gradient worth checking; ``ties``: the
    gradient jumps where two values are equal, as rounded ones may or may not be; ``weight``: how often it is drawn."""

    name: str
    function: Callable[..., Any]
    pick: Pick
    keeps: bool = False
    smooth: bool = True
    ties: bool = False
    mutates: bool = False
    weight: int = 1


RULES: dict[str, Rule] = {}
OPS: dict[str, Callable[..., Any]] = {}


def rule(name: str, function: Callable[..., Any], pick: Pick, **facts: Any) -> None:
    RULES[name] = Rule(name, function, pick, **facts)
    OPS[name] = function


def is_float(v: Value) -> bool:
    return v.tensor.is_floating_point()


def is_int(v: Value) -> bool:
    return not v.tensor.is_floating_point() and v.tensor.dtype is not torch.bool


def is_wide(v: Value) -> bool:
    """Of a dtype that every operator knows, on any device."""
    return v.tensor.dtype in (torch.float32, torch.float64)


def exact(v: Value) -> bool:
    return v.exact


def varied(v: Value) -> bool:
    """Finite floats that differ along each row: norms of constant rows are rounding errors."""
    if not is_float(v) or v.tensor.ndim == 0 or v.tensor.shape[-1] < 2:
        return False
    return bool((v.tensor.double().var(-1) > 1e-2).all())


def named(x: Value | None, **params: Any) -> Arguments:
    """The arguments of an operator of one value."""
    return None if x is None else ((x.name,), params)


def _floats(c: Chooser) -> Arguments:
    x = c.value(is_float)
    return None if x is None else ((x.name,), {})


def _exact_floats(c: Chooser) -> Arguments:
    x = c.value(lambda v: is_float(v) and v.exact)
    return None if x is None else ((x.name,), {})


def _numbers(c: Chooser) -> Arguments:
    x = c.value(lambda v: v.tensor.dtype is not torch.bool)
    return None if x is None else ((x.name,), {})


def _anything(c: Chooser) -> Arguments:
    x = c.value()
    return ((x.name,), {}) if x is not None else None


def pair(c: Chooser, test: Callable[[Value], bool] = lambda v: True) -> tuple[Value, Value] | None:
    """Two values that broadcast together, dtypes mixed."""
    x = c.value(test)
    if x is None:
        return None
    y = c.value(lambda v: test(v) and broadcasts(x.tensor.shape, v.tensor.shape))
    return None if y is None else (x, y)


def broadcasts(a: Any, b: Any) -> bool:
    return all(m == n or 1 in (m, n) for m, n in zip(reversed(a), reversed(b), strict=False))


def _pair_of(test: Callable[[Value], bool]) -> Pick:
    def pick(c: Chooser) -> Arguments:
        both = pair(c, test)
        return None if both is None else ((both[0].name, both[1].name), {})

    return pick


_numeric = _pair_of(lambda v: v.tensor.dtype is not torch.bool)
_float_pair = _pair_of(is_float)
_exact_pair = _pair_of(exact)
_integral = _pair_of(lambda v: not is_float(v))


def _scalar(c: Chooser) -> Arguments:
    x = c.value(lambda v: v.tensor.dtype is not torch.bool)
    if x is None:
        return None
    return (x.name,), {"number": c.pick([2, -1, 3] if is_int(x) else [0.5, -1.25, 2, 0])}


# --- elementwise ---
for _name in ("exp", "tanh", "sigmoid", "sin", "cos", "erf", "square", "expm1", "atan", "sinh"):
    rule(_name, getattr(torch, _name), _floats)
_SMOOTH: dict[str, Callable[..., Any]] = {
    "gelu": F.gelu,
    "silu": F.silu,
    "softplus": F.softplus,
    "elu": F.elu,
    "mish": F.mish,
}
for _name, _function in _SMOOTH.items():
    rule(_name, _function, _floats)
rule("sqrtabs", lambda x: (x.abs() + 0.25).sqrt(), _floats)
rule("rsqrtabs", lambda x: (x.abs() + 0.25).rsqrt(), _floats)
rule("log1pabs", lambda x: x.abs().log1p(), _floats)
rule("reciprocal", lambda x: (x * x + 0.5).reciprocal(), _floats)
for _name in ("neg", "abs"):
    rule(_name, getattr(torch, _name), _numbers, keeps=True)
rule("relu", F.relu, _numbers, keeps=True)
rule("clamp", lambda x: x.clamp(-1, 2), _numbers, keeps=True)
rule("leaky", lambda x: F.leaky_relu(x, 0.25), _floats)
for _name in ("floor", "ceil", "trunc", "round", "sign", "isnan", "frac"):
    rule(_name, getattr(torch, _name), _exact_floats, keeps=True, smooth=False)
rule("add", torch.add, _numeric, weight=3)
rule("sub", torch.sub, _numeric, weight=2)
rule("mul", torch.mul, _numeric, weight=3)
rule("div", lambda x, y: x / (y.abs() + 1), _numeric)
rule("atan2", lambda x, y: torch.atan2(x, y.abs() + 0.5), _float_pair)
for _name in ("maximum", "minimum", "fmax"):
    rule(_name, getattr(torch, _name), _numeric, keeps=True, ties=True)
rule("adds", lambda x, number: x + number, _scalar)
rule("muls", lambda x, number: x * number, _scalar)
rule("rsub", lambda x, number: number - x, _scalar)
for _name in ("lt", "ge", "eq", "ne"):
    rule(_name, getattr(torch, _name), _exact_pair, smooth=False)
for _name in ("bitwise_and", "bitwise_or", "bitwise_xor"):
    rule(_name, getattr(torch, _name), _integral, smooth=False)
rule("floordiv", lambda x, y: x // (y.abs() + 1), _pair_of(is_int), smooth=False)
rule("remainder", lambda x, y: x % (y.abs() + 1), _pair_of(is_int), smooth=False)
rule("logical", lambda x, y: torch.logical_and(x, torch.logical_not(y)), _exact_pair, smooth=False)


def _where(c: Chooser) -> Arguments:
    mask = c.value(lambda v: v.tensor.dtype is torch.bool)
    if mask is None:
        return None
    x = c.value(lambda v: broadcasts(mask.tensor.shape, v.tensor.shape))
    y = c.value(lambda v: broadcasts(mask.tensor.shape, v.tensor.shape))
    return None if x is None or y is None else ((mask.name, x.name, y.name), {})


def _masked(c: Chooser) -> Arguments:
    mask = c.value(lambda v: v.tensor.dtype is torch.bool)
    if mask is None:
        return None
    x = c.value(lambda v: is_float(v) and broadcasts(mask.tensor.shape, v.tensor.shape))
    return None if x is None else ((x.name, mask.name), {})


rule("where", torch.where, _where, keeps=True, weight=2)
rule("masked", lambda x, m: x.masked_fill(m, -2.0), _masked, keeps=True, weight=2)


def _cast(c: Chooser) -> Arguments:
    x = c.value()
    if x is None:
        return None
    floats = ["float32", "float64", "bfloat16", "float16"]
    others = ["int64", "int32", "bool"] if x.exact and c.finite(x) else []
    return (x.name,), {"dtype": c.pick(floats + others)}


rule("to", lambda x, dtype: x.to(dtype), _cast, keeps=True, smooth=False, weight=3)


# --- reductions and scans ---
def _reduction(test: Callable[[Value], bool], empty: bool = True, several: bool = True) -> Pick:
    def pick(c: Chooser) -> Arguments:
        x = c.value(lambda v: test(v) and v.tensor.ndim > 0 and (empty or v.tensor.numel() > 0))
        if x is None:
            return None
        dim: Any = c.integer(0, x.tensor.ndim - 1)
        if several and x.tensor.ndim > 1 and c.integer(0, 3) == 0:
            dim = sorted({dim, c.integer(0, x.tensor.ndim - 1)})
        return (x.name,), {"dim": dim, "keepdim": c.integer(0, 1) == 1}

    return pick


def _along(test: Callable[[Value], bool], empty: bool = True) -> Pick:
    inner = _reduction(test, empty, several=False)

    def pick(c: Chooser) -> Arguments:
        found = inner(c)
        return None if found is None else (found[0], {"dim": found[1]["dim"]})

    return pick


rule("sum", lambda x, dim, keepdim: x.sum(dim, keepdim), _reduction(lambda v: True), weight=2)
rule("mean", lambda x, dim, keepdim: x.mean(dim, keepdim), _reduction(is_float), weight=2)
rule(
    "amax", lambda x, dim, keepdim: x.amax(dim, keepdim), _reduction(lambda v: True, empty=False), keeps=True, ties=True
)
rule(
    "amin", lambda x, dim, keepdim: x.amin(dim, keepdim), _reduction(lambda v: True, empty=False), keeps=True, ties=True
)
rule("var", lambda x, dim, keepdim: x.var(dim, correction=0, keepdim=keepdim), _reduction(is_float, empty=False))
rule("prod", lambda x, dim, keepdim: x.prod(dim, keepdim), _reduction(lambda v: True, several=False), smooth=False)
rule("logsumexp", lambda x, dim, keepdim: x.logsumexp(dim, keepdim), _reduction(is_float, empty=False))
rule("norm", lambda x, dim, keepdim: torch.linalg.vector_norm(x, 2, dim, keepdim), _reduction(is_float), smooth=False)
rule("any", lambda x, dim, keepdim: x.any(dim, keepdim), _reduction(exact, several=False), smooth=False)
rule("all", lambda x, dim, keepdim: x.all(dim, keepdim), _reduction(exact, several=False), smooth=False)
rule(
    "argmax",
    lambda x, dim, keepdim: x.argmax(dim, keepdim),
    _reduction(lambda v: v.exact and v.tensor.dtype is not torch.bool, empty=False, several=False),
    smooth=False,
)
rule("total", lambda x: x.sum(), _anything)
rule("softmax", lambda x, dim: x.softmax(dim), _along(is_float), weight=2)
rule("logsoftmax", lambda x, dim: x.log_softmax(dim), _along(is_float))
rule("cumsum", lambda x, dim: x.cumsum(dim), _along(lambda v: True))


def _layer_norm(c: Chooser) -> Arguments:
    return named(c.value(varied))


rule("layernorm", lambda x: F.layer_norm(x, x.shape[-1:]), _layer_norm, weight=2)
rule("rmsnorm", lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3), _layer_norm, weight=2)


# --- views, joins ---
def _dim(c: Chooser, least: int = 1) -> tuple[Value, int] | None:
    x = c.value(lambda v: v.tensor.ndim >= least)
    return None if x is None else (x, c.integer(0, x.tensor.ndim - 1))


def _transpose(c: Chooser) -> Arguments:
    found = _dim(c, 2)
    return None if found is None else ((found[0].name,), {"a": found[1], "b": c.integer(0, found[0].tensor.ndim - 1)})


def _slice(c: Chooser) -> Arguments:
    found = _dim(c)
    if found is None:
        return None
    size = found[0].tensor.shape[found[1]]
    start = c.integer(0, size)
    return (found[0].name,), {
        "dim": found[1],
        "start": start,
        "stop": c.integer(start, size),
        "step": c.pick([1, 1, 2, 3]),
    }


def _select(c: Chooser) -> Arguments:
    found = _dim(c)
    if found is None or not found[0].tensor.shape[found[1]]:
        return None
    return (found[0].name,), {"dim": found[1], "index": c.integer(0, found[0].tensor.shape[found[1]] - 1)}


def _with_dim(c: Chooser) -> Arguments:
    found = _dim(c)
    return None if found is None else ((found[0].name,), {"dim": found[1]})


def _unsqueeze(c: Chooser) -> Arguments:
    x = c.value(lambda v: v.tensor.ndim < 4)
    return None if x is None else ((x.name,), {"dim": c.integer(0, x.tensor.ndim)})


def _expand(c: Chooser) -> Arguments:
    x = c.value(lambda v: 1 in v.tensor.shape)
    return None if x is None else ((x.name,), {"shape": [c.pick(c.sizes) if n == 1 else -1 for n in x.tensor.shape]})


def _joined(c: Chooser) -> Arguments:
    found = _dim(c)
    if found is None:
        return None
    x, dim = found

    def fits(v: Value) -> bool:
        mine, other = list(x.tensor.shape), list(v.tensor.shape)
        return len(mine) == len(other) and mine[:dim] + mine[dim + 1 :] == other[:dim] + other[dim + 1 :]

    y = c.value(fits)
    return None if y is None else ((x.name, y.name), {"dim": dim})


def _stacked(c: Chooser) -> Arguments:
    x = c.value(lambda v: v.tensor.ndim < 3)
    y = c.value(lambda v: x is not None and v.tensor.shape == x.tensor.shape and v.tensor.dtype == x.tensor.dtype)
    return None if x is None or y is None else ((x.name, y.name), {"dim": c.integer(0, x.tensor.ndim)})


def _roll(c: Chooser) -> Arguments:
    found = _dim(c)
    return None if found is None else ((found[0].name,), {"by": c.integer(-3, 3), "dim": found[1]})


def _pad(c: Chooser) -> Arguments:
    x = c.value(lambda v: v.tensor.ndim > 0 and is_float(v))
    return None if x is None else ((x.name,), {"left": c.integer(-1, 2), "right": c.integer(-1, 2)})


def _reshape(c: Chooser) -> Arguments:
    x = c.value()
    if x is None:
        return None
    count = x.tensor.numel()
    shapes = [[-1]] + [[n, count // n] for n in (2, 3, 7, 16) if count % n == 0 and count]
    shapes += [[2, count // 4, 2]] if count % 4 == 0 and count else []
    return (x.name,), {"shape": c.pick(shapes)}


rule("transpose", lambda x, a, b: x.transpose(a, b), _transpose, keeps=True, weight=2)
rule("reverse", lambda x: x.permute(tuple(reversed(range(x.ndim)))), _anything, keeps=True)
rule("slice", lambda x, dim, start, stop, step: _sliced(x, dim, start, stop, step), _slice, keeps=True, weight=3)
rule("select", lambda x, dim, index: x.select(dim, index), _select, keeps=True)
rule("unsqueeze", lambda x, dim: x.unsqueeze(dim), _unsqueeze, keeps=True, weight=2)
rule("squeeze", lambda x, dim: x.squeeze(dim), _with_dim, keeps=True)
rule("expand", lambda x, shape: x.expand(shape), _expand, keeps=True)
rule("reshape", lambda x, shape: x.reshape(shape), _reshape, keeps=True, weight=2)
rule("flip", lambda x, dim: x.flip(dim), _with_dim, keeps=True)
rule("roll", lambda x, by, dim: x.roll(by, dim), _roll, keeps=True)
rule("cat", lambda x, y, dim: torch.cat([x, y], dim), _joined, keeps=True, weight=2)
rule("stack", lambda x, y, dim: torch.stack([x, y], dim), _stacked, keeps=True)
rule("pad", lambda x, left, right: F.pad(x, (left, right), value=1.5), _pad, keeps=True)
rule("chunk", lambda x, dim: x.chunk(2, dim)[0] if x.numel() else x, _with_dim, keeps=True)
rule("tril", lambda x: x.tril(), lambda c: _matrix(c), keeps=True)
rule("diagonal", lambda x: x.diagonal(), lambda c: _matrix(c), keeps=True)
rule("clone", lambda x: x.clone(), _anything, keeps=True)
rule("contiguous", lambda x: x.contiguous(), _anything, keeps=True)


def _sliced(x: torch.Tensor, dim: int, start: int, stop: int, step: int) -> torch.Tensor:
    return x[(slice(None),) * dim + (slice(start, stop, step),)]


def _matrix(c: Chooser) -> Arguments:
    x = c.value(lambda v: v.tensor.ndim >= 2)
    return None if x is None else ((x.name,), {})


# --- matrix products, indices, windows ---
def _mm(c: Chooser) -> Arguments:
    x = c.value(lambda v: is_float(v) and v.tensor.ndim == 2)
    y = c.value(
        lambda v: (
            x is not None
            and v.tensor.ndim == 2
            and v.tensor.dtype == x.tensor.dtype
            and x.tensor.shape[1] == v.tensor.shape[0]
        )
    )
    return None if x is None or y is None else ((x.name, y.name), {})


def _linear(c: Chooser) -> Arguments:
    x = c.value(lambda v: is_float(v) and v.tensor.ndim >= 1)
    w = c.value(
        lambda v: (
            x is not None
            and v.tensor.ndim == 2
            and v.tensor.dtype == x.tensor.dtype
            and x.tensor.shape[-1] == v.tensor.shape[1]
        )
    )
    return None if x is None or w is None else ((x.name, w.name), {})


def _gather(c: Chooser) -> Arguments:
    found = _dim(c)
    index = c.value(lambda v: is_int(v) and v.tensor.ndim == 1)
    if found is None or index is None or not found[0].tensor.shape[found[1]]:
        return None
    return (found[0].name, index.name), {"dim": found[1]}


def positions(i: torch.Tensor, size: int) -> torch.Tensor:
    return i.to(torch.int64).remainder(size)


def _scatter(x: torch.Tensor, i: torch.Tensor, dim: int) -> torch.Tensor:
    source = x.index_select(dim, positions(i, x.size(dim)))
    return torch.zeros_like(x).index_add(dim, positions(i + 1, x.size(dim)), source)


def _index_put(x: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
    rows = positions(i, x.size(0))
    return x.index_put((rows,), torch.ones_like(x[rows]), accumulate=True)


rule("mm", torch.mm, _mm, weight=2)
rule("gram", lambda x: x @ x.mT, lambda c: _square(c), weight=2)
rule("linear", lambda x, w: F.linear(x, w), _linear, weight=2)
rule("indexselect", lambda x, i, dim: x.index_select(dim, positions(i, x.size(dim))), _gather, keeps=True, weight=2)
rule("gatherrows", lambda x, i, dim: x.movedim(dim, 0)[positions(i, x.size(dim))], _gather, keeps=True)
rule("scatteradd", _scatter, _gather)
rule("indexput", lambda x, i, dim: _index_put(x, i), lambda c: _rows(c))
rule("maxpool", lambda x: F.max_pool1d(x.unsqueeze(0), 2).squeeze(0), lambda c: _window(c), keeps=True, ties=True)
rule("avgpool", lambda x: F.avg_pool1d(x.unsqueeze(0), 2).squeeze(0), lambda c: _window(c))
rule("ones", lambda x: torch.ones_like(x), _anything, keeps=True, smooth=False)
rule("arange", lambda x: torch.arange(x.numel(), device=x.device).view(x.shape), _anything, smooth=False)


def _square(c: Chooser) -> Arguments:
    x = c.value(lambda v: is_wide(v) and 2 <= v.tensor.ndim <= 3)
    return None if x is None else ((x.name,), {})


def _rows(c: Chooser) -> Arguments:
    x = c.value(lambda v: v.tensor.ndim >= 1 and v.tensor.shape[0] > 0 and is_float(v))
    index = c.value(lambda v: is_int(v) and v.tensor.ndim == 1)
    return None if x is None or index is None else ((x.name, index.name), {"dim": 0})


def _window(c: Chooser) -> Arguments:
    x = c.value(lambda v: is_wide(v) and v.tensor.ndim == 2 and v.tensor.shape[1] >= 2 and v.tensor.shape[0] > 0)
    return None if x is None else ((x.name,), {})


# --- writes; the value that is written to may be an input, or a view of one ---
def _into(c: Chooser) -> Arguments:
    x = c.value(lambda v: v.tensor.dtype is not torch.bool)
    if x is None:
        return None

    def fits(v: Value) -> bool:
        shape, into = v.tensor.shape, x.tensor.shape
        return (
            len(shape) <= len(into)
            and all(m in (1, n) for m, n in zip(reversed(shape), reversed(into), strict=False))
            and torch.can_cast(v.tensor.dtype, x.tensor.dtype)
        )

    y = c.value(fits)
    return None if y is None else ((x.name, y.name), {})


rule("addinto", lambda x, y: x.add_(y), _into, mutates=True, smooth=False, weight=2)
rule("mulinto", lambda x, y: x.mul_(y), _into, mutates=True, smooth=False)
rule("copyinto", lambda x, y: x.copy_(y), _into, keeps=True, mutates=True, smooth=False)
rule(
    "flipinto", lambda x: x.copy_(x.flip(0)) if x.ndim else x.copy_(x), _numbers, keeps=True, mutates=True, smooth=False
)
rule("addflip", lambda x: x.add_(x.flip(0)) if x.ndim else x.add_(x), _numbers, mutates=True, smooth=False)
rule("clampinto", lambda x: x.clamp_(-1, 1), _numbers, keeps=True, mutates=True, smooth=False)
rule("zerorow", lambda x: x[:1].zero_() if x.ndim else x.zero_(), _numbers, keeps=True, mutates=True, smooth=False)
