"""The kernels of `skinny_linear` and `decode_attention` in Triton's interpreter against the operators in ATen.

In a process of its own: parts of Triton's library are made for the interpreter only when it is imported.
"""

from __future__ import annotations

import re
import sys
from typing import Any

import pytest
import torch

import fusionc.ops
from tests.ops.own_process import interpreted
from tests.sampled import sampled

pytestmark = pytest.mark.interpret


@pytest.mark.parametrize("part", ["linear", "attention", "far"])
def test_kernels(part: str) -> None:
    interpreted(__file__, part)


def test_ranges() -> None:
    from fusionc.codegen.templates.decode_attention import ranges

    assert ranges(8, 1024, 64, 132) == (8, 128, 128), "Llama 1B"
    assert ranges(8, 1024, 128, 132) == (16, 64, 64), "keys and values of 128 rows would not fit into registers"
    assert ranges(8, 100000, 64, 132) == (32, 3136, 64), "a loop"
    assert ranges(4096, 1000, 64, 132) == (1, 1024, 64) and ranges(1, 1, 16, 8) == (1, 128, 128)
    for heads in (1, 8, 60, 2000):
        for length in (1, 63, 64, 65, 128, 4097, 70000):
            for width in (16, 64, 128, 256):
                count, rows, step = ranges(heads, length, width, 132)
                assert count * rows >= length > (count - 1) * rows and rows % step == 0 and count <= 32


@pytest.mark.parametrize(
    ("strides", "wide"),
    [((1 << 20, 1 << 16, 64), False), ((1 << 30, 64, 64), True), ((64, 1 << 28, 64), True), ((64, 64, 1 << 20), True)],
)
def test_addresses_are_wide_whatever_of_a_cache_lies_far_apart(strides: tuple[int, ...], wide: bool) -> None:
    from fusionc.targets import decode

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "properties", lambda _: type("H200", (), {"processors": 132}))
        kernel, _ = decode._kernel.__wrapped__(torch.bfloat16, 8, 8, 64, 1024, 0.1, False, False, None, 2,
                                               (0,) * 7 + strides * 2 + (0, 0, 0), True, torch.device("cuda", 0))  # fmt: skip
    assert dict(kernel.constants)["WIDE"] is wide


@pytest.mark.cross
@pytest.mark.parametrize(("width", "length"), sampled([(64, 1024), (64, 50000), (128, 1024), (128, 50000), (256, 1024),
                                                       (256, 5000)], 3))  # fmt: skip
def test_compiles_for_hopper_without_spills(width: int, length: int) -> None:
    from triton.backends.compiler import GPUTarget

    from fusionc.targets import decode

    row, device = 8 * width, torch.device("cuda", 0)
    strides = (3 * row, width) * 3 + (width, *(8 * length * width, length * width, width) * 2, 0, 0, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "properties", lambda _: type("H200", (), {"processors": 132}))
        kernel, _ = decode._kernel.__wrapped__(torch.bfloat16, 32, 8, width, length, 0.1, True, True, torch.bool, 1, strides,
                                               True, device)  # fmt: skip
    built = kernel.build(GPUTarget("cuda", 90, 32), usage=True)
    assert built.spills <= 0 and built.registers <= 255
    moved = re.findall(r"ttg.convert_layout [^\n]* : tensor<(\d+)x(\d+)x[^\n]*->", built.asm["ttgir"])
    tile = width * dict(kernel.constants)["BS"]
    assert all(int(a) * int(b) < tile for a, b in moved), "keys or values pass through shared memory once, for the product"


def _plan(heights: tuple[int, ...], inner: int, activation: str, ahead: tuple[int, ...], chained: bool = True,
          norm: torch.dtype | None = None, bias: bool = False, residual: bool = True) -> Any:  # fmt: skip
    from fusionc.targets import skinny

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(skinny, "dependent", lambda _: True)
        return skinny._Plan(heights, inner, torch.bfloat16, norm or torch.bfloat16, 1e-5, int(norm is not None), activation, bias,
                            residual and not activation, chained, ahead, torch.device("cuda", 0))  # fmt: skip


@pytest.mark.cross
@pytest.mark.parametrize(
    ("heights", "inner", "activation", "ahead", "asked"),
    [((2048,), 2048, "", (33554432, 33554432), 2), ((2048,), 4096, "", (33554432, 33554432), 2),
     ((960, 320, 320), 4096, "", (1 << 20,), 1), ((1000, 1000), 4104, "silu", (4096, 0), 0), ((2048,), 2048, "", (), 0)],
)  # fmt: skip
def test_weights_are_asked_for(
    heights: tuple[int, ...], inner: int, activation: str, ahead: tuple[int, ...], asked: int
) -> None:
    from triton.backends.compiler import GPUTarget

    plan = _plan(heights, inner, activation, ahead)
    for tile in plan.tiles:
        built = plan.kernel(tile).build(GPUTarget("cuda", 90, 32), usage=True)
        own = 0 if not ahead or tile.depth * tile.bk >= inner else 2 if activation else 1  # for what is not loaded already
        assert built.asm["ptx"].count("cp.async.bulk.prefetch.L2.global") == asked + own, tile
        assert built.spills <= 0, tile
    alone = _plan(heights, inner, activation, ahead, chained=False)
    assert not dict(alone.kernel(alone.tiles[0]).constants)["OWN"], "without waiting there is no time to use"


@pytest.mark.cross
@pytest.mark.parametrize(
    ("heights", "inner", "activation", "norm", "bias"),
    [((2048, 512, 512), 2048, "", torch.bfloat16, False), ((3072, 1024, 1024), 3072, "", torch.bfloat16, False),
     ((8192, 8192), 3072, "silu", torch.bfloat16, False), ((14336, 14336), 4096, "silu", torch.bfloat16, False),
     ((4096, 1024, 1024), 4096, "", torch.float32, True), ((8192, 8192), 2048, "silu", torch.bfloat16, True)],
)  # fmt: skip
def test_few_registers_of_one_row_are_spilled(
    heights: tuple[int, ...], inner: int, activation: str, norm: torch.dtype, bias: bool
) -> None:
    from triton.backends.compiler import GPUTarget

    plan = _plan(heights, inner, activation, (), chained=False, norm=norm, bias=bias, residual=False)
    assert len(plan.tiles) == 2
    for tile in plan.tiles:
        built = plan.kernel(tile).build(GPUTarget("cuda", 90, 32), usage=True)
        assert built.spills <= 64, tile


def test_what_decides_the_tiles_is_in_the_key() -> None:
    wide = _plan((2048,), 2048, "", (), chained=False, norm=torch.float32, residual=False)
    same = _plan((2048,), 2048, "", (), chained=False, norm=torch.bfloat16, residual=False)
    assert wide.tiles != same.tiles and wide.key != same.key
    assert len(_plan((2048,), 2048, "", ()).tiles) == 1, "in a chain nothing is chosen"


def test_shares_lie_inside_the_weight() -> None:
    from fusionc.codegen.templates.skinny_linear import share

    assert share(33554432, 512, 33554432) == (65536, 13056), "Llama 1B: of every 64 KB a fifth"
    for size in (0, 16, 4096, 33554432, 33554432 + 16, 525336576):
        for programs in (1, 7, 240, 512, 32064):
            for room in (0, 5000000, size):
                step, part = share(size, programs, room)
                assert part % 16 == 0 and step % 16 == 0 and part <= step and (programs - 1) * step + part <= size
                assert part * programs <= room


def test_fake_shapes() -> None:
    fusionc.ops.load("skinny_linear")
    fusionc.ops.load("decode_attention")
    with torch._subclasses.FakeTensorMode():
        x, w = torch.empty(3, 16, dtype=torch.bfloat16), torch.empty(8, 16, dtype=torch.bfloat16)
        got = torch.ops.fusionc.skinny_linear(x, w, None, 0.0, False, None, "silu", None, False)
        assert got.shape == (3, 4) and got.dtype is torch.bfloat16
        q, k = torch.empty(2, 8, 1, 16), torch.empty(2, 4, 32, 16)
        assert torch.ops.fusionc.decode_attention(q, k, k, None, 1.0, False).shape == (2, 1, 8, 16)


def test_operators_are_well_formed() -> None:
    fusionc.ops.load("skinny_linear")
    fusionc.ops.load("decode_attention")
    x, w, n = torch.randn(3, 16), torch.randn(8, 16), torch.rand(16)
    check = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.fusionc.skinny_linear.default, (x, w, n, 1e-5, True, None, "gelu", None, False),
                          test_utils=check)
    q, k, cache = torch.randn(1, 4, 1, 16), torch.randn(1, 2, 1, 16), torch.randn(1, 2, 8, 16)
    cos, index = torch.rand(1, 1, 1, 16), torch.tensor(3)
    torch.library.opcheck(torch.ops.fusionc.decode_attention_update.default,
                          (q, k, k, cos, cos, cache, cache.clone(), index, None, 0.25, False), test_utils=check)


def _linear() -> None:
    from fusionc.codegen.templates.skinny_linear import text
    from fusionc.ops.skinny_linear import reference
    from fusionc.runtime import interpreter, launch

    half, brain = torch.float16, torch.bfloat16
    #     dtype  M  parts of N   K   norm activation bias residual BN  BK depth
    for dtype, m, parts, k, norm, act, bias, residual, bn, bk, depth in (
        (half, 1, (10,), 48, 1, "", False, True, 4, 64, 1),
        (brain, 1, (20,), 100, 2, "silu", False, False, 4, 32, 1),
        (brain, 1, (14,), 64, 0, "gelu", True, False, 2, 64, 1),
        (half, 1, (12, 12), 64, 1, "relu", False, False, 4, 32, 1),
        (half, 1, (18,), 33, 1, "gelu_tanh", False, False, 2, 16, 3),
        (half, 1, (24, 8, 16), 33, 2, "", True, False, 4, 16, 2),
        (half, 1, (8, 16), 64, 0, "", False, True, 4, 16, 4),  # one round, nothing masked
        (brain, 1, (16, 16), 128, 2, "silu", False, False, 4, 16, 2),  # four
        (brain, 1, (16, 16), 100, 1, "silu", True, False, 4, 16, 3),  # three, of which the last is not full
        (half, 1, (13,), 40, 2, "", True, True, 4, 32, 2),
        (half, 1, (13,), 600, 2, "", True, True, 4, 32, 2),  # more tiles than are written out for the sum of squares
    ):
        n = sum(parts) // (2 if act else 1)
        x, w = torch.randn(m, k).to(dtype), (torch.randn(sum(parts), k) * k**-0.5).to(dtype)
        x[:, -8:] *= 4  # so that a tile left out of the sum of squares shows
        apart = [part.clone() for part in w.split(parts)]
        ends = (parts[0], sum(parts[:2])) if len(parts) > 1 and not act else (0, 0)
        nw = (1 + 0.1 * torch.randn(k)).to(dtype) if norm else None
        b = torch.randn(sum(parts)).to(dtype) if bias else None
        r = torch.randn(m, n).to(dtype) if residual else None
        out = torch.full((m, n), float("nan"), dtype=dtype)
        constants = {"N0": ends[0], "N1": ends[1], "UP": n if len(parts) == 1 else 0, "N": n, "K": k,
                     "EPS": 1e-5, "NORM": norm, "ACT": act, "HAS_BIAS": b is not None,
                     "HAS_RESIDUAL": residual, "WIDE": False, "PDL": False, "NEXT": False, "OWN": False, "STEP0": 0, "SHARE0": 0,
                     "STEP1": 0, "SHARE1": 0, "BN": bn, "BK": bk, "EVEN": n % bn == 0 and k % (bk * depth) == 0}
        args = [out if t is None else t for t in (x, apart[0], apart[len(parts) // 2], apart[-1], nw, b, r)]
        with interpreter.lock, interpreter.repaired(), launch._interpreting(True):
            module = launch.load_module(text(depth), interpret=True)
            module.one_row[(-(-n // bn), 1, 1)](*args, out, out, out, **constants)
        want = reference(*(None if t is None else t.float() for t in (x, w)), None if nw is None else nw.float(), 1e-5,
                         norm == 1, None if b is None else b.float(), act, None if r is None else r.float())
        torch.testing.assert_close(out.float(), want, rtol=3e-2, atol=3e-2)


def _attention() -> None:
    from fusionc.codegen.templates.decode_attention import TEXT
    from fusionc.ops.decode_attention import attention, rotated, update
    from fusionc.runtime import interpreter, launch
    from fusionc.targets.decode import _mask_strides

    module, dtype = launch.load_module(TEXT, interpret=True), torch.float16
    module.gdc_wait = module.gdc_launch_dependents = lambda: None  # the interpreter has no inline assembly
    names = "QB QH KNB KNH VNB VNH CB KB KH KS VB VH VS MB MH MS".split()
    #   B  H HKV D   S  update rope mask splits rows position
    cases = (
        (1, 8, 2, 16, 96, True, True, 2, 2, 64, 40),
        (2, 4, 4, 32, 70, True, False, 1, 1, 128, 69),
        (1, 6, 2, 16, 200, False, False, 1, 4, 64, 0),
        (1, 4, 1, 64, 130, True, True, 0, 3, 64, 3),
        (1, 4, 2, 16, 96, True, True, 3, 2, 64, 20),  # nothing is visible, with numbers: the softmax of them counts
        (1, 4, 2, 128, 70, True, True, 2, 2, 64, 40),
        (1, 2, 1, 256, 70, True, False, 1, 2, 64, 69),
        (1, 4, 2, 16, 70, True, True, 2, 2, 64, 70),  # a position outside of the cache is not written
    )
    # in one step a range, then in several
    for number, (step, (b, h, g, d, s, up, rope, kind, splits, rows, p)) in enumerate(
        [(case[9], case) for case in cases] + [(32, case) for case in cases] + [(64, cases[0]), (32, cases[1])]
    ):
        qkv = torch.randn(b, 1, (h + 2 * g) * d).to(dtype)
        q, k, v = (t.unflatten(-1, (-1, d)).transpose(1, 2) for t in qkv.split([h * d, g * d, g * d], -1))
        key, value = torch.randn(b, g, s, d).to(dtype), torch.randn(b, g, s, d).to(dtype)
        key2, value2 = key.clone(), value.clone()
        angle = torch.randn(1, 1, 1, d // 2).repeat(1, 1, 1, 2)
        cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
        visible = (torch.arange(s) <= p).view(1, 1, 1, s) if p else torch.rand(1, 1, 1, s) > 0.3
        mask = {0: None, 1: visible.expand(b, 1, 1, s), 2: torch.where(visible, 0.0, -65504.0).to(dtype),
                3: torch.full((1, 1, 1, s), -65504.0).to(dtype)}[kind]
        index, scale = torch.tensor([p]), d**-0.5
        out = torch.full((b, 1, h, d), float("nan"), dtype=dtype)
        part = torch.full((b * g * splits * (16 * d + 32),), float("nan"))
        counters = torch.zeros(b * g, dtype=torch.int32)
        strides = (q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1), 0, *key.stride()[:3],
                   *value.stride()[:3], *((0, 0, 0) if mask is None else _mask_strides(mask)))
        with interpreter.lock, interpreter.repaired(), launch._interpreting(True):
            module.decode[(b * g * splits, 1, 1)](
                q, k, v, cos, sin, key, value, index, out if mask is None else mask, out, part, counters, H=h, HKV=g, D=d, S=s,
                SCALE=scale, UPDATE=up, ROPE=rope, MASK=min(kind, 2), **dict(zip(names, strides)), WIDE=False,
                PDL=number >= 2 * len(cases), SPLITS=splits, ROWS=rows, BS=step)
        turn = (cos, sin) if rope else (None, None)
        if up and p < s:
            want = update(q, k, v, *turn, key2, value2, index, mask, scale)
        else:
            want = attention(rotated(q, cos, sin) if rope else q, key2, value2, mask, scale)
        torch.testing.assert_close(out, want, rtol=1e-2, atol=2e-3)
        assert torch.equal(key, key2) and torch.equal(value, value2) and not counters.any()


def _far() -> None:
    """Rows of a cache more than 2³¹ elements apart, as in one laid out [S, B, H, D]; its pages between them are never touched."""
    from fusionc.codegen.templates.decode_attention import TEXT
    from fusionc.ops.decode_attention import attention
    from fusionc.runtime import interpreter, launch

    module, (s, d, step) = launch.load_module(TEXT, interpret=True), (70, 16, 1 << 25)
    cache = torch.empty(s * step, dtype=torch.float16).as_strided((1, 1, s, d), (0, 0, step, 1))
    cache.copy_(torch.randn(1, 1, s, d))
    q, out = torch.randn(1, 2, 1, d).half(), torch.empty(1, 1, 2, d, dtype=torch.float16)
    names = "QB QH KNB KNH VNB VNH CB KB KH KS VB VH VS MB MH MS".split()
    strides = dict.fromkeys(names, 0) | {"QH": d, "KS": step, "VS": step}
    for block in (128, 32):  # one step, then several
        with interpreter.lock, interpreter.repaired(), launch._interpreting(True):
            module.decode[(1, 1, 1)](q, q, q, q, q, cache, cache, q, q, out, out, out, H=2, HKV=1, D=d, S=s, SCALE=0.25,
                                     UPDATE=False, ROPE=False, MASK=0, **strides, WIDE=True, PDL=False, SPLITS=1, ROWS=128,
                                     BS=block)  # fmt: skip
        torch.testing.assert_close(out, attention(q, cache, cache, None, 0.25), rtol=1e-2, atol=2e-3)


if __name__ == "__main__":
    torch.manual_seed(0)
    {"linear": _linear, "attention": _attention, "far": _far}[sys.argv[1]]()
