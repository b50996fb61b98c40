"""GPU: render Triton, compile for the device (or for one that is not there), bind a direct launch.

`interpret` runs the same text on CPU tensors in Triton's interpreter.  For a cross target (`sm_90`, …) the kernels are
compiled, so that registers, spills and assembly can be read in the dump, and nothing is launched.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ..codegen import triton as codegen
from ..errors import CompileError, LoadError
from ..ir.loop import Kernel, evaluate
from ..progress import Progress
from ..runtime import binaries, launch, turns
from ..runtime import device as devices
from ..schedule.columns import stage
from ..schedule.plan import Plan
from ..schedule.rules_triton import column_parts, default_plan, streams
from ..schedule.split import should_split, split
from .tune_triton import Session

if TYPE_CHECKING:
    from ..compiler import Context

Launcher = Callable[[Sequence[Any], Sequence[int], int], None]


@dataclass
class Part:
    """One kernel to build: its plan and text."""

    symbol: str
    kernel: Kernel
    plan: Plan
    source: str


def compile_all(
    cx: Context, kernels: dict[str, Kernel], uses: dict[str, int] | None = None
) -> tuple[dict[str, Any], dict[str, str]]:
    """Launchers `f(tensors, sizes, stream)` by symbol, and reasons for kernels that could not be built.

    With `uses` (how often each runs) plans may be measured; without, only those that the cache knows are used.
    """
    return start(cx, kernels, uses)()


def start(
    cx: Context, kernels: dict[str, Kernel], uses: dict[str, int] | None = None
) -> Callable[[], tuple[dict[str, Any], dict[str, str]]]:
    """Start compiling in threads; the result waits, measures plans, and returns what `compile_all` does."""
    cross = cx.target not in ("triton", "interpret")
    device = device_of(cx)
    parts: dict[str, list[Part]] = {}
    problems: dict[str, str] = {}
    for symbol, kernel in kernels.items():
        try:
            parts[symbol] = _parts(cx, symbol, kernel, device)
        except NotImplementedError as e:
            problems[symbol] = str(e)
    flat = [p for group in parts.values() for p in group]
    bound: dict[str, launch.TritonKernel] = {}
    session = None
    jobs: list[Callable[[], Any]] = []
    if cross:
        jobs = [partial(launch.cross_compile, p.source, p.symbol, p.kernel, p.plan, cx.target) for p in flat]
    elif cx.target == "triton":
        session = Session(cx, device, uses)
        session.consider(flat)
        bound = {p.symbol: launch.TritonKernel(p.source, p.symbol, p.kernel, p.plan, cx.device) for p in flat}
        jobs = [*[k.compile for k in bound.values()], *session.jobs()]
    bar = Progress("compiling kernels", len(jobs))
    with triton_cache(cx):
        waiting = launch.compile_beside(jobs, bar.advance).result if jobs else list

    def finish() -> tuple[dict[str, Any], dict[str, str]]:
        with bar.shown(cx.config.progress):
            results = waiting()[: len(flat)] if jobs else [None] * len(flat)
        if session is not None:
            _settle(cx, session, flat, bound, results)
        return _launchers(cx, kernels, parts, bound, results, session, problems)

    return finish


def _settle(cx: Context, session: Session, flat: list[Part], bound: dict[str, launch.TritonKernel], results: list[Any]) -> None:
    """Rules' plans where those of the cache do not build, and the winners of what is measured."""
    for i, p in enumerate(flat):
        if isinstance(results[i], Exception):
            if p.symbol in session.rules:
                session.restore(p)
                bound[p.symbol] = launch.TritonKernel(p.source, p.symbol, p.kernel, p.plan, cx.device)
            elif not isinstance(results[i], LoadError):
                continue
            with triton_cache(cx):
                results[i] = launch.compile_many([bound[p.symbol].compile])[0]
    if session.entries and cx.waiting is not None:
        cx.waiting()  # the less compiles while kernels race, the better
    clock = time.perf_counter()
    if session.entries:
        with turns.first():
            session.measure(bound, cx.config.progress)
    cx.record.timings["measure"] = cx.record.timings.get("measure", 0.0) + time.perf_counter() - clock


def _launchers(
    cx: Context, kernels: dict[str, Kernel], parts: dict[str, list[Part]], bound: dict[str, launch.TritonKernel],
    results: list[Any], session: Session | None, problems: dict[str, str],
) -> tuple[dict[str, Any], dict[str, str]]:  # fmt: skip
    """What `compile_all` returns, with records of the kernels."""
    from ..artifacts import kernel_record

    built: dict[str, launch.Compiled] = {}
    for p, r in zip([p for group in parts.values() for p in group], results, strict=True):
        if isinstance(r, Exception):
            problems[p.symbol.split("_part")[0]] = str(r)
        elif isinstance(r, launch.Compiled) and session is None:
            built[p.symbol] = r
    functions: dict[str, Any] = {}
    for symbol, group in parts.items():
        if symbol in problems:
            continue
        if cx.target == "triton":
            steps = [_direct(bound[p.symbol], p.kernel) for p in group]
        elif cx.target == "interpret":
            steps = [_interpreted(p) for p in group]
        else:
            steps = [_never for _ in group]
        whole = kernels[symbol]
        functions[symbol] = _joined(
            [b.name for b in whole.buffers], [s.name for s in whole.sizes], group, steps, cx.device
        )
        for p in group:
            compiled = built.get(p.symbol)
            note = usage_note(compiled) if compiled is not None else ""
            record = kernel_record(cx, symbol, p.kernel, p.plan, p.source + note, "triton", p.symbol)
            record.tuning = session.tuning.get(p.symbol, []) if session is not None else []
            cx.record.kernels.append(record)
    return functions, problems


def device_of(cx: Context) -> devices.DeviceProperties:
    """The GPU that plans are made for."""
    if cx.target == "triton":
        return devices.properties(cx.device)
    return devices.known(cx.target if cx.target != "interpret" else "sm_90")


def usage_note(compiled: launch.Compiled) -> str:
    """A comment for the end of a text: what the compiled kernel uses."""
    return (
        f"\n# {compiled.target}: {compiled.registers} registers, {compiled.spills} bytes spilled, "
        f"{compiled.shared} bytes of shared memory\n"
    )


def _parts(cx: Context, symbol: str, kernel: Kernel, device: Any) -> list[Part]:
    hints = {s.name: cx.hints.get(s.name, 64) for s in kernel.sizes}
    pieces: list[Kernel] = [kernel]
    count = 1 if kernel.columns else should_split(kernel, hints, "triton", device.processors)
    if kernel.columns:
        pieces = list(stage(kernel, max(1, column_parts(kernel, hints, device))))
    elif count > 1:
        two = split(kernel, count)
        if two is not None:
            pieces = list(two)
    out: list[Part] = []
    for k, piece in enumerate(pieces):
        name = symbol if len(pieces) == 1 else f"{symbol}_part{k}"
        sizes = {s.name: cx.hints.get(s.name, 64) for s in piece.sizes}
        plan = default_plan(piece, sizes, device)
        if cx.lone and len(pieces) == 1 and streams(piece, sizes, device):
            plan = replace(plan, stream=True)
        out.append(Part(name, piece, plan, codegen.render(piece, plan, name)))
    return out


def triton_cache(cx: Context) -> contextlib.AbstractContextManager[None]:
    """Triton's own binary cache inside ours: private, and gone with `cache=False`."""
    from .cpp import cache_for

    return binaries.in_folder(cache_for(cx.config.cache).folder("triton"))


def _direct(kernel: launch.TritonKernel, ir: Kernel) -> Launcher:
    """Launch with pre-bound arguments; a misaligned pointer takes a variant compiled without the alignment promise."""
    generic: list[launch.TritonKernel] = []
    names = [s.name for s in ir.sizes]
    scalar = any(b.scalar for b in ir.buffers)
    static = not names
    grid = launch.grid_of(ir, kernel.plan, {}) if static else 0
    run = kernel.bind(grid) if static else None

    def f(tensors: Sequence[Any], sizes: Sequence[int], stream: int) -> None:
        if scalar:
            pointers = [t.data_ptr() if isinstance(t, torch.Tensor) else t for t in tensors]
        else:
            pointers = [t.data_ptr() for t in tensors]
        bits = 0
        for p, b in zip(pointers, ir.buffers, strict=True):
            if not b.scalar:
                bits |= p
        if bits & 15:
            if not generic:
                generic.append(
                    launch.TritonKernel(
                        kernel.source, kernel.name, ir, kernel.plan, kernel.device, [False] * len(ir.buffers)
                    )
                )
            generic[0].launch(pointers, dict(zip(names, sizes, strict=True)), stream)
        elif run is not None:
            run(stream, *pointers)
        else:
            kernel.launch(pointers, dict(zip(names, sizes, strict=True)), stream)

    return f


def _interpreted(p: Part) -> Launcher:
    names = [s.name for s in p.kernel.sizes]

    def f(tensors: Sequence[Any], sizes: Sequence[int], stream: int) -> None:
        launch.interpret(p.source, p.symbol, p.kernel, p.plan, tensors, dict(zip(names, sizes, strict=True)))

    return f


def _never(tensors: Sequence[Any], sizes: Sequence[int], stream: int) -> None:
    raise CompileError("kernel", None, "was compiled for a machine that is not this one and cannot be launched")


def bind(group: list[Part], order: list[str], names: list[str], device: torch.device) -> Launcher:
    """A launcher of one kernel (or of its parts in order) for `device`; on the CPU in Triton's interpreter.

    `order` and `names` are the buffers and sizes that the launcher takes.
    """
    if device.type == "cpu":
        steps = [_interpreted(p) for p in group]
    else:
        steps = [_direct(launch.TritonKernel(p.source, p.symbol, p.kernel, p.plan, device), p.kernel) for p in group]
    return _joined(order, names, group, steps, device)


def _joined(
    order: list[str], names: list[str], group: list[Part], steps: list[Launcher], device: torch.device
) -> Launcher:
    """Run a split kernel: partial results go through scratch buffers."""
    from ..ir.lowering.registry import TORCH_DTYPE

    if len(group) == 1:
        return steps[0]
    known = set(order)
    scratch = {b.name: b for p in group for b in p.kernel.buffers if b.name not in known}

    def f(tensors: Sequence[Any], sizes: Sequence[int], stream: int) -> None:
        by_name = dict(zip(order, tensors, strict=True))
        values = dict(zip(names, sizes, strict=True))
        for name, b in scratch.items():
            by_name[name] = torch.empty(evaluate(b.size, values), dtype=TORCH_DTYPE[b.dtype], device=device)
        for p, step in zip(group, steps, strict=True):
            step([by_name[b.name] for b in p.kernel.buffers], [values[s.name] for s in p.kernel.sizes], stream)

    return f
