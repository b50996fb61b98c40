"""Kernels of `codegen.templates`: compiled once for a set of constants, then launched through the driver.

What `TritonKernel` is for generated kernels.  Operators (`fusionc.ops`) use it:

    kernel = template(TEXT, "one_row", ("*bf16", "*bf16", "i32"), (("N", 4096), ("PDL", True)), device, warps=4)
    kernel.launch(grid, stream, x.data_ptr(), y.data_ptr(), rows)

or, where shapes decide everything but the tensors, a `Start`, which also runs in Triton's interpreter.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from ..errors import CompileError
from . import cuda_driver, ready
from .binaries import in_folder
from .launch import (
    Compiled,
    _cuda_launcher,
    _usage,
    compile_source,
    early_start,
    load_binary,
    load_module,
    without_library,
)
from .tune import binaries

Constants = tuple[tuple[str, Any], ...]
POINTER = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.float64: "*fp64",
    torch.int64: "*i64", torch.int32: "*i32", torch.bool: "*i1", torch.int8: "*i8", torch.uint8: "*u8",
}  # fmt: skip


class Template:
    """One kernel of a template text for given argument types and constants, on one device.

    ``kinds`` are Triton's names for the types of its run-time arguments, which come first; ``constants`` the others.
    ``dependent`` launches with programmatic dependent launch: the kernel must wait (`gdc_wait`) in every program.
    ``exact`` keeps the rounding between a product and a sum, also in 16 bits, where the compiler else makes one fma.
    ``registers`` is the most that a thread may use. ``early``: it gets the waiting, and the launch, of `launch.early_start`.
    """

    def __init__(self, text: str, name: str, kinds: tuple[str, ...], constants: Constants, device: torch.device,
                 warps: int, stages: int = 1, dependent: bool = False, exact: bool = False,
                 registers: int | None = None, early: bool = False) -> None:  # fmt: skip
        self.text, self.name, self.kinds, self.constants = text, name, kinds, constants
        self.device, self.warps, self.stages, self.registers, self.early = device, warps, stages, registers, early
        self.dependent, self.exact = dependent, exact
        self._launch: Callable[..., None] | None = None
        self._failure = ""  # of building, which would fail again
        self._lock = threading.Lock()

    def _source(self, text: str) -> Any:
        from triton.compiler import ASTSource

        fn = getattr(load_module(text), self.name)
        names = list(fn.arg_names)
        signature = dict(zip(names, self.kinds))
        signature.update({n: "constexpr" for n, _ in self.constants})
        if len(signature) != len(names):
            raise ValueError(f"kernel {self.name} takes {names}, was given {list(signature)}")
        attrs = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(self.kinds) if kind.startswith("*")}
        return ASTSource(fn=fn, signature=signature, constexprs=dict(self.constants), attrs=attrs)

    def build(self, gpu: Any, usage: bool = False) -> Compiled:
        """Compile for a target of Triton's (``GPUTarget``).  Raises CompileError."""
        start = time.perf_counter()
        try:
            options: dict[str, Any] = {"num_warps": self.warps, "num_stages": self.stages}
            options["enable_fp_fusion"] = not self.exact
            options |= {} if self.registers is None else {"maxnreg": self.registers}
            text = early_start(self.text, self.name, gpu) if self.early else self.text
            self.dependent |= text is not self.text
            built = compile_source(self._source(without_library(text, gpu)), gpu, options)
        except Exception as e:  # whatever the tool says: the caller decides
            raise CompileError(self.name, None, f"{type(e).__name__}: {e}") from e
        registers, spills = _usage(built) if usage else (-1, -1)
        seconds = time.perf_counter() - start
        shared = int(built.metadata.shared)
        return Compiled(self.name, str(gpu.arch), dict(built.asm), registers, spills, shared, seconds, {}, built)

    def prepare(self) -> Callable[..., None]:
        """The launcher, compiled on first use; raises CompileError."""
        with self._lock:
            if self._failure:
                raise CompileError(self.name, None, self._failure)
            if self._launch is None:
                ready.wait()
                try:
                    with torch.cuda.device(self.device), in_folder(binaries()):
                        built = self.build(cuda_driver.target())
                        load_binary(built.handle)
                        launch = _cuda_launcher(built, list(self.kinds), None, self.dependent)
                except Exception as e:
                    self._failure = f"{type(e).__name__}: {e}"
                    raise CompileError(self.name, None, f"it cannot be built and loaded: {self._failure}") from e
                if launch is None:
                    self._failure = "the kernel needs more than a plain launch"
                    raise CompileError(self.name, None, self._failure)
                self._launch = launch
            return self._launch

    def launch(self, grid: int, stream: int, *args: int | float) -> None:
        """Launch ``grid`` programs; pointers are integers that are multiples of 16.  Raises CompileError on first use."""
        run = self._launch
        if run is None:
            run = self.prepare()
        run(grid, stream, *args)


@functools.lru_cache(maxsize=1024)
def template(text: str, name: str, kinds: tuple[str, ...], constants: Constants, device: torch.device,
             warps: int, stages: int = 1, dependent: bool = False, exact: bool = False,
             registers: int | None = None, early: bool = False) -> Template:  # fmt: skip
    """The one `Template` of these arguments."""
    return Template(text, name, kinds, constants, device, warps, stages, dependent, exact, registers, early)


class Start:
    """A launch of a template's kernel with everything but its tensors decided: ``start(x, y)`` on the current stream.

    ``kinds`` are the tensors' types and ``numbers`` the int32 arguments after them. ``device`` None: Triton's interpreter.
    Triton's own ``kernel[grid](…)`` takes 15 µs of the host and more with many constants; this takes 4, and leaves the other
    way to tensors whose addresses are no multiples of 16.
    """

    def __init__(self, text: str, name: str, kinds: Sequence[torch.dtype], grid: int, device: torch.device | None, *,
                 numbers: tuple[int, ...] = (), warps: int, stages: int = 1, registers: int | None = None,
                 early: bool = False, **constants: Any) -> None:  # fmt: skip
        self.text, self.name, self.grid, self.numbers, self.constants = text, name, grid, numbers, constants
        self.options: dict[str, Any] = {"num_warps": warps, "num_stages": stages}
        self.options |= {} if registers is None else {"maxnreg": registers}
        self.kernel: Template | None = None
        self.interpreted = device is None
        self._fn: Any = None  # Triton's function, where that launches
        if device is not None and not torch.version.hip:  # (ROCm's launches go through Triton)
            words = (*[POINTER[kind] for kind in kinds], *["i32"] * len(numbers))
            self.kernel = template(text, name, words, tuple(constants.items()), device, warps, stages, registers=registers,
                                   early=early)

    def prepare(self) -> None:
        """Compile it.  Raises CompileError."""
        if self.kernel is not None:
            self.kernel.prepare()

    def __call__(self, *tensors: torch.Tensor) -> None:
        addresses = [t.data_ptr() for t in tensors]
        together = 0
        for address in addresses:
            together |= address
        if self.kernel is None or together & 15:
            with _interpreter() if self.interpreted else contextlib.nullcontext():
                if self._fn is None:
                    self._fn = getattr(load_module(self.text, interpret=self.interpreted), self.name)
                self._fn[(self.grid,)](*tensors, *self.numbers, **self.constants, **self.options)
            return
        stream = torch._C._cuda_getCurrentRawStream(tensors[0].device.index)
        self.kernel.launch(self.grid, stream, *addresses, *self.numbers)


@contextlib.contextmanager
def _interpreter() -> Iterator[None]:
    """Around a launch in Triton's interpreter, which has global state."""
    from . import interpreter
    from . import launch as launching

    with interpreter.lock, launching._loading, interpreter.repaired(), launching._interpreting(True):
        yield
