"""The kernel of `short_attention` in Triton's interpreter against the operator in ATen, and built for Hopper.

The kernel runs in a process of its own: parts of Triton's library are made for the interpreter only when imported.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

import fusionc.ops
from fusionc.codegen.templates.short_attention import TEXT, Tile, tiles
from fusionc.ops.short_attention import reference
from fusionc.targets.short_attention import constants, tiled
from tests.ops.own_process import interpreted
from tests.sampled import sampled

INF = float("inf")


@pytest.mark.interpret
def test_kernel() -> None:
    interpreted(__file__)


def test_operator_is_well_formed() -> None:
    fusionc.ops.load("short_attention")
    q, k = torch.randn(2, 4, 5, 16), torch.randn(2, 2, 5, 16)
    bias, mask = torch.randn(1, 4, 5, 8), torch.ones(2, 1, 1, 5, dtype=torch.bool)
    for arguments in ((q, k, k, 0.25, True), (q, k, k, 0.25, False, bias, mask, False)):
        torch.library.opcheck(torch.ops.fusionc.short_attention.default, arguments,
                              test_utils=("test_schema", "test_faketensor"))
        out = torch.ops.fusionc.short_attention(*arguments)
        assert out.shape == q.shape and out.transpose(1, 2).is_contiguous()


def plain(q: Tensor, k: Tensor, v: Tensor, scale: float, *added: Tensor) -> Tensor:
    """As a model writes it, where batch entry b reads part b mod P."""
    scores = q @ k.mT * scale
    for x in added:
        x = x.repeat(q.shape[0] // x.shape[0], 1, 1, 1)
        scores = scores + torch.where(x, 0.0, -INF) if x.dtype == torch.bool else scores + x
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("safe", [True, False])
def test_reference(safe: bool) -> None:
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(6, 2, 5, 8, generator=rng, dtype=torch.float64) for _ in range(3))
    bias, place = torch.randn(1, 2, 5, 5, generator=rng), torch.randn(3, 1, 5, 5, generator=rng)
    seen = torch.rand(2, 1, 1, 5, generator=rng) < 0.5
    seen[:, :, :, 0] = True
    for added in ((bias,), (place,), (bias, place), (place, seen), (seen,), (seen, bias), (bias.double(), place.double())):
        made = reference(q, k, v, 0.3, False, *added, *(None,) * (2 - len(added)), safe)  # type: ignore[arg-type]
        torch.testing.assert_close(made, plain(q, k, v, 0.3, *added), rtol=1e-6, atol=1e-6)
    wide = torch.nn.functional.pad(bias, (0, 3), value=float("nan"))
    torch.testing.assert_close(reference(q, k, v, 0.3, False, wide, None, safe), plain(q, k, v, 0.3, bias), rtol=1e-6, atol=1e-6)
    causal = reference(q, k, v, 0.3, True, bias, None, safe)
    torch.testing.assert_close(causal, plain(q, k, v, 0.3, bias, torch.ones(1, 1, 5, 5).tril().bool()), rtol=1e-6, atol=1e-6)


def test_rows_without_keys_are_zero_or_nan() -> None:
    q = torch.randn(2, 1, 3, 8)
    mask = torch.tensor([[[[True], [False], [True]]]]).expand(1, 1, 3, 3)
    for given in (mask, torch.where(mask, 0.0, -INF)):
        assert (reference(q, q, q, 1.0, False, given, None, True)[:, :, 1] == 0).all()
        out = reference(q, q, q, 1.0, False, given, None, False)
        assert out[:, :, 1].isnan().all() and not out[:, :, ::2].isnan().any()


def _constants(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, added: list[Tensor], safe: bool,
               early: bool) -> tuple[tuple[str, Any], ...]:  # fmt: skip
    b, h, n, d = q.shape
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    return constants(h, k.shape[1], n, k.shape[2], d, scale, causal, strides,
                     [(x.dtype, tuple(x.shape), x.stride()) for x in added], safe, b, early)  # fmt: skip


def _packed(batch: int, heads: int, rows: int, width: int, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, ...]:
    qkv = torch.empty(batch, rows, 3, heads, width, dtype=dtype, device=device)
    return (qkv if device == "meta" else qkv.normal_()).permute(2, 0, 3, 1, 4).unbind(0)


@pytest.mark.cross
@pytest.mark.parametrize("keys, width, causal", sampled([(128, 64, True), (256, 128, False), (200, 64, True)], 2))
def test_kernel_builds_for_hopper_without_spills(keys: int, width: int, causal: bool) -> None:
    q, k, v = _packed(1, 12, keys, width, torch.bfloat16, "meta")
    for tile in {*tiles(12, keys, 132), *tiles(384, keys, 132)}:
        _builds(_constants(q, k, v, 0.125, causal, [], True, True), tile, ())


@pytest.mark.cross
@pytest.mark.parametrize("rows, width", sampled([(49, 32), (64, 32), (128, 64)], 1))
@pytest.mark.parametrize("second", [None, torch.bfloat16, torch.bool])
def test_kernel_with_bias_builds_for_hopper_without_spills(rows: int, width: int, second: torch.dtype | None) -> None:
    q, k, v = _packed(2048, 3, rows, width, torch.bfloat16, "meta")
    added = [torch.empty(64, 3, rows, -(-rows // 8) * 8, dtype=torch.bfloat16, device="meta")]
    if second is not None:
        added.append(torch.empty(64, 1, rows, rows, dtype=second, device="meta"))
    kinds = tuple({torch.bfloat16: "*bf16", torch.bool: "*i1"}[x.dtype] for x in added)
    found = tiles(2048 * 3, rows, 132, 32)
    assert {tile.each for tile in found} == {1, 2, 4, 8}
    for tile in found:
        _builds(_constants(q, k, v, 0.125, False, added, False, True), tile, kinds)


def _builds(fixed: tuple[tuple[str, Any], ...], tile: Tile, kinds: tuple[str, ...]) -> None:
    from triton.backends.compiler import GPUTarget

    from fusionc.runtime.templates import Template

    kernel = Template(TEXT, "short", ("*bf16",) * 4 + kinds, (*fixed, *tiled(tile)), torch.device("cpu"), tile.warps)
    built = kernel.build(GPUTarget("cuda", 90, 32), usage=True)
    ptx = built.asm["ptx"]
    assert built.spills == 0 and ptx.index("griddepcontrol.wait") < ptx.index("ld.global"), tile
    assert built.shared <= 200 << 10
    if os.environ.get("SHOW"):
        print(tile, kinds, "registers", built.registers, "shared", built.shared)


def _run(module: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, added: list[Tensor], safe: bool,
         tile: Tile) -> Tensor:  # fmt: skip
    from fusionc.runtime import interpreter, launch

    b, h, n, d = q.shape
    out = torch.full((b, n, h, d), float("nan"), dtype=q.dtype)
    fixed = dict((*_constants(q, k, v, scale, causal, added, safe, False), *tiled(tile)))
    for i, x in enumerate(added):
        fixed[f"x{i}"] = x
    programs = -(-n // tile.queries) * h * fixed["PERIOD"] * -(-(b // fixed["PERIOD"]) // tile.each)
    with interpreter.lock, interpreter.repaired(), launch._interpreting(True):
        module.short[(programs, 1, 1)](q, k, v, out, **fixed)
    return out.transpose(1, 2)


def _kernel() -> None:
    from fusionc.runtime import launch

    module = launch.load_module(TEXT, interpret=True)
    half = torch.float16  # of bfloat16 the interpreter multiplies bit patterns
    #  B  H HKV  L   S   D  causal BM
    for b, h, g, n, s, d, causal, bm in (
        (2, 3, 3, 20, 20, 16, True, 16),
        (1, 4, 2, 33, 33, 32, True, 32),
        (1, 4, 1, 24, 70, 16, False, 16),
        (2, 2, 2, 64, 64, 16, False, 32),
    ):
        qkv = torch.randn(b, max(n, s), (h + 2 * g) * d).to(half)
        q, k, v = (t.unflatten(-1, (-1, d)).transpose(1, 2) for t in qkv.split([h * d, g * d, g * d], -1))
        q, k, v = q[:, :, :n], k[:, :, :s], v[:, :, :s]
        out = _run(module, q, k, v, 0.3, causal, [], True, Tile(bm, 4))
        want = reference(q.double(), k.double(), v.double(), 0.3, causal)
        error = (out.double() - want).norm() / want.norm()
        assert error < 2e-3, (error, b, h, n, s)
    _with_bias(module, half)


def _with_bias(module: Any, half: torch.dtype) -> None:
    lowest = torch.finfo(torch.float32).min
    shifted = torch.where(torch.rand(4, 1, 49, 49) < 0.3, -100.0, 0.0)
    cut = torch.where(torch.rand(2, 1, 40, 40) < 0.4, -INF, 0.0)
    cut[1, :, 3] = -INF  # a row without a key
    dead = torch.where(torch.rand(1, 1, 1, 64) < 0.5, lowest, 0.0).repeat(2, 1, 64, 1)
    dead[1, :, 5] = lowest  # uniform
    wide = torch.nn.functional.pad(torch.randn(1, 3, 49, 49), (0, 7), value=float("nan")).to(half)
    turned = torch.randn(64, 64, 2).to(half).permute(2, 0, 1)[None]
    seen = torch.rand(4, 1, 1, 64) < 0.6
    seen[2] = False
    #  B  H  L   S   D  added, causal, tile
    for b, h, n, s, d, added, causal, tile in (
        (4, 3, 49, 49, 32, [wide], False, Tile(64, 4)),
        (8, 3, 49, 49, 32, [wide, shifted.to(half)], False, Tile(64, 4)),
        (12, 3, 49, 49, 32, [wide, shifted.to(half)], False, Tile(64, 4, 2)),  # 3 images: the last program has one
        (8, 3, 49, 49, 32, [shifted], False, Tile(32, 4, 4)),
        (3, 5, 49, 49, 16, [torch.randn(1, 5, 49, 49).to(half)], True, Tile(16, 4, 2)),
        (4, 2, 64, 64, 32, [turned, seen], False, Tile(64, 4)),
        (4, 2, 17, 64, 32, [seen], False, Tile(32, 4)),
        (2, 1, 40, 40, 16, [cut], False, Tile(64, 4)),
        (4, 2, 64, 64, 32, [turned, dead], False, Tile(32, 4, 2)),
    ):
        q, k, v = _packed(b, h, max(n, s), d, half)
        q = q[:, :, :n]
        for safe in (True, False):
            ordered = sorted(added, key=lambda x: x.dtype == torch.bool)
            out = _run(module, q, k, v, 0.2, causal, ordered, safe, tile).double()
            more = (*added, *(None,) * (2 - len(added)))
            want = reference(q.double(), k.double(), v.double(), 0.2, causal, *more, safe)
            assert torch.equal(out.isnan(), want.isnan()), (b, h, n, s, safe)
            assert want.isnan().any() == (not safe and (n == 40 or any(x is seen for x in added)))
            out, want = out.nan_to_num(0), want.nan_to_num(0)
            error = (out - want).norm() / want.norm()
            assert error < 2e-3, (error, b, h, n, s)


if __name__ == "__main__":
    torch.manual_seed(0)
    _kernel()
