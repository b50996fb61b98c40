"""GPU: every baseline workload under eager and fusionc, right and timed; for one CUDA device.

    python -m benchmarks.gpu_check --json "$OUT/gpu.json" --logs "$OUT"      # eager and fusionc
    python -m benchmarks.gpu_check --backends eager,fusionc,inductor,inductor:reduce-overhead --jobs 1
    python -m benchmarks.gpu_check --device cpu --tiny --backends eager,aot_eager     # the same code paths without a GPU

Each workload runs in a process of its own under a time limit, so that a crash, a hang or a poisoned CUDA context costs
one row.  Within it eager comes first; each other backend is compiled (timed: first call with cold caches), checked on
inputs that it was not compiled with against float64 (float32 where float64 does not fit) and then timed with
``triton.testing.do_bench`` (CUDA events, L2 flushed, median).  Peak memory is that of the timed steps, weights included.

With ``--jobs`` > 1 processes overlap in importing, building and compiling; a file lock lets one time while no other
checks, but another's compilation may launch a kernel now and then: use ``--jobs 1`` for figures to publish.
"""

from __future__ import annotations

import argparse
import fcntl
import json
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
from typing import Any

from .common import (
    cache_environment,
    cell,
    check,
    compiled,
    counts,
    first_line,
    geomean,
    machine,
    matches,
    not_compiled,
    records,
    reference,
    step,
    table,
    write_json,
)

MARK = "@@result "


# ------------------------------------------------------------------------------------------------------- child process


@contextmanager
def locked(path: str, shared: bool) -> Iterator[None]:
    """Holds the machine-wide lock: shared while using the GPU for anything but timing, alone while timing."""
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield


class _ResetBetween:
    """Given to ``do_bench`` as a tensor whose gradient is to be dropped: called between runs, outside the events."""

    reset: Callable[[], None]

    def __init__(self, reset: Callable[[], None]) -> None:
        object.__setattr__(self, "reset", reset)

    def __setattr__(self, name: str, value: Any) -> None:
        self.reset()


def bench(run: Callable[[], Any], reset: Callable[[], None] | None, device: str, repeat_ms: int) -> float:
    """Median milliseconds of ``run``; on a CPU a few calls by the host's clock (to exercise this file, not to publish)."""
    if device == "cuda":
        from triton.testing import do_bench

        between = [_ResetBetween(reset)] if reset else None
        return do_bench(run, warmup=25, rep=repeat_ms, grad_to_none=between, return_mode="median")
    samples = []
    for _ in range(3):
        if reset:
            reset()
        start = time.perf_counter()
        run()
        samples.append(1e3 * (time.perf_counter() - start))
    return statistics.median(samples)


def child(name: str, backends: list[str], device: str, size: str, repeat_ms: int, lock: str) -> None:
    """Measures one workload and prints a result line after each backend, so that a later crash loses nothing."""
    import torch

    from .gpu_workloads import WORKLOADS, Where

    cuda = device == "cuda"
    workload = next(w for w in WORKLOADS if w.name == name)

    def say(backend: str, **values: Any) -> None:
        print(MARK + json.dumps({"backend": backend, **values}), flush=True)

    def sync() -> None:
        if cuda:
            torch.cuda.synchronize()

    with locked(lock, shared=True):
        case = workload.build(Where(device, size))
        first, probe = case.inputs(100), case.inputs(7)
        reset = case.reset or (lambda: None)
        ref = [t.detach() for t in reference(case, probe)]
        reset()
        eager = step(case, case.fn, probe)
        eager_check = vars(check(eager, eager, ref))
        sync()
    if cuda:
        torch.cuda.empty_cache()
    for backend in backends:
        result: dict[str, Any] = {}
        try:
            fn = compiled(case.fn, backend)
            before_records = records(backend)
            reset()
            graphs = ":" in backend  # modes that replay CUDA graphs own their outputs until the next step

            def run(fn: Callable[..., Any] = fn, inputs: Any = first, graphs: bool = graphs) -> list[Any]:
                if graphs:
                    torch.compiler.cudagraph_mark_step_begin()
                return step(case, fn, inputs)

            start = time.perf_counter()
            run()
            sync()
            if backend != "eager":
                result["compile_s"] = time.perf_counter() - start
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
                reset()
                if cuda:
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
                    before = torch.cuda.memory_allocated()
                    run()
                    sync()
                    held = tensors_bytes(ref) + tensors_bytes(eager)  # kept for the checks only
                    result["peak_gb"] = (torch.cuda.max_memory_allocated() - held) / 1e9
                    result["step_gb"] = (torch.cuda.max_memory_allocated() - before) / 1e9
                    reset()
                result["ms"] = bench(run, case.reset, device, repeat_ms)
        except Exception as error:
            traceback.print_exc()
            result["error"] = first_line(error)
        say(backend, **result)
        torch._dynamo.reset()


def tensors_bytes(values: list[Any]) -> int:
    """Bytes of the distinct storages of some tensors."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in values}.values())


# ------------------------------------------------------------------------------------------------------ parent process


class Runner:
    """Starts the children, keeps their lines, and writes the JSON after each."""

    def __init__(self, args: argparse.Namespace, environment: dict[str, str], lock: str) -> None:
        self.args, self.environment, self.lock = args, environment, lock
        self.start = time.monotonic()
        self.rows: dict[str, dict[str, Any]] = {}
        self.guard = threading.Lock()

    def run(self, name: str, limit_ms: float | None) -> None:
        left = self.args.budget - (time.monotonic() - self.start)
        row: dict[str, Any] = {"name": name, "limit_ms": limit_ms, "backends": {}}
        if left < 10:
            row["error"] = "not started: out of time (--budget)"
        else:
            self.spawn(row, min(self.args.limit, left))
        with self.guard:
            self.rows[name] = row
            spent = time.monotonic() - self.start
            told = ", ".join(
                f"{b} {cell(v.get('ms'))} ms" + ("" if b == "eager" else f" (compile {cell(v.get('compile_s'))} s)")
                for b, v in row["backends"].items()
            )
            print(f"[{spent:4.0f} s] {name}: {told} {row.get('error', '')}".rstrip(), flush=True)
            self.save()

    def spawn(self, row: dict[str, Any], limit_s: float) -> None:
        args = self.args
        command = [sys.executable, "-m", "benchmarks.gpu_check", "--child", row["name"], "--backends", args.backends]
        command += [
            "--device",
            args.device,
            "--size",
            args.size,
            "--repeat-ms",
            str(args.repeat_ms),
            "--lock",
            self.lock,
        ]
        log = open(os.path.join(args.logs, row["name"] + ".log"), "w") if args.logs else subprocess.DEVNULL  # noqa: SIM115
        with tempfile.TemporaryFile("w+") as errors:
            process = subprocess.Popen(
                command, env=self.environment, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
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
        if not isinstance(log, int):
            with log:
                log.write(text + "\n" + out)

    def save(self) -> None:
        settings = {k: v for k, v in vars(self.args).items() if k not in ("logs", "json", "child", "lock")}
        write_json(self.args.json, {"machine": self.facts(), "settings": settings, "rows": list(self.rows.values())})

    def facts(self) -> dict[str, Any]:
        if not hasattr(self, "_facts"):
            self._facts = machine()
        return self._facts


def compact_table(rows: list[dict[str, Any]], backends: list[str]) -> str:
    """One line a workload, under 10,000 characters for all of them with up to four backends."""
    others = [b for b in backends if b != "eager"]
    body, problems = [], []
    for row in rows:
        found = {b: row["backends"].get(b, {}) for b in backends}
        line: list[Any] = [row["name"], *(found[b].get("ms") for b in backends), row["limit_ms"]]
        for b in others:
            mine, eager = found[b].get("ms"), found["eager"].get("ms") if "eager" in found else None
            line += [eager / mine if mine and eager else None, found[b].get("compile_s")]
            line += [found[b].get("check", {}).get("ratio")]
        line += [found[b].get("peak_gb") for b in backends]
        state = "ok"
        for b in backends:
            verdict = found[b]
            text = verdict.get("error") or ""
            if not text and verdict.get("check") and not verdict["check"]["ok"]:
                shown = verdict["check"]
                text = f"WRONG {shown['error']:.2g} vs eager {shown['eager_error']:.2g} {shown['note']}"
            if text:
                state = "FAIL"
                problems.append(f"{row['name']} {b}: {text[:150]}")
        if row.get("error"):
            state = "FAIL"
            problems.append(f"{row['name']}: {row['error'][:150]}")
        body.append([*line, state])
    headers = ["workload", *(f"{b} ms" for b in backends), "limit"]
    for b in others:
        short = b.replace("inductor", "ind").replace("reduce-overhead", "ro").replace("max-autotune", "max")
        headers += [f"{short}: ×eager", "cold s", "err×"]
    headers += [f"{b} GB" for b in backends] + [""]
    lines = [table(headers, body)]
    for b in others:
        pairs = [(r["backends"].get("eager", {}).get("ms"), r["backends"].get(b, {}).get("ms")) for r in rows]
        gains = [x / y for x, y in pairs if x and y]
        mean = geomean(gains)
        lines.append(f"{b}: {len(gains)} of {len(rows)} timed, geometric mean {cell(mean)}× eager")
        parts = [r["backends"].get(b, {}).get("report") or {} for r in rows]
        if any(parts):
            reasons = sorted({f for p in parts for f in p.get("fallbacks", [])})
            kernels = sum(p.get("kernels", 0) for p in parts)
            lines.append(f"{b}: {kernels} kernels; {len(reasons)} kinds of fallback: {'; '.join(reasons)[:600]}")
    return "\n".join([*lines, *problems])[:9900]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", help="workloads whose name contains one of these words")
    parser.add_argument("--backends", default="eager,fusionc", help="comma-separated; name or name:mode")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--size", choices=("full", "quick", "tiny"), default="full")
    parser.add_argument("--quick", dest="size", action="store_const", const="quick", help="about an eighth of the work")
    parser.add_argument("--tiny", dest="size", action="store_const", const="tiny", help="sizes for a CPU")
    parser.add_argument("--jobs", type=int, default=None, help="processes at a time; default 4 on CUDA, 1 on a CPU")
    parser.add_argument("--limit", type=float, default=150, help="seconds for one workload")
    parser.add_argument("--budget", type=float, default=400, help="seconds for everything; what is left is not started")
    parser.add_argument("--repeat-ms", type=int, default=150, help="do_bench's measuring time")
    parser.add_argument("--cache", default=None, help="folder for compiler caches; default a fresh one (cold)")
    parser.add_argument("--json", default=None, help="result file, rewritten after each workload")
    parser.add_argument("--logs", default=None, help="folder for one log a workload (tracebacks)")
    parser.add_argument("--list", action="store_true", help="name the workloads and stop")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--lock", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    backends = args.backends.split(",")
    if args.child:
        child(args.child, backends, args.device, args.size, args.repeat_ms, args.lock)
        return 0

    from .gpu_workloads import WORKLOADS

    chosen = [w for w in WORKLOADS if matches(w.name, args.only)]
    if args.list or not chosen:
        print("\n".join(w.name for w in WORKLOADS))
        return 0 if args.list else 2
    if args.logs:
        os.makedirs(args.logs, exist_ok=True)
    jobs = args.jobs or (4 if args.device == "cuda" else 1)
    with tempfile.TemporaryDirectory(prefix="bench-gpu-") as folder:
        lock = os.path.join(folder, "lock")
        environment = os.environ | cache_environment(args.cache or folder) | {"TOKENIZERS_PARALLELISM": "false"}
        if args.device == "cuda":
            threads = max(1, (os.cpu_count() or jobs) // jobs)
            environment.setdefault("OMP_NUM_THREADS", str(threads))
        runner = Runner(args, environment, lock)
        with ThreadPoolExecutor(jobs) as pool:
            done = [pool.submit(runner.run, w.name, w.limit_ms if args.size == "full" else None)
                    for w in sorted(chosen, key=lambda w: -w.weight)]  # fmt: skip
            for future in done:
                future.result()
    rows = [runner.rows[w.name] for w in chosen]
    runner.rows = {r["name"]: r for r in rows}
    runner.save()
    print()
    print(compact_table(rows, backends))
    print(f"{args.size} size, {jobs} at a time, {time.monotonic() - runner.start:.0f} s")
    bad = [r for r in rows if "error" in r or any("error" in v or not v["check"]["ok"] for v in r["backends"].values())]
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
