"""The torch.compile backend: `torch.compile(model, backend="fusionc")`.

Dynamo calls `fusionc` with a torch-level graph and real inputs; model passes run on it; AOTAutograd functionalises it
into ATen graphs, each of which goes through `fusionc.compiler.compile_steps`.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from . import errors
from .config import Config
from .runtime import ready, turns

_numbers = itertools.count()
_lock = threading.RLock()
_LARGE = 64  # nodes, from which on there are kernels enough for more processes, and tracing takes as long as they to start
_ALONE = ("cpp", "aten", "interpret")  # targets that compile in threads of their own, or not at all
ready.begin()  # torch.compile imports this module when it is given our name: beside Dynamo, where a GPU is in use


def fusionc(gm: GraphModule, example_inputs: Sequence[Any], *, mode: str | None = None,
            options: dict[str, Any] | None = None, **_: Any) -> Callable[..., Any]:  # fmt: skip
    """Compile a Dynamo graph.  Raises OptionError for an unknown mode or option, StrictError only under strict."""
    return fusionc_with(gm, example_inputs, Config.parse(mode, options))


def fusionc_with(gm: GraphModule, example_inputs: Sequence[Any], config: Config) -> Callable[..., Any]:
    """The backend with its options as they were checked."""
    ready.begin()
    with _without_collector():
        return _compile(gm, example_inputs, config)


@contextlib.contextmanager
def _without_collector() -> Iterator[None]:
    """Pause Python's cycle collector: a full collection walks the graphs of all layers again and again and finds nothing
    (of a 24-layer training step's compile time it was a quarter)."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _compile(gm: GraphModule, example_inputs: Sequence[Any], config: Config) -> Callable[..., Any]:
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch import config as functorch_config

    from .artifacts import graph_label
    from .runtime import compile_workers, tune
    from .warm import Warm

    tune.configure(config.tune, config.cache)
    title = f"g{next(_numbers)}_{graph_label(gm)}"
    example_inputs = list(example_inputs)
    original = gm
    warm = Warm(gm, example_inputs, config, title)
    ready = warm.load()
    if ready is not None:
        return ready
    on_gpu = any(isinstance(t, torch.Tensor) and t.device.type == "cuda" for t in example_inputs)
    if on_gpu and len(gm.graph.nodes) >= _LARGE:
        compile_workers.start()  # beside AOTAutograd
    gm, derived, model_records = _model_passes(gm, example_inputs, config)
    weights = None
    if derived:
        from .runtime.weights import DerivedWeights

        weights = DerivedWeights(derived, config.weights)
        example_inputs = [*example_inputs, *_static(weights.resolve(example_inputs))]
    backward = _Backward()
    inner = functools.partial(_inner, config=config, title=title, model_records=model_records, warm=warm, backward=backward)
    # We reuse no saved tensor's memory, so AOTAutograd need not forbid backward(retain_graph=True).
    with functorch_config.patch(donated_buffer=False):
        compiled = aot_autograd(
            fw_compiler=functools.partial(inner, stage="forward"),
            bw_compiler=functools.partial(inner, stage="backward"),
            inference_compiler=functools.partial(inner, stage="inference"),
            decompositions=decompositions(),
            partition_fn=backward.partition,
            keep_inference_input_mutations=True,
        )(gm, example_inputs)
    warm.finish(derived, model_records)
    if weights is None:
        return warm.short_cut(compiled, None)
    resolve = weights.resolve

    def with_derived(*args: Any) -> Any:
        try:
            made = resolve(args)
        except errors.StaleDecision as e:  # another instance, or weights="frozen" that were not
            errors.warn_once("stale decision", f"{e}; this model runs in eager mode")
            return original(*args)
        return compiled(*args, *made)

    bounds = gm.meta.get("fusionc_bounds")
    if bounds:
        return _while_bounds_hold(bounds, config, with_derived, original)
    return warm.short_cut(with_derived, resolve)


def _while_bounds_hold(bounds: list[Any], config: Config, approximate: Callable[..., Any],
                       given: GraphModule) -> Callable[..., Any]:  # fmt: skip
    """``approximate`` as long as what an approximate pass decided by is true of the weights of the call, else the graph as
    Dynamo made it, compiled without that pass when first needed. Nothing but a look at the weights' versions is paid while
    they stay."""
    import dataclasses

    plain = dataclasses.replace(config, large_kernel=None)
    exact = torch.compile(given, backend=lambda gm, inputs: fusionc_with(gm, inputs, plain))
    from .runtime.weights import DerivedWeights

    resolve = DerivedWeights(bounds, config.weights).resolve
    last: Any = None
    holds = False

    def call(*args: Any) -> Any:
        nonlocal last, holds
        found = resolve(args)
        if found is not last:  # another list for other weights, and after each change
            holds, last = all(float(value) <= 1.0 for value in found), found
            if not holds:
                errors.warn_once("bounds", "weights changed after compilation and the bound of an approximate rewrite does not "
                                 "hold any more: the exact graph runs. torch.compiler.reset() decides anew")  # fmt: skip
        return approximate(*args) if holds else exact(*args)

    return call


def _static(values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Derived weights with static sizes: Dynamo knows no source for a symbol of theirs, so it could not guard it."""
    context = torch._guards.TracingContext.try_get()
    if context is None or context.fake_mode is None:
        return list(values)
    return [context.fake_mode.from_tensor(value, static_shapes=True) for value in values]


def _model_passes(
    gm: GraphModule, example_inputs: list[Any], config: Config
) -> tuple[GraphModule, list[Any], list[Any]]:
    """Run the model-level passes (on a copy of the graph if one finds work: Dynamo still reads its own after we return)."""
    from .passes.manager import run_passes

    gm, records = run_passes(gm, "model", config, example_inputs)
    return gm, list(gm.meta.get("fusionc_derived") or []), records


def _inner(gm: GraphModule, example_inputs: Sequence[Any], *, config: Config, title: str, stage: str,
           model_records: list[Any], warm: Any, backward: _Backward) -> Callable[[list[Any]], Any]:  # fmt: skip
    """AOTAutograd's compiler: one ATen graph to a boxed callable."""
    if stage == "forward":
        _nothing_donated()
    graph = _Graph(gm, example_inputs, config, title, stage, model_records, warm)
    graph.advance()
    if stage == "backward":
        backward.take_over(graph)
    elif stage == "forward" and graph.run is None:
        graph.advance()
        if graph.run is None:
            backward.begin(graph)
    return graph.finish()


class _Graph:
    """The compilation of one ATen graph."""

    def __init__(self, gm: GraphModule, example_inputs: Sequence[Any], config: Config, title: str, stage: str,
                 model_records: list[Any], warm: Any) -> None:  # fmt: skip
        from .compiler import compile_steps

        self.gm, self.config, self.stage, self.model_records, self.warm = gm, config, stage, model_records, warm
        self.title, self.name = title, title if stage == "inference" else f"{title}_{stage}"
        self.steps = compile_steps(gm, example_inputs, config, stage, self.name)
        self.key: Any = None  # in the cache
        self.run: Callable[[list[Any]], Any] | None = None  # once compiled

    def finish(self) -> Callable[[list[Any]], Any]:
        """The callable; waits for it."""
        while self.run is None:
            self.advance()
        return self.run

    def advance(self) -> None:
        """Compile to where there is something to wait for, or to the end."""
        from .compiler import boxed_eager
        from .record import GraphRecord

        with _lock, _without_collector():  # a backward graph comes later than `_compile`
            try:
                self.key = next(self.steps)
                return
            except StopIteration as end:
                call, record = end.value
                record.passes = [*self.model_records, *record.passes]
            except Exception as e:
                if self.config.strict or isinstance(e, errors.StrictError):
                    raise
                errors.warn_once(
                    f"graph:{type(e).__name__}:{e}",
                    f"fusionc could not compile a {self.stage} graph ({type(e).__name__}: {e}); it runs in ATen. "
                    "Please report this; options={'strict': True} shows where it happens",
                )
                record = GraphRecord(name=self.name, stage=self.stage)  # type: ignore[arg-type]
                record.fallbacks.append(f"whole graph: {type(e).__name__}: {e}")
                call = boxed_eager(self.gm)
        self._compiled(call, record)

    def _compiled(self, call: Callable[[list[Any]], Any], record: Any) -> None:
        from .record import remember
        from .rescue import guarded

        self.run = guarded(call, self.config.strict)
        self.run._boxed_call = True  # type: ignore[attr-defined]
        del self.gm, self.steps
        self.warm.observe(self.stage, call, self.run)
        remember(record)
        if self.config.dump:
            from .dump import write_graph

            write_graph(record, self.config)


class _Backward:
    """A backward graph whose kernels compile while the forward graph is finished and runs, not only then.

    AOTAutograd asks for a backward graph when it runs for the first time.  What the partitioner made is compiled, to where
    it would wait, before the forward graph is waited for; if what is asked for then has the same key, that compilation goes
    on.  Its kernels come after the forward graph's and stop with the process, so that a forward whose gradients nobody wants
    pays for the lowering, which takes a tenth of a second or two.  Triton only: there other processes and threads compile
    while Python's lock is free.  Nothing is begun for graphs without a key: under ``cache=False``, ``verify`` or ``dump``,
    and with passes of the user's.
    """

    def __init__(self) -> None:
        self._gm: GraphModule | None = None
        self._begun: tuple[Any, Any] | None = None  # its key, and the compilation

    def partition(self, joint: GraphModule, inputs: Sequence[Any], **more: Any) -> tuple[GraphModule, GraphModule]:
        from .partition import partition

        forward, self._gm = partition(joint, inputs, **more)
        return forward, self._gm

    def begin(self, forward: _Graph) -> None:
        """Start, while the kernels of the forward graph compile."""
        from .compiler import choose_target, compile_steps, device_of
        from .graph.edit import copy_module

        gm, self._gm = self._gm, None
        config = forward.config
        if gm is None or forward.key is None or choose_target(config, device_of(gm)) in _ALONE:
            return
        # whatever goes wrong, the graph itself meets it again
        with contextlib.suppress(Exception), _lock, _without_collector(), errors.quietly(), turns.later():
            gm = copy_module(gm)
            values = [n.meta["val"] for n in gm.graph.find_nodes(op="placeholder")]
            steps = compile_steps(gm, values, config, "backward", f"{forward.title}_backward")
            key = next(steps)
            if key is not None:
                next(steps)
                self._begun = key, steps

    def take_over(self, graph: _Graph) -> None:
        """Let it go on as the compilation of ``graph``, if it is the same."""
        begun, self._begun = self._begun, None
        if begun is not None and graph.run is None and begun[0] == graph.key:
            graph.steps = begun[1]


def _nothing_donated() -> None:
    """Says to the backward's wrapper that no saved tensor's memory is reused: it asks the switch at run time, when ours is off
    again, and takes the missing list for a reason to forbid a second backward."""
    context = torch._guards.TracingContext.try_get()
    about: Any = getattr(context, "fw_metadata", None)
    if getattr(about, "bw_donated_idxs", ()) is None:
        about.bw_donated_idxs = []


@functools.lru_cache(maxsize=1)
def decompositions() -> dict[Any, Any]:
    """Operators that AOTAutograd takes apart for us: rare ones, whose parts we lower and fuse.

    Frequent operators (norms, softmax, gelu, …) stay whole: they are lowered directly, which costs less compile time.
    """
    from torch._decomp import decomposition_table, get_decompositions

    from .decompose import rules

    aten = torch.ops.aten
    names = """native_layer_norm_backward native_group_norm native_group_norm_backward nll_loss_forward nll_loss_backward
        nll_loss2d_forward nll_loss2d_backward mse_loss mse_loss_backward smooth_l1_loss smooth_l1_loss_backward huber_loss
        huber_loss_backward binary_cross_entropy binary_cross_entropy_backward binary_cross_entropy_with_logits
        hardswish_backward hardsigmoid_backward hardtanh_backward elu elu_backward leaky_relu_backward softplus softplus_backward
        mish mish_backward glu glu_backward logit logit_backward logaddexp logaddexp2 log_sigmoid_forward log_sigmoid_backward
        _fused_rms_norm _fused_rms_norm_backward native_batch_norm_backward cudnn_batch_norm_backward
        _native_batch_norm_legit_no_training _native_batch_norm_legit _native_batch_norm_legit_functional native_batch_norm
        _batch_norm_with_update _batch_norm_with_update_functional batch_norm_backward threshold
        hardshrink softshrink celu selu xlogy heaviside
        hypot deg2rad rad2deg nan_to_num dot mv soft_margin_loss l1_loss addr std_mean var_mean
        slice_backward select_backward diagonal_backward masked_fill_ norm sinc expand_copy
        special_entr special_log_ndtr frac stack t_copy addcmul_ rot90
        reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d pixel_shuffle
        pixel_unshuffle""".split()
    packets = [getattr(aten, n) for n in names if hasattr(aten, n)]
    table = get_decompositions([p for p in packets if any(getattr(p, o) in decomposition_table for o in p.overloads())])
    table.pop(aten.var_mean.correction, None)
    table.update(rules())
    return table
