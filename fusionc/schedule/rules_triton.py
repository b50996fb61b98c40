"""The default Plan of a Triton kernel, by rule: no measurement, no compiler.

The rules aim at tiles that leave 8 to 16 elements to a thread (16-byte accesses, several in flight, no spills), at rows
that stay in registers between the reductions over them, and at enough programs for every processor.
"""

from __future__ import annotations

from typing import Protocol

from ..ir.expr import ITEMSIZE, Load, Op, Var, bounds
from ..ir.loop import Kernel, evaluate, kernel_bytes
from ..ir.online import online_pairs
from .plan import Plan


class Device(Protocol):
    """What of `runtime.device.DeviceProperties` matters here."""

    @property
    def processors(self) -> int: ...
    @property
    def warp(self) -> int: ...
    @property
    def cache(self) -> int: ...


_PERSISTENT = 16384  # longest row kept in registers
_PERSISTENT_SCAN = 4096
_REGISTERS = 96  # of a thread that tiles may use before they spill
# Functions that the device's library writes out as dozens of instructions (float64: hundreds), each for every point of
# a thread. 9 each of sin, tanh, exp, sqrt and erf: 12 s to compile with 16 points, 4.6 with 8, 1.4 with 4 (float64:
# 8 s, and it spills).
_LONG = frozenset(
    ("exp", "expm1", "log", "log1p", "log10", "log2", "sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh")
) | {"asinh", "acosh", "atanh", "erf", "erfc", "lgamma", "pow", "atan2", "fmod", "mod", "floordiv", "sigmoid"}
MOST_LONG = 160  # of a thread


def default_plan(kernel: Kernel, hint: dict[str, int], device: Device) -> Plan:
    """A good plan for `kernel` on `device`; `hint` gives a likely value of each size by name."""
    outer, inner = evaluate(kernel.outer, hint), evaluate(kernel.inner, hint)
    if not kernel.axis:
        return _pointwise(kernel, outer, device)
    if kernel.columns:
        return _walk(kernel, outer, inner, device)
    if contiguous_in_loops(kernel, hint):
        return _columns(kernel, outer, inner, device)
    return _rows(kernel, outer, inner, device)


def streams(kernel: Kernel, hint: dict[str, int], device: Device) -> bool:
    """Is a graph of this kernel alone faster with `evict_last` on its loads?

    Measured on an H200 (NOTES.md): 2 to 4 % for large tensors that are read and written once, as written lines then leave
    L2 first.  It costs up to 4 % below the size of L2 or with little written, and 1 % of a model, whose next kernel would
    have found the results in L2.
    """
    read, written = kernel_bytes(kernel, hint)
    return device.warp == 32 and read + written >= 2 * device.cache and 4 * written >= read


def _pow2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def _pow2_down(n: int) -> int:
    return 1 << max(0, n.bit_length() - 1)


def _warps(elements: int, per_thread: int, device: Device, most: int = 8) -> int:
    return max(1, min(_pow2_down(elements // (device.warp * per_thread)), most))


def _pointwise(kernel: Kernel, outer: int, device: Device) -> Plan:
    sizes = [ITEMSIZE[b.dtype] for b in kernel.buffers] or [4]
    per_thread = 16 if min(sizes) == 1 and max(sizes) < 8 else 8
    if len(kernel.loads) + len(kernel.stores) > 12:
        per_thread = 4
    while per_thread > 1 and per_thread * long_functions(kernel) > MOST_LONG:
        per_thread //= 2
    block = 128 * per_thread
    while block > 128 and outer < block * device.processors:
        block //= 2
    return Plan("triton", xblock=block, warps=_warps(block, max(1, min(per_thread, block // 128)), device))


def long_functions(kernel: Kernel) -> int:
    """How many float32 functions of many instructions a point takes; one of float64 is as long as four."""
    found = [n for n in kernel.nodes if isinstance(n, Op) and n.name in _LONG and n.args[0].dtype in ("f32", "f64")]
    return sum(4 if n.args[0].dtype == "f64" else 1 for n in found)


def live_tiles(kernel: Kernel) -> int:
    """How many tiles [XBLOCK, RBLOCK] of 4-byte values are alive at once, roughly."""
    axis = frozenset(kernel.axis)
    full = [n for n in kernel.loads if n.free & axis]
    words = sum(max(4, ITEMSIZE[n.dtype]) for n in full) / 4
    return max(2, round(words) + 1)


def accumulators(kernel: Kernel) -> int:
    """Most registers that the reductions of one pass over the axis keep for a lane."""
    words: dict[int, int] = {}
    for r in kernel.reductions:
        own = max(1, ITEMSIZE[r.body.dtype] // 4) + (r.kind in ("argmax", "argmin"))
        words[r.level] = words.get(r.level, 0) + own
    return max(words.values(), default=0)


def _rows(kernel: Kernel, outer: int, inner: int, device: Device) -> Plan:
    limit = _PERSISTENT_SCAN if kernel.scans else _PERSISTENT
    live = live_tiles(kernel)
    threads = 1024 if device.warp == 32 else 512
    tile = _pow2(inner)
    fits = tile <= threads * max(1, _REGISTERS // (live * 2))
    if kernel.inner.is_const and tile <= limit and fits:
        xblock = 1
        while xblock * tile < 2048 and outer >= 2 * xblock * 2 * device.processors:
            xblock *= 2
        # measured on an H200 (softmax and norms of 768 to 16384 columns, enough rows to fill it): 16 elements a thread
        # beat 8 by up to 30 %, and one live tile may be larger still; few rows want more threads instead
        if outer < 4 * device.processors or live > 6:
            per_thread = 8
        else:
            per_thread = 16 if live > 2 or tile < 4096 else 32 if tile < 16384 else 64
        most = threads // device.warp // (2 if live <= 4 else 1)
        return Plan("triton", xblock=xblock, rblock=0, warps=_warps(xblock * tile, per_thread, device, most))
    top = bounds(kernel.inner)[1]
    longest = 1024 if kernel.scans else 2048 if live > 4 else 8192 if outer <= 16 * device.processors else 4096
    block = max(32, min(_pow2(min(inner, top or inner)), longest))
    # 8 elements a thread, each with a lane of every accumulator: the fewer threads, the more registers for one
    while block > 1024 and 8 * accumulators(kernel) + 24 > 65536 // (block // 8):
        block //= 2
    xblock = 1
    while xblock * block < 512 and outer >= 2 * xblock * 2 * device.processors:
        xblock *= 2
    most = threads // device.warp
    if online_pairs(kernel):
        # measured on an H200 (4096 × 65536 bf16): four tiles of 4096 a step with 16 warps, of 1024 to 8192 and 1 to 8 tiles
        block = min(block, 4096)
        unroll = max(1, min(4, _pow2_down(inner // block)))
        return Plan(
            "triton", xblock=xblock, rblock=block, warps=_warps(xblock * block, 8, device, most // 2), unroll=unroll
        )
    return Plan("triton", xblock=xblock, rblock=block, warps=_warps(xblock * block, 8, device, most))


# Programs that walk over rows and sum columns, measured on an H200 (norm backward, 16384 × 4096 bf16, of 4 to 32 warps,
# 1 to 6 programs a processor, 1 to 3 stages): 16 elements a thread, 512 threads a processor in two programs, three
# stages, 0.105 ms; without the pipelined loads 0.127.
_WALK_TILE, _WALK_THREADS = 4096, 512
_PIPELINE = 65536  # bytes of shared memory that the rows in flight of one program may take
_LEAST_ROWS = 4  # of a program: fewer do not pay for its partial sums


def column_parts(kernel: Kernel, hint: dict[str, int], device: Device) -> int:
    """How many programs share the rows of a kernel with column stores; 0: too few rows, or rows that are too long."""
    outer = evaluate(kernel.outer, hint)
    shape = _walk_shape(kernel, outer, evaluate(kernel.inner, hint), device)
    if shape is None:
        return 0
    xblock, warps = shape
    programs = min(8, max(1, _WALK_THREADS // (warps * device.warp)))
    parts = min(programs * device.processors, outer // (_LEAST_ROWS * xblock))
    return parts if 2 * parts >= device.processors else 0


def _walk_shape(kernel: Kernel, outer: int, inner: int, device: Device) -> tuple[int, int] | None:
    """Rows at a time and warps with which everything stays in registers; None where the row is too long for that."""
    tile = _pow2(inner)
    xblock = max(1, _WALK_TILE // tile)
    while xblock > 1 and outer < 2 * _LEAST_ROWS * xblock * device.processors:
        xblock //= 2
    loops, axis = frozenset(kernel.loops), frozenset(kernel.axis)
    # for each element: the row as it was loaded, one float32 value for each sum, and a few temporaries
    full = [n for n in kernel.loads if n.free & axis and n.free & loops]
    words = sum(ITEMSIZE[n.dtype] for n in full) / 4 + len(kernel.column_sums) + 2
    for each in (16, 8):
        threads = max(device.warp, xblock * tile // each)
        if threads <= (1024 if device.warp == 32 else 512) and each * words + 24 <= min(255, 65536 // threads):
            return xblock, threads // device.warp
    return None


def _walk(kernel: Kernel, outer: int, inner: int, device: Device) -> Plan:
    """Rows one after the other, column sums in registers."""
    xblock, warps = _walk_shape(kernel, outer, inner, device) or (1, 16)
    loops, axis = frozenset(kernel.loops), frozenset(kernel.axis)
    row = sum(ITEMSIZE[n.dtype] for n in kernel.loads if n.free & axis and n.free & loops) * _pow2(inner) * xblock
    stages = 1 if device.warp != 32 else max(1, min(3, 1 + _PIPELINE // max(row, 1)))
    return Plan("triton", xblock=xblock, rblock=0, warps=warps, stages=stages)


def _columns(kernel: Kernel, outer: int, inner: int, device: Device) -> Plan:
    """Reductions over a slow dimension: neighbouring lanes take neighbouring columns."""
    xblock = 32
    while xblock > 16 and outer < xblock * device.processors:
        xblock //= 2
    xblock = min(xblock, max(1, _pow2(outer)))
    rblock = max(1, min(_pow2(inner), 2048 // xblock if live_tiles(kernel) <= 6 else 1024 // xblock))
    persistent = kernel.inner.is_const and rblock >= inner
    return Plan("triton", xblock=xblock, rblock=0 if persistent else rblock, warps=_warps(xblock * rblock, 8, device))


def contiguous_in_loops(kernel: Kernel, hint: dict[str, int]) -> bool:
    """Do the accesses run along the last loop rather than along the axis?"""
    if not kernel.axis or not kernel.loops:
        return False
    x, r = kernel.loops[-1], kernel.axis[-1]
    if evaluate(x.extent, hint) < 4:
        return False
    axis = frozenset(kernel.axis)
    accesses = [(n.index, n.dtype) for n in kernel.nodes if isinstance(n, Load) and n.index.free & axis]
    accesses += [(s.index, kernel.buffer(s.buffer).dtype) for s in kernel.stores if s.inner]
    along_x = sum(_unit(at, x) * ITEMSIZE[dtype] for at, dtype in accesses)
    along_r = sum(_unit(at, r) * ITEMSIZE[dtype] for at, dtype in accesses)
    return along_x > along_r


def _unit(at: object, v: Var) -> int:
    """1 if the index moves by one element with `v`."""
    c = at.coefficient(v)  # type: ignore[attr-defined]
    return int(c is not None and c.is_const and c.value == 1)
