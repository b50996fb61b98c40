"""Kernels and expressions as text that a person reads and that parses back to the same object.

The text is canonical: it does not depend on the order in which nodes were created (sums and products are printed in an
order of their own), so equal kernels have equal text in every process and its hash can be a cache key.  Values that are
used more than once, or that would make a line long, get a line of their own (`t0 = …`), so that a shared graph does not
unfold into an exponentially large tree.

    kernel
      size  s0 >= 2
      in    in0: f32[1024*s0]
      out   out0: f32[1024*s0]
      for   x0 < s0
      axis  r0 < 1024
        t0 = in0[1024*x0 + r0]
        t1 = exp(sub(t0, max[r0](t0)))
        inner out0[1024*x0 + r0] = div(t1, sum[r0](t1))

Plain arithmetic (`+ - * // %`) is index arithmetic; everything else is an operation by name, `name.dtype(…)` where the
result's dtype does not follow from the arguments.  `in0[i if guard else value]` is a guarded load, `f32(0.5)` a
constant, `idx(v)` an integer value v used as an index polynomial, `atom(e)` the reverse.
"""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Callable

from .expr import (
    DTYPES,
    REDUCTIONS,
    Const,
    Expr,
    FloorDiv,
    Index,
    Load,
    Mod,
    Monomial,
    Op,
    Reduce,
    Scan,
    Size,
    Var,
)
from .loop import Buffer, ColumnStore, Kernel, Store
from .ops import ARITY, COMPARE, PREDICATE

_KEYWORDS = {"not": "not_", "and": "and_", "or": "or_"}
_OPS = {_KEYWORDS.get(name, name): name for name in ARITY}
_LONG = 90  # characters of one inlined value before it gets its own line
_MAX_TEXT, _MAX_LINE = 4_000_000, 65_536


# -- printing -----------------------------------------------------------------------------------------------------


def _key(e: Expr) -> str:
    """A short string that identifies the structure of `e` whatever the creation order; memoised in the node."""
    got = e._str
    if got is not None:
        return got
    stack = [e]  # an explicit stack: long chains must not meet the recursion limit
    while stack:
        n = stack[-1]
        if n._str is not None:
            stack.pop()
            continue
        missing = [c for c in n.children() if c._str is None]
        if missing:
            stack += missing
            continue
        stack.pop()
        n._str = _key_of(n)
    return e._str


def _key_of(n: Expr) -> str:
    if isinstance(n, (Var, Size)):
        return n.name
    if isinstance(n, Index):
        s = "+".join([f"{c}*" + "*".join([a._str for a in m]) for m, c in ordered_terms(n)])
    elif isinstance(n, Const):
        return f"{n.dtype}({n.value!r})"
    elif isinstance(n, (FloorDiv, Mod)):
        s = f"{'/' if isinstance(n, FloorDiv) else '%'}({n.dividend._str},{n.divisor._str})"
    elif isinstance(n, Load):
        guard = "" if n.guard is None else f"?{n.guard._str}:{_key(n.other)}"  # type: ignore[arg-type]
        s = f"{n.buffer}[{n.index._str}{guard}]"
    elif isinstance(n, Op):
        s = f"{n.name}.{n.dtype}({','.join([a._str for a in n.args])})"
    elif isinstance(n, Reduce):
        s = f"{n.kind}.{n.dtype}[{','.join([v.name for v in n.vars])}]({n.body._str})"
    elif isinstance(n, Scan):
        s = f"scan_{n.kind}.{n.dtype}[{n.var.name}]({n.body._str})"
    else:
        raise TypeError(f"{type(n).__name__} is not an expression node")
    return s if len(s) < 64 else "#" + hashlib.blake2b(s.encode(), digest_size=12).hexdigest()


def ordered_terms(e: Index) -> list[tuple[Monomial, int]]:
    """The terms in canonical order: large strides first, the constant last; equal strides by structure."""
    if len(e.terms) < 2 and (not e.terms or len(e.terms[0][0]) < 2):
        return list(e.terms)
    out = []
    for m, c in e.terms:
        if len(m) > 1:
            m = tuple(sorted(m, key=_key))
        out.append((not m, -abs(c), [_key(a) for a in m], m, c))
    out.sort(key=lambda t: t[:3])
    return [(t[3], t[4]) for t in out]


class _Printer:
    """Prints values with shared or long ones on their own lines."""

    def __init__(self, roots: list[Expr], dtypes: dict[str, str], share: bool = True):
        self.dtypes = dtypes
        self.lines: list[str] = []
        self.memo: dict[int, str] = {}
        self.depth: dict[int, int] = {}
        self.uses: dict[int, int] = {}
        self.share = share
        for r in roots:
            _key(r)  # memoises the keys below without recursion
            self.visit(r)

    def visit(self, root: Expr) -> None:
        """Count uses, then print every node below `root`, children first, in canonical order."""
        order: list[Expr] = []
        stack: list[tuple[Expr, bool]] = [(root, False)]
        while stack:
            n, done = stack.pop()
            if done:
                order.append(n)
                continue
            first = n.uid not in self.uses
            self.uses[n.uid] = self.uses.get(n.uid, 0) + 1
            if first:
                stack.append((n, True))
                stack += [(c, False) for c in reversed(ordered_children(n))]
        self.pending = order

    def flush(self) -> None:
        for n in self.pending:
            if n.uid not in self.memo:
                self.memo[n.uid] = self.name(n, self.show(n))

    def name(self, n: Expr, s: str) -> str:
        depth = 1 + max([self.depth.get(c.uid, 0) for c in n.children()], default=0)
        if isinstance(n, (Load, Op, Reduce, Scan, FloorDiv, Mod)):
            shared = self.uses[n.uid] > 1 and (not isinstance(n, (FloorDiv, Mod)) or len(s) > 16)
            if self.share and (shared or len(s) > _LONG or depth > 24):
                t = f"t{len(self.lines)}"
                self.lines.append(f"{t} = {f'atom({s})' if isinstance(n, (FloorDiv, Mod)) else s}")
                self.depth[n.uid] = 0
                return t
        self.depth[n.uid] = depth
        return s

    def show(self, n: Expr) -> str:
        """Text of a node whose children are printed already (atoms of an Index as they stand in it)."""
        memo = self.memo
        if isinstance(n, Index):
            return self.poly(n)
        if isinstance(n, (Var, Size)):
            return n.name
        if isinstance(n, Const):
            return f"{n.dtype}({n.value!r})"
        if isinstance(n, (FloorDiv, Mod)):
            sign = "//" if isinstance(n, FloorDiv) else " % "
            return f"({self.factor(n.dividend)}{sign}{self.factor(n.divisor)})"
        if isinstance(n, Load):
            known = self.dtypes.get(n.buffer, n.dtype)
            head = n.buffer if known == n.dtype else f"{n.buffer}.{n.dtype}"
            if n.guard is None:
                return f"{head}[{memo[n.index.uid]}]"
            return f"{head}[{memo[n.index.uid]} if {self.value(n.guard)} else {self.show(n.other)}]"  # type: ignore[arg-type]
        if isinstance(n, Op):
            head = _KEYWORDS.get(n.name, n.name)
            if n.name == "cast" or n.dtype != _op_dtype(n.name, n.args):
                head += "." + n.dtype
            return f"{head}({', '.join([self.value(a) for a in n.args])})"
        if isinstance(n, Reduce):
            head = n.kind if n.dtype == _reduce_dtype(n.kind, n.body) else f"{n.kind}.{n.dtype}"
            return f"{head}[{', '.join([v.name for v in n.vars])}]({self.value(n.body)})"
        if isinstance(n, Scan):
            head = f"scan_{n.kind}" if n.dtype == n.body.dtype else f"scan_{n.kind}.{n.dtype}"
            return f"{head}[{n.var.name}]({self.value(n.body)})"
        raise TypeError(f"{type(n).__name__} is not an expression node")

    def value(self, n: Expr) -> str:
        """`n` where a value is expected: an index that is a lone opaque value is marked, and a bare atom too."""
        s = self.memo[n.uid]
        if isinstance(n, Index):
            if len(n.terms) == 1 and n.terms[0][1] == 1 and len(n.terms[0][0]) == 1:
                a = n.terms[0][0][0]
                if not isinstance(a, (Var, Size)) and not (isinstance(a, (FloorDiv, Mod)) and s[0] == "("):
                    return f"idx({s})"
            return s
        if isinstance(n, (Var, Size)) or (isinstance(n, (FloorDiv, Mod)) and s[0] == "("):
            return f"atom({s})"
        return s

    def factor(self, e: Index) -> str:
        s = self.memo[e.uid]
        return s if s.isalnum() else f"({s})"

    def poly(self, e: Index) -> str:
        if not e.terms:
            return "0"
        out: list[str] = []
        for m, c in ordered_terms(e):
            if not out:
                sign = "-" if c < 0 else ""
            else:
                sign = " - " if c < 0 else " + "
            body = "*".join([self.memo[a.uid] for a in m])
            size = abs(c)
            out.append(sign + (body if m and size == 1 else f"{size}*{body}" if m else str(size)))
        return "".join(out)


def ordered_children(n: Expr) -> list[Expr]:
    if isinstance(n, Index):
        return [a for m, _ in ordered_terms(n) for a in m]
    return list(n.children())


def _op_dtype(name: str, args: tuple[Expr, ...]) -> str:
    if name in COMPARE or name in PREDICATE:
        return "b1"
    return args[1].dtype if name == "where" else args[0].dtype


def _reduce_dtype(kind: str, body: Expr) -> str:
    return "i64" if kind in ("argmax", "argmin") else body.dtype


def expr_text(e: Expr) -> str:
    """`e` on one line; shared values of a large expression are named before it (`t0 = …; t1 = …; …`)."""
    p = _Printer([e], {}, share=_tree_size(e) > 40)
    p.flush()
    return "; ".join(p.lines + [p.value(e)])


def _tree_size(e: Expr) -> int:
    """Number of nodes of the unfolded tree, counted to 100."""
    stack, n = [e], 0
    while stack and n < 100:
        n += 1
        stack += stack.pop().children()
    return n


def kernel_text(kernel: Kernel) -> str:
    """The canonical text of a kernel; `parse_kernel` inverts it."""
    out = ["kernel"]
    part = (kernel.part,) if kernel.part is not None else ()
    extents = [v.extent for v in kernel.loops + kernel.axis + part] + [b.size for b in kernel.buffers]
    ext = _Printer([], {}, share=False)
    for e in extents:
        _key(e)
        ext.visit(e)
        ext.flush()
    for s in kernel.sizes:
        out.append(f"  size  {s.name} >= {s.lower}")
    for b in kernel.buffers:
        out.append(f"  {b.kind:<5} {b.name}: {b.dtype}[{ext.memo[b.size.uid]}]{' scalar' if b.scalar else ''}")
    for head, vars in (("part ", part), ("for  ", kernel.loops), ("axis ", kernel.axis)):
        for v in vars:
            out.append(f"  {head} {v.name} < {ext.memo[v.extent.uid]}")
    roots: list[Expr] = []
    for st in kernel.writes:
        roots += (st.value, st.index)
    p = _Printer([], {b.name: b.dtype for b in kernel.buffers})
    pending: list[Expr] = []
    for r in roots:  # count every use before the first line is printed
        _key(r)
        p.visit(r)
        pending += p.pending
    p.pending = pending
    p.flush()
    out += ["    " + line for line in p.lines]
    for st in kernel.writes:
        head = "column" if not isinstance(st, Store) else "inner" if st.inner else "row"
        out.append(f"    {head} {st.buffer}[{p.memo[st.index.uid]}] = {p.value(st.value)}")
    return "\n".join(out) + "\n"


# -- parsing ------------------------------------------------------------------------------------------------------

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")


def parse_kernel(text: str) -> Kernel:
    """The kernel that `kernel_text` printed.  Raises ValueError, naming the line, for anything else."""
    if not isinstance(text, str) or len(text) > _MAX_TEXT:
        raise ValueError(f"kernel text must be a string of at most {_MAX_TEXT} characters")
    lines = text.splitlines()
    if not lines or lines[0] != "kernel":
        raise ValueError("kernel text must begin with a line 'kernel'")
    p = _Parser()
    for number, line in enumerate(lines[1:], 2):
        try:
            if len(line) > _MAX_LINE:
                raise ValueError("the line is too long")
            p.line(line.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError, AssertionError) as e:
            raise ValueError(f"kernel text, line {number} ({line.strip()[:60]!r}): {e}") from None
    return Kernel(
        tuple(p.buffers.values()),
        tuple(p.sizes),
        tuple(p.loops),
        tuple(p.axis),
        tuple(p.stores),
        tuple(p.columns),
        p.part,
    )


class _Parser:
    def __init__(self) -> None:
        self.names: dict[str, Expr] = {}
        self.buffers: dict[str, Buffer] = {}
        self.sizes: list[Size] = []
        self.loops: list[Var] = []
        self.axis: list[Var] = []
        self.stores: list[Store] = []
        self.columns: list[ColumnStore] = []
        self.part: Var | None = None

    def define(self, name: str, value: Expr | None) -> None:
        if not _NAME.match(name):
            raise ValueError(f"{name!r} is not a name")
        if name in self.names or name in self.buffers:
            raise ValueError(f"{name} is defined twice")
        if value is not None:
            self.names[name] = value

    def line(self, s: str) -> None:
        head, _, rest = s.partition(" ")
        rest = rest.strip()
        if head == "size":
            name, _, lower = rest.partition(" >= ")
            size = Size(name, _int(lower))
            self.define(name, size)
            self.sizes.append(size)
        elif head in ("in", "out", "inout"):
            name, _, rest = rest.partition(": ")
            self.define(name, None)
            scalar = rest.endswith(" scalar")
            dtype, _, size_text = rest.removesuffix(" scalar").partition("[")
            if dtype not in DTYPES or not size_text.endswith("]"):
                raise ValueError("a buffer is written 'name: dtype[size]'")
            self.buffers[name] = Buffer(name, dtype, self.index(_ast(size_text[:-1])), head, scalar)
        elif head in ("for", "axis", "part"):
            name, _, extent = rest.partition(" < ")
            v = Var(name, self.index(_ast(extent)))
            self.define(name, v)
            if head == "part":
                if self.part is not None:
                    raise ValueError("a kernel has one part")
                self.part = v
            else:
                (self.loops if head == "for" else self.axis).append(v)
        elif head in ("row", "inner", "column"):
            target, _, value = rest.partition("] = ")
            name, _, at = target.partition("[")
            if name not in self.buffers:
                raise ValueError(f"{name!r} is not a buffer")
            where, what = self.index(_ast(at)), self.value(_ast(value))
            if head == "column":
                self.columns.append(ColumnStore(name, where, what))
            else:
                self.stores.append(Store(name, where, what, head == "inner"))
        elif re.fullmatch(r"t\d+", head) and rest.startswith("= "):
            self.define(head, self.value(_ast(rest[2:])))
        else:
            raise ValueError("the line is none of size, in, out, inout, part, for, axis, t…, row, inner, column")

    # -- values ----
    def value(self, n: ast.expr) -> Expr:
        if isinstance(n, ast.Name):
            e = self.lookup(n.id)
            return Index((((e,), 1),)) if isinstance(e, (Var, Size)) else e
        if isinstance(n, (ast.BinOp, ast.UnaryOp, ast.Constant)):
            return self.index(n)
        if isinstance(n, ast.Subscript):
            name, dtype = _dotted(n.value)
            if name not in self.buffers:
                raise ValueError(f"{name!r} is not a buffer")
            dtype = dtype or self.buffers[name].dtype
            at = n.slice
            if not isinstance(at, ast.IfExp):
                return Load(name, self.index(at), dtype)
            other = self.value(at.orelse)
            if not isinstance(other, Const):
                raise ValueError("the value of a guarded load must be a constant")
            return Load(name, self.index(at.body), dtype, self.value(at.test), other)
        if isinstance(n, ast.Call) and not n.keywords:
            return self.call(n)
        raise ValueError(f"{ast.unparse(n)[:40]!r} is not an expression")

    def call(self, n: ast.Call) -> Expr:
        if isinstance(n.func, ast.Subscript):
            name, dtype = _dotted(n.func.value)
            vars = n.func.slice.elts if isinstance(n.func.slice, ast.Tuple) else [n.func.slice]
            bound = tuple([self.var(v) for v in vars])
            (arg,) = n.args
            body = self.value(arg)
            if name.startswith("scan_"):
                (v,) = bound
                return Scan(name[5:], v, body, dtype or body.dtype)
            if name not in REDUCTIONS:
                raise ValueError(f"{name!r} is not a reduction")
            return Reduce(name, bound, body, dtype or _reduce_dtype(name, body))
        name, dtype = _dotted(n.func)
        if name in DTYPES and dtype is None:
            return Const(_literal(n.args, name), name)
        if name == "idx":
            (arg,) = n.args
            return self.index(arg)
        if name == "atom":
            (arg,) = n.args
            ((m, c),) = self.index(arg).terms
            if c != 1 or len(m) != 1:
                raise ValueError("atom(…) takes one variable, size, quotient or remainder")
            return m[0]
        if name not in _OPS:
            raise ValueError(f"{name!r} is not an operation")
        op = _OPS[name]
        args = tuple([self.value(a) for a in n.args])
        if len(args) != ARITY[op]:
            raise ValueError(f"{op} takes {ARITY[op]} arguments, not {len(args)}")
        return Op(op, args, dtype or _op_dtype(op, args))

    def lookup(self, name: str) -> Expr:
        if name not in self.names:
            raise ValueError(f"{name} is not defined")
        return self.names[name]

    def var(self, n: ast.expr) -> Var:
        v = self.lookup(n.id) if isinstance(n, ast.Name) else None
        if not isinstance(v, Var):
            raise ValueError("a reduction binds loop variables")
        return v

    def index(self, n: ast.expr) -> Index:
        acc: dict[Monomial, int] = {}
        self.sum(n, 1, acc)
        terms = [(m, c) for m, c in acc.items() if c]
        terms.sort(key=lambda t: tuple([a.uid for a in t[0]]))
        return Index(tuple(terms))

    def sum(self, n: ast.expr, sign: int, acc: dict[Monomial, int]) -> None:
        while isinstance(n, ast.BinOp) and isinstance(n.op, (ast.Add, ast.Sub)):
            self.term(n.right, -sign if isinstance(n.op, ast.Sub) else sign, acc)
            n = n.left
        self.term(n, sign, acc)

    def term(self, n: ast.expr, coef: int, acc: dict[Monomial, int]) -> None:
        atoms: list[Expr] = []
        while True:
            if isinstance(n, ast.BinOp) and isinstance(n.op, ast.Mult):
                right, n = n.right, n.left
            else:
                right, n = n, None  # type: ignore[assignment]
            if isinstance(right, ast.UnaryOp) and isinstance(right.op, ast.USub):
                coef, right = -coef, right.operand
            if isinstance(right, ast.Constant):
                coef *= _checked(right.value)
            else:
                atoms.append(self.atom(right))
            if n is None:
                break
        m = tuple(sorted(atoms, key=lambda a: a.uid))
        acc[m] = acc.get(m, 0) + coef

    def atom(self, n: ast.expr) -> Expr:
        if isinstance(n, ast.BinOp) and isinstance(n.op, (ast.FloorDiv, ast.Mod)):
            kind: Callable[[Index, Index], Expr] = FloorDiv if isinstance(n.op, ast.FloorDiv) else Mod
            return kind(self.index(n.left), self.index(n.right))
        e = self.lookup(n.id) if isinstance(n, ast.Name) else self.value(n)
        if isinstance(e, (Index, Const)):
            raise ValueError("an index is a sum of products of integers, variables and integer values")
        return e


def _ast(s: str) -> ast.expr:
    return ast.parse(s.strip(), mode="eval").body


def _int(s: str) -> int:
    if not re.fullmatch(r"-?\d{1,19}", s.strip()):
        raise ValueError(f"{s.strip()[:30]!r} is not an integer")
    return int(s)


def _checked(v: object) -> int:
    if type(v) is not int or v >= 1 << 63:
        raise ValueError(f"{v!r} is not a 64-bit integer")
    return v


def _dotted(n: ast.expr) -> tuple[str, str | None]:
    """name or name.dtype"""
    if isinstance(n, ast.Name):
        return n.id, None
    if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.attr in DTYPES:
        return n.value.id, n.attr
    raise ValueError(f"{ast.unparse(n)[:40]!r} is not a name or name.dtype")


def _literal(args: list[ast.expr], dtype: str) -> object:
    (n,) = args
    sign = 1
    if isinstance(n, ast.UnaryOp) and isinstance(n.op, ast.USub):
        sign, n = -1, n.operand
    if isinstance(n, ast.Name) and n.id in ("nan", "inf"):
        v: object = float(n.id)
    elif isinstance(n, ast.Constant):
        v = n.value
    else:
        raise ValueError("a constant must be a literal")
    if type(v) is bool and dtype == "b1" and sign == 1:
        return v
    if dtype == "b1" or type(v) not in (int, float) or (type(v) is float) != (dtype in ("f16", "bf16", "f32", "f64")):
        raise ValueError(f"{v!r} is not a constant of dtype {dtype}")
    return sign * v  # type: ignore[operator]
