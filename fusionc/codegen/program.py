"""The Program: the call sequence of one graph, as steps that print as the body of one Python function.

Everything that can be known at compile time is text: sizes and strides are literals (or arithmetic on the size symbols of
a dynamic graph), buffers are local variables that are deleted at their last use, kernels and operators are bound
names.  Nothing of the user's reaches the text but integers; names go through `codegen.names`.
"""

from __future__ import annotations

import functools
import linecache
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..ir.expr import Expr, FloorDiv, Index, Mod, Size
from .names import comment


@functools.lru_cache(maxsize=1 << 14)  # expressions are interned, and layers use the same sizes
def size_text(e: Expr) -> str:
    """A size expression as Python text over variables named like its Size symbols."""
    if isinstance(e, Size):
        return e.name
    if isinstance(e, FloorDiv):
        return f"({size_text(e.dividend)}) // ({size_text(e.divisor)})"
    if isinstance(e, Mod):
        return f"({size_text(e.dividend)}) % ({size_text(e.divisor)})"
    assert isinstance(e, Index), e
    if e.is_const:
        return str(e.value)
    parts: list[str] = []
    for m, c in e.terms:
        factors = [t if isinstance(a, Size) else f"({t})" for a in m for t in (size_text(a),)]
        if c != 1 or not factors:
            factors.insert(0, str(c))
        parts.append("*".join(factors))
    return " + ".join(sorted(parts))


@functools.lru_cache(maxsize=1 << 14)
def tuple_text(xs: tuple[Expr, ...]) -> str:
    inner = ", ".join(size_text(x) for x in xs)
    return f"({inner},)" if len(xs) == 1 else f"({inner})"


@dataclass(frozen=True)
class Alloc:
    """A new uninitialised buffer."""

    name: str
    size: tuple[Index, ...]
    stride: tuple[Index, ...]
    dtype: torch.dtype
    device: torch.device

    def text(self, p: Program) -> list[str]:
        args = f"{tuple_text(self.size)}, {tuple_text(self.stride)}"
        dtype = p.constant(str(self.dtype).replace("torch.", ""), self.dtype)
        if self.device.type == "cpu":
            nbytes = self.dtype.itemsize
            static = all(s.is_const for s in self.size)
            for s in self.size:
                nbytes *= s.value if s.is_const else 1
            if static and nbytes < 1 << 20:
                return [f"{self.name} = empty({args}, dtype={dtype})"]
            return [f"{self.name} = allocate({args}, {dtype})"]
        return [f"{self.name} = empty({args}, dtype={dtype}, device={p.constant('device', self.device)})"]


@dataclass(frozen=True)
class Carve:
    """Several small uninitialised buffers in one allocation, each with a storage offset and a version of its own.

    ``whole`` is the size of the allocation.  With ``rows`` the buffers are runs of rows of it (one operator makes them
    all), else ``places`` has (size, stride, first element) of each.
    """

    names: tuple[str, ...]
    whole: tuple[int, ...]
    rows: tuple[int, ...]
    places: tuple[tuple[tuple[int, ...], tuple[int, ...], int], ...]
    dtype: torch.dtype
    device: torch.device

    def text(self, p: Program) -> list[str]:
        strides = [1]
        for n in reversed(self.whole[1:]):
            strides.insert(0, strides[0] * n)
        args = f"{self.whole!r}, {tuple(strides)!r}, dtype={p.constant(str(self.dtype)[6:], self.dtype)}"
        if self.device.type != "cpu":
            args += f", device={p.constant('device', self.device)}"
        how = f"split(empty({args}), {self.rows!r})" if self.rows else f"carve(empty({args}), {self.places!r})"
        return [f"{', '.join(self.names)} = {how}"]


@dataclass(frozen=True)
class Launch:
    """One generated kernel on buffers, then the run-time sizes it takes."""

    kernel: str
    buffers: tuple[str, ...]
    sizes: tuple[Size, ...]
    language: str
    may_fail: bool = False
    note: str = ""
    scalars: tuple[bool, ...] = ()

    def text(self, p: Program) -> list[str]:
        sizes = [s.name for s in self.sizes]
        lines = [f"# {comment(self.note)}"] if self.note else []
        if self.language == "cpp":
            call = f"{self.kernel}({', '.join([f'{b}.data_ptr()' for b in self.buffers] + sizes)})"
            if self.may_fail:
                return [*lines, f"if {call}:", f"    index_error({self.kernel!r})"]
            return [*lines, call]
        buffers = [
            f"{b}.item()" if k < len(self.scalars) and self.scalars[k] else b for k, b in enumerate(self.buffers)
        ]
        return [*lines, f"{self.kernel}(({', '.join(buffers)},), ({''.join(s + ', ' for s in sizes)}), stream)"]


@dataclass(frozen=True)
class Call:
    """An operator run by ATen or a library; `args` is text."""

    name: str
    function: str
    args: str
    note: str = ""

    def text(self, p: Program) -> list[str]:
        lines = [f"# {comment(self.note)}"] if self.note else []
        return [*lines, f"{self.name} = {self.function}({self.args})"]


@dataclass(frozen=True)
class Expect:
    """Kernels read by stride: if a tensor came with others than its compile-time ones, it is copied into them."""

    name: str
    size: tuple[Index, ...]
    stride: tuple[Index, ...]

    def text(self, p: Program) -> list[str]:
        return [
            f"if {self.name}.stride() != {tuple_text(self.stride)}:",
            f"    {self.name} = restride({self.name}, {tuple_text(self.size)}, {tuple_text(self.stride)})",
        ]


@dataclass(frozen=True)
class View:
    """A tensor over the memory of another."""

    name: str
    base: str
    size: tuple[Index, ...]
    stride: tuple[Index, ...]
    offset: Index

    def text(self, p: Program) -> list[str]:
        return [
            f"{self.name} = view({self.base}, {tuple_text(self.size)}, {tuple_text(self.stride)}, {size_text(self.offset)})"
        ]


@dataclass(frozen=True)
class Free:
    """Buffers after their last use."""

    names: tuple[str, ...]

    def text(self, p: Program) -> list[str]:
        return [f"del {', '.join(self.names)}"]


@dataclass(frozen=True)
class Assign:
    """A number computed on the host."""

    name: str
    value: str

    def text(self, p: Program) -> list[str]:
        return [f"{self.name} = {self.value}"]


@dataclass(frozen=True)
class Wrote:
    """Arguments that kernels wrote in place: autograd and caches of weights see it by their version."""

    names: tuple[str, ...]

    def text(self, p: Program) -> list[str]:
        return [f"wrote(({', '.join(self.names)},))"]


Step = Alloc | Carve | Launch | Call | Expect | View | Free | Assign | Wrote


@dataclass
class Program:
    """Steps over named arguments; `constants` are the objects that the text refers to by name."""

    arguments: tuple[str, ...]
    sizes: tuple[tuple[str, str], ...] = ()  # (symbol, text that computes it from the arguments)
    steps: list[Step] = field(default_factory=list)
    results: tuple[str, ...] = ()
    constants: dict[str, Any] = field(default_factory=dict)
    uses_stream: bool = False

    def constant(self, name: str, value: Any) -> str:
        """Bind `value` under a name like `name`; the same object keeps its name, as do equal devices.

        Each step of a Program that was read from the cache has a device object of its own.
        """
        k = 0
        candidate = name
        while candidate in self.constants and (held := self.constants[candidate]) is not value:
            if isinstance(value, torch.device) and isinstance(held, torch.device) and held == value:
                return candidate
            k += 1
            candidate = f"{name}_{k}"
        self.constants[candidate] = value
        return candidate

    def _head(self) -> list[str]:
        body: list[str] = []
        if self.arguments:
            body.append(f"{', '.join(self.arguments)}{',' if len(self.arguments) == 1 else ''} = args")
        body.append("args.clear()")
        body += [f"{name} = {value}" for name, value in self.sizes]
        if self.uses_stream:
            body.append("stream = current_stream()")
        return body

    def step_at(self, line: int) -> int | None:
        """Position of the step that line `line` of the text belongs to (the first line is 1)."""
        at = 2 + len(self._head())
        for number, step in enumerate(self.steps):
            at += len(step.text(self))
            if line < at:
                return number if line >= 2 + len(self._head()) else None
        return None

    def text(self) -> str:
        """Source of `call(args: list) -> tuple`, which empties the list it is given."""
        body = self._head()
        for step in self.steps:
            body += step.text(self)
        inner = ", ".join(self.results)
        body.append(f"return ({inner}{',' if len(self.results) == 1 else ''})")
        return "def call(args):\n" + "".join(f"    {line}\n" for line in body)

    def compile(
        self, namespace: Mapping[str, Any], label: str, instead: Mapping[str, Any] | None = None
    ) -> Callable[[list[Any]], tuple[Any, ...]]:
        """The callable.  The text is generated above from this value alone; it is never read from a file.

        `instead` has other values for some of the constants, which do the same.
        """
        source = self.text()
        filename = f"<fusionc {label}>"
        linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
        scope = {**namespace, **self.constants, **(instead or {})}
        exec(compile(source, filename, "exec"), scope)  # noqa: S102  the one place
        return scope["call"]


def literal(p: Program, value: Any, name_of: Callable[[Any], str]) -> str:
    """A call argument as text; objects without a literal form become constants of the program."""
    if isinstance(value, torch.fx.Node):
        return name_of(value)
    if value is None or isinstance(value, (bool, int)):
        return repr(value)
    if isinstance(value, float):
        if value != value or value in (float("inf"), float("-inf")):
            return f"float('{value}')"
        return repr(value)
    if isinstance(value, str):
        return repr(value)
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        inner = ", ".join(literal(p, v, name_of) for v in value)
        return f"[{inner}]" if isinstance(value, list) else f"({inner}{',' if len(value) == 1 else ''})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k!r}: {literal(p, v, name_of)}" for k, v in value.items()) + "}"
    if isinstance(value, slice):
        return f"slice({literal(p, value.start, name_of)}, {literal(p, value.stop, name_of)}, {literal(p, value.step, name_of)})"
    if isinstance(value, torch.dtype):
        return p.constant(str(value).replace("torch.", ""), value)
    return p.constant(type(value).__name__.lower(), value)
