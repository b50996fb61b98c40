"""Compile time: cold and warm first calls of fusionc and Inductor, and of a backend that does nothing (the floor).

    python -m benchmarks.compile_time                    # table and benchmarks/results/compile_time.json
    python -m benchmarks.compile_time --only train       # one of: inference, decode, train
    python -m benchmarks.compile_time --layers 4 8 16 32 # the slope; --no-slope skips it

Every figure comes from a fresh process.  Cold: empty Inductor, Triton and fusionc caches; warm: the same command again
with the caches that the cold one filled.  The time is that of the first call, forward and backward for training, as a
user waits for it; importing torch and building the model are outside.  It splits into

    Dynamo    everything outside the backend: capture, guards, and one run (measured by a second call, subtracted)
    AOT       inside the backend but outside its graph compilers: functionalising, tracing the joint graph, partitioning
              (with Inductor warm also its cache look-up, which replaces its compilers)
    compiler  inside the functions that the backend gave AOTAutograd as forward, backward and inference compilers

Inductor's one-time work per machine (instruction set probe, precompiled header: about a minute) is done once before and
the probe is switched off; ``--count-warmup`` leaves the probe in.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

from .common import (
    Case,
    cache_environment,
    compile_bytecode,
    compiled,
    counts,
    machine,
    not_compiled,
    randint,
    records,
    step,
    table,
    watch_compilers,
    write_json,
)

DEFAULT_JSON = "benchmarks/results/compile_time.json"
MARK = "@@result "
WHAT = ("inference", "decode", "train")
# INTEGRATION's tiny-width Llama: the Python part of compiling does not depend on widths.
SMALL = {
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


# ------------------------------------------------------------------------------------------------------- child process


def build(what: str, layers: int, width: str) -> Case:
    """SmolLM2's shape with random weights for inference and decode, a tiny-width Llama with loss for training."""
    from . import models

    if what == "train" or width == "small":
        model = models.llama(models.SMOLLM2, **SMALL, num_hidden_layers=layers)
    else:
        model = models.llama(models.SMOLLM2, num_hidden_layers=layers)
    vocabulary = model.config.vocab_size
    if what == "train":
        return Case(models.TrainLoss(model.train()), lambda s: (randint(vocabulary, (2, 32), s, "cpu"),), train=True)
    if what == "decode":
        decode = models.Decode(model, 64, 16)
        return Case(decode, lambda s: (randint(vocabulary, (1, 1), s, "cpu"),), reset=decode.reset)
    return Case(models.Logits(model), lambda s: (randint(vocabulary, (2, 32), s, "cpu"),))


def child(what: str, backend: str, layers: int, width: str, threads: int) -> dict[str, Any]:
    """One first call in this process; seconds of it and of its parts."""
    import torch
    from torch._dynamo.utils import compilation_time_metrics

    torch.set_num_threads(threads)
    case = build(what, layers, width)
    inputs = case.inputs(0)
    eager = step(case, case.fn, inputs)
    if case.reset:
        case.reset()
    before = records(backend)
    with watch_compilers() as log:
        start = time.perf_counter()
        fn = compiled(case.fn, backend)
        out = step(case, fn, inputs)
        total = time.perf_counter() - start
        inside = sum(sum(v) for k, v in compilation_time_metrics.items() if k.endswith("call_user_compiler"))
        if case.reset:
            case.reset()
        start = time.perf_counter()
        step(case, fn, inputs)
        run = time.perf_counter() - start
    difference = max(float((a - b).abs().max()) for a, b in zip(out, eager))
    result = {
        "total_s": total,
        "dynamo_s": total - inside - log.late - run,
        "aot_s": inside - (log.total - log.late),
        "compiler_s": log.total,
        "run_s": run,
        "compilers": [[kind, round(s, 4), "late" if late else ""] for kind, s, late in log.seconds],
        "max_difference": difference,
        "load": os.getloadavg()[0],
    }
    result["report"] = report = counts(backend, before)
    if unfit := not_compiled(report):
        result["not_compiled"] = unfit
    return result


# ------------------------------------------------------------------------------------------------------ parent process


def spawn(arguments: list[str], environment: dict[str, str], limit_s: float) -> dict[str, Any]:
    """Runs a child and returns its result, or {"error": …}; a child over its limit is ended with everything it started."""
    command = [sys.executable, "-m", "benchmarks.compile_time", "--child", *arguments]
    with subprocess.Popen(
        command,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            out, err = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return {"error": f"stopped after {limit_s:.0f} s"}
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    for line in out.splitlines():
        if line.startswith(MARK):
            result = json.loads(line[len(MARK) :])
            if "not_compiled" in result:  # the time of a fallback is no time of this backend: no table may show it
                return {"error": result["not_compiled"], "discarded": result}
            return result
    return {"error": (err.strip().splitlines() or [f"exit status {process.returncode}"])[-1][:200]}


def measure(what: str, backend: str, layers: int, args: argparse.Namespace, width: str, warm: bool) -> dict[str, Any]:
    """Cold (and warm) runs of one backend; the median of ``--repeats`` by total."""
    colds, warms = [], []
    for _ in range(args.repeats):
        with tempfile.TemporaryDirectory(prefix="bench-compile-") as folder:
            environment = cache_environment(folder) | {"OMP_NUM_THREADS": str(args.threads)}
            if not args.count_warmup:
                environment["TORCHINDUCTOR_VEC_ISA_OK"] = "1"
            arguments = [what, backend, str(layers), width, str(args.threads)]
            colds.append(spawn(arguments, environment, args.limit))
            print(f"  {what} {layers} layers {backend} cold: {said(colds[-1])}", flush=True)
            if warm and "error" not in colds[-1]:
                warms.append(spawn(arguments, environment, args.limit))
                print(f"  {what} {layers} layers {backend} warm: {said(warms[-1])}", flush=True)
    row: dict[str, Any] = {"what": what, "backend": backend, "layers": layers, "width": width, "cold": middle(colds)}
    if warms:
        row["warm"] = middle(warms)
    return row


def middle(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The run with the median total (the lower one of two), or the first error."""
    good = sorted((r for r in results if "error" not in r), key=lambda r: r["total_s"])
    return good[(len(good) - 1) // 2] if good else results[0]


def said(result: dict[str, Any]) -> str:
    """One line about one run."""
    if "error" in result:
        return result["error"]
    parts = ", ".join(f"{k[:-2]} {result[k]:.2f}" for k in ("dynamo_s", "aot_s", "compiler_s", "run_s"))
    return f"{result['total_s']:.2f} s ({parts})"


def slope(points: list[tuple[int, float]]) -> float | None:
    """Least-squares seconds per layer."""
    if len(points) < 2:
        return None
    x, y = zip(*points)
    return statistics.linear_regression(x, y).slope


def print_first_calls(rows: list[dict[str, Any]]) -> None:
    """Cold and warm totals with shares and with what lies above the floor."""
    floors = {r["what"]: r["cold"].get("total_s") for r in rows if r["backend"] == "floor"}
    inductors = {r["what"]: r["cold"].get("total_s") for r in rows if r["backend"] == "inductor"}
    body = []
    for row in rows:
        for state in ("cold", "warm"):
            if state not in row:
                continue
            found = row[state]
            total, floor, inductor = found.get("total_s"), floors.get(row["what"]), inductors.get(row["what"])
            above = total - floor if total and floor and state == "cold" and row["backend"] != "floor" else None
            of_total = of_above = None
            if above is not None and inductor and floor and row["backend"] != "inductor":
                of_total, of_above = total / inductor, above / (inductor - floor)
            body.append(
                [row["what"], row["layers"], row["backend"], state, total, above, of_total, of_above]
                + [found.get(k) for k in ("dynamo_s", "aot_s", "compiler_s", "run_s")]
                + [found.get("error", "")]
            )
    headers = ["what", "layers", "backend", "caches", "total s", "above floor", "/ Inductor", "above / Inductor's"]
    print(table([*headers, "Dynamo", "AOT", "compiler", "run", ""], body))


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--child"]:
        what, backend, layers, width, threads = argv[1:6]
        print(MARK + json.dumps(child(what, backend, int(layers), width, int(threads))), flush=True)
        return 0
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compile_time", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--only", nargs="+", choices=WHAT, default=["inference", "train"])
    parser.add_argument("--backends", default="floor,inductor,fusionc", help="comma-separated; name or name:mode")
    parser.add_argument("--depth", nargs=2, type=int, default=[30, 24], metavar=("INFERENCE", "TRAIN"), help="layers")
    parser.add_argument("--layers", nargs="+", type=int, default=[4, 8, 16, 32], help="depths for the slope")
    parser.add_argument("--slope-backends", default="fusionc", help="comma-separated, empty for none")
    parser.add_argument("--no-slope", action="store_true")
    parser.add_argument("--no-warm", action="store_true")
    parser.add_argument(
        "--width", choices=("real", "small"), default="real", help="inference widths: SmolLM2's or tiny"
    )
    parser.add_argument("--repeats", type=int, default=1, help="runs per figure; the median is reported")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--limit", type=float, default=600, help="seconds for one run")
    parser.add_argument(
        "--count-warmup", action="store_true", help="leave Inductor's instruction set probe in its time"
    )
    parser.add_argument("--json", default=DEFAULT_JSON)
    args = parser.parse_args(argv)
    backends = args.backends.split(",")
    compile_bytecode()

    if "inductor" in backends and not args.count_warmup:
        start = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="bench-compile-") as folder:
            environment = cache_environment(folder) | {"TORCHINDUCTOR_VEC_ISA_OK": "1"}
            spawn(["inference", "inductor", "1", "small", str(args.threads)], environment, args.limit)
        print(
            f"Inductor's precompiled header and a first kernel, outside the figures: {time.perf_counter() - start:.0f} s"
        )
    rows, slopes = [], []
    for what in args.only:
        depth = args.depth[1] if what == "train" else args.depth[0]
        for backend in backends:
            rows.append(measure(what, backend, depth, args, args.width, warm=not args.no_warm and backend != "floor"))
    if not args.no_slope:
        for what in args.only:
            for backend in filter(None, args.slope_backends.split(",")):
                runs = [measure(what, backend, n, args, "small", warm=False) for n in args.layers]
                good = [r for r in runs if "error" not in r["cold"]]
                found: dict[str, Any] = {"what": what, "backend": backend, "layers": [r["layers"] for r in good]}
                for part in ("compiler_s", "aot_s", "dynamo_s", "total_s"):
                    found[part] = [r["cold"][part] for r in good]
                    per_layer = slope(list(zip(found["layers"], found[part])))
                    found[part.replace("_s", "_ms_per_layer")] = None if per_layer is None else 1e3 * per_layer
                slopes.append(found)
    print()
    print_first_calls(rows)
    if slopes:
        print()
        parts = ("compiler", "aot", "dynamo", "total")
        body = [
            [s["what"], s["backend"], " ".join(f"{n}: {v:.2f}" for n, v in zip(s["layers"], s["compiler_s"]))]
            + [s[f"{p}_ms_per_layer"] for p in parts]
            for s in slopes
        ]
        print(table(["what", "backend", "compiler s by layers", *(f"{p} ms/layer" for p in parts)], body))
    write_json(args.json, {"machine": machine(), "settings": vars(args), "rows": rows, "slopes": slopes})
    return 1 if any("error" in r[s] for r in rows for s in ("cold", "warm") if s in r) else 0


if __name__ == "__main__":
    sys.exit(main())
