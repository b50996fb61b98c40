"""Every Triton kernel of the zoo: built for GPUs that are not here, and run in Triton's interpreter.

``python -m tests.sweeps.kernels`` compiles the architectures of ``tests.sweeps.zoo`` for sm_90, collects the distinct
kernels, and asks of each that it

* spills no register on sm_90 with its default plan,
* compiles for the other targets (sm_80, sm_100, gfx942),
* gives in Triton's interpreter what the loop interpreter gives, on random inputs (of large grids the first programs).

``--names llama,bert`` takes a part of the zoo; ``--every N`` every N-th kernel.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import io
import json
import os
import re
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.sweeps.pool import run_tasks
from tests.sweeps.zoo_table import BY_NAME, ROWS

OTHERS = ("sm_80", "sm_100", "gfx942")


def harvest(task: Mapping[str, Any]) -> list[dict[str, str]]:
    """The kernels of one architecture in one direction, as text."""
    import torch

    from tests.sweeps import zoo
    from tests.sweeps.backends import Counting, prepare, records

    prepare("fusionc", 1)
    torch._dynamo.reset()
    model, values = zoo.build(BY_NAME[task["name"]])
    train = task["direction"] == "train"
    model.train(train)
    backend = Counting("fusionc", {"target": "sm_90", "cache": False})
    with records("fusionc") as made:
        zoo._run(model, torch.compile(model, backend=backend), values, train)
    return [
        {"symbol": k.symbol, "plan": k.plan_json, "loop": k.loop_text, "source": k.source, "standalone": k.standalone}
        for graph in made
        for k in graph.kernels
    ]


def spilled(source: str) -> int:
    """Bytes spilled, from the line that cross-compilation leaves at the end of a source."""
    found = re.search(r"(\d+) bytes spilled", source)
    if found is None:
        raise ValueError("the source does not say how many bytes it spills")
    return int(found.group(1))


def judge(kernel: Mapping[str, str]) -> str:
    """What is wrong with one kernel, or ""."""
    from fusionc.ir.text import parse_kernel
    from fusionc.runtime.launch import cross_compile
    from fusionc.schedule.horizontal import parse_many
    from fusionc.schedule.plan import Plan
    from fusionc.standalone import run_kernel

    plan, source = Plan.from_dict(json.loads(kernel["plan"])), kernel["source"]
    many = parse_many(_constant(kernel["standalone"], "LOOP").strip()) if kernel["symbol"].startswith("m_") else None
    ir = many.signature if many else parse_kernel(kernel["loop"].strip())
    # the parts of a split reduction have one symbol and functions of their own
    symbol = re.findall(r"^def ([km]_\w+)\(", source, re.MULTILINE)[-1]
    problems = []
    # sine and cosine of large arguments keep a table of 32 bytes in local memory, which counts as spilled
    if spilled(source) > (32 if re.search(r"\b(sin|cos|tan)\(", source) else 0):
        problems.append(f"spills {spilled(source)} bytes on sm_90")
    for target in OTHERS:
        try:
            cross_compile(source, symbol, ir, plan, target)
        except Exception as error:  # noqa: BLE001 - whatever it is, it belongs in the table
            problems.append(f"{target}: {type(error).__name__}: {str(error)[:100]}")
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        if many is not None:
            wrong = compare_many(many, plan, source, _constant(kernel["standalone"], "GRID"))
        else:
            wrong = bool(run_kernel(symbol, "triton", kernel["plan"], kernel["loop"], source))
    if wrong:
        problems.append("interpreter: " + " ".join(said.getvalue().split())[-160:])
    return "; ".join(problems)


def _constant(text: str, name: str) -> Any:
    """The literal that a dumped kernel.py assigns to a name."""
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == name:
            return ast.literal_eval(node.value)
    raise ValueError(f"kernel.py has no {name}")


def compare_many(many: Any, plan: Any, source: str, grid: int) -> bool:
    """Run a horizontal launch in the interpreter; true, with a line printed, if an item's results are not its kernel's.

    Items read and write parts of shared buffers, which get random values item by item, a shared input those of its first.
    """
    import torch

    from fusionc.standalone import _agrees, _oracle, random_buffers
    from fusionc.targets.many import bind

    items = [(many.kernels[item.kernel], item.slots) for item in many.items]
    made = [random_buffers(kernel, {}) for kernel, _ in items]
    sizes: dict[int, int] = {}
    for (kernel, slots), buffers in zip(items, made, strict=True):
        for (slot, first), b in zip(slots, kernel.buffers, strict=True):
            sizes[slot] = max(sizes.get(slot, 0), first + buffers[b.name].numel())
    memory: dict[int, Any] = {}
    for (kernel, slots), buffers in zip(items, made, strict=True):
        for (slot, first), b in zip(slots, kernel.buffers, strict=True):
            value = buffers[b.name]
            known = memory.setdefault(slot, torch.empty(0, dtype=value.dtype))
            if known.numel() < first + value.numel():
                grown = torch.zeros(first + value.numel(), dtype=value.dtype)
                grown[first:] = value
                grown[: known.numel()] = known
                memory[slot] = grown
            elif b.kind == "out":
                known[first : first + value.numel()] = value
            buffers[b.name] = None
    views = [
        {
            b.name: memory[slot][first : first + _elements(b)]
            for (slot, first), b in zip(slots, kernel.buffers, strict=True)
        }
        for kernel, slots in items
    ]
    for _ in range(2):  # the first may make inputs positive, which others share
        expected = [_oracle(kernel, mine, {}, 0) for (kernel, _), mine in zip(items, views, strict=True)]
    bind(many.text, plan, source, grid, torch.device("cpu"))([memory[slot] for slot in sorted(memory)], (), 0)
    good = True
    for (kernel, _), mine, (wide, narrow) in zip(items, views, expected, strict=True):
        assert wide is not None and narrow is not None
        for b in kernel.buffers:
            good &= b.kind == "in" or _agrees(b.name, mine[b.name], wide[b.name], narrow[b.name], None)
    return not good


def _elements(buffer: Any) -> int:
    from fusionc.ir.loop import evaluate

    return evaluate(buffer.size, {})


def run_task(task: dict[str, Any]) -> dict[str, Any]:
    """One step of the sweep: an architecture's kernels, or the verdict on one kernel."""
    warnings.simplefilter("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if "name" in task:
        return {**task, "status": "pass", "message": "", "kernels": harvest(task)}
    problem = judge(task)
    return {"symbol": task["symbol"], "status": "fail" if problem else "pass", "message": problem}


def main(argv: list[str] | None = None) -> int:
    """Run the sweep; exit status 1 when a kernel failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.sweeps.kernels", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--names", default="", help="only these architectures, comma separated")
    parser.add_argument("--every", type=int, default=1, help="judge every N-th distinct kernel")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for one step")
    parser.add_argument("--out", type=Path, default=None, help="write the verdicts here as JSON")
    args = parser.parse_args(argv)
    chosen = args.names.split(",") if args.names else [row.name for row in ROWS]
    begin = time.monotonic()
    graphs = [
        {"name": n, "direction": d} for n in chosen for d in ("infer", "train") if d == "infer" or BY_NAME[n].train
    ]
    found: dict[tuple[str, str], dict[str, str]] = {}
    failed: list[dict[str, Any]] = []

    def on_graph(result: dict[str, Any]) -> None:
        if result["status"] != "pass":
            failed.append(result)
            print(f"{result['name']} {result['direction']}: {result['message']}", flush=True)
        for kernel in result.get("kernels", ()):
            found.setdefault((kernel["symbol"], kernel["loop"]), kernel)

    environment = {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "FUSIONC_CACHE": "0",
    }
    module = "tests.sweeps.kernels"
    run_tasks(module, graphs, on_graph, args.jobs, args.timeout, environment=environment)
    kernels = [found[key] for key in sorted(found)][:: args.every]
    print(f"{len(found)} distinct kernels of {len(graphs)} graphs after {time.monotonic() - begin:.0f} s", flush=True)
    verdicts: list[dict[str, Any]] = []

    def on_kernel(result: dict[str, Any]) -> None:
        verdicts.append(result)
        if result["status"] != "pass":
            failed.append(result)
            print(f"{result['symbol']}: {result['message']}", flush=True)

    run_tasks(module, kernels, on_kernel, args.jobs, args.timeout, environment=environment)
    print(
        f"{sum(v['status'] == 'pass' for v in verdicts)} of {len(kernels)} kernels pass; {time.monotonic() - begin:.0f} s"
    )
    if args.out is not None:
        args.out.write_text(json.dumps(sorted(verdicts, key=lambda v: v["symbol"]), indent=1) + "\n")
    return 1 if failed or len(verdicts) < len(kernels) else 0


if __name__ == "__main__":
    sys.exit(main())
