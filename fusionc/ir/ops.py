"""The pointwise operations of the loop IR, their typing, and the smart constructor `op`.

Arithmetic happens in b1, u8…i64, f32 or f64; f16 and bf16 occur only as the dtype of a Load, a Store or a `cast`, so a
renderer needs no half-precision arithmetic.  `op` folds what is exact: casts of constants, comparisons that the loop
bounds decide, integer arithmetic on indices.  It folds nothing that could change NaN, Inf or the sign of zero.

unary    neg abs sign not sqrt rsqrt exp exp2 expm1 log log1p log2 log10 sin cos tan asin acos atan sinh cosh tanh
         asinh acosh atanh erf erfc lgamma sigmoid floor ceil round trunc isnan isinf signbit cast
         (`not` is logical on b1 and bitwise on integers; round is half-to-even; sign(NaN) is NaN)
binary   add sub mul div floordiv mod truncdiv fmod pow maximum minimum fmax fmin atan2 copysign
         and or xor shl shr eq ne lt le gt ge
         (div is true division of floats; floordiv and mod round to minus infinity; truncdiv (integers) and fmod round to
         zero; maximum and minimum propagate NaN, fmax and fmin prefer the number; integers wrap; integer division by
         zero must not trap: any value may result.  pow is of floats.)
ternary  where(condition b1, a, b)
index    check_index(i, size): i + size where i < 0; must then lie in [0, size).  A renderer clamps it into the range, so
         that memory stays safe, and reports the violation where it can (C++: the kernel's return value).
"""

from __future__ import annotations

import math
import struct

from .expr import FLOATS, INTS, Const, Expr, Index, Op, bounds, index

UNARY = frozenset(
    "neg abs sign not sqrt rsqrt exp exp2 expm1 log log1p log2 log10 sin cos tan asin acos atan sinh cosh tanh asinh acosh "
    "atanh erf erfc lgamma sigmoid floor ceil round trunc isnan isinf signbit cast".split()
)
BINARY = frozenset(
    "add sub mul div floordiv mod truncdiv fmod pow maximum minimum fmax fmin atan2 copysign and or xor shl shr eq ne lt le gt "
    "ge check_index".split()
)
COMPARE = frozenset("eq ne lt le gt ge".split())
PREDICATE = frozenset("isnan isinf signbit".split())
FLOAT_ONLY = frozenset(
    "sqrt rsqrt exp exp2 expm1 log log1p log2 log10 sin cos tan asin acos atan sinh cosh tanh asinh acosh atanh erf erfc "
    "lgamma sigmoid div pow atan2 copysign".split()
)
ARITY = {**dict.fromkeys(UNARY, 1), **dict.fromkeys(BINARY, 2), "where": 3}
# Rough cost in multiples of one addition; schedule/ uses it for flop counts and to decide what is cheap to recompute.
COST = {
    **dict.fromkeys(ARITY, 1),
    **dict.fromkeys(FLOAT_ONLY, 16),
    "div": 4,
    "sqrt": 4,
    "rsqrt": 4,
    "floordiv": 8,
    "mod": 8,
    "truncdiv": 8,
    "fmod": 16,
    "cast": 0,
}

_MANTISSA = {"f16": 11, "bf16": 8, "f32": 24, "f64": 53}
_INT_BITS = {"b1": 1, "u8": 8, "i8": 7, "i16": 15, "i32": 31, "i64": 63}


def compute_dtype(dtype: str) -> str:
    """The dtype in which values of `dtype` are computed: f32 for f16 and bf16, itself otherwise."""
    return "f32" if dtype in ("f16", "bf16") else dtype


def op(name: str, args: tuple[Expr, ...], dtype: str) -> Expr:
    """`Op(name, args, dtype)`, or an equal simpler expression."""
    if name == "cast":
        return cast(args[0], dtype)
    if name == "where":
        c, a, b = args
        if isinstance(c, Const):
            return a if c.value else b
        if a is b:
            return a
    elif name in ("and", "or") and dtype == "b1":
        a, b = args
        for x, y in ((a, b), (b, a)):
            if isinstance(x, Const):
                return (y if x.value else x) if name == "and" else (x if x.value else y)
        if a is b:
            return a
    elif name == "not" and isinstance(args[0], Const) and dtype == "b1":
        return Const(not args[0].value, "b1")
    elif dtype == "i64" and name in ("add", "sub", "mul", "neg"):
        if all(isinstance(a, (Index, Const)) for a in args):
            xs = [index(a) for a in args]
            if name == "neg":
                return -xs[0]
            return xs[0] + xs[1] if name == "add" else xs[0] - xs[1] if name == "sub" else xs[0] * xs[1]
    elif dtype == "i64" and name in ("floordiv", "mod") and isinstance(args[0], (Index, Const)):
        if isinstance(args[1], Const) and args[1].value > 0:
            p, d = index(args[0]), index(args[1])
            return p // d if name == "floordiv" else p % d
    elif name in COMPARE and args[0].dtype == "i64":
        a, b = args
        if isinstance(a, (Index, Const)) and isinstance(b, (Index, Const)):
            known = _compare(name, index(a), index(b))
            if known is not None:
                return Const(known, "b1")
    elif name in ("mul", "div") and isinstance(args[1], Const) and args[1].value == 1:
        return args[0]
    elif name == "mul" and isinstance(args[0], Const) and args[0].value == 1:
        return args[1]
    return Op(name, args, dtype)


def _compare(name: str, a: Index, b: Index) -> bool | None:
    lo, hi = bounds(a - b)
    if name in ("lt", "ge"):
        known = True if hi is not None and hi < 0 else False if lo is not None and lo >= 0 else None
        return known if known is None or name == "lt" else not known
    if name in ("gt", "le"):
        known = True if lo is not None and lo > 0 else False if hi is not None and hi <= 0 else None
        return known if known is None or name == "gt" else not known
    if lo == hi == 0:
        return name == "eq"
    if (lo is not None and lo > 0) or (hi is not None and hi < 0):
        return name == "ne"
    return None


def cast(x: Expr, dtype: str) -> Expr:
    """`x` converted to `dtype` as torch's `.to` does; exact double casts collapse."""
    if x.dtype == dtype:
        return x
    if isinstance(x, Const):
        return _cast_const(x, dtype)
    if isinstance(x, Index) and x.is_const:
        return _cast_const(Const(x.value, "i64"), dtype)
    if isinstance(x, Op) and x.name == "cast" and exact_cast(x.args[0].dtype, x.dtype):
        return cast(x.args[0], dtype)
    return Op("cast", (x,), dtype)


def exact_cast(src: str, dst: str) -> bool:
    """True when every value of `src` survives the way to `dst` and back, and any further cast gives the same result."""
    if src == dst:
        return True
    if src in FLOATS:
        return dst in FLOATS and _MANTISSA[dst] >= _MANTISSA[src] and not (src == "bf16" and dst == "f16")
    if dst in FLOATS:
        return _INT_BITS[src] <= _MANTISSA[dst] and dst != "f16"
    if dst == "b1":
        return False
    return _INT_BITS[src] <= _INT_BITS[dst] and not (src in ("i8", "i16", "i32") and dst == "u8")


def _cast_const(c: Const, dtype: str) -> Const | Op:
    v = c.value
    if dtype in FLOATS:
        x = float(v)
        if math.isfinite(x):
            if dtype in ("f32", "f16"):
                fmt = "f" if dtype == "f32" else "e"
                try:
                    x = struct.unpack(fmt, struct.pack(fmt, x))[0]
                except OverflowError:
                    x = math.copysign(math.inf, x)
            elif dtype == "bf16":
                return Op("cast", (c,), dtype)
        return Const(x, dtype)
    if dtype == "b1":
        return Const(bool(v), "b1")
    if isinstance(v, float):
        if not math.isfinite(v) or abs(v) >= 2.0**31:
            return Op("cast", (c,), dtype)
        v = int(v)
    bits = {"u8": 8, "i8": 8, "i16": 16, "i32": 32, "i64": 64}[dtype]
    v = int(v) & ((1 << bits) - 1)
    if dtype != "u8" and v >= 1 << (bits - 1):
        v -= 1 << bits
    return Const(v, dtype)


def f32(x: Expr) -> Expr:
    return cast(x, "f32")


def is_integer(dtype: str) -> bool:
    return dtype in INTS


def and_(a: Expr | None, b: Expr | None) -> Expr | None:
    """Conjunction where None means true."""
    if a is None:
        return b
    if b is None:
        return a
    return op("and", (a, b), "b1")
