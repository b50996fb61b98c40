"""``fusionc.remove_attention``: take sublayers out of a module, so that parameters and caches go with them.

The sublayers are found in the model's graph (``find``); the modules to change follow from the weights: the smallest module
that holds a sublayer's projections and nothing that the rest still needs is replaced by one that returns zeros, and a norm
that only fed it becomes an identity.  The edited module is then run against the edited graph; if it gives other numbers,
the edit is undone and the layer kept, with that reason.  ``generate()`` goes on working: a removed layer never touches
its cache, which therefore is never allocated.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fusionc.accuracy import Agreement, Change, Place, Plan, Report, agreement, change, warn_unverified, within
from fusionc.errors import OptionError

from . import choose, edit
from .capture import Inputs, call, captured, default_inputs, logits, observe
from .find import Finder, Sublayer
from .scores import residual_cosine

SCORERS = ("gate_norm", "cosine")


class Removed(nn.Module):
    """Stands where an attention or MLP module was: returns zeros in the same place of the result. They are a broadcast view
    (no memory), or ``dense`` where the model writes into them."""

    def __init__(self, seat: int | str, template: Any, dense: bool = False) -> None:
        super().__init__()
        self.seat, self.template, self.dense = seat, template, dense

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Zeros like the hidden states; None for every other tensor (weights, caches)."""
        x = args[self.seat] if isinstance(self.seat, int) else kwargs[self.seat]
        zero = x.new_zeros(x.shape) if self.dense else x.new_zeros(()).expand(x.shape)
        return _fill(self.template, zero)


class ZeroOutput(nn.Module):
    """Stands where a projection was: zeros [..., width], a broadcast view unless ``dense``."""

    def __init__(self, width: int, dense: bool = False) -> None:
        super().__init__()
        self.width, self.dense = width, dense

    def forward(self, x: Tensor) -> Tensor:
        """x [..., d] to zeros [..., width]."""
        shape = (*x.shape[:-1], self.width)
        return x.new_zeros(shape) if self.dense else x.new_zeros(()).expand(shape)


class KeylessCache:
    """A Hugging Face cache as an attention sees it whose keys are all zero: one element of each key is kept (the length is
    read from it, and beams are reordered by it), values as they are."""

    def __init__(self, cache: Any) -> None:
        self.cache = cache

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store the values; return zero keys (a broadcast view) and the values so far."""
        held = self.cache.layers[layer].keys if layer < len(self.cache.layers) else None
        width = held.shape[-1] if held is not None and held.dim() == keys.dim() else 1  # allocated before anybody asked us
        kept, values = self.cache.update(keys[..., :width], values, layer, *args, **kwargs)
        return keys.new_zeros(()).expand(*kept.shape[:-1], keys.shape[-1]), values

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)


def without_keys(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook: the module's cache keeps no keys."""

    def swap(a: Any) -> Any:
        return KeylessCache(a) if hasattr(a, "update") and hasattr(a, "layers") else a

    return tuple(swap(a) for a in args), {name: swap(a) for name, a in kwargs.items()}


def _fill(template: Any, zero: Tensor) -> Any:
    if isinstance(template, (tuple, list)):
        return type(template)(_fill(t, zero) for t in template)
    return zero if template == "zero" else None


def _template(result: Any, shape: torch.Size) -> Any:
    if isinstance(result, Tensor):
        return "zero" if result.shape == shape else None
    if isinstance(result, (tuple, list)):
        parts: list[Any] = []
        for r in result:
            parts.append(None if "zero" in parts else _template(r, shape))
        return parts if isinstance(result, list) else tuple(parts)
    return None


class Stuck(Exception):
    """Sublayers that cannot leave their modules: place → reason."""

    def __init__(self, reasons: dict[Place, str]) -> None:
        super().__init__()
        self.reasons = reasons


class Surgeon:
    """Edits of one model that can be undone."""

    def __init__(self, model: nn.Module, inputs: Inputs, finder: Finder, subs: Sequence[Sublayer]) -> None:
        self.model, self.inputs, self.finder, self.subs = model, inputs, finder, subs
        self.paths: dict[int, str] = {}
        for path, p in model.named_parameters(remove_duplicate=False):
            self.paths.setdefault(id(p), path)
        self.undo_list: list[tuple[nn.Module, str, nn.Module]] = []
        self.hooks: list[Any] = []
        self.written: set[str] = set()  # modules whose result the model writes into
        self.seats: dict[str, tuple[int | str, Any]] = {}

    def owner(self, node: Node) -> str:
        """Path of the module that holds a weight."""
        path = self.paths.get(id(self.finder.real.get(node)))
        if path is None:
            raise OptionError(f"weight {node.name} is no parameter of the model.")
        return path.rpartition(".")[0]

    def undo(self) -> None:
        """Put every replaced module back."""
        for parent, name, old in reversed(self.undo_list):
            parent._modules[name] = old
        for hook in self.hooks:
            hook.remove()
        self.keep()

    def keep(self) -> None:
        """What was done stays: forget the old modules."""
        self.undo_list.clear()
        self.hooks.clear()

    def put(self, path: str, new: nn.Module) -> None:
        """Replace the module at ``path``."""
        above, _, name = path.rpartition(".")
        parent = self.model.get_submodule(above)
        old = parent._modules[name]
        assert old is not None
        self.undo_list.append((parent, name, old))
        new.train(old.training)
        parent._modules[name] = new

    def uniform(self, s: Sublayer) -> None:
        """Queries and keys become zero: softmax then weighs all visible values alike."""
        assert s.queries is not None and s.keys is not None
        q, k = self.owner(s.queries.linear.weight), self.owner(s.keys.linear.weight)
        if q == k or s.queries.linear.bias is not s.queries.bias or s.keys.linear.bias is not s.keys.bias:
            raise Stuck({s.place: "mode='uniform' needs separate modules for queries and keys"})
        for path, rows in ((q, s.queries), (k, s.keys)):
            self.put(path, ZeroOutput(int(rows.linear.node.meta["example_value"].shape[-1])))
        above = self.model.get_submodule(_common([q, k]))
        if above is not self.model:
            self.hooks.append(above.register_forward_pre_hook(without_keys, with_kwargs=True))

    def plan_edits(self, gone: Sequence[Sublayer]) -> tuple[dict[str, Any], GraphModule]:
        """(path → "sublayer" | "projection" | "norm", the graph after removal) for an identity removal."""
        from ..graph.edit import copy_module

        gm = copy_module(self.finder.gm)
        twin = dict(zip(self.finder.gm.graph.nodes, gm.graph.nodes))
        real = {twin[n]: t for n, t in self.finder.real.items()}
        copy = Finder(gm, real, {twin[n] for n in self.finder.parameters})
        cut = {s.place for s in gone}
        found = copy.sublayers() + (copy.mlps() if any(s.part == "mlp" for s in gone) else [])
        for s in found:
            if s.place in cut:
                edit.remove(copy.again(s))
        gm.recompile()
        lifeless = edit.dead(gm)
        live = {self.paths.get(id(self.finder.real[n])) for n in self.finder.parameters if twin[n] not in lifeless}
        lost = {
            p for n in self.finder.parameters if twin[n] in lifeless and (p := self.paths.get(id(self.finder.real[n])))
        }
        out: dict[str, Any] = {}
        stuck: dict[Place, str] = {}
        for s in gone:
            assert s.output is not None
            inside = list(dict.fromkeys(self.owner(m.weight) for m in s.maps if m is not s.output))
            last = self.owner(s.output.weight)
            whole, part = _common([*inside, last]), _common(inside)
            if whole and not self._needed(whole, live) and not self._adds(whole, s):
                out[whole] = "sublayer"
            elif s.part == "attention" and part and part not in inside and not self._needed(part, live):
                out |= {part: "sublayer", last: "projection"}
            elif not any(self._needed(path, live) for path in (*inside, last)):
                out |= dict.fromkeys((*inside, last), "projection")
            else:
                stuck[s.place] = "no module holds it alone: the rest of the model needs its weights"
                continue
            if s.out is not None and edit.written_later(s.out):
                self.written.add(whole if whole in out else last)
        if stuck:
            raise Stuck(stuck)
        for path in sorted({p.rpartition(".")[0] for p in lost}):
            if not any(path == o or path.startswith(o + ".") for o in out) and not self._needed(path, live):
                out[path] = "norm"
        return out, gm

    def _needed(self, path: str, live: set[Any]) -> bool:
        return any(f"{path}.{name}" in live for name, _ in self.model.get_submodule(path).named_parameters())

    def _adds(self, path: str, s: Sublayer) -> bool:
        """The residual addition happens inside this module (BERT): its result is not the addend."""
        stack = list((s.add.meta.get("nn_module_stack") or {}).values())  # type: ignore[union-attr]
        names = [_dots(str(entry[0])) for entry in stack]
        return any(n == path or n.endswith("." + path) or n.startswith(path + ".") for n in names)

    def apply(self, edits: dict[str, Any]) -> None:
        """Replace the modules; those called are looked at first, to know what they take and return."""
        wanted = [p for p, kind in edits.items() if kind != "projection" and p not in self.seats]
        hooks = []
        for path in wanted:

            def hook(module: nn.Module, args: Any, kwargs: Any, result: Any, path: str = path) -> None:
                given = [*enumerate(args), *kwargs.items()]
                first = next((r for r in torch.utils._pytree.tree_leaves(result) if isinstance(r, Tensor)), None)
                if edits[path] == "norm" and (len(given) != 1 or result is not first or given[0][0] != 0):
                    return  # it does something else than map one tensor: let it stand
                seat = next((k for k, t in given if isinstance(t, Tensor) and first is not None and t.shape == first.shape
                             and t.dtype == first.dtype), None)  # fmt: skip
                if seat is not None and first is not None:
                    self.seats[path] = (seat, _template(result, first.shape))

            hooks.append(self.model.get_submodule(path).register_forward_hook(hook, with_kwargs=True))
        try:
            if hooks:
                with torch.no_grad():
                    call(self.model, self.inputs)
        finally:
            for h in hooks:
                h.remove()
        for path, kind in edits.items():
            if kind == "sublayer":
                if path not in self.seats:
                    raise OptionError(f"module {path} returns nothing of its input's shape.")
                self.put(path, Removed(*self.seats[path], path in self.written))
            elif kind == "projection":
                old = self.model.get_submodule(path)
                self.put(path, ZeroOutput(_width(old), path in self.written))
            elif path in self.seats:
                self.put(path, nn.Identity())


def _dots(path: str) -> str:
    text = path.replace("L['self']", "").replace("L['fn']", "")
    for a, b in (("._modules['", "."), ("['", "."), ("']", ""), ("[", "."), ("]", ""), ("_modules.", "")):
        text = text.replace(a, b)
    return text.strip(".")


def _width(linear: nn.Module) -> int:
    found = getattr(linear, "out_features", None) or getattr(linear, "nf", None)
    if not isinstance(found, int):
        raise OptionError(f"the width of a {type(linear).__name__} is unknown.")
    return found


def _common(paths: Sequence[str]) -> str:
    parts = [p.split(".") for p in paths]
    out = []
    for column in zip(*parts):
        if len(set(column)) > 1:
            break
        out.append(column[0])
    return ".".join(out)


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
                  vanishing coupling; needs separate query and key modules; of the cache the values stay)
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
    if plan.mode == "uniform":
        for s in gone:
            surgeon.uniform(s)
        return
    edits, gm = surgeon.plan_edits(gone)
    real = [surgeon.finder.real[n] for n in surgeon.finder.gm.graph.find_nodes(op="placeholder")]
    with torch.no_grad():
        # The traced graph may take other kernels than eager (Hugging Face traces a mask where eager says "causal"): by how
        # much that moves the whole model is how much it may move the edited one.
        noise = _distance(call(surgeon.model, surgeon.inputs), surgeon.finder.gm(*real))
        surgeon.apply(edits)
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
            near = [float((a.double().nan_to_num() - b).norm() / b.norm().clamp_min(1e-300)) for b in theirs if a.shape == b.shape]
            worst = max(worst, min(near, default=math.inf))
    return worst


def _barred(model: nn.Module, subs: Sequence[Sublayer], mode: str) -> dict[Place, str]:
    """Layers whose cache counts the tokens that generate() has seen: the first, and the first of each kind of attention."""
    if not callable(getattr(model, "generate", None)) or mode != "identity":
        return {}
    kinds = getattr(getattr(model, "config", None), "layer_types", None) or []
    first = {kinds.index(kind) for kind in set(kinds)} | {0}
    return {n: "its cache counts the tokens for generate()" for n in first if n < sum(s.part == "attention" for s in subs)}


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


__all__ = ["Removed", "ZeroOutput", "remove_attention"]
