"""Accumulators: how each kind of reduction starts, takes in a value, and is combined, as C++ text."""

from __future__ import annotations

from fusionc.ir.expr import FLOATS, Reduce, Scan

from .cpp_expr import VALUE_TYPE, convert, literal

_MIN = {"u8": 0, "i8": -(1 << 7), "i16": -(1 << 15), "i32": -(1 << 31), "i64": -(1 << 63)}
_MAX = {"u8": 255, "i8": (1 << 7) - 1, "i16": (1 << 15) - 1, "i32": (1 << 31) - 1, "i64": (1 << 63) - 1}
HALF = ("f16", "bf16")


class Acc:
    """The accumulator of one reduction along a vector loop."""

    def __init__(self, r: Reduce, name: str):
        self.r, self.name = r, name
        self.nan = r.kind in ("max", "min") and r.dtype in FLOATS

    def declare(self, total: bool = False) -> list[str]:
        """Declarations; a `total` adds up parts."""
        out = [f"{part_type(self.r) if total else acc_type(self.r)} {self.name} = {initial(self.r)};"]
        return [*out, f"int {self.name}n = 0;"] if self.nan else out

    def clauses(self) -> list[str]:
        sign = {"sum": "+", "prod": "*", "max": "max", "min": "min", "any": "|", "all": "&"}[_kind(self.r)]
        return [f" reduction({sign}:{self.name})"] + ([f" reduction(|:{self.name}n)"] if self.nan else [])

    def convert(self, v: str) -> str:
        return as_acc(self.r, v)

    def update(self, v: str) -> list[str]:
        a = self.name
        if self.nan:
            sign = ">" if self.r.kind == "max" else "<"
            return [f"{a} = {v} {sign} {a} ? {v} : {a};", f"{a}n |= {v} != {v};"]
        return [f"{a} = {merge(self.r, a, v)};"]

    def combine(self, part: Acc) -> list[str]:
        if self.nan:
            sign = ">" if self.r.kind == "max" else "<"
            a, p = self.name, part.name
            return [f"{a} = {p} {sign} {a} ? {p} : {a};", f"{a}n |= {p}n;"]
        return [f"{self.name} = {merge(self.r, self.name, part.name)};"]

    def final(self) -> str:
        """The accumulated value, still as an accumulator."""
        return f"({self.name}n ? ({acc_type(self.r)})FC_NAN : {self.name})" if self.nan else self.name

    def result(self) -> str:
        return from_acc(self.r, self.final())


def _kind(r: Reduce | Scan) -> str:
    """The kind, with max and min of booleans as any and all."""
    if r.dtype == "b1":
        return {"max": "any", "min": "all", "sum": "any", "prod": "all"}.get(r.kind, r.kind)
    return r.kind


def acc_type(r: Reduce | Scan) -> str:
    if r.kind in ("argmax", "argmin"):
        return VALUE_TYPE[r.body.dtype]
    if _kind(r) in ("any", "all"):
        return "int32_t"
    if r.dtype not in FLOATS and r.kind in ("sum", "prod"):
        return {"i64": "uint64_t"}.get(r.dtype, "uint32_t")
    return VALUE_TYPE[r.dtype]


def extreme(kind: str, dtype: str) -> str:
    """The neutral value of max or min."""
    if dtype in FLOATS:
        return literal(float("-inf") if kind == "max" else float("inf"), dtype)
    if dtype == "b1":
        return "false" if kind == "max" else "true"
    return literal((_MIN if kind == "max" else _MAX)[dtype], dtype)


def initial(r: Reduce | Scan) -> str:
    kind = _kind(r)
    if kind in ("sum", "any"):
        return "0"
    if kind in ("prod", "all"):
        return "1"
    return extreme(kind[-3:], r.body.dtype if kind.startswith("arg") else r.dtype)


def as_acc(r: Reduce | Scan, v: str) -> str:
    """A value of the body as the accumulator takes it."""
    if _kind(r) in ("any", "all"):
        return v if r.body.dtype == "b1" else f"({v} != 0)"
    return convert(v, r.body.dtype, r.dtype)


def from_acc(r: Reduce | Scan, acc: str) -> str:
    return f"fc_round_{r.dtype}({acc})" if r.dtype in HALF else f"({VALUE_TYPE[r.dtype]}){acc}"


def part_type(r: Reduce | Scan) -> str:
    """The type in which parts of a long reduction are added up: float sums and products in double."""
    return "double" if r.kind in ("sum", "prod") and r.dtype in ("f32", *HALF) else acc_type(r)


def merge(r: Reduce | Scan, a: str, v: str) -> str:
    kind = _kind(r)
    if kind in ("max", "min"):
        return f"fc_{kind}<{VALUE_TYPE[r.dtype]}>({v}, {a})"
    return f"{a} {({'sum': '+', 'prod': '*', 'any': '|', 'all': '&'})[kind]} {v}"


def better(r: Reduce, v: str, a: str) -> str:
    sign = ">" if r.kind == "argmax" else "<"
    if r.body.dtype in FLOATS:
        return f"(({v} {sign} {a}) | (({v} != {v}) & ({a} == {a})))"
    return f"({v} {sign} {a})"
