"""Which row of a weight made each element of a tensor: follows queries and keys back to their linear maps.

The row numbers are a tensor of the value's shape to which the same views are applied as to the value.  Most of its
dimensions repeat (batch, positions): they have stride 0, and stay so here, because a tensor of the real size would cost
gigabytes beside a long cache.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..graph.facts import value
from .parts import ADD, SAME, SCALE, VIEWS, Linear, Reader, Refused, op, size

_NORM = set("layer_norm rms_norm group_norm pow square mean rsqrt sqrt var norm normalize linalg_vector_norm".split())
_CLIP = {"clamp", "clamp_", "clip", "clip_"}


@dataclass
class Rows:
    """Row numbers of the linear map by element of a tensor; ``mates``: those of the rotary partner (-1: not rotated)."""

    linear: Linear
    ids: Any
    mates: Any = None
    bias: Node | None = None
    factor: float = 1.0


@dataclass(frozen=True)
class Turned:
    """A node read with its last two dimensions swapped (the keys of a plain product)."""

    node: Node

    @property
    def all_input_nodes(self) -> list[Node]:
        """As of a node."""
        return [self.node]


class Tracker:
    """Finds the ``Rows`` of nodes of one graph. ``unknown`` says what the last search without result stopped at."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.unknown = ""
        self.seen: dict[Node, Rows | None] = {}

    def rows(self, node: Any) -> Rows | None:
        """The rows that ``node`` is made of, or None where no linear map is behind it. Raises Refused for QK-norm."""
        if isinstance(node, Turned):
            inner = self.rows(node.node)
            if inner is None:
                return None
            mates = None if inner.mates is None else inner.mates.mT
            return Rows(inner.linear, inner.ids.mT, mates, inner.bias, inner.factor)
        if not isinstance(node, Node):
            return None
        if node not in self.seen:
            self.seen[node] = None
            try:
                self.seen[node] = self._of(node)
            except Refused:
                del self.seen[node]  # every asker hears the reason
                raise
        return self.seen[node]

    def _of(self, node: Node) -> Rows | None:
        linear = self.reader.linear(node)
        if linear is not None:
            shape = [size(n) for n in value(node).shape]
            return Rows(linear, torch.arange(shape[-1], dtype=torch.int32).expand(shape), None, linear.bias)
        if node.op == "placeholder":  # a cache that is written before it is read
            return self._written(node)
        if node.op not in ("call_function", "call_method"):
            return None
        name = op(node)
        parts = [(a, r) for a in node.all_input_nodes if (r := self.rows(a)) is not None]
        if not parts:
            return None
        first, rows = parts[0]
        if name.startswith("index_copy") or name in ("copy", "scatter"):
            return self._filled(node, rows if len(parts) == 1 else parts[-1][1])
        if name in SAME:
            return rows
        if name in VIEWS and len(parts) == 1 or name in ("cat", "concat", "stack"):
            return self._map(node, rows)
        if name in SCALE and len(parts) == 1:
            other = node.args[1] if node.args[0] is first else node.args[0]
            number = self.reader.number(other)
            factor = 1.0 if number is None else number if "mul" in name else 1.0 / number
            return Rows(rows.linear, rows.ids, rows.mates, rows.bias, rows.factor * factor)
        if name in ADD and len(parts) == 2 and parts[0][1].linear.node is parts[1][1].linear.node:
            a, b = (self.rows(x) for x in node.args[:2])
            if a is not None and b is not None and a.mates is None and b.mates is None:
                return Rows(a.linear, a.ids, b.ids, a.bias, a.factor)
        if name in ADD and len(parts) == 1:
            other = node.args[1] if node.args[0] is first else node.args[0]
            if other in self.reader.parameters and rows.bias is None and rows.linear.node is first:
                return Rows(rows.linear, rows.ids, rows.mates, other, rows.factor)  # type: ignore[arg-type]
        if name in _NORM:
            raise Refused(
                "QK-norm: queries or keys are normalised after their projection, which erases the scale of the weights"
            )
        if name in _CLIP:
            raise Refused("its queries or keys are clipped, which hides the scale of the weights")
        self.unknown = f"its queries or keys pass through {name}"
        return None

    def _written(self, cache: Node) -> Rows | None:
        for writer in self.reader.writers.get(cache, ()):
            for source in writer.all_input_nodes:
                if source is not cache and (rows := self.rows(source)) is not None:
                    return self._filled(cache, rows)
        return None

    def _filled(self, node: Node, rows: Rows) -> Rows | None:
        """A cache [batch, heads, length, head_dim] that new rows of the same heads were written into."""
        found = value(node)
        if not isinstance(found, Tensor) or found.dim() != rows.ids.dim() or found.dim() < 2:
            return None
        shape = [size(n) for n in found.shape]

        def fill(t: Any) -> Any:
            return None if t is None else t.narrow(0, 0, 1).narrow(-2, 0, 1).expand(*shape)

        if rows.ids.shape[-1] != shape[-1] or rows.ids.shape[1:-2] != tuple(shape)[1:-2]:
            return None
        return Rows(rows.linear, fill(rows.ids), fill(rows.mates), rows.bias, rows.factor)

    def _map(self, node: Node, rows: Rows) -> Rows | None:
        """Do to the row numbers what the node does to the values."""

        def run(pick: str) -> Any:
            def given(a: Any) -> Any:
                if isinstance(a, Node):
                    r = self.rows(a)
                    if r is None:
                        v = value(a)
                        if isinstance(v, Tensor):
                            return _blank([size(n) for n in v.shape])
                        return size(v) if isinstance(v, torch.SymInt) else v
                    t = r.ids if pick == "ids" else r.mates
                    return tree(lambda x: _blank(x.shape), r.ids) if t is None else t
                if isinstance(a, (list, tuple)):
                    parts = [given(x) for x in a]
                    return tuple(parts) if isinstance(a, tuple) else parts
                if isinstance(a, slice):
                    return slice(given(a.start), given(a.stop), given(a.step))
                return a

            return _run(node, [given(a) for a in node.args], {k: given(v) for k, v in node.kwargs.items()})

        try:
            ids = run("ids")
            paired = any(r.mates is not None for a in node.all_input_nodes if (r := self.rows(a)) is not None)
            mates = run("mates") if paired else None
        except (TypeError, ValueError, RuntimeError, IndexError) as e:
            raise Refused(f"its queries or keys cannot be followed through {op(node)} ({type(e).__name__})") from None
        return Rows(rows.linear, ids, mates, rows.bias, rows.factor)


def _blank(shape: Any) -> Tensor:
    return torch.tensor(-1, dtype=torch.int32).expand(tuple(shape))


def tree(f: Any, x: Any) -> Any:
    """``f`` of every tensor of a tuple or list, or of the tensor."""
    return type(x)(tree(f, y) for y in x) if isinstance(x, (list, tuple)) else f(x)


# -- views that leave repeated dimensions repeated --------------------------------------------------------------------


def _run(node: Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """The node's call on row numbers; those calls that would copy a repeated dimension are done here."""
    name, x = op(node), args[0] if args else None
    if isinstance(x, Tensor) and not kwargs:
        if name == "contiguous":
            return x
        if name in ("view", "reshape") and not any(isinstance(a, torch.dtype) for a in args[1:]):
            shape = args[1:] if len(args) != 2 or isinstance(args[1], int) else list(args[1])
            return reshaped(x, shape)
        if name in ("view_as", "reshape_as"):
            return reshaped(x, args[1].shape)
        if name == "flatten":
            start, end = (*args[1:], 0, -1)[:2] if len(args) > 1 else (0, -1)
            end = args[2] if len(args) > 2 else -1
            start, end = start % x.dim(), end % x.dim()
            return reshaped(x, [*x.shape[:start], math.prod(x.shape[start : end + 1]), *x.shape[end + 1 :]])
    if name == "repeat_interleave" and isinstance(x, Tensor):
        given = dict(zip(("repeats", "dim"), args[1:])) | kwargs
        if isinstance(given.get("repeats"), int) and isinstance(given.get("dim"), int):
            n, dim = given["repeats"], given["dim"] % x.dim()
            wide = x.unsqueeze(dim + 1).expand(*x.shape[: dim + 1], n, *x.shape[dim + 1 :])
            return reshaped(wide, [*x.shape[:dim], x.shape[dim] * n, *x.shape[dim + 1 :]])
    if name in ("cat", "concat") and isinstance(x, (list, tuple)) and all(isinstance(t, Tensor) and t.dim() for t in x):
        dim = kwargs.get("dim", args[1] if len(args) > 1 else 0) % x[0].dim()
        if all(t.dim() == x[0].dim() for t in x):
            return _cat(list(x), dim)
    if node.op == "call_method":
        return getattr(x, str(node.target))(*args[1:], **kwargs)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _cat(parts: list[Tensor], dim: int) -> Tensor:
    repeated = [d for d in range(parts[0].dim()) if d != dim and parts[0].shape[d] > 1
                and all(p.stride(d) == 0 and p.shape[d] == parts[0].shape[d] for p in parts)]  # fmt: skip
    small = parts
    for d in repeated:
        small = [p.narrow(d, 0, 1) for p in small]
    joined = torch.cat(small, dim)
    return joined.expand(*(parts[0].shape[d] if d in repeated else n for d, n in enumerate(joined.shape)))


def reshaped(x: Tensor, shape: Any) -> Tensor:
    """``x.reshape(shape)`` in which dimensions that repeat (stride 0) go on repeating instead of being written out."""
    wanted = [int(n) for n in shape]
    if -1 in wanted:
        rest = -math.prod(wanted)
        if rest == 0 or x.numel() % rest:
            raise ValueError("sizes do not fit")
        wanted[wanted.index(-1)] = x.numel() // rest
    if math.prod(wanted) != x.numel():
        raise ValueError("sizes do not fit")
    if x.numel() == 0:
        return x.reshape(wanted)
    small, middle = x, []
    i = j = 0
    while i < x.dim() or j < len(wanted):  # blocks of dimensions with equal products
        old, new = [], []
        a = b = 1
        while True:
            if i < x.dim() and (a <= b or j == len(wanted)):
                a *= x.shape[i]
                old.append(i)
                i += 1
            elif j < len(wanted):
                b *= wanted[j]
                new.append(j)
                j += 1
            if a == b:
                break
        repeats = all(x.stride(d) == 0 or x.shape[d] == 1 for d in old)
        for d in old:
            small = small.narrow(d, 0, 1) if repeats else small
        middle += [1 if repeats else wanted[d] for d in new]
    return small.reshape(middle).expand(wanted)


__all__ = ["Rows", "Tracker", "Turned", "reshaped", "tree"]
