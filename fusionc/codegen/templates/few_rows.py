"""A kernel for y = epilogue(x W) with 2 to 128 rows of x, where reading W and starting kernels is the work; with sibling
weights also for more rows, where each sibling alone would leave processors idle.

`few_rows` multiplies on the tensor cores.  A program owns BM rows of x and BN columns of the result (twice that with a
gate), or one of SPLIT ranges of K of them: then the last program of a tile to finish adds the ranges in their order, so
results do not depend on which one that is.  W is stored by rows, in up to three tensors, or by columns (KN).

Norms stay outside: their arithmetic between loading x and multiplying it cost more than a kernel of their own (NOTES.md).

With PDL a program asks for its part of W, which no kernel of the chain writes, to be brought into L2 before it waits for
the kernel in front of it; for large weights only its first steps, lest L2 overflows.

Source: split-K with a semaphore as in CUTLASS; CUDA programming guide, "Programmatic dependent launch"; tiles measured on
an H200 (NOTES.md).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

TEXT = '''
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _activation(y, ACT: tl.constexpr):
    if ACT == "silu":
        y = y / (1.0 + tl.exp(-y))
    elif ACT == "gelu":
        y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        t = 0.7978845608028654 * (y + 0.044715 * y * y * y)
        y = 0.5 * y * (2.0 - 2.0 / (tl.exp(2.0 * t) + 1.0))
    elif ACT == "relu":
        y = tl.where(y < 0.0, 0.0, y)  # keeps NaN
    return y


@triton.jit
def _fetch(at):
    """Brings the lines into L2."""
    tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at], tl.int32, False, 1)


@triton.jit
def few_rows(x, w, w1, w2, bias, residual, out, part, counters,
             N0: tl.constexpr, N1: tl.constexpr, APART: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
             K: tl.constexpr, XS: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr, HAS_BIAS: tl.constexpr,
             HAS_RESIDUAL: tl.constexpr, KN: tl.constexpr, SPLIT: tl.constexpr, WIDE: tl.constexpr,
             PDL: tl.constexpr, FETCH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
             STAGES: tl.constexpr):
    DT: tl.constexpr = out.dtype.element_ty
    TM: tl.constexpr = (M + BM - 1) // BM
    STEPS: tl.constexpr = ((K + BK - 1) // BK + SPLIT - 1) // SPLIT
    WN: tl.constexpr = 2 * N if GATED and not APART else N
    ONCE: tl.constexpr = "evict_first" if TM <= 2 else ""  # else W is read again for the next rows
    pid = tl.program_id(0)
    pm = pid % TM
    split = (pid // TM) % SPLIT
    pn = pid // (TM * SPLIT)
    m = pm * BM + tl.arange(0, BM)
    n = pn * BN + tl.arange(0, BN)
    c = tl.arange(0, BK)
    first = split * (STEPS * BK)
    m_ok = m < M
    n_ok = n < N
    at_n = n
    if WIDE:
        at_n = n.to(tl.int64)
    at_m = m
    if M * XS >= 2147483648:  # rows far apart: the last position of each of several long sequences
        at_m = m.to(tl.int64)
    if N0 > 0:  # columns from N0 on lie in w1, from N1 on in w2; no block of columns lies in two
        if pn * BN >= N0:
            w = w1 - N0 * K
        if pn * BN >= N1:
            w = w2 - N1 * K
    if KN:
        near = (first + c).to(at_n.dtype)[:, None] * WN + at_n[None, :]
        step: tl.constexpr = BK * WN
    else:
        near = at_n[None, :] * K + (first + c)[:, None]
        step: tl.constexpr = BK
    at_w = w + near
    if APART:  # the up columns lie in a tensor of their own
        u = w1
    elif KN:
        u = w + N
    else:
        u = w + N * K
    at_u = u + near
    if PDL:
        if FETCH > 0:
            if KN:
                line = tl.minimum(pn * BN + tl.arange(0, (BN + 63) // 64) * 64, N - 1)[None, :]
                for i in range(min(STEPS, FETCH)):
                    at = tl.minimum(first + i * BK + c, K - 1).to(at_n.dtype)[:, None] * WN + line
                    _fetch(w + at)
                    if GATED:
                        _fetch(u + at)
            else:
                line = tl.arange(0, (BK + 63) // 64) * 64
                for i in range(min(STEPS, FETCH)):
                    at = tl.minimum(at_n, N - 1)[:, None] * K + tl.minimum(first + i * BK + line, K - 1)[None, :]
                    _fetch(w + at)
                    if GATED:
                        _fetch(u + at)
        gdc_wait()
        gdc_launch_dependents()
    SMALL: tl.constexpr = BM * BN <= 4096  # few registers, and nothing to wait for at the end
    HELD: tl.constexpr = HAS_RESIDUAL and SMALL
    if HAS_BIAS and SMALL:
        bias_n = tl.load(bias + n, mask=n_ok, other=0.0)
        if GATED:
            bias_up = tl.load(bias + N + n, mask=n_ok, other=0.0)
    if HELD:
        beside = tl.load(residual + m[:, None] * N + n[None, :], mask=m_ok[:, None] & n_ok[None, :], other=0.0)
    acc = tl.zeros([BM, BN], tl.float32)
    acc_up = tl.zeros([BM, BN], tl.float32)
    for i in tl.range(STEPS, num_stages=STAGES):
        k = first + i * BK + c
        if K % BK == 0 and STEPS * SPLIT * BK == K:
            a = tl.load(x + at_m[:, None] * XS + k[None, :], mask=m_ok[:, None], other=0.0, eviction_policy="evict_last")
            b = tl.load(at_w, mask=n_ok[None, :], other=0.0, eviction_policy=ONCE)
            if GATED:
                b_up = tl.load(at_u, mask=n_ok[None, :], other=0.0, eviction_policy=ONCE)
        else:
            a = tl.load(x + at_m[:, None] * XS + k[None, :], mask=m_ok[:, None] & (k < K)[None, :], other=0.0,
                        eviction_policy="evict_last")
            b = tl.load(at_w, mask=n_ok[None, :] & (k < K)[:, None], other=0.0, eviction_policy=ONCE)
            if GATED:
                b_up = tl.load(at_u, mask=n_ok[None, :] & (k < K)[:, None], other=0.0, eviction_policy=ONCE)
        acc = tl.dot(a, b, acc)
        if GATED:
            acc_up = tl.dot(a, b_up, acc_up)
        at_w += step
        at_u += step
    last = True
    if SPLIT > 1:
        cell = tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :]
        tile = pn * TM + pm
        size: tl.constexpr = BM * BN * (2 if GATED else 1)
        whole = part + tile * (SPLIT * size)
        tl.store(whole + split * size + cell, acc, cache_modifier=".cg")
        if GATED:
            tl.store(whole + split * size + BM * BN + cell, acc_up, cache_modifier=".cg")
        tl.debug_barrier()  # all threads have stored before one of them counts
        last = tl.atomic_add(counters + tile, 1, sem="acq_rel") == SPLIT - 1
        if last:
            tl.store(counters + tile, 0)
            acc = tl.load(whole + cell, cache_modifier=".cg")
            for j in tl.static_range(1, SPLIT):
                acc += tl.load(whole + j * size + cell, cache_modifier=".cg")
            if GATED:
                acc_up = tl.load(whole + BM * BN + cell, cache_modifier=".cg")
                for j in tl.static_range(1, SPLIT):
                    acc_up += tl.load(whole + j * size + BM * BN + cell, cache_modifier=".cg")
    if last:
        ok = m_ok[:, None] & n_ok[None, :]
        at = m[:, None] * N + n[None, :]
        if HAS_BIAS:
            if not SMALL:
                bias_n = tl.load(bias + n, mask=n_ok, other=0.0)
            acc += bias_n.to(tl.float32)[None, :]
            if GATED:
                if not SMALL:
                    bias_up = tl.load(bias + N + n, mask=n_ok, other=0.0)
                acc_up += bias_up.to(tl.float32)[None, :]
        y = acc.to(DT)
        if ACT != "":
            y = _activation(y.to(tl.float32), ACT).to(DT)
        if GATED:
            y = (y.to(tl.float32) * acc_up.to(DT).to(tl.float32)).to(DT)
        if HELD:
            y = (y.to(tl.float32) + beside.to(tl.float32)).to(DT)
        elif HAS_RESIDUAL:
            y = (y.to(tl.float32) + tl.load(residual + at, mask=ok, other=0.0).to(tl.float32)).to(DT)
        tl.store(out + at, y, mask=ok)
'''


@dataclass(frozen=True)
class Tile:
    """One way to cut the work: rows, columns and depth of a step, warps, steps in flight, ranges of K."""

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int
    split: int = 1


_LARGE = 16 << 20  # bytes of a weight that may not all be asked for ahead
_MANY = 1 << 22  # elements of a weight that fills the device with large tiles
_SHARED = 200 << 10  # bytes of shared memory that a program may take


def ahead(rows: int, width: int, inner: int, gated: bool) -> int:
    """Steps of each program whose part of the weight is asked for before the kernel in front has finished."""
    if rows > 128:  # it has programs enough to hide its loads
        return 0
    return 1 << 16 if width * inner * (4 if gated else 2) <= _LARGE else 2


def tiles(rows: int, width: int, inner: int, gated: bool, processors: int) -> tuple[Tile, ...]:
    """At most two candidates, the default first: fast on an H200 for such shapes, with programs for most of the device."""
    kept = rows <= 16
    if rows > 64 and width % 8 and width * inner > _MANY:  # bound by reading the weight and x: each as rarely as may be
        base, wanted, kept = [Tile(128, 128, 64, 8, 4), Tile(128, 64, 64, 4, 4)], 1.0, True
    elif rows <= 16:  # several programs a processor keep the memory busy
        base, wanted = [Tile(16, 32, 256, 4, 3), Tile(16, 16, 256, 2, 4)], 4.0 * processors
    elif rows <= 32:
        base, wanted = [Tile(32, 64, 128, 4, 4), Tile(32, 32, 128, 4, 4), Tile(32, 16, 128, 4, 4)], 1.0 * processors
    else:  # more programs than that read x too often
        base = [Tile(64, 64, 128, 4, 4), Tile(64, 32, 128, 4, 6), Tile(64, 16, 128, 4, 4), Tile(64, 32, 256, 4, 3)]
        wanted = 0.7 * processors
    found: list[tuple[float, Tile]] = []
    for t in base:
        while (t.bm + t.bn * (2 if gated else 1)) * t.bk * 2 * t.stages > _SHARED and t.stages > 2:
            t = replace(t, stages=t.stages - 1)
        t = replace(t, bk=min(t.bk, max(16, 1 << (inner - 1).bit_length())))
        count = -(-rows // t.bm) * -(-width // t.bn)
        steps = -(-inner // t.bk)
        split = 1
        while count * split < 0.75 * wanted and steps // (2 * split) >= 4 and split < 8:
            split *= 2
        found.append((0.0 if kept else abs(math.log2(count * split / wanted)), replace(t, split=split)))
    found.sort(key=lambda each: each[0])
    return tuple(dict.fromkeys(t for _, t in found))[:2]


_SHAPES = ((Tile(128, 256, 64, 8, 3), 1, 1.0), (Tile(128, 128, 64, 8, 3), 2, 0.9), (Tile(64, 128, 64, 4, 4), 2, 0.75),
           (Tile(64, 64, 64, 4, 4), 3, 0.55))  # with programs a processor, and speed where all have work


def sibling_tiles(rows: int, width: int, inner: int, block: int, processors: int) -> tuple[Tile, ...]:
    """Two candidates for many rows, the default first; sibling weights are multiples of ``block``."""

    def cost(shape: tuple[Tile, int, float]) -> float:
        t, together, speed = shape
        waves = math.ceil(-(-rows // t.bm) * -(-width // t.bn) / (processors * together))
        return waves * together * t.bm * t.bn / speed

    fitting = [shape for shape in _SHAPES if block % shape[0].bn == 0]
    depth = max(16, 1 << (inner - 1).bit_length())
    return tuple(replace(t, bk=min(t.bk, depth)) for t, _, _ in sorted(fitting, key=cost)[:2])
