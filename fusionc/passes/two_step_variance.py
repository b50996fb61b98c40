"""Mean and variance of few long rows are two reductions after each other, so that each can be split over a GPU's processors.

Math       var_mean(x) = (Σ (x − m)² / (n − c), m),   m = Σ x / n;   var and std alone likewise
Exactness  reassociates: the same two sums in other order
Legality   on a GPU; float32 or float64; sizes, dimensions and correction are numbers; so few rows for their length that a program
           for each leaves the device idle (``graph/parallel.py``)
Cost       reads x once more, by all processors: BatchNorm in training of 64×64×112×112 channels-last had 4 programs at work
Source     two-pass variance; batch statistics of channels-last images are sums over columns
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator

import torch
from torch.fx import Node

from ..graph import edit
from ..graph.facts import Facts, shape, tensor
from ..graph.parallel import along_rows, scarce
from .base import Match, Pass, Reassociates, Refuse

aten = torch.ops.aten


class TwoStepVariance(Pass):
    """aten.var_mean, var and std → mean, differences, sum of squares."""

    name = "two_step_variance"
    exactness = Reassociates(rtol=1e-5)
    atomic = True

    def __init__(self, devices: tuple[str, ...] = ("cuda",)) -> None:
        self.devices = devices

    def find(self, facts: Facts) -> Iterator[Match]:
        """Every var_mean, var and std on one of the devices."""
        for target in (aten.var_mean.correction, aten.var.correction, aten.std.correction):
            for node in list(facts.gm.graph.find_nodes(op="call_function", target=target)):
                like = tensor(node.args[0])
                if like is not None and like.device.type in self.devices:
                    yield Match({"node": node}, (node,))

    def check(self, match: Match, facts: Facts) -> Refuse | None:
        """See Legality."""
        node: Node = match.node
        like, sizes = tensor(node.args[0]), shape(node.args[0]) or ()
        assert like is not None
        dims = _dims(node, len(sizes))
        if like.dtype not in (torch.float32, torch.float64):
            return Refuse("neither float32 nor float64", node)
        if not all(isinstance(n, int) for n in sizes):
            return Refuse("a size is symbolic", node)
        both = node.target is aten.var_mean.correction
        if both and any(user.target is not operator.getitem for user in node.users):
            return Refuse("its results leave together", node)
        length = math.prod(sizes[d] for d in dims)
        if not length or not isinstance(_correction(node), (int, float)) or length <= _correction(node):
            return Refuse("there are fewer values than degrees of freedom taken off", node)
        if not scarce(math.prod(sizes) // length, length, along_rows(like, dims)):
            return Refuse("its rows keep the device busy", node)
        return None

    def replace(self, match: Match, facts: Facts) -> None:
        """Each result by name."""
        node, graph = match.node, facts.gm.graph
        x, sizes = node.args[0], shape(node.args[0]) or ()
        dims, keep = _dims(node, len(sizes)), bool(node.kwargs.get("keepdim", False))
        length = math.prod(sizes[d] for d in dims)
        with graph.inserting_before(node):
            mean = edit.insert(graph, aten.mean.dim, (x, dims, True), origin=(node,))
            off = edit.insert(graph, aten.sub.Tensor, (x, mean), origin=(node,))
            square = edit.insert(graph, aten.mul.Tensor, (off, off), origin=(node,))
            total = edit.insert(graph, aten.sum.dim_IntList, (square, dims, True), origin=(node,))
            variance = edit.insert(graph, aten.div.Tensor, (total, float(length - _correction(node))), origin=(node,))
            if node.target is aten.std.correction:
                variance = edit.insert(graph, aten.sqrt.default, (variance,), origin=(node,))
            made = [variance, mean] if node.target is aten.var_mean.correction else [variance]
            if not keep:
                made = [edit.insert(graph, aten.squeeze.dims, (each, dims), origin=(node,)) for each in made]
        if len(made) == 1:
            edit.replace(node, made[0])
            return
        for user in list(node.users):
            edit.replace(user, made[user.args[1]])


def _dims(node: Node, rank: int) -> list[int]:
    given = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    return sorted(d % rank for d in given) if given else list(range(rank))  # type: ignore[union-attr, operator]


def _correction(node: Node) -> float:
    given = node.kwargs.get("correction", 1)
    return 1 if given is None else given  # type: ignore[return-value]
