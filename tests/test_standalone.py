"""What the Python files of a dump call; that whole dumps run is tested end to end."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from fusionc.repro import Spec
from fusionc.standalone import run_program


def test_a_program_that_counts_up_in_a_cache_runs_again_and_again(capsys: pytest.CaptureFixture[str]) -> None:
    positions = []

    def step(args: list[Any]) -> tuple[torch.Tensor]:
        cache, position, many = args
        positions.append(int(position))
        cache.index_copy_(0, position.reshape(1), torch.ones(1) + many.sum())
        position.add_(1)
        return (cache.sum(),)

    inputs = [Spec("float32", (4,), (1,), "cpu"), Spec("int64", (), (), "cpu"), Spec("int32", (3, 5), (0, 1), "cpu")]
    assert run_program(step, inputs) == 0
    assert "us a call" in capsys.readouterr().out
    first, once, *later = positions
    assert later and {first, *later} == {once}, "each call finds the counter as it was"


def test_only_the_call_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    copy, clock = torch.Tensor.copy_, time.perf_counter
    monkeypatch.setattr(torch.Tensor, "copy_", lambda *args: events.append("copied") or copy(*args))
    monkeypatch.setattr(time, "perf_counter", lambda: events.append("clock") or clock())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: events.append("waited"))
    assert run_program(lambda args: events.append("called") or (), [Spec("int64", (3,), (1,), "cpu")]) == 0
    at = events.index("clock")
    assert events[at - 2 : at + 4] == ["copied", "waited", "clock", "called", "waited", "clock"]
