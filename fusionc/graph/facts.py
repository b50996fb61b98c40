"""What is known about an FX graph without running it: values, mutation, aliases, constants, what leaves the graph.

Both levels are served. ATen graphs carry ``meta["val"]`` and schemas say what an operator writes or aliases. Torch-level
(Dynamo) graphs carry ``meta["example_value"]``; there names say what is written and the storages of the fake tensors
say what aliases, because a torch function has no schema.

Answers lean to the safe side: "may alias", "may be written".
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch.fx import GraphModule, Node

# Operators without alias annotation in their schema that return (or may return) their input's storage.
_HIDDEN_ALIASES = {"_unsafe_view", "reshape", "contiguous", "to", "flatten", "_reshape_alias", "lift_fresh", "unflatten",
                   "type_as", "expand_as", "view_as", "reshape_as", "squeeze_", "resolve_conj", "resolve_neg"}
_IN_PLACE_OPERATORS = {
    operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod, operator.ipow,
    operator.iand, operator.ior, operator.ixor, operator.ilshift, operator.irshift, operator.imatmul,
    operator.setitem, operator.delitem,
}
# norms that write their running statistics where an argument says so: its name and default
_MOVE_STATISTICS = {torch.nn.functional.batch_norm: ("training", False),
                    torch.nn.functional.instance_norm: ("use_input_stats", True)}  # fmt: skip


def value(node: Node) -> Any:
    """The node's fake value (tensor, symbolic number, number or tuple of these), or None if nobody recorded one."""
    meta = node.meta
    found = meta.get("val")
    return meta.get("example_value") if found is None else found


def tensor(node: Any) -> torch.Tensor | None:
    """The node's fake value if it is one tensor."""
    found = value(node) if isinstance(node, Node) else None
    return found if isinstance(found, torch.Tensor) else None


def shape(node: Any) -> tuple[Any, ...] | None:
    """Sizes (ints or SymInts) of a tensor node, else None."""
    found = tensor(node)
    return None if found is None else tuple(found.shape)


def stride(node: Any) -> tuple[Any, ...] | None:
    """Strides of a strided tensor node, else None."""
    found = tensor(node)
    return None if found is None or found.layout != torch.strided else tuple(found.stride())


def dtype(node: Any) -> torch.dtype | None:
    """dtype of a tensor node, else None."""
    found = tensor(node)
    return None if found is None else found.dtype


def device(node: Any) -> torch.device | None:
    """Device of a tensor node, else None."""
    found = tensor(node)
    return None if found is None else found.device


def is_static_shape(node: Any) -> bool:
    """True if every size is a plain integer."""
    sizes = shape(node)
    return sizes is not None and all(isinstance(size, int) for size in sizes)


def same(a: Any, b: Any) -> bool:
    """Two sizes are equal without adding a guard: ints compared, symbolic ones only if provably equal."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    left = getattr(getattr(a, "node", None), "expr", a)
    right = getattr(getattr(b, "node", None), "expr", b)
    return bool(left == right)  # sympy's structural equality: never guards


def same_sizes(a: Sequence[Any] | None, b: Sequence[Any] | None) -> bool:
    """Same rank and provably equal sizes."""
    return a is not None and b is not None and len(a) == len(b) and all(map(same, a, b))


def same_strides(sizes: Sequence[Any], a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Strides address the same elements: those of dimensions of size 1 do not matter, none does if a size is 0."""
    if any(isinstance(size, int) and size == 0 for size in sizes):
        return True
    return all(same(x, y) for size, x, y in zip(sizes, a, b, strict=True) if not (isinstance(size, int) and size == 1))


def size_hints(env: Any) -> Any:
    """By symbol: the value that a size had when the graph was traced (a ShapeEnv's table, by its name in this torch)."""
    return env.backed_var_to_val if hasattr(env, "backed_var_to_val") else getattr(env, "var_to_val", {})


def each(given: Any, count: int) -> list[Any]:
    """A window's numbers, one for all ``count`` dimensions or one for each, as a list of these."""
    numbers = list(given) if isinstance(given, (list, tuple)) else [given]
    return numbers * count if len(numbers) == 1 else numbers


def is_dense(x: torch.Tensor) -> bool:
    """Is it contiguous?  (Asked of the tensor itself, symbolic sizes would add a guard.)"""
    expected: list[Any] = []
    step: Any = 1
    for size in reversed(x.shape):
        expected.append(step)
        step = step * size
    return same_strides(x.shape, x.stride(), expected[::-1])


def same_layout(a: Any, b: Any) -> bool:
    """Two tensor values have the same dtype, device, sizes and (meaningful) strides."""
    if not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)):
        return False
    if a.dtype != b.dtype or a.device != b.device or not same_sizes(a.shape, b.shape) or a.layout != b.layout:
        return False
    return a.layout != torch.strided or same_strides(a.shape, a.stride(), b.stride())


def packet_name(node: Node) -> str:
    """Operator name without namespace and overload (``add`` of ``aten.add.Tensor``), or "" for other targets."""
    target = node.target  # (looked up by its hash it would take longer)
    return target.overloadpacket.__name__ if isinstance(target, torch._ops.OpOverload) else ""


def overlaps(sizes: Iterable[int], strides: Iterable[int]) -> bool:
    """May two positions in a tensor of these sizes and strides be the same memory?  (Yes, too, where strides are not nested.)"""
    reach = 0
    for step, size in sorted(zip(strides, sizes, strict=True)):
        if size > 1:
            if step <= reach:
                return True
            reach += (size - 1) * step
    return False


# Operators whose result begins where their first argument does in its storage: ATen copies all of that.
KEEP_PLACE = frozenset("slice_scatter select_scatter diagonal_scatter as_strided_scatter".split())


@lru_cache(maxsize=None)
def _schema(op: Any) -> tuple[frozenset[str], frozenset[str], tuple[str, ...]]:
    """(arguments written, arguments aliased by a result, all argument names)."""
    written: set[str] = set()
    aliased: set[str] = set()
    arguments = op._schema.arguments
    for argument in arguments:
        if argument.alias_info is not None:
            (written if argument.alias_info.is_write else aliased).add(argument.name)
            if argument.alias_info.is_write and op._schema.returns:
                aliased.add(argument.name)
    if op.overloadpacket.__name__ in _HIDDEN_ALIASES and arguments:
        aliased.add(arguments[0].name)
    return frozenset(written), frozenset(aliased), tuple(argument.name for argument in arguments)


def _pick(node: Node, names: frozenset[str], order: tuple[str, ...]) -> list[Node]:
    if not names:
        return []
    found: list[Node] = []
    for position, name in enumerate(order):
        if name in names:
            given = node.args[position] if position < len(node.args) else node.kwargs.get(name)
            found.extend(nodes_of(given))
    return found


def nodes_of(argument: Any) -> Iterator[Node]:
    """All nodes inside one (nested) argument."""
    if isinstance(argument, Node):
        yield argument
    elif isinstance(argument, (list, tuple)):
        for part in argument:
            yield from nodes_of(part)
    elif isinstance(argument, dict):
        for part in argument.values():
            yield from nodes_of(part)


def written_by(node: Node) -> list[Node]:
    """Nodes whose memory this node writes (in-place operators, ``out=``, ``copy_``, torch-level spellings)."""
    if node.op == "call_function":
        target = node.target
        if isinstance(target, torch._ops.OpOverload):
            written, _, order = _schema(target)
            return _pick(node, written, order) if written else []
        if target in _IN_PLACE_OPERATORS or node.kwargs.get("inplace") is True or _underscored(target):
            return list(nodes_of(node.args[:1])) + list(nodes_of(node.kwargs.get("input")))
        if node.kwargs.get("out") is not None:
            return list(nodes_of(node.kwargs["out"]))
        if isinstance(target, torch._ops.HigherOrderOperator):
            return list(node.all_input_nodes)
        if target in _MOVE_STATISTICS:
            training = node.args[5] if len(node.args) > 5 else node.kwargs.get(*_MOVE_STATISTICS[target])
            given = (*node.args[1:3], node.kwargs.get("running_mean"), node.kwargs.get("running_var"))
            return [] if training is False else list(nodes_of(given))
        # functional.relu(x, True), dropout(x, p, training, True): a trailing positional True may mean inplace
        if getattr(target, "__module__", "") == "torch.nn.functional" and any(arg is True for arg in node.args[1:]):
            names = getattr(getattr(target, "__code__", None), "co_varnames", ())
            if "inplace" in names and names.index("inplace") < len(node.args) and node.args[names.index("inplace")] is True:
                return list(nodes_of(node.args[:1]))
        return []
    if node.op == "call_method":
        name = str(node.target)
        if name == "__setitem__" or (name.endswith("_") and not name.endswith("__")) or \
                name.startswith("__i") and name not in ("__invert__", "__int__", "__index__"):
            return list(nodes_of(node.args[:1]))
    return []


def _underscored(target: Any) -> bool:
    name = getattr(target, "__name__", "")  # operator.and_ and its like end so because "and" is a keyword
    return name.endswith("_") and not name.endswith("__") and getattr(target, "__module__", "") != "_operator"


def aliased_by(node: Node) -> list[Node]:
    """Inputs whose storage a result of this node may share (views, in-place results, ``getitem`` of a tuple)."""
    if node.op == "call_function":
        target = node.target
        if isinstance(target, torch._ops.OpOverload):
            _, aliased, order = _schema(target)
            return _pick(node, aliased, order) if aliased else []
        if target is operator.getitem:
            return list(nodes_of(node.args[:1]))
        if isinstance(target, torch._ops.HigherOrderOperator):
            return list(node.all_input_nodes)
    if node.op in ("call_function", "call_method"):
        mine = storages(value(node))
        return [source for source in node.all_input_nodes if mine & storages(value(source))]
    return []


def storages(found: Any) -> set[int]:
    """Storages of the tensors in a recorded value; empty if they have none."""
    if isinstance(found, torch.Tensor):
        try:
            return {found.untyped_storage()._cdata}
        except (NotImplementedError, RuntimeError):  # sparse and other layouts have none
            return set()
    if isinstance(found, (list, tuple)):
        return set().union(*map(storages, found)) if found else set()
    return set()


@lru_cache(maxsize=None)
def _op_pure(op: Any) -> bool:
    if _schema(op)[0] or torch.Tag.nondeterministic_seeded in op.tags:
        return False
    name = op._schema.name
    if name.startswith("_c10d_functional") or name.startswith("c10d"):
        return False
    return not name.startswith(("aten::_assert", "aten::sym_constrain", "aten::_print", "aten::record_stream"))


@lru_cache(maxsize=None)
def is_pointwise_op(op: Any) -> bool:
    """Tagged pointwise by torch (each output element depends on one element of each input)."""
    return isinstance(op, torch._ops.OpOverload) and torch.Tag.pointwise in op.tags


def is_pure(node: Node) -> bool:
    """No effect besides its result and no randomness: may be merged with an equal node or dropped when unused."""
    if node.op == "get_attr":
        return True
    if node.op != "call_function":
        return False
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return _op_pure(target)
    return target is operator.getitem or getattr(target, "__module__", "") in ("_operator", "math") and \
        target not in _IN_PLACE_OPERATORS


def is_view(node: Node) -> bool:
    """The result is (or may be) a view of an input and nothing is written."""
    return bool(aliased_by(node)) and not written_by(node)


def placeholders(gm: GraphModule) -> list[Node]:
    """Placeholders in order."""
    return list(gm.graph.find_nodes(op="placeholder"))


def output_nodes(gm: GraphModule) -> list[Node]:
    """Nodes returned by the graph, with repetitions, in order."""
    return list(nodes_of(gm.graph.output_node().args))


class Facts:
    """Facts of one graph as it was when they were asked for; passes create none, the manager hands one in.

    ``stage`` is "inference", "forward" or "backward"; ``static`` are placeholders whose tensors are parameters or
    buffers of a module (their values change rarely, through the user's hand); ``real`` are real example inputs where
    the level has them.
    """

    def __init__(self, gm: GraphModule, level: str = "graph", stage: str = "forward",
                 static: Iterable[int] = (), real: Sequence[Any] | None = None) -> None:
        self.gm, self.level, self.stage = gm, level, stage
        self.inputs = placeholders(gm)
        chosen = set(static)
        self.static = {node for position, node in enumerate(self.inputs) if position in chosen}
        self.real = dict(zip(self.inputs, real, strict=False)) if real is not None else {}

    @cached_property
    def writers(self) -> dict[Node, list[Node]]:
        """Root node → nodes that write its memory, in graph order."""
        found: dict[Node, list[Node]] = {}
        for node in self.gm.graph.nodes:
            for written in written_by(node):
                for root in self.roots(written):
                    found.setdefault(root, []).append(node)
        return found

    @cached_property
    def mutated(self) -> set[Node]:
        """Placeholders that the graph writes."""
        return {root for root in self.writers if root.op == "placeholder"}

    @cached_property
    def escaping(self) -> set[Node]:
        """Nodes whose storage may leave the graph through an output."""
        found: set[Node] = set()
        stack = output_nodes(self.gm)
        while stack:
            node = stack.pop()
            if node not in found:
                found.add(node)
                stack.extend(aliased_by(node))
        return found

    def roots(self, node: Node) -> set[Node]:
        """Owners of the storage that the node's value may live in (itself if it allocates)."""
        found: set[Node] = set()
        stack = [node]
        while stack:
            current = stack.pop()
            sources = aliased_by(current)
            if sources:
                stack.extend(sources)
            else:
                found.add(current)
        return found

    def aliases(self, root: Node) -> set[Node]:
        """The node and everything that may be a view of it (downstream)."""
        found = {root}
        stack = [root]
        while stack:
            for user in stack.pop().users:
                if user not in found and any(source in found for source in aliased_by(user)):
                    found.add(user)
                    stack.append(user)
        return found

    def constant(self, node: Any) -> bool:
        """A number, or a static input that the graph does not write: same value on each call until the user changes it."""
        if not isinstance(node, Node):
            return True
        return node in self.static and node not in self.mutated

    def position(self, node: Node) -> int:
        """Index of a placeholder among the placeholders; raises ValueError for other nodes."""
        try:
            return self._positions[node]
        except KeyError:
            raise ValueError(f"{node.name} is not an input of the graph") from None

    @cached_property
    def _positions(self) -> dict[Node, int]:
        return {node: index for index, node in enumerate(self.inputs)}
