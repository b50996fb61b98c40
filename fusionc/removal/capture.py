"""A model's torch-level graph with its real weights, and the values at its attention sublayers, from one ordinary call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from fusionc.errors import OptionError

from ..graph.facts import placeholders
from .find import Finder, Sublayer

Inputs = Any  # a mapping of keyword arguments, a tuple of arguments, or one tensor


def split(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs), {}) if isinstance(inputs, (tuple, list)) else ((inputs,), {})


def call(model: nn.Module, inputs: Inputs) -> Any:
    """``model`` on ``inputs``, without a cache where its forward has that choice."""
    args, kwargs = split(inputs)
    inner = getattr(model, "_orig_mod", model)  # of torch.compile
    if "use_cache" in inspect.signature(inner.forward).parameters:
        kwargs.setdefault("use_cache", False)
    return model(*args, **kwargs)


def logits(result: Any) -> Tensor:
    """The logits of a result, or its first tensor."""
    found = getattr(result, "logits", None)
    found = found if found is not None else getattr(result, "last_hidden_state", None)
    if found is None:
        found = next((t for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, Tensor)), None)
    if found is None:
        raise OptionError("the model returned no tensor to compare.")
    return found


def default_inputs(model: nn.Module) -> Inputs:
    """Inputs that the model itself offers (``dummy_inputs``); raises OptionError if it has none."""
    found = getattr(model, "dummy_inputs", None)
    if not isinstance(found, Mapping):
        raise OptionError(
            "give inputs= (any inputs of the model): its sublayers are found by looking at one call of it."
        )
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in found.items()}


@contextmanager
def captured(model: nn.Module, inputs: Inputs, mlps: bool = False) -> Iterator[Finder]:
    """The finder of the model's graph. Raises OptionError if Dynamo cuts the model up between (attention) sublayers."""
    finders: list[Finder] = []
    ran: list[int] = []  # layers that a graph break parts may share one graph, which then runs for each

    def keep(gm: GraphModule, real: list[Any]) -> Callable[..., Any]:
        nodes = dict(zip(placeholders(gm), real))
        parameters = {n for n, t in nodes.items() if isinstance(t, nn.Parameter) or _buffer(t)}
        number = len(finders)
        finders.append(Finder(gm, nodes, parameters))

        def run(*args: Any) -> Any:
            ran.append(number)
            return gm.forward(*args)

        return run

    _run(model, inputs, keep)
    with_cores = [f for f in finders if next(f.cores(), None) is not None or mlps and f.mlps()]
    runs = sum(finders[number] in with_cores for number in ran)
    if max(runs, len(with_cores)) > 1:
        raise OptionError(f"Dynamo cuts the model into {runs} graphs with attention; only one can be handled.")
    try:
        yield with_cores[0] if with_cores else Finder(GraphModule(nn.Module(), torch.fx.Graph()), {}, set())
    finally:
        for f in finders:  # Dynamo keeps the graph: it must not keep weights that are to be freed
            f.real = {}


def _buffer(t: Any) -> bool:
    return getattr(t, "_dynamo_static_input_type", None) is not None


def _run(model: nn.Module, inputs: Inputs, backend: Callable[..., Any]) -> Any:
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=1 << 20):
        return call(torch.compile(model, backend=backend, dynamic=False), inputs)  # type: ignore[arg-type]


def observe(
    model: nn.Module, inputs: Inputs, see: Callable[[Sublayer, Tensor, Tensor], None], mlps: bool = False
) -> Any:
    """Run the model; ``see(sublayer, residual, addend)`` gets what each sublayer read and added. Returns the result."""

    def watch(gm: GraphModule, real: list[Any]) -> Callable[..., Any]:
        nodes = dict(zip(placeholders(gm), real))
        finder = Finder(gm, nodes, {n for n, t in nodes.items() if isinstance(t, nn.Parameter) or _buffer(t)})
        subs = [s for s in [*finder.sublayers(), *(finder.mlps() if mlps else [])] if not s.refusal]
        finder.real = {}
        return lambda *args: _Watch(gm, subs, see).run(*args)

    return _run(model, inputs, watch)


class _Watch(Interpreter):
    def __init__(self, gm: GraphModule, subs: list[Sublayer], see: Callable[[Sublayer, Tensor, Tensor], None]) -> None:
        super().__init__(gm)
        self.streams: dict[Node, Tensor] = {}
        self.wanted = {s.residual for s in subs}
        self.ends = {s.out: s for s in subs}
        self.see = see

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if n in self.wanted:
            self.streams[n] = result.clone()  # type: ignore[index]
        if n in self.ends:
            s = self.ends[n]
            self.see(s, self.streams[s.residual], result)  # type: ignore[index]
        return result
