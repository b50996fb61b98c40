"""Checks an FX graph between stages: well formed, values as recorded, mutation order as it was.

Under test it runs after every pass that changed something; in use only on request, since it runs the whole graph on fake
tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from fusionc.errors import VerifyError

from .edit import compute_value, value_key
from .facts import Facts, aliased_by, nodes_of, same_layout, storages, value, written_by


def verify(gm: GraphModule, where: str = "graph", before: list[tuple[Any, ...]] | None = None) -> None:
    """Raise VerifyError at the first fault. ``before``: ``mutations(gm)`` of the graph that a pass started from."""
    _structure(gm, where)
    _values(gm, where)
    _mutation(gm, where)
    if before is not None:
        after = mutations(gm)
        if not set(before) <= set(after):
            lost = sorted(str(entry[0]) for entry in set(before) - set(after))
            raise VerifyError(where, f"inputs are not written any more: {', '.join(lost)}",
                              "a pass dropped a write; writes are effects and must stay")


def mutations(gm: GraphModule) -> list[tuple[Any, ...]]:
    """Names of inputs that the graph writes."""
    facts = Facts(gm)
    return [(root.name,) for root in facts.inputs if root in facts.writers]


def _structure(gm: GraphModule, where: str) -> None:
    seen: set[Node] = set()
    outputs, past_inputs = 0, False
    names: set[str] = set()
    for node in gm.graph.nodes:
        for source in nodes_of((node.args, node.kwargs)):
            if source not in seen:
                raise VerifyError(f"{where}, node {node.name}", f"{source.name} is used before it is defined",
                                  "insert new nodes after all of their inputs")
        if node.name in names:
            raise VerifyError(f"{where}, node {node.name}", "two nodes have this name")
        if node.op == "placeholder":
            if past_inputs:
                raise VerifyError(f"{where}, node {node.name}", "an input stands after a computation",
                                  "add inputs with edit.add_input")
        elif node.op == "output":
            outputs += 1
        else:
            past_inputs = True
        seen.add(node)
        names.add(node.name)
    if outputs != 1:
        raise VerifyError(where, f"the graph has {outputs} outputs lines; it must have one")
    derived = [each.name for each in gm.meta.get("fusionc_derived", ())]
    last = [node.name for node in gm.graph.nodes if node.op == "placeholder"][-len(derived):] if derived else []
    if derived != last:
        raise VerifyError(where, f"derived inputs {derived} are not the last inputs {last}",
                          "the caller appends their values to the arguments in this order")


def _values(gm: GraphModule, where: str) -> None:
    """Recorded dtype, device, sizes and strides equal what the operator gives on its inputs' recorded values."""
    if value_key(gm.graph) != "val":
        return  # Dynamo's torch-level values are of no use to later stages: AOTAutograd makes its own
    for node in gm.graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        recorded = value(node)
        if recorded is None:
            if node.target._schema.returns and node.users:
                raise VerifyError(f"{where}, node {node.name}", "it has no recorded value (meta['val'])",
                                  "insert nodes with edit.insert")
            continue
        if any(value(source) is None for source in node.all_input_nodes) or written_by(node):
            continue
        if _symbolic((recorded, [value(source) for source in node.all_input_nodes])):
            continue  # running it could add guards
        try:
            made = compute_value(node.target, node.args, node.kwargs)
        except Exception as error:  # noqa: BLE001 - whatever the operator says is the finding
            raise VerifyError(f"{where}, node {node.name}", f"{node.target} refuses its inputs: {error}") from error
        if not _agree(made, recorded):
            raise VerifyError(f"{where}, node {node.name}", f"recorded {_say(recorded)}, but {node.target} gives "
                              f"{_say(made)}", "recompute meta['val'] of nodes whose inputs changed layout")


def _symbolic(found: Any) -> bool:
    if isinstance(found, torch.Tensor):
        return not all(isinstance(size, int) for size in found.shape)
    if isinstance(found, (list, tuple)):
        return any(map(_symbolic, found))
    return isinstance(found, (torch.SymInt, torch.SymFloat, torch.SymBool))


def _agree(made: Any, recorded: Any) -> bool:
    if isinstance(recorded, torch.Tensor):
        return same_layout(made, recorded)
    if isinstance(recorded, (list, tuple)):
        return isinstance(made, (list, tuple)) and len(made) == len(recorded) and all(map(_agree, made, recorded))
    return True


def _say(found: Any) -> str:
    from .text import _kind

    if isinstance(found, torch.Tensor) and found.layout == torch.strided:
        return f"{_kind(found)} with strides {tuple(map(str, found.stride()))}"
    return _kind(found) or repr(found)


def _apart(node: Node, others: list[Node]) -> bool:
    """The recorded values are known to share no memory."""
    mine, theirs = storages(value(node)), [storages(value(other)) for other in others]
    return bool(mine) and all(found and not found & mine for found in theirs)


def _mutation(gm: GraphModule, where: str) -> None:
    """Nothing reads, through a functional value, memory that was overwritten in between.

    A value that *is* an input's storage (a view of it) may be read after a write only if it was made after it.
    """
    facts = Facts(gm)
    for root, writers in facts.writers.items():
        writing = set(writers)
        for holder in facts.aliases(root):
            if holder is root or holder in writing or written_by(holder):
                continue
            for writer in writers:
                if not holder < writer or holder in nodes_of((writer.args[:1],)):
                    continue
                if isinstance(value(root), (tuple, list)) and _apart(holder, written_by(writer)):
                    continue  # two results of one operator (values and indices of a sort)
                late = next((reader for reader in holder.users if writer < reader and reader not in writing
                             and reader.op != "output" and not aliased_by(reader)), None)
                if late is not None:
                    raise VerifyError(f"{where}, node {late.name}", f"it reads {holder.name}, a view of {root.name} "
                                      f"made before {writer.name} wrote it", "keep reads before the write")
