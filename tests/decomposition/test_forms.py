"""Forms print and read back; their filters amount to the kernel that is claimed, impulse by impulse, at every border."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fusionc.decomposition import fit
from fusionc.decomposition.build import Geometry, plain, run
from fusionc.decomposition.choose import Request, choose
from fusionc.decomposition.cost import Machine, convolution, cost, exact, machine
from fusionc.decomposition.forms import Branch, Branches, Form, LowRank, Recursive, centred, parse
from fusionc.errors import OptionError

K = (9, 9)
SQUARE, ROW, COLUMN = centred(K, (3, 3)), centred(K, (1, 9)), centred(K, (9, 1))
FORMS: list[Form] = [
    LowRank(3), LowRank(2, 3),
    Branches("inception", K, (SQUARE, ROW, COLUMN)), Branches("inception", K, (centred(K, (1, 1)), ROW)),
    Branches("dilated_sparse", K, (SQUARE, centred(K, (3, 3), (4, 4)), centred(K, (5, 5), (2, 2)))),
    Branches("shiftwise", K, (Branch((3, 3)), Branch((3, 2), (1, 1), (6, 7)), centred(K, (3, 3)))),
    Recursive(3, ((5, 2),)), Recursive(0, ((5, 2), (3, 4))),
]  # fmt: skip


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_text_reads_back(form: Form) -> None:
    assert parse(str(form), K) == form


@pytest.mark.parametrize("text", [
    "", "low_rank", "low_rank x", "low_rank 0", "low_rank 10", "low_rank 1 2", "low_rank 1 3x5", "low_rank 1 9x9",
    "low_rank 1 4x4", "winograd 3x3", "inception", "inception 3x",
    "inception 11x1", "inception 3x3/2", "shiftwise 3x3+8+0", "shiftwise 0x3", "dilated_sparse 3x3@5", "recursive 3x3",
    "recursive 4x4/2", "recursive 3x5/2", "recursive 3x3/3", "recursive 3x3@2", "inception " + "9" * 5000,
])  # fmt: skip
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"decomposition|rank|branch|level|lie"):
        parse(text or "x", K)


def responses(form: Form, g: Geometry, pieces: list[Tensor], image: tuple[int, int]) -> Tensor:
    """[C, output pixels, input pixels]: one impulse after another through the filters."""
    count = image[0] * image[1]
    x = torch.eye(count, dtype=torch.float64).view(count, 1, *image).expand(-1, g.channels, -1, -1)
    return run(form, g, x.contiguous(), pieces, None, plain, image).flatten(2).permute(1, 2, 0)


def convolved(kernel: Tensor, g: Geometry, image: tuple[int, int]) -> Tensor:
    count = image[0] * image[1]
    x = torch.eye(count, dtype=torch.float64).view(count, 1, *image).expand(-1, g.channels, -1, -1)
    y = torch.nn.functional.conv2d(x, kernel.unsqueeze(1), None, g.stride, g.padding, g.dilation, g.channels)
    return y.flatten(2).permute(1, 2, 0)


@pytest.mark.parametrize("form", FORMS[:6], ids=str)
@pytest.mark.parametrize("stride, padding, dilation", [(1, 4, 1), (2, 4, 1), (1, 8, 2), (1, 0, 1), ((1, 2), (3, 5), 1)], ids=str)
def test_filters_are_a_convolution_with_the_effective_kernel(form: Form, stride: Any, padding: Any, dilation: Any) -> None:
    def pair(n: int | tuple[int, int]) -> tuple[int, int]:
        return n if isinstance(n, tuple) else (n, n)

    g = Geometry(K, pair(stride), pair(padding), pair(dilation), 2)
    weight = torch.randn(2, 1, *K, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    pieces = fit.filters(form, weight)
    kernel = fit.effective(form, [fit.wide(p) for p in pieces], (2, *K))
    image = (17, 18)
    torch.testing.assert_close(responses(form, g, pieces, image), convolved(kernel, g, image), rtol=0, atol=1e-12)
    claimed = fit.errors(form, pieces, weight)
    found = (kernel - weight[:, 0]).flatten(1).norm(dim=1) / weight.flatten(1).norm(dim=1)
    torch.testing.assert_close(claimed, found, rtol=0, atol=1e-12)
    assert (claimed > 0.1).all()


@pytest.mark.parametrize("form", FORMS[6:], ids=str)
def test_recursive_error_is_that_of_all_positions(form: Recursive) -> None:
    g = Geometry(K, (1, 1), (4, 4), (1, 1), 2)
    at = torch.arange(9) - 4.0
    weight = torch.exp(-(at[:, None] ** 2 + at**2) / 8).double().expand(2, 1, -1, -1).clone()
    weight[1] += 0.1 * torch.randn(9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    pieces = fit.filters(form, weight)
    image = (32, 32)
    off = responses(form, g, pieces, image) - convolved(weight[:, 0], g, image)
    inner = off.view(2, *image, -1)[:, 14:18, 14:18].square().sum(-1).mean((1, 2)).sqrt()  # one period, far from the rim
    torch.testing.assert_close(fit.errors(form, pieces, weight), inner / weight.flatten(1).norm(dim=1), rtol=1e-9, atol=0)
    assert fit.recursive_error(form, weight[:, 0]) == pytest.approx(float(fit.errors(form, pieces, weight).max()), rel=1e-6)


def test_recursive_fit_is_the_best_one() -> None:
    form = Recursive(3, ((5, 2),))
    weight = torch.randn(1, 1, *K, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    pieces = fit.filters(form, weight)
    best = fit.errors(form, pieces, weight)
    for i in range(2):
        for step in (-1e-2, 1e-2):
            moved = [p.clone() for p in pieces]
            moved[i][0, 0, 1, 1] += step
            assert fit.errors(form, moved, weight) > best


def test_low_rank_error_is_what_the_singular_values_say() -> None:
    weight = torch.randn(3, 1, 13, 13, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    s = torch.linalg.svdvals(weight[:, 0])
    for rank in (1, 3, 6):
        expected = s[:, rank:].norm(dim=1) / s.norm(dim=1)
        torch.testing.assert_close(fit.errors(LowRank(rank), fit.filters(LowRank(rank), weight), weight), expected)


def test_white_noise_sees_the_predicted_error() -> None:
    weight = torch.randn(4, 1, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = torch.randn(8, 4, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    g = Geometry(K, (1, 1), (4, 4), (1, 1), 4)
    y = torch.nn.functional.conv2d(x, weight, padding=4, groups=4)[:, :, 8:-8, 8:-8]
    for form in FORMS[:6]:
        pieces = fit.filters(form, weight)
        off = run(form, g, x, pieces, None, plain)[:, :, 8:-8, 8:-8] - y
        measured = off.square().mean((0, 2, 3)).sqrt() / y.square().mean((0, 2, 3)).sqrt()
        torch.testing.assert_close(measured, fit.errors(form, pieces, weight), rtol=0.05, atol=0)


def test_rounding_of_the_filters_counts() -> None:
    weight = (torch.randn(2, 1, 9, 1) * torch.randn(2, 1, 1, 9)).bfloat16()
    found = fit.errors(LowRank(9), fit.filters(LowRank(9), weight), weight).max()
    assert 1e-4 < found < 2e-2


def test_zero_channels_have_no_error() -> None:
    weight = torch.zeros(2, 1, 9, 9)
    weight[0, 0, 4, 4] = 1
    for form in FORMS:
        assert float(fit.errors(form, fit.filters(form, weight), weight)[1]) == 0


# -- choosing ---------------------------------------------------------------------------------------------------------

G = Geometry((13, 13), (1, 1), (6, 6), (1, 1), 6)
M = Machine(1e12, 2e-9, launch=0.0)  # only products count


def chosen(weight: Tensor, method: str, error: float, m: Machine = M, g: Geometry = G) -> object:
    price = exact(m, g, 1, (32, 32), 4)
    return choose(weight, g, Request((method,), error), lambda f: cost(f, m, g, 1, (32, 32), 4), price, 0.95 * price)


def planted(method: str, noise: float, seed: int = 0) -> Tensor:
    """[6, 1, 13, 13] float64 of one form, plus noise of a relative size."""
    rng = torch.Generator().manual_seed(seed)

    def rand(*size: int) -> Tensor:
        return torch.randn(*size, dtype=torch.float64, generator=rng)

    out = torch.zeros(6, 13, 13, dtype=torch.float64)
    if method == "low_rank":
        out += sum(rand(6, 13, 1) * rand(6, 1, 13) for _ in range(3))
    elif method == "inception":
        out[:, 5:8, 5:8] += rand(6, 3, 3)
        out[:, 6, :] += rand(6, 13)
        out[:, :, 6] += rand(6, 13)
    elif method == "dilated_sparse":
        out[:, 4:9, 4:9] += rand(6, 5, 5)
        out[:, ::6, ::6] += rand(6, 3, 3)
    elif method == "shiftwise":
        out[:, 5:8, 5:8] += rand(6, 3, 3)
        out[:, 2:5, 8:11] += rand(6, 3, 3)
    else:
        form = Recursive(3, ((7, 2),))
        base = fit._responses(form, (13, 13))[0]
        side = int(base[0].shape[0] ** 0.5)
        middle = (side - 13) // 2
        theta = rand(6, base[0].shape[1])
        theta[:, 9:] = torch.nn.functional.avg_pool2d(theta[:, 9:].view(6, 7, 7), 5, 1, 2, count_include_pad=True).flatten(1)
        theta[:, 9:] *= (torch.outer(torch.hann_window(9)[1:-1], torch.hann_window(9)[1:-1]).flatten()) * 4
        whole = torch.stack([theta @ a.T for a in base]).mean(0).view(6, side, side)
        out += whole[:, middle : middle + 13, middle : middle + 13]
    out += noise * rand(6, 13, 13) * out.flatten(1).norm(dim=1).view(6, 1, 1) / 13
    return out.unsqueeze(1)


@pytest.mark.parametrize("method", ["low_rank", "inception", "dilated_sparse", "shiftwise"])
def test_planted_forms_are_found(method: str) -> None:
    found = chosen(planted(method, 1e-3), method, 1e-2)
    assert not isinstance(found, str) and found.error <= 1e-2 and 5e-4 < found.error, found
    expected = {"low_rank": "low_rank 3", "inception": "inception 3x3 1x13 13x1", "dilated_sparse": "dilated_sparse 5x5 3x3@6",
                "shiftwise": "shiftwise 3x3+2+8 3x3"}  # fmt: skip
    assert str(found.form) == expected[method]
    weight = planted(method, 1e-3)
    pieces = fit.filters(found.form, weight)
    image = (15, 14)
    off = (responses(found.form, G, pieces, image) - convolved(weight[:, 0], G, image)).flatten(1).norm(dim=1)
    assert (off / convolved(weight[:, 0], G, image).flatten(1).norm(dim=1) <= 2e-2).all()  # borders see parts of the kernel


def test_low_rank_beside_a_square_is_found() -> None:
    # what a merged RepLKNet kernel is: the large one, here of rank 2, and a 5×5 of full rank in its middle
    rng = torch.Generator().manual_seed(0)
    weight = sum(torch.randn(6, 1, 13, 1, dtype=torch.float64, generator=rng) * torch.randn(
        6, 1, 1, 13, dtype=torch.float64, generator=rng) for _ in range(2))  # fmt: skip
    assert isinstance(weight, Tensor)
    weight[:, :, 4:9, 4:9] += torch.randn(6, 1, 5, 5, dtype=torch.float64, generator=rng)
    weight += 1e-4 * torch.randn(6, 1, 13, 13, dtype=torch.float64, generator=rng)
    found = chosen(weight, "low_rank", 1e-2)
    assert not isinstance(found, str) and str(found.form) == "low_rank 2 5x5" and 1e-5 < found.error < 1e-3


def test_planted_recursive_is_found() -> None:
    weight = planted("recursive", 0)
    found = chosen(weight, "recursive", 0.3)
    assert not isinstance(found, str) and found.error <= 0.3
    assert isinstance(chosen(weight, "recursive", 1e-2), str)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(["low_rank", "inception", "dilated_sparse", "shiftwise", "recursive"]), st.integers(0, 99),
       st.sampled_from([0.5, 0.1, 1e-2]))  # fmt: skip
def test_random_kernels_reach_the_bound_or_are_refused(method: str, seed: int, error: float) -> None:
    weight = torch.randn(6, 1, 13, 13, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    found = chosen(weight, method, error)
    if isinstance(found, str):
        assert f"not reachable with {method}" in found and "best" in found
    else:
        assert found.error <= error and found.share < 0.95
        assert float(fit.errors(found.form, fit.filters(found.form, weight), weight).max()) <= error


def test_a_form_must_be_cheaper() -> None:
    weight = planted("low_rank", 0)
    slow = Machine(1e6, 1e-12, launch=0.0)  # only bytes count
    found = chosen(weight, "low_rank", 1e-2, slow)
    assert isinstance(found, str) and "low_rank 3 would reach it at" in found


def test_methods_say_why_they_do_not_fit() -> None:
    even = Geometry((6, 6), (1, 1), (3, 3), (1, 1), 1)
    weight = torch.randn(1, 1, 6, 6)
    assert "has no middle" in str(chosen(weight, "inception", 0.1, g=even))
    assert "keeps the image's size" in str(chosen(weight, "recursive", 0.1, g=even))
    weight[0, 0, 0, 0] = torch.nan
    assert chosen(weight, "low_rank", 0.1, g=even) == "the weights are not finite"


def test_cost_counts_bytes_products_and_launches() -> None:
    m = Machine(1e9, 2e-9, launch=0.0)
    assert convolution(m, (3, 3), 100, 50, 4) == pytest.approx(600e-9 + 50 * 18e-9)
    big = Geometry((31, 31), (1, 1), (15, 15), (1, 1), 256)

    def share(m: Machine, rank: int, bytes_each: int) -> float:
        return cost(LowRank(rank), m, big, 32, (56, 56), bytes_each) / exact(m, big, 32, (56, 56), bytes_each)

    assert share(machine("cuda", True), 1, 2) > 1 and share(machine("cuda", True, last=True), 1, 2) < 0.8
    assert share(machine("cuda", True, last=True), 2, 2) > 1 > share(machine("cuda", False), 2, 4)
    assert share(machine("cpu", False), 8, 4) < 0.2 and share(machine("cpu", False, last=True), 3, 4) < 0.7


def test_cost_of_branches_that_are_merged_again() -> None:
    big = Geometry((31, 31), (1, 1), (15, 15), (1, 1), 256)
    form = parse("dilated_sparse 5x5 7x7@5", (31, 31))
    for last in (False, True):
        m = machine("cuda", True, last)
        assert cost(form, m, big, 32, (56, 56), 2) == exact(m, big, 32, (56, 56), 2)
    assert cost(form, machine("cpu", False), big, 1, (56, 56), 4) < 0.2 * exact(machine("cpu", False), big, 1, (56, 56), 4)
    bands = parse("inception 3x3 1x31 31x1", (31, 31))
    assert cost(bands, m, big, 32, (56, 56), 2) != exact(m, big, 32, (56, 56), 2)


@pytest.mark.parametrize("last, size, microseconds", [
    (False, (31, 31), 385), (False, (13, 13), 199), (False, (31, 1), 381), (False, (1, 31), 64), (False, (3, 3), 67),
    (False, (5, 5), 91), (True, (31, 31), 437), (True, (31, 1), 135), (True, (1, 31), 116), (True, (3, 3), 56),
], ids=str)  # fmt: skip
def test_cost_is_near_what_was_measured(last: bool, size: tuple[int, int], microseconds: float) -> None:
    count = 32 * 256 * 56 * 56
    assert convolution(machine("cuda", True, last), size, count, count, 2) == pytest.approx(microseconds * 1e-6, rel=0.2)


WRONG = [None, 3, {}, {"method": "low_rank"}, {"error": 0.1, "rank": 2}, {"error": 0}, {"error": 1.0}, {"error": True},
         {"error": "x"}, {"method": "svd", "error": 0.1}, {"method": [], "error": 0.1}]  # fmt: skip


@pytest.mark.parametrize("given", WRONG, ids=str)
def test_wrong_requests(given: object) -> None:
    from fusionc.decomposition.choose import request

    with pytest.raises(OptionError, match="large_kernel"):
        request("large_kernel", given)
