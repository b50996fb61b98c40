"""Calls run with their own GPU as the current one: without a GPU, torch's view of the devices is planted."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fusionc.runtime.device import on_device


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Two GPUs; the list's last element is the current one."""
    current = [0]

    @contextlib.contextmanager
    def device(index: int) -> Iterator[None]:
        current.append(index)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", device)
    return current


def test_a_call_runs_on_its_device(gpus: list[int]) -> None:
    def call(args: list[Any]) -> list[Any]:
        return [*args, gpus[-1]]

    assert on_device(call, torch.device("cuda", 1))([7]) == [7, 1]
    assert gpus == [0]
    assert on_device(call, torch.device("cuda", 0))([7]) == [7, 0]


def test_one_gpu_and_cpus_cost_nothing(gpus: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    assert on_device(len, torch.device("cpu")) is len
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert on_device(len, torch.device("cuda", 0)) is len
