"""Cores that a process may keep busy: affinity, and the quotas of the groups around it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fusionc.runtime import compile_workers, cores


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine of 64 cores whose control groups lie in a folder of the test's."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    monkeypatch.setattr(cores, "_MOUNT", tmp_path)
    monkeypatch.setattr(cores, "_MINE", tmp_path / "mine")
    return tmp_path


def put(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def test_without_groups() -> None:
    assert cores.available() == 64


@pytest.mark.parametrize(
    ("limits", "wanted"),
    [(["max 100000", "max 100000"], 64), (["400000 100000", "max 100000"], 4), (["max 100000", "250000 100000"], 3),
     (["800000 100000", "400000 100000"], 4), (["5000 100000", "max 100000"], 1), (["nonsense", ""], 64), (["0 0", "-1 5"], 64)],
)  # fmt: skip
def test_groups_of_version_2(machine: Path, limits: list[str], wanted: int) -> None:
    put(machine / "mine", "0::/pods/one\n")
    put(machine / "pods/one/cpu.max", limits[0] + "\n")
    put(machine / "pods/cpu.max", limits[1] + "\n")
    assert cores.available() == wanted


def test_the_root_of_a_container(machine: Path) -> None:
    put(machine / "mine", "0::/../..\n")
    put(machine / "cpu.max", "200000 100000\n")
    assert cores.available() == 2


@pytest.mark.parametrize(("quota", "wanted"), [("-1", 64), ("600000", 6)])
def test_groups_of_version_1(machine: Path, quota: str, wanted: int) -> None:
    put(machine / "mine", "5:memory:/docker/x\n4:cpu,cpuacct:/docker/x\n1:cpuacct:/docker/x\nno group\n")
    put(machine / "cpu/docker/x/cpu.cfs_quota_us", quota + "\n")
    put(machine / "cpu/docker/x/cpu.cfs_period_us", "100000\n")
    assert cores.available() == wanted


def test_a_small_quota_gets_no_workers(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FUSIONC_WORKERS", raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert compile_workers.count() == 12
    put(machine / "mine", "0::/\n")
    put(machine / "cpu.max", "400000 100000\n")
    assert compile_workers.count() == 0
