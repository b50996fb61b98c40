"""What is compiled for later begins after everything else, and not once Python ends."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest

from fusionc.runtime import launch, turns


def test_later_work_begins_after_other_work_has_begun() -> None:
    said: list[str] = []
    held = threading.Event()
    with turns.first():
        with turns.later():
            wait_later = launch.compile_beside([lambda: said.append("later")] * 2)
        wait = launch.compile_beside([lambda: held.wait(10) and said.append("first")])
        time.sleep(0.1)
        assert said == []
    wait_later.result()  # the other job has begun: it need not have ended
    assert said == ["later", "later"]
    held.set()
    wait.result()
    assert said[2:] == ["first"] and turns._others == 0


def test_jobs_that_wait_for_a_slot_come_before_later_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(launch, "_slots", threading.BoundedSemaphore(1))
    begun, held = threading.Event(), threading.Event()

    def long() -> None:
        begun.set()
        held.wait(10)

    wait = launch.compile_beside([long, lambda: said.append("first"), lambda: said.append("first")])
    assert begun.wait(10)
    with turns.later():
        wait_later = launch.compile_beside([lambda: said.append("later")])
    time.sleep(0.1)
    assert said == []
    held.set()
    wait.result()
    wait_later.result()
    assert said == ["first", "first", "later"]


def test_patience_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "_PATIENCE_SECONDS", 0.1)
    with turns.first(), turns.later():
        assert launch.compile_many([lambda: 3]) == [3]


@pytest.mark.parametrize("where", ["thread", "caller"])
def test_who_cannot_start_threads_leaves_nobody_waiting(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **more: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(launch, "ThreadPoolExecutor", refuse)
    with pytest.raises(RuntimeError, match="new thread"):
        if where == "thread":
            launch.compile_beside([int, int]).result()
        else:
            launch.compile_many([int, int], workers=2)
    assert turns._others == 0


def test_a_program_that_ends_waits_for_nothing_that_has_not_begun() -> None:
    code = """
from fusionc.runtime import launch, turns

held = turns.first()
held.__enter__()  # a race that goes on
with turns.later():
    launch.compile_beside([lambda k=k: print("begun", k) for k in range(9)])
raise SystemExit(7)
"""
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 7 and done.stdout == "", done.stderr
    assert time.monotonic() - started < turns._PATIENCE_SECONDS
