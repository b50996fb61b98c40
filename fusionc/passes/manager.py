"""Runs the pipeline: times, counts, records refusals, verifies, keeps before/after texts, contains failures.

Passes know nothing of this. A pass that raises is left out with one warning that names it (an error under ``strict``).
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Sequence
from typing import Any, Literal

import torch
from torch.fx import Graph, GraphModule, Node
from torch.utils._python_dispatch import _disable_current_modes

from fusionc.errors import StrictError, VerifyError, warn_once
from fusionc.record import PassRecord, Refusal

from ..graph import edit
from ..graph.facts import Facts, placeholders, value
from ..graph.verify import mutations
from ..graph.verify import verify as check_graph
from .base import DROPPED_KEY, Approximate, Match, Pass, Refuse

STATIC_KEY = "fusionc_static"
STAGE_KEY = "fusionc_stage"
_MAX_REFUSALS = 200


def run_passes(gm: GraphModule, level: Literal["model", "graph"], config: Any = None,
               example_inputs: Sequence[Any] | None = None, *, stage: str | None = None,
               static: Collection[int] | None = None, recompile: bool = True) -> tuple[GraphModule, list[PassRecord]]:
    """Run the built-in pipeline of one level, and the user's passes: in place, but on a copy at model level.
    Without ``recompile`` a changed module's code is left as it was (the compiler runs a graph as a module only if it gives
    it up).

    ``example_inputs``: the graph's inputs (real at model level, fake at graph level). ``stage``: "inference",
    "forward" or "backward"; default ``gm.meta["fusionc_stage"]``, else told from gradient mode at model level and
    "forward" at graph level. ``static``: positions of placeholders that are parameters or buffers; default
    ``gm.meta["fusionc_static"]``, else found out. Derived weights are left in ``gm.meta["fusionc_derived"]``.
    """
    from . import pipeline

    chosen = pipeline(level, config)
    stage = stage or gm.meta.get(STAGE_KEY) or _stage(level, example_inputs)
    if static is None:
        static = gm.meta.get(STATIC_KEY)
    if static is None:
        static = _static(gm, level, example_inputs)
    if level == "model":
        facts = Facts(gm, level, stage, static, example_inputs)
        if not any(_looks(item, facts) for _, item in chosen):
            return gm, [PassRecord(position, item.name, "model") for position, item in chosen]
        gm = edit.copy_module(gm)
    return run(chosen, gm, level, config, example_inputs, stage=stage, static=static, recompile=recompile)


def _looks(item: Pass, facts: Facts) -> bool:
    """The pass finds something to look at (or fails, which ``run`` deals with)."""
    try:
        return next(iter(item.find(facts)), None) is not None
    except Exception:  # noqa: BLE001 - reported by the real run
        return True


def run(pipeline: Iterable[tuple[int, Pass]], gm: GraphModule, level: str, config: Any = None,
        example_inputs: Sequence[Any] | None = None, *, stage: str = "inference",
        static: Collection[int] = (), recompile: bool = True) -> tuple[GraphModule, list[PassRecord]]:
    """Run (position, pass) pairs in order on ``gm`` in place; one record for each pass.

    If a pass raises, the half-made edits of it are never compiled: the graph goes back to what it was before the first
    edit of a non-atomic pass (see ``Pass.atomic``) and the pipeline runs again without it.
    """
    chosen, saved = list(pipeline), _Saved(gm)
    failed: list[PassRecord] = []
    while True:
        records: list[PassRecord] = []
        with _disable_current_modes():  # AOTAutograd calls under a fake mode, which makes each small tensor 5× dearer
            broken = _run_once(chosen, gm, level, config, example_inputs, stage, static, saved, records)
        if broken is None:
            if recompile and any(record.fired for record in records):
                gm.recompile()
            return gm, sorted(records + failed, key=lambda record: record.position)
        saved.restore()
        failed.append(broken)
        chosen = [entry for entry in chosen if entry[0] != broken.position]


def _run_once(pipeline: list[tuple[int, Pass]], gm: GraphModule, level: str, config: Any,
              example_inputs: Sequence[Any] | None, stage: str, static: Collection[int], saved: _Saved,
              records: list[PassRecord]) -> PassRecord | None:
    """One go through the pipeline; fills ``records``. Returns the record of a pass that raised, or None."""
    dump, verify = bool(getattr(config, "dump", None)), bool(getattr(config, "verify", False))
    text: str | None = None
    for position, item in pipeline:
        if dump and text is None:
            text = _text(gm, static)
        facts = Facts(gm, level, stage, static, example_inputs if level == "model" else None)
        record = PassRecord(position, item.name, level)  # type: ignore[arg-type]
        written = mutations(gm) if verify else None
        start = time.perf_counter()
        try:
            _apply(item, gm, facts, record, saved)
            dropped = gm.meta.pop(DROPPED_KEY, ())
            if record.fired and verify:
                if written and isinstance(item.exactness, Approximate):  # the caches of what it removed
                    written = [entry for entry in written if entry[0] not in dropped]
                check_graph(gm, f"after pass {item.name}", written)
        except VerifyError:
            raise
        except Exception as error:  # noqa: BLE001 - a broken pass must not take the user's program with it
            if getattr(config, "strict", False):
                raise StrictError(f"pass {item.name!r} failed on the {level} graph: {error}") from error
            what = f"{type(error).__name__}: {error}"
            warn_once(f"pass {item.name}", f"pass {item.name!r} failed and was skipped ({what}). The result is right "
                      f"without it; options={{'disable': [{item.name!r}]}} silences this.")
            record.refusals.append(Refusal(item.name, f"failed: {what}"))
            if not item.atomic:
                record.fired, record.seconds = 0, time.perf_counter() - start
                return record
        record.seconds = time.perf_counter() - start
        if record.fired and dump:
            record.before, text = text, _text(gm, static)
            record.after = text
        records.append(record)
    return None


def _apply(item: Pass, gm: GraphModule, facts: Facts, record: PassRecord, saved: _Saved) -> None:
    """Look, check and replace; matches that an earlier replacement consumed are left alone."""
    traced = type(item).pattern is not None
    refused: set[tuple[str, str]] = set()
    found = list(item.find(facts)) if traced else item.find(facts)
    for match in found:
        nodes = getattr(match, "nodes", ())
        if any(node._erased for node in nodes):
            continue
        refusal = item.check(match, facts)
        if refusal is not None:
            blame = refusal.node if isinstance(refusal.node, Node) else getattr(match, "anchor", None)
            key = (refusal.reason, blame.name if blame is not None else "")
            if key not in refused and len(refused) < _MAX_REFUSALS:
                refused.add(key)
                record.refusals.append(Refusal(item.name, *key))
            continue
        if not item.atomic:
            saved.before_edit()
        if traced:
            refusal = replace_traced(item, match, gm)
            if refusal is not None:
                record.refusals.append(Refusal(item.name, refusal.reason, match.nodes[-1].name))
                continue
        else:
            item.replace(match, facts)
            note = getattr(match, "bound", {}).get("note")
            if note:
                record.notes.append(str(note))
        record.fired += 1


def replace_traced(item: Pass, match: Match, gm: GraphModule) -> Refuse | None:
    """Put the traced ``replace`` function of a pattern pass where its match was."""
    from ..graph.pattern import arguments, trace

    function = type(item).__dict__.get("replace") or type(item).replace
    bound = [match.bound[name] for name in arguments(function)]
    last = match.nodes[-1]
    key = edit.value_key(gm.graph)
    body = _trace_aten(function, bound) if key == "val" else trace(function)
    new = edit.inline(gm, body, [b for b in bound if isinstance(b, Node)] if key == "val" else bound, last,
                      match.nodes, key)
    if not isinstance(new, Node):
        return Refuse("the replacement returns no tensor", last)
    from ..graph.facts import same_layout

    if not same_layout(value(new), value(last)):
        edit.erase_dead([new])  # torch-level parts that have no schema stay unused: AOTAutograd drops them
        return Refuse("the replacement has another shape, stride or dtype", last)
    edit.replace(last, new)
    edit.erase_dead(node for node in match.nodes if not node._erased)
    return None


def _trace_aten(function: Any, bound: Sequence[Any]) -> Graph:
    """ATen graph of a plain torch function on the bound nodes' fake values; constants are baked in."""
    from torch.fx.experimental.proxy_tensor import make_fx

    inputs = [value(b) for b in bound if isinstance(b, Node)]

    def call(*tensors: Any) -> Any:
        given = iter(tensors)
        return function(*[next(given) if isinstance(b, Node) else b for b in bound])

    mode = edit.fake_mode_of(inputs)
    if mode is None:
        return make_fx(call)(*inputs).graph
    with mode:
        return make_fx(call)(*inputs).graph


class _Saved:
    """A copy of the graph taken before the first edit of a non-atomic pass, to come back to if it fails."""

    def __init__(self, gm: GraphModule) -> None:
        self.gm = gm
        self.graph: Graph | None = None
        self.derived: list[Any] | None = None

    def before_edit(self) -> None:
        """Called before each edit; copies once."""
        if self.graph is None:
            self.graph = edit.copy_graph(self.gm.graph)
            known = self.gm.meta.get(edit.DERIVED_KEY)  # passes append to it
            self.derived = list(known) if known is not None else None

    def restore(self) -> None:
        """Undo every edit since ``before_edit``."""
        if self.graph is None:
            return
        self.gm.graph, self.graph = self.graph, None
        if self.derived is None:
            self.gm.meta.pop(edit.DERIVED_KEY, None)
        else:
            self.gm.meta[edit.DERIVED_KEY] = self.derived


def _text(gm: GraphModule, static: Collection[int]) -> str:
    from ..graph.text import show

    return show(gm, static)


def _stage(level: str, example_inputs: Sequence[Any] | None) -> str:
    if level == "graph":
        return "forward"
    if not torch.is_grad_enabled():
        return "inference"
    needs = any(isinstance(x, torch.Tensor) and x.requires_grad for x in example_inputs or ())
    return "forward" if needs else "inference"


def _static(gm: GraphModule, level: str, example_inputs: Sequence[Any] | None) -> frozenset[int]:
    if level == "model":
        return static_inputs(example_inputs or ())
    context = torch._guards.TracingContext.try_get()
    known = getattr(context, "fw_metadata", None)
    count = len(placeholders(gm))
    return frozenset(i for i in getattr(known, "static_input_indices", None) or () if i < count)


def static_inputs(example_inputs: Sequence[Any]) -> frozenset[int]:
    """Positions of parameters, buffers and tensor attributes of modules among Dynamo's example inputs."""
    return frozenset(
        position for position, found in enumerate(example_inputs)
        if isinstance(found, torch.nn.Parameter) or getattr(found, "_dynamo_static_input_type", None) is not None
    )


def named_approximate(item: Pass, config: Any) -> bool:
    """Approximate passes run only if the user put an instance of them, or an option of their name, into ``options``."""
    given = {getattr(p, "name", None) for p in getattr(config, "passes", ())}
    asked = getattr(config, item.name, None) is not None  # an option of the pass's own name
    return not isinstance(item.exactness, Approximate) or item.name in given or asked
