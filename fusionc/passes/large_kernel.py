"""Large depthwise kernels become sums of cheaper filters, where their weights are within the user's error bound of one.

Math       conv(x, K) → conv(x, K'), K' = Σ columns × rows, square + bands, dense + dilated, shifted blocks, or filters on coarser
           images; max over channels of ‖K' − K‖ / ‖K‖ ≤ the bound: what white noise sees of it, relative to the output
Exactness  Approximate: runs only with options={"large_kernel": {"method": ..., "error": ...}} (or a Plan)
Legality   inference; two dimensions, depthwise, kernels from 7×7; weights are parameters or folded ones and their values decide:
           they are looked at when they change, and if the bound does not hold any more the exact graph runs instead
Cost       a form is taken only if the machine's model (``decomposition/cost.py``) says that it is cheaper; then the cheapest one
Source     ``decomposition/forms.py`` names the papers
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fusionc.accuracy import PART, Entry, Plan, warn_unverified, weight_hash
from fusionc.errors import OptionError

from ..decomposition import cost as costs
from ..decomposition import fit
from ..decomposition.build import Geometry, run
from ..decomposition.choose import Choice, Request, choose, request
from ..decomposition.find import Site, sites
from ..decomposition.forms import METHODS, Form, parse
from ..graph import edit
from ..graph.facts import Facts, shape, tensor
from ..graph.text import where
from ..ops.layout import is_last
from .base import Approximate, Match, Pass, Refuse

KIND = "large_kernel"
BOUNDS_KEY = "fusionc_bounds"  # of gm.meta: derived numbers that must stay at most 1 for the graph to be right
PLAN_KEY = "fusionc_large_kernel"  # of gm.meta: (the plan, reasons of the layers that stay)


def check_option(where_: str, given: Any) -> Any:
    """{"method", "error"}, a Plan, its JSON or its path → Request or Plan. Raises OptionError."""
    if given is None or isinstance(given, Request):
        return given
    if isinstance(given, str):
        given = Plan.load(given)
    elif isinstance(given, dict) and "format" in given:
        given = Plan.from_json(given)
    if not isinstance(given, Plan):
        return request(where_, given)
    if given.kind != KIND:
        raise OptionError(f"{where_} was given a plan for {given.kind!r}, not for {KIND!r}.")
    _bound(given)
    if any(e.part != PART for e in given.entries):
        raise OptionError(f"{where_} was given a plan that names parts of layers: a kernel has none.")
    return given


def _bound(plan: Plan) -> float:
    words = plan.mode.split()
    try:
        found = float(words[1]) if len(words) == 2 and words[0] == "error" else 0.0
    except ValueError:
        found = 0.0
    if not 0 < found < 1:
        raise OptionError(f"the plan's mode is {plan.mode[:40]!r}, not 'error' and a number between 0 and 1.")
    return found


class LargeKernel(Pass):
    """``what``: a Request or a Plan (None: nothing to do). ``device``: to choose for another device type than the graph's;
    ``quiet``: somebody is measuring the error, so nobody need be told that nobody does."""

    name = KIND
    level = "model"
    exactness = Approximate("large kernels within an error bound; unverified unless measured")

    def __init__(self, what: Any = None, device: str | None = None, quiet: bool = False) -> None:
        self.what = check_option(KIND, what)
        self.device, self.quiet = device, quiet
        self.known: dict[Any, tuple[Plan, dict[int, str]]] = {}  # the manager looks twice

    def find(self, facts: Facts) -> Iterable[Match]:
        """One match for each large kernel, first those that stay."""
        if self.what is None:
            return
        found = sites(facts)
        if not found:
            return
        plan, reasons = self._plan(facts, found)
        facts.gm.meta[PLAN_KEY] = plan, reasons
        for n, why in sorted(reasons.items()):
            yield Match({"refusal": why, "site": found[n]}, (found[n].node,))
        bound = _bound(plan)
        chosen = [(found[e.layer], parse(e.form, _sides(found[e.layer]))) for e in plan.entries]
        for i, (site, form) in enumerate(chosen):
            last = chosen if i == len(chosen) - 1 else ()
            e = plan.entries[i]
            note = f"{e.name} ({where(site.node)}) becomes {e.form}: {e.reason}; measured error: unverified"
            yield Match({"refusal": "", "site": site, "form": form, "all": last, "limit": bound, "note": note}, (site.node,))

    def _plan(self, facts: Facts, found: list[Site]) -> tuple[Plan, dict[int, str]]:
        weights = [None if s.refusal else s.weight(facts.real, facts.inputs) for s in found]
        hashes = ["" if w is None else weight_hash([w]) for w in weights]
        key = (tuple(hashes), tuple((s.node.name, s.refusal) for s in found))
        if key not in self.known:
            reasons = {s.index: s.refusal for s in found if s.refusal}
            reasons |= {s.index: "the weight's value is not known" for s, w in zip(found, weights)
                        if w is None and not s.refusal}  # fmt: skip
            made = self._replay if isinstance(self.what, Plan) else self._decide
            self.known = {key: (made(facts, found, weights, hashes, reasons), reasons)}
        return self.known[key]

    def _decide(self, facts: Facts, found: list[Site], weights: list[Any], hashes: list[str], reasons: dict[int, str]) -> Plan:
        entries = []
        for site, weight, digest in zip(found, weights, hashes):
            if site.index in reasons:
                continue
            choice = self._choose(site, weight)
            if isinstance(choice, str):
                at = where(site.node)
                reasons[site.index] = choice + (f" ({at})" if at else "")
                continue
            words = (f"error {choice.error:.2g} of the worst channel ({choice.mean:.2g} of all), as much for white noise; "
                     f"predicted time {choice.share:.2g} of the convolution's")  # fmt: skip
            entries.append(Entry(site.index, site.name, words, choice.error, digest, form=str(choice.form)))
        methods = "auto" if self.what.methods == METHODS else ",".join(self.what.methods)
        return Plan(KIND, len(found), tuple(entries), methods, f"error {self.what.error!r}")

    def _choose(self, site: Site, weight: Tensor) -> Choice | str:
        x, g = tensor(site.given["input"]), site.geometry
        assert x is not None and g is not None
        machine = costs.machine(self.device or x.device.type, x.element_size() == 2, is_last(x), torch.get_num_threads())
        batch, _, *image = (_hint(n) for n in x.shape)
        symbolic = not all(isinstance(n, int) for n in x.shape[2:])
        asked = self.what
        if symbolic:
            rest = tuple(m for m in asked.methods if m != "recursive")
            if not rest:
                return "recursive: the image's size is symbolic"
            asked = Request(rest, asked.error)

        def cost(form: Form) -> float:
            return costs.cost(form, machine, g, batch, image, weight.element_size())

        exact = costs.exact(machine, g, batch, image, weight.element_size())
        return choose(weight, g, asked, cost, exact, costs.WORTH * exact)

    def _replay(self, facts: Facts, found: list[Site], weights: list[Any], hashes: list[str], reasons: dict[int, str]) -> Plan:
        plan: Plan = self.what
        if plan.total != len(found):
            raise OptionError(f"the plan was made for {plan.total} large kernels, this graph has {len(found)}.")
        kept = []
        for e in plan.entries:
            if e.layer not in reasons and e.weights and hashes[e.layer] != e.weights:
                raise OptionError(f"the weights of layer {e.layer} are not those that the plan was made for.")
            if e.layer in reasons:
                continue
            try:
                form = parse(e.form, _sides(found[e.layer]))
            except ValueError as error:
                raise OptionError(f"layer {e.layer} of the plan: {error}.") from None
            worst = float(fit.errors(form, fit.filters(form, weights[e.layer]), weights[e.layer]).max())
            if not worst <= _bound(plan):
                reasons[e.layer] = f"{form} has an error of {worst:.2g}, above the plan's bound {_bound(plan):g}"
                continue
            kept.append(e)
        named = {e.layer for e in plan.entries}
        for n in [n for n in reasons if n not in named]:
            del reasons[n]  # nobody asked for those
        return Plan(KIND, plan.total, tuple(kept), plan.scorer, plan.mode)

    def check(self, match: Any, facts: Facts) -> Refuse | None:
        """The reason that was found, if any."""
        return Refuse(match.refusal, match.site.node) if match.refusal else None

    def replace(self, match: Any, facts: Facts) -> None:
        """The form's calls in the convolution's place, filters as derived weights; with the last, what must stay true."""
        site, form, gm = match.site, match.form, facts.gm
        node, key = site.node, edit.value_key(gm.graph)
        weight = site.given["weight"]
        like = tensor(weight)
        x = shape(site.given["input"])
        assert like is not None and x is not None and site.geometry is not None
        sizes = _shapes(form, site.geometry)
        pieces = []
        for i, size in enumerate(sizes):
            share = None if site.share is None else f"large_kernel {site.share} {form} {i}"
            pieces.append(edit.add_derived(gm, site.sources, _piece(site.compute, form, i), edit.fake_empty(like, size), share,
                                           (weight, node), key, site.volatile))  # fmt: skip

        def call(function: Any, *args: Any, **kwargs: Any) -> Node:
            return edit.insert(gm.graph, function, args, kwargs, origin=(node,), key=key)

        with gm.graph.inserting_before(node):
            made = run(form, site.geometry, site.given["input"], pieces, site.given["bias"], call,
                       [n for n in x[2:] if isinstance(n, int)])  # fmt: skip
        edit.replace(node, made)
        edit.drop_derived(gm, weight)  # of a folded one
        if match.all:
            gm.meta[BOUNDS_KEY] = [
                edit.Derived(f"bound_{s.index}", s.sources, _ratio(s.compute, f, match.limit), volatile=s.volatile)
                for s, f in match.all]  # fmt: skip
            if not self.quiet:
                warn_unverified(self.name)


def _sides(site: Site) -> tuple[int, int]:
    assert site.geometry is not None
    return site.geometry.kernel


def _shapes(form: Form, g: Geometry) -> list[tuple[int, ...]]:
    """Sizes of the filters, in the order of ``fit.filters``."""
    dummy = fit.filters(form, torch.zeros((1, 1, *g.kernel)))
    return [(g.channels, *f.shape[1:]) for f in dummy]


def _piece(compute: Any, form: Form, index: int) -> Callable[[list[Tensor]], Tensor]:
    def made(sources: list[Tensor]) -> Tensor:
        weight = compute(sources)
        # a copy: the runtime writes later values into what it was given
        return fit.filters(form, weight)[index].to(weight.device, copy=True)

    return made


def _ratio(compute: Any, form: Form, bound: float) -> Callable[[list[Tensor]], Tensor]:
    def made(sources: list[Tensor]) -> Tensor:
        weight = compute(sources)
        if not bool(torch.isfinite(weight).all()):
            return torch.tensor(torch.inf, dtype=torch.float64)
        return fit.errors(form, fit.filters(form, weight), weight).max().reshape(()) / bound

    return made


def _hint(n: Any) -> int:
    """A size as it is in this call, for costs only: no guard comes of it."""
    if isinstance(n, int):
        return n
    found = getattr(getattr(n, "node", None), "hint", None)
    return int(found) if isinstance(found, int) else 1


__all__ = ["BOUNDS_KEY", "KIND", "PLAN_KEY", "LargeKernel", "check_option"]
