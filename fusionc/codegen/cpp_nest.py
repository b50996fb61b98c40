"""The frame of a C++ kernel: units of work shared by threads, vector loops, and assignments.

A unit is one point of the loops that are not vectorised, or one block of the vectorised loop at such a point.  Every
thread takes a contiguous share of the units and steps through it like an odometer, without division.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from fusionc.ir.expr import ITEMSIZE, Expr, Index, Op, Reduce, Scan, Var
from fusionc.ir.loop import Kernel, Store
from fusionc.ir.text import ordered_children
from fusionc.schedule.plan import Plan
from fusionc.schedule.rules_cpp import streamed

from .cpp_acc import HALF, as_acc, from_acc, initial, merge, part_type
from .cpp_expr import MEMORY_TYPE, VALUE_TYPE, Emitter, convert, to_memory

_PARALLEL = 65536  # element operations worth waking the threads for
_STREAM = 512  # bytes gathered before they are written past the caches: with 4096 arithmetic waits for the writes


class Nest:
    """Writes loops around values.  `vector` is the vectorised loop variable, if it is one of the kernel's loops."""

    def __init__(self, kernel: Kernel, plan: Plan, vector: Var | None, columns: bool):
        self.k, self.plan, self.vector, self.columns = kernel, plan, vector, columns
        self.e = Emitter()
        self.width = 1  # of a block of the vectorised loop
        self.saved: dict[Expr, str] = {}  # values in row buffers or column arrays: their text inside a vector loop
        self.top: list[str] = []  # declarations in front of the loop over units
        self.spans: dict[Var, tuple[str, str]] = {}  # variables of which a unit covers only a part
        self.errs: list[bool] = []
        self.past: dict[Store, str] = {}  # stores that go past the caches: where their chunk is gathered
        self.fence = False  # a unit of the region has such stores
        self.at = f"[{vector.name} - begin]" if vector is not None else ""

    # -- units ------------------------------------------------------------------------------------------------------
    def clauses(self, parallel: bool) -> str | None:
        """Clauses of the parallel region; None where it does not pay."""
        if not parallel:
            return None
        points = self.k.outer * self.k.inner
        limit = max(_PARALLEL * 8 // (8 + self.k.flops_per_point()), 1)
        if points.is_const:
            return "" if points.value >= limit else None
        return f" if({self.e.value(points)} >= {limit})"

    def region(
        self, units: str, counters: Sequence[tuple[str, str]], clauses: str | None, body: Callable[[], None]
    ) -> None:
        """Run `body` for every unit; `counters` are (name, extent) of what a unit number consists of, slowest first."""
        e = self.e
        if clauses is not None:
            e.open([f"#pragma omp parallel{clauses} reduction(|:err)", "{"])
            e.line("int64_t lo, hi;")
            e.line(f"fc_share({units}, &lo, &hi);")
        else:
            e.open(["{"])
            e.line(f"int64_t lo = 0, hi = {units};")
        scope = e.scopes[-1]
        mark, self.top, self.fence = len(scope.lines), [], False
        rest = "lo"
        for i, (name, extent) in reversed(list(enumerate(counters))):
            e.line(f"int64_t {name} = {f'{rest} % {extent}' if i else rest};")
            rest = f"({rest} / {extent})"
        e.open(["for (int64_t unit = lo; unit < hi; ++unit) {"])
        for v in self.k.loops:
            if any(v.name == name for name, _ in counters):
                e.bind(v, v.name)
        body()
        for i, (name, extent) in reversed(list(enumerate(counters))):
            e.line(f"if (++{name} == {extent}) {{ {name} = 0;" if i else f"++{name};" + " }" * (len(counters) - 1))
        e.close()
        if self.fence:
            e.line("fc_fence();")
        scope.lines[mark:mark] = ["  " * scope.indent + t for t in self.top]
        e.close()
        self.saved = {}

    # -- loops --------------------------------------------------------------------------------------------------------
    def span(self, v: Var) -> tuple[str, str]:
        return self.spans.get(v) or ("0", self.e.value(v.extent))

    def open_loop(self, v: Var) -> None:
        lo, hi = self.span(v)
        self.e.open([f"for (int64_t {v.name} = {lo}; {v.name} < {hi}; ++{v.name}) {{"])
        self.e.bind(v, v.name)

    def open_simd(self, name: str, lo: str, hi: str, clauses: str = "") -> None:
        """A vector loop; the clause for range errors is added at its end, when it is known."""
        self.errs.append(self.e.err)
        self.e.err = False
        self.e.open([f"#pragma omp simd{clauses}@", f"for (int64_t {name} = {lo}; {name} < {hi}; ++{name}) {{"])

    def open_vector(self) -> None:
        """The vector loop over the block of the last loop (pointwise, columns)."""
        assert self.vector is not None
        self.open_simd(self.vector.name, *self.spans.get(self.vector, ("begin", "end")))
        self.bind_saved(self.vector)

    def bind_saved(self, v: Var) -> None:
        self.e.bind(v, v.name)
        for node, text in self.saved.items():
            if node.uid not in self.e.memo:
                # the position's text may be hoisted into a loop around this one: make it anew in each pass
                self.e.bind(node, text.replace("[@]", f"[{self.linear()}]") if "[@]" in text else text)

    def close_simd(self) -> None:
        scope = self.e.scopes[-1]
        scope.lines[0] = scope.lines[0].replace("@", " reduction(|:err)" if self.e.err else "")
        self.e.err = self.errs.pop() or self.e.err
        self.e.close()

    @contextmanager
    def chunks(self, stores: Sequence[Store], v: Var) -> Iterator[None]:
        """Around the vector loop over `v` that has `stores`: what the plan streams is gathered by chunks in the first-level
        cache, and written past the caches from there.  (OpenMP's `nontemporal` means nothing to GCC.)"""
        e, whole = self.e, self.spans.get(v)
        found = streamed(self.k, stores, v) if self.plan.stream else []
        if not found:
            yield
            return
        block, points = v is self.vector, v.extent.value if v.extent.is_const else None
        lo, hi = ("begin", "end") if block else self.span(v)
        types = [self.k.buffer(s.buffer).dtype for s in found]
        length = _STREAM // max(ITEMSIZE[t] for t in types)
        most = self.width if block else length + 1 if points is None else points
        starts = [bare(e.value(s.index - v)) for s in found]
        if most > length:
            e.open([f"for (int64_t chunk = {lo}; chunk < {hi}; chunk += {length}) {{"])
            full = whole is None and points is not None and points % length == 0 and not (block and self.width % length)
            e.line(f"const int64_t stop = {f'chunk + {length}' if full else f'fc_least(chunk + {length}, {hi})'};")
            lo, hi = "chunk", "stop"
        self.spans[v] = lo, hi
        lines = []
        for s, dtype, start in zip(found, types, starts, strict=True):
            name = e.fresh("past")
            self.top.append(f"alignas(64) {MEMORY_TYPE[dtype]} {name}[{max(min(most, length), 1)}];")
            self.past[s] = f"{name}[{v.name} - {lo}]"
            to = " + ".join(t for t in (s.buffer, start, lo) if t != "0")
            lines.append(f"fc_stream({to}, {name}, {hi} - {lo});")
        yield
        for line in lines:
            e.line(line)
        if most > length:
            e.close()
        del self.spans[v]
        if whole is not None:
            self.spans[v] = whole
        self.past.clear()
        self.fence = True

    def array(self, ctype: str, name: str) -> str:
        """An array with an element for each column of the block; its text inside the vector loop."""
        self.top.append(f"alignas(64) {ctype} {name}[{self.width}];")
        return f"{name}{self.at}"

    def axis_order(self, roots: Iterable[Expr]) -> tuple[list[Var], Var | None]:
        """The axis as nested, and the variable that must be innermost and sequential because of a scan."""
        scanned = {s.var for s in scans_below(roots)}
        if not scanned:
            return list(self.k.axis), None
        if len(scanned) > 1:
            raise ValueError("scans along different variables cannot share a loop nest")
        (v,) = scanned
        return [a for a in self.k.axis if a is not v] + [v], v

    def linear(self) -> str:
        """The row-major position in the axis."""
        total = Index(())
        for v in self.k.axis:
            total = total * v.extent + v
        return bare(self.e.value(total))

    # -- assignments ----------------------------------------------------------------------------------------------------
    def stored(self, s: Store) -> tuple[Store, str]:
        """What `s` assigns, in the form it has in memory; computed here, assigned by `write`."""
        dtype, value = self.k.buffer(s.buffer).dtype, s.value
        if dtype in HALF and isinstance(value, Op) and value.name == "cast" and value.dtype == dtype:
            value = value.args[0]  # rounded once, on the way to memory
        text = self.e.value(value)
        if dtype not in HALF:
            text = convert(text, value.dtype, dtype)
        elif value.dtype not in ("f32", *HALF):
            text = f"(float){text}"
        return s, to_memory(text, dtype, value.dtype == dtype)

    def write(self, stores: list[tuple[Store, str]]) -> None:
        """Assignments of values that are computed already (`stored`)."""
        places = [self.past.get(s) or f"{s.buffer}[{bare(self.e.value(s.index))}]" for s, _ in stores]
        for place, (_, text) in zip(places, stores, strict=True):
            self.e.line(f"{place} = {text};")

    def store_inner(self, stores: list[Store]) -> None:
        """The stores along the axis; those with scans along different variables in different loops."""
        groups: dict[tuple[Var, ...], list[Store]] = {}
        for s in stores:
            groups.setdefault(tuple(self.axis_order([s.value, s.index])[0]), []).append(s)
        for group in groups.values():
            self._store_group(group)

    def _store_group(self, stores: list[Store]) -> None:
        e = self.e
        roots: list[Expr] = [x for s in stores for x in (s.value, s.index)]
        order, scan = self.axis_order(roots)
        *outer, last = order
        for v in outer:
            self.open_loop(v)
        states = self.scan_states(roots) if scan is not None else []
        if self.vector is not None:
            self.open_loop(last)
        with self.chunks(stores, self.vector or last):
            if self.vector is not None:
                self.open_vector()
            elif scan is None:
                self.open_simd(last.name, *self.span(last))
                self.bind_saved(last)
            else:
                self.open_loop(last)
            self.scan_steps(states)
            self.write([self.stored(s) for s in stores])
            if scan is None or self.vector is not None:
                self.close_simd()
            else:
                e.close()
        if self.vector is not None:
            e.close()
        for _ in outer:
            e.close()

    # -- scans ----------------------------------------------------------------------------------------------------------
    def scan_states(self, roots: Iterable[Expr]) -> list[tuple[Scan, str]]:
        """Declare and start the accumulators of every scan below `roots`, in order of dependence."""
        out, e = [], self.e
        for s in scans_below(roots):
            name = e.fresh("run")  # not "s": torch calls its sizes s0, s1, …
            if self.columns:
                name = self.array(part_type(s), name)
                self.open_vector()
                e.line(f"{name} = {initial(s)};")
                self.close_simd()
            else:
                e.line(f"{part_type(s)} {name} = {initial(s)};")
            out.append((s, name))
        return out

    def scan_steps(self, states: list[tuple[Scan, str]]) -> None:
        e = self.e
        for s, acc in states:
            e.line(f"{acc} = {merge(s, acc, as_acc(s, e.value(s.body)))};")
            name = e.fresh()
            e.line(f"const {VALUE_TYPE[s.dtype]} {name} = {from_acc(s, acc)};")
            e.bind(s, name)


def bare(text: str) -> str:
    """Without the parentheses around all of it."""
    return text[1:-1] if text[0] == "(" else text


def reductions(k: Kernel) -> list[Reduce]:
    """Every reduction, in an order that does not depend on how the nodes were made."""
    return [n for n in ordered_walk([x for s in k.stores for x in (s.value, s.index)]) if isinstance(n, Reduce)]


def scans_below(roots: Iterable[Expr]) -> list[Scan]:
    """Scans below `roots` outside nested reductions, children first."""
    return [n for n in ordered_walk(list(roots), into_reductions=False) if isinstance(n, Scan)]


def ordered_walk(roots: list[Expr], into_reductions: bool = True) -> list[Expr]:
    """Every node below `roots`, children first, in canonical order."""
    out: list[Expr] = []
    seen: set[int] = set()
    stack: list[tuple[Expr, bool]] = [(r, False) for r in reversed(roots)]
    while stack:
        n, done = stack.pop()
        if done:
            out.append(n)
        elif n.uid not in seen:
            seen.add(n.uid)
            stack.append((n, True))
            if into_reductions or not isinstance(n, Reduce):
                stack += [(c, False) for c in reversed(ordered_children(n))]
    return out
