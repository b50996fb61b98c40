"""What kernel.py and program.py of a dump call: build one kernel or one call sequence from text, run, check, time.

A dump is data until its owner runs one of its programs.  These functions take the kernel as text (loop IR, plan,
source), so that a kernel can be edited in place and tried again; program.py reads the kernels beside it as literals and
imports none of them.  Nothing here is used by the compiler itself.
"""

from __future__ import annotations

import ast
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .errors import FusioncError
from .ir.expr import Index, Load, Op, walk
from .ir.interp import TORCH_DTYPE, run
from .ir.loop import Kernel, evaluate, kernel_bytes
from .ir.text import parse_kernel
from .repro import make_inputs
from .runtime.pool import allocate, carve, split, wrote
from .schedule.plan import Plan

__all__ = [
    "allocate", "carve", "current_stream", "device", "empty", "index_error", "load_kernels", "missing", "restride",
    "run_kernel", "run_program", "split", "view", "wrote",
]  # fmt: skip

_SECONDS = 0.1  # of timing
_INTERPRETED = 64  # programs that Triton's interpreter is given: it needs milliseconds for each
_ORACLE = 1 << 26  # points that the loop interpreter is given

empty = torch.empty_strided


# -- one kernel -------------------------------------------------------------------------------------------------------


def run_kernel(symbol: str, language: str, plan: str, loop: str, source: str,
               sizes: Mapping[str, int] | None = None) -> int:  # fmt: skip
    """Run one kernel on random inputs, compare it with the loop interpreter, time it. Exit status: 0 if they agree.

    C++ is built with this machine's compiler; Triton runs on the GPU if there is one, else its first programs run in
    Triton's interpreter.  ``sizes`` gives a value to each run-time size.
    """
    kernel, chosen = parse_kernel(loop.strip()), Plan.from_dict(json.loads(plan))
    values = {s.name: int((sizes or {}).get(s.name, 64)) for s in kernel.sizes}
    points = evaluate(kernel.outer, values) * evaluate(kernel.inner, values)
    print(f"{symbol}: {language}, {kernel.kind}, {points} points")
    inputs = random_buffers(kernel, values)
    wide, narrow = _oracle(kernel, inputs, values, points)
    call, programs = _callable(symbol, language, kernel, chosen, source, values)
    found = {k: v.clone() for k, v in inputs.items()}
    if call(found):
        print("FAILS: the kernel says that an index is out of range")
        return 1
    written = _written(kernel, call, inputs, found) if programs == "first" else {}
    problems = 0
    for b in kernel.buffers:
        if b.kind != "in" and wide is not None and narrow is not None:
            problems += not _agrees(b.name, found[b.name], wide[b.name], narrow[b.name], written.get(b.name))
    if wide is None:
        print(f"not compared: {points} points are too many for the loop interpreter")
    if programs == "real":
        _time(call, found, sum(kernel_bytes(kernel, values)))
    return 1 if problems else 0


def random_buffers(kernel: Kernel, sizes: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """Inputs by buffer name on the CPU, the same in each process; what is used as an index is in range."""
    limits = _index_limits(kernel, dict(sizes))
    made: dict[str, torch.Tensor] = {}
    for position, b in enumerate(kernel.buffers):
        count, dtype = evaluate(b.size, dict(sizes)), TORCH_DTYPE[b.dtype]
        rng = torch.Generator().manual_seed(1234 + position)
        if b.name in limits:
            made[b.name] = torch.randint(0, max(1, limits[b.name]), (count,), generator=rng).to(dtype)
        elif dtype == torch.bool:
            made[b.name] = torch.randint(0, 2, (count,), generator=rng).to(dtype)
        elif dtype.is_floating_point:
            made[b.name] = torch.randn(count, generator=rng).to(dtype)
        else:
            made[b.name] = torch.randint(0, 8, (count,), generator=rng).to(dtype)
        if b.kind == "out":  # every element of interest is written: whatever is left must be noticed
            made[b.name] = torch.full_like(made[b.name], math.nan if dtype.is_floating_point else 1)
    return made


def _index_limits(kernel: Kernel, sizes: dict[str, int]) -> dict[str, int]:
    """Buffers whose values are used as indices, and below which number they must stay."""
    limits: dict[str, int] = {}

    def bound(expr: Any, limit: int) -> None:
        loads = [n for n in walk([expr]) if isinstance(n, Load)]
        if len(loads) > 1:  # as if they were multiplied
            limit = max(1, int(limit ** (1 / len(loads))))
        for n in loads:
            limits[n.buffer] = min(limits.get(n.buffer, limit), limit)

    for n in kernel.nodes:
        if isinstance(n, Op) and n.name == "check_index":
            try:
                limit = evaluate(n.args[1], sizes) if isinstance(n.args[1], Index) else int(getattr(n.args[1], "value", 1))
            except (KeyError, ValueError):
                limit = 1
            bound(n.args[0], limit)
    for n in kernel.nodes:
        if isinstance(n, Load):
            bound(n.index, 2) if not _checked(n.index) else None
    for s in kernel.writes:
        bound(s.index, 2) if not _checked(s.index) else None
    return limits


def _checked(at: Any) -> bool:
    return any(isinstance(n, Op) and n.name == "check_index" for n in walk([at]))


def _oracle(kernel: Kernel, inputs: dict[str, torch.Tensor], sizes: dict[str, int],
            points: int) -> tuple[dict[str, torch.Tensor] | None, dict[str, torch.Tensor] | None]:  # fmt: skip
    """Outputs by the loop interpreter, in float64 and in the kernel's own dtypes; None for a kernel that is too large.

    Where random numbers give mostly NaN (a logarithm, a root), all inputs are made positive in place.
    """
    if points > _ORACLE:
        return None, None
    outputs = [b for b in kernel.buffers if b.kind != "in"]

    def both() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        wide, narrow = ({k: v.clone() for k, v in inputs.items()} for _ in range(2))
        for b in outputs:
            if wide[b.name].dtype.is_floating_point:
                wide[b.name] = wide[b.name].double()
        run(kernel, wide, sizes, upcast=True)
        run(kernel, narrow, sizes)
        return wide, narrow

    wide, narrow = both()
    floats = [narrow[b.name] for b in outputs if narrow[b.name].dtype.is_floating_point and narrow[b.name].numel()]
    if any(t.isnan().float().mean() > 0.25 for t in floats):
        for b in kernel.buffers:
            if b.kind != "out" and inputs[b.name].dtype.is_floating_point:
                inputs[b.name].abs_()
        wide, narrow = both()
    return wide, narrow


Call = Callable[[dict[str, torch.Tensor]], int]


def _callable(symbol: str, language: str, kernel: Kernel, plan: Plan, source: str,
              sizes: dict[str, int]) -> tuple[Call, str]:  # fmt: skip
    """(function of the buffers by name, "real", or in the interpreter "all" or only the "first" programs)."""
    order = [b.name for b in kernel.buffers]
    if language == "cpp":
        function = _build({symbol: (kernel, source)})[symbol]
        return lambda buffers: function(*[buffers[n].data_ptr() for n in order], *sizes.values()), "real"
    from .runtime import launch

    if torch.cuda.is_available():
        bound = launch.TritonKernel(source, symbol, kernel, plan, "cuda")
        print(f"{bound.compile().registers} registers, {bound.compile().spills} bytes spilled")

        def on_gpu(buffers: dict[str, torch.Tensor]) -> int:
            for name in order:
                if not kernel.buffer(name).scalar:
                    buffers[name] = buffers[name].cuda()
            bound.launch([buffers[n] for n in order], sizes)
            return 0

        return on_gpu, "real"
    grid = launch.grid_of(kernel, plan, sizes)
    count = min(grid, _INTERPRETED)
    print(f"no GPU here: {count} of its {grid} programs run in Triton's interpreter")

    def interpreted(buffers: dict[str, torch.Tensor]) -> int:
        launch.interpret(source, symbol, kernel, plan, [buffers[n] for n in order], sizes, grid=count)
        return 0

    return interpreted, "all" if count == grid else "first"


def _written(kernel: Kernel, call: Call, inputs: dict[str, torch.Tensor],
             found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:  # fmt: skip
    """Which elements of each output a partial run wrote: those that end equal whatever they held before."""
    again = {k: v.clone() for k, v in inputs.items()}
    for b in kernel.buffers:
        if b.kind == "out":
            again[b.name].fill_(0)
    call(again)
    return {b.name: (again[b.name] == found[b.name]) | ((again[b.name] != again[b.name]) & (found[b.name] != found[b.name]))
            if b.kind == "out" else again[b.name] != inputs[b.name]
            for b in kernel.buffers if b.kind != "in"}  # fmt: skip


def _agrees(name: str, found: torch.Tensor, wide: torch.Tensor, narrow: torch.Tensor,
            where: torch.Tensor | None) -> bool:  # fmt: skip
    """Print and judge one output: at most as far from float64 as ten times the loop interpreter is, give or take."""
    found = found.cpu()
    if where is not None:
        found, wide, narrow = found[where], wide[where], narrow[where]
    if not found.numel():
        print(f"{name}: nothing was written")
        return where is None
    if not found.dtype.is_floating_point:
        share = (found != narrow).float().mean().item()
        print(f"{name}: {found.numel()} elements, {share:.2%} differ")
        return share <= 1e-3  # a comparison of rounded numbers may fall to the other side
    given, exact, ours = found.double(), wide.double(), narrow.double()
    same = (given == exact) | (given.isnan() & exact.isnan()) | (given == ours) | (given.isnan() & ours.isnan())
    error = torch.where(same, 0.0, (given - exact).abs()).nan_to_num(math.inf, math.inf)
    peer = torch.where(ours.isnan(), 0.0, (ours - exact).abs()).nan_to_num(0.0, 0.0)
    scale = exact[exact.isfinite()].abs().max().item() if bool(exact.isfinite().any()) else 1.0
    allowed = 10 * peer.max().item() + 16 * torch.finfo(found.dtype).eps * (exact.abs().nan_to_num(0.0, 0.0) + scale)
    wrong = (error > allowed).float().mean().item()
    print(f"{name}: {found.numel()} elements, largest error {error.max().item():.3g} (values up to {scale:.3g})"
          + (f", {wrong:.2%} WRONG" if wrong else ""))  # fmt: skip
    return wrong <= (1e-4 if found.numel() >= 10_000 else 0.0)


def _time(call: Call, buffers: dict[str, torch.Tensor], moved: int) -> None:
    gpu = torch.cuda.is_available() and any(t.is_cuda for t in buffers.values())

    def batch(n: int) -> float:
        start = time.perf_counter()
        for _ in range(n):
            call(buffers)
        if gpu:
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / n

    once = batch(1)
    best = min(batch(max(1, int(_SECONDS / 5 / max(once, 1e-6)))) for _ in range(5))
    print(f"{best * 1e6:.2f} us a launch, {moved / max(best, 1e-9) / 1e9:.1f} GB/s")


def _build(kernels: Mapping[str, tuple[Kernel, str]]) -> dict[str, Callable[..., int]]:
    """C++ kernels by symbol, compiled now. Raises FusioncError for one that does not build."""
    from .codegen.cpp import PRELUDE
    from .compiler import ctypes_function
    from .runtime.cache import open_cache
    from .runtime.compile_cpp import build
    from .runtime.environment import environment_key

    result = build([(s, text) for s, (_, text) in kernels.items()], open_cache(False), environment_key("cpu"), PRELUDE)
    for error in result.errors.values():
        raise error
    return {s: ctypes_function(result.addresses[s], len(k.buffers), len(k.sizes)) for s, (k, _) in kernels.items()}


# -- one program ------------------------------------------------------------------------------------------------------


def device(name: str) -> torch.device:
    """The device of that name, or the CPU where it is not there."""
    found = torch.device(name)
    return found if found.type != "cuda" or torch.cuda.is_available() else torch.device("cpu")


def current_stream() -> int:
    """The raw stream that launches go to."""
    return torch.cuda.current_stream().cuda_stream if torch.cuda.is_available() else 0


def view(base: torch.Tensor, size: Sequence[int], stride: Sequence[int], offset: int) -> torch.Tensor:
    """A tensor over the memory of another; ``offset`` counts from its first element."""
    from torch._C._dynamo.guards import _reinterpret_tensor  # type: ignore[attr-defined]

    return _reinterpret_tensor(base, size, stride, offset)


def restride(t: torch.Tensor, size: Sequence[int], stride: Sequence[int]) -> torch.Tensor:
    """A copy with these strides."""
    return torch.empty_strided(size, stride, dtype=t.dtype, device=t.device).copy_(t)


def index_error(kernel: str) -> None:
    """What a Program calls when a kernel reports an index out of range."""
    raise IndexError(f"index out of range in fusionc kernel {kernel}")


def missing(what: str) -> Any:
    """Stands for an object that has no text; using it ends the program with a sentence."""

    def use(*args: Any, **kwargs: Any) -> Any:
        raise SystemExit(f"this program needs {what}, which cannot be written as text")

    return use


def load_kernels(folder: Path, wanted: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]]) -> dict[str, Any]:
    """Callables by symbol, from the literals of ``folder/k*/kernel.py``; nothing there is executed but the kernels.

    ``wanted`` gives for each symbol the names of its buffers and sizes in the order of a call's arguments.
    """
    parts: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("k*/kernel.py")):
        found = _literals(path)
        parts.setdefault(str(found.get("SYMBOL", "")).split("_part")[0], []).append(found)
    absent = [s for s in wanted if s not in parts]
    if absent:
        raise FusioncError(f"kernel {absent[0]} is in no k*/kernel.py beside program.py; run it inside its dump")
    cpp = {s: (_kernel(p), p["SOURCE"]) for s in wanted for p in parts[s][:1] if p["LANGUAGE"] == "cpp"}
    functions: dict[str, Any] = dict(_build(cpp)) if cpp else {}
    for symbol, (buffers, sizes) in wanted.items():
        if symbol not in functions:
            functions[symbol] = _triton(sorted(parts[symbol], key=lambda p: str(p["SYMBOL"])), buffers, sizes)
    return functions


def _kernel(found: dict[str, Any]) -> Kernel:
    return parse_kernel(str(found["LOOP"]).strip())


def _literals(path: Path) -> dict[str, Any]:
    """Assignments of literals at the top of a Python file, without running it."""
    out: dict[str, Any] = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            try:
                out[node.targets[0].id] = ast.literal_eval(node.value)
            except ValueError:
                continue
    return out


def _triton(found: list[dict[str, Any]], buffers: tuple[str, ...], sizes: tuple[str, ...]) -> Any:
    from .targets.triton import Part, bind

    where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if "GRID" in found[0]:  # a horizontal launch
        from .targets import many

        (p,) = found
        return many.bind(p["LOOP"].strip(), Plan.from_dict(json.loads(p["PLAN"])), p["SOURCE"], int(p["GRID"]), where)
    group = [Part(p["SYMBOL"], _kernel(p), Plan.from_dict(json.loads(p["PLAN"])), p["SOURCE"]) for p in found]
    return bind(group, list(buffers), list(sizes), where)


def _memory(t: torch.Tensor) -> torch.Tensor:
    """All elements of its storage; strides may overlap."""
    return t.as_strided((t.untyped_storage().nbytes() // t.element_size(),), (1,), 0)


def run_program(call: Callable[[list[Any]], Any], specs: Sequence[Any]) -> int:
    """Call the program on random inputs, print what it returns, time it. Exit status 0 unless it raises."""
    torch.manual_seed(0)
    inputs = make_inputs(specs)
    # a program may count up where the next call writes into a cache, which has an end
    integers = [_memory(t) for t in inputs if isinstance(t, torch.Tensor) and not t.dtype.is_floating_point]
    kept = [t.clone() for t in integers]
    with torch.no_grad():
        results = call(list(inputs))
        for number, r in enumerate(results):
            what = f"{str(r.dtype).removeprefix('torch.')}{list(r.shape)}" if isinstance(r, torch.Tensor) else repr(r)
            print(f"result {number}: {what}")

        def settle() -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()

        def once() -> float:
            for t, values in zip(integers, kept, strict=True):
                t.copy_(values)
            settle()
            start = time.perf_counter()
            call(list(inputs))
            settle()
            return time.perf_counter() - start

        first = once()
        more = 0 if first > 1 else max(3, min(1000, int(_SECONDS / max(first, 1e-5))))
        best = min([first, *(once() for _ in range(more))])
    print(f"{best * 1e6:.1f} us a call")
    return 0
