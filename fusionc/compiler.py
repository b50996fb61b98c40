"""One ATen graph to one callable: passes, groups, kernels, plans, source, Program.

`compile_steps` is what the backend hands to AOTAutograd.  It never fails for lack of a lowering: what cannot be a kernel
is an ATen call inside the Program; what goes wrong in the compiler itself costs speed, with one warning, not the answer.
"""

from __future__ import annotations

import contextlib
import ctypes
import operator
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch.fx import GraphModule, Node

from . import ahead, artifacts, errors, inplace, many, ops, program_cache, rescue
from .codegen import program as prog
from .config import Config
from .graph.facts import KEEP_PLACE, packet_name, size_hints
from .ir.alike import Alike
from .ir.build import Builder, Built
from .ir.expr import ONE, ZERO, Index, Size, Var
from .ir.loop import Kernel
from .ir.simplify import simplify
from .ir.sizes import Unsupported, free_sizes, size_index, sizes_index, strides_index
from .ir.value import Idx
from .record import CallRecord, GraphRecord, GroupRecord
from .runtime import ready
from .schedule.group import Call, Group, Grouper, Unit, is_view

CROSS = artifacts.CROSS


@dataclass
class Lowered:
    """One group with its kernel."""

    group: Group
    built: Built
    symbol: str = ""


@dataclass
class Context:
    """What one compilation carries along."""

    gm: GraphModule
    config: Config
    record: GraphRecord
    device: torch.device
    target: str
    hints: dict[str, int]
    key: program_cache.Key | None = None
    sources: dict[str, str] = field(default_factory=dict)  # symbol -> generated text
    loops: dict[str, str] = field(default_factory=dict)  # symbol -> loop IR, once linked
    program: prog.Program | None = None  # once linked
    operators: dict[int, torch._ops.OpOverload] = field(default_factory=dict)  # id of what the program calls -> operator
    alike: Alike = field(default_factory=Alike)
    waiting: ahead.Compiling | None = None  # the operators' kernels
    at_zero: frozenset[Node] = frozenset()  # values that must begin where their storage does
    elsewhere: float = 0.0  # seconds in which the caller did something else
    lone: bool = False  # one kernel is all of an inference graph: no other of ours follows

    def placed(self, node: Node) -> bool:
        """Is it told where the value begins in its storage, so that it cannot lie in memory of something else?"""
        return node in self.at_zero or packet_name(node) in KEEP_PLACE


def device_of(gm: GraphModule) -> torch.device:
    """The device the graph computes on: the first accelerator found, else the CPU."""
    for node in gm.graph.nodes:
        val = node.meta.get("val")
        if isinstance(val, torch.Tensor) and val.device.type not in ("cpu", "meta"):
            return val.device
    return torch.device("cpu")


def choose_target(config: Config, device: torch.device) -> str:
    """ "cpp", "triton", "interpret", "aten" or a cross-compilation target, for this device and these options."""
    if config.target not in ("auto", "cpp"):
        return config.target
    if device.type == "cpu":
        return "cpp"
    return "triton" if device.type == "cuda" else "aten"


T = TypeVar("T")
Compiled = tuple[Callable[[list[Any]], Any], GraphRecord]
Steps = Generator[program_cache.Key | None, None, T]


def compile_graph(gm: GraphModule, example_inputs: Sequence[Any], config: Config, stage: str = "inference",
                  name: str = "graph") -> Compiled:  # fmt: skip
    """Compile one ATen graph (functional, `meta["val"]` on every node).

    Returns a boxed callable (one list of arguments, which it empties; returns a tuple) and the record of what was done.
    """
    steps = compile_steps(gm, example_inputs, config, stage, name)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            compiled: Compiled = end.value
            return compiled


def compile_steps(gm: GraphModule, example_inputs: Sequence[Any], config: Config, stage: str = "inference",
                  name: str = "graph") -> Steps[Compiled]:  # fmt: skip
    """`compile_graph` in steps: the caller may do something else before it goes on.

    Unless the cache has the graph, it stops once before it does anything, and whenever it would wait for kernels that other
    threads may compile.  It yields the graph's key in the cache, None where it has none.
    """
    from .passes.manager import run_passes

    started = time.perf_counter()
    record = GraphRecord(name=name, stage=stage)  # type: ignore[arg-type]
    if config.dump:
        from .graph.text import graph_text

        record.input_text = graph_text(gm)
        record.repro = artifacts.repro_text(gm, example_inputs, config)
    device = device_of(gm)
    target = choose_target(config, device)
    if target == "triton":
        ready.begin(force=True)
    slot = program_cache.Slot(gm, config, stage, device, target)
    found = slot.load(name)
    if found is not None:
        return found
    away = time.perf_counter()
    yield slot.key
    started += time.perf_counter() - away
    gm, record.passes = run_passes(gm, "graph", config, example_inputs, stage=stage, recompile=False)
    derived = gm.meta.get("fusionc_derived") or []
    record.timings["passes"] = time.perf_counter() - started
    if config.dump:
        record.final_text = graph_text(gm)
        record.edges = [(a.name, n.name) for n in gm.graph.nodes for a in n.all_input_nodes]
    record.device = _device_words(device, target)
    bandwidth, rate = artifacts.peaks(target, device)
    record.peak_gbs, record.peak_gflops = bandwidth / 1e9, rate / 1e9
    cx = Context(gm, config, record, device, target, _hints(gm), slot.key)
    try:
        call = yield from _lower_and_link(cx)
    except errors.StrictError:
        raise
    except Exception as e:  # a bug of ours costs speed, not the answer
        if config.strict:
            raise
        errors.warn_once(
            f"graph:{type(e).__name__}:{e}",
            f"fusionc could not lower a {stage} graph ({type(e).__name__}: {e}); it runs in ATen. "
            "Please report this; options={'strict': True} shows where it happens",
        )
        record.fallbacks.append(f"whole graph: {type(e).__name__}: {e}")
        call = boxed_eager(gm)
    if target in CROSS:  # its kernels were compiled to be read; the graph itself runs in ATen
        call = boxed_eager(gm)
    call = _with_derived(call, derived, config)
    slot.store(cx, derived, call)
    record.timings["total"] = time.perf_counter() - started - cx.elsewhere
    return call, record


def boxed_eager(gm: GraphModule) -> Callable[[list[Any]], Any]:
    """The graph run node by node in ATen, with the calling convention of a Program."""

    gm.recompile()  # passes have edited the graph and left its code as it was

    def call(args: list[Any]) -> Any:
        mine = list(args)
        args.clear()
        return gm.forward(*mine)

    return call


def _device_words(device: torch.device, target: str) -> str:
    return f"{device.type} ({target})"


def _with_derived(
    call: Callable[[list[Any]], Any], derived: Sequence[Any], config: Config
) -> Callable[[list[Any]], Any]:
    if not derived:
        return call
    from .runtime.weights import DerivedWeights

    resolve = DerivedWeights(derived, config.weights).resolve

    def with_derived(args: list[Any]) -> Any:
        args.extend(resolve(args))
        return call(args)

    return with_derived


def _hints(gm: GraphModule) -> dict[str, int]:
    """Compile-time values of the size symbols, for plans (never for results)."""
    out: dict[str, int] = {}
    for node in gm.graph.nodes:
        if node.op != "placeholder":
            continue
        val = node.meta.get("val")
        for s in (val,) if isinstance(val, torch.SymInt) else getattr(val, "shape", ()):
            if isinstance(s, torch.SymInt) and not s.node.is_constant():
                for sym in s.node.expr.free_symbols:
                    value = size_hints(s.node.shape_env).get(sym)
                    out.setdefault(str(sym), int(value) if value is not None else 64)
    return out


# -- groups to kernels ------------------------------------------------------------------------------------------------


def _lower_and_link(cx: Context) -> Steps[Callable[[list[Any]], Any]]:
    if cx.target == "aten":
        never = {n: "target is aten" for n in cx.gm.graph.nodes if n.op == "call_function" and not is_view(n)}
    else:
        never, cx.at_zero = _told_where(cx.gm)
    alone: set[Node] = set()
    columns = cx.target not in ("cpp", "aten")  # column sums beside row results: worth it where memory is the limit
    for _ in range(12):
        clock = time.perf_counter()
        grouper = Grouper(cx.gm.graph, cx.device, never, alone, cx.alike, cx.target not in ("cpp", "aten"))
        units = grouper.run()
        cx.record.timings["group"] = cx.record.timings.get("group", 0.0) + time.perf_counter() - clock
        clock = time.perf_counter()
        lowered, failed, apart = _build_kernels(cx, grouper, units)
        alone |= apart
        if not failed and not apart:
            _recompute(cx, grouper, lowered)
            if columns:
                units = _merge_columns(cx, grouper, units, lowered)
        cx.record.timings["build"] = cx.record.timings.get("build", 0.0) + time.perf_counter() - clock
        if not failed and not apart:
            clock = time.perf_counter()
            cx.record.kernels.clear()  # of an earlier round
            if cx.target == "triton" and cx.waiting is None:  # (earlier, its threads would only wait for Python's lock)
                cx.waiting = ahead.start(cx.gm)
            direct = inplace.write_in_place(cx, grouper, units, lowered, _stable_inputs(cx))
            reused = inplace.reuse_operands(cx, grouper, units, lowered, direct)
            over = inplace.reuse_calls(cx, grouper, units, lowered, {*direct, *reused.values()})
            bundles = many.find(cx, grouper, units, lowered, direct | reused)
            cx.lone = cx.record.stage == "inference" and len(units) == len(lowered) == 1
            with _compiled_into_our_cache(cx):
                finish = many.start(cx, bundles)
                finish_others = _start_kernels(cx, _outside(bundles, lowered))
            left = time.perf_counter()
            yield cx.key
            away = time.perf_counter() - left
            clock, cx.elsewhere = clock + away, cx.elsewhere + away
            with _compiled_into_our_cache(cx):
                more, bad = finish_others()
                fused, symbols = finish()
                if len(fused) < len(bundles):  # the members of what could not be built are launches of their own
                    cx.record.kernels[:] = [k for k in cx.record.kernels if k.symbol in symbols]
                    more, bad = _start_kernels(cx, _outside(fused, lowered))()
            symbols |= more
            if cx.waiting is not None:
                waited = time.perf_counter()
                cx.waiting()
                cx.record.timings["operators"] = time.perf_counter() - waited
            cx.record.timings["compile"] = cx.record.timings.get("compile", 0.0) + time.perf_counter() - clock
            failed = bad
            if bad and any(i.built.kernel.columns for i in lowered):
                columns, failed = False, {}  # whichever it was, the simpler kernels come first
                continue
        if not failed and not apart:
            break
        never.update(failed)
    else:
        raise errors.FusioncError(f"grouping of graph {cx.record.name} did not settle")
    clock = time.perf_counter()
    out = _link(cx, grouper, units, lowered, symbols, fused, direct, reused, over)
    cx.record.timings["program"] = time.perf_counter() - clock
    return out


def _told_where(gm: GraphModule) -> tuple[dict[Node, str], frozenset[Node]]:
    """Scatters whose storage `as_strided` reads, by positions in the storage of the input that they changed; and other values
    of which it names positions: they are to begin where their storage does."""
    out: dict[Node, str] = {}
    at_zero: set[Node] = set()
    kept = KEEP_PLACE | {"copy"}  # ATen's `copy` makes a clone of its first argument with the storage around it
    for node in gm.graph.nodes:
        read = node.args[0] if packet_name(node).startswith("as_strided") else None
        while isinstance(read, Node) and (packet_name(read) in kept or is_view(read)):
            if packet_name(read) in kept:
                out[read] = f"{packet_name(node)} reads its storage"
            read = read.args[0]
        if isinstance(read, Node):
            at_zero.add(read)
    return out, frozenset(at_zero)


def _outside(bundles: Sequence[many.Bundle], lowered: Sequence[Lowered]) -> list[Lowered]:
    inside = {id(m) for b in bundles for m in b.members}
    return [item for item in lowered if id(item) not in inside]


def _compiled_into_our_cache(cx: Context) -> contextlib.AbstractContextManager[None]:
    """Triton's cache for what two batches compile at a time."""
    if cx.target in ("cpp", "aten", "interpret"):
        return contextlib.nullcontext()
    from .targets.triton import triton_cache

    return triton_cache(cx)


def _stored(grouper: Grouper, units: Sequence[Unit]) -> dict[Node, None]:
    """Nodes of groups whose tensor must be in memory: read by a call, another group or the graph's output."""
    out: dict[Node, None] = {}

    def need(node: Node) -> None:
        base, _ = grouper.resolve(node)
        if base in grouper.lowered:
            out[base] = None

    for unit in units:
        if isinstance(unit, Call):
            for a in unit.node.all_input_nodes:
                need(a)
    seen: set[tuple[int, Node]] = set()

    def reads(group: Group, node: Node) -> None:
        for a in node.all_input_nodes:
            base, _ = grouper.resolve(a)
            if (id(group), base) in seen:
                continue
            seen.add((id(group), base))
            if base in grouper.inline:
                reads(group, base)
            elif base in grouper.lowered and grouper.unit.get(base) is not group:
                out[base] = None

    for unit in units:
        if isinstance(unit, Group):
            for node in unit.nodes:
                reads(unit, node)
    for node in grouper.graph.find_nodes(op="output"):
        for a in node.all_input_nodes:
            need(a)
    return out


def _build_kernels(
    cx: Context, grouper: Grouper, units: list[Unit]
) -> tuple[list[Lowered], dict[Node, str], set[Node]]:
    """Kernels of all groups; nodes that cannot be lowered, with the reason; nodes whose groups must be taken apart."""
    stored = _stored(grouper, units)
    out: list[Lowered] = []
    failed: dict[Node, str] = {}
    apart: set[Node] = set()
    for unit in units:
        if not isinstance(unit, Group):
            continue
        wanted = [n for n in unit.nodes if n in stored]
        if not wanted:
            continue
        try:
            out.append(Lowered(unit, _build_one(cx, grouper, unit, wanted)))
        except (Unsupported, NotImplementedError) as e:
            if len([n for n in unit.nodes if n.target is not operator.getitem]) == 1:
                failed[unit.nodes[0]] = str(e) or "empty"
            else:
                apart.update(unit.nodes)
    return out, failed, apart


_Description = tuple[
    list[Node], list[Var], list[Var], dict[Node, Idx], dict[Node, dict[int, Index]], set[Node], Callable[[Node], bool]
]


def _described(grouper: Grouper, group: Group) -> _Description:
    """A group as `Builder` and `Alike.key` take it."""
    lowered = grouper.lowered.__contains__
    return group.nodes, group.loops, group.axis, group.index, group.axis_index, grouper.inline, lowered


def _build_one(cx: Context, grouper: Grouper, group: Group, wanted: list[Node]) -> Built:
    """The kernel of one group: built, or that of an earlier group that is alike (of 24 equal layers, 23 are)."""
    key, nodes = cx.alike.key(*_described(grouper, group), wanted, cx.device.type)
    known = cx.alike.found.get(key)
    if known is None:
        built = _build_new(cx, grouper, group, wanted)
        seats = {n: k for k, n in enumerate(nodes)}
        cx.alike.found[key] = (built.kernel, [seats[n] for n in built.inputs])
        return built
    kernel, inputs = known
    return Built(kernel, tuple([nodes[k] for k in inputs]), tuple(wanted))


def _build_new(cx: Context, grouper: Grouper, group: Group, wanted: list[Node]) -> Built:
    builder = Builder(*_described(grouper, group))
    builder.device_type = cx.device.type
    built = builder.build(wanted)
    kernel = simplify(built.kernel)
    if cx.config.verify:
        _verify(kernel)
    return Built(kernel, built.inputs, built.outputs)


def _verify(kernel: Kernel) -> None:
    from .ir.verify import verify

    with torch.utils._python_dispatch._disable_current_modes():  # the verifier computes indices with real tensors
        verify(kernel)


def _merge_columns(cx: Context, grouper: Grouper, units: list[Unit], lowered: list[Lowered]) -> list[Unit]:
    """Kernels of rows take over the column sums of the same data; the units in their new order."""
    from .schedule.columns import merge
    from .targets.triton import device_of as gpu

    by_group = {item.group: item for item in lowered}
    built = {g: item.built for g, item in by_group.items()}
    done = list(merge(grouper, units, built, cx.hints, gpu(cx)))
    for rows, columns, both in done:
        by_group[rows].built = both
        lowered.remove(by_group[columns])
    if done and cx.config.verify:
        for rows in {r for r, _, _ in done}:
            _verify(built[rows].kernel)
    return grouper.ordered() if done else units


def _recompute(cx: Context, grouper: Grouper, lowered: list[Lowered]) -> None:
    """Kernels compute what others would have written for them, where that moves fewer bytes."""
    from .schedule import recompute

    inline, changed = recompute.find(grouper, {item.group: item.built for item in lowered})
    if not inline:
        return
    before = set(grouper.inline)
    grouper.inline |= inline
    anew: list[tuple[Lowered, Built | None]] = []
    try:
        for item in lowered:
            if item.group in changed:
                wanted = [n for n in item.built.outputs if n not in inline]
                anew.append((item, _build_one(cx, grouper, item.group, wanted) if wanted else None))
    except (Unsupported, NotImplementedError):
        grouper.inline = before
        return
    for item, built in anew:
        if built is None:
            lowered.remove(item)
        else:
            item.built = built


# -- kernels to code --------------------------------------------------------------------------------------------------


def _start_kernels(cx: Context, lowered: list[Lowered]) -> Callable[[], tuple[dict[str, Any], dict[Node, str]]]:
    """Start to compile.  The result waits; it returns callables by symbol and, for kernels that could not be built, their
    nodes with the reason."""
    by_text: dict[str, list[Lowered]] = {}
    for item in lowered:
        item.symbol = f"k_{item.built.kernel.digest[:20]}"
        by_text.setdefault(item.symbol, []).append(item)
    if not by_text:
        return lambda: ({}, {})
    kernels, counts = {s: items[0].built.kernel for s, items in by_text.items()}, {s: len(i) for s, i in by_text.items()}
    waiting: Callable[[], tuple[dict[str, Any], dict[str, str]]]
    if cx.target == "cpp":
        from .targets import cpp

        waiting = partial(cpp.compile_all, cx, kernels)
    else:
        from .targets import triton

        waiting = triton.start(cx, kernels, counts)

    def finish() -> tuple[dict[str, Any], dict[Node, str]]:
        functions, problems = waiting()
        if problems:
            artifacts.report_problems(cx, problems)
        bad = {n: "its kernel could not be built" for symbol in problems for item in by_text[symbol] for n in item.group.nodes}
        for record in cx.record.kernels:
            record.uses = counts.get(record.symbol, record.uses)
        artifacts.describe_kernels(cx.record.kernels, {s: items[0].group.nodes for s, items in by_text.items()})
        return functions, bad

    return finish


# -- the program ------------------------------------------------------------------------------------------------------


class _Linker:
    """Turns units into steps."""

    def __init__(self, cx: Context, grouper: Grouper, lowered: list[Lowered], symbols: dict[str, Any]):
        self.cx, self.grouper, self.symbols = cx, grouper, symbols
        self.by_group = {id(item.group): item for item in lowered}
        placeholders = [n for n in cx.gm.graph.nodes if n.op == "placeholder"]
        self.placeholders = placeholders
        self.name: dict[Node, str] = {n: f"a{k}" for k, n in enumerate(placeholders)}
        self.program = prog.Program(tuple(self.name.values()))
        self.sizes: dict[str, Size] = {}
        self.count = 0
        self.views: dict[Node, str] = {}
        self.expected: set[Node] = set()
        self.language = "cpp" if cx.target == "cpp" else "triton"

    def fresh(self, prefix: str) -> str:
        self.count += 1
        return f"{prefix}{self.count}"

    def use(self, xs: Sequence[Index]) -> tuple[Index, ...]:
        for x in xs:
            free_sizes(x, self.sizes)
        return tuple(xs)

    # -- operands
    def tensor(self, node: Node) -> str:
        """Name of a variable that holds this node's tensor, making the view if it is one."""
        found = self.name.get(node)
        if found is not None:
            return found
        base, chain = self.grouper.resolve(node)
        if node.op == "get_attr":
            name = self.program.constant("attr_" + str(self.count), _get_attr(self.cx.gm, str(node.target)))
            self.count += 1
            self.name[node] = name
            return name
        if not chain:
            raise errors.FusioncError(f"node {node.name} has no value")
        self.expect(base)
        source = self.tensor(base)
        val, base_val = node.meta["val"], base.meta["val"]
        name = self.fresh("v")
        try:
            if not isinstance(val, torch.Tensor):
                raise Unsupported("several views")
            if val.dtype != base_val.dtype or val.is_conj() != base_val.is_conj() or val.is_neg() != base_val.is_neg():
                raise Unsupported("view of another type")
            offset = size_index(val.storage_offset()) - size_index(base_val.storage_offset())
            size, stride = sizes_index(val.shape), strides_index(val.stride())
        except Unsupported:
            self.call(node, name)
        else:
            self.use([*size, *stride, offset])
            self.program.steps.append(prog.View(name, source, size, stride, offset))
        self.name[node] = name
        return name

    def expect(self, node: Node) -> None:
        """Make sure the tensor of a call or an argument has the strides that were assumed."""
        if node in self.expected:
            return
        self.expected.add(node)
        val = node.meta.get("val")
        if not isinstance(val, torch.Tensor) or val.layout is not torch.strided or val.dim() == 0:
            return
        if node.op == "placeholder":
            if node in self.stable:
                return
        elif node.op != "call_function" or node in self.grouper.lowered or _keeps_strides(node):
            return
        try:
            size, stride = sizes_index(val.shape), strides_index(val.stride())
        except Unsupported:
            return
        self.use([*size, *stride])
        self.program.steps.append(prog.Expect(self.name[node], size, stride))

    stable: frozenset[Node] = frozenset()

    def operand(self, value: Any) -> str:
        if isinstance(value, Node):
            val = value.meta.get("val")
            if isinstance(val, torch.SymInt) and value not in self.name:
                i = size_index(val)
                self.use([i])
                return prog.size_text(i)
            return self.tensor(value)
        raise TypeError(value)

    # -- units
    def call(self, node: Node, name: str | None = None) -> None:
        p = self.program
        val = node.meta.get("val")
        name = name or self.fresh("c")
        if isinstance(val, torch.SymInt):
            try:
                i = size_index(val)
                self.use([i])
                p.steps.append(prog.Assign(name, prog.size_text(i)))
                self.name[node] = name
                return
            except Unsupported:
                pass
        args = [prog.literal(p, a, self.operand) for a in node.args]
        args += [f"{k}={prog.literal(p, v, self.operand)}" for k, v in node.kwargs.items()]
        if node.target is operator.getitem:
            p.steps.append(prog.Assign(name, f"{args[0]}[{args[1]}]"))
            self.name[node] = name
            return
        target: Any = self.over.get(node, node.target)
        if node.op == "call_function":
            label = getattr(getattr(target, "overloadpacket", None), "__name__", None) or getattr(
                target, "__name__", "function"
            )
            if isinstance(target, torch._ops.OpOverload):
                operator_, target = target, getattr(target, "_op", target)
                self.cx.operators[id(target)] = operator_
        else:
            raise errors.FusioncError(f"{node.op} node {node.name} in an ATen graph")
        label = "".join(ch if ch.isalnum() and ch.isascii() else "_" for ch in str(label))
        p.steps.append(prog.Call(name, p.constant(f"op_{label}", target), ", ".join(args)))
        self.name[node] = name

    direct: dict[Node, Node] = {}
    reused: dict[Node, Node] = {}
    over: dict[Node, Any] = {}  # calls → the operator that may write over an argument
    leaving: frozenset[Node] = frozenset()  # whose memory the results of the graph are or view

    def output(self, node: Node) -> str:
        """Name of the buffer for a result: a new one, the input that it is written to, or the operand that it replaces."""
        if node in self.reused:
            self.tensor(self.reused[node])
            self.expect(self.reused[node])
            name = self.name[node] = self.tensor(self.reused[node])
            val, theirs = node.meta["val"], self.reused[node].meta["val"]
            if (val.shape, val.stride()) != (theirs.shape, theirs.stride()):  # strides of one element may differ, too
                base, name = name, self.fresh("v")
                size, stride = sizes_index(val.shape), strides_index(val.stride())
                self.program.steps.append(prog.View(name, base, size, stride, size_index(0)))
                self.name[node] = name
            return name
        if node in self.direct:
            name = self.name[node] = self.tensor(self.direct[node])
            return name
        val = node.meta["val"]
        size, stride = sizes_index(val.shape), strides_index(val.stride())
        self.use([*size, *stride])
        name = self.name[node] = self.fresh("b")
        first = self.begins(node) if node in self.leaving else ZERO
        if first is ZERO:
            self.program.steps.append(prog.Alloc(name, size, stride, val.dtype, val.device))
            return name
        self.use([first])
        reach = first + ONE  # at least what the elements span, and never negative
        for n, step in zip(size, stride, strict=True):
            reach = reach + n * step
        self.program.steps.append(prog.Alloc(name, (reach,), (ONE,), val.dtype, val.device))
        base, name = name, self.fresh("v")
        self.program.steps.append(prog.View(name, base, size, stride, first))
        self.name[node] = name
        return name

    def begins(self, node: Node) -> Index:
        """Where ATen's result would begin in its storage: AOTAutograd takes that for the place of the user's view, if the
        result is a view of an input that the graph changes.  Fake values out of torch's cache say 0 for every scatter."""
        first = ZERO
        try:
            while True:
                base, _ = self.grouper.resolve(node)
                here, there = size_index(node.meta["val"].storage_offset()), size_index(base.meta["val"].storage_offset())
                if packet_name(base) not in KEEP_PLACE:
                    return first + here
                first, node = first + here - there, base.args[0]  # type: ignore[assignment]
        except Unsupported:
            return ZERO

    def launch(self, item: Lowered) -> None:
        p = self.program
        kernel = item.built.kernel
        names = []
        for node in item.built.inputs:
            names.append(self.tensor(node))
            self.expect(node)
        for node in item.built.outputs:
            names.append(self.output(node))
        for s in kernel.sizes:
            self.sizes[s.name] = s
        by_name = dict(zip([b.name for b in (*_inputs(item.built), *_outputs(item.built))], names, strict=True))
        ordered = [by_name[b.name] for b in kernel.buffers]
        p.steps.append(
            prog.Launch(
                item.symbol,
                tuple(ordered),
                kernel.sizes,
                self.language,
                kernel.may_fail and self.language == "cpp",
                ", ".join(n.name for n in item.group.nodes)[:100],
                tuple(b.scalar for b in kernel.buffers),
            )
        )
        p.constants[item.symbol] = self.symbols[item.symbol]

    def bind_sizes(self) -> None:
        """How each size symbol is read off the arguments."""
        known: dict[str, str] = {}
        for n in self.placeholders:
            val = n.meta.get("val")
            if isinstance(val, torch.SymInt) and not val.node.is_constant() and val.node.expr.is_Symbol:
                known.setdefault(str(val.node.expr), self.name[n])
        for n in self.placeholders:
            val = n.meta.get("val")
            if isinstance(val, torch.Tensor):
                for what, dims in (
                    ("size", val.shape),
                    ("stride", val.stride() if val.layout is torch.strided else ()),
                ):
                    for d, s in enumerate(dims):
                        if isinstance(s, torch.SymInt) and not s.node.is_constant() and s.node.expr.is_Symbol:
                            known.setdefault(str(s.node.expr), f"{self.name[n]}.{what}({d})")
        missing = [s for s in self.sizes if s not in known]
        if missing:
            raise errors.FusioncError(f"size symbol {missing[0]} cannot be read off the graph's arguments")
        self.program.sizes = tuple((s, known[s]) for s in sorted(self.sizes))


def _inputs(built: Built) -> list[Any]:
    return sorted((b for b in built.kernel.buffers if b.kind == "in"), key=lambda b: int(b.name[2:]))


def _outputs(built: Built) -> list[Any]:
    return sorted((b for b in built.kernel.buffers if b.kind != "in"), key=lambda b: int(b.name[3:]))


def _get_attr(gm: GraphModule, path: str) -> Any:
    out: Any = gm
    for part in path.split("."):
        out = getattr(out, part)
    return out


_KEEPS = frozenset("mm addmm bmm baddbmm native_dropout bernoulli getitem".split())


def _keeps_strides(node: Node) -> bool:
    """Library calls whose output strides always are those of the meta function."""
    name = getattr(getattr(node.target, "overloadpacket", None), "__name__", "")
    return name in _KEEPS


def _link(
    cx: Context, grouper: Grouper, units: list[Unit], lowered: list[Lowered], symbols: dict[str, Any],
    fused: Sequence[many.Bundle] = (), direct: Mapping[Node, Node] | None = None,
    reused: Mapping[Node, Node] | None = None, over: Mapping[Node, Any] | None = None,
) -> Callable[[list[Any]], Any]:  # fmt: skip
    link = _Linker(cx, grouper, lowered, symbols)
    p = link.program
    link.stable = _stable_inputs(cx)
    link.direct, link.reused, link.over = dict(direct or {}), dict(reused or {}), dict(over or {})
    (output,) = cx.gm.graph.find_nodes(op="output")
    link.leaving = frozenset(grouper.resolve(n)[0] for n in output.all_input_nodes)
    record = cx.record
    names = {r.symbol: r.name for r in record.kernels}
    bundle_of = {id(m): b for b in fused for m in b.members}
    for unit in units:
        if isinstance(unit, Call):
            link.call(unit.node)
            if unit.node.target is not operator.getitem and not isinstance(
                unit.node.meta.get("val"), (torch.SymInt, int)
            ):
                record.calls.append(CallRecord(unit.node.name, str(unit.node.target), unit.reason))
        elif id(unit) in link.by_group:
            item = link.by_group[id(unit)]
            bundle = bundle_of.get(id(item))
            if bundle is None:
                link.launch(item)
            elif bundle.members[0] is item:
                many.launch(link, bundle)
            symbol = bundle.many.symbol if bundle else item.symbol
            record.groups.append(
                GroupRecord(
                    name=f"group{len(record.groups)}",
                    nodes=[n.name for n in unit.nodes],
                    kernel=names.get(symbol, symbol),
                    kind=item.built.kernel.kind,
                    inputs=[n.name for n in item.built.inputs],
                    outputs=[n.name for n in item.built.outputs],
                )
            )
            p.uses_stream |= link.language != "cpp"
    results = output.args[0]
    results = results if isinstance(results, (list, tuple)) else (results,)
    p.results = tuple(prog.literal(p, r, link.operand) for r in results)
    link.bind_sizes()
    if link.direct:
        p.steps.append(prog.Wrote(tuple([link.name[n] for n in link.direct.values()])))
    _insert_frees(p)
    if cx.config.dump:
        kernels = {i.symbol: i.built.kernel for i in lowered if i.symbol} | {b.many.symbol: b.many.signature for b in fused}
        record.program = artifacts.program_text(p, cx.gm, cx.operators, kernels)
    if cx.config.strict:
        for c in record.calls:
            if c.reason:
                raise errors.StrictError(
                    f"node {c.node} ({c.op}) was left to ATen: {c.reason}. Remove options['strict'] to allow it"
                )
    cx.program, cx.loops = p, {i.symbol: i.built.kernel.text for i in lowered if id(i) not in bundle_of}
    cx.loops |= {b.many.symbol: b.many.text for b in fused}
    return _compiled(cx, p)


def finish(cx: Context, program: prog.Program, derived: Sequence[Any]) -> Callable[[list[Any]], Any]:
    """The callable of a Program that was read from the cache."""
    return _with_derived(_compiled(cx, program), derived, cx.config)


def _compiled(cx: Context, program: prog.Program) -> Callable[[list[Any]], Any]:
    """The callable of a Program, replayed as a CUDA graph where that is legal and pays."""
    from .runtime import cudagraph, device

    instead = {}
    if cx.device.type == "cuda":
        instead = {name: kernel for name, value in program.constants.items() if (kernel := ops.direct(value)) is not None}
    space, loops, name, strict = _namespace(cx), cx.loops, cx.record.name, cx.config.strict

    def build(part: prog.Program, label: str = "") -> Callable[[list[Any]], Any]:
        call = part.compile({**space, **rescue.entry(part, loops)}, name + label, instead)
        return device.on_device(call, where)

    def half(part: prog.Program) -> Callable[[list[Any]], Any]:
        return rescue.guarded(build(part, f", {len(part.steps)} steps"), strict)

    where = cx.device
    return cudagraph.wrap(build(program), program, cx.record, cx.config, where, cx.target, half)


def _stable_inputs(cx: Context) -> frozenset[Node]:
    """Placeholders whose strides Dynamo guards: all of inference and forward; a backward's saved tensors are ours."""
    if cx.record.stage == "backward":
        return frozenset(n for n in cx.gm.graph.nodes if n.op == "placeholder" and not n.name.startswith("tangents"))
    return frozenset(n for n in cx.gm.graph.nodes if n.op == "placeholder")


def _insert_frees(p: prog.Program) -> None:
    """Delete variables after the last step that mentions them."""
    import re

    word = re.compile(r"\b[abcv]\d+\b")
    last: dict[str, int] = dict.fromkeys(p.arguments, -1)
    kept = set(word.findall(" ".join(p.results)))
    for k, step in enumerate(p.steps):
        for line in step.text(p):
            if not line.startswith("#"):
                for w in word.findall(line):
                    last[w] = k
    ends: dict[int, list[str]] = {}
    for w, k in last.items():
        if w not in kept:
            ends.setdefault(k, []).append(w)
    steps: list[prog.Step] = []
    if -1 in ends:
        steps.append(prog.Free(tuple(ends[-1])))
    for k, step in enumerate(p.steps):
        steps.append(step)
        if k in ends:
            steps.append(prog.Free(tuple(ends[k])))
    p.steps = steps


def _restride(t: torch.Tensor, size: tuple[int, ...], stride: tuple[int, ...]) -> torch.Tensor:
    out = torch.empty_strided(size, stride, dtype=t.dtype, device=t.device)
    return out.copy_(t)


def _index_error(kernel: str) -> None:
    raise IndexError(f"index out of range in fusionc kernel {kernel}")


def _namespace(cx: Context) -> dict[str, Any]:
    from torch._C._dynamo.guards import _reinterpret_tensor  # type: ignore[attr-defined]

    from .runtime.pool import allocate, carve, split, wrote

    space: dict[str, Any] = {
        "empty": torch.empty_strided,
        "allocate": allocate,
        "split": split,
        "carve": carve,
        "wrote": wrote,
        "view": _reinterpret_tensor,
        "restride": _restride,
        "index_error": _index_error,
        "__builtins__": {"float": float, "slice": slice, "__import__": __import__},  # ATen's Python kernels import
    }
    if cx.device.type == "cuda":
        ordinal = cx.device.index or 0
        raw = torch._C._cuda_getCurrentRawStream
        space["current_stream"] = lambda: raw(ordinal)
    else:
        space["current_stream"] = lambda: 0
    return space


def ctypes_function(address: int, buffers: int, sizes: int) -> Callable[..., int]:
    """A C++ kernel as a Python callable taking data pointers and sizes."""
    prototype = ctypes.CFUNCTYPE(ctypes.c_int, *([ctypes.c_void_p] * buffers), *([ctypes.c_int64] * sizes))
    return prototype(address)


__all__ = ["compile_graph", "compile_steps"]
