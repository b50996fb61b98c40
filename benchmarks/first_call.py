"""What the first call of a process waits for: its threads, sampled while it compiles one workload with empty caches.

``python -m benchmarks.first_call llama_decode --backend fusionc --only fusionc/`` prints seconds by function, those below
it included, and by line where the thread was; name caches in use (``FUSIONC_CACHE``, ``TRITON_CACHE_DIR``) for a warm
start. ``--others`` adds where all other threads were, the sum of them, whether they worked or waited. A profiler would
charge each of Python's calls and so blame what is written in Python; samples do not.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from types import FrameType

from .common import cache_environment
from .gpu import first_call_s, workloads

_STEP_S = 0.003


def place(frame: FrameType, line: bool = False) -> str:
    """File (from its package on), function and, if asked for, line of a frame."""
    file = frame.f_code.co_filename.split("site-packages/")[-1].removeprefix(os.getcwd() + "/")
    return f"{file}:{frame.f_code.co_name}" + (f":{frame.f_lineno}" if line else "")


class Sampler:
    """Counts seconds of the main thread by function and by line, in a thread of its own, until it is stopped."""

    def __init__(self) -> None:
        self.below: defaultdict[str, float] = defaultdict(float)
        self.at: defaultdict[str, float] = defaultdict(float)
        self.others: defaultdict[str, float] = defaultdict(float)  # by function, of all other threads
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
            frames = sys._current_frames()
            now = time.perf_counter()
            frame = frames.pop(main, None)
            if frame is not None:
                self.at[place(frame, line=True)] += now - before
                for name in {place(f) for f in _callers(frame)}:
                    self.below[name] += now - before
            frames.pop(threading.get_ident(), None)
            for other in frames.values():
                for name in {place(f) for f in _callers(other)}:
                    self.others[name] += now - before
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
    parser.add_argument("--others", action="store_true", help="also the other threads, in all of them together")
    parser.add_argument("--least", type=float, default=0.03, help="seconds from which a function is shown")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="first-call-") as folder:
        os.environ.update({k: v for k, v in cache_environment(folder).items() if k not in os.environ})
        found = Sampler()
        seconds = first_call_s(args.name, args.backend, args.device, args.size, found)
    print(f"{args.name}, {args.backend}: first call {seconds:.2f} s (sampled)")
    shown = [("with what it calls", found.below), ("where it was", found.at)]
    if args.others:
        shown.append(("other threads, with what they call", found.others))
    for title, counted in shown:
        print(title)
        for name, s in sorted(counted.items(), key=lambda item: -item[1]):
            if s >= args.least and args.only in name:
                print(f"  {s:.3f} {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
