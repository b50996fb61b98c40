"""The default Plan of a C++ kernel, by rule: no measurement, no compiler."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from fusionc.ir.expr import ITEMSIZE, Expr, Index, Load, Op, Reduce, Var, walk
from fusionc.ir.loop import Kernel, Store, evaluate, kernel_bytes
from fusionc.ir.ops import COST

from .plan import Plan

_TILE = 128  # columns whose accumulators stay in the first-level cache beside the data
_FEW = 8  # units of work from which the threads are busy without cutting the axis
_PART = 16384  # points of a part of a cut axis
_LINE = 64  # bytes of a line of a cache
_RUN = 128  # bytes in a row from which writing past the caches pays
_BUSY = 2  # additions beside the stores, for each byte moved, that hide what writing through the caches costs
_SERIAL = 1024  # rows from which column sums are cut into parts of a sixteenth, added up in double: a float running sum drifts


def default_plan(kernel: Kernel, hint: dict[str, int], stream: int | None = None) -> Plan:
    """A good plan for `kernel`; `hint` gives a likely value of each size by name, `stream` the bytes of results from which they
    are written past the caches (None: never)."""
    columns = _columns(kernel, hint)
    tile = _TILE if columns else 1
    past = stream is not None and _stream(kernel, columns, stream, hint)
    return Plan(target="cpp", xblock=tile, rblock=_rblock(kernel, hint, columns), columns=columns, stream=past)


def streamed(kernel: Kernel, stores: Sequence[Store], v: Var) -> list[Store]:
    """Those of `stores` that can be written past the caches in the loop over `v`: runs of a buffer that is only written, and
    by one store.  (Row stores beside an axis come one element at a time.)"""
    writers = Counter(s.buffer for s in kernel.stores)
    return [s for s in stores if _unit(s.index, v) and s.inner == bool(kernel.axis) and writers[s.buffer] == 1
            and kernel.buffer(s.buffer).kind == "out"]  # fmt: skip


def _stream(kernel: Kernel, columns: bool, least: int, hint: dict[str, int]) -> bool:
    """Whether to write past the caches: results of `least` bytes, which no cache holds until they are read, by a kernel that
    waits for memory.  Rows that begin inside a line lose more at their ends than they gain."""
    points = kernel.outer * kernel.inner
    if not points.is_const or kernel.scans or not (kernel.loops or kernel.axis):
        return False
    v = kernel.loops[-1] if columns or not kernel.axis else kernel.axis[-1]
    found = [(s, ITEMSIZE[kernel.buffer(s.buffer).dtype]) for s in streamed(kernel, kernel.stores, v)]
    if not found or points.value * sum(size for _, size in found) < max(least, 1):
        return False
    if any(c * size % _LINE for s, size in found for _, c in (s.index - v).terms):
        return False
    run = v.extent.value * min(size for _, size in found)
    return run >= _RUN and _beside_stores(kernel, columns) * points.value < _BUSY * sum(kernel_bytes(kernel, hint))


def _beside_stores(kernel: Kernel, columns: bool) -> int:
    """Cost of the arithmetic at one point of the loop that stores, in additions.  What the reductions of a row have computed is
    kept for it if it is expensive."""
    moving = frozenset(kernel.axis or kernel.loops)
    kept = set() if columns else set(walk([r.body for r in kernel.reductions]))
    found = _below([s.value for s in kernel.stores if s.inner == bool(kernel.axis)])
    return sum(COST.get(n.name, 0) for n in found if isinstance(n, Op) and n.free & moving and n not in kept)


def _rblock(kernel: Kernel, hint: dict[str, int], columns: bool) -> int:
    """Points of the axis that are one part, where the loops alone would leave threads without work; else 0."""
    if not kernel.axis or kernel.scans:
        return 0
    points, inner = evaluate(kernel.outer, hint), evaluate(kernel.inner, hint)
    units = points
    if columns:
        units = -(-points // _TILE)
        sums = any(r.kind == "sum" and r.dtype == "f32" for r in kernel.reductions)
        if sums and inner >= _SERIAL and not any(s.inner for s in kernel.stores) and len(kernel.axis) == 1:
            return min(max(_SERIAL // 16, -(-inner // 64)), 1 << 16)
    if units >= _FEW or points * inner < 4 * _PART:
        return 0
    longest = max(evaluate(v.extent, hint) for v in kernel.axis)
    parts = min(64, longest, points * inner // _PART // max(units, 1))
    return 0 if parts < 2 else min(-(-longest // parts), 1 << 16)


def _columns(kernel: Kernel, hint: dict[str, int]) -> bool:
    """Whether the loads run along the last loop rather than along the axis."""
    if not kernel.axis or not kernel.loops:
        return False
    x, r = kernel.loops[-1], kernel.axis[-1]
    if evaluate(x.extent, hint) < 8:
        return False
    if evaluate(kernel.inner, hint) <= 4:
        return True
    along_x = along_r = 0
    for at, dtype, times in _accesses(kernel):
        weight = ITEMSIZE[dtype] * times
        for v in at.free:
            weight *= max(evaluate(v.extent, hint), 1)
        along_x += _unit(at, x) * weight
        along_r += _unit(at, r) * weight
    if along_x == along_r:
        return evaluate(kernel.inner, hint) < 8
    return along_x > along_r


def _accesses(kernel: Kernel) -> list[tuple[Index, str, int]]:
    """Accesses that move with the axis: (index, dtype, how often: a norm of transposed rows reads thrice what it writes once)."""
    axis = frozenset(kernel.axis)
    inner = [s for s in kernel.stores if s.inner]
    readers = [(r.level, _loads([r.body])) for r in kernel.reductions]
    readers.append((0, _loads([x for s in inner for x in (s.value, s.index)])))
    passes: dict[Load, set[int]] = {}
    for level, read in readers:
        for load in read:
            passes.setdefault(load, set()).add(level)
    loads = [n for n in kernel.nodes if isinstance(n, Load) and n.index.free & axis]
    out = [(n.index, n.dtype, max(1, len(passes.get(n, ())))) for n in loads]
    return out + [(s.index, kernel.buffer(s.buffer).dtype, 1) for s in inner]


def _loads(roots: list[Expr]) -> list[Load]:
    return [n for n in _below(roots) if isinstance(n, Load)]


def _below(roots: list[Expr]) -> list[Expr]:
    """What some values are made of, outside the reductions they contain."""
    found: dict[int, Expr] = {}
    stack = list(roots)
    while stack:
        node = stack.pop()
        if node.uid not in found:
            found[node.uid] = node
            if not isinstance(node, Reduce):
                stack += node.children()
    return list(found.values())


def _unit(at: Index, v: Var) -> int:
    """1 if the index moves by one element with `v`."""
    c = at.coefficient(v)
    return int(c is not None and c.is_const and c.value == 1)
