"""What generated code depends on beside its own text: the parts that every cache key must hold.

A key that forgets an input serves wrong code: an artefact for one GPU reused on its sibling gave garbled text in a
well-known server.  So sources, versions, CPU flags and device all go in.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from functools import cache, lru_cache
from typing import Any


def source_fingerprint(packages: tuple[str, ...] = ("ir", "schedule", "codegen", "runtime")) -> str:
    """SHA-256 over fusionc's own sources in ``packages``; a key that holds it dies with any change of ours.

    Programs depend on ``("graph", "passes", "ops")`` too.
    """
    return hashlib.sha256("".join(map(_package_fingerprint, packages)).encode()).hexdigest()


@cache
def _package_fingerprint(package: str) -> str:
    """Read once a process: what is loaded does not change either.  Beside threads that compile, each of the files waits
    for Python's lock, 2 s in all: the first key of a process, which is made before those start, asks for all packages."""
    home = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    digest = hashlib.sha256()
    for folder, inner, files in os.walk(os.path.join(home, package)):
        inner[:] = sorted(d for d in inner if d != "__pycache__")
        for name in sorted(files):
            if name.endswith((".py", ".h")):
                path = os.path.join(folder, name)
                with open(path, "rb") as stream:
                    text = stream.read()
                digest.update(f"{os.path.relpath(path, home)}\0{len(text)}\0".encode())
                digest.update(text)
    return digest.hexdigest()


@lru_cache(maxsize=8)
def _environment(device: str) -> str:
    import platform
    import sys

    import torch

    key: dict[str, Any] = {
        "python": ".".join(map(str, sys.version_info[:3])),
        "torch": torch.__version__,
        "torch_git": str(getattr(torch.version, "git_version", "")),
        "machine": platform.machine(),
        "system": sys.platform,
        "device": device,
    }
    if device == "cpu":
        # Not the C++ compiler: a shipped cache must work where there is none. compile_cpp compares it where there is.
        key["isa"] = cpu_fingerprint()
    else:
        key["triton"] = _triton_version()
        key["cuda"] = str(torch.version.cuda)
        key["hip"] = str(getattr(torch.version, "hip", None))
        if ":" in device or device in ("cuda", "hip"):
            properties = torch.cuda.get_device_properties(device)
            key["device"] = properties.name
            key["capability"] = [properties.major, properties.minor]
            key["arch"] = str(getattr(properties, "gcnArchName", ""))
            key["multiprocessors"] = properties.multi_processor_count
            driver = getattr(torch._C, "_cuda_getDriverVersion", None)
            key["driver"] = int(driver()) if driver is not None else 0
    return json.dumps(key, sort_keys=True)


def environment_key(device: str = "cpu") -> dict[str, Any]:
    """What generated code depends on beside its own text: versions, and the CPU or GPU.

    ``device`` is "cpu", a torch device such as "cuda:0" (asks the driver), or the name of a target such as "sm_90"
    (asks nothing).  Computed once a process and device.
    """
    return dict(json.loads(_environment(str(device))))


def cpu_fingerprint(path: str = "/proc/cpuinfo") -> str:
    """Hash of this CPU's vendor, model and instruction flags: what ``-march=native`` looks at."""
    import platform

    try:
        with open(path, "rb", buffering=0) as stream:
            text = stream.read(8192).decode("ascii", "replace")  # the first core only: the file is slow to make
    except OSError:
        return hashlib.sha256(f"{platform.machine()}/{platform.processor()}".encode()).hexdigest()[:32]
    wanted = ("vendor_id", "cpu family", "model", "stepping", "flags", "Features", "CPU implementer", "CPU part", "isa")
    facts = {}
    for line in text.split("\n\n", 1)[0].splitlines():
        name, _, value = line.partition(":")
        if name.strip() in wanted:
            facts[name.strip()] = sorted(value.split()) if name.strip() in ("flags", "Features") else value.strip()
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def _triton_version() -> str:
    import sys
    from importlib import metadata

    loaded = getattr(sys.modules.get("triton"), "__version__", None)
    if loaded:
        return str(loaded)
    for name in ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-rocm"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(name)
    return "none"
