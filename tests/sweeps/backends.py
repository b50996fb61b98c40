"""The backend under test: found by name, counted, and set up so that sweeps are fast and repeatable."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch._dynamo


class Counting:
    """A ``torch.compile`` backend that counts the graphs and operator nodes it hands to another one.

    A result that is right because no graph reached the backend proves nothing, so every sweep looks at ``graphs``.
    """

    def __init__(self, name: str, options: dict[str, Any] | None = None) -> None:
        self.name, self.options = name, options or {}
        self.inner = lookup(name)
        self.graphs = 0
        self.nodes = 0

    def __call__(self, gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        self.graphs += 1
        self.nodes += sum(node.op in ("call_function", "call_method", "call_module") for node in gm.graph.nodes)
        return self.inner(gm, example_inputs, options=self.options) if self.options else self.inner(gm, example_inputs)

    def reset(self) -> None:
        reset = getattr(self.inner, "reset", None)
        if reset is not None:
            reset()


def lookup(name: str) -> Callable[..., Any]:
    """The backend of that name, or at "module:attribute"; "fusionc" is found in a source tree that is not installed, too."""
    if name == "fusionc":
        return importlib.import_module("fusionc.backend").fusionc
    if ":" in name:  # module:attribute, for backends made wrong on purpose
        module, attribute = name.split(":")
        return getattr(importlib.import_module(module), attribute)
    return torch._dynamo.lookup_backend(name)


def prepare(name: str, threads: int = 1) -> None:
    """Settings of a sweep's process: few threads, exact float32 matmuls, no time spent on measuring guards."""
    torch.set_num_threads(threads)
    # an optimisation on the user's behalf would hide what the backend does with a static shape
    torch._dynamo.config.automatic_dynamic_shapes = False
    torch._dynamo.config.recompile_limit = 1000
    torch._dynamo.config.accumulated_recompile_limit = 10**6
    torch._dynamo.config.suppress_errors = False
    # not torch.backends.cudnn.allow_tf32: importing torch's operator database freezes those flags
    torch._C._set_cudnn_allow_tf32(False)
    torch.set_float32_matmul_precision("highest")
    if name == "inductor":
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
        torch._inductor.config.fallback_random = True
        torch._inductor.config.compile_threads = 1
    with contextlib.suppress(ImportError, AttributeError):
        # Dynamo times every new guard with a flushed cache: 20 ms of each 50 ms compile here, only for a log line
        guards: Any = importlib.import_module("torch._dynamo.guards")
        if hasattr(guards, "profile_guard_manager"):
            guards.profile_guard_manager = lambda *_: 0.0


@contextlib.contextmanager
def prepared(name: str, threads: int = 1) -> Iterator[None]:
    """``prepare`` for a test that shares its process with others: Dynamo's settings and the thread count come back."""
    before = torch.get_num_threads()
    kept = ("automatic_dynamic_shapes", "recompile_limit", "accumulated_recompile_limit", "suppress_errors")
    with torch._dynamo.config.patch({key: getattr(torch._dynamo.config, key) for key in kept}):
        prepare(name, threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)
            torch._dynamo.reset()


@contextlib.contextmanager
def records(name: str) -> Iterator[list[Any]]:
    """The ``GraphRecord``s that fusionc makes inside the block; stays empty for other backends."""
    if name != "fusionc":
        yield []
        return
    with importlib.import_module("fusionc.record").collect() as graphs:
        yield graphs
