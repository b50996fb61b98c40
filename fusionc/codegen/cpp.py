"""Kernel + Plan → one C++ function: OpenMP over the outer loops, `omp simd` inside, no headers of torch.

    extern "C" int SYMBOL(const T* in0, …, T* out0, …, int64_t s0, …)     0, or 1: a checked index was out of range

Three shapes of code, by which variable is vectorised:

    pointwise  the last loop; a load that runs along another loop is packed tile by tile
    rows       the last axis variable: a loop for each nesting level of reductions, then the stores
    columns    the last loop, in tiles with an accumulator per column; the axis runs outside (slow reduced dimensions)

What several loops of a row need and what is expensive (the exponential of a softmax) is kept in a row buffer.  Long
float sums are added up in parts whose totals are doubles.  The threads share the points of the loops evenly.  With
`plan.rblock` the axis is cut into parts of that many points, which the threads share too; the parts are combined in
order.  Nothing depends on the number of threads.
"""

from __future__ import annotations

from fusionc.ir.expr import FLOATS, Expr, Load, Op, Reduce, Var, bounds
from fusionc.ir.loop import Kernel
from fusionc.ir.ops import COST
from fusionc.ir.text import ordered_children
from fusionc.schedule.plan import Plan

from .cpp_acc import Acc, acc_type, as_acc, better, extreme, from_acc, initial, merge, part_type
from .cpp_expr import MEMORY_TYPE, VALUE_TYPE
from .cpp_nest import Nest, ordered_walk, reductions
from .cpp_prelude import PRELUDE

__all__ = ["PRELUDE", "render"]

_BLOCK = 4096  # elements of a long vector loop that are one unit of work
_SUM_RUN = 4096  # a float sum up to this long is one vector loop; longer ones go by _SUM_CHUNK
_SUM_CHUNK = 2048
_COLUMN_CHUNK = 256  # rows that one float column accumulator takes up
_SAVE_COST = 12  # additions from which a value is kept between the loops of a row
_SAVE_LIMIT = 1 << 16  # elements of a row buffer
_STACK_LIMIT = 1 << 14  # elements of a row buffer on the stack
_LANES = 16
_TILE = (16, 64)  # a packed tile: points of the other loop, points of the vectorised loop


def render(kernel: Kernel, plan: Plan, symbol: str) -> str:
    """C++ text that defines `symbol`; compiles after PRELUDE.  Raises ValueError for a kernel it cannot express."""
    columns = bool(plan.columns and kernel.axis and kernel.loops)
    vector = kernel.loops[-1] if kernel.loops and (columns or not kernel.axis) else None
    return _Renderer(kernel, plan, vector, columns).render(symbol)


class _Renderer(Nest):
    def __init__(self, kernel: Kernel, plan: Plan, vector: Var | None, columns: bool):
        super().__init__(kernel, vector, columns)
        self.plan = plan
        self.levels: dict[int, list[Reduce]] = {}
        for r in reductions(kernel):
            self.levels.setdefault(r.level, []).append(r)
        self.levels = {n: self.levels[n] for n in sorted(self.levels)}
        self.inner = [s for s in kernel.stores if s.inner]
        self.row = [s for s in kernel.stores if not s.inner]

    def render(self, symbol: str) -> str:
        k, e = self.k, self.e
        params = []
        for b in k.buffers:
            const, restrict = ("const " if b.kind == "in" else ""), ("" if b.kind == "inout" else " __restrict")
            params.append(f"{const}{MEMORY_TYPE[b.dtype]}*{restrict} {b.name}")
        params += [f"int64_t {s.name}" for s in k.sizes]
        tile, packed = self.choose_tile()
        counters = [(v.name, e.value(v.extent)) for v in k.loops if v is not self.vector and v is not tile]
        if tile is not None:
            counters.append(("tile", self.count("tiles", e.value(tile.extent), _TILE[0])))
        if self.vector is not None:
            n = self.vector.extent
            self.width = _BLOCK if tile is None else _TILE[1]
            if self.columns:
                self.width = min(max(self.plan.xblock, 16), 512)
                if n.is_const:
                    self.width = min(self.width, -(-n.value // 16) * 16)
            if not n.is_const or n.value > self.width:
                counters.append(("block", self.count("blocks", e.value(n), self.width)))
            blocked = counters and counters[-1][0] == "block"
            self.begin = [
                f"const int64_t begin = {f'block * {self.width}' if blocked else '0'};",
                f"const int64_t end = {f'fc_least(begin + {self.width}, {e.value(n)})' if blocked else e.value(n)};",
            ]
        e.line("int err = 0;")
        e.line(f"const int64_t units = {' * '.join([c for _, c in counters]) or '1'};")
        e.line("if (units <= 0) return 0;")
        for c in ordered_walk([x for s in k.stores for x in (s.value, s.index)]):
            if isinstance(c, Op) and c.name == "check_index" and (bounds(c.args[1])[0] or 0) < 1:
                e.line(f"if ({e.value(c.args[1])} <= 0) return 1;")  # there is nothing that an index may name
        split = self.choose_split()
        if split is not None:
            self.render_split(split, counters)
        else:
            clauses = self.clauses(self.plan.parallel)
            if not k.axis:
                self.region("units", counters, clauses, lambda: self.pointwise(tile, packed))
            else:
                self.region("units", counters, clauses, self.reduce_unit)
        e.line("return err;")
        return "\n".join([f'extern "C" int {symbol}({", ".join(params)}) {{', *e.scopes[0].lines, "}"]) + "\n"

    def count(self, name: str, extent: str, step: int | str) -> str:
        self.e.line(f"const int64_t {name} = ({extent} + {step} - 1) / {step};")
        return name

    # -- pointwise ----------------------------------------------------------------------------------------------------
    def choose_tile(self) -> tuple[Var | None, list[Load]]:
        """The loop along which some loads run that jump along the vectorised loop, and these loads."""
        v = self.vector
        found: dict[Var, list[Load]] = {}
        if v is None or self.k.axis or (v.extent.is_const and v.extent.value < 8):
            return None, []
        for n in ordered_walk([x for s in self.k.stores for x in (s.value, s.index)]):
            if not isinstance(n, Load):
                continue
            step = n.index.coefficient(v)
            if step is None or (step.is_const and abs(step.value) < 16):
                continue
            for t in self.k.loops[:-1]:
                c = n.index.coefficient(t)
                if c is not None and c.is_const and c.value == 1 and not (t.extent.is_const and t.extent.value < 8):
                    found.setdefault(t, []).append(n)
        if not found:
            return None, []
        best = max(found, key=lambda t: len(found[t]))
        return best, found[best]

    def pointwise(self, tile: Var | None, packed: list[Load]) -> None:
        e, v = self.e, self.vector
        if v is None:
            self.write([self.stored(s) for s in self.k.stores])
            return
        for line in self.begin:
            e.line(line)
        if tile is not None:
            rows, t = _TILE[0], tile.name
            e.line(f"const int64_t {t}_ = tile * {rows}, {t}_end = fc_least({t}_ + {rows}, {e.value(tile.extent)});")
            names = {n: e.fresh("tile") for n in packed}
            for n, name in names.items():
                self.top.append(f"alignas(64) {VALUE_TYPE[n.dtype]} {name}[{rows * self.width}];")
            e.open([f"for (int64_t {v.name} = begin; {v.name} < end; ++{v.name}) {{"])
            e.bind(v, v.name)
            self.open_simd(t, f"{t}_", f"{t}_end")
            e.bind(tile, t)
            for n, name in names.items():
                e.line(f"{name}[({t} - {t}_) * {self.width} + {v.name} - begin] = {e.value(n)};")
                self.saved[n] = f"{name}[({t} - {t}_) * {self.width} + {v.name} - begin]"
            self.close_simd()
            e.close()
            self.spans[tile] = (f"{t}_", f"{t}_end")
            self.open_loop(tile)
        self.open_vector()
        self.write([self.stored(s) for s in self.k.stores])
        self.close_simd()
        if tile is not None:
            e.close()

    # -- reductions: one unit -----------------------------------------------------------------------------------------
    def reduce_unit(self) -> None:
        passes: list[list[Expr]] = [[r.body for r in reds] for reds in self.levels.values()]
        passes.append([x for s in self.inner for x in (s.value, s.index)])
        save = self.choose_saved(passes)
        if self.columns:
            for line in self.begin:
                self.e.line(line)
        for i, (level, reds) in enumerate(self.levels.items()):
            if self.columns:
                for r, text in self.reduce_columns(reds):
                    self.saved[r] = from_acc(r, text)
                self.save_columns(passes[i + 1 :], level)
                continue
            plain = [r for r in reds if r.kind not in ("argmax", "argmin")]
            arg = [r for r in reds if r.kind in ("argmax", "argmin")]
            done: list[tuple[Reduce, str]] = []
            if plain:
                done += [(a.r, a.result()) for a in self.reduce_row(plain, save[i])]
            if arg:
                done += [(r, p) for r, _, p in self.arg_row(arg)]
            self.bind_results(done)
        self.row_and_inner()

    def bind_results(self, done: list[tuple[Reduce, str]]) -> None:
        for r, text in done:
            name = self.e.fresh()
            self.e.line(f"const {VALUE_TYPE[r.dtype]} {name} = {text};")
            self.e.bind(r, name)

    def row_and_inner(self) -> None:
        """All stores; row values are computed before the inner stores and written after them (inout buffers)."""
        if self.columns and self.row:
            self.open_vector()
            values = [self.stored(s) for s in self.row]
            if not self.inner:
                self.write(values)
            else:
                values = [(s, self.keep_column(MEMORY_TYPE[self.k.buffer(s.buffer).dtype], t)) for s, t in values]
            self.close_simd()
            if self.inner:
                self.store_inner(self.inner)
                self.open_vector()
                self.write(values)
                self.close_simd()
            return
        values = [self.stored(s) for s in self.row]
        if self.inner:
            self.store_inner(self.inner)
        self.write(values)

    def reduce_row(self, reds: list[Reduce], save: list[Expr]) -> list[Acc]:
        """One loop over the axis for all of `reds`; their accumulators."""
        e = self.e
        order, scan = self.axis_order([r.body for r in reds])
        *outer, last = order
        lo, hi = self.span(last)
        chunked = scan is None and any(r.kind == "sum" and r.dtype in FLOATS for r in reds)
        points = self.k.inner
        if chunked and points.is_const and points.value <= _SUM_RUN:
            chunked = False
        accs = [Acc(r, e.fresh("a")) for r in reds]
        for a in accs:
            for d in a.declare(total=chunked):
                e.line(d)
        for v in outer:
            self.open_loop(v)
        parts = accs
        if chunked:
            e.open([f"for (int64_t chunk = {lo}; chunk < {hi}; chunk += {_SUM_CHUNK}) {{"])
            e.line(f"const int64_t stop = fc_least(chunk + {_SUM_CHUNK}, {hi});")
            lo, hi = "chunk", "stop"
            parts = [Acc(a.r, a.name + "p") for a in accs]
            for p in parts:
                for d in p.declare():
                    e.line(d)
        if scan is None:
            self.open_simd(last.name, lo, hi, "".join([c for p in parts for c in p.clauses()]))
            self.bind_saved(last)
        else:
            states = self.scan_states([r.body for r in reds])
            self.open_loop(last)
            self.scan_steps(states)
        for p in parts:
            for line in p.update(p.convert(e.value(p.r.body))):
                e.line(line)
        self.save_row(save)
        if scan is None:
            self.close_simd()
        else:
            e.close()
        if chunked:
            for a, p in zip(accs, parts, strict=True):
                for line in a.combine(p):
                    e.line(line)
            e.close()
        for _ in outer:
            e.close()
        return accs

    def arg_row(self, reds: list[Reduce]) -> list[tuple[Reduce, str, str]]:
        """Positions: a best value and its place for each of several lanes, then the best of the lanes.

        Gives (reduction, best value, place).
        """
        e = self.e
        order, scan = self.axis_order([r.body for r in reds])
        if scan is not None:
            raise ValueError("the position of an extreme of a scan cannot be found in the same kernel")
        *outer, last = order
        lo, hi = self.span(last)
        names = [(r, e.fresh("a"), e.fresh("p")) for r in reds]
        for r, a, p in names:
            e.line(f"alignas(64) {VALUE_TYPE[r.body.dtype]} {a}[{_LANES}];")
            e.line(f"alignas(64) int64_t {p}[{_LANES}];")
            init = extreme(r.kind[3:], r.body.dtype)
            e.line(f"for (int l = 0; l < {_LANES}; ++l) {{ {a}[l] = {init}; {p}[l] = -1; }}")
        for v in outer:
            self.open_loop(v)
        whole = e.fresh("whole")
        e.line(f"const int64_t {whole} = {hi} - ({hi} - {lo}) % {_LANES};")
        for tail in (False, True):
            if tail:
                self.open_simd("l", "0", f"{hi} - {whole}")
            else:
                e.open([f"for (int64_t step = {lo}; step < {whole}; step += {_LANES}) {{"])
                self.open_simd("l", "0", str(_LANES))
            e.line(f"const int64_t {last.name} = {whole if tail else 'step'} + l;")
            self.bind_saved(last)
            place = self.linear()
            for r, a, p in names:
                x = e.value(r.body)
                e.line(f"const bool {a}c = {better(r, x, f'{a}[l]')} | ({p}[l] < 0);")
                e.line(f"{a}[l] = {a}c ? {x} : {a}[l];")
                e.line(f"{p}[l] = {a}c ? {place} : {p}[l];")
            self.close_simd()
            if not tail:
                e.close()
        for _ in outer:
            e.close()
        out = []
        for r, a, p in names:
            name = e.fresh()
            e.line(f"int64_t {name} = {p}[0];")
            e.open([f"for (int l = 1; l < {_LANES}; ++l) {{"])
            wins, loses = better(r, f"{a}[l]", f"{a}[0]"), better(r, f"{a}[0]", f"{a}[l]")
            e.line(f"if ({p}[l] >= 0 && ({wins} | (!{loses} & ({p}[l] < {name})) | ({name} < 0))) {{")
            e.line(f"  {a}[0] = {a}[l]; {name} = {p}[l];")
            e.line("}")
            e.close()
            e.line(f"if ({name} < 0) {name} = 0;")
            out.append((r, f"{a}[0]", name))
        return out

    def reduce_columns(self, reds: list[Reduce]) -> list[tuple[Reduce, str]]:
        """One nest over the axis with an accumulator per column; the texts of the accumulators in a vector loop."""
        e = self.e
        order, scan = self.axis_order([r.body for r in reds])
        lo, hi = self.span(order[0])
        rest = 1
        for o in order[1:]:
            rest *= o.extent.value if o.extent.is_const else 64
        step = max(1, _COLUMN_CHUNK // max(rest, 1))
        first = order[0].extent
        chunked = scan is None and not (first.is_const and first.value <= 2 * step)
        names = [e.fresh("a") for _ in reds]
        accs = [self.array(acc_type(r), a) for r, a in zip(reds, names, strict=True)]
        totals: dict[str, str] = {}
        places: dict[str, str] = {}
        for r, a, acc in zip(reds, names, accs, strict=True):
            if chunked and part_type(r) != acc_type(r):
                totals[acc] = self.array(part_type(r), a + "t")
            if r.kind in ("argmax", "argmin"):
                places[acc] = self.array("int64_t", a + "p")
        self.open_vector()
        for r, acc in zip(reds, accs, strict=True):
            e.line(f"{acc} = {initial(r)};")
            if acc in totals:
                e.line(f"{totals[acc]} = {initial(r)};")
            if acc in places:
                e.line(f"{places[acc]} = -1;")
        self.close_simd()
        if chunked:
            e.open([f"for (int64_t chunk = {lo}; chunk < {hi}; chunk += {step}) {{"])
            e.line(f"const int64_t stop = fc_least(chunk + {step}, {hi});")
            saved_span = self.spans.get(order[0])
            self.spans[order[0]] = ("chunk", "stop")
        for i, o in enumerate(order):
            if scan is not None and i == len(order) - 1:
                states = self.scan_states([r.body for r in reds])
            self.open_loop(o)
        self.open_vector()
        if scan is not None:
            self.scan_steps(states)
        for r, acc in zip(reds, accs, strict=True):
            x = e.value(r.body)
            if acc in places:
                wins = f"{e.fresh('c')}"
                e.line(f"const bool {wins} = {better(r, x, acc)} | ({places[acc]} < 0);")
                e.line(f"{acc} = {wins} ? {x} : {acc};")
                e.line(f"{places[acc]} = {wins} ? {self.linear()} : {places[acc]};")
            else:
                e.line(f"{acc} = {merge(r, acc, as_acc(r, x))};")
        self.close_simd()
        for _ in order:
            e.close()
        if chunked:
            if saved_span is None:
                del self.spans[order[0]]
            else:
                self.spans[order[0]] = saved_span
            if totals:
                self.open_vector()
                for r, acc in zip(reds, accs, strict=True):
                    if acc in totals:
                        e.line(f"{totals[acc]} = {merge(r, totals[acc], acc)};")
                        e.line(f"{acc} = {initial(r)};")
                self.close_simd()
            e.close()
        return [(r, places.get(acc, totals.get(acc, acc))) for r, acc in zip(reds, accs, strict=True)]

    # -- reductions: the axis shared by the threads ---------------------------------------------------------------------
    def choose_split(self) -> Var | None:
        """The axis variable to cut, where the plan asks for it and the kernel allows it."""
        k = self.k
        if not self.plan.rblock or not self.plan.parallel or not self.levels or k.scans:
            return None
        if any(r.kind in ("argmax", "argmin") for r in reductions(k)):
            return None
        if any(b.kind == "inout" for b in k.buffers) and self.inner:
            return None
        fixed = [v for v in k.axis if v.extent.is_const]
        split = max(fixed, key=lambda v: v.extent.value) if len(fixed) == len(k.axis) else k.axis[0]
        if split.extent.is_const and split.extent.value <= self.plan.rblock:
            return None
        return split

    def render_split(self, split: Var, counters: list[tuple[str, str]]) -> None:
        """A parallel region for the parts of each level, one that combines them, and one for the inner stores."""
        e = self.e
        extent = e.value(split.extent)
        parts = self.count("parts", extent, self.plan.rblock)
        both = [*counters, ("part", parts)]
        clauses = self.clauses(True)
        results: dict[Reduce, str] = {}  # text in terms of `point`, the number of the unit

        def begin(point: str, part: bool) -> None:
            if self.columns:
                for line in self.begin:
                    e.line(line)
            if part:
                e.line(f"const int64_t part_begin = part * {self.plan.rblock};")
                e.line(f"const int64_t part_end = fc_least(part_begin + {self.plan.rblock}, {extent});")
                self.spans[split] = ("part_begin", "part_end")
            if not self.columns:
                for r, name in results.items():
                    e.bind(r, f"{name}[{point}]")
                return
            for r, name in results.items():
                self.saved[r] = f"{name}[({point}) * {self.width} + {self.at[1:-1]}]"

        for level, reds in self.levels.items():
            scratch = {r: e.fresh("part") for r in reds}
            total = {r: e.fresh("all") for r in reds}
            for r in reds:
                for name, ctype, n in (
                    (scratch[r], part_type(r), "units * parts"),
                    (total[r], VALUE_TYPE[r.dtype], "units"),
                ):
                    e.line(f"fc_row<{ctype}> {name}_({n} * {self.width if self.columns else 1});")
                    e.line(f"{ctype}* const {name} = {name}_.data;")
                    e.line(f"if (!{name}) return 1;")

            def some(reds: list[Reduce] = reds, scratch: dict[Reduce, str] = scratch, level: int = level) -> None:
                begin("unit / parts", True)
                if self.columns:
                    self.save_columns([[r.body for r in reds]], level - 1)
                    done = self.reduce_columns(reds)
                    self.open_vector()
                    for r, text in done:
                        e.line(f"{scratch[r]}[unit * {self.width} + {self.at[1:-1]}] = {text};")
                    self.close_simd()
                else:
                    for a in self.reduce_row(reds, []):
                        e.line(f"{scratch[a.r]}[unit] = {a.final()};")

            def combine(
                reds: list[Reduce] = reds, scratch: dict[Reduce, str] = scratch, total: dict[Reduce, str] = total
            ) -> None:
                begin("unit", False)
                for r in reds:
                    acc = e.fresh("a")
                    if self.columns:
                        self.open_vector()
                    e.line(f"{part_type(r)} {acc} = {initial(r)};")
                    at = (
                        f"[(unit * parts + i) * {self.width} + {self.at[1:-1]}]"
                        if self.columns
                        else "[unit * parts + i]"
                    )
                    e.line(f"for (int64_t i = 0; i < parts; ++i) {acc} = {merge(r, acc, scratch[r] + at)};")
                    to = f"[unit * {self.width} + {self.at[1:-1]}]" if self.columns else "[unit]"
                    e.line(f"{total[r]}{to} = {from_acc(r, acc)};")
                    if self.columns:
                        self.close_simd()

            self.region(f"units * {parts}", both, clauses, some)
            self.spans.clear()
            self.region("units", counters, clauses if self.columns else None, combine)
            results.update(total)

        def rows() -> None:
            begin("unit", False)
            if self.columns:
                self.open_vector()
                self.write([self.stored(s) for s in self.row])
                self.close_simd()
            else:
                self.write([self.stored(s) for s in self.row])

        def stores() -> None:
            begin("unit / parts", True)
            if self.columns:
                self.save_columns([[x for s in self.inner for x in (s.value, s.index)]], max(self.levels))
            self.store_inner(self.inner)

        if self.row:
            self.region("units", counters, clauses if self.columns else None, rows)
        if self.inner:
            self.region(f"units * {parts}", both, clauses, stores)

    # -- values kept between loops --------------------------------------------------------------------------------------
    def choose_saved(self, passes: list[list[Expr]]) -> list[list[Expr]]:
        """For each pass the expensive values that a later pass needs again, to be kept in a row buffer."""
        save: list[list[Expr]] = [[] for _ in passes]
        if self.columns or self.k.scans or (self.k.inner.is_const and self.k.inner.value > _SAVE_LIMIT):
            return save
        axis = frozenset(self.k.axis)
        seen: dict[Expr, int] = {}  # node -> first pass that computes it
        kept: set[Expr] = set()
        for i, roots in enumerate(passes):
            stack = list(roots)
            visited: set[int] = set()
            while stack:
                n = stack.pop()
                if n.uid in visited or not n.free & axis or isinstance(n, Reduce):
                    continue
                visited.add(n.uid)
                if n in kept:
                    continue
                if n in seen and isinstance(n, Op) and n.dtype in ("f32", "f64") and _cost(n, axis, kept) >= _SAVE_COST:
                    kept.add(n)
                    save[seen[n]].append(n)
                    continue
                seen.setdefault(n, i)
                stack += ordered_children(n)
        return save

    def save_row(self, nodes: list[Expr]) -> None:
        """Inside the vector loop of a pass: keep `nodes` for later passes."""
        e = self.e
        for n in nodes:
            name, ctype = e.fresh("row"), VALUE_TYPE[n.dtype]
            points = self.k.inner
            if points.is_const and points.value <= _STACK_LIMIT:
                self.top.append(f"alignas(64) {ctype} {name}[{max(points.value, 1)}];")
            else:
                self.top.append(f"fc_row<{ctype}> {name}_({e.value(points)});")
                self.top.append(f"{ctype}* const {name} = {name}_.data;")
                self.top.append(f"if (!{name}) {{ err |= 1; hi = lo; }}")
            text = f"{name}[{self.linear()}]"
            e.line(f"{text} = {e.value(n)};")
            self.saved[n] = text

    def save_columns(self, passes: list[list[Expr]], level: int) -> None:
        """Values per column that the loops over the axis need: what they do not change is computed once."""
        axis = frozenset(self.k.axis)
        found: list[Expr] = []
        for roots in passes:
            stack = list(reversed(roots))
            visited: set[int] = set()
            while stack:
                n = stack.pop()
                if n.uid in visited or isinstance(n, Reduce) or n in self.saved or n.level == 0:
                    continue
                visited.add(n.uid)
                if isinstance(n, Op) and not n.free & axis and n.level <= level:
                    if n not in found:
                        found.append(n)
                    continue
                stack += reversed(ordered_children(n))
        if found:
            self.open_vector()
            texts = {n: self.keep_column(VALUE_TYPE[n.dtype], self.e.value(n)) for n in found}
            self.close_simd()
            self.saved.update(texts)

    def keep_column(self, ctype: str, value: str) -> str:
        """Inside a vector loop: put a value into an array over the columns; its text there."""
        text = self.array(ctype, self.e.fresh("col"))
        self.e.line(f"{text} = {value};")
        return text


def _cost(root: Expr, axis: frozenset[Var], kept: set[Expr]) -> int:
    """What computing `root` again would cost, given the values in `kept`."""
    total, stack, seen = 0, [root], set()
    while stack:
        n = stack.pop()
        if n.uid in seen or n in kept or isinstance(n, Reduce) or not n.free & axis:
            continue
        seen.add(n.uid)
        if isinstance(n, Op):
            total += COST[n.name]
        stack += n.children()
    return total
