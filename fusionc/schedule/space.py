"""Which plans of a kernel are worth measuring: a short list around the rule's plan, by hard limits and a roofline model.

A kernel has a few hundred legal plans and most of them are within a factor of two of each other, so measuring all of
them costs minutes and gains little.  Here plans that cannot be good (tiles beyond the registers, idle threads) are
dropped, the rest are ranked by a model, and the first few are measured (`targets/tune_triton.py`).  The rule's plan is
always the first: a measurement can only improve on it.

The model is a roofline with corrections, each of which explained a loss seen on an H200: bytes in flight per processor
against what the latency of DRAM asks for (Little's law), the tail of the last wave, a fixed cost per program (launch,
index arithmetic, barriers of reductions), short runs of neighbouring addresses, and rows that are read again by later
passes.  It ranks; its microseconds are not predictions to rely on.  Idea of "prune by a model, measure the survivors":
Ansor, and Triton's autotuner with `early_config_prune`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

from ..ir.expr import ITEMSIZE, Load, Var
from ..ir.loop import Kernel, evaluate, kernel_bytes
from .plan import Plan
from .rules_triton import MOST_LONG, live_tiles, long_functions

VERSION = 3  # part of cache keys: a new list asks for a new measurement
_LAUNCH = 2e-6
_REGISTERS = 65536  # of a processor
_MOST_TILE = 1 << 16
_MOST_UNROLLED = 64  # points of a thread in one step: with 256 the row softmax takes 1 s to compile, with 64 0.2


class Device(Protocol):
    """What of `runtime.device.DeviceProperties` matters here."""

    @property
    def processors(self) -> int: ...
    @property
    def warp(self) -> int: ...
    @property
    def threads(self) -> int: ...
    @property
    def cache(self) -> int: ...
    @property
    def bandwidth(self) -> float: ...


@dataclass(frozen=True)
class Model:
    """The model's constants."""

    latency: float = 8e-7  # seconds from a load to its data with DRAM busy
    flight: float = 0.5  # exponent of missing bytes in flight
    program: float = 1e-7  # seconds that a program takes beside moving its data
    barrier: float = 5e-8  # of a reduction, each time that it doubles the warps
    step: float = 2e-8  # of a pass over a row
    point: float = 4e-9  # of a thread for each of its points
    run: float = 0.4  # exponent of the part of a 32-byte sector that is not used
    share: float = 0.015  # of the time, for each doubling away from 32 bytes a thread
    tail: float = 0.3  # of the last wave
    again: float = 0.5  # of DRAM's time, for bytes that L2 still has


MODEL = Model()


def candidates(kernel: Kernel, rule: Plan, hint: dict[str, int], device: Device, most: int = 8) -> list[Plan]:
    """At most `most` different plans, `rule` first, then by expected time; `hint` gives the value of each size by name.

    Half as many for a pointwise kernel: its plans differ by a few per cent.
    """
    most = most if kernel.axis else max(2, most // 2)
    ranked = []
    for plan in dict.fromkeys(around(kernel, rule, hint, device)):
        if plan == rule or limit(kernel, plan, hint, device) is not None:
            continue
        us = estimate(kernel, plan, hint, device)
        # the model cannot tell plans within 1 %: the nearer to the rule's, the better
        ranked.append((round(math.log(us) / 0.01), _distance(plan, rule), plan.to_json(), plan))
    ranked.sort(key=lambda r: r[:3])
    return [rule, *(r[3] for r in ranked[: most - 1])]


def legal(plan: Plan) -> bool:
    """Can this plan be rendered at all?  (Blocks are powers of two in Triton.)"""
    sizes = (plan.xblock, plan.rblock or 1, plan.warps)
    return plan.target == "triton" and all(n & (n - 1) == 0 for n in sizes)


def lower_bound(kernel: Kernel, hint: dict[str, int], device: Device) -> float:
    """Microseconds that the kernel's bytes take at the device's bandwidth."""
    return sum(kernel_bytes(kernel, hint)) / device.bandwidth * 1e6


def estimate(kernel: Kernel, plan: Plan, hint: dict[str, int], device: Device, model: Model = MODEL) -> float:
    """Expected microseconds of one launch."""
    outer, inner = max(1, evaluate(kernel.outer, hint)), max(1, evaluate(kernel.inner, hint))
    read, written = kernel_bytes(kernel, hint)
    tile, threads, regs = _tile(kernel, plan, inner), plan.warps * device.warp, _registers(kernel, plan, inner, device)
    programs = _programs(kernel, plan, hint)
    resident = max(1, min(32, device.threads // threads, _REGISTERS // (threads * min(regs, 255))))
    slots = resident * device.processors
    waves = programs / slots

    moved = float(read + written) * _scatter(kernel, plan, inner, hint, model)
    passes = max((r.level for r in kernel.reductions), default=0) + 1 if kernel.axis and plan.rblock else 1
    if passes > 1:  # the row is read again: from L2 as far as the rows in work fit there
        rows = read / outer * plan.xblock * min(programs, slots) / device.cache
        missed = min(1.0, max(0.0, rows - 0.5))
        moved += read * (passes - 1) * (missed + (1 - missed) * model.again)
    # bytes that one processor has asked for at a time, against those that keep DRAM busy
    flight = min(1.0, waves) * resident * tile * (read + written) / (outer * inner)
    flight = min(1.0, flight / (device.bandwidth * model.latency / device.processors))
    seconds = moved / device.bandwidth / max(flight, 0.01) ** model.flight
    if waves > 1:
        seconds *= 1 + model.tail * (math.ceil(waves) / waves - 1)
    seconds *= 1 + model.share * abs(math.log2(tile / threads * _width(kernel) / 32))
    steps = -(-inner // plan.rblock) * passes if kernel.axis and plan.rblock else 1
    barriers = len(kernel.reductions) * math.log2(2 * plan.warps) * model.barrier
    seconds += max(1.0, waves) * (model.program + barriers + steps * model.step) + steps * tile / threads * model.point
    return (seconds + _LAUNCH) * 1e6


def around(kernel: Kernel, rule: Plan, hint: dict[str, int], device: Device) -> Iterator[Plan]:
    """Plans to consider, legal or not."""
    outer, inner = evaluate(kernel.outer, hint), evaluate(kernel.inner, hint)
    widths = (1, 2, 4, 8, 16, 32) if device.warp == 32 else (1, 2, 4, 8, 16)
    if not kernel.axis:
        for xblock in (64, 128, 256, 512, 1024, 2048, 4096, 8192):
            for warps in widths[:5]:
                yield replace(rule, xblock=xblock, warps=warps)
        return
    if getattr(kernel, "part", None) is not None:  # rows dealt out to a fixed number of programs
        for xblock in (rule.xblock // 2, rule.xblock, rule.xblock * 2, rule.xblock * 4):
            for warps in widths:
                yield replace(rule, xblock=max(1, xblock), warps=warps)
        return
    whole = kernel.inner.is_const
    unit = _units(kernel, hint)
    if any(x for x, _, _ in unit):
        for xblock in (4, 8, 16, 32, 64, 128):
            for rblock in (1, 2, 4, 8, 16, 32, 64, 128, 256):
                for warps in widths[:5]:
                    yield replace(rule, xblock=xblock, rblock=0 if whole and rblock >= inner else rblock, warps=warps)
    if any(r for _, r, _ in unit) or not any(x for x, _, _ in unit):
        for rblock in (0, 256, 512, 1024, 2048, 4096, 8192, 16384):
            if (rblock == 0 and not whole) or rblock >= 2 * max(inner, 256) or (rblock and whole and rblock >= inner):
                continue
            for xblock in (1, 2, 4, 8, 16, 32):
                if xblock == 1 or xblock <= outer:
                    for warps in widths:
                        yield replace(rule, xblock=xblock, rblock=rblock, warps=warps)


def limit(kernel: Kernel, plan: Plan, hint: dict[str, int], device: Device) -> str | None:
    """Why the plan cannot be good, or None."""
    inner = max(1, evaluate(kernel.inner, hint))
    tile, threads = _tile(kernel, plan, inner), plan.warps * device.warp
    if tile > _MOST_TILE:
        return "the tile is too large"
    if tile < threads and plan.warps > 1:
        return "threads without work"
    if tile > 128 * threads:
        return "too much for one thread"
    regs = _registers(kernel, plan, inner, device)
    if regs > 255 or regs * threads > _REGISTERS:
        return "the tile does not fit into registers"
    if kernel.axis and plan.rblock and plan.unroll > 1 and tile * plan.unroll > _MOST_UNROLLED * threads:
        return "a step of several tiles takes seconds to compile, and spills"
    if tile * (plan.unroll if kernel.axis and plan.rblock else 1) * long_functions(kernel) > MOST_LONG * threads:
        return "too many long functions for one thread: seconds to compile, and spills"
    return None


def _programs(kernel: Kernel, plan: Plan, hint: dict[str, int]) -> int:
    part = getattr(kernel, "part", None)
    return evaluate(part.extent, hint) if part is not None else -(-max(1, evaluate(kernel.outer, hint)) // plan.xblock)


def _tile(kernel: Kernel, plan: Plan, inner: int) -> int:
    if not kernel.axis:
        return plan.xblock
    row = 1 << max(0, inner - 1).bit_length()
    return plan.xblock * (min(plan.rblock, row) if plan.rblock else row)


def _registers(kernel: Kernel, plan: Plan, inner: int, device: Device) -> int:
    """Registers of a thread, roughly: the tiles that are alive, and addresses and indices."""
    points = max(1.0, _tile(kernel, plan, inner) / (plan.warps * device.warp))
    if kernel.axis:
        words = float(live_tiles(kernel)) / (1 if plan.rblock else 2)  # half of a row's tiles are packed or recomputed
    else:
        words = sum(max(2, ITEMSIZE[n.dtype]) for n in kernel.loads if n.free) / 4 + 1
    return round(24 + words * points)


def _width(kernel: Kernel) -> int:
    """Bytes of an element of the widest tensor that is moved element by element."""
    return max((ITEMSIZE[b.dtype] for b in kernel.buffers if not b.scalar), default=4)


def _units(kernel: Kernel, hint: dict[str, int]) -> list[tuple[bool, bool, int]]:
    """(neighbours along the last loop?, along the axis?, bytes) of each access to elements of the whole nest."""
    loops, axis = frozenset(kernel.loops), frozenset(kernel.axis)
    found = [(n.index, n.dtype) for n in kernel.nodes if isinstance(n, Load)]
    found += [(s.index, kernel.buffer(s.buffer).dtype) for s in kernel.stores]
    out = []
    for at, dtype in found:
        if at.free & loops and (not axis or at.free & axis):
            x = bool(kernel.loops) and _unit(at, kernel.loops[-1]) and evaluate(kernel.loops[-1].extent, hint) > 1
            r = bool(axis) and _unit(at, kernel.axis[-1])
            out.append((x, r, ITEMSIZE[dtype]))
    return out


def _unit(at: object, v: Var) -> bool:
    c = at.coefficient(v)  # type: ignore[attr-defined]
    return c is not None and c.is_const and c.value == 1


def _scatter(kernel: Kernel, plan: Plan, inner: int, hint: dict[str, int], model: Model) -> float:
    """By how much sectors that are used in part lengthen the way to memory; 1 where all runs are long."""
    total = weighted = 0.0
    for x, r, size in _units(kernel, hint):
        run = min(plan.xblock, evaluate(kernel.loops[-1].extent, hint)) if x else 1
        if r:
            run = max(run, plan.rblock or inner)
        total += size
        weighted += size * max(1.0, 32 / (run * size)) ** model.run
    return weighted / total if total else 1.0


def _distance(a: Plan, b: Plan) -> float:
    """How many halvings or doublings lie between two plans; a change between whole rows and steps counts three."""
    d = abs(math.log2(a.xblock / b.xblock)) + abs(math.log2(a.warps / b.warps))
    if (a.rblock == 0) != (b.rblock == 0):
        return d + 3
    return d + (abs(math.log2(a.rblock / b.rblock)) if a.rblock else 0)
