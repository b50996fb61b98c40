"""Host time: microseconds that one compiled call and one launch cost the CPU.

    python -m benchmarks.host_cost                 # CUDA where there is one, else the CPU
    python -m benchmarks.host_cost --device cpu --backends eager,inductor,fusionc

Two chains of n dependent steps on 16×16 tensors, n = 1, 8, 32: softmax over alternating axes, which cannot fuse (one
generated kernel a step), and matmul (one library call a step).  Three ways to call what was compiled:

    call      the function that torch.compile returned: guards, Dynamo's and AOTAutograd's wrappers, everything
    backend   what the backend gave Dynamo: AOTAutograd's run-time wrapper and below
    program   what the backend's compiler gave AOTAutograd: allocations, launches, frees

The intercept over n is the price of a call, the slope that of a step.  On CUDA nothing waits for the device inside the
timed batches, so kernels run behind; on a CPU a step includes the (tiny) work itself: compare with eager's.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .common import (
    cold_caches,
    compiled,
    counts,
    first_line,
    floor_backend,
    machine,
    not_compiled,
    records,
    table,
    watch_compilers,
    write_json,
)


def softmax_chain(n: int) -> Callable[[Tensor], Tensor]:
    """n softmaxes over alternating axes."""

    def chain(x: Tensor) -> Tensor:
        for i in range(n):
            x = torch.softmax(x, i % 2)
        return x

    return chain


def matmul_chain(n: int) -> Callable[[Tensor], Tensor]:
    """n products with the same matrix."""

    def chain(x: Tensor) -> Tensor:
        w = x
        for _ in range(n):
            x = x @ w
        return x

    return chain


def per_call(fn: Callable[[], Any], launches: int, device: str, batches: int) -> float:
    """Median microseconds of a call over batches short enough for the launch queue not to fill."""
    count = max(5, 400 // max(1, launches))
    samples = []
    for _ in range(batches):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            fn()
        samples.append((time.perf_counter() - start) / count)
    if device == "cuda":
        torch.cuda.synchronize()
    return 1e6 * statistics.median(samples)


def measure(spec: str, chain: Callable[[Tensor], Tensor], n: int, x: Tensor, batches: int) -> dict[str, float]:
    """Microseconds of the three ways to call one compiled chain (only the first for eager)."""
    device = x.device.type
    result: dict[str, float] = {}
    with torch.no_grad():
        if spec == "eager":
            return {"call": per_call(lambda: chain(x), n, device, batches)}
        kept: dict[str, Any] = {}
        name, _, mode = spec.partition(":")
        real: Any = floor_backend if name == "floor" else torch._dynamo.lookup_backend(name)

        def capture(gm: torch.fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
            kept["backend"] = real(gm, example_inputs)
            return kept["backend"]

        before = records(spec)
        with watch_compilers() as log:
            # A mode is an argument of torch.compile, which then knows the backend itself: only whole calls are timed.
            fn = compiled(chain, spec) if mode else torch.compile(chain, backend=capture)
            fn(x)
        if unfit := not_compiled(counts(spec, before)) if "softmax" in chain.__qualname__ else None:
            raise RuntimeError(unfit)  # the matmul chain rightly has library calls only
        result["call"] = per_call(lambda: fn(x), n, device, batches)
        if "backend" in kept:
            backend = kept["backend"]
            result["backend"] = per_call(lambda: backend(x), n, device, batches)
            if log.functions:
                program = log.functions[0]
                boxed = getattr(program, "_boxed_call", False)
                result["program"] = per_call(lambda: program([x]) if boxed else program(x), n, device, batches)
    torch._dynamo.reset()
    return result


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host_cost", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backends", default="eager,floor,inductor,fusionc", help="comma-separated; name or name:mode")
    parser.add_argument("--lengths", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--batches", type=int, default=30)
    parser.add_argument("--json", default=None)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # one thread: the cost of waking others is no cost of a call
    x = torch.rand(16, 16, device=args.device)
    rows: list[dict[str, Any]] = []
    with cold_caches():
        for kind, make in (("softmax (kernels)", softmax_chain), ("matmul (library)", matmul_chain)):
            for spec in args.backends.split(","):
                points: dict[str, list[tuple[int, float]]] = {}
                row: dict[str, Any] = {"chain": kind, "backend": spec, "fit": {}}
                try:
                    for n in args.lengths:
                        for way, value in measure(spec, make(n), n, x, args.batches).items():
                            points.setdefault(way, []).append((n, value))
                except Exception as error:
                    row["error"] = first_line(error)
                    torch._dynamo.reset()
                row["us"] = points
                for way, found in points.items():
                    if len(found) > 1:
                        line = statistics.linear_regression(*zip(*found))
                        row["fit"][way] = {"intercept_us": line.intercept, "slope_us": line.slope}
                rows.append(row)
    headers = ["chain", "backend"]
    for way in ("call", "backend", "program"):
        headers += [f"{way}: µs for n={args.lengths[0]}", "µs a step"]
    body = []
    for row in rows:
        line_: list[Any] = [row["chain"], row["backend"]]
        for way in ("call", "backend", "program"):
            line_ += [row["us"][way][0][1] if way in row["us"] else None, row["fit"].get(way, {}).get("slope_us")]
        body.append([*line_, row.get("error", "")])
    print(table([*headers, ""], body))
    write_json(args.json, {"machine": machine(), "settings": vars(args), "rows": rows})
    return 1 if any("error" in r for r in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
