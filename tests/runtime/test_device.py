"""Calls run with their own GPU as the current one: without a GPU, torch's view of the devices is planted.  Sizes of caches."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fusionc.runtime import device
from fusionc.runtime.device import on_device


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Two GPUs; the list's last element is the current one."""
    current = [0]

    @contextlib.contextmanager
    def use(index: int) -> Iterator[None]:
        current.append(index)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", use)
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


def test_size_of_a_cache(tmp_path: Path) -> None:
    for text, size in (("32768K\n", 32 << 20), ("48M\n", 48 << 20), ("", 0), ("many", 0)):
        (tmp_path / "size").write_text(text)
        assert device._cache_bytes(str(tmp_path / "size")) == size
    assert device._cache_bytes(str(tmp_path / "none")) == 0


def test_streams_begin_at_the_largest_cache_that_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(machine: str, *sizes: int) -> int | None:
        monkeypatch.setattr(device.platform, "machine", lambda: machine)
        monkeypatch.setattr(device.glob, "glob", lambda pattern: sizes)
        monkeypatch.setattr(device, "_cache_bytes", lambda size: size)
        return device.stream_bytes.__wrapped__()

    assert found("x86_64", 32 << 10, 2 << 20, 105 << 20) == 105 << 20
    assert found("x86_64", 32 << 10, 2 << 20) == found("x86_64") == 32 << 20
    assert found("aarch64", 64 << 20) is None
