"""A plain torch function as a pattern: traced once, matched on FX graphs up to commutativity.

Spellings are made one first: ``a + b``, ``torch.add(a, b)``, ``a.add(b)`` and ``aten.add.Tensor`` have the canonical name
``add``. The pattern's arguments match any node or constant; an argument used twice must match the same thing. Values
inside the pattern must have no reader outside of it, since the rewrite removes them.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node, symbolic_trace

_COMMUTATIVE = {"add", "mul", "maximum", "minimum", "eq", "ne", "logical_and", "logical_or", "logical_xor",
                "bitwise_and", "bitwise_or", "bitwise_xor"}
_ALIASES = {"and_": "bitwise_and", "or_": "bitwise_or", "xor": "bitwise_xor", "truediv": "div", "multiply": "mul",
            "subtract": "sub", "divide": "div", "true_divide": "div", "negative": "neg", "absolute": "abs",
            "_unsafe_view": "view", "_softmax": "softmax_", "inv": "bitwise_not", "__and__": "bitwise_and",
            "__add__": "add", "__mul__": "mul", "__sub__": "sub", "__truediv__": "div"}
# keyword defaults that may be spelled out or left away
_DEFAULTS: dict[str, dict[str, Any]] = {"add": {"alpha": 1}, "sub": {"alpha": 1}, "relu": {"inplace": False},
                                        "silu": {"inplace": False}, "gelu": {"approximate": "none"}}


@dataclass
class Found:
    """Arguments of the pattern by name, and the matched nodes, the result last."""

    bound: dict[str, Any]
    nodes: tuple[Node, ...]


def canonical(node: Node) -> str:
    """Operator name shared by all spellings of an operator, or "" for nodes that are no calls."""
    if node.op == "call_function":
        target = node.target
        if isinstance(target, torch._ops.OpOverload):
            name = target._schema.name.split("::")[1]
        elif isinstance(target, torch._ops.OpOverloadPacket):
            name = target._qualified_op_name.split("::")[1]
        else:
            name = getattr(target, "__name__", "")
    elif node.op == "call_method":
        name = str(node.target)
    else:
        return ""
    return _ALIASES.get(name, name)


def arguments(function: Callable[..., Any]) -> list[str]:
    """Names of the function's parameters."""
    return list(inspect.signature(_plain(function)).parameters)


def trace(function: Callable[..., Any]) -> Graph:
    """Torch-level graph of a plain function."""
    return symbolic_trace(_plain(function)).graph


def _plain(function: Callable[..., Any]) -> Callable[..., Any]:
    return function.__func__ if isinstance(function, (staticmethod, classmethod)) else function  # type: ignore[return-value]


class Pattern:
    """A traced pattern; ``find(gm)`` yields its matches that do not overlap, in graph order."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.graph = trace(function)
        result = self.graph.output_node().args[0]
        if not isinstance(result, Node) or not canonical(result):
            raise ValueError("a pattern must return one tensor that it computes")
        self.result = result
        self.head = canonical(result)

    def find(self, gm: GraphModule) -> Iterator[Found]:
        """Matches; nodes of one match take part in no other."""
        taken: set[Node] = set()
        for node in list(gm.graph.nodes):
            if canonical(node) != self.head or node._erased:
                continue
            found = self.match(node)
            if found is not None and taken.isdisjoint(found.nodes):
                taken.update(found.nodes)
                yield found

    def match(self, node: Node) -> Found | None:
        """The pattern's result is this node: the match, or None."""
        for bound in self._nodes(self.result, node, {}):
            inner = {real for mine, real in bound.items() if mine.op != "placeholder" and isinstance(real, Node)}
            if all(user in inner for real in inner if real is not node for user in real.users):
                named = {mine.name: real for mine, real in bound.items() if mine.op == "placeholder"}
                named = {str(mine.target): bound[mine] for mine in bound if mine.op == "placeholder"}
                return Found(named, tuple(sorted(inner)))
        return None

    def _nodes(self, mine: Any, real: Any, bound: dict[Node, Any]) -> Iterator[dict[Node, Any]]:
        """All ways in which ``real`` is an instance of ``mine``, given what is bound already."""
        if isinstance(mine, Node):
            if mine in bound:
                if bound[mine] is real or not isinstance(real, Node) and _equal(bound[mine], real):
                    yield bound
                return
            if mine.op == "placeholder":
                yield {**bound, mine: real}
                return
            if not isinstance(real, Node) or canonical(mine) != canonical(real) or not canonical(mine):
                return
            own, given = _normal(mine), _normal(real)
            if own is None or given is None or len(own[0]) != len(given[0]) or set(own[1]) != set(given[1]):
                return
            orders = [given[0]]
            if canonical(mine) in _COMMUTATIVE and len(given[0]) == 2 and not given[1]:
                orders.append(given[0][::-1])
            for order in orders:
                yield from self._all([*own[0], *own[1].values()], [*order, *[given[1][k] for k in own[1]]],
                                     {**bound, mine: real})
        elif isinstance(mine, (list, tuple)):
            if isinstance(real, (list, tuple)) and len(mine) == len(real):
                yield from self._all(list(mine), list(real), bound)
        elif not isinstance(real, Node) and _equal(mine, real):
            yield bound

    def _all(self, mine: list[Any], real: list[Any], bound: dict[Node, Any]) -> Iterator[dict[Node, Any]]:
        if not mine:
            yield bound
            return
        for first in self._nodes(mine[0], real[0], bound):
            yield from self._all(mine[1:], real[1:], first)


def _equal(a: Any, b: Any) -> bool:
    """Same constant: numbers by value (1 matches 1.0, True matches only True), everything else exactly."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_equal, a, b))
    try:
        return bool(a == b)
    except Exception:  # noqa: BLE001 - objects that refuse comparison are not equal
        return False


def _normal(node: Node) -> tuple[list[Any], dict[str, Any]] | None:
    """Positional and keyword arguments with defaults taken away; known keywords moved to their position."""
    args, kwargs = list(node.args), dict(node.kwargs)
    for name in ("input", "self"):
        if name in kwargs and not args:
            args = [kwargs.pop(name)]
    if "other" in kwargs and len(args) == 1:
        args.append(kwargs.pop("other"))
    for name, default in _DEFAULTS.get(canonical(node), {}).items():
        if name in kwargs and _equal(kwargs[name], default):
            del kwargs[name]
    if isinstance(node.target, torch._ops.OpOverload):
        schema = node.target._schema.arguments
        while args and len(args) > 1 and len(args) <= len(schema) and schema[len(args) - 1].has_default_value() and \
                not isinstance(args[-1], Node) and _equal(args[-1], schema[len(args) - 1].default_value):
            args.pop()
        for argument in schema:
            if argument.name in kwargs and not isinstance(kwargs[argument.name], Node) and \
                    argument.has_default_value() and _equal(kwargs[argument.name], argument.default_value):
                del kwargs[argument.name]
    return args, kwargs


@lru_cache(maxsize=512)
def compiled(function: Callable[..., Any]) -> Pattern:
    """The Pattern of a function, traced once."""
    return Pattern(function)


__all__ = ["Found", "Pattern", "arguments", "canonical", "compiled", "operator", "trace"]
