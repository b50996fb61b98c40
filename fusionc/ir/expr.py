"""Scalar expressions of the loop IR: hash-consed, so equal structure is the same object.

One node says what one element is.  Index arithmetic is kept in a canonical polynomial form (`Index`) with integer
coefficients over *atoms* (loop variables, size symbols, quotients, remainders, loaded integers); sympy is used only
at the edge, where symbolic sizes enter (`fusionc.ir.sizes`).

    Const  Var  Size  Index  FloorDiv  Mod  Load  Op  Reduce  Scan

Every node knows `dtype` (a short name, see DTYPES), `free` (loop variables it depends on that no Reduce inside it
binds) and `level` (how deeply reductions are nested below it; a renderer computes level 1 first).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

DTYPES = ("b1", "u8", "i8", "i16", "i32", "i64", "f16", "bf16", "f32", "f64")
FLOATS = ("f16", "bf16", "f32", "f64")
INTS = ("u8", "i8", "i16", "i32", "i64")
ITEMSIZE = {"b1": 1, "u8": 1, "i8": 1, "i16": 2, "i32": 4, "i64": 8, "f16": 2, "bf16": 2, "f32": 4, "f64": 8}

_table: dict[tuple, Expr] = {}
_NO_VARS: frozenset[Var] = frozenset()


class Expr:
    """Base of all scalar expressions.  Instances are interned: compare with `is`."""

    __slots__ = ("dtype", "free", "level", "uid", "_str")
    dtype: str
    free: frozenset[Var]
    level: int
    uid: int
    _str: Any  # memo of the canonical text (fusionc.ir.text), None until made

    def children(self) -> tuple[Expr, ...]:
        return ()

    def __repr__(self) -> str:
        from .text import expr_text

        return expr_text(self)


def _finish(node: Expr, key: tuple, dtype: str, free: frozenset[Var], level: int) -> None:
    node.dtype, node.free, node.level, node.uid = dtype, free, level, len(_table)
    node._str = None
    _table[key] = node


class Const(Expr):
    """A literal of a given dtype (bool for b1, int for integers, float otherwise; NaN and -0.0 are distinct values)."""

    __slots__ = ("value",)
    value: Any

    def __new__(cls, value: Any, dtype: str) -> Const:
        value = bool(value) if dtype == "b1" else int(value) if dtype in INTS else float(value)
        key = (cls, repr(value), dtype)
        node = _table.get(key)
        if node is None:
            node = object.__new__(cls)
            node.value = value
            _finish(node, key, dtype, _NO_VARS, 0)
        return node  # type: ignore[return-value]


class Var(Expr):
    """A loop variable running over [0, extent)."""

    __slots__ = ("name", "extent")
    name: str
    extent: Index

    def __new__(cls, name: str, extent: Index | int) -> Var:
        extent = index(extent)
        key = (cls, name, extent.uid)
        node = _table.get(key)
        if node is None:
            node = object.__new__(cls)
            node.name, node.extent = name, extent
            _finish(node, key, "i64", _NO_VARS, 0)
            node.free = frozenset((node,))
        return node  # type: ignore[return-value]


class Size(Expr):
    """A size known only at run time: an integer argument of the kernel, at least `lower`."""

    __slots__ = ("name", "lower")
    name: str
    lower: int

    def __new__(cls, name: str, lower: int = 0) -> Size:
        key = (cls, name, lower)
        node = _table.get(key)
        if node is None:
            node = object.__new__(cls)
            node.name, node.lower = name, lower
            _finish(node, key, "i64", _NO_VARS, 0)
        return node  # type: ignore[return-value]


Monomial = tuple[Expr, ...]


class Index(Expr):
    """An int64 polynomial: the sum of coef·atom·atom…; `terms` is sorted, without zero coefficients."""

    __slots__ = ("terms",)
    terms: tuple[tuple[Monomial, int], ...]

    def __new__(cls, terms: tuple[tuple[Monomial, int], ...]) -> Index:
        key = (cls, tuple([(tuple([a.uid for a in m]), c) for m, c in terms]))
        node = _table.get(key)
        if node is None:
            node = object.__new__(cls)
            node.terms = terms
            free: frozenset[Var] = _NO_VARS
            level = 0
            for m, _ in terms:
                for a in m:
                    if a.free:
                        free = free | a.free
                    if a.level > level:
                        level = a.level
            _finish(node, key, "i64", free, level)
        return node  # type: ignore[return-value]

    def children(self) -> tuple[Expr, ...]:
        return tuple(a for m, _ in self.terms for a in m)

    # -- arithmetic ---------------------------------------------------------------------------------------------
    def __add__(self, other: Expr | int) -> Index:
        if type(other) is not Index:
            other = index(other)
        if not other.terms:
            return self
        if not self.terms:
            return other
        acc = dict(self.terms)
        for m, c in other.terms:
            acc[m] = acc.get(m, 0) + c
        return _from_dict(acc)

    __radd__ = __add__

    def __neg__(self) -> Index:
        return self * -1

    def __sub__(self, other: Expr | int) -> Index:
        return self + index(other) * -1

    def __rsub__(self, other: int) -> Index:
        return index(other) - self

    def __mul__(self, other: Expr | int) -> Index:
        if isinstance(other, int):
            if other == 1:
                return self
            if other == 0:
                return ZERO
            return Index(tuple([(m, c * other) for m, c in self.terms]))
        if type(other) is not Index:
            other = index(other)
        if self.is_const:
            return other * self.value
        if other.is_const:
            return self * other.value
        acc: dict[Monomial, int] = {}
        for m1, c1 in self.terms:
            for m2, c2 in other.terms:
                m = tuple(sorted(m1 + m2, key=_uid))
                acc[m] = acc.get(m, 0) + c1 * c2
        return _from_dict(acc)

    __rmul__ = __mul__

    def __floordiv__(self, other: Expr | int) -> Index:
        return floordiv(self, index(other))

    def __mod__(self, other: Expr | int) -> Index:
        return mod(self, index(other))

    # -- queries ------------------------------------------------------------------------------------------------
    @property
    def is_const(self) -> bool:
        return not self.terms or (len(self.terms) == 1 and not self.terms[0][0])

    @property
    def value(self) -> int:
        """The integer this polynomial is.  Raises ValueError when it is not constant."""
        if not self.terms:
            return 0
        if len(self.terms) == 1 and not self.terms[0][0]:
            return self.terms[0][1]
        raise ValueError(f"index {self!r} is not a constant")

    def single_var(self) -> Var | None:
        """The loop variable this index is, if it is exactly one."""
        if len(self.terms) == 1:
            m, c = self.terms[0]
            if c == 1 and len(m) == 1 and isinstance(m[0], Var):
                return m[0]
        return None

    def coefficient(self, var: Var) -> Index | None:
        """d(index)/d(var) if `var` occurs only linearly and outside opaque atoms, else None."""
        acc: dict[Monomial, int] = {}
        for m, c in self.terms:
            n = 0
            for a in m:
                if a is var:
                    n += 1
                elif var in a.free:
                    return None
            if n > 1:
                return None
            if n == 1:
                rest = tuple(a for a in m if a is not var)
                acc[rest] = acc.get(rest, 0) + c
        return _from_dict(acc)


def _uid(e: Expr) -> int:
    return e.uid


def _term_order(t: tuple[Monomial, int]) -> tuple:
    return tuple([a.uid for a in t[0]])


def _from_dict(acc: dict[Monomial, int]) -> Index:
    terms = [(m, c) for m, c in acc.items() if c]
    if len(terms) > 1:
        for m, _ in terms:
            if any(type(a) is Mod for a in m):
                terms = _recombine(dict(terms))
                break
        terms.sort(key=_term_order)
    return Index(tuple(terms))


def _recombine(acc: dict[Monomial, int]) -> list[tuple[Monomial, int]]:
    """d·(e // d) + e % d = e, inside a sum."""
    for m, c in list(acc.items()):
        for pos, a in enumerate(m):
            if type(a) is not Mod or m not in acc or not a.divisor.is_const:
                continue
            rest = index_of_monomial(m[:pos] + m[pos + 1 :])
            quotient = floordiv(a.dividend, a.divisor)
            want = rest * quotient * (c * a.divisor.value)
            if want.terms and all(acc.get(mm, None) == cc for mm, cc in want.terms):
                del acc[m]
                for mm, _ in want.terms:
                    del acc[mm]
                for mm, cc in (rest * a.dividend * c).terms:
                    acc[mm] = acc.get(mm, 0) + cc
                return _recombine({k: v for k, v in acc.items() if v})
    return list(acc.items())


def index_of_monomial(m: Monomial) -> Index:
    return Index(((m, 1),))


ZERO = Index(())
ONE = Index((((), 1),))


def index(x: Index | Expr | int) -> Index:
    """Anything integer as an `Index`."""
    if type(x) is Index:
        return x
    if isinstance(x, int):
        return Index((((), int(x)),)) if x else ZERO
    if isinstance(x, Const):
        return index(int(x.value))
    if isinstance(x, Expr):
        return Index((((x,), 1),))
    raise TypeError(f"{x!r} is not an integer index")


def flat(vars: Iterable[Var]) -> Index:
    """The row-major position of a point of `vars`."""
    out = ZERO
    for v in vars:
        out = out * v.extent + v
    return out


class FloorDiv(Expr):
    """dividend // divisor (rounding towards minus infinity), divisor positive."""

    __slots__ = ("dividend", "divisor")
    dividend: Index
    divisor: Index

    def __new__(cls, dividend: Index, divisor: Index) -> FloorDiv:
        return _divmod_node(cls, dividend, divisor)  # type: ignore[return-value]

    def children(self) -> tuple[Expr, ...]:
        return (self.dividend, self.divisor)


class Mod(Expr):
    """dividend % divisor with the sign of the divisor, divisor positive."""

    __slots__ = ("dividend", "divisor")
    dividend: Index
    divisor: Index

    def __new__(cls, dividend: Index, divisor: Index) -> Mod:
        return _divmod_node(cls, dividend, divisor)  # type: ignore[return-value]

    def children(self) -> tuple[Expr, ...]:
        return (self.dividend, self.divisor)


def _divmod_node(cls: type, dividend: Index, divisor: Index) -> Expr:
    key = (cls, dividend.uid, divisor.uid)
    node: Any = _table.get(key)
    if node is None:
        node = object.__new__(cls)
        node.dividend, node.divisor = dividend, divisor
        _finish(node, key, "i64", dividend.free | divisor.free, max(dividend.level, divisor.level))
    return node


def floordiv(p: Index, d: Index) -> Index:
    """p // d for d > 0, simplified with the ranges of the loop variables."""
    if d is ONE:
        return p
    if p.is_const and d.is_const:
        return index(p.value // d.value)
    whole, rest = _divide_terms(p, d)
    if whole.terms:
        return whole + floordiv(rest, d)
    if _within(rest, d):
        return ZERO
    if len(p.terms) == 1 and p.terms[0][1] == 1 and len(p.terms[0][0]) == 1:
        a = p.terms[0][0][0]
        if type(a) is FloorDiv:  # (x // a) // b = x // (a·b)
            return floordiv(a.dividend, a.divisor * d)
        if type(a) is Mod and a.divisor.is_const and d.is_const and a.divisor.value % d.value == 0:
            return mod(floordiv(a.dividend, d), index(a.divisor.value // d.value))
    if d.is_const and p.terms:
        g = math.gcd(d.value, *[c for _, c in p.terms])
        if g > 1:
            return floordiv(Index(tuple((m, c // g) for m, c in p.terms)), index(d.value // g))
    return index(FloorDiv(p, d))


def mod(p: Index, d: Index) -> Index:
    """p % d for d > 0, simplified with the ranges of the loop variables."""
    if d is ONE:
        return ZERO
    if p.is_const and d.is_const:
        return index(p.value % d.value)
    whole, rest = _divide_terms(p, d)
    if _within(rest, d):
        return rest
    if whole.terms:
        return mod(rest, d)
    if len(p.terms) == 1 and p.terms[0][1] == 1 and len(p.terms[0][0]) == 1:
        a = p.terms[0][0][0]
        if type(a) is Mod and a.divisor.is_const and d.is_const and a.divisor.value % d.value == 0:
            return mod(a.dividend, d)
    if d.is_const and p.terms:
        g = math.gcd(d.value, *[c for _, c in p.terms])
        if g > 1:
            return mod(Index(tuple((m, c // g) for m, c in p.terms)), index(d.value // g)) * g
    return index(Mod(p, d))


def _divide_terms(p: Index, d: Index) -> tuple[Index, Index]:
    """Split p = d·whole + rest, term by term; d may be a constant or a single monomial."""
    if len(d.terms) != 1:
        return (ONE, ZERO) if p is d else (ZERO, p)
    dm, dc = d.terms[0]
    whole: dict[Monomial, int] = {}
    rest: dict[Monomial, int] = {}
    for m, c in p.terms:
        if c % dc == 0:
            left = list(m)
            for a in dm:
                if a in left:
                    left.remove(a)
                else:
                    break
            else:
                key = tuple(left)
                whole[key] = whole.get(key, 0) + c // dc
                continue
        if not dm and not m and abs(c) >= dc:  # constant term: keep only its remainder
            whole[()] = whole.get((), 0) + c // dc
            c = c % dc
            if not c:
                continue
        rest[m] = c
    return _from_dict(whole), _from_dict(rest)


def _within(p: Index, d: Index) -> bool:
    """True when 0 <= p < d is certain."""
    if not p.terms:
        return True
    lo, hi = bounds(p)
    if lo is None or lo < 0:
        return False
    if d.is_const:
        return hi is not None and hi < d.value
    top = upper(p)
    return top is not None and nonnegative(d - 1 - top)


def upper(p: Index) -> Index | None:
    """A bound p <= upper(p) without loop variables, or None; p must be a sum of nonnegative monomials."""
    total = ZERO
    for m, c in p.terms:
        if c < 0:
            return None
        part = index(c)
        for a in m:
            if isinstance(a, Var):
                part = part * (a.extent - 1)
            elif isinstance(a, Mod):
                part = part * (a.divisor - 1)
            elif isinstance(a, Size):
                part = part * index(a)
            else:
                return None
        total = total + part
    return total


def nonnegative(p: Index) -> bool:
    """True when p >= 0 is certain, given the lower bounds of its size symbols."""
    lo, _ = bounds(p)
    if lo is not None and lo >= 0:
        return True
    # s·t - s and the like: substitute s = lower + s' and look at the signs
    acc = ZERO
    for m, c in p.terms:
        part = index(c)
        for a in m:
            if not isinstance(a, Size):
                return False
            part = part * (index(Size(a.name + "'", 0)) + a.lower)
        acc = acc + part
    return all(c >= 0 for _, c in acc.terms)


def bounds(e: Expr) -> tuple[int | None, int | None]:
    """Constant interval that contains an integer expression; None where there is no bound."""
    if isinstance(e, Index):
        lo: int | None = 0
        hi: int | None = 0
        for m, c in e.terms:
            mlo: int | None = 1
            mhi: int | None = 1
            for a in m:
                alo, ahi = bounds(a)
                if alo is None or alo < 0 or mlo is None:
                    if len(m) > 1:
                        return None, None
                    mlo, mhi = alo, ahi
                    continue
                mlo = mlo * alo
                mhi = None if mhi is None or ahi is None else mhi * ahi
            if c < 0:
                mlo, mhi = mhi, mlo
            lo = None if lo is None or mlo is None else lo + c * mlo
            hi = None if hi is None or mhi is None else hi + c * mhi
        return lo, hi
    if isinstance(e, Var):
        _, top = bounds(e.extent)
        return 0, None if top is None else max(top - 1, 0)
    if isinstance(e, Size):
        return e.lower, None
    if isinstance(e, Mod):
        _, top = bounds(e.divisor)
        return 0, None if top is None else top - 1
    if isinstance(e, FloorDiv) and e.divisor.is_const:
        lo, hi = bounds(e.dividend)
        d = e.divisor.value
        return (None if lo is None else lo // d), (None if hi is None else hi // d)
    if isinstance(e, FloorDiv):
        lo, hi = bounds(e.dividend)
        return (0 if lo is not None and lo >= 0 else None), hi
    if isinstance(e, Const):
        return int(e.value), int(e.value)
    if isinstance(e, Op) and e.name == "check_index":
        _, hi = bounds(e.args[1])
        return 0, None if hi is None else hi - 1
    return None, None


class Load(Expr):
    """buffer[index]; where `guard` is given and false, the value is `other` and memory is not touched.

    `dtype` is that of the buffer's elements; `index` counts elements from the buffer's start.
    """

    __slots__ = ("buffer", "index", "guard", "other")
    buffer: str
    index: Index
    guard: Expr | None
    other: Const | None

    def __new__(cls, buffer: str, at: Index, dtype: str, guard: Expr | None = None, other: Const | None = None) -> Load:
        if guard is not None and other is None:
            other = Const(0, dtype)
        key = (cls, buffer, at.uid, dtype, -1 if guard is None else guard.uid, -1 if other is None else other.uid)
        node = _table.get(key)
        if node is None:
            node = object.__new__(cls)
            node.buffer, node.index, node.guard, node.other = buffer, at, guard, other
            free = at.free if guard is None else at.free | guard.free
            _finish(node, key, dtype, free, at.level if guard is None else max(at.level, guard.level))
        return node  # type: ignore[return-value]

    def children(self) -> tuple[Expr, ...]:
        return (self.index,) if self.guard is None else (self.index, self.guard)


class Op(Expr):
    """A pointwise operation; names and typing rules are in `fusionc.ir.ops`."""

    __slots__ = ("name", "args")
    name: str
    args: tuple[Expr, ...]

    def __new__(cls, name: str, args: tuple[Expr, ...], dtype: str) -> Op:
        key = (cls, name, tuple([a.uid for a in args]), dtype)
        node = _table.get(key)
        if node is None:
            node = object.__new__(cls)
            node.name, node.args = name, args
            free: frozenset[Var] = _NO_VARS
            level = 0
            for a in args:
                if a.free:
                    free = free | a.free if free else a.free
                if a.level > level:
                    level = a.level
            _finish(node, key, dtype, free, level)
        return node  # type: ignore[return-value]

    def children(self) -> tuple[Expr, ...]:
        return self.args


REDUCTIONS = ("sum", "prod", "max", "min", "any", "all", "argmax", "argmin")


class Reduce(Expr):
    """Reduce `body` over `vars` (all the axis variables of the kernel, in order).

    max and min propagate NaN; argmax and argmin give the position (int64, counted over `vars` in row-major order) of
    the first extreme element, NaN counting as extreme, as torch does.
    """

    __slots__ = ("kind", "vars", "body")
    kind: str
    vars: tuple[Var, ...]
    body: Expr

    def __new__(cls, kind: str, vars: tuple[Var, ...], body: Expr, dtype: str) -> Reduce:
        assert kind in REDUCTIONS, kind
        key = (cls, kind, tuple([v.uid for v in vars]), body.uid, dtype)
        node = _table.get(key)
        if node is None:
            node = object.__new__(cls)
            node.kind, node.vars, node.body = kind, vars, body
            _finish(node, key, dtype, body.free.difference(vars), body.level + 1)
        return node  # type: ignore[return-value]

    def children(self) -> tuple[Expr, ...]:
        return (self.body,)


class Scan(Expr):
    """Inclusive prefix `kind` (sum, prod, max, min) of `body` along `var`, at the current position of `var`."""

    __slots__ = ("kind", "var", "body")
    kind: str
    var: Var
    body: Expr

    def __new__(cls, kind: str, var: Var, body: Expr, dtype: str) -> Scan:
        key = (cls, kind, var.uid, body.uid, dtype)
        node = _table.get(key)
        if node is None:
            node = object.__new__(cls)
            node.kind, node.var, node.body = kind, var, body
            _finish(node, key, dtype, body.free | {var}, body.level)
        return node  # type: ignore[return-value]

    def children(self) -> tuple[Expr, ...]:
        return (self.body,)


# -- traversal ----------------------------------------------------------------------------------------------------


def walk(roots: Iterable[Expr]) -> Iterator[Expr]:
    """Every distinct node below `roots`, children before parents."""
    seen: set[int] = set()
    stack: list[tuple[Expr, bool]] = [(r, False) for r in reversed(list(roots))]
    while stack:
        node, done = stack.pop()
        if done:
            yield node
            continue
        if node.uid in seen:
            continue
        seen.add(node.uid)
        stack.append((node, True))
        for c in reversed(node.children()):
            if c.uid not in seen:
                stack.append((c, False))


_DEEP = 64  # levels of an expression that are rewritten by recursion


class Rewriter:
    """Bottom-up rewriting with a memo; `leaf` may replace a node before its children are visited (None: go on)."""

    def __init__(self, leaf: Callable[[Expr], Expr | None]):
        self.leaf = leaf
        self.memo: dict[int, Expr] = {}
        self._depth = 0

    def __call__(self, e: Expr) -> Expr:
        out = self.memo.get(e.uid)
        if out is None:
            out = self.leaf(e)
            if out is None:
                self._depth += 1
                if self._depth == _DEEP:  # the rest without recursion: what a node asks for is in the memo by then
                    for below in walk(e.children()):
                        self(below)
                out = self._rebuild(e)
                self._depth -= 1
            self.memo[e.uid] = out
        return out

    def index(self, e: Expr) -> Index:
        return index(self(e))

    def _rebuild(self, e: Expr) -> Expr:
        if isinstance(e, Index):
            total = ZERO
            for m, c in e.terms:
                part = index(c)
                for a in m:
                    part = part * self.index(a)
                total = total + part
            return total
        if isinstance(e, FloorDiv):
            return floordiv(self.index(e.dividend), self.index(e.divisor))
        if isinstance(e, Mod):
            return mod(self.index(e.dividend), self.index(e.divisor))
        if isinstance(e, Load):
            guard = None if e.guard is None else self(e.guard)
            if isinstance(guard, Const):
                if not guard.value:
                    assert e.other is not None
                    return e.other
                guard = None
            return Load(e.buffer, self.index(e.index), e.dtype, guard, e.other if guard is not None else None)
        if isinstance(e, Op):
            from .ops import op

            return op(e.name, tuple([self(a) for a in e.args]), e.dtype)
        if isinstance(e, Reduce):
            vars: list[Var] = []
            for v in e.vars:
                new = self(v)
                for t in _vars_in_order(new):
                    vars.append(t)
            return Reduce(e.kind, tuple(vars), self(e.body), e.dtype)
        if isinstance(e, Scan):
            renamed = self.index(e.var).single_var()
            assert renamed is not None, "a scan variable may only be renamed"
            return Scan(e.kind, renamed, self(e.body), e.dtype)
        return e


def _vars_in_order(e: Expr) -> list[Var]:
    """Loop variables of a replacement for a bound variable, slowest first (largest coefficient first)."""
    if isinstance(e, Var):
        return [e]
    assert isinstance(e, Index)
    out: list[tuple[int, Var]] = []
    for m, c in e.terms:
        assert len(m) == 1 and isinstance(m[0], Var), f"cannot bind {e!r}"
        out.append((c, m[0]))
    return [v for _, v in sorted(out, key=lambda t: -t[0])]


def substitute(e: Expr, mapping: dict[Var, Index] | dict[Var, Var]) -> Expr:
    """Replace loop variables; bound variables are replaced in their binders too."""
    if not mapping:
        return e
    return Rewriter(lambda n: mapping.get(n) if isinstance(n, Var) else None)(e)  # type: ignore[arg-type]
