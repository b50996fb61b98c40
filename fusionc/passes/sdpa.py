"""What the attention passes share: the arguments of a scaled_dot_product_attention call, and what torch makes of one.

A fused kernel is chosen by torch while AOTAutograd traces the call, from shapes, strides, dtypes, the mask and the user's
``sdpa_kernel`` settings. ``Probe`` asks for that choice with the graph's fake values, before the graph is changed.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.utils._python_dispatch import TorchDispatchMode

from ..graph import edit
from ..graph.facts import nodes_of, same_layout, value
from .base import Match, Refuse

CALL: Any = torch.nn.functional.scaled_dot_product_attention
_ORDER = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
_DEFAULTS = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False}
_FUSED = "_scaled_dot_product_"
_REACH = 12  # nodes that may see another layout before the old one is back


def calls(gm: GraphModule) -> list[Node]:
    """All scaled_dot_product_attention calls in order."""
    return list(gm.graph.find_nodes(op="call_function", target=CALL))


def arguments(node: Node) -> dict[str, Any]:
    """Every argument by name, defaults filled in."""
    return {**_DEFAULTS, **dict(zip(_ORDER, node.args)), **node.kwargs}


class _Recorder(TorchDispatchMode):
    """Remembers which fused attention operator is called."""

    def __init__(self) -> None:
        super().__init__()
        self.fused = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        if name.startswith(_FUSED) and "math" not in name:
            self.fused = name[len(_FUSED) :]
        return func(*args, **(kwargs or {}))


class Probe:
    """Asks torch what it makes of an attention call; answers are kept by layout, as layers repeat."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[int, Any]] = {}

    def __call__(self, given: dict[str, Any]) -> tuple[int, Any]:
        """(rank of the kernel: 2 flash or cuDNN, 1 another fused one, 0 plain operators; fake result). Raises what torch does."""
        key = repr({name: _layout(part) for name, part in given.items()})
        found = self._known.get(key)
        if found is None:
            fake = map_arg(given, value)
            mode = edit.fake_mode_of(list(fake.values()))
            with mode if mode is not None else nullcontext(), _Recorder() as recorder:
                result = CALL(**fake).detach()
            rank = 0 if not recorder.fused else 2 if recorder.fused.startswith(("flash", "cudnn")) else 1
            found = self._known[key] = rank, result
        return found


def _layout(part: Any) -> Any:
    found = value(part) if isinstance(part, Node) else part
    if not isinstance(found, torch.Tensor):
        return found
    return str(found.dtype), str(found.device), tuple(found.shape), found.stride(), found.requires_grad


def outlook(node: Node, new: Any) -> dict[Node, Any] | None:
    """New fake values of the readers downstream if ``node`` had the value ``new``, up to where layouts agree again.

    None if one of them cannot take the other layout (``view`` needs strides), or it reaches the output.
    """
    if same_layout(value(node), new):
        return {}
    found: dict[Node, Any] = {node: new}
    stack = list(node.users)
    while stack:
        user = min(stack)  # graph order: all its inputs are known then
        stack = [other for other in stack if other is not user]
        if user.op not in ("call_function", "call_method") or len(found) > _REACH:
            return None
        if user.target in ("as_strided", torch.as_strided, "as_strided_", "set_"):  # told strides: it reads memory as it lay
            return None
        args, kwargs = map_arg((user.args, user.kwargs), lambda n: found.get(n, value(n)))
        mode = edit.fake_mode_of(value(n) for n in nodes_of((user.args, user.kwargs)))
        try:
            with torch.no_grad(), mode if mode is not None else nullcontext():
                if user.op == "call_method":
                    made = getattr(args[0], str(user.target))(*args[1:], **kwargs)
                else:
                    made = user.target(*args, **kwargs)  # type: ignore[operator]
        except Exception:  # noqa: BLE001 - whatever torch says: the reader depends on the layout
            return None
        if not same_layout(value(user), made):
            if not isinstance(made, torch.Tensor):
                return None
            found[user] = made
            stack.extend(user.users)
    return found


def settle(match: Match, new: dict[str, Any], slower: str, fused: bool = True) -> Refuse | None:
    """Why these arguments are not to be given, ``slower`` if torch would choose a lesser kernel; else notes them in ``match``.

    ``fused``: the kernel for them must be a fused one.
    """
    node = match.call
    try:
        before, after = match.probe(match.given), match.probe(new)
    except Exception as error:  # noqa: BLE001 - torch cannot tell for these (symbolic) values
        return Refuse(f"torch cannot choose a kernel: {type(error).__name__}", node)
    if after[0] < before[0] or fused and after[0] == 0:
        return Refuse(slower, node)
    values = outlook(node, after[1])
    if values is None:
        return Refuse("a reader of the result depends on its strides", node)
    match.result.append((new, values))
    return None


def rewrite(node: Node, given: dict[str, Any], values: dict[Node, Any]) -> Node:
    """Put a call with these arguments in the place of ``node`` and note the new fake values."""
    graph = node.graph
    key = edit.value_key(graph)
    for reader, made in values.items():
        reader.meta[key] = made
    plain = [given[name] for name in _ORDER[:3]]
    rest = {name: given[name] for name in _ORDER[3:] if given[name] != _DEFAULTS[name]}
    with graph.inserting_before(node):
        new = edit.insert(graph, CALL, plain, rest, origin=(node,), val=value(node), key=key)
    new.meta[key] = values.get(node, value(node))
    edit.replace(node, new)
    edit.erase_dead([node] if not node._erased else [])
    return new
