"""``fusionc.explain``: compile something once and say what became of it.

It runs the same backend as ``torch.compile(f, backend="fusionc")`` and collects the records that every compilation
leaves, so the explanation cannot drift from what really happens.
(The module is not called ``explain``: importing it would then hide the function ``fusionc.explain``.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fusionc.record import GraphRecord, collect

_MAX_REFUSALS = 20


@dataclass
class Explanation:
    """What fusionc made of one call: ``graphs`` as records, and where Dynamo broke the function apart and why."""

    graphs: list[GraphRecord] = field(default_factory=list)
    breaks: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {"graphs": [g.to_json() for g in self.graphs], "graph_breaks": self.breaks}

    def __str__(self) -> str:
        from fusionc.dump import clean, summary

        if not self.graphs and not self.breaks:
            return "fusionc: nothing was compiled (no tensor operation reached the backend)\n"
        parts = [summary(self.graphs, measured=True)]
        for i, g in enumerate(self.graphs):
            lines = [f"g{i} groups"]
            for group in g.groups:
                shown = " ".join(group.nodes[:12]) + (
                    f" … {len(group.nodes) - 12} more" if len(group.nodes) > 12 else ""
                )
                lines.append(f"  {group.name}: {group.kind}, kernel {group.kernel}: {shown}")
            refusals = [r for p in g.passes for r in p.refusals]
            if refusals:
                lines.append(f"g{i} refusals")
                lines += [f"  {r.pass_name} at {r.node or '-'}: {r.reason}" for r in refusals[:_MAX_REFUSALS]]
                if len(refusals) > _MAX_REFUSALS:
                    lines.append(f"  … {len(refusals) - _MAX_REFUSALS} more")
            if len(lines) > 1:
                parts.append("\n".join(lines) + "\n")
        if self.breaks:
            lines = [f"  {n} × {' '.join(reason.split())[:300]}" for reason, n in sorted(self.breaks.items())]
            parts.append("graph breaks (made by Dynamo, before fusionc)\n" + "\n".join(lines) + "\n")
        return clean("\n".join(parts))


def explain(f: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Explanation:
    """Compile the function or module ``f``, call it once with the arguments, and explain what was compiled.

    Gradient mode is the caller's: under ``torch.no_grad()`` it is the inference graph, else backward is run too and
    its result dropped, so ``.grad`` of nothing changes.  What ``f`` mutates is mutated as in any call, and errors of
    ``f`` itself are raised.
    """
    return explain_with(f, args, kwargs)


def explain_with(
    f: Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    dynamic: bool | None = None,
) -> Explanation:
    """``explain`` with the mode and options of the backend and ``dynamic`` of ``torch.compile``."""
    import torch
    from torch._dynamo.utils import counters

    backend = _backend()
    given: dict[str, Any] = {}
    if mode is not None:
        given["mode"] = mode
    if options:
        given["options"] = dict(options)

    def explaining(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        # a new function each time: Dynamo reuses code compiled by an equal backend, and then there is nothing to see
        leaves.extend(x for x in example_inputs if isinstance(x, torch.Tensor) and x.requires_grad)
        return backend(gm, example_inputs, **given)

    leaves: list[torch.Tensor] = []
    before = dict(counters["graph_break"])
    with collect() as graphs, torch._dynamo.config.patch(recompile_limit=1 << 20):
        result = torch.compile(f, backend=explaining, dynamic=dynamic)(*args, **(kwargs or {}))
        _backward(result, leaves)
    after = dict(counters["graph_break"])
    breaks = {reason: n - before.get(reason, 0) for reason, n in after.items() if n > before.get(reason, 0)}
    return Explanation(list(graphs), breaks)


def _backward(result: Any, leaves: list[Any]) -> None:
    """Run the backward graphs, which are compiled when first needed; gradients are not kept."""
    import torch

    outputs = [
        t for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, torch.Tensor) and t.grad_fn is not None
    ]
    # by identity, and leaves of autograd only: the inputs of a later graph may be outputs of an earlier one
    inputs = list({id(t): t for t in leaves if t.is_leaf}.values())
    if outputs and inputs:
        ones = [torch.ones_like(t) for t in outputs]
        torch.autograd.grad(outputs, inputs, ones, allow_unused=True)


def _backend() -> Callable[..., Any]:
    from fusionc.backend import fusionc

    return fusionc
