"""What all benchmarks share: cases, backends, correctness, interleaved timing, cold caches, tables.

A benchmark that is not fair is worse than none, so the rules live here once and every command follows them: inputs are
random and fresh, several input sets are rotated so that the cache does not answer, results are compared with float64
before anything is timed, and backends take turns inside one process.
"""

from __future__ import annotations

import copy
import functools
import json
import math
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

Backend = Callable[..., Any]
SIZES = ("full", "quick", "tiny")


# ---------------------------------------------------------------------------------------------------------------- cases


@dataclass
class Case:
    """One function to compile and how to feed it.

    ``inputs(seed)`` makes a fresh tuple of arguments.  With ``train`` a step is forward and backward: gradients of all
    parameters and of every input that requires them; with ``cotangent`` the last input is not an argument but the
    gradient of the output (otherwise the output is a scalar loss).  ``reset`` puts mutable state back before a call.
    """

    fn: Callable[..., Any]
    inputs: Callable[[int], tuple[Any, ...]]
    train: bool = False
    cotangent: bool = False
    reset: Callable[[], None] | None = None
    reference_dtype: torch.dtype = torch.float64
    prepare_reference: Callable[[nn.Module], None] | None = None
    note: str = ""

    def leaves(self, args: Sequence[Any]) -> list[Tensor]:
        """What the backward differentiates by: inputs that require gradients, then parameters."""
        found = [a for a in pytree.tree_leaves(args) if isinstance(a, Tensor) and a.requires_grad]
        if isinstance(self.fn, nn.Module):
            found += [p for p in self.fn.parameters() if p.requires_grad]
        return found


def step(case: Case, fn: Callable[..., Any], inputs: tuple[Any, ...]) -> list[Tensor]:
    """One call of ``fn`` (the case's function, compiled or not): its tensor outputs, then its gradients if it trains."""
    if not case.train:
        with torch.no_grad():
            return tensors(fn(*inputs))
    args, cotangent = (inputs[:-1], inputs[-1]) if case.cotangent else (inputs, None)
    out = fn(*args)
    grads = torch.autograd.grad(out, case.leaves(args), cotangent)
    return [out.detach(), *grads]


def tensors(value: Any) -> list[Tensor]:
    """The tensors inside any nest of lists, dictionaries and model outputs."""
    if type(value) in (list, tuple) and all(isinstance(t, Tensor) for t in value):
        return list(value)  # pytree takes 25 µs of a timed call for 64 results
    return [t for t in pytree.tree_leaves(value) if isinstance(t, Tensor)]


def randn(*shape: int, seed: int, device: str, dtype: torch.dtype, grad: bool = False, scale: float = 1.0) -> Tensor:
    """Normal numbers from their own seeded generator, rounded to ``dtype``."""
    generator = torch.Generator(device=device).manual_seed(seed)
    value = torch.randn(shape, generator=generator, device=device, dtype=torch.float32).mul_(scale).to(dtype)
    return value.requires_grad_(grad)


def randint(high: int, shape: tuple[int, ...], seed: int, device: str) -> Tensor:
    """Integers in [0, high) from their own seeded generator."""
    return torch.randint(high, shape, generator=torch.Generator(device=device).manual_seed(seed), device=device)


# ---------------------------------------------------------------------------------------------------------- correctness


class _Promote(TorchFunctionMode):
    """Turns explicit casts to lower precision inside a model into casts to ``dtype``.

    Models say ``x.float()`` or ``softmax(dtype=torch.float32)``; without this a float64 reference would round there.
    """

    LOWER = (torch.float32, torch.bfloat16, torch.float16)
    CASTS = {Tensor.float, Tensor.half, Tensor.bfloat16}

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.CASTS:
            return args[0].to(self.dtype)
        swap = lambda v: self.dtype if isinstance(v, torch.dtype) and v in self.LOWER else v  # noqa: E731
        return func(*map(swap, args), **{k: swap(v) for k, v in (kwargs or {}).items()})


def reference(case: Case, inputs: tuple[Any, ...]) -> list[Tensor]:
    """The same step in ``case.reference_dtype`` on a copy of the module: same (already rounded) weights and inputs."""
    dtype = case.reference_dtype

    def lift(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.detach().to(dtype).requires_grad_(value.requires_grad)
        return value

    fn = case.fn
    if isinstance(fn, nn.Module):
        fn = copy.deepcopy(fn).to(dtype)
        for module in fn.modules():
            if hasattr(module, "cast_state"):
                module.cast_state(dtype)
        if case.prepare_reference is not None:
            case.prepare_reference(fn)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with _Promote(dtype):
            lifted = copy.copy(case)
            lifted.fn = fn
            return step(lifted, fn, pytree.tree_map(lift, inputs))
    finally:
        torch.set_default_dtype(before)


@dataclass
class Check:
    """Relative error against the reference, next to eager's; ``ratio`` is the worst output's (error / eager's error)."""

    error: float
    eager_error: float
    ratio: float
    ok: bool
    note: str = ""


def relative_error(value: Tensor, ref: Tensor) -> float:
    """‖value − ref‖ / ‖ref‖ over finite elements in the reference's precision; inf if NaN or Inf differ in place."""
    if value.shape != ref.shape:
        return math.inf
    if not ref.is_floating_point():
        return float((value != ref).float().mean()) if ref.numel() else 0.0
    if not ref.numel():
        return 0.0
    lifted = value.detach().to(ref.dtype)
    finite = torch.isfinite(ref)
    if not bool(finite.all()):
        if not torch.equal(torch.nan_to_num(lifted[~finite], nan=0.5), torch.nan_to_num(ref[~finite], nan=0.5)):
            return math.inf
        lifted, ref = lifted[finite], ref[finite]
    norm = float(torch.linalg.vector_norm(ref))
    difference = float(torch.linalg.vector_norm(lifted.sub_(ref) if lifted is not value else lifted - ref))
    return math.inf if math.isnan(difference) else difference / (norm or 1.0)


def check(out: Sequence[Tensor], eager: Sequence[Tensor], ref: Sequence[Tensor], bar: float = 2.0) -> Check:
    """Compares a backend's outputs with eager's by their distance to the reference; passes where no output is ``bar``× worse."""
    if len(out) != len(eager):
        return Check(math.inf, 0.0, math.inf, False, f"{len(out)} outputs where eager gives {len(eager)}")
    worst = Check(0.0, 0.0, 0.0, True)
    for index, (o, e, r) in enumerate(zip(out, eager, ref)):
        if o.dtype != e.dtype or o.shape != e.shape:
            said = f"output {index} is {o.dtype} {tuple(o.shape)}, not {e.dtype} {tuple(e.shape)}"
            return Check(math.inf, 0.0, math.inf, False, said)
        mine, eagers = relative_error(o, r), relative_error(e, r)
        # An error far below one rounding is luck (an exact sum, say), and no fair denominator.
        floor = torch.finfo(e.dtype).eps / 4 if e.is_floating_point() else 1e-9
        ratio = mine / max(eagers, floor)
        if ratio > worst.ratio or index == 0:
            worst = Check(mine, eagers, ratio, ratio <= bar, "" if ratio <= bar else f"output {index}")
    return worst


# ------------------------------------------------------------------------------------------------------------- backends


def floor_backend(gm: torch.fx.GraphModule, example_inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
    """Dynamo + AOTAutograd + min-cut partitioner around compilers that do nothing: what any backend pays."""
    from functorch.compile import make_boxed_compiler, min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd

    @make_boxed_compiler
    def nothing(graph: torch.fx.GraphModule, _inputs: Sequence[Any]) -> Callable[..., Any]:
        return graph.forward

    partition = functools.partial(min_cut_rematerialization_partition, compiler="inductor")
    return aot_autograd(fw_compiler=nothing, bw_compiler=nothing, inference_compiler=nothing, partition_fn=partition)(
        gm, example_inputs
    )


def compiled(fn: Callable[..., Any], spec: str) -> Callable[..., Any]:
    """``fn`` under a backend written as ``name`` or ``name:mode`` ("eager", "floor", "inductor:reduce-overhead", …).

    ``fusionc@causal_mask+cse`` is fusionc without these passes, to see what they are worth.
    """
    spec, _, disabled = spec.partition("@")
    name, _, mode = spec.partition(":")
    if disabled:
        return torch.compile(fn, backend=name, options={"disable": disabled.split("+")})
    if name == "eager":
        return fn
    backend: Any = floor_backend if name == "floor" else name
    return torch.compile(fn, backend=backend, **({"mode": mode} if mode else {}))


def first_line(error: BaseException, width: int = 160) -> str:
    """The innermost cause of an exception in one line."""
    while True:  # Dynamo wraps what a backend raises and says little itself
        inner = getattr(error, "inner_exception", None) or error.__cause__
        if inner is None or inner is error:
            break
        error = inner
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}"[:width]


def records(spec: str) -> list[Any]:
    """What fusionc has recorded in this process so far; empty for other backends."""
    if not spec.startswith("fusionc"):
        return []
    import fusionc

    return list(fusionc.report())


def counts(spec: str, before: Sequence[Any]) -> dict[str, Any] | None:
    """Graphs, kernels, calls of our operators and unexpected library calls since ``before``; None for other backends."""
    if not spec.startswith("fusionc"):
        return None
    new = [g for g in records(spec) if not any(g is old for old in before)]
    return {
        "graphs": len(new),
        "kernels": sum(len(g.kernels) for g in new),
        "launches": sum(k.uses for g in new for k in g.kernels),
        "templates": sum(c.op.startswith("fusionc.") for g in new for c in g.calls),
        "whole": [f for g in new for f in g.fallbacks if f.startswith("whole graph")],
        "fallbacks": sorted(
            {f"{c.op}: {c.reason}" for g in new for c in g.calls if c.reason} | {f for g in new for f in g.fallbacks}
        ),
        "timings": [{k: round(v, 4) for k, v in g.timings.items()} for g in new],
    }


def not_compiled(report: dict[str, Any] | None) -> str | None:
    """Why a run may not count as fusionc's, or None: it never raises, but runs a graph in ATen where compiling fails.

    Such a run is right and about as fast as eager, so neither the check nor the times would show it.
    """
    if report is None:
        return None
    if report["whole"]:
        return f"NOT COMPILED, ran in ATen: {report['whole'][0]}"[:200]
    if not report["graphs"] or not report["kernels"] + report["templates"]:
        return f"NOT COMPILED: {report['graphs']} graphs with no kernel and no template recorded"
    return None


@contextmanager
def cold_caches(folder: str | None = None) -> Any:
    """Points Inductor's, Triton's and fusionc's caches at an empty folder (or at ``folder``) for the duration."""
    with tempfile.TemporaryDirectory(prefix="bench-cache-") as fresh:
        values = cache_environment(folder or fresh)
        before = {key: os.environ.get(key) for key in values}
        os.environ.update(values)
        try:
            yield folder or fresh
        finally:
            for key, value in before.items():
                if value is None:
                    os.environ.pop(key, None)
                else:
                    os.environ[key] = value


def compile_bytecode() -> None:
    """fusionc's modules as bytecode, as an installer leaves every other package's: a checkout that is new or that runs
    under PYTHONDONTWRITEBYTECODE would parse 85 files (0.25 s) in each process."""
    import compileall

    import fusionc

    compileall.compile_dir(os.path.dirname(fusionc.__file__), quiet=1)


def cache_environment(folder: str) -> dict[str, str]:
    """Environment variables that put every compiler's cache under ``folder``."""
    parts = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton", "FUSIONC_CACHE": "fusionc"}
    for part in parts.values():
        os.makedirs(os.path.join(folder, part), mode=0o700, exist_ok=True)
    return {key: os.path.join(folder, part) for key, part in parts.items()}


@dataclass
class CompilerLog:
    """Filled by ``watch_compilers``: seconds of each graph compiler call and the callables that they returned.

    ``seconds`` has (kind, seconds, late); a late call comes after the backend returned (Inductor compiles backward graphs
    at the first backward).
    """

    seconds: list[tuple[str, float, bool]] = field(default_factory=list)
    functions: list[Callable[..., Any]] = field(default_factory=list)
    depth: int = 0

    @property
    def total(self) -> float:
        return sum(s for _, s, _ in self.seconds)

    @property
    def late(self) -> float:
        return sum(s for _, s, late in self.seconds if late)


@contextmanager
def watch_compilers() -> Any:
    """Times the forward, backward and inference compilers that any backend hands to AOTAutograd, and keeps their results.

    This splits a backend's time into AOT's own tracing and the compiler proper without knowing the backend.
    """
    from torch._dynamo.backends.common import AotAutograd

    log, original = CompilerLog(), AotAutograd.__call__

    def timed(kind: str, compiler: Callable[..., Any]) -> Callable[..., Any]:
        if getattr(compiler, "_bench_timed", False):
            return compiler

        @functools.wraps(compiler)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = compiler(*args, **kwargs)
            log.seconds.append((kind, time.perf_counter() - start, log.depth == 0))
            log.functions.append(result)
            return result

        wrapper._bench_timed = True  # type: ignore[attr-defined]
        return wrapper

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        for key, kind in (("fw_compiler", "forward"), ("bw_compiler", "backward"), ("inference_compiler", "inference")):
            compiler = self.kwargs.get(key)
            if compiler is None:
                continue
            if hasattr(compiler, "compiler_fn"):  # Inductor's serialisable compilers: their type must stay
                compiler.compiler_fn = timed(kind, compiler.compiler_fn)
            else:
                self.kwargs[key] = timed(kind, compiler)
        log.depth += 1
        try:
            return original(self, *args, **kwargs)
        finally:
            log.depth -= 1

    AotAutograd.__call__ = call  # type: ignore[method-assign]
    try:
        yield log
    finally:
        AotAutograd.__call__ = original  # type: ignore[method-assign]


# --------------------------------------------------------------------------------------------------------------- timing


def cache_bytes() -> int:
    """Size of the largest data cache of this machine's CPU; 32 MiB where the kernel does not say."""
    best = 0
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        unit = {"K": 1 << 10, "M": 1 << 20}.get(text[-1:], 1)
        best = max(best, int(text.rstrip("KM")) * unit)
    return best or 32 << 20


def input_sets(case: Case, first_seed: int, most: int = 12) -> list[tuple[Any, ...]]:
    """Enough different inputs that going round them exceeds the last-level cache twice (at most ``most``, at least 2)."""
    one = case.inputs(first_seed)
    size = sum(t.numel() * t.element_size() for t in tensors(one)) or 1
    count = min(most, max(2, math.ceil(2 * cache_bytes() / size)))
    return [one] + [case.inputs(first_seed + i) for i in range(1, count)]


def interleave(
    calls: dict[str, Callable[[int], float]], rounds: int, seconds_per_turn: float = 0.15, most_calls: int = 200
) -> dict[str, list[float]]:
    """Lets the candidates take turns; each round gives one median of seconds per candidate.

    ``calls[name](i)`` runs call number ``i`` and returns its seconds.  Turns rotate, so that no candidate always follows
    the same one, and drift of the machine falls on all alike: compare medians of one round with each other.
    """
    names = list(calls)
    counts: dict[str, int] = {}
    for name in names:
        estimate = min(calls[name](i) for i in range(2))
        counts[name] = max(1, min(most_calls, round(seconds_per_turn / max(estimate, 1e-7))))
    result: dict[str, list[float]] = {name: [] for name in names}
    number = 0
    for turn in range(rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            samples = []
            for _ in range(counts[name]):
                samples.append(calls[name](number))
                number += 1
            result[name].append(statistics.median(samples))
    return result


def host_timer(case: Case, fn: Callable[..., Any], sets: Sequence[tuple[Any, ...]]) -> Callable[[int], float]:
    """A call for ``interleave``: one step on input set ``i`` modulo their number, state reset before, on the host's clock."""

    def call(i: int) -> float:
        if case.reset is not None:
            case.reset()
        chosen = sets[i % len(sets)]
        start = time.perf_counter()
        out = step(case, fn, chosen)
        seconds = time.perf_counter() - start
        del out
        return seconds

    return call


def geomean(values: Iterable[float]) -> float | None:
    """Geometric mean; None of nothing."""
    kept = [v for v in values if v and math.isfinite(v)]
    return math.exp(sum(map(math.log, kept)) / len(kept)) if kept else None


# --------------------------------------------------------------------------------------------------------------- output


def machine() -> dict[str, Any]:
    """What was measured on, in words and versions (no host name)."""
    cpu = next(
        (line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    facts: dict[str, Any] = {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "load": [round(v, 2) for v in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }
    for name in ("triton", "transformers"):
        try:
            from importlib.metadata import version

            facts[name] = version(name)
        except Exception:
            facts[name] = None
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def cell(value: Any, digits: int = 3) -> str:
    """A number in about ``digits`` significant digits, None as a dash."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        if not math.isfinite(value):
            return str(value)
        return f"{value:.{digits}g}" if abs(value) < 10 ** (digits - 1) else f"{value:.0f}"
    return str(value)


def table(headers: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table in aligned columns."""
    body = [[cell(v) for v in row] for row in rows]
    widths = [max([len(h), *(len(r[i]) for r in body)]) for i, h in enumerate(headers)]
    line = lambda r: "| " + " | ".join(v.ljust(w) for v, w in zip(r, widths)) + " |"  # noqa: E731
    return "\n".join([line(headers), "| " + " | ".join("-" * w for w in widths) + " |", *map(line, body)])


def write_json(path: str | None, value: Any) -> None:
    """Writes JSON (temporary file, then rename); None writes nothing.  NaN and Inf become null."""
    if path is None:
        return

    def clean(v: Any) -> Any:
        if isinstance(v, dict):
            return {str(k): clean(x) for k, x in v.items()}
        if isinstance(v, (list, tuple)):
            return [clean(x) for x in v]
        return None if isinstance(v, float) and not math.isfinite(v) else v

    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(target.name + ".part")
    temporary.write_text(json.dumps(clean(value), indent=1) + "\n")
    temporary.replace(target)


def matches(name: str, only: Sequence[str] | None) -> bool:
    """Whether a workload was asked for: any of ``only`` is part of its name (nothing given: all)."""
    return not only or any(part in name for part in only)
