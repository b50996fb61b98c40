"""Filters for each example: each kernel in Triton's interpreter against F.conv2d in float64; compiled for sm_90."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from fusionc.ops import load
from fusionc.runtime import per_example_conv as runtime
from fusionc.runtime.per_example_conv import Shape
from tests.sampled import sampled

load("per_example_conv")
ACT = {"": lambda y: y, "relu": F.relu, "gelu": F.gelu, "silu": F.silu, "gelu_tanh": lambda y: F.gelu(y, approximate="tanh")}


def make(g=2, c=8, o=6, size=(7, 9), kernel=(3, 3), stride=(1, 1), padding=None, dilation=(1, 1), dtype=torch.float16, bias=True,
         activation=""):  # fmt: skip
    padding = tuple(d * (k - 1) // 2 for k, d in zip(kernel, dilation)) if padding is None else padding
    shape = Shape(g, c, o, size, kernel, stride, padding, dilation, dtype, bias, activation)
    rng = torch.Generator().manual_seed(c * size[0] + kernel[1])
    x = torch.randn(1, g * c, *size, generator=rng).to(dtype)
    w = (torch.randn(g * o, c, *kernel, generator=rng) / (c * kernel[0] * kernel[1]) ** 0.5).to(dtype)
    b = torch.randn(g * o, generator=rng).to(dtype) if bias else None
    each = [F.conv2d(x[:, n * c : n * c + c].double(), w[n * o : n * o + o].double(), None, stride, padding, dilation)
            for n in range(g)]  # fmt: skip
    want = torch.cat(each, 1) + (0 if b is None else b.double().view(-1, 1, 1))
    return shape, x, w, b, ACT[activation](want)


def check(how, shape, x, w, b, want) -> None:
    assert want.shape[2:] == shape.out
    got = runtime.launch(how, shape, x, w, b, interpret=True)
    assert got.shape == want.shape and got.dtype == x.dtype and got.is_contiguous()
    tolerance = 1e-6 if x.dtype == torch.float32 else 1e-3
    assert (got.double() - want).norm() <= tolerance * want.norm()


GRID: list[dict[str, Any]] = [
    {},
    {"c": 5, "o": 3, "size": (5, 7), "bias": False},
    {"g": 3, "c": 16, "o": 20, "size": (6, 6), "activation": "silu"},
    {"c": 24, "o": 17, "kernel": (5, 5), "size": (9, 8), "activation": "gelu"},
    {"c": 8, "kernel": (5, 5), "stride": (2, 2), "size": (9, 12), "activation": "relu", "dtype": torch.float32},
    {"c": 40, "o": 9, "stride": (2, 2), "size": (8, 8)},
    {"c": 7, "stride": (2, 1), "padding": (0, 0), "size": (6, 11), "dtype": torch.float32, "activation": "gelu"},
    {"c": 8, "dilation": (2, 2), "padding": (1, 3), "size": (9, 9), "activation": "gelu_tanh"},
    {"c": 8, "kernel": (2, 4), "padding": (1, 0), "size": (5, 9), "dilation": (1, 2)},
    {"c": 32, "o": 32, "padding": (0, 0), "size": (10, 5)},
    {"c": 16, "kernel": (1, 3), "size": (1, 20), "g": 4},
]
PRODUCTS: list[dict[str, Any]] = [
    {"c": 40, "o": 20, "kernel": (1, 1)},
    {"c": 7, "o": 5, "kernel": (1, 1), "bias": False, "activation": "relu", "dtype": torch.float32},
    {"c": 32, "o": 5, "kernel": (1, 1), "size": (8, 8), "activation": "silu"},
]
STRIDED: list[dict[str, Any]] = [
    {"c": 40, "o": 20, "kernel": (1, 1), "stride": (2, 2)}, {"c": 9, "kernel": (1, 1), "padding": (1, 0)},
]  # fmt: skip


@pytest.mark.interpret
@pytest.mark.parametrize("given", [*GRID, *PRODUCTS, *STRIDED], ids=str)
@pytest.mark.parametrize("tile", [(False, 16, 32, 32), (True, 32, 16, 16)], ids=str)
def test_direct(given: dict, tile: tuple[bool, int, int, int]) -> None:
    check(("direct", *tile, 4, 2), *make(**given))


@pytest.mark.interpret
@pytest.mark.parametrize("given", GRID, ids=str)
@pytest.mark.parametrize("tile", [(True, 16, 32, 32), (False, 32, 16, 16)], ids=str)
def test_turned(given: dict, tile: tuple[bool, int, int, int]) -> None:
    check(("turned", *tile, 4, 2), *make(**given))


@pytest.mark.interpret
@pytest.mark.parametrize("given", [*GRID[:3], *PRODUCTS], ids=str)
def test_the_library_with_what_it_leaves_undone(given: dict) -> None:
    check(("library",), *make(**given))
    if given in PRODUCTS:
        check(("bmm",), *make(**given))


@pytest.mark.parametrize("given", [*GRID, *PRODUCTS, *STRIDED], ids=str)
def test_reference_and_library(given: dict) -> None:
    shape, x, w, b, want = make(**given)
    rest = (shape.stride, shape.padding, shape.dilation, shape.examples, shape.activation)
    got = torch.ops.fusionc.per_example_conv(x, w, b, *rest)
    assert got.dtype == x.dtype and got.is_contiguous() and (got.double() - want).norm() <= 1e-3 * want.norm()
    found = [runtime.library(x, w, b, shape), runtime.launch(("library",), shape, x, w, b)]
    found += [runtime.launch(("bmm",), shape, x, w, b)] if given in PRODUCTS else []
    for each in found:
        assert each.shape == want.shape and (each.double() - want).norm() <= 3e-3 * want.norm()
    torch.library.opcheck(torch.ops.fusionc.per_example_conv.default, (x, w, b, *rest),
                          test_utils=("test_schema", "test_faketensor"))  # fmt: skip


def test_infinities_stay_where_they_are() -> None:
    """A mask, not a multiplication by zero, keeps taps outside of the image out."""
    shape, x, w, b, _ = make(g=1, c=8, size=(6, 6))
    x[0, 3, 5, 5] = torch.inf
    want = F.conv2d(x, w, b, padding=1)
    for how in (("direct", True, 16, 64, 32, 4, 2), ("direct", False, 16, 64, 32, 4, 2), ("turned", True, 16, 64, 32, 4, 2)):
        got = runtime.launch(how, shape, x, w, b, interpret=True)
        assert torch.equal(got.isfinite(), want.isfinite()) and not want.isfinite().all()


def test_candidates_fit_the_shape() -> None:
    def kinds(**given: Any) -> list[Any]:
        shape = make(g=1, size=(2, 2), **{"c": 8, **given})[0]
        found = runtime.candidates(replace(shape, examples=32, size=(28, 28)))
        assert found[0] == ("library",) and len(set(found)) == len(found) <= 7
        return [how[0] for how in found]

    assert set(kinds()) == {"library", "direct", "turned"}
    assert set(kinds(c=5)) == set(kinds(stride=(2, 2), kernel=(1, 1))) == {"library", "direct"}, "patches in order are no gain"
    assert kinds(kernel=(1, 1))[:2] == ["library", "bmm"] and "turned" not in kinds(kernel=(1, 1))
    assert kinds(kernel=(7, 7)) == ["library"], "more taps than bits"
    small, large = Shape(8, 256, 256, (14, 14), (3, 3), (1, 1), (1, 1), (1, 1), torch.bfloat16, False, ""), (128, 128)
    assert runtime._tiles(small, 64)[0] == (64, 64, 4) and runtime._tiles(replace(small, examples=64), 64)[0][:2] == large
    assert ("turned", False) in [how[:2] for how in runtime.candidates(small)], "the filters are most of the bytes"


def test_float32_is_as_exact_as_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    class Setting:
        fp32_precision = "tf32"

    exact = runtime._precisions(torch.float16)
    monkeypatch.setattr(torch.backends.cudnn, "conv", Setting())
    assert runtime._precisions(torch.float32) == ("tf32", True) and runtime._precisions(torch.float16) == exact == ("ieee", True)
    monkeypatch.setattr(Setting, "fp32_precision", "none")
    assert runtime._precisions(torch.float32) == ("ieee", True)
    monkeypatch.setattr(torch.backends.cuda, "matmul", type("M", (), {"fp32_precision": "tf32"})())
    assert runtime._precisions(torch.float32) == ("ieee", False)
    shape = make(kernel=(1, 1), dtype=torch.float32)[0]
    assert [how[0] for how in runtime.candidates(shape, False)] == ["library", "direct", "direct"]


def test_what_only_the_library_does() -> None:
    def wanted(x: torch.Tensor, w: torch.Tensor, groups: int) -> Any:
        return runtime.wanted(x, w, None, [1, 1], [1, 1], [1, 1], groups, "")

    half = torch.float16
    x, w = torch.empty(1, 16, 4, 4, dtype=half, device="meta"), torch.empty(6, 8, 3, 3, dtype=half, device="meta")
    assert wanted(x, w, 2) is not None and wanted(x.double(), w.double(), 2) is None and wanted(x[:, :, :0], w, 2) is None
    assert wanted(torch.empty(1, 4, 1 << 15, 1 << 15, dtype=half, device="meta"), w[:2, :2], 2) is None
    shape, x, w, b, want = make()
    got = runtime.per_example_conv(x, w, b, shape.stride, shape.padding, shape.dilation, 2, "")
    assert (got.double() - want).norm() <= 1e-3 * want.norm()


CROSS = [
    (Shape(32, 64, 64, (56, 56), (3, 3), (1, 1), (1, 1), (1, 1), torch.bfloat16, False, ""), True),
    (Shape(8, 256, 256, (14, 14), (3, 3), (2, 2), (1, 1), (1, 1), torch.float16, True, "silu"), True),
    (Shape(32, 240, 40, (14, 14), (1, 1), (1, 1), (0, 0), (1, 1), torch.bfloat16, True, "gelu"), True),
    (Shape(8, 20, 72, (28, 28), (5, 5), (1, 1), (2, 2), (1, 1), torch.bfloat16, True, "gelu"), True),
    (Shape(8, 64, 64, (28, 28), (3, 3), (1, 1), (1, 1), (1, 1), torch.float32, True, "gelu", "tf32"), True),
    (Shape(8, 64, 64, (28, 28), (5, 5), (1, 1), (2, 2), (1, 1), torch.float32, True, "gelu"), False),
]


@pytest.mark.cross
@pytest.mark.parametrize(("shape", "matrix"), sampled(CROSS, 3), ids=str)
def test_compiles_for_a_gpu_without_spills(shape: Shape, matrix: bool) -> None:
    from triton.backends.compiler import GPUTarget

    from fusionc.runtime.templates import Template

    for how in runtime.candidates(shape):
        starts = runtime._plan(how, shape, torch.device("cpu"))[1]
        for start in starts:
            assert isinstance(start.kernel, Template)
            built = start.kernel.build(GPUTarget("cuda", 90, 32), usage=True)
            assert built.spills <= 0 and built.registers <= 255, (how, built.registers, built.spills)
            assert built.shared <= 227 * 1024, (how, built.shared)
        if how[0] in ("direct", "turned"):
            text = built.asm["ptx"]
            assert ("wgmma" in text) == matrix, how
            assert how[0] == "direct" or text.count("cp.async.cg.shared.global") >= 2 or not how[1], how
