"""Results that AOTAutograd copies into an input at the end are written there by the kernel that computes them.

An optimiser's step ends in one `copy_` for each parameter and each of its states: as calls they cost a launch each, and
one more read and write of everything.  Where the kernel that computes the value is the last to read what the input held,
and reads of it only the element that it writes, the input becomes a buffer of that kernel, read and written.

A result is written in place if all of this holds (else the `copy_` stays as it is):
    the copied value is a result of a pointwise kernel, of the input's dtype, sizes and strides, and no view;
    nothing else writes the input, and nothing reads what the `copy_` returns;
    the value is not written to another input as well (equal values are one node): the second `copy_` stays;
    the value does not leave the graph (it would be the input itself);
    whoever else reads the input comes before the kernel; the kernel reads it at the element that it writes, unguarded;
    the input's layout is guarded, and dense: two of its elements never share memory.
Inputs that share memory with each other are told apart by AOTAutograd, which then passes one base for them.

`reuse_operands` does the same for intermediate results: a pointwise kernel that is the last to read the result of a matmul,
of a convolution or of another kernel writes its own over it.  On a CPU that saves the memory traffic of touching another
tensor, on a GPU a third of the peak of a gated layer.  `reuse_calls` does it for operators that can write over an argument.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from .graph.facts import packet_name
from .ir.build import Built
from .ir.expr import Const, Expr, Load, Rewriter
from .ir.loop import Kernel, Store
from .schedule.group import Call, Group, Grouper, Unit, _mutated_args, _mutates

if TYPE_CHECKING:
    from .compiler import Context, Lowered


def write_in_place(
    cx: Context, grouper: Grouper, units: list[Unit], lowered: Sequence[Lowered], stable: frozenset[Node]
) -> dict[Node, Node]:
    """Result → input that it is written to.  Takes the copies out of `units` and changes kernels in `lowered`."""
    copies = [u for u in units if isinstance(u, Call) and u.node.target is torch.ops.aten.copy_.default]
    if not copies:
        return {}
    state = _State(cx, grouper, units, lowered, stable)
    out: dict[Node, Node] = {}
    for unit in copies:
        value = unit.node.args[1]
        found = state.rewrite(unit) if value not in out and value not in cx.at_zero else None
        if found is not None:
            out[found[0]] = found[1]
            units.remove(unit)
    return out


# library calls whose result is nobody else's memory
_FRESH = frozenset("mm addmm bmm baddbmm convolution conv_relu conv_add_relu".split())


def _fresh(node: Node) -> bool:
    """A call whose result is memory of its own."""
    return packet_name(node) in _FRESH and getattr(node.target, "namespace", "") in ("aten", "fusionc")


def reuse_operands(
    cx: Context, grouper: Grouper, units: Sequence[Unit], lowered: Sequence[Lowered], direct: dict[Node, Node]
) -> dict[Node, Node]:
    """Result → intermediate result that it is written over.  Changes kernels in `lowered`."""
    state = _State(cx, grouper, list(units), lowered, frozenset())
    taken: set[Node] = {*direct, *direct.values()}  # what lies in an input stays there
    out: dict[Node, Node] = {}
    for item in lowered:
        if item.built.kernel.axis or item.built.kernel.scans or len(item.built.outputs) != 1:
            continue
        (value,) = item.built.outputs
        shape = value.meta["val"].shape
        if value in direct or cx.placed(value) or not all(type(n) is int for n in shape):
            continue
        if math.prod(shape) * value.meta["val"].itemsize < _WORTH:
            continue
        for operand in item.built.inputs:
            built = state.over(item, operand, value, out) if operand not in taken else None
            if built is not None:
                item.built = built
                out[value] = operand
                taken.add(operand)
                break
    return out


# operator → (the one that may write its result over an argument, position of that argument)
_OVER = {"fusionc::conv_add_relu": ("conv_add_relu_over", 3)}


def reuse_calls(
    cx: Context, grouper: Grouper, units: Sequence[Unit], lowered: Sequence[Lowered], used: Collection[Node]
) -> dict[Node, Any]:
    """Library calls that write over an argument which nobody reads after them → the operator that does so.

    ``used`` are results that another kernel was allowed to write over, or that lie in an input.
    """
    calls = [u for u in units if isinstance(u, Call) and getattr(u.node.target, "_schema", None) is not None
             and u.node.target._schema.name in _OVER]  # type: ignore[union-attr]
    if not calls:
        return {}
    state = _State(cx, grouper, list(units), lowered, frozenset())
    out: dict[Node, Any] = {}
    for unit in calls:
        name, seat = _OVER[unit.node.target._schema.name]  # type: ignore[union-attr]
        operand = unit.node.args[seat]
        if not isinstance(operand, Node) or operand in used or not state.last_reader(unit, operand):
            continue
        sizes = operand.meta["val"].shape
        if all(isinstance(n, int) for n in sizes) and math.prod(sizes) * operand.meta["val"].itemsize >= _WORTH:
            out[unit.node] = getattr(torch.ops.fusionc, name).default
    return out


_WORTH = 1 << 20  # bytes; less stays in the processor's cache anyway, and is no part of a peak


class _State:
    def __init__(
        self, cx: Context, grouper: Grouper, units: list[Unit], lowered: Sequence[Lowered], stable: frozenset[Node]
    ):
        self.grouper, self.stable = grouper, stable
        self.lowered = {id(item.group): item for item in lowered}
        self.position = {id(u): k for k, u in enumerate(units)}
        self.readers: dict[Node, list[Unit]] = {}  # input → units that read it, the copies into it aside
        self.writers: dict[Node, int] = {}
        for unit in units:
            item = self.lowered.get(id(unit)) if isinstance(unit, Group) else None
            if isinstance(unit, Call):
                written = _mutated_args(unit.node) if _mutates(unit.node) else []
                for n in written:
                    base = grouper.resolve(n)[0]
                    self.writers[base] = self.writers.get(base, 0) + 1
                nodes = [n for n in unit.node.all_input_nodes if n not in written]
            else:
                nodes = list(item.built.inputs) if item is not None else []
            for n in nodes:
                self.readers.setdefault(grouper.resolve(n)[0], []).append(unit)
        self.leaving = set()
        for n in cx.gm.graph.find_nodes(op="output"):
            self.leaving |= {grouper.resolve(a)[0] for a in n.all_input_nodes}

    def over(self, item: Lowered, operand: Node, value: Node, done: dict[Node, Node]) -> Built | None:
        """The kernel that writes `value` over `operand`, if nobody else ever looks at the operand's memory again."""
        unit = self.grouper.unit.get(operand)
        if isinstance(unit, Call):
            if not _fresh(operand):
                return None
        elif unit is None or id(unit) not in self.lowered or operand in done:
            return None
        ours, theirs = value.meta["val"], operand.meta["val"]
        if operand in self.leaving or self.writers.get(operand, 0):
            return None
        if not _same_layout(theirs, ours) and not _same_order(theirs, ours):
            return None
        if any(u is not item.group for u in self.readers.get(operand, [])):
            return None
        built = _joined(item.built, operand, value)
        if built is None or any(self.grouper.resolve(n)[0] is operand for n in built.inputs):
            return None
        return built

    def last_reader(self, unit: Call, operand: Node) -> bool:
        """Nobody looks at the operand's memory after this call, which reads it once."""
        made = self.grouper.unit.get(operand)
        if isinstance(made, Call):
            if not _fresh(operand):
                return False
        elif made is None or id(made) not in self.lowered:
            return False
        if self.grouper.resolve(operand)[1] or operand in self.leaving or self.writers.get(operand, 0):
            return False
        reads: list[Node] = []
        torch.fx.map_arg((unit.node.args, unit.node.kwargs), reads.append)
        if sum(self.grouper.resolve(n)[0] is operand for n in reads) != 1:
            return False
        here = self.position[id(unit)]
        others = [u for u in self.readers.get(operand, []) if u is not unit]
        return all(self.position[id(u)] < here and not _aliases(u) for u in others)

    def rewrite(self, unit: Call) -> tuple[Node, Node] | None:
        """(result, input) if the copy could be taken into the kernel, which is changed then."""
        node = unit.node
        target, value = node.args[:2]
        if (
            not isinstance(target, Node)
            or not isinstance(value, Node)
            or len(node.args) > 2
            or node.kwargs
            or node.users
        ):
            return None
        group = self.grouper.unit.get(value)
        item = self.lowered.get(id(group)) if isinstance(group, Group) else None
        if item is None or target not in self.stable or target in self.leaving or value in self.leaving:
            return None
        kernel = item.built.kernel
        if value not in item.built.outputs or kernel.axis or kernel.scans or self.writers.get(target, 0) != 1:
            return None
        if not _same_layout(target.meta["val"], value.meta["val"]):
            return None
        here = self.position[id(group)]
        others = [u for u in self.readers.get(target, []) if u is not group]
        if any(self.position[id(u)] >= here or _aliases(u) for u in others):
            return None
        built = _joined(item.built, target, value)
        if built is None or any(self.grouper.resolve(n)[0] is target for n in built.inputs):
            return None
        item.built = built
        assert group is not None
        group.preds |= {u for u in others if u is not group}
        return value, target


def _aliases(unit: Unit) -> bool:
    """Whether its result may share memory with what it reads."""
    if isinstance(unit, Group):
        return False
    schema = getattr(unit.node.target, "_schema", None)
    return schema is None or any(a.alias_info is not None for a in schema.arguments)


def _same_layout(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Same dtype, device and static layout without gaps or overlaps."""
    numbers = (*a.shape, *a.stride(), *b.shape, *b.stride())
    if a.dtype != b.dtype or a.device != b.device or not all(type(n) is int for n in numbers):
        return False
    if tuple(a.shape) != tuple(b.shape) or a.stride() != b.stride():
        return False
    span = 1
    for n, s in sorted(zip(a.shape, a.stride(), strict=True), key=lambda p: p[1]):
        if n > 1:
            if s != span:
                return False
            span *= n
    return True


def _same_order(a: torch.Tensor, b: torch.Tensor) -> bool:
    """As many elements, contiguous in both: one is a reshape of the other."""
    whole = (a.is_contiguous(), b.is_contiguous(), a.storage_offset() == 0, all(type(n) is int for n in (*a.shape, *b.shape)))
    return a.dtype == b.dtype and a.device == b.device and all(whole) and a.numel() == b.numel()


def _joined(built: Built, target: Node, value: Node) -> Built | None:
    """The kernel with the buffers of `target` (if it is read) and `value` as one, or None if that changed its result."""
    kernel = built.kernel
    ins = sorted((b for b in kernel.buffers if b.kind == "in"), key=lambda b: int(b.name[2:]))
    outs = sorted((b for b in kernel.buffers if b.kind != "in"), key=lambda b: int(b.name[3:]))
    new = outs[built.outputs.index(value)].name
    if target not in built.inputs:
        return built
    old = ins[built.inputs.index(target)]
    where = [s.index for s in kernel.stores if s.buffer == new]
    if len(where) != 1 or old.scalar:
        return None
    for n in kernel.loads:
        if n.buffer == old.name and (n.index is not where[0] or n.guard is not None):
            return None

    def leaf(e: Expr) -> Expr | None:
        if isinstance(e, Load) and e.buffer == old.name:
            return Load(new, e.index, e.dtype)
        return e if isinstance(e, Const) else None

    rename = Rewriter(leaf)
    stores = tuple([Store(s.buffer, s.index, rename(s.value), s.inner) for s in kernel.stores])
    buffers = tuple([replace(b, kind="inout") if b.name == new else b for b in kernel.buffers if b.name != old.name])
    inputs = tuple([n for n in built.inputs if n is not target])
    return Built(Kernel(buffers, kernel.sizes, kernel.loops, (), stores), inputs, built.outputs)
