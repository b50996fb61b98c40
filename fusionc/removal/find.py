"""Attention sublayers of a torch-level (Dynamo) graph, found by what is computed and not by anybody's class names.

A core is a call of scaled_dot_product_attention, or a softmax whose result is multiplied by values.  From its queries and
keys the walk goes back to the linear maps that made them, carrying for every element the number of the weight row that it
came from: that tells fused and separate q/k/v apart, finds shared heads, and, where rotary embedding adds a row and its
mate, how they pair.  From its result the walk goes forward to the addition into the residual stream.  Whatever does not
fit is a sublayer with a ``refusal``, which says why.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..graph.facts import nodes_of, tensor, value, written_by
from .scores import Coupling, Projection

_VIEWS = set("tensor_split view reshape transpose permute contiguous expand unsqueeze squeeze flatten unflatten split chunk "
            "narrow getitem "
             "broadcast_to movedim swapaxes unbind repeat_interleave t mT T view_as reshape_as expand_as".split())  # fmt: skip
_SAME = set("to float half bfloat16 double type type_as clone neg dropout detach identity".split())
_SCALE = {"mul", "truediv", "div", "multiply", "divide"}
_ADD = {"add", "sub", "iadd", "add_", "isub"}
_NORM = set("layer_norm rms_norm group_norm pow square mean rsqrt sqrt var norm normalize linalg_vector_norm".split())
_NORM_PARTS = (
    _NORM | _SCALE | {"add", "sub", "to", "float", "type_as", "reciprocal", "rsub", "view", "reshape", "dropout"}
)
_SCORES = set("mul truediv div imul itruediv div_ mul_ add iadd add_ sub masked_fill masked_fill_ where view reshape to float "
              "type_as contiguous tanh clamp max maximum".split())  # fmt: skip
_PRODUCT = {"matmul", "bmm", "baddbmm"}


class Refused(Exception):
    """Why a sublayer cannot be ranked or removed."""


def op(node: Node) -> str:
    """The last part of the called name (method, operator or torch function); "" for other nodes."""
    if node.op == "call_method":
        return str(node.target)
    if node.op != "call_function":
        return ""
    if node.target is getattr:
        return str(node.args[1])
    return str(getattr(node.target, "__name__", "")).removeprefix("_").rstrip("_") or str(node.target)


@dataclass(frozen=True)
class Linear:
    """A linear map in the graph: ``weight`` and ``bias`` are placeholders, ``turned`` if the weight is stored in × out."""

    node: Node
    source: Node
    weight: Node
    bias: Node | None
    turned: bool


@dataclass
class Rows:
    """Row numbers of the linear map by element of a tensor; ``mates``: those of the rotary partner (-1: not rotated)."""

    linear: Linear
    ids: Any
    mates: Any = None
    bias: Node | None = None
    factor: float = 1.0


@dataclass
class Sublayer:
    """One attention sublayer. ``add`` is the node that adds ``out`` to ``keep``; ``residual`` the stream it reads."""

    index: int
    core: Node
    out: Node | None = None
    add: Node | None = None
    keep: Node | None = None
    residual: Node | None = None
    output: Linear | None = None
    queries: Rows | None = None
    keys: Rows | None = None
    scale: float = 1.0
    gain: Tensor | None = None
    shift: Tensor | None = None
    refusal: str = ""  # it cannot be removed
    unranked: str = ""  # it cannot be scored from the weights
    weights: list[Node] = field(default_factory=list)


class Finder:
    """All sublayers of one graph. ``real``: placeholder → real value; ``parameters``: placeholders that are weights."""

    def __init__(self, gm: GraphModule, real: Mapping[Node, Any], parameters: set[Node]) -> None:
        self.gm, self.real, self.parameters = gm, real, parameters
        self.order = {n: i for i, n in enumerate(gm.graph.nodes)}
        self.writers: dict[Node, list[Node]] = {}
        for n in gm.graph.nodes:
            for w in written_by(n):
                self.writers.setdefault(w, []).append(n)

    def cores(self) -> Iterator[Node]:
        """Attention calls, and softmaxes whose result meets values, in execution order."""
        for n in self.gm.graph.nodes:
            if op(n).startswith("scaled_dot_product_attention") or op(n) == "softmax" and self._values(n) is not None:
                yield n

    def sublayers(self) -> list[Sublayer]:
        """Every core as a sublayer; those that cannot be handled carry the reason."""
        found = []
        for index, core in enumerate(self.cores()):
            s = Sublayer(index, core)
            try:
                self._projections(s)
                self._output(s)
                self._stream(s)
            except Refused as e:
                s.refusal = str(e)
            found.append(s)
        return found

    # -- what comes in ------------------------------------------------------------------------------------------------
    def _projections(self, s: Sublayer) -> None:
        q, k, s.scale = self._inputs(s.core)
        self.unknown = ""
        queries, keys = self._rows(q, {}), self._rows(k, {})
        if self.unknown and (queries is None or keys is None):
            raise Refused(self.unknown)
        if queries is None or keys is None:
            raise Refused("its queries or keys come from no linear map of the graph")
        s.scale *= queries.factor * keys.factor
        s.queries, s.keys = queries, keys
        s.weights = list(dict.fromkeys([queries.linear.weight, keys.linear.weight]))
        if self._plain(queries.linear.source) is not self._plain(keys.linear.source):
            raise Refused("cross-attention: queries and keys are made of different tensors")

    def _inputs(self, core: Node) -> tuple[Node, Node, float]:
        if op(core).startswith("scaled"):
            given = dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale"), core.args))
            given.update(core.kwargs)
            scale = given.get("scale")
            if given.get("dropout_p"):
                raise Refused("attention drops probabilities out: it is in training mode")
            shape = getattr(tensor(given["query"]), "shape", None)
            if scale is None and shape is None:
                raise Refused("the head dimension is unknown")
            return given["query"], given["key"], _real(scale if scale is not None else _size(shape[-1]) ** -0.5)  # type: ignore[index]
        node, scale = core.args[0], 1.0
        while isinstance(node, Node) and op(node) not in _PRODUCT:
            if op(node) not in _SCORES:
                raise Refused(f"its scores pass through {op(node) or node.op}")
            operands = [a for a in nodes_of(node.args[:3]) if a.op != "placeholder" and self._scores_below(a)]
            if len(operands) != 1:
                raise Refused("its scores are no single product")
            number = self._number(node.args[1]) if len(node.args) > 1 else None
            if number is not None and op(node).strip("_").removeprefix("i") in _SCALE:
                scale = scale / number if "div" in op(node) else scale * number
            node = operands[0]
        if not isinstance(node, Node):
            raise Refused("its scores are no single product")
        args = node.args[1:3] if op(node) == "baddbmm" else node.args[:2]
        if op(node) == "baddbmm":
            scale *= float(node.kwargs.get("alpha", 1.0))  # type: ignore[arg-type]
        key = args[1]
        while isinstance(key, Node) and op(key) in ("contiguous",):
            key = key.args[0]
        if not (isinstance(args[0], Node) and isinstance(key, Node)):
            raise Refused("its scores are no single product")
        if op(key) in ("transpose", "mT", "permute", "swapaxes", "t") and tensor(key) is not None:
            inner = key.args[0]
            a, b = tensor(inner), tensor(key)
            if a is not None and b is not None and a.dim() == b.dim() and _size(a.shape[-1]) == _size(b.shape[-2]) \
                    and (op(key) != "permute" or a.dim() == 3):  # fmt: skip
                return args[0], inner, scale  # type: ignore[return-value]
        return args[0], _Turned(key), scale  # type: ignore[return-value]

    def _scores_below(self, node: Node, depth: int = 12) -> bool:
        if op(node) in _PRODUCT:
            return not self._is_linear(node)
        return (
            depth > 0 and op(node) in _SCORES and any(self._scores_below(a, depth - 1) for a in nodes_of(node.args[:3]))
        )

    def _number(self, a: Any) -> float | None:
        if isinstance(a, (int, float)) and not isinstance(a, bool):
            return float(a)
        if isinstance(a, Node):
            if isinstance(value(a), (torch.SymFloat, torch.SymInt)):
                return _real(a)
            found = self._constant(a)
            if found is not None and found.numel() == 1:
                return float(found)
        return None

    def _rows(self, node: Any, seen: dict[Node, Rows | None]) -> Rows | None:
        """The rows that ``node`` is made of, or None where no linear map is behind it. Raises Refused for QK-norm."""
        if isinstance(node, _Turned):
            inner = self._rows(node.node, seen)
            if inner is None:
                return None
            mates = None if inner.mates is None else inner.mates.mT
            return Rows(inner.linear, inner.ids.mT, mates, inner.bias, inner.factor)
        if not isinstance(node, Node):
            return None
        if node not in seen:
            seen[node] = None
            seen[node] = self._rows_of(node, seen)
        return seen[node]

    def _rows_of(self, node: Node, seen: dict[Node, Rows | None]) -> Rows | None:
        linear = self._is_linear(node)
        if linear is not None:
            shape = [_size(n) for n in value(node).shape]
            return Rows(linear, torch.arange(shape[-1], dtype=torch.int32).expand(shape), None, linear.bias)
        if node.op == "placeholder":  # a cache that is written before it is read
            return self._written(node, seen)
        if node.op not in ("call_function", "call_method"):
            return None
        name = op(node)
        parts = [(a, r) for a in node.all_input_nodes if (r := self._rows(a, seen)) is not None]
        if not parts:
            return None
        first, rows = parts[0]
        if name.startswith("index_copy") or name in ("copy", "scatter"):
            return self._filled(node, rows if len(parts) == 1 else parts[-1][1])
        if name in _SAME:
            return rows
        if name in _VIEWS and len(parts) == 1:
            return self._map(node, rows, seen)
        if name in ("cat", "concat", "stack"):
            return self._map(node, rows, seen)
        if name in _SCALE and len(parts) == 1:
            other = node.args[1] if node.args[0] is first else node.args[0]
            number = self._number(other)
            factor = 1.0 if number is None else number if "mul" in name else 1.0 / number
            return Rows(rows.linear, rows.ids, rows.mates, rows.bias, rows.factor * factor)
        if name in _ADD and len(parts) == 2 and parts[0][1].linear.node is parts[1][1].linear.node:
            a, b = (self._rows(x, seen) for x in node.args[:2])
            if a is not None and b is not None and a.mates is None and b.mates is None:
                return Rows(a.linear, a.ids, b.ids, a.bias, a.factor)
        if name in _ADD and len(parts) == 1:
            other = node.args[1] if node.args[0] is first else node.args[0]
            if other in self.parameters and rows.bias is None and rows.linear.node is first:
                return Rows(rows.linear, rows.ids, rows.mates, other, rows.factor)  # type: ignore[arg-type]
        if name in _NORM:
            raise Refused(
                "QK-norm: queries or keys are normalised after their projection, which erases the scale of the weights"
            )
        self.unknown = f"its queries or keys pass through {name}"
        return None

    def _written(self, cache: Node, seen: dict[Node, Rows | None]) -> Rows | None:
        for writer in self.writers.get(cache, ()):
            for source in writer.all_input_nodes:
                if source is not cache and (rows := self._rows(source, seen)) is not None:
                    return self._filled(cache, rows)
        return None

    def _filled(self, node: Node, rows: Rows) -> Rows | None:
        """A cache [batch, heads, length, head_dim] that new rows of the same heads were written into."""
        found = value(node)
        if not isinstance(found, Tensor) or found.dim() != rows.ids.dim() or found.dim() < 2:
            return None
        shape = [_size(n) for n in found.shape]

        def fill(t: Any) -> Any:
            return None if t is None else t.narrow(0, 0, 1).narrow(-2, 0, 1).expand(*shape)

        if rows.ids.shape[-1] != shape[-1] or rows.ids.shape[1:-2] != tuple(shape)[1:-2]:
            return None
        return Rows(rows.linear, fill(rows.ids), fill(rows.mates), rows.bias, rows.factor)

    def _map(self, node: Node, rows: Rows, seen: dict[Node, Rows | None]) -> Rows | None:
        """Do to the row numbers what the node does to the values."""

        def run(pick: str) -> Any:
            def given(a: Any) -> Any:
                if isinstance(a, Node):
                    r = self._rows(a, seen)
                    if r is None:
                        v = value(a)
                        if isinstance(v, Tensor):
                            return torch.full([_size(n) for n in v.shape], -1, dtype=torch.int32)
                        return _plain_number(v)
                    t = r.ids if pick == "ids" else r.mates
                    if t is None:
                        t = tree(lambda x: torch.full_like(x, -1), r.ids)
                    return t
                if isinstance(a, (list, tuple)):
                    parts = [given(x) for x in a]
                    return tuple(parts) if isinstance(a, tuple) else parts
                if isinstance(a, slice):
                    return slice(given(a.start), given(a.stop), given(a.step))
                return a

            args, kwargs = [given(a) for a in node.args], {k: given(v) for k, v in node.kwargs.items()}
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            return node.target(*args, **kwargs)  # type: ignore[operator]

        try:
            ids = run("ids")
            paired = any(r.mates is not None for a in node.all_input_nodes if (r := self._rows(a, seen)) is not None)
            mates = run("mates") if paired else None
        except (TypeError, ValueError, RuntimeError, IndexError) as e:
            raise Refused(f"its queries or keys cannot be followed through {op(node)} ({type(e).__name__})") from None
        return Rows(rows.linear, ids, mates, rows.bias, rows.factor)

    def _is_linear(self, node: Node) -> Linear | None:
        name = op(node)
        if name == "linear" and node.op == "call_function":
            given = dict(zip(("input", "weight", "bias"), node.args)) | dict(node.kwargs)
            return self._linear(node, given["input"], given["weight"], given.get("bias"), False)
        if name == "addmm":
            return self._linear(node, node.args[1], node.args[2], node.args[0], True)
        if name in ("matmul", "mm") and len(node.args) == 2:
            return self._linear(node, node.args[0], node.args[1], None, True)
        return None

    def _linear(self, node: Node, source: Any, weight: Any, bias: Any, turned: bool) -> Linear | None:
        if isinstance(weight, Node) and op(weight) in ("T", "t", "mT", "transpose"):
            weight, turned = weight.args[0], not turned
        if (
            weight not in self.parameters
            or not isinstance(source, Node)
            or bias is not None
            and bias not in self.parameters
        ):
            return None
        return Linear(node, source, weight, bias, turned)

    # -- what goes out ------------------------------------------------------------------------------------------------
    def _values(self, softmax: Node) -> Node | None:
        """The product of the probabilities with the values, if the softmax leads to one."""
        node: Node | None = softmax
        for _ in range(6):
            found = [u for u in node.users if op(u) in ("matmul", "bmm") and u.args[0] is node]  # type: ignore[union-attr]
            if found:
                return found[0]
            node = next((u for u in node.users if op(u) in _SAME | _VIEWS), None)  # type: ignore[union-attr]
            if node is None:
                return None
        return None

    def _output(self, s: Sublayer) -> None:
        node: Node = s.core
        if op(node) == "softmax":
            product = self._values(node)
            assert product is not None
            for between in _path(node, product):
                if any(u.op == "output" for u in between.users):
                    raise Refused("its probabilities leave the graph")
            node = product
        for _ in range(40):
            users = list(node.users)
            if len(users) != 1 or users[0].op == "output":
                raise Refused(
                    "its output has other readers than the residual addition" if users else "its output is unused"
                )
            user = users[0]
            name = op(user)
            linear = self._is_linear(user)
            if linear is not None and linear.source is node and s.output is None:
                s.output, node = linear, user
            elif name in _ADD and "sub" not in name and s.output is not None and not user.kwargs:
                other = user.args[1] if user.args[0] is node else user.args[0]
                if other in self.parameters:
                    node = user
                    continue
                mine, theirs, total = tensor(node), tensor(other), tensor(user)
                if not isinstance(other, Node) or other is node or mine is None or theirs is None or total is None:
                    raise Refused("its output is not a plain residual addend")
                if theirs.shape != total.shape or theirs.dtype != total.dtype:
                    raise Refused("its output is not a plain residual addend: the sum has another shape or type")
                s.out, s.add, s.keep = node, user, other
                return
            elif name in _VIEWS | _SAME or name in _SCALE and self._weight_like(user, node):
                if name == "dropout" and _trains(user):
                    raise Refused("it is in training mode")
                node = user
            else:
                raise Refused(f"its output is not a plain residual addend: {name or user.op} comes first")
        raise Refused("its output is not a plain residual addend")

    def _weight_like(self, user: Node, node: Node) -> bool:
        other = user.args[1] if user.args[0] is node else user.args[0]
        return other in self.parameters or self._number(other) is not None

    def _stream(self, s: Sublayer) -> None:
        """The residual stream feeds the projections, through a norm at most; its gain and shift."""
        assert s.queries is not None and s.add is not None
        leaves = self._leaves(s)
        node = self._plain(s.queries.linear.source)
        found, gain, shift = self._through_norm(node, leaves)
        if found is None:
            raise Refused(
                "its output is not a plain residual addend: the stream that it reads is not what it is added to"
            )
        s.residual, s.gain, s.shift = found, gain, shift

    def _leaves(self, s: Sublayer) -> set[Node]:
        out: set[Node] = set()
        stack: list[Any] = [s.keep]
        node: Node = s.add  # type: ignore[assignment]
        for _ in range(12):  # further additions downstream: parallel residual
            users = list(node.users)
            if len(users) != 1 or op(users[0]) not in _ADD | _SAME | _SCALE:
                break
            stack += [a for a in users[0].args if isinstance(a, Node) and a is not node]
            node = users[0]
        while stack:
            n = stack.pop()
            if not isinstance(n, Node) or n in out:
                continue
            out.add(n)
            if op(n) in _ADD | {"dropout", "to", "view", "reshape"}:
                stack += [a for a in n.args[:2] if isinstance(a, Node)]
        return out

    def _through_norm(self, node: Node, leaves: set[Node]) -> tuple[Node | None, Tensor | None, Tensor | None]:
        gain = shift = None
        for _ in range(16):
            if node in leaves:
                return node, gain, shift
            name = op(node)
            if name == "layer_norm" or name == "rms_norm":
                names = (
                    ("input", "normalized_shape", "weight", "bias")
                    if name == "layer_norm"
                    else ("input", "shape", "weight")
                )
                given = dict(zip(names, node.args)) | dict(node.kwargs)
                gain, shift = self._vector(given.get("weight")), self._vector(given.get("bias"))
                node = given["input"]
                continue
            if name not in _NORM_PARTS:
                return None, None, None
            inputs = [a for a in node.args[:2] if isinstance(a, Node)]
            rest = []
            for a in inputs:
                c = self._constant(a)
                if c is None:
                    rest.append(a)
                elif name == "mul" and c.dim() == 1:
                    gain = c if gain is None else gain * c
                elif name == "add" and c.dim() == 1 and gain is None:
                    shift = c
            # x · rsqrt(mean(x²)): go on along the operand that is not the row's norm
            rest = [a for a in rest if op(a) not in ("rsqrt", "mean", "sqrt", "pow", "reciprocal")] or rest
            if len(rest) != 1:
                return None, None, None
            node = rest[0]
        return None, None, None

    def _vector(self, a: Any) -> Tensor | None:
        return self._constant(a) if isinstance(a, Node) else None

    def _constant(self, node: Node, depth: int = 5) -> Tensor | None:
        """The value of a small expression of parameters and numbers alone."""
        if node in self.parameters:
            found = self.real.get(node)
            return found.detach() if isinstance(found, Tensor) and found.dim() <= 1 else None
        if depth == 0 or node.op not in ("call_function", "call_method") or not node.all_input_nodes:
            return None
        inner = {a: self._constant(a, depth - 1) for a in node.all_input_nodes}
        if any(v is None for v in inner.values()) or op(node) not in _SCALE | _SAME | {"add", "sub"}:
            return None
        args = torch.fx.node.map_arg(node.args, lambda a: inner[a])
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **node.kwargs)  # type: ignore[index]
        return node.target(*args, **node.kwargs)  # type: ignore[operator]

    def _plain(self, node: Node) -> Node:
        while op(node) in ("view", "reshape", "contiguous", "flatten", "transpose") and isinstance(node.args[0], Node):
            node = node.args[0]
        return node

    # -- for the scores -----------------------------------------------------------------------------------------------
    def coupling(self, s: Sublayer) -> Coupling:
        """The numbers that a weight score needs. Raises Refused where the heads cannot be told apart."""
        if s.refusal:
            raise Refused(s.refusal)
        assert s.queries is not None and s.keys is not None
        q, k = _by_head(s.queries.ids), _by_head(s.keys.ids)
        if (
            q is None
            or k is None
            or q.shape[1] != k.shape[1]
            or len(q) % len(k)
            or bool((q < 0).any())
            or bool((k < 0).any())
        ):
            raise Refused("the heads of its queries and keys do not fit together")
        k = k.repeat_interleave(len(q) // len(k), 0)
        partner = None
        if s.queries.mates is not None:
            mates = _by_head(s.queries.mates)
            assert mates is not None
            places = {int(row): i for i, row in enumerate(q[0])}
            partner = torch.tensor([places.get(int(m), -1) for m in mates[0]])
        return Coupling(self._side(s.queries, q), self._side(s.keys, k), s.scale, s.gain, s.shift, partner)

    def _side(self, rows: Rows, picked: Tensor) -> Projection:
        weight = self.real[rows.linear.weight].detach()
        bias = self.real[rows.bias].detach() if rows.bias is not None else None
        return Projection(weight.T if rows.linear.turned else weight, picked.long(), bias)


@dataclass(frozen=True)
class _Turned:
    """A node read with its last two dimensions swapped (the keys of a plain product)."""

    node: Node

    @property
    def all_input_nodes(self) -> list[Node]:
        return [self.node]


def _by_head(ids: Tensor) -> Tensor | None:
    """[heads, head_dim] of row numbers of [batch, heads, length, head_dim] or [batch·heads, length, head_dim]; last position."""
    last = ids[..., -1, :]
    if last.dim() == 3:
        return last[0]
    if last.dim() == 2:  # batch and heads are one dimension: the heads repeat
        return torch.unique_consecutive(last, dim=0) if len(torch.unique(last, dim=0)) == len(last) else _period(last)
    return None


def _period(last: Tensor) -> Tensor:
    for n in range(1, len(last)):
        if len(last) % n == 0 and bool((last.view(-1, n, last.shape[-1]) == last[:n]).all()):
            return last[:n]
    return last


def tree(f: Any, x: Any) -> Any:
    """``f`` of every tensor of a tuple or list, or of the tensor."""
    return type(x)(tree(f, y) for y in x) if isinstance(x, (list, tuple)) else f(x)


def _plain_number(v: Any) -> Any:
    return _size(v) if isinstance(v, torch.SymInt) else v


def _real(x: Any) -> float:
    """A number, or the one that a symbolic float (Dynamo's dynamic=True) stood for in the example call."""
    found = value(x) if isinstance(x, Node) else x
    if isinstance(found, (torch.SymFloat, torch.SymInt)):
        found = found.node.hint
    if not isinstance(found, (int, float)):
        raise Refused("the scale of its scores is unknown")
    return float(found)


def _size(n: Any) -> int:
    """A size as it was in the example call: row numbers do not depend on it, and ``int`` would add a guard."""
    if not isinstance(n, torch.SymInt):
        return int(n)
    hint = n.node.hint
    if hint is None:
        raise Refused("its sizes depend on data")
    return int(hint)


def _trains(dropout: Node) -> bool:
    given = dict(zip(("input", "p", "training"), dropout.args)) | dict(dropout.kwargs)
    return bool(given.get("training", True)) and bool(given.get("p", 0.5))


def _path(a: Node, b: Node) -> list[Node]:
    out = [a]
    while out[-1] is not b:
        nxt = next((u for u in out[-1].users if u is b or op(u) in _SAME | _VIEWS), None)
        if nxt is None:
            break
        out.append(nxt)
    return out


__all__ = ["Finder", "Linear", "Refused", "Rows", "Sublayer", "op"]
