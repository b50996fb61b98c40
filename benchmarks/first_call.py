"""What the first call of a process waits for: its main thread, sampled while it compiles one workload with empty caches.

``python -m benchmarks.first_call llama_decode --backend fusionc --only fusionc/`` prints seconds by function, those below
it included, and by line where the thread was; name caches in use (``FUSIONC_CACHE``, ``TRITON_CACHE_DIR``) for a warm
start. A profiler would charge each of Python's calls and so blame what is written in Python; samples do not.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from types import FrameType

from .gpu import prime, workloads

_STEP_S = 0.003


def place(frame: FrameType, line: bool = False) -> str:
    """File (from its package on), function and, if asked for, line of a frame."""
    file = frame.f_code.co_filename.split("site-packages/")[-1].removeprefix(os.getcwd() + "/")
    return f"{file}:{frame.f_code.co_name}" + (f":{frame.f_lineno}" if line else "")


class Sampler:
    """Counts seconds of the main thread by function and by line, in a thread of its own, until it is stopped."""

    def __init__(self) -> None:
        self.below: Counter[str] = Counter()
        self.at: Counter[str] = Counter()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        main = threading.main_thread().ident
        assert main is not None
        before = time.perf_counter()
        while not self._end.wait(_STEP_S):
            frame = sys._current_frames().get(main)
            now = time.perf_counter()
            if frame is not None:
                self.at[place(frame, line=True)] += now - before  # type: ignore[assignment]
                for name in {place(f) for f in _callers(frame)}:
                    self.below[name] += now - before  # type: ignore[assignment]
            before = now


def _callers(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.first_call", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", choices=sorted(workloads()))
    parser.add_argument("--backend", default="fusionc", help="name or name:mode")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--size", choices=("full", "quick", "tiny"), default="full")
    parser.add_argument("--only", default="", help="functions of files whose path contains this")
    parser.add_argument("--least", type=float, default=0.03, help="seconds from which a function is shown")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="first-call-") as folder:
        for name in ("FUSIONC_CACHE", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
            os.environ.setdefault(name, os.path.join(folder, name))
        return _measure(args)


def _measure(args: argparse.Namespace) -> int:
    import torch

    from .gpu import compiled, step
    from .gpu_workloads import Where

    case = workloads()[args.name].build(Where(args.device, args.size))
    inputs = case.inputs(100)
    prime()
    (case.reset or (lambda: None))()
    start = time.perf_counter()
    with Sampler() as found:
        step(case, compiled(case.fn, args.backend), inputs)
        if args.device == "cuda":
            torch.cuda.synchronize()
    print(f"{args.name}, {args.backend}: first call {time.perf_counter() - start:.2f} s (sampled)")
    for title, seconds in (("with what it calls", found.below), ("where it was", found.at)):
        print(title)
        for name, s in seconds.most_common():
            if s >= args.least and args.only in name:
                print(f"  {s:.3f} {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
