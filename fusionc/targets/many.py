"""Horizontal launches: plan each family, render, compile for the device (or one that is not there), bind."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from ..codegen.triton import index_width
from ..codegen.triton_many import Rendered, render_many
from ..ir.loop import Kernel, evaluate, kernel_bytes
from ..progress import progress
from ..runtime import device as devices
from ..runtime import launch
from ..schedule.horizontal import Family, Many
from ..schedule.plan import Plan
from ..schedule.rules_triton import default_plan
from ..schedule.split import should_split

if TYPE_CHECKING:
    from ..compiler import Context

SMALL_US = 4.0  # of memory traffic: a longer kernel fills the device and hides the next launch
WARPS = 4  # of pointwise families, so that they can share a launch with most others
_pointer: Callable[[torch.Tensor], int] = torch._C.TensorBase.data_ptr


def device_of(cx: Context) -> Any:
    """What plans and limits are chosen by."""
    if cx.target == "triton":
        return devices.properties(cx.device)
    return devices.known("sm_90" if cx.target == "interpret" else cx.target)


def kind_of(kernel: Kernel, device: Any) -> str | None:
    """With which others a small kernel may share a launch (a word: its warps), None if it is to be alone."""
    if kernel.sizes or kernel.columns or index_width(kernel) != 32 or not kernel.stores:
        return None
    points = evaluate(kernel.outer, {}) * evaluate(kernel.inner, {})
    if points == 0 or sum(kernel_bytes(kernel, {})) > SMALL_US * 1e-6 * device.bandwidth:
        return None
    if not kernel.axis:
        return f"{WARPS} warps"
    if should_split(kernel, {}, "triton", device.processors) > 1:
        return None
    return f"{default_plan(kernel, {}, device).warps} warps"


def plans_of(many: Many, device: Any) -> list[Plan]:
    """A plan for each family, all with the same warps."""
    out: list[Plan] = []
    total = sum(f.points(k) for f in many.families for k in range(len(f.items)) if not f.kernel.axis)
    for family in many.families:
        if family.kernel.axis:
            largest = max(range(len(family.items)), key=family.points)
            out.append(default_plan(family.kernel, family.sizes(largest), device))
            continue
        block = 1024
        while block > 256 and total < 2 * block * device.processors:
            block //= 2
        out.append(Plan("triton", xblock=block, warps=WARPS))
    return out if len({p.warps for p in out}) == 1 else [replace(p, warps=max(q.warps for q in out)) for p in out]


Built = tuple[dict[str, Any], dict[str, str]]


def compile_all(cx: Context, wanted: Mapping[str, Many]) -> Built:
    """Launchers `f(tensors, sizes, stream)` by symbol, and reasons for launches that could not be built."""
    from .triton import triton_cache

    with triton_cache(cx), progress("compiling kernels", len(wanted), cx.config.progress) as bar:
        return start(cx, wanted, bar.advance)()


def start(cx: Context, wanted: Mapping[str, Many], done: Callable[[], Any] | None = None) -> Callable[[], Built]:
    """Start compiling in threads, in the caller's `triton_cache`; the result waits and returns what `compile_all` does."""
    from .triton import _never, usage_note

    device = device_of(cx)
    functions: dict[str, Any] = {}
    problems: dict[str, str] = {}
    made: dict[str, tuple[Rendered, list[Plan]]] = {}
    jobs: dict[str, Callable[[], Any]] = {}
    for symbol, many in wanted.items():
        try:
            plans = plans_of(many, device)
            made[symbol] = rendered, _ = render_many(many, plans), plans
        except NotImplementedError as e:
            problems[symbol] = str(e)
            continue
        text, plan, signature = rendered.source, plans[0], many.signature
        if cx.target == "triton":
            kernel = launch.TritonKernel(text, symbol, signature, plan, cx.device)
            jobs[symbol] = functools.partial(_bound, kernel, rendered.grid)
        elif cx.target == "interpret":
            functions[symbol] = interpreted(many, rendered, plan)
        else:
            jobs[symbol] = functools.partial(launch.cross_compile, text, symbol, signature, plan, cx.target)
    waiting = launch.compile_beside(list(jobs.values()), done).result if jobs else list

    def finish() -> Built:
        for symbol, r in zip(jobs, waiting(), strict=True):
            if isinstance(r, Exception):
                problems[symbol] = str(r)
            else:
                functions[symbol] = _never if isinstance(r, launch.Compiled) else r
                if isinstance(r, launch.Compiled):
                    rendered, plans = made[symbol]
                    made[symbol] = replace(rendered, source=rendered.source + usage_note(r)), plans
        for symbol in functions:
            record_of(cx, symbol, wanted[symbol], *made[symbol])
        return functions, problems

    return finish


def _bound(kernel: launch.TritonKernel, grid: int) -> Callable[..., None]:
    """A launcher of `grid` programs; misaligned pointers take a variant compiled without the promise."""
    run = kernel.bind(grid)
    buffers = kernel.kernel.buffers
    scalars = [k for k, b in enumerate(buffers) if b.scalar]
    generic: list[Callable[..., None]] = []

    def misaligned() -> Callable[..., None]:
        if not generic:
            other = launch.TritonKernel(
                kernel.source, kernel.name, kernel.kernel, kernel.plan, kernel.device, [False] * len(buffers)
            )
            generic.append(other.bind(grid))
        return generic[0]

    if scalars:

        def mixed(tensors: Sequence[Any], sizes: Sequence[int], stream: int) -> None:
            values = [t.data_ptr() if isinstance(t, torch.Tensor) else t for t in tensors]
            bits = 0
            for v, b in zip(values, buffers, strict=True):
                if not b.scalar:
                    bits |= v
            (misaligned() if bits & 15 else run)(stream, *values)

        return mixed

    aligned = getattr(run, "aligned", None)
    if aligned is not None:

        def quick(tensors: Sequence[Any], sizes: Sequence[int], stream: int) -> None:
            pointers = list(map(_pointer, tensors))
            if not aligned(stream, pointers):
                misaligned()(stream, *pointers)

        return quick

    def f(tensors: Sequence[Any], sizes: Sequence[int], stream: int) -> None:
        pointers = list(map(_pointer, tensors))
        (misaligned() if functools.reduce(operator.or_, pointers) & 15 else run)(stream, *pointers)

    return f


def interpreted(many: Many, rendered: Rendered, plan: Plan) -> Callable[..., None]:
    """The launch in Triton's interpreter."""

    def f(tensors: Sequence[Any], sizes: Sequence[int], stream: int) -> None:
        launch.interpret(rendered.source, many.symbol, many.signature, plan, tensors, {}, rendered.grid)

    return f


def bind(text: str, plan: Plan, source: str, grid: int, device: torch.device) -> Callable[..., None]:
    """A launcher from what a dump holds: on the CPU in Triton's interpreter."""
    from ..schedule.horizontal import parse_many

    many = parse_many(text)
    if device.type == "cpu":
        return interpreted(many, Rendered(source, grid), plan)
    return _bound(launch.TritonKernel(source, many.symbol, many.signature, plan, device), grid)


def record_of(cx: Context, symbol: str, many: Many, rendered: Rendered, plans: Sequence[Plan]) -> None:
    """Append the record of a horizontal launch: what it moves is the sum over its items."""
    from ..artifacts import CROSS, many_text, peaks, predicted_us
    from ..record import KernelRecord

    out = KernelRecord(name=symbol, symbol=symbol, language="triton")
    for item in many.items:
        kernel = many.kernels[item.kernel]
        read, written = kernel_bytes(kernel, {})
        out.bytes_read += read
        out.bytes_written += written
        out.flops += kernel.flops_per_point() * evaluate(kernel.outer, {}) * evaluate(kernel.inner, {})
    out.plan_json = plans[0].to_json()
    moved = out.bytes_read + out.bytes_written
    out.predicted_us = predicted_us(moved, out.flops, peaks(cx.target, cx.device), 2.0)
    if cx.config.dump or cx.target in CROSS:
        out.loop_text = describe(many, plans)
        out.source = rendered.source
        out.standalone = many_text(many, plans[0], rendered.source, rendered.grid)
    cx.record.kernels.append(out)


def describe(many: Many, plans: Sequence[Plan]) -> str:
    """The families of a launch for a reader: body, plan, and the sizes of each item."""
    out = [f"# one launch of {len(many.items)} kernels in {len(many.families)} families"]
    for family, plan in zip(many.families, plans, strict=True):
        out.append(f"# {len(family.items)} items, {plan.to_json()}")
        out += [f"#   {_item(family, k)}" for k in range(min(len(family.items), 8)) if family.kernel.sizes]
        out.append(family.kernel.text)
    return "\n".join(out)


def _item(family: Family, k: int) -> str:
    return ", ".join(f"{name} = {value}" for name, value in family.sizes(k).items())
