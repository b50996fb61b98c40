"""The kernel verifier: every kernel of the table passes, and each broken one is refused for its own reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from fusionc.errors import VerifyError
from fusionc.ir.expr import Const, Expr, Load, Op, Reduce, Scan, Size, Var, index
from fusionc.ir.loop import Buffer, Kernel, Store
from fusionc.ir.ops import cast, op
from fusionc.ir.verify import verify
from tests.codegen import kernels

X, R, S = Var("x0", 8), Var("r0", 5), Size("s0", 1)
IN, OUT = Buffer("in0", "f32", index(40)), Buffer("out0", "f32", index(8), "out")
FULL = Buffer("out0", "f32", index(40), "out")
AT = index(X) * 5 + R
LOADED = Load("in0", index(X), "f32")


def make(
    value: Expr, at: object = X, inner: bool = False, buffers: tuple = (IN, OUT), axis: tuple = (), **more: object
):
    return Kernel(buffers, (), (X,), axis, (Store("out0", index(at), value, inner),), **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("case", kernels.cases(), ids=lambda c: c.name)
def test_accepts(case: kernels.Case) -> None:
    verify(case.kernel)


def i64(v: int) -> Const:
    return Const(v, "i64")


def lt(a: Expr, b: Expr) -> Expr:
    return Op("lt", (a, b), "b1")


IDX = Buffer("in1", "i64", index(8))
RAW = index(Load("in1", index(X), "i64"))
BROKEN: dict[str, tuple[Callable[[], Kernel], str]] = {
    "load past the end": (lambda: make(Load("in0", AT + 1, "f32"), AT, True, (IN, FULL), (R,)), "reaches element 40"),
    "load before the start": (lambda: make(Load("in0", index(X) - 1, "f32")), "reaches element -1"),
    "store past the end": (lambda: make(LOADED, index(X) + 1), "store to out0"),
    "guard too wide": (
        lambda: make(Load("in0", index(X) * 6, "f32", lt(index(X), i64(8)), Const(0, "f32"))),
        "reaches element 42",
    ),
    "unchecked data index": (lambda: make(Load("in0", RAW, "f32"), buffers=(IN, IDX, OUT)), "check_index"),
    "same element twice": (lambda: make(LOADED, index(X) * 0), "same element"),
    "overlapping store": (lambda: make(LOADED, index(X) // 2), "twice"),
    "store without loop": (
        lambda: make(Load("in0", AT, "f32"), X, True, (IN, OUT), (R,)),
        "every point of r0 writes the same element",
    ),
    "axis leaks into a row store": (lambda: make(Load("in0", AT, "f32"), X, False, (IN, OUT), (R,)), "depends on r0"),
    "unbound variable": (lambda: make(Load("in0", index(Var("x9", 8)), "f32")), "x9, which nothing binds"),
    "inner without axis": (lambda: make(LOADED, X, True), "no axis"),
    "foreign reduction axis": (
        lambda: make(Reduce("sum", (Var("r1", 5),), Load("in0", index(Var("r1", 5)), "f32"), "f32"), axis=(R,)),
        "runs over",
    ),
    "scan along a loop": (lambda: make(Scan("sum", X, LOADED, "f32"), axis=(R,)), "no axis variable"),
    "half arithmetic": (
        lambda: make(Op("add", (Load("in0", index(X), "f16"),) * 2, "f16"), buffers=(replace(IN, dtype="f16"), OUT)),
        "f16 and bf16 are only loaded",
    ),
    "mixed dtypes": (lambda: make(Op("add", (LOADED, Const(1, "f64")), "f32")), "one dtype"),
    "integer exp": (lambda: make(cast(Op("exp", (index(X),), "i64"), "f32")), "exp"),
    "comparison of the wrong dtype": (lambda: make(Op("lt", (LOADED, LOADED), "f32")), "lt"),
    "condition not b1": (lambda: make(Op("where", (LOADED, LOADED, Const(0, "f32")), "f32")), "condition"),
    "unknown operation": (lambda: make(Op("frobnicate", (LOADED,), "f32")), "unknown operation"),
    "argmax dtype": (lambda: make(Reduce("argmax", (R,), Load("in0", AT, "f32"), "f32"), axis=(R,)), "argmax"),
    "any of floats": (lambda: make(Reduce("any", (R,), Load("in0", AT, "f32"), "f32"), axis=(R,)), "any and all"),
    "unknown buffer": (lambda: make(Load("in7", index(X), "f32")), "in7"),
    "unused buffer": (lambda: make(Const(0, "f32")), "in0 is never used"),
    "stored input": (lambda: make(LOADED, buffers=(IN, replace(OUT, kind="in"))), "is an input"),
    "loaded output": (
        lambda: make(op("add", (LOADED, Load("out0", index(X), "f32")), "f32")),
        "make it inout",
    ),
    "inout read elsewhere": (
        lambda: make(
            op("add", (LOADED, Load("out0", 7 - index(X), "f32")), "f32"), buffers=(IN, replace(OUT, kind="inout"))
        ),
        "another point",
    ),
    "load of the wrong dtype": (lambda: make(cast(Load("in0", index(X), "i32"), "f32")), "buffer of f32"),
    "undeclared size": (lambda: make(LOADED, buffers=(replace(IN, size=index(S) * 40), OUT)), "size s0"),
    "declared twice": (lambda: make(LOADED, buffers=(IN, IN, OUT)), "declared twice"),
    "no stores": (lambda: Kernel((IN,), (), (X,), (), ()), "stores nothing"),
    "scalar of many elements": (lambda: make(LOADED, buffers=(replace(IN, scalar=True), OUT)), "one element"),
    "guard not b1": (lambda: make(Load("in0", index(X), "f32", index(X), Const(0, "f32"))), "not b1"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_refuses(name: str) -> None:
    build, message = BROKEN[name]
    with pytest.raises(VerifyError, match=message) as e:
        verify(build(), "somewhere")
    assert str(e.value).startswith("somewhere: ")


def test_two_stores_to_one_element() -> None:
    k = make(LOADED)
    with pytest.raises(VerifyError, match="two stores"):
        verify(replace(k, stores=k.stores * 2))


def test_symbolic_bounds() -> None:
    s = Size("s0", 2)
    x = Var("x0", index(s))
    buffers = (Buffer("in0", "f32", index(s)), Buffer("out0", "f32", index(s), "out"))

    def kernel(at: object) -> Kernel:
        return Kernel(buffers, (s,), (x,), (), (Store("out0", index(x), Load("in0", index(at), "f32"), False),))

    verify(kernel(index(s) - 1 - x))
    verify(kernel((index(x) + 1) % index(s)))
    with pytest.raises(VerifyError, match="outside"):
        verify(kernel(index(s) - x))


def test_clamped_and_positions_are_proved() -> None:
    raw = op("maximum", (op("minimum", (Load("in1", index(X), "i64"), i64(39)), "i64"), i64(0)), "i64")
    verify(make(Load("in0", index(raw), "f32"), buffers=(IN, IDX, OUT)))
    top = Reduce("argmax", (R,), Load("in0", AT, "f32"), "i64")
    verify(make(Load("in0", index(X) * 5 + index(top), "f32"), axis=(R,)))


def test_guard_arithmetic() -> None:
    """pad: element x - 2 of 4, where 2 <= x < 6."""
    inside = op("and", (op("ge", (index(X), i64(2)), "b1"), op("lt", (index(X), i64(6)), "b1")), "b1")
    small = Buffer("in0", "f32", index(4))
    verify(make(Load("in0", index(X) - 2, "f32", inside), buffers=(small, OUT)))
    negated = op("not", (op("or", (lt(index(X), i64(2)), op("ge", (index(X), i64(6)), "b1")), "b1"),), "b1")
    verify(make(Load("in0", index(X) - 2, "f32", negated), buffers=(small, OUT)))
