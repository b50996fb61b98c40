"""Small programs that show one graph alone: written into dumps, checked, and cut down to what still fails.

A repro holds the graph as a plain ``torch.nn.Module`` and the *shapes* of its inputs, never the user's data: inputs
are random from a fixed seed.  So a repro can be sent to somebody else, and its reduction stays a repro.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from fusionc import explanation
from fusionc.codegen.names import comment
from fusionc.errors import FusioncError


@dataclass(frozen=True)
class Spec:
    """A tensor input: everything but its values."""

    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    device: str = "cpu"


def spec_of(value: Any) -> Any:
    """The ``Spec`` of a tensor (symbolic sizes by their hints); numbers and None stay what they are."""
    if isinstance(value, torch.Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return Spec(dtype, tuple(map(_hint, value.shape)), tuple(map(_hint, value.stride())), value.device.type)
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return _hint(value)
    if value is None or isinstance(value, (bool, int, float)):
        return value
    raise FusioncError(f"an input of type {type(value).__name__} cannot be put into a repro.")


def _hint(value: Any) -> Any:
    node = getattr(value, "node", None)
    return value if node is None or not hasattr(node, "hint") else node.hint


def make_inputs(specs: Sequence[Any], device: str | None = None) -> list[Any]:
    """Random inputs for the specs, the same in each call. Integers are 0 or 1, so that they are valid indices."""
    made: list[Any] = []
    for position, spec in enumerate(specs):
        if not isinstance(spec, Spec):
            made.append(spec)
            continue
        rng = torch.Generator().manual_seed(1234 + position)
        dtype = getattr(torch, spec.dtype)
        # strides may overlap (expand) or leave gaps: fill what they span
        span = 1 + sum((n - 1) * s for n, s in zip(spec.shape, spec.stride, strict=True)) if all(spec.shape) else 0
        if dtype.is_floating_point or dtype.is_complex:
            wide = torch.complex64 if dtype.is_complex else torch.float32
            values = torch.randn(span, generator=rng, dtype=wide)
            if len(spec.shape) == 2:  # likely a weight: products with it keep the size of values
                values /= max(1, spec.shape[-1]) ** 0.5
            values = values.to(dtype)
        else:
            values = torch.randint(0, 2, (span,), generator=rng).to(dtype)
        where = device or spec.device
        if where == "cuda" and not torch.cuda.is_available():
            where = "cpu"
        made.append(values.to(where).as_strided(spec.shape, spec.stride))
    return made


def repro_source(gm: GraphModule, inputs: Sequence[Any], options: dict[str, Any] | None = None) -> str:
    """The text of ``repro.py`` for a graph without submodules. Its exit status is 0 if eager and fusionc agree.

    ``inputs`` are tensors (fake ones too), numbers or ``Spec``s, one for each placeholder.
    """
    specs = [x if isinstance(x, Spec) else spec_of(x) for x in inputs]
    buffers: list[str] = []
    for name in sorted({n.target for n in gm.graph.nodes if n.op in ("get_attr", "call_module")}):
        value = getattr(gm, name, None)
        if not isinstance(value, torch.Tensor) or not str(name).isidentifier():
            message = f"the graph holds {comment(str(name))}, which is no tensor; a repro cannot show it"
            return f"raise SystemExit({message!r})\n"
        if value.numel() <= 256 and not value.is_complex():
            text = f"torch.tensor({value.tolist()!r}, dtype={value.dtype}).reshape({tuple(value.shape)!r})"
        else:
            text = f"make_inputs([{spec_of(value)!r}])[0]"
        buffers.append(f"        self.register_buffer({name!r}, {text}, persistent=False)")
    code = gm.graph.python_code("self").src
    body = "\n".join("    " + line if line.strip() else "" for line in code.strip("\n").splitlines())
    init = "    def __init__(self):\n        super().__init__()\n" + "\n".join(buffers) + "\n\n" if buffers else ""
    lines = "".join(f"    {s!r},\n" for s in specs)
    return (
        '"""One graph, eager against fusionc. Run it: the exit status is 0 if they agree, 1 if not."""\n'
        "import builtins\nimport math\nimport operator as _operator\n\nimport torch\nfrom torch import device, inf, nan\n"
        "import torch.fx._pytree as fx_pytree\nimport torch.utils._pytree as pytree\n\n"
        "from fusionc.repro import Spec, main, make_inputs\n\nNoneType = type(None)\n"
        f"OPTIONS = {dict(options or {})!r}\nINPUTS = [\n{lines}]\n\n\n"
        f"class Repro(torch.nn.Module):\n{init}{body}\n\n\n"
        'if __name__ == "__main__":\n    raise SystemExit(main(Repro(), INPUTS, OPTIONS))\n'
    )


def main(module: torch.nn.Module, specs: Sequence[Any], options: dict[str, Any] | None = None) -> int:
    """What a repro runs: print the differences between eager and fusionc, return the exit status."""
    try:
        problems = compare(module, specs, options)
    except NothingToCompare as error:
        problems = [str(error)]
    print("\n".join(problems) if problems else "eager and fusionc agree")
    return 1 if problems else 0


class NothingToCompare(FusioncError):
    """Eager itself fails."""


_NOTHING = "nothing was compared"


def compare(module: torch.nn.Module, specs: Sequence[Any], options: dict[str, Any] | None = None) -> list[str]:
    """Sentences about where fusionc differs from eager: outputs, inputs written to, or an error. Empty: agreement.

    Raises NothingToCompare if eager fails on these inputs.
    """
    expected, expected_inputs = _outcome(module, specs)
    if isinstance(expected, Exception):
        raise NothingToCompare(
            f"{_NOTHING}: eager fails on these random inputs with {type(expected).__name__}: {str(expected)[:500]}. "
            "Edit INPUTS, or how Repro uses them."
        )
    exact, _ = _outcome(module, specs, wide=True)
    torch._dynamo.reset()
    compiled = torch.compile(module, backend=explanation._backend(), options=dict(options or {}) or None)
    found, found_inputs = _outcome(compiled, specs)
    if isinstance(found, Exception):
        return [f"fusionc failed: {type(found).__name__}: {str(found)[:2000]}"]
    problems = _differences("output", expected, found, exact)
    return problems + _differences("input", expected_inputs, found_inputs)


def _outcome(f: Callable[..., Any], specs: Sequence[Any], wide: bool = False) -> tuple[Any, list[Any]]:
    """What ``f`` returns (or raises) on random inputs, and the inputs afterwards; ``wide``: floats in float64."""
    inputs = make_inputs(specs)
    if wide:
        inputs = [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs]
    torch.manual_seed(0)
    try:
        with torch.no_grad():
            return torch.utils._pytree.tree_leaves(f(*inputs)), inputs
    except Exception as e:  # noqa: BLE001 - the failure is the result
        return e, inputs


def _differences(what: str, expected: list[Any], found: list[Any], exact: Any = None) -> list[str]:
    if len(expected) != len(found):
        return [f"{len(found)} {what}s instead of {len(expected)}"]
    out = []
    for i, (a, b) in enumerate(zip(expected, found, strict=True)):
        if isinstance(exact, list) and len(exact) == len(expected) and _as_good(a, b, exact[i]):
            continue
        try:
            tolerance: dict[str, float] = {}
            if isinstance(a, torch.Tensor) and a.dtype in (torch.float16, torch.bfloat16):
                tolerance = {"rtol": 2e-2, "atol": 2e-2}
            elif isinstance(a, torch.Tensor) and a.dtype == torch.float32:
                tolerance = {"rtol": 1e-4, "atol": 1e-4}
            torch.testing.assert_close(b, a, equal_nan=True, **tolerance)  # type: ignore[arg-type]
        except AssertionError as e:
            out.append(f"{what} {i} differs: {' '.join(str(e).split())}")
    return out


def _as_good(eager: Any, ours: Any, exact: Any) -> bool:
    """Ours is no further from float64 than thrice eager's error: rounding that a long graph has amplified."""
    if not all(isinstance(t, torch.Tensor) and t.is_floating_point() for t in (eager, ours, exact)):
        return False
    if (eager.shape, eager.dtype) != (ours.shape, ours.dtype) or exact.dtype != torch.float64 or exact.shape != eager.shape:
        return False
    a, b = (t.double() - exact for t in (eager, ours))
    if not bool(a.isfinite().all() and b.isfinite().all()):
        return False
    return bool(b.abs().max() <= 3 * a.abs().max()) if a.numel() else True


# reading and cutting down


def load(path: str | Path) -> tuple[GraphModule, list[Any], dict[str, Any]]:
    """Graph, input specs and options of a ``repro.py``. The file is a program and is imported: run only your own."""
    spec = importlib.util.spec_from_file_location("fusionc_repro", os.fspath(path))
    if spec is None or spec.loader is None:
        raise FusioncError(f"{path} is not a Python file.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if isinstance(getattr(module, "GRAPH", None), str):
        from fusionc.graph.text import parse

        gm = parse(module.GRAPH)
        values = [n.meta.get("val", n.meta.get("example_value")) for n in gm.graph.nodes if n.op == "placeholder"]
        return gm, [spec_of(v) for v in values], dict(getattr(module, "OPTIONS", {}))
    if not hasattr(module, "Repro") or not hasattr(module, "INPUTS"):
        raise FusioncError(f"{path} is not a repro of fusionc: it must define GRAPH, or Repro and INPUTS.")
    return _trace(module.Repro()), list(module.INPUTS), dict(getattr(module, "OPTIONS", {}))


def _trace(module: torch.nn.Module) -> GraphModule:
    """The graph of a repro's module. Plain symbolic tracing would run calls without inputs (full, rand) and keep only
    their values."""
    tracer = torch.fx.Tracer()

    class Record(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            # torch.device(...) comes by here too, and is a value
            is_call = isinstance(func, torch._ops.OpOverload) or (
                not isinstance(func, type) and getattr(torch, func.__name__, None) is func
            )
            leaves = torch.utils._pytree.tree_leaves((args, kwargs))
            if is_call and not any(isinstance(x, torch.fx.Proxy) for x in leaves):
                return tracer.create_proxy("call_function", func, args, kwargs)
            return func(*args, **kwargs)

    with Record():
        graph = tracer.trace(module)
    return GraphModule(module, graph)


def fails(gm: GraphModule, specs: Sequence[Any], options: dict[str, Any] | None = None) -> bool:
    """Whether fusionc differs from eager on this graph."""
    try:
        return bool(compare(gm, specs, options))
    except NothingToCompare:
        return False


def fails_alone(gm: GraphModule, specs: Sequence[Any], options: dict[str, Any] | None = None) -> bool:
    """As ``fails``, in a process of its own: for graphs that kill the process."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "repro.py"
        path.write_text(repro_source(gm, specs, options), encoding="utf-8")
        done = subprocess.run([sys.executable, str(path)], capture_output=True, timeout=600, check=False)
        return done.returncode != 0 and not done.stdout.startswith(_NOTHING.encode())


def reduce(
    gm: GraphModule,
    specs: Sequence[Any],
    failing: Callable[[GraphModule, Sequence[Any]], bool],
    say: Callable[[str], None] = lambda text: None,
) -> tuple[GraphModule, list[Any]]:
    """The smallest graph found for which ``failing`` still holds, and its input specs.

    Two moves, each tried in halving chunks until neither helps: return fewer values (or an inner value instead of the
    outputs), and make inner values inputs, which drops what computed them.  Raises FusioncError if ``gm`` does not
    fail to begin with.
    """
    if not failing(gm, specs):
        raise FusioncError("the graph does not fail, so there is nothing to reduce.")
    state = (gm, list(specs))
    while True:
        size = _size(state[0])
        for moves in (_single_outputs, _inner_inputs):
            state = _shrink(state, moves, failing, say)
        if _size(state[0]) >= size:
            return state


State = tuple[GraphModule, list[Any]]


def _size(gm: GraphModule) -> tuple[int, int]:
    computed = sum(n.op not in ("placeholder", "output", "get_attr") for n in gm.graph.nodes)
    return computed, len(gm.graph.nodes)


def _shrink(
    state: State,
    moves: Callable[[State], Iterator[State]],
    failing: Callable[[GraphModule, Sequence[Any]], bool],
    say: Callable[[str], None],
) -> State:
    progress = True
    while progress:
        progress = False
        for candidate in moves(state):
            if _size(candidate[0]) < _size(state[0]) and failing(*candidate):
                state, progress = candidate, True
                say(f"{_size(state[0])[0]} operations left")
                break
    return state


def _values(state: State) -> dict[str, Any]:
    """What each node computes in eager on the repro's inputs."""
    gm, specs = state
    found: dict[str, Any] = {}

    class Watch(torch.fx.Interpreter):
        def run_node(self, n: Node) -> Any:
            found[n.name] = super().run_node(n)
            return found[n.name]

    with torch.no_grad():
        Watch(gm).run(*make_inputs(specs))
    return found


def _single_outputs(state: State) -> Iterator[State]:
    """The graph returning one inner or final value alone."""
    gm, _ = state
    values = _values(state)
    names = [n.name for n in gm.graph.nodes if n.op not in ("placeholder", "output", "get_attr")]
    names = [n for n in names if isinstance(values.get(n), torch.Tensor)]
    # the early halves first: a failure near the start then needs few tries
    order: list[str] = []
    step = len(names) // 2
    while step >= 1:
        order += [names[i] for i in range(step - 1, len(names), step)]
        step //= 2
    order += names
    for name in dict.fromkeys(order):
        yield _cut(state, {}, name)


def _inner_inputs(state: State) -> Iterator[State]:
    """The graph with runs of inner values made inputs, long runs first."""
    gm, _ = state
    values = _values(state)
    names = [n.name for n in gm.graph.nodes if n.op not in ("placeholder", "output", "get_attr")]
    step = len(names) // 2
    while step >= 1:
        for start in range(0, len(names), step):
            chunk = {n: values[n] for n in names[start : start + step] if isinstance(values.get(n), torch.Tensor)}
            if chunk:
                yield _cut(state, chunk, None)
        step //= 2


def _cut(state: State, replaced: dict[str, Any], output: str | None) -> State:
    """A copy of the graph with some nodes as inputs and, if ``output`` is named, only that value returned."""
    gm, specs = state
    graph, mapping, kept = Graph(), {}, {}
    spec_of_name = dict(zip((n.name for n in gm.graph.nodes if n.op == "placeholder"), specs, strict=True))
    for name, spec in [*spec_of_name.items(), *((n, spec_of(v)) for n, v in replaced.items())]:
        made = graph.placeholder(name)
        mapping[name] = made
        kept[made] = spec
    for n in gm.graph.nodes:
        if n.name in mapping:
            continue
        if n.op == "output":
            result = mapping[output] if output is not None else n.args[0]
            graph.output(result if output is not None else torch.fx.map_arg(result, lambda a: mapping[a.name]))
            continue
        mapping[n.name] = graph.node_copy(n, lambda a: mapping[a.name])
    # only writes into inputs have effects that matter here; eliminate_dead_code keeps ops it knows to be impure
    graph.eliminate_dead_code()
    for made in list(kept):
        if not made.users:
            graph.erase_node(made)
            del kept[made]
    graph.lint()
    return GraphModule(gm, graph), list(kept.values())
