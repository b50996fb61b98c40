"""Split a reduction over few, long rows across programs: partial results first, then a small kernel that finishes.

    out[x] = f(reduce_r body(x, r))     becomes     part[x, p] = reduce_s body(x, p·chunk + s)
                                                    out[x]     = f(reduce_p part[x, p])

The order of combination is fixed by `parts`, so results do not vary from run to run.  Legal when no reduction and no
inner store needs the result of a reduction: then one exchange is enough.
"""

from __future__ import annotations

from ..ir.expr import FLOATS, Const, Expr, Index, Load, Reduce, Rewriter, Size, Var, flat, index
from ..ir.loop import Buffer, Kernel, Store, evaluate
from ..ir.ops import and_, op
from .rules_triton import contiguous_in_loops

_MIN_CHUNK = 256  # elements of the axis that a part must have, to be worth a second launch
_GUESS = 1024  # stands for sizes known at run time only
_LOWEST = {"u8": 0, "i8": -(1 << 7), "i16": -(1 << 15), "i32": -(1 << 31), "i64": -(1 << 63), "b1": False}
_HIGHEST = {"u8": 255, "i8": (1 << 7) - 1, "i16": (1 << 15) - 1, "i32": (1 << 31) - 1, "i64": (1 << 63) - 1, "b1": True}


def should_split(kernel: Kernel, hint: dict[str, int], target: str, parallelism: int) -> int:
    """Into how many parts the axis should be split (1: not at all).

    `target` is "triton" or "cpp", `parallelism` the number of processors or threads.
    """
    if not kernel.reductions or not legal(kernel):
        return 1
    outer, inner = evaluate(kernel.outer, hint), evaluate(kernel.inner, hint)
    lanes = 1
    if contiguous_in_loops(kernel, hint):
        lanes = 32  # columns that one program takes side by side
    rows = max(1, -(-outer // lanes))
    want = parallelism if target == "cpp" else 2 * parallelism
    if target == "cpp" and (outer * inner < 1 << 16 or rows * 2 > want):
        return 1
    shortest = _MIN_CHUNK * (16 if lanes == 1 else 1) // (1 if target == "triton" else 4)
    parts = min(-(-want // rows), inner // max(1, shortest // 4 if lanes > 1 else shortest))
    if parts < 2 or (target == "triton" and rows * 2 > want):
        return 1
    chosen = _split_var(kernel)
    if not chosen.extent.is_const:
        return parts
    return _divisor(chosen.extent.value, parts)


def _divisor(n: int, parts: int) -> int:
    """A divisor of `n` near `parts`, so that no part needs a guard; else `parts` (at most n)."""
    parts = min(parts, n)
    for d in range(parts, max(1, parts // 2), -1):
        if n % d == 0:
            return d
    for d in range(parts + 1, min(n, 2 * parts) + 1):
        if n % d == 0:
            return d
    return parts


def legal(kernel: Kernel) -> bool:
    """Can `kernel` be split at all?"""
    if not kernel.axis or kernel.scans or any(r.level != 1 for r in kernel.reductions):
        return False
    if any(s.inner and (s.value.level or s.index.level) for s in kernel.stores):
        return False
    return all(b.kind != "inout" for b in kernel.buffers)


def _split_var(kernel: Kernel) -> Var:
    """The axis variable to cut: the slowest where positions count, else the longest."""
    if any(r.kind in ("argmax", "argmin") for r in kernel.reductions):
        return kernel.axis[0]
    return max(kernel.axis, key=lambda v: v.extent.value if v.extent.is_const else 1 << 62)


def split(kernel: Kernel, parts: int) -> tuple[Kernel, Kernel] | None:
    """The two kernels, or None where that is not legal.

    Buffers keep their names; partial results are buffers "part0", … of `outer * parts` elements, written by the first
    kernel and read by the second.  Stores that need no reduction happen in the first.
    """
    if parts < 2 or not legal(kernel):
        return None
    v = _split_var(kernel)
    exact = v.extent.is_const and v.extent.value % parts == 0
    if not exact and any(s.inner for s in kernel.stores):
        return None  # a store cannot be guarded
    chunk = (v.extent + (parts - 1)) // index(parts)
    p = Var(f"x{len(kernel.loops)}", index(parts))
    axis = tuple([Var(w.name, chunk) if w is v else w for w in kernel.axis])
    s = axis[kernel.axis.index(v)]
    first = _First(kernel, v, p, s, chunk, exact, axis)
    outs: list[Store] = [
        Store(st.buffer, first.rewrite.index(st.index), first.rewrite(st.value), True)
        for st in kernel.stores
        if st.inner
    ]
    # columns stay neighbours in memory: [parts, outer]; rows keep their partial results together: [outer, parts]
    columns = contiguous_in_loops(kernel, {z.name: _GUESS for z in kernel.sizes})
    place = flat(kernel.loops)
    step, row = (kernel.outer, place) if columns else (index(1), place * parts)
    at = row + index(p) * step
    extra: list[Buffer] = []
    q = Var("r0", index(parts))
    finish: dict[int, Expr] = {}

    def partial(value: Expr) -> str:
        name = f"part{len(extra)}"
        extra.append(Buffer(name, value.dtype, kernel.outer * parts, "out"))
        outs.append(Store(name, at, value, False))
        return name

    for r in kernel.reductions:
        body = first.body(r)
        if r.kind in ("argmax", "argmin"):
            kind = r.kind[3:]
            best = partial(Reduce(kind, axis, body, body.dtype))
            where = partial(index(Reduce(r.kind, axis, body, "i64")) + first.base())
            which = Reduce(r.kind, (q,), Load(best, row + index(q) * step, body.dtype), "i64")
            finish[r.uid] = Load(where, row + index(which) * step, "i64")
        else:
            name = partial(Reduce(r.kind, axis, body, r.dtype))
            finish[r.uid] = Reduce(r.kind, (q,), Load(name, row + index(q) * step, r.dtype), r.dtype)
    second = Rewriter(lambda e: finish.get(e.uid) if isinstance(e, Reduce) else None)
    ends = [Store(st.buffer, second.index(st.index), second(st.value), False) for st in kernel.stores if not st.inner]
    if not ends:
        return None
    loops = (p, *kernel.loops) if columns else (*kernel.loops, p)
    one = _kernel(kernel, loops, axis, outs, extra)
    reads = [Buffer(b.name, b.dtype, b.size, "in") for b in extra]
    return one, _kernel(kernel, kernel.loops, (q,), ends, reads)


class _First:
    """Rewrites bodies for the first kernel: v = p·chunk + s, guarded where the last part is shorter."""

    def __init__(self, kernel: Kernel, v: Var, p: Var, s: Var, chunk: Index, exact: bool, axis: tuple[Var, ...]):
        self.p, self.chunk, self.axis, self.v = p, chunk, axis, v
        self.position = index(p) * chunk + s
        self.old = kernel.axis
        self.inside: Expr | None = None
        if not exact:
            self.inside = op("lt", (self.position, v.extent), "b1")
        self.rewrite = Rewriter(self.leaf)

    def leaf(self, e: Expr) -> Expr | None:
        if e is self.v:
            return self.position
        if isinstance(e, Load) and self.inside is not None and self.v in e.free:
            guard = and_(self.inside, None if e.guard is None else self.rewrite(e.guard))
            return Load(e.buffer, self.rewrite.index(e.index), e.dtype, guard, e.other)
        return None

    def body(self, r: Reduce) -> Expr:
        new = self.rewrite(r.body)
        if self.inside is None:
            return new
        return op("where", (self.inside, new, identity(r.kind, new.dtype)), new.dtype)

    def base(self) -> Index:
        """Position, counted over the whole axis, of the first element of part p (v is the slowest variable)."""
        rest = index(1)
        for w in self.old[1:]:
            rest = rest * w.extent
        return index(self.p) * self.chunk * rest


def identity(kind: str, dtype: str) -> Const:
    """The value that a reduction of `kind` ignores."""
    if kind in ("sum", "any"):
        return Const(0, dtype)
    if kind in ("prod", "all"):
        return Const(1, dtype)
    low = kind in ("max", "argmax")
    if dtype in FLOATS:
        return Const(float("-inf") if low else float("inf"), dtype)
    return Const(_LOWEST[dtype] if low else _HIGHEST[dtype], dtype)


def _kernel(
    old: Kernel, loops: tuple[Var, ...], axis: tuple[Var, ...], stores: list[Store], extra: list[Buffer]
) -> Kernel:
    """A kernel with those of the old buffers that its stores use, then `extra`."""
    trial = Kernel((), (), loops, axis, tuple(stores))
    used = {n.buffer for n in trial.loads} | {s.buffer for s in stores}
    buffers = [b for b in old.buffers if b.name in used] + extra
    sizes = _sizes(trial, buffers)
    return Kernel(tuple(buffers), tuple([s for s in old.sizes if s in sizes]), loops, axis, tuple(stores))


def _sizes(k: Kernel, buffers: list[Buffer]) -> set[Expr]:
    from ..ir.expr import walk

    roots = [*k.nodes, *(v.extent for v in k.loops + k.axis), *(b.size for b in buffers)]
    return {n for n in walk(roots) if isinstance(n, Size)}
