"""Values made of a model's parameters: parameters themselves and derived weights, and new derived weights made of them.

A derived weight's sources are inputs of the graph as Dynamo gave it, so a rewrite of what another rewrite made (the
BatchNorm after a merged convolution, say) composes the two computations: one derived weight, made in one go from the
parameters in float64 and rounded once. The one that stood between goes when nothing reads it any more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ..graph import edit
from ..graph.facts import Facts

Compute = Callable[[list[torch.Tensor]], torch.Tensor]


@dataclass(frozen=True)
class Constant:
    """A parameter or buffer (``compute`` is None), or what is computed from some; ``sources`` are input positions."""

    sources: tuple[int, ...]
    compute: Compute | None = None
    volatile: tuple[int, ...] = ()
    share: str | None = ""
    recipe: Any = None


def constant(node: Any, facts: Facts) -> Constant | None:
    """What the node's value is made of, if only of parameters and buffers that the graph does not write; else None."""
    if not isinstance(node, Node) or node.op != "placeholder":
        return None
    if node in facts.static:
        return Constant((facts.position(node),)) if node not in facts.mutated else None
    for derived in reversed(facts.gm.meta.get(edit.DERIVED_KEY, ())):
        if derived.name == node.target:
            return Constant(derived.sources, derived.compute, derived.volatile, derived.share, derived.recipe)
    return None


def add(facts: Facts, parts: Sequence[Node], outer: Compute, val: torch.Tensor, share: str, recipe: list[Any] | None,
        origin: Iterable[Node] = (), moving: Sequence[Node] = ()) -> Node:  # fmt: skip
    """A new input whose value is ``outer`` of the values of ``parts``, all of which are constants.

    ``moving`` are those parts that torch writes without telling. ``outer`` computes wide and rounds once: where parts
    are derived weights themselves it is given all of them in float64, and its result is rounded to val's dtype.
    """
    key, made = edit.value_key(facts.gm.graph), [constant(part, facts) for part in parts]
    known = [each for each in made if each is not None]
    assert len(known) == len(parts)
    sources = tuple(dict.fromkeys(position for each in known for position in each.sources))
    volatile = {position for each in known for position in each.volatile}
    volatile |= {each.sources[0] for part, each in zip(parts, known) if part in moving and each.compute is None}
    if all(each.compute is None for each in known) and len(sources) == len(parts):
        return edit.add_derived(facts.gm, sources, outer, val, share, origin, key, sorted(volatile), recipe)
    where = {position: index for index, position in enumerate(sources)}
    inner = [([where[position] for position in each.sources], each) for each in known]
    kind = str(val.dtype)[6:]
    compute = composed(outer, [(indices, each.compute) for indices, each in inner], val.dtype)
    whole = recipe is not None and all(each.compute is None or each.recipe is not None for each in known)
    nested = ["compose", recipe, [[indices, each.recipe] for indices, each in inner], kind] if whole else None
    shared = None if any(each.share is None for each in known) else \
        f"compose {share} {kind} {[(indices, each.share) for indices, each in inner]}"  # fmt: skip
    return edit.add_derived(facts.gm, sources, compute, val, shared, origin, key, sorted(volatile), nested)


def composed(outer: Compute, inner: Sequence[tuple[Sequence[int], Compute | None]], kind: torch.dtype) -> Compute:
    """outer(inner₀(sources[…]), …) computed in float64 and rounded to ``kind`` once; None: the source itself."""

    def compute(sources: list[torch.Tensor]) -> torch.Tensor:
        wide = [s.to(torch.float64) if s.is_floating_point() else s for s in sources]
        values = [wide[indices[0]] if each is None else each([wide[i] for i in indices]) for indices, each in inner]
        return outer(values).to(kind)

    return compute


def drop_unused(gm: GraphModule, parts: Iterable[Node | None]) -> None:
    """Forget those derived weights among ``parts`` that nothing reads any more: they are neither computed nor kept."""
    gone = {part.target for part in parts if part is not None and not part._erased and not part.users}
    table: list[edit.Derived] = gm.meta.get(edit.DERIVED_KEY, [])
    names = gone & {each.name for each in table} if gone else gone
    if names:
        table[:] = [each for each in table if each.name not in names]
        for node in list(gm.graph.find_nodes(op="placeholder")):
            if node.target in names:
                gm.graph.erase_node(node)
