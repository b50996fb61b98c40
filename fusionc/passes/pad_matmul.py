"""Matmuls whose sizes are no multiple of 8 get zeros appended: cuBLAS has its fast kernels for aligned rows only.

Math       x [W 0] = [x W  0];   [a 0] [b; 0] = a b;   [a; 0] b = [a b; 0]
Exactness  reassociates: another kernel of the library adds in another order
Legality   float16 or bfloat16 on CUDA; K and N are plain numbers; a bias is one vector or N stays; no scaled addmm
Cost       a frozen weight is padded once (a copy of it, kept up to date at run time), everything else at each call:
           only if the library's slow kernel takes clearly longer than the copies. A result that leaves the graph, or
           whose readers want contiguous memory, is copied once more.
Source     measured (H200, torch 2.11): 50257 columns run at 95 TFLOP/s, 50304 at 660; a padded row stride alone does not
           help, the library looks at the sizes
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.fx import Node

from ..graph import edit
from ..graph.facts import Facts, device, dtype, same, shape, stride, tensor
from . import horizontal_matmul as wide
from .base import Match, Pass, Reassociates, Refuse

aten = torch.ops.aten
ALIGN = 8  # elements of two bytes: 16 bytes, what the library asks for
STEP = 64  # what is padded to: 2-4 % faster than 8
COPY = 2.5e6  # bytes a µs of a copy, reads and writes together
LAUNCH = 3.0  # µs


class PadMatmul(Pass):
    """Append zeros to mm and addmm operands. ``least``: µs to be saved for a rewrite (tests give other values)."""

    name = "pad_matmul"
    atomic = True
    exactness = Reassociates(rtol=1e-5)

    def __init__(self, place: str = "cuda", dtypes: Sequence[torch.dtype] = (torch.bfloat16, torch.float16),
                 least: float = 3.0) -> None:  # fmt: skip
        self.place, self.dtypes, self.least = place, tuple(dtypes), least

    def find(self, facts: Facts) -> Iterator[Match]:
        """Matmuls that the library would run by its slow kernels."""
        for node in list(facts.gm.graph.nodes):
            if node.op != "call_function" or node.target not in (aten.mm.default, aten.addmm.default):
                continue
            a, b = node.args[-2:]
            place, sizes, inner = device(node), shape(node), (shape(a) or (None, None))[1]
            if place is None or place.type != self.place or sizes is None:
                continue
            m, n = sizes
            # M and K matter only where they are the row stride of an operand
            odd = [_odd(m) and _transposed(a), _odd(n), _odd(inner) and (not _transposed(a) or _transposed(b))]
            if any(odd):
                yield Match({"node": node, "a": a, "b": b, "m": m, "n": n, "k": inner, "odd": odd}, (node,))

    def check(self, match: Match, facts: Facts) -> Refuse | None:
        """See Legality and Cost. Sets ``match.bound["frozen"]``, the weight behind ``b`` if that is padded once."""
        node, m, n, k = match.node, match.m, match.n, match.k
        if dtype(node) not in self.dtypes or dtype(match.a) != dtype(node):
            return Refuse("not 16-bit floats", node)
        if node.kwargs:
            return Refuse("addmm scales its bias or product", node)
        if not isinstance(n, int) or not isinstance(k, int):
            return Refuse("its width is symbolic", node)
        if len(node.args) == 3 and match.odd[1] and len(shape(node.args[0]) or ()) != 1:
            return Refuse("its bias is a matrix", node)
        if match.odd[1] and not _row_major(node):
            return Refuse("its result is not row-major", node)
        if facts.writers and any(root in facts.writers for x in node.all_input_nodes for root in facts.roots(x)):
            return Refuse("the memory of an operand is written by the graph", node)
        weight = wide._weight(match.b, facts) if facts.stage == "inference" else None
        frozen = weight if isinstance(weight, wide.Weight) and _row_major(weight.source) else None
        match.bound["frozen"] = frozen
        slices = wide.Sibling(node, frozen, None)  # type: ignore[arg-type]
        # a reader that takes the result as a strided view gets one; else one more copy
        direct = match.odd[1] and wide._readers(slices, _up(n), facts) is None
        match.bound["views"] = slices.views if direct else None
        rows = m if isinstance(m, int) else 128
        copies, count = 0, 0
        if match.odd[2] or match.odd[0]:
            copies, count = copies + rows * k, count + 1
        if frozen is None and (match.odd[1] or match.odd[2]):
            copies, count = copies + n * k, count + 1
        if match.odd[1] and not direct:
            copies, count = copies + rows * n, count + 1
        spent = copies * 4 / COPY + count * LAUNCH
        saved = _slow(rows, n, k) - _fast(rows, n, k) - 1.3 * spent
        if saved < self.least:
            return Refuse(f"padding would not pay: {_slow(rows, n, k):.0f} µs without, {_fast(rows, n, k):.0f} with, "
                          f"{spent:.0f} for copies", node)  # fmt: skip
        return None

    def replace(self, match: Match, facts: Facts) -> None:
        """The padded matmul, a slice of its result, and a copy of that where strides matter."""
        node, m, n, k = match.node, match.m, match.n, match.k
        graph, like = facts.gm.graph, tensor(node)
        assert like is not None
        rows, columns = _up(m) if match.odd[0] else m, _up(n) if match.odd[1] else n
        inner = _up(k) if match.odd[2] else k
        values = edit.FakeViews(like, (rows, columns))
        restrided = [
            (view, values.view(shape(view) or (), strides, offset)) for view, strides, offset in match.views or ()
        ]
        cut = values.view((m, n), (columns, 1))
        a, b = _padded(graph, node, match.a, rows, inner), match.b
        if match.odd[1] or match.odd[2]:
            b = (
                _derived(facts, match, inner, columns)
                if match.frozen is not None
                else _padded(graph, node, b, inner, columns)
            )
        args: tuple[Any, ...] = (a, b)
        if len(node.args) == 3:
            bias = node.args[0]
            args = (_padded_vector(facts, node, columns) if columns is not n else bias, a, b)
        with graph.inserting_before(node):
            made = edit.insert(graph, node.target, args, origin=[node], val=values.whole)
            if rows is not m:
                half = values.view((m, columns), (columns, 1))
                made = edit.insert(graph, aten.slice.Tensor, (made, 0, 0, m), origin=[node], val=half)
            if columns is not n:
                made = edit.insert(graph, aten.slice.Tensor, (made, 1, 0, n), origin=[node], val=cut)
                if match.views is None:
                    made = edit.insert(graph, aten.clone.default, (made,), {"memory_format": torch.contiguous_format},
                                       origin=[node], val=edit.fake_empty(like, (m, n)))  # fmt: skip
        node.replace_all_uses_with(made)
        for view, value in restrided:
            view.meta["val"] = value
            view.meta.pop("tensor_meta", None)
        edit.erase_dead([node])


def _odd(size: Any) -> bool:
    return isinstance(size, int) and size % ALIGN != 0


def _up(size: int) -> int:
    return -(-size // STEP) * STEP


def _slow(m: int, n: int, k: int) -> float:
    """µs of the library's kernels for odd sizes: 100 TFLOP/s in tiles of 128 rows; few rows are bound by memory."""
    return 1.3 * _fast(m, n, k) if m <= 8 else 2e-6 * -(-m // 128) * 128 * n * k / 100


def _fast(m: int, n: int, k: int) -> float:
    """µs for aligned sizes: 600 TFLOP/s or 3.5 TB/s, and a launch's ramp."""
    return 2.0 + max(2e-6 * m * n * k / 600, 2e-6 * (m * n + n * k + m * k) / 3.5)


def _transposed(node: Any) -> bool:
    """The matrix is stored by columns."""
    steps, sizes = stride(node), shape(node)
    return (
        steps is not None
        and sizes is not None
        and len(steps) == 2
        and isinstance(steps[0], int)
        and steps[0] == 1
        and not (isinstance(steps[1], int) and steps[1] == 1)
    )


def _row_major(node: Any) -> bool:
    steps, sizes = stride(node), shape(node)
    return steps is not None and sizes is not None and len(steps) == 2 and isinstance(steps[1], int) and steps[1] == 1


def _padded(graph: torch.fx.Graph, before: Node, node: Node, rows: Any, columns: Any) -> Node:
    """``node`` with zeros up to [rows, columns], stored the way it is stored (transposed or not)."""
    m, n = shape(node) or (0, 0)
    if same(rows, m) and same(columns, n):
        return node
    if not _transposed(node):
        return _pad(graph, before, node, rows, columns)
    base = node.args[0] if node.target is aten.t.default else None
    with graph.inserting_before(before):
        if not isinstance(base, Node):
            base = edit.insert(graph, aten.t.default, (node,), origin=[node])
        made = _pad(graph, before, base, columns, rows)
        return edit.insert(graph, aten.t.default, (made,), origin=[node])


def _pad(graph: torch.fx.Graph, before: Node, base: Node, rows: Any, columns: Any) -> Node:
    """Zeros below and to the right; what an earlier matmul had padded is used again."""
    like = tensor(base)
    assert like is not None
    m, n = like.shape
    args = (base, [0, 0 if same(columns, n) else columns - n, 0, 0 if same(rows, m) else rows - m])
    for user in base.users:
        if user.target is aten.constant_pad_nd.default and user.args == args and user < before:
            return user
    with graph.inserting_before(before):
        return edit.insert(graph, aten.constant_pad_nd.default, args, origin=[base],
                           val=edit.fake_empty(like, (rows, columns)))  # fmt: skip


def _padded_vector(facts: Facts, node: Node, columns: int) -> Node:
    """The bias of this addmm as [columns]."""
    bias = node.args[0]
    like = tensor(bias)
    assert isinstance(bias, Node) and like is not None
    if like.shape[0] == 1:
        return bias  # spreads over any width
    weight = wide._weight(bias, facts) if facts.stage == "inference" else None
    made = edit.fake_empty(like, (columns,))
    if isinstance(weight, wide.Weight):
        recipe = wide._recipe([weight], 0, False)
        return edit.add_derived(facts.gm, [facts.position(weight.source)],
                                _padding(wide._joined([weight.steps], 0, False), 0, columns), made,
                                f"pad {columns} {weight.word()}", [bias],
                                recipe=None if recipe is None else ["pad", 0, columns, *recipe[1:]])  # fmt: skip
    with facts.gm.graph.inserting_before(node):
        return edit.insert(facts.gm.graph, aten.constant_pad_nd.default, (bias, [0, columns - like.shape[0]]),
                           origin=[bias], val=made)  # fmt: skip


def _derived(facts: Facts, match: Match, rows: int, columns: int) -> Node:
    """The frozen weight [k, n] padded to [rows, columns] as an input, transposed like the one it stands for."""
    graph, weight, like = facts.gm.graph, match.frozen, tensor(match.b)
    assert like is not None
    turned = _transposed(match.b)
    sizes = (columns, rows) if turned else (rows, columns)
    recipe = wide._recipe([weight], 0, turned)
    values = edit.FakeViews(like, sizes)
    node = edit.add_derived(
        facts.gm, [facts.position(weight.source)], _padding(wide._joined([weight.steps], 0, turned), *sizes),
        values.whole, f"pad {sizes} {turned} {weight.word()}", [match.node],
        recipe=None if recipe is None else ["pad", *sizes, *recipe[1:]])  # fmt: skip
    if not turned:
        return node
    with graph.inserting_before(match.node):
        return edit.insert(graph, aten.t.default, (node,), origin=[match.node],
                           val=values.view((rows, columns), (1, rows)))  # fmt: skip


Compute = Callable[[list[torch.Tensor]], torch.Tensor]


def _padding(source: Compute, rows: int, columns: int) -> Compute:
    """Zeros appended to what ``source`` gives: to [rows, columns], or to [columns] if ``rows`` is 0."""

    def compute(sources: list[torch.Tensor]) -> torch.Tensor:
        found = source(sources)
        made = found.new_zeros((rows, columns) if rows else (columns,))
        made[tuple(slice(0, size) for size in found.shape)] = found
        return made

    return compute


def rebuild(rows: Any, columns: Any, dim: Any, transposed: Any, chains: Any, count: int) -> Compute:
    """The computation of a recipe. Raises ValueError or TypeError for what is none."""
    if (
        count != 1
        or type(rows) is not int
        or type(columns) is not int
        or not 0 <= rows <= 1 << 31
        or not 0 < columns <= 1 << 31
    ):
        raise ValueError("not a padded weight")
    return _padding(wide.rebuild(dim, transposed, chains, count), rows, columns)
