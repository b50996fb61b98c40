"""The short cut of a warm start: Dynamo's graph straight to cached Programs, without tracing through AOTAutograd.

A second process would spend most of its time in AOTAutograd only to arrive at graphs that the program cache already
holds.  So the first process notes, under a key of Dynamo's graph and everything that tracing looks at, which Programs
came out and how their arguments and results are wired; the second takes over that wiring.  Only plain cases are noted:
no results that alias inputs or each other (but an input itself in inference), no tensor subclasses, mutation of inputs
only inside the graph, no guards that tracing added, operators from a closed list.  Everything else goes through
AOTAutograd as always, and `stats` counts the reasons.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from . import program_cache
from .codegen.program_json import NAMESPACES, NotCacheable
from .config import Config
from .record import GraphRecord, PassRecord, Refusal, remember
from .runtime.cache import canonical
from .warm_training import training_callable

KIND = "warm"
Resolve = Callable[[Sequence[Any]], Sequence[Any]]
stats: Counter[str] = Counter()  # "hit", "miss", "stored" and reasons for not storing, of this process
_METADATA = ("recompute", "custom", "ac_graph_id")  # what a node may carry that changes how AOTAutograd treats it


class Warm:
    """One Dynamo graph on its way through the backend."""

    def __init__(self, gm: GraphModule, example_inputs: Sequence[Any], config: Config, title: str) -> None:
        self.config, self.title = config, title
        self.count = len(example_inputs)
        self.programs: dict[str, dict[str, Any]] = {}
        self.calls: dict[str, tuple[int, tuple[str, ...]]] = {}
        self.plan: dict[str, Any] | None = None
        self.key: dict[str, Any] | None = None
        self.shared: set[int] = set()
        self.ready: dict[str, Callable[[list[Any]], Any]] = {}
        self.wired: dict[str, Any] | None = None  # the plan, once everything is known
        try:
            self.key = self._make_key(gm, example_inputs)
            self.before = _guards()
        except Exception as e:  # noqa: BLE001 - a short cut must not be what fails
            self._not_stored(e)

    def _not_stored(self, e: Exception) -> None:
        self.key = None
        stats[f"not cached: {e}" if isinstance(e, NotCacheable) else f"not cached: {type(e).__name__}: {e}"] += 1

    # -- the key ----------------------------------------------------------------------------------------------------
    def _make_key(self, gm: GraphModule, example_inputs: Sequence[Any]) -> dict[str, Any]:
        why = program_cache.refusal(self.config) or _ambient()
        if why:
            raise NotCacheable(why)
        if self.config.remove_attention is not None:
            raise NotCacheable("which sublayers are removed depends on the values of the weights")
        if self.config.large_kernel is not None:
            raise NotCacheable("which kernels are decomposed depends on the values of the weights")
        from .compiler import choose_target

        seats: dict[Node, int] = {}
        symbols: dict[str, Any] = {}
        lines: list[Any] = []
        given = iter(example_inputs)
        storages: dict[int, int] = {}
        tensors: dict[Node, Any] = {}
        device = torch.device("cpu")
        for node in gm.graph.nodes:
            if any(name in node.meta for name in _METADATA):
                raise NotCacheable("nodes are marked for recomputation or by the user")
            if node.op == "placeholder":
                real, seat = next(given), len(seats)
                tensors[node] = real
                line = ["input", program_cache.layout(node.meta["example_value"], symbols), *_facts(real)]
                if isinstance(real, torch.Tensor):
                    first = storages.setdefault(real.untyped_storage()._cdata, seat)
                    if first != seat:
                        self.shared |= {first, seat}
                    line.append(first)
                    if real.device.type not in ("cpu", "meta"):
                        device = real.device
            elif node.op == "call_function":
                line = [_function(node.target), program_cache.literal(node.args, seats),
                        program_cache.literal(node.kwargs, seats)]  # fmt: skip
                if node.target is torch.nn.functional.batch_norm:
                    from .passes.bn_conv import decides

                    line.append(decides(node, tensors))
            elif node.op == "call_method":
                line = [_method(node), program_cache.literal(node.args, seats), program_cache.literal(node.kwargs, seats)]
            elif node.op == "output":
                line = ["output", program_cache.literal(node.args, seats)]
            else:
                raise NotCacheable(f"Dynamo's graph holds a {node.op}")
            seats[node] = len(seats)
            lines.append(line)
        target = choose_target(self.config, device)
        return {**program_cache.common_key(self.config, device, target), "graph": program_cache._digest(lines),
                "symbols": symbols, "inputs": self.count}  # fmt: skip

    # -- loading ----------------------------------------------------------------------------------------------------
    def load(self) -> Callable[..., Any] | None:
        """The callable for Dynamo, or None.  Never raises."""
        if self.key is None:
            return None
        found = None
        try:
            entry = program_cache.cache_of(self.config).get(KIND, self.key)
            found = self._rebuild(entry) if entry is not None else None
        except Exception as e:  # noqa: BLE001 - whatever is wrong with an entry, compiling is the answer
            stats[f"not valid: {type(e).__name__}: {str(e)[:80]}"] += 1
        stats["hit" if found is not None else "miss"] += 1
        return found

    def _rebuild(self, entry: Mapping[str, Any]) -> Callable[..., Any] | None:
        plan, programs = entry["plan"], entry["programs"]
        training = set(programs) == {"forward", "backward"}
        if set(entry) != {"plan", "programs", "derived", "passes"} or not training and set(programs) != {"inference"}:
            raise ValueError("not an entry of this kind")
        if not isinstance(entry["derived"], list) or not isinstance(entry["passes"], list):
            raise ValueError("not an entry of this kind")
        _check_plan(plan, self.count, training)
        from .rescue import guarded

        calls: dict[str, Callable[[list[Any]], Any]] = {}
        records: list[GraphRecord] = []
        for stage in ("inference",) if not training else ("forward", "backward"):
            key = programs[stage]
            device, target = torch.device(key["device"]), str(key["target"])
            now = program_cache.common_key(self.config, device, target)
            # switches were those inside of AOTAutograd then; ours are in our own key
            if key["stage"] != stage or any(key[f] != v for f, v in now.items() if f != "switches"):
                raise ValueError("a program is for another machine, version or setting")
            name = self.title if stage == "inference" else f"{self.title}_{stage}"
            found = program_cache.load(key, self.config, stage, name, device, target)
            if found is None:
                return None
            calls[stage] = guarded(found[0], self.config.strict)
            records.append(found[1])
        derived = [program_cache._derived(each) for each in entry["derived"]]
        passes = [PassRecord(int(p[0]), str(p[1]), "model", int(p[2]), [Refusal(*map(str, r)) for r in p[3]])
                  for p in entry["passes"]]  # fmt: skip
        if training:
            if derived:
                raise ValueError("derived weights in training")
            call = training_callable(calls["forward"], calls["backward"], plan)
        else:
            resolve = None
            if derived:
                from .runtime.weights import DerivedWeights

                resolve = DerivedWeights(derived, self.config.weights).resolve
            call = _inference_callable(calls["inference"], plan, resolve)
        for record in records:
            record.passes = [*passes, *record.passes]
            record.cache = "hit, without AOTAutograd"
            remember(record)
        return call

    # -- storing ----------------------------------------------------------------------------------------------------
    def observe(self, stage: str, call: Any, run: Callable[[list[Any]], Any]) -> None:
        """A graph of ours was compiled (or loaded) as `stage`; `call` is what `compile_steps` returned, `run` what runs."""
        self.ready[stage] = run
        if self.key is None:
            return
        key = getattr(call, "program_key", None)
        if key is None or stage in self.programs:
            self._not_stored(NotCacheable("one of its programs is not cached"))
            return
        self.programs[stage] = key
        self.calls[stage] = call.program_shape
        self._put()

    def finish(self, derived: Sequence[Any], records: Sequence[PassRecord]) -> None:
        """AOTAutograd is through (a backward graph may still come): note the wiring if it is plain."""
        if self.key is None:
            return
        try:
            if _guards() != self.before:
                raise NotCacheable("tracing added guards")
            if any(d.recipe is None for d in derived):
                raise NotCacheable("a derived weight has no recipe")
            metadata = torch._guards.TracingContext.get().fw_metadata
            self.plan = _plan(metadata, self.count, len(derived), self.shared, self.key["switches"]["autocast"])
            self.derived = [[d.name, list(d.sources), d.recipe, d.share, list(d.volatile)] for d in derived]
            self.passes = [[p.position, p.name, p.fired, [[r.pass_name, r.reason, r.node] for r in p.refusals]]
                           for p in records]  # fmt: skip
            self._put()
        except Exception as e:  # noqa: BLE001 - as above
            self._not_stored(e)

    def _put(self) -> None:
        stages = set(self.programs)
        if self.plan is None or self.key is None or stages not in ({"inference"}, {"forward", "backward"}):
            return
        try:
            plan = dict(self.plan)
            if "backward" in stages:
                _wire_training(plan, self.calls)
            elif plan["training"]["saved"] is not None and any(plan["training"]["saved"]):
                raise NotCacheable("an inference graph saves tensors")
            inputs = self.calls["forward" if "backward" in stages else "inference"][0]
            if inputs != self.count + len(self.derived):
                raise NotCacheable("the graph takes other inputs than Dynamo's")
            results = len(self.calls["inference"][1]) if "inference" in stages else len(plan["outputs"])
            if results != len(plan["outputs"]):
                raise NotCacheable("the graph gives other results than Dynamo's")
            _check_plan(plan, self.count, "backward" in stages)
            self.wired = plan
            entry = {"plan": plan, "programs": self.programs, "derived": self.derived, "passes": self.passes}
            if program_cache.cache_of(self.config).put(KIND, self.key, json.loads(canonical(entry))):
                stats["stored"] += 1
        except Exception as e:  # noqa: BLE001 - as above
            self._not_stored(e)


    def short_cut(self, usual: Callable[..., Any], resolve: Resolve | None) -> Callable[..., Any]:
        """What a warm start would build, around the calls of this process, or `usual` where the wiring is not plain: on
        each call it costs the host less than AOTAutograd's wrappers.  A backward graph is compiled when it first runs;
        until then it is `usual`.  `resolve` gives derived weights."""
        if self.key is None or self.plan is None:
            return usual
        if "inference" in self.ready:
            return usual if self.wired is None else _inference_callable(self.ready["inference"], self.wired, resolve)
        if resolve is not None:
            return usual
        now = usual

        def call(*args: Any) -> Any:
            nonlocal now
            if now is usual and self.wired is not None:
                now = training_callable(self.ready["forward"], self.ready["backward"], self.wired)
            return now(*args)

        return call


# -- what may be in a key ---------------------------------------------------------------------------------------------


def _ambient() -> str:
    """Why graphs are not cached in this state of the process, or ""."""
    context = torch._guards.TracingContext.try_get()
    if context is None or context.fake_mode is None:
        return "Dynamo is not tracing"
    if getattr(context, "fakify_first_call", False):
        return "inputs are fake"
    if torch._C._len_torch_function_stack() or torch._C._is_tracing():
        return "a torch function mode is active"
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return "hooks on saved tensors are active"
    if torch._dynamo.config.compiled_autograd:
        return "compiled autograd needs AOTAutograd's graphs"
    return ""


def _facts(real: Any) -> list[Any]:
    """What AOTAutograd can see of a real input beyond its layout."""
    if not isinstance(real, torch.Tensor):
        if not isinstance(real, (int, float, torch.SymInt, torch.SymFloat)):
            raise NotCacheable(f"an input is a {type(real).__name__}")
        return ["number"]
    if type(real) not in (torch.Tensor, torch.nn.Parameter):
        raise NotCacheable(f"an input is a {type(real).__name__}")
    kind = getattr(real, "_dynamo_static_input_type", None)
    return [type(real).__name__, real.is_leaf, real.requires_grad, real.is_inference(), real._is_view(),
            str(kind) if kind is not None else ""]  # fmt: skip


def _homes() -> dict[str, Any]:
    import math
    import operator

    c = torch._C
    homes = {"operator": operator, "math": math, "torch": torch, "torch.nn.functional": torch.nn.functional,
             "torch.functional": torch.functional}  # fmt: skip
    for name in ("_nn", "_special", "_linalg", "_fft"):
        homes[f"torch._C.{name}"] = getattr(c, name)
    return homes


_EXTRA = {  # functions outside of the homes that Dynamo puts into graphs
    "torch.amp.autocast_mode": ("_enter_autocast", "_exit_autocast"),
    "torch._C": ("_set_grad_enabled", "_log_api_usage_once"),
}
_known: dict[Any, str] = {}


def _function(target: Any) -> str:
    """Qualified name of a function that means the same in every process with these versions."""
    name = _known.get(target)
    if name is not None:
        return name
    if isinstance(target, torch._ops.OpOverload):
        found = program_cache.operator_name(target)
    elif isinstance(target, torch._ops.OpOverloadPacket):
        found = str(target._qualified_op_name)
        found = found if found.split("::")[0] in NAMESPACES else None
    else:
        found = _plain(target)
    if found is None:
        raise NotCacheable(f"Dynamo's graph calls {getattr(target, '__name__', type(target).__name__)}")
    _known[target] = found
    return found


def _plain(target: Any) -> str | None:
    name = getattr(target, "__name__", "")
    # a function of the user's that replaced one of torch's has another module
    module = getattr(target, "__module__", None) or "torch"
    if isinstance(target, type) or not name or module.split(".")[0] not in ("torch", "_operator", "math", "builtins"):
        return None
    for home, where in _homes().items():
        if not name.startswith("_") and getattr(where, name, None) is target:
            return f"{home}.{name}"
    for home, names in _EXTRA.items():
        where = torch.amp.autocast_mode if home == "torch.amp.autocast_mode" else torch._C
        if name in names and getattr(where, name, None) is target:
            return f"{home}.{name}"
    return None


def _method(node: Node) -> str:
    first = node.args[0] if node.args else None
    value = first.meta.get("example_value") if isinstance(first, Node) else None
    if not isinstance(value, (torch.Tensor, torch.SymInt, torch.SymFloat)):
        raise NotCacheable(f"Dynamo's graph calls method {node.target} of something that is no tensor")
    if isinstance(value, torch.Tensor):
        found = getattr(torch.Tensor, str(node.target), None)
        if found is None or (getattr(found, "__module__", None) or "torch").split(".")[0] != "torch":
            raise NotCacheable(f"Dynamo's graph calls method {node.target}, which is not torch's")
    return f"method {node.target}"


def _guards() -> Any:
    """What tracing may add to: a short cut is sound only where it added nothing."""
    context = torch._guards.TracingContext.get()
    env = context.fake_mode.shape_env if context.fake_mode is not None else None
    symbolic = (len(env.guards), dict(env.var_to_range), dict(env.replacements), len(env.deferred_runtime_asserts),
                len(env.axioms)) if env is not None else ()  # fmt: skip
    return symbolic, len(context.guards_context.aotautograd_guards), len(context.guards_context.dynamo_guards.inner)


# -- the wiring -------------------------------------------------------------------------------------------------------


def _plan(metadata: Any, count: int, derived: int, shared: set[int], autocast: Mapping[str, Any]) -> dict[str, Any]:
    """The wiring from AOTAutograd's metadata, as JSON.  Raises NotCacheable unless it is plain."""
    infos = metadata.input_info
    if len(infos) != count + derived:
        raise NotCacheable("AOTAutograd merged inputs")
    if metadata.num_mutated_inp_runtime_indices or metadata.num_intermediate_bases:
        raise NotCacheable("inputs are mutated outside of the graph, or results share memory")
    for name in ("tokens", "num_graphsafe_rng_states", "is_rng_op_functionalized", "act_input_indices",
                 "indices_of_inputs_that_requires_grad_with_mutations_in_bw", "num_opaque_objects_saved_for_bw",
                 "num_backward_tokens"):  # fmt: skip
        if getattr(metadata, name, None):
            raise NotCacheable(f"AOTAutograd's {name} is in use")
    if metadata.grad_enabled_mutation is not None:
        raise NotCacheable("the graph leaves gradients switched on or off")
    mutated = [i for i, info in enumerate(infos) if info.mutates_data or info.mutates_metadata]
    if any(infos[i].mutates_metadata for i in mutated) or any(i in shared for i in mutated):
        raise NotCacheable("an input that is mutated shares its memory or changes its layout")
    metas = [*metadata.subclass_inp_meta, *metadata.subclass_fw_graph_out_meta, *metadata.subclass_tangent_meta]
    if any(type(m).__name__ not in ("PlainTensorMeta", "int") for m in metas):
        raise NotCacheable("tensor subclasses are involved")
    outputs: list[list[Any]] = []
    for info in metadata.output_info:
        kind = info.output_type.name
        if kind == "is_input" and not info.requires_grad:
            outputs.append(["input", int(info.base_idx), [], False, False])
        elif kind in ("non_alias", "unsafe_view_alias"):
            tensor = issubclass(info.raw_type, torch.Tensor)
            tangent = tensor and getattr(info, "requires_grad_for_backward", info.requires_grad)
            outputs.append([kind, -1, sorted(info.dynamic_dims or ()), bool(info.requires_grad), bool(tangent)])
        else:
            raise NotCacheable(f"a result is {kind}")
    return {
        "outputs": outputs,
        "increment": [int(i) for i in metadata.mutated_graph_handled_indices_seen_by_autograd],
        "autocast_off": any(on for on, _ in autocast.values()),
        "training": _training_plan(metadata),
    }


def _training_plan(metadata: Any) -> dict[str, Any]:
    tangents: list[Any] = []
    for meta in metadata.subclass_tangent_meta:
        form = meta.memory_format
        if form is None:
            raise NotCacheable("a gradient has no known layout")
        if form.memory_format is not None:
            tangents.append(["format", str(form.memory_format)[6:]])
        else:
            sizes = [list(form.size), list(form.stride)]
            if not all(type(n) is int for part in sizes for n in part):
                raise NotCacheable("a gradient has a symbolic layout")
            tangents.append(["strides", *sizes])
    symbols = metadata.num_symints_saved_for_bw
    unchecked = getattr(metadata, "num_tensors_saved_with_no_vc_check", 0) or 0
    return {
        "tangents": tangents,
        "saved": [int(symbols), int(unchecked)] if symbols is not None else None,
        "deterministic": metadata.deterministic,
        "leaves": [bool(i.is_leaf) or not i.requires_grad for i in metadata.input_info],
    }


def _wire_training(plan: dict[str, Any], calls: Mapping[str, tuple[int, tuple[str, ...]]]) -> None:
    """Add what only the two compiled graphs tell: how much is saved, and which gradients there are."""
    training = dict(plan["training"])
    if training["saved"] is None or any(kind == "input" for kind, *_ in plan["outputs"]):
        raise NotCacheable("a training graph returns an input")
    symbols, unchecked = training["saved"]
    results, (arguments, gradients) = calls["forward"][1], calls["backward"]
    checked = len(results) - len(plan["outputs"]) - symbols - unchecked
    tangents = sum(tangent for *_, tangent in plan["outputs"])
    if checked < 0 or tangents != len(training["tangents"]) or arguments != symbols + checked + unchecked + tangents:
        raise NotCacheable("the backward graph takes other inputs than expected")
    if len(gradients) != calls["forward"][0]:
        raise NotCacheable("the backward graph gives other gradients than expected")
    none = [text == "None" for text in gradients]
    training["detach"] = [i for i, leaf in enumerate(training.pop("leaves")) if none[i] and not leaf]
    training["saved"] = [checked, unchecked, symbols]
    plan["training"] = training


def _check_plan(plan: Any, count: int, training: bool) -> None:
    """Raise ValueError unless `plan` is of the right form, all numbers in range."""

    def fail() -> None:
        raise ValueError("not a plan")

    def index(i: Any, below: int) -> bool:
        return type(i) is int and 0 <= i < below

    if set(plan) != {"outputs", "increment", "autocast_off", "training"} or type(plan["autocast_off"]) is not bool:
        fail()
    for kind, base, dims, grad, tangent in plan["outputs"]:
        if kind not in ("input", "non_alias", "unsafe_view_alias") or type(grad) is not bool or type(tangent) is not bool:
            fail()
        if kind == "input" and not index(base, count) or not all(index(d, 64) for d in dims):
            fail()
    if not all(index(i, count) for i in plan["increment"]):
        fail()
    if not training:
        return
    more = plan["training"]
    if set(more) != {"tangents", "saved", "deterministic", "detach"} or len(more["saved"]) != 3:
        fail()
    if not all(index(n, 1 << 20) for n in more["saved"]) or not all(index(i, count) for i in more["detach"]):
        fail()
    if more["deterministic"] not in (None, True, False):
        fail()
    if len(more["tangents"]) != sum(tangent for *_, tangent in plan["outputs"]):
        fail()
    for form in more["tangents"]:
        if form[0] == "format":
            if len(form) != 2 or not isinstance(getattr(torch, str(form[1]), None), torch.memory_format):
                fail()
        elif form[0] != "strides" or len(form) != 3 or not all(index(n, 1 << 48) for part in form[1:] for n in part):
            fail()


def _inference_callable(
    program: Callable[[list[Any]], Any], plan: Mapping[str, Any], resolve: Resolve | None
) -> Callable[..., Any]:
    """What AOTAutograd's run-time wrapper does in the plain cases: gradients and autocast off, versions counted."""
    increment = tuple(plan["increment"])
    returned = [(k, base) for k, (kind, base, *_) in enumerate(plan["outputs"]) if kind == "input"]
    dynamic = [(k, set(dims)) for k, (_, _, dims, *_) in enumerate(plan["outputs"]) if dims]
    autocast_off = plan["autocast_off"]
    bump, grad_enabled, set_grad = torch.autograd.graph.increment_version, torch.is_grad_enabled, torch._C._set_grad_enabled

    def call(*args: Any) -> list[Any]:
        mine = list(args)
        if resolve is not None:
            mine.extend(resolve(args))
        if increment:
            bump(tuple([args[i] for i in increment]))
        keep = [args[base] for _, base in returned]
        del args
        grad = grad_enabled()
        try:
            if grad:
                set_grad(False)
            if autocast_off:
                with torch._C._DisableAutocast():
                    results = list(program(mine))
            else:
                results = list(program(mine))
        finally:
            if grad:
                set_grad(True)
        for (k, _), value in zip(returned, keep, strict=True):
            results[k] = value
        for k, dims in dynamic:
            mark_dynamic(results[k], dims)
        return results

    return call


def mark_dynamic(t: Any, dims: set[int]) -> None:
    """Tell Dynamo, as AOTAutograd does, which sizes of a result may vary when it enters another compiled graph."""
    with contextlib.suppress(AttributeError):
        t._dynamo_propagated_dynamic_indices = getattr(t, "_dynamo_propagated_dynamic_indices", set()) | dims
