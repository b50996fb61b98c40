"""From what the user asked for to a plan: which sublayers go, in which order, and why the others stay."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fusionc.accuracy import Entry, Plan, weight_hash
from fusionc.errors import OptionError

from .find import Finder, Refused, Sublayer
from .scores import METHODS, score

KIND = "remove_attention"
MODES = ("identity", "uniform")
PROTECT = (
    2,
    1,
)  # layers kept at the start and at the end unless named one by one (the spec's default, not the paper's)


def check(where: str, what: Any) -> Any:
    """What ``remove_attention`` takes: a count, a fraction, layer numbers, or a Plan (also its path or parsed JSON)."""
    if isinstance(what, Plan):
        plan = what
    elif isinstance(what, dict):
        plan = Plan.from_json(what)
    elif isinstance(what, bool) or what is None:
        raise OptionError(f"{where} takes a count, a fraction, a list of layer numbers or a Plan, found {what!r}.")
    elif isinstance(what, int):
        if what < 0:
            raise OptionError(f"{where} takes a count of at least 0, found {what}.")
        return what
    elif isinstance(what, float):
        if not 0 <= what < 1:
            raise OptionError(f"{where} takes a fraction from 0 to below 1, found {what}.")
        return what
    elif isinstance(what, (list, tuple)):
        if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in what) or len(set(what)) < len(
            what
        ):
            raise OptionError(f"{where} takes different layer numbers from 0 up, found {list(what)!r:.80}.")
        return tuple(what)
    else:
        raise OptionError(
            f"{where} takes a count, a fraction, a list of layer numbers or a Plan, found {type(what).__name__}."
        )
    if plan.kind != KIND:
        raise OptionError(f"{where} was given a plan for {plan.kind!r}, not for {KIND!r}.")
    if plan.mode not in MODES:
        raise OptionError(f"{where} was given a plan with mode {plan.mode!r}; there are {', '.join(MODES)}.")
    return plan


def named(finder: Finder, s: Sublayer) -> str:
    """The query projection's weight as the graph calls it."""
    return s.queries.linear.weight.name if s.queries is not None else s.core.name


def hashed(finder: Finder, s: Sublayer) -> str:
    """Content hash of the query and key weights, "" where there are none to hash."""
    real = [finder.real.get(n) for n in s.weights]
    return weight_hash(real) if real and all(hasattr(t, "detach") for t in real) else ""


def plan_of(what: Any, finder: Finder, subs: Sequence[Sublayer], *, method: str = "layer", protect: tuple[int, int] = PROTECT,
            scores: Mapping[int, float] | None = None, scorer: str = "gate_norm", mode: str = "identity",
            barred: Mapping[int, str] | None = None, name: Callable[[Finder, Sublayer], str] = named,
            ) -> tuple[Plan, dict[int, str]]:  # fmt: skip
    """The plan for ``what`` (checked), and the reasons of layers that were wanted or looked at and stay.

    ``scores`` replaces the weight score; ``barred`` are layers that must stay, with reasons.
    """
    if method not in METHODS:
        raise OptionError(f"there is no score {method!r}; there are {', '.join(METHODS)}.")
    total, reasons = len(subs), dict(barred or {})
    reasons |= {s.index: s.refusal for s in subs if s.refusal}
    if isinstance(what, Plan):
        if what.total != total:
            raise OptionError(f"the plan was made for {what.total} attention sublayers, this model has {total}.")
        for e in what.entries:
            if e.weights and e.layer not in reasons and hashed(finder, subs[e.layer]) != e.weights:
                raise OptionError(f"the weights of layer {e.layer} are not those that the plan was made for.")
        kept = tuple(e for e in what.entries if e.layer not in reasons)
        return Plan(KIND, total, kept, what.scorer, what.mode), {e.layer: reasons[e.layer] for e in what.entries
                                                                   if e.layer in reasons}  # fmt: skip
    if isinstance(what, tuple):
        if any(n >= total for n in what):
            raise OptionError(f"layer {max(what)} was named, but the model has {total} attention sublayers.")
        entries = [Entry(n, name(finder, subs[n]), "named by the user", weights=hashed(finder, subs[n])) for n in sorted(what)
                   if n not in reasons]  # fmt: skip
        return Plan(KIND, total, tuple(entries), "explicit", mode), {n: reasons[n] for n in what if n in reasons}
    count = what if isinstance(what, int) else round(what * total)
    if not count:
        return Plan(KIND, total, (), scorer, mode), {}
    ranked: list[tuple[float, int]] = []
    for s in subs:
        if s.index in reasons:
            continue
        if s.index < protect[0] or s.index >= total - protect[1]:
            reasons[s.index] = f"protected: the first {protect[0]} and the last {protect[1]} stay unless named"
            continue
        try:
            value = scores[s.index] if scores is not None else score(finder.coupling(s), method)
        except Refused as e:
            reasons[s.index] = str(e)
            continue
        ranked.append((value, s.index))
    ranked.sort(key=lambda pair: (pair[0], -pair[1]))  # equal scores: the deeper one goes first
    label = f"{scorer}/{method}" if scorer == "gate_norm" else scorer
    entries = [Entry(n, name(finder, subs[n]), f"{label} rank {i + 1} of {len(ranked)}", value, hashed(finder, subs[n]))
               for i, (value, n) in enumerate(ranked[:count])]  # fmt: skip
    if count <= len(ranked):  # nobody asked for those
        reasons = {n: why for n, why in reasons.items() if not why.startswith("protected")}
    return Plan(KIND, total, tuple(entries), label, mode), reasons
