"""A kernel that fails when it is launched: the call is finished without it, with the right result.

A Program empties its arguments and drops buffers as it goes, so it cannot be started again elsewhere.  But Python keeps
what is needed: the traceback of the error holds the frame of the Program, with every buffer that is still alive and the
line where it stopped.  So the failed kernel's work is done by the loop interpreter (torch operators, slow), and the
remaining steps run as a Program of their own.  A call that succeeds pays nothing for this.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch

from .codegen.program import Launch, Program
from .errors import StrictError, strictly, warn_once
from .ir.interp import TORCH_DTYPE, run
from .ir.loop import Kernel, evaluate
from .ir.text import parse_kernel
from .schedule.horizontal import parse_many

_NAME = "fusionc_rescue"  # in the globals of a compiled Program; its text cannot mention it
Boxed = Callable[[list[Any]], Any]


@dataclass
class Rescue:
    """What it takes to go on after a failed launch: the steps, and the kernels' loop IR by symbol."""

    program: Program
    loops: Mapping[str, str]
    rest: dict[tuple[int, tuple[str, ...]], Boxed] = field(default_factory=dict)


def entry(program: Program, loops: Mapping[str, str]) -> dict[str, Any]:
    """For the namespace that ``program`` is compiled in."""
    return {_NAME: Rescue(program, loops)}


def guarded(call: Boxed, strict: bool = False) -> Boxed:
    """``call`` with launches that fail made good; every other error passes through unchanged.

    With ``strict`` nothing is made good, by operators neither: StrictError says what could not run.
    """

    def run(args: list[Any]) -> Any:
        try:
            return call(args)
        except Exception as error:
            found = _failed_launch(error)
            if found is None:
                raise
            return _finish(error, *found, strict)

    def strict_run(args: list[Any]) -> Any:
        with strictly():
            return run(args)

    return strict_run if strict else run


def _finish(error: Exception, frame: FrameType, rescue: Rescue, number: int, strict: bool) -> Any:
    """The result of the call that ``error`` ended at step ``number``."""
    step = rescue.program.steps[number]
    assert isinstance(step, Launch)
    what = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if strict:
        raise StrictError(f"kernel {step.kernel} could not be launched: {what}") from error
    warn_once(
        f"launch:{what}",
        f"fusionc: kernel {step.kernel} could not be launched ({what}); torch computes it from now on, slowly. "
        "FUSIONC_DUMP=<folder> keeps its source, kernel.py there runs it alone",
    )
    values = {k: v for k, v in frame.f_locals.items() if k != "args"}
    known = {**frame.f_globals, **values}  # constants of the graph are global
    with torch.no_grad():
        _again(rescue.loops[step.kernel], [known[b] for b in step.buffers], values)
    names = tuple(sorted(values))
    rest = rescue.rest.get((number, names))
    if rest is None:
        p = rescue.program
        tail = Program(names, (), p.steps[number + 1 :], p.results, p.constants)
        rest = tail.compile({**frame.f_globals, **entry(tail, rescue.loops)}, f"after {step.kernel}")
        rest = rescue.rest[number, names] = guarded(rest, strict)
    inputs = [values[n] for n in names]
    del values, known, frame
    error.__traceback__ = None  # it holds the frame, and with it all buffers
    return rest(inputs)


def _failed_launch(error: Exception) -> tuple[FrameType, Rescue, int] | None:
    """Frame, Program and step of the launch that raised, if that is what happened and something can be done."""
    if isinstance(error, (IndexError, StrictError, torch.OutOfMemoryError)):
        return None  # a wrong index is the user's error; without memory there is nothing to go on with
    tb = error.__traceback__
    while tb is not None:
        rescue = tb.tb_frame.f_globals.get(_NAME)
        if isinstance(rescue, Rescue) and tb.tb_frame.f_code.co_name == "call":
            number = rescue.program.step_at(tb.tb_lineno)
            step = rescue.program.steps[number] if number is not None else None
            if not isinstance(step, Launch) or step.kernel not in rescue.loops or number is None:
                return None
            if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                return None
            return tb.tb_frame, rescue, number
        tb = tb.tb_next
    return None


def _again(text: str, tensors: Sequence[Any], values: Mapping[str, Any]) -> None:
    """The work of the launch whose kernel has this text."""
    if not text.startswith("{"):
        kernel = parse_kernel(text)
        compute(kernel, tensors, {s.name: int(values[s.name]) for s in kernel.sizes})
        return
    many = parse_many(text)
    for item in many.items:
        mine = []
        for slot, first in item.slots:
            t = tensors[slot]
            mine.append(t.as_strided((1,), (1,), t.storage_offset() + first) if first else t)
        compute(many.kernels[item.kernel], mine, {})


def compute(kernel: Kernel, tensors: Sequence[Any], sizes: dict[str, int]) -> None:
    """What a launch of ``kernel`` on these tensors does, by torch operators on their device."""
    device = next((t.device for t in tensors if isinstance(t, torch.Tensor) and t.device.type != "cpu"), None)
    buffers: dict[str, torch.Tensor] = {}
    for b, t in zip(kernel.buffers, tensors, strict=True):
        if not isinstance(t, torch.Tensor):
            t = torch.tensor([t], dtype=TORCH_DTYPE[b.dtype])
        flat = t.detach().as_strided((evaluate(b.size, sizes),), (1,), t.storage_offset())
        if flat.dtype != TORCH_DTYPE[b.dtype]:
            flat = flat.view(TORCH_DTYPE[b.dtype])
        buffers[b.name] = flat.to(device) if b.scalar and device is not None else flat
    with torch.device(device or "cpu"):
        run(kernel, buffers, sizes)
