"""The zoo sweep: small random models of 30 Hugging Face architectures, compiled and compared with eager.

``python -m tests.sweeps.zoo --backend fusionc --train`` prints one row per architecture and direction.  The reference
is the same model in float64; the compiled float32 model must be no further from it than twice eager float32's distance
(L2 norm per output and per gradient, plus a few float32 roundings).  The table also shows how many graphs Dynamo made,
how many of them the backend gave up as a whole (``thrown``: must be none), and its library calls and fallbacks by node.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from tests.sweeps.pool import first_line, run_tasks
from tests.sweeps.zoo_table import BY_NAME, ROWS, Row

FACTOR = 2.0
# a result may differ from eager by a few roundings of its own size although eager happened to be nearly exact
FLOOR = 8 * 2.0**-24
COLUMNS = (
    ("name", 11),
    ("direction", 9),
    ("status", 6),
    ("graphs", 6),
    ("thrown", 6),
    ("kernels", 7),
    ("calls", 5),
    ("fallbacks", 9),
    ("ratio", 6),
    ("seconds", 7),
)


def inputs(kind: str, config: Any, generator: Any) -> dict[str, Any]:
    """Random inputs of one kind for a batch of two, on the CPU, in float32 and int64."""
    import torch

    def tokens(length: int) -> Any:
        return torch.randint(3, 97, (2, length), generator=generator)

    if kind == "tokens":
        mask = torch.ones(2, 16, dtype=torch.int64)
        return {"input_ids": tokens(16), "attention_mask": mask}
    if kind == "pairs":
        mask = torch.ones(2, 16, dtype=torch.int64)
        return {"input_ids": tokens(16), "attention_mask": mask, "decoder_input_ids": tokens(12)}
    if kind == "image":
        return {"pixel_values": torch.randn(2, 3, 32, 32, generator=generator)}
    if kind == "wave":
        return {"input_values": torch.randn(2, 1600, generator=generator)}
    if kind == "spectrum":
        frames = 2 * config.max_source_positions
        features = torch.randn(2, config.num_mel_bins, frames, generator=generator)
        return {"input_features": features, "decoder_input_ids": tokens(12)}
    raise ValueError(f"unknown kind of inputs {kind!r}")


def build(row: Row) -> tuple[Any, dict[str, Any]]:
    """(model in float32 on the CPU, its inputs), both from a seed; dropout is off in every configuration."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, row.config)(**row.fields)
    if row.inputs in ("tokens", "pairs", "spectrum"):
        config.use_cache = False  # a cache object is not a result
    model = getattr(transformers, row.model)(config)
    with torch.no_grad():
        # fresh models have zero biases and unit scales, which hide a forgotten one
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model, inputs(row.inputs, config, torch.Generator().manual_seed(1))


def _cast(values: dict[str, Any], dtype: Any, device: str) -> dict[str, Any]:
    return {k: v.to(device, dtype if v.is_floating_point() else v.dtype) for k, v in values.items()}


def _tensors(out: Any) -> dict[str, Any]:
    """The float tensors of a model's output by name, nested ones by position."""
    import torch
    from torch.utils import _pytree as pytree

    found = {}
    for name, value in dict(out).items():
        for index, leaf in enumerate(pytree.tree_leaves(value)):
            if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
                found[f"{name}.{index}" if isinstance(value, list | tuple) else name] = leaf
    return found


def _run(model: Any, call: Any, values: dict[str, Any], backward: bool) -> dict[str, Any]:
    """Outputs, and with ``backward`` the gradients, of one call, in float64 on the CPU."""
    import torch

    torch.manual_seed(2)  # wav2vec2 draws a number for layer drop even at rate 0
    model.zero_grad(set_to_none=True)
    with contextlib.nullcontext() if backward else torch.no_grad():
        named = _tensors(call(**values))
    if backward:
        generator = torch.Generator().manual_seed(3)
        loss = torch.zeros((), dtype=torch.float64)
        for name in sorted(named):
            if named[name].requires_grad:
                weight = torch.randn(named[name].shape, generator=generator, dtype=torch.float64)
                loss = loss + (named[name] * weight.to(named[name])).sum().double().cpu()
        loss.backward()
        named.update({f"grad of {n}": p.grad for n, p in model.named_parameters() if p.grad is not None})
    return {name: value.detach().double().cpu() for name, value in named.items()}


def judge(got: dict[str, Any], want: dict[str, Any], reference: dict[str, Any]) -> tuple[float, str]:
    """(worst ratio of the backend's error to the allowed eager error, what is wrong or "")."""
    import torch

    if got.keys() != reference.keys():
        return float("inf"), f"other results than eager's: {sorted(got.keys() ^ reference.keys())[:3]}"
    # gradients that are zero in exact arithmetic (a key bias under softmax) are rounding noise of their neighbours
    gradients = [float(v.norm()) for k, v in reference.items() if k.startswith("grad of ")]
    typical = max(gradients, default=0.0)
    worst, problem = 0.0, ""
    for name, exact in reference.items():
        if got[name].shape != exact.shape:
            return float("inf"), f"{name} has shape {tuple(got[name].shape)}, eager's {tuple(exact.shape)}"
        if not bool(torch.isfinite(got[name]).all()) and bool(torch.isfinite(want[name]).all()):
            return float("inf"), f"{name} is not finite"
        size = float(exact.norm()) + (1e-2 * typical if name.startswith("grad of ") else 0.0)
        mine = float(torch.nan_to_num(got[name] - exact).norm())
        theirs = float(torch.nan_to_num(want[name] - exact).norm())
        ratio = mine / (theirs + FLOOR * size / FACTOR + 1e-30)
        if ratio > worst:
            worst = ratio
            if ratio > FACTOR:
                problem = f"{name}: error {mine:.3g}, eager's {theirs:.3g}, norm {size:.3g}"
    return worst, problem


def run_task(task: dict[str, Any]) -> dict[str, Any]:
    """One architecture in one direction; JSON values in and out."""
    import torch
    import torch._dynamo

    from tests.sweeps.backends import Counting, prepare, records

    warnings.simplefilter("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    prepare(task["backend"], task["threads"])
    torch._dynamo.reset()
    row, backward, device = BY_NAME[task["name"]], task["direction"] == "train", task["device"]
    begin = time.monotonic()
    model, values = build(row)
    model.train(backward)
    exact, compiled_model = copy.deepcopy(model).double().to(device), copy.deepcopy(model).to(device)
    if hasattr(exact, "set_experts_implementation"):
        with contextlib.suppress(ValueError, NotImplementedError):
            exact.set_experts_implementation("eager")  # torch's grouped matmul has no float64
    model = model.to(device)
    reference = _run(exact, exact, _cast(values, torch.float64, device), backward)
    # the reference hears the same numbers as float32 eager: inputs and weights were float32 before
    want = _run(model, model, _cast(values, torch.float32, device), backward)
    backend = Counting(task["backend"], task["options"])
    result: dict[str, Any] = {**task, "family": row.family, "eager_seconds": round(time.monotonic() - begin, 2)}
    begin = time.monotonic()
    with records(task["backend"]) as made:
        try:
            compiled = torch.compile(compiled_model, backend=backend, dynamic=task["dynamic"] or None)
            got = _run(compiled_model, compiled, _cast(values, torch.float32, device), backward)
            ratio, problem = judge(got, want, reference)
        except Exception as error:
            ratio, problem = float("inf"), first_line(error)
        graphs = list(made)
    thrown = [f"{record.name}: {reason}" for record in graphs for reason in record.fallbacks]
    reasons = sorted({f"{call.op}: {call.reason}" for record in graphs for call in record.calls if call.reason})
    if thrown and not problem:
        problem = thrown[0]
    if not backend.graphs and not problem:
        problem = "no graph reached the backend"
    return {
        **result,
        "status": "fail" if problem else "pass",
        "graphs": backend.graphs,
        "thrown": len(thrown),
        "kernels": sum(len(record.kernels) for record in graphs),
        "calls": sum(not call.reason for record in graphs for call in record.calls),
        "fallbacks": sum(bool(call.reason) for record in graphs for call in record.calls),
        "reasons": reasons,
        "ratio": round(min(ratio, 1e9), 3),
        "seconds": round(time.monotonic() - begin, 2),
        "message": problem,
    }


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.sweeps.zoo", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backend", default="fusionc")
    parser.add_argument("--options", default=None, help="JSON object passed as torch.compile's options")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--train", action="store_true", help="also forward+backward of the rows marked so")
    parser.add_argument("--train-only", action="store_true")
    parser.add_argument("--names", default="", help="only these architectures, comma separated")
    parser.add_argument("--dynamic", action="store_true", help="compile with symbolic sizes from the start")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="torch threads in each process")
    parser.add_argument("--timeout", type=float, default=400.0, help="seconds per architecture and direction")
    parser.add_argument("--stop-after", type=float, default=None, help="start no task after this many seconds")
    parser.add_argument("--out", type=Path, default=None, help="write all results here as JSON")
    parser.add_argument("--list", action="store_true", help="print the table of architectures and stop")
    args = parser.parse_args(argv)
    args.options = json.loads(args.options) if args.options else {}
    unknown = [name for name in args.names.split(",") if name and name not in BY_NAME]
    if unknown:
        parser.error(f"no such architecture: {', '.join(unknown)}; there are {', '.join(BY_NAME)}")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the sweep and print its table; exit status 1 when an architecture failed."""
    args = parse(argv)
    if args.list:
        for row in ROWS:
            print(f"{row.name:12s}{row.family:20s}{row.model:36s}{'forward, backward' if row.train else 'forward'}")
        return 0
    rows = [row for row in ROWS if not args.names or row.name in args.names.split(",")]
    tasks: list[dict[str, Any]] = []
    for row in rows:
        directions = [] if args.train_only else ["infer"]
        if row.train and (args.train or args.train_only):
            directions.append("train")
        for direction in directions:
            tasks.append(
                {
                    "name": row.name,
                    "direction": direction,
                    "backend": args.backend,
                    "options": args.options,
                    "device": args.device,
                    "dynamic": args.dynamic,
                    "threads": args.threads,
                }
            )
    results: list[dict[str, Any]] = []
    begin = time.monotonic()
    print("  ".join(f"{title:{width}s}" for title, width in COLUMNS), flush=True)

    def on_result(result: dict[str, Any]) -> None:
        results.append(result)
        cells = "  ".join(f"{str(result.get(title, '')):{width}s}" for title, width in COLUMNS)
        print(cells + ("  " + " ".join(result["message"].split()) if result["message"] else ""), flush=True)

    complete = run_tasks(
        "tests.sweeps.zoo",
        tasks,
        on_result,
        args.jobs,
        args.timeout,
        stop_after=args.stop_after,
        environment={"OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"},
    )
    passed = {d: sum(r["status"] == "pass" and r["direction"] == d for r in results) for d in ("infer", "train")}
    asked = {d: sum(task["direction"] == d for task in tasks) for d in ("infer", "train")}
    print(
        f"{args.backend} on {args.device}: forward {passed['infer']} of {asked['infer']}, "
        f"forward+backward {passed['train']} of {asked['train']}; "
        f"{sum(int(r.get('thrown', 0)) for r in results)} graphs thrown away; {time.monotonic() - begin:.0f} s"
    )
    if args.out is not None:
        args.out.write_text(json.dumps(sorted(results, key=lambda r: (r["name"], r["direction"])), indent=1) + "\n")
    return 0 if complete and len(results) == sum(passed.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
