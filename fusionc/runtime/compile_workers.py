"""Processes that compile Triton kernels beside this one (`compile_worker`), for Python's lock.

Of the 95 ms that a kernel takes to compile, 30 to 40 hold the lock (its text becomes IR, IR is printed and stored), and as
much again on a slower machine: 16 threads compile little faster than two. A worker compiles into the same cache folder,
and this process then finds the binary there, which takes 5 ms. Where all of them are at work, as many threads wait for one
again: a thread that compiles keeps the lock from those that only load, and from the main thread (H200, 16 cores, ConvNeXt's
55 kernels: 2.2 s; 2.6 where threads compile meanwhile). All is best effort: where there is no worker, and wherever one fails
or does not answer, the thread compiles by itself.

Workers take half a second to start, which is spent while AOTAutograd traces (`start`), and end after a minute without work.
Only where there are many cores: below, threads have them busy already. ``FUSIONC_WORKERS`` sets their number; 0: none.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import queue
import select
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from .compile_worker import others_hook
from .cores import available

__all__ = ["compile_elsewhere", "start"]

_MOST = 12
_CORES = 8  # fewer are kept busy by threads
_ANSWER_SECONDS = 120.0
_PATIENCE_SECONDS = 2.0  # for a worker that another thread has
_PLAIN = (bool, int, float, str, type(None))

_free: queue.SimpleQueue[Worker] = queue.SimpleQueue()
_team: list[Worker | None] = []  # all that were started; None: is being started
_busy = 0  # how many have a job
_waiting = 0  # how many threads wait for one of them: no more than these, or cores would be idle
_home = 0  # the process that they work for
_guard = threading.Lock()


class Worker:
    """One process and its pipes."""

    def __init__(self) -> None:
        script = str(Path(__file__).with_name("compile_worker.py"))
        # -I: neither the script's folder nor the current one is among them (Python passes over what is no text, too)
        packages = json.dumps([p for p in sys.path if p and isinstance(p, str)])
        self.process = subprocess.Popen(
            [sys.executable, "-I", script, packages], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, bufsize=0, start_new_session=True,
            env={**os.environ, "FUSIONC_WORKERS": "0"})  # fmt: skip
        self.rest = b""
        self.pipes = threading.Lock()  # who holds it uses them: they are not closed meanwhile

    def ask(self, job: dict[str, Any]) -> str:
        """The answer to a job.  Raises OSError or TimeoutError if the process has gone or says nothing."""
        with self.pipes:
            assert self.process.stdin is not None
            self.process.stdin.write(json.dumps(job).encode() + b"\n")
            return str(json.loads(self.line(_ANSWER_SECONDS)))

    def line(self, seconds: float) -> bytes:
        """The next line that it says; with ``pipes`` held."""
        assert self.process.stdout is not None
        end = time.monotonic() + seconds
        something = select.poll()  # (`select` takes no descriptors beyond 1023)
        something.register(self.process.stdout, select.POLLIN)
        while b"\n" not in self.rest:
            left = end - time.monotonic()
            if left <= 0 or not something.poll(left * 1000):
                raise TimeoutError("no answer")
            part = os.read(self.process.stdout.fileno(), 1 << 16)
            if not part:
                raise BrokenPipeError("the process has ended")
            self.rest += part
        line, self.rest = self.rest.split(b"\n", 1)
        return line

    def ready(self) -> bool:
        """Wait until it has started."""
        try:
            with self.pipes:
                return self.line(60) == b"ready"
        except (OSError, ValueError):
            return False

    def stop(self) -> None:
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            self.process.kill()
            self.process.wait(5)
        with self.pipes:
            self.close()

    def close(self) -> None:
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


def count() -> int:
    """How many workers this process gets."""
    if not sys.executable or getattr(sys, "frozen", False):
        return 0  # there is no Python to start, only a program that holds one
    word = os.environ.get("FUSIONC_WORKERS", "")
    if word.isdigit():
        return min(int(word), 64)
    cores = available()
    ranks = os.environ.get("LOCAL_WORLD_SIZE", "")  # torchrun: as many processes as this one share the cores
    cores //= max(1, int(ranks)) if ranks.isdigit() else 1
    return min(_MOST, cores * 3 // 4) if cores >= _CORES else 0


def start() -> None:
    """Start the workers of this process, if it has none; returns at once.  Call when something will be compiled."""
    global _home, _free
    with _guard:
        if _home != os.getpid():
            _home = os.getpid()
            atexit.register(_end, _home)
        _team[:] = [w for w in _team if w is None or w.process.poll() is None]
        if _team:
            return
        _free = queue.SimpleQueue()
        for _ in range(count()):
            _team.append(None)
            try:
                threading.Thread(target=_attend, args=(_free,), name="fusionc-worker", daemon=True).start()
            except RuntimeError:  # no more threads
                _team.remove(None)


def _attend(free: queue.SimpleQueue[Worker]) -> None:
    """Start one worker, put it among the free ones once it is ready, and clear away what is left when it has ended."""
    worker = None
    with contextlib.suppress(OSError, ValueError, TypeError):
        worker = Worker()
    with _guard:
        if None in _team:
            _team.remove(None)
        if worker is not None:
            _team.append(worker)
    if worker is None:
        return
    if worker.ready():
        free.put(worker)
        worker.process.wait()
    worker.stop()


def _end(pid: int) -> None:
    if pid == os.getpid():  # not in a forked child
        for worker in [w for w in _team if w is not None]:
            worker.stop()


def _after_fork() -> None:
    """A child has no workers, and holds nothing of its parent's open."""
    global _guard, _free, _home, _busy, _waiting
    _guard, _free, _home, _busy, _waiting = threading.Lock(), queue.SimpleQueue(), 0, 0, 0
    for worker in [w for w in _team if w is not None]:
        worker.close()
        worker.process.returncode = 0  # it is not the child's to wait for
    _team.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def compile_elsewhere(source: Any, target: Any, options: dict[str, Any], folder: str) -> bool:
    """Have an ``ASTSource`` of a generated text compiled into a cache folder; False if no worker had time or it did not work.

    The caller compiles it with Triton in any case, and finds it in the cache or not.
    """
    global _busy
    if _home != os.getpid() or not (_busy or not _free.empty()):
        return False
    job = _job(source, target, options, folder)
    if job is None:
        return False
    worker = _take()
    if worker is None:
        return False
    try:
        answer = worker.ask(job)
        _free.put(worker)
    except (OSError, ValueError):  # it ends just now, or something is wrong with it
        worker.stop()
        return False
    finally:
        with _guard:
            _busy -= 1
    return not answer


def _take() -> Worker | None:
    """A worker that is free, or is so before long; None where there is none, or where as many threads wait as have one."""
    global _busy, _waiting
    end = time.monotonic() + _PATIENCE_SECONDS
    with _guard:
        patient = _waiting < _busy
        _waiting += patient
    try:
        while True:
            try:
                worker = _free.get(timeout=0.05 if patient else 0)
            except queue.Empty:
                if not patient or not _busy or time.monotonic() > end:
                    return None
                continue
            if worker.process.poll() is None:  # (else it has ended after a minute without work)
                with _guard:
                    _busy += 1
                return worker
    finally:
        with _guard:
            _waiting -= patient


def _job(source: Any, target: Any, options: dict[str, Any], folder: str) -> dict[str, Any] | None:
    """The job as plain values, None where it cannot be told in these or must be done by this process's Triton."""
    import triton
    from triton import knobs
    from triton.runtime.cache import triton_key

    if others_hook() or knobs.compilation.listener is not None:
        return None
    if knobs.compilation.always_compile or knobs.compilation.override or knobs.compilation.dump_ir:
        return None

    fn = source.fn
    if not all(isinstance(v, _PLAIN) for v in (*source.constants.values(), *options.values())):
        return None
    if any(len(place) != 1 for place in (*source.constants, *source.attrs)):
        return None
    return {
        "module": fn.fn.__module__,
        "path": fn.fn.__code__.co_filename,
        "name": fn.fn.__name__,
        "signature": dict(source.signature),
        "constants": [[place[0], value] for place, value in source.constants.items()],
        "attributes": [[place[0], values] for place, values in source.attrs.items()],
        "target": [target.backend, target.arch, target.warp_size],
        "options": options,
        "folder": os.path.abspath(folder),  # also where this process has moved since
        "libraries": triton_key(),
        "triton": [triton.__version__, triton.__file__],
    }
