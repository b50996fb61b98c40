"""The Kernel: stores of scalar expressions inside one loop nest.

    for each point of `loops` (parallel, any order):
        [reductions over `axis`, in order of their nesting level]
        row stores                                  Store(inner=False): one element a point of `loops`
        for each point of `axis`:
            inner stores                            Store(inner=True):  one element a point of `loops` × `axis`

`axis` is empty for a pointwise kernel.  Every Reduce in the kernel is over exactly the variables of `axis`, and depends
on nothing but `loops` outside; every Scan is along a single axis variable.

A kernel that walks over rows may sum columns on the way (dweight and dbias of a norm beside its dx, in one read):

        for each point of `axis`:
            column stores                           ColumnStore: their Reduce nodes are sums over exactly `loops`

With `part` (a variable, once `fusionc.schedule.columns` has staged the kernel) the points of `loops` are dealt out like
cards, flat position n to share n % part.extent, and a column store happens once a share and point of `axis`, with sums
over that share.

Loop variables are x0, x1, … and axis
variables r0, r1, … (slowest first), buffers in0, in1, …, out0, …, so kernels that compute the same are equal as values
and as text: 32 identical layers are one kernel.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

from .expr import ITEMSIZE, Expr, Index, Load, Reduce, Scan, Size, Var, index, walk
from .ops import COST


@dataclass(frozen=True)
class Buffer:
    """One tensor argument: element dtype and how many elements may be addressed from its pointer.

    `kind` is "in", "out" (every element of interest is written, none is read) or "inout" (read and written; a
    kernel reads an element of it only at the point that writes the same element).  `scalar` marks a 0-d tensor on the CPU that is
    passed by value to a GPU kernel.
    """

    name: str
    dtype: str
    size: Index
    kind: str = "in"
    scalar: bool = False


@dataclass(frozen=True)
class Write:
    """buffer[index] = value (cast to the buffer's dtype)."""

    buffer: str
    index: Index
    value: Expr


@dataclass(frozen=True)
class Store(Write):
    """A write once per point of the loops (and of the axis, if inner)."""

    inner: bool


@dataclass(frozen=True)
class ColumnStore(Write):
    """A write once per point of the axis (and of the part); its value may hold sums over the loops."""


@dataclass(frozen=True)
class Kernel:
    """One launch.  `sizes` are the run-time integers it takes, in argument order after the buffers."""

    buffers: tuple[Buffer, ...]
    sizes: tuple[Size, ...]
    loops: tuple[Var, ...]
    axis: tuple[Var, ...]
    stores: tuple[Store, ...]
    columns: tuple[ColumnStore, ...] = ()
    part: Var | None = None

    @cached_property
    def text(self) -> str:
        """Canonical text of the kernel; equal kernels have equal text (see `fusionc.ir.text`)."""
        from .text import kernel_text

        return kernel_text(self)

    @cached_property
    def digest(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def writes(self) -> tuple[Write, ...]:
        return (*self.stores, *self.columns)

    @cached_property
    def nodes(self) -> tuple[Expr, ...]:
        """Every distinct expression node, children first."""
        roots: list[Expr] = []
        for s in self.writes:
            roots += (s.value, s.index)
        return tuple(walk(roots))

    @cached_property
    def reductions(self) -> tuple[Reduce, ...]:
        """Every reduction over the axis."""
        return tuple(n for n in self.nodes if isinstance(n, Reduce) and not self.is_column_sum(n))

    @cached_property
    def column_sums(self) -> tuple[Reduce, ...]:
        """Every sum over the loops."""
        return tuple(n for n in self.nodes if isinstance(n, Reduce) and self.is_column_sum(n))

    def is_column_sum(self, r: Reduce) -> bool:
        return bool(self.columns) and r.vars == self.loops

    @cached_property
    def scans(self) -> tuple[Scan, ...]:
        return tuple(n for n in self.nodes if isinstance(n, Scan))

    @property
    def kind(self) -> str:
        return "scan" if self.scans else "reduction" if self.axis else "pointwise"

    @cached_property
    def outer(self) -> Index:
        """Number of points of `loops`."""
        n = index(1)
        for v in self.loops:
            n = n * v.extent
        return n

    @cached_property
    def inner(self) -> Index:
        """Number of points of `axis` (1 if empty)."""
        n = index(1)
        for v in self.axis:
            n = n * v.extent
        return n

    def buffer(self, name: str) -> Buffer:
        for b in self.buffers:
            if b.name == name:
                return b
        raise KeyError(name)

    @property
    def loads(self) -> tuple[Load, ...]:
        return tuple(n for n in self.nodes if isinstance(n, Load))

    @property
    def may_fail(self) -> bool:
        """True when an index is checked at run time."""
        return any(getattr(n, "name", None) == "check_index" for n in self.nodes)

    def flops_per_point(self) -> int:
        """Cost of the arithmetic at one point of loops × axis, in additions."""
        return sum(COST.get(getattr(n, "name", ""), 0) for n in self.nodes if n.dtype != "i64")


def kernel_bytes(kernel: Kernel, hint: dict[str, int]) -> tuple[int, int]:
    """Bytes read and written if each addressed element moves once; sizes from `hint` by name.

    A buffer that is loaded at fewer points than it holds (a slice) counts only the points loaded.
    """
    points = evaluate(kernel.outer, hint) * evaluate(kernel.inner, hint)
    read = written = 0
    for b in kernel.buffers:
        size = evaluate(b.size, hint) * ITEMSIZE[b.dtype]
        if b.kind != "out":
            count = sum(1 for n in kernel.loads if n.buffer == b.name)
            read += min(size, count * points * ITEMSIZE[b.dtype])
        if b.kind != "in":
            written += min(size, points * ITEMSIZE[b.dtype])
    return read, written


def evaluate(e: Index, hint: dict[str, int]) -> int:
    """The value of a size polynomial, with `hint` giving the value of each Size by name."""
    from .expr import FloorDiv, Mod

    total = 0
    for m, c in e.terms:
        for a in m:
            if isinstance(a, Size):
                c *= hint[a.name]
            elif isinstance(a, FloorDiv):
                c *= evaluate(a.dividend, hint) // evaluate(a.divisor, hint)
            elif isinstance(a, Mod):
                c *= evaluate(a.dividend, hint) % evaluate(a.divisor, hint)
            else:
                raise ValueError(f"{e!r} is not a size")
        total += c
    return total
