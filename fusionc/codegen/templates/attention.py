'''Triton text of attention with a score expression: forward, gradients of q (and δ), of k and v, and of an operand.

The order of computation is FlashAttention-2's (Dao, arXiv 2307.08691): one program owns a tile of rows (queries, or keys for
dk and dv), walks over tiles of the other axis and keeps running maxima and sums, so that scores live in registers only.
Our own: the score expression (``ops/score.py``) is rendered into the tile; the band of pairs that can have weight is
proved from it, tiles outside of the band are not visited, and tiles inside it skip the comparisons.

The forward saves for each row, in base 2, the maximum plus the logarithm of the sum: [B, H, 2, Q], of which the second row
is used only where a finite fill may dwarf the logarithm; then the two are kept apart.

A finite fill (-1e9) makes a row without a live key uniform over what is masked. Kernels then look at the row maxima (or
the saved log-sum-exp) and visit the skipped tiles if there is such a row.
'''

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

from ...ops.score import LOG2E, K, Live, Q, S, T, Term, as_float, gradient, live, load, parse, scaled

_INFIX = {"add": "+", "sub": "-", "mul": "*", "div": "/", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==",
          "ne": "!=", "and": "&", "or": "|", "fdiv": "//", "mod": "%"}  # fmt: skip
_CALL = {
    "min": "tl.minimum({}, {}, propagate_nan=tl.PropagateNan.ALL)",
    "max": "tl.maximum({}, {}, propagate_nan=tl.PropagateNan.ALL)",
    "neg": "-{}",
    "not": "{} == 0",
    "abs": "tl.abs({})",
    "exp": "tl.exp({})",
    "log": "tl.log({})",
    "sqrt": "tl.sqrt({})",
    "float": "{}.to(tl.float32)",
    "where": "tl.where({}, {}, {})",
    "tanh": "1.0 - 2.0 / (1.0 + tl.exp2({} * 2.8853900817779268))",
    "sigmoid": "1.0 / (1.0 + tl.exp2({} * -1.4426950408889634))",
}
_PRECISION = 'input_precision="tf32x3"'  # of float32 inputs; 16-bit ones ignore it


def _number(term: Term) -> str:
    value = term.value
    if term.kind == "f" and not math.isfinite(value):
        return f'float("{value}")'
    return repr(value)


def _function(name: str, term: Term, arguments: Sequence[str]) -> list[str]:
    """A jit function that returns the expression's value; equal parts are computed once."""
    lines = ["@triton.jit", f"def {name}({', '.join(arguments)}):"]
    names: dict[Term, str] = {}

    def use(x: Term) -> str:
        found = names.get(x)
        if found is None:
            if x.op == "const":
                return _number(x)
            if not x.args:
                found = f"x{x.value}" if x.op == "load" else x.op
            else:
                parts = [use(a) for a in x.args]
                text = f"{parts[0]} {_INFIX[x.op]} {parts[1]}" if x.op in _INFIX else _CALL[x.op].format(*parts)
                found = f"v{len(lines)}"
                lines.append(f"    {found} = {text}")
            names[x] = found
        return found

    result = use(term)
    return [*lines, f"    return {result}", ""]


_COMBINE = [  # of reductions: functions of the module itself, which Triton's interpreter can run
    line
    for name, text in (("plus", "a + b"), ("most", "tl.maximum(a, b)"), ("least", "tl.minimum(a, b)"))
    for line in ("@triton.jit", f"def {name}(a, b):", f"    return {text}", "")
]


class _Text:
    """Pieces of text that depend on the operands and on the band."""

    def __init__(self, term: Term, axes: Sequence[str]):
        self.term, self.axes, self.band = term, list(axes), live(term)
        self.kinds = {int(x.value): x.kind for x in term.leaves if x.op == "load"}
        self.used = [i for i in range(len(axes)) if i in self.kinds]
        self.xs = "".join(f", x{i}" for i in self.used)
        fill = max(self.band.fill * LOG2E, -3.4e38)
        self.guarded = self.band.bounded and math.isfinite(self.band.fill)
        self.limit = fill / 2 if fill < -1e30 else max(fill + 160, fill * 0.99999)

    def functions(self) -> list[str]:
        arguments = ["s", "q", "k", *[f"x{i}" for i in self.used]]
        inside = self.band.inside
        return [
            *_function("score_edge", scaled(self.term, LOG2E), arguments),
            *_function("score_inside", scaled(inside, LOG2E), arguments),
            *_function("gradient_edge", gradient(self.term, S), ["t", *arguments]),
            *_function("gradient_inside", gradient(inside, S), ["t", *arguments]),
        ]

    def head(self, name: str, pointers: str, last: str = "") -> list[str]:
        """First lines of a kernel: pointers, then strides (three of each tensor named in lower case, and those of the
        operands along the axes they vary with), sizes, and constants."""
        operands = "".join(f", X{i}" for i in self.used)
        strides = "".join(f"s{x}b, s{x}h, s{x}n, " for x in ("g", "q", "k", "v") if x != "g" or pointers.startswith("G"))
        strides += "".join(f"x{i}{a}, " for i in self.used for a in self.axes[i])
        return ["@triton.jit", f"def {name}({pointers}{operands}, {strides}{last}", f"        {_SIZES}):"]

    def loads(self, when: str, rows: str, edge: bool = False) -> list[str]:
        """Loads of the operands that change with ``when``: "head", "row" or "step"; ``rows`` is the axis of tile rows."""
        out = []
        for i in self.used:
            axes = self.axes[i]
            inner = {"q", "k"} & set(axes)
            due = "head" if not inner else "row" if inner == {rows} else "step"
            if due != when:
                continue
            where = "".join(f" + {a} * x{i}{a}" for a in axes if a in "bh")
            masks = []
            for a, position, end, even in (("q", "qi", "QN", "EVEN_Q"), ("k", "ki", "KN", "EVEN_K")):
                if a in axes:
                    where += f" + {position}.to(tl.int64) * x{i}{a}"
                    masks.append(f"({even} | ({position} < {end}))")
            text = f"tl.load(X{i}{where}" + (f", mask={' & '.join(masks)}, other=0)" if masks else ")")
            out.append(f"x{i} = {text}" + {"f": ".to(tl.float32)", "i": "", "b": ".to(tl.int1)"}[self.kinds[i]])
        return out


def _indent(lines: Sequence[str], depth: int) -> list[str]:
    return ["    " * depth + line for line in lines]


def _ranges(band: Live, mine: str, other: str, end: str, even: str) -> list[str]:
    """low ≤ full_low ≤ … ≤ high along the other axis: tiles to visit, and those of them that lie within the band.

    ``start`` is the first row of this program's tile of ``mine`` rows; bounds are of (column - row).
    """
    lower, upper = band.lower, band.upper
    low = "0" if lower is None else f"tl.maximum(start + ({lower}), 0) // {other} * {other}"
    high = end if upper is None else f"tl.maximum(tl.minimum(start + {mine} + ({upper}), {end}), 0)"
    full_low = "low" if lower is None else f"(tl.maximum(start + {mine} - 1 + ({lower}), 0) + {other} - 1) // {other} * {other}"
    full_high = f"{end} // {other} * {other}"
    if upper is not None:
        full_high = f"tl.minimum({full_high}, tl.maximum(start + 1 + ({upper}), 0) // {other} * {other})"
    return [
        f"low = {low}",
        f"high = {high}",
        f"full_low = {full_low}",
        f"full_high = {full_high}",
        "last_low = tl.maximum(full_low, full_high)",
    ]


def _loops(text: _Text, band: Live, step: str, inside: Sequence[str], edge: Sequence[str], even: str) -> list[str]:
    """The three runs of tiles: edge, inside, edge."""
    out: list[str] = []
    if band.lower is not None:
        out += [f"for n in range(low, tl.minimum(full_low, high), {step}):", *_indent(edge, 1)]
    out += [f"for n in range(full_low, full_high, {step}):", *_indent(inside, 1)]
    tail = [f"for n in range(last_low, high, {step}):", *_indent(edge, 1)]
    if band.upper is not None or band.lower is not None:
        return out + tail
    return [*out, f"if not {even}:", *_indent(tail, 1)]


def _skipped(step: str, end: str, edge: Sequence[str]) -> list[str]:
    """The tiles that the loops left out, visited if ``need``."""
    return [
        f"done = low + (tl.maximum(high - low, 0) + {step} - 1) // {step} * {step}",
        f"for n in range(0, tl.where(need, low, 0), {step}):",
        *_indent(edge, 1),
        f"for n in range(done, tl.where(need, {end}, done), {step}):",
        *_indent(edge, 1),
    ]


_SIZES = """H, QN, KN, GROUP: tl.constexpr, D: tl.constexpr, E: tl.constexpr, DP: tl.constexpr, EP: tl.constexpr,
        EVEN_Q: tl.constexpr, EVEN_K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr"""


def _programs(size: str, tile: str) -> list[str]:
    """Programs count through the tiles of one axis, then through pairs of batch and head."""
    return [f"tiles = ({size} + {tile} - 1) // {tile}", "turn = tl.program_id(0) % tiles", "pair = tl.program_id(0) // tiles"]


def _tile(name: str, pointer: str, position: str, stride: str, columns: str, width: str, padded: str, mask: str) -> str:
    """Load of a [rows, width] tile."""
    return (
        f"{name} = tl.load({pointer} + {position}.to(tl.int64)[:, None] * {stride} + {columns}[None, :], "
        f"mask=({mask})[:, None] & (({width} == {padded}) | ({columns} < {width}))[None, :], other=0.0)"
    )


_D, _E = ("d", "D", "DP"), ("e", "E", "EP")
_ROW = "EVEN_Q | (rows < QN)"
_QUERY_START = [
    "b = (pair // H).to(tl.int64)",
    "h = (pair % H).to(tl.int64)",
    "rows = start + tl.arange(0, BM)",
    "cols = tl.arange(0, BN)",
    "d = tl.arange(0, DP)",
    "e = tl.arange(0, EP)",
    "qi = rows[:, None]",
    "K += b * skb + (h // GROUP) * skh",
    "V += b * svb + (h // GROUP) * svh",
    _tile("q", "Q + b * sqb + h * sqh", "rows", "sqn", *_D, _ROW),
]


def _query_tiles(text: _Text, kind: str) -> list[str]:
    """What all walks over keys share: tile of k, scores s, and (after them) z in units of base 2."""
    edge = kind == "edge"
    mask = "EVEN_K | (n + cols < KN)" if edge else "EVEN_K | (cols >= 0)"
    lines = [
        "ki = (n + cols)[None, :]",
        _tile("k", "K", "(n + cols)", "skn", *_D, mask),
        _tile("v", "V", "(n + cols)", "svn", *_E, mask),
        *text.loads("step", "q"),
        f"s = tl.dot(q, tl.trans(k), {_PRECISION})",
        f"z = score_{kind}(s, qi, ki{text.xs})",
    ]
    if edge:
        lines += ["if not EVEN_K:", "    z = tl.where(ki < KN, z, float('-inf'))"]
    return lines


def _forward(text: _Text) -> list[str]:
    def body(kind: str) -> list[str]:
        return [
            *_query_tiles(text, kind),
            "new = tl.maximum(m, tl.reduce(z, 1, most))",
            "base = tl.where(new == float('-inf'), 0.0, new)",
            "p = tl.exp2(z - base[:, None])",
            "shrink = tl.exp2(m - base)",
            "l = l * shrink + tl.reduce(p, 1, plus)",
            f"acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], {_PRECISION})",
            "m = new",
        ]

    edge = body("edge")
    lines = text.head("forward", "Q, K, V, OUT, LSE")
    guard = [f"need = tl.reduce(m, 0, least) < {text.limit!r}", *_skipped("BN", "KN", edge)] if text.guarded else []
    return lines + _indent(
        [
            *_programs("QN", "BM"),
            _order(text.band.upper is not None),
            *_QUERY_START,
            *text.loads("head", "q"),
            *text.loads("row", "q"),
            "m = tl.full([BM], float('-inf'), tl.float32)",
            "l = tl.full([BM], 0.0, tl.float32)",
            "acc = tl.full([BM, EP], 0.0, tl.float32)",
            *_ranges(text.band, "BM", "BN", "KN", "EVEN_K"),
            *_loops(text, text.band, "BN", body("inside"), edge, "EVEN_K"),
            *guard,
            "acc = acc / l[:, None]",
            "place = pair.to(tl.int64) * QN + rows",
            f"tl.store(LSE + place + pair.to(tl.int64) * QN, {'m' if text.guarded else 'm + tl.log2(l)'}, mask={_ROW})",
            f"tl.store(LSE + place + (pair + 1).to(tl.int64) * QN, {'tl.log2(l)' if text.guarded else '0.0 * l'}, mask={_ROW})",
            "tl.store(OUT + place[:, None] * E + e[None, :], acc.to(OUT.dtype.element_ty),",
            f"         mask=({_ROW})[:, None] & ((E == EP) | (e < E))[None, :])",
        ],
        1,
    ) + [""]


def _order(reverse: bool) -> str:
    """First row of this program's tile; rows with the most work go first."""
    return f"start = {'(tiles - 1 - turn)' if reverse else 'turn'} * BM"


def _backward_q(text: _Text) -> list[str]:
    def body(kind: str) -> list[str]:
        return [
            *_query_tiles(text, kind),
            f"p = tl.exp2(z - lse[:, None]{' - rest[:, None]' if text.guarded else ''})",
            f"dp = tl.dot(grad, tl.trans(v), {_PRECISION})",
            f"ds = gradient_{kind}(p * (dp - delta[:, None]), s, qi, ki{text.xs})",
            *(["if not EVEN_K:", "    ds = tl.where(ki < KN, ds, 0.0)"] if kind == "edge" else []),
            f"acc = tl.dot(ds.to(k.dtype), k, acc, {_PRECISION})",
        ]

    edge = body("edge")
    guard = [f"need = tl.reduce(lse, 0, least) < {text.limit!r}", *_skipped("BN", "KN", edge)] if text.guarded else []
    return text.head("backward_q", "G, Q, K, V, OUT, LSE, DELTA, DQ") + _indent(
        [
            *_programs("QN", "BM"),
            _order(text.band.upper is not None),
            *_QUERY_START,
            _tile("grad", "G + b * sgb + h * sgh", "rows", "sgn", *_E, _ROW),
            "place = pair.to(tl.int64) * QN + rows",
            "out = tl.load(OUT + place[:, None] * E + e[None, :],",
            f"              mask=({_ROW})[:, None] & ((E == EP) | (e < E))[None, :], other=0.0)",
            "delta = tl.reduce(grad.to(tl.float32) * out.to(tl.float32), 1, plus)",
            f"tl.store(DELTA + place, delta, mask={_ROW})",
            "sums = LSE + place + pair.to(tl.int64) * QN",
            f"lse = tl.load(sums, mask={_ROW}, other=float('inf'))",
            *([f"rest = tl.load(sums + QN, mask={_ROW}, other=0.0)"] if text.guarded else []),
            *text.loads("head", "q"),
            *text.loads("row", "q"),
            "acc = tl.full([BM, DP], 0.0, tl.float32)",
            *_ranges(text.band, "BM", "BN", "KN", "EVEN_K"),
            *_loops(text, text.band, "BN", body("inside"), edge, "EVEN_K"),
            *guard,
            "tl.store(DQ + place[:, None] * D + d[None, :], acc.to(DQ.dtype.element_ty),",
            f"         mask=({_ROW})[:, None] & ((D == DP) | (d < D))[None, :])",
        ],
        1,
    ) + [""]


def _flipped(band: Live) -> Live:
    """Bounds of q - k instead of k - q."""
    return Live(None if band.upper is None else -band.upper, None if band.lower is None else -band.lower, band.fill, band.inside)


def _key_tiles(text: _Text, kind: str) -> list[str]:
    """What all walks over queries share: tiles of q and grad, and p and dz, with keys along the rows."""
    edge = kind == "edge"
    mask = "EVEN_Q | (n + cols < QN)" if edge else "EVEN_Q | (cols >= 0)"
    return [
        "qi = (n + cols)[None, :]",
        _tile("q", "Q + b * sqb + h * sqh", "(n + cols)", "sqn", *_D, mask),
        _tile("grad", "G + b * sgb + h * sgh", "(n + cols)", "sgn", *_E, mask),
        "place = (b * H + h) * QN + n + cols",
        "sums = LSE + place + (b * H + h) * QN",
        f"lse = tl.load(sums, mask={mask}, other=float('inf'))",
        *([f"rest = tl.load(sums + QN, mask={mask}, other=0.0)"] if text.guarded else []),
        f"delta = tl.load(DELTA + place, mask={mask}, other=0.0)",
        *text.loads("step", "k"),
        f"s = tl.dot(k, tl.trans(q), {_PRECISION})",
        f"z = score_{kind}(s, qi, ki{text.xs})",
        f"p = tl.exp2(z - lse[None, :]{' - rest[None, :]' if text.guarded else ''})",
        *(["if not EVEN_Q:", "    p = tl.where(qi < QN, p, 0.0)"] if edge else []),
        f"dp = tl.dot(v, tl.trans(grad), {_PRECISION})",
        "dz = p * (dp - delta[None, :])",
    ]


_KEY = "EVEN_K | (rows < KN)"
_KEY_START = [
    "rows = start + tl.arange(0, BN)",
    "cols = tl.arange(0, BM)",
    "d = tl.arange(0, DP)",
    "e = tl.arange(0, EP)",
    "ki = rows[:, None]",
]


def _backward_kv(text: _Text) -> list[str]:
    band = _flipped(text.band)

    def body(kind: str) -> list[str]:
        return [
            *_key_tiles(text, kind),
            f"dv = tl.dot(p.to(grad.dtype), grad, dv, {_PRECISION})",
            f"ds = gradient_{kind}(dz, s, qi, ki{text.xs})",
            *(["if not EVEN_Q:", "    ds = tl.where(qi < QN, ds, 0.0)"] if kind == "edge" else []),
            f"dk = tl.dot(ds.to(q.dtype), q, dk, {_PRECISION})",
        ]

    edge = body("edge")
    looped = _indent(
        [
            "h = shared * GROUP + g",
            *text.loads("head", "k"),
            *text.loads("row", "k"),
            *_loops(text, band, "BM", body("inside"), edge, "EVEN_Q"),
            *_guard_keys(text, edge),
        ],
        1,
    )
    return text.head("backward_kv", "G, Q, K, V, LSE, DELTA, DK, DV") + _indent(
        [
            *_programs("KN", "BN"),
            "start = turn * BN",
            "b = (pair // (H // GROUP)).to(tl.int64)",
            "shared = (pair % (H // GROUP)).to(tl.int64)",
            *_KEY_START,
            _tile("k", "K + b * skb + shared * skh", "rows", "skn", *_D, _KEY),
            _tile("v", "V + b * svb + shared * svh", "rows", "svn", *_E, _KEY),
            "dk = tl.full([BN, DP], 0.0, tl.float32)",
            "dv = tl.full([BN, EP], 0.0, tl.float32)",
            *_ranges(band, "BN", "BM", "QN", "EVEN_Q"),
            "for g in range(GROUP):",
            *looped,
            "home = pair.to(tl.int64) * KN + rows",
            "tl.store(DK + home[:, None] * D + d[None, :], dk.to(DK.dtype.element_ty),",
            f"         mask=({_KEY})[:, None] & ((D == DP) | (d < D))[None, :])",
            "tl.store(DV + home[:, None] * E + e[None, :], dv.to(DV.dtype.element_ty),",
            f"         mask=({_KEY})[:, None] & ((E == EP) | (e < E))[None, :])",
        ],
        1,
    ) + [""]


def _guard_keys(text: _Text, edge: Sequence[str]) -> list[str]:
    """Tiles of queries outside of the band that hold a row without a live key."""
    if not text.guarded:
        return []
    test = [
        "far = tl.load(LSE + (b * H + h) * 2 * QN + n + cols, mask=EVEN_Q | (n + cols < QN), other=float('inf'))",
        f"if tl.reduce(far, 0, least) < {text.limit!r}:",
        *_indent(edge, 1),
    ]
    return [
        "done = low + (tl.maximum(high - low, 0) + BM - 1) // BM * BM",
        "for n in range(0, low, BM):",
        *_indent(test, 1),
        "for n in range(done, QN, BM):",
        *_indent(test, 1),
    ]


def _operand(text: _Text, which: int) -> list[str]:
    """Gradient of one operand.

    One that varies with query and key: a program owns a tile of it and adds up over batches and heads that share it. Others:
    a program owns the rows it varies with (queries if with neither) and writes float32 sums over the other axis for each
    batch and head; the caller adds the rest up.
    """
    tile = {"q", "k"} <= set(text.axes[which])
    by_key = "k" in text.axes[which]
    functions = [
        *_function(f"slope{which}", gradient(text.term, load(which, "f")),
                   ["t", "s", "q", "k", *[f"x{i}" for i in text.used]])
    ]  # fmt: skip
    slope = f"slope{which}(dz, s, qi, ki{text.xs})"
    valid = f"tl.where((EVEN_K | (ki < KN)) & (EVEN_Q | (qi < QN)), {slope}, 0.0)"
    band = _flipped(text.band)
    inner = [*_key_tiles(text, "edge"), f"acc += {valid}"]
    load_kv = [
        _tile("k", "K + b * skb + (h // GROUP) * skh", "rows", "skn", *_D, _KEY),
        _tile("v", "V + b * svb + (h // GROUP) * svh", "rows", "svn", *_E, _KEY),
        *text.loads("head", "k"),
        *text.loads("row", "k"),
    ]
    if tile:
        axes = text.axes[which]
        lines = [
            *_programs("QN", "BM"),
            "n = turn * BM",
            "start = pair % ((KN + BN - 1) // BN) * BN",
            *_KEY_START,
            f"mine = pair // ((KN + BN - 1) // BN)  # of {axes}",
            *_outside(text),
            f"nb = {'1' if 'b' in axes else 'NB'}",
            f"nh = {'1' if 'h' in axes else 'H'}",
            "acc = tl.full([BN, BM], 0.0, tl.float32)",
            "for step in range(0, tl.where(outside, 0, nb * nh)):",
            f"    b = ({_mine(axes, 'b')}).to(tl.int64)",
            f"    h = ({_mine(axes, 'h')}).to(tl.int64)",
            *_indent([*load_kv, *inner], 1),
            "qi = (n + cols)[None, :]",
            "place = (mine.to(tl.int64) * QN + qi) * KN + ki",
            "tl.store(DX + place, acc.to(DX.dtype.element_ty), mask=(qi < QN) & (ki < KN))",
        ]
    elif by_key:
        lines = [
            *_programs("KN", "BN"),
            "start = turn * BN",
            "b = (pair // H).to(tl.int64)",
            "h = (pair % H).to(tl.int64)",
            *_KEY_START,
            *load_kv,
            "acc = tl.full([BN, BM], 0.0, tl.float32)",
            *([*_ranges(band, "BN", "BM", "QN", "EVEN_Q")] if not text.guarded else ["low = 0", "high = QN"]),
            "for n in range(low, high, BM):",
            *_indent(inner, 1),
            "tl.store(DX + pair.to(tl.int64) * KN + rows, tl.reduce(acc, 1, plus), mask=rows < KN)",
        ]
    else:
        lines = [
            *_programs("QN", "BM"),
            "n = turn * BM",
            "b = (pair // H).to(tl.int64)",
            "h = (pair % H).to(tl.int64)",
            "acc = tl.full([BN, BM], 0.0, tl.float32)",
            *_query_span(text),
            "for start in range(low, high, BN):",
            *_indent([*_KEY_START, *load_kv, *inner], 1),
            "qs = n + tl.arange(0, BM)",
            "tl.store(DX + pair.to(tl.int64) * QN + qs, tl.reduce(acc, 0, plus), mask=qs < QN)",
        ]
    head = text.head(f"operand{which}", "G, Q, K, V, LSE, DELTA, DX", "NB, " if tile else "")
    return functions + head + _indent(lines, 1) + [""]


def _outside(text: _Text) -> list[str]:
    """Does this tile hold no pair that can have weight?"""
    tests = []
    if text.band.upper is not None:
        tests.append(f"(start > n + BM - 1 + ({text.band.upper}))")
    if text.band.lower is not None:
        tests.append(f"(start + BN - 1 < n + ({text.band.lower}))")
    return ["outside = " + ("n < 0" if text.guarded or not tests else " | ".join(tests))]


def _mine(axes: str, axis: str) -> str:
    """Batch or head of a turn, from the index of the tile among (batches, heads) it varies with and of the turn."""
    both = "b" in axes and "h" in axes
    if axis in axes:
        return ("mine // H" if axis == "b" else "mine % H") if both else "mine"
    turn = "(mine * 0 + step)"  # a tensor, also where the loop counts in plain numbers
    return turn if ("h" if axis == "b" else "b") in axes else f"{turn} // H" if axis == "b" else f"{turn} % H"


def _query_span(text: _Text) -> list[str]:
    """Keys that the queries n … n + BM can see."""
    if text.guarded:
        return ["low = 0", "high = KN"]
    return [line.replace("start", "n") for line in _ranges(text.band, "BM", "BN", "KN", "EVEN_K")[:2]]


@functools.lru_cache(maxsize=256)
def source(score: str, axes: tuple[str, ...], which: int | None = None) -> str:
    """A module with ``forward``, ``backward_q`` and ``backward_kv``, or with ``operand<which>`` only.

    ``score`` is the expression's text, ``axes`` for each operand the axes it varies with, in the order "bhqk". Raises
    ValueError for a text that is no expression, ``ops.score.Unsupported`` if it has no derivative.
    """
    text = _Text(as_float(parse(score)), axes)
    if text.term.leaves - {S, Q, K} - {x for x in text.term.leaves if x.op == "load"} or T in text.term.leaves:
        raise ValueError("a score expression of unknown operands")
    if any(i >= len(axes) for i in text.kinds):
        raise ValueError("a score expression names more operands than there are")
    kernels = [*_forward(text), *_backward_q(text), *_backward_kv(text)] if which is None else _operand(text, which)
    head = [f"# softmax of {score}", "import triton", "import triton.language as tl", "", ""]
    return "\n".join([*head, *_COMBINE, *text.functions(), *kernels])


@functools.lru_cache(maxsize=256)
def used(score: str, count: int) -> list[int]:
    """Numbers of the operands that the kernels take, in order."""
    found = {int(x.value) for x in parse(score).leaves if x.op == "load"}
    return [i for i in range(count) if i in found]
