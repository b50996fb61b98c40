"""Which ATen nodes become one kernel, and which stay calls of a library.

Groups grow in graph order.  Every group has loop variables and, once it reduces, axis variables; every member knows the
index of its elements over them.  A node joins the group of a producer when that index can be carried through the views
between them (`Lowering.forward`); so siblings, prologues, epilogues and several reductions over one axis meet in one
group, while anything that would have to be recomputed many times, or would make the group non-convex, does not.

Three kinds of node have no group of their own: views (index maps), *inline* nodes (cheap, evaluated wherever they are
read) and calls.  Grouping decides speed only: a kernel inlines what its members read, so any grouping is correct, except
that a reduction must not end up evaluated once per axis element; `fusionc.ir.build` checks that.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from ..graph.facts import KEEP_PLACE, aliased_by, overlaps, packet_name
from ..graph.parallel import along_rows, scarce
from ..ir.alike import Alike
from ..ir.expr import ONE, ZERO, Index, Var, index, substitute
from ..ir.lowering.registry import DTYPE_NAME, LOWERINGS, Lowering, shape_of
from ..ir.ops import FLOAT_ONLY
from ..ir.sizes import Unsupported, size_index, sizes_index, strides_index
from ..ir.value import Context, Value, normalize_dim, numel

Idx = tuple[Index, ...]
MAX_MEMBERS = 96
MAX_INPUTS = 28
_MANY = 16  # operations that are done again rather than read
_PARTS, _PARTS_CPU = 32, 4  # of a concatenation in a kernel; on a CPU the latter where there are more checks than
_CHECKS = 1 << 16
# Groups that only share an operand are merged if they are at most this many nodes apart: results must not wait in memory.
SIBLING_REACH = 48


@dataclass(eq=False)
class Group:
    """Members of one future kernel, in graph order."""

    id: int
    first: int
    last: int
    nodes: list[Node] = field(default_factory=list)
    index: dict[Node, Idx] = field(default_factory=dict)
    axis_index: dict[Node, dict[int, Index]] = field(default_factory=dict)
    loops: list[Var] = field(default_factory=list)
    axis: list[Var] = field(default_factory=list)
    preds: set[Group | Call] = field(default_factory=set)
    scan: bool = False
    split: bool = False


@dataclass(eq=False)
class Call:
    """One node run by ATen or a library; `reason` is why it was not lowered ("" where that is the intention)."""

    node: Node
    first: int
    last: int
    reason: str = ""
    preds: set[Group | Call] = field(default_factory=set)


Unit = Group | Call

LIBRARY = frozenset(
    "mm addmm bmm baddbmm convolution convolution_backward _scaled_dot_product_flash_attention "
    "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention _scaled_dot_product_flash_attention_for_cpu "
    "_scaled_dot_product_flash_attention_backward _scaled_dot_product_efficient_attention_backward "
    "_scaled_dot_product_cudnn_attention_backward _scaled_dot_product_flash_attention_for_cpu_backward "
    "_scaled_dot_product_fused_attention_overrideable _grouped_mm _fft_c2c _fft_r2c _fft_c2r topk sort "
    # writes into the memory of an input: ATen's kernel is one launch as well
    "copy_ index_copy_ index_put_ index_fill_ scatter_ _foreach_add_ "
    # no kernel at all
    "empty empty_like empty_strided new_empty new_empty_strided".split()
)


def is_view(node: Node) -> bool:
    low = LOWERINGS.get(node.target) if node.op == "call_function" else None
    if low is not None:
        return low.kind == "view"
    return (
        node.op == "call_function"
        and node.target is operator.getitem
        and isinstance(node.args[0], Node)
        and is_view(node.args[0])
    )


def tensor_args(node: Node) -> tuple[tuple[int, Node], ...]:
    """(position, node) of every tensor operand, nested lists flattened (keyword operands have position -1)."""
    known = node.meta.get(_ARGS)  # asked for ten times a node
    if known is not None and known[0] is node.args and known[1] is node.kwargs:
        return known[2]  # type: ignore[no-any-return]
    out: list[tuple[int, Node]] = []

    def visit(pos: int, a: object) -> None:
        if isinstance(a, Node):
            if not isinstance(a.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool, int, float, bool)):
                out.append((pos, a))
        elif isinstance(a, (list, tuple)):
            for b in a:
                visit(pos, b)

    for pos, a in enumerate(node.args):
        visit(pos, a)
    for a in node.kwargs.values():
        visit(-1, a)
    node.meta[_ARGS] = (node.args, node.kwargs, tuple(out))
    return tuple(out)


_ARGS = "fusionc_tensor_args"


def hint(n: Index | int | torch.SymInt) -> int:
    """A number for a size: exact if it is one, the value seen at compile time if it is symbolic."""
    if isinstance(n, int):
        return n
    if isinstance(n, torch.SymInt):
        h = n.node.hint
        return int(h) if h is not None else 8192
    return n.value if n.is_const else 8192


def _overlaps(t: torch.Tensor) -> bool:
    """May two positions of a tensor be the same memory, at the sizes seen?"""
    return overlaps([hint(n) for n in t.shape], [hint(n) for n in t.stride()])


def numel_hint(node: Node) -> int:
    """Elements of a value; of several results, those of the first."""
    n, val = 1, node.meta["val"]
    for s in (val[0] if isinstance(val, (tuple, list)) else val).shape:
        n *= hint(s)
    return n


class Grouper:
    """Build units (groups and calls, in executable order) from an ATen graph with `meta["val"]` on every node."""

    def __init__(
        self,
        graph: Graph,
        device: torch.device,
        never: dict[Node, str] | None = None,
        alone: set[Node] | None = None,
        alike: Alike | None = None,
        gpu: bool | None = None,
    ):
        self.gpu = device.type != "cpu" if gpu is None else gpu  # whose kernels these are, wherever the tensors may be
        self.graph = graph
        self.alike = alike or Alike()
        self.device = device
        self.never = never or {}  # nodes to leave to ATen, with the reason
        self.alone = alone or set()  # nodes whose group turned out wrong: one kernel each
        self.position = {n: i for i, n in enumerate(graph.nodes)}
        self.lowered: dict[Node, Lowering] = {}
        self.reason: dict[Node, str] = {}
        self.inline: set[Node] = set()
        self.unit: dict[Node, Unit] = {}
        self.units: list[Unit] = []
        self._deps: dict[Node, frozenset[Node]] = {}
        self._resolve: dict[Node, tuple[Node, tuple[Node, ...]]] = {}
        self._from_nothing: dict[Node, int | None] = {}
        self._writes = any(n.op == "call_function" and _mutates(n) for n in graph.nodes)
        self._readers: dict[Node, set[Unit]] = {}  # by memory: units that read it since it was last written
        self._writer: dict[Node, Unit] = {}
        self._last_effect: Unit | None = None

    # -- what can be lowered ---------------------------------------------------------------------------------------
    def classify(self) -> None:
        for node in self.graph.nodes:
            if node.op != "call_function":
                continue
            low = LOWERINGS.get(node.target)
            if node in self.never:
                self.reason[node] = self.never[node]
                continue
            if low is None:
                if node.target is operator.getitem and node.args[0] in self.lowered:
                    self.lowered[node] = self.lowered[node.args[0]]
                    continue
                self.reason[node] = self._why_not(node)
                continue
            key = self.alike.node_key(node)
            if key not in self.alike.checked:
                self.alike.checked[key] = self._refusal(node, low)
            why = self.alike.checked[key]
            if why is None:
                self.lowered[node] = low
            else:
                self.reason[node] = why
        for node in reversed(list(self.lowered)):  # readers first: what one of them is decides on what it reads
            val = node.meta["val"]
            if self.device.type != "cpu" and _cpu_number(val) and not self._only_in_kernels(node):
                del self.lowered[node]
                self.reason[node] = f"on {val.device}"

    def _only_in_kernels(self, node: Node) -> bool:
        """Every reader, through views, is part of a kernel."""
        return all(user in self.lowered and (self.lowered[user].kind != "view" or self._only_in_kernels(user))
                   for user in node.users)  # fmt: skip

    @staticmethod
    def _why_not(node: Node) -> str:
        name = packet_name(node) or str(node.target)
        ours = getattr(node.target, "namespace", "") == "fusionc"
        return "" if ours or name in LIBRARY or node.target is operator.getitem else "no lowering"

    def _refusal(self, node: Node, low: Lowering) -> str | None:
        """Why this node cannot be lowered, or None."""
        try:
            self._check(node, low)
        except Unsupported as e:
            return str(e)
        return None

    def _check(self, node: Node, low: Lowering) -> None:
        vals = node.meta["val"]
        for v in vals if isinstance(vals, (tuple, list)) else (vals,):
            if v is None:
                continue
            if not isinstance(v, torch.Tensor):
                raise Unsupported("not a tensor")
            self._check_tensor(v, low.kind == "view")
            if v.device != self.device and low.kind != "view" and not (low.kind == "create" and _cpu_number(v)):
                raise Unsupported(f"on {v.device}")
            shape_of_tensor(v)
        for _, a in tensor_args(node):
            v = a.meta.get("val")
            if isinstance(v, (tuple, list)):
                continue
            if not isinstance(v, torch.Tensor):
                raise Unsupported("operand that is not a tensor")
            self._check_tensor(v, low.kind == "view")
            if low.kind != "view" and v.device != self.device and not _cpu_number(v):
                raise Unsupported(f"operand on {v.device}")
        if low.dims is not None:
            low.dims(node)
        if node.target is torch.ops.aten.cat.default and self._many_parts(node):
            raise Unsupported("")
        if packet_name(node) in KEEP_PLACE and _overlaps(node.args[0].meta["val"]):  # type: ignore[union-attr]
            raise Unsupported("what it writes into overlaps itself")  # ATen copies that as it lies
        if low.kind != "view":  # a lowering says what it does not support when it is called, not when it is read
            low.fn(_DRY, node, *map_arg(node.args, _dummy), **map_arg(node.kwargs, _dummy))

    def _many_parts(self, node: Node) -> bool:
        """Is a concatenation the library's?  Each element of ours asks for each part whether it lies there.

        A hundred computed parts take Triton 11 s to compile; a CPU 0.3 ns for each element and part, seven times eager's
        time for eight large parts (NOTES.md).
        """
        parts: Any = node.args[0]
        most = _PARTS if self.gpu or len(parts) * numel_hint(node) <= _CHECKS else _PARTS_CPU
        return len(parts) > most

    @staticmethod
    def _check_tensor(v: torch.Tensor, view: bool) -> None:
        if v.dtype not in DTYPE_NAME and not view:
            raise Unsupported(f"dtype {v.dtype}")
        if v.layout is not torch.strided or v.is_quantized or v.is_nested:
            raise Unsupported(f"layout {v.layout}")
        if not view and (v.is_conj() or v.is_neg()):
            raise Unsupported("lazy conjugation or negation")
        if not view and any(isinstance(s, int) and s == 0 for s in v.shape):
            raise Unsupported("")  # empty: nothing to fuse

    # -- reading through views ---------------------------------------------------------------------------------------
    def resolve(self, node: Node) -> tuple[Node, tuple[Node, ...]]:
        """The node whose memory or expression `node` is a view of, and the views between, nearest `node` first."""
        found = self._resolve.get(node)
        if found is None:
            chain: list[Node] = []
            base = node
            while base in self.lowered and self.lowered[base].kind == "view":
                if base.target is not operator.getitem:
                    chain.append(base)
                else:
                    chain.append(base)
                base = base.args[0]  # type: ignore[assignment]
            found = self._resolve[node] = (base, tuple(chain))
        return found

    def forward(self, chain: tuple[Node, ...], idx: Idx) -> tuple[Index | None, ...] | None:
        """Carry an element's index from the base of a chain of views to its end; None where it is not one-to-one."""
        out: tuple[Index | None, ...] | None = idx
        for v in reversed(chain):
            low = self.lowered[v]
            if v.target is operator.getitem or low.forward is None:
                return None
            out = low.forward(v, out)  # type: ignore[arg-type]
            if out is None:
                return None
        return out

    def deps(self, node: Node) -> frozenset[Node]:
        """Nodes with a unit (or graph inputs) that the value of `node` is computed from, through views and inline nodes."""
        found = self._deps.get(node)
        if found is None:
            out: set[Node] = set()
            for a in node.all_input_nodes:
                base, _ = self.resolve(a)
                if base.target is operator.getitem and base in self.lowered:
                    base = base.args[0]  # type: ignore[assignment]
                if base in self.inline:
                    out |= self.deps(base)
                else:
                    out.add(base)
            found = self._deps[node] = frozenset(out)
        return found

    # -- inlining ----------------------------------------------------------------------------------------------------
    def decide_inline(self) -> None:
        written = self._written_at() if self._writes else {}
        until: dict[Node, int] = {}  # where the last reader of a value stands, through views and inline nodes
        for node in reversed(self.graph.nodes):
            low = self.lowered.get(node)
            if written:
                read = [until[u] if u in self.inline or is_view(u) else self.position[u] for u in node.users]
                until[node] = max(read, default=self.position[node])
            if low is None or low.kind not in ("pointwise", "gather", "create") or node.target is operator.getitem:
                continue
            if node in self.alone or isinstance(node.meta["val"], (tuple, list)):
                continue
            if low.kind == "create":
                self.inline.add(node)
                continue
            if self._worth_inlining(node) and not (written and self._overwritten(node, until[node], written)):
                self.inline.add(node)

    def _written_at(self) -> dict[Node, list[int]]:
        """By memory: where in the graph it is written by in-place calls."""
        found: dict[Node, list[int]] = {}
        for node in self.graph.nodes:
            if node.op == "call_function" and _mutates(node):
                for a in _mutated_args(node):
                    found.setdefault(self._memory_root(self.resolve(a)[0]), []).append(self.position[node])
        return found

    def _overwritten(self, node: Node, until: int, written: dict[Node, list[int]]) -> bool:
        """Is an operand's memory written after `node` and before the last place where an inline `node` would be evaluated?"""
        for _, a in tensor_args(node):
            places = written.get(self._memory_root(self.resolve(a)[0]), ())
            if any(self.position[node] < place < until for place in places):
                return True
        return False

    def _worth_inlining(self, node: Node) -> bool:
        reads: list[tuple[Node, bool]] = []  # (consumer, one-to-one)
        if self.lowered[node].windowed or not self._collect_reads(node, True, reads) or not reads:
            return False
        if len(reads) <= 4 and self._closed(node) is not None:
            return True  # computed from positions alone: cheaper than any memory
        own = numel_hint(node)
        if len(reads) == 1 and not transcendental(node):
            reader = reads[0][0]
            if reader in self.inline:
                return True  # evaluated as often as its only reader, which is evaluated where it is read
            if self.lowered[reader].kind in ("pointwise", "gather") and numel_hint(reader) < own:
                return True  # its only reader takes a part of it: the rest need not be computed
        cost = 16 if transcendental(node) else 1
        consumers = {c for c, _ in reads}
        total = sum(min(own, numel_hint(c)) if c.target in _PIECEWISE else numel_hint_any(c) for c in consumers)
        if (
            _is_cast(node)
            and len(consumers) <= 3
            and all(is_external(self.resolve(a)[0], self) for _, a in tensor_args(node))
        ):
            return True
        if any(one_to_one for _, one_to_one in reads):
            return False
        if any(self.lowered[c].kind in ("reduce", "row", "scan") for c in consumers):
            return False
        if cost == 1 and len(reads) == 1 and next(iter(consumers)).target in _PIECEWISE:
            return True  # each element is read once
        if total <= own or (cost == 1 and total <= 2 * own):
            return True
        if len(reads) <= 16 and self._thin(node, 3):
            return True
        return (
            cost == 1 and own * 8 <= total and len(consumers) <= 2 and len(tensor_args(node)) <= 2 and self._leaf(node)
        )

    def _closed(self, node: Node) -> int | None:
        """Number of cheap operations that make `node` from no tensor in memory, or None if there are many or it has one."""
        known = self._from_nothing
        waiting = [node]  # (chains may be longer than the recursion limit)
        while waiting:
            n = waiting[-1]
            low = self.lowered.get(n)
            count: int | None = None
            if low is not None and low.kind == "create":
                count = 0
            elif low is not None and low.kind in ("pointwise", "view") and not transcendental(n):
                below = [a for _, a in tensor_args(n)]
                missing = [a for a in below if a not in known]
                if missing:
                    waiting += missing
                    continue
                parts = [known[a] for a in below]
                count = sum(c for c in parts if c is not None) + int(low.kind == "pointwise")
                if None in parts or count > _MANY:
                    count = None
            known[n] = count
            waiting.pop()
        return known[node]

    def _thin(self, node: Node, most: int) -> bool:
        """A few cheap operations on one tensor in memory whose elements are no wider: reading that costs no more."""
        width = node.meta["val"].dtype.itemsize
        while most > 0:
            low = self.lowered.get(node)
            if low is None or low.kind != "pointwise" or transcendental(node):
                return False
            wide = [a for _, a in tensor_args(node) if numel_hint(a) > 1]
            if len(wide) != 1:
                return False
            node = self.resolve(wide[0])[0]
            if is_external(node, self):
                val = node.meta["val"]
                return isinstance(val, torch.Tensor) and val.dtype.itemsize <= width
            most -= 1
        return False

    def _leaf(self, node: Node) -> bool:
        return all(is_external(self.resolve(a)[0], self) for _, a in tensor_args(node))

    def _collect_reads(self, node: Node, one_to_one: bool, out: list[tuple[Node, bool]]) -> bool:
        """All consumers through views; False if any is a call or the graph's output."""
        for user in node.users:
            low = self.lowered.get(user)
            if low is None:
                return False
            if low.kind == "view":
                # what a slice of a longer computation reads is better stored once than computed from its parts
                whole = low.forward is not None or not self._leaf(node)
                straight = one_to_one and whole and user.target is not operator.getitem and _one_to_one(user)
                if not self._collect_reads(user, straight, out):
                    return False
                continue
            if low.kind == "create":
                continue  # new_zeros of a tensor reads none of its elements
            loose = any(a is node and p in low.loose for p, a in tensor_args(user))
            same = one_to_one and not loose and not _broadcasts(node, user)
            out.append((user, same))
        return True

    # -- growing -----------------------------------------------------------------------------------------------------
    def run(self) -> list[Unit]:
        self.classify()
        self.decide_inline()
        needed = self._realized_inlines()
        for node in self.graph.nodes:
            if node.op != "call_function":
                continue
            low = self.lowered.get(node)
            if low is None:
                self._add_call(node)
            elif low.kind == "view":
                continue
            elif node in self.inline:
                if node in needed:
                    self._start(node, low)
            elif node.target is operator.getitem:
                self._add_projection(node)
            else:
                self._place(node, low)
        self._join_siblings()
        return self.ordered()

    def _realized_inlines(self) -> set[Node]:
        """Inline nodes whose tensor is needed in memory all the same (a creation read by a call, or an output)."""
        out: set[Node] = set()
        for node in self.inline:
            stack = list(node.users)
            while stack:
                u = stack.pop()
                low = self.lowered.get(u)
                if low is None:
                    out.add(node)
                    break
                if low.kind == "view":
                    stack.extend(u.users)
        return out

    def _units_of(self, nodes: Iterable[Node]) -> set[Unit]:
        return {self.unit[n] for n in nodes if n in self.unit}

    def _add_call(self, node: Node) -> None:
        pos = self.position[node]
        call = Call(node, pos, pos, self.reason.get(node, ""))
        deps = self._call_deps(node)
        call.preds = self._units_of(deps)
        self.unit[node] = call
        self.units.append(call)
        self._touch(call, deps)
        if _random(node) or _effect(node):  # drawn, printed, … in the order of the graph
            if self._last_effect is not None:
                call.preds.add(self._last_effect)
            self._last_effect = call
        if _mutates(node):
            for b in _mutated_args(node):
                root = self._memory_root(self.resolve(b)[0])
                call.preds |= {u for u in self._readers.pop(root, ()) if u is not call}
                self._writer[root] = call

    def _call_deps(self, node: Node) -> set[Node]:
        out: set[Node] = set()
        for a in node.all_input_nodes:
            base, _ = self.resolve(a)
            if base.target is operator.getitem and base in self.lowered:
                base = base.args[0]  # type: ignore[assignment]
            out.add(base)
        return out

    def _add_projection(self, node: Node) -> None:
        """getitem of a node with several results: a member of that node's group, with its own index."""
        source: Node = node.args[0]  # type: ignore[assignment]
        group = self.unit[source]
        assert isinstance(group, Group)
        low = self.lowered[source]
        full = group.index[source]
        if low.kind == "row" and len(node.meta["val"].shape) == len(full):
            along = group.axis_index[source]
            reduced = all(isinstance(s, int) and s == 1 for d, s in enumerate(node.meta["val"].shape) if d in along)
            if reduced and along:
                full = tuple([ZERO if d in along else i for d, i in enumerate(full)])
        group.index[node] = full
        group.nodes.append(node)
        self.unit[node] = group
        group.last = self.position[node]

    def _place(self, node: Node, low: Lowering) -> None:
        groups: list[Group] = []
        for _, a in tensor_args(node) if node not in self.alone else ():
            base, _ = self.resolve(a)
            u = self.unit.get(base)
            if isinstance(u, Group) and u not in groups and base not in self.inline and base not in self.alone:
                groups.append(u)
        groups.sort(key=lambda g: (bool(g.axis), g.last), reverse=True)
        for g in groups:
            if self._join(node, low, g):
                for other in groups:
                    if other is not g and other is not self.unit[node]:
                        self._merge(node, self.unit[node], other)  # type: ignore[arg-type]
                return
        self._start(node, low)

    def _start(self, node: Node, low: Lowering) -> None:
        pos = self.position[node]
        g = Group(len(self.units), pos, pos)
        prefix = f"g{g.id}_"
        if low.kind in ("reduce", "row", "scan"):
            dims = low.dims(node) if low.dims else ()
            shape = low.over(node)
            full: list[Index] = []
            along: dict[int, Index] = {}
            for d, s in enumerate(shape):
                v = Var(f"{prefix}{d}", s)
                if s is ONE:
                    full.append(ZERO)
                elif d in dims:
                    full.append(index(v))
                    along[d] = index(v)
                    g.axis.append(v)
                else:
                    full.append(index(v))
                    g.loops.append(v)
            self._seat_row(node, low, g, tuple(full), dims, along)
        else:
            shape = shape_of(node)
            vars = [Var(f"{prefix}{d}", s) for d, s in enumerate(shape)]
            g.loops = [v for v, s in zip(vars, shape, strict=True) if s is not ONE]
            g.index[node] = tuple([ZERO if s is ONE else index(v) for v, s in zip(vars, shape, strict=True)])
        g.nodes.append(node)
        g.preds = self._units_of(self.deps(node))
        self.unit[node] = g
        self.units.append(g)
        self._touch(g, self.deps(node))

    def _seat_row(
        self, node: Node, low: Lowering, g: Group, full: Idx, dims: tuple[int, ...], along: dict[int, Index]
    ) -> None:
        """Record the index of a reducing node's result, given the index over its input."""
        g.axis_index[node] = along
        if low.kind in ("row", "scan"):
            g.index[node] = full
            g.scan |= low.kind == "scan"
            return
        val = node.meta["val"]
        val = val[0] if isinstance(val, (tuple, list)) else val
        if len(val.shape) == len(full) and dims:
            g.index[node] = tuple([ZERO if d in dims else i for d, i in enumerate(full)])
        else:
            g.index[node] = tuple([i for d, i in enumerate(full) if d not in dims])
        rows = 1
        for v in g.loops:
            rows *= hint(v.extent)
        length = 1
        for v in g.axis:
            length *= hint(v.extent)
        g.split |= self._scarce(node, dims, rows, length)

    def _scarce(self, node: Node, dims: Any, rows: int, length: int) -> bool:
        """Is this reduction to be split over programs? (A C++ kernel shares columns among threads by itself.)"""
        operand = next((a for _, a in tensor_args(node)), None)
        like = operand.meta["val"] if operand is not None else None
        return scarce(rows, length, self.gpu and bool(dims) and along_rows(like, dims))

    def _commit(self, node: Node, g: Group) -> None:
        g.nodes.append(node)
        g.last = self.position[node]
        g.preds |= self._units_of(self.deps(node))
        g.preds.discard(g)
        self.unit[node] = g
        self._touch(g, self.deps(node))

    def _reaches(self, start: Iterable[Unit], target: Group) -> bool:
        """True if `target` is an ancestor of (or is) one of `start`, looking only where it can be."""
        seen: set[int] = set()
        stack = list(start)
        while stack:
            u = stack.pop()
            if u is target:
                return True
            if id(u) in seen or u.last < target.first:
                continue
            seen.add(id(u))
            stack.extend(u.preds)
        return False

    def _operand_index(self, node: Node, low: Lowering, g: Group, rank: int, shape: Idx) -> list[Index | None] | None:
        """The index of `node`'s domain implied by the operands that are members of g, None entries where free."""
        known: list[Index | None] = [None] * rank
        found = False
        for pos, a in tensor_args(node):
            base, chain = self.resolve(a)
            if base in self.inline or self.unit.get(base) is not g:
                continue
            if pos in low.loose:
                return None
            idx = self.forward(chain, g.index[base])
            if idx is None:
                return None
            found = True
            lead = rank - len(idx)
            if lead < 0:
                return None
            a_shape = a.meta["val"].shape
            for k, i in enumerate(idx):
                if i is None or (isinstance(a_shape[k], int) and a_shape[k] == 1):
                    continue
                if known[lead + k] is None:
                    known[lead + k] = i
                elif known[lead + k] is not i:
                    return None
        if not found:
            return None
        for d, s in enumerate(shape):
            if s is ONE:
                known[d] = ZERO
        return known

    @staticmethod
    def _fill(known: list[Index | None], shape: Idx, g: Group) -> Idx | None:
        """Give the free dimensions the loop variables not yet used, in order; None if they do not fit."""
        used: set[Var] = set()
        for i in known:
            if i is not None:
                used |= i.free
        missing = [v for v in (*g.loops, *g.axis) if v not in used]
        free = [d for d, i in enumerate(known) if i is None]
        for d in free:
            if not missing or missing[0].extent is not shape[d]:
                return None
            known[d] = index(missing.pop(0))
        if missing and (set(missing) != set(g.axis) or used & set(g.axis)):
            return None
        points = numel([v.extent for v in (*g.loops, *g.axis) if v not in missing])
        if points is not numel(shape):  # x[:, None] - x[None, :] reads one loop twice
            return None
        return tuple(known)  # type: ignore[arg-type]

    def _join(self, node: Node, low: Lowering, g: Group) -> bool:
        if len(g.nodes) >= MAX_MEMBERS or g.scan:
            return False
        deps = self.deps(node)
        before = self._units_of(deps) | self._writers_of(deps)
        if self._reaches((u for u in before if u is not g), g):
            return False
        if sum(1 for d in deps if self.unit.get(d) is not g) + len(g.preds) > MAX_INPUTS:
            return False
        if low.kind in ("reduce", "row", "scan"):
            return self._join_row(node, low, g)
        picked = self._gather_pick(node, g) or self._turned(node, g)
        if picked is not None:
            g.index[node] = picked
            self._commit(node, g)
            return True
        shape = shape_of(node)
        known = self._operand_index(node, low, g, len(shape), shape)
        if known is None:
            return False
        idx = self._fill(known, shape, g)
        if idx is None:
            return False
        axis = set(g.axis)
        inner = any(i.free & axis for i in idx)
        if g.split and (inner or not axis) and g.axis_index:
            return False
        g.index[node] = idx
        self._commit(node, g)
        return True

    def _gather_pick(self, node: Node, g: Group) -> Idx | None:
        """gather of one element a row out of a row that is a member (the picked log-probability of a loss)."""
        if node.target is not torch.ops.aten.gather.default or not g.axis:
            return None
        base, chain = self.resolve(node.args[0])  # type: ignore[arg-type]
        if self.unit.get(base) is not g or base in self.inline:
            return None
        idx = self.forward(chain, g.index[base])
        if idx is None or any(i is None for i in idx):
            return None
        d = normalize_dim(node.args[1], len(idx))  # type: ignore[arg-type]
        shape = shape_of(node)
        if shape[d] is not ONE or set(g.axis) != set(idx[d].free):  # type: ignore[union-attr]
            return None
        return tuple([ZERO if k == d else i for k, i in enumerate(idx)])  # type: ignore[misc]

    def _turned(self, node: Node, g: Group) -> Idx | None:
        """The index of cat([f(x[..., k:]), x[..., :k]], -1) where x is a member and its last dimension the axis.

        Rotary embedding behind a norm of each head: the kernel that has the row reads it twice and need not store it."""
        if node.target is not torch.ops.aten.cat.default or len(g.axis) != 1 or self.device.type in _NO_TURNS:
            return None
        shape = shape_of(node)
        parts: Any = node.args[0]
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        if normalize_dim(dim, len(shape)) != len(shape) - 1 or not 2 <= len(parts) <= 4:  # type: ignore[arg-type]
            return None
        found: Idx | None = None
        for part in parts:
            idx = self._of_row(part, g, shape)
            if idx is None or found is not None and any(a is not b for a, b in zip(idx, found)):
                return None
            found = idx
        return found

    def _of_row(self, part: Node, g: Group, shape: Idx) -> Idx | None:
        """The index of x where ``part`` is made of a slice of x along the axis, one number of one, and x is a member."""
        while part in self.inline and self.lowered[part].kind == "pointwise":
            operands = [a for _, a in tensor_args(part)]
            if len(operands) != 1:
                return None
            part = operands[0]
        base, chain = self.resolve(part)
        if self.unit.get(base) is not g or base in self.inline or not chain or not self._over_rows(base, g):
            return None
        cut, rest = chain[0], chain[1:]
        if cut.target is not torch.ops.aten.slice.Tensor or len(cut.args) > 4 or cut.kwargs:
            return None
        if normalize_dim(cut.args[1] if len(cut.args) > 1 else 0, len(shape)) != len(shape) - 1:  # type: ignore[arg-type]
            return None
        whole = shape_of(cut.args[0])  # type: ignore[arg-type]
        idx = self.forward(rest, g.index[base]) if rest else g.index[base]
        if len(whole) != len(shape) or any(a is not b for a, b in zip(whole, shape)):
            return None
        if idx is None or any(i is None for i in idx) or idx[-1].single_var() is not g.axis[0]:  # type: ignore[union-attr]
            return None
        return idx  # type: ignore[return-value]

    def _over_rows(self, node: Node, g: Group) -> bool:
        """What a member is made of within its group are pointwise operators and plain reductions."""
        stack, seen = [node], {node}
        while stack:
            n = stack.pop()
            if self.unit.get(n) is g and n not in self.inline:
                if n.target is operator.getitem or self.lowered[n].kind not in ("pointwise", "reduce"):
                    return False
            elif n not in self.inline:
                continue
            for _, a in tensor_args(n):
                base = self.resolve(a)[0]
                if base not in seen:
                    seen.add(base)
                    stack.append(base)
        return True

    def _join_row(self, node: Node, low: Lowering, g: Group) -> bool:
        if g.split:
            if low.kind != "reduce":
                return False
        dims = low.dims(node) if low.dims else ()
        shape = low.over(node)
        known = self._operand_index(node, low, g, len(shape), shape)
        if known is None:
            return False
        full = self._fill(known, shape, g)
        if full is None:
            return False
        along = {d: full[d] for d in dims if shape[d] is not ONE}
        on: list[Var] = []
        for d in sorted(along):
            for v in (*g.loops, *g.axis):
                if v in along[d].free and v not in on:
                    on.append(v)
        off: set[Var] = set()
        for d, i in enumerate(full):
            if d not in along:
                off |= i.free
        if off & set(on) or not on:
            return False
        arg = low.kind == "reduce" and "arg" in str(node.target) or node.target in _ORDERED
        if low.kind == "scan" and (len(on) != 1 or next(iter(along.values())).single_var() is None):
            return False
        if g.axis:
            if set(on) != set(g.axis) or off != set(g.loops):
                return False
            if arg and on != g.axis:
                return False
        else:
            if off | set(on) != set(g.loops):
                return False
            fastest = max(d for d, s in enumerate(shape) if s is not ONE)
            if fastest not in along and not self._private(g, node):
                return False
            if low.kind == "scan" and not self._private(g, node):
                return False
            rows = 1
            for v in g.loops:
                if v not in on:
                    rows *= hint(v.extent)
            length = 1
            for v in on:
                length *= hint(v.extent)
            if self._scarce(node, dims, rows, length) and not self._private(g, node):
                return False
            g.axis = on
            g.loops = [v for v in g.loops if v not in on]
        self._seat_row(node, low, g, full, dims, along)
        self._commit(node, g)
        return True

    def _private(self, g: Group, node: Node) -> bool:
        """True when nothing outside g but `node` reads a member of g."""
        for m in g.nodes:
            stack = list(m.users)
            while stack:
                u = stack.pop()
                if u is node or self.unit.get(u) is g:
                    continue
                low = self.lowered.get(u)
                if low is not None and low.kind == "view":
                    stack.extend(u.users)
                    continue
                return False
        return True

    def _merge(self, node: Node, g: Group, other: Group) -> bool:
        """Absorb another producer group of `node`, already a member of g, if their loops can be identified."""
        if other.scan or g.scan or g.split or other.split or len(g.nodes) + len(other.nodes) > MAX_MEMBERS:
            return False
        if len(g.preds) + len(other.preds) > MAX_INPUTS:
            return False
        if self._reaches(g.preds, other) and not self._only_direct(g, other, node):
            return False
        if self._reaches(other.preds, g):
            return False
        low = self.lowered[node]
        own = g.index[node]
        if low.kind == "reduce":
            return False
        mapping: dict[Var, Index] = {}
        for pos, a in tensor_args(node):
            base, chain = self.resolve(a)
            if base in self.inline or self.unit.get(base) is not other:
                continue
            if pos in low.loose:
                return False
            idx = self.forward(chain, other.index[base])
            if idx is None:
                return False
            lead = len(own) - len(idx)
            a_shape = a.meta["val"].shape
            for k, i in enumerate(idx):
                if i is None or i is ZERO or (isinstance(a_shape[k], int) and a_shape[k] == 1):
                    continue
                v = i.single_var()
                if v is None:
                    return False
                if mapping.setdefault(v, own[lead + k]) is not own[lead + k]:
                    return False
        rest = [v for v in other.axis if v not in mapping]
        if rest:
            if len(rest) != len(other.axis) or not g.axis or len(g.axis) != len(rest):
                return False
            for v, w in zip(rest, g.axis, strict=True):
                if v.extent is not w.extent:
                    return False
                mapping[v] = index(w)
        return self._absorb(g, other, mapping)

    def _absorb(self, g: Group, other: Group, mapping: dict[Var, Index]) -> bool:
        """Make the members of `other` members of g, its variables being replaced as given; False if they do not fit."""
        if any(v not in mapping for v in other.loops):
            return False
        images = [mapping[v] for v in (*other.loops, *other.axis)]
        if len({i.uid for i in images}) != len(images):
            return False
        before = g.axis, g.loops
        if other.axis:
            on = [mapping[v].single_var() for v in other.axis]
            if any(v is None for v in on):
                return False
            if g.axis:
                if on != g.axis:
                    return False
                if any(mapping[v].free & set(g.axis) for v in other.loops):
                    return False
            else:
                if any(mapping[v].free & set(on) for v in other.loops):
                    return False
                if {w for v in other.loops for w in mapping[v].free} | set(on) != set(g.loops):
                    return False
                g.axis = on  # type: ignore[assignment]
                g.loops = [v for v in g.loops if v not in on]
        covered = {w for i in images for w in i.free}
        every = numel([v.extent for v in (*other.loops, *other.axis)]) is numel([v.extent for v in covered])
        whole = covered in (set(g.loops) | set(g.axis), set(g.loops))
        if not (every and whole):  # i // 4 alone does not visit every i
            g.axis, g.loops = before
            return False
        for m in other.nodes:
            g.index[m] = tuple([index(substitute(i, mapping)) for i in other.index[m]])
            if m in other.axis_index:
                g.axis_index[m] = {d: index(substitute(i, mapping)) for d, i in other.axis_index[m].items()}
        self.combine(g, other)
        return True

    def combine(self, g: Group, other: Group) -> None:
        """Put `g` in the place of `other` everywhere; the variables that the members are indexed with are left alone."""
        for m in other.nodes:
            self.unit[m] = g
        g.nodes = sorted({*g.nodes, *other.nodes}, key=self.position.__getitem__)
        g.first, g.last = min(g.first, other.first), max(g.last, other.last)
        g.preds = (g.preds | other.preds) - {g, other}
        self.units.remove(other)
        for readers in self._readers.values():
            if other in readers:
                readers.discard(other)
                readers.add(g)
        for u in self.units:
            if other in u.preds:
                u.preds.discard(other)
                u.preds.add(g)
        g.preds.discard(g)

    def adjacent(self, a: Group, b: Group) -> bool:
        """True when no third unit must run between `a` and `b`, in either order: they may become one kernel."""
        return not any(self._reaches([p], x) for x, y in ((a, b), (b, a)) for p in y.preds if p is not x)

    def read_outside(self, node: Node, groups: tuple[Group, ...]) -> bool:
        """Is the tensor of a member read by anything but the members of `groups`?"""
        stack = list(node.users)
        while stack:
            u = stack.pop()
            low = self.lowered.get(u)
            if low is None:
                return True
            if low.kind == "view" or u in self.inline:
                stack.extend(u.users)
            elif self.unit.get(u) not in groups:
                return True
        return False

    # -- siblings ----------------------------------------------------------------------------------------------------
    def _join_siblings(self) -> None:
        """Merge groups that read the same large tensor over the same points and do not depend on each other."""
        readers: dict[Node, list[tuple[Group, Idx]]] = {}
        for h in sorted([u for u in self.units if isinstance(u, Group)], key=lambda u: u.first):
            reads = self._reads(h)
            home = h
            for a, idx in reads.items():
                for g, other in readers.get(a, ())[-3:]:
                    if self.unit[g.nodes[0]] is g and g is not home and self._join_sibling(g, home, other, idx):
                        home = g
                        break
                if home is not h:
                    break
            for a, idx in (reads if home is h else self._reads(home)).items():
                readers.setdefault(a, []).append((home, idx))

    def _reads(self, g: Group) -> dict[Node, Idx]:
        """Operands from outside that have an element for each point of g, with their index."""
        out: dict[Node, Idx] = {}
        points = {*g.loops, *g.axis}

        def visit(node: Node, domain: Idx, depth: int) -> None:
            low = self.lowered[node]
            for pos, a in tensor_args(node):
                base, _ = self.resolve(a)
                if pos in low.loose or a in out or self.unit.get(base) is g:
                    continue
                val = a.meta["val"]
                if not isinstance(val, torch.Tensor) or len(val.shape) != len(domain):
                    continue
                if base in self.inline:
                    like = node.meta["val"]  # of batch norm in training: a tuple, the normalised image first
                    same = shape_of(a) == sizes_index((like[0] if isinstance(like, (tuple, list)) else like).shape)
                    if a is base and depth and self.lowered[a].kind == "pointwise" and same:
                        visit(a, domain, depth - 1)
                elif {v for i in domain for v in i.free} == points and numel(shape_of(a)) is numel(
                    [v.extent for v in points]
                ):
                    out[a] = domain

        for node in g.nodes:
            low = self.lowered[node]
            if node.target is operator.getitem or node in self.alone or low.kind == "gather":
                continue
            domain = g.index[node]
            if low.kind == "reduce":
                domain = self._reduced_domain(node, g)
            visit(node, domain, 2)
        return out

    @staticmethod
    def _reduced_domain(node: Node, g: Group) -> Idx:
        """The index over the operand of a reduction, whose own index leaves out the axis."""
        along, own = g.axis_index[node], g.index[node]
        shape = LOWERINGS[node.target].over(node)
        dims = LOWERINGS[node.target].dims(node)  # type: ignore[misc]
        if len(own) == len(shape):
            return tuple([along.get(d, i) for d, i in enumerate(own)])
        rest = iter(own)
        return tuple([along.get(d, ZERO) if d in dims else next(rest) for d in range(len(shape))])

    def _join_sibling(self, g: Group, h: Group, at_g: Idx, at_h: Idx) -> bool:
        """Merge h into g, which reads the same tensor; the element at_h in h is the element at_g in g."""
        if g.scan or h.scan or g.split != h.split or h.first - g.last > SIBLING_REACH:
            return False
        if len(g.nodes) + len(h.nodes) > MAX_MEMBERS or len(g.preds) + len(h.preds) > MAX_INPUTS:
            return False
        mapping: dict[Var, Index] = {}
        for i, j in zip(at_h, at_g, strict=True):
            if i is ZERO and j is ZERO:
                continue
            v, w = i.single_var(), j.single_var()
            if v is None or w is None or mapping.setdefault(v, j) is not j:
                return False
        if g.axis and h.axis and [mapping.get(v) for v in h.axis] != [index(w) for w in g.axis]:
            return False
        if bool(g.axis) != bool(h.axis):  # a pointwise nest takes on the other's rows
            rows, flat = (g, [mapping.get(v) for v in h.loops]) if g.axis else (h, [index(v) for v in g.loops])
            axis = [index(v) for v in g.axis] if g.axis else [mapping.get(v) for v in h.axis]
            if flat[-1] not in axis or rows.split:
                return False
            count = length = 1
            for v in rows.loops:
                count *= hint(v.extent)
            for v in rows.axis:
                length *= hint(v.extent)
            if scarce(count, length, False):
                return False
        if self._reaches([h], g) or self._reaches([g], h):
            return False
        return self._absorb(g, h, mapping)

    def _only_direct(self, g: Group, other: Group, node: Node) -> bool:
        """g depends on `other` through `node` alone (which is what a merge is for)."""
        for m in g.nodes:
            if m is not node and any(self.unit.get(d) is other for d in self.deps(m)):
                return False
        return not self._reaches([p for p in g.preds if p is not other], other)

    # -- order -------------------------------------------------------------------------------------------------------
    def ordered(self) -> list[Unit]:
        """Units in an executable order that stays close to the graph's."""
        import heapq

        pending = {id(u): len(u.preds) for u in self.units}
        users: dict[int, list[Unit]] = {}
        for u in self.units:
            for p in u.preds:
                users.setdefault(id(p), []).append(u)
        heap = [(u.last, k, u) for k, u in enumerate(self.units) if not u.preds]
        heapq.heapify(heap)
        order: list[Unit] = []
        count = len(self.units)
        while heap:
            _, _, u = heapq.heappop(heap)
            order.append(u)
            for w in users.get(id(u), ()):
                pending[id(w)] -= 1
                if not pending[id(w)]:
                    count += 1
                    heapq.heappush(heap, (w.last, count, w))
        if len(order) != len(self.units):
            raise AssertionError("grouping made a cycle")
        return order

    def _writers_of(self, deps: Iterable[Node]) -> set[Unit]:
        """In-place calls that the memory of `deps` was last written by."""
        if not self._writer:
            return set()
        return {self._writer[r] for d in deps if (r := self._memory_root(d)) in self._writer}

    def _touch(self, unit: Unit, deps: Iterable[Node]) -> None:
        """`unit` reads `deps`: after the write that made them what they are, before the next one."""
        if not self._writes:
            return
        for d in deps:
            root = self._memory_root(d)
            self._readers.setdefault(root, set()).add(unit)
            writer = self._writer.get(root)
            if writer is not None and writer is not unit:
                unit.preds.add(writer)

    def written(self, node: Node) -> bool:
        """Is the memory of `node` written by an in-place call somewhere in the graph?"""
        return self._writes and self._memory_root(node) in self._writer

    def _memory_root(self, node: Node) -> Node:
        """The node whose memory an in-place call's result or a call-made view lives in."""
        while node.op == "call_function" and node not in self.lowered:
            shared = _mutated_args(node) if _mutates(node) else aliased_by(node)
            if not shared:
                break
            node = self.resolve(shared[0])[0]
        return node


_DRY = Context()


def _dummy(node: Node) -> Any:
    """An operand for a dry run: right shape and dtype, no elements."""
    v = node.meta.get("val")
    if isinstance(v, torch.Tensor):
        if v.dtype not in DTYPE_NAME:
            raise Unsupported(f"dtype {v.dtype}")
        return Value(_DRY, sizes_index(v.shape), DTYPE_NAME[v.dtype], _no_elements)
    return size_index(v) if isinstance(v, torch.SymInt) else v


def _no_elements(idx: Idx) -> Any:
    raise Unsupported("read during a dry run")


def shape_of_tensor(v: torch.Tensor) -> Idx:
    strides_index(v.stride())
    return sizes_index(v.shape)


def numel_hint_any(node: Node) -> int:
    """Elements that a consumer visits: its own, or for a reduction those of its operands."""
    val = node.meta["val"]
    if isinstance(val, (tuple, list)):
        return numel_hint(node.args[0])  # type: ignore[arg-type]
    low = LOWERINGS.get(node.target)
    if low is None or low.kind != "reduce":
        return numel_hint(node)
    operands = [numel_hint(a) for _, a in tensor_args(node) if isinstance(a.meta["val"], torch.Tensor)]
    return max([numel_hint(node), *operands])


def is_external(node: Node, grouper: Grouper) -> bool:
    return node not in grouper.lowered


_NO_TURNS = ("cpu",)  # devices where reading a row from two places costs more than storing it: SIMD


def _cpu_number(v: Any) -> bool:
    """A tensor on the CPU without dimensions: operators of any device take it."""
    return isinstance(v, torch.Tensor) and v.dim() == 0 and v.device.type == "cpu"


def _mutates(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _random(node: Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _effect(node: Node) -> bool:
    """Calls without a result that is used, such as assertions: kept in order."""
    return not node.users and not _mutates(node)


def _mutated_args(node: Node) -> list[Node]:
    schema = node.target._schema  # type: ignore[union-attr]
    out: list[Node] = []
    for k, arg in enumerate(schema.arguments):
        if arg.alias_info is not None and arg.alias_info.is_write:
            a = node.args[k] if k < len(node.args) else node.kwargs.get(arg.name)
            for x in a if isinstance(a, (list, tuple)) else (a,):
                if isinstance(x, Node):
                    out.append(x)
    return out


def transcendental(node: Node) -> bool:
    """Does it take many times as long as a multiplication?"""
    return packet_name(node) in _SLOW


_SLOW = frozenset(FLOAT_ONLY - {"div", "sqrt", "rsqrt"}) | {
    "gelu",
    "silu",
    "mish",
    "softplus",
    "gelu_backward",
    "silu_backward",
}


def _is_cast(node: Node) -> bool:
    return node.target in (torch.ops.aten._to_copy.default, torch.ops.prims.convert_element_type.default)


def _one_to_one(view: Node) -> bool:
    return packet_name(view) != "expand" or view.meta["val"].shape == view.args[0].meta["val"].shape  # type: ignore[union-attr]


def _broadcasts(node: Node, user: Node) -> bool:
    val = user.meta["val"]
    if not isinstance(val, torch.Tensor):
        return False
    low = LOWERINGS.get(user.target)
    if low is not None and low.kind in ("reduce", "row"):
        return False
    return numel_hint(node) != numel_hint(user)


_PIECEWISE = frozenset(
    (
        torch.ops.aten.cat.default,
        torch.ops.aten.constant_pad_nd.default,
        torch.ops.aten.slice_scatter.default,
        torch.ops.aten.select_scatter.default,
    )
)

_ORDERED = frozenset(
    t
    for t in (
        torch.ops.aten.argmax.default,
        torch.ops.aten.argmin.default,
        torch.ops.aten.max.dim,
        torch.ops.aten.min.dim,
    )
)
