"""What a pass is: a rewrite with a name, a declared exactness, a way to find places, a legality check and a replacement.

A pass does no I/O, no logging, no counting and reads no configuration; ``manager.py`` does all of that. Refusal is a
value: why a rewrite did not apply is what ``explain`` prints and what tests assert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch.fx import Node

from ..graph.facts import Facts

# gm.meta: names of inputs that an approximate pass stopped writing on purpose; the manager's check of lost writes reads it
DROPPED_KEY = "fusionc_dropped_writes"


@dataclass(frozen=True)
class Exact:
    """Same bits (NaN payloads aside)."""

    def __str__(self) -> str:
        return "exact"


@dataclass(frozen=True)
class Reassociates:
    """Same real function, rounded differently: relative error against the original bounded by about ``rtol``."""

    rtol: float

    def __str__(self) -> str:
        return f"reassociates (rtol {self.rtol:g})"


@dataclass(frozen=True)
class Approximate:
    """Changes the function; runs only when the user names it in ``options``."""

    why: str = ""

    def __str__(self) -> str:
        return "approximate" + (f" ({self.why})" if self.why else "")


Exactness = Exact | Reassociates | Approximate


@dataclass(frozen=True)
class Refuse:
    """Why a rewrite does not apply here. ``node`` is the node to blame, if there is one."""

    reason: str
    node: Node | None = None


@dataclass
class Match:
    """One place where a pass may apply: named nodes (or constants), readable as attributes.

    ``nodes`` are the nodes that the rewrite makes superfluous, the last of them the one whose value is replaced.
    """

    bound: dict[str, Any] = field(default_factory=dict)
    nodes: tuple[Node, ...] = ()

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["bound"][name]
        except KeyError:
            raise AttributeError(name) from None

    @property
    def anchor(self) -> Node | None:
        """The node to name in messages."""
        return self.nodes[-1] if self.nodes else next((n for n in self.bound.values() if isinstance(n, Node)), None)


class Pass:
    """Base of all rewrites. Give ``name``, ``exactness`` and either

    * ``pattern`` and ``replace`` as plain torch functions over the same arguments (no ``self``), or
    * ``find(facts) -> iterable of Match`` and ``replace(self, match, facts)`` which edits the graph.

    ``check(match, facts)`` returns ``Refuse`` or None. ``level`` is "model" (Dynamo's torch-level graph, real weights
    at hand) or "graph" (functional ATen graph).
    """

    name: ClassVar[str] = ""
    exactness: ClassVar[Exactness] = Exact()
    level: ClassVar[Literal["model", "graph"]] = "graph"
    # replace does all that may fail before its first edit: if the pass raises, the graph is still sound (no copy is kept)
    atomic: ClassVar[bool] = False
    pattern: ClassVar[Callable[..., Any] | None] = None
    replace: Callable[..., Any]

    def find(self, facts: Facts) -> Iterable[Match]:
        """Places to look at, in graph order; default: every match of ``pattern``."""
        from ..graph.pattern import compiled

        if type(self).pattern is None:
            raise NotImplementedError(f"pass {self.name!r} has neither a pattern nor a find method")
        for found in compiled(type(self).pattern).find(facts.gm):
            yield Match(found.bound, found.nodes)

    def check(self, match: Any, facts: Facts) -> Refuse | None:
        """Legality beyond the shape of the match; None means go."""
        return None
