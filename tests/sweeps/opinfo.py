"""The OpInfo sweep: every operator torch can describe, compiled by one backend and compared with eager.

``python -m tests.sweeps.opinfo --backend fusionc --dtypes float32,bfloat16,int64 --grad`` writes one row per task
(operator, dtype, forward or backward).  Status of a task:

    pass      every sample as good as eager, and the backend was called
    fail      a sample differs, or compiling or running it raised although eager runs it
    crash     the worker process died or exceeded the time limit
    vacuous   right, but no graph reached the backend in any sample
    skip      eager itself does not run the samples on this machine

OpInfo wraps random operators in a function that Dynamo refuses to trace, so that they would "pass" without the backend
being called; the wrapper is bypassed here and both sides are seeded instead.

``--check-baseline`` compares failures with ``opinfo_baseline.tsv``, which lists known ones and may only shrink: an
unlisted failure is an error, and so is a listed task that passes.
"""

from __future__ import annotations

import argparse
import csv
import functools
import itertools
import os
import sys
import time
import types
import warnings
import zlib
from pathlib import Path
from typing import Any

from tests.sweeps.pool import first_line, run_tasks

BASELINE = Path(__file__).with_name("opinfo_baseline.tsv")
COLUMNS = ("op", "dtype", "direction", "status", "samples", "vacuous", "graphs", "fallbacks", "seconds", "message")
KEY = ("op", "dtype", "direction")
BAD = ("fail", "crash")
# eager's own choice between 0.0 and -0.0 depends on the position here: vectors and remainders differ
ANY_ZERO = ("maximum", "minimum", "fmax", "fmin", "max", "min")
# their results are whatever was in memory
UNINITIALISED = ("empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided")


@functools.cache
def operators() -> dict[str, Any]:
    """All OpInfo entries by "name" or "name.variant", with the seeding wrapper bypassed."""
    import torch.testing._internal.common_methods_invocations as methods

    def bypass(op: Any, *args: Any, **kwargs: Any) -> Any:
        return op(*args, **kwargs)

    # the entries are lambdas that look the wrapper up in their module when called
    module: Any
    for name, module in list(sys.modules.items()):
        if name.startswith("torch.testing._internal") and hasattr(module, "wrapper_set_seed"):
            module.wrapper_set_seed = bypass
    return {op.name + (f".{op.variant_test_name}" if op.variant_test_name else ""): op for op in methods.op_db}


def tasks_of(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The selected tasks, as JSON values."""
    import torch

    device = torch.device(args.device).type
    names = [name for name in operators() if args.match in name]
    if args.ops:
        names = [name for name in args.ops.split(",") if name in operators()]
    names = names[args.offset :: args.every]
    directions = ("backward",) if args.grad_only else ("forward", "backward") if args.grad else ("forward",)
    common = {
        "backend": args.backend,
        "options": args.options,
        "device": args.device,
        "samples": args.samples,
        "noncontiguous": args.noncontiguous,
        "dynamic": args.dynamic,
    }
    out = []
    for name in names:
        op = operators()[name]
        for dtype_name in args.dtypes.split(","):
            dtype = getattr(torch, dtype_name)
            for direction in directions:
                if direction == "forward" and dtype not in op.supported_dtypes(device):
                    continue
                if direction == "backward" and not (
                    op.supports_autograd
                    and dtype in op.supported_backward_dtypes(device)
                    and (dtype.is_floating_point or dtype.is_complex)
                ):
                    continue
                out.append({"op": name, "dtype": dtype_name, "direction": direction, **common})
    return out


@functools.cache
def _backend(name: str, options: tuple[tuple[str, Any], ...]) -> Any:
    from tests.sweeps.backends import Counting, prepare

    prepare(name)
    warnings.simplefilter("ignore")
    return Counting(name, dict(options))


def _function(op: Any) -> Any:
    """A function calling ``op`` with a code object of its own, so that tasks do not share Dynamo's cache."""

    def call(args: Any, kwargs: Any) -> Any:
        return op(*args, **kwargs)

    return types.FunctionType(call.__code__.replace(co_name="case"), call.__globals__, "case", None, call.__closure__)


def _run(call: Any, args: Any, kwargs: Any, finish: Any, backward: bool, seed: int) -> tuple[Any, Any]:
    """(outputs, gradients of the leaves of args and kwargs) of one call; gradients are () without ``backward``."""
    import torch
    from torch.utils import _pytree as pytree

    torch.manual_seed(seed)
    with torch.set_grad_enabled(backward):
        out = call(args, kwargs)
        if not backward:
            return out, ()
        inputs = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.requires_grad]
        finished = finish(out) if finish is not None else out
        outputs = [t for t in pytree.tree_leaves(finished) if isinstance(t, torch.Tensor) and t.requires_grad]
        if not outputs or not inputs:
            return out, ()
        generator = torch.Generator().manual_seed(seed)
        cotangents = [
            torch.randn(t.shape, dtype=torch.complex128 if t.dtype.is_complex else torch.float64, generator=generator)
            for t in outputs
        ]
        cotangents = [c.to(t.device, t.dtype) for c, t in zip(cotangents, outputs, strict=True)]
        grads = torch.autograd.grad(outputs, inputs, cotangents, allow_unused=True)
    return tuple(t.detach() if isinstance(t, torch.Tensor) else t for t in pytree.tree_leaves(finished)), grads


def _sample(op: Any, sample: Any, task: dict[str, Any], backend: Any, seed: int) -> tuple[str, str]:
    """(status, message) of one sample, status one of pass, fail, vacuous, skip."""
    import torch

    from tests.sweeps.compare import compare, copy_tree, widen_tree

    backward = task["direction"] == "backward"
    call = _function(op.op)
    finish = sample.output_process_fn_grad if backward else None
    given = ((sample.input, *sample.args), sample.kwargs)
    args, kwargs = copy_tree(given)
    try:
        want = (*_run(call, args, kwargs, finish, backward, seed), (args, kwargs))
    except Exception as error:
        return "skip", f"eager: {first_line(error)}"
    # the inputs are part of the result: an operator that writes to them is compared there as well
    before = backend.graphs
    # equal to the default "False" in shapes, since automatic dynamic shapes are off
    compiled = torch.compile(call, backend=backend, dynamic=True if task["dynamic"] else None)
    args, kwargs = copy_tree(given)
    try:
        got = (*_run(compiled, args, kwargs, finish, backward, seed), (args, kwargs))
    except Exception as error:
        return "fail", first_line(error)

    def oracle() -> Any:
        args, kwargs = widen_tree(given)
        torch.set_default_dtype(torch.float64)  # an integer sample has its float results in double, too
        try:
            return (*_run(call, args, kwargs, finish, backward, seed), (args, kwargs))
        finally:
            torch.set_default_dtype(torch.float32)

    elementwise = type(op).__name__ in ("UnaryUfuncInfo", "BinaryUfuncInfo") and op.name not in ANY_ZERO
    problem = compare(got, want, oracle, elementwise and not backward, op.name not in UNINITIALISED)
    if problem is not None:
        return "fail", problem
    return ("pass" if backend.graphs > before else "vacuous"), ""


def run_task(task: dict[str, Any]) -> dict[str, Any]:
    """One task in this process: the result is the task's key with the columns of the table."""
    import torch
    import torch._dynamo

    from tests.sweeps.backends import records

    begin = time.monotonic()
    op = operators()[task["op"]]
    backend = _backend(task["backend"], tuple(sorted((task["options"] or {}).items())))
    seed = zlib.crc32(task["op"].encode()) & 0xFFFF
    dtype, backward = getattr(torch, task["dtype"]), task["direction"] == "backward"
    graphs = backend.graphs
    statuses: list[str] = []
    message = ""
    fallbacks: list[str] = []
    try:
        torch.manual_seed(seed)
        samples = list(itertools.islice(op.sample_inputs(task["device"], dtype, backward), task["samples"]))
    except Exception as error:
        samples, message = [], f"sample inputs: {first_line(error)}"
    with records(task["backend"]) as made:
        for index, sample in enumerate(samples):
            if task["noncontiguous"]:
                sample = sample.noncontiguous()
            status, text = _sample(op, sample, task, backend, seed)
            torch._dynamo.reset()
            statuses.append(status)
            if text and (not message or (status == "fail" and "fail" not in statuses[:-1])):
                message = f"sample {index}: {text}"
        for record in made:
            fallbacks.extend(record.fallbacks)
    counted = {status: statuses.count(status) for status in ("pass", "fail", "vacuous", "skip")}
    overall = "fail" if counted["fail"] else "pass" if counted["pass"] else "vacuous" if counted["vacuous"] else "skip"
    return {
        **task,
        "status": overall,
        "samples": len(statuses),
        "vacuous": counted["vacuous"],
        "graphs": backend.graphs - graphs,
        "fallbacks": len(fallbacks),
        "seconds": round(time.monotonic() - begin, 2),
        "message": message if overall != "pass" else (fallbacks[0][:200] if fallbacks else ""),
    }


def read_table(path: Path) -> dict[tuple[str, ...], dict[str, str]]:
    """A written table (or the baseline) by its key columns; empty when the file does not exist."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        rows = csv.DictReader((line for line in file if not line.startswith("#")), delimiter="\t")
        return {tuple(row[c] for c in KEY): dict(row) for row in rows}


def write_table(path: Path, rows: list[dict[str, Any]], columns: tuple[str, ...] = COLUMNS, head: str = "") -> None:
    """Rows sorted by key, tab separated, written to a temporary file first."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", newline="") as file:
        file.write(head)
        writer = csv.DictWriter(file, columns, delimiter="\t", extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for row in sorted(rows, key=lambda row: tuple(str(row[c]) for c in KEY)):
            writer.writerow({c: str(row.get(c, "")).replace("\t", " ").replace("\n", " ") for c in columns})
    os.replace(temporary, path)


def against_baseline(rows: list[dict[str, Any]], baseline: dict[tuple[str, ...], Any]) -> tuple[list[str], list[str]]:
    """(new failures, listed tasks that ran and no longer fail), each as one line of text."""
    new, fixed = [], []
    for row in rows:
        key = tuple(str(row[c]) for c in KEY)
        if row["status"] in BAD and key not in baseline:
            new.append(f"{' '.join(key)}: {row['status']}: {row['message']}")
        if row["status"] not in BAD and key in baseline:
            fixed.append(f"{' '.join(key)}: {row['status']}")
    return new, fixed


BASELINE_HEAD = (
    "# Known failures of the OpInfo sweep (python -m tests.sweeps.opinfo --check-baseline).\n"
    "# This list may only shrink: --shrink-baseline removes what passes now; nothing adds rows but an edit in review.\n"
)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.sweeps.opinfo", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backend", default="fusionc")
    parser.add_argument("--options", default=None, help="JSON object passed as torch.compile's options")
    parser.add_argument("--dtypes", default="float32")
    parser.add_argument("--grad", action="store_true", help="also forward+backward of float dtypes")
    parser.add_argument("--grad-only", action="store_true")
    parser.add_argument("--noncontiguous", action="store_true")
    parser.add_argument("--dynamic", action="store_true", help="compile with symbolic sizes from the start")
    parser.add_argument("--every", type=int, default=1, help="every N-th operator")
    parser.add_argument("--offset", type=int, default=0, help="starting with the K-th")
    parser.add_argument("--match", default="", help="only operators whose name contains this")
    parser.add_argument("--ops", default="", help="exactly these operators, comma separated")
    parser.add_argument("--samples", type=int, default=3, help="the first N samples of each operator")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds per task")
    parser.add_argument("--stop-after", type=float, default=None, help="start no task after this many seconds")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=None, help="write the table here (tab separated)")
    parser.add_argument("--resume", action="store_true", help="keep the rows of --out and run only the other tasks")
    parser.add_argument("--compare-with", type=Path, default=None, help="list tasks that fail here and pass there")
    parser.add_argument("--check-baseline", action="store_true")
    parser.add_argument("--shrink-baseline", action="store_true", help="remove listed tasks that no longer fail")
    parser.add_argument("--quiet", action="store_true")
    args = parser.parse_args(argv)
    if args.options:
        import json

        args.options = json.loads(args.options)
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the sweep; exit status 1 when something failed (with ``--check-baseline``: when the baseline is off)."""
    args = parse(argv)
    tasks = tasks_of(args)
    rows: list[dict[str, Any]] = []
    if args.resume and args.out is not None:
        done = read_table(args.out)
        rows.extend(done.values())
        tasks = [task for task in tasks if tuple(str(task[c]) for c in KEY) not in done]
    total, begin = len(tasks), time.monotonic()
    fresh = 0

    def on_result(row: dict[str, Any]) -> None:
        nonlocal fresh
        fresh += 1
        rows.append(row)
        if row["status"] in BAD and not args.quiet:
            print(f"{row['status']:8s}{row['op']} {row['dtype']} {row['direction']}: {row['message']}", flush=True)
        if fresh % 100 == 0:
            if not args.quiet:
                print(f"… {fresh} of {total} tasks, {time.monotonic() - begin:.0f} s", flush=True)
            if args.out is not None:
                write_table(args.out, rows)

    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"} if args.device == "cpu" else {}
    complete = run_tasks(
        "tests.sweeps.opinfo",
        tasks,
        on_result,
        args.jobs,
        args.timeout,
        stop_after=args.stop_after,
        environment=threads,
    )
    if args.out is not None:
        write_table(args.out, rows)
    counts = {s: sum(row["status"] == s for row in rows) for s in ("pass", "fail", "crash", "vacuous", "skip")}
    cases = sum(int(row.get("samples") or 0) for row in rows)
    idle = sum(int(row.get("vacuous") or 0) for row in rows)
    print(
        f"{args.backend} on {args.device}: {len(rows)} tasks: "
        + ", ".join(f"{n} {s}" for s, n in counts.items())
        + f"; {cases} cases, {idle} without a graph; {time.monotonic() - begin:.0f} s"
        + ("" if complete else "; STOPPED before the end")
    )
    if args.compare_with is not None:
        other = read_table(args.compare_with)
        worse = [
            r
            for r in rows
            if r["status"] in BAD and other.get(tuple(str(r[c]) for c in KEY), {}).get("status") == "pass"
        ]
        print(f"{len(worse)} tasks fail here and pass in {args.compare_with}:")
        for row in worse:
            print(f"  {row['op']} {row['dtype']} {row['direction']}: {row['message']}")
    if args.shrink_baseline:
        listed = read_table(BASELINE)
        passing = {tuple(str(r[c]) for c in KEY) for r in rows if r["status"] not in BAD}
        kept = [row for key, row in listed.items() if key not in passing]
        write_table(BASELINE, kept, (*KEY, "status", "message"), BASELINE_HEAD)
        print(f"baseline: {len(listed)} rows before, {len(kept)} now")
    if args.check_baseline:
        new, fixed = against_baseline(rows, read_table(BASELINE))
        for line in new:
            print(f"new failure: {line}")
        for line in fixed:
            print(f"listed in the baseline but not failing (remove it with --shrink-baseline): {line}")
        return 1 if new or fixed or not complete else 0
    return 1 if counts["fail"] or counts["crash"] or not complete else 0


if __name__ == "__main__":
    sys.exit(main())
