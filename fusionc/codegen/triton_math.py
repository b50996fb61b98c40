"""Spelling of the loop IR's operations in Triton, so that values match eager also for NaN, infinities and -0.0.

Triton's own functions are used where they are as exact as eager's; the others come from the device library of the
target (`libdevice` stands for NVIDIA's libdevice and AMD's ocml alike).  What differs from the obvious spelling:

    -x           Triton computes 0 - x, which loses the sign of zero: written as a product with -1.0
    -0.0         a literal zero of any sign becomes +0.0
    a / b        float32 division is the approximate one: div_rn is not
    a // b, %    round to zero (C), the IR rounds down
    maximum      Triton's propagates NaN only when asked, and on float64 not on every target
    float → u8   wraps as torch does; the conversion instruction saturates
"""

from __future__ import annotations

from collections.abc import Callable

from ..ir.expr import FLOATS
from ..ir.ops import ARITY, COMPARE

TL_DTYPE = {
    "b1": "tl.int1",
    "u8": "tl.uint8",
    "i8": "tl.int8",
    "i16": "tl.int16",
    "i32": "tl.int32",
    "i64": "tl.int64",
    "f16": "tl.float16",
    "bf16": "tl.bfloat16",
    "f32": "tl.float32",
    "f64": "tl.float64",
}

_INFIX = {"add": "+", "sub": "-", "mul": "*", "and": "&", "or": "|", "xor": "^", "shl": "<<", "shr": ">>"}
_COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_LIBRARY = {
    name: name
    for name in (
        *("exp", "expm1", "log1p", "log10", "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh", "asinh", "acosh"),
        *("atanh", "erfc", "lgamma", "pow", "atan2", "fmod"),
    )
} | {"round": "nearbyint", "trunc": "trunc"}
_DIRECT = {name: f"tl.{name}" for name in ("exp2", "log", "log2", "sin", "cos", "erf", "floor", "ceil", "abs")}
# Operations whose operands all have to be Triton tensors: they are used twice, or passed to a library function.
NEEDS_TENSORS = frozenset(
    (*_LIBRARY, *_DIRECT, "floordiv", "mod", "truncdiv", "maximum", "minimum", "fmax", "fmin", "copysign", "sqrt")
) | {"rsqrt", "sigmoid", "isnan", "isinf", "signbit", "sign", "neg", "not", "cast"}


def supports(name: str, dtype: str) -> bool:
    """Can operation `name` with operands of `dtype` (a compute dtype) be rendered?  Everything in `ir.ops` can."""
    return name in ARITY and (dtype not in ("f16", "bf16") or name == "cast")


def operation(name: str, args: list[str], dtype: str, result: str, fresh: Callable[[str], str]) -> str:
    """Triton text of `name` over operand texts `args` of `dtype`; `result` is the dtype of the value.

    Operands are names or parenthesised; literals occur only where `NEEDS_TENSORS` allows it.  `fresh` writes a line that
    gives a text a name, for steps that are used more than once.
    """
    a = args[0]
    floating = dtype in FLOATS
    if name == "cast":
        return cast(a, dtype, result)
    if name in COMPARE:
        if dtype == "b1" and name not in ("eq", "ne"):
            return f"{a}.to(tl.int32) {_COMPARE[name]} {args[1]}.to(tl.int32)"
        return f"{a} {_COMPARE[name]} {args[1]}"
    if name in _INFIX:
        return f"{a} {_INFIX[name]} {args[1]}"
    if name == "where":
        return f"tl.where({', '.join(args)})"
    if name in ("maximum", "minimum", "fmax", "fmin"):
        return extreme(name, a, args[1], dtype)
    if name in ("floordiv", "mod", "truncdiv", "fmod"):
        return _division(name, a, args[1], dtype, fresh)
    if name == "div":
        return f"tl.div_rn({a}, {args[1]})" if dtype == "f32" else f"{a} / {args[1]}"
    if name in _LIBRARY:
        return f"libdevice.{_LIBRARY[name]}({', '.join(args)})"
    if name == "exp2" and dtype == "f64":
        return f"libdevice.exp2({a})"  # (tl.exp2 is one instruction, of float32)
    if name in _DIRECT:
        return f"{_DIRECT[name]}({a})"
    one = _UNARY.get(name)
    if one is not None:
        return one(a, dtype, floating)
    if name == "copysign":
        i, top = ("tl.int64", 63) if dtype == "f64" else ("tl.int32", 31)
        sign, rest = -(1 << top), (1 << top) - 1
        bits = f"({a}.to({i}, bitcast=True) & {rest}) | ({args[1]}.to({i}, bitcast=True) & {sign})"
        return f"({bits}).to({TL_DTYPE[dtype]}, bitcast=True)"
    raise ValueError(f"operation {name} has no spelling in Triton")


def quick(name: str, args: list[str]) -> str | None:
    """Text of a float32 operation exact to about 20 bits, where that is cheaper; None: no such spelling."""
    if name == "exp":
        return f"tl.exp({args[0]})"
    if name == "div":
        return f"{args[0]} / {args[1]}"
    if name == "sigmoid":
        return f"1.0 / (1.0 + tl.exp({args[0]} * -1.0))"
    return None


# Functions exact to 1.2e-7 of their range, not of their value, at a third of the instructions of the library's.
# erf(x) = sign(x)·(1 - 2^(-|x|·P(|x|))), P fitted to log2(erfc(x))/x over [0, 4] by reweighted least squares.
QUICK = {
    "erf": """@triton.jit
def _erf(x):
    a = tl.abs(x)
    p = 4.5357574425335974e-05 * a - 0.0004455074085853994
    p = p * a + 0.0014894406776875257
    p = p * a + 0.0007746313349343836
    p = p * a - 0.02825368195772171
    p = p * a + 0.14848162233829498
    p = p * a + 0.9184163808822632
    p = p * a + 1.6279085874557495
    y = 1.0 - tl.exp2(p * a * -1.0)
    return tl.where(x < 0, y * -1.0, y)
""",
    "tanh": """@triton.jit
def _tanh(x):
    return 1.0 - 2.0 / (1.0 + tl.exp(x * 2.0))
""",
}


def _neg(a: str, dtype: str, floating: bool) -> str:
    return f"{a} * -1.0" if floating else f"0 - {a}"


def _sign(a: str, dtype: str, floating: bool) -> str:
    if dtype == "u8":
        return f"({a} > 0).to(tl.uint8)"
    if floating:
        return f"tl.where({a} > 0, 1.0, tl.where({a} < 0, -1.0, {a} + 0.0))"  # -0.0 gives 0.0
    return f"({a} > 0).to({TL_DTYPE[dtype]}) - ({a} < 0).to({TL_DTYPE[dtype]})"


def _sqrt(a: str, dtype: str, floating: bool) -> str:
    return f"tl.sqrt_rn({a})" if dtype == "f32" else f"tl.sqrt({a})"


def _rsqrt(a: str, dtype: str, floating: bool) -> str:
    return f"tl.rsqrt({a})" if dtype == "f32" else f"1.0 / tl.sqrt({a})"


def _sigmoid(a: str, dtype: str, floating: bool) -> str:
    down = f"1.0 + libdevice.exp({a} * -1.0)"
    return f"tl.div_rn(1.0, {down})" if dtype == "f32" else f"1.0 / ({down})"


def _signbit(a: str, dtype: str, floating: bool) -> str:
    if not floating:
        return f"{a} < 0"
    return f"{a}.to({'tl.int64' if dtype == 'f64' else 'tl.int32'}, bitcast=True) < 0"


_UNARY = {
    "neg": _neg,
    "not": lambda a, dtype, floating: f"~{a}",
    "sign": _sign,
    "sqrt": _sqrt,
    "rsqrt": _rsqrt,
    "sigmoid": _sigmoid,
    "isnan": lambda a, dtype, floating: f"{a} != {a}",
    "isinf": lambda a, dtype, floating: f"tl.abs({a}) == float('inf')",
    "signbit": _signbit,
}


def extreme(name: str, a: str, b: str, dtype: str) -> str:
    """The larger or smaller of two texts; NaN wins in maximum and minimum, and loses in fmax and fmin."""
    larger = name in ("maximum", "fmax", "max")
    if dtype == "b1":
        return f"{a} | {b}" if larger else f"{a} & {b}"
    if dtype not in FLOATS:
        return f"tl.{'maximum' if larger else 'minimum'}({a}, {b})"
    order = ">" if larger else "<"
    if name in ("fmax", "fmin"):
        return f"tl.where(({a} {order} {b}) | ({b} != {b}), {a}, {b})"
    if dtype == "f32":
        return f"tl.{'maximum' if larger else 'minimum'}({a}, {b}, propagate_nan=tl.PropagateNan.ALL)"
    return f"tl.where(({a} {order} {b}) | ({a} != {a}), {a}, {b})"


def _division(name: str, a: str, b: str, dtype: str, fresh: Callable[[str], str]) -> str:
    floating = dtype in FLOATS
    if not floating and (dtype == "u8" or name in ("truncdiv", "fmod")):
        return f"{a} // {b}" if name in ("floordiv", "truncdiv") else f"{a} % {b}"
    rem = f"libdevice.fmod({a}, {b})" if floating else f"{a} % {b}"
    if name == "fmod":
        return rem
    rem = fresh(rem)
    below = f"({rem} != 0) & (({rem} < 0) != ({b} < 0))"
    if name == "mod":
        return f"tl.where({below}, {rem} + {b}, {rem})"
    if not floating:
        quotient = fresh(f"{a} // {b}")
        return f"tl.where({below}, {quotient} - 1, {quotient})"
    # as c10::div_floor_floating: the exact quotient of a minus its remainder, rounded, with the sign of a / b
    div = "tl.div_rn({}, {})" if dtype == "f32" else "{} / {}"
    plain = fresh(div.format(a, b))
    exact = fresh(div.format(f"({a} - {rem})", b))
    down = fresh(f"tl.where({below}, {exact} - 1.0, {exact})")
    floor = fresh(f"tl.floor({down})")
    near = fresh(f"tl.where({down} - {floor} > 0.5, {floor} + 1.0, {floor})")
    return f"tl.where({b} == 0, {plain}, tl.where({down} == 0, {plain} * 0.0, {near}))"


def cast(a: str, src: str, dst: str) -> str:
    """`a` of dtype `src` converted to `dst` as torch's `.to` does."""
    if src == dst:
        return a
    if dst == "b1":
        return f"{a} != 0"
    if src in FLOATS and dst not in FLOATS:
        if dst == "u8":
            return f"{a}.to(tl.int64).to(tl.uint8)"
        if dst in ("i8", "i16"):
            return f"{a}.to(tl.int32).to({TL_DTYPE[dst]})"
    narrow = ("f16", "bf16")
    if (dst in narrow and src != "f32") or (src in narrow and dst != "f32"):
        return f"{a}.to(tl.float32).to({TL_DTYPE[dst]})"
    return f"{a}.to({TL_DTYPE[dst]})"


# -- combine functions of reductions and scans: what they compute must not depend on the order of combination ---------

_BODIES = {
    "sum": "    return a + b\n",
    "prod": "    return a * b\n",
    "any": "    return a | b\n",
    "all": "    return a & b\n",
}


def combine_name(kind: str, dtype: str) -> str:
    """Name of the combine function of a reduction of `kind` over values of `dtype`."""
    flavour = "_f64" if dtype == "f64" else "_int" if dtype not in FLOATS else ""
    return f"_{kind}" + (flavour if kind in ("max", "min", "argmax", "argmin") else "")


def combine_source(kind: str, dtype: str) -> str:
    """Source of that function."""
    name = combine_name(kind, dtype)
    if kind in _BODIES:
        return f"@triton.jit\ndef {name}(a, b):\n{_BODIES[kind]}"
    if kind in ("max", "min"):
        return f"@triton.jit\ndef {name}(a, b):\n    return {extreme(kind, 'a', 'b', dtype)}\n"
    order = ">" if kind == "argmax" else "<"
    better, tie = f"a {order} b", "a == b"
    if dtype in FLOATS:  # NaN is more extreme than any number, the first NaN wins
        better, tie = f"({better}) | ((a != a) & (b == b))", f"({tie}) | ((a != a) & (b != b))"
    return (
        f"@triton.jit\ndef {name}(a, i, b, j):\n"
        f"    first = ({better}) | (({tie}) & (i < j))\n"
        "    return tl.where(first, a, b), tl.where(first, i, j)\n"
    )


def literal(value: object, dtype: str) -> str:
    """A number as Python text that Triton reads exactly; beyond the range of its type it wraps, as torch's do."""
    if dtype in FLOATS:
        x = float(value)  # type: ignore[arg-type]
        if x != x:
            return 'float("nan")'
        if x in (float("inf"), float("-inf")):
            return f'float("{x}")'
        return repr(x)
    if dtype == "b1":
        return repr(bool(value))
    return repr((int(value) - _LOWEST[dtype]) % (_HIGHEST[dtype] - _LOWEST[dtype] + 1) + _LOWEST[dtype])  # type: ignore[call-overload]


_LOWEST = {"u8": 0, "i8": -(1 << 7), "i16": -(1 << 15), "i32": -(1 << 31), "i64": -(1 << 63)}
_HIGHEST = {"u8": 255, "i8": (1 << 7) - 1, "i16": (1 << 15) - 1, "i32": (1 << 31) - 1, "i64": (1 << 63) - 1}


def identity(kind: str, dtype: str) -> str:
    """The value that changes nothing when combined, as text."""
    if kind in ("sum", "any"):
        return "0.0" if dtype in FLOATS else "0"
    if kind in ("prod", "all"):
        return "1.0" if dtype in FLOATS else "1"
    low = kind in ("max", "argmax")
    if dtype in FLOATS:
        return f'float("{"-inf" if low else "inf"}")'
    if dtype == "b1":
        return "0" if low else "1"
    return str(_LOWEST[dtype] if low else _HIGHEST[dtype])
