"""What options and the steps of a Program tell about CUDA graphs: wanted or not, possible or not, which inputs it writes."""

from __future__ import annotations

import ast
import contextlib
from typing import Any

import torch

from ..codegen.program import Alloc, Assign, Call, Carve, Launch, Program, View, Wrote
from ..config import Config
from ..record import GraphRecord


def wanted(config: Config, stage: str, device: torch.device, target: str) -> tuple[str, str]:
    """("no" | "auto" | "yes", reason) of these options for a graph of `stage`; the reason is empty on a CPU."""
    if device.type != "cuda" or target != "triton":
        return "no", ""
    if torch.version.hip:
        return "no", "HIP graphs were never tried"
    if config.cudagraphs is False:
        return "no", "options={'cudagraphs': False}"
    if stage != "inference":
        return "no", "a training graph: all tensors saved for backward would be copied at every step"
    explicit = config.cudagraphs is True or config.mode in ("reduce-overhead", "max-autotune")
    return "yes" if explicit else "auto", ""


def obstacle(program: Program, record: GraphRecord, auto: bool) -> str:
    """Why this Program cannot be recorded, or "".  `record.calls` names its operators."""
    if program.sizes:
        return "sizes are dynamic"
    launches = 0
    for step in program.steps:
        if isinstance(step, Launch):
            launches += 1
            if any(step.scalars):
                return "a kernel takes a number from the CPU"
        elif isinstance(step, (Alloc, Carve)) and step.device.type != "cuda":
            return "a buffer lies on the CPU"
        elif isinstance(step, Call):
            launches += 1
    for value in program.constants.values():
        if isinstance(value, torch.device) and value.type not in ("cuda", "meta"):
            return f"an operator works on {value}"
        if isinstance(value, torch.Generator):
            return "an operator has a random generator of its own"
    for call in record.calls:
        op = _operator(call.op)
        if op is None:
            if auto or "higher_order" in call.op:
                return f"{call.op} is not one of torch's operators"
            continue
        if op.namespace in ("_c10d_functional", "c10d", "symm_mem"):
            return f"{call.op} talks to other processes"
        if op.namespace not in ("aten", "prims", "fusionc") and auto:
            return f"{call.op} is not one of torch's operators"
        for tag in ("dynamic_output_shape", "data_dependent_output", "cudagraph_unsafe"):
            if getattr(torch.Tag, tag, None) in op.tags:
                return f"{call.op} waits for the GPU" if tag != "cudagraph_unsafe" else f"{call.op} is marked as unsafe"
    return "" if launches else "nothing is launched"


# µs of host time on an H200: a launch, one more tensor in a list that is copied, and a new tensor to copy a result to
_LAUNCH_US, _COPY_US, _RESULT_US = 5.0, 0.4, 3.5


def dearer(launches: int, moved: int, results: int) -> str:
    """Why copying inputs that move and results costs the host more than the launches that a replay saves, or ""."""
    if _COPY_US * moved + _RESULT_US * results <= _LAUNCH_US * launches:
        return ""
    return f"copying {moved} inputs and {results} results costs more than {launches} launches"


def _operator(name: str) -> torch._ops.OpOverload | None:
    parts = name.split(".")
    found: Any = torch.ops
    with contextlib.suppress(AttributeError, RuntimeError):
        for part in parts:
            found = getattr(found, part)
        if isinstance(found, torch._ops.OpOverload):
            return found
    return None


def written_arguments(program: Program, record: GraphRecord) -> set[int]:
    """Positions of arguments that a library call or a kernel writes."""
    operators = {id(getattr(op, "_op", op)): op for c in record.calls if (op := _operator(c.op)) is not None}
    seat = {name: k for k, name in enumerate(program.arguments)}
    home = dict(seat)  # variable -> argument whose memory it may share
    written: set[int] = set()
    for step in program.steps:
        if isinstance(step, Wrote):
            written.update(seat[n] for n in step.names if n in seat)
            continue
        if isinstance(step, View):
            names = [step.base]
        elif isinstance(step, Call):
            tree = ast.parse(f"f({step.args})", mode="eval").body
            assert isinstance(tree, ast.Call)
            op = operators.get(id(program.constants.get(step.function)))
            names = []
            for k, value in enumerate(tree.args):
                inner = [n.id for n in ast.walk(value) if isinstance(n, ast.Name)]
                info = op._schema.arguments[k].alias_info if op is not None and k < len(op._schema.arguments) else None
                if op is None or info is not None:  # an operator unknown here is a view that the linker made
                    names += inner
                if info is not None and info.is_write:
                    written.update(home[n] for n in inner if n in home)
        elif isinstance(step, Assign):
            names = [n.id for n in ast.walk(ast.parse(step.value, mode="eval")) if isinstance(n, ast.Name)]
        else:
            continue
        for n in names:
            if n in home:
                home.setdefault(step.name, home[n])
    return written
