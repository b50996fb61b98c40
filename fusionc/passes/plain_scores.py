"""Reads the operators between two products of Dynamo's graph into a score expression (``ops/score.py``).

Spellings are many (functions, methods, operators, in place or not); each operator has one name here. What does not depend
on the scores is folded into the expression if it is made of positions (``arange``, ``triu`` …) or varies with query and
key; other tensors are operands, computed outside as they were. In-place operators on the scores are followed in order.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Node

from ..graph.facts import Facts, dtype, same, same_sizes, shape, tensor, value
from ..ops.score import INF, K, Q, Term, Unsupported, as_bool, as_float, const, load, make

NAMES = {
    "add": "add", "iadd": "add", "sub": "sub", "subtract": "sub", "isub": "sub", "rsub": "rsub", "mul": "mul", "imul": "mul",
    "multiply": "mul", "div": "div", "truediv": "div", "itruediv": "div", "divide": "div", "true_divide": "div",
    "neg": "neg", "negative": "neg", "abs": "abs", "absolute": "abs", "minimum": "min", "maximum": "max",
    "clamp": "clamp", "clip": "clamp", "tanh": "tanh", "exp": "exp", "log": "log", "log1p": "log1p", "sqrt": "sqrt",
    "sigmoid": "sigmoid", "square": "square", "pow": "pow", "where": "where", "masked_fill": "masked_fill", "lt": "lt",
    "less": "lt", "le": "le", "less_equal": "le", "gt": "gt", "greater": "gt", "ge": "ge", "greater_equal": "ge",
    "eq": "eq", "ne": "ne", "not_equal": "ne", "and_": "and", "iand": "and", "bitwise_and": "and", "logical_and": "and",
    "or_": "or", "ior": "or", "bitwise_or": "or", "logical_or": "or", "invert": "not", "inv": "not", "bitwise_not": "not",
    "logical_not": "not", "floordiv": "fdiv", "floor_divide": "fdiv", "mod": "mod", "remainder": "mod", "clamp_min": "clamp_min",
    "clamp_max": "clamp_max",
}  # fmt: skip
_CASTS = ("to", "float", "half", "bfloat16", "double", "type", "type_as", "bool", "int", "long")
_SAME = ("contiguous", "clone")
_MADE = {"zeros": 0, "ones": 1, "zeros_like": 0, "ones_like": 1, "new_zeros": 0, "new_ones": 1}
_FILLED = {"full": 1, "full_like": 1, "new_full": 2, "tensor": 0}
_HOMES = ("torch", "torch.nn.functional", "_operator", "builtins", "torch.functional", "torch._C._nn", "torch._C")
_DEPTH = 48

Axes = tuple[int | None, ...]


def name_of(node: Node, plain: bool = True) -> str:
    """One name for all spellings of torch's operators ("" for other things); with ``plain``, in-place ones too."""
    if node.op == "call_method":
        name = str(node.target)
    elif node.op == "call_function":
        target = node.target
        if target in (builtins.getattr, getattr) and len(node.args) == 2:
            return str(node.args[1])
        name = getattr(target, "__name__", "")
        if (getattr(target, "__module__", None) or "torch") not in _HOMES:
            return ""
    else:
        return ""
    if not plain:
        return name
    if name.endswith("_") and not name.endswith("__") and name not in NAMES:
        name = name[:-1]
    return NAMES.get(name) or name


def argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    """A positional or named argument."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def number(x: Any) -> float | int | None:
    """A plain number, else None."""
    return x if isinstance(x, (int, float)) and not isinstance(x, bool) else None


MERGED = -1  # the axis of a dimension that holds batch and head together
OUTER, INNER = -2, -3  # the axes of two dimensions that hold the batch, b // n and b % n (Swin: image, window of the image)


class Reader:
    """Reads one chain. ``operands`` are the tensors that are loaded, each with the score axis of each of its dimensions;
    ``consumed`` are the nodes that depend on the scores, ``folded`` others that became part of the expression."""

    def __init__(self, facts: Facts, product: Node, final: Node):
        self.facts, self.product, self.final = facts, product, final
        self.operands: list[tuple[Node, Axes]] = []
        self.read_at: list[Node] = []  # who reads each operand
        self.consumed: list[Node] = []
        self.folded: list[Node] = []
        self.raw: Term | None = None
        self.tainted = self._descendants(product)
        self.rank = len(shape(product) or ())
        self.heads: tuple[Any, Any] | None = None  # batch and heads, where some tensors hold them in one dimension
        if self.rank == 3:
            rows = (shape(product) or ())[1:]
            split = [shape(n) or () for n in self.tainted if len(shape(n) or ()) == 4]
            if split and same_sizes(split[0][2:], rows):
                self.rank, self.heads = 4, split[0][:2]
        self._memo: dict[tuple[Node, Axes, bool], Term] = {}
        self._path: list[Node] = []
        self._count = 0

    def _descendants(self, node: Node) -> set[Node]:
        found, stack = {node}, [node]
        while stack:
            for user in stack.pop().users:
                if user not in found and user is not self.final:
                    found.add(user)
                    stack.append(user)
        return found

    def scores(self, node: Node, at: Node, raw: Term) -> Term:
        """The expression of what the softmax ``at`` reads; ``raw`` is the first product's."""
        self.raw = raw
        self._path.append(at)
        found = self.read(self._current(node, at), self.own_axes(node))
        if self.product not in self.consumed:
            raise Unsupported("the scores are no product of two tensors")
        return found

    def own_axes(self, node: Node) -> Axes:
        """The axes of scores."""
        rank = len(shape(node) or ())
        return (MERGED, 2, 3) if rank == 3 and self.rank == 4 else tuple(range(rank))

    def canonical(self, sizes: Sequence[Any]) -> tuple[Any, ...]:
        """Sizes of scores, queries or values with batch and heads apart."""
        return (*self.heads, *sizes[1:]) if self.heads is not None and len(sizes) == 3 else tuple(sizes)

    def aligned(self, node: Node, like: Node) -> Term:
        """A tensor that is broadcast against the product."""
        self._path.append(like)
        return self.argument(like, node, self.own_axes(like), False)

    # -- values
    def read(self, node: Any, axes: Axes, pure: bool = False) -> Term:
        """The node's element at the current place. ``pure``: made of positions and numbers only. Raises Unsupported."""
        if not isinstance(node, Node):
            if isinstance(node, (bool, int, float)):
                return const(node)
            raise Unsupported(f"a {type(node).__name__} among the scores is not understood")
        if not isinstance(value(node), torch.Tensor):
            raise Unsupported(f"{node.name} is a number that is not known before the call")
        key = (node, axes, pure)
        found = self._memo.get(key)
        if found is None:
            self._count += 1
            if len(self._path) > _DEPTH or self._count > 1000:
                raise Unsupported("the chain of operators is too long")
            found = self._read(node, axes, pure)
            if not self.facts.writers:  # else what a node holds depends on who reads it
                self._memo[key] = found
        return found

    def _read(self, node: Node, axes: Axes, pure: bool) -> Term:
        if node in self.tainted:
            if node is self.product:
                if any(a != b and not same(n, 1) for a, b, n in zip(axes, self.own_axes(node), shape(node) or (), strict=True)):
                    raise Unsupported("the scores are read transposed or reshaped")
                self.consumed.append(node)
                assert self.raw is not None
                return self.raw
            found = self._within(node, axes, pure)
            self.consumed.append(node)
            return found
        if pure:
            return self._within(node, axes, True)
        both = {self.rank - 2, self.rank - 1} <= set(axes)
        try:
            return self._within(node, axes, not both)
        except Unsupported:
            return self._operand(node, axes)

    def _within(self, node: Node, axes: Axes, pure: bool) -> Term:
        self._path.append(node)
        try:
            found = self._operator(node, axes, pure)
        finally:
            self._path.pop()
        if node not in self.tainted:
            self.folded.append(node)
        return found

    def _operand(self, node: Node, axes: Axes) -> Term:
        kind = tensor(node)
        if kind is None or kind.dtype.is_complex or kind.layout != torch.strided or kind.device != self._device():
            raise Unsupported(f"{node.name} is not an ordinary tensor on the scores' device")
        known = [a for a in axes if a is not None]
        if len(known) != len(set(known)):
            raise Unsupported(f"{node.name} is read along a diagonal")
        if self.heads is not None and any(a in (0, 1) and not same(n, self.heads[a])
                                          for n, a in zip(kind.shape, axes, strict=True)):  # fmt: skip
            raise Unsupported(f"{node.name} splits batches and heads otherwise than the scores")
        letter = "f" if kind.dtype.is_floating_point else "b" if kind.dtype == torch.bool else "i"
        for i, (known_node, known_axes) in enumerate(self.operands):
            if known_node is node and known_axes == axes and not self.facts.writers:
                return load(i, letter)
        self.operands.append((node, axes))
        self.read_at.append(self._path[-1])
        return load(len(self.operands) - 1, letter)

    def _device(self) -> Any:
        found = tensor(self.product)
        return None if found is None else found.device

    # -- memory
    def _current(self, node: Node, at: Node) -> Node:
        """The node that made the value which ``at`` reads through ``node``: the last in-place operator between."""
        if not self.facts.writers:
            return node
        latest = node
        for root in self.facts.roots(node):
            for writer in self.facts.writers.get(root, ()):
                if latest < writer < at:
                    if _base(writer) is not _base(node):
                        raise Unsupported(f"{writer.name} writes part of {node.name}")
                    latest = writer
        return latest

    def unwritten(self, node: Node, first: Node, last: Node) -> None:
        """Raise if the tensor changes between its use at ``first`` and ``last``, where the kernel reads it."""
        if not self.facts.writers:
            return
        for root in self.facts.roots(node):
            for writer in self.facts.writers.get(root, ()):
                if first < writer < last:
                    raise Unsupported(f"{writer.name} writes {node.name} before the values are read")

    # -- operators
    def _operator(self, node: Node, axes: Axes, pure: bool) -> Term:
        if node.op not in ("call_function", "call_method"):
            raise Unsupported(f"{node.name} is an input")
        name = name_of(node)
        if name in VIEWS:
            source = argument(node, 0, "input")
            return self.read(self._current(source, node), VIEWS[name](node, axes), pure)
        kind = dtype(node)
        assert kind is not None
        if name == "arange":
            return self._arange(node, axes)
        if name in _MADE or name in _FILLED:
            filled = _MADE[name] if name in _MADE else number(argument(node, _FILLED[name], "fill_value"))
            if filled is None:
                raise Unsupported(f"{node.name} is filled with something unknown")
            return _ranged(_cast(const(filled), kind), kind)
        if name in ("triu", "tril"):
            return self._triangle(node, axes, pure, name)
        if name in _CASTS or name in _SAME:
            return _ranged(_cast(self.argument(node, argument(node, 0, "input"), axes, pure), kind), kind)
        if name not in set(NAMES.values()) - {""}:
            raise Unsupported(f"operator {name or node.target} is not understood among the scores")
        return _ranged(_cast(self._pointwise(node, name, axes, pure), kind), kind)

    def argument(self, node: Node, x: Any, axes: Axes, pure: bool) -> Term:
        """An argument of an elementwise operator, broadcast."""
        if isinstance(x, Node) and isinstance(value(x), torch.Tensor):
            try:
                x = self._current(x, node)
            except Unsupported:
                if x in self.tainted or pure:
                    raise
                return self._operand(x, self._axes_of(x, axes))
            return self.read(x, self._axes_of(x, axes), pure)
        return self.read(x, axes, pure)

    def _axes_of(self, node: Node, axes: Axes) -> Axes:
        sizes = shape(node) or ()
        return tuple(None if same(n, 1) else a for n, a in zip(sizes, axes[len(axes) - len(sizes) :], strict=True))

    def _pointwise(self, node: Node, name: str, axes: Axes, pure: bool) -> Term:
        extra = {k: v for k, v in node.kwargs.items() if k not in ("input", "other", "min", "max", "mask", "value", "exponent",
                                                                   "self", "condition", "rounding_mode", "inplace")}  # fmt: skip
        if extra.pop("alpha", 1) != 1 or extra:
            raise Unsupported(f"{node.name} has options that are not understood")

        def given(position: int, *names: str) -> Any:
            if len(node.args) > position:
                return node.args[position]
            return next((node.kwargs[n] for n in names if n in node.kwargs), None)

        def read(x: Any) -> Term:
            return self.argument(node, x, axes, pure)

        if name == "where":
            c, a, b = given(0, "condition"), given(1, "input", "self"), given(2, "other")
            return make("where", read(c), read(a), read(b))
        x = read(given(0, "input", "self"))
        if name == "masked_fill":
            return make("where", read(given(1, "mask")), read(given(2, "value")), x)
        if name in ("clamp", "clamp_min", "clamp_max"):
            low = given(1, "min") if name != "clamp_max" else None
            high = given(2, "max") if name == "clamp" else given(1, "max") if name == "clamp_max" else None
            x = make("max", x, read(low)) if low is not None else x
            return make("min", x, read(high)) if high is not None else x
        if name == "log1p":
            return make("log", make("add", const(1.0), as_float(x)))
        if name in ("neg", "abs", "tanh", "exp", "log", "sqrt", "sigmoid", "not"):
            return make(name, x)
        if name == "square":
            return make("mul", x, x)
        y = given(1, "other", "exponent")
        if name == "pow":
            return _power(x, number(y))
        other = read(y)
        if name in ("and", "or") and not x.kind == other.kind == "b":
            raise Unsupported("bits of integers")
        if name == "rsub":
            return make("sub", other, x)
        if name == "div" and node.kwargs.get("rounding_mode") is not None:
            if node.kwargs["rounding_mode"] != "floor" or not x.kind == other.kind == "i":
                raise Unsupported("a rounded division")
            return make("fdiv", x, other)
        return make(name, x, other)

    def _arange(self, node: Node, axes: Axes) -> Term:
        given = [*node.args] or [node.kwargs.get("start", 0), node.kwargs.get("end"), node.kwargs.get("step", 1)]
        start, step = (0, 1) if len(given) == 1 else (number(given[0]), number(given[2]) if len(given) > 2 else 1)
        if len(given) == 1 and "start" in node.kwargs:
            start = number(node.kwargs["start"])
        if type(start) is not int or type(step) is not int:
            raise Unsupported("positions that do not start and step by whole numbers")
        (axis,) = axes
        if axis is None:
            return _cast(const(start), dtype(node))
        if axis < self.rank - 2:
            raise Unsupported("positions of batches or heads")
        position = Q if axis == self.rank - 2 else K
        return _cast(make("add", make("mul", position, const(step)), const(start)), dtype(node))

    def _triangle(self, node: Node, axes: Axes, pure: bool, name: str) -> Term:
        source, diagonal = argument(node, 0, "input"), argument(node, 1, "diagonal", 0)
        if type(diagonal) is not int or len(axes) < 2 or any(a is not None and a < self.rank - 2 for a in axes[-2:]):
            raise Unsupported("a triangle that is not over queries and keys")
        row, column = (const(0) if a is None else Q if a == self.rank - 2 else K for a in axes[-2:])
        offset = make("sub", column, row)
        kept = make("ge" if name == "triu" else "le", offset, const(diagonal))
        x = self.argument(node, source, axes, pure)
        return make("where", kept, x, {"f": const(0.0), "i": const(0), "b": const(False)}[x.kind])


def _cast(x: Term, kind: torch.dtype | None) -> Term:
    """The value as of this dtype; float types are one."""
    assert kind is not None
    if kind.is_floating_point:
        return as_float(x)
    if kind == torch.bool:
        return as_bool(x)
    if x.kind == "f" or kind.is_complex or kind.itemsize < 4:
        raise Unsupported("scores or positions rounded to integers")
    return x if x.kind == "i" else make("add", make("where", x, const(1), const(0)), const(0))


def _ranged(x: Term, kind: torch.dtype) -> Term:
    """Raises Unsupported for a number that is infinite in this dtype but not as written."""
    if kind.is_floating_point:
        parts = x.args[1:] if x.op == "where" else (x,)
        if any(p.op == "const" and abs(p.value) != INF and abs(p.value) > torch.finfo(kind).max for p in parts):
            raise Unsupported(f"a number overflows in {kind}")
    return x


def _power(x: Term, exponent: float | int | None) -> Term:
    if exponent == 2:
        return make("mul", x, x)
    if exponent == 0.5:
        return make("sqrt", x)
    if exponent == -0.5:
        return make("div", const(1.0), make("sqrt", x))
    raise Unsupported("a power that is not understood")


def _base(node: Node) -> Node:
    """The node whose tensor this one is, through in-place operators."""
    while node.op in ("call_function", "call_method") and node.args and isinstance(node.args[0], Node):
        name = name_of(node, False)
        if not ((name.endswith("_") and not name.endswith("__") and name not in NAMES) or name in
                ("iadd", "isub", "imul", "itruediv", "iand", "ior")):  # fmt: skip
            break
        node = node.args[0]
    return node


# -- views: axes of the result to axes of the input ---------------------------------------------------------------------


def _sizes(node: Node) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    source = argument(node, 0, "input")
    return (shape(source) or ()) if isinstance(source, Node) else (), shape(node) or ()


def _by_ones(node: Node, axes: Axes) -> Axes:
    """unsqueeze, squeeze, view, reshape: only axes of size 1 come and go."""
    before, after = _sizes(node)
    if MERGED in axes and axes.index(MERGED) == 0 and len(before) == len(after) + 1 and same_sizes(before[2:], after[1:]):
        return (0, 1, *axes[1:])
    if axes[:2] == (0, 1) and len(before) == len(after) - 1 and same_sizes(before[1:], after[2:]):
        return (MERGED, *axes[2:])
    if axes[:1] == (0,) and (len(before), len(after)) == (5, 4) and _parts(before, after):
        return (OUTER, INNER, *(None if same(n, 1) else a for n, a in zip(before[2:], axes[1:])))
    if axes[:2] == (OUTER, INNER) and (len(before), len(after)) == (4, 5) and _parts(after, before):
        return (0, *axes[2:])
    kept = [(n, a) for n, a in zip(after, axes) if not same(n, 1)]
    wanted = [n for n in before if not same(n, 1)]
    if len(kept) != len(wanted) or not all(same(n, m) for (n, _), m in zip(kept, wanted)):
        raise Unsupported(f"{node.name} reshapes")
    rest = iter(kept)
    return tuple(None if same(n, 1) else next(rest)[1] for n in before)


def _parts(five: tuple[Any, ...], four: tuple[Any, ...]) -> bool:
    """The first two of five dimensions, neither of size 1, are the first of four."""
    outer, inner = five[:2]
    return all(isinstance(n, int) and n > 1 for n in five[:2]) and same(outer * inner, four[0]) and same_sizes(five[2:], four[1:])


def _by_index(node: Node, axes: Axes) -> Axes:
    given = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    before, _ = _sizes(node)
    count = sum(1 for g in given if g is not None and g is not Ellipsis)
    out: list[int | None] = []
    position = 0
    for g in given:
        if g is None:
            position += 1
        elif g is Ellipsis:
            for _ in range(len(before) - count):
                out.append(axes[position])
                position += 1
        elif isinstance(g, slice) and g.step in (None, 1) and g.start in (None, 0) and \
                (g.stop is None or same(shape(node)[position], before[len(out)])):  # type: ignore[index]
            out.append(axes[position])
            position += 1
        else:
            raise Unsupported(f"{node.name} takes a part")
    out.extend(axes[position:])
    return tuple(None if same(n, 1) else a for n, a in zip(before, out, strict=True))


def _by_expand(node: Node, axes: Axes) -> Axes:
    before, after = _sizes(node)
    tail = axes[len(after) - len(before) :]
    return tuple(None if same(n, 1) else a for n, a in zip(before, tail, strict=True))


def _by_swap(node: Node, axes: Axes) -> Axes:
    rank = len(axes)
    name = name_of(node)
    if name in ("mT", "T", "t"):
        if rank < 2 or (rank != 2 and name != "mT"):
            raise Unsupported(f"{node.name} reorders axes")
        i, j = rank - 2, rank - 1
    else:
        dims = [argument(node, n, f"dim{n - 1}") for n in (1, 2)]
        if not all(type(d) is int for d in dims):
            raise Unsupported(f"{node.name} reorders axes")
        i, j = (d % rank for d in dims)
    out = list(axes)
    out[i], out[j] = out[j], out[i]
    return tuple(out)


def _by_permute(node: Node, axes: Axes) -> Axes:
    given = argument(node, 1, "dims")
    order = given if isinstance(given, (list, tuple)) else node.args[1:]
    if not all(type(d) is int for d in order):
        raise Unsupported(f"{node.name} reorders axes")
    out: list[int | None] = [None] * len(axes)
    for position, d in enumerate(order):
        out[d % len(axes)] = axes[position]
    return tuple(out)


VIEWS: dict[str, Callable[[Node, Axes], Axes]] = {
    **dict.fromkeys(("unsqueeze", "squeeze", "view", "reshape"), _by_ones),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), _by_expand),
    **dict.fromkeys(("transpose", "swapaxes", "swapdims", "mT", "T", "t"), _by_swap),
    "getitem": _by_index,
    "permute": _by_permute,
}
