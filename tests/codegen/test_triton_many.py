"""Text of horizontal launches: it builds for a GPU that is not there, and its values are those of the loop interpreter."""

from __future__ import annotations

import pytest
import torch

from fusionc.codegen.triton import Unrenderable
from fusionc.codegen.triton_many import render_many
from fusionc.ir import interp
from fusionc.ir.text import parse_kernel
from fusionc.runtime import launch
from fusionc.runtime.device import known
from fusionc.schedule.horizontal import Item, Many
from fusionc.schedule.plan import Plan
from fusionc.targets.many import bind, kind_of, plans_of
from tests.schedule.test_horizontal import row, scale

HALF = scale(9).replace("f32[27]", "f16[27]").replace("in0[3*x0 + x1]", "cast.f32(in0[3*x0 + x1])")


def value() -> tuple[Many, list[list[torch.Tensor]]]:
    """Three families with different dtypes, one of them with an axis; the results of the first share a buffer."""
    kernels = tuple(parse_kernel(t) for t in (scale(5), scale(70), HALF, row(4, 16), row(9, 16)))
    rng = torch.Generator().manual_seed(0)
    buffers: list[torch.Tensor] = []
    items = []
    shared = torch.zeros(15 + 1 + 210, dtype=torch.float16)
    buffers.append(shared)
    expected = []
    for n, k in enumerate(kernels):
        slots = []
        mine = []
        for b in k.buffers:
            if b.kind == "out" and n < 2:
                slots.append((0, 16 * n))
                mine.append(shared[16 * n :][: b.size.value])
                continue
            made = torch.randn(b.size.value, generator=rng).to(interp.TORCH_DTYPE[b.dtype])
            slots.append((len(buffers), 0))
            buffers.append(made)
            mine.append(made)
        items.append(Item(n, tuple(slots)))
        expected.append(mine)
    return Many(kernels, tuple(items)), [buffers, *expected]


@pytest.mark.interpret
@pytest.mark.parametrize("block", [16, 256])
def test_values(block: int) -> None:
    many, (buffers, *mine) = value()
    plans = [
        Plan("triton", xblock=block) if not f.kernel.axis else Plan("triton", xblock=2, rblock=0) for f in many.families
    ]
    rendered = render_many(many, plans)
    want = []
    for k, tensors in zip(many.kernels, mine, strict=True):
        named = {b.name: t.clone() for b, t in zip(k.buffers, tensors, strict=True)}
        interp.run(k, named)
        want.append(named["out0"])
    bind(many.text, plans[0], rendered.source, rendered.grid, torch.device("cpu"))(buffers, (), 0)
    for tensors, w in zip(mine, want, strict=True):
        torch.testing.assert_close(tensors[-1], w)


def test_builds_for_a_gpu() -> None:
    many, _ = value()
    plans = plans_of(many, known("sm_90"))
    assert len(many.families) == 3 and len({p.warps for p in plans}) == 1
    rendered = render_many(many, plans)
    built = launch.cross_compile(rendered.source, many.symbol, many.signature, plans[0], "sm_90")
    assert built.registers > 0 and built.spills == 0
    assert "ld.global.v2.b32" not in rendered.source and ".param .u64" in built.asm["ptx"]


def test_what_may_share() -> None:
    device = known("sm_90")
    assert kind_of(parse_kernel(scale(5)), device) == "4 warps"
    assert kind_of(parse_kernel(scale(1 << 22)), device) is None  # fills the device by itself
    assert kind_of(parse_kernel(row(1, 1 << 16)), device) is None  # is split over programs
    dynamic = "kernel\n  size s0 >= 2\n  in in0: f32[s0]\n  out   out0: f32[s0]\n  for   x0 < s0\n    row out0[x0] = in0[x0]\n"
    assert kind_of(parse_kernel(dynamic), device) is None


def test_refuses_what_one_kernel_refuses() -> None:
    many, _ = value()
    plans = [Plan("triton", xblock=1 << 16, rblock=0) for _ in many.families]
    with pytest.raises(Unrenderable, match="too large"):
        render_many(many, plans)


@pytest.mark.interpret
def test_the_sweep_notices_a_wrong_item() -> None:
    from tests.sweeps.kernels import compare_many

    many, _ = value()
    plans = plans_of(many, known("sm_90"))
    rendered = render_many(many, plans)
    assert not compare_many(many, plans[0], rendered.source, rendered.grid)
    wrong = rendered.source.replace("tl.store(", "tl.store(1 + ", 1)
    assert compare_many(many, plans[0], wrong, rendered.grid)
