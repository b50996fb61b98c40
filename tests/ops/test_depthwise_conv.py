"""Depthwise convolution: each kernel in Triton's interpreter against F.conv2d in float64; compiled for sm_90."""

from __future__ import annotations

import re
import weakref
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from fusionc.codegen.templates import depthwise_conv as template
from fusionc.ops import load
from fusionc.runtime import depthwise_conv as runtime
from fusionc.runtime.depthwise_conv import Shape

load("depthwise_conv")
ACT = {"": lambda y: y, "relu": F.relu, "gelu": F.gelu, "silu": F.silu, "gelu_tanh": lambda y: F.gelu(y, approximate="tanh")}


def make(n=2, c=3, size=(9, 10), kernel=(3, 3), stride=(1, 1), padding=None, dilation=(1, 1), dtype=torch.float16,
         last=False, bias=True, activation="", times=1):  # fmt: skip
    padding = tuple(d * (k - 1) // 2 for k, d in zip(kernel, dilation)) if padding is None else padding
    shape = Shape(c, size, kernel, stride, padding, dilation, dtype, last, bias, activation, times)
    rng = torch.Generator().manual_seed(c * size[0] + kernel[1])
    x = torch.randn(n, c // times, *size, generator=rng).to(dtype)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    taps = (torch.randn(*kernel, c, generator=rng) / kernel[0]).to(dtype)
    b = torch.randn(c, generator=rng).to(dtype) if bias else None
    weight = taps.double().permute(2, 0, 1).unsqueeze(1)
    want = F.conv2d(x.double(), weight, None if b is None else b.double(), stride, padding, dilation, c // times)
    return shape, x, taps, b, ACT[activation](want)


def check(how, shape, x, taps, b, want) -> None:
    got = runtime.launch(how, shape, x, taps, b, interpret=True)
    assert got.shape == want.shape and got.dtype == x.dtype
    assert got.is_contiguous(memory_format=torch.channels_last if shape.last else torch.contiguous_format)
    tolerance = 1e-5 if x.dtype == torch.float32 else 1e-3
    assert (got.double() - want).norm() <= tolerance * want.norm()


TOEPLITZ = [
    ({"kernel": (7, 7), "size": (9, 14)}, (16, 16)),
    ({"kernel": (7, 7), "size": (6, 40), "c": 2}, (16, 32)),
    ({"kernel": (5, 13), "size": (8, 56), "c": 1, "activation": "gelu"}, (64, 64)),
    ({"kernel": (31, 31), "size": (7, 20), "n": 1, "c": 1, "activation": "silu"}, (32, 32)),
    ({"kernel": (3, 5), "size": (12, 25), "dilation": (2, 3), "bias": False}, (32, 32)),
    ({"kernel": (3, 7), "size": (9, 33), "padding": (0, 1), "activation": "relu", "c": 2}, (16, 32)),
    ({"kernel": (4, 6), "size": (7, 12), "padding": (3, 5), "activation": "gelu_tanh"}, (32, 32)),
]


def test_turned_images_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []
    empty = torch.empty

    def watched(*sizes: Any, **options: Any) -> torch.Tensor:
        found = empty(*sizes, **options)
        made.append(weakref.ref(found))
        return found

    def look(*_: Any) -> None:
        alive.append(sum(ref() is not None for ref in made))

    shape, x, taps, b, _ = make(last=True)
    monkeypatch.setattr(runtime.torch, "empty", watched)
    monkeypatch.setattr(runtime.Start, "__call__", look)
    runtime.launch(("turned", 0, "toeplitz", 1, True, 16, 16, 16, 4, 2), shape, x, taps, b, interpret=True)
    assert alive == [1, 3, 3, 2]  # (the packed taps are the third)


@pytest.mark.interpret
@pytest.mark.parametrize("how", [
    ("turned", 0, "toeplitz", 2, True, 16, 16, 16, 4, 2), ("turned", 16, "streamed", 8, 16, 4, 16, 1, 3, 2),
    ("laid", "direct", 4, 16, 8, 4)], ids=str)  # fmt: skip
def test_large_batches_are_turned_in_portions(how: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers, the taps packed once, and copies of a portion only."""
    sizes: list[int] = []
    started: list[str] = []
    empty, call = torch.empty, runtime.Start.__call__
    monkeypatch.setattr(runtime, "_MUCH", 1)
    monkeypatch.setattr(runtime, "_SLOW", 9)
    monkeypatch.setattr(runtime.torch, "empty", lambda *a, **k: (t := empty(*a, **k), sizes.append(t.numel()))[0])
    monkeypatch.setattr(runtime.Start, "__call__", lambda self, *t: (started.append(self.name), call(self, *t))[1])
    runtime._plan.cache_clear()
    given = make(n=8, c=3, size=(7, 12), kernel=(5, 5), last=how[0] == "turned")
    check(how, *given)
    runtime._plan.cache_clear()
    x = given[1]
    assert sizes.count(x.numel()) == 1 and sizes.count(x.numel() * (16 if how[1] == 16 else 12) // 48) == 2
    assert started.count("pack") == (how[1] != "direct") and started.count("conv") == 4 and started.count("turn") == 8


@pytest.mark.interpret
@pytest.mark.parametrize(("given", "tile"), TOEPLITZ, ids=str)
@pytest.mark.parametrize(("last", "group"), [(False, 1), (False, 2), (True, 2), (False, 4)], ids=str)
def test_toeplitz(given: dict, tile: tuple[int, int], last: bool, group: int) -> None:
    check((*(("turned", 0) if last else ()), "toeplitz", group, True, *tile, 16, 4, 2), *make(**given, last=last))


STREAMED = [
    ({"kernel": (7, 7), "size": (9, 24)}, (8, 16, 4)),
    ({"kernel": (7, 7), "size": (9, 14)}, (16, 16, 0)),
    ({"kernel": (9, 9), "size": (7, 20), "n": 1, "activation": "silu"}, (8, 16, 4)),
    ({"kernel": (13, 13), "size": (11, 28), "c": 2, "activation": "gelu"}, (16, 32, 8)),
    ({"kernel": (21, 21), "size": (5, 17), "c": 1}, (8, 32, 12)),
    ({"kernel": (3, 5), "size": (12, 25), "dilation": (2, 3), "bias": False}, (8, 32, 8)),
    ({"kernel": (3, 3), "size": (5, 9), "dilation": (4, 1), "padding": (4, 1)}, (8, 16, 4)),
    ({"kernel": (3, 7), "size": (9, 33), "padding": (0, 1), "activation": "relu", "c": 2}, (8, 32, 8)),
    ({"kernel": (4, 6), "size": (7, 12), "padding": (3, 5), "activation": "gelu_tanh"}, (8, 16, 8)),
]


@pytest.mark.interpret
@pytest.mark.parametrize(("given", "window"), STREAMED, ids=str)
@pytest.mark.parametrize(("around", "unroll", "parts"), [((), 2, 1), ((), 1, 3), (("turned", 0), 2, 2), (("turned", 8), 2, 1),
                                                         (("widened", 8), 2, 2)], ids=str)  # fmt: skip
def test_streamed(given: dict, window: tuple[int, int, int], around: tuple, unroll: int, parts: int,
                  monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    shape, *rest = make(**given, last="turned" in around)
    if around and around[1]:
        around = (around[0], -(-shape.size[1] // 8) * 8)
        if around[0] == "turned" and around[1] == shape.size[1] or window == (16, 16, 0) and around[1] > 16:
            return
    monkeypatch.setattr(runtime, "_PROGRAMS", parts if parts == 1 else 10**6)  # as many parts as the lines allow
    runtime._plan.cache_clear()
    check((*around, "streamed", *window, 16, 1, 3, unroll), shape, *rest)
    runtime._plan.cache_clear()


DIRECT = [
    {"kernel": (7, 7), "size": (9, 14)},
    {"kernel": (3, 3), "size": (9, 11), "stride": (2, 2), "c": 40, "dtype": torch.float32},
    {"kernel": (5, 3), "size": (9, 11), "dilation": (2, 3), "activation": "gelu", "bias": False},
    {"kernel": (2, 4), "size": (8, 9), "padding": (0, 2), "stride": (1, 3), "activation": "relu"},
    {"kernel": (1, 5), "size": (1, 7), "n": 1, "c": 1, "activation": "silu", "dtype": torch.float32},
    {"kernel": (7, 7), "size": (9, 11), "stride": (2, 2), "c": 40, "times": 2, "activation": "gelu"},
    {"kernel": (3, 3), "size": (5, 6), "c": 9, "times": 3, "dtype": torch.float32},
]


@pytest.mark.interpret
@pytest.mark.parametrize("given", DIRECT, ids=str)
@pytest.mark.parametrize(("strip", "block"), [(4, 16), (7, 32)])
def test_direct(given: dict, strip: int, block: int) -> None:
    check(("direct", strip, block, 8, 4), *make(**given, last=True))


@pytest.mark.interpret
@pytest.mark.parametrize("given", [
    {"kernel": (11, 11), "size": (9, 13), "dtype": torch.float32, "activation": "gelu"},
    {"kernel": (5, 25), "size": (7, 9), "c": 40, "dtype": torch.float32, "bias": False},
    {"kernel": (13, 13), "size": (9, 10), "stride": (2, 2), "activation": "silu"},
], ids=str)  # fmt: skip
def test_large_filters_of_float32_or_with_strides(given: dict) -> None:
    shape, *rest = make(**given)
    forms = runtime.candidates(shape, 2)
    assert [how[:2] for how in forms[:-1]] == [("laid", "direct")] * (len(forms) - 1) and len(forms) > 1
    check((*forms[0][:4], 8, *forms[0][5:]), shape, *rest)


@pytest.mark.parametrize("given", [*(g for g, _ in TOEPLITZ[:3]), *({**g, "last": True} for g in DIRECT)], ids=str)
def test_reference_and_library(given: dict) -> None:
    shape, x, taps, b, want = make(**given)
    got = torch.ops.fusionc.depthwise_conv(x, taps, b, shape.stride, shape.padding, shape.dilation, shape.activation)
    assert (got.double() - want).norm() <= 1e-3 * want.norm() and got.stride() == \
        torch.ops.aten.convolution(x, taps.permute(2, 0, 1)[:, None].contiguous(), b, shape.stride, shape.padding,
                                   shape.dilation, False, [0, 0], x.shape[1]).stride()  # fmt: skip
    assert (runtime.library(x, taps, b, shape).double() - want).norm() <= 3e-3 * want.norm()
    plain = runtime.by_taps(x, taps, b, shape)
    assert plain.dtype == torch.float32 and (plain.double() - want).norm() <= 1e-5 * want.norm()
    torch.library.opcheck(torch.ops.fusionc.depthwise_conv.default, (x, taps, b, shape.stride, shape.padding, shape.dilation,
                          shape.activation), test_utils=("test_schema", "test_faketensor"))  # fmt: skip


def test_the_library_is_asked_where_it_may_be_the_fastest() -> None:
    def asked(**given: Any) -> tuple[int, int]:
        shape = make(n=1, c=64, size=(14, 28), **given)[0]
        return runtime.most(shape, 32), len(runtime.candidates(shape, 32))

    assert asked(kernel=(7, 7), last=True) == (2, 4) == asked(kernel=(3, 3), last=True, stride=(2, 2))
    others = ({"kernel": (13, 13), "last": True}, {"kernel": (1, 31), "last": True}, {"kernel": (7, 7)},
              {"kernel": (3, 3), "last": True, "dilation": (2, 2)}, {"kernel": (7, 7), "last": True, "dtype": torch.float32})
    for given in others:
        tried, known = asked(**given)
        assert tried == known


@pytest.mark.interpret
@pytest.mark.parametrize(("given", "tile"), [TOEPLITZ[1], TOEPLITZ[4], TOEPLITZ[6]], ids=str)
@pytest.mark.parametrize(("last", "parts"), [(False, 1), (True, 3)])
def test_gradient_of_taps(given: dict, tile: tuple[int, int], last: bool, parts: int) -> None:
    shape, x, taps, _, want = make(**{**given, "bias": False, "activation": ""}, last=last)
    grad = torch.randn(want.shape, generator=torch.Generator().manual_seed(1)).to(x.dtype)
    grad = grad.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    wide = taps.double().requires_grad_()
    F.conv2d(x.double(), wide.permute(2, 0, 1).unsqueeze(1), None, shape.stride, shape.padding, shape.dilation,
             shape.channels).backward(grad.double())  # fmt: skip
    how = ("turned" if last else "toeplitz", *tile, 16, 4, 2, parts)
    for got in (runtime.launch_weight(how, shape, grad, x, interpret=True), runtime._library_weight(shape, grad, x),
                torch.ops.fusionc.depthwise_conv_weight(grad, x, shape.kernel, shape.padding, shape.dilation)):
        assert got.dtype == torch.float32 and got.shape == taps.shape and got.is_contiguous()
        assert (got - wide.grad).norm() <= 2e-3 * wide.grad.norm()


def test_candidates_fit_the_shape() -> None:
    def kinds(**given):  # type: ignore[no-untyped-def]
        shape = make(n=1, **given)[0]
        return [c[0] for c in runtime.candidates(shape, 32)]

    assert set(kinds(size=(8, 56), kernel=(7, 7))) == {"streamed", "library"}
    assert set(kinds(size=(8, 56), kernel=(21, 21))) == {"streamed", "toeplitz", "library"}
    assert set(kinds(size=(8, 56), kernel=(31, 31))) == {"toeplitz", "library"}
    assert set(kinds(size=(8, 56), kernel=(7, 7), last=True)) == {"direct", "library"}
    assert kinds(size=(8, 16), kernel=(31, 31), last=True)[0] == "turned"
    assert kinds(size=(8, 16), kernel=(7, 7), stride=(2, 2)) == ["library"]
    assert kinds(size=(8, 16), kernel=(7, 7), dtype=torch.float32) == ["library"]
    for width in (7, 14, 28, 56, 112, 200):
        for k in (3, 7, 13, 31, 51):
            shape = make(n=1, c=1, size=(4, width), kernel=(k, k))[0]
            for tw, kd in runtime._tiles(shape):
                whole = kd >= width and tw >= width
                assert whole or kd >= -(-(k // 2) // 8) * 8 + tw + k // 2, (width, k, tw, kd)
            for p, wide, ahead in runtime._windows(shape):
                assert p == wide >= width and not ahead or wide >= ahead + p + k // 2 and ahead >= k // 2, (width, k, p, wide)


def test_transpositions_align_lines() -> None:
    def widths(size: int, kernel: int) -> list[int]:
        shape = make(n=1, c=64, size=(4, size), kernel=(kernel, kernel), last=True)[0]
        return [how[1] for how in runtime.candidates(shape, 32) if how[0] == "turned"]

    assert set(widths(56, 13)) == {0} and set(widths(28, 13)) == {32}
    assert set(widths(56, 31)) == {64} and set(widths(64, 31)) == {0}


def test_lines_of_odd_widths_are_lengthened() -> None:
    """Of such lines each pixel is loaded by itself, which takes time and registers."""
    for width, kernel in ((57, 7), (57, 31), (7, 7), (13, 21)):
        shape = make(n=1, c=3, size=(4, width), kernel=(kernel, kernel))[0]
        wide = -(-width // 8) * 8
        assert all(how[:2] == ("widened", wide) for how in runtime.candidates(shape, 32)[:-1])
        assert all(how[:2] == ("widened", wide) for how in runtime.weight_candidates(shape, 32)[:-1])


def test_lengthened_lines_keep_32_bit_offsets() -> None:
    def shape(size: tuple[int, int], c: int = 1024) -> Shape:
        return Shape(c, size, (51, 1), (1, 1), (25, 0), (1, 1), torch.bfloat16, True, False, "")

    assert all(how[1] == 0 for how in runtime.candidates(shape((200000, 1)), 1) if how[0] == "turned"), "eight times as long"
    assert all(how[1] == 0 for how in runtime.candidates(shape((149000, 7)), 1) if how[0] == "turned"), "2^30 elements"
    assert any(how[1] for how in runtime.candidates(shape((1000, 7)), 1) if how[0] == "turned")


def test_candidates_compile_quickly() -> None:
    """A model waits for the slowest candidate."""
    for width in (14, 28, 56, 112, 200):
        for k in range(3, 33, 2):
            for last in (False, True):
                for how in runtime.candidates(make(n=1, c=64, size=(4, width), kernel=(k, k), last=last)[0], 32):
                    if "streamed" in how:
                        p, _, _, tall, warps, _, unroll = how[how.index("streamed") + 1 :]
                        assert k * tall * p // (32 * warps) <= 112 and unroll * k <= 56, (width, k, how)
    texts = (((7, 7), (1, 1)), ((7, 7), (3, 3)), ((7, 7), (1, 20)), ((5, 5), (18, 18)), ((49, 1), (1, 1)), ((3, 3), (1, 1)))
    for kernel, dilation in texts:
        shape = make(n=1, c=96, size=(56, 56), kernel=kernel, dilation=dilation, last=True)[0]
        for _, strip, *_ in [how for how in runtime.weight_candidates(shape, 32) if how[0] == "direct"]:
            assert kernel[0] * kernel[1] * strip <= 7 * 7 * 14 and kernel[0] * (strip + (kernel[1] - 1) * dilation[1]) <= 150
    direct = runtime.candidates(make(n=1, c=64, size=(4, 28), kernel=(7, 7), last=True)[0], 32)
    assert direct == (("direct", 14, 64, 4, 4), ("direct", 7, 64, 4, 4), ("direct", 14, 32, 16, 4), ("library",))


@pytest.mark.cross
@pytest.mark.parametrize(("kernel", "how"), [
    (7, ("toeplitz", 2, False, 64, 64, 128, 8, 2)), (7, ("toeplitz", 2, True, 64, 64, 64, 4, 2)),
    (7, ("toeplitz", 1, False, 64, 64, 128, 4, 3)), (7, ("direct", 14, 32, 8, 4)),
    (7, ("streamed", 8, 16, 4, 32, 2, 3, 2)), (7, ("streamed", 16, 16, 0, 32, 2, 3, 2)),
    (13, ("streamed", 8, 32, 8, 64, 2, 3, 2)), (13, ("streamed", 16, 32, 8, 16, 1, 3, 2)),
    (25, ("streamed", 8, 32, 12, 32, 2, 3, 2)), (25, ("streamed", 8, 32, 12, 16, 1, 3, 2))], ids=str)  # fmt: skip
def test_compiles_for_a_gpu_without_spills(kernel: int, how: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.backends.compiler import GPUTarget

    side = 14 if how[1:3] == (16, 16) else 56
    shape = Shape(256, (side, side), (kernel, kernel), (1, 1), (kernel // 2, kernel // 2), (1, 1), torch.bfloat16,
                  how[0] == "direct", True, "gelu")  # fmt: skip
    starts = runtime._FORMS[how[0]](how, shape, 32, torch.float32, torch.bfloat16, torch.device("cuda"))[1]
    assert starts[-1].kernel is not None
    built = starts[-1].kernel.build(GPUTarget("cuda", 90, 32), usage=True)
    ptx = built.asm["ptx"]
    assert built.spills <= 0 and built.registers <= 255
    if how[0] == "toeplitz":
        assert built.registers <= 128 or how[6] == 4  # two programs on a multiprocessor
        assert "wgmma" in ptx and bool(re.search(r"wgmma\.mma_async[^;]*\}, \{", ptx)) == how[2]  # A from registers
    if how[0] == "streamed":
        assert ptx.count("mma.sync") == kernel * how[7] * how[1] // 8 * how[2] // 16 * how[4] // (16 * how[5])
    if how[0] in ("toeplitz", "streamed"):
        assert "cp.async" in ptx


@pytest.mark.cross
@pytest.mark.parametrize(("kernel", "side", "last"), [(31, 57, False), (13, 57, False), (7, 7, False), (13, 27, True)], ids=str)
def test_odd_widths_compile_without_spills(kernel: int, side: int, last: bool) -> None:
    from triton.backends.compiler import GPUTarget

    pad = kernel // 2
    shape = Shape(64, (side, side), (kernel, kernel), (1, 1), (pad, pad), (1, 1), torch.bfloat16, last, True, "gelu")
    how = runtime.candidates(shape, 32)[0]
    starts = [*runtime._plan(how, shape, 32, torch.float32, torch.bfloat16, torch.device("cuda"))[1]]
    if kernel == 31:
        starts += runtime._weight_plan(runtime.weight_candidates(shape, 32)[0], shape, 32, torch.device("cuda"))[1]
    for start in starts:
        assert start.kernel is not None
        built = start.kernel.build(GPUTarget("cuda", 90, 32), usage=True)
        assert built.spills <= 0 and built.registers <= 255, start.name


@pytest.mark.cross
@pytest.mark.parametrize("kernel", [7, 13, 31])
def test_compiles_for_amd_without_spills(kernel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.backends.compiler import GPUTarget

    from fusionc.runtime.templates import Template

    monkeypatch.setattr(torch.version, "hip", "6.4")
    pad, names = kernel // 2, {"pack": ("*fp32", "*bf16"), "conv": ("*bf16", "*bf16", "*bf16", "*bf16", "i32")}
    shape = Shape(64, (28, 28), (kernel, kernel), (1, 1), (pad, pad), (1, 1), torch.bfloat16, False, True, "gelu")
    runtime._plan.cache_clear()
    runtime.candidates.cache_clear()
    for how in runtime.candidates(shape, 33)[:2]:
        for start in runtime._plan(how, shape, 33, torch.float32, torch.bfloat16, torch.device("cuda"))[1]:
            built = Template(start.text, start.name, names[start.name], tuple(start.constants.items()), torch.device("cuda"),
                             start.options["num_warps"], start.options["num_stages"])  # fmt: skip
            assert built.build(GPUTarget("hip", "gfx942", 64), usage=True).spills <= 0, how
    runtime._plan.cache_clear()
    runtime.candidates.cache_clear()


@pytest.mark.cross
@pytest.mark.parametrize(("tall", "warps"), [(64, 4), (128, 8)])
def test_the_gradient_of_the_taps_compiles_without_spills(tall: int, warps: int) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fusionc.runtime.launch import _usage, load_module

    fn = load_module(template.WEIGHT).weight
    constants = {"C": 256, "H": 56, "W": 56, "OH": 56, "OW": 56, "KH": 31, "KW": 31, "DH": 1, "DW": 1, "PH": 15, "PW": 15,
                 "PA": 0, "TILES": 1, "TW": 64, "KD": 64, "KP": 32, "BM": tall, "PARTS": 1}  # fmt: skip
    kinds = {n: "constexpr" if n in constants else {"rows": "i32", "out": "*fp32"}.get(n, "*bf16") for n in fn.arg_names}
    attrs = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(fn.arg_names) if kinds[n][0] == "*"}
    source = ASTSource(fn=fn, signature=kinds, constexprs=constants, attrs=attrs)
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, "num_stages": 3})
    registers, spills = _usage(built)
    assert spills <= 0 and registers < 255 and "wgmma" in built.asm["ptx"]


@pytest.mark.cross
@pytest.mark.slow
def test_the_gradient_of_few_taps_compiles_without_spills() -> None:
    from triton.backends.compiler import GPUTarget

    from fusionc.runtime.templates import Template

    text = template.direct_weight(256, 56, 56, (7, 7), (3, 3), (1, 1), 14, 64)
    kinds = ("*bf16", "*bf16", "*fp32", "i32")
    built = Template(text, "weight", kinds, (("BR", 4), ("PARTS", 99)), torch.device("cuda"), 4).build(
        GPUTarget("cuda", 90, 32), usage=True)  # fmt: skip
    assert built.spills <= 0 and built.registers <= 256  # two programs on a multiprocessor


def test_the_kernels_get_a_contiguous_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    import fusionc.runtime.depthwise_conv as home

    def launch(how: Any, shape: Any, x: torch.Tensor, taps: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        assert bias.is_contiguous()
        return x

    monkeypatch.setattr(home, "launch", launch)
    home.depthwise_conv(torch.ones(1, 8, 4, 4), torch.ones(3, 3, 8), torch.ones(16)[::2], [1, 1], [1, 1], [1, 1], "")
