"""What a compilation did, as plain data.

Every stage appends to one ``GraphRecord``; the dump, ``fusionc.explain``, ``fusionc.report`` and the command line only
read it.  Keeping the two sides apart means that a stage never prints, and that a report never reaches into a stage.
Records hold text and numbers only: no tensors, no graph nodes, no callables, so that keeping them costs little memory
and keeps no model alive.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

KEPT_GRAPHS = 64


@dataclass
class Refusal:
    """Why a rewrite did not apply at one place (``node`` is the node's name in the graph, possibly empty)."""

    pass_name: str
    reason: str
    node: str = ""


@dataclass
class PassRecord:
    """One run of one pass. ``before``/``after`` are graph texts, kept only when a dump was asked for and it fired; ``notes``:
    what an approximate pass did at each place, with its error."""

    position: int
    name: str
    level: Literal["model", "graph"] = "graph"
    fired: int = 0
    refusals: list[Refusal] = field(default_factory=list)
    seconds: float = 0.0
    before: str | None = None
    after: str | None = None
    notes: list[str] = field(default_factory=list)


@dataclass
class KernelRecord:
    """One generated kernel. ``symbol`` is its name in the source; ``uses`` counts its launches in one run of the graph.

    ``bytes_read``, ``bytes_written`` and ``flops`` are for one launch.  ``tuning`` lists the plans that were tried:
    (plan as JSON, predicted µs, measured µs), either time None where unknown.
    """

    name: str
    symbol: str = ""
    loop_text: str = ""
    plan_json: str = ""
    source: str = ""
    language: Literal["cpp", "triton"] = "cpp"
    nodes: list[str] = field(default_factory=list)
    origins: list[str] = field(default_factory=list)
    bytes_read: int = 0
    bytes_written: int = 0
    flops: int = 0
    predicted_us: float | None = None
    measured_us: float | None = None
    from_cache: bool = False
    standalone: str = ""
    uses: int = 1
    tuning: list[tuple[str, float | None, float | None]] = field(default_factory=list)


@dataclass
class CallRecord:
    """One library (ATen) call. ``reason`` is empty for expected ones (mm, conv, sdpa), else why it was not lowered."""

    node: str
    op: str
    reason: str = ""


@dataclass
class GroupRecord:
    """Nodes that became one kernel; ``kernel`` is a ``KernelRecord.name``, inputs and outputs are node names."""

    name: str
    nodes: list[str] = field(default_factory=list)
    kernel: str = ""
    kind: str = "pointwise"
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)


@dataclass
class GraphRecord:
    """One compiled graph. ``edges`` are (producer node, consumer node) of the final graph; ``timings`` are seconds.

    An operation left to ATen for lack of a lowering is one of ``calls``, with a ``reason``; ``fallbacks`` are sentences about
    kernels and graphs that could not be built.
    ``device`` says in words what it was compiled for; ``cache`` whether its Program came from the cache or
    went there; ``cudagraph`` whether it is replayed as a CUDA graph, or why not (empty on a CPU; changes as calls are
    made); ``peak_gbs`` and ``peak_gflops`` are the copy bandwidth (GB/s)
    and float32 rate (GFLOP/s) that the cost model assumes of it, and draw the roof of the roofline plot.
    """

    name: str
    stage: Literal["inference", "forward", "backward"] = "inference"
    input_text: str = ""
    final_text: str = ""
    passes: list[PassRecord] = field(default_factory=list)
    groups: list[GroupRecord] = field(default_factory=list)
    kernels: list[KernelRecord] = field(default_factory=list)
    calls: list[CallRecord] = field(default_factory=list)
    fallbacks: list[str] = field(default_factory=list)
    program: str = ""
    repro: str = ""
    timings: dict[str, float] = field(default_factory=dict)
    edges: list[tuple[str, str]] = field(default_factory=list)
    device: str = ""
    cache: str = ""
    cudagraph: str = ""
    peak_gbs: float | None = None
    peak_gflops: float | None = None

    def left_to_aten(self) -> int:
        """How much fell back to ATen: calls with a reason, among them the nodes of kernels that failed, and whole graphs."""
        return sum(bool(c.reason) for c in self.calls) + sum(not f.startswith("kernel ") for f in self.fallbacks)

    def to_json(self) -> dict[str, Any]:
        """The record as dictionaries, lists, strings and numbers."""
        return dataclasses.asdict(self)


_lock = threading.Lock()
_kept: deque[GraphRecord] = deque(maxlen=KEPT_GRAPHS)
_collectors: list[list[GraphRecord]] = []


def name_kernels(graph: GraphRecord) -> None:
    """Give kernels that are named by their hash a name for people, made of what they compute; fill ``nodes``."""
    by_kernel: dict[str, list[GroupRecord]] = {}
    for group in graph.groups:
        by_kernel.setdefault(group.kernel, []).append(group)
    taken = {k.name for k in graph.kernels}
    for kernel in graph.kernels:
        groups = by_kernel.get(kernel.name, [])
        if groups and not kernel.nodes:
            kernel.nodes = list(groups[0].nodes)
        found = re.fullmatch(r"[km]_[0-9a-f]{8,}(_part\d+)?", kernel.name)
        if found is None or not kernel.nodes:
            continue
        part = found.group(1) or ""
        words = [re.sub(r"(_default)?(_\d+)*$", "", n).removeprefix("native_").strip("_") for n in kernel.nodes]
        words = [w for w in dict.fromkeys(words) if w and w not in _PLAIN_WORDS] or words[:1]
        many = "many_" if found.group().startswith("m_") else ""
        base = many + "_".join(words if len(words) <= 4 else [*words[:3], f"and_{len(words) - 3}_more"])[:60]
        name, number = base + part, 1
        while name in taken:
            name, number = f"{base}_{number}{part}", number + 1
        taken.add(name)
        kernel.name = name
        for group in groups:
            group.kernel = name


# nodes that only rename or reshape say nothing about a kernel
_PLAIN_WORDS = frozenset(
    "getitem view reshape unsqueeze squeeze expand permute transpose t clone slice select detach alias to_copy".split()
)


def remember(graph: GraphRecord) -> None:
    """Add a finished graph to the session's report and to every open ``collect()``."""
    name_kernels(graph)
    with _lock:
        _kept.append(graph)
        for collector in _collectors:
            collector.append(graph)


def report() -> list[GraphRecord]:
    """The graphs that fusionc compiled in this process, oldest first, at most the newest ``KEPT_GRAPHS``."""
    with _lock:
        return list(_kept)


def forget() -> None:
    """Empty the session's report."""
    with _lock:
        _kept.clear()


@contextlib.contextmanager
def collect() -> Iterator[list[GraphRecord]]:
    """Yield a list that receives every graph remembered (by any thread) while the block runs."""
    mine: list[GraphRecord] = []
    with _lock:
        _collectors.append(mine)
    try:
        yield mine
    finally:
        with _lock:
            # by identity: two open collectors that are both empty compare equal
            _collectors[:] = [c for c in _collectors if c is not mine]
