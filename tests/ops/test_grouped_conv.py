"""Grouped convolutions: each kernel in Triton's interpreter against F.conv2d in float64; compiled for sm_90."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from fusionc.ops import load
from fusionc.runtime import grouped_conv as runtime

load("grouped_conv")
ACT = {"": lambda y: y, "relu": F.relu, "gelu": F.gelu, "silu": F.silu, "gelu_tanh": lambda y: F.gelu(y, approximate="tanh")}


def make(n=2, g=3, c=24, o=24, size=(7, 9), kernel=(3, 3), stride=1, padding=None, dilation=1, last=True, bias=True,
         activation=""):  # fmt: skip
    padding = [dilation * (k - 1) // 2 for k in kernel] if padding is None else padding
    rng = torch.Generator().manual_seed(c * size[0] + kernel[1])
    x = torch.randn(n, g * c, *size, generator=rng).half().contiguous(memory_format=torch.channels_last)
    w = (torch.randn(g * o, c, *kernel, generator=rng) / (c * kernel[0] * kernel[1]) ** 0.5).half()
    w = w.contiguous(memory_format=torch.channels_last) if last else w
    b = torch.randn(g * o, generator=rng).half() if bias else None
    want = ACT[activation](F.conv2d(x.double(), w.double(), None if b is None else b.double(), stride, padding, dilation, g))
    rest = ([stride] * 2, padding, [dilation] * 2, g, activation)
    shape, wanted = runtime._call(x.shape, w.shape, w.stride(), x.dtype, bias, stride, stride, *padding, dilation, dilation, g,
                                  activation, torch.device("cpu"))  # fmt: skip
    assert wanted is not None and shape.out == want.shape[2:]
    return shape, x, w, b, want, rest


GRID: list[dict[str, Any]] = [
    {},
    {"g": 2, "c": 8, "o": 6, "size": (6, 5), "stride": 2, "last": False, "activation": "relu"},
    {"n": 1, "g": 4, "c": 40, "o": 20, "size": (5, 6), "dilation": 2, "bias": False, "activation": "silu"},
    {"n": 3, "g": 2, "c": 4, "o": 4, "size": (9, 8), "kernel": (5, 5), "padding": [1, 2], "last": False, "activation": "gelu"},
    {"g": 2, "c": 70, "o": 17, "size": (4, 4), "kernel": (1, 1), "activation": "gelu_tanh"},
    {"g": 2, "c": 16, "o": 16, "size": (3, 20), "kernel": (1, 3), "last": False},
    {"g": 2, "c": 12, "o": 8, "size": (9, 2), "kernel": (3, 1)},
]


@pytest.mark.interpret
@pytest.mark.parametrize("given", GRID, ids=str)
@pytest.mark.parametrize("how", [("library",), ("grouped", True, 32, 16, 16, 4, 1), ("grouped", False, 16, 32, 64, 4, 2)],
                         ids=str)  # fmt: skip
def test_kernels(given: dict, how: tuple[Any, ...]) -> None:
    shape, x, w, b, want, _ = make(**given)
    got = runtime.launch(how, shape, x, w, b, interpret=True)
    assert got.dtype == x.dtype and got.is_contiguous(memory_format=torch.channels_last)
    assert (got.double() - want).norm() <= 1e-3 * want.norm()


@pytest.mark.parametrize("given", GRID, ids=str)
def test_reference_and_library(given: dict) -> None:
    shape, x, w, b, want, rest = make(**given)
    got = torch.ops.fusionc.grouped_conv(x, w, b, *rest)
    assert got.dtype == x.dtype and got.is_contiguous(memory_format=torch.channels_last)
    for each in (got, runtime.library(x, w, b, shape)):
        assert (each.double() - want).norm() <= 2e-3 * want.norm()
    torch.library.opcheck(torch.ops.fusionc.grouped_conv.default, (x, w, b, *rest), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.interpret
def test_infinities_stay_where_they_are() -> None:
    """A mask, not a multiplication by zero, keeps other groups and taps outside of the image out."""
    shape, x, w, b, _, _ = make(n=1, c=8, o=8, size=(6, 6))
    x[0, 3, 5, 5] = torch.inf
    want = F.conv2d(x, w, b, padding=1, groups=3)
    for how in (("grouped", True, 16, 16, 16, 4, 1), ("grouped", False, 16, 16, 16, 4, 2)):
        got = runtime.launch(how, shape, x, w, b, interpret=True)
        assert torch.equal(got.isfinite(), want.isfinite()) and not want.isfinite().all()


def test_what_offsets_of_32_bits_cannot_reach_is_the_librarys() -> None:
    def wanted(**changed: Any) -> Any:
        given: dict[str, Any] = {"size": (64, 96, 56, 56), "filters": (96, 24, 3, 3), "strides": (216, 1, 72, 24)} | changed
        return runtime._call(given["size"], given["filters"], given["strides"], torch.bfloat16, True, 1, 1, 1, 1, 1, 1, 4, "",
                             torch.device("cpu"))[1]  # fmt: skip

    assert wanted() is not None and wanted(size=(1 << 14, 96, 56, 56)) is None
    assert wanted(strides=(216, 9, 1, 3)) is None, "lines and columns of the filter the other way round"
    assert wanted(size=(0, 96, 56, 56)) is None


@pytest.mark.cross
@pytest.mark.parametrize("c, o, stride, last", [(24, 24, 1, True), (64, 64, 1, True), (4, 8, 2, False), (128, 128, 2, False)])
def test_kernels_build_for_hopper_without_spills(c: int, o: int, stride: int, last: bool) -> None:
    from triton.backends.compiler import GPUTarget

    from fusionc.runtime.templates import Template

    shape = make(n=1, g=2, c=c, o=o, size=(28, 28), stride=stride, last=last, activation="relu")[0]
    for how in runtime.candidates(shape)[1:]:
        start = runtime._plan(how, shape, None)[1]
        assert start is not None
        kernel = Template(start.text, start.name, ("*bf16",) * 4 + ("i32",), tuple(start.constants.items()), torch.device("cpu"),
                          start.options["num_warps"], start.options["num_stages"], early=True)  # fmt: skip
        built = kernel.build(GPUTarget("cuda", 90, 32), usage=True)
        assert built.spills == 0 and "wgmma" in built.asm["ptx"] and built.shared <= 100 << 10
