"""Give a kernel the loops that its memory accesses want: no trivial loops, affine indices, long runs, memory order.

    drop     loops and axis variables of extent 1
    split    v = d·v1 + v0 where v // d, v % d or a guard v < d makes the indices piecewise, so that they become affine
    order    loops (and axis variables, where the order does not matter) by the strides of the largest access
    merge    two variables that every index sees as one: o·n + i
    rename   x0, x1, … and r0, r1, …

The steps repeat until nothing changes.  Values are unchanged: positions (argmax) count the axis in row-major order, so
the axis of a kernel with argmax or argmin or a scan keeps its linear order.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from .expr import (
    ITEMSIZE,
    ONE,
    ZERO,
    Const,
    Expr,
    FloorDiv,
    Index,
    Load,
    Mod,
    Monomial,
    Op,
    Reduce,
    Rewriter,
    Scan,
    Size,
    Var,
    bounds,
    index,
)
from .loop import Kernel, Store
from .ops import cast, op

_MIN_GUARD_RUN = 8  # a guard splits a loop only if the runs stay long enough for SIMD
_GUESS = 1024  # stands for sizes that are known only at run time, in comparisons of strides


def simplify(kernel: Kernel) -> Kernel:
    """An equal kernel with simpler loops; the same object if there is nothing to do."""
    if kernel.columns:
        return kernel  # made of simplified kernels (fusionc.schedule.columns)
    out = kernel
    for _ in range(8):
        before = out
        out = _rename(_merge(_order(_split(_drop(out)))))
        if out is before:
            break
    return out


# -- rewriting ----------------------------------------------------------------------------------------------------


class _Replace(Rewriter):
    """Replaces variables; reductions get the new axis, or vanish when it is empty."""

    def __init__(self, mapping: dict[Var, Index], axis: tuple[Var, ...]):
        super().__init__(self._leaf)
        self.mapping, self.axis = mapping, axis

    def _leaf(self, e: Expr) -> Expr | None:
        if isinstance(e, Var):
            return self.mapping.get(e, e)
        if isinstance(e, Reduce):
            body = self(e.body)
            if self.axis:
                return Reduce(e.kind, self.axis, body, e.dtype)
            return ZERO if e.kind in ("argmax", "argmin") else cast(body, e.dtype)
        if isinstance(e, Scan):
            new = self.index(e.var)
            if not new.terms:
                return cast(self(e.body), e.dtype)
        if isinstance(e, Op) and e.name in _COMPARES and e.args[0].dtype == "i64":
            a, b = self(e.args[0]), self(e.args[1])
            return _compare(e.name, a, b) if e.name in ("lt", "ge") else _compare(_COMPARES[e.name], b, a)
        return None


_COMPARES = {"lt": "lt", "ge": "ge", "gt": "lt", "le": "ge"}


def _compare(name: str, a: Expr, b: Expr) -> Expr:
    """a < b or a >= b, without the variables that cannot change the outcome: 8·q + r < 16 with 0 <= r < 8 is q < 2."""
    if isinstance(a, Index) and isinstance(b, Index) and a.terms:
        limit = b - a  # a < b is limit >= 1
        c = dict(limit.terms).get((), 0)
        terms = [(m, f) for m, f in limit.terms if m]
        for d in sorted({abs(f) for _, f in terms if abs(f) > 1}, reverse=True):
            whole = Index(tuple([(m, f // d) for m, f in terms if f % d == 0]))
            rest = Index(tuple([(m, f) for m, f in terms if f % d]))
            lo, hi = bounds(rest)
            if lo is None or hi is None:
                continue
            # limit = d·(whole + k) + (rest + c - d·k); with that bracket in [1, d], limit >= 1 is whole + k >= 0
            part = 1 - lo + (c - 1 + lo) % d
            if part + hi > d:
                continue
            k = (c - part) // d
            if whole.terms[0][1] < 0:
                return op(name, (-whole, index(k + 1)), "b1")
            return op("ge" if name == "lt" else "lt", (whole, index(-k)), "b1")
    return op(name, (a, b), "b1")


def _apply(kernel: Kernel, mapping: dict[Var, Index], loops: tuple[Var, ...], axis: tuple[Var, ...]) -> Kernel:
    rewrite = _Replace(mapping, axis)
    stores = tuple(
        [Store(s.buffer, rewrite.index(s.index), rewrite(s.value), s.inner and bool(axis)) for s in kernel.stores]
    )
    return Kernel(kernel.buffers, kernel.sizes, loops, axis, stores)


# -- steps --------------------------------------------------------------------------------------------------------


def _drop(k: Kernel) -> Kernel:
    if k.axis and not k.reductions and not k.scans and all(s.inner for s in k.stores):
        stores = tuple([Store(s.buffer, s.index, s.value, False) for s in k.stores])
        k = Kernel(k.buffers, k.sizes, k.loops + k.axis, (), stores)
    gone = {v: ZERO for v in k.loops + k.axis if v.extent is ONE}
    if not gone:
        return k
    return _apply(k, gone, tuple(v for v in k.loops if v not in gone), tuple(v for v in k.axis if v not in gone))


def _divide(a: Index, b: Index) -> Index | None:
    """a / b if b is a single term that divides a exactly."""
    if len(b.terms) != 1:
        return ONE if a is b else None
    ((m, c),) = b.terms
    out: list[tuple[Monomial, int]] = []
    for am, ac in a.terms:
        rest = list(am)
        for x in m:
            if x not in rest:
                return None
            rest.remove(x)
        if ac % c:
            return None
        out.append((tuple(rest), ac // c))
    return Index(tuple(sorted(out, key=lambda t: tuple([x.uid for x in t[0]]))))


def _is_size(d: Index) -> bool:
    return all(isinstance(a, Size) for m, _ in d.terms for a in m) and len(d.terms) == 1 and d.terms[0][1] > 0


def _split(k: Kernel) -> Kernel:
    wanted: dict[Var, list[Index]] = {}

    def want(p: Index, d: Index) -> None:
        v = p.single_var()
        if v is not None and _is_size(d) and d not in wanted.setdefault(v, []):
            wanted[v].append(d)

    for n in k.nodes:
        if isinstance(n, (FloorDiv, Mod)):
            want(n.dividend, n.divisor)
            inner = n.dividend.terms[0][0][:1] if len(n.dividend.terms) == 1 and n.dividend.terms[0][1] == 1 else ()
            if len(inner) == 1 and len(n.dividend.terms[0][0]) == 1 and isinstance(inner[0], FloorDiv):
                q = inner[0]  # (v // a) % b  needs a and a·b
                want(q.dividend, q.divisor)
                want(q.dividend, q.divisor * n.divisor)
        elif isinstance(n, Op) and n.name in ("lt", "ge", "gt", "le") and isinstance(n.args[0], (Index, Const)):
            if isinstance(n.args[1], (Index, Const)):
                _want_guard(n, want)
    scanned = {s.var for s in k.scans}
    mapping: dict[Var, Index] = {}
    parts: dict[Var, tuple[Var, ...]] = {}
    for v, ds in wanted.items():
        if v in scanned:
            continue
        chain = _chain(v.extent, ds)
        if not chain:
            continue
        # v = chain[-1]·v_n + … + v_0; names only have to be new, the last step renames
        total, bound, pieces = ZERO, ONE, []
        for i, d in enumerate([*chain, v.extent]):
            extent = _divide(d, bound)
            assert extent is not None
            piece = Var(f"{v.name}_{i}", extent)
            pieces.append(piece)
            total = total + bound * index(piece)
            bound = d
        mapping[v], parts[v] = total, tuple(reversed(pieces))
    if not mapping:
        return k
    loops = tuple([p for v in k.loops for p in parts.get(v, (v,))])
    axis = tuple([p for v in k.axis for p in parts.get(v, (v,))])
    return _apply(k, mapping, loops, axis)


def _want_guard(n: Op, want: Callable[[Index, Index], None]) -> None:
    """A comparison that changes at v = t wants v cut into runs that t is a multiple of."""
    p = index(n.args[0]) - index(n.args[1])
    const = dict(p.terms).get((), 0)
    v, t = (p - const).single_var(), -const
    below = n.name in ("lt", "ge")  # v < t or v >= t, else v <= t or v > t
    if v is None:
        v, t, below = (const - p).single_var(), const, not below
    if v is None or not v.extent.is_const:
        return
    t = t if below else t + 1
    if 0 < t < v.extent.value:
        d = math.gcd(t, v.extent.value)
        if d >= _MIN_GUARD_RUN:
            want(index(v), index(d))


def _chain(extent: Index, ds: list[Index]) -> list[Index]:
    """The longest prefix-greedy chain of proper divisors of `extent`, each dividing the next."""
    chain: list[Index] = []
    for d in sorted(ds, key=lambda d: (_guess(d), d.uid)):
        if d is ONE or d is extent or _divide(extent, d) is None:
            continue
        if not chain or (d is not chain[-1] and _divide(d, chain[-1]) is not None):
            chain.append(d)
    return chain


def _direct(e: Index) -> dict[Var, Index]:
    """The coefficient of every variable that occurs directly (not inside an opaque atom)."""
    acc: dict[Var, dict[Monomial, int]] = {}
    for m, c in e.terms:
        for i, a in enumerate(m):
            if isinstance(a, Var):
                rest = m[:i] + m[i + 1 :]
                acc.setdefault(a, {})[rest] = c
    return {v: Index(tuple(sorted(t.items(), key=lambda t: tuple([x.uid for x in t[0]])))) for v, t in acc.items()}


def _guess(e: Index) -> int:
    """The value of a stride or size, sizes taken as _GUESS; opaque values as 1."""
    total = 0
    for m, c in e.terms:
        for a in m:
            if isinstance(a, Size):
                c *= _GUESS
        total += c
    return total


def _order(k: Kernel) -> Kernel:
    """Sort loops by the strides of the largest access, and the axis too where its order is free."""
    axis_free = len(k.axis) > 1 and not k.scans and not any(r.kind in ("argmax", "argmin") for r in k.reductions)
    if len(k.loops) < 2 and not axis_free:
        return k
    best: tuple[int, int] = (-1, 0)
    strides: dict[Var, Index] = {}
    sized = {v: max(_guess(v.extent), 1) for v in k.loops + k.axis}
    accesses = [(s.index, ITEMSIZE[k.buffer(s.buffer).dtype], 1) for s in k.stores]
    accesses += [(n.index, ITEMSIZE[n.dtype], 0) for n in k.nodes if isinstance(n, Load)]
    for at, weight, is_store in accesses:
        direct = _direct(at)
        for v in direct:
            weight *= sized[v]
        if (weight, is_store) > best:
            best, strides = (weight, is_store), direct

    def stride(v: Var) -> int:
        c = strides.get(v)
        return 1 << 62 if c is None else abs(_guess(c))

    loops = tuple(sorted(k.loops, key=lambda v: -stride(v)))
    axis = tuple(sorted(k.axis, key=lambda v: -stride(v))) if axis_free else k.axis
    if loops == k.loops and axis == k.axis:
        return k
    if axis == k.axis:
        return Kernel(k.buffers, k.sizes, loops, axis, k.stores)
    return _apply(k, {}, loops, axis)


def _merge(k: Kernel) -> Kernel:
    if len(k.loops) < 2 and len(k.axis) < 2:
        return k
    fixed: set[Var] = {s.var for s in k.scans}
    uses: list[dict[Var, Index]] = []
    for n in k.nodes:
        if isinstance(n, Index):
            if n.free:
                uses.append(_direct(n))
                for m, _ in n.terms:  # products of variables stay as they are
                    vs = [a for a in m if isinstance(a, Var)]
                    if len(vs) > 1:
                        fixed.update(vs)
        else:
            fixed.update([c for c in n.children() if isinstance(c, Var)])
    loops, axis = list(k.loops), list(k.axis)
    mapping: dict[Var, Index] = {}
    for group in (loops, axis):
        i = len(group) - 2
        while i >= 0:
            o, v = group[i], group[i + 1]
            if o not in fixed and v not in fixed and _seen_as_one(o, v, uses):
                # o's uses vanish, the inner variable runs over both
                new = Var(f"{o.name}{v.name}", o.extent * v.extent)
                for u in uses:
                    u.pop(o, None)
                    if v in u:
                        u[new] = u.pop(v)
                for key in (x for x, to in mapping.items() if to.single_var() is v):
                    mapping[key] = index(new)
                mapping[o], mapping[v] = ZERO, index(new)
                group[i : i + 2] = [new]
                i = min(i, len(group) - 2)
                continue
            i -= 1
    if not mapping:
        return k
    return _apply(k, mapping, tuple(loops), tuple(axis))


def _seen_as_one(o: Var, v: Var, uses: list[dict[Var, Index]]) -> bool:
    for u in uses:
        co, cv = u.get(o), u.get(v)
        if co is None and cv is None:
            continue
        if co is None or cv is None or co is not cv * v.extent:
            return False
    return True


def _rename(k: Kernel) -> Kernel:
    mapping: dict[Var, Index] = {}
    loops = tuple([Var(f"x{i}", v.extent) for i, v in enumerate(k.loops)])
    axis = tuple([Var(f"r{i}", v.extent) for i, v in enumerate(k.axis)])
    for old, new in zip(k.loops + k.axis, loops + axis, strict=True):
        if old is not new:
            mapping[old] = index(new)
    return _apply(k, mapping, loops, axis) if mapping else k
