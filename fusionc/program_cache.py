"""Compiled graphs on disk: an ATen graph that some process compiled before becomes its Program without compiling.

The key is everything that decides the result: the graph (operators, literals, layouts of its inputs, which of them are
parameters), the stage, the switches of torch that tracing looks at, our options, our sources, versions and machine.
The entry is data: steps, sizes, descriptions of constants, loop IR of the kernels, recipes of derived weights, and
what `explain` needs.  All of it is validated (`codegen.program_json`), nothing is unpickled or evaluated, and any doubt
is a miss.  What has no description is not stored; the record says why.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import hashlib
import json
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import GraphModule, Node

from .codegen.program_json import NotCacheable, decode, encode
from .config import Config
from .graph.edit import Derived
from .graph.facts import size_hints
from .record import CallRecord, GraphRecord, GroupRecord, KernelRecord, PassRecord, Refusal
from .runtime.cache import PROGRAM, canonical

if TYPE_CHECKING:
    from .codegen.program import Program
    from .compiler import Context

Key = dict[str, Any]
FORMAT = 1
stats: Counter[str] = Counter()  # "hit", "miss", "stored" and reasons for not storing, of this process
_IMPORTED = time.time()
# Top-level modules that decide what a Program does; a test holds the list of the others.
_SHAPING = "accuracy artifacts backend compiler decompose inplace many partition program_cache rescue warm warm_training".split()
_FREE = ("dump", "cache", "progress", "verify")  # options that change no result
_RECORDS: dict[str, Any] = {"kernels": KernelRecord, "calls": CallRecord, "groups": GroupRecord}


def refusal(config: Config) -> str:
    """Why nothing is cached under these options, or ""."""
    if config.cache is False:
        return "the cache is switched off"
    if config.dump or config.verify:
        return "a dump or verification needs every stage to run"
    if _edited():
        return "fusionc's sources were edited while it ran"
    if config.passes:
        return "passes of the user may do anything"
    return ""


@functools.lru_cache(maxsize=1)
def _edited() -> bool:
    """Whether a source file is younger than this process's fusionc: then their hash would not be that of what runs."""
    home = os.path.dirname(os.path.abspath(__file__))
    names = (os.path.join(folder, n) for folder, _, files in os.walk(home) for n in files if n.endswith(".py"))
    return any(_IMPORTED < os.stat(name).st_mtime <= time.time() for name in names)


# -- keys -------------------------------------------------------------------------------------------------------------


def switches() -> dict[str, Any]:
    """Global settings of torch that tracing and the choice of operators look at."""
    backends = torch.backends
    cuda = backends.cuda
    functorch: dict[str, Any] = {}
    settings = torch._functorch.config
    for name in ("view_replay_for_aliased_outputs", "functionalize_rng_ops", "fake_tensor_allow_meta", "cse",
                 "treat_parameters_as_free_to_save", "recompute_views", "activation_memory_budget", "max_dist_from_bw",
                 "ban_recompute_used_far_apart", "ban_recompute_long_fusible_chains", "ban_recompute_not_in_allowlist",
                 "ban_recompute_materialized_backward", "ban_recompute_reductions", "aggressive_recomputation",
                 "guess_tangent_strides_as_outputs", "graphsafe_rng_functionalization",
                 "force_non_lazy_backward_lowering", "unlift_effect_tokens", "selective_decompose",
                 "disable_guess_zero_tangent_for_mutated_input_subclass"):  # fmt: skip
        functorch[name] = str(getattr(settings, name, None))
    return {
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": {d: [torch.is_autocast_enabled(d), str(torch.get_autocast_dtype(d))] for d in ("cpu", "cuda")},
        "autocast_cache": torch.is_autocast_cache_enabled(),
        "deterministic": [torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(),
                          torch.utils.deterministic.fill_uninitialized_memory],
        "default_dtype": str(torch.get_default_dtype()),
        "precision": torch.get_float32_matmul_precision(),
        "sdpa": [cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled(),
                 cuda.cudnn_sdp_enabled(), str(getattr(torch._C, "_get_sdp_priority_order", list)())],
        "mkldnn": [backends.mkldnn.enabled, backends.mkldnn.is_available()],
        "cudnn": [backends.cudnn.enabled, backends.cudnn.benchmark, backends.cudnn.allow_tf32],
        "functorch": functorch,
    }  # fmt: skip


def common_key(config: Config, device: torch.device, target: str) -> Key:
    """The part of every key that does not come from the graph."""
    from .runtime.environment import environment_key, source_fingerprint

    options = {n: v for n, v in config.to_json().items() if n not in _FREE}
    where = "cpu" if device.type == "cpu" else target if target != "triton" else f"cuda:{device.index or 0}"
    return {
        "format": FORMAT,
        "options": options,
        "target": target,
        "device": str(device),
        "environment": environment_key(where if device.type in ("cpu", "cuda") else "cpu"),
        "source": source_fingerprint(("ops", "graph", "removal", "decomposition", "passes", "ir", "schedule", "codegen",
                                      "runtime", "targets")),
        "compiler": _own_sources(),
        "switches": switches(),
    }


@functools.lru_cache(maxsize=1)
def _own_sources() -> str:
    """Hash of the top-level modules that shape a Program."""
    digest = hashlib.sha256()
    home = os.path.dirname(os.path.abspath(__file__))
    for name in [f"{n}.py" for n in _SHAPING]:
        with open(os.path.join(home, name), "rb") as stream:
            digest.update(hashlib.sha256(stream.read()).digest())
    return digest.hexdigest()


def layout(value: Any, symbols: dict[str, Any]) -> Any:
    """An input as JSON: what a compiler can see of it.  Raises NotCacheable for what is no plain tensor or number."""
    if isinstance(value, torch.Tensor):
        if value.layout is not torch.strided or value.is_nested or value.is_quantized:
            raise NotCacheable("an input is sparse, nested or quantised")
        kind = type(value)
        if kind is not torch.Tensor and kind is not torch.nn.Parameter and \
                not isinstance(value, torch._subclasses.FakeTensor):
            raise NotCacheable(f"an input is a {kind.__name__}")
        sizes = [[number(n, symbols) for n in part] for part in (value.shape, value.stride(), (value.storage_offset(),))]
        return [str(value.dtype), str(value.device), *sizes, value.is_conj(), value.is_neg(), value.requires_grad]
    return ["number", number(value, symbols)]


def number(n: Any, symbols: dict[str, Any]) -> Any:
    """A size as JSON; `symbols` receives range and magnitude of each symbol in it, and what is known of all of them:
    two graphs of the same operators and inputs may differ in it, and then in the sizes of their results."""
    if type(n) in (int, bool):
        return n
    if type(n) is float:
        return {"float": n.hex()}
    if not isinstance(n, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        raise NotCacheable(f"an input is a {type(n).__name__}")
    node = n.node
    if node.is_constant() and isinstance(n, torch.SymInt):
        return int(node.maybe_as_int())
    env = node.shape_env
    table = size_hints(env)
    if "guards" not in symbols:
        symbols["guards"] = sorted({str(guard.expr) for guard in env.guards})
    for s in node.expr.free_symbols:
        hint, bounds = table.get(s), env.var_to_range.get(s)
        # plans look at the magnitude of a size, never at its value
        size = int(hint).bit_length() if hint is not None and getattr(hint, "is_Integer", True) else -1
        symbols[str(s)] = [str(bounds), size]
    return {"size": str(node.expr), "kind": type(n).__name__}


def operator_name(target: Any) -> str | None:
    """Qualified name of an operator whose meaning is fixed by the versions in the key, else None."""
    from .codegen.program_json import NAMESPACES

    if isinstance(target, torch._ops.OpOverload) and target.namespace in NAMESPACES:
        return str(target.name())
    return None


def literal(value: Any, seats: Mapping[Node, int]) -> Any:
    """An argument of a node as JSON that tells apart what must be told apart.  Raises NotCacheable."""
    kind = type(value)
    if kind is int or kind is bool or value is None or kind is str:
        return value
    if kind is Node:
        return {"n": seats[value]}
    if kind is float:
        return {"f": value.hex()}
    if kind is complex:
        return {"c": [value.real.hex(), value.imag.hex()]}
    if isinstance(value, (list, tuple)):
        name = "l" if isinstance(value, list) else "t"
        if hasattr(value, "_fields"):
            raise NotCacheable(f"an argument is a {kind.__name__}")
        return {name: [literal(v, seats) for v in value]}
    if isinstance(value, dict):
        return {"d": [[literal(k, seats), literal(v, seats)] for k, v in value.items()]}
    if kind is slice:
        return {"s": [literal(v, seats) for v in (value.start, value.stop, value.step)]}
    if isinstance(value, (torch.dtype, torch.device, torch.layout, torch.memory_format)):
        return {"o": [kind.__name__, str(value)]}
    if value is Ellipsis:
        return {"o": ["Ellipsis", ""]}
    raise NotCacheable(f"an argument is a {kind.__name__}")


def _digest(value: Any) -> str:
    return hashlib.sha256(canonical(value).encode()).hexdigest()


# Autograd's threads have settings of their own, and a graph of ATen operators depends on none of these.
_OF_A_THREAD = ("grad", "inference", "autocast", "autocast_cache")


def make_key(gm: GraphModule, config: Config, stage: str, device: torch.device, target: str) -> Key:
    """The key of an ATen graph as AOTAutograd hands it over.  Raises NotCacheable."""
    why = refusal(config)
    if why:
        raise NotCacheable(why)
    context = torch._guards.TracingContext.try_get()
    static = getattr(getattr(context, "fw_metadata", None), "static_input_indices", None)
    seats: dict[Node, int] = {}
    symbols: dict[str, Any] = {}
    lines: list[Any] = []
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            line = [layout(node.meta.get("val"), symbols), node.name.startswith("tangents")]
        elif node.op == "call_function":
            name = operator_name(node.target)
            if name is None:
                name = _plain_function(node.target)
            line = [name, literal(node.args, seats), literal(node.kwargs, seats)]
        elif node.op == "get_attr":
            line = ["constant", _constant(gm, str(node.target))]
        elif node.op == "output":
            line = ["output", literal(node.args, seats)]
        else:
            raise NotCacheable(f"the graph holds a {node.op}")
        seats[node] = len(seats)
        lines.append(line)
    common = common_key(config, device, target)
    common["switches"] = {name: value for name, value in common["switches"].items() if name not in _OF_A_THREAD}
    return {
        **common,
        "graph": _digest(lines),
        "symbols": symbols,
        "stage": stage,
        "static": sorted(static or ()),
    }


def _plain_function(target: Any) -> str:
    import operator

    name = getattr(target, "__name__", "")
    for home in (operator, torch):
        if name and getattr(home, name, None) is target and (home is operator or name.startswith("sym_")):
            return f"{home.__name__}.{name}"
    raise NotCacheable(f"the graph calls {getattr(target, '__name__', type(target).__name__)}")


def _constant(gm: GraphModule, path: str) -> Any:
    from .codegen.program_json import describe

    value: Any = gm
    for part in path.split("."):
        value = getattr(value, part)
    if not isinstance(value, torch.Tensor):
        raise NotCacheable(f"the graph holds a {type(value).__name__}")
    return describe(value, {})


class Slot:
    """One graph's place in the cache, for `compile_steps`: load before compiling, store after."""

    def __init__(self, gm: GraphModule, config: Config, stage: str, device: torch.device, target: str) -> None:
        self.config, self.stage, self.device, self.target = config, stage, device, target
        self.key: Key | None = None
        self.why = ""
        try:
            self.key = make_key(gm, config, stage, device, target)
        except Exception as e:  # noqa: BLE001 - a cache must not be what fails
            self.why = str(e) if isinstance(e, NotCacheable) else f"{type(e).__name__}: {e}"

    def load(self, name: str) -> tuple[Callable[[list[Any]], Any], GraphRecord] | None:
        """The callable and its record, if the graph was compiled before."""
        if self.key is None:
            return None
        found = load(self.key, self.config, self.stage, name, self.device, self.target)
        if found is not None:
            found[0].program_key = self.key  # type: ignore[attr-defined]
        return found

    def store(self, cx: Context, derived: Sequence[Derived], call: Callable[[list[Any]], Any]) -> None:
        """Put what was compiled into the cache; the record says if not, and why."""
        try:
            if self.key is None:
                raise NotCacheable(self.why)
            if cx.program is None or cx.target in ("sm_80", "sm_90", "sm_100", "gfx942"):
                raise NotCacheable("no program was made")
            cx.record.cache = "stored" if store(self.key, cx, cx.program, cx.loops, derived) else "kept in memory"
            call.program_key = self.key  # type: ignore[attr-defined]
            call.program_shape = shape_of(cx.program, derived)  # type: ignore[attr-defined]
        except Exception as e:  # noqa: BLE001 - as above
            cx.record.cache = f"not cached: {e}" if isinstance(e, NotCacheable) else f"not cached: {type(e).__name__}: {e}"
            stats[cx.record.cache] += 1


def shape_of(program: Program, derived: Sequence[Derived]) -> tuple[int, tuple[str, ...]]:
    """How many arguments the callable takes, and the texts of its results."""
    return len(program.arguments) - len(derived), program.results


# -- storing ----------------------------------------------------------------------------------------------------------


def store(key: Key, cx: Context, program: Program, kernels: Mapping[str, str], derived: Sequence[Derived]) -> bool:
    """Store what was compiled under `key`.  `kernels` maps symbols to loop IR.  Raises NotCacheable."""
    if any(f.startswith(("kernel ", "whole graph")) for f in cx.record.fallbacks):
        raise NotCacheable("something could not be built here")  # another day it may
    missing = [d.name for d in derived if d.recipe is None]
    if missing:
        raise NotCacheable(f"derived weight {missing[0]} has no recipe")
    operators = {number: str(op.name()) for number, op in cx.operators.items()}
    payload = {
        "program": encode(program, operators, {s: program.constants[s] for s in kernels}),
        "kernels": [{"symbol": s, "loop": text, "source": _sha(cx.sources.get(s))} for s, text in sorted(kernels.items())],
        "derived": [[d.name, list(d.sources), d.recipe, d.share, list(d.volatile)] for d in derived],
        "hints": cx.hints,
        "lone": cx.lone,
        "record": _essentials(cx.record),
    }
    try:
        data = json.loads(canonical(payload))
        stored = cache_of(cx.config).put(PROGRAM, key, data)
    except (TypeError, ValueError) as e:
        raise NotCacheable(f"the entry cannot be written: {e}") from e
    stats["stored"] += stored
    return stored


def cache_of(config: Config) -> Any:
    """The cache of these options."""
    from .targets.cpp import cache_for

    return cache_for(config.cache)


def _sha(text: str | None) -> str | None:
    return hashlib.sha256(text.encode()).hexdigest() if text is not None else None


def _essentials(record: GraphRecord) -> dict[str, Any]:
    out: dict[str, Any] = {name: [dataclasses.asdict(r) for r in getattr(record, name)] for name in _RECORDS}
    out["passes"] = [
        [p.position, p.name, p.level, p.fired, [[r.pass_name, r.reason, r.node] for r in p.refusals]] for p in record.passes
    ]
    out["fallbacks"] = list(record.fallbacks)
    return {**out, "device": record.device, "peak_gbs": record.peak_gbs, "peak_gflops": record.peak_gflops}


# -- loading ----------------------------------------------------------------------------------------------------------


def load(key: Key, config: Config, stage: str, name: str, device: torch.device,
         target: str) -> tuple[Callable[[list[Any]], Any], GraphRecord] | None:  # fmt: skip
    """The callable and the record for `key`, or None.  Never raises: what does not check is a miss."""
    started = time.perf_counter()
    collecting = gc.isenabled()
    gc.disable()  # many small objects at once: collections in between would walk all of torch
    try:
        payload = cache_of(config).get(PROGRAM, key)
        found = _rebuild(payload, config, stage, name, device, target) if payload is not None else None
    except Exception as e:  # noqa: BLE001 - whatever is wrong with an entry, compiling is the answer
        stats[f"not valid: {type(e).__name__}: {str(e)[:80]}"] += 1
        found = None
    finally:
        if collecting:
            gc.enable()
    stats["hit" if found is not None else "miss"] += 1
    if found is not None:
        found[1].cache = "hit"
        found[1].timings["program_cache"] = found[1].timings["total"] = time.perf_counter() - started
    return found


def _rebuild(payload: Mapping[str, Any], config: Config, stage: str, name: str, device: torch.device,
             target: str) -> tuple[Callable[[list[Any]], Any], GraphRecord] | None:  # fmt: skip
    from . import compiler

    if set(payload) != {"program", "kernels", "derived", "hints", "lone", "record"}:
        raise ValueError("not an entry of this kind")
    kinds = {"kernels": list, "derived": list, "lone": bool}
    if any(type(payload[name]) is not kind for name, kind in kinds.items()):
        raise ValueError("not an entry of this kind")
    record = GraphRecord(name=name, stage=stage)  # type: ignore[arg-type]
    hints = {str(n): int(v) for n, v in payload["hints"].items()}
    empty = GraphModule({}, torch.fx.Graph())
    cx = compiler.Context(empty, config, record, device, target, hints, lone=payload["lone"])
    cx.loops = {e["symbol"]: e["loop"] for e in payload["kernels"]}
    launchers = _launchers(cx, payload["kernels"])
    if launchers is None:
        return None
    _fill(record, payload["record"])
    program = decode(payload["program"], launchers)
    cx.program, cx.loops = program, {e["symbol"]: e["loop"] for e in payload["kernels"]}
    derived = [_derived(each) for each in payload["derived"]]
    call = compiler.finish(cx, program, derived)
    call.program_shape = shape_of(program, derived)  # type: ignore[attr-defined]
    return call, record


def _launchers(cx: Context, entries: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Launchers by symbol: C++ ones by the hash of their text, others (and lost ones) from the loop IR."""
    from .ir.text import parse_kernel
    from .schedule.horizontal import parse_many

    launchers: dict[str, Any] = {}
    for each in entries:
        symbol, loop, source = each["symbol"], each["loop"], each["source"]
        if not re.fullmatch(r"[km]_[0-9a-f]{8,64}", symbol) or not isinstance(loop, str):
            raise ValueError("not a kernel")
        if source is not None and not re.fullmatch(r"[0-9a-f]{64}", source):
            raise ValueError("not a hash")
        # the symbol is the hash of the text, so the text needs no parsing where the binary is at hand
        if f"{symbol[0]}_{hashlib.sha256(loop.encode()).hexdigest()[:20]}" != symbol:
            raise ValueError("the loop IR is not that of its symbol")
    if cx.target == "cpp":
        from .targets.cpp import load_all

        if any(e["symbol"].startswith("m_") for e in entries):
            raise ValueError("C++ has no horizontal launches")
        launchers = load_all(cx, {e["symbol"]: e["source"] for e in entries if e["source"]},
                             {e["symbol"]: e["loop"] for e in entries})  # fmt: skip
    lost = {e["symbol"]: e["loop"] for e in entries if e["symbol"] not in launchers}
    fused = {s: parse_many(lost.pop(s)) for s in list(lost) if s.startswith("m_")}
    if fused:
        from .targets import many

        launchers, problems = many.compile_all(cx, fused)
        if problems:
            return None
    if lost:
        if cx.target == "cpp":
            from .targets.cpp import compile_all
        else:
            from .targets.triton import compile_all
        kernels = {}
        for symbol, loop in lost.items():
            kernel = parse_kernel(loop)
            if f"k_{kernel.digest[:20]}" != symbol:
                raise ValueError("the loop IR does not read back")
            kernels[symbol] = kernel
        made, problems = compile_all(cx, kernels)
        if problems:
            return None
        launchers.update(made)
    return launchers


def _derived(data: Any) -> Derived:
    from .passes.recipes import rebuild

    name, sources, recipe, share, volatile = data
    if not all(type(s) is int and 0 <= s < 1 << 20 for s in (*sources, *volatile)) or not isinstance(name, str):
        raise ValueError("not a derived weight")
    if share is not None and not isinstance(share, str):
        raise ValueError("not a derived weight")
    return Derived(name, tuple(sources), rebuild(recipe, len(sources)), share, tuple(volatile), recipe)


def _fill(record: GraphRecord, data: Mapping[str, Any]) -> None:
    record.kernels.clear()
    for name, cls in _RECORDS.items():
        wanted = {f.name: f for f in dataclasses.fields(cls)}
        for each in data[name]:
            if set(each) != set(wanted):
                raise ValueError("a record has other fields")
            made = cls(**each)
            if isinstance(made, KernelRecord):
                made.from_cache = True
                made.tuning = [tuple(t) for t in made.tuning]  # type: ignore[misc]
            getattr(record, name).append(made)
    for position, name, level, fired, refused in data["passes"]:
        refusals = [Refusal(str(a), str(b), str(c)) for a, b, c in refused]
        record.passes.append(PassRecord(int(position), str(name), level, int(fired), refusals))
    record.fallbacks = [str(f) for f in data["fallbacks"]]
    record.device = str(data["device"])
    record.peak_gbs, record.peak_gflops = data["peak_gbs"], data["peak_gflops"]
