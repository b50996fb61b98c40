"""One optimiser step over many parameters of different shapes: eager (foreach, fused) against the compilers.

    python -m benchmarks.optimizer                                   # 100 parameters, H200
    python -m benchmarks.optimizer --device cpu --backends eager,fusionc

Host time is that of a call that waits for nothing; the whole is the median with the device's time in it.  Launches are
those of fusionc's record.  Every way starts from the same numbers; after three steps the largest difference from a
float64 step is compared with eager's.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch

from fusionc.record import collect

SHAPES = ((256, 256), (256,), (64, 3, 7, 7), (1024, 256), (1024,), (33, 17), (5,), (512, 64), (64,), (128, 128, 3, 3))


def make(
    count: int, device: str, dtype: torch.dtype, **options: Any
) -> tuple[list[torch.nn.Parameter], Callable[[], None]]:
    """Parameters with gradients, and the step."""
    rng = torch.Generator().manual_seed(0)
    parameters = []
    for k in range(count):
        shape = SHAPES[k % len(SHAPES)]
        p = torch.nn.Parameter(torch.randn(shape, generator=rng).to(device, dtype))
        p.grad = torch.randn(shape, generator=rng).to(device, dtype)
        parameters.append(p)
    options.setdefault("capturable", device != "cpu")
    optimizer = torch.optim.Adam(parameters, lr=1e-2, **options)

    def step() -> None:
        optimizer.step()

    return parameters, step


def host_us(step: Callable[[], None], device: str, calls: int = 50) -> float:
    """Host microseconds of a call, best of five."""
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(calls):
            step()
        best = min(best, (time.perf_counter() - start) / calls)
        if device != "cpu":
            torch.cuda.synchronize()
    return 1e6 * best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backends", default="eager,fused,inductor,fusionc,fusionc:loop")
    given = parser.parse_args()
    exact, reference = make(given.count, "cpu", torch.float64, foreach=False)
    for _ in range(3):
        reference()
    for name in given.backends.split(","):
        options: dict[str, Any] = {"fused": {"fused": True}, "fusionc:loop": {"foreach": False}}.get(
            name, {"foreach": True}
        )
        parameters, step = make(given.count, given.device, torch.float32, **options)
        launches = ""
        try:
            step()
            start = time.perf_counter()
            if name not in ("eager", "fused"):
                step = torch.compile(step, backend=name.split(":")[0])
            with collect() as records:
                step()
            cold = time.perf_counter() - start
            step()
            error = max((a.detach().cpu().double() - b.detach()).abs().max().item() for a, b in zip(parameters, exact))
            if records:
                count = sum(k.uses for r in records for k in r.kernels)
                launches = f"{count} launches, {sum(len(r.calls) for r in records)} calls"
            for _ in range(12):
                step()
            host = host_us(step, given.device)
            whole = ""
            if given.device != "cpu":
                from triton.testing import do_bench

                whole = f"{1e3 * do_bench(step, return_mode='median'):8.1f} us with the device"
            print(
                f"{name:14s} host {host:8.1f} us {whole}  error {error:.1e}  first call {cold:5.2f} s  {launches}",
                flush=True,
            )
        except Exception as e:  # noqa: BLE001 - one way that fails does not stop the others
            print(f"{name:14s} FAILED {type(e).__name__}: {str(e).splitlines()[0][:160]}", flush=True)


if __name__ == "__main__":
    main()
