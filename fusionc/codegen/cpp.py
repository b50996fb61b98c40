"""Kernel + Plan → one C++ function: OpenMP over the outer loops, `omp simd` inside, no headers of torch.

    extern "C" int SYMBOL(const T* in0, …, T* out0, …, int64_t s0, …)     0, or 1: a checked index was out of range

Three shapes of code, by which variable is vectorised:

    pointwise  the last loop
    rows       the last axis variable: a loop for each nesting level of reductions, then the stores
    columns    the last loop, in tiles with an accumulator per column; the axis runs outside (slow reduced dimensions)

What several loops of a row need and what is expensive (the exponential of a softmax) is kept in a row buffer.  Long
float sums are added up in pieces whose totals are doubles.  The threads share the points of the loops evenly; nothing
depends on their number.
"""

from __future__ import annotations

from collections.abc import Iterable

from fusionc.ir.expr import FLOATS, Expr, Index, Op, Reduce, Scan, Var
from fusionc.ir.loop import Kernel, Store
from fusionc.ir.ops import COST
from fusionc.ir.text import ordered_children
from fusionc.schedule.plan import Plan

from .cpp_expr import MEMORY_TYPE, VALUE_TYPE, Emitter, convert, literal, to_memory
from .cpp_prelude import PRELUDE

__all__ = ["PRELUDE", "render"]

_PARALLEL = 32768  # element operations worth waking the threads for
_BLOCK = 4096  # elements of a long vector loop that are one unit of work
_SUM_RUN = 4096  # a float sum up to this long is one vector loop; longer ones go by _SUM_CHUNK
_SUM_CHUNK = 2048
_COLUMN_CHUNK = 256  # rows that one float column accumulator takes up
_SAVE_COST = 12  # additions from which a value is kept between the loops of a row
_SAVE_LIMIT = 1 << 16  # elements of a row buffer
_LANES = 16
_MIN = {"u8": 0, "i8": -(1 << 7), "i16": -(1 << 15), "i32": -(1 << 31), "i64": -(1 << 63)}
_MAX = {"u8": 255, "i8": (1 << 7) - 1, "i16": (1 << 15) - 1, "i32": (1 << 31) - 1, "i64": (1 << 63) - 1}


def render(kernel: Kernel, plan: Plan, symbol: str) -> str:
    """C++ text that defines `symbol`; compiles after PRELUDE.  Raises ValueError for a kernel it cannot express."""
    return _Renderer(kernel, plan, symbol).render()


class _Renderer:
    def __init__(self, kernel: Kernel, plan: Plan, symbol: str):
        self.k, self.plan, self.symbol = kernel, plan, symbol
        self.e = Emitter()
        self.columns = bool(plan.columns and kernel.axis and kernel.loops)
        self.vector: Var | None = None if kernel.axis and not self.columns else kernel.loops[-1] if kernel.loops else None
        self.outer = tuple(v for v in kernel.loops if v is not self.vector)
        self.saved: dict[Expr, str] = {}  # values in row buffers or column arrays: their text inside a vector loop
        self.blocked = False
        self.width = 1
        self.top: list[str] = []  # declarations in front of the loop over units

    # -- the function -----------------------------------------------------------------------------------------------
    def render(self) -> str:
        k, e = self.k, self.e
        params = []
        for b in k.buffers:
            const, restrict = ("const " if b.kind == "in" else ""), ("" if b.kind == "inout" else " __restrict")
            params.append(f"{const}{MEMORY_TYPE[b.dtype]}*{restrict} {b.name}")
        params += [f"int64_t {s.name}" for s in k.sizes]
        out = [f'extern "C" int {self.symbol}({", ".join(params)}) {{']
        factors = [e.value(v.extent) for v in self.outer]
        if self.vector is not None:
            n = self.vector.extent
            if self.columns:
                self.width = min(max(self.plan.xblock, 16), 512)
                if n.is_const:
                    self.width = min(self.width, -(-n.value // 16) * 16)
            else:
                self.width = _BLOCK
            self.blocked = self.columns or not n.is_const or n.value > self.width
            if self.blocked:
                blocks = f"(({e.value(n)} + {self.width - 1}) / {self.width})"
                e.line(f"const int64_t blocks = {blocks};")
                factors.append("blocks")
        e.line(f"const int64_t units = {' * '.join(factors) or '1'};")
        e.line("int err = 0;")
        threads = self.threads()
        e.line("if (units <= 0) return 0;")
        if threads is not None:
            e.open([f"#pragma omp parallel{threads} reduction(|:err)", "{"])
            e.line("int64_t lo, hi;")
            e.line("fc_share(units, &lo, &hi);")
        else:
            e.line("int64_t lo = 0, hi = units;")
        scope = e.scopes[-1]
        mark, pad = len(scope.lines), "  " * scope.indent
        self.loop_over_units(factors)
        scope.lines[mark:mark] = [pad + t for t in self.top]
        if threads is not None:
            e.close()
        e.line("return err;")
        out += e.scopes[0].lines
        return "\n".join(out) + "\n}\n"

    def threads(self) -> str | None:
        """Clauses of the parallel region; None where it does not pay."""
        if not self.plan.parallel:
            return None
        points = self.k.outer * self.k.inner
        limit = _PARALLEL * 8 // (8 + self.k.flops_per_point())
        if points.is_const:
            return "" if points.value >= limit else None
        return f" if({self.e.value(points)} >= {max(limit, 1)})"

    def loop_over_units(self, factors: list[str]) -> None:
        e = self.e
        names = [v.name for v in self.outer] + (["block"] if self.blocked else [])
        rest = "lo"
        decode = []
        for i in range(len(names) - 1, 0, -1):
            decode.append(f"int64_t {names[i]} = {rest} % {factors[i]};")
            rest = f"({rest} / {factors[i]})"
        if names:
            decode.append(f"int64_t {names[0]} = {rest};")
        for d in decode:
            e.line(d)
        e.open(["for (int64_t unit = lo; unit < hi; ++unit) {"])
        for v in self.outer:
            e.bind(v, v.name)
        if self.vector is not None:
            n = e.value(self.vector.extent)
            if self.blocked:
                e.line(f"const int64_t begin = block * {self.width}, end = fc_least(begin + {self.width}, {n});")
            else:
                e.line(f"const int64_t begin = 0, end = {n};")
        self.body()
        if names:
            step, depth = f"++{names[-1]};", 0
            for i in range(len(names) - 1, 0, -1):
                e.line(f"if (++{names[i]} == {factors[i]}) {{")
                e.line(f"  {names[i]} = 0;")
                depth += 1
                step = f"++{names[i - 1]};"
            e.line(step + " }" * depth)
        e.close()

    # -- one unit -----------------------------------------------------------------------------------------------------
    def body(self) -> None:
        k = self.k
        if not k.axis:
            if self.vector is None:
                self.write([(s, self.e.value(s.value)) for s in k.stores])
            else:
                self.open_vector()
                self.write([(s, self.e.value(s.value)) for s in k.stores])
                self.close_vector()
            return
        levels: dict[int, list[Reduce]] = {}
        for r in _reductions(k):
            levels.setdefault(r.level, []).append(r)
        inner = [s for s in k.stores if s.inner]
        row = [s for s in k.stores if not s.inner]
        passes: list[list[Expr]] = [[r.body for r in levels[n]] for n in sorted(levels)]
        passes.append([x for s in inner for x in (s.value, s.index)])
        save = self.choose_saved(passes)
        for i, n in enumerate(sorted(levels)):
            plain = [r for r in levels[n] if r.kind not in ("argmax", "argmin")]
            arg = [r for r in levels[n] if r.kind in ("argmax", "argmin")]
            if plain:
                self.reduce(plain, save[i])
                save[i] = []
            if arg:
                self.arg_reduce(arg, save[i])
            if self.columns:
                self.save_columns(passes[i + 1 :], n)
        if self.columns:
            self.open_vector()
            late = [(s, self.e.value(s.value)) for s in row]
            if inner:  # an inout element must be read before it is written: keep the values
                late = [(s, self.keep_column(s.value, t)) for s, t in late]
                self.close_vector()
            else:
                self.write(late)
                self.close_vector()
                late = []
        else:
            late = [(s, self.e.value(s.value)) for s in row]
            for s in row:
                self.e.value(s.index)
        if inner:
            self.store_inner(inner)
        if late and self.columns:
            self.open_vector()
            self.write(late)
            self.close_vector()
        else:
            self.write(late)

    def write(self, stores: list[tuple[Store, str]]) -> None:
        """Assignments; every value is computed before the first."""
        lines = []
        for s, value in stores:
            dtype = self.k.buffer(s.buffer).dtype
            text = convert(value, s.value.dtype, dtype) if dtype not in ("f16", "bf16") else value
            if dtype in ("f16", "bf16") and s.value.dtype not in ("f32", "f16", "bf16"):
                text = f"(float){value}"
            at = self.e.value(s.index)
            at = at[1:-1] if at[0] == "(" else at
            lines.append(f"{s.buffer}[{at}] = {to_memory(text, dtype, s.value.dtype == dtype)};")
        for line in lines:
            self.e.line(line)

    def open_vector(self, clauses: str = "") -> None:
        """The simd loop over the last loop variable (pointwise, columns)."""
        v = self.vector
        assert v is not None
        self.open_simd([f"for (int64_t {v.name} = begin; {v.name} < end; ++{v.name}) {{"], clauses)
        self.e.bind(v, v.name)
        for node, text in self.saved.items():
            self.e.bind(node, text)

    def open_simd(self, head: list[str], clauses: str) -> None:
        self.err_before, self.e.err = self.e.err, False
        self.e.open([f"#pragma omp simd{clauses}@", *head])

    def close_vector(self) -> None:
        scope = self.e.scopes[-1]
        err = " reduction(|:err)" if self.e.err else ""
        scope.lines[0] = scope.lines[0].replace("@", err)
        self.e.err = self.e.err or self.err_before
        self.e.close()

    # -- reductions ---------------------------------------------------------------------------------------------------
    def axis_order(self, roots: Iterable[Expr]) -> tuple[list[Var], Var | None]:
        """The axis as nested, and the variable that must be innermost and sequential because of a scan."""
        scanned = {s.var for s in _scans(roots)}
        if not scanned:
            return list(self.k.axis), None
        if len(scanned) > 1:
            raise ValueError("scans along different variables cannot share a loop nest")
        (v,) = scanned
        return [a for a in self.k.axis if a is not v] + [v], v

    def reduce(self, reds: list[Reduce], save: list[Expr]) -> None:
        if self.columns:
            self.reduce_columns(reds)
            return
        e = self.e
        order, scan = self.axis_order([r.body for r in reds])
        *outer, last = order
        n = e.value(last.extent)
        chunked = scan is None and any(r.kind == "sum" and r.dtype in FLOATS for r in reds)
        if chunked and self.k.inner.is_const and self.k.inner.value <= _SUM_RUN:
            chunked = False
        accs = [_Acc(r, e.fresh("a")) for r in reds]
        for a in accs:
            for d in a.declare(total=chunked):
                e.line(d)
        for v in outer:
            e.open([f"for (int64_t {v.name} = 0; {v.name} < {e.value(v.extent)}; ++{v.name}) {{"])
            e.bind(v, v.name)
        first, stop = "0", n
        if chunked:
            e.open([f"for (int64_t chunk = 0; chunk < {n}; chunk += {_SUM_CHUNK}) {{"])
            e.line(f"const int64_t stop = fc_least(chunk + {_SUM_CHUNK}, {n});")
            first, stop = "chunk", "stop"
            parts = [_Acc(a.r, a.name + "p") for a in accs]
            for p in parts:
                for d in p.declare(total=False):
                    e.line(d)
        else:
            parts = accs
        head = f"for (int64_t {last.name} = {first}; {last.name} < {stop}; ++{last.name}) {{"
        if scan is None:
            self.open_simd([head], "".join([c for p in parts for c in p.clauses()]))
        else:
            states = self.scan_states([r.body for r in reds])
            e.open([head])
        self.bind_axis(last, order)
        if scan is not None:
            self.scan_steps(states)
        for p in parts:
            for line in p.update(p.convert(e.value(p.r.body))):
                e.line(line)
        self.save_row(save, order)
        if scan is None:
            self.close_vector()
        else:
            e.close()
        if chunked:
            for a, p in zip(accs, parts, strict=True):
                for line in a.combine(p):
                    e.line(line)
            e.close()
        for _ in outer:
            e.close()
        for a in accs:
            name = e.fresh()
            e.line(f"const {VALUE_TYPE[a.r.dtype]} {name} = {a.result()};")
            e.bind(a.r, name)

    def bind_axis(self, last: Var, order: list[Var]) -> None:
        self.e.bind(last, last.name)
        for node, text in self.saved.items():
            if node.uid not in self.e.memo:
                self.e.bind(node, text)

    def arg_reduce(self, reds: list[Reduce], save: list[Expr]) -> None:
        """Positions: a best value and its place for each of several lanes, then the best of the lanes."""
        if self.columns:
            self.reduce_columns(reds)
            return
        e = self.e
        order, scan = self.axis_order([r.body for r in reds])
        if scan is not None:
            raise ValueError("argmax of a scan in one kernel is not supported")
        *outer, last = order
        n = e.value(last.extent)
        names = [(r, e.fresh("a"), e.fresh("p")) for r in reds]
        for r, a, p in names:
            e.line(f"alignas(64) {VALUE_TYPE[r.body.dtype]} {a}[{_LANES}];")
            e.line(f"alignas(64) int64_t {p}[{_LANES}];")
            init = _extreme(r.kind[3:], r.body.dtype)
            e.line(f"for (int l = 0; l < {_LANES}; ++l) {{ {a}[l] = {init}; {p}[l] = -1; }}")
        for v in outer:
            e.open([f"for (int64_t {v.name} = 0; {v.name} < {e.value(v.extent)}; ++{v.name}) {{"])
            e.bind(v, v.name)
        whole = e.fresh("whole")
        e.line(f"const int64_t {whole} = {n} - {n} % {_LANES};")
        for tail in (False, True):
            if tail:
                self.open_simd([f"for (int64_t l = 0; l < {n} - {whole}; ++l) {{"], "")
            else:
                e.open([f"for (int64_t step = 0; step < {whole}; step += {_LANES}) {{"])
                self.open_simd([f"for (int l = 0; l < {_LANES}; ++l) {{"], "")
            e.line(f"const int64_t {last.name} = {whole if tail else 'step'} + l;")
            self.bind_axis(last, order)
            place = self.linear(order)
            for r, a, p in names:
                x = e.value(r.body)
                e.line(f"const bool {a}c = {_better(r, x, f'{a}[l]')} | ({p}[l] < 0);")
                e.line(f"{a}[l] = {a}c ? {x} : {a}[l];")
                e.line(f"{p}[l] = {a}c ? {place} : {p}[l];")
            self.close_vector()
            if not tail:
                e.close()
        for _ in outer:
            e.close()
        for r, a, p in names:
            name = e.fresh()
            e.line(f"int64_t {name} = {p}[0];")
            e.open([f"for (int l = 1; l < {_LANES}; ++l) {{"])
            better, same = _better(r, f"{a}[l]", f"{a}[0]"), f"!({_better(r, f'{a}[0]', f'{a}[l]')})"
            e.line(f"const bool c = ({p}[l] >= 0) & ({better} | ({same} & ({p}[l] < {name})));")
            e.line(f"if (c) {{ {a}[0] = {a}[l]; {name} = {p}[l]; }}")
            e.close()
            e.line(f"if ({name} < 0) {name} = 0;")
            e.bind(r, name)

    def linear(self, order: list[Var]) -> str:
        """The row-major position in the axis."""
        total = Index(())
        for v in self.k.axis:
            total = total * v.extent + v
        return self.e.value(total)

    def reduce_columns(self, reds: list[Reduce]) -> None:
        e, v = self.e, self.vector
        assert v is not None
        order, scan = self.axis_order([r.body for r in reds])
        names = [e.fresh("a") for _ in reds]
        at = f"[{v.name} - begin]"
        first = order[0].extent
        rest = 1
        for o in order[1:]:
            rest *= o.extent.value if o.extent.is_const else 64
        step = max(1, _COLUMN_CHUNK // max(rest, 1))
        sums = [(r, a) for r, a in zip(reds, names, strict=True) if r.kind == "sum" and r.dtype == "f32"]
        chunked = scan is None and bool(sums) and not (first.is_const and first.value <= 2 * step)
        inits = []
        for r, a in zip(reds, names, strict=True):
            ctype = _acc_type(r)
            self.top.append(f"alignas(64) {ctype} {a}[{self.width}];")
            inits.append(f"{a}{at} = {_initial(r)};")
            if r.kind in ("argmax", "argmin"):
                self.top.append(f"alignas(64) int64_t {a}p[{self.width}];")
                inits.append(f"{a}p{at} = -1;")
            if chunked and (r, a) in sums:
                self.top.append(f"alignas(64) double {a}t[{self.width}];")
                inits.append(f"{a}t{at} = 0;")
        self.open_vector()
        for line in inits:
            e.line(line)
        self.close_vector()
        if chunked:
            n = e.value(first)
            e.open([f"for (int64_t chunk = 0; chunk < {n}; chunk += {step}) {{"])
            e.line(f"const int64_t stop = fc_least(chunk + {step}, {n});")
        for i, o in enumerate(order):
            lo, hi = ("chunk", "stop") if chunked and i == 0 else ("0", e.value(o.extent))
            if scan is not None and i == len(order) - 1:
                states = self.scan_states([r.body for r in reds])
            e.open([f"for (int64_t {o.name} = {lo}; {o.name} < {hi}; ++{o.name}) {{"])
            e.bind(o, o.name)
        self.open_vector()
        if scan is not None:
            self.scan_steps(states)
        for r, a in zip(reds, names, strict=True):
            x = e.value(r.body)
            if r.kind in ("argmax", "argmin"):
                e.line(f"const bool {a}c = {_better(r, x, a + at)} | ({a}p{at} < 0);")
                e.line(f"{a}{at} = {a}c ? {x} : {a}{at};")
                e.line(f"{a}p{at} = {a}c ? {self.linear(order)} : {a}p{at};")
            else:
                e.line(f"{a}{at} = {_merge(r, f'{a}{at}', _as_acc(r, x))};")
        self.close_vector()
        for _ in order:
            e.close()
        if chunked:
            self.open_vector()
            for _, a in sums:
                e.line(f"{a}t{at} += {a}{at};")
                e.line(f"{a}{at} = 0;")
            self.close_vector()
            e.close()
        for r, a in zip(reds, names, strict=True):
            if r.kind in ("argmax", "argmin"):
                self.saved[r] = f"{a}p{at}"
            elif chunked and (r, a) in sums:
                self.saved[r] = f"(float){a}t{at}"
            else:
                self.saved[r] = _from_acc(r, f"{a}{at}")

    # -- scans --------------------------------------------------------------------------------------------------------
    def scan_states(self, roots: list[Expr]) -> list[tuple[Scan, str]]:
        """Declare (or reset) the accumulators of every scan below `roots`, in order of dependence."""
        out = []
        e, v = self.e, self.vector
        for s in _scans(roots):
            name = e.fresh("s")
            ctype = "double" if s.kind == "sum" and s.dtype in ("f32", "f16", "bf16") else _acc_type(s)
            if self.columns:
                assert v is not None
                self.top.append(f"alignas(64) {ctype} {name}[{self.width}];")
                self.open_vector()
                e.line(f"{name}[{v.name} - begin] = {_initial(s)};")
                self.close_vector()
                name = f"{name}[{v.name} - begin]"
            else:
                e.line(f"{ctype} {name} = {_initial(s)};")
            out.append((s, name))
        return out

    def scan_steps(self, states: list[tuple[Scan, str]]) -> None:
        e = self.e
        for s, acc in states:
            x = _as_acc(s, e.value(s.body))
            e.line(f"{acc} = {_merge(s, acc, x)};")
            name = e.fresh()
            e.line(f"const {VALUE_TYPE[s.dtype]} {name} = {_from_acc(s, acc)};")
            e.bind(s, name)

    # -- stores along the axis ----------------------------------------------------------------------------------------
    def store_inner(self, stores: list[Store]) -> None:
        groups: dict[tuple[Var, ...], list[Store]] = {}
        for s in stores:
            order, _ = self.axis_order([s.value, s.index])
            groups.setdefault(tuple(order), []).append(s)
        for group in groups.values():
            self.store_group(group)

    def store_group(self, stores: list[Store]) -> None:
        e = self.e
        roots: list[Expr] = [x for s in stores for x in (s.value, s.index)]
        order, scan = self.axis_order(roots)
        *outer, last = order
        for v in outer:
            e.open([f"for (int64_t {v.name} = 0; {v.name} < {e.value(v.extent)}; ++{v.name}) {{"])
            e.bind(v, v.name)
        states = self.scan_states(roots) if scan is not None else []
        head = f"for (int64_t {last.name} = 0; {last.name} < {e.value(last.extent)}; ++{last.name}) {{"
        if scan is None and not self.columns:
            self.open_simd([head], "")
        else:
            e.open([head])
        if self.columns:
            e.bind(last, last.name)
            self.open_vector()
        else:
            self.bind_axis(last, order)
        self.scan_steps(states)
        self.write([(s, e.value(s.value)) for s in stores])
        if self.columns:
            self.close_vector()
            e.close()
        elif scan is None:
            self.close_vector()
        else:
            e.close()
        for _ in outer:
            e.close()

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

    def save_row(self, nodes: list[Expr], order: list[Var]) -> None:
        """Inside the vector loop of a pass: keep `nodes` for later passes."""
        e = self.e
        new = {}
        for n in nodes:
            name = e.fresh("row")
            ctype = VALUE_TYPE[n.dtype]
            if self.k.inner.is_const:
                self.top.append(f"alignas(64) {ctype} {name}[{self.k.inner.value}];")
            else:
                size = e.value(self.k.inner)
                self.top.append(f"fc_row<{ctype}> {name}_({size});")
                self.top.append(f"{ctype}* const {name} = {name}_.data;")
                self.top.append(f"if (!{name}) {{ err |= 1; hi = lo; }}")
            at = self.linear(order)
            text = f"{name}[{at[1:-1] if at[0] == '(' else at}]"
            e.line(f"{text} = {e.value(n)};")
            new[n] = text
        self.saved.update(new)

    def save_columns(self, passes: list[list[Expr]], level: int) -> None:
        """Values per column that the loops over the axis need: what they do not change is computed once."""
        axis = frozenset(self.k.axis)
        found: list[Expr] = []
        for roots in passes:
            stack = list(reversed(roots))
            visited: set[int] = set()
            while stack:
                n = stack.pop()
                if n.uid in visited or isinstance(n, Reduce) or n in self.saved:
                    continue
                visited.add(n.uid)
                if not n.free & axis and isinstance(n, Op):
                    if 0 < n.level <= level and n not in found and n.dtype != "b1":
                        found.append(n)
                    if n.level <= level:
                        continue
                stack += reversed(ordered_children(n))
        if found:
            self.open_vector()
            texts = {n: self.keep_column(n, self.e.value(n)) for n in found}
            self.close_vector()
            self.saved.update(texts)

    def keep_column(self, n: Expr, value: str) -> str:
        """Inside a vector loop: put a value into an array over the columns; its text there."""
        assert self.vector is not None
        name = self.e.fresh("col")
        self.top.append(f"alignas(64) {VALUE_TYPE[n.dtype]} {name}[{self.width}];")
        text = f"{name}[{self.vector.name} - begin]"
        self.e.line(f"{text} = {value};")
        return text


class _Acc:
    """The accumulator of one reduction along a vector loop."""

    def __init__(self, r: Reduce, name: str):
        self.r, self.name = r, name
        self.nan = r.kind in ("max", "min") and r.dtype in FLOATS
        self.total = False

    def declare(self, total: bool) -> list[str]:
        self.total = total and self.r.kind == "sum" and self.r.dtype in ("f32", "f16", "bf16")
        out = [f"{'double' if self.total else _acc_type(self.r)} {self.name} = {_initial(self.r)};"]
        return [*out, f"int {self.name}n = 0;"] if self.nan else out

    def clauses(self) -> list[str]:
        sign = {"sum": "+", "prod": "*", "max": "max", "min": "min", "any": "|", "all": "&"}[_kind(self.r)]
        return [f" reduction({sign}:{self.name})"] + ([f" reduction(|:{self.name}n)"] if self.nan else [])

    def convert(self, v: str) -> str:
        return _as_acc(self.r, v)

    def update(self, v: str) -> list[str]:
        a = self.name
        if self.nan:
            sign = ">" if self.r.kind == "max" else "<"
            return [f"{a} = {v} {sign} {a} ? {v} : {a};", f"{a}n |= {v} != {v};"]
        return [f"{a} = {_merge(self.r, a, v)};"]

    def combine(self, part: _Acc) -> list[str]:
        if self.nan:
            sign = ">" if self.r.kind == "max" else "<"
            a, p = self.name, part.name
            return [f"{a} = {p} {sign} {a} ? {p} : {a};", f"{a}n |= {p}n;"]
        return [f"{self.name} = {_merge(self.r, self.name, part.name)};"]

    def result(self) -> str:
        if self.nan:
            return f"{self.name}n ? ({VALUE_TYPE[self.r.dtype]})FC_NAN : {self.name}"
        return f"({VALUE_TYPE[self.r.dtype]}){self.name}"


def _kind(r: Reduce | Scan) -> str:
    """The kind, with max and min of booleans as any and all."""
    if r.dtype == "b1":
        return {"max": "any", "min": "all", "sum": "any", "prod": "all"}.get(r.kind, r.kind)
    return r.kind


def _acc_type(r: Reduce | Scan) -> str:
    if r.kind in ("argmax", "argmin"):
        return VALUE_TYPE[r.body.dtype]
    if _kind(r) in ("any", "all"):
        return "int32_t"
    if r.dtype not in FLOATS and r.kind in ("sum", "prod"):
        return {"i64": "uint64_t"}.get(r.dtype, "uint32_t")
    return VALUE_TYPE[r.dtype]


def _extreme(kind: str, dtype: str) -> str:
    """The neutral value of max or min."""
    if dtype in FLOATS:
        return literal(float("-inf") if kind == "max" else float("inf"), dtype)
    if dtype == "b1":
        return "false" if kind == "max" else "true"
    return literal((_MIN if kind == "max" else _MAX)[dtype], dtype)


def _initial(r: Reduce | Scan) -> str:
    kind = _kind(r)
    if kind in ("sum", "any"):
        return "0"
    if kind in ("prod", "all"):
        return "1"
    return _extreme(kind[-3:], r.body.dtype if kind.startswith("arg") else r.dtype)


def _as_acc(r: Reduce | Scan, v: str) -> str:
    """A value of the body as the accumulator takes it."""
    if _kind(r) in ("any", "all"):
        return v if r.body.dtype == "b1" else f"({v} != 0)"
    return convert(v, r.body.dtype, r.dtype)


def _from_acc(r: Reduce | Scan, acc: str) -> str:
    return f"({VALUE_TYPE[r.dtype]}){acc}"


def _merge(r: Reduce | Scan, a: str, v: str) -> str:
    kind = _kind(r)
    if kind in ("max", "min"):
        return f"fc_{kind}<{VALUE_TYPE[r.dtype]}>({v}, {a})"
    return f"{a} {({'sum': '+', 'prod': '*', 'any': '|', 'all': '&'})[kind]} {v}"


def _better(r: Reduce, v: str, a: str) -> str:
    sign = ">" if r.kind == "argmax" else "<"
    if r.body.dtype in FLOATS:
        return f"(({v} {sign} {a}) | (({v} != {v}) & ({a} == {a})))"
    return f"({v} {sign} {a})"


def _reductions(k: Kernel) -> list[Reduce]:
    """Every reduction, in an order that does not depend on how the nodes were made."""
    return [n for n in _walk([x for s in k.stores for x in (s.value, s.index)]) if isinstance(n, Reduce)]


def _scans(roots: Iterable[Expr]) -> list[Scan]:
    """Scans below `roots` outside nested reductions, children first."""
    return [n for n in _walk(list(roots), into_reductions=False) if isinstance(n, Scan)]


def _walk(roots: list[Expr], into_reductions: bool = True) -> list[Expr]:
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
