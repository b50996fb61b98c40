"""Lowerings that once went wrong or were missing: each runs compiled with the verifier on and must equal eager.

A second table holds what must not be left to ATen any more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fusionc.backend import fusionc
from fusionc.ir.expr import ONE, Index, Size, Var, index
from fusionc.ir.value import reshape_index
from fusionc.record import collect

OPTIONS = {"target": "cpp", "verify": True, "cache": False}


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


IDS = torch.arange(6) % 5
LOWERED: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "scatter of one position a row": (lambda x, i: x.scatter(1, i[:, None], -1.0) * 2, (rand(6, 5), IDS)),
    "scatter of one value a row": (lambda x, i: x.scatter(1, i[:, None], x[:, :1]) + 1, (rand(6, 5), IDS)),
    "slice_scatter in steps": (lambda x: torch.slice_scatter(x, x[:, 1::2] * 3, 1, 1, None, 2), (rand(4, 7),)),
    "slice_scatter in steps with an end": (lambda x: torch.slice_scatter(x, x[:, 1:6:2] * 3, 1, 1, 6, 2), (rand(4, 9),)),
    "group_norm": (lambda x, w, b: F.group_norm(x, 4, w, b), (rand(2, 8, 3, 5), rand(8), rand(8))),
    "group_norm of a sequence": (lambda x, w, b: F.group_norm(x, 8, w, b), (rand(2, 8, 11), rand(8), rand(8))),
    "group_norm without parameters": (lambda x: F.group_norm(x, 2), (rand(2, 8, 3, 3),)),
    "group_norm of channels last": (lambda x, w, b: F.group_norm(x.to(memory_format=torch.channels_last), 4, w, b),
                                    (rand(2, 8, 3, 5), rand(8), rand(8))),
    "group_norm of a bfloat16": (lambda x, w: F.group_norm(x.bfloat16(), 4, w.bfloat16()).float(), (rand(2, 8, 16), rand(8))),
    "sign of NaN": (lambda x: torch.sign(x / x), (torch.tensor([0.0, 1.0, -2.0]),)),
    "clamp keeps NaN": (lambda x: (x / 0 * 0).clamp(-1, 1), (torch.tensor([0.0, 1.0]),)),
    "reductions over size one": (lambda x: (x.sum(1), x.amax(1), x.argmax(1), x.var(1, correction=0)), (rand(5, 1),)),
    "unfold": (lambda x: x.unfold(1, 3, 2).sum(-1), (rand(4, 9),)),
    "pad with negative and positive": (lambda x: F.pad(x, (1, -2), value=3.0) * 2, (rand(4, 9),)),
}  # fmt: skip


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", LOWERED)
def test_lowered(name: str, dynamic: bool) -> None:
    fn, args = LOWERED[name]
    with collect() as records, torch.no_grad():
        got = torch.compile(fn, backend=fusionc, dynamic=dynamic, options=OPTIONS)(*args)
        torch.testing.assert_close(got, fn(*args), rtol=2e-2 if "bfloat16" in name else 1e-5, atol=1e-5, equal_nan=True)
    for record in records:
        assert not record.fallbacks
        if not (dynamic and "scatter in steps" in name):
            assert not [call for call in record.calls if call.reason], record.calls


def test_contiguous_copies_of_symbolic_slices_are_kernels() -> None:
    """torch writes their strides with Max(1, size)."""

    def fn(x: torch.Tensor) -> torch.Tensor:
        h = (x[:, : x.shape[1] // 2] * 2).contiguous() + 1
        return torch.cat([h.transpose(1, 2).contiguous().relu(), h.exp().transpose(1, 2)], -1)

    run = torch.compile(fn, backend=fusionc, dynamic=True, options=OPTIONS)
    with collect() as records, torch.no_grad():
        for shape in ((3, 7, 5), (2, 9, 4), (4, 4, 3)):
            torch.testing.assert_close(run(rand(*shape)), fn(rand(*shape)))
    assert len(records) == 1 and not [call for call in records[0].calls if call.reason]


def test_empty_results_of_symbolic_slices() -> None:
    def fn(x: torch.Tensor) -> torch.Tensor:
        return (x[:, : x.shape[1] - 2] * 2).t().contiguous() + 1

    run = torch.compile(fn, backend=fusionc, dynamic=True, options=OPTIONS)
    for shape in ((3, 7), (5, 3), (4, 2)):
        torch.testing.assert_close(run(rand(*shape)), fn(rand(*shape)))


def test_broadcasting_by_a_size_that_a_guard_makes_one() -> None:
    """Halves of three columns are two and one: an expression of the size, which torch has found to be 1."""

    def fn(x: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, -1)
        return a * b

    run = torch.compile(fn, backend=fusionc, dynamic=True, options=OPTIONS)
    for shape in ((3, 3), (5, 3), (5, 4)):
        torch.testing.assert_close(run(rand(*shape)), fn(rand(*shape)))


def _sizes(*names: str | int) -> tuple[Index, ...]:
    return tuple(index(Size(n, 2)) if isinstance(n, str) else index(n) for n in names)


def test_reshape_splits_only_what_must_be() -> None:
    a, b, c = _sizes("a", "b", "c")

    def remap(src: tuple[Index, ...], dst: tuple[Index, ...]) -> str:
        return repr(reshape_index(tuple([index(Var(f"x{k}", n)) for k, n in enumerate(src)]), src, dst))

    assert remap(_sizes(6, 4), _sizes(2, 3, 4)) == "((x0//3), (x0 % 3), x1)"
    assert remap(_sizes(4, 3), _sizes(1, 4, 1, 3, 1)) == "(0, x0, 0, x1, 0)"
    assert remap((b * a - b, c), (b, a - 1, c)) == "((x0//(a - 1)), (x0 % (a - 1)), x1)"
    assert remap((b, a - 1, c), (b * (a - 1), c)) == "(a*x0 - x0 + x1, x2)"
    assert remap((ONE,), ()) == "()"


PARTS: dict[str, Callable[[torch.Tensor], Any]] = {
    "softmax": lambda x: x.softmax(0),
    "layer norm": lambda x: F.layer_norm(x.t(), (4,)).t(),
    "logsumexp": lambda x: x - x.logsumexp(0),
    "cumsum": lambda x: x.cumsum(0),
}


@pytest.mark.parametrize("name", PARTS)
def test_writes_into_a_part_of_reduced_rows(name: str) -> None:
    """The guard of what is written is about one element of a row, the reduction's about all."""

    def fn(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        a, b, c = [PARTS[name](x + k) for k in range(3)]
        a[1:] *= 2
        b[0] = b[-1]
        c[:1] += c[2:3]
        return a, b, c, torch.cat([a[1:] * 3, b[:1]]) + c

    x = rand(4, 3)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(fn, backend=fusionc, options=OPTIONS)(x), fn(x))


NUMBERS: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
    "quotient": lambda x, n: x + n // 2,
    "remainder": lambda x, n: x * ((n - 1) % 5),
    "negative divisor": lambda x, n: x + 7 // n,
    "shift": lambda x, n: x + (n >> 1),
    "select": lambda x, n: x[n] * 2,
    "select_scatter": lambda x, n: x.select_scatter(x[0] * 2, 0, n),
    "slice from": lambda x, n: x[n:] * 2,
    "slice from the negative": lambda x, n: x[-n:] * 2,
    "slice_scatter": lambda x, n: x.slice_scatter(x[n:] * 2, 0, n),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_that_may_be_negative(name: str) -> None:
    """A symbol is a size only where it stands for one; what the user passes may be below zero."""
    fn, x = NUMBERS[name], rand(6, 4)
    run = torch.compile(fn, backend=fusionc, dynamic=True, options=OPTIONS)
    with collect() as records, torch.no_grad():
        for n in (3, 5, -3, -4, 2):
            torch.testing.assert_close(run(x, n), fn(x, n))
    assert not [record.fallbacks for record in records if record.fallbacks]


def test_numbers_with_a_negative_bound() -> None:
    def fn(x: torch.Tensor, n: int) -> torch.Tensor:
        torch._check(n > -100)
        return x + n // 2

    run = torch.compile(fn, backend=fusionc, dynamic=True, options=OPTIONS)
    for n in (3, -3):
        torch.testing.assert_close(run(rand(6), n), fn(rand(6), n))


FAR_FROM_ZERO: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "var": lambda x: x.var(-1),
    "std of columns": lambda x: x.std(0, correction=0),
    "var_mean": lambda x: torch.stack(torch.var_mean(x, -1)),
    "group_norm": lambda x: F.group_norm(x.view(24, 8, 8), 2),
}


@pytest.mark.parametrize("name", FAR_FROM_ZERO)
@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_variances_are_as_good_as_eagers(name: str, mean: float) -> None:
    """ATen adds up variances in float64 on a CPU; beside large means it is the mean's rounding that counts."""
    fn, x = FAR_FROM_ZERO[name], rand(24, 64) + mean
    with torch.no_grad():
        run = torch.compile(fn, backend=fusionc, options=OPTIONS)
        exact = fn(x.double())
        mine, eagers = ((y.double() - exact).abs().max() for y in (run(x), fn(x)))
        assert mine <= 2 * eagers
        constant = torch.full_like(x, 0.1)
        torch.testing.assert_close(run(constant), fn(constant), rtol=0, atol=0 if "group" not in name else 1e-5)


def test_one_of_several_views_that_aten_must_make() -> None:
    """The row length of every second column is `Max(1, ...)`, and so is where the second part begins."""

    def fn(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = x[:, 1::2].cosh()
        return y.split([1, y.shape[0] - 1])[1], y.unbind(0)[1], y.chunk(2)[1].sort()[0]

    run = torch.compile(fn, backend=fusionc, dynamic=True, options=OPTIONS)
    with collect() as records, torch.no_grad():
        for x in (rand(4, 5), rand(6, 9)):
            torch.testing.assert_close(run(x), fn(x))
    assert not [f for record in records for f in record.fallbacks if "whole graph" in f]
