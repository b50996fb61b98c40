"""CUDA graphs around a Program: its launches are recorded once and then sent to the GPU with one call.

What a caller sees stays what it is without them.  Results are copied out of the graph's memory (unless they are inputs,
views of inputs or constants, or large: `cudagraph_halves`), so a later call never overwrites an earlier result.  Inputs
that do not move (parameters, buffers, key/value caches) are recorded where they lie, all others are copied into buffers
of the recording.  Nothing is believed about which is which: in the first calls, which run plainly, we look; and at every
later call the addresses of the inputs recorded in place are compared with those recorded.  A difference means another
recording (of the few kept, or a new one), never a wrong read.  Inputs that the graph writes are never copied.

Not recorded, with the reason in the record: graphs with dynamic sizes, numbers or CPU tensors among the inputs,
operators that wait for the GPU, collectives, training graphs (every saved activation would be copied).  Random operators
are fine: torch registers the default generator with each recording, whose offset moves as in plain calls.

With "auto" in mode "default" a graph is recorded only if measuring says that the host is what takes the time, and kept
only if it is then faster.  All recordings of a device share one memory pool and one lock, because what one leaves in
the pool another may overwrite: they run one after the other, also when they are called on several streams.

The warm-up are ordinary calls on the caller's stream in the thread that records later: that creates torch's library
handles, which are per thread.  (Running extra ones on a side stream would write key/value caches twice.)
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..codegen.program import Call, Launch, Program
from ..config import Config
from ..errors import warn_once
from ..graph.facts import overlaps
from ..record import GraphRecord
from . import cudagraph_halves
from .cudagraph_device import Boxed, Gpu, pointer
from .cudagraph_rules import dearer, obstacle, wanted, written_arguments

LIMIT = 4  # recordings kept by one Program
WARMUP = 2  # plain calls before the first recording
SMALL = 1 << 20  # bytes of an input that is copied rather than recorded anew when it moves
FEW = 10  # replays below which a recording was wasted
WASTED = 4  # wasted recordings in a row after which a Program is left alone
LARGE = 64 << 20  # bytes of a result that is worth a launch outside of the recording rather than a copy
AUTO_POOL = 1 << 30  # bytes of graph memory that "auto" may take for one recording
AUTO_HOST_US = 40.0  # host time of a plain call below which there is nothing to win
# The events of a call that waits for the host stand as far apart as its launches, and some: up to 1.4 times the host's time
# was seen where the kernels took half of it (H200).  A recording that does not pay after all is dropped by its trial.
HOST_BOUND = 2.0
COPY_BYTES_PER_US = 2e6  # of a copy on the device, reads and writes together


class Unfit(Exception):
    """This call cannot be recorded; the text says why."""


class Dearer(Unfit):
    """It could be recorded, and would be slower."""


_gpus: dict[int, Gpu] = {}
_runners: weakref.WeakSet[Any] = weakref.WeakSet()
_leaked: list[Any] = []


def gpu_of(index: int) -> Gpu:
    """The one object of a device, whose lock and memory pool all Programs share."""
    found = _gpus.get(index)
    return found if found is not None else _gpus.setdefault(index, Gpu(index))


def _after_fork() -> None:
    """CUDA does not survive a fork: the child runs plain calls (which will tell) and destroys nothing of the parent's."""
    _gpus.clear()
    for runner in list(_runners):
        _leaked.append(runner.kept)
        runner.kept, runner.last, runner.off = [], None, "the process was forked"


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


# -- recordings -------------------------------------------------------------------------------------------------------


@dataclass
class Recording:
    """One recorded graph: where its inputs lie, how results leave."""

    graph: Any
    fixed: list[int]  # positions of inputs recorded in place
    pointers: list[int]  # of all inputs; 0 for those that are copied
    moved: list[int]  # positions of inputs that are copied
    buffers: list[torch.Tensor]
    written: tuple[int, ...]  # fixed ones whose version is to be counted up
    sources: list[torch.Tensor] = field(default_factory=list)  # in the graph's memory
    layouts: list[tuple[Any, Any, torch.dtype]] = field(default_factory=list)  # of the copies of `sources`
    makers: list[Maker] = field(default_factory=list)
    plain: bool = False  # results are exactly the copies, in order
    tail: Boxed | None = None  # what runs plainly after the replay, on the values of `rest`
    rest: list[Maker] = field(default_factory=list)
    late: tuple[int, ...] = ()  # positions of its results among all
    used: int = 0
    bytes_in: int = 0
    bytes_out: int = 0


def _storage(t: torch.Tensor) -> int:
    return t.untyped_storage().data_ptr() if t.numel() else 0


Maker = Callable[[list[Any], list[Any]], Any]  # (arguments, copies) -> one result


def _value(value: Any) -> Maker:
    return lambda args, copies: value


def _argument(k: int) -> Maker:
    return lambda args, copies: args[k]


def _view_of_argument(k: int, t: torch.Tensor, base: torch.Tensor) -> Maker:
    size, stride, offset = tuple(t.shape), t.stride(), t.storage_offset() - base.storage_offset()
    return lambda args, copies: args[k].as_strided(size, stride, args[k].storage_offset() + offset)


def _copy_number(k: int) -> Maker:
    return lambda args, copies: copies[k]


def _view_of_copy(k: int, t: torch.Tensor) -> Maker:
    like, place = t.new_empty(0), (t.storage_offset(), t.shape, t.stride())
    return lambda args, copies: like.new_empty(0).set_(copies[k].untyped_storage(), *place)


def _as_it_is(t: torch.Tensor, given: Sequence[Any]) -> Maker:
    """An argument, or what lies in the memory of the graph."""
    return next((_argument(k) for k, a in enumerate(given) if a is t), _value(t))


def _plan_results(r: Recording, results: Sequence[Any], given: Sequence[Any], constants: Sequence[Any], kind: str) -> None:
    """Fill `sources`, `layouts` and `makers` for results on a device of this kind.  Raises Unfit."""
    seats = {_storage(t): k for k, t in reversed(list(enumerate(given)))}
    fixed = {_storage(t) for t in constants}
    shared: dict[int, int] = {}  # storage -> how many results lie in it
    for t in results:
        if isinstance(t, torch.Tensor):
            shared[_storage(t)] = shared.get(_storage(t), 0) + 1
    whole: dict[int, int] = {}  # storage -> position among sources of its copy

    def source(t: torch.Tensor) -> int:
        r.sources.append(t)
        r.layouts.append((t.size(), t.stride(), t.dtype))
        r.bytes_out += t.nbytes
        return len(r.sources) - 1

    def maker(t: Any) -> Maker:
        if t is None or isinstance(t, (torch.SymInt, int, float)):
            return _value(t)
        if type(t) not in (torch.Tensor, torch.nn.Parameter) or t.layout is not torch.strided:
            raise Unfit(f"it returns a {type(t).__name__} that is no plain tensor")
        for k, a in enumerate(given):
            if a is t:
                return _argument(k)
        where = _storage(t) if t.numel() else 0  # empty tensors share nothing
        if where and where in seats:
            base = given[seats[where]]
            if base.dtype != t.dtype or base.is_conj() != t.is_conj() or base.is_neg() != t.is_neg():
                raise Unfit("it returns an input as another type")
            return _view_of_argument(seats[where], t, base)
        if where and where in fixed:
            return _value(t)
        if t.device.type != kind:
            raise Unfit(f"a result lies on {t.device}")
        if not where or shared[where] == 1 and not overlaps(t.shape, t.stride()):
            return _copy_number(source(t))
        if where not in whole:  # results that share memory share it in the copy too
            with torch.inference_mode(False):
                everything = torch.empty(0, dtype=torch.uint8, device=t.device).set_(t.untyped_storage())
            whole[where] = source(everything)
        return _view_of_copy(whole[where], t)

    r.makers = [maker(t) for t in results]
    r.plain = len(r.sources) == len(results) and not whole and all(t is s for t, s in zip(results, r.sources))


# -- the runner -------------------------------------------------------------------------------------------------------


class Runner:
    """The plain callable of a Program, and its recordings.  Call it like the Program: one list, which it empties."""

    def __init__(self, call: Boxed, program: Program, record: GraphRecord, auto: bool, gpu: Any,
                 build: Callable[[Program], Boxed] | None = None) -> None:  # fmt: skip
        self.call, self.record, self.auto, self.gpu = call, record, auto, gpu
        self._program, self._build = program, build
        self._large: list[int] = []  # positions of large results
        self._halves: tuple[Boxed, Boxed, cudagraph_halves.Halves] | None = None
        self.off = ""
        self.kept: list[Recording] = []  # the last used one is the last
        self.last: Recording | None = None
        self.plain_calls = self.recordings = self.replays = self.wasted = 0
        self.steps = sum(isinstance(s, (Launch, Call)) for s in program.steps)
        self._own = len([r for r in program.results if r not in program.arguments and r != "None"])
        self._constants = [v for v in program.constants.values() if isinstance(v, torch.Tensor)]
        self._written = written_arguments(program, record)
        self._copied: set[int] = set()  # inputs found to move
        self._moves: dict[int, int] = {}
        self._stable: list[bool] = []
        self._seen: list[Any] = []
        self._threads: set[int] = set()
        self._timer: Any = None
        self._times: list[tuple[float, float]] = []
        self._trial: list[tuple[float, float]] | None = None
        record.cudagraph = "measured first, recorded if that pays" if auto else "recorded after the first calls"
        _runners.add(self)

    @property
    def counts(self) -> dict[str, int]:
        """Calls run plainly, recordings made, replays."""
        return {"plain": self.plain_calls, "recordings": self.recordings, "replays": self.replays}

    def __call__(self, args: list[Any]) -> Any:
        r = self.last
        if r is None or self.gpu.busy() or not self.gpu.same(args, r.pointers, r.fixed):
            return self._slow(args)
        if self._trial is not None:
            return self._try(r, args)
        return self._replay(r, args)

    # -- the fast way
    def _replay(self, r: Recording, args: list[Any]) -> Any:
        gpu = self.gpu
        # memory first: without any, the error comes before something was written
        copies = [torch.empty_strided(n, s, dtype=d, device=gpu.device) for n, s, d in r.layouts]
        with gpu.lock:
            gpu.order()
            if r.moved:
                _copy(r.buffers, [args[i] for i in r.moved])
            r.graph.replay()
            if copies:
                _copy(copies, r.sources)
            late = r.tail([make(args, copies) for make in r.rest]) if r.tail is not None else ()  # before another replay
            r.used += 1
            self.replays += 1
        if r.written:
            torch.autograd.graph.increment_version([args[i] for i in r.written])
        results = tuple(copies) if r.plain else tuple([make(args, copies) for make in r.makers])
        if r.late:
            found = list(results)
            for k, value in zip(r.late, late, strict=True):
                found.insert(k, value)
            results = tuple(found)
        args.clear()
        return results

    # -- everything else
    def _slow(self, args: list[Any]) -> Any:
        if self.off or self.gpu.busy():
            return self.call(args)
        with self.gpu.lock:
            found = next((r for r in reversed(self.kept) if self.gpu.same(args, r.pointers, r.fixed)), None)
            if found is not None:
                self.kept.remove(found)
                self.kept.append(found)
                self.last = found
            elif self.plain_calls >= WARMUP and threading.get_ident() in self._threads and self._decided():
                try:
                    found = self._record(args)
                except Unfit as e:
                    self._stop(str(e), warn=not isinstance(e, Dearer))
        if found is not None:
            return self._replay(found, args)
        return self.call(args) if self.off else self._watch(args)

    def _stop(self, reason: str, warn: bool = True) -> None:
        """Plain calls from now on."""
        self.off = reason
        self.last = None
        if self.kept:
            self.gpu.synchronize()  # a graph must not be destroyed while it runs
            self.kept = []
        self._seen, self._timer, self._trial = [], None, None
        self.record.cudagraph = f"not used: {reason}"
        if warn and not self.auto:
            warn_once(f"cudagraph:{reason}", f"fusionc: {self.record.name} runs without a CUDA graph: {reason}")

    def _watch(self, args: list[Any]) -> Any:
        """A plain call that looks at which inputs move and which are written, and how long it takes."""
        try:
            self._check(args)
        except Unfit as e:
            self._stop(str(e))
            return self.call(args)
        if len(self._seen) == len(args):
            self._stable = [s and ref() is a for s, ref, a in zip(self._stable, self._seen, args, strict=True)]
        else:
            self._stable = [True] * len(args)
        tensors = list(args)
        self._seen = [weakref.ref(a) for a in tensors]
        before = [-1 if a.is_inference() else a._version for a in tensors]
        timer = self.gpu.timer() if self.auto and self._timer is None and self.plain_calls else None
        if timer is not None:
            timer.start()
        results = self.call(args)
        if timer is not None:
            timer.stop()
            self._timer = timer
        self._written.update(k for k, (a, v) in enumerate(zip(tensors, before)) if v >= 0 and a._version != v)
        self._large = [k for k, t in enumerate(results) if isinstance(t, torch.Tensor) and t.nbytes >= LARGE]
        self.plain_calls += 1
        if len(self._threads) < 64:
            self._threads.add(threading.get_ident())
        return results

    def _check(self, args: Sequence[Any]) -> None:
        for a in args:
            if not isinstance(a, torch.Tensor):
                raise Unfit("it takes a number")
            if type(a) not in (torch.Tensor, torch.nn.Parameter) or a.layout is not torch.strided:
                raise Unfit(f"it takes a {type(a).__name__} that is no plain tensor")
            if a.device.type != self.gpu.kind or (a.device.index or 0) != self.gpu.index:
                raise Unfit(f"an input lies on {a.device}")

    def _decided(self) -> bool:
        """Record now?  In "auto" only once the times are known and say so."""
        if not self.auto or self.recordings:
            return True
        if self._timer is not None:
            found = self._timer.micros()
            if found is None:
                return False
            self._times.append(found)
            self._timer = None
        if len(self._times) < 2:
            return False
        host, device = min(h for h, _ in self._times), min(d for _, d in self._times)
        if host < AUTO_HOST_US:
            why = f"a plain call costs the host only {host:.0f} µs"
        elif device > HOST_BOUND * host:
            why = f"the GPU is what takes the time ({device:.0f} µs, the host {host:.0f} µs)"
        else:
            return True
        self._stop(why)
        return False

    def _try(self, r: Recording, args: list[Any]) -> Any:
        """The first replays in "auto" are timed too; a graph that is no faster is dropped."""
        trial = self._trial
        if self._timer is not None:
            found = self._timer.micros()
            if found is not None and trial is not None:
                trial.append(found)
                self._timer = None
                if len(trial) >= 3:
                    plain = min(max(t) for t in self._times)
                    graph = min(max(t) for t in trial)
                    self._trial = None
                    if graph > 0.97 * plain:
                        self._stop(f"measured: {graph:.0f} µs with, {plain:.0f} µs without")
                        return self.call(args)
                    self.record.cudagraph += f"; {graph:.0f} µs a call, {plain:.0f} µs without"
            return self._replay(r, args)
        timer = self.gpu.timer()
        timer.start()
        results = self._replay(r, args)
        timer.stop()
        self._timer = timer
        return results

    # -- recording
    def _classify(self, args: Sequence[Any]) -> tuple[list[int], list[int]]:
        """Positions of inputs to record in place and of those to copy."""
        if self.last is not None or self.kept:
            known = self.last or self.kept[-1]
            differing = [i for i in known.fixed if pointer(args[i]) != known.pointers[i]]
            for i in differing:
                self._moves[i] = self._moves.get(i, 0) + 1
            free = [i for i in differing if i not in self._written]
            if len(free) == len(differing) <= 8 and all(args[i].nbytes <= SMALL for i in free):
                self._copied.update(free)  # else it looks like another instance of the model: another recording
            self._copied.update(i for i in free if self._moves[i] >= 3)
        elif self._stable:
            self._copied.update(i for i, s in enumerate(self._stable) if not s and i not in self._written)
        moved = sorted(self._copied)
        return [i for i in range(len(args)) if i not in self._copied], moved

    def _record(self, args: list[Any]) -> Recording:
        gpu = self.gpu
        self._check(args)
        if self.kept:
            self.wasted = self.wasted + 1 if self.kept[-1].used < FEW else 0
            if self.wasted >= WASTED:
                raise Unfit("its inputs move too often for recordings to pay")
        fixed, moved = self._classify(args)
        why = dearer(self.steps, len(moved), self._own)
        if why:
            raise Dearer(why)
        bytes_in = sum(args[i].nbytes for i in moved)
        self._afford(bytes_in)
        reserved = gpu.reserved() if self.auto else 0
        given = list(args)
        try:
            with torch.inference_mode(False), torch.no_grad():
                for i in moved:
                    if overlaps(args[i].shape, args[i].stride()):
                        raise Unfit("an input that moves overlaps itself")
                    given[i] = torch.empty_strided(args[i].size(), args[i].stride(), dtype=args[i].dtype, device=gpu.device)
                    given[i].copy_(args[i].detach())  # real values: an operator may look at them on the host
            split = self._split()
            graph, results = gpu.record(split[0] if split is not None else self.call, list(given))
        except Unfit:
            raise
        except Exception as e:  # noqa: BLE001 - nothing was executed: the plain call is still right
            raise Unfit(f"recording failed: {type(e).__name__}: {' '.join(str(e).split())[:160]}") from None
        pointers = [0 if i in self._copied else pointer(a) for i, a in enumerate(args)]
        written = tuple(sorted(i for i in self._written if not args[i].is_inference()))
        r = Recording(graph, fixed, pointers, moved, [given[i] for i in moved], written, bytes_in=bytes_in)
        if split is not None:
            _, r.tail, parts = split
            rest, results = results[len(parts.early) :], results[: len(parts.early)]
            r.late, r.rest = parts.late, [_as_it_is(t, given) for t in rest]
            del rest
        _plan_results(r, results, given, self._constants, gpu.kind)
        r.plain = r.plain and not r.late
        del results
        self._afford(bytes_in + r.bytes_out)
        if self.auto and gpu.reserved() - reserved > AUTO_POOL:
            raise Unfit("its graph takes too much memory for 'auto'")
        if len(self.kept) >= LIMIT:
            gpu.synchronize()  # a graph must not be destroyed while it runs
            self.kept = self.kept[1 - LIMIT :]
        self.kept.append(r)
        self.last = r
        if self.auto and not self.recordings:
            self._trial, self._timer = [], None
        self.recordings += 1
        self._seen = []
        self.record.cudagraph = (
            f"recorded {self.recordings} × {self.steps} launches and calls: {len(fixed)} inputs in place "
            f"({len(self._written)} of them written), {len(moved)} copied ({bytes_in} B), "
            f"{len(r.sources)} results copied ({r.bytes_out} B)"
            + (f", {len(r.late)} large ones made by plain calls after it" if r.late else "")
        )
        return r

    def _split(self) -> tuple[Boxed, Boxed, cudagraph_halves.Halves] | None:
        """The Program as two callables where large results are made by its last operations."""
        if self._large and self._build is not None and self._halves is None:
            found = cudagraph_halves.cut(self._program, self._large)
            if found is not None:
                self._halves = self._build(found.head), self._build(found.tail), found
        return self._halves

    def _afford(self, copied: int) -> None:
        """In "auto" copies must be small beside the work."""
        if self.auto and self._times:
            copying, working = 2 * copied / COPY_BYTES_PER_US, min(max(t) for t in self._times)
            if copying > 0.05 * working:
                raise Unfit(f"copying inputs and results would take {copying:.0f} of {working:.0f} µs")


def _copy(to: list[torch.Tensor], source: list[torch.Tensor]) -> None:
    if len(to) == 1:
        to[0].copy_(source[0])
    else:
        torch._foreach_copy_(to, source)


def wrap(call: Boxed, program: Program, record: GraphRecord, config: Config, device: torch.device, target: str,
         build: Callable[[Program], Boxed] | None = None) -> Boxed:  # fmt: skip
    """`call`, with CUDA graphs where the options want them and the Program allows; says so in `record.cudagraph`.

    ``build`` makes the plain callable of a part of the Program.
    """
    verdict, reason = wanted(config, record.stage, device, target)
    if verdict != "no":
        reason = obstacle(program, record, verdict == "auto")
    if verdict == "no" or reason:
        record.cudagraph = f"not used: {reason}" if reason else ""
        return call
    index = device.index if device.index is not None else torch.cuda.current_device()
    runner = Runner(call, program, record, verdict == "auto", gpu_of(index), build)

    def with_graphs(args: list[Any]) -> Any:  # a function: the caller hangs attributes on it
        return runner(args)

    with_graphs.cudagraph = runner  # type: ignore[attr-defined]
    return with_graphs
