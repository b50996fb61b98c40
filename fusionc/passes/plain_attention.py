"""Attention written out in plain operators becomes one call that keeps the scores out of memory.

Math       softmax(f(q kᵀ)) v  =  attention(q, k, v; f)       f: any pointwise function of the scores, positions and tensors
Exactness  reassociates: running maxima and sums in float32, where eager rounds the scores to the inputs' type between steps
Legality   on a GPU, 16-bit floats of one type; nothing else reads the scores or probabilities; no dropout; every operator
           between the products is understood; what is read there is not written before the second product
Cost       saves writing and reading the scores (several times), in the backward too; skips tiles that a mask leaves empty
Source     specs/attention.md D1: match by canonical form; FlexAttention (arXiv 2412.05496) for the score slot, Flashlight
           (arXiv 2511.02043) for finding it in plain code

The walk goes back from the second product: casts and idle dropout, the softmax over the last axis, then the chain, which
``plain_scores.py`` reads into a score expression. A scaled product without a mask, or with a causal one, is
``scaled_dot_product_attention``; everything else is ``fusionc::attention``.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, Node

from .. import ops
from ..graph import edit
from ..graph.facts import Facts, device, dtype, same, same_sizes, shape, tensor
from ..ops.score import S, Term, Unsupported, as_float, const, gradient, live, make
from .base import Match, Pass, Reassociates, Refuse
from .plain_scores import INNER, MERGED, OUTER, Reader, argument, name_of, number

_PRODUCTS = ("matmul", "bmm", "einsum")
_PASSING = ("to", "float", "half", "bfloat16", "type", "type_as", "contiguous", "clone")
_LARGEST = 256  # head size


@dataclass
class Product:
    """A batched matrix product in canonical form: left [batch…, m, c] times right [batch…, c, n]."""

    node: Node
    left: Node
    right: Node
    swapped: bool = False  # right is given as [batch…, n, c]
    orders: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]] | None = None  # einsum: permutations of left, right, result
    bias: tuple[Node, float, float] | None = None  # baddbmm: input, beta, alpha


@dataclass
class Found:
    """What ``check`` read out of a match, for ``replace``."""

    term: Term
    operands: list[tuple[Node, tuple[int | None, ...]]]
    q: Node
    k: Node
    v: Node
    orders: tuple[Any, Any]
    swapped: bool
    group: int = 1
    plain: tuple[Node, Node] | None = None  # k and v with repeated heads
    heads: tuple[Any, Any] | None = None  # batch and heads of tensors that hold them in one dimension
    sizes: tuple[Any, ...] = ()  # of the scores
    nodes: list[Node] = field(default_factory=list)  # that depend on the scores
    spare: list[Node] = field(default_factory=list)  # that may have lost their only user


class PlainAttention(Pass):
    """See the module. ``devices``: kinds of devices to work on (the reference is slower than ATen on a CPU)."""

    name = "plain_attention"
    level = "model"
    exactness = Reassociates(rtol=1e-3)
    reader: type[Reader] = Reader

    def __init__(self, devices: tuple[str, ...] = ("cuda",), dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16),
                 smallest: int = 4096) -> None:  # fmt: skip
        self.devices, self.dtypes, self.smallest = devices, dtypes, smallest

    def find(self, facts: Facts) -> Iterator[Match]:
        """Products whose left operand is a softmax."""
        for node in list(facts.gm.graph.nodes):
            if node.op in ("call_function", "call_method") and name_of(node) in _PRODUCTS and not node._erased:
                second = product(node)
                if second is not None:
                    softmax, between = _softmax(second.left)
                    if softmax is not None:
                        yield Match({"second": second, "softmax": softmax, "between": between, "found": []}, (node,))

    def check(self, match: Match, facts: Facts) -> Refuse | None:
        """See Legality."""
        try:
            found = self.read(match.second, match.softmax, match.between, facts)
            if any({OUTER, INNER} & set(axes) for _, axes in found.operands):
                raise Unsupported("a tensor is added by the place of a batch entry, which only short sequences can have")
        except Unsupported as e:
            return Refuse(str(e), match.second.node)
        match.found.append(found)
        return None

    def read(self, second: Product, softmax: Node, between: list[Node], facts: Facts) -> Found:
        """What the products, the softmax and all between them compute. Raises Unsupported."""
        final = second.node
        on = device(final)
        if on is None or on.type not in self.devices:
            raise Unsupported("it is not on a GPU, where the kernels are")
        for node in between:
            if name_of(node).startswith("dropout") and _dropping(node):
                raise Unsupported("dropout is active")
        scores = argument(softmax, 0, "input")
        rank = len(shape(scores) or ())
        dim = argument(softmax, 1, "dim")
        if not isinstance(scores, Node) or dim not in (-1, rank - 1) or not 2 <= rank <= 4:
            raise Unsupported("the softmax is not over the last of two to four axes")
        first = product(_origin(scores))
        if first is None:
            raise Unsupported("the scores are no product of two tensors")
        reader = self.reader(facts, first.node, final)
        if not same_sizes(reader.canonical(shape(scores) or ()), reader.canonical(shape(first.node) or ())):
            raise Unsupported("the scores are reshaped")
        if any(p.orders is not None and len(shape(p.node) or ()) != reader.rank for p in (first, second)):
            raise Unsupported("a product has another rank than the scores")
        term = as_float(reader.scores(scores, softmax, _raw(first, reader, reader.rank)))
        found = self._shapes(first, second, term, reader, final)
        found.nodes = [*reader.consumed, softmax, *between]
        _private(found.nodes, final)
        found.spare = [*reader.folded, *_peeled(first.left, found.q), *_peeled(first.right, found.k),
                       *_peeled(second.right, found.v)]  # fmt: skip
        used = sorted({int(x.value) for x in found.term.leaves if x.op == "load"})
        found.operands = [reader.operands[i] for i in used]
        found.term = _renumbered(found.term, {i: n for n, i in enumerate(used)})
        if len(used) > 16:
            raise Unsupported("the scores depend on too many tensors")
        gradient(found.term, S)
        for node in {found.q, found.k, found.v, *(found.plain or ())}:
            reader.unwritten(node, min(node.users), final)
        for i in used:
            reader.unwritten(reader.operands[i][0], reader.read_at[i], final)
        return found

    def _shapes(self, first: Product, second: Product, term: Term, reader: Reader, final: Node) -> Found:
        q, k, swapped, factor = first.left, first.right, first.swapped, 1.0
        if first.orders is None:
            q, factor = _unscaled(q)
            inner = None if swapped else _untransposed(k)
            if inner is not None:
                k, swapped = inner, True
            k, more = _unscaled(k)
            factor *= more
        v = second.right
        kinds = {dtype(x) for x in (q, k, v, first.node, final)}
        if len(kinds) != 1 or dtype(q) not in self.dtypes:
            raise Unsupported(f"types are mixed or not 16-bit floats: {', '.join(sorted(map(str, kinds)))}")
        if factor != 1.0:
            term = _substituted(term, make("mul", S, const(factor)))
        sizes = reader.canonical(shape(first.node) or ())
        found = Found(term, [], q, k, v, (first.orders, second.orders), swapped, heads=reader.heads, sizes=sizes)
        d, e = (shape(first.left) or ())[-1], (shape(final) or ())[-1]
        if first.orders is not None:
            d = (shape(q) or ())[first.orders[0][-1]]
        if second.orders is not None:
            e = (shape(v) or ())[second.orders[1][-1]]
            _fits(second, sizes, e, final)
        elif not same_sizes(reader.canonical(shape(final) or ())[:-1], sizes[:-1]):
            raise Unsupported("the values have more batches than the scores")
        if not all(isinstance(n, int) and 1 < n <= _LARGEST for n in (d, e)):
            raise Unsupported(f"head sizes {d} and {e} are not numbers up to {_LARGEST}")
        rows, columns = sizes[-2:]
        work = (rows if isinstance(rows, int) else 4096) * (columns if isinstance(columns, int) else 4096)
        if work < self.smallest or (isinstance(rows, int) and rows < 16):
            raise Unsupported("it is so small that the library's products are as fast")
        if len(sizes) == 4 and swapped and first.orders is None and second.orders is None:
            (k1, g1), (v1, g2) = _unrepeated(k), _unrepeated(v)
            if g1 == g2 > 1:
                found.plain, found.k, found.v, found.group = (k, v), k1, v1, g1
        return found

    def replace(self, match: Match, facts: Facts) -> None:
        """One call where the second product was."""
        (found,) = match.found
        final, graph = match.second.node, facts.gm.graph
        with graph.inserting_before(final):
            new = _emit(graph, found, found.sizes, final)
        put(found, final, new)


def put(found: Found, final: Node, new: Node) -> None:
    """The new node in place of the second product, and what that leaves without readers erased."""
    edit.replace(final, new)
    for node in sorted(set(found.nodes), reverse=True):
        if not node._erased and not node.users and node.op in ("call_function", "call_method"):
            node.graph.erase_node(node)
    edit.erase_dead(node for node in dict.fromkeys(found.spare) if not node._erased)


# -- products ---------------------------------------------------------------------------------------------------------


def product(node: Any) -> Product | None:
    """The node as a batched product of two tensors, or None."""
    if not isinstance(node, Node) or node.op not in ("call_function", "call_method"):
        return None
    name = name_of(node)
    if name in ("matmul", "bmm"):
        left, right = argument(node, 0, "input"), argument(node, 1, "mat2" if name == "bmm" else "other")
        ok = all(isinstance(x, Node) and len(shape(x) or ()) >= 2 for x in (left, right)) and "out" not in node.kwargs
        return Product(node, left, right) if ok else None
    if name == "baddbmm":
        bias, left, right = (argument(node, i, n) for i, n in enumerate(("input", "batch1", "batch2")))
        beta, alpha = number(node.kwargs.get("beta", 1)), number(node.kwargs.get("alpha", 1))
        if beta is None or alpha is None or not isinstance(bias, Node):
            return None
        return Product(node, left, right, bias=(bias, float(beta), float(alpha)))
    if name == "einsum":
        return _einsum(node)
    return None


def _einsum(node: Node) -> Product | None:
    given = list(node.args[1]) if len(node.args) == 2 and isinstance(node.args[1], (list, tuple)) else list(node.args[1:])
    equation = str(node.args[0]).replace(" ", "")
    if len(given) != 2 or not all(isinstance(x, Node) for x in given) or "->" not in equation or "." in equation:
        return None
    sides, result = equation.split("->")
    parts = sides.split(",")
    if len(parts) != 2 or any(len(set(p)) != len(p) for p in (*parts, result)):
        return None
    a, b = parts
    summed = set(a) & set(b) - set(result)
    batch = [x for x in result if x in a and x in b]
    mine, other = set(a) - set(b), set(b) - set(a)
    if len(summed) != 1 or len(mine) != 1 or len(other) != 1 or not mine | other <= set(result) or not 2 <= len(result) <= 4:
        return None
    (c,), (m,), (n,) = summed, mine, other
    if result.index(m) > result.index(n):  # the scores' last axis is the keys', the result's last one the values'
        return None
    orders = (tuple(a.index(x) for x in (*batch, m, c)), tuple(b.index(x) for x in (*batch, c, n)),
              tuple((*batch, m, n).index(x) for x in result))  # fmt: skip
    return Product(node, given[0], given[1], orders=orders)


def _fits(second: Product, sizes: tuple[Any, ...], e: Any, final: Node) -> None:
    """Raise unless an einsum's probabilities are [batch…, q, k] as they are, and its result has a layout that we can give."""
    assert second.orders is not None
    if second.orders[0] != tuple(range(len(sizes))):
        raise Unsupported("the second product reorders the probabilities")
    result = torch.empty([2] * (len(sizes) - 1) + [2], device="meta")
    made = [(*sizes[:-1], e)[i] for i in second.orders[2]]
    if not same_sizes(shape(final), made) or result.dim() != len(made):
        raise Unsupported("the second product has another shape than expected")


def _raw(first: Product, reader: Reader, rank: int) -> Term:
    """The first product's value in terms of s = q·k."""
    if first.orders is not None and first.orders[2] != tuple(range(rank)):
        raise Unsupported("the scores' axes are not batch, query, key")
    if first.bias is None:
        return S
    bias, beta, alpha = first.bias
    raw = make("mul", S, const(alpha))
    return raw if beta == 0 else make("add", raw, make("mul", const(beta), as_float(reader.aligned(bias, first.node))))


def _origin(node: Any) -> Any:
    """The first product, looked for along first (or any) tensor arguments; the Reader proves the way."""
    stack, seen = [node], set[Any]()
    while stack and len(seen) < 64:
        x = stack.pop()
        if not isinstance(x, Node) or x in seen or x.op not in ("call_function", "call_method"):
            continue
        seen.add(x)
        if name_of(x) in (*_PRODUCTS, "baddbmm"):
            return x
        stack.extend(reversed(x.all_input_nodes))
    return None


def _softmax(node: Any) -> tuple[Node | None, list[Node]]:
    """The softmax whose value the node is, and the nodes between."""
    between: list[Node] = []
    while isinstance(node, Node) and node.op in ("call_function", "call_method") and len(between) < 8:
        name = name_of(node)
        if name == "softmax":
            return node, between
        regrouped = name in ("view", "reshape") and _regrouped(shape(node) or (), shape(argument(node, 0, "input")) or ())
        if name not in _PASSING and not name.startswith("dropout") and not regrouped:
            break
        value = tensor(node)
        if value is None or not value.dtype.is_floating_point:
            break
        between.append(node)
        node = argument(node, 0, "input")
    return None, between


def _regrouped(after: tuple[Any, ...], before: tuple[Any, ...]) -> bool:
    """Same sizes, or batch and heads merged or split."""
    if len(after) == len(before):
        return same_sizes(after, before)
    return {len(after), len(before)} == {3, 4} and same_sizes(after[-2:], before[-2:])


def _dropping(node: Node) -> bool:
    p, training = argument(node, 1, "p", 0.5), argument(node, 2, "training", True)
    if node.target is torch.dropout:
        training = argument(node, 2, "train", True)
    return not (number(p) == 0 or training is False)


def _private(nodes: list[Node], final: Node) -> None:
    """Raise if something else than this attention reads the scores or probabilities."""
    mine = {*nodes, final}
    for node in nodes:
        for user in node.users:
            if user not in mine:
                raise Unsupported(f"{user.name} also reads {node.name}, scores or probabilities")


# -- operands ---------------------------------------------------------------------------------------------------------


def _unscaled(node: Node) -> tuple[Node, float]:
    """x and c for x·c with a number c."""
    if name_of(node) not in ("mul", "div") or len(node.args) != 2 or node.kwargs:
        return node, 1.0
    a, b = node.args
    if name_of(node) == "mul" and not isinstance(a, Node):
        a, b = b, a
    c = number(b)
    if not isinstance(a, Node) or c is None or not math.isfinite(c) or c == 0 or dtype(a) != dtype(node):
        return node, 1.0
    if name_of(node, False) not in ("mul", "div", "truediv"):  # written in place
        return node, 1.0
    return a, float(c) if name_of(node) == "mul" else 1.0 / float(c)


def _untransposed(node: Node) -> Node | None:
    """x for a transposition of x's last two axes."""
    name, rank = name_of(node), len(shape(node) or ())
    source = argument(node, 0, "input")
    if not isinstance(source, Node):
        return None
    if name in ("transpose", "swapaxes", "swapdims"):
        dims = {d % rank for d in (number(argument(node, i, f"dim{i - 1}")) for i in (1, 2)) if isinstance(d, int)}
        return source if dims == {rank - 1, rank - 2} else None
    if name == "permute":
        given = node.args[1:] if not isinstance(argument(node, 1, "dims"), (list, tuple)) else argument(node, 1, "dims")
        order = [d % rank for d in given if isinstance(d, int)]
        return source if order == [*range(rank - 2), rank - 1, rank - 2] else None
    return source if name == "mT" or (name in ("t", "T") and rank == 2) else None


def _unrepeated(node: Node) -> tuple[Node, int]:
    """(x, g) for a tensor [B, H, S, D] whose heads repeat those of x [B, H/g, S, D] g times each."""
    name, sizes = name_of(node), shape(node) or ()
    source = argument(node, 0, "input")
    if name == "repeat_interleave" and isinstance(source, Node):
        times, dim = number(argument(node, 1, "repeats")), number(argument(node, 2, "dim"))
        return (source, times) if isinstance(times, int) and dim in (1, -3) else (node, 1)
    if name not in ("reshape", "view", "flatten") or not isinstance(source, Node) or name_of(source) != "expand":
        return node, 1
    wide, narrow = shape(source) or (), argument(source, 0, "input")
    if not isinstance(narrow, Node) or len(wide) != 5 or len(sizes) != 4:
        return node, 1
    thin, origin = shape(narrow) or (), argument(narrow, 0, "input")
    if not isinstance(origin, Node) or name_of(narrow) not in ("getitem", "unsqueeze", "view", "reshape"):
        return node, 1
    base, group = shape(origin) or (), wide[2]
    right = (len(base) == 4 and same_sizes(thin, (*base[:2], 1, *base[2:])) and isinstance(group, int)
             and same_sizes(wide, (*base[:2], group, *base[2:])) and isinstance(base[1], int)
             and same_sizes(sizes, (base[0], base[1] * group, *base[2:])))  # fmt: skip
    return (origin, group) if right else (node, 1)


def _peeled(node: Any, end: Node) -> list[Node]:
    """Nodes on the way from an operand of a product to the tensor that is read instead."""
    out: list[Node] = []
    while isinstance(node, Node) and node is not end and len(out) < 8 and node.op in ("call_function", "call_method"):
        out.append(node)
        node = next((a for a in node.args if isinstance(a, Node)), None)
    return out if node is end else []


def _substituted(term: Term, s: Term) -> Term:
    """The expression with another one for s."""
    if term == S:
        return s
    if not term.args or S not in term.leaves:
        return term
    return make(term.op, *[_substituted(a, s) for a in term.args])


def _renumbered(term: Term, numbers: dict[Any, int]) -> Term:
    if term.op == "load":
        return Term("load", (), numbers[term.value], term.kind)
    return Term(term.op, tuple(_renumbered(a, numbers) for a in term.args), term.value, term.kind) if term.args else term


# -- the new nodes ----------------------------------------------------------------------------------------------------


def _emit(graph: Graph, found: Found, sizes: tuple[Any, ...], final: Node) -> Node:
    call = caller(graph, final)
    plain = _library(found, sizes)
    q4, k4, v4 = products(call, found, sizes, plain is not None)
    if plain is not None:
        scale, causal = plain
        out = call(torch.nn.functional.scaled_dot_product_attention, q4, k4, v4, is_causal=causal, scale=scale)
    else:
        ops.load("attention")
        operands = [operand(call, node, axes, len(sizes), found.heads) for node, axes in found.operands]
        both = call(torch.ops.fusionc.attention.default, q4, k4, v4, operands, str(found.term))
        out = call(operator.getitem, both, 0)
    out = shaped(call, out, found, sizes, final)
    value = tensor(final)
    if value is not None and value.is_contiguous() and not _contiguous(out):
        out = call(torch.Tensor.contiguous, out)
    return out


def caller(graph: Graph, final: Node) -> Any:
    """``call(target, *args, **kwargs)``: a new node where the graph's insertion point is."""

    def call(target: Any, *args: Any, **kwargs: Any) -> Node:
        return edit.insert(graph, target, args, kwargs, origin=[final], key="example_value")

    return call


def products(call: Any, found: Found, sizes: tuple[Any, ...], repeated: bool) -> tuple[Node, Node, Node]:
    """Queries, keys and values as [B, H, rows, width]; keys and values of fewer heads stay as they are if not ``repeated``."""
    rank = len(sizes)

    def lifted(x: Node, order: tuple[int, ...] | None, keep_heads: bool) -> Node:
        """As [B, H, rows, width], batches as many as the scores have."""
        if order is not None and order != tuple(range(rank)):
            x = call(torch.permute, x, order)
        if found.heads is not None and len(shape(x) or ()) == 3 and not same((shape(x) or ())[0], 1):
            x = call(torch.unflatten, x, 0, found.heads)
        for _ in range(4 - len(shape(x) or ())):
            x = call(torch.unsqueeze, x, 0)
        have, want = shape(x) or (), [1] * (4 - rank) + list(sizes[:-2])
        if not keep_heads:
            want[1] = have[1]
        return x if same_sizes(have[:2], want) else call(torch.Tensor.expand, x, *want, -1, -1)

    first, second = found.orders
    k, v = (found.plain or (found.k, found.v)) if repeated else (found.k, found.v)
    q4 = lifted(found.q, first and first[0], True)
    k4 = lifted(k, first and first[1], repeated)
    if not found.swapped:
        k4 = call(torch.transpose, k4, -1, -2)
    v4 = lifted(v, second and second[1], repeated)
    heads = {(shape(x) or ())[1] for x in (k4, v4)}
    if len(heads) > 1:  # one of them broadcast over heads
        want = max(heads)
        k4, v4 = (x if same((shape(x) or ())[1], want) else call(torch.Tensor.expand, x, -1, want, -1, -1) for x in (k4, v4))
    return q4, k4, v4


def shaped(call: Any, out: Node, found: Found, sizes: tuple[Any, ...], final: Node) -> Node:
    """[B, H, rows, width] in the shape of the second product."""
    rank, second = len(sizes), found.orders[1]
    for _ in range(4 - rank):
        out = call(torch.squeeze, out, 0)
    if second is not None and second[2] != tuple(range(rank)):
        out = call(torch.permute, out, second[2])
    if len(shape(final) or ()) == 3 and rank == 4:
        out = call(torch.flatten, out, 0, 1)
    return out


def _library(found: Found, sizes: tuple[Any, ...]) -> tuple[float, bool] | None:
    """(scale, is_causal) where the library's attention computes exactly this."""
    band = live(found.term)
    inside = band.inside
    if inside == S:
        scale = 1.0
    elif inside.op == "mul" and inside.args[0] == S and inside.args[1].op == "const" and inside.args[1].value > 0:
        scale = float(inside.args[1].value)
    elif inside.op == "add" and any(a == const(0.0) for a in inside.args):
        return None
    else:
        return None
    if not band.bounded:
        return (scale, False) if inside == found.term else None
    # the diagonal is live in each row of a square, and scores of real models lie far above half of float16's lowest number
    causal = (band.lower, band.upper) == (None, 0) and band.fill <= -32752 and same(sizes[-2], sizes[-1])
    return (scale, True) if causal else None


def operand(call: Any, node: Node, axes: tuple[int | None, ...], rank: int, heads: tuple[Any, Any] | None) -> Node:
    """The tensor as [B|1, H|1, Q|1, K|1]."""
    if MERGED in axes:
        at = axes.index(MERGED)
        node, axes = call(torch.unflatten, node, at, heads), (*axes[:at], 0, 1, *axes[at + 1 :])
    for position in reversed(range(len(axes))):
        if axes[position] is None:
            node = call(torch.squeeze, node, position)
    kept = [a for a in axes if a is not None]
    if kept != sorted(kept):
        node = call(torch.permute, node, tuple(kept.index(a) for a in sorted(kept)))
    for axis in range(rank):
        if axis not in kept:
            node = call(torch.unsqueeze, node, axis)
    for _ in range(4 - rank):
        node = call(torch.unsqueeze, node, 0)
    return node


def _contiguous(node: Node) -> bool:
    found = tensor(node)
    return found is not None and found.is_contiguous()
