"""Horizontal fusion in one compilation: which of its launches become one, and the steps of the Program for them.

`schedule.horizontal` decides by dependences and limits; here its inputs are made from groups and their kernels, and its
answer becomes one launch, whose small results lie in one allocation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from . import errors
from .codegen import program as prog
from .config import ONE_LAUNCH
from .schedule.group import Call, Group, Grouper, Unit, _mutates
from .schedule.horizontal import Item, Many, Step, bundles, template

if TYPE_CHECKING:
    from .compiler import Context, Lowered, _Linker

ARENA = 8 << 20  # bytes: whoever keeps one result keeps the allocation of all
SAVED = 1 << 20  # bytes, where most results wait for the backward pass
MIXED = 1 << 16  # bytes, where results are not alike: a loss that is kept must not keep an image
ALIGNMENT = 16
TARGETS = ("triton", "interpret", "sm_80", "sm_90", "sm_100", "gfx942")


@dataclass
class Arena:
    """Results in one allocation: `step` of the Program without names, for these nodes in order."""

    nodes: list[Node]
    whole: tuple[int, ...]
    rows: tuple[int, ...]
    places: tuple[tuple[tuple[int, ...], tuple[int, ...], int], ...]
    first: list[int]  # element at which each begins


@dataclass
class Bundle:
    """Launches that become one: `slots` are its parameters (input nodes, arenas, output nodes) in order."""

    members: list[Lowered]
    many: Many
    slots: list[Any]
    arenas: list[Arena] = field(default_factory=list)


def find(cx: Context, grouper: Grouper, units: Sequence[Unit], lowered: Sequence[Lowered],
         direct: Mapping[Node, Node]) -> list[Bundle]:  # fmt: skip
    """Bundles of these groups' kernels; none where the target has no horizontal launches."""
    if cx.target not in TARGETS or len(lowered) < 2 or ONE_LAUNCH in cx.config.disable:
        return []
    from .targets.many import device_of, kind_of

    device = device_of(cx)
    by_group = {id(item.group): item for item in lowered}
    position = {id(u): k for k, u in enumerate(units)}
    results = {a for n in cx.gm.graph.find_nodes(op="output") for a in n.all_input_nodes}
    kinds: dict[str, str | None] = {}
    families: dict[str, str] = {}
    steps: list[Step] = []
    for unit in units:
        reads = frozenset(position[id(p)] for p in unit.preds if id(p) in position)
        item = by_group.get(id(unit)) if isinstance(unit, Group) else None
        if item is None:
            steps.append(Step(reads, writes=isinstance(unit, Call) and _mutates(unit.node)))
            continue
        kernel = item.built.kernel
        if kernel.text not in kinds:
            kinds[kernel.text], families[kernel.text] = kind_of(kernel, device), template(kernel)[0]
        kind = kinds[kernel.text]
        if kind is None or not all(_plain(n) for n in item.built.outputs):
            steps.append(Step(reads))
            continue
        slots = frozenset((*item.built.inputs, *item.built.outputs))
        held = sum(n.meta["val"].nbytes for n in item.built.outputs if n not in direct and n not in results)
        steps.append(Step(reads, kind, families[kernel.text], slots, held))
    limit = ARENA if cx.record.stage == "inference" else SAVED
    found = [[by_group[id(units[k])] for k in members] for members in bundles(steps)]
    return [_bundle(members, direct, results, cx.placed, limit) for members in found]


def _plain(node: Node) -> bool:
    val = node.meta["val"]
    return isinstance(val, torch.Tensor) and all(
        type(n) is int for n in (*val.shape, *val.stride(), val.storage_offset())
    )


def _bundle(members: list[Lowered], direct: Mapping[Node, Node], results: set[Node], placed: Callable[[Node], bool],
            limit: int) -> Bundle:  # fmt: skip
    fresh = [n for m in members for n in m.built.outputs if n not in direct and not placed(n)]
    # what leaves the graph must not keep what does not
    arenas = _arenas([n for n in fresh if n in results], limit, MIXED)
    arenas += _arenas([n for n in fresh if n not in results], SAVED, SAVED)
    home = {n: (a, first) for a in arenas for n, first in zip(a.nodes, a.first, strict=True)}
    kernels: dict[str, int] = {}
    slots: dict[Any, int] = {}
    things: list[Any] = []
    items: list[Item] = []
    for m in members:
        kernel = m.built.kernel
        number = kernels.setdefault(kernel.text, len(kernels))
        ins = sorted([b.name for b in kernel.buffers if b.kind == "in"], key=lambda n: int(n[2:]))
        outs = sorted([b.name for b in kernel.buffers if b.kind != "in"], key=lambda n: int(n[3:]))
        nodes = dict(zip((*ins, *outs), (*m.built.inputs, *m.built.outputs), strict=True))
        mine: list[tuple[int, int]] = []
        for b in kernel.buffers:
            node = nodes[b.name]
            thing, first = home.get(node, (node, 0)) if b.kind != "in" else (node, 0)
            key = (id(thing), b.dtype, b.scalar)
            if key not in slots:
                slots[key] = len(slots)
                things.append(thing)
            mine.append((slots[key], first))
        items.append(Item(number, tuple(mine)))
    distinct: dict[str, Any] = {m.built.kernel.text: m.built.kernel for m in members}
    return Bundle(members, Many(tuple(distinct.values()), tuple(items)), things, arenas)


def _arenas(nodes: Sequence[Node], limit: int, mixed: int) -> list[Arena]:
    """Small results in shared allocations: runs of rows of one where their other sizes agree (at most `limit` bytes in an
    allocation), else by dtype (at most `mixed`)."""
    out: list[Arena] = []
    loose: dict[torch.dtype, list[Node]] = {}
    rows: dict[Any, list[Node]] = {}
    for n in nodes:
        val = n.meta["val"]
        if not val.numel() or val.nbytes > limit // 2:
            continue
        row = val.nbytes // val.shape[0] if val.dim() else 0
        if val.dim() and val.is_contiguous() and row * val.shape[0] % ALIGNMENT == 0:
            rows.setdefault((val.dtype, tuple(val.shape[1:])), []).append(n)
        else:
            loose.setdefault(val.dtype, []).append(n)
    for (dtype, rest), found in rows.items():
        if len(found) < 4:
            loose.setdefault(dtype, []).extend(found)
            continue
        for part in _portions(found, limit):
            sizes = tuple(n.meta["val"].shape[0] for n in part)
            row = part[0].meta["val"].numel() // sizes[0]
            first = [sum(sizes[:k]) * row for k in range(len(sizes))]
            out.append(Arena(part, (sum(sizes), *rest), sizes, (), first))
    for dtype, found in loose.items():
        for part in _portions([n for n in found if n.meta["val"].nbytes <= mixed // 2], mixed):
            if len(part) < 2:
                continue
            at, places = 0, []
            step = max(1, ALIGNMENT // dtype.itemsize)
            for n in part:
                val = n.meta["val"]
                places.append((tuple(val.shape), tuple(val.stride()), at))
                at += -(-_span(val) // step) * step
            out.append(Arena(part, (at,), (), tuple(places), [p[2] for p in places]))
    return out


def _span(val: torch.Tensor) -> int:
    return 1 + sum((n - 1) * s for n, s in zip(val.shape, val.stride(), strict=True))


def _portions(nodes: list[Node], limit: int) -> list[list[Node]]:
    """In order, each of at most `limit` bytes."""
    out: list[list[Node]] = [[]]
    held = 0
    for n in nodes:
        size = _span(n.meta["val"]) * n.meta["val"].dtype.itemsize
        if held + size > limit and out[-1]:
            out.append([])
            held = 0
        out[-1].append(n)
        held += size
    return out


def start(cx: Context, found: list[Bundle]) -> Callable[[], tuple[list[Bundle], dict[str, Any]]]:
    """Start to compile the bundles beside what follows.  The result waits; it returns the bundles that could be built and
    their launchers by symbol (the others run as launches of their own) and puts their records in front of the kernels'."""
    if not found:
        return lambda: ([], {})
    from .targets.many import start as start_compiling

    waiting = start_compiling(cx, {b.many.symbol: b.many for b in found})
    return lambda: _built(cx, found, waiting)


def _built(cx: Context, found: list[Bundle],
           waiting: Callable[[], tuple[dict[str, Any], dict[str, str]]]) -> tuple[list[Bundle], dict[str, Any]]:  # fmt: skip
    others, cx.record.kernels[:] = list(cx.record.kernels), []
    functions, problems = waiting()
    for symbol, why in problems.items():
        if cx.config.strict:
            raise errors.StrictError(f"horizontal launch {symbol} could not be built: {why}")
        errors.warn_once(
            f"many:{why}", f"fusionc: horizontal launch {symbol} could not be built; its kernels run alone: {why}"
        )
    counts: dict[str, int] = {}
    for b in found:
        counts[b.many.symbol] = counts.get(b.many.symbol, 0) + 1
    for record in cx.record.kernels:
        record.uses = counts.get(record.symbol, record.uses)
    cx.record.kernels += others
    return [b for b in found if b.many.symbol in functions], functions


def launch(link: _Linker, bundle: Bundle) -> None:
    """Append the steps of a bundle: inputs, results, one launch."""
    p = link.program
    for m in bundle.members:
        for node in m.built.inputs:
            link.tensor(node)
            link.expect(node)
    first: dict[int, str] = {}
    for arena in bundle.arenas:
        names = [link.fresh("b") for _ in arena.nodes]
        for node, name in zip(arena.nodes, names, strict=True):
            link.name[node] = name
        val = arena.nodes[0].meta["val"]
        p.steps.append(prog.Carve(tuple(names), arena.whole, arena.rows, arena.places, val.dtype, val.device))
        first[id(arena)] = names[0]
    for m in bundle.members:
        for node in m.built.outputs:
            if node not in link.name:
                link.output(node)
    symbol, parameters = bundle.many.symbol, bundle.many.parameters
    buffers = tuple([first[id(s)] if isinstance(s, Arena) else link.name[s] for s in bundle.slots])
    note = f"{len(bundle.members)} launches in one: " + "; ".join(
        ", ".join(n.name for n in m.group.nodes) for m in bundle.members[:4]
    )
    p.steps.append(prog.Launch(symbol, buffers, (), "triton", False, note[:100], tuple(b.scalar for b in parameters)))
    p.constants[symbol] = link.symbols[symbol]
