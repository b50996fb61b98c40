"""Residual sublayers of a torch-level (Dynamo) graph, found by what is computed and not by anybody's class names.

Attention: from the core's queries and keys the walk goes back to the linear maps that made them, carrying for every element
the number of the weight row that it came from: that tells fused and separate q/k/v apart, finds shared heads, and, where
rotary embedding adds a row and its mate, how they pair.  From its result the walk goes forward to the addition into the
residual stream.  Whatever does not fit is a sublayer with a ``refusal``, which says why.

MLP: a residual addend that is computed from the stream and parameters alone, by two linear maps or more and no attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from . import cores, stream
from .parts import Linear, Reader, Refused, op, plain
from .rows import Rows, Tracker
from .scores import Coupling, Projection


@dataclass
class Sublayer:
    """One residual sublayer. ``add`` is the node that adds ``out`` to ``keep``; ``residual`` the stream it reads.

    ``part`` is "attention" or "mlp" (then ``core`` is its last linear map and there are neither queries nor keys).
    ``maps`` are its linear maps, ``output`` the last of them; ``weights`` are hashed for a plan.
    """

    index: int
    core: Node
    part: str = "attention"
    out: Node | None = None
    add: Node | None = None
    keep: Node | None = None
    residual: Node | None = None
    output: Linear | None = None
    maps: list[Linear] = field(default_factory=list)
    queries: Rows | None = None
    keys: Rows | None = None
    scale: float = 1.0
    gain: Tensor | None = None
    shift: Tensor | None = None
    refusal: str = ""  # it cannot be removed
    weights: list[Node] = field(default_factory=list)

    @property
    def place(self) -> int | str:
        """How a plan and a report call it: n, or "mlp n"."""
        return self.index if self.part == "attention" else f"{self.part} {self.index}"


class Finder:
    """All sublayers of one graph. ``real``: placeholder → real value; ``parameters``: placeholders that are weights."""

    def __init__(self, gm: GraphModule, real: Mapping[Node, Any], parameters: set[Node]) -> None:
        self.gm, self.real, self.parameters = gm, real, parameters
        self.reader = Reader(gm, real, parameters)
        self.tracker = Tracker(self.reader)

    def cores(self) -> Iterator[Node]:
        """Attention calls, and softmaxes whose result meets values, in execution order."""
        return cores.cores(self.gm)

    def sublayers(self) -> list[Sublayer]:
        """Every attention core as a sublayer; those that cannot be handled carry the reason."""
        found = []
        for index, core in enumerate(self.cores()):
            s = Sublayer(index, core)
            try:
                self._projections(s)
                s.out, s.add, s.keep, s.output = stream.addition(self.reader, cores.result(core))
                s.maps = [s.queries.linear, s.keys.linear, s.output]  # type: ignore[union-attr]
                self._stream(s)
            except Refused as e:
                s.refusal = str(e)
            found.append(s)
        return found

    def _projections(self, s: Sublayer) -> None:
        q, k, s.scale = cores.inputs(s.core, self.reader)
        self.tracker.unknown = ""
        queries, keys = self.tracker.rows(q), self.tracker.rows(k)
        if queries is None or keys is None:
            raise Refused(self.tracker.unknown or "its queries or keys come from no linear map of the graph")
        s.scale *= queries.factor * keys.factor
        s.queries, s.keys = queries, keys
        s.weights = list(dict.fromkeys([queries.linear.weight, keys.linear.weight]))
        if plain(queries.linear.source) is not plain(keys.linear.source):
            raise Refused("cross-attention: queries and keys are made of different tensors")

    def _stream(self, s: Sublayer) -> None:
        """The residual stream feeds the projections, through a norm at most; its gain and shift."""
        assert s.queries is not None and s.add is not None and s.keep is not None
        ends = stream.leaves(s.add, s.keep)
        s.residual, s.gain, s.shift = stream.through_norm(self.reader, plain(s.queries.linear.source), ends)
        if s.residual is None:
            raise Refused(
                "its output is not a plain residual addend: the stream that it reads is not what it is added to"
            )

    def mlps(self) -> list[Sublayer]:
        """Residual MLPs in execution order. Where each follows an attention sublayer of its own, it has that one's number,
        else its position."""
        order = {n: i for i, n in enumerate(self.gm.graph.nodes)}
        attention = list(self.cores())
        found: list[Sublayer] = []
        for node in self.gm.graph.nodes:
            output = self.reader.linear(node)
            if output is None:
                continue
            try:
                out, add, keep, _ = stream.addition(self.reader, node, output)
            except Refused:
                continue
            way = stream.branch(self.reader, out, stream.leaves(add, keep), attention)
            if way is None or len(way[1]) < 2:
                continue
            maps = [m for m in way[1] if m is not output][::-1] + [output]
            weights = list(dict.fromkeys(m.weight for m in maps))
            found.append(Sublayer(len(found), node, "mlp", out, add, keep, way[0], output, maps, weights=weights))
        blocks = [sum(order[c] < order[s.core] for c in attention) - 1 for s in found]
        if len(set(blocks)) == len(blocks) and all(n >= 0 for n in blocks):
            for s, n in zip(found, blocks):
                s.index = n
        return found

    def again(self, s: Sublayer) -> Sublayer:
        """``s`` with its addition looked up anew: removing the other addend of a parallel block took it away."""
        if s.part == "attention":
            out, add, keep, _ = stream.addition(self.reader, cores.result(s.core))
        else:
            out, add, keep, _ = stream.addition(self.reader, s.core, s.output)
        return replace(s, out=out, add=add, keep=keep)

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


__all__ = ["Finder", "Linear", "Refused", "Rows", "Sublayer", "op"]
