"""CPU speed side by side: eager, Inductor and fusionc in one process, taking turns.

    python -m benchmarks.cpu                       # all workloads, writes benchmarks/results/cpu.json
    python -m benchmarks.cpu --only norm softmax   # workloads whose name contains one of these
    python -m benchmarks.cpu --quick               # smaller sizes, fewer rounds

Method: float32, two threads, fresh random inputs, several input sets in rotation so that they do not stay in the last
cache, each backend checked against float64 before it is timed.  One round is one turn of every backend; a turn's figure
is the median of its calls, a backend's time the median of its rounds, and a ratio the median of the rounds' ratios.
"Cold compile" is the first call (tracing, compiling and one run) with empty caches made for this run.  Inductor's first
C++ build in a process probes the instruction set and precompiles torch's headers (about a minute, once a machine): a
trivial function is compiled with every backend first, outside the figures, and its time is printed
(``--count-warmup`` adds it to the totals).
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from typing import Any

import torch

from . import common
from .common import Case, cell
from .cpu_workloads import WORKLOADS, Workload

DEFAULT_JSON = "benchmarks/results/cpu.json"


def warm_up(backends: list[str]) -> dict[str, Any]:
    """First use of each backend on a trivial function, in seconds; a message where the backend does not work at all."""
    seconds: dict[str, Any] = {}
    x = torch.randn(4, 64)
    for spec in backends:
        start = time.perf_counter()
        try:
            before = common.records(spec)
            common.compiled(lambda v: (v * 2).relu().sum(-1), spec)(x)
            unfit = common.not_compiled(common.counts(spec, before))
            seconds[spec] = unfit or time.perf_counter() - start
        except Exception as error:
            seconds[spec] = common.first_line(error)
        torch._dynamo.reset()
    return seconds


def measure(workload: Workload, backends: list[str], size: str, rounds: int, turn: float) -> dict[str, Any]:
    """Builds, checks and times one workload; a backend that fails is reported and left out of the timing."""
    case: Case = workload.build(size)
    row: dict[str, Any] = {"name": workload.name, "group": workload.group, "note": case.note, "backends": {}}
    sets = common.input_sets(case, 100)
    probe = case.inputs(7)  # its own seed: what is checked is none of the inputs that were compiled with
    reset = case.reset or (lambda: None)

    reset()
    ref = common.reference(case, probe)
    reset()
    eager = common.step(case, case.fn, probe)
    calls = {}
    for spec in backends:
        result: dict[str, Any] = {}
        row["backends"][spec] = result
        try:
            fn = common.compiled(case.fn, spec)
            before = common.records(spec)
            reset()
            start = time.perf_counter()
            common.step(case, fn, sets[0])
            if spec != "eager":
                result["compile_s"] = time.perf_counter() - start
            reset()
            result["check"] = vars(common.check(common.step(case, fn, probe), eager, ref))
            result["report"] = common.counts(spec, before)
            if unfit := common.not_compiled(result["report"]):
                result["error"] = unfit
                continue  # not timed: it would be eager's time under another name
            calls[spec] = common.host_timer(case, fn, sets)
            calls[spec](0)  # once more: lazily built parts
        except Exception as error:
            result["error"] = common.first_line(error)
            calls.pop(spec, None)
    del ref, eager
    for spec, medians in common.interleave(calls, rounds, turn).items():
        row["backends"][spec]["rounds_ms"] = [1e3 * v for v in medians]
        row["backends"][spec]["ms"] = 1e3 * statistics.median(medians)
    torch._dynamo.reset()
    return row


def ratio(row: dict[str, Any], over: str, under: str) -> float | None:
    """How many times faster ``under`` is than ``over``: median of the rounds' ratios."""
    a, b = (row["backends"].get(k, {}).get("rounds_ms") for k in (over, under))
    return statistics.median(x / y for x, y in zip(a, b)) if a and b else None


def summary(rows: list[dict[str, Any]], backends: list[str]) -> dict[str, Any]:
    """Geometric means of the speed-ups between all pairs, over all workloads and over each group, and the worst."""
    result: dict[str, Any] = {}
    for over in backends:
        for under in backends:
            if over == under:
                continue
            pairs = [(r["name"], r["group"], v) for r in rows if (v := ratio(r, over, under)) is not None]
            if pairs:
                worst = min(pairs, key=lambda p: p[2])
                result[f"{under} over {over}"] = {
                    "all": common.geomean(v for _, _, v in pairs),
                    "model": common.geomean(v for _, g, v in pairs if g == "model"),
                    "pointwise": common.geomean(v for _, g, v in pairs if g == "pointwise"),
                    "worst": {"name": worst[0], "ratio": worst[2]},
                    "count": len(pairs),
                }
    return result


def print_rows(rows: list[dict[str, Any]], backends: list[str]) -> None:
    """The table, one line a workload."""
    others = [b for b in backends if b != "eager"]
    pairs = [(o, u) for u in others for o in ("eager", "inductor") if o in backends and o != u]
    headers = ["workload", *(f"{b} ms" for b in backends), *(f"{u} vs {o}" for o, u in pairs)]
    headers += [f"{b} cold s" for b in others] + [f"{b} err×" for b in others]
    body, problems = [], []
    for row in rows:
        found = row["backends"]
        body.append(
            [row["name"], *(found[b].get("ms") for b in backends), *(ratio(row, o, u) for o, u in pairs)]
            + [None if "error" in found[b] else found[b].get("compile_s") for b in others]
            + [None if "error" in found[b] else found[b].get("check", {}).get("ratio") for b in others]
        )
        for b in backends:
            if "error" in found[b]:
                problems.append(f"{row['name']} {b}: {found[b]['error']}")
            elif not found[b]["check"]["ok"]:
                problems.append(f"{row['name']} {b}: WRONG, {found[b]['check']}")
    print(common.table(headers, body))
    for line in problems:
        print(line)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", help="workloads whose name contains one of these words")
    parser.add_argument("--backends", default="eager,inductor,fusionc", help="comma-separated; name or name:mode")
    parser.add_argument("--rounds", type=int, default=None, help="default 7, with --quick 3")
    parser.add_argument("--turn", type=float, default=0.15, help="seconds of one backend's turn")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="smaller sizes and fewer rounds: no figures to publish")
    parser.add_argument("--tiny", action="store_true", help="tests only: sizes of a few dozen elements")
    parser.add_argument(
        "--count-warmup", action="store_true", help="add each backend's one-time start to its compile total"
    )
    parser.add_argument("--json", default=None, help=f"result file; default {DEFAULT_JSON} for a full run")
    parser.add_argument("--list", action="store_true", help="name the workloads and stop")
    args = parser.parse_args(argv)
    chosen = [w for w in WORKLOADS if common.matches(w.name, args.only)]
    if args.list or not chosen:
        print("\n".join(f"{w.name:24}{w.group}" for w in WORKLOADS))
        return 0 if args.list else 2

    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # for OpenMP runtimes that kernels bring along later
    torch.set_num_threads(args.threads)
    size = "tiny" if args.tiny else "quick" if args.quick else "full"
    rounds = args.rounds or (3 if size != "full" else 7)
    backends = args.backends.split(",")
    whole = size == "full" and not args.only
    path = args.json or (DEFAULT_JSON if whole else None)

    rows: list[dict[str, Any]] = []
    start = time.perf_counter()
    with common.cold_caches():
        starts = warm_up([b for b in backends if b != "eager"])
        for spec, value in starts.items():
            print(
                f"first use of {spec}: "
                + (f"{value:.1f} s (outside the figures)" if isinstance(value, float) else value)
            )
        for workload in chosen:
            rows.append(measure(workload, backends, size, rounds, args.turn))
            said = ", ".join(f"{b} {cell(v.get('ms'))} ms" for b, v in rows[-1]["backends"].items())
            print(f"  {workload.name}: {said}", flush=True)
    print()
    print_rows(rows, backends)
    means = summary(rows, backends)
    print()
    pairs = [(p, m) for p, m in means.items() if "inductor" in p or p.endswith("over eager")]
    print(common.table(["geometric mean of", "all", "model", "pointwise", "worst", "n"],
                       [[p, m["all"], m["model"], m["pointwise"], f"{m['worst']['name']} {m['worst']['ratio']:.2f}", m["count"]]
                        for p, m in pairs if not p.startswith("eager")]))  # fmt: skip
    totals = {}
    for spec in starts:
        seconds = [v["compile_s"] for r in rows if "compile_s" in (v := r["backends"][spec]) and "error" not in v]
        extra = starts[spec] if args.count_warmup and isinstance(starts[spec], float) else 0.0
        totals[spec] = sum(seconds) + extra
        print(
            f"cold compile, {len(seconds)} workloads, {spec}: {totals[spec]:.1f} s"
            + (" with first use" if extra else "")
        )
    took = time.perf_counter() - start
    print(f"{size} size, {rounds} rounds, {args.threads} threads, load {common.machine()['load']}, {took:.0f} s in all")
    settings = {"size": size, "rounds": rounds, "turn_s": args.turn, "threads": args.threads, "only": args.only}
    common.write_json(path, {"machine": common.machine(), "settings": settings, "first_use": starts, "rows": rows,
                             "geomean": means, "compile_total_s": totals})  # fmt: skip
    bad = [r for r in rows for v in r["backends"].values() if "error" in v or not v["check"]["ok"]]
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
