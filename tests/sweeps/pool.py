"""Worker processes for sweeps: a task that kills its process, or hangs, costs itself and nothing else.

A sweep module defines ``run_task(task: dict) -> dict``; ``run_tasks`` starts ``python -m tests.sweeps.pool MODULE``
processes, hands them one JSON line per task and reads one JSON line per result.  A worker that dies or exceeds the
task's time is replaced, and its task is reported as a crash or a timeout.  Workers are also replaced after a number of
tasks, because compiled code and caches pile up in a process.
"""

from __future__ import annotations

import importlib
import json
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


class _Worker:
    """One child process and its pipes. ``ask`` returns the child's answer, or a crash or timeout result."""

    def __init__(self, module: str, environment: dict[str, str]) -> None:
        read, write = os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.sweeps.pool", module, str(write)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL if not os.environ.get("SWEEP_STDERR") else None,
            pass_fds=(write,),
            cwd=ROOT,
            env={"FUSIONC_WORKERS": "0", **os.environ, **environment},
            start_new_session=True,
        )
        os.close(write)
        self.answers = read
        self.buffer = b""
        self.tasks = 0

    def ask(self, task: dict[str, Any], timeout: float) -> dict[str, Any]:
        self.tasks += 1
        # the first task also pays for the imports
        deadline = time.monotonic() + timeout + (90.0 if self.tasks == 1 else 0.0)
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(task).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return {**task, "status": "crash", "message": self._obituary()}
        while b"\n" not in self.buffer:
            left = deadline - time.monotonic()
            ready = select.select([self.answers], [], [], max(left, 0.0))[0]
            if not ready:
                self.stop()
                return {**task, "status": "crash", "message": f"timeout: no answer within {timeout:.0f} s"}
            chunk = os.read(self.answers, 1 << 16)
            if not chunk:
                return {**task, "status": "crash", "message": self._obituary()}
            self.buffer += chunk
        line, self.buffer = self.buffer.split(b"\n", 1)
        return json.loads(line)

    def _obituary(self) -> str:
        code = self.process.wait()
        self.stop()
        if code < 0:
            return f"the process died of {signal.Signals(-code).name}"
        return f"the process left with exit status {code}"

    def stop(self) -> None:
        # the child leads its own session: compilers that it started end with it
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass
        self.process.wait()
        if self.answers >= 0:
            os.close(self.answers)
            self.answers = -1

    @property
    def usable(self) -> bool:
        return self.answers >= 0 and self.process.poll() is None


def run_tasks(
    module: str,
    tasks: Sequence[dict[str, Any]],
    on_result: Callable[[dict[str, Any]], None],
    jobs: int = 2,
    timeout: float = 120.0,
    tasks_per_worker: int = 250,
    stop_after: float | None = None,
    environment: dict[str, str] | None = None,
) -> bool:
    """Run every task in ``jobs`` worker processes; ``on_result`` is called under a lock, in order of completion.

    Returns False when ``stop_after`` seconds passed before all tasks were started. Tasks and results are JSON values;
    a result has at least "status" and "message".
    """
    waiting: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    for task in tasks:
        waiting.put(task)
    lock = threading.Lock()
    begin = time.monotonic()
    complete = True
    problems: list[BaseException] = []
    live: set[_Worker] = set()

    def serve() -> None:
        nonlocal complete
        worker: _Worker | None = None
        try:
            while not problems:
                if stop_after is not None and time.monotonic() - begin > stop_after:
                    complete = complete and waiting.empty()
                    return
                try:
                    task = waiting.get_nowait()
                except queue.Empty:
                    return
                if worker is None or not worker.usable or worker.tasks >= tasks_per_worker:
                    if worker is not None and worker.usable:
                        worker.stop()
                    worker = _Worker(module, environment or {})
                    live.add(worker)
                begun = time.monotonic()
                result = worker.ask(task, timeout)
                result.setdefault("seconds", round(time.monotonic() - begun, 2))
                if result.pop("last", False):  # the process has lost its GPU, say
                    worker.stop()
                with lock:
                    on_result(result)
        except BaseException as error:  # reported by the caller's thread
            problems.append(error)
        finally:
            if worker is not None and worker.usable:
                worker.stop()

    threads = [threading.Thread(target=serve, daemon=True) for _ in range(max(1, min(jobs, len(tasks))))]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            while thread.is_alive():
                thread.join(0.2)
    except KeyboardInterrupt:
        for worker in live:
            if worker.usable:
                worker.stop()
        raise
    if problems:
        raise problems[0]
    return complete


def _child(module: str, answers: int) -> None:
    run_task = importlib.import_module(module).run_task
    with os.fdopen(answers, "w") as out:
        for line in sys.stdin:
            task = json.loads(line)
            try:
                result = run_task(task)
            except Exception as error:
                result = {**task, "status": "fail", "message": first_line(error)}
            out.write(json.dumps(result) + "\n")
            out.flush()


def first_line(error: BaseException) -> str:
    """The error's type and the first line of its text that says something, on one line without tabs."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else ""
    if text.endswith("raised:") and len(lines) > 1:  # Dynamo's wrapper around what a backend raised
        text = lines[1]
    return f"{type(error).__name__}: {text}".replace("\t", " ")[:300]


if __name__ == "__main__":
    _child(sys.argv[1], int(sys.argv[2]))
