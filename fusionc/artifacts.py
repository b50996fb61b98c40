"""What a compilation leaves to read and run: kernel records, and the texts of kernel.py, program.py and repro.py.

The compiler hands its values over and this module turns them into text, so that a dump's files say exactly what was
compiled.  Everything here is a function of the program alone: times predicted from data-sheet figures, user lines without
folders, no addresses.  None of the texts executes anything of the user's but integers and operator names.
"""

from __future__ import annotations

import math
import operator
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import GraphModule, Node

from . import errors
from .codegen.program import Program
from .config import Config
from .ir.loop import Kernel, evaluate, kernel_bytes
from .record import KernelRecord
from .repro import repro_source, spec_of

if TYPE_CHECKING:
    from .compiler import Context

CROSS = ("sm_80", "sm_90", "sm_100", "gfx942")
_MAX_ORIGINS = 12

# float32 rate in FLOP/s by the data sheet; bandwidths are those that plans are chosen by (runtime/device.py)
_FLOPS = {"sm_80": 19.5e12, "sm_90": 67e12, "sm_100": 75e12, "gfx942": 163e12}
_CPU_THREAD = (10e9, 30e9)  # bytes/s and FLOP/s of one thread: round figures that any server of ten years reaches

# a launch that does nothing: the call and, with threads, waking them; the driver and the GPU's front end
_LAUNCH_US = {"cpp": 0.5, "triton": 2.0}


# -- names and figures ------------------------------------------------------------------------------------------------


def graph_label(gm: GraphModule) -> str:
    """The class of the module that Dynamo compiles, or the function's name: letters, digits and underscores."""
    try:  # what Dynamo is at; nothing of it is in the graph where the compiled module is the outermost one
        from torch._dynamo.symbolic_convert import InstructionTranslator

        tx = InstructionTranslator.current_tx()
        owner, name = tx.f_locals.get("self"), tx.f_code.co_name
        if isinstance(owner, torch.nn.Module):
            return _word(type(owner).__name__)
        name = re.sub(r"^torch_dynamo_resume_in_(.*)_at_\d+$", r"\1", name)
        if name not in ("<lambda>", "inner", "wrapper"):
            return _word(name)
    except Exception:  # noqa: BLE001 - called outside of Dynamo, or by another Dynamo than ours
        pass
    for node in gm.graph.nodes:
        stack = node.meta.get("nn_module_stack")
        if isinstance(stack, dict) and stack:
            kind = next(iter(stack.values()))
            kind = kind[1] if isinstance(kind, tuple) and len(kind) == 2 else kind
            return _word(kind.__name__ if isinstance(kind, type) else str(kind).rpartition(".")[2])
    return "graph"


def _word(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "_", name[:200]).strip("_")[:40] or "graph"


def peaks(target: str, device: torch.device) -> tuple[float, float]:
    """(bytes/s, float32 FLOP/s) that predictions assume: of the data sheet, so that they do not change between runs."""
    from .runtime import device as devices

    if target == "cpp" or (target == "aten" and device.type == "cpu"):
        threads = torch.get_num_threads()
        return _CPU_THREAD[0] * threads, _CPU_THREAD[1] * threads
    arch = target if target in CROSS else "sm_90"
    if device.type == "cuda" and target not in CROSS:
        arch = devices.properties(device).arch
    arch = arch if arch in _FLOPS else "gfx942" if arch.startswith("gfx") else "sm_90"
    return devices.known(arch).bandwidth, _FLOPS[arch]


def predicted_us(moved: int, flops: int, peak: tuple[float, float], launch_us: float = 0.0) -> float:
    """Time of one launch by the roofline, to two digits: whichever takes longest, memory, arithmetic or the launch."""
    us = max(moved / peak[0] * 1e6, flops / peak[1] * 1e6, launch_us)
    return float(f"{us:.2g}") if us > 0 and math.isfinite(us) else 0.0


# -- records ----------------------------------------------------------------------------------------------------------


def kernel_record(cx: Context, symbol: str, kernel: Kernel, plan: Any, source: str, language: str,
                  name: str | None = None) -> KernelRecord:  # fmt: skip
    """What the dump says of a kernel; the texts are made only for a dump, or where reading them is all one can do.

    ``name`` is the function's name in ``source`` where one kernel became several (default: ``symbol``).
    """
    name = name or symbol
    hints = {s.name: cx.hints.get(s.name, 64) for s in kernel.sizes}
    read, written = kernel_bytes(kernel, hints)
    points = evaluate(kernel.outer, hints) * evaluate(kernel.inner, hints)
    out = KernelRecord(name=name, symbol=symbol, language=language, bytes_read=read, bytes_written=written)  # type: ignore[arg-type]
    out.flops = kernel.flops_per_point() * points
    out.plan_json = plan.to_json()
    out.predicted_us = predicted_us(read + written, out.flops, peaks(cx.target, cx.device), _LAUNCH_US[language])
    if cx.config.dump or cx.target in CROSS:
        out.loop_text, out.source = kernel.text, source
        out.standalone = kernel_text(kernel, plan, source, language, name, hints)
    return out


def report_problems(cx: Context, problems: dict[str, str]) -> None:
    """One warning for each reason why kernels could not be built, with their names; an error under ``strict``."""
    by_reason: dict[str, list[str]] = {}
    for symbol, why in problems.items():  # a compiler that fails says the same of each, but for the name and where its source is
        by_reason.setdefault(clean_reason(why).replace(symbol, "…"), []).append(symbol)
    for symbols in by_reason.values():
        why = problems[symbols[0]]
        some = ", ".join(symbols[:3]) + (f" and {len(symbols) - 3} more" if len(symbols) > 3 else "")
        whose = "their" if len(symbols) > 1 else "its"
        what = f"kernel{'s' * (len(symbols) > 1)} {some} could not be built"
        if cx.config.strict:
            raise errors.StrictError(f"{what}: {why}")
        place = f" (the dump in {cx.config.dump} lists them)" if cx.config.dump else ""
        errors.warn_once(f"kernel:{why}", f"fusionc: {what}; {whose} nodes run in ATen{place}: {why}")
        cx.record.fallbacks += [f"kernel {symbol}: {clean_reason(problems[symbol])}" for symbol in symbols]


def clean_reason(why: str) -> str:
    """The reason on one line without the names of temporary folders, which differ between runs."""
    return " ".join(re.sub(r"\S*fusionc-[a-z]+-\S+", "…", why).split())[:400]


def origins(nodes: Iterable[Node]) -> list[str]:
    """The user's lines (``model.py:12``) that the nodes came from, in order, each once."""
    from .graph.text import where

    return [o for o in dict.fromkeys(where(n) for n in nodes) if o][:_MAX_ORIGINS]


def describe_kernels(records: Iterable[KernelRecord], nodes_of: dict[str, Sequence[Node]]) -> None:
    """Fill ``nodes`` and ``origins`` of the records whose symbol is in ``nodes_of``."""
    for record in records:
        nodes = nodes_of.get(record.symbol)
        if nodes and not record.nodes:
            record.nodes = [n.name for n in nodes]
            record.origins = origins(nodes)


# -- texts ------------------------------------------------------------------------------------------------------------


def kernel_text(kernel: Kernel, plan: Any, source: str, language: str, name: str, sizes: dict[str, int]) -> str:
    """kernel.py: the kernel as data, and a call that runs, checks and times it."""
    lines = [
        '"""One kernel by itself. Run it: random inputs, compared with the loop interpreter, timed. Edit it and try."""',
        "",
        "from fusionc.standalone import run_kernel",
        "",
        f"SYMBOL = {name!r}",
        f"LANGUAGE = {language!r}",
        f"PLAN = {plan.to_json()!r}",
        f"SIZES = {sizes!r}",
        f"LOOP = r'''\n{kernel.text.rstrip()}\n'''",
        f"SOURCE = r'''\n{source.rstrip()}\n'''",
        "",
        'if __name__ == "__main__":',
        "    raise SystemExit(run_kernel(SYMBOL, LANGUAGE, PLAN, LOOP, SOURCE, SIZES))",
        "",
    ]
    return "\n".join(lines)


def many_text(many: Any, plan: Any, source: str, grid: int) -> str:
    """kernel.py of a horizontal launch: data for program.py, which runs it on the right buffers."""
    lines = [
        '"""One launch of many small kernels. program.py in the folder above runs it; edit SOURCE and try."""',
        "",
        f"SYMBOL = {many.symbol!r}",
        "LANGUAGE = 'triton'",
        f"PLAN = {plan.to_json()!r}",
        f"GRID = {grid}",
        f"LOOP = r'''\n{many.text}\n'''",
        f"SOURCE = r'''\n{source.rstrip()}\n'''",
        "",
    ]
    return "\n".join(lines)


def repro_text(gm: GraphModule, inputs: Sequence[Any], config: Config) -> str:
    """repro.py: the graph as a plain module; a graph that cannot be shown gives a program that says why."""
    options: dict[str, Any] = {}
    default = Config()
    for key in ("target", "disable", "deterministic"):
        if getattr(config, key) != getattr(default, key):
            given = getattr(config, key)
            options[key] = list(given) if isinstance(given, tuple) else given
    if "disable" in options:  # the user's passes are not in the program: there is nothing of these names to leave out
        options["disable"] = [name for name in options["disable"] if name not in {p.name for p in config.passes}]
    try:
        return repro_source(gm, [_value(n, x) for n, x in zip(_placeholders(gm), inputs, strict=True)], options)
    except Exception as e:  # noqa: BLE001 - a dump is a convenience
        from .codegen.names import comment

        message = comment(f"this graph cannot be shown as a program: {type(e).__name__}: {e}")
        return f"raise SystemExit({message!r})\n"


def _value(node: Node, given: Any) -> Any:
    return node.meta.get("val", given)


def _placeholders(gm: GraphModule) -> list[Node]:
    return [n for n in gm.graph.nodes if n.op == "placeholder"]


def program_text(p: Program, gm: GraphModule, operators: Mapping[int, Any], kernels: dict[str, Kernel]) -> str:
    """program.py: the call sequence, with everything that it refers to by name, runnable beside its kernels' folders.

    ``operators`` has the operators that it calls, by the ``id`` of the constant that stands for each.
    """
    inputs = []
    for n in _placeholders(gm):
        try:
            inputs.append(f"    {spec_of(n.meta.get('val'))!r},")
        except Exception:  # noqa: BLE001 - an input that is no tensor or number
            inputs.append("    None,")
    used = {s: k for s, k in kernels.items() if s in p.constants}
    shape = {s: (tuple(b.name for b in k.buffers), tuple(v.name for v in k.sizes)) for s, k in used.items()}
    names = [f"{s} = _kernels[{s!r}]" for s in used]
    for name, value in p.constants.items():
        if name not in used:
            names.append(f"{name} = {constant_text(value, operators)}")
    table = "".join(f"    {s!r}: {arguments!r},\n" for s, arguments in shape.items())
    called = [operators.get(id(value), value) for value in p.constants.values()]
    ours = sorted({op._opname for op in called if isinstance(op, torch._ops.OpOverload) and op.namespace == "fusionc"})
    loaded = ["from fusionc.ops import load", "", *(f"load({name!r})" for name in ours)] if ours else []
    lines = [
        '"""The call sequence of one graph. Run it: random inputs, kernels from the folders beside it, timed."""',
        "",
        "import builtins",
        "import math",
        "import operator",
        "from pathlib import Path",
        "",
        "import torch",
        "",
        "from fusionc.repro import Spec, make_inputs",
        "from fusionc.standalone import allocate, carve, current_stream, device, empty, index_error, load_kernels",
        "from fusionc.standalone import missing, restride, run_program, split, view, wrote",
        *loaded,
        "",
        "INPUTS = [",
        *inputs,
        "]",
        "# kernels by symbol: names of their buffers and of their run-time sizes, in the order of the call's arguments",
        f"KERNELS = {{\n{table}}}",
        "_kernels = load_kernels(Path(__file__).resolve().parent, KERNELS)",
        *names,
        "",
        "",
        p.text(),
        "",
        'if __name__ == "__main__":',
        "    raise SystemExit(run_program(call, INPUTS))",
        "",
    ]
    return "\n".join(lines)


def constant_text(value: Any, operators: Mapping[int, Any]) -> str:
    """A Python expression for an object that a Program names; what has none is looked up as missing when run."""
    target = operators.get(id(value), value)
    if isinstance(target, torch._ops.OpOverload):
        return f"torch.ops.{target._schema.name.replace('::', '.')}.{target._overloadname or 'default'}"
    if isinstance(value, (torch.dtype, torch.memory_format, torch.layout)):
        return str(value)
    if isinstance(value, torch.device):
        return f"device({str(value)!r})"
    if isinstance(value, torch.Tensor):
        where = "" if value.device.type == "cpu" else f".to(device({str(value.device)!r}))"
        if value.numel() <= 256 and not value.is_complex() and type(value) in (torch.Tensor, torch.nn.Parameter):
            return f"torch.tensor({value.tolist()!r}, dtype={value.dtype}).reshape({tuple(value.shape)!r}){where}"
        return f"make_inputs([{spec_of(value)!r}])[0]"
    if isinstance(value, complex):
        return f"complex({_real(value.real)}, {_real(value.imag)})"
    name = getattr(target, "__name__", "")
    for module in (operator, math, builtins_module(), torch):
        if name.isidentifier() and getattr(module, name, None) is target:
            return f"{module.__name__}.{name}"
    return f"missing({re.sub(r'[^A-Za-z0-9_.]+', '_', f'{type(value).__name__} {name}')[:80]!r})"


def _real(x: float) -> str:
    return repr(x) if math.isfinite(x) else f"float('{x}')"


def builtins_module() -> Any:
    return sys.modules["builtins"]
