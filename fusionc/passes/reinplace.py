"""Write into an input instead of into a copy of it that is copied back at the end.

Math       p' = op(p, …);  copy_(p, p')   →   op_(p, …)        op: index_copy, index_put, scatter…, slice_scatter, …
Exactness  exact
Legality   the copied value comes from p by scatter-like operators alone; after each of them nobody reads the value from
           before it; the result does not leave the graph; what is written does not share memory with p; same dtype
           and layout; p does not overlap itself (stride 0)
Cost       saves one read and write of the whole of p (a KV cache per decoded token) for each copy_
Source     PyTorch's functionalisation, read backwards; Hugging Face static caches (index_copy + copy_ per K and V)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from ..graph import edit
from ..graph.facts import Facts, nodes_of, overlaps, same_layout, shape, stride, tensor
from .base import Exact, Match, Pass, Refuse

aten = torch.ops.aten

# functional operator → in-place twin with the same arguments
_TWINS = {
    aten.index_copy.default: aten.index_copy_.default,
    aten.index_put.default: aten.index_put_.default,
    aten._unsafe_index_put.default: aten.index_put_.default,
    aten.index_add.default: aten.index_add_.default,
    aten.index_fill.int_Scalar: aten.index_fill_.int_Scalar,
    aten.index_fill.int_Tensor: aten.index_fill_.int_Tensor,
    aten.index_reduce.default: aten.index_reduce_.default,
    aten.scatter.src: aten.scatter_.src,
    aten.scatter.value: aten.scatter_.value,
    aten.scatter.reduce: aten.scatter_.reduce,
    aten.scatter.value_reduce: aten.scatter_.value_reduce,
    aten.scatter_add.default: aten.scatter_add_.default,
    aten.scatter_reduce.two: aten.scatter_reduce_.two,
    aten.masked_scatter.default: aten.masked_scatter_.default,
}
# scatter into a view → the view operator; arguments are (self, src, *view arguments)
_REGIONS = {
    aten.slice_scatter.default: aten.slice.Tensor,
    aten.select_scatter.default: aten.select.int,
    aten.diagonal_scatter.default: aten.diagonal.default,
}


@dataclass(frozen=True)
class Chain:
    """``copy`` writes the result of ``ops`` (first to last, each working on the one before) into ``target``."""

    target: Node
    ops: tuple[Node, ...]
    copy: Node


class Reinplace(Pass):
    """In-place scatter into graph inputs."""

    name = "reinplace"
    atomic = True
    exactness = Exact()

    def find(self, facts: Facts) -> Iterator[Match]:
        """Every copy_ of a scatter-like result into an input."""
        for node in list(facts.gm.graph.nodes):
            if node.op != "call_function" or node.target is not aten.copy_.default:
                continue
            target, source = node.args[0], node.args[1]
            if not isinstance(target, Node) or target.op != "placeholder" or not isinstance(source, Node):
                continue
            ops: list[Node] = []
            while source.op == "call_function" and (source.target in _TWINS or source.target in _REGIONS):
                ops.append(source)
                if not isinstance(source.args[0], Node):
                    break
                source = source.args[0]
            if ops:
                chain = Chain(target, tuple(reversed(ops)), node)
                yield Match({"chain": chain, "start": source}, (*chain.ops, node))

    def check(self, match: Match, facts: Facts) -> Refuse | None:
        """See Legality."""
        chain: Chain = match.chain
        target, copy = chain.target, chain.copy
        if match.start is not target:
            return Refuse("the copied value does not start from the input it is copied to", chain.ops[0])
        if not same_layout(tensor(target), tensor(chain.ops[-1])):
            return Refuse("dtype or layout differ between the input and the result", chain.ops[-1])
        sizes, strides = shape(target), stride(target)
        if sizes is None or strides is None or _overlaps(sizes, strides):
            return Refuse("the input may overlap itself", target)
        if [writer for writer in facts.writers.get(target, ()) if writer is not copy]:
            return Refuse("the input is written elsewhere too", target)
        if copy.users:
            return Refuse("the result of copy_ is read", copy)
        before = target
        for op in chain.ops:
            old = facts.aliases(before)
            if any(found in old for found in nodes_of((op.args[1:], op.kwargs))):
                return Refuse("what is written may share memory with the input", op)
            if before is not target and before in facts.escaping:
                return Refuse("a value between leaves the graph", before)
            for holder in old:
                for reader in holder.users:
                    if reader is not op and reader is not copy and op < reader:
                        return Refuse("the old value is read after the write", reader)
            before = op
        if before in facts.escaping:
            return Refuse("the result leaves the graph, where it must not share memory with the input", before)
        return None

    def replace(self, match: Match, facts: Facts) -> None:
        """Each scatter becomes its in-place twin (or copy_ into the view); the copy at the end goes."""
        chain: Chain = match.chain
        graph = facts.gm.graph
        current = chain.target
        graph.erase_node(chain.copy)
        for op in chain.ops:
            with graph.inserting_before(op):
                if op.target in _TWINS:
                    written = edit.insert(graph, _TWINS[op.target], (current, *op.args[1:]), dict(op.kwargs), origin=[op],
                                          val=tensor(current))  # (strides of size 1 may be others in the copy)
                else:
                    view: Callable[..., Any] = _REGIONS[op.target]
                    kwargs = {name: given for name, given in op.kwargs.items() if name != "src"}
                    source = op.args[1] if len(op.args) > 1 else op.kwargs["src"]
                    region = edit.insert(graph, view, (current, *op.args[2:]), kwargs, origin=[op])
                    edit.insert(graph, aten.copy_.default, (region, source), origin=[op], val=tensor(region))
                    written = current
            if written is current:
                # later readers read the input itself: graph order, not a data edge, keeps them after the write
                edit.redirect(op, current)
            else:
                edit.redirect(op, written)
                current = written
            graph.erase_node(op)


def _overlaps(sizes: tuple[Any, ...], strides: tuple[Any, ...]) -> bool:
    """Two indices may address one element: a stride is 0 where the size is not 1, or unknown, or strides are not nested."""
    pairs = [(size, step) for size, step in zip(sizes, strides) if not (isinstance(size, int) and size == 1)]
    if any(isinstance(step, int) and step == 0 for _, step in pairs):
        return True
    if not all(isinstance(part, int) for pair in pairs for part in pair):
        return False  # symbolic sizes come without overlap, or Dynamo would have guarded on it
    return overlaps([size for size, _ in pairs], [step for _, step in pairs])
