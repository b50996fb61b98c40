"""Pointwise operators: one small function each from element expressions to an element expression."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Node

from ..expr import FLOATS, INTS, Const, Expr
from ..ops import cast, compute_dtype, op
from ..sizes import Unsupported
from ..value import Context, Value, pointwise
from .registry import as_value, dtype_of, register, result_type, scalar, shape_of

E = Expr


def fc(v: float, like: E) -> Const:
    """A constant of the dtype of `like`."""
    return Const(v, like.dtype)


def unary(name: str, x: E) -> E:
    return op(name, (x,), x.dtype)


def binary(name: str, a: E, b: E) -> E:
    return op(name, (a, b), a.dtype)


def compare(name: str, a: E, b: E) -> E:
    return op(name, (a, b), "b1")


def where(c: E, a: E, b: E) -> E:
    return op("where", (c, a, b), a.dtype)


def add(a: E, b: E) -> E:
    return binary("add", a, b)


def sub(a: E, b: E) -> E:
    return binary("sub", a, b)


def mul(a: E, b: E) -> E:
    return binary("mul", a, b)


def div(a: E, b: E) -> E:
    return binary("div", a, b)


def elementwise(names: str | Sequence[str], nargs: int, *, ints: bool = True, promote: bool = False) -> Callable:
    """Register fn(*element expressions) for an operator with `nargs` tensor-like operands.

    promote: operands are cast to their common dtype (comparisons), not to the result's.
    ints: the operator is also registered for integer results.
    """

    def wrap(fn: Callable[..., E]) -> Callable[..., E]:
        @register(names, "pointwise")
        def lower(ctx: Context, node: Node, *args: Any, **kwargs: Any) -> Value:
            if kwargs and any(v is not None for v in kwargs.values()):
                raise Unsupported(f"keyword arguments {sorted(kwargs)}")
            if len(args) != nargs:
                raise Unsupported("optional arguments")
            dtype = dtype_of(node)
            work = compute_dtype(result_type(*node.args)) if promote else compute_dtype(dtype)
            if not ints and work not in FLOATS:
                raise Unsupported(f"{node.target} on {work}")
            return pointwise(ctx, shape_of(node), dtype, [as_value(ctx, a, work) for a in args], fn, work)

        return fn

    return wrap


# -- arithmetic -----------------------------------------------------------------------------------------------------


def _with_alpha(name: str, reverse: bool = False) -> Callable[..., Value]:
    def lower(ctx: Context, node: Node, a: Any, b: Any, alpha: Any = 1) -> Value:
        dtype = dtype_of(node)
        work = compute_dtype(dtype)
        if work == "b1":
            if name == "sub":
                raise Unsupported("subtraction of booleans")

        def fn(x: E, y: E) -> E:
            if reverse:
                x, y = y, x
            if alpha != 1:
                y = mul(y, scalar(ctx, alpha, work))
            if work == "b1":
                return op("or", (x, y), "b1")
            return binary(name, x, y)

        return pointwise(ctx, shape_of(node), dtype, [as_value(ctx, a, work), as_value(ctx, b, work)], fn, work)

    return lower


register(["aten.add.Tensor", "aten.add.Scalar"], "pointwise")(_with_alpha("add"))
register(["aten.sub.Tensor", "aten.sub.Scalar"], "pointwise")(_with_alpha("sub"))
register(["aten.rsub.Tensor", "aten.rsub.Scalar"], "pointwise")(_with_alpha("sub", reverse=True))


@elementwise(["aten.mul.Tensor", "aten.mul.Scalar"], 2)
def _mul(a: E, b: E) -> E:
    return op("and", (a, b), "b1") if a.dtype == "b1" else mul(a, b)


@elementwise(["aten.div.Tensor", "aten.div.Scalar", "aten.true_divide.Tensor"], 2, ints=False)
def _div(a: E, b: E) -> E:
    return div(a, b)


def _both(
    ctx: Context, node: Node, a: Any, b: Any, dtype: str, work: str, fn: Callable[[Expr, Expr], Expr]
) -> Value:
    """`fn` of two operands, tensors or numbers, computed in `work`."""
    return pointwise(ctx, shape_of(node), dtype, [as_value(ctx, a, work), as_value(ctx, b, work)], fn, work)


@register(["aten.div.Tensor_mode", "aten.div.Scalar_mode"], "pointwise")
def _div_mode(ctx: Context, node: Node, a: Any, b: Any, rounding_mode: str | None = None) -> Value:
    dtype = dtype_of(node)
    work = compute_dtype(dtype)
    if rounding_mode is None:
        return pointwise(ctx, shape_of(node), dtype, [as_value(ctx, a, work), as_value(ctx, b, work)], div, work)
    if work not in FLOATS:
        # Integer division by zero raises in eager; only a divisor known not to be zero is ours.
        if not (isinstance(b, int) and b != 0) or work not in INTS:
            raise Unsupported("integer division by a tensor (eager raises on zero)")
        name = "truncdiv" if rounding_mode == "trunc" else "floordiv"
    elif rounding_mode == "floor":
        name = "floordiv"
    else:
        return _both(ctx, node, a, b, dtype, work, lambda x, y: unary("trunc", div(x, y)))
    return _both(ctx, node, a, b, dtype, work, lambda x, y: binary(name, x, y))


@register(["aten.remainder.Scalar", "aten.remainder.Tensor", "aten.fmod.Scalar", "aten.fmod.Tensor"], "pointwise")
def _remainder(ctx: Context, node: Node, a: Any, b: Any) -> Value:
    dtype = dtype_of(node)
    work = compute_dtype(dtype)
    name = "mod" if node.target.overloadpacket is torch.ops.aten.remainder else "fmod"  # type: ignore[union-attr]
    if work not in FLOATS and (name == "fmod" or not (isinstance(b, int) and b != 0) or work not in INTS):
        raise Unsupported("integer remainder by a tensor (eager raises on zero)")
    return _both(ctx, node, a, b, dtype, work, lambda x, y: binary(name, x, y))


@register("aten.pow.Tensor_Scalar", "pointwise")
def _pow_scalar(ctx: Context, node: Node, x: Value, p: Any) -> Value:
    dtype = dtype_of(node)
    work = compute_dtype(dtype)
    if not isinstance(p, (int, float)):
        raise Unsupported("symbolic exponent")
    if work not in FLOATS and p not in (1, 2, 3):
        raise Unsupported("integer power")
    if work == "b1":
        raise Unsupported("power of booleans")

    def fn(e: E) -> E:
        if p == 0:
            return fc(1, e)
        if p == 1:
            return e
        if p == 2:
            return mul(e, e)
        if p == 3:
            return mul(mul(e, e), e)
        if p == 0.5:
            return unary("sqrt", e)
        if p == -1:
            return div(fc(1, e), e)
        if p == -2:
            return div(fc(1, e), mul(e, e))
        return binary("pow", e, fc(p, e))

    return pointwise(ctx, shape_of(node), dtype, [x], fn, work)


@elementwise(["aten.pow.Tensor_Tensor", "aten.pow.Scalar"], 2, ints=False)
def _pow(a: E, b: E) -> E:
    return binary("pow", a, b)


for _names, _ir, _int_ok in (
    ("aten.neg.default", "neg", True),
    ("aten.abs.default", "abs", True),
    ("aten.floor.default", "floor", False),
    ("aten.ceil.default", "ceil", False),
    ("aten.round.default", "round", False),
    ("aten.trunc.default", "trunc", False),
    *((f"aten.{n}.default", n, False) for n in (
        "sqrt rsqrt exp exp2 expm1 log log1p log2 log10 sin cos tan asin acos atan sinh cosh tanh asinh acosh atanh erf erfc "
        "lgamma sigmoid").split()),
):  # fmt: skip

    @elementwise(_names, 1, ints=_int_ok)
    def _unary(x: E, name: str = _ir) -> E:
        if x.dtype == "b1":
            if name in ("neg",):
                raise Unsupported("negation of booleans")
            return x
        return unary(name, x)


@elementwise("aten.reciprocal.default", 1, ints=False)
def _reciprocal(x: E) -> E:
    return div(fc(1, x), x)


@elementwise("aten.square.default", 1)
def _square(x: E) -> E:
    return x if x.dtype == "b1" else mul(x, x)


@elementwise("aten.relu.default", 1)
def _relu(x: E) -> E:
    if x.dtype == "b1":
        raise Unsupported("relu of booleans")
    return where(compare("lt", x, fc(0, x)), fc(0, x), x)  # keeps NaN and -0.0


@elementwise(["aten.sign.default", "aten.sgn.default"], 1)
def _sign(x: E) -> E:
    """(0 < x) - (x < 0): 0 for NaN."""
    if x.dtype == "b1":
        return x
    zero = fc(0, x)
    return sub(cast(compare("lt", zero, x), x.dtype), cast(compare("lt", x, zero), x.dtype))


for _name in ("maximum", "minimum", "fmax", "fmin"):

    @elementwise(f"aten.{_name}.default", 2)
    def _extremum(a: E, b: E, name: str = _name) -> E:
        if a.dtype == "b1":
            return op("or" if "max" in name else "and", (a, b), "b1")
        return binary(name if a.dtype in FLOATS else name.replace("fm", "m") + ("imum" if name[0] == "f" else ""), a, b)


@elementwise("aten.atan2.default", 2, ints=False)
def _atan2(a: E, b: E) -> E:
    return binary("atan2", a, b)


@elementwise(["aten.copysign.Tensor", "aten.copysign.Scalar"], 2, ints=False)
def _copysign(a: E, b: E) -> E:
    return binary("copysign", a, b)


def bound(beyond: str, name: str, e: E, limit: E) -> E:
    """One side of a clamp.  With a constant limit a comparison does it, which keeps NaN and the sign of zero."""
    if isinstance(limit, Const) and limit.value == limit.value:
        return where(compare(beyond, e, limit), limit, e)
    return binary(name, e, limit)


@register(["aten.clamp.default", "aten.clamp_min.default", "aten.clamp_max.default", "aten.clamp.Tensor",
           "aten.clamp_min.Tensor", "aten.clamp_max.Tensor", "aten.hardtanh.default"], "pointwise")  # fmt: skip
def _clamp(ctx: Context, node: Node, x: Value, *bounds: Any, min: Any = None, max: Any = None) -> Value:
    name = node.target.overloadpacket.__name__  # type: ignore[union-attr]
    if name == "clamp_min":
        lo, hi = bounds[0], None
    elif name == "clamp_max":
        lo, hi = None, bounds[0]
    elif name == "hardtanh":
        given = (*bounds, *(-1.0, 1.0)[len(bounds) :])
        lo, hi = given[0], given[1]
    else:
        lo, hi = [*bounds, None, None][:2]
        lo, hi = (min if lo is None else lo), (max if hi is None else hi)
    dtype = dtype_of(node)
    work = compute_dtype(dtype)
    if work == "b1":
        raise Unsupported("clamp of booleans")
    args = [x, *[as_value(ctx, b, work) for b in (lo, hi) if b is not None]]

    def fn(e: E, *rest: E) -> E:
        it = iter(rest)
        if lo is not None:
            e = bound("lt", "maximum", e, next(it))
        if hi is not None:
            e = bound("gt", "minimum", e, next(it))
        return e

    return pointwise(ctx, shape_of(node), dtype, args, fn, work)


# -- comparison and logic ------------------------------------------------------------------------------------------

for _name in ("eq", "ne", "lt", "le", "gt", "ge"):

    @elementwise([f"aten.{_name}.Tensor", f"aten.{_name}.Scalar"], 2, promote=True)
    def _compare(a: E, b: E, name: str = _name) -> E:
        if a.dtype == "b1" and name in ("lt", "le", "gt", "ge"):
            a, b = cast(a, "i32"), cast(b, "i32")
        return compare(name, a, b)


def truth(x: E) -> E:
    return x if x.dtype == "b1" else cast(x, "b1")


for _name, _ir in (("logical_and", "and"), ("logical_or", "or"), ("logical_xor", "xor")):

    @elementwise(f"aten.{_name}.default", 2, promote=True)
    def _logical(a: E, b: E, name: str = _ir) -> E:
        return op(name, (truth(a), truth(b)), "b1")


@elementwise("aten.logical_not.default", 1, promote=True)
def _logical_not(x: E) -> E:
    return op("not", (truth(x),), "b1")


for _name, _ir in (("bitwise_and", "and"), ("bitwise_or", "or"), ("bitwise_xor", "xor")):

    @elementwise([f"aten.{_name}.Tensor", f"aten.{_name}.Scalar"], 2)
    def _bitwise(a: E, b: E, name: str = _ir) -> E:
        return binary(name, a, b)


@elementwise("aten.bitwise_not.default", 1)
def _bitwise_not(x: E) -> E:
    return unary("not", x)


@elementwise("aten.isnan.default", 1, promote=True)
def _isnan(x: E) -> E:
    return op("isnan", (x,), "b1") if x.dtype in FLOATS else Const(False, "b1")


@elementwise("aten.isinf.default", 1, promote=True)
def _isinf(x: E) -> E:
    return op("isinf", (x,), "b1") if x.dtype in FLOATS else Const(False, "b1")


@elementwise("aten.signbit.default", 1, promote=True)
def _signbit(x: E) -> E:
    if x.dtype in FLOATS:
        return op("signbit", (x,), "b1")
    return Const(False, "b1") if x.dtype in ("b1", "u8") else compare("lt", x, fc(0, x))


@register(["aten.where.self", "aten.where.ScalarOther", "aten.where.ScalarSelf", "aten.where.Scalar"], "pointwise")
def _where(ctx: Context, node: Node, c: Value, a: Any, b: Any) -> Value:
    dtype = dtype_of(node)
    work = compute_dtype(dtype)
    va, vb = as_value(ctx, a, work), as_value(ctx, b, work)

    def at(idx: tuple) -> E:
        return where(
            truth(c.at_broadcast(idx, compute_dtype(c.dtype))), va.at_broadcast(idx, work), vb.at_broadcast(idx, work)
        )

    return Value(ctx, shape_of(node), dtype, at)


@register(["aten.masked_fill.Scalar", "aten.masked_fill.Tensor"], "pointwise")
def _masked_fill(ctx: Context, node: Node, x: Value, mask: Value, value: Any) -> Value:
    dtype = dtype_of(node)
    work = compute_dtype(dtype)
    v = as_value(ctx, value, work)
    if isinstance(value, float) and work not in FLOATS:
        raise Unsupported("float fill of an integer tensor")

    def at(idx: tuple) -> E:
        return where(
            truth(mask.at_broadcast(idx, compute_dtype(mask.dtype))),
            v.at_broadcast(idx, work),
            x.at_broadcast(idx, work),
        )

    return Value(ctx, shape_of(node), dtype, at)


# -- conversion and copies ------------------------------------------------------------------------------------------


@register(["aten._to_copy.default", "prims.convert_element_type.default"], "pointwise")
def _to_copy(ctx: Context, node: Node, x: Value, *_: Any, **kwargs: Any) -> Value:
    src: Node = node.args[0]  # type: ignore[assignment]
    if node.meta["val"].device != src.meta["val"].device:
        raise Unsupported("copy between devices")
    if kwargs.get("pin_memory"):
        raise Unsupported("pinned memory")
    dtype = dtype_of(node)
    if dtype == x.dtype:
        return Value(ctx, x.shape, dtype, x.at)
    work = compute_dtype(dtype)

    def at(idx: tuple) -> E:
        e = x.at(idx)
        if x.dtype not in FLOATS or dtype not in FLOATS or dtype in ("f32", "f64"):
            return cast(e, work)
        return cast(cast(e, dtype), work)

    return Value(ctx, x.shape, dtype, at)


@register(["aten.clone.default", "aten.lift_fresh_copy.default"], "pointwise")
def _clone(ctx: Context, node: Node, x: Value, **_: Any) -> Value:
    return Value(ctx, x.shape, x.dtype, x.at)


@register("aten.copy.default", "pointwise")
def _copy(ctx: Context, node: Node, dst: Value, src: Value, *_: Any) -> Value:
    if node.args[0].meta["val"].device != node.args[1].meta["val"].device:  # type: ignore[union-attr]
        raise Unsupported("copy between devices")
    return pointwise(ctx, shape_of(node), dtype_of(node), [src], lambda e: e, compute_dtype(dtype_of(node)))


# -- activations and their gradients --------------------------------------------------------------------------------


def sigmoid(x: E) -> E:
    return unary("sigmoid", x)


@elementwise("aten.silu.default", 1, ints=False)
def _silu(x: E) -> E:
    return mul(x, sigmoid(x))


@elementwise("aten.silu_backward.default", 2, ints=False)
def _silu_backward(g: E, x: E) -> E:
    s = sigmoid(x)
    return mul(mul(g, s), add(fc(1, x), mul(x, sub(fc(1, x), s))))


def _gelu_of(x: E, tanh: bool) -> E:
    if tanh:
        inner = mul(fc(math.sqrt(2 / math.pi), x), add(x, mul(fc(0.044715, x), mul(mul(x, x), x))))
        return mul(mul(fc(0.5, x), x), add(fc(1, x), unary("tanh", inner)))
    return mul(mul(x, fc(0.5, x)), add(fc(1, x), unary("erf", mul(x, fc(math.sqrt(0.5), x)))))


_LONG_GELU = ("cpu",)  # where erf is as fast


def _gelu_of_half(x: E) -> E:
    """x·Φ(x) by Abramowitz and Stegun 7.1.26, for results of at most 11 bits: a third of the instructions of erf.

    Φ's error is 7e-8 of 1, and it does not cancel for negative x as 1 + erf(x) does in float32.
    """
    t = add(mul(unary("abs", x), fc(0.3275911 * math.sqrt(0.5), x)), fc(1, x))
    t = unary("rsqrt", mul(t, t))  # 1 / t is many instructions, this is one
    p: E = fc(0.5 * 1.061405429, x)
    for c in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        p = add(mul(p, t), fc(0.5 * c, x))
    tail = mul(mul(p, t), unary("exp2", mul(mul(x, x), fc(-0.5 * math.log2(math.e), x))))
    return mul(x, where(compare("lt", x, fc(0, x)), tail, sub(fc(1, x), tail)))


@register("aten.gelu.default", "pointwise")
def _gelu(ctx: Context, node: Node, x: Value, approximate: str = "none") -> Value:
    work = compute_dtype(dtype_of(node))
    if approximate == "none" and dtype_of(node) in ("bf16", "f16") and node.meta["val"].device.type not in _LONG_GELU:
        return pointwise(ctx, shape_of(node), dtype_of(node), [x], _gelu_of_half, work)
    return pointwise(ctx, shape_of(node), dtype_of(node), [x], lambda e: _gelu_of(e, approximate == "tanh"), work)


@register("aten.gelu_backward.default", "pointwise")
def _gelu_backward(ctx: Context, node: Node, g: Value, x: Value, approximate: str = "none") -> Value:
    work = compute_dtype(dtype_of(node))

    def fn(dy: E, e: E) -> E:
        if approximate == "tanh":
            k = math.sqrt(2 / math.pi)
            sq = mul(e, e)
            t = unary("tanh", mul(fc(k, e), add(e, mul(fc(0.044715, e), mul(sq, e)))))
            left = mul(fc(0.5, e), add(fc(1, e), t))
            slope = mul(fc(k, e), add(fc(1, e), mul(fc(3 * 0.044715, e), sq)))
            right = mul(mul(mul(fc(0.5, e), e), sub(fc(1, e), mul(t, t))), slope)
            return mul(dy, add(left, right))
        cdf = mul(fc(0.5, e), add(fc(1, e), unary("erf", mul(e, fc(math.sqrt(0.5), e)))))
        pdf = mul(unary("exp", mul(mul(e, e), fc(-0.5, e))), fc(1 / math.sqrt(2 * math.pi), e))
        return mul(dy, add(cdf, mul(e, pdf)))

    return pointwise(ctx, shape_of(node), dtype_of(node), [g, x], fn, work)


@elementwise("aten.tanh_backward.default", 2, ints=False)
def _tanh_backward(g: E, y: E) -> E:
    return mul(g, sub(fc(1, y), mul(y, y)))


@elementwise("aten.sigmoid_backward.default", 2, ints=False)
def _sigmoid_backward(g: E, y: E) -> E:
    return mul(g, mul(sub(fc(1, y), y), y))


@register("aten.threshold_backward.default", "pointwise")
def _threshold_backward(ctx: Context, node: Node, g: Value, x: Value, threshold: Any) -> Value:
    work = compute_dtype(dtype_of(node))
    return pointwise(
        ctx,
        shape_of(node),
        dtype_of(node),
        [g, x],
        lambda dy, e: where(compare("le", e, scalar(ctx, threshold, work)), fc(0, dy), dy),
        work,
    )


@register("aten.leaky_relu.default", "pointwise")
def _leaky_relu(ctx: Context, node: Node, x: Value, slope: Any = 0.01) -> Value:
    work = compute_dtype(dtype_of(node))
    if work not in FLOATS:
        raise Unsupported("leaky_relu of integers")
    return pointwise(
        ctx,
        shape_of(node),
        dtype_of(node),
        [x],
        lambda e: where(compare("gt", e, fc(0, e)), e, mul(e, scalar(ctx, slope, work))),
        work,
    )


@register("aten.native_dropout_backward.default", "pointwise")
def _dropout_backward(ctx: Context, node: Node, g: Value, mask: Value, scale: Any) -> Value:
    work = compute_dtype(dtype_of(node))
    return pointwise(
        ctx, shape_of(node), dtype_of(node), [g, mask], lambda dy, m: mul(mul(dy, m), scalar(ctx, scale, work)), work
    )


@elementwise("aten.hardswish.default", 1, ints=False)
def _hardswish(x: E) -> E:
    return div(mul(x, binary("minimum", binary("maximum", add(x, fc(3, x)), fc(0, x)), fc(6, x))), fc(6, x))


@elementwise("aten.hardsigmoid.default", 1, ints=False)
def _hardsigmoid(x: E) -> E:
    return div(binary("minimum", binary("maximum", add(x, fc(3, x)), fc(0, x)), fc(6, x)), fc(6, x))


# -- fused arithmetic -----------------------------------------------------------------------------------------------


@register(["aten.addcmul.default", "aten.addcdiv.default"], "pointwise")
def _addc(ctx: Context, node: Node, x: Value, a: Value, b: Value, value: Any = 1) -> Value:
    dtype = dtype_of(node)
    work = compute_dtype(dtype)
    if work not in FLOATS:
        raise Unsupported("addcmul of integers")
    name = "mul" if "mul" in node.target.overloadpacket.__name__ else "div"  # type: ignore[union-attr]

    def fn(e: E, p: E, q: E) -> E:
        if name == "mul":
            return add(e, mul(mul(p, q), scalar(ctx, value, work)))
        return add(e, mul(scalar(ctx, value, work), div(p, q)))

    return pointwise(ctx, shape_of(node), dtype, [x, a, b], fn, work)


@register(["aten.lerp.Scalar", "aten.lerp.Tensor"], "pointwise")
def _lerp(ctx: Context, node: Node, a: Value, b: Value, w: Any) -> Value:
    work = compute_dtype(dtype_of(node))

    def fn(x: E, y: E, t: E) -> E:
        near = add(x, mul(t, sub(y, x)))
        far = sub(y, mul(sub(y, x), sub(fc(1, x), t)))
        return where(compare("lt", unary("abs", t), fc(0.5, t)), near, far)

    return pointwise(ctx, shape_of(node), dtype_of(node), [a, b, as_value(ctx, w, work)], fn, work)


# -- creation -------------------------------------------------------------------------------------------------------


@register(["aten.full.default", "aten.full_like.default", "aten.scalar_tensor.default", "aten.fill.Scalar",
           "aten.zeros.default", "aten.ones.default", "aten.zeros_like.default", "aten.ones_like.default",
           "aten.new_zeros.default", "aten.new_ones.default", "aten.new_full.default"], "create")  # fmt: skip
def _full(ctx: Context, node: Node, *args: Any, **_: Any) -> Value:
    name = node.target.overloadpacket.__name__  # type: ignore[union-attr]
    if "zeros" in name or "ones" in name:
        fill: Any = 1 if "ones" in name else 0
    elif name == "new_full":
        fill = args[2]
    else:
        fill = args[0] if name == "scalar_tensor" else args[1]
    dtype = dtype_of(node)
    value = cast(scalar(ctx, fill, dtype), compute_dtype(dtype))
    return Value(ctx, shape_of(node), dtype, lambda idx: value)


@register(["aten.arange.start_step", "aten.arange.start", "aten.arange.default"], "create")
def _arange(ctx: Context, node: Node, *args: Any, **_: Any) -> Value:
    dtype = dtype_of(node)
    if len(args) == 1:
        args = (0, args[0])
    start, step = args[0], (args[2] if len(args) > 2 else 1)
    if dtype == "b1":
        raise Unsupported("arange of booleans")
    if isinstance(start, float) or isinstance(step, float):
        raise Unsupported("arange with float bounds")

    def at(idx: tuple) -> E:
        e = add(op("mul", (idx[0], scalar(ctx, step, "i64")), "i64"), scalar(ctx, start, "i64"))
        return cast(cast(e, dtype), compute_dtype(dtype))

    return Value(ctx, shape_of(node), dtype, at)


@register("prims.iota.default", "create")
def _iota(ctx: Context, node: Node, length: Any, *, start: Any, step: Any, **_: Any) -> Value:
    return _arange(ctx, node, start, None, step)


@register(["aten.tril.default", "aten.triu.default"], "pointwise")
def _triangle(ctx: Context, node: Node, x: Value, diagonal: Any = 0) -> Value:
    lower = node.target.overloadpacket.__name__ == "tril"  # type: ignore[union-attr]
    work = compute_dtype(dtype_of(node))

    def at(idx: tuple) -> E:
        offset = idx[-1] - idx[-2]
        keep = compare("le" if lower else "ge", offset, scalar(ctx, diagonal, "i64"))
        return where(keep, x.at(idx), Const(0, work))

    return Value(ctx, x.shape, x.dtype, at)
