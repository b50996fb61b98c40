"""Padded matmuls: frozen weights, run-time copies, readers of strided results, each refusal."""

from __future__ import annotations

import pytest
import torch

from fusionc.graph.text import parse, show
from fusionc.passes.pad_matmul import PadMatmul, rebuild
from tests.passes.helpers import apply, check_values, refusals, rewritten

PASS = PadMatmul("cpu", (torch.float64,), least=-1e9)
HEAD = """
%x: f64[6, 8] = input
%w: f64[13, 8] = input  # static
%t: f64[8, 13]{1, 8} = aten.t(%w)
%y: f64[6, 13] = aten.mm(%x, %t)
%v: f64[2, 3, 13] = aten.view(%y, [2, 3, 13])
return (%v,)
"""


def test_a_frozen_weight_is_padded_once() -> None:
    assert (
        rewritten(PASS, HEAD)
        == """
%x: f64[6, 8] = input
%w: f64[13, 8] = input  # static
%derived_0: f64[64, 8] = input
%t_1: f64[8, 64]{1, 8} = aten.t(%derived_0)
%mm: f64[6, 64] = aten.mm(%x, %t_1)
%slice_1: f64[6, 13]{64, 1} = aten.slice(%mm, 1, 0, 13)
%clone: f64[6, 13] = aten.clone(%slice_1, memory_format=torch.contiguous_format)
%v: f64[2, 3, 13] = aten.view(%clone, [2, 3, 13])
return (%v)
"""
    )
    check_values(PASS, HEAD, fired=1, exact=False)


def test_readers_take_strided_results() -> None:
    new = check_values(
        PASS, HEAD.replace("return (%v,)", "%s: f64[2, 3, 13] = aten.sin(%v)\nreturn (%s,)"), fired=1, exact=False
    )
    assert "clone" not in show(new) and "%v: f64[2, 3, 13]{192, 64, 1}" in show(new)


def test_weights_by_rows_biases_and_casts() -> None:
    new = check_values(
        PASS,
        """
%x: f64[6, 8] = input
%w: f32[8, 13] = input  # static
%b: f64[13] = input  # static
%c: f64[8, 13] = aten._to_copy(%w, dtype=torch.float64)
%y: f64[6, 13] = aten.addmm(%b, %x, %c)
return (%y,)
""",
        fired=1,
        exact=False,
    )
    assert "%derived_0: f64[8, 64] = input\n%derived_1: f64[64] = input" in show(new)
    for made in new.meta["fusionc_derived"]:
        again = rebuild(*made.recipe[1:], count=1)
        source = (
            torch.randn(8, 13, dtype=torch.float32)
            if made.name == "derived_0"
            else torch.randn(13, dtype=torch.float64)
        )
        assert again([source]).equal(made.compute([source]))


BACKWARD = """
%g: f64[6, 13] = input
%w: f64[13, 8] = input  # static
%x: f64[6, 8] = input
%dx: f64[6, 8] = aten.mm(%g, %w)
%t: f64[13, 6]{1, 13} = aten.t(%g)
%dw: f64[13, 8] = aten.mm(%t, %x)
return (%dx, %dw)
"""


def test_training_pads_at_run_time_and_shares() -> None:
    assert (
        "\n" + show(apply(PASS, BACKWARD, "backward")[0])
        == """
%g: f64[6, 13] = input
%w: f64[13, 8] = input  # static
%x: f64[6, 8] = input
%constant_pad_nd: f64[6, 64] = aten.constant_pad_nd(%g, [0, 51, 0, 0])
%constant_pad_nd_1: f64[64, 8] = aten.constant_pad_nd(%w, [0, 0, 0, 51])
%mm: f64[6, 8] = aten.mm(%constant_pad_nd, %constant_pad_nd_1)
%t_1: f64[64, 6]{1, 64} = aten.t(%constant_pad_nd)
%mm_1: f64[64, 8] = aten.mm(%t_1, %x)
%slice_1: f64[13, 8] = aten.slice(%mm_1, 0, 0, 13)
return (%mm, %slice_1)
"""
    )


@pytest.mark.parametrize("spelling", ["t(%g)", "permute(%g, [1, 0])"])
def test_run_time_values(spelling: str) -> None:
    check_values(PASS, BACKWARD.replace("  # static", "").replace("t(%g)", spelling), fired=2, exact=False)


def test_run_time_bias() -> None:
    check_values(
        PASS,
        """
%x: f64[6, 8] = input
%w: f64[8, 13] = input
%b: f64[13] = input
%b1: f64[1] = input
%m: f64[6, 8] = input
%n: f64[13, 8] = input
%y: f64[6, 13] = aten.addmm(%b, %x, %w)
%z: f64[6, 13] = aten.addmm(%b1, %x, %w)
%r: f64[6, 8] = aten.addmm(%m, %y, %n)
return (%y, %z, %r)
""",
        fired=3,
        exact=False,
    )


def one(line: str, inputs: str = "") -> str:
    return f"%x: f64[6, 8] = input\n%w: f64[8, 13] = input  # static\n{inputs}{line}\nreturn (%y,)\n"


REFUSED = {
    "not 16-bit floats": one("%y: f32[6, 13] = aten.mm(%x, %w)").replace("f64", "f32"),
    "addmm scales its bias or product": one("%y: f64[6, 13] = aten.addmm(%b, %x, %w, beta=2)", "%b: f64[13] = input\n"),
    "its bias is a matrix": one("%y: f64[6, 13] = aten.addmm(%b, %x, %w)", "%b: f64[6, 13] = input\n"),
    "the memory of an operand is written by the graph": one(
        "%c: f64[6, 8] = aten.mul_.Tensor(%x, 2)\n%y: f64[6, 13] = aten.mm(%c, %w)"
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refusals(reason: str) -> None:
    assert [each.split(" (")[0] for each in refusals(PASS, REFUSED[reason])] == [reason]
    check_values(PASS, REFUSED[reason], fired=0)


def test_refuses_what_is_small() -> None:
    item = PadMatmul("cpu", (torch.float64,))
    (found,) = refusals(item, HEAD)
    assert found.startswith("padding would not pay: 3 µs without, 2 with, 3 for copies")
    big = (
        "%x: f64[128, 768] = input\n%w: f64[768, 50257] = input{}\n%y: f64[128, 50257] = aten.mm(%x, %w)\nreturn (%y,)"
    )
    assert apply(item, parse(big.format("  # static")))[1].fired == 1
    # 128 rows against a copy of 77 MB: the weight of a training step stays as it is, that of 8192 rows does not
    assert apply(item, parse(big.format("")), "forward")[1].fired == 0
    assert apply(item, parse(big.format("").replace("128", "8192")), "forward")[1].fired == 1


def test_aligned_sizes_and_other_devices_are_not_looked_at() -> None:
    assert refusals(PASS, HEAD.replace("13", "16")) == [] and refusals(PadMatmul(), HEAD) == []
    assert apply(PASS, HEAD.replace("13", "16"))[1].fired == 0


def test_symbolic() -> None:
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    from fusionc.passes.manager import run
    from tests.passes.helpers import call

    w = torch.nn.Parameter(torch.randn(13, 8, dtype=torch.float64))

    def f(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.mm(x, w.t()), torch.mm(w, x.t())

    env = ShapeEnv()
    mode = FakeTensorMode(shape_env=env)
    context = StatelessSymbolicContext([DimDynamic.DYNAMIC, DimDynamic.STATIC])
    fakes = [
        mode.from_tensor(torch.randn(6, 8, dtype=torch.float64), symbolic_context=context),
        mode.from_tensor(w, static_shapes=True),
    ]
    with mode:
        gm = make_fx(f)(*fakes)
    guards = len(env.guards)
    gm, (record,) = run([(1, PASS)], gm, "graph", None, stage="inference", static=(1,))
    assert record.fired == 1 and len(env.guards) == guards
    for rows in (6, 9):
        x = torch.randn(rows, 8, dtype=torch.float64)
        with torch.no_grad():
            torch.testing.assert_close(tuple(call(gm, [x, w])[0]), f(x, w))


def test_bad_recipes() -> None:
    for bad in ((0, 0, 0, False, [[]]), ("1", 8, 0, False, [[]]), (8, 8, 3, False, [[]])):
        with pytest.raises(ValueError, match="not a"):
            rebuild(*bad, count=1)
