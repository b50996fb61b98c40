"""Tensors that one kernel writes for another although the other could make them itself from fewer bytes.

The backward of a batch norm sums dy and dy·(x − μ) and then needs both again at every element.  Grouping hands them over
in float32 where dy and x lie in memory in bfloat16: 8 bytes written and read for 4 that are read.  `find` looks at the
built kernels of a graph for such values and says which are to be computed where they are read; the caller builds the
kernels anew.

    value     a member of a group, cheap arithmetic, read by other groups alone
    sources   what it is computed from, through members that are as cheap: all in memory anyway, of the value's shape and
              strides, or much smaller (a mean of every channel)
    worth it  reading the sources in each reader takes at most three quarters of the bytes of writing and reading the value

Source: recomputation in place of storage as in min-cut partitioners (functorch), at the boundaries of kernels.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping

import torch
from torch.fx import Node

from ..graph.facts import is_dense, same_sizes, same_strides
from ..ir.build import Built
from .group import Group, Grouper, numel_hint, tensor_args, transcendental

SMALLEST = 1 << 20  # bytes of a value: below, it stays in the caches
_STEPS = 12  # operations that may be done again
_WORTH = 0.75  # of the bytes
_MUCH = 8  # how many times smaller a source of another shape is


def find(grouper: Grouper, built: Mapping[Group, Built]) -> tuple[set[Node], set[Group]]:
    """Nodes to compute where they are read, and the groups whose kernels that changes."""
    search = _Search(grouper, built)
    values = [n for b in built.values() for n in b.outputs if _bytes(n) >= SMALLEST]
    for node in sorted(values, key=lambda n: (-_bytes(n), grouper.position[n])):
        search.consider(node)
    return search.inline, search.changed


class _Search:
    def __init__(self, grouper: Grouper, built: Mapping[Group, Built]) -> None:
        self.grouper = grouper
        self.stored = {n for b in built.values() for n in b.outputs}
        self.reads = {g: set(b.inputs) for g, b in built.items()}
        self.readers: dict[Node, list[Group]] = {}
        for g, b in built.items():
            for n in b.inputs:
                self.readers.setdefault(n, []).append(g)
        self.kept: set[Node] = set()  # sources of what is computed again
        self.inline: set[Node] = set()
        self.changed: set[Group] = set()

    def consider(self, node: Node) -> None:
        """Have `node` computed by its readers, if that is possible and worth it."""
        readers, home = self.readers.get(node, []), self.grouper.unit[node]
        if node in self.kept or not readers or not self._cheap(node) or not isinstance(home, Group):
            return
        if self.grouper.read_outside(node, (home, *readers)):
            return
        found = self._sources(node, home)
        if found is None:
            return
        sources, between = found
        more = sum(_bytes(s) for g in readers for s in sources - self.reads[g])
        if more > _WORTH * _bytes(node) * (1 + len(readers)):
            return
        self.inline |= {node, *between}
        self.kept |= sources
        self.stored.discard(node)
        self.changed |= {home, *readers}
        for g in readers:
            self.reads[g] = self.reads[g] - {node} | sources

    def _sources(self, node: Node, home: Group) -> tuple[set[Node], set[Node]] | None:
        """What `node` is computed from in memory, and the members of its group between; None if it is to be kept."""
        sources: set[Node] = set()
        between: set[Node] = set()
        todo, steps = [node], 0
        while todo:
            steps += 1
            if steps > _STEPS:
                return None
            for _, a in tensor_args(todo.pop()):
                base, _ = self.grouper.resolve(a)
                if base in between or base in sources:
                    continue
                if base not in self.grouper.lowered or base in self.stored:
                    if not self._readable(base, a, node):
                        return None
                    sources.add(base)
                elif self._cheap(base) and (base in self.grouper.inline or self.grouper.unit.get(base) is home):
                    between.add(base)
                    todo.append(base)
                else:
                    return None
        return sources, between

    def _readable(self, source: Node, view: Node, node: Node) -> bool:
        """Does each element of `node` need one element of it, at the same place, or of something far smaller?"""
        mine, its = node.meta["val"], view.meta.get("val")
        if not isinstance(its, torch.Tensor) or its.device != mine.device or self.grouper.written(source):
            return False
        if numel_hint(source) * _MUCH <= numel_hint(node):
            return True
        if same_sizes(its.shape, mine.shape):
            return same_strides(its.shape, its.stride(), mine.stride())
        return numel_hint(view) == numel_hint(node) and is_dense(its) and is_dense(mine)

    def _cheap(self, node: Node) -> bool:
        low = self.grouper.lowered[node]
        return low.kind == "pointwise" and node.target is not operator.getitem and not transcendental(node)


def _bytes(node: Node) -> int:
    return numel_hint(node) * int(node.meta["val"].dtype.itemsize)
