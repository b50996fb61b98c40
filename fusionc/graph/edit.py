"""Changing an FX graph: insert with value and provenance, replace, drop what became dead, add derived inputs.

Nothing here retraces a graph. A new node's fake value is computed from its inputs' fake values, or handed in when the
caller knows it already (much cheaper: fake operators cost ~0.1 ms each).
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from .facts import is_pure, is_view, nodes_of, placeholders, same, value, written_by

_PROVENANCE = ("stack_trace", "nn_module_stack", "source_fn_stack")
DERIVED_KEY = "fusionc_derived"
_SOURCE = "_dynamo_source"


@dataclass(frozen=True, eq=False)
class Derived:
    """A weight computed from parameters at run time: the value of a placeholder that a pass added.

    ``sources`` are placeholder positions of the graph that holds it; ``compute`` maps their tensors (in that order) to
    the value and must not keep or write them. ``share`` names the computation (structure and constants): two derived
    weights with equal ``share`` and the same source tensors are one tensor in memory, across graphs. None: not shared.
    ``volatile`` are those sources that torch writes without telling (eager BatchNorm in training mode moves its running
    statistics and leaves their version counters alone): the runtime looks at their values too. ``recipe`` is the
    computation as JSON that ``passes.recipes.rebuild`` understands; None: a graph that holds it is not cached on disk.
    """

    name: str
    sources: tuple[int, ...]
    compute: Callable[[list[torch.Tensor]], torch.Tensor]
    share: str | None = None
    volatile: tuple[int, ...] = ()
    recipe: Any = None


def provenance(new: Node, old: Iterable[Node]) -> None:
    """Copy where the old nodes came from (user's line, module path) to the new one and remember their names."""
    names: list[str] = []
    for node in old:
        for key in _PROVENANCE:
            found = node.meta.get(key)
            if found is not None and key not in new.meta:
                new.meta[key] = found
        names.extend(node.meta.get("fusionc_from", (node.name,)))
    if names:
        new.meta["fusionc_from"] = tuple(dict.fromkeys((*new.meta.get("fusionc_from", ()), *names)))


def value_key(graph: Graph) -> str:
    """The meta key that this graph keeps fake values under: "val" (ATen) or "example_value" (Dynamo)."""
    for node in graph.nodes:
        if "val" in node.meta:
            return "val"
        if "example_value" in node.meta:
            return "example_value"
    return "val"


def fake_mode_of(values: Iterable[Any]) -> Any:
    """The fake mode of the first fake tensor among the values, or None."""
    for found in values:
        if isinstance(found, torch._subclasses.FakeTensor):
            return found.fake_mode
    return None


def compute_value(target: Any, args: Any, kwargs: Any, op: str = "call_function") -> Any:
    """Run an operator on the fake values of its node arguments and return the fake result.

    Raises whatever the operator raises on such inputs: the caller treats that as "this rewrite is not legal".
    """
    fake_args, fake_kwargs = map_arg((args, kwargs), value)
    inputs = [value(node) for node in nodes_of((args, kwargs))]
    mode = fake_mode_of(inputs)
    with torch.no_grad(), mode if mode is not None else nullcontext():
        if op == "call_method":
            return getattr(fake_args[0], target)(*fake_args[1:], **fake_kwargs)
        return target(*fake_args, **fake_kwargs)


_MISSING: Any = object()


def insert(graph: Graph, target: Any, args: Sequence[Any], kwargs: dict[str, Any] | None = None, *,
           origin: Iterable[Node] = (), val: Any = _MISSING, key: str = "val", name: str | None = None) -> Node:
    """Create a call at the graph's insertion point with provenance and a fake value.

    ``val`` skips the fake run; pass it wherever the result's layout is already known. ``key`` is the meta key.
    """
    kwargs = kwargs or {}
    found = compute_value(target, args, kwargs) if val is _MISSING else val
    if name is None and isinstance(target, torch._ops.OpOverload):
        name = target._schema.name.split("::", 1)[1]
    node = graph.create_node("call_function", target, tuple(args), kwargs, name=name)
    node.meta[key] = found
    provenance(node, origin)
    return node


def replace(old: Node, new: Node) -> None:
    """Every use of ``old`` becomes a use of ``new``; ``old`` and what only it used are erased."""
    if old is new:
        return
    provenance(new, [old])
    redirect(old, new)
    erase_dead([old])


def redirect(old: Node, new: Node) -> None:
    """Every use of ``old`` becomes a use of ``new``. Where it begins elsewhere in its storage (a copy begins at 0, the input
    that it was copied from where the user says), the values of its views are made again: a view is found by their difference."""
    readers = list(old.users)
    old.replace_all_uses_with(new)
    before, after = value(old), value(new)
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor) \
            or before.layout != torch.strided or after.layout != torch.strided \
            or same(before.storage_offset(), after.storage_offset()):
        return
    key = value_key(old.graph)
    while readers:
        node = readers.pop()
        if is_view(node) or node.target is operator.getitem:  # a piece of a split, whose value was made again before
            node.meta[key] = compute_value(node.target, node.args, node.kwargs, node.op)
            node.meta.pop("tensor_meta", None)
            readers.extend(node.users)


def erase_dead(nodes: Iterable[Node]) -> int:
    """Erase unused nodes without effect, and then their inputs likewise. Returns how many went.

    Random operators, asserts and collectives stay. Torch-level calls have no schema to tell, so they go only if named.
    """
    stack, gone, seen = list(nodes), 0, set()
    named = set(stack)
    while stack:
        node = stack.pop()
        if node in seen or node.users or node.op in ("placeholder", "output") or written_by(node):
            continue
        schema = isinstance(node.target, torch._ops.OpOverload)
        if not is_pure(node) and (schema or node not in named):
            continue
        seen.add(node)
        inputs = node.all_input_nodes
        node.graph.erase_node(node)
        gone += 1
        stack.extend(inputs)
    return gone


def add_input(gm: GraphModule, name: str, val: Any, key: str = "val") -> Node:
    """A new last placeholder with this fake value; the caller of the graph must append its value to the arguments."""
    graph, existing = gm.graph, placeholders(gm)
    if existing:
        with graph.inserting_after(existing[-1]):
            node = graph.placeholder(name)
    else:
        with graph.inserting_before(next(iter(graph.nodes))):
            node = graph.placeholder(name)
    node.meta[key] = val
    return node


def add_derived(gm: GraphModule, sources: Sequence[int], compute: Callable[[list[torch.Tensor]], torch.Tensor],
                val: torch.Tensor, share: str | None = None, origin: Iterable[Node] = (), key: str = "val",
                volatile: Sequence[int] = (), recipe: Any = None) -> Node:
    """A new last placeholder ``derived_<n>`` that the runtime fills with ``compute(sources)``; see ``Derived``."""
    table: list[Derived] = gm.meta.setdefault(DERIVED_KEY, [])
    node = add_input(gm, f"derived_{len(table)}", val, key)
    name = node.target = node.name  # another one where a derived input of that name stands or stood
    provenance(node, origin)
    if key != "val":  # AOTAutograd asks each placeholder of a Dynamo graph where it comes from and whether it moves
        setattr(node, _SOURCE, None)
        node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
    table.append(Derived(name, tuple(sources), compute, share, tuple(volatile), recipe))
    return node


def derived(gm: GraphModule, node: Node) -> Derived | None:
    """What the runtime fills this input with, if a pass added it."""
    return next((each for each in gm.meta.get(DERIVED_KEY, ()) if each.name == node.name and node.op == "placeholder"), None)


def drop_derived(gm: GraphModule, node: Node) -> None:
    """Erase an input that a pass added and that nothing reads any more; any other node stays."""
    entry = derived(gm, node)
    if entry is not None and not node.users:
        gm.meta[DERIVED_KEY].remove(entry)
        gm.graph.erase_node(node)


def fake_empty(like: torch.Tensor, sizes: Sequence[Any], strides: Sequence[Any] | None = None,
               dtype: torch.dtype | None = None) -> torch.Tensor:
    """A fake tensor of the fake mode and device of ``like``: the value of a new input or of a known result.

    Wraps a meta tensor directly: a fifth of the time of running ``torch.empty`` under the fake mode, and no guards.
    """
    mode = fake_mode_of([like])
    if mode is None:
        with torch.no_grad():
            made = torch.empty(tuple(sizes), dtype=dtype or like.dtype, device=like.device)
            return made if strides is None else torch.empty_strided(
                tuple(sizes), tuple(strides), dtype=made.dtype, device=made.device)
    with torch.no_grad():
        if strides is None:
            plain = torch.empty(tuple(sizes), dtype=dtype or like.dtype, device="meta")
        else:
            plain = torch.empty_strided(tuple(sizes), tuple(strides), dtype=dtype or like.dtype, device="meta")
        return torch._subclasses.FakeTensor(mode, plain, like.device)


class FakeViews:
    """A fake tensor and strided views of its storage, made cheaply (see ``fake_empty``)."""

    def __init__(self, like: torch.Tensor, sizes: Sequence[Any]) -> None:
        self.mode, self.device = fake_mode_of([like]), like.device
        place = "meta" if self.mode is not None else like.device
        self._plain = torch.empty(tuple(sizes), dtype=like.dtype, device=place)
        self.whole = self._wrap(self._plain)

    def view(self, sizes: Sequence[Any], strides: Sequence[Any], offset: Any = 0) -> torch.Tensor:
        """Elements of the storage by sizes, strides and offset."""
        with torch.no_grad():
            return self._wrap(self._plain.as_strided(tuple(sizes), tuple(strides), offset))

    def _wrap(self, plain: torch.Tensor) -> torch.Tensor:
        if self.mode is None:
            return plain
        with torch.no_grad():
            return torch._subclasses.FakeTensor(self.mode, plain, self.device)


def inline(gm: GraphModule, body: Graph, bound: Sequence[Any], before: Node, origin: Sequence[Node],
           key: str = "val") -> Any:
    """Copy a traced graph in front of ``before``, its placeholders standing for ``bound``; returns what it outputs."""
    env: dict[Node, Any] = {}
    given = iter(bound)
    with gm.graph.inserting_before(before):
        for node in body.nodes:
            if node.op == "placeholder":
                env[node] = next(given)
            elif node.op == "output":
                return map_arg(node.args[0], env.__getitem__)
            else:
                args, kwargs = map_arg((node.args, node.kwargs), env.__getitem__)
                name = node.target._schema.name.split("::")[1] if isinstance(node.target, torch._ops.OpOverload) else None
                copy = gm.graph.create_node(node.op, node.target, args, kwargs, name=name)
                found = value(node)
                copy.meta[key] = compute_value(node.target, args, kwargs, node.op) if found is None else found
                provenance(copy, origin)
                env[node] = copy
    raise ValueError("the replacement has no output")


def copy_graph(graph: Graph) -> Graph:
    """A copy with all meta (shallow) and the marks that Dynamo keeps on its placeholders."""
    made = Graph()
    mapping: dict[Node, Node] = {}
    found = made.graph_copy(graph, mapping, return_output_node=True)
    if isinstance(found, tuple):  # (returned value, the output node)
        copied = made.output(found[0])
        copied.meta = dict(found[1].meta)
    for old, new in mapping.items():
        new.meta = dict(old.meta)
        if hasattr(old, _SOURCE):
            setattr(new, _SOURCE, getattr(old, _SOURCE))
    made._codegen = graph._codegen
    return made


def copy_module(gm: GraphModule) -> GraphModule:
    """A GraphModule over a copy of the graph. Dynamo reads its own graph again after the backend: ours must be another."""
    made = GraphModule(gm, copy_graph(gm.graph), type(gm).__name__)
    made.meta = dict(gm.meta)
    for name, found in vars(gm).items():
        if name not in vars(made):
            setattr(made, name, found)
    return made


def safe_name(text: str, limit: int = 63) -> str:
    """ASCII identifier made from any text: letters, digits and underscores, not starting with a digit."""
    made = re.sub(r"[^A-Za-z0-9_]", "_", text)[:limit] or "x"
    return made if not made[0].isdigit() else ("_" + made)[:limit]
