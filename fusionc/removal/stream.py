"""From a branch's last linear map forward to the residual addition, and from its input back to the stream that it reads."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.fx import Node

from ..graph.facts import tensor, written_by
from .parts import ADD, SAME, SCALE, VIEWS, Linear, Reader, Refused, op, trains

_NORM_PARTS = set("layer_norm rms_norm group_norm pow square mean rsqrt sqrt var norm normalize linalg_vector_norm add sub to "
                  "float type_as reciprocal rsub view reshape dropout".split()) | SCALE  # fmt: skip

_TWO = SCALE | {"add", "sub", "rsub"}  # of these the second argument counts, too


def addition(reader: Reader, node: Node, output: Linear | None = None) -> tuple[Node, Node, Node, Linear]:
    """(addend, the addition, what it is added to, the output projection) of the branch that ``node`` lies on.

    Raises Refused with the reason if the branch does not end as a plain addend. Without ``output`` the projection is the
    first linear map that comes.
    """
    for _ in range(40):
        users = list(node.users)
        if len(users) > 1 and all(op(u) in _NORM_PARTS for u in users):
            raise Refused("its output is not a plain residual addend: a norm comes first")
        if len(users) != 1 or users[0].op == "output":
            raise Refused(
                "its output has other readers than the residual addition" if users else "its output is unused"
            )
        user = users[0]
        name = op(user)
        linear = reader.linear(user)
        if linear is not None and linear.source is node and output is None:
            output, node = linear, user
        elif name in ADD and "sub" not in name and output is not None and not user.kwargs:
            other = user.args[1] if user.args[0] is node else user.args[0]
            if other in reader.parameters:
                node = user
                continue
            mine, theirs, total = tensor(node), tensor(other), tensor(user)
            if not isinstance(other, Node) or other is node or mine is None or theirs is None or total is None:
                raise Refused("its output is not a plain residual addend")
            if theirs.shape != total.shape or theirs.dtype != total.dtype:
                raise Refused("its output is not a plain residual addend: the sum has another shape or type")
            return node, user, other, output
        elif name in VIEWS | SAME or name in SCALE and _weight_like(reader, user, node):
            if name == "dropout" and trains(user):
                raise Refused("it is in training mode")
            node = user
        else:
            raise Refused(f"its output is not a plain residual addend: {name or user.op} comes first")
    raise Refused("its output is not a plain residual addend")


def _weight_like(reader: Reader, user: Node, node: Node) -> bool:
    other = user.args[1] if user.args[0] is node else user.args[0]
    return other in reader.parameters or reader.number(other) is not None


def leaves(add: Node, keep: Node) -> set[Node]:
    """What the residual sum is made of: the kept side's addends and partial sums, and those added further downstream
    (parallel residual)."""
    out: set[Node] = set()
    stack: list[Any] = [keep]
    node = add
    for _ in range(12):
        users = list(node.users)
        if len(users) != 1 or op(users[0]) not in ADD | SAME | SCALE:
            break
        stack += [a for a in users[0].args if isinstance(a, Node) and a is not node]
        node = users[0]
    while stack:
        n = stack.pop()
        if not isinstance(n, Node) or n in out:
            continue
        out.add(n)
        if op(n) in ADD | {"dropout", "to", "view", "reshape"}:
            stack += [a for a in n.args[:2] if isinstance(a, Node)]
    return out


def through_norm(reader: Reader, node: Node, ends: set[Node]) -> tuple[Node | None, Tensor | None, Tensor | None]:
    """The member of ``ends`` that ``node`` is, or is a norm of; the norm's gain and shift. (None, None, None): neither."""
    gain = shift = None
    for _ in range(16):
        if node in ends:
            return node, gain, shift
        name = op(node)
        if name in ("layer_norm", "rms_norm"):
            names = ("input", "shape", "weight", "bias") if name == "layer_norm" else ("input", "shape", "weight")
            given = dict(zip(names, node.args)) | dict(node.kwargs)
            gain, shift = reader.constant(given.get("weight")), reader.constant(given.get("bias"))
            node = given["input"]
            continue
        if name not in _NORM_PARTS:
            return None, None, None
        rest = []
        for a in [a for a in node.args[: 2 if name in _TWO else 1] if isinstance(a, Node)]:
            c = reader.constant(a)
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


def branch(reader: Reader, start: Node, ends: set[Node], stops: Iterable[Node]) -> tuple[Node, list[Linear]] | None:
    """The one member of ``ends`` that ``start`` is computed from, and the linear maps on the way; None if anything but
    parameters is read besides, if a node of ``stops`` (attention) lies on the way, or if something is written."""
    barred, found, maps = set(stops), set(), []
    stack, seen = [start], {start}
    while stack:
        node = stack.pop()
        if node in ends:
            found.add(node)
            continue
        if node.op == "placeholder" and node in reader.parameters:
            continue
        if node.op not in ("call_function", "call_method") or node in barred or written_by(node) or len(seen) > 400:
            return None
        if op(node) == "dropout" and trains(node):
            return None
        if (linear := reader.linear(node)) is not None:
            maps.append(linear)
        new = [a for a in node.all_input_nodes if a not in seen]
        seen.update(new)
        stack += new
    return (found.pop(), maps) if len(found) == 1 else None


__all__ = ["addition", "branch", "leaves", "through_norm"]
