"""Kernel + Plan → the text of a Triton module that stands by itself.

One program computes `xblock` points of the flattened loops.  With an axis its values are tiles [XBLOCK, RBLOCK]: the
whole axis at once (`plan.rblock == 0`), or in steps of RBLOCK, with one pass over the axis per reduction level; all
reductions of a level share a pass, and inner stores that need no reduction are written in the first.  A maximum and the
sum of exponentials below it share a pass too (`fusionc.ir.online`).

Column sums make the kernel persistent: program p walks over the rows p, p + parts, …, keeps one accumulator a column
sum in registers, and stores them at the end; what does not depend on the row (a norm's weight) is loaded once.

Indices are int32 where every index and offset of the kernel provably fits, else int64; with run-time sizes the kernel
takes a constexpr WIDE and the launcher decides.  Out-of-range lanes are masked; a guarded load is masked by its guard.
The text depends on nothing but its inputs.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..errors import FusioncError
from ..ir.expr import (
    FLOATS,
    ITEMSIZE,
    Const,
    Expr,
    FloorDiv,
    Index,
    Load,
    Mod,
    Op,
    Reduce,
    Scan,
    Size,
    Var,
    bounds,
    index,
)
from ..ir.loop import Kernel, Store, Write
from ..ir.online import online_pairs
from ..ir.ops import COMPARE
from ..ir.text import ordered_terms
from ..schedule.plan import Plan
from . import triton_math as tm
from .triton_math import TL_DTYPE, supports

__all__ = ["Unrenderable", "index_width", "parameters", "refusal", "render", "supports"]

_X, _R = 1, 2  # dimensions of a tile
_SHAPE = {_X: "[XBLOCK, 1]", _R: "[1, RBLOCK]", _X | _R: "[XBLOCK, RBLOCK]"}
_INT32 = (1 << 31) - 1
_MAX_TILE = 1 << 17  # elements of one tile; more cannot be kept in the registers of a block
_LINE = 60  # index texts longer than this get a name
_EACH = 8  # elements of a thread up to which a kernel reads everything first
_HELD = 32  # registers of a thread that all of it may take


class Unrenderable(FusioncError, NotImplementedError):
    """This kernel cannot be expressed in Triton with this plan; the text says why."""


def refusal(kernel: Kernel, plan: Plan) -> str | None:
    """Why `render` would refuse, or None."""
    if kernel.scans and len(kernel.axis) != 1:
        return f"a scan over an axis of {len(kernel.axis)} variables"
    for n in kernel.nodes:
        if isinstance(n, Op) and not supports(n.name, n.args[0].dtype):
            return f"operation {n.name} on {n.args[0].dtype}"
    if kernel.columns and (kernel.part is None or plan.rblock or kernel.scans):
        return "column sums must be staged, and need whole rows in registers and no scan"
    if kernel.axis and plan.rblock == 0:
        if not kernel.inner.is_const:
            return "an axis of unknown length cannot be kept in registers: the plan needs an rblock"
        if next_power_of_2(kernel.inner.value) * plan.xblock > _MAX_TILE:
            return f"a tile of {plan.xblock} × {kernel.inner.value} elements is too large"
    return None


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def index_width(kernel: Kernel) -> int | None:
    """32 if all index arithmetic fits int32, 64 if it may not, None if that depends on run-time sizes."""
    worst = 0
    unknown = False
    polys = [n for n in kernel.nodes if isinstance(n, Index)]
    polys += [b.size for b in kernel.buffers] + [kernel.outer * 2, kernel.inner * 2]  # ×2: lanes beyond the end
    for p in polys:
        total = 0
        for m, c in p.terms:
            part = abs(c)
            for a in m:
                lo, hi = bounds(a)
                if hi is not None:
                    part *= max(abs(lo or 0), abs(hi), 1)
                elif _of_sizes(a):
                    unknown = True
            total += part
        worst = max(worst, total)
    if worst > _INT32:
        return 64
    return None if unknown else 32


def _of_sizes(a: Expr) -> bool:
    """Is this atom unbounded because of a run-time size (rather than because it is loaded, as an int64)?"""
    return isinstance(a, (Var, Size)) or any(_of_sizes(c) for c in a.children() if not isinstance(a, (Load, Op)))


def parameters(kernel: Kernel) -> list[tuple[str, str]]:
    """(name, type) of the run-time parameters in order: "*fp32" for a tensor, "fp32" by value, "size" for a size."""
    short = {"b1": "i1", "f16": "fp16", "bf16": "bf16", "f32": "fp32", "f64": "fp64"}
    out = []
    for b in kernel.buffers:
        dtype = short.get(b.dtype, b.dtype)
        if b.scalar:
            out.append((b.name, "fp32" if b.dtype in ("f16", "bf16") else dtype))
        else:
            out.append((b.name, "*" + dtype))
    return out + [(s.name, "size") for s in kernel.sizes]


def render(kernel: Kernel, plan: Plan, name: str) -> str:
    """The module text; it defines the `triton.jit` function `name` (parameters: see `parameters`, then WIDE if
    `index_width(kernel)` is None).  Raises Unrenderable where `refusal` gives a reason."""
    why = refusal(kernel, plan)
    if why is not None:
        raise Unrenderable(f"kernel {name} cannot be rendered for Triton: {why}")
    return _Writer(kernel, plan, name).module()


_STEPPED = frozenset(("floor", "ceil", "round", "trunc", "floordiv", "mod", "truncdiv", "fmod", "sign"))


def _half(kernel: Kernel) -> bool:
    """Do float32 functions exact to about 20 bits suffice, at a fraction of the instructions?

    They do where every result has 8 or 11 bits (sums of columns beside such results are gradients of that precision),
    unless a step makes much of a last bit: floor(6 / 2) must be 3.
    """
    if not kernel.stores or not {kernel.buffer(s.buffer).dtype for s in kernel.stores} <= {"f16", "bf16"}:
        return False
    for n in kernel.nodes:
        if isinstance(n, Reduce) and n.kind in ("argmax", "argmin"):
            return False
        if not isinstance(n, Op) or n.args[0].dtype not in FLOATS:
            continue
        if n.name in _STEPPED or (n.name == "cast" and n.dtype not in FLOATS):
            return False
        if n.name in COMPARE and not all(_given(a) for a in n.args):
            return False
    return True


def _given(e: Expr) -> bool:
    """A number as it was loaded, or a literal."""
    while isinstance(e, Op) and e.name == "cast":
        e = e.args[0]
    return isinstance(e, (Load, Const))


class _Writer:
    block = "tl.program_id(0)"  # text of the number of the program

    def __init__(self, kernel: Kernel, plan: Plan, name: str):
        self.k, self.plan, self.name = kernel, plan, name
        self.width = index_width(kernel)
        self.lines: list[str] = []
        self.depth = 1
        self.text: dict[int, str] = {}  # node → name or literal, valid in this place
        self.dims: dict[int, int] = {}
        self.local: list[int] = []  # nodes whose text ends with the current loop over the axis
        self.count = 0
        self.helpers: dict[str, str] = {}
        self.axis = frozenset(kernel.axis)
        self.loops = frozenset(kernel.loops)
        self.rank2 = bool(kernel.axis)
        self.eviction: str | None = None  # eviction hint of the pass being written
        self.looped = self.rank2 and plan.rblock > 0
        self.inverses: dict[int, str] = {}
        # sums of exponentials, one of which is exp(0): at least 1, or NaN
        self.totals = frozenset(online_pairs(kernel))
        self.half = _half(kernel)

    # -- lines ------------------------------------------------------------------------------------------------------
    def line(self, text: str) -> None:
        self.lines.append("    " * self.depth + text)

    def fresh(self, text: str) -> str:
        name = f"t{self.count}"
        self.count += 1
        self.line(f"{name} = {text}")
        return name

    def body(self) -> None:
        """Write the statements of the function, except its head."""
        k = self.k
        self.prologue()
        if k.columns:
            self.rows()
        elif self.looped:
            self.passes()
        else:
            if self.rank2:
                self.axis_variables("rbase")
            roots = [e for s in k.stores for e in (s.index, s.value)]
            if self.few_each():
                self.emit([n for n in self.order(roots) if isinstance(n, Load) and n.level == 0])
            self.emit(roots)
            for s in k.stores:
                self.store(s)

    def few_each(self) -> bool:
        """All is read before the first reduction, where that takes few registers of a thread.

        Threads wait for each other in a reduction, and then once more for what is read after it.
        """
        if not self.rank2 or not self.k.reductions:
            return False
        each = max(1.0, self.plan.xblock * self.rblock / (32 * self.plan.warps))
        words = sum(ITEMSIZE[n.dtype] / 4 for n in self.k.loads if n.level == 0 and n.free & self.axis)
        return each <= _EACH and each * words <= _HELD

    def module(self) -> str:
        k = self.k
        self.body()
        params = [n for n, _ in parameters(k)] + (["WIDE: tl.constexpr"] if self.width is None else [])
        head = ["import triton", "import triton.language as tl"]
        if any("libdevice." in t for t in self.lines):
            head.append("from triton.language.extra import libdevice")
        parts = ["\n".join(head)]
        parts += [self.helpers[n].rstrip() for n in sorted(self.helpers)]
        parts.append("\n".join([f"@triton.jit\ndef {self.name}({', '.join(params)}):", *self.lines]))
        return "\n\n\n".join(parts) + "\n"

    def wide(self, text: str) -> str:
        return f"({text}).to(tl.int64)" if self.width == 64 else text

    def prologue(self) -> None:
        k, p = self.k, self.plan
        self.line(f"XBLOCK: tl.constexpr = {p.xblock}")
        if self.rank2:
            block = p.rblock or next_power_of_2(k.inner.value)
            if k.inner.is_const:
                block = min(block, next_power_of_2(k.inner.value))
            self.rblock = block
            self.line(f"RBLOCK: tl.constexpr = {block}")
        self.line("pid = " + self.wide(self.block))
        if self.width is None:
            self.line("if WIDE:")
            self.line("    pid = pid.to(tl.int64)")
        self.xmask = None if k.outer.is_const and k.outer.value % p.xblock == 0 else "xmask"
        if k.columns:
            assert k.part is not None
            self.text[k.part.uid], self.dims[k.part.uid] = "pid", 0
        else:
            self.loop_variables("pid * XBLOCK + ")
        if self.rank2:
            self.line("rbase = " + self.wide("tl.arange(0, RBLOCK)[None, :]"))
            if self.width is None:
                self.line("if WIDE:")
                self.line("    rbase = rbase.to(tl.int64)")
            step = self.rblock * (p.unroll if self.looped else 1)
            self.rmask = None if k.inner.is_const and k.inner.value % step == 0 else "rmask"

    def loop_variables(self, start: str, step: str = "") -> None:
        lanes = "tl.arange(0, XBLOCK)" + ("[:, None]" if self.rank2 else "")
        self.line(f"x = {start}{lanes}{step}")
        if self.xmask:
            self.line(f"xmask = x < {self.size(self.k.outer)}")
        self.variables("x", self.k.loops, _X)

    def variables(self, flat: str, vars: tuple[Var, ...], dims: int, suffix: str = "") -> None:
        """Recover the variables from their flattened position."""
        stride = index(1)
        whole = index(0)
        texts = []
        for v in reversed(vars):
            whole = whole + index(v) * stride
            text = flat if stride.is_const and stride.value == 1 else f"{flat} // {self.size(stride)}"
            if v is not vars[0]:
                text = f"{text} % {self.size(v.extent)}"
            texts.append((v, text))
            stride = stride * v.extent
        for v, text in reversed(texts):
            self.dims[v.uid] = dims
            self.text[v.uid] = flat
            if text != flat:
                self.text[v.uid] = v.name + suffix
                self.line(f"{v.name}{suffix} = {text}")
        # put together again, the position itself: Triton would not see that it is contiguous
        if vars:
            self.dims[whole.uid], self.text[whole.uid] = dims, flat

    def axis_variables(self, base: str, suffix: str = "") -> None:
        """Positions along the axis from `base` on; the names of one tile of several end with `suffix`."""
        r = base
        if base != "rbase":
            r = "r" + suffix
            self.line(f"{r} = {base} + rbase")
        self.flat = r
        if self.rmask:
            self.rmask = "rmask" + suffix
            self.line(f"{self.rmask} = {r} < {self.size(self.k.inner)}")
        self.variables(r, self.k.axis, _R, suffix)

    def size(self, p: Index) -> str:
        """A polynomial in sizes as an operand."""
        self.emit([p])
        text = self.text[p.uid]
        return text if text.isidentifier() or text.isdigit() else f"({text})"

    # -- rows one after the other, with sums of columns ---------------------------------------------------------------
    def rows(self) -> None:
        k = self.k
        assert k.part is not None
        self.axis_variables("rbase")
        sums = list(k.column_sums)
        roots = [e for s in k.stores for e in (s.index, s.value)] + [r.body for r in sums]
        loops = self.loops
        for n in self.order(roots):
            if not n.free & loops and not isinstance(n, Var):
                self.node(n)
        total, parts = self.size(k.outer), self.size(k.part.extent)
        accs = [self.fresh(f"tl.full([XBLOCK, RBLOCK], 0, {self.accumulator(r.kind, r.body.dtype)})") for r in sums]
        stages = f", num_stages={self.plan.stages}" if self.plan.stages > 1 else ""
        self.line(f"for first in tl.range(pid, {total}, {parts} * XBLOCK{stages}):")
        self.depth += 1
        saved, exact = dict(self.text), self.plan.xblock == 1
        self.xmask = None if exact else "xmask"
        self.loop_variables("first + ", f" * {parts}")
        self.emit(roots)
        for s in k.stores:
            self.store(s)
        for r, acc in zip(sums, accs, strict=True):
            text = f"{acc} + {self.tile(r)}"
            self.line(f"{acc} = {text}" if exact else f"{acc} = tl.where(xmask, {text}, {acc})")
        self.depth -= 1
        self.text = saved
        for r, acc in zip(sums, accs, strict=True):
            self.text[r.uid] = self.fresh(f"tl.reduce({acc}, 0, {self.combine('sum', r.body.dtype)}, keep_dims=True)")
            self.dims[r.uid] = _R
        self.emit([e for c in k.columns for e in (c.index, c.value)])
        for c in k.columns:
            self.write(c, _R)

    # -- passes over a looped axis ------------------------------------------------------------------------------------
    def passes(self) -> None:
        k = self.k
        top = max((r.level for r in k.reductions), default=0)
        pairs = online_pairs(k)
        inout = {b.name for b in k.buffers if b.kind == "inout"}
        rows = [s for s in k.stores if not s.inner]
        inner: dict[int, list[Store]] = {}
        for s in k.stores:
            if s.inner:
                # in place, nothing may be overwritten that a later pass reads
                level = top if s.buffer in inout else max(s.value.level, s.index.level)
                inner.setdefault(level, []).append(s)
        work = [
            ([r for r in k.reductions if r.level == n + 1 and r not in pairs], inner.get(n, [])) for n in range(top + 1)
        ]
        work = [w for w in work if w[0] or w[1]]
        for n, (reductions, stores) in enumerate(work):
            mine = {r: m for r, m in pairs.items() if m in reductions}
            self.one_pass(reductions, stores, mine, again=n + 1 < len(work), repeated=n > 0)
        self.emit([e for s in rows for e in (s.index, s.value)])
        for s in rows:
            self.store(s)

    def one_pass(
        self, reductions: list[Reduce], stores: list[Store], pairs: dict[Reduce, Reduce], again: bool, repeated: bool
    ) -> None:
        """A loop over the axis; `again`: another follows and rereads the row, `repeated`: one came before.

        `pairs` are sums of exponentials that are taken below the maximum that this pass finds.
        """
        roots: list[Expr] = [r.body for r in reductions]
        roots += [e for s in stores for e in (s.index, s.value)]
        nodes = self.order(roots)
        for n in nodes:
            if not n.free & self.axis:
                self.node(n)
        extent = self.size(self.k.inner)
        state = {r: self.start(r) for r in reductions}
        sums = {r: self.fresh("tl.full([XBLOCK, RBLOCK], 0.0, tl.float32)") for r in pairs}
        carries = {
            n: self.fresh(f"tl.full([XBLOCK, 1], {tm.identity(n.kind, n.dtype)}, {self.accumulator(n.kind, n.dtype)})")
            for n in nodes
            if isinstance(n, Scan)
        }
        unroll = self.plan.unroll
        step = f"{unroll} * RBLOCK" if unroll > 1 else "RBLOCK"
        self.line(f"for offset in range(0, {extent}, {step}):")
        self.depth += 1
        saved = dict(self.text)
        self.eviction = "evict_last" if again else "evict_first" if repeated else None
        tiles: dict[Reduce, list[str]] = {m: [] for m in pairs.values()}
        done: list[tuple[dict[int, str], str | None]] = []
        for tile in range(unroll):
            self.text = dict(saved)
            self.axis_variables(f"offset + {tile} * RBLOCK" if tile else "offset", f"_{tile}" if tile else "")
            for n in nodes:
                if n.uid not in self.text:
                    self.node(n, carries.get(n))  # type: ignore[call-overload]
            for r in reductions:
                if r in tiles:
                    body = self.tile(r)
                    if self.rmask:
                        body = f"tl.where({self.rmask}, {body}, {tm.identity(r.kind, r.body.dtype)})"
                    tiles[r].append(self.fresh(body))
                else:
                    self.step(r, state[r])
            done.append((self.text, self.rmask))
        for self.text, self.rmask in done:  # after the loads of all tiles: nothing is loaded early across a store
            for s in stores:
                self.store(s)
        for m, found in tiles.items():
            self.online(state[m][0], found, [sums[r] for r in pairs if pairs[r] is m])
        self.depth -= 1
        self.text = saved
        self.eviction = None
        for r in reductions:
            self.finish(r, state[r])
        for r, total in sums.items():
            # a lane that saw nothing but -inf adds exp(-inf) = 0; a row of them gives NaN as exp(-inf + inf) does
            scaled = self.fresh(f"{total} * {self.exponential(f'{state[pairs[r]][0]} - {self.text[pairs[r].uid]}')}")
            self.finish(r, (scaled,))
            if self.half:
                self.inverse(r)

    def online(self, top: str, tiles: list[str], totals: list[str]) -> None:
        """Take `tiles` into the running maximum of each lane and the running sums of exponentials below it."""
        new = top
        for t in tiles:
            new = self.fresh(tm.extreme("max", new, t, "f32"))
        base = self.fresh(f'tl.where({new} == float("-inf"), 0.0, {new})')  # -inf - -inf is no number
        scale = self.exponential(f"{top} - {base}")
        terms = " + ".join([self.exponential(f"{t} - {base}") for t in tiles])
        total = self.fresh(f"{totals[0]} * {scale} + ({terms})")
        for t in totals:
            self.line(f"{t} = {total}")
        self.line(f"{top} = {new}")

    def exponential(self, text: str) -> str:
        return f"tl.exp({text})" if self.half else f"libdevice.exp({text})"

    def accumulator(self, kind: str, dtype: str) -> str:
        return "tl.int32" if dtype == "b1" else TL_DTYPE[dtype]

    def combine(self, kind: str, dtype: str) -> str:
        name = tm.combine_name(kind, dtype)
        self.helpers[name] = tm.combine_source(kind, dtype)
        return name

    def position(self) -> tuple[str, str]:
        """dtype of positions along the axis, and a position after all."""
        if self.width == 64 or (self.width is None and not self.k.inner.is_const):
            return "tl.int64", str((1 << 63) - 1)
        return "tl.int32", str(_INT32)

    def start(self, r: Reduce) -> tuple[str, ...]:
        """Accumulators of a reduction, one lane each."""
        dtype = self.accumulator(r.kind, r.body.dtype)
        acc = self.fresh(f"tl.full([XBLOCK, RBLOCK], {tm.identity(r.kind, r.body.dtype)}, {dtype})")
        if r.kind not in ("argmax", "argmin"):
            return (acc,)
        itype, last = self.position()
        return acc, self.fresh(f"tl.full([XBLOCK, RBLOCK], {last}, {itype})")

    def step(self, r: Reduce, state: tuple[str, ...]) -> None:
        body = self.tile(r)
        if len(state) == 2:
            acc, at = state
            order = ">" if r.kind == "argmax" else "<"
            better = f"({body} {order} {acc}) | (({body} == {acc}) & ({self.flat} < {at}))"
            if r.body.dtype in FLOATS:
                better += f" | (({body} != {body}) & (({acc} == {acc}) | ({self.flat} < {at})))"
            if self.rmask:
                better = f"({better}) & {self.rmask}"
            first = self.fresh(better)
            self.line(f"{at} = tl.where({first}, {self.flat}, {at})")
            self.line(f"{acc} = tl.where({first}, {body}, {acc})")
            return
        (acc,) = state
        dtype = self.accumulator(r.kind, r.body.dtype)
        text = self.together(r.kind, acc, body, "i32" if dtype == "tl.int32" else r.body.dtype)
        self.line(f"{acc} = tl.where({self.rmask}, {text}, {acc})" if self.rmask else f"{acc} = {text}")

    def together(self, kind: str, a: str, b: str, dtype: str) -> str:
        if kind in ("max", "min"):
            return tm.extreme(kind, a, b, dtype)
        return f"{a} {_SIGN[kind]} {b}"

    def finish(self, r: Reduce, state: tuple[str, ...]) -> None:
        fn = self.combine(r.kind, "i32" if r.body.dtype == "b1" else r.body.dtype)
        if len(state) == 2:
            acc, at = state
            _, out = self.fresh_pair(f"tl.reduce(({acc}, {at}), 1, {fn}, keep_dims=True)")
            out = self.fresh(f"{out}.to(tl.int64)")
        else:
            out = self.fresh(f"tl.reduce({state[0]}, 1, {fn}, keep_dims=True)")
            if r.body.dtype == "b1":
                out = self.fresh(f"{out} != 0")
        self.text[r.uid], self.dims[r.uid] = out, _X

    def fresh_pair(self, text: str) -> tuple[str, str]:
        a, b = f"t{self.count}", f"t{self.count + 1}"
        self.count += 2
        self.line(f"{a}, {b} = {text}")
        return a, b

    def tile(self, r: Reduce | Scan) -> str:
        """The body of a reduction as a full tile of the type it is accumulated in."""
        body = self.spread(r.body, _X | _R)
        if r.body.dtype == "b1":
            return f"{body}.to(tl.int32)"
        if r.body.dtype == "i64" and not isinstance(r.body, Load):
            return f"{body}.to(tl.int64)"  # positions are 32 bits wide in the text, where the identity may not fit
        return body

    def reduce(self, r: Reduce) -> str:
        """A reduction over the whole axis at once."""
        body = self.tile(r)
        if self.rmask:
            body = self.fresh(f"tl.where({self.rmask}, {body}, {tm.identity(r.kind, r.body.dtype)})")
        if r.kind not in ("argmax", "argmin"):
            self.finish(r, (body,))
        else:
            itype, last = self.position()
            at = f"tl.where({self.rmask}, {self.flat}, {last})" if self.rmask else self.flat
            at = self.fresh(f"tl.broadcast_to({at}, [XBLOCK, RBLOCK]).to({itype})")
            if body.endswith(")"):
                body = self.fresh(body)
            self.finish(r, (body, at))
        return self.text[r.uid]

    def scan(self, n: Scan, carry: str | None) -> str:
        body = self.tile(n)
        if self.rmask:
            body = f"tl.where({self.rmask}, {body}, {tm.identity(n.kind, n.body.dtype)})"
        body = self.fresh(body)
        dtype = "i32" if n.body.dtype == "b1" else n.body.dtype
        fn = self.combine(n.kind, dtype)
        out = self.fresh(f"tl.associative_scan({body}, 1, {fn})")
        if carry is not None:
            out = self.fresh(self.together(n.kind, carry, out, dtype))
            last = self.fresh(f"tl.reduce({body}, 1, {fn}, keep_dims=True)")
            self.line(f"{carry} = {self.together(n.kind, carry, last, dtype)}")
        return self.fresh(f"{out} != 0") if n.dtype == "b1" else out

    # -- expressions --------------------------------------------------------------------------------------------------
    def order(self, roots: Iterable[Expr]) -> list[Expr]:
        """Nodes that have no text yet, children first; a Reduce of a looped axis must have one."""
        out: list[Expr] = []
        seen: set[int] = set()
        stack = [(r, False) for r in reversed(list(roots))]
        while stack:
            n, done = stack.pop()
            if done:
                out.append(n)
            elif n.uid not in seen and n.uid not in self.text:
                seen.add(n.uid)
                if isinstance(n, Var):
                    continue  # of the axis, named inside the loop
                stack.append((n, True))
                stack.extend((c, False) for c in reversed(n.children()))
        return out

    def emit(self, roots: Iterable[Expr]) -> None:
        for n in self.order(roots):
            self.node(n)

    def node(self, n: Expr, carry: str | None = None) -> None:
        dims = 0
        for c in n.children():
            dims |= self.dims.get(c.uid, 0)
        self.dims[n.uid] = dims
        if isinstance(n, Const):
            text = tm.literal(n.value, n.dtype)
        elif isinstance(n, Size):
            text = n.name
        elif isinstance(n, Index):
            text = self.polynomial(n)
            if len(text) > _LINE:
                text = self.fresh(text)
        elif isinstance(n, (FloorDiv, Mod)):
            text = self.fresh(self.quotient(n))
        elif isinstance(n, Load):
            text = self.load(n)
        elif isinstance(n, Op):
            text = self.operation(n)
        elif isinstance(n, Reduce):
            if self.looped:
                raise AssertionError("reductions of a looped axis are computed by passes")
            text = self.reduce(n)
        elif isinstance(n, Scan):
            text = self.scan(n, carry)
            self.dims[n.uid] = _X | _R
        else:
            raise Unrenderable(f"kernel {self.name} has an unbound {n!r}")
        self.text[n.uid] = text

    def polynomial(self, p: Index) -> str:
        out = ""
        for m, c in ordered_terms(p):
            part = " * ".join([self.text[a.uid] for a in m])
            if not m:
                part = str(abs(c))
            elif abs(c) != 1:
                part += f" * {abs(c)}"
            out += (" - " if c < 0 else " + ") if out else ("0 - " if c < 0 else "")
            out += part
        return out or "0"

    def quotient(self, n: FloorDiv | Mod) -> str:
        a, b = self.paren(n.dividend), self.paren(n.divisor)
        lo, _ = bounds(n.dividend)
        positive = lo is not None and lo >= 0
        if isinstance(n, Mod):
            return f"{a} % {b}" if positive else f"({a} % {b} + {b}) % {b}"
        return f"{a} // {b}" if positive else f"({a} - ({a} % {b} + {b}) % {b}) // {b}"

    def paren(self, e: Expr) -> str:
        text = self.text[e.uid]
        plain = text.isidentifier() or text.isdigit() or (isinstance(e, Const) and not text.startswith("-"))
        return text if plain else f"({text})"

    def is_literal(self, e: Expr) -> bool:
        return isinstance(e, Const) or (isinstance(e, Index) and e.is_const)

    def tensor(self, e: Expr, dtype: str | None = None) -> str:
        """`e` as a Triton value (not a Python number) of its own dtype."""
        if self.is_literal(e):
            text = self.text[e.uid]
            if text == "-0.0":  # a literal zero of any sign becomes +0.0
                return f"(tl.full([], 0.0, {TL_DTYPE[e.dtype]}) * -1.0)"
            return f"tl.full([], {text}, {TL_DTYPE[e.dtype]})"
        return self.paren(e)

    def operation(self, n: Op) -> str:
        name, dtype = n.name, n.args[0].dtype
        if name == "check_index":
            return self.check_index(n)
        values = n.args[1:] if name == "where" else n.args
        force = name in tm.NEEDS_TENSORS or all(self.is_literal(a) for a in values)
        args = []
        for a in n.args:
            negative_zero = isinstance(a, Const) and self.text[a.uid] == "-0.0"
            text = self.tensor(a) if force or negative_zero else self.paren(a)
            if isinstance(a, Index) and not self.is_literal(a) and self.width != 64:
                if name not in COMPARE and name != "cast":
                    text = f"{text}.to(tl.int64)"  # an index as a value is an int64, whatever it is computed in
            args.append(text)
        if name == "where":
            dtype = n.dtype
        if self.half and dtype == "f32":
            quick = tm.quick(name, args)
            if name == "div" and n.args[1] in self.totals:
                quick = f"{args[0]} * {self.inverse(n.args[1])}"
            if name in tm.QUICK and self.beside_one(n):
                self.helpers[f"_{name}"] = tm.QUICK[name]
                quick = f"_{name}({args[0]})"
            if quick is not None:
                return self.fresh(quick)
        return self.fresh(tm.operation(name, args, dtype, n.dtype, self.fresh))

    def inverse(self, total: Expr) -> str:
        """1 / total, once a row: a division an element is as dear as its exponential."""
        found = self.inverses.get(total.uid)
        if found is None:
            found = self.inverses[total.uid] = self.fresh(f"1.0 / {self.paren(total)}")
        return found

    def beside_one(self, n: Op) -> bool:
        """Is `n` only ever added to a constant of at least 1, as in 1 + erf(x)?  Then its absolute error counts."""
        if self.users is None:
            self.users = {}
            for m in self.k.nodes:
                for c in m.children():
                    self.users.setdefault(c.uid, []).append(m)
        return all(
            isinstance(u, Op) and u.name == "add" and any(isinstance(a, Const) and abs(a.value) >= 1 for a in u.args)
            for u in self.users.get(n.uid, [])
        )

    users: dict[int, list[Expr]] | None = None

    def check_index(self, n: Op) -> str:
        i, size = self.tensor(n.args[0]), self.paren(n.args[1])
        wrapped = self.fresh(f"tl.where({i} < 0, {i} + {size}, {i})")
        out = self.fresh(f"tl.maximum(tl.minimum({wrapped}, {size} - 1), 0)")
        if self.width == 32 or (self.width is None and n.args[1].dtype == "i64" and bounds(n)[1] is not None):
            hi = bounds(n)[1]
            if hi is not None and hi <= _INT32:
                out = self.fresh(f"{out}.to(tl.int32)")
        return out

    def spread(self, e: Expr, dims: int) -> str:
        """`e` as a block of the given dimensions."""
        have = self.dims.get(e.uid, 0)
        shape = _SHAPE[dims] if self.rank2 else "[XBLOCK]"
        if have == dims:
            return self.paren(e)
        if have == 0:
            text = self.tensor(e)
            dtype = TL_DTYPE[e.dtype]
            if isinstance(e, Index):
                dtype = "tl.int32" if self.width == 32 else "tl.int64"
            return f"tl.full({shape}, {self.paren(e) if not text.startswith('(tl') else text}, {dtype})"
        return f"tl.broadcast_to({self.paren(e)}, {shape})"

    def mask(self, dims: int) -> list[str]:
        out = [self.xmask] if dims & _X and self.xmask else []
        return out + ([self.rmask] if dims & _R and self.rmask else [])

    def load(self, n: Load) -> str:
        b = self.k.buffer(n.buffer)
        if b.scalar:
            self.dims[n.uid] = 0
            got = self.fresh(f"tl.full([], {b.name}, {TL_DTYPE['f32' if n.dtype in ('f16', 'bf16') else n.dtype]})")
            return got if n.dtype not in ("f16", "bf16") else self.fresh(f"{got}.to({TL_DTYPE[n.dtype]})")
        at = self.paren(n.index)
        dims = self.dims.get(n.index.uid, 0)
        guards: list[str] = []
        if n.guard is not None:
            wanted = dims | self.dims.get(n.guard.uid, 0)
            if wanted != dims:
                at = self.spread(n.index, wanted)
                dims = wanted
            guards = [self.paren(n.guard)]
        self.dims[n.uid] = dims
        masks = self.mask(dims) + guards
        extra = f", mask={' & '.join(masks)}" if masks else ""
        if n.guard is not None and n.other is not None:
            extra += f", other={tm.literal(n.other.value, n.dtype)}"
        elif masks and b.dtype == "b1":
            extra += ", other=0"
        hint = self.eviction or ("evict_last" if self.plan.stream else None)
        if hint and dims & _X and (dims & _R or not self.k.axis):
            extra += f', eviction_policy="{hint}"'
        return self.fresh(f"tl.load({b.name} + {at}{extra})")

    def store(self, s: Store) -> None:
        self.write(s, (_X | _R) if s.inner else _X)

    def write(self, s: Write, dims: int) -> None:
        b = self.k.buffer(s.buffer)
        at = self.spread(s.index, dims)
        value = self.spread(s.value, dims) if self.dims.get(s.value.uid, 0) != dims else self.tensor(s.value)
        if s.value.dtype != b.dtype:
            if not value.isidentifier():
                value = self.fresh(value)
            value = tm.cast(value, s.value.dtype, b.dtype)
            if value.endswith("!= 0"):
                value = self.fresh(value)
        masks = self.mask(dims)
        extra = f", mask={' & '.join(masks)}" if masks else ""
        if self.eviction == "evict_first" and dims & _R:
            extra += ', eviction_policy="evict_first"'  # leaves the cache to rows that are read again
        self.line(f"tl.store({b.name} + {at}, {value}{extra})")


_SIGN = {"sum": "+", "prod": "*", "any": "|", "all": "&"}
