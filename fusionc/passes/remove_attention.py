"""Residual attention sublayers that the user wants gone are left out of the graph, with the writes into their caches.

Math        x + attention(norm(x)) becomes x for the chosen sublayers; beside it, parallel MLPs stay. A drop list
            ({"attention": [3], "mlp": [3, 5], "block": [7]}) names MLPs and whole blocks in the same way.
Exactness   Approximate: runs only with options={"remove_attention": ...}. Equal to eager with that sublayer replaced by zero.
Legality    Inference; the output must be a plain residual addend; no QK-norm, no cross-attention; keys and values must not
            leave the graph (then ``fusionc.remove_attention`` edits the module). A count or fraction spares the first two
            sublayers and the last and takes those with the lowest weight score; layers are counted in each graph by itself.
Cost        Scoring reads the query and key weights once; a removed sublayer costs nothing at run time. Its parameters stay
            allocated (they are the module's).
Source      Gate-Norm, arXiv 2512.20636; the ranking's definition is in ``removal/scores.py``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch.fx import Node

from fusionc.accuracy import Place, Plan, warn_unverified

from ..graph.facts import Facts
from ..removal import choose, edit
from ..removal.find import Finder, Sublayer
from .base import DROPPED_KEY, Approximate, Match, Pass, Refuse


class RemoveAttention(Pass):
    """``what``: a count, fraction, layer numbers, drop list or Plan (None: nothing to do). See the module's docstring."""

    name = "remove_attention"
    level = "model"
    exactness = Approximate("named attention sublayers add nothing; unverified unless measured")

    def __init__(self, what: Any = None) -> None:
        self.what = None if what is None else choose.check("remove_attention", what)
        self.known: dict[Any, tuple[Plan, dict[Place, str]]] = {}  # the manager looks twice; scoring is dear

    def find(self, facts: Facts) -> Iterable[Match]:
        """One match for each sublayer that goes or was refused."""
        if self.what is None:
            return
        finder = Finder(facts.gm, facts.real, facts.static)
        subs = finder.sublayers() + (finder.mlps() if choose.needs_mlps(self.what) else [])
        if not subs:
            return
        if facts.stage != "inference":
            yield Match({"refusal": "it is in training mode", "core": subs[0].core}, (subs[0].core,))
            return
        barred = {s.place: "its keys or values leave the graph: use fusionc.remove_attention on the module"
                  for s in subs if not s.refusal and s.part == "attention" and self._escapes(finder, s, facts)}  # fmt: skip
        weights = [facts.real[n] for s in subs for n in s.weights if n in facts.real]
        key = (len(subs), *barred, *((id(w), w._version) for w in weights))
        if key not in self.known:
            self.known = {key: choose.plan_of(self.what, finder, subs, barred=barred)}
        plan, reasons = self.known[key]
        if isinstance(self.what, Plan) and plan.mode != "identity":
            yield Match({"refusal": f"mode {plan.mode!r} is done by fusionc.remove_attention on the module only",
                         "core": subs[0].core}, (subs[0].core,))  # fmt: skip
            return
        by_place = {s.place: s for s in subs}
        for place, why in reasons.items():
            yield Match({"refusal": why, "core": by_place[place].core}, (by_place[place].core,))
        gone = [by_place[e.place] for e in plan.entries]
        for s in gone:
            fresh = finder.again(s)
            assert fresh.add is not None
            yield Match({"refusal": "", "sublayer": fresh, "last": s is gone[-1]}, (s.core, fresh.add))

    def _escapes(self, finder: Finder, s: Sublayer, facts: Facts) -> bool:
        """A tensor between the projections and the core is a result of the graph (a growing cache)."""
        stack: list[Node] = list(s.core.all_input_nodes)
        seen: set[Node] = set()
        results = set(facts.gm.graph.output_node().all_input_nodes)
        for _ in range(200):
            if not stack:
                break
            node = stack.pop()
            if node in seen or node.op == "placeholder":
                continue
            seen.add(node)
            if node in results:
                return True
            if finder.reader.linear(node) is None:  # what is before the projections lives without the attention
                stack.extend(node.all_input_nodes)
        return False

    def check(self, match: Any, facts: Facts) -> Refuse | None:
        """The reason that was found, if any."""
        return Refuse(match.refusal) if match.refusal else None

    def replace(self, match: Any, facts: Facts) -> None:
        """Let the stream pass; after the last one erase cache writes that nobody reads any more."""
        edit.remove(match.sublayer)
        if match.last:
            facts.gm.meta.setdefault(DROPPED_KEY, []).extend(edit.erase_writes(facts.gm))
            warn_unverified(self.name)


__all__ = ["RemoveAttention"]
