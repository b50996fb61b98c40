"""simplify: the loops that come out, the same values, nothing left to do the second time."""

from __future__ import annotations

import math
import random

import pytest
import torch

from fusionc.ir import interp
from fusionc.ir.expr import Op
from fusionc.ir.loop import Kernel, evaluate
from fusionc.ir.simplify import simplify
from fusionc.ir.text import parse_kernel

SIZES = {"s0": 6, "s1": 5}


def check(kernel: Kernel) -> Kernel:
    """Simplify, compare values with the interpreter, and require a fixed point."""
    out = simplify(kernel)
    assert simplify(out) is out
    assert parse_kernel(out.text) == out
    g = torch.Generator().manual_seed(1)
    data = {}
    for b in kernel.buffers:
        n = evaluate(b.size, SIZES)
        dtype = interp.TORCH_DTYPE[b.dtype]
        data[b.name] = torch.randint(-9, 9, (n,), generator=g).to(dtype)
    mine = {n: t.clone() for n, t in data.items()}
    interp.run(kernel, data, SIZES)
    interp.run(out, mine, SIZES)
    for name, t in data.items():
        assert torch.equal(t, mine[name]), out.text
    return out


def pointwise(value: str, *loops: int | str, at: str, size: str = "10000", sizes: str = "") -> Kernel:
    lines = "".join(f"  for   x{i} < {n}\n" for i, n in enumerate(loops))
    return parse_kernel(
        f"kernel\n{sizes}  in    in0: f32[{size}]\n  out   out0: f32[{size}]\n{lines}    row out0[{at}] = {value}\n"
    )


def extents(kernel: Kernel) -> list[str]:
    return [repr(v.extent) for v in kernel.loops + kernel.axis]


def test_contiguous_loops_become_one() -> None:
    out = check(pointwise("exp(in0[96*x0 + 24*x1 + x3])", 4, 4, 1, 24, at="96*x0 + 24*x1 + x3"))
    assert extents(out) == ["384"]
    assert [v.name for v in out.loops] == ["x0"]


def test_broadcast_keeps_two_loops() -> None:
    out = check(pointwise("add(in0[60*x0 + 12*x1 + x2], in0[12*x1 + x2])", 7, 5, 12, at="60*x0 + 12*x1 + x2"))
    assert extents(out) == ["7", "60"]


def test_quotient_and_remainder_become_loops() -> None:
    out = check(pointwise("in0[32*(x0 % 8) + (x0//8)]", 256, at="x0"))
    assert extents(out) == ["32", "8"]
    assert "//" not in out.text and "%" not in out.text


def test_nested_quotients() -> None:
    out = check(pointwise("in0[16*((x0//4) % 6) + 4*(x0//24) + (x0 % 4)]", 96, at="x0"))
    assert extents(out) == ["4", "6", "4"]
    assert "//" not in out.text and "%" not in out.text


def test_rotate_half_splits_at_the_guard() -> None:
    t = "lt(x1, 32)"
    value = (
        f"where({t}, neg(in0[64*x0 + x1 + 32 if {t} else f32(0.0)]), in0[64*x0 + x1 - 32 if ge(x1, 32) else f32(0.0)])"
    )
    out = check(pointwise(value, 9, 64, at="64*x0 + x1"))
    assert extents(out) == ["9", "2", "32"]
    assert "lt(x1, 1)" in out.text and "ge(x1, 1)" in out.text


def test_three_way_cat() -> None:
    value = "where(gt(16, x1), in0[x1], where(lt(x1, 32), in0[x1 + 7], in0[x1 + 9]))"
    out = check(pointwise(value, 3, 48, at="48*x0 + x1"))
    assert extents(out) == ["3", "3", "16"]
    assert "lt(x1, 1)" in out.text and "lt(x1, 2)" in out.text


def test_symbolic_view_is_undone() -> None:
    k = pointwise(
        "in0[7*s1*(x0//s1) + 7*(x0 % s1) + x1]",
        "s0*s1",
        7,
        at="7*x0 + x1",
        size="7*s0*s1",
        sizes="  size  s0 >= 2\n  size  s1 >= 2\n",
    )
    assert extents(check(k)) == ["7*s0*s1"]


def test_symbolic_transpose_is_split() -> None:
    k = pointwise(
        "in0[s0*(x0 % s1) + (x0//s1)]", "s0*s1", at="x0", size="s0*s1", sizes="  size  s0 >= 2\n  size  s1 >= 2\n"
    )
    out = check(k)
    assert extents(out) == ["s0", "s1"]
    assert "//" not in out.text


def test_loops_follow_the_memory_of_the_output() -> None:
    out = check(pointwise("exp(in0[5*x1 + x0])", 5, 7, at="5*x1 + x0"))
    assert extents(out) == ["35"]


def reduction(stores: str, axis: str, loops: str = "  for   x0 < 6\n") -> Kernel:
    return parse_kernel(
        f"kernel\n  in    in0: f32[5000]\n  out   out0: f32[5000]\n  out   out1: i64[5000]\n{loops}{axis}{stores}"
    )


def test_axis_of_a_sum_is_ordered_and_merged() -> None:
    k = reduction(
        "    row out0[x0] = sum[r0, r1](in0[x0 + 6*r0 + 60*r1])\n    row out1[x0] = i64(1)\n",
        "  axis  r0 < 10\n  axis  r1 < 8\n",
    )
    assert extents(check(k)) == ["6", "80"]


def test_axis_of_an_argmax_keeps_its_order() -> None:
    k = reduction(
        "    row out1[x0] = argmax[r0, r1, r2](in0[x0 + 6*r0 + 60*r2])\n    row out0[x0] = f32(1.0)\n",
        "  axis  r0 < 10\n  axis  r1 < 1\n  axis  r2 < 8\n",
    )
    assert extents(check(k)) == ["6", "10", "8"]
    k = reduction(
        "    row out1[x0] = argmax[r0, r1](in0[80*x0 + 8*r0 + r1])\n    row out0[x0] = f32(1.0)\n",
        "  axis  r0 < 10\n  axis  r1 < 8\n",
    )
    assert extents(check(k)) == ["6", "80"]


def test_an_axis_of_one_vanishes() -> None:
    k = reduction(
        "    row out1[x0] = argmax[r0](in0[x0 + r0])\n    inner out0[x0 + r0] = scan_sum[r0](sum[r0](in0[x0 + r0]))\n",
        "  axis  r0 < 1\n",
    )
    out = check(k)
    assert not out.axis and not out.reductions and not out.scans


def test_a_scan_keeps_its_variable() -> None:
    k = reduction(
        "    inner out0[48*x0 + 8*r0 + r1] = scan_sum[r1](in0[48*x0 + 8*r0 + r1])\n    row out1[x0] = i64(0)\n",
        "  axis  r0 < 6\n  axis  r1 < 8\n",
    )
    assert extents(check(k)) == ["6", "6", "8"]


def test_nothing_to_do_is_the_same_object() -> None:
    k = reduction(
        "    row out1[x0] = argmax[r0](in0[9*x0 + r0])\n    row out0[x0] = sum[r0](in0[9*x0 + r0])\n",
        "  axis  r0 < 9\n",
    )
    assert simplify(k) is k


def _split_shape(n: int, rng: random.Random) -> list[int]:
    out = []
    while n > 1:
        d = rng.choice([d for d in range(2, n + 1) if n % d == 0])
        out.append(d)
        n //= d
    return out or [1]


@pytest.mark.parametrize("seed", range(40))
def test_random_views(seed: int) -> None:
    """A chain of reshapes and permutes as nested quotients and remainders, read into a random loop nest."""
    rng = random.Random(seed)
    n = rng.choice([24, 36, 48, 64, 120])
    loops = _split_shape(n, rng)
    strides = [math.prod(loops[i + 1 :]) for i in range(len(loops))]
    flat = " + ".join(f"{s}*x{i}" for i, s in enumerate(strides))
    at = flat
    for _ in range(rng.randint(1, 2)):
        shape = _split_shape(n, rng)
        order = list(range(len(shape)))
        rng.shuffle(order)
        source = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
        permuted = [shape[i] for i in order]
        terms = []
        for pos, dim in enumerate(order):
            below = math.prod(permuted[pos + 1 :])
            terms.append(f"{source[dim]}*((({at})//{below}) % {permuted[pos]})")
        at = " + ".join(terms)
    guard = f"lt({flat}, {rng.choice([8, 10, 12])})"
    k = pointwise(f"add(in0[{at}], where({guard}, in0[{flat}], f32(2.0)))", *loops, at=flat, size=str(n))
    check(k)


def test_an_expression_of_thousands_of_operators_is_rewritten_without_recursion() -> None:
    text = "in0[x0]"
    lines = [f"    t0 = add({text}, f32(1.0))"] + [f"    t{k} = mul(t{k - 1}, in0[x0])" for k in range(1, 3000)]
    head = ["kernel", "  in    in0: f32[48]", "  out   out0: f32[48]", "  for   x0 < 6", "  for   x1 < 8"]
    body = [line.replace("in0[x0]", "in0[8*x0 + x1]") for line in lines]
    out = simplify(parse_kernel("\n".join([*head, *body, "    row out0[8*x0 + x1] = t2999", ""])))
    assert len(out.loops) == 1 and sum(isinstance(n, Op) for n in out.nodes) == 3000
