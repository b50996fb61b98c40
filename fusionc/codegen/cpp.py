"""Kernel + Plan → one C++ function: OpenMP over the outer loops, `omp simd` inside, no headers of torch.

    extern "C" int SYMBOL(const T* in0, …, T* out0, …, int64_t s0, …)     0, or 1: a checked index was out of range

Three shapes of code, by which variable is vectorised:

    pointwise  the last loop; a load that runs along another loop is packed tile by tile
    rows       the last axis variable: a loop for each nesting level of reductions, then the stores
    columns    the last loop, in tiles with an accumulator per column; the axis runs outside (slow reduced dimensions)

What several loops of a row need and what is expensive (the exponential of a softmax) is kept in a row buffer.  Long
float sums are added up in parts whose totals are doubles.  The threads share the points of the loops evenly.  With
`plan.rblock` the axis is cut into parts of that many points, which the threads share too; the parts are combined in
order.  Nothing depends on the number of threads.  With `plan.stream` what the vector loops store is gathered by 512
bytes and written past the caches, which saves reading the lines first.
"""

from __future__ import annotations

from fusionc.ir.expr import Expr, Load, Op, Reduce, Var, bounds
from fusionc.ir.loop import Kernel
from fusionc.schedule.plan import Plan

from .cpp_acc import from_acc, initial, merge, part_type
from .cpp_expr import MEMORY_TYPE, VALUE_TYPE
from .cpp_nest import ordered_walk, reductions
from .cpp_prelude import PRELUDE
from .cpp_reduce import Reductions

__all__ = ["PRELUDE", "render"]

_BLOCK = 4096  # elements of a long vector loop that are one unit of work
_TILE = (16, 64)  # a packed tile: points of the other loop, points of the vectorised loop


def render(kernel: Kernel, plan: Plan, symbol: str) -> str:
    """C++ text that defines `symbol`; compiles after PRELUDE.  Raises ValueError for a kernel it cannot express."""
    columns = bool(plan.columns and kernel.axis and kernel.loops)
    vector = kernel.loops[-1] if kernel.loops and (columns or not kernel.axis) else None
    return _Renderer(kernel, plan, vector, columns).render(symbol)


class _Renderer(Reductions):
    def __init__(self, kernel: Kernel, plan: Plan, vector: Var | None, columns: bool):
        super().__init__(kernel, plan, vector, columns)
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
        with self.chunks(self.k.stores, v):
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
