"""Getting ready for Triton beside tracing: once, never in the way of who does not compile, never twice at a time."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from typing import Any

import pytest
import torch

from fusionc.runtime import launch, ready
from fusionc.runtime.device import known
from fusionc.schedule.rules_triton import default_plan
from tests.codegen import kernels

CASE = next(c for c in kernels.cases() if not c.kernel.sizes)
TEXT = """
import triton
import triton.language as tl


@triton.jit
def nothing(x):
    tl.store(x, 1.0)
"""


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> list[threading.Event]:
    """A process that has not begun; the work ends when the event is set and is counted by the list's length."""
    started: list[threading.Event] = []

    def work() -> None:
        started.append(threading.Event())
        assert started[-1].wait(20)

    monkeypatch.setattr(ready, "_thread", None)
    monkeypatch.setattr(ready, "_prepare", work)
    return started


def test_nothing_is_started_where_no_gpu_is_in_use(fresh: list[threading.Event]) -> None:
    ready.begin()
    ready.wait()
    assert not fresh and ready._thread is None


def test_it_is_started_once_and_compiling_waits_for_it(
    fresh: list[threading.Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ready.torch.cuda, "is_initialized", lambda: True)
    ready.begin()
    ready.begin(force=True)
    loaded: list[Any] = []
    user = threading.Thread(target=lambda: loaded.append(launch.load_module(TEXT)))
    user.start()
    user.join(0.2)
    assert user.is_alive() and not loaded
    fresh[0].set()
    user.join(20)
    assert len(fresh) == 1 and hasattr(loaded[0], "nothing")


def test_its_own_thread_does_not_wait_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[Any] = []
    monkeypatch.setattr(ready, "_thread", None)
    monkeypatch.setattr(ready, "_prepare", lambda: done.append(launch.load_module(TEXT)))
    ready.begin(force=True)
    ready.wait()
    assert done


def test_a_failure_is_left_to_who_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no GPU here (or Triton may be broken): the real work ends quietly."""
    monkeypatch.setattr(ready, "_PROBE", "no module")
    ready._prepare()


def test_the_backend_starts_no_thread_without_cuda() -> None:
    code = (
        "import sys, threading, fusionc.backend; assert threading.active_count() == 1 and 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_who_asks_for_the_driver_waits_too(fresh: list[threading.Event]) -> None:
    from fusionc.runtime.templates import Template

    ready.begin(force=True)
    device = torch.device("cpu")
    kernel = Template(TEXT, "nothing", ("*fp32",), (), device, 4)
    generated: Any = launch.TritonKernel(
        TEXT, "nothing", CASE.kernel, default_plan(CASE.kernel, CASE.sizes, known("sm_90"))
    )
    users = [threading.Thread(target=lambda k=k: _quietly(k)) for k in (kernel.prepare, generated.compile)]
    for user in users:
        user.start()
    users[0].join(0.2)
    assert all(user.is_alive() for user in users)
    fresh[0].set()
    for user in users:
        user.join(20)
    assert not any(user.is_alive() for user in users)


def _quietly(f: Any) -> None:
    with contextlib.suppress(Exception):  # there is no GPU
        f()
