"""What a node of a torch-level (Dynamo) graph is, in the words of the removal: names of operators, linear maps, constants."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..graph.facts import value, written_by

VIEWS = set("tensor_split view reshape transpose permute contiguous expand unsqueeze squeeze flatten unflatten split chunk "
            "narrow getitem "
            "broadcast_to movedim swapaxes unbind repeat_interleave t mT T view_as reshape_as expand_as".split())  # fmt: skip
SAME = set("to float half bfloat16 double type type_as clone neg dropout detach identity".split())
SCALE = {"mul", "truediv", "div", "multiply", "divide"}
ADD = {"add", "sub", "iadd", "add_", "isub"}
PRODUCT = {"matmul", "bmm", "baddbmm"}


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


class Reader:
    """One graph. ``real``: placeholder → real value; ``parameters``: placeholders that are weights or buffers."""

    def __init__(self, gm: GraphModule, real: Mapping[Node, Any], parameters: set[Node]) -> None:
        self.gm, self.real, self.parameters = gm, real, parameters
        self.writers: dict[Node, list[Node]] = {}
        for n in gm.graph.nodes:
            for w in written_by(n):
                self.writers.setdefault(w, []).append(n)

    def linear(self, node: Node) -> Linear | None:
        """The linear map that this node calls, if its weight (and bias) are parameters."""
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
        if weight not in self.parameters or not isinstance(source, Node):
            return None
        if bias is not None and bias not in self.parameters:
            return None
        return Linear(node, source, weight, bias, turned)

    def constant(self, node: Any, depth: int = 5) -> Tensor | None:
        """The value of a small expression of parameters (scalars and vectors) and numbers alone."""
        if not isinstance(node, Node):
            return None
        if node in self.parameters:
            found = self.real.get(node)
            return found.detach() if isinstance(found, Tensor) and found.dim() <= 1 else None
        if depth == 0 or node.op not in ("call_function", "call_method") or not node.all_input_nodes:
            return None
        inner = {a: self.constant(a, depth - 1) for a in node.all_input_nodes}
        if any(v is None for v in inner.values()) or op(node) not in SCALE | SAME | {"add", "sub"}:
            return None
        args = torch.fx.node.map_arg(node.args, lambda a: inner[a])
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **node.kwargs)  # type: ignore[index]
        return node.target(*args, **node.kwargs)  # type: ignore[operator]

    def number(self, a: Any) -> float | None:
        """A number, or the value of a constant expression of one element."""
        if isinstance(a, (int, float)) and not isinstance(a, bool):
            return float(a)
        if isinstance(a, Node):
            if isinstance(value(a), (torch.SymFloat, torch.SymInt)):
                return real(a)
            found = self.constant(a)
            if found is not None and found.numel() == 1:
                return float(found)
        return None


def plain(node: Node) -> Node:
    """What a chain of views on the way from a tensor to a linear map starts from."""
    while op(node) in ("view", "reshape", "contiguous", "flatten", "transpose") and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def real(x: Any) -> float:
    """A number, or the one that a symbolic float (Dynamo's dynamic=True) stood for in the example call."""
    found = value(x) if isinstance(x, Node) else x
    if isinstance(found, (torch.SymFloat, torch.SymInt)):
        found = found.node.hint
    if not isinstance(found, (int, float)):
        raise Refused("the scale of its scores is unknown")
    return float(found)


def size(n: Any) -> int:
    """A size as it was in the example call: row numbers do not depend on it, and ``int`` would add a guard."""
    if not isinstance(n, torch.SymInt):
        return int(n)
    hint = n.node.hint
    if hint is None:
        raise Refused("its sizes depend on data")
    return int(hint)


def trains(dropout: Node) -> bool:
    """A dropout that draws numbers."""
    given = dict(zip(("input", "p", "training"), dropout.args)) | dict(dropout.kwargs)
    return bool(given.get("training", True)) and bool(given.get("p", 0.5))


__all__ = [
    "ADD",
    "PRODUCT",
    "SAME",
    "SCALE",
    "VIEWS",
    "Linear",
    "Reader",
    "Refused",
    "op",
    "plain",
    "real",
    "size",
    "trains",
]
