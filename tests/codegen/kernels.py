"""A table of hand-built kernels that the tests of the interpreter, the verifier and the renderers share.

Each case knows its inputs (1-D tensors by buffer name), and what torch says its outputs are.  Inputs are floats from a
normal distribution unless the case makes its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fusionc.ir.expr import FLOATS, Const, Expr, Index, Load, Reduce, Scan, Size, Var, index
from fusionc.ir.interp import TORCH_DTYPE
from fusionc.ir.loop import Buffer, Kernel, Store, evaluate
from fusionc.ir.ops import cast, op

Buffers = dict[str, Tensor]


@dataclass
class Case:
    """A kernel, its sizes, and outputs by torch from inputs by name (0-d inputs for scalar buffers)."""

    name: str
    kernel: Kernel
    expected: Callable[[Buffers], Buffers]
    sizes: dict[str, int] = field(default_factory=dict)
    make: dict[str, Callable[[], Tensor]] = field(default_factory=dict)
    exact: bool = False
    tags: tuple[str, ...] = ()

    def inputs(self, seed: int = 0) -> Buffers:
        """Fresh buffers: inputs filled, outputs filled with a value that no result has."""
        torch.manual_seed(seed)
        out: Buffers = {}
        for b in self.kernel.buffers:
            n, dtype = evaluate(b.size, self.sizes), TORCH_DTYPE[b.dtype]
            if b.name in self.make:
                t = self.make[b.name]()
                assert t.numel() == n and t.dtype == dtype, (b.name, t.shape, t.dtype)
            elif b.kind == "out":
                t = torch.full((n,), 77 if b.dtype != "b1" else 1).to(dtype)
            elif dtype.is_floating_point:
                t = torch.randn(n, dtype=torch.float64).to(dtype)
            elif dtype == torch.bool:
                t = torch.rand(n) < 0.3
            else:
                t = torch.randint(0 if dtype == torch.uint8 else -100, 100, (n,), dtype=torch.int64).to(dtype)
            out[b.name] = t
        return out


def loop(*extents: Any) -> tuple[Var, ...]:
    return tuple([Var(f"x{i}", index(n)) for i, n in enumerate(extents)])


def axis(*extents: Any) -> tuple[Var, ...]:
    return tuple([Var(f"r{i}", index(n)) for i, n in enumerate(extents)])


def flat(vars: tuple[Var, ...]) -> Index:
    out = index(0)
    for v in vars:
        out = out * v.extent + v
    return out


def f(name: str, *args: Expr, dtype: str | None = None) -> Expr:
    """An operation whose result has the dtype of its last operand unless given."""
    return op(name, args, dtype or args[-1].dtype)


def const(value: Any, dtype: str = "f32") -> Const:
    return Const(value, dtype)


def load(name: str, at: Index, dtype: str = "f32", guard: Expr | None = None, other: Const | None = None) -> Expr:
    """A load in its compute dtype."""
    e = Load(name, at, dtype, guard, other)
    return cast(e, "f32") if dtype in ("f16", "bf16") else e


def kernel(
    buffers: list[Buffer], loops: tuple[Var, ...], axis_: tuple[Var, ...], stores: list[Store], sizes: tuple = ()
) -> Kernel:
    return Kernel(tuple(buffers), tuple(sizes), loops, axis_, tuple(stores))


def inp(name: str, size: Any, dtype: str = "f32", kind: str = "in", scalar: bool = False) -> Buffer:
    return Buffer(name, dtype, index(size), kind, scalar)


def outp(name: str, size: Any, dtype: str = "f32", kind: str = "out") -> Buffer:
    return Buffer(name, dtype, index(size), kind)


# -- pointwise ----------------------------------------------------------------------------------------------------


def pointwise(n: int, dtype: str) -> Case:
    """out = sigmoid(a) * b + a, in f32 for half precision; a plain sum of products for integers."""
    (x,) = loop(n)
    a, b = load("in0", index(x), dtype), load("in1", index(x), dtype)
    floating = dtype in FLOATS
    e = f("add", f("mul", f("sigmoid", a) if floating else a, b), a)

    def expected(t: Buffers) -> Buffers:
        u, v = t["in0"], t["in1"]
        if u.dtype in (torch.float16, torch.bfloat16):
            u, v = u.float(), v.float()
        return {"out0": ((u.sigmoid() if floating else u) * v + u).to(t["in0"].dtype)}

    k = kernel([inp("in0", n, dtype), inp("in1", n, dtype), outp("out0", n, dtype)], (x,), (), [st("out0", x, e)])
    return Case(f"pointwise_{dtype}_{n}", k, expected, exact=not floating, tags=("pointwise",))


def st(name: str, at: Any, value: Expr, inner: bool = False) -> Store:
    return Store(name, index(at), value, inner)


def exp2(n: int, dtype: str) -> Case:
    (x,) = loop(n)
    stores = [st("out0", x, f("exp2", load("in0", index(x), dtype)))]
    k = kernel([inp("in0", n, dtype), outp("out0", n, dtype)], (x,), (), stores)
    return Case(f"exp2_{dtype}_{n}", k, lambda t: {"out0": t["in0"].exp2()}, tags=("pointwise",))


def boolean(n: int) -> Case:
    (x,) = loop(n)
    a, b = load("in0", index(x), "b1"), load("in1", index(x), "b1")
    e = f("xor", f("and", a, f("not", b)), f("lt", index(x), index(n // 2), dtype="b1"))

    def expected(t: Buffers) -> Buffers:
        return {"out0": (t["in0"] & ~t["in1"]) ^ (torch.arange(n) < n // 2)}

    k = kernel([inp("in0", n, "b1"), inp("in1", n, "b1"), outp("out0", n, "b1")], (x,), (), [st("out0", x, e)])
    return Case(f"boolean_{n}", k, expected, exact=True, tags=("pointwise",))


def broadcast(a: int, b: int, c: int) -> Case:
    """out[i,j,k] = x[i,1,k] * y[j,1] + s, transposed store of the sign as a side output."""
    x = loop(a, b, c)
    v = f("mul", load("in0", index(x[0]) * c + x[2]), load("in1", index(x[1])))
    v = f("add", v, load("in2", index(0)))
    side = index(x[2]) * (a * b) + index(x[0]) * b + x[1]

    def expected(t: Buffers) -> Buffers:
        y = t["in0"].view(a, 1, c) * t["in1"].view(b, 1) + t["in2"]
        return {"out0": y.reshape(-1), "out1": (y > 0).permute(2, 0, 1).reshape(-1)}

    k = kernel(
        [
            inp("in0", a * c),
            inp("in1", b),
            inp("in2", 1, scalar=True),
            outp("out0", a * b * c),
            outp("out1", a * b * c, "b1"),
        ],
        x,
        (),
        [st("out0", flat(x), v), st("out1", side, f("gt", v, const(0.0), dtype="b1"))],
    )
    return Case(f"broadcast_{a}_{b}_{c}", k, expected, tags=("pointwise",))


def cat(a: int, b: int, c: int) -> Case:
    """cat([x (rows, a), y (rows, b)], 1) by guards, then padded by c zeros on the left."""
    rows, width = 5, a + b + c
    x = loop(rows, width)
    col = index(x[1])
    lo = f("ge", col, const(c, "i64"), dtype="b1")
    first = f("and", lo, f("lt", col, const(c + a, "i64"), dtype="b1"))
    second = f("ge", col, const(c + a, "i64"), dtype="b1")
    left = load("in0", index(x[0]) * a + col - c, guard=first)
    right = load("in1", index(x[0]) * b + col - (a + c), guard=second)
    v = f("where", lo, f("where", second, right, left), const(0.0))

    def expected(t: Buffers) -> Buffers:
        y = torch.cat([t["in0"].view(rows, a), t["in1"].view(rows, b)], 1)
        return {"out0": torch.nn.functional.pad(y, (c, 0)).reshape(-1)}

    k = kernel(
        [inp("in0", rows * a), inp("in1", rows * b), outp("out0", rows * width)], x, (), [st("out0", flat(x), v)]
    )
    return Case(f"cat_{a}_{b}_{c}", k, expected, exact=True, tags=("pointwise",))


def gather(rows: int, width: int, table: int) -> Case:
    """An embedding whose indices may be negative."""
    x = loop(rows, width)
    i = f("check_index", load("in0", index(x[0]), "i64"), index(table), dtype="i64")
    v = f("mul", load("in1", index(i) * width + x[1]), const(0.1))

    def expected(t: Buffers) -> Buffers:
        return {"out0": (t["in1"].view(table, width)[t["in0"]] * 0.1).reshape(-1)}

    def indices() -> Tensor:
        return torch.randint(-table, table, (rows,))

    k = kernel(
        [inp("in0", rows, "i64"), inp("in1", table * width), outp("out0", rows * width)],
        x,
        (),
        [st("out0", flat(x), v)],
    )
    return Case(f"gather_{rows}_{width}", k, expected, make={"in0": indices}, tags=("pointwise",))


def window(n: int) -> Case:
    """Quotients and remainders of possibly negative positions: roll by 3, then by blocks of 4 reversed."""
    (x,) = loop(n)
    rolled = (index(x) - 3) % index(n)
    block = (index(x) - 3) // index(4)

    def expected(t: Buffers) -> Buffers:
        return {"out0": t["in0"].roll(3), "out1": torch.div(torch.arange(n) - 3, 4, rounding_mode="floor")}

    k = kernel(
        [inp("in0", n), outp("out0", n), outp("out1", n, "i64")],
        (x,),
        (),
        [st("out0", x, load("in0", rolled)), st("out1", x, block)],
    )
    return Case(f"window_{n}", k, expected, exact=True, tags=("pointwise",))


def in_place(n: int) -> Case:
    (x,) = loop(n)
    v = f("add", load("out0", index(x)), load("in0", index(x)))

    def expected(t: Buffers) -> Buffers:
        return {"out0": t["out0"] + t["in0"]}

    k = kernel([inp("in0", n), outp("out0", n, kind="inout")], (x,), (), [st("out0", x, v)])
    return Case(f"in_place_{n}", k, expected, tags=("pointwise",))


# -- reductions ---------------------------------------------------------------------------------------------------


def softmax(rows: int, n: int, dtype: str = "f32") -> Case:
    (x,), (r,) = loop(rows), axis(n)
    at = index(x) * n + r
    v = load("in0", at, dtype)
    top = Reduce("max", (r,), v, v.dtype)
    e = f("exp", f("sub", v, top))
    y = f("div", e, Reduce("sum", (r,), e, v.dtype))

    def expected(t: Buffers) -> Buffers:
        u = t["in0"].view(rows, n)
        return {"out0": (u.double() if dtype == "f64" else u.float()).softmax(-1).to(u.dtype).reshape(-1)}

    k = kernel(
        [inp("in0", rows * n, dtype), outp("out0", rows * n, dtype)], (x,), (r,), [st("out0", at, y, inner=True)]
    )
    return Case(f"softmax_{dtype}_{rows}_{n}", k, expected, tags=("reduction",))


def layernorm(rows: int, n: int, dtype: str = "f32") -> Case:
    """LayerNorm with weight and bias, and its mean and inverse deviation as row outputs."""
    (x,), (r,) = loop(rows), axis(n)
    at = index(x) * n + r
    v = load("in0", at, dtype)
    mean = f("div", Reduce("sum", (r,), v, "f32"), const(float(n)))
    d = f("sub", v, mean)
    var = f("div", Reduce("sum", (r,), f("mul", d, d), "f32"), const(float(n)))
    inv = f("rsqrt", f("add", var, const(1e-5)))
    y = f("add", f("mul", f("mul", d, inv), load("in1", index(r), dtype)), load("in2", index(r), dtype))

    def expected(t: Buffers) -> Buffers:
        u = t["in0"].view(rows, n).float()
        inv = (u.var(-1, correction=0) + 1e-5).rsqrt()
        y = torch.nn.functional.layer_norm(u, (n,), t["in1"].float(), t["in2"].float())
        return {"out0": y.to(t["in0"].dtype).reshape(-1), "out1": u.mean(-1), "out2": inv}

    k = kernel(
        [
            *(inp("in0", rows * n, dtype), inp("in1", n, dtype), inp("in2", n, dtype)),
            *(outp("out0", rows * n, dtype), outp("out1", rows), outp("out2", rows)),
        ],
        (x,),
        (r,),
        [st("out0", at, y, inner=True), st("out1", x, mean), st("out2", x, inv)],
    )
    return Case(f"layernorm_{dtype}_{rows}_{n}", k, expected, tags=("reduction",))


def rmsnorm(n: int, rows: int = 7, dtype: str = "f32", dynamic: bool = True) -> Case:
    """RMSNorm of a sum whose rows are counted at run time; the sum is a side output."""
    s0 = Size("s0", 2)
    count: Any = index(s0) if dynamic else rows
    (x,), (r,) = loop(count), axis(n)
    at = index(x) * n + r
    v = f("add", load("in0", at, dtype), load("in1", at, dtype))
    ms = f("div", Reduce("sum", (r,), f("mul", v, v), "f32"), const(float(n)))
    y = f("mul", f("mul", v, f("rsqrt", f("add", ms, const(1e-6)))), load("in2", index(r), dtype))

    def expected(t: Buffers) -> Buffers:
        u = t["in0"].view(-1, n).float() + t["in1"].view(-1, n).float()
        z = u * (u.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * t["in2"].float()
        dt = t["in0"].dtype
        return {"out0": z.to(dt).reshape(-1), "out1": u.to(dt).reshape(-1)}

    total = index(count) * n
    k = kernel(
        [
            *(inp("in0", total, dtype), inp("in1", total, dtype), inp("in2", n, dtype)),
            *(outp("out0", total, dtype), outp("out1", total, dtype)),
        ],
        (x,),
        (r,),
        [st("out0", at, y, inner=True), st("out1", at, v, inner=True)],
        (s0,) if dynamic else (),
    )
    return Case(f"rmsnorm_{dtype}_{n}", k, expected, {"s0": rows} if dynamic else {}, tags=("reduction",))


def dynamic_axis(rows: int, n: int) -> Case:
    """log-sum-exp along an axis whose length is known at run time only."""
    s0, s1 = Size("s0", 1), Size("s1", 1)
    (x,), (r,) = loop(index(s0)), axis(index(s1))
    v = load("in0", index(x) * s1 + r)
    top = Reduce("max", (r,), v, "f32")
    y = f("add", f("log", Reduce("sum", (r,), f("exp", f("sub", v, top)), "f32")), top)

    def expected(t: Buffers) -> Buffers:
        return {"out0": t["in0"].view(rows, n).logsumexp(-1)}

    k = kernel([inp("in0", index(s0) * s1), outp("out0", index(s0))], (x,), (r,), [st("out0", x, y)], (s0, s1))
    return Case(f"dynamic_axis_{rows}_{n}", k, expected, {"s0": rows, "s1": n}, tags=("reduction",))


def arg(kind: str, rows: int, n: int, dtype: str = "f32") -> Case:
    """argmax/argmin with ties, and a row of NaN values (floats) or of one value (integers); max/min beside it."""
    (x,), (r,) = loop(rows), axis(n)
    v = load("in0", index(x) * n + r, dtype)

    def values() -> Tensor:
        t = torch.randint(-5, 5, (rows, n)).to(TORCH_DTYPE[dtype])
        if dtype in FLOATS:
            t[0, n // 3] = t[0, n // 2] = math.nan
            t[1] = -math.inf if kind == "argmax" else math.inf
        else:
            t[0] = torch.iinfo(t.dtype).min
        return t.reshape(-1)

    def expected(t: Buffers) -> Buffers:
        u = t["in0"].view(rows, n)
        i = u.argmax(-1) if kind == "argmax" else u.argmin(-1)
        return {"out0": i, "out1": u.amax(-1) if kind == "argmax" else u.amin(-1)}

    k = kernel(
        [inp("in0", rows * n, dtype), outp("out0", rows, "i64"), outp("out1", rows, dtype)],
        (x,),
        (r,),
        [st("out0", x, Reduce(kind, (r,), v, "i64")), st("out1", x, Reduce(kind[3:], (r,), v, v.dtype))],
    )
    return Case(f"{kind}_{dtype}_{rows}_{n}", k, expected, make={"in0": values}, exact=True, tags=("reduction",))


def any_all(rows: int, n: int) -> Case:
    (x,), (r,) = loop(rows), axis(n)
    v = load("in0", index(x) * n + r, "b1")

    def values() -> Tensor:
        t = torch.zeros(rows, n, dtype=torch.bool)
        t[1], t[2, n - 1] = True, True
        return t.reshape(-1)

    def expected(t: Buffers) -> Buffers:
        u = t["in0"].view(rows, n)
        return {"out0": u.any(-1), "out1": u.all(-1), "out2": u.sum(-1)}

    k = kernel(
        [inp("in0", rows * n, "b1"), outp("out0", rows, "b1"), outp("out1", rows, "b1"), outp("out2", rows, "i64")],
        (x,),
        (r,),
        [
            st("out0", x, Reduce("any", (r,), v, "b1")),
            st("out1", x, Reduce("all", (r,), v, "b1")),
            st("out2", x, Reduce("sum", (r,), cast(v, "i64"), "i64")),
        ],
    )
    return Case(f"any_all_{rows}_{n}", k, expected, make={"in0": values}, exact=True, tags=("reduction",))


def column_sum(n: int, columns: int, dtype: str = "f32") -> Case:
    (x,), (r,) = loop(columns), axis(n)
    v = load("in0", index(r) * columns + x, dtype)

    def expected(t: Buffers) -> Buffers:
        return {"out0": t["in0"].view(n, columns).float().sum(0).to(t["in0"].dtype)}

    k = kernel(
        [inp("in0", n * columns, dtype), outp("out0", columns, dtype)],
        (x,),
        (r,),
        [st("out0", x, Reduce("sum", (r,), v, "f32"))],
    )
    return Case(f"column_sum_{dtype}_{n}_{columns}", k, expected, tags=("reduction", "splittable"))


def full(kind: str, n: int, dtype: str = "f32") -> Case:
    """A reduction of everything to one element."""
    (r,) = axis(n)
    v = load("in0", index(r), dtype)
    result = "i64" if kind.startswith("arg") else v.dtype

    def expected(t: Buffers) -> Buffers:
        u = t["in0"]
        y = {"max": u.amax, "min": u.amin}.get(kind, getattr(u, kind))()
        return {"out0": y.to(TORCH_DTYPE[result]).reshape(1)}

    k = kernel(
        [inp("in0", n, dtype), outp("out0", 1, result)], (), (r,), [st("out0", 0, Reduce(kind, (r,), v, result))]
    )
    exact = dtype not in FLOATS or kind not in ("sum", "prod")
    return Case(f"full_{kind}_{dtype}_{n}", k, expected, exact=exact, tags=("reduction", "splittable"))


def multi_axis(a: int, b: int, c: int) -> Case:
    """Group-norm-like: mean over dims 0 and 2 of [a, b, c], and the product of signs."""
    (x,), r = loop(b), axis(a, c)
    v = load("in0", index(r[0]) * (b * c) + index(x) * c + r[1])
    mean = f("div", Reduce("sum", r, v, "f32"), const(float(a * c)))
    prod = Reduce("prod", r, f("sign", v), "f32")
    at = index(r[0]) * (b * c) + index(x) * c + r[1]

    def expected(t: Buffers) -> Buffers:
        u = t["in0"].view(a, b, c)
        m = u.mean((0, 2))
        return {
            "out0": m,
            "out1": (u - m.view(1, b, 1)).reshape(-1),
            "out2": u.sign().prod(0).prod(1),
        }

    k = kernel(
        [inp("in0", a * b * c), outp("out0", b), outp("out1", a * b * c), outp("out2", b)],
        (x,),
        r,
        [st("out0", x, mean), st("out1", at, f("sub", v, mean), inner=True), st("out2", x, prod)],
    )
    return Case(f"multi_axis_{a}_{b}_{c}", k, expected, tags=("reduction",))


def cumulative(kind: str, rows: int, n: int, dtype: str = "f32") -> Case:
    (x,), (r,) = loop(rows), axis(n)
    at = index(x) * n + r
    v = load("in0", at, dtype)
    y = f("add", Scan(kind, r, v, v.dtype), const(1, v.dtype))

    def values() -> Tensor:
        t = torch.randn(rows, n, dtype=torch.float64)
        if kind == "prod":
            t = 1 + t * 0.1
        if dtype in FLOATS and kind in ("max", "min"):
            t[0, n // 2] = math.nan
        return (t if dtype in FLOATS else t * 10).to(TORCH_DTYPE[dtype]).reshape(-1)

    def expected(t: Buffers) -> Buffers:
        u = t["in0"].view(rows, n)
        u = u.float() if u.dtype in (torch.float16, torch.bfloat16) else u
        if kind in ("sum", "prod"):
            y = (u.cumsum if kind == "sum" else u.cumprod)(-1, dtype=u.dtype)
        else:
            y = (u.cummax if kind == "max" else u.cummin)(-1).values
        return {"out0": (y + 1).to(t["in0"].dtype).reshape(-1)}

    k = kernel(
        [inp("in0", rows * n, dtype), outp("out0", rows * n, dtype)], (x,), (r,), [st("out0", at, y, inner=True)]
    )
    exact = dtype not in FLOATS
    return Case(f"cum{kind}_{dtype}_{rows}_{n}", k, expected, make={"in0": values}, exact=exact, tags=("scan",))


def cases() -> list[Case]:
    """The whole table; every case is small enough for Triton's interpreter."""
    return [
        *(pointwise(300, d) for d in ("f32", "f16", "bf16", "f64", "i64", "i32", "i16", "i8", "u8")),
        pointwise(1024, "f32"),
        *(exp2(100, d) for d in ("f32", "f64")),
        boolean(100),
        broadcast(3, 4, 5),
        cat(6, 3, 2),
        gather(6, 16, 10),
        window(50),
        in_place(70),
        softmax(5, 100),
        softmax(3, 64, "f16"),
        softmax(3, 40, "f64"),
        layernorm(4, 96),
        layernorm(4, 48, "bf16"),
        rmsnorm(64),
        rmsnorm(80, dtype="bf16", dynamic=False),
        dynamic_axis(3, 50),
        *(arg(k, 4, 45, d) for k in ("argmax", "argmin") for d in ("f32", "i64")),
        arg("argmax", 4, 32, "f64"),
        any_all(4, 37),
        column_sum(50, 24),
        column_sum(40, 8, "bf16"),
        full("sum", 1000),
        full("max", 333),
        full("argmin", 500, "i32"),
        full("sum", 257, "i64"),
        multi_axis(3, 4, 10),
        *(cumulative(k, 3, 50) for k in ("sum", "prod", "max", "min")),
        cumulative("sum", 2, 64, "i64"),
        cumulative("sum", 2, 33, "f16"),
    ]
