"""Triton texts of the depthwise convolution: Toeplitz matrices on matrix instructions, and direct with register blocking.

Row-Toeplitz (contiguous NCHW, stride 1). For one channel and one kernel row i the rows of the result are a product

    y[rows, w0 : w0 + TW] += x[rows + i, s0 : s0 + KD] @ T_i       T_i[a, b] = taps[i, (s0 + a) − (w0 + b) + padding]

with rows = all (image, line) pairs: K small matrix products per tile, most of whose columns are real work where TW is not
small against K. What bounds it is not the products but how often x and T come from the L2 cache, hence groups of lines
(see ``toeplitz``). T_i is constant along its diagonals, so its rows are windows of one reversed, zero-padded row R of taps;
``pack`` stores R in eight copies, shifted by 0 … 7 elements, so that every run of eight elements of every T_i is one
aligned 16-byte load. What lies in a window or a group of lines but outside of the kernel is multiplied by zero, hence an
infinity or NaN in x makes NaN of results next to those that the kernel touches: of a window's P pixels (streamed), of whole
tiles' lines, and with groups of two to four lines of up to three lines above and below.

Streamed (the same inputs, kernels of few lines). T_i has only as many diagonals as the kernel has columns, so wide tiles are
mostly zeros: with windows of P = 8 pixels a kernel of 9 columns needs K = 16, one of 25 K = 32. A program owns BM windows
of one channel and walks down the image: each line, loaded once, is multiplied by all T_i, and line i of the kernel adds to
what line i − 1 had summed up one line of the image before, so that the sums of the lines in progress pass from name to name
(no instruction) and the last one is a finished line of the result. The matrices are so narrow that Triton takes `mma.sync`,
which issues back to back, for them; `wgmma`, which large tiles get, is waited for after each product outside of a loop.

Direct (channels-last, any stride and dilation). A program owns BR strips of a line for a block of channels; a pixel of
the input is loaded once per strip and kernel row, and used for all taps that meet it. ``direct_weight`` is the same for
the gradient of few taps (an infinity in dy meets zeros around x there: taps that never touch its pixel become NaN).

Source: T. Y. Ding et al., RepLKNet (arXiv 2203.06717) for why; the Toeplitz form is that of implicit-GEMM depthwise
kernels (MegEngine's cutlass fork), here by rows; sizes as measured on an H200 (NOTES.md).
"""

from __future__ import annotations

from ...ops.layout import out_sizes

ACTIVATIONS = ("", "relu", "gelu", "gelu_tanh", "silu")

ACTIVATE = '''
import triton
import triton.language as tl


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        x = tl.where(x < 0, 0.0, x)
    elif ACTIVATION == "gelu_erf":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu":  # Abramowitz and Stegun 7.1.26: a third of erf's instructions, enough for 11 bits
        t = tl.abs(x) * 0.23164189 + 1.0
        t = tl.rsqrt(t * t)
        p = (((0.5307027145 * t - 0.7265760135) * t + 0.7107068705) * t - 0.142248368) * t + 0.127414796
        p = p * t * tl.exp2(x * x * -0.7213475204444817)
        x = x * tl.where(x < 0, p, 1.0 - p)
    elif ACTIVATION == "gelu_tanh":
        x = x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    elif ACTIVATION == "silu":
        x = x / (1.0 + tl.exp(-x))
    return x
'''

TURN = '''
import triton
import triton.language as tl


@triton.jit
def turn(x, y, A: tl.constexpr, B: tl.constexpr, FROM: tl.constexpr, TO: tl.constexpr, WIDE: tl.constexpr, TA: tl.constexpr,
         TB: tl.constexpr):
    """y[n, b, a] = x[n, a, b]: channels-last to contiguous and back.

    FROM: lines of FROM pixels in a become WIDE wide, with zeros behind them. TO: of lines WIDE wide in b, TO pixels are kept.
    """
    across: tl.constexpr = (B + TB - 1) // TB
    tiles: tl.constexpr = (A + TA - 1) // TA * across
    pid = tl.program_id(0) % tiles
    n = (tl.program_id(0) // tiles).to(tl.int64)
    a = pid // across * TA + tl.arange(0, TA)
    b = pid % across * TB + tl.arange(0, TB)
    read, written, given, kept = a, b, a < A, b < B
    if FROM:
        read, given = a // WIDE * FROM + a % WIDE, given & (a % WIDE < FROM)
    if TO:
        written, kept = b // WIDE * TO + b % WIDE, kept & (b % WIDE < TO)
    rows: tl.constexpr = A // WIDE * FROM if FROM else A
    columns: tl.constexpr = B // WIDE * TO if TO else B
    found = tl.load(x + n * (rows * B) + read[:, None] * B + b[None, :], mask=given[:, None] & (b < B)[None, :], other=0.0)
    place = y + n * (A * columns) + written[:, None] * A + a[None, :]
    tl.store(place, tl.trans(found), mask=kept[:, None] & (a < A)[None, :])
'''

WIDEN = '''
import triton
import triton.language as tl


@triton.jit
def widen(x, y, lines, W: tl.constexpr, WIDE: tl.constexpr, BL: tl.constexpr, BW: tl.constexpr):
    """Lines of W pixels become WIDE wide, with zeros behind them: asynchronous copies and wide loads want aligned lines."""
    line = tl.program_id(0).to(tl.int64) * BL + tl.arange(0, BL)[:, None]
    j = tl.arange(0, BW)[None, :]
    found = tl.load(x + line * W + j, mask=(line < lines) & (j < W), other=0.0)
    tl.store(y + line * WIDE + j, found, mask=(line < lines) & (j < WIDE))
'''

PACK = '''
import triton
import triton.language as tl


@triton.jit
def pack(taps, packed, KH: tl.constexpr, KW: tl.constexpr, C: tl.constexpr, DW: tl.constexpr, FIRST: tl.constexpr,
         L: tl.constexpr, LEAD: tl.constexpr, LINES: tl.constexpr, BC: tl.constexpr):
    """packed[c, i, m, u] = R[u + m], R[v] = taps[i − LEAD, (FIRST − v) / DW, c] where that is a tap, else 0."""
    place = tl.program_id(0) % LINES
    c = tl.program_id(0) // LINES * BC + tl.arange(0, BC)[:, None]
    at = tl.arange(0, 8 * L)[None, :]
    step = FIRST - at % L - at // L
    i, j = place - LEAD, step // DW
    ok = (c < C) & (step >= 0) & (step % DW == 0) & (j < KW) & (i >= 0) & (i < KH)
    w = tl.load(taps + (i * KW + j) * C + c, mask=ok, other=0.0)
    tl.store(packed + (c.to(tl.int64) * LINES + place) * (8 * L) + at, w.to(packed.dtype.element_ty), mask=c < C)
'''

_ROWS = '''

@triton.jit
def conv(x, packed, bias, y, rows, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr,
         G: tl.constexpr, DH: tl.constexpr, PH: tl.constexpr, PA: tl.constexpr, L: tl.constexpr, LINES: tl.constexpr,
         TILES: tl.constexpr, TW: tl.constexpr, KD: tl.constexpr, BM: tl.constexpr, STAGES: tl.constexpr,
         BIAS: tl.constexpr, ACTIVATION: tl.constexpr):
    c = tl.program_id(0) % C
    pid = tl.num_programs(0) // C - 1 - tl.program_id(0) // C  # the last images were written last and may be in the cache
    tile = pid % TILES
    row = pid // TILES * BM + tl.arange(0, BM)
    live = row < rows
    n = (row // G).to(tl.int64)
    group = row % G
    h = group // DH * (GROUP * DH) + group % DH
    a = tl.arange(0, KD)
    b = tl.arange(0, TW)
    column = tile * TW - PA + a
    inside = (column >= 0) & (column < W)
    top = h - PH
    pixels = x + (n * (C * H * W) + c * (H * W) + top * W)[:, None] + column[None, :]
    q = KD - 1 - a
    diagonals = packed + c.to(tl.int64) * (LINES * 8 * L) + (q % 8 * L + q // 8 * 8)[:, None] + b[None, :]
    out = tile * TW + b
    place = y + (n * (C * OH * OW) + c * (OH * OW) + h * OW)[:, None] + out[None, :]
'''


def toeplitz(kernel: int, group: int, held: bool = False) -> str:
    """Text of ``conv``, row-Toeplitz: one channel, BM × ``group`` lines of the result, TW columns.

    ``group`` lines that lie DH apart belong to one row of the tiles, so that a line of the input, loaded once, is
    multiplied by T of as many lines of the kernel. Asynchronous copies feed the loop over the kernel's lines, STAGES of
    them ahead; T has ``group`` − 1 lines of zeros before and behind. ``held``: the matrix units get x from registers instead
    of shared memory, whose bandwidth bounds products of 64 columns. Triton decides that from what made an operand: an
    instruction that it cannot look into (not for the interpreter, either) keeps x out of shared memory.
    """
    rows = range(group)
    deep = " " * 8
    lines = [ACTIVATE, _ROWS.replace("GROUP", str(group))]
    lines += [f"    t{r} = tl.full((BM, TW), 0.0, tl.float32)" for r in rows]
    lines.append(f"    for i in tl.range(0, {kernel + group - 1}, {group}, num_stages=STAGES):")
    for s in rows:
        line = f"(top + (i + {s}) * DH >= 0) & (top + (i + {s}) * DH < H)"
        mask = f"(live & {line})[:, None] & inside[None, :]"
        lines.append(f"{deep}x{s} = tl.load(pixels + (i + {s}) * (DH * W), mask={mask}, other=0.0)")
    lines += [f"{deep}w{d} = tl.load(diagonals + (i + {d}) * (8 * L))" for d in range(2 * group - 1)]
    for s in rows:
        if held:
            asm = f"'mov.b32 $0, $1;', '=r,r', [x{s}], dtype=x{s}.dtype, is_pure=True, pack=2"
            lines.append(f"{deep}x{s} = tl.inline_asm_elementwise({asm})")
        lines += [f"{deep}t{r} = tl.dot(x{s}, w{s - r + group - 1}, t{r}, input_precision='ieee')" for r in rows]
    for r in rows:
        lines += ["    if BIAS:", f"        t{r} += tl.load(bias + c).to(tl.float32)",
                  f"    tl.store(place + {r} * (DH * OW), activate(t{r}, ACTIVATION).to(y.dtype.element_ty), "
                  f"mask=(live & (h + {r} * DH < OH))[:, None] & (out < OW)[None, :])"]  # fmt: skip
    return "\n".join(lines) + "\n"


_WINDOWS = '''

@triton.jit
def conv(x, packed, bias, y, columns, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr,
         DH: tl.constexpr, PH: tl.constexpr, PA: tl.constexpr, L: tl.constexpr, LINES: tl.constexpr, TILES: tl.constexpr,
         P: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr, BIAS: tl.constexpr,
         ACTIVATION: tl.constexpr):
    c = tl.program_id(0) % C
    pid = tl.num_programs(0) // C - 1 - tl.program_id(0) // C  # the last images were written last and may be in the cache
    shift = pid // PARTS % DH  # lines that lie DH apart
    lines = (OH - shift + DH - 1) // DH
    each = (lines + PARTS - 1) // PARTS
    first = pid % PARTS * each
    end = tl.minimum(first + each, lines)
    window = pid // (PARTS * DH) * BM + tl.arange(0, BM)
    live = window < columns
    n = (window // TILES).to(tl.int64)
    left = window % TILES * P
    a = tl.arange(0, K)
    b = tl.arange(0, P)
    column = (left - PA)[:, None] + a[None, :]
    inside = live[:, None] & (column >= 0) & (column < W)
    pixels = x + (n * (C * H * W) + c * (H * W))[:, None] + column
    q = K - 1 - a
    diagonals = packed + c.to(tl.int64) * (LINES * 8 * L) + (q % 8 * L + q // 8 * 8)[:, None] + b[None, :]
    out = left[:, None] + b[None, :]
    place = y + (n * (C * OH * OW) + c * (OH * OW))[:, None] + out
    kept = live[:, None] & (out < OW)
    offset = 0.0
    if BIAS:
        offset = tl.load(bias + c).to(tl.float32)
'''


def streamed(kernel: int, unroll: int) -> str:
    """Text of ``conv``, streamed: one channel, BM windows of P pixels, ``unroll`` lines of the image at a step.

    ``columns`` windows of all images, TILES to a line; a window begins PA pixels before its results and is K wide. An image's
    lines are shared out to PARTS programs, each of which reads kernel − 1 lines more than it writes.
    """
    deep, steps = " " * 8, range(unroll)
    lines = [ACTIVATE, _WINDOWS]
    lines += [f"    w{i} = tl.load(diagonals + {i} * (8 * L))" for i in range(kernel)]
    lines += [f"    t{i} = tl.full((BM, P), 0.0, tl.float32)" for i in range(kernel - 1)]
    lines.append(f"    for u in tl.range(first, end + {kernel - 1}, {unroll}, num_stages=STAGES):")
    for s in steps:
        lines.append(f"{deep}line{s} = (u + {s}) * DH + shift - PH")
        mask = f"inside & (line{s} >= 0) & (line{s} < H)"
        lines.append(f"{deep}x{s} = tl.load(pixels + line{s} * W, mask={mask}, other=0.0)")
    for s in steps:
        for i in reversed(range(kernel)):  # the last line of the kernel first: t{i} is used before it is replaced
            name, before = f"done{s}" if i == kernel - 1 else f"t{i}", f"t{i - 1}" if i else "tl.full((BM, P), 0.0, tl.float32)"
            lines.append(f"{deep}{name} = tl.dot(x{s}, w{i}, {before}, input_precision='ieee')")
    for s in steps:
        lines.append(f"{deep}h{s} = u + {s - kernel + 1}")
        lines.append(f"{deep}done{s} = activate(done{s} + offset, ACTIVATION).to(y.dtype.element_ty)")
        mask = f"kept & (h{s} >= first) & (h{s} < end)"
        lines.append(f"{deep}tl.store(place + (h{s} * DH + shift) * OW, done{s}, mask={mask})")
    return "\n".join(lines) + "\n"


SUM = '''
import triton
import triton.language as tl


@triton.jit
def _sum(a, b):
    return a + b
'''

WEIGHT = f'''{SUM}

@triton.jit
def weight(x, grad, out, rows, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr,
           KH: tl.constexpr, KW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
           PA: tl.constexpr, TILES: tl.constexpr, TW: tl.constexpr, KD: tl.constexpr, KP: tl.constexpr,
           BM: tl.constexpr, PARTS: tl.constexpr):
    """out[part, i, :, c]: sums along the diagonals of Σ grad[rows, w0 : w0 + TW]ᵀ @ x[rows + i, s0 : s0 + KD]."""
    i = tl.program_id(0) % KH
    part = tl.program_id(0) // KH % PARTS
    c = (tl.program_id(0) // (KH * PARTS)).to(tl.int64)
    a = tl.arange(0, KD)
    b = tl.arange(0, TW)
    total = tl.full((TW, KD), 0.0, tl.float32)
    steps = (rows + BM - 1) // BM * TILES
    for step in range(part, steps, PARTS):
        tile = step % TILES
        row = step // TILES * BM + tl.arange(0, BM)
        live = row < rows
        n = (row // OH).to(tl.int64)
        h = row % OH
        right = tile * TW + b
        given = tl.load(grad + (n * (C * OH * OW) + c * (OH * OW) + h * OW)[:, None] + right[None, :],
                        mask=live[:, None] & (right < OW)[None, :], other=0.0)
        line = h - PH + i * DH
        column = tile * TW - PA + a
        inside = (live & (line >= 0) & (line < H))[:, None] & ((column >= 0) & (column < W))[None, :]
        pixels = tl.load(x + (n * (C * H * W) + c * (H * W) + line * W)[:, None] + column[None, :], mask=inside, other=0.0)
        total = tl.dot(tl.trans(given), pixels, total, input_precision="ieee")
    j = tl.arange(0, KP)
    at = b[:, None] + (j * DW)[None, :] + (PA - PW)
    ok = (at >= 0) & (at < KD)
    diagonal = tl.where(ok, tl.gather(total, tl.where(ok, at, 0), 1), 0.0)
    found = tl.reduce(diagonal, 0, _sum)
    tl.store(out + ((part * KH + i) * KW + j) * C + c, found, mask=j < KW)
'''


def direct(
    channels: int, height: int, width: int, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int],
    dilation: tuple[int, int], strip: int, block: int, times: int = 1
) -> str:  # fmt: skip
    """Text of ``conv(x, taps, bias, y, strips, BR, BIAS, ACTIVATION)`` with everything else as literals.

    ``channels`` are the result's; ``times`` of them in a row read one channel of the input.
    A strip is ``strip`` pixels of a line; ``strips`` counts those of all images. ``block`` is the number of channels per
    program (a power of two). Only the loop over the kernel's rows stays a loop: unrolled whole, a 7×7 kernel takes ten
    times as long to compile and is no faster.
    """
    kh, kw = kernel
    out = out_sizes((height, width), kernel, stride, padding, dilation)
    across = -(-out[1] // strip)
    blocks = -(-channels // block)
    whole, pixel = channels % block == 0, channels // times
    read = "c" if times == 1 else f"(c // {times})"
    lane = "" if whole else " & lane[None, :]"
    given = "" if whole else ", mask=lane, other=0.0"
    offsets = sorted({o * stride[1] + j * dilation[1] for o in range(strip) for j in range(kw)})
    last = (across - 1) * strip * stride[1] - padding[1]
    lines = [
        ACTIVATE,
        "",
        "@triton.jit",
        "def conv(x, taps, bias, y, strips, BR: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr):",
        "    pid = tl.program_id(0)",
        f"    c = pid % {blocks} * {block} + tl.arange(0, {block})",
        f"    lane = c < {channels}",
        f"    strip = pid // {blocks} * BR + tl.arange(0, BR)",
        "    live = strip < strips",
        f"    p = strip % {out[0]}",  # strips above each other in one program: their lines meet in the L1 cache
        f"    q = strip // {out[0]} % {across}",
        f"    n = (strip // {out[0] * across}).to(tl.int64)",
        f"    top = p * {stride[0]} - {padding[0]}",
        f"    left = q * {strip * stride[1]} - {padding[1]}",
        f"    corner = x + (n * {height * width * pixel} + (top * {width} + left) * {pixel})[:, None] + {read}[None, :]",
        "    weights = taps + c",
    ]
    lines += [f"    t{o} = tl.full((BR, {block}), 0.0, tl.float32)" for o in range(strip)]
    lines.append(f"    for i in range({kh}):")
    lines.append(f"        line = top + i * {dilation[0]}")
    lines.append(f"        inside = live & (line >= 0) & (line < {height})")
    lines.append(f"        pixels = corner + i * {dilation[0] * width * pixel}")
    for k in offsets:
        test = _inside("left", k, padding[1], last, width)
        lines.append(f"        x{k} = tl.load(pixels + {k * pixel}, mask=(inside{test})[:, None]{lane}, other=0.0)")
    for j in range(kw):
        lines.append(f"        w = tl.load(weights + i * {kw * channels} + {j * channels}{given}).to(tl.float32)[None, :]")
        lines += [f"        t{o} += x{o * stride[1] + j * dilation[1]}.to(tl.float32) * w" for o in range(strip)]
    lines += ["    if BIAS:", f"        offset = tl.load(bias + c{given}).to(tl.float32)[None, :]"]
    lines += [f"        t{o} += offset" for o in range(strip)]
    place = f"n * {out[0] * out[1] * channels} + (p * {out[1]} + q * {strip}) * {channels}"
    lines.append(f"    place = y + ({place})[:, None] + c[None, :]")
    for o in range(strip):
        tail = f" & (q * {strip} + {o} < {out[1]})" if o + (across - 1) * strip >= out[1] else ""
        value = f"activate(t{o}, ACTIVATION).to(y.dtype.element_ty)"
        lines.append(f"    tl.store(place + {o * channels}, {value}, mask=(live{tail})[:, None]{lane})")
    return "\n".join(lines) + "\n"


def direct_weight(
    channels: int, height: int, width: int, kernel: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int],
    strip: int, block: int
) -> str:  # fmt: skip
    """Text of ``weight(x, grad, out, strips, BR, PARTS)``: the gradient of the taps, channels-last, stride 1.

    out[part, i, j, c] sums grad · x over one of PARTS runs of strips (``strip`` pixels of a line of grad, numbered along
    lines and down the images). BR strips at a time: a pixel of grad is loaded once, one of x once for each line of the
    kernel, and all products of a channel stay in the registers of one thread, hence few taps only.
    """
    kh, kw = kernel
    out = out_sizes((height, width), kernel, (1, 1), padding, dilation)
    across, blocks = -(-out[1] // strip), -(-channels // block)
    whole = channels % block == 0
    lane = "" if whole else " & lane[None, :]"
    offsets = sorted({o + j * dilation[1] for o in range(strip) for j in range(kw)})
    last = (across - 1) * strip - padding[1]
    places = [(i, j) for i in range(kh) for j in range(kw)]
    lines = [
        SUM,
        "",
        "@triton.jit",
        "def weight(x, grad, out, strips, BR: tl.constexpr, PARTS: tl.constexpr):",
        "    pid = tl.program_id(0)",
        f"    c = pid % {blocks} * {block} + tl.arange(0, {block})",
        f"    lane = c < {channels}",
        f"    part = pid // {blocks}",
        "    each = (strips + PARTS * BR - 1) // (PARTS * BR) * BR",
        "    end = tl.minimum(part * each + each, strips)",
        *[f"    s{i}_{j} = tl.full((BR, {block}), 0.0, tl.float32)" for i, j in places],
        "    for first in range(part * each, end, BR):",
        "        strip = first + tl.arange(0, BR)",
        "        live = strip < end",
        f"        q = strip % {across}",
        f"        p = strip // {across} % {out[0]}",
        f"        n = (strip // {out[0] * across}).to(tl.int64)",
        f"        left = q * {strip} - {padding[1]}",
        f"        given = grad + (n * {out[0] * out[1] * channels} + (p * {out[1]} + q * {strip}) * {channels})[:, None]"
        " + c[None, :]",
        f"        corner = x + (n * {height * width * channels} + ((p - {padding[0]}) * {width} + left) * {channels})[:, None]"
        " + c[None, :]",
    ]
    for o in range(strip):
        tail = f" & (q * {strip} + {o} < {out[1]})" if o + (across - 1) * strip >= out[1] else ""
        mask = f"mask=(live{tail})[:, None]{lane}, other=0.0"
        lines.append(f"        g{o} = tl.load(given + {o * channels}, {mask}).to(tl.float32)")
    for i in range(kh):
        down = i * dilation[0] - padding[0]
        lines.append(f"        inside = live & (p + {down} >= 0) & (p + {down} < {height})")
        for k in offsets:
            test = _inside("left", k, padding[1], last, width)
            at = (i * dilation[0] * width + k) * channels
            mask = f"mask=(inside{test})[:, None]{lane}, other=0.0"
            lines.append(f"        x{k} = tl.load(corner + {at}, {mask}).to(tl.float32)")
        for j in range(kw):
            lines += [f"        s{i}_{j} += g{o} * x{o + j * dilation[1]}" for o in range(strip)]
    mask = "" if whole else ", mask=lane"
    for at, (i, j) in enumerate(places):
        lines.append(f"    tl.store(out + (part * {kh * kw} + {at}) * {channels} + c, tl.reduce(s{i}_{j}, 0, _sum){mask})")
    return "\n".join(lines) + "\n"


def _inside(name: str, offset: int, padding: int, last: int, size: int) -> str:
    """Tests that ``name + offset`` lies in the image, without those that always hold; starts with " & "."""
    test = f" & ({name} + {offset} >= 0)" if offset < padding else ""
    return test + (f" & ({name} + {offset} < {size})" if last + offset >= size else "")
