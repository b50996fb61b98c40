"""fusionc::conv_add_relu: the operator in ATen, our kernel in Triton's interpreter and for sm_90, which ways are offered."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusionc.codegen.templates.pointwise_conv import TEXT, Tile, tiles
from fusionc.ops import load
from fusionc.targets import conv_add_relu as target

load("conv_add_relu")
load("conv_add_relu_over")


def make(n: int, c: int, o: int, side: int, dtype: torch.dtype, taps: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x, z = [torch.randn(n, k, side, side).to(dtype, memory_format=torch.channels_last) for k in (c, o)]
    return x, (torch.randn(o, c, taps, taps) / c).to(dtype), torch.randn(o).to(dtype), z


def test_each_operator_has_a_kernel_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Program calls kernels by name: once the one that writes over z stood under the other's."""
    from types import SimpleNamespace

    from fusionc import ops
    from fusionc.ops import conv_add_relu

    called = []
    kernels = SimpleNamespace(fresh=lambda *_: called.append("fresh"), over=lambda *_: called.append("over"))
    monkeypatch.setattr(conv_add_relu, "_kernels", lambda: kernels)
    kernel = ops.direct(torch.ops.fusionc.conv_add_relu.default._op)
    assert kernel is not None and kernel.__closure__ is not None
    find = next(c.cell_contents for c in kernel.__closure__ if getattr(c.cell_contents, "__name__", "") == "<lambda>")
    find()()
    assert called == ["fresh"]
    assert ops.direct(torch.ops.fusionc.conv_add_relu_over.default._op) is None


def test_operator() -> None:
    x, w, b, z = make(2, 4, 8, 5, torch.float64, taps=3)
    given = ([1, 1], [1, 1], [1, 1])
    want = F.relu(F.conv2d(x, w, b, padding=1) + z)
    torch.testing.assert_close(torch.ops.fusionc.conv_add_relu(x, w, b, z, *given), want)
    torch.library.opcheck(torch.ops.fusionc.conv_add_relu.default, (x, w, b, z, *given),
                          test_utils=("test_schema", "test_faketensor"))  # fmt: skip
    torch.testing.assert_close(torch.ops.fusionc.conv_add_relu_over(x, w, b, z, *given), want)


@pytest.mark.interpret
@pytest.mark.parametrize("over", [False, True])
@pytest.mark.parametrize("tile", [Tile(16, 16, 16, 4, 2), Tile(64, 32, 32, 4, 2)], ids=str)
def test_kernel(tile: Tile, over: bool) -> None:
    from fusionc.runtime import interpreter, launch

    x, w, b, z = make(3, 64, 96, 5, torch.float16)
    want = F.relu(F.conv2d(x.double(), w.double(), b.double()) + z.double())
    out = z if over else torch.empty_like(z)
    grid = (-(-75 // tile.bm) * (96 // tile.bn), 1, 1)
    constants = {"N": 96, "K": 64, "BM": tile.bm, "BN": tile.bn, "BK": tile.bk, "STAGES": tile.stages}
    with interpreter.lock, launch._loading, interpreter.repaired(), launch._interpreting(True):
        launch.load_module(TEXT, interpret=True).pointwise[grid](x, w, b, z, out, 75, **constants)
    assert (out.double() - want).norm() < 1e-3 * want.norm()


@pytest.mark.cross
@pytest.mark.parametrize("width, inner", [(256, 64), (2048, 512)])
def test_kernel_builds_for_hopper_without_spills(width: int, inner: int) -> None:
    from triton.backends.compiler import GPUTarget

    from fusionc.runtime.templates import Template

    for tile in tiles(width, inner):
        constants = (("N", width), ("K", inner), ("BM", tile.bm), ("BN", tile.bn), ("BK", tile.bk), ("STAGES", tile.stages))
        kernel = Template(TEXT, "pointwise", ("*bf16",) * 5 + ("i32",), constants, torch.device("cpu"), tile.warps, tile.stages)
        built = kernel.build(GPUTarget("cuda", 90, 32), usage=True)
        assert built.spills == 0 and "wgmma" in built.asm["ptx"] and "st.global.v4" in built.asm["ptx"]


def test_ways() -> None:
    x, w, b, z = make(2, 64, 128, 4, torch.bfloat16)
    assert target.fits(x, w, b, z, (1, 1), (0, 0))
    assert not target.fits(x, w, b, z, (2, 2), (0, 0)) and not target.fits(x, w, b, z.contiguous(), (1, 1), (0, 0))
    assert not target.fits(x, w.transpose(0, 1).contiguous().transpose(0, 1), b, z, (1, 1), (0, 0))
    assert not target.fits(*make(2, 64, 128, 4, torch.float32), (1, 1), (0, 0))
    assert not target.fits(*make(2, 64, 128, 4, torch.bfloat16, taps=3), (1, 1), (1, 1))
    assert [type(how) for how in target.candidates(128, 64, True)] == [Tile, Tile, str, str]
    assert target.candidates(100, 64, True) == target.candidates(128, 64, False) == ("cudnn", "library")
