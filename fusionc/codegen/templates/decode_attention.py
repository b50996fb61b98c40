"""Attention of one query per sequence over a key/value cache, the new key and value written into it on the way.

A program handles the G query heads of one key/value head and one range of the cache (split-KV, as Flash-Decoding): K and
V are read once for all G heads.  The last program of a head to finish combines the ranges in their order, so results do
not depend on which one that is.  Query and new key are rotated (RoPE) in every program, which is a few hundred
operations; the new row is not read back from memory but put in its place in registers, and one program writes it.

A range is one step where that gives enough programs.  Of longer ranges, steps that the mask hides entirely are left out:
with -inf always, with a large negative number (PyTorch's stand-in) only if the new row is visible, for else the softmax of
these numbers counts.  With PDL the first step of each range of a cache is read before the kernel in front has finished.

Source: Flash-Decoding (Dao et al. 2023); semaphore as in split-K; rotation as in Llama, with its roundings.
"""

from __future__ import annotations

TEXT = '''
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _rotated(x, y, d, cos, sin, D: tl.constexpr):
    """``y`` is x with its halves exchanged."""
    turned = tl.where(d < D // 2, -y.to(tl.float32), y.to(tl.float32))
    a = (x.to(tl.float32) * cos.to(tl.float32)).to(x.dtype)
    b = (turned * sin.to(tl.float32)).to(x.dtype)
    return (a.to(tl.float32) + b.to(tl.float32)).to(x.dtype)


@triton.jit
def _rows(at_k, at_v, n, n_ok, KS: tl.constexpr, VS: tl.constexpr):
    kt = tl.load(at_k + n[None, :] * KS, mask=n_ok[None, :], other=0.0)
    vt = tl.load(at_v + n[:, None] * VS, mask=n_ok[:, None], other=0.0)
    return kt, vt


@triton.jit
def _step(qv, kt, vt, n, p, k_new, v_new, bias, n_ok, top, total, acc, SCALE: tl.constexpr, UPDATE: tl.constexpr):
    if UPDATE:
        kt = tl.where((n == p)[None, :], k_new, kt)
        vt = tl.where((n == p)[:, None], v_new, vt)
    score = tl.where(n_ok[None, :], tl.dot(qv, kt) * SCALE + bias, float("-inf"))
    higher = tl.maximum(top, tl.max(score, 1))
    base = tl.where(higher == float("-inf"), 0.0, higher)
    w = tl.exp(score - base[:, None])
    shrink = tl.exp(top - base)
    total = total * shrink + tl.sum(w, 1)
    acc = acc * shrink[:, None] + tl.dot(w.to(vt.dtype), vt)
    return higher, total, acc


@triton.jit
def _bias(at, ok, BS: tl.constexpr, MASK: tl.constexpr):
    bias = tl.full([16, BS], 0.0, tl.float32)
    if MASK == 1:
        bias = tl.where(tl.load(at, mask=ok, other=0).to(tl.int32) != 0, 0.0, float("-inf"))
    elif MASK == 2:
        bias = tl.load(at, mask=ok, other=float("-inf")).to(tl.float32)
    return bias


@triton.jit
def decode(q, kn, vn, cos, sin, kc, vc, pos, mask, out, part, counters,
           H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, S: tl.constexpr, SCALE: tl.constexpr,
           UPDATE: tl.constexpr, ROPE: tl.constexpr, MASK: tl.constexpr,
           QB: tl.constexpr, QH: tl.constexpr, KNB: tl.constexpr, KNH: tl.constexpr, VNB: tl.constexpr,
           VNH: tl.constexpr, CB: tl.constexpr, KB: tl.constexpr, KH: tl.constexpr, KS: tl.constexpr,
           VB: tl.constexpr, VH: tl.constexpr, VS: tl.constexpr, MB: tl.constexpr, MH: tl.constexpr,
           MS: tl.constexpr, WIDE: tl.constexpr, PDL: tl.constexpr, SPLITS: tl.constexpr,
           ROWS: tl.constexpr, BS: tl.constexpr):
    DT: tl.constexpr = out.dtype.element_ty
    G: tl.constexpr = H // HKV
    split = tl.program_id(0) % SPLITS
    head = tl.program_id(0) // SPLITS
    b = head // HKV
    hk = head % HKV
    if WIDE:
        b = b.to(tl.int64)
        hk = hk.to(tl.int64)
    d = tl.arange(0, D)
    g = tl.arange(0, 16)
    rows = tl.arange(0, BS)
    if WIDE:
        rows = rows.to(tl.int64)
    n = split * ROWS + rows
    n_ok = n < S
    at_k = kc + b * KB + hk * KH + d[:, None]
    at_v = vc + b * VB + hk * VH + d[None, :]
    EARLY: tl.constexpr = PDL and UPDATE
    if EARLY:  # nobody in front writes the cache, and the row that this kernel writes is replaced below
        k_first, v_first = _rows(at_k, at_v, n, n_ok, KS, VS)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    g_ok = (g < G)[:, None]
    half = (d + D // 2) % D
    # all that is read, before anything is done with it: loads are not moved across barriers, and would wait one by one
    if ROPE:
        c = tl.load(cos + b * CB + d[None, :])
        s = tl.load(sin + b * CB + d[None, :])
    qv = tl.load(q + b * QB + ((hk * G + g) * QH)[:, None] + d[None, :], mask=g_ok, other=0.0)
    if ROPE:
        q_half = tl.load(q + b * QB + ((hk * G + g) * QH)[:, None] + half[None, :], mask=g_ok, other=0.0)
    # a column is laid out like the keys, for nothing, if it has fewer elements than there are threads; a longer one would
    # have all keys moved to its own layout, through shared memory: a vector is moved itself
    FLAT: tl.constexpr = D >= 128
    d_k = d[:, None]
    d_v = d[None, :]
    half_k = half[:, None]
    if FLAT:
        d_k = d
        d_v = d
        half_k = half
    p = 0
    k_new = 0
    v_new = 0
    if UPDATE:
        p = tl.load(pos)
        k_new = tl.load(kn + b * KNB + hk * KNH + d_k)
        v_new = tl.load(vn + b * VNB + hk * VNH + d_v)
        if ROPE:
            k_half = tl.load(kn + b * KNB + hk * KNH + half_k)
            c_k = tl.load(cos + b * CB + d_k)
            s_k = tl.load(sin + b * CB + d_k)
    at_mask = mask + b * MB + ((hk * G + g) * MH)[:, None]
    if ROWS == BS:
        bias = _bias(at_mask + n[None, :] * MS, g_ok & n_ok[None, :], BS, MASK)
        if EARLY:
            kt, vt = k_first, v_first
        else:
            kt, vt = _rows(at_k, at_v, n, n_ok, KS, VS)
    if ROPE:
        qv = _rotated(qv, q_half, d[None, :], c, s, D)
    inside = (p >= 0) & (p < S)
    if UPDATE and ROPE:
        k_new = _rotated(k_new, k_half, d_k, c_k, s_k, D)
    k_row = k_new
    v_row = v_new
    if UPDATE and FLAT:
        k_row = k_new[:, None]
        v_row = v_new[None, :]
    top = tl.full([16], float("-inf"), tl.float32)
    total = tl.full([16], 0.0, tl.float32)
    acc = tl.full([16, D], 0.0, tl.float32)
    if ROWS == BS:
        top, total, acc = _step(qv, kt, vt, n, p, k_row, v_row, bias, n_ok, top, total, acc, SCALE, UPDATE)
    else:
        for start in range(split * ROWS, tl.minimum(split * ROWS + ROWS, S), BS):
            n = start + rows
            n_ok = n < S
            bias = _bias(at_mask + n[None, :] * MS, g_ok & n_ok[None, :], BS, MASK)
            read = True
            if MASK != 0:
                highest = tl.max(tl.max(bias, 1), 0)
                read = highest > -60000.0
                if MASK == 2:
                    if (highest <= -60000.0) & (highest > float("-inf")):
                        read = True
                        if UPDATE:
                            at_p = tl.load(mask + b * MB + (hk * G + g) * MH + p * MS, mask=(g < G) & inside, other=-60000.0)
                            at_p = tl.where(g < G, at_p.to(tl.float32), 0.0)
                            read = tl.min(at_p, 0) <= -60000.0
            if read:
                if EARLY:
                    if start == split * ROWS:
                        kt, vt = k_first, v_first
                    else:
                        kt, vt = _rows(at_k, at_v, n, n_ok, KS, VS)
                else:
                    kt, vt = _rows(at_k, at_v, n, n_ok, KS, VS)
                top, total, acc = _step(qv, kt, vt, n, p, k_row, v_row, bias, n_ok, top, total, acc, SCALE, UPDATE)
    if UPDATE:
        if split == 0:  # (nobody reads the row from the cache)
            tl.store(kc + b * KB + hk * KH + p * KS + d_k, k_new, mask=(d_k < D) & inside)
            tl.store(vc + b * VB + hk * VH + p * VS + d_v, v_new, mask=(d_v < D) & inside)
    to = out + (b * H + hk * G + g)[:, None] * D + d[None, :]
    if SPLITS == 1:
        tl.store(to, (acc / tl.where(total > 0, total, 1.0)[:, None]).to(DT), mask=g_ok)
    else:
        # of each range: 16 x D sums, 16 maxima, 16 totals
        here = part + (head * SPLITS + split) * (16 * D + 32)
        cell = g[:, None] * D + d[None, :]
        tl.store(here + cell, acc, mask=g_ok, cache_modifier=".cg")
        tl.store(here + 16 * D + g, top, cache_modifier=".cg")
        tl.store(here + 16 * D + 16 + g, total, cache_modifier=".cg")
        tl.debug_barrier()  # all threads have stored before one of them counts
        if tl.atomic_add(counters + head, 1, sem="acq_rel") == SPLITS - 1:
            tl.store(counters + head, 0)
            whole = part + head * SPLITS * (16 * D + 32)
            most = tl.full([16, 1], float("-inf"), tl.float32)
            sum_ = tl.full([16, 1], 0.0, tl.float32)
            mean = tl.full([16, D], 0.0, tl.float32)
            for i in tl.static_range(SPLITS):  # columns and no vectors: so loads wait neither for each other nor for barriers
                at = whole + i * (16 * D + 32)
                its_top = tl.load(at + 16 * D + g[:, None], cache_modifier=".cg")
                its_total = tl.load(at + 16 * D + 16 + g[:, None], cache_modifier=".cg")
                its_acc = tl.load(at + cell, mask=g_ok, other=0.0, cache_modifier=".cg")
                higher = tl.maximum(most, its_top)
                base = tl.where(higher == float("-inf"), 0.0, higher)
                shrink = tl.exp(most - base)
                share = tl.exp(its_top - base)
                sum_ = sum_ * shrink + its_total * share
                mean = mean * shrink + its_acc * share
                most = higher
            tl.store(to, (mean / tl.where(sum_ > 0, sum_, 1.0)).to(DT), mask=g_ok)
'''


def ranges(heads: int, length: int, width: int, processors: int) -> tuple[int, int, int]:
    """(number of ranges, rows of each, rows of a step) for ``heads`` key/value heads of ``width`` and a cache of ``length``.

    H200, Llama 1B (8 heads of 64, 1024 rows), whole decode step: 16 ranges of a step of 64 rows in a loop 0.820 ms, without the
    loop 0.801; 8 ranges of a step of 128 rows 0.790. Such a step's keys and values take up half of a thread's registers.
    """
    once, again = (128, 64) if width <= 64 else (64, 64) if width <= 128 else (64, 32)
    for step in (once, again):  # in a loop steps take turns in the registers, so they are smaller there
        blocks = -(-length // step)
        count = max(1, min(blocks, 4 * processors // max(heads, 1), 32))  # a few programs a processor hide each other's waits
        rows = -(-blocks // count) * step
        if rows == step:
            break
    return -(-length // rows), rows, step


def warps(width: int, count: int, rows: int, step: int) -> int:
    """Of a program: eight for steps of many rows and in loops that hold the first step as well, where four would spill.

    H200, whole decode steps: Llama 1B (128 rows of 64) with four warps 0.7036 and 0.7115 ms, with eight 0.6979 and 0.6893;
    Llama 8B's layers (64 rows of 128) 0.5253 and 0.5300, 3B's 0.3985 and 0.3991.
    """
    return 8 if step >= 128 or rows > step and (width > 128 or width == 128 and count > 16) else 4
