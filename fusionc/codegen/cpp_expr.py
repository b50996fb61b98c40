"""Scalar expressions of the loop IR as C++ statements, each value once, in the outermost scope where it is known.

An `Emitter` holds the stack of open scopes (loop bodies).  `value(e)` returns the C++ name of e and appends the
declarations that are missing, each to the deepest scope that binds something it depends on: what a loop does not change
is computed before it.  f16 and bf16 values are floats that hold such a value; b1 values are C++ bool.
"""

from __future__ import annotations

import math

from fusionc.ir.expr import (
    FLOATS,
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
)
from fusionc.ir.text import ordered_children, ordered_terms

VALUE_TYPE = {
    "b1": "bool",
    "u8": "uint8_t",
    "i8": "int8_t",
    "i16": "int16_t",
    "i32": "int32_t",
    "i64": "int64_t",
    "f16": "float",
    "bf16": "float",
    "f32": "float",
    "f64": "double",
}
MEMORY_TYPE = {**VALUE_TYPE, "b1": "fc_b1", "f16": "uint16_t", "bf16": "uint16_t"}
_UNSIGNED = {"u8": "uint32_t", "i8": "uint32_t", "i16": "uint32_t", "i32": "uint32_t", "i64": "uint64_t"}
_INFIX = {"add": "+", "sub": "-", "mul": "*", "div": "/"}
_COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_BITS = {"and": "&", "or": "|", "xor": "^"}
_BOOL = {**_BITS, "add": "|", "mul": "&", "maximum": "|", "minimum": "&", "fmax": "|", "fmin": "&", "sub": "^"}


class Scope:
    """One open loop body: its lines and the nodes named in it."""

    def __init__(self, indent: int):
        self.indent = indent
        self.lines: list[str] = []
        self.known: list[int] = []
        self.sums: dict[str, str] = {}


class Emitter:
    """Writes values into a stack of scopes; see the module's docstring."""

    def __init__(self, indent: int = 1):
        self.scopes: list[Scope] = [Scope(indent)]
        self.memo: dict[int, tuple[str, int]] = {}
        self.count = 0
        self.err = False  # check_index was written

    # -- scopes ----
    def line(self, text: str) -> None:
        s = self.scopes[-1]
        s.lines.append("  " * s.indent + text)

    def open(self, head: list[str]) -> None:
        """Begin a nested scope; `head` are the lines of the loop, the last one ending in '{'."""
        s = Scope(self.scopes[-1].indent + 1)
        s.lines += ["  " * (s.indent - 1) + h for h in head]
        self.scopes.append(s)

    def close(self, tail: str = "}") -> None:
        s = self.scopes.pop()
        for uid in s.known:
            del self.memo[uid]
        s.lines.append("  " * (s.indent - 1) + tail)
        self.scopes[-1].lines += s.lines

    def bind(self, e: Expr, name: str) -> None:
        """`e` is called `name` from here to the end of the innermost scope."""
        self.memo[e.uid] = (name, len(self.scopes) - 1)
        self.scopes[-1].known.append(e.uid)

    def fresh(self, prefix: str = "v") -> str:
        self.count += 1
        return f"{prefix}{self.count}"

    # -- values ----
    def value(self, e: Expr) -> str:
        return self._emit(e)[0]

    def depth(self, e: Expr) -> int:
        return self._emit(e)[1]

    def _emit(self, root: Expr) -> tuple[str, int]:
        got = self.memo.get(root.uid)
        if got is not None:
            return got
        stack: list[tuple[Expr, bool]] = [(root, False)]
        out: tuple[str, int] = ("", 0)
        while stack:
            n, done = stack.pop()
            got = self.memo.get(n.uid)
            if got is not None:
                out = got
            elif done:
                out = self._define(n)
            else:
                if isinstance(n, (Reduce, Scan, Var)):
                    raise ValueError(f"internal: {n!r} is used outside the loops that give it")
                stack.append((n, True))
                stack += [(c, False) for c in reversed(ordered_children(n))]
        return out

    def _define(self, n: Expr) -> tuple[str, int]:
        """Write one node whose children are written."""
        if isinstance(n, Const):
            return self._keep(n, literal(n.value, n.dtype), 0)
        if isinstance(n, Size):
            return self._keep(n, n.name, 0)
        depth = max([self.memo[c.uid][1] for c in n.children()], default=0)
        if isinstance(n, Index):
            return self._index(n, depth)
        if isinstance(n, (FloorDiv, Mod)):
            return self._declare(n, self._divmod(n), depth)
        if isinstance(n, Load):
            return self._declare(n, self._load(n), depth)
        assert isinstance(n, Op)
        if n.name == "check_index":
            return self._check(n, depth)
        return self._declare(n, self._op(n), depth)

    def _keep(self, n: Expr, text: str, depth: int) -> tuple[str, int]:
        self.memo[n.uid] = (text, depth)
        self.scopes[depth].known.append(n.uid)
        return text, depth

    def _declare(self, n: Expr, text: str, depth: int) -> tuple[str, int]:
        name = self.fresh("i" if isinstance(n, (Index, FloorDiv, Mod)) else "v")
        s = self.scopes[depth]
        s.lines.append(f"{'  ' * s.indent}const {VALUE_TYPE[n.dtype]} {name} = {text};")
        return self._keep(n, name, depth)

    def _index(self, n: Index, depth: int) -> tuple[str, int]:
        """A sum: what outer scopes know of it is added there."""
        by_depth: dict[int, list[str]] = {}
        for m, c in ordered_terms(n):
            d = max([self.memo[a.uid][1] for a in m], default=0)
            factors = ([str(c)] if c != 1 or not m else []) + [self.memo[a.uid][0] for a in m]
            by_depth.setdefault(d, []).append("*".join(factors))
        text = ""
        total = 0
        for d in sorted(by_depth):
            part = " + ".join(([text] if text else []) + by_depth[d]).replace("+ -", "- ")
            total = d
            if d < depth and not (part.isidentifier() or part.isdigit()):
                s = self.scopes[d]
                if part not in s.sums:
                    s.sums[part] = self.fresh("i")
                    s.lines.append(f"{'  ' * s.indent}const int64_t {s.sums[part]} = {part};")
                part = s.sums[part]
            text = part
        if not text:
            text = "0"
        if text.isidentifier() or text.isdigit():
            return self._keep(n, text, total)
        return self._keep(n, f"({text})", total)

    def _divmod(self, n: FloorDiv | Mod) -> str:
        a, d = self.memo[n.dividend.uid][0], self.memo[n.divisor.uid][0]
        lo, hi = bounds(n.dividend)
        sign = "/" if isinstance(n, FloorDiv) else "%"
        if lo is None or lo < 0:
            return f"{'fc_floordiv' if sign == '/' else 'fc_mod'}({a}, {d})"
        if hi is not None and hi < 1 << 31 and n.divisor.is_const and n.divisor.value < 1 << 31:
            return f"(int64_t)((uint32_t){a} {sign} {d}u)"  # 32 bits: the compiler can vectorise it
        return f"{a} {sign} {d}"

    def _check(self, n: Op, depth: int) -> tuple[str, int]:
        i, size = [self.memo[a.uid][0] for a in n.args]
        self.err = True
        wrapped, s = self.fresh("i"), self.scopes[depth]
        s.lines.append(f"{'  ' * s.indent}const int64_t {wrapped} = {i} < 0 ? {i} + {size} : {i};")
        s.lines.append(f"{'  ' * s.indent}err |= ({wrapped} < 0) | ({wrapped} >= {size});")
        return self._declare(n, f"({wrapped} < 0) | ({wrapped} >= {size}) ? 0 : {wrapped}", depth)

    def _load(self, n: Load) -> str:
        at = self.memo[n.index.uid][0]
        text = f"{n.buffer}[{at[1:-1] if at[0] == '(' else at}]"
        if n.guard is not None:
            assert n.other is not None
            other = literal(n.other.value, n.other.dtype)
            zero = f"({MEMORY_TYPE[n.dtype]})0"
            if n.other.value == 0 and math.copysign(1, n.other.value) > 0:
                return from_memory(f"({self.value(n.guard)} ? {text} : {zero})", n.dtype)
            return f"{self.value(n.guard)} ? {from_memory(text, n.dtype)} : {other}"
        return from_memory(text, n.dtype)

    def _op(self, n: Op) -> str:
        args = [self.memo[a.uid][0] for a in n.args]
        if n.name == "cast":
            return convert(args[0], n.args[0].dtype, n.dtype)
        if n.name == "pow" and isinstance(n.args[1], Const):
            special = _power(args[0], n.args[1].value, VALUE_TYPE[n.dtype])
            if special:
                return special
        return operation(n.name, args, n.dtype, n.args[0].dtype)


def _power(x: str, p: float, ctype: str) -> str | None:
    """x ** p as eager computes it for the exponents that it treats specially."""
    return {
        0.5: f"fc_sqrt({x})",
        2.0: f"{x} * {x}",
        3.0: f"{x} * {x} * {x}",
        1.0: x,
        -0.5: f"fc_rsqrt({x})",
        -1.0: f"({ctype})1 / {x}",
        -2.0: f"({ctype})1 / ({x} * {x})",
    }.get(p)


def literal(v: object, dtype: str) -> str:
    """A C++ literal with exactly this value."""
    if dtype == "b1":
        return "true" if v else "false"
    if dtype in FLOATS:
        x = float(v)  # type: ignore[arg-type]
        double = dtype == "f64"
        if math.isnan(x):
            return "(double)FC_NAN" if double else "FC_NAN"
        if math.isinf(x):
            text = "(double)FC_INF" if double else "FC_INF"
            return text if x > 0 else f"(-{text})"
        if not double and abs(x) >= 3.4028235677973366e38:
            return "FC_INF" if x > 0 else "(-FC_INF)"
        text = repr(x) + ("" if double else "f")
        return f"({text})" if text[0] == "-" else text
    i = int(v)  # type: ignore[call-overload]
    if i == -(1 << 63):
        return "(-9223372036854775807LL - 1)"
    text = f"({VALUE_TYPE[dtype]}){i}LL" if dtype != "i32" or i == -(1 << 31) else f"(int32_t){i}"
    return f"({text})"


def from_memory(text: str, dtype: str) -> str:
    if dtype == "b1":
        return f"({text} != 0)"
    if dtype in ("f16", "bf16"):
        return f"fc_from_{dtype}({text})"
    return text


def to_memory(text: str, dtype: str, exact: bool) -> str:
    """The memory form of a value of `dtype`; `exact` says that a half-precision value is rounded already."""
    if dtype == "b1":
        return f"(fc_b1)({text})"
    if dtype == "bf16" and exact:
        return f"(uint16_t)(fc_bits<uint32_t>({text}) >> 16)"
    if dtype in ("f16", "bf16"):
        return f"fc_to_{dtype}({text})"
    return text


def convert(x: str, src: str, dst: str) -> str:
    """x cast as torch casts it."""
    if dst == "b1":
        return f"({x} != 0)"
    if dst in ("f16", "bf16"):
        if src == dst:
            return x
        return f"fc_round_{dst}({x if src in ('f32', 'f16', 'bf16') else f'(float){x}'})"
    if src in FLOATS and dst in ("u8", "i8", "i16"):
        return f"({VALUE_TYPE[dst]}){'(int64_t)' if dst == 'u8' else '(int32_t)'}{x}"
    return x if VALUE_TYPE[src] == VALUE_TYPE[dst] else f"({VALUE_TYPE[dst]}){x}"


def operation(name: str, x: list[str], dtype: str, src: str) -> str:
    """C++ text of one operation on named values; `src` is the dtype of the first argument."""
    ctype = VALUE_TYPE[dtype]
    if name == "where":
        return f"{x[0]} ? {x[1]} : {x[2]}"
    if name in _COMPARE:
        return f"{x[0]} {_COMPARE[name]} {x[1]}"
    if name == "isnan":
        return f"{x[0]} != {x[0]}" if src in FLOATS else "false"
    if name in ("isinf", "signbit"):
        return f"fc_{name}({x[0]})" if src in FLOATS else f"{x[0]} < 0" if name == "signbit" else "false"
    if dtype == "b1":
        if name in _BOOL:
            return f"(bool)({x[0]} {_BOOL[name]} {x[1]})"
        if name == "not":
            return f"!{x[0]}"
        return x[0]  # abs, sign, floor… of a bool
    if dtype in FLOATS:
        if name in _INFIX:
            return f"{x[0]} {_INFIX[name]} {x[1]}"
        if name == "neg":
            return f"-{x[0]}"
        fn = {"maximum": "max", "minimum": "min", "mod": "remainder", "floordiv": "floor_divide"}.get(name, name)
        return f"fc_{fn}({', '.join(x)})"
    if name in ("add", "sub", "mul"):
        u = _UNSIGNED[dtype]
        return f"({ctype})(({u}){x[0]} {_INFIX[name]} ({u}){x[1]})"
    if name in _BITS:
        return f"({ctype})({x[0]} {_BITS[name]} {x[1]})"
    if name == "not":
        return f"({ctype})~{x[0]}"
    if name == "neg":
        return f"({ctype})(0 - ({_UNSIGNED[dtype]}){x[0]})"
    if name in ("floor", "ceil", "round", "trunc"):
        return x[0]
    if name == "abs" and dtype == "u8":
        return x[0]
    names = {"maximum": "max", "minimum": "min", "fmax": "max", "fmin": "min", "abs": "iabs"}
    names.update({"floordiv": "ifloor", "mod": "imod", "truncdiv": "itrunc", "div": "itrunc", "fmod": "ifmod"})
    return f"fc_{names.get(name, name)}<{ctype}>({', '.join(x)})"
