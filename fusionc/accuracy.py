"""The contract of every approximate pass: what was changed is a reviewable file, and how much it changed is a number.

An approximate pass runs only when the user names it.  It writes a ``Plan`` (JSON: layer, reason, score, hash of the weights
it was made for) that can be read, edited and replayed; it measures its error where the user gave calibration inputs
(``Change`` for one place, ``Agreement`` for the final logits); and where there were none it says "unverified", in the
report and once as a warning.  ``within`` undoes the worst changes until the final error is inside a budget.

Source: KL divergence and top-1 agreement of the logits as in "Accuracy is Not All You Need" (arXiv 2407.09141).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fusionc.errors import OptionError, warn_once

FORMAT = "fusionc-plan-1"
Place = int | str  # a layer, or "mlp 3": a layer's other part
PART = "attention"  # of an entry that names none
PARTS = (PART, "mlp")
_HASH = 32  # hexadecimal digits of a weight hash


@dataclass(frozen=True)
class Entry:
    """One place that a plan changes. ``layer``: its number in execution order; ``name``: the module's path or that of a
    weight (for the reader); ``score``: what the ranking saw (NaN: none); ``weights``: ``weight_hash`` or "" (not checked);
    ``part``: which part of the layer (a file may leave it out); ``form``: what comes there instead, in the words of the
    pass ("": it has one choice only)."""

    layer: int
    name: str = ""
    reason: str = ""
    score: float = math.nan
    weights: str = ""
    part: str = PART
    form: str = ""

    @property
    def place(self) -> Place:
        """How reports call it."""
        return self.layer if self.part == PART else f"{self.part} {self.layer}"


@dataclass(frozen=True)
class Plan:
    """What an approximate pass does: ``kind`` is the pass, ``total`` the number of layers that it could look at."""

    kind: str
    total: int
    entries: tuple[Entry, ...] = ()
    scorer: str = "explicit"
    mode: str = "identity"

    def __post_init__(self) -> None:
        for part in PARTS:
            layers = [e.layer for e in self.entries if e.part == part]
            if len(set(layers)) != len(layers):
                raise OptionError(f"the plan names a layer twice: {sorted(layers)}.")
            if any(not 0 <= layer < self.total for layer in layers):
                raise OptionError(f"the plan names layers {sorted(layers)}, but there are only {self.total}.")
        if strange := {e.part for e in self.entries} - {*PARTS}:
            raise OptionError(f"the plan names the part {min(strange)!r}; there are {', '.join(PARTS)}.")

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers whose attention is named, ascending."""
        return self.of(PART)

    def of(self, part: str) -> tuple[int, ...]:
        """The layers of which this part is named, ascending."""
        return tuple(sorted(e.layer for e in self.entries if e.part == part))

    def without(self, place: Place) -> Plan:
        """The plan less one place."""
        rest = tuple(e for e in self.entries if e.place != place)
        return Plan(self.kind, self.total, rest, self.scorer, self.mode)

    def to_json(self) -> dict[str, Any]:
        """JSON values; a score that is no number is null."""
        entries = [{**asdict(e), "score": e.score if math.isfinite(e.score) else None} for e in self.entries]
        usual = {"form": "", "part": PART}  # left out where it says nothing
        entries = [{k: v for k, v in e.items() if k not in usual or v != usual[k]} for e in entries]
        return {"format": FORMAT, "kind": self.kind, "total": self.total, "scorer": self.scorer, "mode": self.mode,
                "entries": entries}  # fmt: skip

    @classmethod
    def from_json(cls, data: Any) -> Plan:
        """Check every field of parsed JSON; raises OptionError naming the field."""
        _shape("plan", data, {"format": str, "kind": str, "total": int, "scorer": str, "mode": str, "entries": list})
        if data["format"] != FORMAT:
            raise OptionError(f"the plan's format is {data['format'][:40]!r}, this version reads {FORMAT!r}.")
        entries = []
        for item in data["entries"]:
            if isinstance(item, dict):
                item = {"part": PART, "form": ""} | item
            _shape("plan entry", item, {"layer": int, "name": str, "reason": str, "score": (int, float, type(None)),
                                        "weights": str, "part": str, "form": str})  # fmt: skip
            if item["weights"] and not (
                len(item["weights"]) == _HASH and set(item["weights"]) <= set("0123456789abcdef")
            ):
                raise OptionError(f"the weight hash of layer {item['layer']} is not {_HASH} hexadecimal digits.")
            try:
                score = math.nan if item["score"] is None else float(item["score"])
            except OverflowError:
                raise OptionError(f"the score of layer {item['layer']} is out of range.") from None
            entries.append(Entry(item["layer"], item["name"], item["reason"], score, item["weights"], item["part"],
                                 item["form"]))  # fmt: skip
        return cls(data["kind"], data["total"], tuple(entries), data["scorer"], data["mode"])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as indented JSON."""
        Path(path).write_text(json.dumps(self.to_json(), indent=2, allow_nan=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read and check a plan file; raises OptionError for anything that is not one."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as e:
            raise OptionError(f"the plan file {os.fspath(path)} is not JSON: {e}.") from None
        return cls.from_json(data)


def _shape(what: str, data: Any, fields: Mapping[str, Any]) -> None:
    if not isinstance(data, dict) or set(data) != set(fields):
        raise OptionError(f"a {what} needs the fields {', '.join(fields)} and no others.")
    for name, kind in fields.items():
        if not isinstance(data[name], kind) or isinstance(data[name], bool):
            raise OptionError(f"field {name!r} of a {what} has a value of type {type(data[name]).__name__}.")


def weight_hash(tensors: Iterable[Any]) -> str:
    """32 hexadecimal digits of the tensors' dtypes, shapes and bytes."""
    import torch

    digest = hashlib.blake2b(digest_size=_HASH // 2)
    for t in tensors:
        t = t.detach()
        digest.update(f"{t.dtype}{tuple(t.shape)}".encode())
        digest.update(t.contiguous().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


@dataclass(frozen=True)
class Change:
    """Measured effect of one place on its own output: relative L2 error and cosine against the original."""

    relative_l2: float
    cosine: float


@dataclass(frozen=True)
class Agreement:
    """Final outputs against the original's: mean KL(original ‖ changed) in nats, share of equal argmax, relative L2 error."""

    kl: float
    top1: float
    relative_l2: float


def change(original: Any, changed: Any) -> Change:
    """Compare two tensors of one shape [..., d]; the cosine is the mean over rows."""
    import torch

    a, b = original.double().reshape(-1, original.shape[-1]), changed.double().reshape(-1, original.shape[-1])
    error = (a - b).norm() / a.norm().clamp_min(1e-300)
    return Change(float(error), float(torch.nn.functional.cosine_similarity(a, b, dim=-1).mean()))


def agreement(original: Sequence[Any], changed: Sequence[Any]) -> Agreement:
    """Compare the logits [..., classes] of the calibration batches, every position counting the same."""
    import torch

    kl, same, square, norm, rows = 0.0, 0.0, 0.0, 0.0, 0
    for a, b in zip(original, changed, strict=True):
        a, b = a.double().reshape(-1, a.shape[-1]), b.double().reshape(-1, b.shape[-1])
        p, q = a.log_softmax(-1), b.log_softmax(-1)
        kl += float(torch.where(p.exp() == 0, 0.0, p.exp() * (p - q)).sum())  # NaN where the original is: nothing is known
        same += float((a.argmax(-1) == b.argmax(-1)).sum())
        square, norm, rows = square + float((a - b).square().sum()), norm + float(a.square().sum()), rows + len(a)
    if rows == 0:
        raise OptionError("the calibration inputs hold no position to compare.")
    return Agreement(kl / rows, same / rows, math.sqrt(square / norm) if norm else 0.0)


@dataclass
class Report:
    """What an application of a plan did. ``changes`` are measured, by place; ``agreement`` is of the final outputs; without
    calibration inputs both are empty and ``unverified`` is True. ``rolled_back`` were undone to stay in the budget."""

    plan: Plan
    changes: dict[Place, Change] = field(default_factory=dict)
    agreement: Agreement | None = None
    rolled_back: tuple[Place, ...] = ()
    refusals: dict[Place, str] = field(default_factory=dict)
    freed_bytes: int = 0

    @property
    def unverified(self) -> bool:
        """Nobody measured the error."""
        return self.agreement is None

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {"plan": self.plan.to_json(), "changes": {str(k): asdict(v) for k, v in self.changes.items()},
                "agreement": asdict(self.agreement) if self.agreement else None, "rolled_back": list(self.rolled_back),
                "refusals": {str(k): v for k, v in self.refusals.items()}, "freed_bytes": self.freed_bytes,
                "unverified": self.unverified}  # fmt: skip

    def __str__(self) -> str:
        lines = [f"{self.plan.kind}: {len(self.plan.entries)} of {self.plan.total} changed ({self.plan.scorer}, "
                 f"{self.plan.mode}), {self.freed_bytes / 1e6:.1f} MB of parameters freed"]  # fmt: skip
        for e in sorted(self.plan.entries, key=lambda e: (e.layer, e.part)):
            c = self.changes.get(e.place)
            words = f", relative error {c.relative_l2:.3g}, cosine {c.cosine:.4f}" if c else ""
            what = f"{e.form}, " if e.form else ""
            lines.append(f"  layer {e.place} {e.name}: {what}{e.reason}{words}")
        lines += [f"  layer {layer} rolled back: over the error budget" for layer in self.rolled_back]
        lines += [f"  layer {layer} kept: {why}" for layer, why in sorted(self.refusals.items(), key=_order)]
        a = self.agreement
        lines.append(f"  final outputs: KL {a.kl:.4g}, top-1 agreement {a.top1:.1%}, relative error {a.relative_l2:.3g}"
                     if a else "  unverified: no calibration inputs were given")  # fmt: skip
        return "\n".join(lines)


def _order(item: tuple[Place, Any]) -> tuple[int, str]:
    """Sorts by layer, attention before its other parts."""
    place = item[0]
    return (place, "") if isinstance(place, int) else (int(place.rpartition(" ")[2]), place)


def warn_unverified(kind: str) -> None:
    """Say once for each kind of pass that an approximation ran unmeasured."""
    warn_once(f"unverified:{kind}", f"{kind} changes the model's results and nobody measured by how much (unverified): "
              "give calibration inputs, or evaluate the changed model.")  # fmt: skip


def within(plan: Plan, budget: float, worst: Mapping[Place, float], apply: Callable[[Plan], Agreement]
           ) -> tuple[Plan, Agreement | None, tuple[Place, ...]]:  # fmt: skip
    """Apply ``plan``; while the KL of the final outputs is above ``budget``, leave out the place whose measured error in
    ``worst`` is largest and apply the rest again. Returns the plan that stays, its agreement and the places left out."""
    if not (isinstance(budget, (int, float)) and not isinstance(budget, bool) and budget >= 0):
        raise OptionError(f"error_budget must be a KL divergence in nats, at least 0; found {budget!r}.")
    gone: list[Place] = []
    while True:
        found = apply(plan)
        if found.kl <= budget or not plan.entries:
            return plan, found, tuple(gone)
        place = max((e.place for e in plan.entries), key=lambda n: (worst.get(n, math.inf), _order((n, None))))
        gone.append(place)
        plan = plan.without(place)


__all__ = [
    "Agreement",
    "Change",
    "Entry",
    "Place",
    "Plan",
    "Report",
    "agreement",
    "change",
    "warn_unverified",
    "weight_hash",
    "within",
]
