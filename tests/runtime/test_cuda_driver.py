"""Loading a binary through the driver, with the driver's library planted."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fusionc.runtime import cuda_driver

ATTRIBUTES = {0: 512, 1: 1024, 3: 24, 4: 96}  # threads, static shared memory, local bytes, registers


class Library:
    """libcuda, which knows one kernel; what it is asked to do is written down."""

    def __init__(self, context: int = 7) -> None:
        self.context, self.asked, self.failing = context, [], ""  # type: ignore[var-annotated]

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any) -> int:
            plain = [getattr(a, "value", a) for a in args if not hasattr(a, "_obj")]
            self.asked.append((name, *plain))
            if name == self.failing:
                return 209
            given = {"cuModuleLoadData": 11, "cuModuleGetFunction": 22, "cuCtxGetCurrent": self.context, "cuDeviceGet": 3,
                     "cuDeviceGetAttribute": 232448}.get(name)  # fmt: skip
            if name == "cuFuncGetAttribute":
                given = ATTRIBUTES[args[1]]
            if given is not None:
                args[0]._obj.value = given
            return 0

        return call


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    made = Library()
    monkeypatch.setattr(cuda_driver, "_library", lambda: made)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    return made


def test_a_small_kernel(library: Library) -> None:
    assert cuda_driver.load("kernel", b"\x7fELF\0binary", 48 << 10) == (11, 22, 96, 6, 512)
    assert ("cuModuleLoadData", b"\x7fELF") in library.asked  # (as text: the pointer is what counts)
    assert ("cuModuleGetFunction", 11, b"kernel") in library.asked
    assert not any(name in ("cuFuncSetAttribute", "cuFuncSetCacheConfig") for name, *_ in library.asked)


def test_much_shared_memory_is_asked_for(library: Library) -> None:
    cuda_driver.load("kernel", b"binary", 200_000)
    assert ("cuDeviceGet", 1) in library.asked and ("cuDeviceGetAttribute", 97, 3) in library.asked
    assert ("cuFuncSetCacheConfig", 22, 1) in library.asked
    assert ("cuFuncSetAttribute", 22, 8, 232448 - 1024) in library.asked


@pytest.mark.parametrize("name", ["cuModuleLoadData", "cuModuleGetFunction", "cuFuncGetAttribute"])
def test_errors_have_the_drivers_code(library: Library, name: str) -> None:
    library.failing = name
    with pytest.raises(RuntimeError, match=f"{name} failed: CUDA driver error 209"):
        cuda_driver.load("kernel", b"binary", 0)


def test_a_thread_without_a_context_gets_that_of_its_device(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    library.context = 0
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: setattr(library, "context", 5))
    context = cuda_driver.current_context()
    assert isinstance(context, ctypes.c_void_p) and context.value == 5


def test_target(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch, "version", SimpleNamespace(hip=None))
    found = cuda_driver.target()
    assert (found.backend, found.arch, found.warp_size) == ("cuda", 90, 32)
