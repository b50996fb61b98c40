"""What the first Triton kernel of a process waits for, done in a thread while Dynamo and AOTAutograd trace.

Importing Triton (0.16 s), building its driver's module with the C compiler where kernels are loaded by it (0.5 s), starting
LLVM and the assembler: most of it outside of Python's lock, and none of it depends on the model.  Without the thread the
first compile jobs would each do it, side by side.

``begin`` starts the thread, ``wait`` returns when it has ended; every way to compile goes through ``wait``
(`launch.load_module`, `launch.TritonKernel`, `templates.Template`).  A failure here is nobody's: who compiles meets it
again and reports it.
"""

from __future__ import annotations

import contextlib
import threading

import torch

__all__ = ["begin", "wait"]

_PROBE = """
import triton
import triton.language as tl


@triton.jit
def probe(x, N: tl.constexpr):
    i = tl.arange(0, 64)
    tl.store(x + i, i.to(tl.float32), mask=i < N)
"""

_guard = threading.Lock()
_thread: threading.Thread | None = None
_awaited = threading.Event()  # somebody has kernels to compile, and needs no other to warm up with


def begin(force: bool = False) -> None:
    """Start getting ready, once in a process, if it uses CUDA already (or ``force``: it is about to); returns at once."""
    global _thread
    if _thread is not None or not (force or torch.cuda.is_initialized()):
        return
    with _guard:
        if _thread is None:
            thread = threading.Thread(target=_prepare, name="fusionc-ready")
            with contextlib.suppress(RuntimeError):  # no more threads: whoever needs it gets ready then
                thread.start()
                _thread = thread


def wait() -> None:
    """Return when the thread has done its work; at once if it was not started, or from that thread itself."""
    thread = _thread
    if thread is not None and thread is not threading.current_thread():
        _awaited.set()
        thread.join()


def _prepare() -> None:
    with contextlib.suppress(Exception):
        import triton
        from triton.compiler import ASTSource

        from . import binaries
        from .cuda_driver import suffices, target, tritons
        from .launch import load_module

        if not suffices():
            tritons()
        fn = load_module(_PROBE).probe
        source = ASTSource(fn=fn, signature={"x": "*fp32", "N": "constexpr"}, constexprs={"N": 60}, attrs={})
        if not _awaited.is_set():
            with binaries.quick_keys():
                triton.compile(source, target=target(), options={"num_warps": 1})
