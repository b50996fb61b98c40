"""From the text of a Triton module to something that runs: on a GPU, in Triton's interpreter, or compiled for a GPU that
is not there.

A `TritonKernel` is compiled once per variant (index width) and then launched with raw pointers: no specialisation on
arguments at run time, because the text has static sizes as literals and the caller promises alignment.
"""

from __future__ import annotations

import atexit
import contextlib
import contextvars
import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch

from ..codegen.triton import index_width, parameters
from ..errors import CompileError, LoadError
from ..ir.loop import Kernel, evaluate, kernel_bytes
from ..schedule.plan import Plan
from . import binaries, compile_worker, compile_workers, cuda_driver, interpreter, ready, turns
from .cores import available
from .device import TARGETS

_ARCH = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
_INT32 = (1 << 31) - 1
_folder: tuple[int, str] | None = None
_modules: dict[tuple[str, bool], ModuleType] = {}
_loading = threading.RLock()


# -- loading ------------------------------------------------------------------------------------------------------


def load_module(source: str, *, interpret: bool = False) -> ModuleType:
    """The Python module of a generated text; the same text gives the same module.

    The text is written to a new file in a 0700 folder of this process (Triton reads a function's source from its file)
    and imported from there.  With `interpret` its functions are for Triton's interpreter.
    """
    global _folder
    if not interpret:
        ready.wait()
    digest = hashlib.sha256(source.encode()).hexdigest()
    with _loading:
        module = _modules.get((digest, interpret))
        if module is not None:
            return module
        if _folder is None or _folder[0] != os.getpid():
            _folder = (os.getpid(), tempfile.mkdtemp(prefix="fusionc-"))
            atexit.register(_remove, *_folder)
        path = os.path.join(_folder[1], f"k{digest[:24]}{'_interpreted' if interpret else ''}.py")
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_NOFOLLOW", 0), 0o600)
        with os.fdopen(fd, "w", encoding="utf-8") as f:
            f.write(source)
        spec = importlib.util.spec_from_file_location(f"fusionc_generated_{digest[:24]}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True
        try:
            with _interpreting(interpret):
                spec.loader.exec_module(module)
        finally:
            sys.dont_write_bytecode = writes
        if interpret and hasattr(module, "libdevice"):
            module.libdevice = interpreter.DeviceLibrary()  # type: ignore[attr-defined]
        _modules[digest, interpret] = module
        return module


def _remove(pid: int, folder: str) -> None:
    if pid == os.getpid():  # not in a forked child
        shutil.rmtree(folder, ignore_errors=True)


class _interpreting:
    """`triton.jit` makes interpreted functions (or not, whatever the environment says) inside this block.

    Nothing else of Triton's settings is put back at its end, as their `scope` would: other threads set theirs meanwhile.
    """

    def __init__(self, on: bool):
        self.on = on

    def __enter__(self) -> None:
        from triton import knobs

        self.settings = vars(knobs.runtime)
        self.before = self.settings.get("interpret")  # None: as the environment says
        self.said = os.environ.get("TRITON_INTERPRET")
        knobs.runtime.interpret = self.on

    def __exit__(self, *exc: object) -> None:
        self.settings.pop("interpret", None)
        if self.before is not None:
            self.settings["interpret"] = self.before
        if self.said is not None:
            os.environ["TRITON_INTERPRET"] = self.said
        else:
            os.environ.pop("TRITON_INTERPRET", None)


# -- interpreter --------------------------------------------------------------------------------------------------


def interpret(
    source: str,
    name: str,
    kernel: Kernel,
    plan: Plan,
    tensors: Sequence[Any],
    sizes: dict[str, int] | None = None,
    grid: int | None = None,
) -> None:
    """Run the rendered text on CPU tensors in Triton's interpreter; outputs are written in place.

    `tensors` are in the order of `kernel.buffers`: tensors whose data starts at their first element, or numbers for
    scalar buffers.  `grid` runs fewer programs than all.
    """
    sizes = sizes or {}
    grid = grid_of(kernel, plan, sizes) if grid is None else grid
    if grid == 0:
        return
    args = [t.item() if b.scalar and isinstance(t, torch.Tensor) else t for t, b in zip(tensors, kernel.buffers)]
    extra = {"WIDE": needs_wide(kernel, sizes)} if index_width(kernel) is None else {}
    with interpreter.lock, _loading:
        fn = getattr(load_module(source, interpret=True), name)
        with interpreter.repaired(), _interpreting(True):
            fn[(grid, 1, 1)](*args, *[sizes[s.name] for s in kernel.sizes], **extra)


def grid_of(kernel: Kernel, plan: Plan, sizes: dict[str, int]) -> int:
    """Number of programs to launch; 0 when there is nothing to do."""
    if kernel.part is not None:
        return evaluate(kernel.part.extent, sizes)
    return -(-evaluate(kernel.outer, sizes) // plan.xblock)


def needs_wide(kernel: Kernel, sizes: dict[str, int]) -> bool:
    """Must index arithmetic be int64 for these sizes?  (For kernels whose `index_width` is None.)"""
    top = max([evaluate(b.size, sizes) for b in kernel.buffers] + [evaluate(s, sizes) for s in _spans(kernel)])
    return top > _INT32 or any(n > _INT32 for n in sizes.values())


@functools.lru_cache(maxsize=4096)
def _spans(kernel: Kernel) -> tuple:
    """Polynomials in sizes that bound every intermediate of the kernel's index arithmetic."""
    from ..ir.expr import Index, Size, Var, index

    def of(e: Any) -> Any:
        if isinstance(e, Var):
            return e.extent
        if isinstance(e, Size):
            return index(e)
        if isinstance(e, Index):
            total = index(0)
            for m, c in e.terms:
                part = index(abs(c))
                for a in m:
                    part = part * of(a)
                total = total + part
            return total
        dividend = getattr(e, "dividend", None)
        if dividend is not None:
            return of(dividend)
        return index(1)  # loaded: an int64 anyway

    return (kernel.outer * 2, kernel.inner * 2, *{of(n) for n in kernel.nodes if isinstance(n, Index)})


# -- compiling ----------------------------------------------------------------------------------------------------


@dataclass
class Compiled:
    """One kernel built for one target.

    `asm` maps "ttir", "ttgir", "llir", "ptx"/"amdgcn" to text and "cubin"/"hsaco" to bytes.
    """

    name: str
    target: str
    asm: dict[str, Any]
    registers: int
    spills: int  # bytes of local memory a thread uses because registers ran out
    shared: int
    seconds: float
    metadata: dict[str, Any] = field(default_factory=dict)
    handle: Any = None  # triton's CompiledKernel


def _ast_source(source: str, name: str, kernel: Kernel, aligned: Sequence[bool] | None, wide: bool) -> Any:
    from triton.compiler import ASTSource

    fn = getattr(load_module(source), name)
    params = parameters(kernel)
    signature = {n: (("i64" if wide else "i32") if t == "size" else t) for n, t in params}
    constexprs: dict[str, Any] = {}
    if index_width(kernel) is None:
        signature["WIDE"] = "constexpr"
        constexprs["WIDE"] = wide
    attrs = {
        (i,): [["tt.divisibility", 16]]
        for i, (_, t) in enumerate(params)
        if t.startswith("*") and (aligned is None or aligned[i])
    }
    return ASTSource(fn=fn, signature=signature, constexprs=constexprs, attrs=attrs)


def cross_compile(
    source: str,
    name: str,
    kernel: Kernel,
    plan: Plan,
    target: str,
    *,
    aligned: Sequence[bool] | None = None,
    wide: bool = False,
    usage: bool = True,
) -> Compiled:
    """Build the rendered text for `target` (one of device.TARGETS), which need not be there.

    `aligned` says for each buffer whether its pointer will be a multiple of 16 bytes (default: all are).  With `usage`
    the numbers of registers and spilled bytes are read from the binary.  Raises CompileError.
    """
    from triton.backends.compiler import GPUTarget

    if target not in _ARCH:
        raise CompileError(name, None, f"unknown target {target}; known are {', '.join(TARGETS)}")
    return _compile(source, name, kernel, plan, GPUTarget(*_ARCH[target]), target, aligned, wide, usage)


# Triton writes operands of checks of integer arithmetic into every kernel, though the checks themselves only in its debug
# mode: a fifth of the time in which a kernel's text becomes IR, under Python's lock.  No options for the assembler in place
# of None are for Triton 3.6: its keys leave hooks out (`compile_worker.pairs_apart`), and binaries without that are wrong.
UNCHECKED = {"sanitize_overflow": False, "ptx_options": ""}


def compile_source(source: Any, gpu: Any, options: dict[str, Any]) -> Any:
    """Triton's CompiledKernel of an ``ASTSource`` of a generated text; by a worker's hands where one has time."""
    import triton

    options = {**options, **UNCHECKED}
    folder = binaries.current()
    with binaries.quick_keys():
        if folder is not None:
            with contextlib.suppress(Exception):  # a Triton that is not as expected: this process compiles then
                compile_workers.compile_elsewhere(source, gpu, options, folder)
        with compile_worker.pairs_apart():
            return triton.compile(source, target=gpu, options=options)


def _compile(
    source: str,
    name: str,
    kernel: Kernel,
    plan: Plan,
    gpu: Any,
    target: str,
    aligned: Sequence[bool] | None,
    wide: bool,
    usage: bool,
) -> Compiled:
    start = time.perf_counter()
    try:
        made = _ast_source(without_library(source, gpu), name, kernel, aligned, wide)
        built = compile_source(made, gpu, {"num_warps": plan.warps, "num_stages": plan.stages})
    except Exception as e:  # whatever the tool says: the caller falls back
        raise CompileError(name, None, f"{type(e).__name__}: {e}") from e
    seconds = time.perf_counter() - start
    registers, spills = _usage(built) if usage else (-1, -1)
    shared = int(built.metadata.shared)
    return Compiled(name, target, dict(built.asm), registers, spills, shared, seconds, {}, built)


def _usage(built: Any) -> tuple[int, int]:
    """(registers a thread, bytes spilled) of a binary; -1 where the tools do not tell."""
    text = built.asm.get("amdgcn")
    if text is not None:
        found = {k: int(v) for k, v in re.findall(r"\.(vgpr_count|vgpr_spill_count|sgpr_spill_count):\s*(\d+)", text)}
        return found.get("vgpr_count", -1), 4 * (found.get("vgpr_spill_count", 0) + found.get("sgpr_spill_count", 0))
    import triton

    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    if not os.path.exists(tool):
        return -1, -1
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(built.asm["cubin"])
        f.flush()
        out = subprocess.run([tool, "--dump-resource-usage", f.name], capture_output=True, text=True, timeout=60).stdout
    found = {k: int(v) for k, v in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", out)}
    return found.get("REG", -1), found.get("STACK", 0) + found.get("LOCAL", 0)


def compile_many(
    jobs: Sequence[Callable[[], Any]], workers: int | None = None, done: Callable[[], Any] | None = None
) -> list[Any]:
    """Run compile jobs side by side and return their results, or the exception of each that failed, in order.

    ``done`` is called (from any thread) after each. Jobs run in the caller's context (`binaries.in_folder`); of all
    batches together no more run at a time than there are cores. (So a job must not call this and wait: when all that
    run do, none goes on.)  Those of a caller in `turns.later` begin when no others wait.

    Threads: MLIR's passes and the assembler run outside of Python's lock.
    """
    workers = min(workers or _CORES, len(jobs) or 1)

    def one(job: Callable[[], Any], turn: turns.Turn) -> Any:
        try:
            turn.wait()
            with _slots:
                turn.end()
                return job()
        except Exception as e:
            return e
        finally:
            turn.end()
            if done is not None:
                done()

    waiting = [turns.Turn() for _ in jobs]
    try:
        if workers <= 1:
            return [one(j, t) for j, t in zip(jobs, waiting, strict=True)]
        with ThreadPoolExecutor(workers, thread_name_prefix="fusionc-compile") as pool:
            contexts = [contextvars.copy_context() for _ in jobs]
            return list(pool.map(lambda context, *job: context.run(one, *job), contexts, jobs, waiting))
    finally:
        for turn in waiting:  # of jobs for which there was no thread
            turn.end()


_CORES = available()
_slots = threading.BoundedSemaphore(_CORES)


def compile_beside(jobs: Sequence[Callable[[], Any]], done: Callable[[], Any] | None = None) -> Future[list[Any]]:
    """Start ``compile_many`` in a thread; the result is what it returns or raises."""
    ended: Future[list[Any]] = Future()

    def run() -> None:
        try:
            ended.set_result(compile_many(jobs, done=done))
        except BaseException as e:  # noqa: BLE001 - who waits gets it
            ended.set_exception(e)

    threading.Thread(target=contextvars.copy_context().run, args=(run,), name="fusionc-compile-beside").start()
    return ended


# -- launching ----------------------------------------------------------------------------------------------------

_PACK = {"i1": "?7x", "i8": "b7x", "u8": "B7x", "i16": "h6x", "i32": "i4x", "i64": "q", "fp32": "f4x", "fp64": "d"}


@functools.lru_cache(maxsize=1)
def _driver() -> Any:
    """cuLaunchKernel, called without letting go of Python's lock (the call is short)."""
    import ctypes

    fn = ctypes.PyDLL("libcuda.so.1").cuLaunchKernel
    word = ctypes.c_uint
    fn.argtypes = [ctypes.c_void_p, *[word] * 7, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    fn.restype = ctypes.c_int
    return fn


@functools.lru_cache(maxsize=1)
def _driver_ex() -> Any:
    """cuLaunchKernelEx, which takes launch attributes; called like ``_driver``."""
    import ctypes

    fn = ctypes.PyDLL("libcuda.so.1").cuLaunchKernelEx
    fn.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    fn.restype = ctypes.c_int
    return fn


def _dependent_launch(threads: int, shared: int) -> Callable[..., int]:
    """cuLaunchKernel, for grids of one dimension, with programmatic dependent launch: the kernel may start while the
    one before it in the stream still runs, and waits for its results itself (``griddepcontrol.wait``)."""
    import ctypes
    import struct

    attribute = (ctypes.c_char * 72)()  # CUlaunchAttribute: id, 4 bytes of padding, a value of 64 bytes
    struct.pack_into("=I4xi", attribute, 0, 6, 1)  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION, allowed
    config = (ctypes.c_char * 56)()  # CUlaunchConfig: grid, block, shared memory, stream, attributes, their number
    at, place, launch, pack = ctypes.addressof(config), ctypes.addressof(attribute), _driver_ex(), struct.Struct("=7I4xQQI4x")

    def dependent(function: int, grid: int, y: int, z: int, x: int, _y: int, _z: int, bytes_: int, stream: int,
                  params: Any, extra: Any, keep: Any = attribute) -> int:  # fmt: skip
        pack.pack_into(config, 0, grid, 1, 1, threads, 1, 1, shared, stream, place, 1)
        return launch(at, function, params, extra)

    return dependent


EARLY = True  # (the benchmarks switch it off to compare)
_EARLY_BYTES = 16 << 20  # that a kernel may move: 4 µs on an H200


def early_start(source: str, name: str, gpu: Any) -> str:
    """``source`` with programmatic dependent launch in kernel ``name``, where the GPU has it; else the same object.

    The kernel may then be brought onto the device while the one in front of it still runs, and waits there, before it
    reads or writes anything.  Every program waits, and only then allows the next kernel to start: so all that was
    launched before the kernel in front is complete when the next one starts.  A launch without the attribute, or after
    something that is no kernel, waits for nothing.
    """
    if not EARLY or getattr(gpu, "backend", "") != "cuda" or not isinstance(gpu.arch, int) or gpu.arch < 90:
        return source
    head = re.search(rf"^def {re.escape(name)}\([^)]*\):\n", source, re.MULTILINE)
    first = "import triton.language as tl\n"
    if head is None or first not in source[: head.start()]:
        return source
    text = f"{source[: head.end()]}    gdc_wait()\n    gdc_launch_dependents()\n{source[head.end() :]}"
    return text.replace(first, f"{first}from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait\n", 1)


_INSTRUCTIONS = {"tl.rsqrt(": ("_rsqrt", "rsqrt.approx.ftz.f32"), "tl.exp2(": ("_exp2", "ex2.approx.ftz.f32")}


def without_library(source: str, gpu: Any) -> str:
    """``source`` with functions written as the one instruction that they become on NVIDIA's GPUs, or the same object.

    Triton takes these instructions from NVIDIA's device library.  Reading and linking the library is the longest step of
    compiling that holds Python's lock: 23 of 95 ms of a kernel on the CPU box, and kernels that compile side by side wait
    for each other in it.  Norms, softmax and the quick erf need nothing else of it.  Operands are float32.
    """
    first = source.find("@triton.jit\n")
    used = [call for call in _INSTRUCTIONS if call in source]
    if getattr(gpu, "backend", "") != "cuda" or not used or first < 0:
        return source
    head, rest = source[:first], source[first:]
    for call in used:
        name, instruction = _INSTRUCTIONS[call]
        options = "dtype=tl.float32, is_pure=True, pack=1"
        only = f'    tl.static_assert(x.dtype == tl.float32, "{call[:-1]} of float32 only")'  # others would be taken for it
        body = f'    return tl.inline_asm_elementwise("{instruction} $0, $1;", "=f,f", [x], {options})'
        head += f"@triton.jit\ndef {name}(x):\n{only}\n{body}\n\n\n"
        rest = rest.replace(call, f"{name}(")
    return head + rest


class _LauncherLater:
    """Triton's launcher of a kernel, built when somebody launches through it; who keeps this launches by that one then."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle
        self.lock = threading.Lock()
        self.built: Any = None

    def __call__(self, *args: Any) -> Any:
        if self.built is None:
            with self.lock:
                if self.built is None:
                    handle = self.handle
                    handle.module, handle._run = None, None  # as before loading, which Triton does once more
                    handle._init_handles()
                    self.built = handle._run
        return self.built(*args)


def load_binary(handle: Any) -> None:
    """Load a kernel that Triton compiled onto the current device.

    Up to 3.6, Triton's own way also builds a launcher with the C compiler for each signature, which launches of ours do
    not use: this leaves it for later.  Where anything is not as expected, Triton does the whole, and says what is wrong.
    """
    if handle.module is None and "cubin" in handle.asm and cuda_driver.suffices():
        with contextlib.suppress(Exception):
            meta = handle.metadata
            if meta.shared <= cuda_driver.most_shared():
                found = cuda_driver.load(handle.name, handle.kernel, meta.shared)
                if 32 * int(meta.num_warps) <= found[4]:
                    module, function, registers, spills, threads = found
                    handle.function, handle.n_regs, handle.n_spills, handle.n_max_threads = function, registers, spills, threads
                    handle._run = _LauncherLater(handle)
                    handle.module = module
                    return
    if handle.module is None:
        cuda_driver.tritons()  # which several threads would each build, in the graph's folder
    handle._init_handles()


_NO_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT: of a thread that has used no CUDA yet, as autograd's may be


def _cuda_launcher(
    built: Compiled, kinds: list[str], grid: int | None, dependent: bool = False
) -> Callable[..., None] | None:
    """A launcher that calls the driver directly, or None where the kernel needs more than a plain launch.

    ``dependent``: with programmatic dependent launch, see ``_dependent_launch``.

    Kernels take hidden pointers after their arguments, in a number that depends on Triton's version: it is read from
    the PTX, and they are null because the kernel uses no scratch memory.
    """
    import ctypes
    import struct

    meta = built.handle.metadata
    simple = not any(
        getattr(meta, name, 0)
        for name in (
            "global_scratch_size",
            "profile_scratch_size",
            "launch_cooperative_grid",
            "launch_pdl",
            "tmem_size",
        )
    )
    entry = re.search(r"\.entry\s+\S+?\((.*?)\)", built.asm.get("ptx", ""), re.DOTALL)
    if not simple or entry is None or getattr(meta, "num_ctas", 1) != 1:
        return None
    total = entry.group(1).count(".param")
    if total < len(kinds):
        return None
    packer = struct.Struct("=" + "".join("Q" if k.startswith("*") else _PACK[k] for k in kinds))
    values = bytearray(8 * max(total, 1))
    base = ctypes.addressof((ctypes.c_char * len(values)).from_buffer(values))
    params = (ctypes.c_void_p * max(total, 1))(*[base + 8 * i for i in range(max(total, 1))])
    pack_into, launch = packer.pack_into, _driver()
    function, threads, shared = built.handle.function, 32 * int(meta.num_warps), int(meta.shared)
    if dependent:
        launch = _dependent_launch(threads, shared)

    context = cuda_driver.current_context()
    # All calls share one buffer of arguments, and Python may switch threads between filling it and the launch.
    lock = threading.Lock()

    def failed(code: int, grid: int, stream: int) -> None:  # (refers to `built`, which keeps the binary loaded)
        if code == _NO_CONTEXT and cuda_driver.use_context(context):
            code = launch(function, grid, 1, 1, threads, 1, 1, shared, stream, params, None)
        if code:
            raise RuntimeError(f"launching kernel {built.name} failed: CUDA driver error {code}")

    if grid is not None:

        def fixed(stream: int, *args: Any) -> None:
            with lock:
                pack_into(values, 0, *args)
                code = launch(function, grid, 1, 1, threads, 1, 1, shared, stream, params, None)
                if code:
                    failed(code, grid, stream)

        low, end = int.from_bytes(bytes([15] * len(kinds)), "little"), 8 * len(kinds)

        def aligned(stream: int, pointers: Sequence[int]) -> bool:
            """Like `fixed`, for pointers alone; False, without a launch, if one is no multiple of 16."""
            with lock:
                pack_into(values, 0, *pointers)
                if int.from_bytes(values[:end:8], "little") & low:
                    return False
                code = launch(function, grid, 1, 1, threads, 1, 1, shared, stream, params, None)
                if code:
                    failed(code, grid, stream)
                return True

        fixed.aligned = aligned  # type: ignore[attr-defined]
        return fixed

    def variable(grid: int, stream: int, *args: Any) -> None:
        with lock:
            pack_into(values, 0, *args)
            code = launch(function, grid, 1, 1, threads, 1, 1, shared, stream, params, None)
            if code:
                failed(code, grid, stream)

    return variable


class TritonKernel:
    """A rendered kernel for a device of this machine.

    `aligned[i]` promises that the pointer of buffer i is a multiple of 16 bytes at every launch.
    """

    def __init__(
        self,
        source: str,
        name: str,
        kernel: Kernel,
        plan: Plan,
        device: torch.device | str | int | None = None,
        aligned: Sequence[bool] | None = None,
    ):
        self.source, self.name, self.kernel, self.plan = source, name, kernel, plan
        self.device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device or "cuda")
        self.aligned = tuple(aligned) if aligned is not None else None
        self.dynamic = index_width(kernel) is None
        self.names = [s.name for s in kernel.sizes]
        self.dependent = False  # compiled to be launched before the kernel in front has finished
        self._variants: dict[bool, Compiled] = {}
        self._direct: Callable[..., None] | None = None
        self._launchers: dict[bool, Callable[..., None]] = {}
        self._shapes: dict[tuple[int, ...], tuple[int, Callable[..., None] | None]] = {}
        self._lock = threading.Lock()

    def compile(self, wide: bool = False) -> Compiled:
        """Build for the device (once); raises CompileError."""
        with self._lock:
            built = self._variants.get(wide)
            if built is None:
                ready.wait()
                with torch.cuda.device(self._index()):
                    gpu = cuda_driver.target()
                    source = early_start(self.source, self.name, gpu) if self._short() else self.source
                    self.dependent = source is not self.source
                    args = (source, self.name, self.kernel, self.plan, gpu, str(gpu.arch))
                    built = _compile(*args, self.aligned, wide, False)
                    try:
                        load_binary(built.handle)
                    except Exception as e:
                        raise LoadError(self.name, None, f"the binary cannot be loaded: {e}") from e
                built.registers, built.spills = int(built.handle.n_regs), int(built.handle.n_spills)
                self._variants[wide] = built
        return built

    def _short(self) -> bool:
        """Does it run for a few µs only, so that its launch counts?  (A long one measured 1 % slower with an early start.)"""
        return bool(self.names) or sum(kernel_bytes(self.kernel, {})) <= _EARLY_BYTES

    def bind(self, grid: int, wide: bool = False) -> Callable[..., None]:
        """`f(stream, *pointers, *sizes)` that launches `grid` programs: the fastest way, for static sizes.

        Pointers are integers, or numbers for scalar buffers.
        """
        if grid <= 0:
            return lambda stream, *args: None
        return self._launcher(grid, wide)

    def _launcher(self, grid: int | None, wide: bool) -> Callable[..., None]:
        """`f(stream, …)`, or `f(grid, stream, …)` if the grid is not given."""
        built = self.compile(wide)
        if "cubin" in built.asm:
            kinds = [("i64" if wide else "i32") if t == "size" else t for _, t in parameters(self.kernel)]
            with torch.cuda.device(self._index()):  # the launcher remembers the context in which the kernel was loaded
                direct = _cuda_launcher(built, kinds, grid, self.dependent)
            if direct is not None:
                return direct
        handle = built.handle
        run, function, packed = handle.run, handle.function, handle.packed_metadata
        tail = (wide,) if self.dynamic else ()

        def variable(grid: int, stream: int, *args: Any) -> None:
            run(grid, 1, 1, stream, function, packed, None, None, None, *args, *tail)

        return variable if grid is None else functools.partial(variable, grid)

    def launch(self, tensors: Sequence[Any], sizes: dict[str, int] | None = None, stream: int | None = None) -> None:
        """Launch on `stream` (default: torch's current one) with tensors, raw pointers or numbers for scalar buffers.

        A tensor is addressed from its first element.  Raises CompileError on first use if the kernel does not build.
        """
        if stream is None:
            stream = torch._C._cuda_getCurrentRawStream(self._index())
        args = [
            (t.item() if b.scalar else t.data_ptr()) if isinstance(t, torch.Tensor) else t
            for t, b in zip(tensors, self.kernel.buffers)
        ]
        if not self.names:
            direct = self._direct
            if direct is None:
                direct = self._direct = self.bind(grid_of(self.kernel, self.plan, {}))
            direct(stream, *args)
            return
        values = tuple([sizes[n] for n in self.names])  # type: ignore[index]
        known = self._shapes.get(values)
        if known is None:
            known = self._shape(values, sizes or {})
        grid, launcher = known
        if launcher is not None:
            launcher(grid, stream, *args, *values)

    def _shape(self, values: tuple[int, ...], sizes: dict[str, int]) -> tuple[int, Callable[..., None] | None]:
        """Grid and launcher for these sizes (None: nothing to do)."""
        grid = grid_of(self.kernel, self.plan, sizes)
        launcher = None
        if grid > 0:
            wide = self.dynamic and needs_wide(self.kernel, sizes)
            launcher = self._launchers.get(wide)
            if launcher is None:
                launcher = self._launchers[wide] = self._launcher(None, wide)
        if len(self._shapes) >= 4096:
            self._shapes.clear()
        self._shapes[values] = (grid, launcher)
        return grid, launcher

    def _index(self) -> int:
        return self.device.index if self.device.index is not None else torch.cuda.current_device()
