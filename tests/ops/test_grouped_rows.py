"""The kernel of `grouped_rows` in Triton's interpreter against the operator in ATen, and built for Hopper.

The kernel runs in a process of its own: parts of Triton's library are made for the interpreter only when imported.
"""

from __future__ import annotations

import pytest
import torch

import fusionc.ops
from tests.ops.own_process import interpreted


@pytest.mark.interpret
def test_kernel() -> None:
    interpreted(__file__)


def test_operator_is_well_formed() -> None:
    fusionc.ops.load("grouped_rows")
    x, w, ends = torch.randn(6, 16).bfloat16(), torch.randn(3, 8, 16).bfloat16(), torch.tensor([2, 2, 6], dtype=torch.int32)
    torch.library.opcheck(torch.ops.fusionc.grouped_rows.default, (x, w, ends), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.cross
@pytest.mark.parametrize(("groups", "width", "inner"), [(128, 1536, 2048), (128, 2048, 768), (8, 14336, 4096), (4, 40, 24)])
def test_compiles_for_hopper_without_spills(groups: int, width: int, inner: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.backends.compiler import GPUTarget

    from fusionc.targets import grouped_rows

    monkeypatch.setattr(grouped_rows, "dependent", lambda _: True)
    plan = grouped_rows._Plan(torch.bfloat16, 64, inner, groups, width, inner, torch.device("cuda", 0))
    assert plan.tiles[-1] is None and len(plan.tiles) == 3
    for tile in plan.tiles[:-1]:
        assert tile is not None
        built = plan.kernel(tile).build(GPUTarget("cuda", 90, 32), usage=True)
        assert built.spills <= 0 and built.shared <= 227 << 10
        assert "griddepcontrol.wait" in built.asm["ptx"]
        assert plan.programs(tile) == groups * -(-width // tile.bn)


@pytest.mark.parametrize("change", ["float32", "int64 ends", "strided weight", "odd rows", "many rows", "an old GPU"])
def test_what_the_kernel_leaves_to_atten(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fusionc.targets import grouped_rows

    monkeypatch.setattr(grouped_rows, "generation", lambda _: 75 if change == "an old GPU" else 90)
    x, w, ends = torch.randn(6, 16).bfloat16(), torch.randn(3, 8, 16).bfloat16(), torch.tensor([2, 2, 6], dtype=torch.int32)
    assert change == "an old GPU" or grouped_rows._fits(x, w, ends)
    if change == "float32":
        x, w = x.float(), w.float()
    elif change == "int64 ends":
        ends = ends.long()
    elif change == "strided weight":
        w = torch.randn(3, 16, 8).bfloat16().transpose(1, 2)
    elif change == "odd rows":
        x = torch.randn(6, 17).bfloat16()[:, :16]
    elif change == "many rows":
        x = torch.randn(513, 16).bfloat16()
    assert not grouped_rows._fits(x, w, ends)


def _kernel() -> None:
    from fusionc.codegen.templates.grouped_rows import TEXT
    from fusionc.runtime import interpreter, launch

    module = launch.load_module(TEXT, interpret=True)
    half, brain = torch.float16, torch.bfloat16
    for dtype, sizes, width, inner, bn, bk, wide in (
        (half, (2, 0, 4), 32, 64, 16, 32, False),
        (brain, (0, 20, 1, 0, 2), 40, 24, 16, 16, False),  # a group of two blocks of rows; masks on both sides
        (half, (0, 0), 16, 16, 16, 16, False),  # nothing at all
        (half, (33, 3), 16, 48, 32, 16, True),
    ):
        rows, groups = sum(sizes), len(sizes)
        x = torch.randn(max(rows, 1) + 2, inner + 8).to(dtype)[:, :inner]  # dense rows, some of them behind the last group
        around = torch.full((groups * width * inner + 1024,), float("nan"), dtype=dtype)
        w = around[512:-512].view(groups, width, inner)
        w.copy_(torch.randn(groups, width, inner) * inner**-0.5)
        ends = torch.full((groups + 2,), 1, dtype=torch.int32)[1:-1]
        ends.copy_(torch.tensor(sizes).cumsum(0))
        out = torch.full((x.shape[0], width), float("nan"), dtype=dtype)
        with interpreter.lock, interpreter.repaired(), launch._interpreting(True):
            module.grouped_rows[(groups * -(-width // bn), 1, 1)](
                x, w, ends, out, x.shape[0], N=width, K=inner, XS=x.stride(0), WIDE=wide, PDL=False, BM=16, BN=bn, BK=bk,
                STAGES=2)
        group = torch.repeat_interleave(torch.arange(groups), torch.tensor(sizes))
        want = torch.einsum("rk,rnk->rn", x[:rows].float(), w[group].float())
        torch.testing.assert_close(out[:rows].float(), want, rtol=2e-2, atol=2e-2)
        assert out[rows:].isnan().all()
    # ends that are none: nothing outside of x and out is read or written
    around = torch.full((11, 16), float("nan"), dtype=half)
    x, out, w = torch.ones(7, 16, dtype=half), around[2:9], torch.ones(4, 16, 16, dtype=half)
    ends = torch.tensor([0, 10, -2, 7], dtype=torch.int32)
    with interpreter.lock, interpreter.repaired(), launch._interpreting(True):
        module.grouped_rows[(4, 1, 1)](x, w, ends, out, 7, N=16, K=16, XS=16, WIDE=False, PDL=False, BM=16, BN=16, BK=16,
                                       STAGES=2)
    assert around[:2].isnan().all() and around[9:].isnan().all() and (out == 16).all()


if __name__ == "__main__":
    _kernel()
