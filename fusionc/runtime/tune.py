"""Which of several ways to do the same thing is the fastest here: measured once, remembered, never a risk.

Custom operators (``fusionc::*``) have several implementations: a library call, kernels of ours, each with several plans.
``choose`` times them on the caller's real tensors at the first call with a key and remembers the winner in the process
and in the private cache on disk.  The measuring itself is in ``race``, a function of a sampler and a clock alone, so
that its decisions are tested without a GPU; the tuner of generated kernels uses the same race.

How the times are taken: candidates in turns, so that a drift of clocks hits all alike; CUDA events around each launch;
L2 filled with other data before it.  The GPU sleeps until the host has queued a batch of launches, and if it woke too soon
the batch is taken again after a longer sleep: slow host code (threads that compile hold Python's lock) is not taken for a
slow kernel.  Rounds of 3, 9 and 27 samples; after each, those that cannot win any more leave
(after Freeze-Thaw and Hyperband's idea of spending measurements on survivors only).  The first candidate is the default
and stays unless another is clearly faster: noise must not change decisions.

A candidate that raises or gives wrong results loses only itself.  One that corrupts the CUDA context cannot be survived
in one process: operators offer only kernels that are memory-safe by construction.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from fusionc.errors import warn_once

from . import turns
from .cache import Cache, open_cache
from .environment import environment_key, source_fingerprint

__all__ = ["Outcome", "Sampler", "Wanted", "choose", "configure", "cuda_sampler", "fastest", "forget", "history", "level",
           "likely", "race"]  # fmt: skip

T = TypeVar("T")
Sampler = Callable[[Sequence[int], int], dict[int, list[float]]]
"""``f(candidates, n)``: n times in ms for each of the candidates, taken in turns."""

KIND = "choice"
LEVELS = ("off", "default", "max")
ROUNDS = (3, 9, 27)
MARGIN = 0.03  # how much faster than the first candidate another must be
_CYCLES = 2e9  # of the GPU in a second, about
_AHEAD = 50e-6  # seconds of the host that a sample may take, at first
_SLEEP = 20e-3  # the longest sleep, about
_QUEUE = 64  # samples of a batch: of up to a dozen launches each, of which the driver holds a thousand
_TRIES = 3  # of a batch
_HOPELESS = 1.5  # times the leader's best: out after three samples


# -- settings of the process --------------------------------------------------------------------------------------


@dataclass
class _Settings:
    level: str | None = None  # None: FUSIONC_TUNE, else "default"
    cache: bool | str = True


_settings = _Settings()
_memory: dict[tuple[str, torch.device], tuple[Sequence[Any], int]] = {}
_history: list[Outcome] = []
_measuring = threading.RLock()  # one race at a time; a candidate may itself call an operator that chooses


def configure(level: str | None = None, cache: bool | str | None = None) -> None:
    """Set how much to measure ("off", "default", "max") and which cache to use; the backend calls it when it compiles.

    Operators run outside of any one compilation, so this holds for the process; the latest call counts.  What was
    chosen before stays.
    Raises ValueError for an unknown level.
    """
    if level is not None and level not in LEVELS:
        raise ValueError(f"tuning level must be one of {', '.join(LEVELS)}, not {level!r}")
    _settings.level = level if level is not None else _settings.level
    _settings.cache = cache if cache is not None else _settings.cache


def level() -> str:
    """How much is measured: "off", "default" or "max"."""
    if _settings.level is not None:
        return _settings.level
    word = os.environ.get("FUSIONC_TUNE", "").lower()
    return word if word in LEVELS else "off" if word in ("0", "no", "false") else "default"


def forget() -> None:
    """Drop what this process remembers (the disk keeps its entries) and all settings."""
    _memory.clear()
    _history.clear()
    _settings.level, _settings.cache = None, True


# -- the race -----------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What a race found.  ``ms[i]`` is candidate i's median, None if it was not timed; ``failed[i]`` says why it lost."""

    key: str
    names: list[str]
    winner: int = 0
    ms: list[float | None] = field(default_factory=list)
    failed: dict[int, str] = field(default_factory=dict)
    seconds: float = 0.0
    proven: bool = False  # the winner ran, and its results were right if they were looked at


def stand_ins(*tensors: torch.Tensor | None) -> list[Any]:
    """Normal values with the sizes and strides of each tensor, for the ``check`` of `choose`: the caller's own may hold NaN or
    infinities, which no two kernels spread alike, or be all zeros. From a generator of their own: the caller's random numbers
    stay."""
    found: list[Any] = []
    for i, t in enumerate(tensors):
        if t is not None:
            generator = torch.Generator(t.device).manual_seed(i)
            span = 1 + sum((n - 1) * step for n, step in zip(t.shape, t.stride())) if t.numel() else 0
            t = torch.empty(span, dtype=t.dtype, device=t.device).normal_(generator=generator).as_strided(t.shape, t.stride())
        found.append(t)
    return found


def agree(got: torch.Tensor, want: torch.Tensor) -> bool:
    """Within 2 % of each other (a wrong kernel is far off, rounding far below)."""
    got, want = got.float(), want.float()
    return bool((got - want).norm() <= 0.02 * want.norm())


def race(
    alive: Sequence[int],
    sample: Sampler,
    *,
    deadline: float,
    clock: Callable[[], float] = time.monotonic,
    rounds: Sequence[int] = ROUNDS,
) -> tuple[list[int], dict[int, float]]:
    """The candidates ``alive`` from best to worst, and the medians of those that were timed.

    The first of ``alive`` is the incumbent: it comes first unless another is more than MARGIN faster.  No further round
    starts after ``deadline`` (of ``clock``).
    """
    left = list(alive)
    times: dict[int, list[float]] = {c: [] for c in left}
    for i, n in enumerate(rounds):
        if i and (len(left) < 2 or clock() > deadline):
            break
        for c, got in sample(left, n).items():
            times[c] += got
        middle = {c: statistics.median(times[c]) for c in left if times[c]}
        if not middle:
            break
        leader = min(middle, key=lambda c: (middle[c], left.index(c)))
        bound = middle[leader] + 2 * _spread(times[leader], middle[leader])
        best = min(times[leader])
        left = [
            c
            for c in left
            if c == leader
            or c in middle
            and middle[c] - 2 * _spread(times[c], middle[c]) <= bound
            and min(times[c]) <= _HOPELESS * best
        ]
    medians = {c: statistics.median(t) for c, t in times.items() if t}
    order = sorted(medians, key=lambda c: (c not in left, medians[c], list(alive).index(c)))
    if order and alive[0] in medians and medians[alive[0]] <= medians[order[0]] * (1 + MARGIN):
        order.remove(alive[0])
        order.insert(0, alive[0])
    return order, medians


def _spread(values: Sequence[float], middle: float) -> float:
    """Median distance from the median; at least 0.5 %, for three samples often agree by chance."""
    return max(statistics.median(abs(v - middle) for v in values), 0.005 * middle)


def cuda_sampler(
    launches: Sequence[Callable[[], Any]], device: torch.device, *, cold: bool = True, repeat: int = 1
) -> Sampler:
    """Samples of ``launches[i]()`` on ``device``'s current stream by CUDA events.

    ``cold``: L2 is filled with other data before each sample.  ``repeat``: one sample is the mean of so many launches in
    a row, replayed as a CUDA graph (for kernels of a few µs that allocate nothing).  A launch that raises is given no
    samples.
    """
    filler: torch.Tensor | None = None
    if cold:
        l2 = int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)) or 64 << 20
        with contextlib.suppress(torch.cuda.OutOfMemoryError):
            filler = torch.empty(2 * l2, dtype=torch.int8, device=device)
    calls: dict[int, Callable[[], Any]] = {}
    ahead, tries = _AHEAD, _TRIES

    def queue(left: Sequence[int], turns: int, dead: set[int]) -> dict[int, list[tuple[torch.cuda.Event, torch.cuda.Event]]]:
        events: dict[int, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {c: [] for c in left}
        for _ in range(turns):
            for c in left:
                if c in dead:
                    continue
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                try:
                    if filler is not None:
                        filler.zero_()
                    start.record()
                    calls[c]()
                    end.record()
                except Exception:  # noqa: BLE001 - it loses, whatever it was
                    dead.add(c)
                    continue
                events[c].append((start, end))
        return events

    def batch(left: Sequence[int], turns: int, dead: set[int]) -> dict[int, list[float]]:
        nonlocal ahead, tries
        for _ in range(tries):
            awake, begun = torch.cuda.Event(), time.perf_counter()
            torch.cuda._sleep(int(_CYCLES * ahead * turns * len(left)))
            awake.record()
            events = queue(left, turns, dead)
            late = awake.query()
            took = (time.perf_counter() - begun) / (turns * len(left))
            torch.cuda.synchronize(device)
            if not late:
                ahead = max(_AHEAD, 2 * took)  # less again after the first call of a library, or another thread's work
                break
            ahead = min(1.5 * max(ahead, took), _SLEEP)
        else:  # a launch that waits for the GPU: no sleep is long enough
            ahead, tries = _AHEAD, 1
        return {c: [a.elapsed_time(b) / repeat for a, b in pairs] for c, pairs in events.items()}

    def sample(candidates: Sequence[int], n: int) -> dict[int, list[float]]:
        found: dict[int, list[float]] = {c: [] for c in candidates}
        dead: set[int] = set()
        for c in candidates:
            if c not in calls:
                try:
                    calls[c] = launches[c] if repeat == 1 else _replayed(launches[c], repeat)
                except Exception:  # noqa: BLE001 - it loses, whatever it was
                    dead.add(c)
        while n > 0 and (left := [c for c in candidates if c not in dead]):
            turns = max(1, min(n, int(min(_QUEUE, _SLEEP / ahead) / len(left))))
            for c, times in batch(left, turns, dead).items():
                found[c] += times
            n -= turns
        return {c: [] if c in dead else times for c, times in found.items()}

    return sample


def _replayed(launch: Callable[[], Any], repeat: int) -> Callable[[], Any]:
    """``launch`` so many times in one CUDA graph: without the host's part, which is longer than a small kernel."""
    graph, aside = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            for _ in range(repeat):
                launch()
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(aside)
    return graph.replay


# -- choosing -----------------------------------------------------------------------------------------------------


def choose(
    key: str,
    candidates: Sequence[T],
    run: Callable[[T], Any],
    *,
    device: torch.device,
    seconds: float = 2.0,
    check: Callable[[T], bool] | None = None,
    prepare: Callable[[T], Any] | None = None,
    sampler: Callable[[Sequence[Callable[[], Any]], torch.device], Sampler] = cuda_sampler,
    most: int | None = None,
) -> T:
    """The fastest of ``candidates`` for ``key``, timed on the first call with that key and remembered.

    key         the operator's name, shapes, dtypes and classes of strides: all that may change which one is fastest
    candidates  plain values with a stable repr (strings, tuples, frozen dataclasses); the first is a good default.
                Pass the same list object at each call where you can: the look-up then costs well under a microsecond
    run         launches one candidate on the caller's tensors, on the current stream; may be called many times, so it
                must not change its inputs (an update that gives the same state each time is fine)
    seconds     about how long measuring may take in all; after it no further candidate is started. `prepare` is not in it:
                on a busy machine compiling would use it up, and the untimed default win for good
    check       is the result of this candidate right (see `stand_ins` and `agree`)?  Asked for the winner, then for the next
    prepare     compiles a candidate without launching it; called for all of them side by side, in threads
    most        how many of them, from the first on, to compile and time unless the level is "max"; the others only where
                none of these is of use

    Returns ``candidates[0]`` without measuring where there is nothing to choose or measuring is impossible: one
    candidate, no CUDA device, a CUDA graph being captured, tracing or fake tensors, tuning switched off.  A candidate
    that raises loses; if all do, the first is returned and its error is the caller's.  If none is proven right, the
    fastest that is not proven wrong is returned, else the first that runs, and it is forgotten with the process.
    Raises IndexError for no candidates.
    """
    known = _memory.get((key, device))
    if known is not None and (known[0] is candidates or known[0] == candidates):
        return candidates[known[1]]
    words = level()
    if len(candidates) == 1 or words == "off" or not _possible(device):
        return candidates[0]
    names = [repr(c) for c in candidates]
    most = tried(candidates, most)
    index = _recall(key, names, most, device)
    if index is None:
        if _capturing(device):
            return candidates[0]
        with _measuring, torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            known = _memory.get((key, device))  # another thread may have been faster
            if known is not None and known[0] == candidates:
                return candidates[known[1]]
            index = _measured(key, names, candidates, most, run, device, seconds, check, prepare, sampler, words)
    _memory[key, device] = (candidates, index)
    return candidates[index]


def tried(candidates: Sequence[Any], most: int | None) -> int:
    """How many of them ``choose`` compiles and times at the level that is set."""
    return len(candidates) if most is None or level() == "max" else min(most, len(candidates))


@dataclass(frozen=True)
class Wanted:
    """What a first call of an operator will pass to ``choose``, known before from shapes alone."""

    key: str
    candidates: Sequence[Any]
    prepare: Callable[[Any], Any]
    most: int | None = None


def fastest(
    at: Wanted, launch: Callable[..., torch.Tensor], library: Callable[..., torch.Tensor], *tensors: torch.Tensor | None,
    check: Callable[[Any], bool] | None = None,
) -> torch.Tensor:  # fmt: skip
    """``launch(how, *tensors)`` of the fastest candidate ``how`` that agrees with ``library(*tensors)`` on stand-ins, or of
    which ``check`` says that it is right.

    The first tensor says on which device.
    """
    first = tensors[0]
    assert first is not None

    def right(how: Any) -> bool:
        made = stand_ins(*tensors)
        return agree(launch(how, *made), library(*made))

    how = choose(at.key, at.candidates, lambda each: launch(each, *tensors), device=first.device, check=check or right,
                 prepare=at.prepare, most=at.most)  # fmt: skip
    return launch(how, *tensors)


def likely(wanted: Wanted, device: torch.device) -> list[Any]:
    """The candidates that ``choose`` will compile for it: the winner where one is known, the default where nothing is
    measured, else all that are timed."""
    candidates = wanted.candidates
    known = _memory.get((wanted.key, device))
    if known is not None and known[0] == candidates:
        return [candidates[known[1]]]
    if len(candidates) == 1 or level() == "off":
        return [candidates[0]]
    most = tried(candidates, wanted.most)
    index = _recall(wanted.key, [repr(c) for c in candidates], most, device)
    return list(candidates[:most]) if index is None else [candidates[index]]


def history() -> list[Outcome]:
    """The races of this process so far."""
    return list(_history)


def _possible(device: torch.device) -> bool:
    """Are there real tensors on a GPU?  Not under tracing, and not under fake tensors or another dispatch mode."""
    return device.type == "cuda" and not torch._C._len_torch_dispatch_stack() and not torch.compiler.is_compiling()


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _measured(
    key: str,
    names: list[str],
    candidates: Sequence[T],
    most: int,
    run: Callable[[T], Any],
    device: torch.device,
    seconds: float,
    check: Callable[[T], bool] | None,
    prepare: Callable[[T], Any] | None,
    sampler: Callable[[Sequence[Callable[[], Any]], torch.device], Sampler],
    words: str,
) -> int:
    """Index of the winner, after waiting for another process that measures the same key."""
    budget = seconds * (5 if words == "max" else 1)
    cache, entry_key = _cache(), _entry_key(key, names, most, device)
    # the other process compiles first, for up to a minute
    with cache.lock(KIND, entry_key, timeout=2 * budget + 60) if entry_key else contextlib.nullcontext(False):
        index = _recall(key, names, most, device)
        if index is not None:
            return index
        outcome = Outcome(key, names)
        start = time.monotonic()
        try:
            with turns.first():
                for seats in (range(most), range(most, len(candidates))):
                    if seats and _run_race(outcome, seats, candidates, run, device, budget, check, prepare, sampler):
                        break
        except Exception as e:  # noqa: BLE001 - measuring is never worth a failure; the default is a good one
            warn_once(f"tune:{key}", f"fusionc could not compare implementations of {key} ({type(e).__name__}: {e})")
            return 0
        outcome.seconds = time.monotonic() - start
        _history.append(outcome)
        if entry_key and outcome.proven:
            with contextlib.suppress(TypeError, ValueError):
                cache.put(KIND, entry_key, {"index": outcome.winner, "name": names[outcome.winner], "ms": outcome.ms})
        return outcome.winner


def _run_race(
    outcome: Outcome,
    seats: Sequence[int],
    candidates: Sequence[T],
    run: Callable[[T], Any],
    device: torch.device,
    budget: float,
    check: Callable[[T], bool] | None,
    prepare: Callable[[T], Any] | None,
    sampler: Callable[[Sequence[Callable[[], Any]], torch.device], Sampler],
) -> bool:
    """Race the candidates at ``seats``, and write down what was found; False if none of them is of use."""
    failed = outcome.failed
    if prepare is not None:
        from .launch import compile_many

        ready = prepare
        for i, r in zip(seats, compile_many([partial(ready, candidates[i]) for i in seats]), strict=True):
            if isinstance(r, Exception):
                failed[i] = _first_line(r)
    deadline = time.monotonic() + budget
    alive: list[int] = []
    for i in seats:
        if i in failed:
            continue
        if alive and time.monotonic() > deadline:
            failed[i] = "no time left"
            continue
        try:
            run(candidates[i])
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            alive.append(i)
        except Exception as e:  # noqa: BLE001 - out of shared memory, a compiler's error, not supported: it loses
            failed[i] = _first_line(e)
    launches = [partial(run, c) for c in candidates]
    order, ms = race(alive, sampler(launches, device), deadline=deadline) if len(alive) > 1 else (alive, {})
    outcome.ms = [ms.get(i, was) for i, was in enumerate(outcome.ms or [None] * len(candidates))]
    wrong: set[int] = set()
    best = [*order, *(i for i in alive if i not in order)]
    for i in best:
        try:
            if check is None or check(candidates[i]):
                outcome.winner, outcome.proven = i, True
                return True
            failed[i] = "gives other results"
            wrong.add(i)
        except Exception as e:  # noqa: BLE001 - no memory for another set of tensors, say
            failed[i] = _first_line(e)
    usable = [i for i in best if i not in wrong]
    outcome.winner = usable[0] if usable else alive[0] if alive else outcome.winner
    return bool(usable)


def _first_line(e: Exception) -> str:
    return f"{type(e).__name__}: {e}".splitlines()[0][:200]


# -- the disk -----------------------------------------------------------------------------------------------------


def _cache() -> Cache:
    return open_cache(_settings.cache)


def binaries() -> Path | None:
    """The folder for what operators compile with Triton, beside what is known of their races; None: Triton's own."""
    return _cache().folder("triton")


def _entry_key(key: str, names: Sequence[str], most: int, device: torch.device) -> dict[str, Any] | None:
    """Key of the entry; None for candidates whose repr holds an address, which no other process could match."""
    text = "\0".join((*names, str(most)))
    if " at 0x" in text:
        return None
    return {
        "choice": key,
        "candidates": hashlib.sha256(text.encode()).hexdigest(),
        "environment": environment_key(str(device)),
        "source": source_fingerprint(("ops", "codegen", "runtime", "targets")),
    }


def _recall(key: str, names: Sequence[str], most: int, device: torch.device) -> int | None:
    """The remembered winner on disk; None for none or for an entry that does not make sense."""
    try:
        entry_key = _entry_key(key, names, most, device)
        payload = _cache().get(KIND, entry_key) if entry_key else None
        if payload is None:
            return None
        index = payload.get("index")
        if type(index) is int and 0 <= index < len(names) and payload.get("name") == names[index]:
            return index
    except Exception:  # noqa: BLE001 - any trouble is a miss
        return None
    return None
