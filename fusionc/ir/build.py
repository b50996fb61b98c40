"""From a group of nodes to a Kernel: inline what the members read, store what others need."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from .expr import ONE, ZERO, Const, Expr, Index, Load, Reduce, Size, Var, index, substitute, walk
from .loop import Buffer, Kernel, Store
from .lowering.registry import DTYPE_NAME, LOWERINGS
from .ops import cast, compute_dtype
from .sizes import Unsupported, size_index, sizes_index, strides_index
from .value import Context, Idx, Value


@dataclass(frozen=True)
class Built:
    """A kernel and what its buffers are: `inputs` and `outputs` are nodes in the order of the kernel's buffers."""

    kernel: Kernel
    inputs: tuple[Node, ...]
    outputs: tuple[Node, ...]


class Builder:
    """Builds the kernel of one group.

    nodes        members; anything else that is not a view and not in `inline` is loaded from memory
    index        per member with a single tensor value: its index over the loop variables
    axis_index   per reducing member: index of its reduced dimensions over the axis variables
    """

    def __init__(self, nodes: Sequence[Node], loops: Sequence[Var], axis: Sequence[Var], idx: dict[Node, Idx],
                 axis_index: dict[Node, dict[int, Index]], inline: set[Node], is_lowered: Callable[[Node], bool]):  # fmt: skip
        self.members = set(nodes)
        self.index = idx
        self.inline = inline
        self.is_lowered = is_lowered
        self.ctx = Context()
        self.loops = tuple(Var(f"x{k}", v.extent) for k, v in enumerate(loops))
        self.axis = tuple(Var(f"r{k}", v.extent) for k, v in enumerate(axis))
        self.rename = dict(zip((*loops, *axis), [index(v) for v in (*self.loops, *self.axis)], strict=True))
        self.ctx.axis_vars = self.axis
        for n, along in axis_index.items():
            self.ctx.axis_of[n] = {d: index(substitute(i, self.rename)) for d, i in along.items()}
        self.values: dict[Node, Any] = {}
        self.inputs: dict[Node, Buffer] = {}

    def build(self, stored: Sequence[Node]) -> Built:
        """The kernel that stores the given members.  Raises Unsupported if a reduction would be recomputed per element."""
        stores: list[Store] = []
        outputs: list[Buffer] = []
        axis = set(self.axis)
        for k, node in enumerate(stored):
            idx = tuple([index(substitute(i, self.rename)) for i in self.index[node]])
            value = self.value(node)
            val = node.meta["val"]
            dtype = DTYPE_NAME[val.dtype]
            offset = _offset(idx, strides_index(val.stride()))
            e = cast(value.at(idx), dtype)
            name = f"out{k}"
            outputs.append(Buffer(name, dtype, _extent(val), "out"))
            stores.append(
                Store(name, offset, e, bool((e.free | offset.free) & axis) or (bool(axis) and self._covers(idx)))
            )
        kernel = Kernel((*self.inputs.values(), *outputs), (), self.loops, self.axis, tuple(stores))
        self._check(kernel)
        sizes: dict[str, Size] = {}
        extents = [v.extent for v in (*self.loops, *self.axis)] + [b.size for b in kernel.buffers]
        for n in walk([*kernel.nodes, *extents]):
            if isinstance(n, Size):
                sizes[n.name] = n
        kernel = Kernel(
            kernel.buffers, tuple(sizes[n] for n in sorted(sizes)), kernel.loops, kernel.axis, kernel.stores
        )
        return Built(kernel, tuple(self.inputs), tuple(stored))

    def _covers(self, idx: Idx) -> bool:
        return any(i.free & set(self.axis) for i in idx)

    def _check(self, kernel: Kernel) -> None:
        axis = set(self.axis)
        for n in kernel.nodes:
            if isinstance(n, Reduce) and n.free & axis:
                raise Unsupported("a reduction would be recomputed for every element of the axis")
        for s in kernel.stores:
            if not s.inner and (s.value.free | s.index.free) & axis:
                raise Unsupported("a row value depends on the axis")
            if s.inner and not axis <= s.index.free and any(v.extent is not ONE for v in axis - s.index.free):
                raise Unsupported("a store does not cover the axis")

    def value(self, node: Node) -> Any:
        found = self.values.get(node)
        if found is None:
            found = self.values[node] = self._make(node)
        return found

    def _make(self, node: Node) -> Any:
        val = node.meta.get("val")
        if isinstance(val, torch.SymInt):
            return size_index(val)
        if isinstance(val, (int, float, bool)):
            return val
        if not inlined(node, self.members, self.inline, self.is_lowered):
            return self._load(node)
        if node.target is operator.getitem:
            return self.value(node.args[0])[node.args[1]]  # type: ignore[arg-type]
        args = torch.fx.node.map_arg(node.args, self.value)
        kwargs = torch.fx.node.map_arg(node.kwargs, self.value)
        low = LOWERINGS[node.target]
        found = low.fn(self.ctx, node, *args, **kwargs)
        return _whole_rows(found) if low.kind == "reduce" and node in self.members and isinstance(found, Value) else found

    def _load(self, node: Node) -> Value:
        val = node.meta["val"]
        if not isinstance(val, torch.Tensor):
            raise Unsupported(f"{node.name} is not a tensor")
        dtype = DTYPE_NAME.get(val.dtype)
        if dtype is None:
            raise Unsupported(f"dtype {val.dtype}")
        shape, stride = sizes_index(val.shape), strides_index(val.stride())
        work = compute_dtype(dtype)

        def at(idx: Idx) -> Expr:
            buffer = self.inputs.get(node)
            if buffer is None:
                buffer = self.inputs[node] = Buffer(
                    f"in{len(self.inputs)}", dtype, _extent(val), "in", self._scalar(val)
                )
            guard = self.ctx.guard
            if isinstance(guard, Const):
                guard = None
            return cast(Load(buffer.name, _offset(idx, stride), dtype, guard), work)

        return Value(self.ctx, shape, dtype, at)

    def _scalar(self, val: torch.Tensor) -> bool:
        return val.dim() == 0 and val.device.type == "cpu" and self.device_type != "cpu"

    device_type = "cpu"


def inlined(node: Node, members: set[Node], inline: set[Node], is_lowered: Callable[[Node], bool]) -> bool:
    """Is the node computed inside the kernel of `members`, from its arguments, rather than loaded from memory?"""
    if not is_lowered(node):
        return False
    if node.target is operator.getitem:
        return node in members or LOWERINGS[_root_target(node)].kind == "view"
    low = LOWERINGS.get(node.target)
    return low is not None and (low.kind == "view" or node in members or node in inline)


def _root_target(node: Node) -> Any:
    while node.target is operator.getitem:
        node = node.args[0]  # type: ignore[assignment]
    return node.target


def _whole_rows(x: Value) -> Value:
    """A reduction of a kernel's own rows: what reads it for a part of a row only still reduces the row once, outside."""

    def at(idx: Idx) -> Expr:
        inside = all(i is ZERO or (v := i.single_var()) is not None and v.extent is n for i, n in zip(idx, x.shape, strict=True))
        return x.ctx.unguarded(lambda: x.at(idx)) if inside else x.at(idx)

    return Value(x.ctx, x.shape, x.dtype, at)


def _offset(idx: Idx, stride: Idx) -> Index:
    total = ZERO
    for i, s in zip(idx, stride, strict=True):
        if i is not ZERO:
            total = total + i * s
    return total


def _extent(val: torch.Tensor) -> Index:
    """Elements addressed from the data pointer: 1 + Σ (size - 1)·stride."""
    total = ONE
    for n, s in zip(sizes_index(val.shape), strides_index(val.stride()), strict=True):
        total = total + (n - 1) * s
    return total
