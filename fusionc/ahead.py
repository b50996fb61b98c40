"""Kernels of operators (``fusionc::*``) compiled beside the generated ones of their graph.

An operator chooses between candidates at its first call, which would compile them there, one operator after the other.
Shapes, types and layouts of its arguments stand in the graph, so all candidates of all operators compile here side by
side; the first call finds them.  A guess that is wrong (an address that is no multiple of 16, a stride that changed) costs
what was compiled for nothing.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.fx import GraphModule, Node

from .runtime import launch, tune

# operator -> the function that says what a call would choose from; imported when an operator is met
_WANTED: dict[str, Callable[[], Any]] = {
    "skinny_linear": lambda: importlib.import_module("fusionc.targets.skinny").wanted,
    "short_attention": lambda: importlib.import_module("fusionc.targets.short_attention").wanted,
    "decode_attention": lambda: importlib.import_module("fusionc.targets.decode").wanted,
    "decode_attention_update": lambda: importlib.import_module("fusionc.targets.decode").wanted_update,
    "conv_add_relu": lambda: importlib.import_module("fusionc.targets.conv_add_relu").wanted,
    "conv_add_relu_over": lambda: importlib.import_module("fusionc.targets.conv_add_relu").wanted,
    "depthwise_conv": lambda: importlib.import_module("fusionc.runtime.depthwise_conv").wanted,
    "depthwise_conv_weight": lambda: importlib.import_module("fusionc.runtime.depthwise_conv").wanted_weight,
    "grouped_conv": lambda: importlib.import_module("fusionc.runtime.grouped_conv").wanted,
    "grouped_rows": lambda: importlib.import_module("fusionc.targets.grouped_rows").wanted,
    "linear_act": lambda: importlib.import_module("fusionc.runtime.linear_act").wanted,
    "linear_cross_entropy": lambda: importlib.import_module("fusionc.runtime.linear_cross_entropy").wanted,
    "linear_cross_entropy_backward": lambda: importlib.import_module("fusionc.runtime.linear_cross_entropy").wanted_backward,
    "per_example_conv": lambda: importlib.import_module("fusionc.runtime.per_example_conv").wanted,
}


class Compiling:
    """Work that was started; calling it waits until it is done, well or not: the first call meets what failed again."""

    def __init__(self, work: list[Callable[[], Any]]) -> None:
        self._ended = launch.compile_beside(work) if work else None

    @property
    def done(self) -> bool:
        return self._ended is None or self._ended.done()

    def __call__(self) -> None:
        if self._ended is not None:
            self._ended.exception()


def start(gm: GraphModule) -> Compiling:
    """Start to compile what the graph's operators will choose from on a GPU."""
    return Compiling(jobs(gm))


def jobs(gm: GraphModule) -> list[Callable[[], Any]]:
    """What compiles, each kernel once, in the order of the graph."""
    found: dict[Any, list[Callable[[], Any]]] = {}
    for node in gm.graph.nodes:
        place = _WANTED.get(_name(node))
        if place is None:
            continue
        try:
            args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
            device = args[0].device
            if device.type != "cuda" or not _static((args, kwargs)):
                continue
            wanted = place()(*args, **kwargs)
            if wanted is not None and (wanted.key, device) not in found:
                found[wanted.key, device] = [partial(wanted.prepare, c) for c in tune.likely(wanted, device)]
        except Exception:  # noqa: BLE001 - whatever it is, the first call meets it again
            continue
    return [job for each in found.values() for job in each]


def _name(node: Node) -> str:
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload) or target.namespace != "fusionc":
        return ""
    return target._schema.name.split("::")[1]


def _static(values: Any) -> bool:
    """No size or stride is known only at run time."""
    for v in torch.utils._pytree.tree_leaves(values):
        numbers = (*v.shape, *v.stride()) if isinstance(v, torch.Tensor) else (v,)
        if any(isinstance(n, torch.SymInt) for n in numbers):
            return False
    return True
