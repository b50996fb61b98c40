"""A Program in two: all that is recorded, and the last operation or two, whose large results would have to be copied.

Results leave a recording as copies, because the next replay writes over them.  The logits of a language model are a third
of a gigabyte, and copying them costs more than the launches that the graph saves.  So the product that makes them is
called plainly after the replay, on what the recording left in its memory, and its result is new memory as in any call.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..codegen.program import Alloc, Assign, Call, Carve, Expect, Free, Launch, Program, Step, View

_WORD = re.compile(r"\b[abcv]\d+\b")
_PRODUCTS = tuple(op for each in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.baddbmm)
                  for op in (each.default, each.default._op))  # fmt: skip


@dataclass(frozen=True)
class Halves:
    """``head`` returns the results at the positions ``early``, then the arguments of ``tail``, which returns the others."""

    head: Program
    tail: Program
    early: tuple[int, ...]
    late: tuple[int, ...]


def halves(program: Program, units: int) -> Halves | None:
    """``program`` cut before its last ``units`` launches and calls, or None where what these return may lie in memory that
    is not theirs, or they may write what the first half returns."""
    steps = program.steps
    places = [k for k, step in enumerate(steps) if isinstance(step, (Launch, Call))]
    if program.sizes or len(places) <= units:
        return None
    cut = places[-units]
    while cut and isinstance(steps[cut - 1], (Alloc, Carve, View, Assign, Expect, Free)):
        cut -= 1
    last: list[Step] = [step for step in steps[cut:] if not isinstance(step, Free)]
    if not all(isinstance(step, (Alloc, Carve, Launch, Call, Expect, View)) for step in last):
        return None
    home: dict[str, frozenset[str]] = {name: frozenset([name]) for name in program.arguments}
    for step in steps:  # the memory that a variable may lie in, by the names that were first
        for name in _made(step):
            fresh = isinstance(step, (Alloc, Carve)) or isinstance(step, Call) and _product(program, step)
            others = () if fresh else [home[w] for w in _reads(step, program) if w in home]
            home[name] = frozenset([name]).union(*others) if fresh or isinstance(step, Call) else frozenset().union(*others)
    made = {name for step in last for name in _made(step)}
    needed = sorted({w for step in last for w in _reads(step, program)} - made, key=lambda w: (w[0], int(w[1:])))
    early = tuple([k for k, name in enumerate(program.results) if name not in made])
    late = tuple([k for k in range(len(program.results)) if k not in early])
    if not late or any(name not in home for name in needed):
        return None
    if any(not home[program.results[k]] <= made for k in late):
        return None
    touched = frozenset().union(*[home[name] for name in needed])
    first = tuple([program.results[k] for k in early])
    if any(home.get(name, frozenset()) & touched for name in first if name not in program.arguments):
        return None  # what the second half may write is copied too early
    head = Program(program.arguments, (), steps[:cut], (*first, *needed), program.constants, program.uses_stream)
    tail = Program(tuple(needed), (), last, tuple([program.results[k] for k in late]), program.constants, program.uses_stream)
    return Halves(head, tail, early, late)


def cut(program: Program, large: Sequence[int]) -> Halves | None:
    """The shortest second half that makes all results at the positions ``large``."""
    for units in (1, 2, 3):
        found = halves(program, units)
        if found is not None and set(large) <= set(found.late):
            return found
    return None


def _made(step: Step) -> tuple[str, ...]:
    if isinstance(step, Carve):
        return step.names
    return (step.name,) if isinstance(step, (Alloc, Call, View, Assign)) else ()


def _reads(step: Step, program: Program) -> set[str]:
    """The variables that a step mentions, but those that it makes."""
    text = " ".join(line for line in step.text(program) if not line.startswith("#"))
    return set(_WORD.findall(text)) - set(_made(step))


def _product(program: Program, step: Call) -> bool:
    """One of the library's operators that always return new memory."""
    return any(program.constants.get(step.function) is op for op in _PRODUCTS)
