"""The chunked operator against F.cross_entropy(F.linear(...)) in float64, its kernels in Triton's interpreter, autograd."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusionc.ops import linear_cross_entropy as op

CASES = list(itertools.product(("mean", "sum"), (0.0, 0.1), (False, True)))


def make(
    tokens: int, width: int, words: int, bias: bool, dtype: torch.dtype = torch.float64
) -> tuple[list[Tensor], Tensor]:
    rng = torch.Generator().manual_seed(tokens + words)
    sizes = [(tokens, width), (words, width)] + [(words,)] * bias
    made = [torch.randn(s, generator=rng, dtype=torch.float64).to(dtype).requires_grad_() for s in sizes]
    target = torch.randint(words, (tokens,), generator=rng)
    target[::3] = -100
    return made, target


def reference(params: list[Tensor], target: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(F.linear(*params), target, **options)


@pytest.mark.parametrize(("tokens", "words"), [(7, 5), (2500, 33), (0, 4)])
@pytest.mark.parametrize(("reduction", "smoothing", "bias"), CASES)
def test_values_and_gradients(tokens: int, words: int, reduction: str, smoothing: float, bias: bool) -> None:
    params, target = make(tokens, 8, words, bias)
    options: dict[str, Any] = {"reduction": reduction, "label_smoothing": smoothing}
    got = op.linear_cross_entropy(*params[:2], target, *params[2:], **options)
    want = reference(params, target, **options)
    torch.testing.assert_close(got, want, equal_nan=True)
    torch.testing.assert_close(torch.autograd.grad(got * 3, params), torch.autograd.grad(want * 3, params))


def test_backward_twice() -> None:
    params, target = make(9, 8, 5, True)
    loss = op.linear_cross_entropy(*params[:2], target, params[2])
    want = torch.autograd.grad(reference(params, target), params)
    for factor in (2.0, 3.0):
        found = torch.autograd.grad(loss * factor, params, retain_graph=True)
        torch.testing.assert_close(found, tuple(g * factor for g in want))
        for g in found:
            g.zero_()  # the caller's
    loss.backward()
    for p, g in zip(params, want):
        torch.testing.assert_close(p.grad, g)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_last_backward_hands_out_its_memory() -> None:
    params, target = make(9, 8, 5, False)
    loss = op.linear_cross_entropy(*params, target)
    kept = [t.data_ptr() for t in loss.grad_fn.saved_tensors[:2]]  # type: ignore[union-attr]
    loss.backward()
    assert [p.grad.data_ptr() for p in params if p.grad is not None] == kept


def test_frozen_parameters_and_no_gradient() -> None:
    params, target = make(9, 8, 5, True)
    params[1].requires_grad_(False)
    loss = op.linear_cross_entropy(*params[:2], target, params[2])
    assert loss.grad_fn.saved_tensors[1].numel() == 0  # type: ignore[union-attr]
    loss.backward()
    assert params[1].grad is None and params[0].grad is not None
    with torch.no_grad():
        assert not op.linear_cross_entropy(*params[:2], target).requires_grad


def test_bfloat16_is_as_good_as_eager() -> None:
    params, target = make(2500, 32, 300, False, torch.bfloat16)  # two chunks: dW is rounded twice
    exact = [p.detach().double().requires_grad_() for p in params]
    want = torch.autograd.grad(reference(exact, target), exact)
    eager = torch.autograd.grad(F.cross_entropy(F.linear(*params).float(), target), params)
    loss = op.linear_cross_entropy(*params, target, dtype=torch.float32)
    assert loss.dtype == torch.float32
    for got, base, true in zip(torch.autograd.grad(loss, params), eager, want):
        assert (got.double() - true).norm() <= 2 * (base.double() - true).norm()


def test_errors() -> None:
    params, target = make(4, 8, 5, False)
    with pytest.raises(ValueError, match="only 'mean' and 'sum'"):
        op.linear_cross_entropy(*params, target, reduction="none")
    with pytest.raises((IndexError, RuntimeError)):
        op.linear_cross_entropy(*params, target + 5)


def test_no_second_derivative() -> None:
    saved = [torch.ones(2, requires_grad=True), torch.ones(3, 2), torch.ones(0)]
    found = torch.ops.fusionc.linear_cross_entropy_backward(torch.tensor(2.0), *saved)
    with pytest.raises(NotImplementedError, match="second derivative"):
        found[0].sum().backward()


def test_operator_contract() -> None:
    params, target = make(4, 8, 5, True, torch.float32)
    given = (*params[:2], params[2], target, -100, True, 0.1, torch.float32, [True, True, True])
    torch.library.opcheck(torch.ops.fusionc.linear_cross_entropy.default, given)


@pytest.mark.parametrize(
    ("tokens", "accumulates", "rows"),
    [
        (8192, True, 2048),
        (8192, False, 2048),
        (8191, True, 2048),
        (100, True, 100),
        (2100, True, 1152),
        (0, True, 0),
        (1 << 20, True, 1 << 17),
        (1 << 20, False, 2048),
    ],
)
def test_chunks(tokens: int, accumulates: bool, rows: int) -> None:
    assert op.chunk_rows(tokens, 4096, accumulates) == rows


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("words", [64, 50, 16])
def test_kernel(words: int, smoothing: float) -> None:
    """The GPU's kernel text on CPU tensors: whole blocks, a tail, ignored rows, rows with -inf, bad targets."""
    interpreted = pytest.importorskip("fusionc.runtime.launch")
    from fusionc.codegen.templates.cross_entropy import TEXT
    from fusionc.runtime import interpreter

    tokens = 5
    logits = torch.randn(tokens, 64, generator=torch.Generator().manual_seed(words))[:, :words]
    logits[1, :9] = float("-inf")
    target = torch.tensor([0, words - 1, -100, words // 2, words])
    scale = torch.tensor(0.25)
    plain, kernel = logits.clone(), logits.clone()
    kernel = torch.empty(tokens, 64)[:, :words].copy_(logits)
    losses, expected = torch.empty(tokens), torch.empty(tokens)
    op._rows_plain(plain, target.where(target != words, 0), scale, expected, -100, smoothing, True)
    with interpreter.lock:
        module = interpreted.load_module(TEXT, interpret=True)
        with interpreter.repaired(), interpreted._interpreting(True):
            module.cross_entropy_rows[(tokens,)](
                kernel, target, scale, losses, words // 2, 2, kernel.stride(0), -100, smoothing, BLOCK=32, GROUP=8, GRADIENT=True)
            buffer, half = torch.arange(50.0), torch.tensor(0.5)
            module.scale_in_place[(2,)](buffer, half, 25, UNIT=2, BLOCK=32)
            module.scale_in_place[(2,)](buffer, half * 2, 25, UNIT=2, BLOCK=32)
    assert losses[4].isnan() and buffer.equal(torch.arange(50.0) / 2)
    torch.testing.assert_close(losses[:4], expected[:4])
    torch.testing.assert_close(kernel[:4], plain[:4])


def test_smoothed_gradients_of_float64_are_as_exact_as_it() -> None:
    device = pytest.importorskip("fusionc.runtime.linear_cross_entropy")
    made = torch.randn(3, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    target, scale = torch.tensor([0, 49, 20]), torch.tensor(1.0, dtype=torch.float64)
    plain, kernel = made.clone(), made.clone()
    losses, expected = torch.empty_like(scale.expand(3)), torch.empty_like(scale.expand(3))
    op._rows_plain(plain, target, scale, expected, -100, 0.1, True)
    start = device._rows(3, 50, 50, torch.float64, -100, 0.1, True, None)
    start(kernel, target, scale, losses)
    torch.testing.assert_close(losses, expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(kernel, plain, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("count", [1, 8192, 8194, 20000])
def test_few_kernels_scale_gradients_of_all_sizes(count: int) -> None:
    """Gradients of x have one for each number of tokens."""
    device = pytest.importorskip("fusionc.runtime.linear_cross_entropy")
    buffer = torch.ones(count + 8)
    device._scale(count, torch.float32, torch.float32, None)(buffer, torch.tensor(3.0))
    assert buffer[:count].eq(3).all() and buffer[count:].eq(1).all()
    gpu = torch.device("cuda:0")
    assert len({id(device._scale(n, torch.float32, torch.float32, gpu).kernel) for n in range(1, 500)}) <= 5


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The targets that the rows' kernel (here its formulas) is given."""
    found: list[torch.Tensor] = []
    plain = op._rows_plain

    def rows(logits: torch.Tensor, target: torch.Tensor, *rest: Any) -> None:
        found.append(target)
        plain(logits, target, *rest)

    monkeypatch.setattr(op, "_rows_plain", rows)
    return found


@pytest.mark.parametrize("kind", [torch.int32, torch.uint8])
def test_the_kernel_gets_64_bit_targets_at_an_aligned_address(kind: torch.dtype, seen: list[torch.Tensor]) -> None:
    """It is compiled for these: 32 bits would be read as half of a word, behind the end of the tensor."""
    x, weight = torch.randn(6, 4), torch.randn(9, 4)
    target = torch.randint(0, 9, (7,))
    want = torch.nn.functional.cross_entropy(x @ weight.t(), target[1:])
    torch.testing.assert_close(op.linear_cross_entropy(x, weight, target[1:]), want)
    torch.testing.assert_close(op.linear_cross_entropy(x, weight, target.to(kind)[1:]), want)
    assert len(seen) == 2 and all(t.dtype == torch.int64 and t.data_ptr() % 16 == 0 for t in seen)


def test_the_kernel_gets_contiguous_targets(seen: list[torch.Tensor]) -> None:
    """It reads them one after the other; a column of a matrix of targets is none such."""
    x, weight = torch.randn(6, 4), torch.randn(9, 4)
    target = torch.randint(0, 9, (6, 2))[:, 1]
    found = op.linear_cross_entropy(x, weight, target)
    torch.testing.assert_close(found, torch.nn.functional.cross_entropy(x @ weight.t(), target))
    assert seen and all(t.is_contiguous() for t in seen)
