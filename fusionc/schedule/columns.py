"""Row results and column sums of the same data in one read.

    dx[m, n]  = f(dy[m, n], x[m, n], Σ_n …)          the kernel of rows      (loops m, axis n)
    dw[n]     = Σ_m dy[m, n]·x̂[m, n]                  the kernel of columns   (loops n, axis m)

become one kernel of rows with column stores (`fusionc.ir.loop`): the backward of a norm reads dy and x once instead of
twice, and what one kernel left in memory only for the other (dy·x̂ in float32) never gets there.  `merge` finds such
pairs among the built kernels of a graph, whatever operators they came from; `stage` turns the result into two launches:

    part[p, n] = Σ over the rows of share p          persistent programs, a fixed share each: the order of all sums is fixed
    dw[n]      = Σ_p part[p, n]

Source: the persistent norm backwards of Liger and quack, as a rule on loop nests instead of a kernel per norm.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from torch.fx import Node

from ..ir.build import Built
from ..ir.expr import ITEMSIZE, Expr, Index, Load, Reduce, Rewriter, Size, Var, flat, index, walk
from ..ir.loop import Buffer, ColumnStore, Kernel, Store, evaluate
from .group import Group, Grouper, Unit
from .rules_triton import Device, column_parts, contiguous_in_loops

_HINT = 64  # stands for sizes without a hint


# -- staging ------------------------------------------------------------------------------------------------------


def stage(kernel: Kernel, parts: int) -> tuple[Kernel, Kernel]:
    """The kernel with one partial sum a part, and the kernel that adds them up.  `kernel` has column stores, no part.

    Buffers keep their names; partial sums are buffers "part0", … of `parts · inner` elements.
    """
    p, q = Var("p0", index(parts)), Var("r0", index(parts))
    across = tuple([Var(f"x{k}", v.extent) for k, v in enumerate(kernel.axis)])
    rename: dict[Var, Expr] = dict(zip(kernel.axis, [index(v) for v in across], strict=True))
    extra: list[Buffer] = []
    partial: list[ColumnStore] = []
    total: dict[int, Expr] = {}
    for k, r in enumerate(kernel.column_sums):
        b = Buffer(f"part{k}", r.dtype, kernel.inner * parts, "out")
        extra.append(b)
        partial.append(ColumnStore(b.name, flat(kernel.axis) + index(p) * kernel.inner, r))
        at = flat(across) + index(q) * kernel.inner
        total[r.uid] = Reduce("sum", (q,), Load(b.name, at, r.dtype), r.dtype)

    def leaf(e: Expr) -> Expr | None:
        return rename.get(e) if isinstance(e, Var) else total.get(e.uid)

    end = Rewriter(leaf)
    ends = [Store(c.buffer, end.index(c.index), end(c.value), False) for c in kernel.columns]
    one = _kernel([*kernel.buffers, *extra], kernel.loops, kernel.axis, kernel.stores, partial, p)
    reads = [Buffer(b.name, b.dtype, b.size, "in") for b in extra]
    return one, _kernel([*kernel.buffers, *reads], across, (q,), ends)


def _kernel(buffers: Sequence[Buffer], loops: tuple[Var, ...], axis: tuple[Var, ...], stores: Sequence[Store],
            columns: Sequence[ColumnStore] = (), part: Var | None = None) -> Kernel:  # fmt: skip
    """A kernel with those of the buffers and sizes that it uses."""
    trial = Kernel((), (), loops, axis, tuple(stores), tuple(columns), part)
    used = {n.buffer for n in trial.loads} | {s.buffer for s in trial.writes}
    kept = tuple([b for b in buffers if b.name in used])
    extents = [v.extent for v in (*loops, *axis)] + [b.size for b in kept]
    sizes = {n.name: n for n in walk([*trial.nodes, *extents]) if isinstance(n, Size)}
    return Kernel(kept, tuple([sizes[n] for n in sorted(sizes)]), loops, axis, tuple(stores), tuple(columns), part)


# -- merging ------------------------------------------------------------------------------------------------------


def merge(
    grouper: Grouper, units: Sequence[Unit], built: dict[Group, Built], hint: dict[str, int], device: Device
) -> Iterator[tuple[Group, Group, Built]]:
    """Join kernels of columns to kernels of rows; yields (rows, columns, both) for each join done.

    Pointwise kernels are cut into rows where that lets them join.  The joined group's members, predecessors and kernel
    become those of the group of rows, in `grouper` and `built`; the caller orders the units anew.
    """
    groups = [u for u in units if isinstance(u, Group) and u in built]
    touching: dict[Node, dict[Group, None]] = {}
    for g in groups:
        if not any(b.kind == "inout" for b in built[g].kernel.buffers):
            for node in (*built[g].inputs, *built[g].outputs):
                touching.setdefault(node, {})[g] = None
    for b in groups:
        if b not in built or not _is_columns(built[b].kernel):
            continue
        nodes = (*built[b].inputs, *built[b].outputs)
        near = {a: None for n in nodes for a in touching.get(n, ()) if a is not b and a in built}
        for a in sorted(near, key=lambda g: not built[g].kernel.axis):  # rows first
            if not grouper.adjacent(a, b):
                continue
            rows = _as_rows(built[a], built[b].kernel, hint)
            both = None if rows is None else join(rows, built[b])
            if rows is None or both is None:
                continue
            both = without(both, frozenset([n for n in both.outputs if grouper.read_outside(n, (a, b))]))
            if not _pays(rows.kernel, built[b].kernel, both.kernel, hint, device):
                continue
            grouper.combine(a, b)
            del built[b]
            built[a] = both
            for n in nodes:
                touching.setdefault(n, {})[a] = None
            yield a, b, both
            break


def _as_rows(a: Built, columns: Kernel, hint: dict[str, int]) -> Built | None:
    """`a` with loops over rows and an axis along them; a pointwise kernel is cut at the rows that `columns` sums."""
    k = a.kernel
    if k.axis:
        return a if _is_rows(k, hint) else None
    rows, width = columns.inner, columns.outer
    mapping: dict[Var, Expr] = {}
    loops: tuple[Var, ...]
    axis: tuple[Var, ...]
    if len(k.loops) == 1 and k.outer is rows * width:
        loops, axis = (Var("x0", rows),), (Var("r0", width),)
        mapping[k.loops[0]] = index(loops[0]) * width + axis[0]
    else:
        order = sorted(k.loops, key=lambda v: -_stride(k.stores[0].index, v))
        cut = next((n for n in range(1, len(order)) if _points(order[:n]) is rows), 0)
        if not cut or _points(order[cut:]) is not width:
            return None
        loops = tuple(order[:cut])
        axis = tuple([Var(f"r{n}", v.extent) for n, v in enumerate(order[cut:])])
        mapping.update(zip(order[cut:], [index(v) for v in axis], strict=True))
    f = Rewriter(lambda e: mapping.get(e) if isinstance(e, Var) else None)
    stores = [Store(s.buffer, f.index(s.index), f(s.value), True) for s in k.stores]
    new = Kernel(k.buffers, k.sizes, loops, axis, tuple(stores))
    return Built(new, a.inputs, a.outputs) if _is_rows(new, hint) else None


def _stride(at: Index, v: Var) -> int:
    """The coefficient of `v` where it is a number (a stride of a run-time size counts as large)."""
    c = at.coefficient(v)
    return 0 if c is None else c.value if c.is_const else 1 << 62


def _points(vars: Sequence[Var]) -> Index:
    out = index(1)
    for v in vars:
        out = out * v.extent
    return out


def _hints(kernel: Kernel, hint: dict[str, int]) -> dict[str, int]:
    return {s.name: hint.get(s.name, _HINT) for s in kernel.sizes}


def _is_rows(k: Kernel, hint: dict[str, int]) -> bool:
    """Rows that can be held in registers, one after the other."""
    if not k.axis or not k.loops or k.scans or not k.inner.is_const or any(b.kind == "inout" for b in k.buffers):
        return False
    return not contiguous_in_loops(k, _hints(k, hint))


def _is_columns(k: Kernel) -> bool:
    """Sums alone, needed by row stores alone."""
    if not k.axis or not k.loops or k.scans or not k.reductions or any(b.kind == "inout" for b in k.buffers):
        return False
    if any(r.kind != "sum" or r.level != 1 for r in k.reductions):
        return False
    return not any(s.inner and (s.value.level or s.index.level) for s in k.stores)


def _pays(a: Kernel, b: Kernel, both: Kernel, hint: dict[str, int], device: Device) -> bool:
    """Do the bytes no longer read twice exceed those of the partial sums, with enough rows to share out?"""
    h = _hints(both, hint)
    parts = column_parts(both, h, device)
    if not parts:
        return False
    points = evaluate(both.outer, h) * evaluate(both.inner, h)
    saved = (_row_bytes(a) + _row_bytes(b) - _row_bytes(both)) * points
    sums = sum(ITEMSIZE[r.dtype] for r in both.column_sums) - sum(ITEMSIZE[r.dtype] for r in a.column_sums)
    return saved >= 2 * parts * evaluate(both.inner, h) * sums  # partial sums are written and read once


def _row_bytes(k: Kernel) -> int:
    """Bytes loaded and stored at each point of loops × axis."""
    loops, axis = frozenset(k.loops), frozenset(k.axis)
    read = {(n.buffer, n.index): ITEMSIZE[n.dtype] for n in k.loads if n.free & loops and n.free & axis}
    return sum(read.values()) + sum(ITEMSIZE[k.buffer(s.buffer).dtype] for s in k.stores if s.inner)


def join(a: Built, b: Built) -> Built | None:
    """The kernel of rows `a` with the sums of the kernel of columns `b`; None where their points do not correspond.

    A load of what the other kernel stores at the same point becomes the stored value.
    """
    ka, kb = a.kernel, b.kernel
    for order in itertools.permutations(ka.loops) if len(ka.loops) <= 3 else (ka.loops,):
        found = _mapping(kb.axis, order), _mapping(kb.loops, ka.axis)
        if found[0] is not None and found[1] is not None:
            both = _join(a, b, {**found[0], **found[1]})
            if both is not None:
                return both
    return None


def _mapping(old: tuple[Var, ...], new: tuple[Var, ...]) -> dict[Var, Index] | None:
    """Where the variables `old` stand in terms of `new`: one for one, or one for all of them flattened."""
    if len(old) == len(new) and all(v.extent is w.extent for v, w in zip(old, new, strict=True)):
        return dict(zip(old, [index(w) for w in new], strict=True))
    return {old[0]: flat(new)} if len(old) == 1 and old[0].extent is _points(new) else None


class _Clash(Exception):
    """One kernel reads what the other stores, but not at the point that stores it."""


def _join(a: Built, b: Built, mapping: dict[Var, Index]) -> Built | None:
    ka = a.kernel
    names = _Names(a, b)
    # whichever reads the other's results is rewritten last, so that it finds their values
    first, second = (a, b) if set(b.inputs) & set(a.outputs) else (b, a)
    stored: dict[str, tuple[Index, Expr]] = {}
    rewrites = {id(a): names.rewriter(a, {}, None, stored), id(b): names.rewriter(b, mapping, ka.loops, stored)}
    stores: dict[int, list[Store]] = {}
    try:
        for one in (first, second):
            f = rewrites[id(one)]
            stores[id(one)] = []
            for s in one.kernel.stores:
                done = Store(names.new[id(one), s.buffer], f.index(s.index), f(s.value), s.inner)
                stores[id(one)].append(done)
                if one is a or s.inner:
                    stored[done.buffer] = done.index, done.value
        f = rewrites[id(a)]
        columns = [ColumnStore(names.new[id(a), c.buffer], f.index(c.index), f(c.value)) for c in ka.columns]
    except _Clash:
        return None
    inner = [s for s in stores[id(b)] if s.inner]
    columns += [ColumnStore(s.buffer, s.index, s.value) for s in stores[id(b)] if not s.inner]
    kernel = _kernel(names.buffers, ka.loops, ka.axis, [*stores[id(a)], *inner], columns)
    if not all(r.free <= frozenset(ka.loops) for r in kernel.reductions):
        return None
    left = {x.name for x in kernel.buffers}
    inputs = tuple([n for n, name in names.inputs.items() if name in left])
    return Built(kernel, inputs, (*a.outputs, *b.outputs))


class _Names:
    """Buffers of the joined kernel: a's keep their names, b's follow."""

    def __init__(self, a: Built, b: Built):
        self.new: dict[tuple[int, str], str] = {}  # (kernel, buffer) → name in the joined kernel
        self.inputs: dict[Node, str] = {}
        self.results: set[str] = set()
        reads: list[Buffer] = []
        writes: list[Buffer] = []
        outputs: dict[Node, str] = {}
        for one in (a, b):
            for node, buffer in zip(one.outputs, _numbered(one.kernel, "out"), strict=True):
                name = outputs[node] = f"out{len(writes)}"
                self.new[id(one), buffer.name] = name
                writes.append(Buffer(name, buffer.dtype, buffer.size, "out"))
        self.results = {x.name for x in writes}
        for one in (a, b):
            for node, buffer in zip(one.inputs, _numbered(one.kernel, "in"), strict=True):
                name = outputs.get(node) or self.inputs.get(node) or f"in{len(reads)}"
                if name not in self.results and node not in self.inputs:
                    self.inputs[node] = name
                    reads.append(Buffer(name, buffer.dtype, buffer.size, "in", buffer.scalar))
                self.new[id(one), buffer.name] = name
        self.buffers = [*reads, *writes]

    def rewriter(self, one: Built, mapping: dict[Var, Index], loops: tuple[Var, ...] | None,
                 stored: dict[str, tuple[Index, Expr]]) -> Rewriter:  # fmt: skip
        """Renames buffers and variables; `loops`: what reductions now run over (None: as before)."""

        def leaf(e: Expr) -> Expr | None:
            if isinstance(e, Var):
                return mapping.get(e, e)
            if isinstance(e, Reduce):
                return Reduce(e.kind, loops if loops is not None else e.vars, self_(e.body), e.dtype)
            if isinstance(e, Load):
                name, at = self.new[id(one), e.buffer], self_.index(e.index)
                if name in self.results:
                    where, value = stored.get(name, (None, None))
                    if e.guard is not None or where is not at or value is None:
                        raise _Clash
                    return value
                guard = None if e.guard is None else self_(e.guard)
                return Load(name, at, e.dtype, guard, e.other)
            return None

        self_ = Rewriter(leaf)
        return self_


def _numbered(k: Kernel, prefix: str) -> list[Buffer]:
    return sorted([b for b in k.buffers if b.name.startswith(prefix)], key=lambda b: int(b.name[len(prefix) :]))


def without(built: Built, kept: frozenset[Node]) -> Built:
    """The kernel without the stores of outputs that nobody reads any more."""
    k = built.kernel
    names = dict(zip([b.name for b in _numbered(k, "out")], built.outputs, strict=True))
    gone = {name for name, node in names.items() if node not in kept}
    if not gone:
        return built
    stores = [s for s in k.stores if s.buffer not in gone]
    columns = [c for c in k.columns if c.buffer not in gone]
    kernel = _kernel(k.buffers, k.loops, k.axis, stores, columns)
    left = {b.name for b in kernel.buffers}
    inputs = tuple([n for n, b in zip(built.inputs, _numbered(k, "in"), strict=True) if b.name in left])
    return Built(kernel, inputs, tuple([n for n in built.outputs if n in kept]))
