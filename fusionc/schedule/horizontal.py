"""Horizontal fusion: many small independent launches as one.

A launch costs the host about 5 µs and the device a microsecond or two in which a small kernel fills few processors.
So launches that do not depend on each other and are each worth less than that become one: program ids are cut into
ranges, one for each item, and an item's pointers, sizes and first program are found by a binary search that is part of
the kernel's text (`codegen.triton_many`).  Items whose kernels differ only in integers (extents, strides) are one
*family*: one body, in which the integers that differ are variables.  Different families in one launch are divergent
horizontal fusion.

Pointers change from call to call; they are passed by value as kernel parameters, which are copied at launch: a table in
memory would need a copy to the device (measured on an H200: 10 µs more) and a buffer that is not rewritten too early.

Source     Fused Kernel Library, arXiv 2508.07071 (vertical, horizontal and divergent horizontal fusion); the design's
           section 4.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ..ir.expr import DTYPES, ONE
from ..ir.loop import Buffer, Kernel, evaluate
from ..ir.text import parse_kernel

MAX_PARAMETERS = 480  # 8 bytes each; 4 KiB is what every driver takes
MAX_FAMILIES = 12  # the registers of a program are those of its hungriest family
MAX_ITEMS = 1024


@dataclass(frozen=True)
class Item:
    """One kernel on buffers: for each of its buffers the parameter and the first element in it."""

    kernel: int
    slots: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Many:
    """One launch of several kernels without run-time sizes, none of which reads what another writes."""

    kernels: tuple[Kernel, ...]
    items: tuple[Item, ...]

    @cached_property
    def text(self) -> str:
        """JSON, which `parse_many` reads back."""
        kernels = [k.text for k in self.kernels]
        return json.dumps(
            {"kernels": kernels, "items": [[i.kernel, i.slots] for i in self.items]}, separators=(",", ":")
        )

    @cached_property
    def symbol(self) -> str:
        """Its name in generated text: the hash of `text`."""
        return symbol_of(self.text)

    @cached_property
    def parameters(self) -> tuple[Buffer, ...]:
        """What the launch takes, as buffers p0, p1, … (their sizes are not those of the tensors)."""
        found: dict[int, Buffer] = {}
        for item in self.items:
            for (p, _), b in zip(item.slots, self.kernels[item.kernel].buffers, strict=True):
                mine = Buffer(f"p{p}", b.dtype, ONE, "in" if b.kind == "in" else "inout", b.scalar)
                other = found.setdefault(p, mine)
                if (other.dtype, other.scalar) != (mine.dtype, mine.scalar):
                    raise ValueError(f"parameter {p} is used as {other.dtype} and as {mine.dtype}")
                if mine.kind != "in":
                    found[p] = mine
        if sorted(found) != list(range(len(found))):
            raise ValueError("parameters must be numbered from 0")
        return tuple([found[p] for p in range(len(found))])

    @cached_property
    def signature(self) -> Kernel:
        """A kernel without stores that has the parameters of the launch: what launchers look at."""
        return Kernel(self.parameters, (), (), (), ())

    @cached_property
    def families(self) -> tuple[Family, ...]:
        return tuple(_families(self))


def symbol_of(text: str) -> str:
    return f"m_{hashlib.sha256(text.encode()).hexdigest()[:20]}"


def parse_many(text: str) -> Many:
    """The value whose `text` this is.  Raises ValueError for anything else."""
    try:
        data = json.loads(text)
        kernels = tuple([parse_kernel(k) for k in data["kernels"]])
        items = tuple(
            [Item(_natural(k), tuple([(_natural(p), _natural(o)) for p, o in slots])) for k, slots in data["items"]]
        )
    except (KeyError, TypeError, RecursionError) as e:
        raise ValueError(f"not the text of a horizontal launch: {e}") from None
    out = Many(kernels, items)
    if any(i.kernel >= len(kernels) for i in items) or any(k.sizes for k in kernels) or out.text != text:
        raise ValueError("not the text of a horizontal launch")
    _ = out.parameters  # checks them
    return out


def _natural(n: Any) -> int:
    if type(n) is not int or not 0 <= n < 1 << 31:
        raise ValueError(f"{n!r} is not a small natural number")
    return n


# -- families ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """Items with one body.  `kernel.sizes` are the integers that differ; `values` has theirs for each of `items`."""

    kernel: Kernel
    items: tuple[int, ...]
    values: tuple[tuple[int, ...], ...]

    def points(self, k: int) -> int:
        """Points of the loops of the k-th item."""
        return evaluate(self.kernel.outer, self.sizes(k))

    def sizes(self, k: int) -> dict[str, int]:
        return {s.name: v for s, v in zip(self.kernel.sizes, self.values[k], strict=True)}


_CONSTANT = rf"(?<![.\w])(?:{'|'.join(DTYPES)})\([^()]*\)"
_TOKEN = re.compile(rf"{_CONSTANT}|(?<![\w.])\d+(?![\w.])")


def template(kernel: Kernel) -> tuple[str, tuple[int, ...]]:
    """The text of a kernel with holes for its integers, and those integers.

    Constants of the arithmetic stay, and so do the extents of the axis: they decide how its values are kept.
    """
    holes: list[int] = []

    def hole(m: re.Match[str]) -> str:
        if not m.group()[0].isdigit():
            return m.group()
        holes.append(int(m.group()))
        return "{}"

    lines = []
    for line in kernel.text.splitlines():
        fixed = line.startswith("  axis ") or line == "kernel"
        lines.append(line if fixed else _TOKEN.sub(hole, line.replace("{", "").replace("}", "")))
    return "\n".join(lines), tuple(holes)


def _families(many: Many) -> Iterable[Family]:
    parts = [template(k) for k in many.kernels]
    groups: dict[str, list[int]] = {}
    for n, item in enumerate(many.items):
        groups.setdefault(parts[item.kernel][0], []).append(n)
    for text, members in groups.items():
        rows = [parts[many.items[n].kernel][1] for n in members]
        kernel, columns = unify(text, sorted(set(rows)))
        yield Family(kernel, tuple(members), tuple([tuple([row[c] for c in columns]) for row in rows]))


def unify(text: str, rows: Sequence[tuple[int, ...]]) -> tuple[Kernel, tuple[int, ...]]:
    """The kernel of a template: integers that differ between `rows` are sizes.  Also: which columns these are."""
    columns = list(zip(*rows, strict=True))
    names: dict[tuple[int, ...], str] = {}
    at: list[int] = []
    lines: list[str] = []
    c = 0
    for line in text.splitlines():
        fill: list[str] = []
        bound = re.match(r"  (in|out|inout) ", line) is not None  # only says how much may be addressed
        for _ in range(line.count("{}")):
            values = columns[c]
            if bound or len(set(values)) == 1:
                fill.append(str(max(values)))
            else:
                if values not in names:
                    names[values] = f"s{len(names)}"
                    at.append(c)
                fill.append(names[values])
            c += 1
        lines.append(line.format(*fill))
    sizes = [f"  size  {name} >= {min(values)}" for values, name in names.items()]
    return parse_kernel("\n".join([lines[0], *sizes, *lines[1:]]) + "\n"), tuple(at)


# -- which launches ---------------------------------------------------------------------------------------------------


@dataclass
class Step:
    """One unit of the call sequence, as `bundles` sees it.

    `kind` is a word for launches that may share a launch with others of the same word, None for everything else;
    `family` tells bodies apart; `reads` are positions of the units it depends on; `slots` are the buffers it takes
    (anything hashable); a unit that `writes` memory in place is not passed by launches behind it.
    """

    reads: frozenset[int]
    kind: str | None = None
    family: str = ""
    slots: frozenset[Any] = frozenset()
    held: int = 0  # bytes of intermediate results that would be there earlier
    writes: bool = False


@dataclass
class _Bundle:
    at: int
    members: list[int]
    slots: set[Any] = field(default_factory=set)
    families: set[str] = field(default_factory=set)
    held: int = 0


def bundles(steps: Sequence[Step], held_limit: int = 16 << 20) -> list[list[int]]:
    """Sets of launches that can be one launch at the place of their first member, two or more each.

    A launch moves forward to a bundle if everything it depends on comes before that place, and nothing in between
    writes in place.  It goes to the earliest one.
    """
    open_: dict[str, list[_Bundle]] = {}
    last_write = -1
    place = list(range(len(steps)))  # where each unit will run
    for at, step in enumerate(steps):
        if step.writes:
            last_write = at
        if step.kind is None:
            continue
        ready = max([place[r] for r in step.reads], default=-1)
        home = None
        for b in open_.setdefault(step.kind, []):
            if b.at > ready and b.at > last_write and _fits(b, step, held_limit):
                home = b
                break
        if home is None:
            home = _Bundle(at, [])
            open_[step.kind].append(home)
        else:
            home.held += step.held
            place[at] = home.at
        home.members.append(at)
        home.slots |= step.slots
        home.families.add(step.family)
    return sorted([b.members for found in open_.values() for b in found if len(b.members) > 1])


def _fits(b: _Bundle, step: Step, held_limit: int) -> bool:
    return (
        len(b.slots | step.slots) <= MAX_PARAMETERS
        and len(b.families | {step.family}) <= MAX_FAMILIES
        and len(b.members) < MAX_ITEMS
        and b.held + step.held <= held_limit
    )
