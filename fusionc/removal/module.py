"""``fusionc.remove_attention``: take sublayers out of a module, so that parameters and caches go with them.

The sublayers are found in the model's graph (``find``), chosen (``choose``) and taken out (``surgery``).  The edited module
is then run against the edited graph; if it gives other numbers, the edit is undone and refused.  ``generate()`` goes on
working: a removed layer never touches its cache, which therefore is never allocated.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fusionc.accuracy import Agreement, Change, Place, Plan, Report, agreement, change, warn_unverified, within
from fusionc.errors import OptionError

from . import choose
from .capture import Inputs, call, captured, default_inputs, logits, observe
from .find import Sublayer
from .scores import residual_cosine
from .surgery import Stuck, Surgeon

SCORERS = ("gate_norm", "cosine")


def remove_attention(model: nn.Module, what: Any, *, inputs: Inputs = None, calibration: Sequence[Inputs] | None = None,
                     scorer: str = "gate_norm", method: str = "layer", mode: str = "identity",
                     protect: tuple[int, int] = choose.PROTECT, error_budget: float | None = None) -> Report:  # fmt: skip
    """Remove attention sublayers from ``model`` in place and say what that did.  An approximation: results change.

    what          how many (int), which share (float below 1), which (list of layer numbers), a drop list
                  ``{"attention": [3], "mlp": [3, 5], "block": [7]}`` (MLPs and whole blocks too), or a Plan, its JSON or path
    inputs        any inputs of the model (mapping, tuple or tensor), to find the sublayers in one call; default: the first of
                  ``calibration``, else ``model.dummy_inputs``
    calibration   batches to measure the error on; without them the report is "unverified" and a warning says so once
    scorer        "gate_norm" (weights only; ``method`` "layer", "heads" or "rope") or "cosine" (needs calibration)
    mode          "identity" (the sublayer adds nothing) or "uniform" (every visible value weighs the same: the limit of
                  vanishing coupling; the value and output projections stay, and of the cache the values)
    protect       layers at the start and the end that a count or fraction must not take
    error_budget  largest mean KL of the final logits, in nats; the worst layers are put back until it holds

    Returns a Report; raises OptionError for a wrong request or a model whose attention cannot be found. Layers that cannot
    be removed stay, with the reason in ``Report.refusals``. Compile the model after this call, not before.
    """
    if isinstance(what, (str, os.PathLike)):
        what = Plan.load(what)
    what = choose.check("remove_attention", what)
    if isinstance(what, Plan):
        mode = what.mode
    if scorer not in SCORERS or mode not in choose.MODES:
        raise OptionError(f"scorer is one of {', '.join(SCORERS)} and mode one of {', '.join(choose.MODES)}.")
    if model.training:
        raise OptionError("the model is in training mode: call model.eval() first.")
    batches = list(calibration or ())
    if not batches and (scorer == "cosine" or error_budget is not None):
        raise OptionError("the cosine scorer and error_budget need calibration= inputs.")
    inputs = inputs if inputs is not None else batches[0] if batches else default_inputs(model)
    before = _bytes(model)
    mlps = choose.needs_mlps(what)
    if mlps and mode != "identity":
        raise OptionError("mode='uniform' is for attention: an MLP can only be dropped.")
    changes, cosine = _measure(model, batches, mlps)
    with captured(model, inputs, mlps) as finder:
        subs = finder.sublayers() + (finder.mlps() if mlps else [])
        if not subs:
            raise OptionError("no attention was found in the model.")
        surgeon = Surgeon(model, inputs, finder, subs)
        plan, refusals = choose.plan_of(what, finder, subs, method=method, protect=protect, scorer=scorer, mode=mode,
                                        scores=cosine if scorer == "cosine" else None, barred=_barred(model, subs, mode),
                                        name=lambda _, s: _path_of(surgeon, s))  # fmt: skip
        original = _logits(model, batches)

        stuck: dict[Place, str] = {}

        def apply(p: Plan) -> Agreement:
            surgeon.undo()
            _apply(surgeon, _rest(p, stuck), subs)
            return agreement(original, _logits(model, batches)) if batches else Agreement(0.0, 1.0, 0.0)

        rolled: tuple[Place, ...] = ()
        found: Agreement | None
        try:
            while True:
                try:
                    if error_budget is not None:
                        worst = {n: c.relative_l2 for n, c in changes.items()}
                        plan, found, rolled = within(_rest(plan, stuck), error_budget, worst, apply)
                    else:
                        found = apply(plan)
                    break
                except Stuck as e:
                    stuck |= e.reasons
            plan, refusals = _rest(plan, stuck), refusals | stuck
        except BaseException:
            surgeon.undo()
            raise
        surgeon.keep()
    if not batches and plan.entries:
        warn_unverified(plan.kind)
    kept = {e.place for e in plan.entries}
    return Report(plan, {n: c for n, c in changes.items() if n in kept} if mode == "identity" else {},
                  found if batches else None, rolled, refusals, before - _bytes(model))  # fmt: skip


def _rest(plan: Plan, stuck: Iterable[Place]) -> Plan:
    for place in stuck:
        plan = plan.without(place)
    return plan


def _path_of(surgeon: Surgeon, s: Sublayer) -> str:
    return surgeon.owner(s.weights[0]) if s.weights else s.core.name


def _apply(surgeon: Surgeon, plan: Plan, subs: Sequence[Sublayer]) -> None:
    by_place = {s.place: s for s in subs}
    gone = [by_place[e.place] for e in plan.entries]
    if not gone:
        return
    uniform = plan.mode == "uniform"
    edits: dict[str, Any] = {}
    if uniform:
        gm = surgeon.uniform_graph(gone)
    else:
        edits, gm = surgeon.plan_edits(gone)
    real = [surgeon.finder.real[n] for n in surgeon.finder.gm.graph.find_nodes(op="placeholder")]
    with torch.no_grad():
        # The traced graph may take other kernels than eager (Hugging Face traces a mask where eager says "causal"): by how
        # much that moves the whole model is how much it may move the edited one.
        noise = _distance(call(surgeon.model, surgeon.inputs), surgeon.finder.gm(*real))
        surgeon.apply(edits)
        for s in gone if uniform else ():
            surgeon.uniform(s)
        found = _distance(call(surgeon.model, surgeon.inputs), gm(*real))
    if not found <= max(1e-4, 4 * noise):
        raise OptionError(f"the edited module and the edited graph disagree (relative {found:.1e}, where tracing alone moves "
                          f"it by {noise:.1e}): this model's sublayers cannot leave their modules; "
                          "options={'remove_attention': ...} of the backend removes them.")  # fmt: skip


def _distance(result: Any, traced: Any) -> float:
    """Largest relative L2 distance of a tensor of ``result`` to the nearest one of its shape in ``traced``."""
    theirs = [t.double().nan_to_num() for t in torch.utils._pytree.tree_leaves(traced) if isinstance(t, Tensor)]
    worst = 0.0
    for a in torch.utils._pytree.tree_leaves(result):
        if isinstance(a, Tensor):
            mine, near = a.double().nan_to_num(), [b for b in theirs if a.shape == b.shape]
            found = [float((mine - b).norm() / b.norm().clamp_min(1e-300)) for b in near]
            worst = max(worst, min(found, default=math.inf))
    return worst


def _barred(model: nn.Module, subs: Sequence[Sublayer], mode: str) -> dict[Place, str]:
    """Layers whose cache counts the tokens that generate() has seen: the first, and the first of each kind of attention."""
    if not callable(getattr(model, "generate", None)) or mode != "identity":
        return {}
    kinds = getattr(getattr(model, "config", None), "layer_types", None) or []
    first = {kinds.index(kind) for kind in set(kinds)} | {0}
    return {
        n: "its cache counts the tokens for generate()" for n in first if n < sum(s.part == "attention" for s in subs)
    }


def _bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def _logits(model: nn.Module, batches: Sequence[Inputs]) -> list[Tensor]:
    with torch.no_grad():
        return [logits(call(model, b)).detach().clone() for b in batches]


def _measure(model: nn.Module, batches: Sequence[Inputs], mlps: bool) -> tuple[dict[Place, Change], dict[Place, float]]:
    """By place, averaged over the batches: the change of leaving it out, and the cosine score."""
    changes: dict[Place, list[Change]] = {}
    scores: dict[Place, list[float]] = {}

    def see(s: Sublayer, x: Tensor, y: Tensor) -> None:
        y = y.reshape(x.shape)
        changes.setdefault(s.place, []).append(change(x + y, x))
        scores.setdefault(s.place, []).append(residual_cosine(x, y))

    for batch in batches:
        observe(model, batch, see, mlps)

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    return ({n: Change(mean([c.relative_l2 for c in found]), mean([c.cosine for c in found])) for n, found in changes.items()},
            {n: mean(found) for n, found in scores.items()})  # fmt: skip


__all__ = ["remove_attention"]
