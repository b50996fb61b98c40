"""A horizontal launch → the text of one Triton module.

Programs are numbered through: all those of the first family, item by item, then those of the next.  A program finds its
item by a binary search of `if`s over these constants, which ends in assignments of what differs between the items of the
family (pointers, sizes, the first program); the family's body follows once, as a function of its own.

    def f0(block, in0, in1, out0, s0): …                the body: like a kernel, its number of program an argument
    def m_…(p0, p1, …):
        pid = tl.program_id(0)
        if pid < 40: …                                  families: divergent
            if pid < 20: in0_f0 = p3; s0_f0 = 21600; first_f0 = 0    items: one family
            else: …
            f0(pid - first_f0, in0_f0, p1, p2 + 64, s0_f0)

A scalar parameter is a number; an offset counts elements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..ir.loop import Kernel
from ..schedule.horizontal import Family, Many
from ..schedule.plan import Plan
from .triton import Unrenderable, _Writer, parameters, refusal

_INT32 = (1 << 31) - 1


class _Body(_Writer):
    """The body of a family as a function of the number of the program within its item."""

    block = "block"

    def __init__(self, kernel: Kernel, plan: Plan, name: str):
        super().__init__(kernel, plan, name)
        self.width = 32  # of every item by itself, which is what was asked of it

    def function(self) -> str:
        self.body()
        params = ", ".join(["block", *[n for n, _ in parameters(self.k)]])
        return "\n".join([f"@triton.jit\ndef {self.name}({params}):", *self.lines])


@dataclass(frozen=True)
class Rendered:
    """Text of the module, and how many programs to launch."""

    source: str
    grid: int


def render_many(many: Many, plans: Sequence[Plan]) -> Rendered:
    """The module for a plan of each family (all with the same warps).  Raises Unrenderable."""
    bodies: list[str] = []
    helpers: dict[str, str] = {}
    library = False
    for number, (family, plan) in enumerate(zip(many.families, plans, strict=True)):
        why = refusal(family.kernel, plan)
        if why is not None:
            raise Unrenderable(f"family {number} of a horizontal launch cannot be rendered for Triton: {why}")
        writer = _Body(family.kernel, plan, f"f{number}")
        bodies.append(writer.function())
        helpers.update(writer.helpers)
        library |= any("libdevice." in t for t in writer.lines)
    main = _Main(many, plans)
    head = ["import triton", "import triton.language as tl"]
    if library:
        head.append("from triton.language.extra import libdevice")
    names = ", ".join(b.name for b in many.parameters)
    main.write()
    function = "\n".join([f"@triton.jit\ndef {many.symbol}({names}):", *main.lines])
    texts = ["\n".join(head), *[helpers[n].rstrip() for n in sorted(helpers)], *bodies, function]
    return Rendered("\n\n\n".join(texts) + "\n", main.grid)


class _Main:
    def __init__(self, many: Many, plans: Sequence[Plan]):
        self.many = many
        self.lines: list[str] = []
        self.first: list[list[int]] = []  # of each family, the first program of each item
        self.ends: list[int] = []
        at = 0
        for family, plan in zip(many.families, plans, strict=True):
            firsts = []
            for k in range(len(family.items)):
                firsts.append(at)
                at += -(-family.points(k) // plan.xblock)
            self.first.append(firsts)
            self.ends.append(at)
        self.grid = at
        if at > _INT32:
            raise Unrenderable("a horizontal launch has too many programs")

    def line(self, depth: int, text: str) -> None:
        self.lines.append("    " * depth + text)

    def write(self) -> None:
        self.line(1, "pid = tl.program_id(0)")
        depth = 1
        for number, family in enumerate(self.many.families):
            last = number == len(self.many.families) - 1
            if not last:
                self.line(depth, f"if pid < {self.ends[number]}:")
            self.family(number, family, depth + (not last))
            if not last:
                self.line(depth, "else:")
                depth += 1

    def family(self, number: int, family: Family, depth: int) -> None:
        items = [self.many.items[n] for n in family.items]
        buffers = family.kernel.buffers
        variables: list[tuple[str, list[str]]] = []  # name, text of the value in each item
        arguments: list[str] = []

        def argument(name: str, values: list[str]) -> str:
            if len(set(values)) == 1:
                return values[0]
            for known, texts in variables:
                if texts == values:
                    return known
            name = f"{name}_f{number}"  # another family's variable of this name may have another type
            variables.append((name, values))
            return name

        for k, b in enumerate(buffers):
            base = argument(b.name, [f"p{i.slots[k][0]}" for i in items])
            offset = argument(f"{b.name}_at", [str(i.slots[k][1]) for i in items])
            arguments.append(base if b.scalar or offset == "0" else f"{base} + {offset}")
        for c, s in enumerate(family.kernel.sizes):
            arguments.append(argument(s.name, [str(v[c]) for v in family.values]))
        first = argument("first", [str(n) for n in self.first[number]])
        self.search(number, variables, 0, len(items), depth)
        block = "pid" if first == "0" else f"pid - {first}"
        self.line(depth, f"f{number}({', '.join([block, *arguments])})")

    def search(self, number: int, variables: list[tuple[str, list[str]]], lo: int, hi: int, depth: int) -> None:
        if not variables:
            return
        if hi - lo == 1:
            for name, values in variables:
                self.line(depth, f"{name} = {values[lo]}")
            return
        middle = (lo + hi) // 2
        self.line(depth, f"if pid < {self.first[number][middle]}:")
        self.search(number, variables, lo, middle, depth + 1)
        self.line(depth, "else:")
        self.search(number, variables, middle, hi, depth + 1)
