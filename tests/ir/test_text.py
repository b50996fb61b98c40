"""Kernel text: canonical, and parses back to the identical kernel."""

from __future__ import annotations

import random

import pytest

from fusionc.ir.expr import Const, FloorDiv, Load, Mod, Op, Reduce, Scan, Size, Var, index
from fusionc.ir.loop import Buffer, Kernel, Store
from fusionc.ir.ops import op
from fusionc.ir.text import expr_text, kernel_text, parse_kernel

SOFTMAX = """kernel
  size  s0 >= 2
  in    in0: bf16[1024*s0]
  in    in1: f32[1] scalar
  out   out0: bf16[1024*s0]
  out   out1: i64[s0]
  for   x0 < s0
  axis  r0 < 1024
    t0 = mul(cast.f32(in0[1024*x0 + r0]), in1[0])
    t1 = exp(sub(t0, max[r0](t0)))
    row out1[x0] = argmax[r0](t0)
    inner out0[1024*x0 + r0] = cast.bf16(div(t1, sum[r0](t1)))
"""

EVERYTHING = """kernel
  size  s0 >= 2
  size  s1 >= 0
  in    in0: f32[s0*s1 + 3]
  in    in1: i64[7]
  inout in2: b1[(s0//2)]
  out   out0: f32[-3*s1 + 64*s0]
  for   x0 < s0
  for   x1 < (s1//4)
  axis  r0 < 8
  axis  r1 < s1
    t0 = scan_sum.f64[r0](in0[-s1*x0 + 5*x0 - 2*r1 - 7])
    t1 = or_(not_(in2[(x0//2)]), and_(lt(x0, 5), eq(idx(in1[3]), (x1 % 3))))
    t2 = in0[check_index(idx(in1[r0]), s0) + (r1 % 4) if t1 else f32(-inf)]
    row in2[(x0//2)] = any[r0, r1](t1)
    inner out0[2*in1[r0] + x0 + 1] = where(t1, add(t2, cast.f32(t0)), f32(nan))
    inner out0[x0] = add(cast.f32(atom(x0)), mul(f32(-0.0), cast.f32(i64(3))))
    inner out0[x1] = cast.f32(sum.i64[r0, r1](add(idx(in1[0]), 3)))
"""


@pytest.mark.parametrize("text", [SOFTMAX, EVERYTHING])
def test_round_trip(text: str) -> None:
    kernel = parse_kernel(text)
    assert parse_kernel(kernel.text) == kernel
    assert parse_kernel(kernel.text).text == kernel.text
    for a, b in zip(kernel.stores, parse_kernel(kernel.text).stores, strict=True):
        assert a.value is b.value and a.index is b.index


def test_the_readable_text_is_the_canonical_text() -> None:
    assert parse_kernel(SOFTMAX).text == SOFTMAX


def test_creation_order_does_not_matter() -> None:
    """The same sum, its parts created in opposite orders under fresh names, prints with the same shape."""
    texts = set()
    for order in (0, 1):
        names = [f"p{order}", f"q{order}"]
        made = {n: Var(n, 16) for n in (names if order else reversed(names))}
        a, b = made[names[0]], made[names[1]]
        parts = [index(b), index(a) * 16, index(FloorDiv(index(a), index(3))) * 16, index(Mod(index(b), index(5)))]
        total = sum(parts[::-1] if order else parts, start=index(0))
        texts.add(expr_text(Load("in0", total, "f32")).replace(names[0], "p").replace(names[1], "q"))
    assert len(texts) == 1


def test_constants_keep_their_bits() -> None:
    x = Var("x0", 4)
    for value, dtype in (
        (-0.0, "f32"),
        (float("nan"), "f64"),
        (0.1, "f32"),
        (1e-40, "f64"),
        (-(2**63), "i64"),
        (True, "b1"),
    ):
        c = Const(value, dtype)
        k = Kernel((Buffer("out0", dtype, index(4), "out"),), (), (x,), (), (Store("out0", index(x), c, False),))
        assert parse_kernel(k.text).stores[0].value is c


def test_bare_atoms_and_indices_stay_apart() -> None:
    x = Var("x0", 64)
    values = [x, index(x), FloorDiv(index(x), index(3)), index(FloorDiv(index(x), index(3))), index(3), Const(3, "i64")]
    load = Load("in0", index(x), "i64")
    values += [load, index(load), index(load) * 2, index(load) + 1, index(load) * index(load)]
    for v in values:
        value = Op("cast", (v,), "f32")
        buffers = (Buffer("in0", "i64", index(64)), Buffer("out0", "f32", index(64), "out"))
        k = Kernel(buffers, (), (x,), (), (Store("out0", index(x), value, False),))
        assert parse_kernel(k.text).stores[0].value is value, k.text


def test_shared_values_do_not_explode() -> None:
    x = Var("x0", 8)
    e = Load("in0", index(x), "f32")
    for _ in range(200):
        e = Op("add", (e, e), "f32")
    buffers = (Buffer("in0", "f32", index(8)), Buffer("out0", "f32", index(8), "out"))
    k = Kernel(buffers, (), (x,), (), (Store("out0", index(x), e, False),))
    assert len(kernel_text(k)) < 20_000
    assert parse_kernel(k.text) == k
    assert len(expr_text(e)) < 20_000


def test_a_long_chain_gets_several_lines() -> None:
    x = Var("x0", 8)
    e = Load("in0", index(x), "f32")
    for i in range(400):
        e = Op("add", (e, Const(float(i), "f32")), "f32")
    buffers = (Buffer("in0", "f32", index(8)), Buffer("out0", "f32", index(8), "out"))
    k = Kernel(buffers, (), (x,), (), (Store("out0", index(x), e, False),))
    assert max(len(line) for line in k.text.splitlines()) < 200
    assert parse_kernel(k.text) == k


def test_dtypes_that_do_not_follow_are_written() -> None:
    x, r = Var("x0", 8), Var("r0", 8)
    body = Load("in0", index(r), "i32")
    for e in (
        Reduce("sum", (r,), body, "i64"),
        Scan("sum", r, body, "i64"),
        Op("add", (body, body), "i16"),
        Load("in0", index(r), "f32"),
        Reduce("any", (r,), body, "b1"),
    ):
        buffers = (Buffer("in0", "i32", index(8)), Buffer("out0", "i64", index(8), "out"))
        k = Kernel(buffers, (), (x,), (r,), (Store("out0", index(x), e, True),))
        assert parse_kernel(k.text) == k


def test_sizes_and_unused_names() -> None:
    k = Kernel((Buffer("in0", "f32", index(Size("s0", 3))),), (Size("s0", 3),), (), (), ())
    assert parse_kernel(k.text) == k


@pytest.mark.parametrize(
    "line",
    [
        "row out0[x0] = exec(in0[0])",
        "row out0[x0] = in0.__class__",
        "row out0[x0] = [x for x in in0]",
        "row out0[x0] = sub(in0[0])",
        "row out0[x0] = in9[0]",
        "row out9[x0] = in0[0]",
        "row out0[y] = in0[0]",
        "row out0[x0] = t7",
        "row out0[x0] = f32(1)",
        "row out0[x0] = f32(True)",
        "row out0[x0] = i64(1.5)",
        "row out0[99999999999999999999*x0] = in0[0]",
        "row out0[x0**2] = in0[0]",
        "row out0[f32(1.0)] = in0[0]",
        "row out0[x0] = sum[s0](in0[0])",
        "row out0[x0] = in0[0 if b1(True) else in0[0]]",
        "row out0[x0] = lambda: 0",
        "row out0[x0 = in0[0]",
        "for x0 < 3",
        "in in0: f32[3]",
        "in in7: f99[3]",
        "size s9 >= a",
        "what is this",
        "row out0[x0] = " + "(" * 500 + "in0[0]" + ")" * 500,
        "row out0[x0] = " + "-" * 60000 + "1",
        "row out0[x0] = f32(" + "9" * 70000 + ")",
    ],
)
def test_malformed_text_is_refused(line: str) -> None:
    good = "kernel\n  in    in0: f32[4]\n  out   out0: f32[4]\n  for   x0 < 4\n"
    parse_kernel(good + "    row out0[x0] = in0[x0]\n")
    with pytest.raises(ValueError, match="kernel text"):
        parse_kernel(good + "    " + line + "\n")


def test_damaged_text_never_raises_anything_else() -> None:
    rng = random.Random(0)
    for _ in range(300):
        chars = list(EVERYTHING)
        for _ in range(rng.randint(1, 6)):
            i = rng.randrange(len(chars))
            chars[i] = rng.choice("()[]{}*%/-+ x0r1,.=<>'\"\n\\\0é")
        try:
            kernel_text(parse_kernel("".join(chars)))
        except ValueError:
            pass
    for bad in ("", "kernelx", "\0", None):
        with pytest.raises(ValueError, match="kernel text"):
            parse_kernel(bad)  # type: ignore[arg-type]


def test_operations_round_trip() -> None:
    x = Var("x0", 8)
    a = Load("in0", index(x), "f32")
    value = op(
        "where", (op("and", (op("lt", (a, Const(0.5, "f32")), "b1"), op("isnan", (a,), "b1")), "b1"), a, a), "f32"
    )
    e = op("not", (op("ne", (value, op("abs", (a,), "f32")), "b1"),), "b1")
    k = Kernel(
        (Buffer("in0", "f32", index(8)), Buffer("out0", "b1", index(8), "out")),
        (),
        (x,),
        (),
        (Store("out0", index(x), e, False),),
    )
    assert parse_kernel(k.text) == k
