"""The kernel of `skinny_linear` for several rows in Triton's interpreter against the operator in ATen, and its tiles.

The kernel runs in a process of its own: parts of Triton's library are made for the interpreter only when imported.
"""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch

import fusionc.ops
from fusionc.codegen.templates.few_rows import sibling_tiles, tiles
from fusionc.ops.skinny_linear import BLOCK, ROWS
from tests.ops.own_process import interpreted


@pytest.mark.interpret
def test_kernel() -> None:
    interpreted(__file__)


def test_operator_is_well_formed() -> None:
    fusionc.ops.load("skinny_linear")
    x, w, n = torch.randn(3, 16), torch.randn(16, 8), torch.rand(16)
    given = (x, w, n, 1e-5, False, torch.randn(8), "relu", torch.randn(3, 8), False, None, False, True)
    torch.library.opcheck(torch.ops.fusionc.skinny_linear.default, given, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("rows", [1, 2, 16, 17, 100, ROWS])
@pytest.mark.parametrize("width, inner, gated", [(14336, 4096, True), (4096, 14336, False), (768, 768, False), (2304, 768, False),
                                                 (768, 3072, False), (40, 104, True), (128256, 2048, False),
                                                 (50257, 768, False)])  # fmt: skip
def test_tiles_fit(rows: int, width: int, inner: int, gated: bool) -> None:
    found = tiles(rows, width, inner, gated, 132)
    assert found and len(set(found)) == len(found) <= 2
    for t in found:
        assert 16 <= t.bm <= 128 and 16 <= t.bn <= (128 if width % 8 else BLOCK) and t.bk >= 16  # odd widths: one tensor
        assert t.split == 1 or (t.split - 1) * -(-(-(-inner // t.bk)) // t.split) * t.bk < inner  # no range is empty
        assert (t.bm + t.bn * (2 if gated else 1)) * t.bk * 2 * t.stages <= 200 << 10  # shared memory


@pytest.mark.parametrize("rows, width, inner, block", [(4096, 2304, 768, 768), (129, 192, 64, 64), (2048, 3072, 1024, 128),
                                                       (512, 6144, 2048, 2048)])  # fmt: skip
def test_sibling_tiles_fit(rows: int, width: int, inner: int, block: int) -> None:
    found = sibling_tiles(rows, width, inner, block, 132)
    assert 1 <= len(found) <= 2 and all(block % t.bn == 0 and t.split == 1 for t in found)
    assert all((t.bm + t.bn) * t.bk * 2 * t.stages <= 200 << 10 for t in found)


@pytest.mark.cross
@pytest.mark.parametrize("bn", [64, 128, 256])
def test_sibling_kernel_builds_for_hopper_without_spills(bn: int) -> None:
    from triton.backends.compiler import GPUTarget

    from fusionc.codegen.templates.few_rows import TEXT, ahead
    from fusionc.runtime.templates import Template

    for t in sibling_tiles(2048, 3 * bn * 8, 1024, bn, 132):
        constants = {"N0": bn * 8, "N1": bn * 16, "APART": False, "M": 2048, "N": bn * 24, "K": 1024, "XS": 1024,
                     "ACT": "", "GATED": False, "HAS_BIAS": True, "HAS_RESIDUAL": False, "KN": False, "SPLIT": 1,
                     "WIDE": False, "PDL": True, "FETCH": ahead(2048, bn * 24, 1024, False), "BM": t.bm, "BN": t.bn,
                     "BK": t.bk, "STAGES": t.stages}  # fmt: skip
        kinds = ("*bf16",) * 7 + ("*fp32", "*i32")
        kernel = Template(TEXT, "few_rows", kinds, tuple(constants.items()), torch.device("cpu"), t.warps, t.stages)
        built = kernel.build(GPUTarget("cuda", 90, 32), usage=True)
        assert built.spills == 0 and "wgmma" in built.asm["ptx"], t


def test_siblings_apart_in_the_library() -> None:
    from fusionc.ops.skinny_linear import reference
    from fusionc.targets.few_rows import apart

    x, weights, bias = torch.randn(20, 16), [torch.randn(n, 16) for n in (8, 24, 16)], torch.randn(48)
    for b in (None, bias):
        want = reference(x, weights[0], None, 0.0, False, b, "", None, False, weights[1:])
        torch.testing.assert_close(apart(x, weights, b), want)


@pytest.mark.cross
@pytest.mark.parametrize("rows, width, inner, gated, turned", [(128, 768, 3072, False, True), (16, 4096, 14336, False, False),
                                                               (24, 3072, 1024, True, False),
                                                               (128, 50257, 768, False, False)])  # fmt: skip
def test_kernel_builds_for_hopper_without_spills(rows: int, width: int, inner: int, gated: bool, turned: bool) -> None:
    from triton.backends.compiler import GPUTarget

    from fusionc.codegen.templates.few_rows import TEXT, ahead
    from fusionc.runtime.templates import Template

    t = tiles(rows, width, inner, gated, 132)[0]
    constants = {"N0": 0, "N1": 0, "APART": gated, "M": rows, "N": width, "K": inner, "XS": inner,
                 "ACT": "silu" if gated else "", "GATED": gated, "HAS_BIAS": True, "HAS_RESIDUAL": True, "KN": turned,
                 "SPLIT": t.split, "WIDE": False, "PDL": True, "FETCH": ahead(rows, width, inner, gated),
                 "BM": t.bm, "BN": t.bn, "BK": t.bk, "STAGES": t.stages}  # fmt: skip
    kinds = ("*bf16",) * 7 + ("*fp32", "*i32")
    kernel = Template(TEXT, "few_rows", kinds, tuple(constants.items()), torch.device("cpu"), t.warps, t.stages)
    built = kernel.build(GPUTarget("cuda", 90, 32), usage=True)
    ptx = built.asm["ptx"]
    assert built.spills == 0 and "cp.async" in ptx and ("wgmma" in ptx or "mma.sync" in ptx)
    assert ptx.index("griddepcontrol.wait") < ptx.index("cp.async")


@pytest.mark.interpret
@pytest.mark.cross
def test_large_tiles_hold_nothing_but_their_sums() -> None:
    """GPT-2's head with a gate on an A100: biases and places held during the products spilled 128 bytes and more."""
    from triton.backends.compiler import GPUTarget

    from fusionc.targets import few_rows

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(few_rows, "dependent", lambda _: False)
        device = torch.device("cuda", 0)
        plan = few_rows._Plan(128, (2 * 50257,), 768, 768, torch.float16, "silu", True, True, False, False, device)
    for tile in plan.tiles[:-1]:
        built = plan.kernel(tile).build(GPUTarget("cuda", 80, 32), usage=True)
        assert built.spills <= 64, tile


def test_the_library_is_charged_for_its_place_between_two_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    from fusionc.targets import few_rows

    times = {0: [0.0055], 1: [0.0062], 2: [0.0050]}

    def alone(launches: Any, device: Any) -> Any:
        return lambda left, count: {i: times[i] * count for i in left}

    monkeypatch.setattr(few_rows, "cuda_sampler", alone)
    sample = few_rows.in_company([lambda: None] * 3, torch.device("cuda:0"))
    found = sample([0, 2], 2)
    assert set(found) == {0, 2} and found[0] == [0.0055] * 2 and found[2] == pytest.approx([0.007] * 2)
    asked: list[Any] = []
    monkeypatch.setattr(few_rows, "choose", lambda *args, sampler, **more: asked.append(sampler))
    for early in (True, False):
        monkeypatch.setattr(few_rows, "dependent", lambda _, early=early: early)
        few_rows._Plan(16, (64,), 64, 64, torch.bfloat16, "", False, False, False, False, torch.device("cuda", 0)).choose(str)
    assert asked == [few_rows.in_company, few_rows.cuda_sampler], "where kernels of ours start early"
    assert few_rows.in_company([lambda: None] * 4, torch.device("cuda:0"))([2], 1) == {2: [0.0050]}, "not the last one"


def test_odd_width_by_columns() -> None:
    from fusionc.targets.few_rows import by_columns, odd

    assert odd(128, 50257) and not odd(128, 50256) and not odd(127, 50257)
    x, w = torch.randn(24, 40, dtype=torch.float64), torch.randn(71, 40, dtype=torch.float64)
    out = torch.empty(24, 71, dtype=torch.float64)
    assert by_columns(x, w, out, interpret=True) is out
    torch.testing.assert_close(out, x @ w.t())
    torch.testing.assert_close(by_columns(x, w, interpret=True), x @ w.t())


def _kernel() -> None:
    from fusionc.codegen.templates.few_rows import TEXT
    from fusionc.ops.skinny_linear import reference
    from fusionc.runtime import interpreter, launch

    module = launch.load_module(TEXT, interpret=True)
    module.gdc_wait = module.gdc_launch_dependents = lambda: None  # the interpreter has no inline assembly
    apart = None
    half = torch.float16  # of bfloat16 the interpreter multiplies bit patterns
    # the last: rows so far apart that 32 bits do not number their elements
    far = [(3, 16, 32, False, "", False, False, False, 1, 16, 16, 32, 1)]
    with contextlib.suppress(RuntimeError):  # 4 GiB of addresses, of which little is touched
        apart = torch.empty((1 << 31) + 32, dtype=half)
    #  M  N   K    turned activation gated bias residual parts BM BN BK split
    for m, n, k, turned, act, gated, bias, residual, parts, bm, bn, bk, split in (
        (20, 48, 96, True, "gelu_tanh", False, True, False, 1, 16, 32, 32, 1),
        (16, 40, 104, False, "silu", True, False, True, 1, 16, 16, 16, 1),
        (16, 48, 104, False, "silu", True, False, False, 2, 16, 16, 32, 1),
        (5, 96, 64, False, "", False, True, False, 3, 16, 32, 32, 1),
        (50, 96, 64, False, "", False, True, False, 3, 16, 32, 32, 1),  # four blocks of rows
        (33, 48, 200, True, "", False, True, True, 1, 16, 32, 32, 3),
        (16, 40, 104, False, "gelu", True, True, True, 1, 16, 16, 16, 2),
        (5, 24, 64, True, "relu", True, True, False, 1, 16, 16, 16, 2),
        (20, 35, 64, False, "", False, False, False, 1, 16, 16, 32, 1),
        *(far if apart is not None else []),
    ):
        x, wide = (torch.randn(m, k) + 0.5).to(half), n * (2 if gated else 1)
        if apart is not None and m == 3:
            x = apart.as_strided((m, k), (1 << 30, 1)).copy_(x)
        w = (torch.randn(wide, k) * k**-0.5).to(half)
        pieces = list(w.split(wide // parts))
        b = torch.randn(wide).to(half) if bias else None
        r = torch.randn(m, n).to(half) if residual else None
        out = torch.full((m, n), float("nan"), dtype=half)
        count = -(-m // bm) * -(-n // bn)
        part, counters = torch.full((count * split * bm * bn * 2,), float("nan")), torch.zeros(count, dtype=torch.int32)
        weights = [p.contiguous() for p in (pieces[0].t() if turned else pieces[0], pieces[parts // 2], pieces[-1])]
        constants = {"N0": n // 3 if parts == 3 else 0, "N1": 2 * n // 3 if parts == 3 else 0, "APART": parts == 2,
                     "M": m, "N": n, "K": k, "XS": x.stride(0), "ACT": act, "GATED": gated, "HAS_BIAS": bias,
                     "HAS_RESIDUAL": residual, "KN": turned, "SPLIT": split, "WIDE": False, "PDL": False, "FETCH": 0,
                     "BM": bm, "BN": bn, "BK": bk, "STAGES": 2}  # fmt: skip
        args = [x, *weights, *[out if t is None else t for t in (b, r)], out, part, counters]
        with interpreter.lock, interpreter.repaired(), launch._interpreting(True):
            module.few_rows[(count * split, 1, 1)](*args, **constants)
        x64, w64, b64, r64 = (None if t is None else t.double() for t in (x, w, b, r))
        assert x64 is not None and w64 is not None
        want = reference(x64, w64, None, 0.0, False, b64, act, r64, False, None, gated)
        error = (out.double() - want).norm() / want.norm()
        assert error < 1e-3, (error, m, n, k, act)
        assert not counters.any()


if __name__ == "__main__":
    torch.manual_seed(0)
    _kernel()
