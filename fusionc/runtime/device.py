"""What this machine can run on, asked for without side effects.

CUDA is initialised only when a caller asks about the device itself, and never in a forked child, where that would break
both processes.  Nothing here imports triton.
"""

from __future__ import annotations

import functools
import glob
import platform
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

_CACHE = 32 << 20  # bytes of a CPU's last cache, where nothing better is known
ALIGNMENT = 16  # bytes that a pointer must be a multiple of for the widest memory access


@dataclass(frozen=True)
class DeviceProperties:
    """What the rules that choose plans need to know.

    `bandwidth` is in bytes a second (the data sheet's until `set_bandwidth` is told a measured one), `cache` is the
    last-level cache in bytes, `threads` how many one processor holds.
    """

    kind: str  # "cuda", "hip" or "cpu"
    arch: str  # "sm_90", "gfx942", …; "" for a CPU
    processors: int
    warp: int = 32
    threads: int = 2048
    cache: int = 50 << 20
    bandwidth: float = 1e12


# For targets that are not there: enough to choose a plan by.
_KNOWN = {
    "sm_80": DeviceProperties("cuda", "sm_80", 108, 32, 2048, 40 << 20, 1.5e12),
    "sm_90": DeviceProperties("cuda", "sm_90", 132, 32, 2048, 50 << 20, 4.0e12),
    "sm_100": DeviceProperties("cuda", "sm_100", 148, 32, 2048, 126 << 20, 7.0e12),
    "gfx942": DeviceProperties("hip", "gfx942", 304, 64, 2048, 256 << 20, 5.0e12),
}
TARGETS = tuple(_KNOWN)
_bandwidth: dict[str, float] = {}


def in_bad_fork() -> bool:
    """True in a forked child of a process that had initialised CUDA: nothing may touch the GPU here."""
    return bool(torch.cuda._is_in_bad_fork())


def kind() -> str:
    """ "cuda", "hip" or "cpu": what kernels are compiled for by default.  Does not initialise CUDA."""
    if in_bad_fork() or not torch.cuda.is_available():
        return "cpu"
    return "hip" if torch.version.hip else "cuda"


def known(target: str) -> DeviceProperties:
    """Properties of a target by name (one of TARGETS).  Raises KeyError for another."""
    return _KNOWN[target]


@functools.lru_cache(maxsize=64)
def _query(index: int) -> DeviceProperties:
    p = torch.cuda.get_device_properties(index)
    hip = bool(torch.version.hip)
    arch = str(p.gcnArchName).split(":")[0] if hip else f"sm_{p.major}{p.minor}"
    base = _KNOWN.get(arch) or _KNOWN["gfx942" if hip else "sm_90"]
    return replace(
        base,
        kind="hip" if hip else "cuda",
        arch=arch,
        processors=int(p.multi_processor_count),
        warp=int(getattr(p, "warp_size", base.warp)),
        threads=int(getattr(p, "max_threads_per_multi_processor", base.threads)),
        cache=int(getattr(p, "L2_cache_size", base.cache)),
    )


def properties(device: torch.device | str | int | None = None) -> DeviceProperties:
    """Properties of a device of this machine (default: the current one).

    Raises RuntimeError in a forked child of a process that uses CUDA.
    """
    if kind() == "cpu" or (device is not None and not isinstance(device, int) and torch.device(device).type == "cpu"):
        if in_bad_fork():
            raise RuntimeError("CUDA was initialised before this process was forked; start it with 'spawn' instead")
        return DeviceProperties("cpu", "", torch.get_num_threads(), 1, 1, _CACHE, 5e10)
    index = device if isinstance(device, int) else torch.device(device).index if device is not None else None
    found = _query(torch.cuda.current_device() if index is None else index)
    measured = _bandwidth.get(found.arch)
    return found if measured is None else replace(found, bandwidth=measured)


@functools.lru_cache(maxsize=1)
def stream_bytes() -> int | None:
    """Bytes of results from which kernels of the CPU write past the caches: what the last of them holds, and no less than
    32 MiB (a virtual machine may be told of less than there is).  None where C++ has no such stores (they are x86's)."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return None
    return max([_CACHE, *(_cache_bytes(f) for f in glob.glob("/sys/devices/system/cpu/cpu0/cache/index*/size"))])


def _cache_bytes(path: str) -> int:
    """The size in a file of sysfs ("32768K"); 0 if there is none."""
    try:
        with open(path, encoding="ascii") as stream:
            found = re.fullmatch(r"(\d+)([KM])\s*", stream.read(32))
    except (OSError, ValueError):
        return 0
    return int(found[1]) << {"K": 10, "M": 20}[found[2]] if found else 0


def on_device(call: Callable[[list[Any]], Any], device: torch.device) -> Callable[[list[Any]], Any]:
    """``call``, run with ``device`` as the current one, as ATen's operators see to by themselves.

    Kernels are launched through the driver, which takes the current context: on a second GPU, whose default stream has
    the same handle (0) as the first one's, that would be the wrong one.  Costs nothing where there is one GPU.
    """
    if device.type != "cuda" or torch.cuda.device_count() < 2:
        return call
    index, current = device.index or 0, torch.cuda.current_device

    def there(args: list[Any]) -> Any:
        if current() == index:
            return call(args)
        with torch.cuda.device(index):
            return call(args)

    return there


def set_bandwidth(arch: str, bytes_per_second: float) -> None:
    """Record a measured copy bandwidth; `properties` reports it from now on."""
    _bandwidth[arch] = float(bytes_per_second)


def aligned(tensor: torch.Tensor) -> bool:
    """Is the first element of `tensor` at a multiple of ALIGNMENT bytes?"""
    return tensor.data_ptr() % ALIGNMENT == 0
