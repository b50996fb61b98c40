"""Attention cores of a torch-level graph: calls of scaled_dot_product_attention, or a softmax whose result meets values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.fx import GraphModule, Node

from ..graph.facts import nodes_of, tensor
from .parts import PRODUCT, SAME, SCALE, VIEWS, Reader, Refused, op, real, size
from .rows import Turned

_SCORES = set("mul truediv div imul itruediv div_ mul_ add iadd add_ sub masked_fill masked_fill_ where view reshape to float "
              "type_as contiguous tanh clamp max maximum".split())  # fmt: skip


def cores(gm: GraphModule) -> Iterator[Node]:
    """In execution order."""
    for n in gm.graph.nodes:
        if (
            op(n).startswith("scaled_dot_product_attention")
            or op(n) == "softmax"
            and product_with_values(n) is not None
        ):
            yield n


def product_with_values(softmax: Node) -> Node | None:
    """The product of the probabilities with the values, if the softmax leads to one."""
    node: Node | None = softmax
    for _ in range(6):
        found = [u for u in node.users if op(u) in ("matmul", "bmm") and u.args[0] is node]  # type: ignore[union-attr]
        if found:
            return found[0]
        node = next((u for u in node.users if op(u) in SAME | VIEWS), None)  # type: ignore[union-attr]
        if node is None:
            return None
    return None


def result(core: Node) -> Node:
    """Where the core's output starts; raises Refused if probabilities leave the graph on the way."""
    if op(core) != "softmax":
        return core
    product = product_with_values(core)
    assert product is not None
    node: Node | None = core
    while node is not None and node is not product:
        if any(u.op == "output" for u in node.users):
            raise Refused("its probabilities leave the graph")
        node = next((u for u in node.users if u is product or op(u) in SAME | VIEWS), None)
    return product


def inputs(core: Node, reader: Reader) -> tuple[Node, Node | Turned, float]:
    """Queries, keys and the scale of the scores. Raises Refused."""
    if op(core).startswith("scaled"):
        given = dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale"), core.args))
        given.update(core.kwargs)
        scale = given.get("scale")
        if given.get("dropout_p"):
            raise Refused("attention drops probabilities out: it is in training mode")
        shape = getattr(tensor(given["query"]), "shape", None)
        if scale is None and shape is None:
            raise Refused("the head dimension is unknown")
        return given["query"], given["key"], real(scale if scale is not None else size(shape[-1]) ** -0.5)  # type: ignore
    node, scale = core.args[0], 1.0
    while isinstance(node, Node) and op(node) not in PRODUCT:
        if op(node) not in _SCORES:
            raise Refused(f"its scores pass through {op(node) or node.op}")
        operands = [a for a in nodes_of(node.args[:3]) if a.op != "placeholder" and _scores_below(a, reader)]
        if len(operands) != 1:
            raise Refused("its scores are no single product")
        number = reader.number(node.args[1]) if len(node.args) > 1 else None
        if number is not None and op(node).strip("_").removeprefix("i") in SCALE:
            scale = scale / number if "div" in op(node) else scale * number
        node = operands[0]
    if not isinstance(node, Node):
        raise Refused("its scores are no single product")
    args: Any = node.args[:2]
    if op(node) == "baddbmm":
        given = dict(zip(("input", "batch1", "batch2"), node.args)) | dict(node.kwargs)
        args = (given["batch1"], given["batch2"])
        scale *= float(given.get("alpha", 1.0))
    if len(args) < 2:
        raise Refused("its scores are no single product")
    key: Any = args[1]
    while isinstance(key, Node) and op(key) == "contiguous":
        key = key.args[0]
    if not (isinstance(args[0], Node) and isinstance(key, Node)):
        raise Refused("its scores are no single product")
    if op(key) in ("transpose", "mT", "permute", "swapaxes", "t") and tensor(key) is not None:
        inner: Any = key.args[0]
        a, b = tensor(inner), tensor(key)
        if a is not None and b is not None and a.dim() == b.dim() and size(a.shape[-1]) == size(b.shape[-2]) \
                and (op(key) != "permute" or a.dim() == 3):  # fmt: skip
            return args[0], inner, scale
    return args[0], Turned(key), scale


def _scores_below(node: Node, reader: Reader, depth: int = 12) -> bool:
    if op(node) in PRODUCT:
        return reader.linear(node) is None
    return (
        depth > 0 and op(node) in _SCORES and any(_scores_below(a, reader, depth - 1) for a in nodes_of(node.args[:3]))
    )


__all__ = ["cores", "inputs", "product_with_values", "result"]
