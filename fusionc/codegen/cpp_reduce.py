"""Reductions as C++ loops: along a row, over a tile of columns, and what is kept between the loops of a row."""

from __future__ import annotations

from fusionc.ir.expr import FLOATS, Expr, Op, Reduce, Var
from fusionc.ir.ops import COST
from fusionc.ir.text import ordered_children

from .cpp_acc import Acc, acc_type, as_acc, better, extreme, initial, merge, part_type
from .cpp_expr import VALUE_TYPE
from .cpp_nest import Nest

_SUM_RUN = 512  # a float sum up to this long is one vector loop; longer ones go by _SUM_CHUNK: a lane adds one by one
_SUM_CHUNK = 512
_COLUMN_CHUNK = 256  # rows that one float column accumulator takes up
_SAVE_COST = 12  # additions from which a value is kept between the loops of a row
_SAVE_LIMIT = 1 << 16  # elements of a row buffer
_STACK_LIMIT = 1 << 14  # elements of a row buffer on the stack
_LANES = 16


class Reductions(Nest):
    """Writes the loops of one nesting level of reductions inside a unit."""

    def bind_results(self, done: list[tuple[Reduce, str]]) -> None:
        for r, text in done:
            name = self.e.fresh()
            self.e.line(f"const {VALUE_TYPE[r.dtype]} {name} = {text};")
            self.e.bind(r, name)

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
            e.line(f"{name}[{self.linear()}] = {e.value(n)};")
            self.saved[n] = f"{name}[@]"

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
