"""``fusionc.plan_large_kernels``: what the large kernels of a model could become, by their weights, and what that would change.

It runs the same pass as ``torch.compile(..., options={"large_kernel": ...})`` and hands back its plan, to look at, to edit,
to save and to replay.  With calibration inputs the error is measured: each layer on its own input in the exact model, and the
model's results with all layers replaced (rounding of the compiled kernels aside: both graphs run in ATen).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from fusionc.accuracy import Agreement, Change, Place, Plan, Report, agreement, change, warn_unverified, within
from fusionc.config import Config
from fusionc.errors import OptionError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.fx import GraphModule


def plan_large_kernels(model: nn.Module, what: Any, *, inputs: Any = None, calibration: Sequence[Any] | None = None,
                       error_budget: float | None = None, device: str | None = None) -> Report:  # fmt: skip
    """The plan for ``model`` (in eval mode, not changed), with its predicted and measured errors.

    what          {"method": a name, several or "auto", "error": relative error of any channel's kernel}, a Plan or its path
    inputs        any inputs of the model (mapping, tuple or tensor); default: the first of ``calibration``
    calibration   batches to measure the error on; without them the report is "unverified" and a warning says so once
    error_budget  largest mean KL between the results [..., classes] (softmax over the last axis), in nats; the worst layers stay
                  exact until it holds
    device        decide by the cost on this device type ("cpu", "cuda") instead of that of the model

    ``options={"large_kernel": report.plan}`` compiles with it. Raises OptionError for wrong requests, and for a model that
    Dynamo cuts up so that more than one graph has large kernels.
    """
    from .passes.large_kernel import check_option

    asked = check_option("large_kernel", what)
    batches = list(calibration or ())
    if asked is None or model.training:
        raise OptionError("plan_large_kernels needs a request, and the model in eval mode: call model.eval() first.")
    if inputs is None and not batches:
        raise OptionError("give inputs= or calibration=: the kernels are found by looking at one call of the model.")
    if error_budget is not None and not batches:
        raise OptionError("error_budget needs calibration= inputs.")
    runs = _Runs(model, device)
    runs(inputs if inputs is not None else batches[0], asked)
    if runs.found is None:
        raise OptionError("no large kernel was found in the model.")
    plan, refusals = runs.found
    if not batches:
        if plan.entries:
            warn_unverified(plan.kind)
        return Report(plan, refusals=refusals)
    changes: dict[Place, list[Change]] = {}
    original = [runs(b, None, plan, changes) for b in batches]

    def apply(p: Plan) -> Agreement:
        return agreement(original, [runs(b, p) for b in batches])

    means = {n: Change(sum(c.relative_l2 for c in found) / len(found), sum(c.cosine for c in found) / len(found))
             for n, found in changes.items()}  # fmt: skip
    rolled: tuple[Place, ...] = ()
    found: Agreement | None
    if error_budget is not None:
        plan, found, rolled = within(plan, error_budget, {n: c.relative_l2 for n, c in means.items()}, apply)
    else:
        found = apply(plan)
    return Report(plan, {n: c for n, c in means.items() if n in plan.layers}, found, rolled, refusals)


class _Runs:
    """The model under a backend that runs the model passes and then the graph in ATen. Dynamo compiles it once (for each shape
    of input): what the graph becomes is decided at each call."""

    def __init__(self, model: nn.Module, device: str | None) -> None:
        import torch

        self.device = device
        self.found: tuple[Plan, dict[Place, str]] | None = None
        self.compiled = torch.compile(model, backend=self._backend, dynamic=False)  # type: ignore[arg-type]
        self.static: frozenset[int] = frozenset()
        self.what: Any = None
        self.watched: Plan | None = None
        self.changes: Any = None

    def __call__(self, inputs: Any, what: Any, watched: Plan | None = None, changes: Any = None) -> Tensor:
        """``logits`` or the first tensor of the result, large kernels replaced as ``what`` says (None: none is). Of the layers
        of the plan ``watched`` the changes are noted."""
        import torch

        from .removal.capture import call, logits

        self.what, self.watched, self.changes = what, watched, changes
        with torch.no_grad():
            return logits(call(self.compiled, inputs)).detach().clone()

    def _backend(self, gm: GraphModule, given: list[Any]) -> Callable[..., Any]:
        made: list[tuple[Any, Any, Callable[..., Any]]] = []

        def run(*args: Any) -> Any:
            known = next((f for what, watched, f in made if what is self.what and watched is self.watched), None)
            if known is None:
                known = self._variant(gm, args)
                made.append((self.what, self.watched, known))
            return known(*args)

        from .graph.edit import copy_module

        gm = copy_module(gm)  # Dynamo empties the meta of its own one
        self.static = _static(given)
        return run

    def _variant(self, gm: GraphModule, args: Any) -> Callable[..., Any]:
        from .decomposition.find import sites
        from .graph.edit import copy_module
        from .graph.facts import Facts
        from .passes import pipeline
        from .passes.large_kernel import PLAN_KEY, LargeKernel
        from .passes.manager import run

        config = dataclasses.replace(Config(), strict=True)
        place = next(position for position, item in pipeline("model", dataclasses.replace(config, large_kernel=self.what or _ANY))
                     if isinstance(item, LargeKernel))  # fmt: skip
        chosen = [e for e in pipeline("model", config) if e[0] < place]
        if self.what is not None:
            chosen.append((place, LargeKernel(self.what, self.device, quiet=True)))
        gm, _ = run(chosen, copy_module(gm), "model", config, args, stage="inference", static=self.static)
        found = gm.meta.pop(PLAN_KEY, None)
        if found is not None and self.found is not None and found[0].total != self.found[0].total:
            raise OptionError("Dynamo cuts the model into several graphs with large kernels.")
        self.found = self.found or found
        if self.watched is None:
            return _running(gm)
        places = {s.index: s for s in sites(Facts(gm, "model", "inference", self.static, args))}
        wanted = [(e, places[e.layer]) for e in self.watched.entries if e.layer in places]
        return _running(gm, {site.node: (e, site) for e, site in wanted}, self.changes)


_ANY = {"method": "auto", "error": 0.5}


def _static(given: list[Any]) -> frozenset[int]:
    from .passes.manager import static_inputs

    return static_inputs(given)


def _running(gm: GraphModule, places: Any = None, changes: Any = None) -> Callable[..., Any]:
    """The graph in ATen with its derived weights; ``places``: node → (entry, site) to look at."""
    from torch.fx import Interpreter, Node

    from .decomposition.build import plain
    from .decomposition.build import run as run_form
    from .decomposition.fit import filters
    from .decomposition.forms import parse
    from .runtime.weights import DerivedWeights

    weights = DerivedWeights(gm.meta.get("fusionc_derived", ()))
    if not places:
        return lambda *args: gm.forward(*args, *weights.resolve(args))

    class Watch(Interpreter):
        def run_node(self, n: Node) -> Any:
            result = super().run_node(n)
            if n in places:
                entry, site = places[n]
                g = site.geometry
                wanted = (site.given[k] for k in ("input", "weight", "bias"))
                x, weight, bias = (self.env[a] if isinstance(a, Node) else a for a in wanted)
                form = parse(entry.form, g.kernel)
                made = run_form(form, g, x, [f.to(weight.device) for f in filters(form, weight)], bias, plain, tuple(x.shape[2:]))
                rows = [t.movedim(1, -1).flatten(0, -2).T for t in (result, made)]  # the cosine is that of channels
                changes.setdefault(entry.layer, []).append(change(*rows))
            return result

    return lambda *args: Watch(gm, garbage_collect_values=False).run(*args, *weights.resolve(args))


__all__ = ["plan_large_kernels"]
