"""Kernels for y = epilogue(norm(x) Wᵀ) with one row of x, where reading W once is all the work.

`one_row` multiplies and adds in float32: each program owns BN rows of W (twice that with a gate) and walks along K.  It
computes the row statistics of x itself, which is small and lies in L2.  The rows of W may lie in up to three tensors.
Results are rounded where separate operators would round: after the norm, after the product, after the activation, after
the sum.

With PDL a program loads its first tile of W, which no kernel of the chain writes, before it waits for the kernel in
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

from dataclasses import dataclass, replace

TEXT = '''
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
def _tile(w, rows, cols, ok, K: tl.constexpr):
    return tl.load(w + rows[:, None] * K + cols[None, :], mask=ok & (cols < K)[None, :], other=0.0,
                   eviction_policy="evict_first")


@triton.jit
def _columns(x, cols, K: tl.constexpr):
    return tl.load(x + cols[None, :], mask=(cols < K)[None, :], other=0.0, eviction_policy="evict_last")


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


@triton.jit
def one_row(x, w, w1, w2, norm, bias, residual, out, next0, next1,
            N0: tl.constexpr, N1: tl.constexpr, UP: tl.constexpr,
            N: tl.constexpr, K: tl.constexpr, EPS: tl.constexpr, NORM: tl.constexpr, ACT: tl.constexpr,
            HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, WIDE: tl.constexpr, PDL: tl.constexpr,
            NEXT: tl.constexpr, OWN: tl.constexpr, STEP0: tl.constexpr, SHARE0: tl.constexpr, STEP1: tl.constexpr,
            SHARE1: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, REPEAT: tl.constexpr):
    DT: tl.constexpr = out.dtype.element_ty
    TILES: tl.constexpr = (K + BK - 1) // BK
    EARLY: tl.constexpr = 2 if TILES > 1 and REPEAT == 1 else 1  # tiles of the first rows that are read before the wait
    cols = tl.arange(0, BK)
    start = tl.program_id(0) * (BN * REPEAT)
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
    first = _tile(w, rows, cols, ok, K)
    if ACT != "":
        first_up = _tile(u, rows + UP, cols, ok, K)
    if EARLY > 1:
        second = _tile(w, rows, BK + cols, ok, K)
        if ACT != "":
            second_up = _tile(u, rows + UP, BK + cols, ok, K)
    if OWN:
        if TILES > EARLY or REPEAT > 1:
            size = tl.minimum(BN * REPEAT, N - start) * (K * 2)
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
    xv = _columns(x, cols, K)
    if EARLY > 1:
        x1 = _columns(x, BK + cols, K)
    if NORM != 0:
        scale = _columns(norm, cols, K)
        if EARLY > 1:
            scale1 = _columns(norm, BK + cols, K)
    b = _beside(bias, rows, N, HAS_BIAS)
    b_up = _beside(bias + N, rows, N, HAS_BIAS and ACT != "")
    r0 = _beside(residual, rows, N, HAS_RESIDUAL)
    if NORM != 0:
        squares = xv.to(tl.float32) * xv.to(tl.float32)
        if EARLY > 1:
            squares += x1.to(tl.float32) * x1.to(tl.float32)
        for t in range(EARLY, TILES):
            v = _columns(x, t * BK + cols, K).to(tl.float32)
            squares += v * v
        total = tl.sum(squares, 1)
        rstd = tl.rsqrt(total / K + EPS)[:, None]
        xv = _scaled(xv, rstd, scale, NORM, DT)
        if EARLY > 1:
            x1 = _scaled(x1, rstd, scale1, NORM, DT)
    for r in tl.static_range(REPEAT):
        acc = first.to(tl.float32) * xv.to(tl.float32)
        if ACT != "":
            acc_up = first_up.to(tl.float32) * xv.to(tl.float32)
        if EARLY > 1:
            acc += second.to(tl.float32) * x1.to(tl.float32)
            if ACT != "":
                acc_up += second_up.to(tl.float32) * x1.to(tl.float32)
        for t in range(EARLY, TILES):
            c = t * BK + cols
            tile = _tile(w, rows, c, ok, K)
            if ACT != "":
                tile_up = _tile(u, rows + UP, c, ok, K)
            v = _columns(x, c, K)
            if NORM != 0:
                v = _scaled(v, rstd, _columns(norm, c, K), NORM, DT)
            acc += tile.to(tl.float32) * v.to(tl.float32)
            if ACT != "":
                acc_up += tile_up.to(tl.float32) * v.to(tl.float32)
        here = rows
        y_bias, y_up_bias, y_residual = b, b_up, r0
        if r < REPEAT - 1:
            rows += BN
            ok = (rows < N)[:, None]
            first = _tile(w, rows, cols, ok, K)
            if ACT != "":
                first_up = _tile(u, rows + UP, cols, ok, K)
            b = _beside(bias, rows, N, HAS_BIAS)
            b_up = _beside(bias + N, rows, N, HAS_BIAS and ACT != "")
            r0 = _beside(residual, rows, N, HAS_RESIDUAL)
        y = tl.sum(acc, 1)
        if HAS_BIAS:
            y += y_bias
        if ACT != "":
            up = tl.sum(acc_up, 1)
            if HAS_BIAS:
                up += y_up_bias
            y = _activated(y, up, ACT, DT)
        y = y.to(DT)
        if HAS_RESIDUAL:
            y = (y.to(tl.float32) + y_residual).to(DT)
        tl.store(out + here, y, mask=here < N)
'''


@dataclass(frozen=True)
class Tile:
    """One way to cut the work: rows of W and columns a step, warps, row blocks that a program does one after another."""

    bn: int
    bk: int
    warps: int
    repeat: int = 1


def registers(tile: Tile, inner: int, gated: bool, heavy: bool) -> int | None:
    """The most of a thread: left alone it takes some more, and fewer programs fit on a multiprocessor, for a spill of 16 bytes.

    Llama 1B's q, k and v are 768 programs: six times the 132 of an H200 hold them, five do not. A third and last tile is no
    loop: all three are read at once, and a cap spills 100 to 340 bytes (Llama 3B); ``heavy`` kernels, up to 140.
    """
    if tile.repeat > 1 or heavy or -(-inner // tile.bk) == 3:
        return None
    return 128 if gated else 80


def share(size: int, programs: int, room: int) -> tuple[int, int]:
    """(step, bytes of it) of each of ``programs`` in asking for half of a weight of ``size`` bytes, at most ``room``.

    H200, Llama 1B: of the 67 MB of gate and up a quarter, half, three quarters, all: 0.769, 0.753 to 0.765, 0.767, 0.784 ms
    a decode step (0.795 to 0.804 without); with evenly spread parts of the other kernels' weights as well 0.786 and more.
    """
    step = size // programs // 256 * 256
    return step, min(step // 2, room // programs // 128 * 128)


def one_row_tiles(n: int, k: int, gated: bool) -> tuple[Tile, ...]:
    """Candidates, the default (by what was the fastest on an H200) first."""
    if k >= 8192:
        order = [Tile(1, 2048, 2, repeat=2) if n <= 2048 else Tile(2, 2048, 8, repeat=2), Tile(4, 1024, 4)]
    elif gated and k <= 2048:
        order = [Tile(4, 512, 2), Tile(4, 1024, 4)]
    else:
        order = [Tile(4, 1024, 4), Tile(4, 512, 4)]
    width = max(128, 1 << (k - 1).bit_length())
    tiles = [replace(t, bk=min(t.bk, width), warps=max(1, t.warps * min(t.bk, width) // t.bk)) for t in order]
    return tuple(dict.fromkeys(tiles))
