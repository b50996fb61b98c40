"""From what the user asked for to a plan: which sublayers go, in which order, and why the others stay."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fusionc.accuracy import Entry, Place, Plan, weight_hash
from fusionc.errors import OptionError

from .find import Finder, Sublayer
from .parts import Refused
from .scores import METHODS, score

KIND = "remove_attention"
MODES = ("identity", "uniform")
_TAKES = "a count, a fraction, a list of layer numbers, a drop list or a Plan"
PROTECT = (
    2,
    1,
)  # layers kept at the start and at the end unless named one by one (the spec's default, not the paper's)


@dataclass(frozen=True)
class Drop:
    """Sublayers named one by one (TrimLLM's lists): layer numbers whose attention, and whose MLP, goes."""

    attention: tuple[int, ...] = ()
    mlp: tuple[int, ...] = ()

    @property
    def places(self) -> list[tuple[str, int]]:
        """(part, layer)."""
        return [("attention", n) for n in self.attention] + [("mlp", n) for n in self.mlp]

    def to_json(self) -> dict[str, list[int]]:
        """As it can be given."""
        return {"attention": list(self.attention), "mlp": list(self.mlp)}


def check(where: str, what: Any) -> Any:
    """What ``remove_attention`` takes: a count, a fraction, layer numbers, a drop list, or a Plan (also as parsed JSON).

    A drop list is ``{"attention": [...], "mlp": [...], "block": [...]}``; a block is both. Lists come back as ``Drop``.
    """
    if isinstance(what, (Plan, Drop)):
        plan = what
    elif isinstance(what, dict) and what and set(what) <= {"attention", "mlp", "block"}:
        lists = {part: _numbers(f"{where}[{part!r}]", given) for part, given in what.items()}
        both = lists.get("block", ())
        return Drop(*(_numbers(f"{where}, part {part!r} with its blocks", (*lists.get(part, ()), *both))
                      for part in ("attention", "mlp")))  # fmt: skip
    elif isinstance(what, dict):
        plan = Plan.from_json(what)
    elif isinstance(what, bool) or what is None:
        raise OptionError(f"{where} takes {_TAKES}, found {what!r}.")
    elif isinstance(what, int):
        if what < 0:
            raise OptionError(f"{where} takes a count of at least 0, found {what}.")
        return what
    elif isinstance(what, float):
        if not 0 <= what < 1:
            raise OptionError(f"{where} takes a fraction from 0 to below 1, found {what}.")
        return what
    elif isinstance(what, (list, tuple)):
        return Drop(_numbers(where, what))
    else:
        raise OptionError(f"{where} takes {_TAKES}, found {type(what).__name__}.")
    if isinstance(plan, Drop):
        return plan
    if plan.kind != KIND:
        raise OptionError(f"{where} was given a plan for {plan.kind!r}, not for {KIND!r}.")
    if plan.mode not in MODES:
        raise OptionError(f"{where} was given a plan with mode {plan.mode!r}; there are {', '.join(MODES)}.")
    return plan


def _numbers(where: str, given: Any) -> tuple[int, ...]:
    if isinstance(given, (list, tuple)) and all(
        isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in given
    ):
        if len(set(given)) == len(given):
            return tuple(given)
    raise OptionError(f"{where} takes different layer numbers from 0 up, found {given!r:.80}.")


def named(finder: Finder, s: Sublayer) -> str:
    """Its first weight as the graph calls it."""
    return s.weights[0].name if s.weights else s.core.name


def hashed(finder: Finder, s: Sublayer) -> str:
    """Content hash of the query and key weights (of all weights of an MLP), "" where there are none to hash."""
    real = [finder.real.get(n) for n in s.weights]
    return weight_hash(real) if real and all(hasattr(t, "detach") for t in real) else ""


def needs_mlps(what: Any) -> bool:
    """The request names MLPs, so that it is worth looking for them."""
    return bool(what.mlp if isinstance(what, Drop) else what.of("mlp") if isinstance(what, Plan) else ())


def plan_of(what: Any, finder: Finder, subs: Sequence[Sublayer], *, method: str = "layer", protect: tuple[int, int] = PROTECT,
            scores: Mapping[Place, float] | None = None, scorer: str = "gate_norm", mode: str = "identity",
            barred: Mapping[Place, str] | None = None, name: Callable[[Finder, Sublayer], str] = named,
            ) -> tuple[Plan, dict[Place, str]]:  # fmt: skip
    """The plan for ``what`` (checked), and the reasons of places that were wanted or looked at and stay.

    ``subs`` are attention sublayers and, if ``needs_mlps``, MLPs. ``scores`` replaces the weight score; ``barred`` are
    places that must stay, with reasons.
    """
    if method not in METHODS:
        raise OptionError(f"there is no score {method!r}; there are {', '.join(METHODS)}.")
    by_place, total = {s.place: s for s in subs}, _total(subs)
    reasons = dict(barred or {}) | {s.place: s.refusal for s in subs if s.refusal}
    if isinstance(what, Plan):
        if what.total != total:
            raise OptionError(f"the plan was made for {what.total} attention sublayers, this model has {total}.")
        for e in what.entries:
            if e.place not in by_place:
                raise OptionError(f"the plan names {e.place}, which was not found in the model.")
            if e.weights and e.place not in reasons and hashed(finder, by_place[e.place]) != e.weights:
                raise OptionError(f"the weights of layer {e.place} are not those that the plan was made for.")
        kept = tuple(e for e in what.entries if e.place not in reasons)
        return Plan(KIND, total, kept, what.scorer, what.mode), {e.place: reasons[e.place] for e in what.entries
                                                                   if e.place in reasons}  # fmt: skip
    if isinstance(what, Drop):
        entries, kept_reasons = [], {}
        for part, n in sorted(what.places):
            place = Entry(n, part=part).place
            if place not in by_place:
                there = [s.index for s in subs if s.part == part]
                raise OptionError(f"layer {n} was named, but the model has {len(there)} {part} sublayers"
                                  + (f" (numbers {there[0]} to {there[-1]})." if there else "."))  # fmt: skip
            if place in reasons:
                kept_reasons[place] = reasons[place]
                continue
            s = by_place[place]
            entries.append(Entry(n, name(finder, s), "named by the user", weights=hashed(finder, s), part=part))
        return Plan(KIND, total, tuple(entries), "explicit", mode), kept_reasons
    count = what if isinstance(what, int) else round(what * total)
    if not count:
        return Plan(KIND, total, (), scorer, mode), {}
    ranked: list[tuple[float, int]] = []
    for s in subs:
        if s.place in reasons or s.part != "attention":
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
    entries = [Entry(n, name(finder, by_place[n]), f"{label} rank {i + 1} of {len(ranked)}", value, hashed(finder, by_place[n]))
               for i, (value, n) in enumerate(ranked[:count])]  # fmt: skip
    if count <= len(ranked):  # nobody asked for those
        reasons = {n: why for n, why in reasons.items() if not why.startswith("protected")}
    return Plan(KIND, total, tuple(entries), label, mode), reasons


def _total(subs: Sequence[Sublayer]) -> int:
    """The layers of a model: attention sublayers, unless there are MLPs with higher numbers."""
    return max((s.index + 1 for s in subs), default=0)
