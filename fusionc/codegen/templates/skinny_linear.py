"""Kernels for y = epilogue(norm(x) Wᵀ) with one row of x, where reading W once is all the work.

`one_row` multiplies and adds in float32: each program owns BN rows of W (twice that with a gate) and walks along K, the
next DEPTH tiles always on their way.  It computes the row statistics of x itself, which is small and lies in L2.  The rows
of W may lie in up to three tensors.  Results are rounded where separate operators would round: after the norm, after the
product, after the activation, after the sum.  Programs of one warp do not wait for each other at the sums; the eight
neighbouring columns that one load brings a thread are added at once, so that registers hold tiles and not sums.

With PDL a program loads its first tiles of W, which no kernel of the chain writes, before it waits for the kernel in
front of it (programmatic dependent launch).  Every program waits, and only then (NEXT) lets the next kernel start: so
whatever the next kernel reads before its own wait was complete unless this kernel wrote it.  The first of a chain starts
when all in front has finished, and lets the next one start at once.

With OWN the kernel in front leaves the memory idle (attention over a cache): before its wait a program then asks for what
it has not loaded of W yet and for its share of two weights that the next kernel reads to be brought into L2.  Of these, every
program asks for the first bytes of a step of its own, so that the next kernel finds parts in L2 all along its way: L2
alone is little faster than the memory, but both together are.

Source: CUDA programming guide, "Programmatic dependent launch"; PTX ISA, ``cp.async.bulk.prefetch``; tile sizes measured
on an H200 (NOTES.md).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

_HELPERS = '''
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _activated(gate, up, ACT: tl.constexpr, DT: tl.constexpr):
    g = gate.to(DT).to(tl.float32)
    if ACT == "silu":
        a = g / (1.0 + tl.exp(-g))
    elif ACT == "gelu":
        a = 0.5 * g * (1.0 + tl.erf(g * 0.7071067811865476))
    elif ACT == "relu":
        a = tl.where(g < 0.0, 0.0, g)  # keeps NaN
    else:  # gelu with tanh
        t = 0.7978845608028654 * (g + 0.044715 * g * g * g)
        a = 0.5 * g * (2.0 - 2.0 / (tl.exp(2.0 * t) + 1.0))
    return a.to(DT).to(tl.float32) * up.to(DT).to(tl.float32)


@triton.jit
def _scaled(x, rstd, w, NORM: tl.constexpr, DT: tl.constexpr):
    h = x.to(tl.float32) * rstd
    if NORM == 1:  # the normalised x is rounded before it is multiplied with the weight
        h = h.to(DT).to(tl.float32)
    return (h * w.to(tl.float32)).to(DT).to(tl.float32)


@triton.jit
def _tile(w, rows, cols, ok, K: tl.constexpr, EVEN: tl.constexpr):
    at = w + rows[:, None] * K + cols[None, :]
    if EVEN:
        return tl.load(at, eviction_policy="evict_first")
    return tl.load(at, mask=ok & (cols < K)[None, :], other=0.0, eviction_policy="evict_first")


@triton.jit
def _columns(x, cols, K: tl.constexpr, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(x + cols[None, :], eviction_policy="evict_last")
    return tl.load(x + cols[None, :], mask=(cols < K)[None, :], other=0.0, eviction_policy="evict_last")


@triton.jit
def _again(x, cols, K: tl.constexpr):  # (without the policy: else the compiler takes the two for one, and keeps all of x)
    return tl.load(x + cols[None, :], mask=(cols < K)[None, :], other=0.0)


@triton.jit
def _products(w, v, BN: tl.constexpr, BK: tl.constexpr):
    return tl.sum(tl.reshape(w.to(tl.float32) * v.to(tl.float32), [BN, BK // 8, 8]), 2)


@triton.jit
def _beside(at, rows, N: tl.constexpr, HAS: tl.constexpr):
    y = tl.zeros(rows.shape, tl.float32)
    if HAS:
        y = tl.load(at + rows, mask=rows < N, other=0.0).to(tl.float32)
    return y


@triton.jit
def _fetch(at, size):
    """Brings ``size`` bytes, a multiple of 16, into L2: the program's first eight threads ask for a part each."""
    part = (size + 127) // 128 * 16
    tl.inline_asm_elementwise("""{
        .reg .pred some;
        .reg .b32 offset, left;
        .reg .b64 from;
        mov.u32 offset, %tid.x;
        mul.lo.u32 offset, offset, $3;
        setp.lt.u32 some, offset, $2;
        sub.u32 left, $2, offset;
        min.u32 left, left, $3;
        cvt.u64.u32 from, offset;
        add.u64 from, from, $1;
        @some cp.async.bulk.prefetch.L2.global [from], left;
        mov.u32 $0, 0;
        }""", "=r,l,r,r", [at, size, part], tl.int32, False, 1)
'''

_START = '''

@triton.jit
def one_row(x, w, w1, w2, norm, bias, residual, out, next0, next1,
            N0: tl.constexpr, N1: tl.constexpr, UP: tl.constexpr,
            N: tl.constexpr, K: tl.constexpr, EPS: tl.constexpr, NORM: tl.constexpr, ACT: tl.constexpr,
            HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, WIDE: tl.constexpr, PDL: tl.constexpr,
            NEXT: tl.constexpr, OWN: tl.constexpr, STEP0: tl.constexpr, SHARE0: tl.constexpr, STEP1: tl.constexpr,
            SHARE1: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr):
    DT: tl.constexpr = out.dtype.element_ty
    TILES: tl.constexpr = (K + BK - 1) // BK
    ROUNDS: tl.constexpr = (TILES + DEPTH - 1) // DEPTH
    cols = tl.arange(0, BK)
    start = tl.program_id(0) * BN
    if UP == 0:  # the up rows lie in a tensor of their own
        u = w1
    else:
        u = w
    if N0 > 0:  # rows from N0 on lie in w1, from N1 on in w2; no block of rows lies in two
        if start >= N0:
            w = w1 - N0 * K
        if start >= N1:
            w = w2 - N1 * K
    rows = start + tl.arange(0, BN)
    if WIDE:
        rows = rows.to(tl.int64)
    ok = (rows < N)[:, None]
'''

_BEFORE = '''    if OWN:
        if ROUNDS > 1:
            size = tl.minimum(BN, N - start) * (K * 2)
            first_row = start
            if WIDE:
                first_row = start.to(tl.int64)
            _fetch(w + first_row * K, size)
            if ACT != "":
                _fetch(u + (first_row + UP) * K, size)
        if SHARE0 > 0:
            _fetch(next0 + tl.program_id(0).to(tl.int64) * STEP0, SHARE0)
        if SHARE1 > 0:
            _fetch(next1 + tl.program_id(0).to(tl.int64) * STEP1, SHARE1)
    if PDL:
        gdc_wait()
    if NEXT:
        gdc_launch_dependents()
    # what a program reads besides is on its way before the first sum, at which its threads wait for each other
'''

_BESIDE = '''    b = _beside(bias, rows, N, HAS_BIAS)
    b_up = _beside(bias + N, rows, N, HAS_BIAS and ACT != "")
    r = _beside(residual, rows, N, HAS_RESIDUAL)
    if NORM != 0:
        squares = tl.zeros([1, BK], tl.float32)
'''

_STATISTICS = '''        if TILES <= 16:
            for t in tl.static_range(DEPTH, TILES):
                v = _again(x, t * BK + cols, K).to(tl.float32)
                squares += v * v
        else:
            for t in range(DEPTH, TILES):
                v = _again(x, t * BK + cols, K).to(tl.float32)
                squares += v * v
        rstd = tl.rsqrt(tl.sum(squares, 1) / K + EPS)[:, None]
    acc = tl.zeros([BN, BK // 8], tl.float32)
    acc_up = acc
'''

_END = '''    y = tl.sum(acc, 1)
    if HAS_BIAS:
        y += b
    if ACT != "":
        up = tl.sum(acc_up, 1)
        if HAS_BIAS:
            up += b_up
        y = _activated(y, up, ACT, DT)
    y = y.to(DT)
    if HAS_RESIDUAL:
        y = (y.to(tl.float32) + r).to(DT)
    tl.store(out + rows, y, mask=rows < N)
'''


@functools.cache
def text(depth: int) -> str:
    """The kernel's text with ``depth`` tiles of W on their way: each has variables of its own, which Triton cannot index."""
    lines: list[str] = []

    def put(pre: str, *some: str) -> None:
        lines.extend(pre + line for line in some)

    def with_gate(pre: str, *some: str) -> None:
        put(pre, 'if ACT != "":', *("    " + line for line in some))

    def tiles(pre: str, at: Callable[[int], str], which: range) -> None:
        put(pre, *(f"tile{j} = _tile(w, rows, {at(j)} * BK + cols, ok, K, EVEN)" for j in which))
        with_gate(pre, *(f"up{j} = _tile(u, rows + UP, {at(j)} * BK + cols, ok, K, EVEN)" for j in which))

    def columns(pre: str, at: Callable[[int], str]) -> None:
        put(pre, *(f"x{j} = _columns(x, {at(j)} * BK + cols, K, EVEN)" for j in each))
        put(pre, "if NORM != 0:", *(f"    n{j} = _columns(norm, {at(j)} * BK + cols, K, EVEN)" for j in each))

    def use(pre: str, following: Callable[[int], str] | None = None) -> None:
        for j in each:
            put(pre, f"v = x{j}", "if NORM != 0:", f"    v = _scaled(x{j}, rstd, n{j}, NORM, DT)",
                f"acc += _products(tile{j}, v, BN, BK)")  # fmt: skip
            with_gate(pre, f"acc_up += _products(up{j}, v, BN, BK)")
            if following is not None:
                tiles(pre, following, range(j, j + 1))

    each = range(depth)
    tiles("    ", str, each)
    lines += _BEFORE.splitlines()
    columns("    ", str)
    lines += _BESIDE.splitlines()
    put("        ", *(f"squares += x{j}.to(tl.float32) * x{j}.to(tl.float32)" for j in each))
    lines += _STATISTICS.splitlines()
    put("    ", "if ROUNDS == 1:")
    use("        ")
    put("    ", "else:")
    use("        ", lambda j: f"{depth + j}")
    put("        ", "for t in range(1, ROUNDS - 1):")
    columns("            ", lambda j: f"(t * {depth} + {j})")
    use("            ", lambda j: f"(t * {depth} + {depth + j})")
    columns("        ", lambda j: f"((ROUNDS - 1) * {depth} + {j})")
    use("        ")
    return _HELPERS + (_START + "\n".join(lines) + "\n" + _END).replace("DEPTH", str(depth))


@dataclass(frozen=True)
class Tile:
    """One way to cut the work: rows of W and columns of a tile, warps, tiles on their way, and the most registers of a thread
    (None: what the compiler takes)."""

    bn: int
    bk: int
    warps: int
    depth: int = 1
    registers: int | None = None


def share(size: int, programs: int, room: int) -> tuple[int, int]:
    """(step, bytes of it) of each of ``programs`` in asking for a part of a weight of ``size`` bytes, at most ``room``.

    H200, Llama 1B, a decode step of 0.69 ms (NOTES.md): of the 67 MB of gate and up 5 %, 10 %, 15 to 25 %, 30 %, 40 %: 1.02,
    1.01, 1, 1.007, 1.013 of that. With evenly spread parts of the other kernels' weights as well it is slower.
    """
    step = size // programs // 256 * 256
    return step, min(step // 5 // 128 * 128, room // programs // 128 * 128)


def one_row_tiles(n: int, k: int, gated: bool, normed: bool, heavy: bool) -> tuple[Tile, ...]:
    """Candidates, the default (by what was the fastest on an H200, in a decode step of Llama 1B) first.

    Left alone the compiler takes some registers more, and fewer programs fit on a multiprocessor; ``heavy`` kernels have
    more to hold, and would spill.
    """
    if gated:
        order = [Tile(4, 256, 1, 1, 128), Tile(4, 512, 2, 1, 128)]
    elif k > 4096:
        # Llama 8B's seven tiles of 2048 and Qwen2.5-0.5B's three: with three on their way; Llama 1B's four: with two
        odd = -(-k // 2048) % 2
        order = [Tile(2, 2048, 8, 3) if odd else Tile(2, 2048, 8, 2, 64), Tile(4, 1024, 4, 2)]
    elif n >= 16384:
        order = [Tile(4, 256, 1, 2, 128), Tile(2, 512, 1, 2, 128)]
    elif normed:
        order = [Tile(2, 1024, 2, 1, 80), Tile(4, 1024, 4, 2, 80)]
    else:
        order = [Tile(4, 1024, 4, 2), Tile(4, 512, 4, 2)]
    width = max(128, 1 << (k - 1).bit_length())
    tiles = []
    for t in order:
        bk = min(t.bk, width)
        tiles.append(replace(t, bk=bk, warps=max(1, t.warps * bk // t.bk), depth=min(t.depth, -(-k // bk)),
                             registers=None if heavy or bk < t.bk else t.registers))  # fmt: skip
    return tuple(dict.fromkeys(tiles))
