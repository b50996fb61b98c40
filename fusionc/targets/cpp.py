"""CPU: render C++, build it with the system compiler, bind it through ctypes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ..codegen import cpp
from ..ir.loop import Kernel
from ..progress import progress
from ..runtime.cache import Cache, open_cache
from ..runtime.compile_cpp import build, load_cached
from ..runtime.device import stream_bytes
from ..runtime.environment import environment_key
from ..schedule.rules_cpp import default_plan

if TYPE_CHECKING:
    from ..compiler import Context

_caches: dict[Any, Cache] = {}
_functions: dict[tuple[str, int], Callable[..., int]] = {}


def cache_for(setting: bool | str) -> Cache:
    """One Cache object per setting and process."""
    found = _caches.get(setting)
    if found is None:
        found = _caches[setting] = open_cache(setting)
    return found


def compile_all(cx: Context, kernels: dict[str, Kernel]) -> tuple[dict[str, Any], dict[str, str]]:
    """Callables by symbol (data pointers, then sizes), and reasons for those that could not be built."""
    from ..artifacts import kernel_record
    from ..compiler import ctypes_function

    sources: list[tuple[str, str]] = []
    problems: dict[str, str] = {}
    plans: dict[str, Any] = {}
    for symbol, kernel in kernels.items():
        try:
            hints = {s.name: cx.hints.get(s.name, 64) for s in kernel.sizes}
            plans[symbol] = default_plan(kernel, hints, stream_bytes())
            sources.append((symbol, cpp.render(kernel, plans[symbol], symbol)))
        except NotImplementedError as e:
            problems[symbol] = str(e)
    with progress("compiling kernels", len(sources), cx.config.progress) as bar:
        result = build(sources, cache_for(cx.config.cache), environment_key("cpu"), cpp.PRELUDE, done=bar.advance)
    # without a source to show, the cause is not the kernel's: the same words for all make one warning
    problems.update({s: str(e) if e.dump else e.detail or str(e) for s, e in result.errors.items()})
    functions: dict[str, Any] = {}
    for symbol, text in sources:
        if symbol in problems:
            continue
        kernel = kernels[symbol]
        key = (symbol, result.addresses[symbol])
        f = _functions.get(key)
        if f is None:
            f = _functions[key] = ctypes_function(result.addresses[symbol], len(kernel.buffers), len(kernel.sizes))
        functions[symbol] = f
        cx.sources[symbol] = text
        record = kernel_record(cx, symbol, kernel, plans[symbol], text, "cpp")
        record.from_cache = symbol in result.from_cache
        cx.record.kernels.append(record)
    return functions, problems


def load_all(cx: Context, hashes: Mapping[str, str], loops: Mapping[str, str]) -> dict[str, Any]:
    """Callables of those kernels whose binary the cache has, found by the hash of their C++ text alone."""
    from ..compiler import ctypes_function

    addresses = load_cached(hashes, cache_for(cx.config.cache), environment_key("cpu"), cpp.PRELUDE)
    functions: dict[str, Any] = {}
    for symbol, address in addresses.items():
        f = _functions.get((symbol, address))
        if f is None:
            buffers = len(re.findall(r"(?m)^  (?:in|out|inout)[ ]", loops[symbol]))
            sizes = len(re.findall(r"(?m)^  size[ ]", loops[symbol]))
            f = _functions[symbol, address] = ctypes_function(address, buffers, sizes)
        functions[symbol] = f
    return functions
