"""Attention over a short sequence with a bias, as over the windows of Swin Transformers, is one kernel.

Math       softmax(c q kᵀ + b + m) v   →   fusionc::short_attention(q, k, v, c, causal, b, m)
           b, m: floats that are added, or bools that choose keys; broadcast over batch, heads, queries or keys, or the same for
           batch entries n apart (scores.view(B // n, n, H, L, L) + mask[:, None]: shifted windows)
Exactness  reassociates: the scores stay in float32, where eager rounds them at each step. A row without any key is what it
           was: NaN in plain operators, 0 in scaled_dot_product_attention; finite masks (-100, -1e9) are added as they are
Legality   inference on a GPU; bfloat16 or float16; known sizes; heads of 16 to 128, dense and aligned; 2 to 128 keys; no
           dropout; nothing else reads scores or probabilities; at most two tensors, once small ones are summed
Cost       scores and probabilities are not written and read: for 2048 windows of 49 tokens two products of 24 and 20 µs and a
           softmax of 58 µs (H200). The sum of small tensors is made once a call, in rows of a multiple of eight columns
Source     Swin Transformer (Liu et al. 2021), as timm, torchvision and Hugging Face write it; plain_attention.py reads it
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from ..graph import edit
from ..graph.facts import Facts, device, dtype, is_static_shape, shape, stride, tensor
from ..ops import short_attention as op
from ..ops.score import INF, S, Term, Unsupported, as_bool, as_float, const, live, make
from . import sdpa
from .base import Match, Reassociates, Refuse
from .plain_attention import Found, PlainAttention, caller, operand, products, put, shaped
from .plain_scores import INNER, MERGED, OUTER, VIEWS, Axes, Reader, argument, name_of
from .skinny_linear import served

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_SMALL = 4  # times smaller than the queries: such a tensor may be copied


class Additive(Reader):
    """Reads what is added to scores as tensors where they lie: through views, but not into their computation."""

    def _descendants(self, node: Node) -> set[Node]:
        return set() if node is self.final else super()._descendants(node)  # a call of the library has no scores

    def _read(self, node: Node, axes: Axes, pure: bool) -> Term:
        if node in self.tainted or pure:
            return super()._read(node, axes, pure)
        made = self._tried(lambda: self._within(node, axes, True))
        if made is not None and (made.op == "const" or _is_causal(made)):
            return made
        for inside in (self._through, self._summands):
            found = self._tried(functools.partial(inside, node, axes))
            if found is not None:
                return found
        return self._operand(node, axes)

    def _tried(self, read: Callable[[], Term | None]) -> Term | None:
        """What it reads; None, and as if it had not been tried, if it cannot."""
        memo, folded, operands = dict(self._memo), len(self.folded), len(self.operands)
        try:
            found = read()
        except Unsupported:
            found = None
        if found is None:
            self._memo = memo
            del self.folded[folded:], self.operands[operands:], self.read_at[operands:]
        return found

    def _through(self, node: Node, axes: Axes) -> Term | None:
        """The tensor that a view shows (or a copy: an expanded mask, reshaped)."""
        source = argument(node, 0, "input") if node.op in ("call_function", "call_method") else None
        if not isinstance(source, Node) or tensor(source) is None or name_of(node) not in VIEWS:
            return None
        inner = VIEWS[name_of(node)](node, axes)
        self._path.append(node)
        try:
            found = self.read(self._current(source, node), inner)
        finally:
            self._path.pop()
        self.folded.append(node)
        return found

    def _summands(self, node: Node, axes: Axes) -> Term | None:
        """The parts of a sum that is as large as the batch, if none of them is."""
        if not {0, OUTER, MERGED} & set(axes) or name_of(node) != "add":
            return None
        before = len(self.operands)
        found = self._within(node, axes, False)
        large = any({0, OUTER, MERGED} & set(given) for _, given in self.operands[before:])
        return None if large else found


@dataclass
class Added:
    """One tensor: as it is read, and what is done to it."""

    node: Node
    axes: Axes
    factor: float = 1.0
    negated: bool = False
    sizes: tuple[int, ...] = ()  # [P, H|1, L|1, S|1]


@dataclass
class Short:
    """One attention to replace: products (or a call of the library), and what is added to the scores."""

    final: Node
    found: Found
    sizes: tuple[int, ...]  # [B, H, L, S]
    scale: float
    causal: bool
    floats: list[Added]
    bools: list[Added]
    summed: bool  # the floats, before they are added
    room: int  # elements of a tensor that may be copied
    rank: int = 4
    call: dict[str, Any] | None = None  # the library's arguments
    spare: list[Node] = field(default_factory=list)


class BiasedAttention(PlainAttention):
    """In plain operators, and as calls of the library with a mask."""

    name = "biased_attention"
    level = "model"
    exactness = Reassociates(rtol=1e-3)
    reader = Additive

    def __init__(self, devices: Collection[str] = ("cuda",),
                 dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16), small: int = 1 << 19) -> None:  # fmt: skip
        super().__init__(tuple(devices), dtypes, smallest=256)
        self.small = small  # elements of a tensor that may always be copied: the launch takes longer

    def find(self, facts: Facts) -> Iterator[Match]:
        """Products whose left operand is a softmax, and calls with a mask, where the kernel runs."""
        for match in super().find(facts):
            if served(device(match.second.node), self.devices):
                yield match
        for node in sdpa.calls(facts.gm):
            given = sdpa.arguments(node)
            if given["attn_mask"] is not None and served(device(node), self.devices):
                yield Match({"call": node, "given": given, "found": []}, (node,))

    def check(self, match: Match, facts: Facts) -> Refuse | None:
        """See Legality."""
        (node,) = match.nodes
        if facts.stage != "inference":
            return Refuse("training needs the gradient of what is added", node)
        try:
            called = "call" in match.bound
            match.found.append(self._of_call(node, match.given, facts) if called else self._of_products(match, facts))
        except Unsupported as e:
            return Refuse(str(e), node)
        return None

    def _of_products(self, match: Match, facts: Facts) -> Short:
        found = self.read(match.second, match.softmax, match.between, facts)
        first, second = found.orders
        rows = (
            (found.q, first[0][-1] if first else -1),
            (found.k, first[1][-2] if first else -1 if found.swapped else -2),
            (found.v, second[1][-1] if second else -1),
        )
        width = (shape(found.v) or ())[rows[2][1]]
        if any((shape(x) or ())[at] != width for x, at in rows):
            raise Unsupported("keys and values differ in width")
        return self._planned(match.second.node, found, rows, width)

    def _of_call(self, node: Node, given: dict[str, Any], facts: Facts) -> Short:
        q, k, v, mask = (given[name] for name in ("query", "key", "value", "attn_mask"))
        if given["dropout_p"] != 0 or given["is_causal"] is not False:
            raise Unsupported("dropout, or a causal flag beside a mask")
        sizes, q_kind = [shape(x) or () for x in (q, k, v)], dtype(q)
        if any(len(n) != 4 for n in sizes) or sizes[1] != sizes[2] or sizes[0][0] != sizes[1][0] or \
                sizes[0][3] != sizes[1][3] or q_kind not in self.dtypes:  # fmt: skip
            raise Unsupported("it is no attention of one width over four dimensions in 16 bits")
        scale = given["scale"] if given["scale"] is not None else 1 / math.sqrt(sizes[0][3])
        if not isinstance(scale, (int, float)) or not isinstance(sizes[0][1], int) or sizes[0][1] % sizes[1][1]:
            raise Unsupported("its scale or heads are not known")
        kind = dtype(mask)
        if kind is not None and kind.is_floating_point and torch.finfo(kind).max > torch.finfo(q_kind).max:
            raise Unsupported("the mask is wider than the queries: autocast would round its lowest numbers to -inf")
        reader = Additive(facts, node, node)
        added = reader.aligned(mask, node)
        term = make("mul", S, const(float(scale)))
        if dtype(mask) == torch.bool:
            term = make("where", as_bool(added), term, const(-INF))
        else:
            term = make("add", term, as_float(added))
        for (x, _), at in zip(reader.operands, reader.read_at):
            reader.unwritten(x, at, node)
        found = Found(term, reader.operands, q, k, v, (None, None), True, sizes=(*sizes[0][:3], sizes[1][2]))
        made = self._planned(node, found, ((q, -1), (k, -1), (v, -1)), sizes[0][3])
        made.call, made.spare = given, reader.folded
        return made

    def _planned(self, final: Node, found: Found, rows: tuple[tuple[Node, int], ...], width: Any) -> Short:
        sizes = (*[1] * (4 - len(found.sizes)), *found.sizes)
        if not all(is_static_shape(x) for x in (final, found.q, found.k, found.v)):
            raise Unsupported("its sizes are not known")
        if not 2 <= sizes[3] <= op.KEYS or sizes[2] < 2 or width not in op.WIDTHS:
            raise Unsupported(f"it has one query, more than {op.KEYS} keys or a width of heads without a kernel")
        if not all(_reads(x, at) for x, at in rows):
            raise Unsupported("queries, keys or values are not dense rows at multiples of 16 bytes")
        scale, causal, floats, bools = _parts(found, sizes[2] == sizes[3])
        if not floats and not bools and sizes[2] * sizes[3] >= 4096:
            raise Unsupported("nothing is added to the scores: it becomes a call of the library")
        if any(dtype(x.node) not in (*_FLOATS, *self.dtypes) for x in floats):
            raise Unsupported("a tensor that is added has a type without a kernel")
        for x in (*floats, *bools):
            x.sizes = _sizes(x, len(found.sizes), found.heads)
        room = max(math.prod(sizes[:3]) * width // _SMALL, self.small)
        total = math.prod(max(n) for n in zip(*(x.sizes for x in floats)))
        summed = len(floats) > 1 and total <= room and len({x.sizes[0] for x in floats} - {1}) < 2
        if len(bools) + (1 if summed else len(floats)) > 2:
            raise Unsupported("more than two tensors are added to the scores")
        return Short(final, found, sizes, scale, causal, floats, bools, summed, room, len(found.sizes))

    def replace(self, match: Match, facts: Facts) -> None:
        """One call where the values were multiplied, or the library called."""
        (short,) = match.found
        final, found, graph = short.final, short.found, facts.gm.graph
        with graph.inserting_before(final):
            call = caller(graph, final)
            added = _emitted(call, short)
            q, k, v = (found.q, found.k, found.v) if short.call else products(call, found, found.sizes, False)
            out = call(torch.ops.fusionc.short_attention.default, q, k, v, short.scale, short.causal,
                       *added, *[None] * (2 - len(added)), short.call is not None)  # fmt: skip
            out = shaped(call, out, found, found.sizes, final)
            values = sdpa.outlook(final, out.meta["example_value"])
            if values is None:  # a reader depends on the layout
                out = _laid(call, out, stride(final) or ())
        for reader, made in (values or {}).items():
            if reader is not final:
                reader.meta["example_value"] = made
        if short.call is None:
            put(found, final, out)
        else:
            edit.replace(final, out)
            edit.erase_dead(x for x in (final, *reversed(short.spare)) if not x._erased)


# -- what is added ----------------------------------------------------------------------------------------------------


def _is_causal(x: Term) -> bool:
    """It leaves a query the keys up to its own, as a condition or as 0 and -inf to be added; or a condition for the others."""
    minus = const(-INF)
    tried = [make("where", x, S, minus), make("where", x, minus, S)] if x.kind == "b" else [make("add", S, as_float(x))]
    bands = [live(term) for term in tried]
    return any((b.bounded, b.lower, b.upper, b.fill, b.inside) == (True, None, 0, -INF, S) for b in bands)


def _parts(found: Found, square: bool) -> tuple[float, bool, list[Added], list[Added]]:
    """(scale, causal, tensors that are added, bools that choose keys) of the scores' expression. Raises Unsupported."""
    term, band = found.term, live(found.term)
    if band.bounded:
        if (band.lower, band.upper) != (None, 0) or not square:
            raise Unsupported("keys are chosen by position otherwise than up to the query's own")
        term = band.inside
    bools = []
    while term.op == "where":
        condition, kept, dead = term.args
        negated = kept == const(-INF)
        kept, dead = (dead, kept) if negated else (kept, dead)
        if condition.op == "not":
            condition, negated = condition.args[0], not negated
        if dead != const(-INF) or condition.op != "load":
            raise Unsupported("keys are left out otherwise than by -inf at a bool")
        bools.append(Added(*found.operands[int(condition.value)], negated=negated))
        term = kept
    scale, floats = 0.0, list[Added]()
    stack = [(term, 1.0)]
    while stack:
        x, factor = stack.pop()
        if x == S:
            scale += factor
        elif x.op in ("add", "sub"):
            stack += [(x.args[1], factor if x.op == "add" else -factor), (x.args[0], factor)]
        elif x.op == "neg":
            stack.append((x.args[0], -factor))
        elif x.op == "mul" and x.args[1].op == "const":
            stack.append((x.args[0], factor * float(x.args[1].value)))
        elif x.op == "load" and x.kind == "f":
            floats.append(Added(*found.operands[int(x.value)], factor=factor))
        else:
            raise Unsupported("the scores are more than a product, a factor and tensors that are added")
    if scale == 0 or not math.isfinite(scale):
        raise Unsupported("the product has no factor that is known")
    if band.bounded and band.fill != -INF and (floats or bools or band.fill > -32752):
        raise Unsupported("a finite number in place of later keys, which counts in a row that has no other")
    return scale, band.bounded, floats, bools


def _sizes(x: Added, rank: int, heads: tuple[Any, Any] | None) -> tuple[int, ...]:
    """[P, H|1, L|1, S|1] of a tensor that is added. Raises Unsupported."""
    sizes = [1, 1, 1, 1]
    for n, axis in zip(shape(x.node) or (), x.axes, strict=True):
        if axis == OUTER:
            raise Unsupported("a tensor is added by the group that a batch entry belongs to")
        if axis == MERGED:
            assert heads is not None
            sizes[:2] = heads
        elif axis is not None:
            sizes[0 if axis == INNER else axis + 4 - rank] = n
    if not all(isinstance(n, int) for n in sizes):
        raise Unsupported("the size of a tensor that is added is not known")
    return tuple(sizes)


def _emitted(call: Any, short: Short) -> list[Node]:
    """The tensors that the kernel reads, floats first."""

    def tensor_of(x: Added) -> Node:
        return operand(call, x.node, tuple(0 if a == INNER else a for a in x.axes), short.rank, short.found.heads)

    floats = [call(torch.mul, tensor_of(x), x.factor) if x.factor != 1 else tensor_of(x) for x in short.floats]
    made = [x.factor != 1 or _computed(x.node) for x in short.floats]
    if short.summed:
        floats, made = [functools.reduce(lambda a, b: call(torch.add, a, b), floats)], [True]
    bools = [call(torch.logical_not, tensor_of(x)) if x.negated else tensor_of(x) for x in short.bools]
    return [*(_rows(call, x, computed, short.room) for x, computed in zip(floats, made)), *bools]


def _rows(call: Any, x: Node, computed: bool, room: int) -> Node:
    """With dense rows; a small tensor that is computed anyway has them begin at multiples of 16 bytes."""
    sizes, steps = shape(x) or (), stride(x) or ()
    if sizes[3] == 1:
        return x
    turned = steps[3] != 1
    if (computed or turned) and sizes[3] % 8 and math.prod(sizes) <= room:
        return call(torch.nn.functional.pad, x, (0, -sizes[3] % 8))  # type: ignore[no-any-return]
    return call(torch.Tensor.contiguous, x) if turned else x  # type: ignore[no-any-return]


def _computed(node: Node) -> bool:
    """Its values are made in this graph."""
    while node.op in ("call_function", "call_method") and name_of(node) in VIEWS and isinstance(node.args[0], Node):
        node = node.args[0]
    return node.op in ("call_function", "call_method")


def _reads(node: Node, at: int) -> bool:
    """Rows along axis ``at`` are dense, and everything begins at multiples of 16 bytes."""
    value = tensor(node)
    if value is None or not all(isinstance(n, int) for n in (*value.stride(), value.storage_offset())):
        return False
    others = [step for i, step in enumerate(value.stride()) if i != at % value.dim() and value.shape[i] > 1]
    return value.stride(at) == 1 and not any(n % 8 for n in (*others, value.storage_offset()))


def _laid(call: Any, x: Node, steps: tuple[Any, ...]) -> Node:
    """In memory as with these strides."""
    order = sorted(range(len(steps)), key=lambda i: -steps[i])
    back = sorted(range(len(steps)), key=lambda i: order[i])
    if order == back == list(range(len(steps))):
        return call(torch.Tensor.contiguous, x)  # type: ignore[no-any-return]
    return call(torch.permute, call(torch.Tensor.contiguous, call(torch.permute, x, order)), back)  # type: ignore[no-any-return]
