"""GPU: where the time of a baseline workload goes, kernel by kernel (torch's profiler, CUDA activity only).

python -m benchmarks.gpu_profile --only llama_decode bert --backends fusionc,inductor --top 12
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from typing import Any

import torch

from .common import compiled, matches, step, table


def kernels(run: Any, rounds: int) -> tuple[dict[str, list[float]], float]:
    """Microseconds of every launch by kernel name, and the busy microseconds of one round."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(rounds):
            run()
        torch.cuda.synchronize()
    found: dict[str, list[float]] = defaultdict(list)
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            found[event.name].append(event.device_time)
    return found, sum(map(sum, found.values())) / rounds


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_profile", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--only", nargs="+", help="workloads whose name contains one of these words")
    parser.add_argument("--backends", default="fusionc")
    parser.add_argument("--size", choices=("full", "quick"), default="full")
    parser.add_argument("--top", type=int, default=10)
    parser.add_argument("--width", type=int, default=70, help="characters of a kernel's name")
    args = parser.parse_args(argv)

    from .gpu_workloads import WORKLOADS, Where

    rounds = 5
    for workload in WORKLOADS:
        if not matches(workload.name, args.only):
            continue
        for backend in args.backends.split(","):
            torch._dynamo.reset()
            try:
                case = workload.build(Where("cuda", args.size))
                fn = compiled(case.fn, backend)
                inputs = case.inputs(3)
                reset = case.reset or (lambda: None)

                def run(case: Any = case, fn: Any = fn, inputs: Any = inputs, reset: Any = reset) -> None:
                    reset()
                    step(case, fn, inputs)

                for _ in range(4):
                    run()
                found, busy = kernels(run, rounds)
            except Exception as error:
                print(f"{workload.name} {backend}: {type(error).__name__}: {str(error)[:200]}")
                continue
            count = sum(map(len, found.values())) / rounds
            rows = [
                [
                    name[: args.width],
                    len(times) / rounds,
                    sum(times) / len(times),
                    sum(times) / rounds,
                    sum(times) / rounds / busy,
                ]
                for name, times in sorted(found.items(), key=lambda kv: -sum(kv[1]))[: args.top]
            ]
            print(f"\n{workload.name} {backend}: {count:.0f} launches, {busy:.0f} µs busy a step")
            print(table(["kernel", "a step", "µs each", "µs a step", "share"], rows))
            del case, fn, inputs, run
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
