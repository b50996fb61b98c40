"""GPU: the workloads of the table under eager, Inductor's modes and fusionc: right, timed, and how close to the limit.

    python -m benchmarks.gpu --json gpu.json --svg gpu.svg                       # eager, Inductor, + graphs, fusionc
    python -m benchmarks.gpu --json gpu.json --resume --warm                     # go on where the last call stopped
    python -m benchmarks.gpu --backends eager,inductor:max-autotune,fusionc:max-autotune --limit 600 --only llama
    python -m benchmarks.gpu --compile-only --backends aot_eager,inductor,fusionc # first calls, cold and warm, nothing else
    python -m benchmarks.gpu --models --json models.json                         # 20 further models
    python -m benchmarks.gpu --conv-models --json conv_models.json               # 8 convolutional networks
    python -m benchmarks.gpu --render gpu.json models.json --svg gpu.svg         # table and plot of earlier runs
    python -m benchmarks.gpu --device cpu --tiny --backends eager,aot_eager      # the same code paths without a GPU

Each workload runs in a process of its own under a time limit, so that a crash, a hang or a poisoned CUDA context costs
one row.  Within it eager comes first; each other backend is compiled (timed: first call with cold caches), checked on
inputs that it was not compiled with against float64 (float32 where float64 does not fit) and then timed with
``triton.testing.do_bench`` (CUDA events, L2 flushed, median).  Whatever has no CUDA graphs of its own, eager included, is
timed twice, as it is and recorded as one graph by hand, and the better time counts (``plain_ms`` and ``step_graph_ms`` in
the JSON).  Peak memory is that of the plain calls, weights included.
``--warm`` then starts a fresh process for each backend with the caches that the first one filled, and times its first call.
With ``--compile-only`` the cold call, too, is the first thing that a process of its own does, with caches of its own: no
backend finds what another one has imported or traced; nothing else is measured.

The JSON is rewritten after each workload; with ``--resume`` what it has is kept, and a row that lacks backends is measured
with eager again for these, so that a table of hours can be made in calls of minutes.

With ``--jobs`` > 1 processes overlap in importing, building and compiling; a file lock lets one time while no other
checks, but another's compilation may launch a kernel now and then: only the default of one job is for publishing.
With ``--gpus`` the jobs are spread over several GPUs, each row on one of them, with a lock for each.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import functools
import gc
import itertools
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from html import escape
from typing import Any

from .common import (
    cache_environment,
    cell,
    check,
    compile_bytecode,
    compiled,
    counts,
    first_line,
    geomean,
    machine,
    matches,
    not_compiled,
    records,
    reference,
    relative_error,
    step,
    table,
    write_json,
)

MARK = "@@result "


# ------------------------------------------------------------------------------------------------------- child process


_holding = False


@contextmanager
def locked(path: str, shared: bool) -> Iterator[None]:
    """Holds the machine-wide lock: shared while using the GPU for anything but timing, alone while timing.

    Inside itself it does nothing (a tuner that measures in a call under a lock).
    """
    global _holding
    if _holding:
        yield
        return
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        _holding = True
        try:
            yield
        finally:
            _holding = False


class _ResetBetween:
    """Given to ``do_bench`` as a tensor whose gradient is to be dropped: called between runs, outside the events."""

    reset: Callable[[], None]

    def __init__(self, reset: Callable[[], None]) -> None:
        object.__setattr__(self, "reset", reset)

    def __setattr__(self, name: str, value: Any) -> None:
        self.reset()


LEAST = 15  # samples of a median


def bench(run: Callable[[], Any], reset: Callable[[], None] | None, device: str, repeat_ms: int) -> float:
    """Median milliseconds of ``run``; on a CPU a few calls by the host's clock (to exercise this file, not to publish).

    Long calls get as many samples as `LEAST`, after some that bring the GPU to the clock that its power limit allows: with two
    or three, the side that was timed after a pause won (lm_head_ce_train: 0.96 to 1.07 of each other in five runs).
    """
    if device == "cuda":
        import torch
        from triton.testing import do_bench

        (reset or (lambda: None))()
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        once = 1e3 * (time.perf_counter() - start)
        between = [_ResetBetween(reset)] if reset else None
        warmup, measured = max(25, 5 * once), max(repeat_ms, LEAST * once)
        return do_bench(run, warmup=warmup, rep=measured, grad_to_none=between, return_mode="median")
    samples = []
    for _ in range(3):
        if reset:
            reset()
        start = time.perf_counter()
        run()
        samples.append(1e3 * (time.perf_counter() - start))
    return statistics.median(samples)


def captured(run: Callable[[], Any]) -> Callable[[], Any]:
    """A call, or a training step with its backward, recorded as one CUDA graph by hand; returns its replay."""
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run()

    def replay() -> Any:
        graph.replay()
        return kept

    return replay


def workloads() -> dict[str, Any]:
    """All workloads by name: the table's, then the further models."""
    return {w.name: w for some in sets().values() for w in some}


def sets() -> dict[str, Any]:
    """The sets of workloads by the option that chooses them; the table's has none."""
    from .conv_models import CONV_MODELS, OTHER
    from .gpu_models import MODELS
    from .gpu_workloads import WORKLOADS

    return {"": WORKLOADS, "models": MODELS, "conv": CONV_MODELS, "conv-other": OTHER}


def prime() -> None:
    """Imports and starts what every backend shares, so that the first one to compile does not pay for all."""
    import torch

    torch.compile(lambda x: x + 1, backend="aot_eager")(torch.ones(2))
    torch._dynamo.reset()


def first_call_s(name: str, backend: str, device: str, size: str, around: contextlib.AbstractContextManager[Any]) -> float:
    """Seconds of the first call of one backend in this process, with the caches as they are, made inside ``around``."""
    import torch

    from .gpu_workloads import Where

    case = workloads()[name].build(Where(device, size))
    inputs = case.inputs(100)
    prime()
    (case.reset or (lambda: None))()
    start = time.perf_counter()
    with around:
        step(case, compiled(case.fn, backend), inputs)
        if device == "cuda":
            torch.cuda.synchronize()
    return time.perf_counter() - start


def first_call(name: str, backend: str, device: str, size: str) -> None:
    """Times the first call of one backend in this process; prints a result line."""
    seconds = first_call_s(name, backend, device, size, contextlib.nullcontext())
    found: dict[str, Any] = {"backend": backend, "first_call_s": seconds}
    if backend.startswith("fusionc"):  # was it a warm one?
        from fusionc import program_cache, warm

        found["hits"] = {"programs": dict(program_cache.stats), "graphs": dict(warm.stats)}
        found["report"] = counts(backend, [])
    print(MARK + json.dumps(found), flush=True)


def child(name: str, backends: list[str], device: str, size: str, repeat_ms: int, lock: str) -> None:
    """Measures one workload and prints a result line after each backend, so that a later crash loses nothing."""
    import torch

    from .gpu_workloads import Where

    cuda = device == "cuda"
    workload = workloads()[name]

    def say(backend: str, **values: Any) -> None:
        print(MARK + json.dumps({"backend": backend, **values}), flush=True)

    def sync() -> None:
        if cuda:
            torch.cuda.synchronize()

    def prepared() -> tuple[Any, ...]:
        with locked(lock, shared=True):
            case = workload.build(Where(device, size))
            first, probe = case.inputs(100), case.inputs(7)
            ref = [t.detach() for t in reference(case, probe)]
            (case.reset or (lambda: None))()
            eager = step(case, case.fn, probe)
            eager_check = vars(check(eager, eager, ref))
            sync()
        return case, first, probe, ref, eager, eager_check

    # the pause is outside of the lock: who has the memory needs it to get on
    case, first, probe, ref, eager, eager_check = with_patience(prepared, torch.OutOfMemoryError, torch.cuda.empty_cache)
    reset = case.reset or (lambda: None)
    if cuda:
        torch.cuda.empty_cache()
    prime()
    waits = tune_alone(lock) if cuda else lambda: 0.0
    for backend in backends:
        result: dict[str, Any] = {}
        try:
            fn = compiled(case.fn, backend)
            before_records = records(backend)
            reset()
            # modes that replay CUDA graphs own their outputs until the next step
            graphs = ":" in backend and not backend.endswith("no-cudagraphs")

            def run(fn: Callable[..., Any] = fn, inputs: Any = first, graphs: bool = graphs) -> list[Any]:
                if graphs:
                    torch.compiler.cudagraph_mark_step_begin()
                return step(case, fn, inputs)

            start, waited = time.perf_counter(), waits()
            run()
            sync()
            if backend != "eager":
                result["compile_s"] = time.perf_counter() - start - (waits() - waited)
            with locked(lock, shared=True):
                for _ in range(2 if graphs else 0):  # warm-up and recording of the graphs
                    reset()
                    run()
                reset()
                out = run(inputs=probe)
                result["check"] = vars(check(out, eager, ref)) if backend != "eager" else eager_check
                del out
                sync()
            result["report"] = counts(backend, before_records)
            if unfit := not_compiled(result["report"]):
                say(backend, **result, error=unfit)  # not timed: it would be eager's time under another name
                torch._dynamo.reset()
                continue
            say(backend, **result)  # known so far, should the timing fail
            with locked(lock, shared=False):
                held = tensors_bytes(ref) + tensors_bytes(eager)  # kept for the checks only
                result |= timings(run, case.reset, device, repeat_ms, held, record=not graphs)
        except Exception as error:
            traceback.print_exc()
            result["error"] = first_line(error)
        say(backend, **result)
        fn = run = None  # type: ignore[assignment]  # with what they own: the next backend would be charged for it
        torch._dynamo.reset()
        gc.collect()
        if cuda:
            torch._C._cuda_clearCublasWorkspaces()  # the recording's own
            torch.cuda.empty_cache()


def with_patience(
    work: Callable[[], Any], trouble: type[Exception], clean: Callable[[], None], tries: int = 5, pause: float = 8.0
) -> Any:
    """``work()``, again after a pause where it meets ``trouble``: float64 references of several processes share one memory."""
    for _ in range(tries - 1):
        try:
            return work()
        except trouble:
            pass
        gc.collect()  # (after the handler, which holds the frames of what failed)
        clean()
        time.sleep(pause)
    return work()


def timings(
    run: Callable[[], list[Any]], reset: Callable[[], None] | None, device: str, repeat_ms: int, held: int, record: bool
) -> dict[str, Any]:
    """Peak memory of one call and median milliseconds; where ``record``, also of the call recorded as a CUDA graph.

    ``held``: bytes that are not the call's, left out of the peak.
    """
    import torch

    result: dict[str, Any] = {}
    cuda = device == "cuda"
    again = reset or (lambda: None)
    again()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        result["peak_gb"] = (torch.cuda.max_memory_allocated() - held) / 1e9
        result["step_gb"] = (torch.cuda.max_memory_allocated() - before) / 1e9
        again()
    result["ms"] = bench(run, reset, device, repeat_ms)
    if cuda and record and reset is None:
        result["plain_ms"] = result["ms"]
        try:
            replay, plain = captured(run), [t.detach().clone() for t in run()]
            for mine, other in zip(replay(), plain, strict=True):
                if relative_error(mine.detach(), other) > 0.05:
                    raise RuntimeError("the recording gives other results than the call")
            result["step_graph_ms"] = bench(replay, None, device, repeat_ms)
            result["ms"] = min(result["ms"], result["step_graph_ms"])
        except Exception as error:  # noqa: BLE001 - not every call can be captured
            result["step_graph_error"] = first_line(error)
    return result


def tune_alone(lock: str) -> Callable[[], float]:
    """Lets tuners, ours and Inductor's, measure only while nobody else uses the GPU.

    Returns a clock of the seconds that they have waited for it.
    """
    from torch._inductor.runtime.benchmarking import benchmarker

    from fusionc.runtime import tune

    waited = [0.0]

    def alone(measure: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(measure)
        def run(*args: Any, **more: Any) -> Any:
            start = time.monotonic()
            with locked(lock, shared=False):
                wait = time.monotonic() - start
                waited[0] += wait
                if "deadline" in more:  # ours stops at a time of the clock
                    more["deadline"] += wait
                return measure(*args, **more)

        return run

    tune.race = alone(tune.race)
    inductors: Any = type(benchmarker)  # all that it measures, one candidate at a time
    inductors.benchmark_gpu = alone(inductors.benchmark_gpu)
    return lambda: waited[0]


def tensors_bytes(values: list[Any]) -> int:
    """Bytes of the distinct storages of some tensors."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in values}.values())


# ------------------------------------------------------------------------------------------------------ parent process


class Runner:
    """Starts the children, keeps their lines, and writes the JSON after each."""

    def __init__(self, args: argparse.Namespace, backends: list[str], folder: str, known: dict[str, Any]) -> None:
        self.args, self.backends, self.folder = args, backends, folder
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        self.gpus = (visible.split(",") if visible else [str(i) for i in range(args.gpus)])[: args.gpus]
        self.turn = itertools.count()
        self.mine = threading.local()  # what a thread's children see
        self.start = time.monotonic()
        self.rows: dict[str, dict[str, Any]] = known
        self.guard = threading.Lock()
        self.facts: dict[str, Any] = machine()

    def take_gpu(self) -> None:
        """Give the calling thread one of the GPUs, in turns."""
        self.mine.gpu = self.gpus[next(self.turn) % len(self.gpus)]

    def run(self, name: str, limit_ms: float | None) -> None:
        """Measure what is missing of one row."""
        old = self.rows.get(name, {"backends": {}})
        lacking = [b for b in self.backends if b not in old["backends"]]
        cold = [b for b in self.backends if b != "eager" and "warm_s" not in old["backends"].get(b, {})]
        if not lacking and not (self.args.warm and cold and self.args.cache):  # caches of an earlier call are gone
            return
        left = self.left()
        if left < 20:
            with self.guard:
                self.rows.setdefault(name, {"name": name, "limit_ms": limit_ms, "backends": {}})
            return  # no error: a later call with --resume finds it missing
        row: dict[str, Any] = {"name": name, "limit_ms": limit_ms, "backends": dict(old["backends"])}
        caches = self.args.cache or os.path.join(self.folder, name)
        arguments = ["--child", name, "--device", self.args.device, "--size", self.args.size]
        if lacking and self.args.compile_only:
            for b in lacking:
                self.first_calls(row, b, [*arguments, "--first-call", b], os.path.join(caches, b.replace(":", "-")))
        elif lacking:
            # eager is timed again beside what is new: ratios are taken within one process
            wanted = [b for b in self.backends if b in lacking or b == "eager"]
            lock = os.path.join(self.folder, f"lock-{self.mine.gpu}")
            more = ["--backends", ",".join(wanted), "--repeat-ms", str(self.args.repeat_ms), "--lock", lock]
            self.spawn(row, [*arguments, *more], caches, min(self.args.limit, left))
            cause = row.pop("error", "ended without a result")
            if left > self.args.limit or not cause.startswith("stopped"):  # else a later call may have the time
                for b in wanted:
                    row["backends"].setdefault(b, {"error": f"not reached: {cause}"})
        for b in cold if self.args.warm and (lacking or self.args.cache) else ():
            if "ms" in row["backends"].get(b, {}):
                row["backends"][b] |= self.warm_call(b, [*arguments, "--first-call", b], caches)
        with self.guard:
            self.rows[name] = row
            spent = time.monotonic() - self.start
            told = ", ".join(
                f"{b} {cell(v.get('ms'))} ms" + ("" if b == "eager" else f" (compile {cell(v.get('compile_s'))} s)")
                for b, v in row["backends"].items()
            )
            print(f"[{spent:4.0f} s] {name}: {told}", flush=True)
            self.save()

    def left(self) -> float:
        """Seconds of the budget."""
        return float(self.args.budget - (time.monotonic() - self.start))

    def first_calls(self, row: dict[str, Any], b: str, arguments: list[str], caches: str) -> None:
        """The first call of a process that finds no cache, then of one that finds what the other has left."""
        if self.left() < 20:
            return
        cold = self.call(b, arguments, caches)
        if "first_call_s" in cold:
            cold["compile_s"] = cold.pop("first_call_s")
            cold |= {} if b in ("aot_eager", "floor") else self.warm_call(b, arguments, caches)  # these keep nothing
        row["backends"][b] = cold

    def warm_call(self, b: str, arguments: list[str], caches: str) -> dict[str, Any]:
        """Seconds of the first call of a fresh process with these caches, and what it found in them."""
        if self.left() < 10:
            return {}
        found = self.call(b, arguments, caches)
        if "error" in found:
            return {"warm_error": found["error"]}
        return {"warm_s": found["first_call_s"], "warm_hits": found.get("hits"), "warm_report": found.get("report")}

    def call(self, b: str, arguments: list[str], caches: str) -> dict[str, Any]:
        """What one child says of a backend, or its error."""
        trial: dict[str, Any] = {"backends": {}}
        self.spawn(trial, arguments, caches, min(self.args.limit, self.left()))
        return dict(trial["backends"].get(b, {"error": trial.get("error", "ended without a result")}))

    def spawn(self, row: dict[str, Any], arguments: list[str], caches: str, limit_s: float) -> None:
        """Run one child and merge its lines into ``row``."""
        command = [sys.executable, "-m", "benchmarks.gpu", *arguments]
        environment = os.environ | cache_environment(caches) | {"TOKENIZERS_PARALLELISM": "false"}
        if self.args.device == "cuda":
            jobs = self.args.jobs
            environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or jobs) // jobs)))
            if jobs > 1:  # each process would start as many as the machine has cores for
                from fusionc.runtime import compile_workers

                environment.setdefault("FUSIONC_WORKERS", str(compile_workers.count() // jobs))
            if len(self.gpus) > 1:
                environment["CUDA_VISIBLE_DEVICES"] = self.mine.gpu
        with tempfile.TemporaryFile("w+") as errors:
            process = subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
            )
            try:
                out, _ = process.communicate(timeout=limit_s)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                out, _ = process.communicate()
                row["error"] = f"stopped after {limit_s:.0f} s"
            for line in out.splitlines():
                if line.startswith(MARK):
                    result = json.loads(line[len(MARK) :])
                    row["backends"][result.pop("backend")] = result
            errors.seek(0)
            text = errors.read()
        if process.returncode and "error" not in row:
            last = next((t for t in reversed(text.splitlines()) if t.strip()), "")
            row["error"] = f"exit status {process.returncode}: {last}"[:200]
        if self.args.logs:
            with open(os.path.join(self.args.logs, arguments[1] + ".log"), "a") as log:
                log.write(text + "\n" + out)

    def save(self) -> None:
        kept = ("backends", "device", "size", "repeat_ms", "jobs")
        settings = {k: v for k, v in vars(self.args).items() if k in kept}
        write_json(self.args.json, {"machine": self.facts, "settings": settings, "rows": list(self.rows.values())})


# --------------------------------------------------------------------------------------------------------------- output


def best_peer(row: dict[str, Any], peers: list[str]) -> float | None:
    """The least time of ``peers`` that were right."""
    found = [row["backends"].get(p, {}) for p in peers]
    return min((v["ms"] for v in found if v.get("ms") and v.get("check", {}).get("ok", True)), default=None)


def problems_of(row: dict[str, Any], backends: list[str]) -> list[str]:
    """What went wrong in a row, in words."""
    out = []
    for b in backends:
        verdict = row["backends"].get(b, {})
        text = verdict.get("error") or ""
        shown = verdict.get("check")
        if not text and shown and not shown["ok"]:
            text = f"WRONG {shown['error']:.2g} vs eager {shown['eager_error']:.2g} {shown['note']}"
        if text:
            out.append(f"{row['name']} {b}: {text[:150]}")
    return out


def compact_table(rows: list[dict[str, Any]], backends: list[str], most: int = 9900) -> str:
    """One line a workload and the sums that the goals are stated in; at most ``most`` characters."""
    ours = next((b for b in backends if b.startswith("fusionc")), None)
    peers = [b for b in backends if b != ours]
    inductors = [b for b in peers if b.startswith("inductor")]
    short = {
        b: b.replace("inductor", "ind").replace("reduce-overhead", "ro").replace("max-autotune", "max")
        for b in backends
    }
    headers = ["workload", *(f"{short[b]} ms" for b in backends), "limit"]
    if ours:
        headers += ["×best", "% limit", "err×", "GB", "×peer GB"]
    headers += [f"{short[b]} s" for b in backends if b != "eager"]
    warmed = [b for b in backends if any(r["backends"].get(b, {}).get("warm_s") for r in rows)]
    headers += [f"{short[b]} warm" for b in warmed]
    body, problems, slower = [], [], []
    for row in rows:
        found = {b: row["backends"].get(b, {}) for b in backends}
        line: list[Any] = [row["name"], *(found[b].get("ms") for b in backends), row.get("limit_ms")]
        if ours:
            ms, best, limit = found[ours].get("ms"), best_peer(row, peers), row.get("limit_ms")
            memory = [found[b]["peak_gb"] for b in inductors or peers if found[b].get("peak_gb")]
            mine = found[ours].get("peak_gb")
            gain = best / ms if best and ms else None
            if gain and gain < 1 / 1.03:
                slower.append(f"{row['name']} {gain:.2f}")
            line += [gain, 100 * limit / ms if limit and ms else None, found[ours].get("check", {}).get("ratio"), mine]
            line += [mine / min(memory) if memory and mine else None]
        line += [found[b].get("compile_s") for b in backends if b != "eager"]
        line += [found[b].get("warm_s") for b in warmed]
        wrong = problems_of(row, backends)
        problems += wrong
        body.append([*line, "FAIL" if wrong else "ok"])
    lines = [table([*headers, ""], body)]
    for b in backends if not ours else peers:
        pairs = [(r["backends"].get(b, {}).get("ms"), r["backends"].get(ours or "eager", {}).get("ms")) for r in rows]
        gains = [x / y for x, y in pairs if x and y]
        if gains and b != (ours or "eager"):
            said = (
                f"{ours} is {cell(geomean(gains))}× {b}" if ours else f"{b} is {cell(1 / (geomean(gains) or 1))}× eager"
            )
            lines.append(f"{said} (geometric mean of {len(gains)})")
    if ours and inductors:
        gains = [best / r["backends"][ours]["ms"] for r in rows
                 if (best := best_peer(r, inductors)) and r["backends"].get(ours, {}).get("ms")]  # fmt: skip
        if gains:
            lines.append(f"{ours} is {cell(geomean(gains))}× Inductor's better mode (geometric mean of {len(gains)})")
        for key, word in (("compile_s", "cold"), ("warm_s", "warm")):
            pairs = [(r["backends"].get(ours, {}).get(key), r["backends"].get(inductors[0], {}).get(key)) for r in rows]
            both = [(x, y) for x, y in pairs if x and y]
            if both:
                mine, theirs = (sum(p[i] for p in both) for i in (0, 1))
                lines.append(f"{word} compile: {cell(mine)} s, {inductors[0]} {cell(theirs)} s: {cell(mine / theirs)}×")
        three = [[r["backends"].get(b, {}).get("compile_s") for b in (ours, "aot_eager", inductors[0])] for r in rows]
        if whole := [t for t in three if all(t)]:
            mine, floor, theirs = (sum(t[i] for t in whole) for i in range(3))
            lines.append(
                f"cold above aot_eager's {cell(floor)} s: {cell((mine - floor) / theirs)} of the whole of {inductors[0]}'s"
            )
    if ours:
        lines.append(f"slower than the best peer by more than 3 %: {', '.join(slower) or 'none'}")
        parts = [r["backends"].get(ours, {}).get("report") or {} for r in rows]
        reasons = sorted({f for p in parts for f in p.get("fallbacks", [])})
        if reasons:
            lines.append(f"{len(reasons)} kinds of fallback: {'; '.join(reasons)[:600]}")
    return "\n".join([*lines, *problems])[:most]


def plot(rows: list[dict[str, Any]], backends: list[str], title: str) -> str:
    """An SVG: for each workload how many times faster than eager each backend is, on a logarithmic axis."""
    shown = [b for b in backends if b != "eager"]
    colours = ["#9aa5b1", "#5b7083", "#c98f2b", "#1f77b4", "#2ca02c"]
    paint = {b: "#d1495b" if b.startswith("fusionc") else colours[i % len(colours)] for i, b in enumerate(shown)}
    data = [(r, r["backends"].get("eager", {}).get("ms")) for r in rows]
    data = [(r, e) for r, e in data if e and any(r["backends"].get(b, {}).get("ms") for b in shown)]
    gains = [e / r["backends"][b]["ms"] for r, e in data for b in shown if r["backends"].get(b, {}).get("ms")]
    if not gains:
        return ""
    low, high = (
        math.floor(min(0.0, *(math.log2(g) for g in gains))),
        math.ceil(max(1.0, *(math.log2(g) for g in gains))),
    )
    left, width, bar = 170, 640, 9
    step_y = bar * len(shown) + 9
    height = 62 + step_y * len(data)
    x = lambda g: left + (math.log2(g) - low) / (high - low) * width  # noqa: E731
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 70}" height="{height}" font-family="sans-serif">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="8" y="17" font-size="13">{escape(title)}</text>',
    ]
    for i, b in enumerate(shown):
        out.append(f'<rect x="{8 + 190 * i}" y="26" width="10" height="10" fill="{paint[b]}"/>')
        out.append(f'<text x="{22 + 190 * i}" y="35" font-size="11">{escape(b)}</text>')
    for k in range(low, high + 1):
        at, label = x(2.0**k), f"{2**k}×" if k >= 0 else f"1/{2**-k}×"
        dark = "#333" if k == 0 else "#ddd"
        out.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="42" y2="{height - 16}" stroke="{dark}"/>')
        out.append(f'<text x="{at:.1f}" y="{height - 4}" font-size="10" text-anchor="middle">{label}</text>')
    for i, (r, eager) in enumerate(data):
        top = 46 + i * step_y
        out.append(
            f'<text x="{left - 8}" y="{top + step_y / 2}" font-size="11" text-anchor="end">{escape(r["name"])}</text>'
        )
        for j, b in enumerate(shown):
            ms = r["backends"].get(b, {}).get("ms")
            if ms:
                a, z = sorted((x(1.0), x(eager / ms)))
                at = top + j * bar
                out.append(
                    f'<rect x="{a:.1f}" y="{at}" width="{max(z - a, 1):.1f}" height="{bar - 1}" fill="{paint[b]}"/>'
                )
                out.append(f'<text x="{z + 3:.1f}" y="{at + 8}" font-size="8" fill="#555">{eager / ms:.2f}</text>')
    return "\n".join([*out, "</svg>", ""])


def read(paths: list[str]) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Rows by name and the last machine of result files; a file that is not there has none."""
    rows: dict[str, dict[str, Any]] = {}
    facts: dict[str, Any] = {}
    for path in paths:
        if os.path.exists(path):
            with open(path) as file:
                content = json.load(file)
            rows |= {r["name"]: r for r in content["rows"]}
            facts = content["machine"]
    return rows, facts


def show(rows: list[dict[str, Any]], backends: list[str], facts: dict[str, Any], svg: str | None) -> None:
    print()
    print(compact_table(rows, backends))
    if svg:
        words = f"times eager's speed, {facts.get('gpu', 'CPU')}, torch {facts.get('torch')}, {facts.get('date')}"
        with open(svg, "w") as file:
            file.write(plot(rows, backends, words))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", help="workloads whose name contains one of these words")
    parser.add_argument("--models", action="store_true", help="the 20 further models instead of the table's workloads")
    parser.add_argument("--conv-models", nargs="?", const="conv", choices=("conv", "conv-other"),
                        help="8 convolutional networks; conv-other: in the layout that is worse for the peers")  # fmt: skip
    parser.add_argument(
        "--backends", default="eager,inductor,inductor:reduce-overhead,fusionc", help="name or name:mode"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--size", choices=("full", "quick", "tiny"), default="full")
    parser.add_argument("--quick", dest="size", action="store_const", const="quick", help="about an eighth of the work")
    parser.add_argument("--tiny", dest="size", action="store_const", const="tiny", help="sizes for a CPU")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time; more than 1 is not for publishing")
    parser.add_argument("--gpus", type=int, default=1, help="GPUs that the jobs are spread over")
    parser.add_argument("--limit", type=float, default=240, help="seconds for one process")
    parser.add_argument("--budget", type=float, default=540, help="seconds for everything; what is left is not started")
    parser.add_argument("--repeat-ms", type=int, default=150, help="do_bench's measuring time")
    parser.add_argument(
        "--cache", default=None, help="folder for compiler caches; default a fresh one a workload (cold)"
    )
    parser.add_argument("--warm", action="store_true", help="also the first call of a second process, caches filled")
    parser.add_argument("--compile-only", action="store_true",
                        help="nothing but first calls, cold (unless --cache names a folder in use) and warm")  # fmt: skip
    parser.add_argument("--json", default=None, help="result file, rewritten after each workload")
    parser.add_argument("--resume", action="store_true", help="keep what --json has; measure only what it lacks")
    parser.add_argument("--render", nargs="+", metavar="JSON", help="measure nothing: table and plot of result files")
    parser.add_argument("--svg", default=None, help="write a plot")
    parser.add_argument("--logs", default=None, help="folder for one log a workload (tracebacks)")
    parser.add_argument("--list", action="store_true", help="name the workloads and stop")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--first-call", help=argparse.SUPPRESS)
    parser.add_argument("--lock", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    backends = [b for b in args.backends.split(",") if b != "eager" or not args.compile_only]
    if args.first_call:
        first_call(args.child, args.first_call, args.device, args.size)
        return 0
    if args.child:
        child(args.child, backends, args.device, args.size, args.repeat_ms, args.lock)
        return 0
    if args.render:
        rows, facts = read(args.render)
        show([r for r in rows.values() if matches(r["name"], args.only)], backends, facts, args.svg)
        return 0
    chosen = [w for w in sets()["models" if args.models else args.conv_models or ""] if matches(w.name, args.only)]
    if args.list or not chosen:
        print("\n".join(workloads()))
        return 0 if args.list else 2
    if args.logs:
        os.makedirs(args.logs, exist_ok=True)
    compile_bytecode()
    known = read([args.json])[0] if args.resume and args.json else {}
    with tempfile.TemporaryDirectory(prefix="bench-gpu-") as folder:
        runner = Runner(args, backends, folder, known)
        with ThreadPoolExecutor(args.jobs, initializer=runner.take_gpu) as pool:
            done = [pool.submit(runner.run, w.name, w.limit_ms if args.size == "full" else None)
                    for w in sorted(chosen, key=lambda w: -w.weight)]  # fmt: skip
            for future in done:
                future.result()
    rows = [runner.rows[w.name] for w in chosen if w.name in runner.rows]
    others = [r for name, r in runner.rows.items() if name not in {w.name for w in chosen}]
    runner.rows = {r["name"]: r for r in [*others, *rows]}
    runner.save()
    show(rows, backends, runner.facts, args.svg)
    missing = [r["name"] for r in rows if any(b not in r["backends"] for b in backends)]
    print(f"{args.size} size, {args.jobs} at a time, {time.monotonic() - runner.start:.0f} s", end="")
    print(f"; {len(missing)} not done (--budget), go on with --resume" if missing else "")
    return 1 if missing or any(problems_of(r, backends) for r in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
