"""What compiling and loading kernels needs of the CUDA driver, called directly.

Triton has the same in a module that it builds with the C compiler for each of its cache folders (0.5 s of a process
that finds none), and looks for the driver's library with another process. With Triton up to 3.6 on NVIDIA's GPUs nothing
of ours needs that module (`suffices`) but launches that go through Triton: operators' with misaligned tensors.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from typing import Any

import torch

from .binaries import in_tritons

__all__ = ["current_context", "load", "most_shared", "suffices", "target", "tritons", "use_context"]

# CUfunction_attribute and CUdevice_attribute, from CUDA's driver API
_MAX_THREADS, _STATIC_SHARED, _LOCAL_BYTES, _REGISTERS, _MOST_DYNAMIC_SHARED = 0, 1, 3, 4, 8
_SHARED_OPTIN = 97
_PREFER_SHARED = 1
_PLAIN_SHARED = 48 << 10  # what a kernel may use without asking
_making = threading.Lock()


def suffices() -> bool:
    """Are kernels loaded by what is here, without Triton's driver?"""
    import triton

    return not torch.version.hip and tuple(map(int, triton.__version__.split(".")[:2])) <= (3, 6)


def tritons() -> Any:
    """Triton's driver. Its module is built once in a process, in the folder where every process looks for it."""
    from triton.runtime import driver

    with _making, in_tritons():
        return driver.active


def target() -> Any:
    """What Triton compiles for on the current device, as Triton's ``GPUTarget``."""
    if torch.version.hip:
        return tritons().get_current_target()
    from triton.backends.compiler import GPUTarget

    major, minor = torch.cuda.get_device_capability()
    return GPUTarget("cuda", 10 * major + minor, 32)


def load(name: str, image: bytes, shared: int) -> tuple[int, int, int, int, int]:
    """Kernel ``name`` of a binary on the current device, with ``shared`` bytes of dynamic shared memory.

    (module, function, registers a thread, 4-byte words spilled a thread, most threads of a program).  Raises
    RuntimeError with the driver's code.
    """
    current_context()
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    _call("cuModuleLoadData", ctypes.byref(module), ctypes.c_char_p(image))
    _call("cuModuleGetFunction", ctypes.byref(function), module, ctypes.c_char_p(name.encode()))
    if shared > _PLAIN_SHARED:
        _call("cuFuncSetCacheConfig", function, _PREFER_SHARED)
        dynamic = most_shared() - _attribute(function, _STATIC_SHARED)
        _call("cuFuncSetAttribute", function, _MOST_DYNAMIC_SHARED, dynamic)
    registers, local, threads = (_attribute(function, n) for n in (_REGISTERS, _LOCAL_BYTES, _MAX_THREADS))
    assert module.value and function.value
    return module.value, function.value, registers, local // 4, threads


def most_shared() -> int:
    """Bytes of shared memory that a program may have on the current device."""
    device, found = ctypes.c_int(), ctypes.c_int()
    _call("cuDeviceGet", ctypes.byref(device), torch.cuda.current_device())
    _call("cuDeviceGetAttribute", ctypes.byref(found), _SHARED_OPTIN, device)
    return found.value


def current_context() -> ctypes.c_void_p:
    """The CUDA context of this thread, which a kernel that is loaded now belongs to."""
    context = ctypes.c_void_p()
    _call("cuCtxGetCurrent", ctypes.byref(context))
    if not context:  # backward graphs are compiled in autograd's thread, whose first use of CUDA this may be
        torch.cuda.mem_get_info()  # makes the device's context current, as any call of the CUDA runtime
        _call("cuCtxGetCurrent", ctypes.byref(context))
    return context


def use_context(context: ctypes.c_void_p) -> bool:
    """Give this thread that context; False if there is none or it is not taken."""
    return bool(context) and _library().cuCtxSetCurrent(context) == 0


def _attribute(function: ctypes.c_void_p, which: int) -> int:
    found = ctypes.c_int()
    _call("cuFuncGetAttribute", ctypes.byref(found), which, function)
    return found.value


def _call(name: str, *args: Any) -> None:
    code = getattr(_library(), name)(*args)
    if code:
        raise RuntimeError(f"{name} failed: CUDA driver error {code}")


@functools.cache
def _library() -> Any:
    return ctypes.CDLL("libcuda.so.1")
