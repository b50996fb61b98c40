"""Check a Kernel before anything is generated from it: a wrong kernel must not become a wrong address.

What is checked: names are declared once and used; every variable is bound; reductions are over exactly the axis; dtypes
follow the rules of `fusionc.ir.ops`; every load and store is inside its buffer whatever the data is; each element has
one writer; a buffer is used as its kind says.

Indices are checked in two steps.  A proof: the least value of the index polynomial over the box of the loops, helped
by the load's guard.  Where that fails (a non-affine index), the index is evaluated over the whole loop nest, and only a
counterexample is an error.  An index that depends on loaded data has to be provable: no test run can stand for
all data.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from ..errors import VerifyError
from .expr import (
    FLOATS,
    INTS,
    ONE,
    REDUCTIONS,
    ZERO,
    Const,
    Expr,
    FloorDiv,
    Index,
    Load,
    Mod,
    Op,
    Reduce,
    Rewriter,
    Scan,
    Size,
    Var,
    floordiv,
    index,
    walk,
)
from .interp import Frame
from .loop import Kernel, Store, Write, evaluate
from .ops import ARITY, COMPARE, FLOAT_ONLY, PREDICATE

_COMPUTE = frozenset(("b1", "u8", "i8", "i16", "i32", "i64", "f32", "f64"))
_BITWISE = frozenset(("and", "or", "xor", "not"))
_MAX_POINTS = 1 << 18  # points of a loop nest that are worth enumerating
_SAMPLES = (48, 96)  # run-time sizes tried when symbolic reasoning is not enough; both must fail


def verify(kernel: Kernel, where: str = "kernel") -> None:
    """Raise VerifyError if `kernel` breaks an invariant of the loop IR; `where` names it in the message."""
    _Verifier(kernel, where).run()


class _Verifier:
    def __init__(self, kernel: Kernel, where: str):
        self.k, self.where = kernel, where
        self.part = (kernel.part,) if kernel.part is not None else ()

    def fail(self, found: str, hint: str = "") -> None:
        raise VerifyError(self.where, found, hint)

    def run(self) -> None:
        self.declarations()
        self.binding()
        for n in self.k.nodes:
            self.types(n)
        for s in self.k.writes:
            self.store(s)
        self.buffers()
        self.accesses()
        self.writers()

    # -- names ----------------------------------------------------------------------------------------------------
    def declarations(self) -> None:
        k = self.k
        for what, names in (
            ("buffer", [b.name for b in k.buffers]),
            ("variable", [v.name for v in k.loops + k.axis + self.part]),
            ("size", [s.name for s in k.sizes]),
        ):
            twice = {n for n in names if names.count(n) > 1}
            if twice:
                self.fail(f"{what} {sorted(twice)[0]} is declared twice")
        if not k.stores and not k.columns:
            self.fail("the kernel stores nothing")
        if k.part is not None and not k.columns:
            self.fail("the kernel has a part, but no column store")
        if k.columns and not (k.loops and k.axis):
            self.fail("column stores need both loops and an axis")
        for v in k.loops + k.axis + self.part:
            if v.extent.free:
                self.fail(f"the extent of {v.name} depends on loop variables", "extents must be made of sizes")
        known = set(k.sizes)
        for n in walk([*k.nodes, *(v.extent for v in k.loops + k.axis + self.part), *(b.size for b in k.buffers)]):
            if isinstance(n, Size) and n not in known:
                self.fail(f"size {n.name} is used but is not an argument of the kernel")

    def binding(self) -> None:
        k = self.k
        loops, axis = frozenset(k.loops), frozenset(k.axis)
        for s in k.stores:
            what = f"store to {s.buffer}"
            bound = loops | axis if s.inner else loops
            for e in (s.index, s.value):
                loose = e.free - bound
                if loose:
                    names = ", ".join(sorted(v.name for v in loose))
                    hint = "a row store may not depend on the axis outside a Reduce" if loose <= axis else ""
                    self.fail(f"{what} depends on {names}, which nothing binds", hint)
            if s.inner and not axis:
                self.fail(f"{what} is inner, but the kernel has no axis")
        for r in k.reductions:
            if r.vars != k.axis or not r.vars:
                self.fail(f"{r.kind} runs over {[v.name for v in r.vars]}, the axis is {[v.name for v in k.axis]}")
            if r.free - loops:
                self.fail(f"{r.kind} depends on {sorted(v.name for v in r.free - loops)}, which no loop binds")
        self.column_binding()
        for sc in k.scans:
            if sc.var not in axis:
                self.fail(f"scan along {sc.var.name}, which is no axis variable")

    def column_binding(self) -> None:
        k = self.k
        if not k.columns:
            return
        bound = frozenset(k.axis) | frozenset(self.part)
        for s in k.columns:
            loose = (s.index.free | s.value.free) - bound
            if loose:
                names = ", ".join(sorted(v.name for v in loose))
                self.fail(f"column store to {s.buffer} depends on {names}", "it may depend on the axis and the part")
        for r in k.column_sums:
            if r.kind != "sum":
                self.fail(f"{r.kind} over the loops", "columns are summed, nothing else")
            if r.free - frozenset(k.axis):
                self.fail("a column sum may depend on nothing but the axis")
            if any(isinstance(n, Reduce) and k.is_column_sum(n) for n in walk([r.body])):
                self.fail("a column sum inside a column sum")
        for n in walk([e for st in k.stores for e in (st.index, st.value)]):
            if isinstance(n, Reduce) and k.is_column_sum(n):
                self.fail("a row or inner store reads a column sum", "sums over the loops are complete only at the end")

    # -- types ----------------------------------------------------------------------------------------------------
    def types(self, n: Expr) -> None:
        if isinstance(n, Index):
            for a in n.children():
                if a.dtype != "i64" or isinstance(a, Index):
                    self.fail(f"index {n!r} has an atom of dtype {a.dtype}", "cast it to i64")
        elif isinstance(n, (FloorDiv, Mod)):
            if n.divisor.is_const and n.divisor.value <= 0:
                self.fail(f"{n!r} divides by {n.divisor.value}", "divisors are positive")
        elif isinstance(n, Load):
            if n.guard is not None and n.guard.dtype != "b1":
                self.fail(f"the guard of {n!r} is {n.guard.dtype}, not b1")
            if n.other is not None and n.other.dtype != n.dtype:
                self.fail(f"{n!r} gives {n.other.dtype} where its guard is false and {n.dtype} elsewhere")
        elif isinstance(n, Reduce):
            self.reduction(n.kind, n.body.dtype, n.dtype)
        elif isinstance(n, Scan):
            if n.kind not in ("sum", "prod", "max", "min"):
                self.fail(f"unknown scan {n.kind}")
            self.reduction(n.kind, n.body.dtype, n.dtype)
        elif isinstance(n, Op):
            self.operation(n)

    def reduction(self, kind: str, body: str, dtype: str) -> None:
        if kind not in REDUCTIONS:
            self.fail(f"unknown reduction {kind}")
        want = "i64" if kind in ("argmax", "argmin") else body
        if dtype != want or body not in _COMPUTE:
            self.fail(f"{kind} of {body} gives {dtype}, not {want}", "f16 and bf16 are reduced in f32")
        if kind in ("any", "all") and body != "b1":
            self.fail(f"{kind} of {body}", "any and all are of b1")
        if kind in ("sum", "prod") and body == "b1":
            self.fail(f"{kind} of b1", "cast to an integer first")

    def operation(self, n: Op) -> None:
        name, got = n.name, [a.dtype for a in n.args]
        if name not in ARITY:
            self.fail(f"unknown operation {name}")
        if len(got) != ARITY[name]:
            self.fail(f"{name} has {len(got)} operands instead of {ARITY[name]}")
        if name == "cast":
            return
        text = f"{name}({', '.join(got)}) -> {n.dtype}"
        if not set(got) <= _COMPUTE or n.dtype not in _COMPUTE:
            self.fail(text, "f16 and bf16 are only loaded, stored and cast; compute in f32")
        args = got[1:] if name == "where" else got
        if name == "where" and got[0] != "b1":
            self.fail(text, "the condition must be b1")
        if len(set(args)) > 1:
            self.fail(text, "operands must have one dtype")
        dtype = args[0]
        if name == "check_index":
            ok = dtype == n.dtype == "i64"
        elif name in COMPARE or name in PREDICATE:
            ok = n.dtype == "b1" and (name in COMPARE or dtype in FLOATS)
        elif name in FLOAT_ONLY:
            ok = dtype == n.dtype and dtype in FLOATS
        elif name in _BITWISE:
            ok = dtype == n.dtype and dtype not in FLOATS
        elif name in ("shl", "shr", "truncdiv"):
            ok = dtype == n.dtype and dtype in INTS
        else:
            ok = dtype == n.dtype and (dtype != "b1" or name in ("where", "maximum", "minimum"))
        if not ok:
            self.fail(text)

    # -- buffers --------------------------------------------------------------------------------------------------
    def store(self, s: Write) -> None:
        if s.index.dtype != "i64":
            self.fail(f"the index of the store to {s.buffer} is {s.index.dtype}")

    def buffers(self) -> None:
        k = self.k
        by_name = {b.name: b for b in k.buffers}
        loaded, stored = {n.buffer for n in k.loads}, {s.buffer for s in k.writes}
        for name in sorted(loaded | stored):
            if name not in by_name:
                self.fail(f"{name} is used but is not a buffer of the kernel")
        for b in k.buffers:
            if b.kind not in ("in", "out", "inout"):
                self.fail(f"buffer {b.name} is of unknown kind {b.kind}")
            if b.name not in loaded and b.name not in stored:
                self.fail(f"buffer {b.name} is never used")
            if b.kind == "in" and b.name in stored:
                self.fail(f"{b.name} is an input and is stored to")
            if b.kind == "out" and b.name in loaded:
                self.fail(f"{b.name} is an output and is loaded from", "make it inout")
            if b.kind != "in" and b.name not in stored:
                self.fail(f"{b.name} is of kind {b.kind} and is never stored to")
            if b.scalar and (b.kind != "in" or b.size is not ONE):
                self.fail(f"{b.name} is passed by value, so it must be an input of one element")
        for n in k.loads:
            if by_name[n.buffer].dtype != n.dtype:
                self.fail(f"{n!r} loads {n.dtype} from a buffer of {by_name[n.buffer].dtype}")
            if by_name[n.buffer].kind == "inout" and not any(
                s.buffer == n.buffer and s.index is n.index for s in k.stores
            ):
                self.fail(f"{n!r} reads an element of an inout buffer that another point may have written")

    # -- indices --------------------------------------------------------------------------------------------------
    def accesses(self) -> None:
        size = {b.name: b.size for b in self.k.buffers}
        for n in self.k.loads:
            self.inside(n.index, size[n.buffer], n.guard, f"load from {n.buffer}")
        for s in self.k.stores:
            self.inside(s.index, size[s.buffer], None, f"store to {s.buffer}")
        across = self.across()
        for c in self.k.columns:
            across.inside(c.index, size[c.buffer], None, f"column store to {c.buffer}")

    def across(self) -> _Verifier:
        """A verifier of the points of column stores: part and axis."""
        return _Verifier(Kernel(self.k.buffers, self.k.sizes, self.part, self.k.axis, ()), self.where)

    def inside(self, at: Index, size: Index, guard: Expr | None, what: str) -> None:
        facts = list(_facts(guard)) if guard is not None else []
        if _nonnegative(at, facts) and _nonnegative(size - 1 - at, facts):
            return
        if not _enumerable([at]):  # a checked index is somewhere in its range: its two ends stand for it
            ends = [_at_end(at, last) for last in (False, True)]
            if all(end is not at for end in ends):
                for end in ends:
                    self.inside(end, size, guard, what)
                return
        if not _enumerable([at] if guard is None else [at, guard]):
            self.fail(
                f"{what} at {at!r} cannot be shown to be inside its {size!r} elements, and the index depends on data",
                "wrap the loaded index in check_index",
            )
        worst = None
        samples = _SAMPLES if self.k.sizes else (0,)
        for sample in samples:
            sizes = {s.name: max(s.lower, sample) for s in self.k.sizes}
            worst = self.counterexample(at, evaluate(size, sizes), guard, sizes)
            if worst is None:
                return
        self.fail(f"{what} at {at!r} reaches element {worst}, outside its {size!r} elements")

    def counterexample(self, at: Index, size: int, guard: Expr | None, sizes: dict[str, int]) -> int | None:
        values = _enumerate(self.k, at, guard, sizes)
        if values is None or not values.numel():
            return None
        lo, hi = int(values.min()), int(values.max())
        return lo if lo < 0 else hi if hi >= size else None

    def writers(self) -> None:
        k = self.k
        for s in k.writes:
            over = self.part + k.axis if not isinstance(s, Store) else k.loops + k.axis if s.inner else k.loops
            vars = [v for v in over if v.extent is not ONE]
            for v in vars:
                if v not in s.index.free and v.extent.is_const and v.extent.value > 1:
                    self.fail(f"every point of {v.name} writes the same element of {s.buffer}", "one writer an element")
            if _injective(s.index, vars) is False:
                self.fail(f"the store to {s.buffer} at {s.index!r} writes some element twice", "one writer an element")
            if _injective(s.index, vars) is None and _enumerable([s.index]) and not k.sizes:
                values = _enumerate(k if isinstance(s, Store) else self.across().k, s.index, None, {})
                if values is not None and values.unique().numel() != values.numel():
                    self.fail(f"the store to {s.buffer} at {s.index!r} writes some element twice")
        for n, a in enumerate(k.writes):
            for b in k.writes[n + 1 :]:
                if a.buffer == b.buffer and a.index is b.index:
                    self.fail(f"two stores write {a.buffer} at {a.index!r}", "one writer an element")


# -- proofs -------------------------------------------------------------------------------------------------------


def _facts(guard: Expr) -> Iterator[Index]:
    """Polynomials that are nonnegative where `guard` holds."""
    if not isinstance(guard, Op):
        return
    if guard.name == "and":
        yield from _facts(guard.args[0])
        yield from _facts(guard.args[1])
        return
    negated = guard.name == "not"
    if negated and isinstance(guard.args[0], Op):
        guard = guard.args[0]
        if guard.name == "or":
            for a in guard.args:
                yield from _facts(Op("not", (a,), "b1"))
            return
    if guard.name not in COMPARE or guard.args[0].dtype != "i64":  # type: ignore[union-attr]
        return
    a, b = (index(x) for x in guard.args)  # type: ignore[union-attr]
    name = guard.name  # type: ignore[union-attr]
    if negated:
        name = {"lt": "ge", "le": "gt", "gt": "le", "ge": "lt", "eq": "ne", "ne": "eq"}[name]
    if name in ("lt", "le"):
        yield b - a - (1 if name == "lt" else 0)
    elif name in ("gt", "ge"):
        yield a - b - (1 if name == "gt" else 0)
    elif name == "eq":
        yield a - b
        yield b - a


def _nonnegative(p: Index, facts: Iterable[Index] = (), depth: int = 2) -> bool:
    """True when p >= 0 at every point of the loops where all `facts` are nonnegative."""
    low = _extreme(p, -1)
    if low is not None and _sizes_nonnegative(low):
        return True
    if depth == 0:
        return False
    mine = dict(p.terms)
    for f in facts:
        # p = (p - t·f) + t·f: choose t > 0 so that a monomial cancels
        ratios = {mine[m] // c for m, c in f.terms if m and m in mine and mine[m] % c == 0 and mine[m] // c > 0}
        if any(_nonnegative(p - f * t, facts, depth - 1) for t in sorted(ratios)):
            return True
    return False


def _extreme(p: Index, sign: int) -> Index | None:
    """A polynomial in sizes alone that is <= p (sign -1) or >= p (sign 1) at every point; None: not found."""
    for _ in range(16):
        atom = next((a for m, _ in p.terms for a in m if not _is_size(a)), None)
        if atom is None:
            return p
        slope, rest = ZERO, ZERO
        for m, c in p.terms:
            count = sum(1 for a in m if a is atom)
            if count > 1:
                return None
            term = Index((((*(a for a in m if a is not atom),), c),))
            if count:
                slope = slope + term
            else:
                rest = rest + term
        if _nonnegative(slope, (), 0):
            bound = _atom_bound(atom, sign)
        elif _nonnegative(-slope, (), 0):
            bound = _atom_bound(atom, -sign)
        else:
            return None
        if bound is None:
            return None
        p = rest + slope * bound
    return None


def _is_size(a: Expr) -> bool:
    return isinstance(a, Size) or (isinstance(a, (FloorDiv, Mod)) and not a.free and not _data(a))


def _data(e: Expr) -> bool:
    return any(isinstance(n, (Load, Op, Reduce, Scan)) for n in walk([e]))


def _atom_bound(a: Expr, sign: int) -> Index | None:
    """Least (sign -1) or greatest (sign 1) value of an integer expression, in sizes; None: not found."""
    if isinstance(a, Index):
        return _extreme(a, sign)
    if isinstance(a, Const):
        return index(int(a.value))
    if isinstance(a, Var):
        return ZERO if sign < 0 else a.extent - 1
    if isinstance(a, Mod):
        return ZERO if sign < 0 else a.divisor - 1
    if isinstance(a, FloorDiv):
        if a.divisor.free or _data(a.divisor):
            return None
        bound = _extreme(a.dividend, sign)
        return None if bound is None else floordiv(bound, a.divisor)
    if isinstance(a, Op):
        return _op_bound(a, sign)
    if isinstance(a, Reduce) and a.kind in ("argmax", "argmin"):
        n = ONE
        for v in a.vars:
            n = n * v.extent
        return ZERO if sign < 0 else n - 1
    return None


def _op_bound(a: Op, sign: int) -> Index | None:
    if a.name == "check_index":
        top = _extreme(index(a.args[1]), 1)
        return ZERO if sign < 0 else None if top is None else top - 1
    if a.name == "cast":
        narrow = {"b1": 1, "u8": 255}.get(a.args[0].dtype)
        if narrow is not None:
            return ZERO if sign < 0 else index(narrow)
        return _atom_bound(a.args[0], sign) if a.args[0].dtype in INTS else None
    if a.name not in ("maximum", "minimum", "where"):
        return None
    found = [_atom_bound(x, sign) for x in (a.args[1:] if a.name == "where" else a.args)]
    known = [x for x in found if x is not None]
    if {"maximum": -1, "minimum": 1}.get(a.name) == sign:  # the bound of either operand holds; the tighter is better
        if len(known) == 2 and _sizes_nonnegative((known[0] - known[1]) * sign):
            return known[1]
        return known[0] if known else None
    for x, y in (known, known[::-1]) if len(known) == 2 else ():
        if _sizes_nonnegative((x - y) * sign):
            return x
    return None


def _sizes_nonnegative(p: Index) -> bool:
    """True when a polynomial in sizes is certainly nonnegative: every coefficient is, once sizes count from `lower`."""
    acc = ZERO
    for m, c in p.terms:
        part = index(c)
        for a in m:
            if isinstance(a, Size):
                part = part * (index(Size(a.name + "'", 0)) + a.lower)
            elif isinstance(a, (FloorDiv, Mod)) and _sizes_nonnegative(_dividend_low(a)):
                part = part * index(a)
            else:
                return False
        acc = acc + part
    return all(c >= 0 for _, c in acc.terms)


def _dividend_low(a: FloorDiv | Mod) -> Index:
    return ZERO if isinstance(a, Mod) else a.dividend


def _injective(at: Index, vars: list[Var]) -> bool | None:
    """Do different points of `vars` give different values?  None: not affine with constant strides."""
    strides: list[tuple[int, int]] = []
    for v in vars:
        c = at.coefficient(v)
        if c is None or not c.is_const or not v.extent.is_const:
            return None
        strides.append((abs(c.value), v.extent.value))
    reach = 0
    for stride, extent in sorted(strides):
        if stride <= reach:
            return None if stride else extent <= 1
        reach += stride * (extent - 1)
    return True


# -- enumeration --------------------------------------------------------------------------------------------------


def _at_end(at: Index, last: bool) -> Index:
    """`at` with every index loaded under a check_index set to the first or last element of its range."""

    def end(n: Expr) -> Expr | None:
        if isinstance(n, Op) and n.name == "check_index":
            return index(n.args[1]) - 1 if last else ZERO  # type: ignore[arg-type]
        return None

    return index(Rewriter(end)(at))


def _enumerable(roots: list[Expr]) -> bool:
    return not any(isinstance(n, (Load, Reduce, Scan)) for n in walk(roots))


def _enumerate(k: Kernel, at: Index, guard: Expr | None, sizes: dict[str, int]) -> Tensor | None:
    """Values of `at` over the loops and axis where `guard` holds, as a flat tensor; None if there are too many."""
    used = at.free if guard is None else at.free | guard.free
    vars = k.loops + k.axis
    extents = [evaluate(v.extent, sizes) for v in vars]
    points = 1
    for v, n in zip(vars, extents, strict=True):
        points *= n if v in used else 1
    if points > _MAX_POINTS or any(n == 0 for n in extents):
        return None
    rows = len(k.loops)
    box = [range(n if v in used else 1) for v, n in zip(k.loops, extents, strict=False)]
    axis = [n if v in used else 1 for v, n in zip(k.axis, extents[rows:], strict=True)]
    frame = Frame(k, {}, sizes, box, axis, False)
    values = frame(at)
    if guard is not None:
        values, mask = torch.broadcast_tensors(values, frame(guard))
        values = values[mask]
    return values.reshape(-1)
