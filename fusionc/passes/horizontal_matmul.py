"""Matmuls of one input with several weights (q/k/v, gate/up) become one matmul with the weights side by side.

Math       x W₁, x W₂, …  =  split(x [W₁ W₂ …])            x [M, K]   Wᵢ [K, Nᵢ], unequal Nᵢ allowed, biases likewise
Exactness  reassociates: the library may choose another kernel for the wider matmul
Legality   inference; the weights (and biases) are parameters that the graph does not write, through transposes and
           casts only; one dtype; all with a bias or none; results stay inside the graph and every reader takes a strided
           view and gives the same layout as before; on a CPU few rows: with more the product is bound by arithmetic, and
           reading each result as columns of a wider one cost 4 to 8 % (SmolLM2 prefill, BERT, SwiGLU block, 2 cores); on a
           GPU only what does not keep it busy by itself: for larger ones an H200 showed no gain (SwiGLU block of 8192
           tokens 0.7 %, Llama 1B prefill -1 %) against 13 to 60 % more memory; nor can there be any for one that
           fills whole waves of tiles (Llama's k and v there, whose copies were 67 MB; BERT's q, k and v, 42 MB). Few rows
           of 16 bits are exempt where skinny_linear will read the weights apart
Cost       one launch and one read of x instead of several; a copy of the weights, kept up to date at run time, unless
           skinny_linear reads them apart
Source     the usual QKV and gate/up merge, here without freezing and for unequal widths
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from ..graph import edit
from ..graph.facts import (
    Facts,
    device,
    dtype,
    is_pointwise_op,
    is_view,
    packet_name,
    same,
    same_layout,
    same_sizes,
    shape,
    stride,
    tensor,
    written_by,
)
from .base import Match, Pass, Reassociates, Refuse
from .skinny_linear import reads_apart

aten = torch.ops.aten
_CPU = torch.device("cpu")
_FEW_ROWS = 32  # on a CPU
_PROCESSORS = 132  # of an H200
_BUSY_TILES = 2 * _PROCESSORS  # of 128 x 256 elements of the result
_WHOLE = 0.95  # of its waves of tiles, 256 or 192 wide: a wider product takes as many waves as its parts
_APART = 3  # weights that skinny_linear reads without a copy
_BUSY_BYTES = 32 << 20  # of weight, read in 8 us there
_TRANSPOSES = (aten.t.default, aten.transpose.int, aten.permute.default)
_RESHAPES = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)
_MOVES = (aten.transpose.int, aten.permute.default, aten.t.default, aten.unsqueeze.default, aten.slice.Tensor,
          aten.select.int, aten.alias.default, aten.detach.default, aten.expand.default)
_BY_STORAGE = {"as_strided_copy", "as_strided_scatter"}  # what they read depends on strides
# Results are contiguous (or like the first argument) whatever the strides of these arguments are.
_PLAIN = {aten.mm.default, aten.bmm.default, aten.addmm.default, aten.baddbmm.default}
_INTO = {aten.copy_.default: 1, aten.index_copy.default: 3, aten.index_put.default: 2, aten.slice_scatter.default: 1,
         aten.scatter.src: 3, aten.select_scatter.default: 1}


@dataclass(frozen=True)
class Weight:
    """A constant matmul operand: placeholder, and what is applied to it (casts, transposes), in order."""

    source: Node
    steps: tuple[tuple[Any, tuple[Any, ...], tuple[tuple[str, Any], ...]], ...] = ()

    def word(self) -> str:
        """Text that is equal for equal computations."""
        return ";".join(f"{target}{args}{kwargs}" for target, args, kwargs in self.steps)


@dataclass
class Sibling:
    """One matmul of a group: ``x @ weight (+ bias)``."""

    node: Node
    weight: Weight
    bias: Weight | None
    views: list[tuple[Node, tuple[Any, ...], Any]] = field(default_factory=list)  # node, new strides, offset in the slice


class HorizontalMatmul(Pass):
    """Merge mm/addmm nodes that share their left operand."""

    name = "horizontal_matmul"
    atomic = True
    exactness = Reassociates(rtol=1e-5)

    def __init__(self, apart: bool = True) -> None:
        self.apart = apart  # skinny_linear comes next, and reads large weights of few rows where they are

    def find(self, facts: Facts) -> Iterator[Match]:
        """Groups of at least two matmuls with one input; members that cannot join are left out by ``check``."""
        groups: dict[tuple[Node, Any], list[Node]] = {}
        for node in facts.gm.graph.nodes:
            if node.op == "call_function" and node.target in (aten.mm.default, aten.addmm.default):
                x = node.args[1] if node.target is aten.addmm.default else node.args[0]
                if isinstance(x, Node):
                    groups.setdefault((x, node.target), []).append(node)
        by_input: dict[Node, list[list[Node]]] = {}
        for (x, _), members in groups.items():
            by_input.setdefault(x, []).append(members)
        for x, kinds in by_input.items():
            if len(kinds) > 1 and any(len(members) == 1 for members in kinds):
                yield Match({"x": x, "members": [kinds[0][0], kinds[1][0]], "group": []}, ())
            for members in kinds:
                for some in _together(members):
                    if len(some) > 1:
                        yield Match({"x": x, "members": some, "group": []}, tuple(some))

    def check(self, match: Match, facts: Facts) -> Refuse | None:
        """See Legality. Fills ``match.group`` with the members that may be merged; refuses if fewer than two."""
        members: list[Node] = match.members
        if len({node.target for node in members}) > 1:
            return Refuse("some siblings have a bias and some have none", members[-1])
        if facts.stage != "inference":
            return Refuse("weights change every step in training", members[0])
        if device(match.x) == _CPU and _rows(match.x) > _FEW_ROWS:
            return Refuse("on a CPU a wider product of many rows is no faster", members[0])
        blame: Refuse | None = None
        group: list[Sibling] = match.group
        group.clear()
        for node in members:
            found = _sibling(node, facts)
            if isinstance(found, Sibling) and group:
                found = _fits(group[0], found) or found
            if isinstance(found, Sibling) and _busy(node) and not (self.apart and reads_apart(node)):
                found = Refuse("it keeps the GPU busy by itself", node)
            if isinstance(found, Sibling):
                group.append(found)
            else:
                blame = found
        if any(_busy(sibling.node) for sibling in group):  # it is here only to be read where it is: so must be the others
            alone = [sibling.node for sibling in group if not reads_apart(sibling.node)]
            if alone:
                blame = Refuse("its weight would be copied, and a large one beside it", alone[0])
                group[:] = [sibling for sibling in group if sibling.node not in alone]
        if len({sibling.weight.source for sibling in group}) < len(group):
            return Refuse("two siblings use one weight", members[-1])
        if len(group) < 2:
            return blame or Refuse("fewer than two siblings can be merged", members[0])
        first, last = group[0].node, group[-1].node
        if any(first < writer < last for writers in facts.writers.values() for writer in writers):
            return Refuse("memory is written between the siblings", last)
        for sibling in list(group):
            total = sum(shape(member.node)[1] for member in group)  # type: ignore[index]
            refusal = _readers(sibling, total, facts)
            if refusal is not None:
                group.remove(sibling)
                blame = refusal
        if len(group) < 2:
            return blame
        if blame is not None:  # fewer members: another row stride
            total = sum(shape(member.node)[1] for member in group)  # type: ignore[index]
            for sibling in group:
                refusal = _readers(sibling, total, facts)
                if refusal is not None:
                    return refusal
        return None

    def replace(self, match: Match, facts: Facts) -> None:
        """One matmul where the first was; each result becomes a slice of its columns."""
        gm, graph = facts.gm, facts.gm.graph
        group: list[Sibling] = match.group
        origin = [sibling.node for sibling in group]
        first = min(origin)
        rows, widths = shape(first)[0], [shape(node)[1] for node in origin]  # type: ignore[index]
        total, like = sum(widths), tensor(first)
        assert like is not None
        # everything that may fail comes before the first edit
        values = edit.FakeViews(like, [rows, total])
        parts: list[torch.Tensor] = []
        restrided: list[tuple[Node, torch.Tensor]] = []
        start = 0
        for sibling, width in zip(group, widths):
            parts.append(values.view((rows, width), (total, 1), start))
            restrided.extend((node, values.view(shape(node) or (), strides, start + offset))
                             for node, strides, offset in sibling.views)
            start += width
        operand, transposed = _operand(group, facts, total, origin)
        bias = None
        if group[0].bias is not None:
            biases = [sibling.bias for sibling in group if sibling.bias is not None]
            bias = edit.add_derived(
                gm, [facts.position(each.source) for each in biases], _joined([each.steps for each in biases], 0, False),
                edit.fake_empty(like, [total]), _share(biases, 0, False), origin, recipe=_recipe(biases, 0, False))
        with graph.inserting_before(first):
            if transposed is not None:
                operand = edit.insert(graph, aten.t.default, (operand,), origin=origin, val=transposed)
            args = (match.x, operand) if bias is None else (bias, match.x, operand)
            wide = edit.insert(graph, first.target, args, origin=origin, val=values.whole)
            start = 0
            for node, width, part in zip(origin, widths, parts):
                piece = edit.insert(graph, aten.slice.Tensor, (wide, 1, start, start + width), origin=[node], val=part)
                node.replace_all_uses_with(piece)
                start += width
        for node, made in restrided:
            node.meta["val"] = made
            node.meta.pop("tensor_meta", None)
        edit.erase_dead(origin)


def _together(members: list[Node]) -> list[list[Node]]:
    """The siblings in equal groups; on a GPU at most as many as one kernel reads where they are."""
    first, found = members[0], []
    most = _APART if device(first) != _CPU and (dtype(first) or torch.float32).itemsize == 2 else len(members)
    count = -(-len(members) // most)
    for i in range(count):
        found.append(members[i * len(members) // count : (i + 1) * len(members) // count])
    return found


def _rows(x: Node) -> int:
    """Rows of the shared operand; of a symbolic size what the example had, and 0 where nothing is known."""
    rows = (shape(x) or (0,))[0]
    return rows if isinstance(rows, int) else rows.node.hint or 0  # type: ignore[no-any-return]


def _busy(node: Node) -> bool:
    """A product on a GPU that gains nothing from company, and whose weight is not worth a copy."""
    x, weight = node.args[-2:]
    assert isinstance(x, Node) and isinstance(weight, Node)
    rows, (inner, width) = _rows(x), shape(weight) or (0, 0)
    kind = dtype(node)
    if (device(node) or _CPU).type == "cpu" or kind is None:
        return False
    high = -(-rows // 128)
    if high * -(-width // 256) >= _BUSY_TILES or inner * width * kind.itemsize >= _BUSY_BYTES:
        return True
    counts = [high * (width // columns) for columns in (256, 192) if width % columns == 0]
    return any(tiles >= _WHOLE * _PROCESSORS * -(-tiles // _PROCESSORS) for tiles in counts)


def _sibling(node: Node, facts: Facts) -> Sibling | Refuse:
    if node.kwargs:
        return Refuse("addmm scales its bias or product", node)
    weight = _weight(node.args[-1], facts)
    if isinstance(weight, Refuse):
        return weight
    sizes = shape(node)
    if sizes is None or not isinstance(sizes[1], int) or stride(node) is None:
        return Refuse("its width is not a plain number", node)
    if not same(stride(node)[1], 1) and sizes[1] != 1:  # type: ignore[index]
        return Refuse("its result is not row-major", node)
    bias = None
    if node.target is aten.addmm.default:
        found = _weight(node.args[0], facts)
        if isinstance(found, Refuse):
            return Refuse("its bias is not a constant parameter", node)
        if not same_sizes(shape(node.args[0]), [sizes[1]]):
            return Refuse("its bias is not one vector of its width", node)
        bias = found
    return Sibling(node, weight, bias)


def _weight(node: Any, facts: Facts) -> Weight | Refuse:
    steps: list[Any] = []
    while isinstance(node, Node) and node.op == "call_function":
        if node.target in _TRANSPOSES:
            kwargs: dict[str, Any] = {}
        elif node.target is aten._to_copy.default and set(node.kwargs) <= {"dtype", "layout"}:
            kwargs = {"dtype": node.kwargs["dtype"]} if "dtype" in node.kwargs else {}
        else:
            return Refuse("its weight is computed in the graph", node)
        args = tuple(tuple(arg) if isinstance(arg, (list, tuple)) else arg for arg in node.args[1:])
        steps.append((node.target, args, tuple(sorted(kwargs.items()))))
        node = node.args[0]
    if not isinstance(node, Node) or node.op != "placeholder":
        return Refuse("its weight is computed in the graph", node if isinstance(node, Node) else None)
    if node not in facts.static:
        return Refuse("its weight is not a parameter", node)
    if node in facts.mutated:
        return Refuse("its weight is written by the graph", node)
    if not all(isinstance(size, int) for size in shape(node) or (None,)):
        return Refuse("its weight has a symbolic size", node)
    return Weight(node, tuple(reversed(steps)))


def _fits(first: Sibling, other: Sibling) -> Refuse | None:
    """Can stand side by side with the first of its group."""
    if dtype(first.node) != dtype(other.node) or device(first.node) != device(other.node) or \
            dtype(first.weight.source) != dtype(other.weight.source):
        return Refuse("its dtype or device differs from its siblings'", other.node)
    if dtype(first.node.args[-1]) != dtype(other.node.args[-1]):
        return Refuse("its dtype or device differs from its siblings'", other.node)
    return None


def _operand(group: Sequence[Sibling], facts: Facts, total: int, origin: list[Node]) -> tuple[Node, torch.Tensor | None]:
    """The derived weight: [N, K], and the value of its transpose, if the first weight is stored so, else [K, N]."""
    first = group[0].node.args[-1]
    assert isinstance(first, Node)
    inner, strides, like = shape(first)[0], stride(first), tensor(first)  # type: ignore[index]
    assert like is not None and strides is not None
    transposed = same(strides[0], 1) and not same(strides[1], 1)
    weights = [sibling.weight for sibling in group]
    values = edit.FakeViews(like, (total, inner) if transposed else (inner, total))
    node = edit.add_derived(facts.gm, [facts.position(weight.source) for weight in weights],
                            _joined([weight.steps for weight in weights], 1, transposed), values.whole,
                            _share(weights, 1, transposed), origin, recipe=_recipe(weights, 1, transposed))
    return node, values.view((inner, total), (1, inner)) if transposed else None


def _joined(chains: Sequence[Any], dim: int, transposed: bool) -> Callable[[list[torch.Tensor]], torch.Tensor]:
    """Takes the weights' steps, not the weights: those would keep the graph alive."""

    def compute(sources: list[torch.Tensor]) -> torch.Tensor:
        parts = [_applied(steps, source) for steps, source in zip(chains, sources)]
        return torch.cat([part.t() for part in parts], 0) if transposed else torch.cat(parts, dim)

    return compute


def _applied(steps: Sequence[Any], found: torch.Tensor) -> torch.Tensor:
    for target, args, kwargs in steps:
        found = target(found, *args, **dict(kwargs))
    return found


def _recipe(weights: Sequence[Weight], dim: int, transposed: bool) -> Any:
    """``_joined`` as JSON, or None for arguments that have no such form."""
    chains: list[Any] = []
    for weight in weights:
        steps: list[Any] = []
        for target, args, kwargs in weight.steps:
            dtype = dict(kwargs).get("dtype")
            if not _plain(args):
                return None
            steps.append([target.name(), [list(a) if isinstance(a, tuple) else a for a in args],
                          None if dtype is None else str(dtype)[6:]])
        chains.append(steps)
    return ["concatenate", dim, transposed, chains]


def rebuild(dim: Any, transposed: Any, chains: Any, count: int) -> Callable[[list[torch.Tensor]], torch.Tensor]:
    """The computation of a recipe for ``count`` sources. Raises ValueError or TypeError for what is none."""
    known = {target.name(): target for target in (*_TRANSPOSES, aten._to_copy.default)}
    if dim not in (0, 1) or type(transposed) is not bool or len(chains) != count or count == 0:
        raise ValueError("not a concatenation of weights")
    found: list[Any] = []
    for steps in chains:
        chain: list[Any] = []
        for name, args, word in steps:
            made = getattr(torch, word, None) if isinstance(word, str) else None
            if name not in known or not _plain(args) or word is not None and not isinstance(made, torch.dtype):
                raise ValueError("not a step of a weight")
            given = tuple(tuple(a) if isinstance(a, list) else a for a in args)
            chain.append((known[name], given, () if made is None else (("dtype", made),)))
        found.append(tuple(chain))
    return _joined(found, dim, transposed)


def _share(weights: Sequence[Weight], dim: int, transposed: bool) -> str:
    return f"cat {dim} {transposed} " + "|".join(weight.word() for weight in weights)


# readers


_KNOWN: dict[Any, bool] = {}


def _readers(sibling: Sibling, total: int, facts: Facts) -> Refuse | None:
    """Follow the views of one result and check each reader; collects the views' new strides in ``sibling.views``."""
    sibling.views.clear()
    node = sibling.node
    if node in facts.escaping:
        return Refuse("its result leaves the graph", node)
    stack: list[tuple[Node, tuple[Any, ...], Any]] = [(node, (total, 1), 0)]
    while stack:
        source, strides, offset = stack.pop()
        for reader in source.users:
            target = reader.target
            if target in _RESHAPES:
                made = view_strides(shape(source) or (), strides, shape(reader) or ())
                if made is None:
                    return Refuse("a view of its result needs contiguous memory", reader)
                sibling.views.append((reader, made, offset))
                stack.append(sibling.views[-1])
            elif target in _MOVES:
                moved = _moved(reader, source, strides)
                if moved is None:
                    return Refuse("a view of its result has unknown strides", reader)
                sibling.views.append((reader, moved[0], offset + moved[1]))
                stack.append(sibling.views[-1])
            elif is_view(reader):
                return Refuse("a reader is a view of another kind", reader)
            elif is_pointwise_op(target) and not written_by(reader) or target in _PLAIN or _only_source(reader, source):
                continue  # strides keep their order, so elementwise results keep their layout
            elif packet_name(reader) in _BY_STORAGE or not _tolerates(reader, source, strides):
                return Refuse("a reader gives another layout for strided input", reader)
    return None


def _only_source(reader: Node, source: Node) -> bool:
    """It copies the value into memory of given layout."""
    position = _INTO.get(reader.target)
    return position is not None and all(
        given is not source for index, given in enumerate(reader.args) if index != position)


def _moved(reader: Node, source: Node, strides: tuple[Any, ...]) -> tuple[tuple[Any, ...], Any] | None:
    """New (strides, offset added) of a view that permutes, inserts, drops, slices or expands dimensions."""
    target, args, sizes, out = reader.target, reader.args, shape(source) or (), shape(reader) or ()
    rank = len(sizes)
    if reader.kwargs or target is not aten.expand.default and not _plain(args[1:]):
        return None
    if target in (aten.alias.default, aten.detach.default):
        return strides, 0
    if target is aten.t.default:
        return strides[::-1], 0
    if target is aten.transpose.int:
        moved = list(strides)
        a, b = args[1] % rank, args[2] % rank  # type: ignore[operator]
        moved[a], moved[b] = moved[b], moved[a]
        return tuple(moved), 0
    if target is aten.permute.default:
        return tuple(strides[dim % rank] for dim in args[1]), 0  # type: ignore[union-attr, operator]
    dim: Any = args[1] if len(args) > 1 else 0
    if target is aten.unsqueeze.default:
        dim %= rank + 1
        return (*strides[:dim], sizes[dim] * strides[dim] if dim < rank else 1, *strides[dim:]), 0
    if target is aten.expand.default:
        lead = len(out) - rank
        return tuple(0 if i < lead or not same(size, sizes[i - lead]) else strides[i - lead]
                     for i, size in enumerate(out)), 0
    dim %= rank
    if target is aten.select.int:
        index: Any = args[2]
        index = index + sizes[dim] if index < 0 else index
        return (*strides[:dim], *strides[dim + 1:]), index * strides[dim]
    start: Any = args[2] if len(args) > 2 and args[2] is not None else 0
    step: Any = args[4] if len(args) > 4 else 1
    if start < 0 or isinstance(sizes[dim], int) and start > sizes[dim]:
        start = start + sizes[dim] if start < 0 else sizes[dim]
        if isinstance(start, int) and start < 0:
            start = 0
    return tuple(s * step if i == dim else s for i, s in enumerate(strides)), start * strides[dim]


def _plain(argument: Any) -> bool:
    """Holds Python integers only, no symbolic sizes."""
    if isinstance(argument, (list, tuple)):
        return all(map(_plain, argument))
    return argument is None or isinstance(argument, int)


def view_strides(sizes: Sequence[Any], strides: Sequence[Any], wanted: Sequence[Any]) -> tuple[Any, ...] | None:
    """Strides of ``view(wanted)`` of a tensor with these sizes and strides, or None if that needs a copy.

    Symbolic sizes are multiplied and compared as they are; what cannot be proved counts as "needs a copy".
    """
    pairs = [(size, step) for size, step in zip(sizes, strides) if not same(size, 1)]
    blocks: list[list[Any]] = []  # [elements, step of the innermost], outermost first; merged where memory continues
    for size, step in pairs:
        if blocks and same(blocks[-1][1], size * step):
            blocks[-1] = [blocks[-1][0] * size, step]
        else:
            blocks.append([size, step])
    found: list[Any] = []
    block = len(blocks) - 1
    count: Any = 1
    for size in reversed(wanted):
        if same(size, 1):
            found.append(blocks[block][1] * count if block >= 0 else 1)
            continue
        if block >= 0 and same(count, blocks[block][0]):
            block, count = block - 1, 1
        if block < 0:
            return None
        found.append(blocks[block][1] * count)
        count = count * size
        if isinstance(count, int) and isinstance(blocks[block][0], int) and blocks[block][0] % max(count, 1):
            return None
    if block >= 0 and not same(count, blocks[block][0]) or block > 0:
        return None
    return tuple(reversed(found))


def _tolerates(reader: Node, source: Node, strides: tuple[Any, ...]) -> bool:
    """Run the reader on a strided fake input: same layout as recorded? Remembered by operator and layouts."""
    old = tensor(source)
    if old is None:
        return False
    key = None
    if all(isinstance(part, int) for part in (*old.shape, *strides)):
        key = (reader.target, _describe(reader.args, source, strides), _describe(reader.kwargs, source, strides))
        if key in _KNOWN:
            return _KNOWN[key]
    strided = edit.fake_empty(old, tuple(old.shape), strides)

    def swap(node: Node) -> Any:
        return strided if node is source else edit.value(node)

    try:
        args, kwargs = torch.fx.node.map_arg((reader.args, reader.kwargs), swap)
        mode = edit.fake_mode_of([strided])
        with torch.no_grad(), mode:
            made = reader.target(*args, **kwargs)  # type: ignore[operator]
    except Exception:  # noqa: BLE001 - an operator that cannot take it is a reader that does not tolerate it
        made = None
    wanted = edit.value(reader)
    answer = _equal_layouts(made, wanted)
    if key is not None:
        if len(_KNOWN) > 4096:
            _KNOWN.clear()
        _KNOWN[key] = answer
    return answer


def _equal_layouts(made: Any, wanted: Any) -> bool:
    if isinstance(wanted, torch.Tensor):
        return same_layout(made, wanted)
    if isinstance(wanted, (list, tuple)):
        return isinstance(made, (list, tuple)) and len(made) == len(wanted) and \
            all(map(_equal_layouts, made, wanted))
    return made is not None or wanted is None


def _describe(argument: Any, source: Node, strides: tuple[Any, ...]) -> Any:
    if isinstance(argument, Node):
        found = edit.value(argument)
        if isinstance(found, torch.Tensor):
            steps = strides if argument is source else tuple(map(str, found.stride()))
            return (str(found.dtype), str(found.device), tuple(map(str, found.shape)), steps)
        return str(found)
    if isinstance(argument, (list, tuple)):
        return tuple(_describe(part, source, strides) for part in argument)
    if isinstance(argument, dict):
        return tuple((name, _describe(part, source, strides)) for name, part in argument.items())
    return (type(argument).__name__, str(argument))
