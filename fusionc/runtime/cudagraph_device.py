"""One CUDA device as the recordings need it: the lock, memory pool and side stream they share, recording, stopwatches."""

from __future__ import annotations

import contextlib
import gc
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import torch

Boxed = Callable[[list[Any]], Any]
pointer: Callable[[torch.Tensor], int] = torch._C.TensorBase.data_ptr


class Gpu:
    """Everything that recordings need of one CUDA device; the tests put another class in its place."""

    kind = "cuda"

    def __init__(self, index: int) -> None:
        self.index = index
        self.device = torch.device("cuda", index)
        self.lock = threading.RLock()
        self._raw: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)
        self._capturing: Any = getattr(torch._C, "_cuda_isCurrentStreamCapturing", None)
        fast = getattr(torch._C, "_tensors_data_ptrs_at_indices_equal", None)
        self.same: Callable[[list[Any], list[int], list[int]], bool] = fast if fast is not None else same_pointers
        self._pool: Any = None
        self._side: Any = None
        self._last = -1
        self._stream: Any = None
        self._graphs: weakref.WeakSet[Any] = weakref.WeakSet()  # those of the pool that exist

    def busy(self) -> bool:
        """The user records a graph of their own, or something watches every operator (AOTAutograd does so in the first
        call): then nothing of ours may step in."""
        return bool(self._capturing()) or torch._C._len_torch_dispatch_stack() > 0

    def order(self) -> None:
        """Later work of the current stream comes after what was replayed on another one (call it with the lock)."""
        raw = self._raw(self.index)
        if raw == self._last:
            return
        stream = torch.cuda.current_stream(self.index)
        if self._stream is not None:
            stream.wait_stream(self._stream)
        self._stream, self._last = stream, raw

    def reserved(self) -> int:
        """Bytes that torch holds of the device."""
        return torch.cuda.memory_reserved(self.index)

    def synchronize(self) -> None:
        """Wait until everything sent to the device is done."""
        torch.cuda.synchronize(self.index)

    def timer(self) -> Timer:
        """A stopwatch for one call."""
        return Timer(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))

    def record(self, call: Boxed, args: list[Any]) -> tuple[Any, Any]:
        """(graph, results): run `call(args)` without executing it.  The graph has `replay()`.  Raises what `call` raises."""
        with torch.cuda.device(self.index):
            if self._side is None:
                self._side = torch.cuda.Stream()
            if not self._graphs:  # torch forgets a pool with its last graph, and with it the memory
                self._pool = torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            collecting = gc.isenabled()
            gc.disable()  # it could destroy another graph or an event, which ends a recording
            try:
                with torch.cuda.stream(self._side):
                    try:
                        with torch.inference_mode(False):  # the state of the random generator must stay writable
                            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                        results = call(args)
                        graph.capture_end()
                    except BaseException:
                        self._recover(graph)
                        raise
            finally:
                if collecting:
                    gc.enable()
        self._graphs.add(graph)
        return graph, results

    def _recover(self, graph: Any) -> None:
        """Bring torch back into its normal state after a recording that failed (on the side stream).

        Its allocator and its random generator may still be in recording mode: the one is told to end, the other ends
        with a trivial recording that succeeds.
        """
        for _ in range(2):  # the first call may only report that the recording is not valid
            with contextlib.suppress(Exception):
                graph.capture_end()
        with contextlib.suppress(Exception):
            torch._C._cuda_endAllocateToPool(self.index, self._pool)
        with contextlib.suppress(Exception), torch.inference_mode(False):
            trivial = torch.cuda.CUDAGraph()
            one = torch.zeros(1, device=self.device)
            trivial.capture_begin(capture_error_mode="thread_local")
            one.add_(1)
            trivial.capture_end()
        self._graphs.clear()  # a new pool next time; the old one lives as long as its graphs


class Timer:
    """Host and device time of one call, read later without waiting."""

    def __init__(self, first: Any, last: Any) -> None:
        self._first, self._last, self._host = first, last, 0.0

    def start(self) -> None:
        self._first.record()
        self._host = time.perf_counter()

    def stop(self) -> None:
        self._host = time.perf_counter() - self._host
        self._last.record()

    def micros(self) -> tuple[float, float] | None:
        """(host, device) in µs, or None while the device is still at it."""
        if not self._last.query():
            return None
        return 1e6 * self._host, 1e3 * self._first.elapsed_time(self._last)


def same_pointers(args: list[Any], pointers: list[int], positions: list[int]) -> bool:
    """The tensors at these positions begin at the addresses that `pointers` has for all positions."""
    return all(pointer(args[i]) == pointers[i] for i in positions)
