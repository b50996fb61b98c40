"""What attention does to a raw score before the softmax, as a small expression that prints, parses, runs and derives.

A score expression is a function of the raw score ``s = q·k`` (float32), the positions ``q`` and ``k`` (integers) and the
elements of further tensors (``xf0``, ``xi1``, ``xb2``: operand number with its kind, float, integer or bool), each of them
broadcast over batch, head, query and key. As text: ``(where (le k q) (add (mul s 0.125) xf0) -inf)``. It travels
as a string argument of ``fusionc::attention``; the reference evaluates it with torch, ``codegen/templates/attention.py``
renders it into a kernel, and ``live`` says which (query, key) pairs can have weight at all, so that kernels may skip tiles.

The idea of a score function as the slot of a flash kernel is FlexAttention's (Dong et al., arXiv 2412.05496); here it is
found in plain operators instead of written by the user, and skipping is proved from the expression.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

INF = math.inf
LOG2E = 1.4426950408889634
_MAX32 = 3.4e38
_FLOAT1 = ("tanh", "exp", "log", "sqrt", "sigmoid")
_COMPARE = {"lt": "ge", "le": "gt", "gt": "le", "ge": "lt", "eq": "ne", "ne": "eq"}  # operator -> its negation
_ARITHMETIC = ("add", "sub", "mul", "min", "max")
_ARITY = {**dict.fromkeys((*_ARITHMETIC, *_COMPARE, "div", "fdiv", "mod", "and", "or"), 2),
          **dict.fromkeys((*_FLOAT1, "neg", "abs", "not", "float"), 1), "where": 3}  # fmt: skip


class Unsupported(Exception):
    """The expression has no form here; the text says why."""


@dataclass(frozen=True)
class Term:
    """One node: operator, operands, and for leaves the number. ``kind`` is "f", "i" or "b"."""

    op: str
    args: tuple[Term, ...] = ()
    value: float | int | bool = 0
    kind: str = "f"

    def __str__(self) -> str:
        if self.op == "const":
            return ("true" if self.value else "false") if self.kind == "b" else repr(self.value)
        if self.op == "load":
            return f"x{self.kind}{self.value}"
        return f"({self.op} {' '.join(map(str, self.args))})" if self.args else self.op

    @functools.cached_property
    def leaves(self) -> frozenset[Term]:
        """The leaves it is made of, constants aside."""
        if self.args:
            return frozenset().union(*[a.leaves for a in self.args])
        return frozenset() if self.op == "const" else frozenset((self,))


S, Q, K, T = Term("s"), Term("q", kind="i"), Term("k", kind="i"), Term("t")  # t: gradient from above, in derivatives


def load(number: int, kind: str) -> Term:
    """Element of operand ``number``."""
    return Term("load", (), number, kind)


def const(value: float | int | bool) -> Term:
    """A number; its Python type is its kind."""
    kind = "b" if isinstance(value, bool) else "i" if isinstance(value, int) else "f"
    return Term("const", (), value, kind)


def _is(term: Term, value: float) -> bool:
    return term.op == "const" and term.kind != "b" and term.value == value


def as_float(x: Term) -> Term:
    """The value as a float."""
    if x.kind == "f":
        return x
    if x.op == "const":
        return const(float(x.value))
    if x.kind == "b":
        return _from_bool(x, "f")
    if x.op in ("add", "sub", "neg") and x.leaves <= {Q, K}:  # float32 is exact for positions; converting rows is cheaper
        return Term(x.op, tuple(map(as_float, x.args)), 0, "f")
    return Term("float", (x,), 0, "f")


def as_bool(x: Term) -> Term:
    """x != 0."""
    if x.kind == "b":
        return x
    return make("ne", x, const(0) if x.kind == "i" else const(0.0))


def _nonnegative(x: Term) -> bool:
    if x.op in ("q", "k"):
        return True
    if x.op == "const":
        return x.value >= 0
    return x.op in ("add", "mul", "fdiv", "mod", "max", "min") and all(map(_nonnegative, x.args))


def make(op: str, *args: Term) -> Term:
    """The simplified expression with torch's promotion of kinds. Raises Unsupported."""
    if op not in _ARITY or len(args) != _ARITY[op]:
        raise Unsupported(f"operator {op} is not understood in scores")
    if op == "where":
        return _where(as_bool(args[0]), *_promote(args[1:]))
    if op == "float":
        return as_float(args[0])
    if op in ("and", "or", "not"):
        return _logic(op, *map(as_bool, args))
    if op in _FLOAT1 or op == "div":
        args = tuple(map(as_float, args))
    elif len(args) == 2:
        args = _promote(args)
    if args[0].kind == "b" and op not in ("eq", "ne"):
        raise Unsupported("arithmetic on truth values")
    kind = "b" if op in _COMPARE else args[0].kind
    if op in ("fdiv", "mod") and not (kind == "i" and all(map(_nonnegative, args)) and args[1].op == "const"
                                      and args[1].value > 0):  # fmt: skip
        raise Unsupported("rounded division other than of positions by a number")
    if all(a.op == "const" for a in args):
        return _folded(op, args, kind)
    return _simplified(op, args, kind)


def _promote(args: Sequence[Term]) -> tuple[Term, ...]:
    kinds = {a.kind for a in args}
    if len(kinds) == 1:
        return tuple(args)
    if "f" in kinds:
        return tuple(_from_bool(a, "f") if a.kind == "b" else as_float(a) for a in args)
    return tuple(_from_bool(a, "i") if a.kind == "b" else a for a in args)


def _from_bool(x: Term, kind: str) -> Term:
    one, zero = (const(1.0), const(0.0)) if kind == "f" else (const(1), const(0))
    return _where(x, one, zero)


def _folded(op: str, args: Sequence[Term], kind: str) -> Term:
    try:
        found = evaluate(Term(op, tuple(args), 0, kind), {}).item()
    except (RuntimeError, ZeroDivisionError) as e:
        raise Unsupported(f"a constant cannot be computed ({e})") from e
    return const({"f": float, "i": int, "b": bool}[kind](found))


def _logic(op: str, *args: Term) -> Term:
    if op == "not":
        (x,) = args
        if x.op == "const":
            return const(not x.value)
        if x.op in _COMPARE and x.args[0].kind == "i":  # not of floats: NaN compares neither way
            return Term(_COMPARE[x.op], x.args, 0, "b")
        return x.args[0] if x.op == "not" else Term("not", (x,), 0, "b")
    a, b = args
    for x, y in ((a, b), (b, a)):
        if x.op == "const":
            return y if bool(x.value) == (op == "and") else x
    return a if a == b else Term(op, (a, b), 0, "b")


def _where(c: Term, a: Term, b: Term) -> Term:
    if c.op == "const":
        return a if c.value else b
    if a == b:
        return a
    if a.kind == "b" and a.op == b.op == "const":
        return c if a.value else make("not", c)
    if c.op == "not":
        return _where(c.args[0], b, a)
    return Term("where", (c, a, b), 0, a.kind)


def _simplified(op: str, args: tuple[Term, ...], kind: str) -> Term:
    a, b = (*args, args[0])[:2]
    if op == "sub" and b.op == "const":
        op, b = "add", const(-b.value)
    if op == "div" and b.op == "const" and b.value:
        op, b = "mul", const(1.0 / b.value)
    if op == "add":
        if _is(a, 0) or _is(b, 0):
            return b if _is(a, 0) else a
        for x, y in ((a, b), (b, a)):  # + where(c, 0, -inf): the mask as a choice
            if x.op == "where" and y.op != "const":
                c, u, v = x.args
                if _is(v, -INF) and u.op == "const":
                    return _where(c, make("add", y, u), v)
                if _is(u, -INF) and v.op == "const":
                    return _where(c, u, make("add", y, v))
    if op in ("ge", "lt") and _nonnegative(a) and b.op == "const" and b.value <= 0:
        return const(op == "ge")
    if op == "mul":
        for x, y in ((a, b), (b, a)):
            if _is(x, 1):
                return y
            if x.op == "const" and y.op == "mul" and y.args[1].op == "const" and kind == "f":
                return make("mul", y.args[0], const(x.value * y.args[1].value))
            # (1 - mask) * -1e9 and its like: choices of constants stay choices of constants
            if x.op == "const" and y.op == "where" and all(z.op == "const" for z in y.args[1:]):
                return _where(y.args[0], *[make("mul", z, x) for z in y.args[1:]])
        if a.op == "const":
            a, b = b, a
    if op in ("add", "sub"):
        for x, y, first in ((a, b, True), (b, a, False)):
            if x.op == "where" and all(z.op == "const" for z in x.args[1:]) and y.op == "const":
                return _where(x.args[0], *[make(op, z, y) if first else make(op, y, z) for z in x.args[1:]])
    if op == "neg" and a.op == "where" and all(z.op == "const" for z in a.args[1:]):
        return _where(a.args[0], *[make("neg", z) for z in a.args[1:]])
    if op in ("eq", "ne", "gt", "lt") and a.op == "where" and b.op == "const" and all(z.op == "const" for z in a.args[1:]):
        return _where(a.args[0], *[make(op, z, b) for z in a.args[1:]])
    return Term(op, args if len(args) == 1 else (a, b), 0, kind)


# -- text -------------------------------------------------------------------------------------------------------------

_TOKEN = re.compile(r"\(|\)|[^\s()]+")
_LOAD = re.compile(r"x([fib])(\d{1,2})")


@functools.lru_cache(maxsize=1024)
def parse(text: str) -> Term:
    """The expression that prints as ``text``. Raises ValueError for anything else."""
    if len(text) > 20_000:
        raise ValueError("a score expression is too long")
    tokens = _TOKEN.findall(text)
    position = 0

    def read(depth: int) -> Term:
        nonlocal position
        if position >= len(tokens) or depth > 200:
            raise ValueError("a score expression ends early or is nested too deeply")
        token = tokens[position]
        position += 1
        if token != "(":
            return _leaf(token)
        op = tokens[position] if position < len(tokens) else ""
        position += 1
        if op not in _ARITY:
            raise ValueError(f"{op!r} is no operator of score expressions")
        args = tuple(read(depth + 1) for _ in range(_ARITY[op]))
        if position >= len(tokens) or tokens[position] != ")":
            raise ValueError(f"{op} takes {_ARITY[op]} operands")
        position += 1
        kind = "b" if op in _COMPARE or op in ("and", "or", "not") else "f" if op == "float" else args[-1].kind
        return Term(op, args, 0, kind)

    found = read(0)
    if position != len(tokens):
        raise ValueError("text after the end of a score expression")
    return found


def _leaf(token: str) -> Term:
    plain = {"s": S, "q": Q, "k": K, "t": T, "true": const(True), "false": const(False)}.get(token)
    if plain is not None:
        return plain
    found = _LOAD.fullmatch(token)
    if found is not None:
        return load(int(found.group(2)), found.group(1))
    if re.fullmatch(r"-?\d{1,18}", token):
        return const(int(token))
    return const(float(token))


# -- values -----------------------------------------------------------------------------------------------------------

_TORCH: dict[str, Callable[..., Any]] = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "min": torch.minimum, "max": torch.maximum, "div": torch.div,
    "lt": torch.lt, "le": torch.le, "gt": torch.gt, "ge": torch.ge, "eq": torch.eq, "ne": torch.ne, "neg": torch.neg,
    "and": torch.logical_and, "or": torch.logical_or, "not": torch.logical_not, "abs": torch.abs, "tanh": torch.tanh,
    "exp": torch.exp, "log": torch.log, "sqrt": torch.sqrt, "sigmoid": torch.sigmoid, "where": torch.where,
    "fdiv": functools.partial(torch.div, rounding_mode="floor"), "mod": torch.remainder,
}  # fmt: skip


def evaluate(term: Term, leaves: Mapping[Term, torch.Tensor], wide: torch.dtype = torch.float64) -> torch.Tensor:
    """The value for tensors of the leaves, broadcast together; floats are computed in ``wide``."""
    memo: dict[Term, torch.Tensor] = {}

    def value(x: Term) -> torch.Tensor:
        found = memo.get(x)
        if found is None:
            if x.op == "const":
                found = torch.tensor(x.value, dtype={"f": wide, "i": torch.int64, "b": torch.bool}[x.kind])
                like = next(iter(leaves.values()), None)
                found = found if like is None else found.to(like.device)
            elif not x.args:
                found = leaves[x].to(wide) if x.kind == "f" else leaves[x]
            elif x.op == "float":
                found = value(x.args[0]).to(wide)
            else:
                found = _TORCH[x.op](*map(value, x.args))
            memo[x] = found
        return found

    return value(term)


# -- derivatives ------------------------------------------------------------------------------------------------------


def gradient(term: Term, wrt: Term) -> Term:
    """t · ∂term/∂wrt as an expression of the same leaves and ``t``. A masked place gives 0 whatever t is there.

    At ties of minimum and maximum all of the gradient goes to the first operand.
    """
    zero = const(0.0)

    def back(x: Term, t: Term) -> Term:
        if x == wrt:
            return t
        if wrt not in x.leaves:
            return zero
        a, b = (*x.args, None, None)[:2]
        assert a is not None
        match x.op:
            case "float":
                return zero
            case "neg":
                return back(a, make("neg", t))
            case "abs":
                return back(a, make("where", make("lt", a, zero), make("neg", t), t))
            case "tanh":
                return back(a, make("mul", t, make("sub", const(1.0), make("mul", x, x))))
            case "exp":
                return back(a, make("mul", t, x))
            case "log":
                return back(a, make("div", t, a))
            case "sqrt":
                return back(a, make("div", make("mul", t, const(0.5)), x))
            case "sigmoid":
                return back(a, make("mul", t, make("mul", x, make("sub", const(1.0), x))))
            case "where":
                return make("where", a, back(x.args[1], t), back(x.args[2], t))
        assert b is not None
        match x.op:
            case "add":
                return make("add", back(a, t), back(b, t))
            case "sub":
                return make("add", back(a, t), back(b, make("neg", t)))
            case "mul":
                return make("add", back(a, make("mul", t, b)), back(b, make("mul", t, a)))
            case "div":
                first = make("div", t, b)
                return make("add", back(a, first), back(b, make("neg", make("mul", first, x))))
            case "min" | "max":
                c = make("le" if x.op == "min" else "ge", a, b)
                return make("where", c, back(a, t), back(b, t))
        raise Unsupported(f"{x.op} has no derivative here")

    return back(term, T)


def scaled(x: Term, c: float) -> Term:
    """c·x for c > 0, the factor pushed to where it costs least; finite constants stay finite in float32."""
    if x.op == "const":
        value = float(x.value) * c
        return const(max(-_MAX32, min(_MAX32, value)) if math.isfinite(value) else value)
    match x.op:
        case "add" | "sub":
            return make(x.op, *[scaled(as_float(a), c) for a in x.args])
        case "neg":
            return make("neg", scaled(x.args[0], c))
        case "where":
            return make("where", x.args[0], *[scaled(a, c) for a in x.args[1:]])
        case "mul":
            a, b = x.args
            if b.op == "const":
                return make("mul", a, const(float(b.value) * c))
            few = min((a, b), key=lambda y: (S in y.leaves, Q in y.leaves and K in y.leaves, len(y.leaves)))
            return make("mul", b if few is a else a, make("mul", few, const(c)))
    return make("mul", x, const(c))


# -- what can be skipped ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Live:
    """Where weight can be: lower ≤ k - q ≤ upper (None: no bound); elsewhere the score is at most ``fill``.

    ``inside`` is the expression for places within the bounds.
    """

    lower: int | None
    upper: int | None
    fill: float
    inside: Term

    @property
    def bounded(self) -> bool:
        """Is there anything to skip?"""
        return self.lower is not None or self.upper is not None


def live(term: Term) -> Live:
    """The band of pairs that can have weight, proved from the structure of the expression."""
    found = _live(term)
    usable = found is not None and found.fill <= -1e4 and found.bounded
    return found if found is not None and usable else Live(None, None, -INF, term)


def _both(a: Live, b: Live, inside: Term, fill: float) -> Live:
    lowers = [x.lower for x in (a, b) if x.lower is not None]
    uppers = [x.upper for x in (a, b) if x.upper is not None]
    return Live(max(lowers, default=None), min(uppers, default=None), fill, inside)


def _live(x: Term) -> Live | None:
    if x.op == "where":
        c, a, b = x.args
        for kept, dead, positive in ((a, b, True), (b, a, False)):
            if dead.op == "const" and dead.value <= -1e4:
                lower, upper, rest = _band(c, positive)
                inner = _live(kept) or Live(None, None, -INF, kept)
                inside = inner.inside
                if rest is not None:
                    inside = _where(rest, inside, dead) if positive else _where(rest, dead, inside)
                fill = max(float(dead.value), inner.fill) if inner.bounded else float(dead.value)
                return _both(Live(lower, upper, fill, x), inner, inside, fill)
    if x.op == "mul" and x.args[1].op == "const" and x.args[1].value > 0:
        part, c = _live(x.args[0]), x.args[1]
        if part is not None:
            return Live(part.lower, part.upper, part.fill * c.value, make("mul", part.inside, c))
    if x.op == "add":
        a, b = x.args
        first, second = _live(a), _live(b)
        fills = [part.fill for part in (first, second) if part is not None and part.bounded]
        if fills and max(fills) <= -65504:  # float16's lowest number; at most half of it is taken back by what is added
            first, second = first or Live(None, None, -INF, a), second or Live(None, None, -INF, b)
            return _both(first, second, make("add", first.inside, second.inside), max(fills) / 2)
    return None


def _band(c: Term, positive: bool) -> tuple[int | None, int | None, Term | None]:
    """Bounds of k - q wherever ``c`` is (or is not), and the condition that is left to test within them (None: none)."""
    if c.op == "not":
        lower, upper, rest = _band(c.args[0], not positive)
        return lower, upper, None if rest is None else c
    if c.op == ("and" if positive else "or"):
        parts = [_band(a, positive) for a in c.args]
        rests = [p[2] for p in parts if p[2] is not None]
        rest = None if not rests else rests[0] if len(rests) == 1 else Term(c.op, tuple(rests), 0, "b")
        lowers = [p[0] for p in parts if p[0] is not None]
        uppers = [p[1] for p in parts if p[1] is not None]
        return max(lowers, default=None), min(uppers, default=None), rest
    if c.op in ("and", "or"):  # either may hold: the hull
        (l1, u1, _), (l2, u2, _) = (_band(a, positive) for a in c.args)
        return (None if l1 is None or l2 is None else min(l1, l2), None if u1 is None or u2 is None else max(u1, u2), c)
    if c.op in _COMPARE:
        found = _compare_band(c.op if positive else _COMPARE[c.op], *c.args)
        if found is not None:
            return (*found, None)
    return None, None, c


def _compare_band(op: str, a: Term, b: Term) -> tuple[int | None, int | None] | None:
    """Bounds of d = k - q for ``a op b``, or None if it says something else."""
    if b.op == "abs" and a.op == "const":
        a, b, op = b, a, {"lt": "gt", "le": "ge", "gt": "lt", "ge": "le"}.get(op, op)
    if a.op == "abs" and b.op == "const" and op in ("lt", "le"):
        form = _affine(a.args[0])
        if form is not None and form[:2] in ((-1, 1), (1, -1)):
            shift = form[2] if form[1] == 1 else -form[2]
            return -_floor(b.value + shift, op == "lt"), _floor(b.value - shift, op == "lt")
        return None
    first, second = _affine(a), _affine(b)
    if first is None or second is None:
        return None
    cq, ck, c0 = (x - y for x, y in zip(first, second))
    if (cq, ck) == (1, -1):  # -d + c0 op 0
        op, c0 = {"lt": "gt", "le": "ge", "gt": "lt", "ge": "le"}.get(op, op), -c0
    elif (cq, ck) != (-1, 1):
        return None
    match op:  # d + c0 op 0
        case "lt" | "le":
            return None, _floor(-c0, op == "lt")
        case "gt" | "ge":
            return -_floor(c0, op == "gt"), None
        case "eq" if c0 == int(c0):
            return int(-c0), int(-c0)
    return None


def _floor(x: float, strict: bool) -> int:
    """The largest integer ≤ x (< x if strict)."""
    return math.ceil(x) - 1 if strict else math.floor(x)


def _affine(x: Term) -> tuple[int, int, float] | None:
    """(a, b, c) with x = a·q + b·k + c."""
    if x.op == "const" and x.kind != "b" and math.isfinite(x.value):
        return 0, 0, x.value
    if x.op in ("q", "k"):
        return (1, 0, 0) if x.op == "q" else (0, 1, 0)
    parts = [_affine(a) for a in x.args]
    if x.op == "float":
        return parts[0]
    if x.op not in ("add", "sub", "neg", "mul") or any(p is None for p in parts):
        return None
    (a, *rest) = [p for p in parts if p is not None]
    if x.op == "neg":
        return -a[0], -a[1], -a[2]
    b = rest[0]
    if x.op == "mul":
        if b[:2] != (0, 0) or b[2] != int(b[2]):
            return None
        return a[0] * int(b[2]), a[1] * int(b[2]), a[2] * b[2]
    sign = 1 if x.op == "add" else -1
    return a[0] + sign * b[0], a[1] + sign * b[1], a[2] + sign * b[2]
