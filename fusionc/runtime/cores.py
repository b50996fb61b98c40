"""How many cores this process may keep busy: those it may run on, and no more than its containers are given time for.

``os.cpu_count`` counts the machine's; a container with ``--cpus=4`` on a machine of 64 then starts 64 threads, which its
quota stops for most of each period.

Source: Linux kernel documentation, "Control Group v2" (cpu.max) and "CFS Bandwidth Control" (cpu.cfs_quota_us)
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

_MOUNT = Path("/sys/fs/cgroup")
_MINE = Path("/proc/self/cgroup")


def available() -> int:
    """At least 1."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [-(-quota // period) for quota, period in _quotas() if quota > 0 and period > 0]
    return max(1, min(count, *quotas)) if quotas else count


def _quotas() -> Iterator[tuple[int, int]]:
    """(microseconds of a core, of each period) of every group around this process that has a limit."""
    for line in _words(_MINE, "\n"):
        number, controllers, path = (*line.split(":", 2), "", "")[:3]
        names = ("cpu.max",) if number == "0" else ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        mount = _MOUNT if number == "0" else _MOUNT / "cpu"
        if number != "0" and "cpu" not in controllers.split(","):
            continue
        group = Path(os.path.normpath("/" + path.lstrip("/")))  # (a namespace may show the path with ..)
        for each in (group, *group.parents):
            found = [word for name in names for word in _words(mount / each.relative_to("/") / name, None)]
            if len(found) == 2 and all(word.isdigit() for word in found):  # (no limit: "max", -1)
                yield int(found[0]), int(found[1])


def _words(file: Path, separator: str | None) -> list[str]:
    try:
        return file.read_text().split(separator)
    except (OSError, ValueError):
        return []
