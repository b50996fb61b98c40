"""Grow random programs, run them compiled, compare with eager, and make failing ones small.

``python -m tests.fuzz.generate --count 1000 --seed 7 --save`` fuzzes outside of pytest, each block of programs in a
worker process; a program that fails is reduced and printed, and with ``--save`` kept in ``corpus/`` for ever.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch._dynamo

from tests.fuzz import indexing, layers  # noqa: F401 - their rules
from tests.fuzz.choose import LARGE, Chooser, Value, from_seed
from tests.fuzz.program import FLAGS, Input, Program, Step, parse
from tests.fuzz.rules import OPS, RULES
from tests.sweeps.compare import compare, copy_tree
from tests.sweeps.pool import first_line, run_tasks

CORPUS = Path(__file__).with_name("corpus")
SIZES = (0, 1, 2, 3, 7, 16, 17, 33, 64, 128)
BIG_SIZES = (*SIZES, 100, 256, 257, 1000, 1024, 4096, 5000)
MOST_ELEMENTS, BIG_ELEMENTS = 4096, 1 << 20
# reliability.md asks for 10 times eager's worst error
FACTOR = 10.0
LOST = "CUDA error"  # what a process says for ever once a kernel of it has failed
_WEIGHTED = [name for name, rule in RULES.items() for _ in range(rule.weight)]
_WRITES = [name for name, rule in RULES.items() if rule.mutates]


def grow(c: Chooser, big: bool = False) -> Program:
    """One random program; every step has run in eager, with results of bounded size and finite up to input NaN, Inf."""
    sizes, most = (BIG_SIZES, BIG_ELEMENTS) if big else (SIZES, MOST_ELEMENTS)
    c.sizes = [1, *(c.pick(sizes[1:]) for _ in range(2)), c.pick(sizes)]
    special = c.integer(0, 7) == 0
    grad = not special and c.integer(0, 3) == 0
    writes = not grad and c.integer(0, 2) > 0
    dtypes = ["float32"] * 4 + (["float64"] if grad or special else ["float64", "bfloat16", "float16"])
    others = ["int64", "int64", "int32", "uint8", "bool"]
    inputs: list[Input] = []
    first_rank = c.pick((0, 1, 2, 2, 3, 3, 4, 4))
    for index in range(c.integer(2, 4)):
        dtype = c.pick(others) if index and c.integer(0, 2) == 0 else c.pick(dtypes)
        shape = _shape(c, c.pick((0, 1, 1, 2, 2, 2, 2, 3, 3)) if index else first_rank, most)
        layout = c.pick(
            ("contiguous", "contiguous", "transposed", "sliced", "expanded", "offset", "channels", "shared")
        )
        values = "normal" if not special else "special" if "float" in dtype else "extreme"
        inputs.append(Input(f"x{index}", dtype, shape, layout, values, c.integer(0, 99)))
    first = inputs[0].name
    tensors = Program(tuple(inputs), (), ()).make()
    # by storage, since a write through one view changes what all others show
    storage_exact = {t.untyped_storage()._cdata: True for t in tensors}
    named = dict(zip((item.name for item in inputs), tensors, strict=True))
    steps: list[Step] = []
    wanted = c.integer(1, 12)
    for _ in range(3 * wanted):
        if len(steps) == wanted:
            break
        c.values = [Value(n, t, storage_exact[t.untyped_storage()._cdata]) for n, t in named.items()]
        rule = RULES[c.pick(_WRITES if writes and c.integer(0, 7) == 0 else _WEIGHTED)]
        if (rule.mutates and not writes) or (grad and not rule.smooth):
            continue
        c.inputs, c.asked = len(inputs), []
        picked = rule.pick(c)
        if picked is None or any(math.prod(item.shape) > most for item in c.asked):
            continue
        trial = {**named, **{item.name: item.make() for item in c.asked}}
        step = Step(f"t{len(steps)}", rule.name, *picked)
        exact = all(storage_exact.get(trial[a].untyped_storage()._cdata, True) for a in step.args)
        if grad and rule.ties and not exact:
            continue
        saved = copy_tree(list(named.values())) if rule.mutates else []
        result = _try(step, trial)
        if result is None or not _reasonable(result, special, most):
            if rule.mutates:  # the write may have happened: start from the values before
                named = dict(zip(named, saved, strict=True))
                storage_exact = {
                    t.untyped_storage()._cdata: storage_exact.get(old.untyped_storage()._cdata, False)
                    for t, old in zip(saved, [v.tensor for v in c.values], strict=True)
                }
            continue
        storage_exact |= {trial[item.name].untyped_storage()._cdata: True for item in c.asked}
        named = trial
        key = result.untyped_storage()._cdata
        keeps = exact and (rule.keeps or not result.is_floating_point())
        if rule.mutates:
            for written in (named[a].untyped_storage()._cdata for a in step.args):
                storage_exact[written] = storage_exact[written] and keeps
        storage_exact.setdefault(key, keeps)  # a view is as exact as what it views
        named[step.name] = result
        steps.append(step)
        inputs += c.asked
    made = [step.name for step in steps]
    outputs = [n for n in made if not any(n in later.args for later in steps)] or [first]
    if made and c.integer(0, 3) == 0:
        outputs.append(c.pick(made))  # an intermediate as well, or one result twice
    if writes and c.integer(0, 3) == 0:
        outputs.append(first)
    dynamic, module = c.integer(0, 5) == 0, c.integer(0, 1) == 1 and any(item.values == "weight" for item in inputs)
    inference, autocast = not grad and c.integer(0, 5) == 0, c.integer(0, 9) == 0
    automatic = not dynamic and c.integer(0, 5) == 0
    flags = grad, dynamic, module, inference, autocast, automatic
    return Program(tuple(inputs), tuple(steps), tuple(outputs), *flags)


def _shape(c: Chooser, rank: int, most: int) -> tuple[int, ...]:
    if rank == 4:  # images
        return c.pick((1, 2, 3)), c.pick((1, 3, 4, 8, 16)), c.pick((4, 5, 7, 8)), c.pick((4, 6, 8))
    shape: list[int] = []
    for _ in range(rank):
        size = c.pick(c.sizes)
        shape.append(size if math.prod(shape) * size <= most else 1)
    return tuple(shape)


def _try(step: Step, named: dict[str, torch.Tensor]) -> torch.Tensor | None:
    """The step's eager result, or None when eager refuses it."""
    params = dict(step.params)
    if "dtype" in params:
        params["dtype"] = getattr(torch, params["dtype"])
    try:
        return OPS[step.op](*[named[a] for a in step.args], **params)
    except (RuntimeError, IndexError, ZeroDivisionError, TypeError, ValueError, NotImplementedError):
        return None


def _reasonable(result: torch.Tensor, special: bool, most: int) -> bool:
    if result.numel() > most:
        return False
    if result.dtype is torch.bool:
        return True
    if special and not result.is_floating_point():
        return True
    finite = result[torch.isfinite(result)] if result.is_floating_point() else result
    if not special and finite.numel() < result.numel():
        return False
    return finite.numel() == 0 or bool((finite.double().abs() <= LARGE).all())


def run(program: Program, function: Callable[..., Any], tensors: list[torch.Tensor]) -> tuple[Any, ...]:
    """(results, inputs afterwards, gradients) of one call."""
    with contextlib.ExitStack() as stack:
        if program.autocast:
            stack.enter_context(torch.autocast(tensors[0].device.type, torch.bfloat16))
        if not program.grad:
            stack.enter_context(torch.inference_mode() if program.inference else torch.no_grad())
        out = function(*tensors)
    if not program.grad:
        return out, tensors
    outputs = [t for t in out if t.requires_grad]
    leaves = [t for t in tensors if t.requires_grad]
    if not outputs or not leaves:
        return out, tensors
    ones = [torch.linspace(0.5, 1.5, t.numel(), dtype=torch.float64).view(t.shape).to(t) for t in outputs]
    return out, tensors, torch.autograd.grad(outputs, leaves, ones, allow_unused=True)


class Held(torch.nn.Module):
    """A program's function with some of its inputs as parameters and buffers of a module."""

    def __init__(self, function: Callable[..., Any], given: list[torch.Tensor], weights: list[int]) -> None:
        super().__init__()
        self.function, self.places = function, {i: f"w{i}" for i in weights}
        for i, name in self.places.items():
            value = copy_tree(given[i]).detach()
            if value.is_floating_point():
                self.register_parameter(name, torch.nn.Parameter(value, given[i].requires_grad))
            else:
                self.register_buffer(name, value)

    def load(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """All inputs, those that the module holds with these values."""
        with torch.no_grad():
            return [getattr(self, self.places[i]).copy_(t) if i in self.places else t for i, t in enumerate(tensors)]

    def forward(self, *tensors: torch.Tensor) -> Any:
        given = iter(tensors)
        count = len(tensors) + len(self.places)
        return self.function(
            *[getattr(self, self.places[i]) if i in self.places else next(given) for i in range(count)]
        )


def _cases(program: Program, calls: int) -> Iterator[list[torch.Tensor]]:
    """Inputs on the CPU: the program's own, other values for more calls, and other sizes if it is dynamic."""
    yield program.make()
    others: list[dict[str, Any]] = [{"salt": 100 * k} for k in range(1, calls)]
    if program.dynamic or program.automatic:
        known = {n for item in program.inputs for n in item.shape if n > 1}
        others += [{"sizes": {n: 2 * n for n in known}}, {"sizes": {n: n + 1 for n in known}, "salt": 1}]
    for other in others:
        given = program.make(**other)
        if sum(t.numel() for t in given) <= 2 * BIG_ELEMENTS:
            yield given


def _moved(tensors: list[torch.Tensor], device: str, wide: bool = False) -> list[torch.Tensor]:
    """Copies of the same strides that share storages as these do, elsewhere, or with floats in float64."""
    storages: dict[int, torch.Tensor] = {}
    out = []
    for t in tensors:
        storage = t.detach().untyped_storage()
        whole = storages.get(storage._cdata)
        if whole is None:
            whole = torch.empty(0, dtype=t.dtype, device=t.device).set_(storage).to(device, copy=True)
            whole = storages[storage._cdata] = whole.double() if wide and t.is_floating_point() else whole
        out.append(whole.as_strided(t.shape, t.stride(), t.storage_offset()).requires_grad_(t.requires_grad))
    return out


def check(program: Program, backend: Any, device: str = "cpu", calls: int = 1) -> str | None:
    """None when the compiled program is as good as eager in each of some calls, else one line that says what is wrong."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(automatic_dynamic_shapes=program.automatic):
        return _check(program, backend, device, calls)


def _check(program: Program, backend: Any, device: str, calls: int) -> str | None:
    plain, wide = program.function(OPS), program.function(OPS, wide=True)
    special = any(item.values in ("special", "extreme") for item in program.inputs)
    held: Held | None = None
    for number, given in enumerate(_cases(program, calls)):
        given = given if device == "cpu" else _moved(given, device)
        try:
            want = run(program, plain, copy_tree(given))
            if device != "cpu":
                torch.cuda.synchronize()
        except Exception as error:
            if LOST in str(error) or device == "cpu" and not program.autocast and not number:
                raise
            continue  # eager refuses these sizes; or its kernels for this device, or these dtypes
        if number and not all(_reasonable(t, special, 1 << 30) for t in want[0]):
            continue
        if held is None or any(getattr(held, name).shape != given[i].shape for i, name in held.places.items()):
            held = Held(program.function(OPS), given, program.weights())
            compiled = torch.compile(held, backend=backend, dynamic=program.dynamic or None)
        tensors = held.load(copy_tree(given))
        places = held.places

        def call(*tensors: torch.Tensor) -> Any:
            return compiled(*[t for i, t in enumerate(tensors) if i not in places])

        try:
            problem = compare(
                run(program, call, tensors),
                want,
                lambda: run(program, wide, _moved(given, device, wide=True)),
                factor=FACTOR,
            )
        except Exception as error:
            problem = first_line(error)
        if problem is not None:
            return problem if not number else f"call {number + 1}: {problem}"
    return None


def verdict(program: Program, backend: Any, device: str = "cpu", calls: int = 1) -> str | None:
    """``check``, but None also when torch's own aot_eager differs from eager: then it is not the backend's error."""
    problem = check(program, backend, device, calls)
    if problem is not None and LOST not in problem and check(program, "aot_eager", device, calls) is not None:
        return None
    return problem


def reduce(program: Program, fails: Callable[[Program], bool]) -> Program:
    """A smaller program that still fails: drop flags, outputs, steps and inputs while it does."""
    changed = True
    while changed:
        changed = False
        for candidate in _smaller(program):
            try:
                if fails(candidate):
                    program, changed = candidate, True
                    break
            except Exception:  # dropping a step made the program meaningless
                continue
    return program


def _smaller(program: Program) -> Any:
    replace = dataclasses.replace
    for flag in FLAGS:
        if getattr(program, flag):
            yield replace(program, **{flag: False})
    for index in range(len(program.outputs)):
        if len(program.outputs) > 1:
            yield replace(program, outputs=program.outputs[:index] + program.outputs[index + 1 :])
    for index, step in reversed(list(enumerate(program.steps))):
        rest = program.steps[:index] + program.steps[index + 1 :]
        used = {a for other in rest for a in other.args} | set(program.outputs)
        if step.name not in used:
            yield replace(program, steps=rest)
        elif step.args:  # put the step's first argument in its place
            swap = {step.name: step.args[0]}
            steps = tuple(replace(s, args=tuple(swap.get(a, a) for a in s.args)) for s in rest)
            yield replace(program, steps=steps, outputs=tuple(swap.get(n, n) for n in program.outputs))
    used = {a for step in program.steps for a in step.args} | set(program.outputs)
    for index, item in enumerate(program.inputs):
        if item.name not in used:
            yield replace(program, inputs=program.inputs[:index] + program.inputs[index + 1 :])
        elif item.layout != "contiguous":
            plain = replace(item, layout="contiguous")
            yield replace(program, inputs=(*program.inputs[:index], plain, *program.inputs[index + 1 :]))


def save(program: Program, problem: str, folder: Path = CORPUS) -> Path:
    """Keep a program in the corpus under a name made from its text."""
    text = program.text()
    path = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:12]}.graph"
    path.write_text(f"# {problem.encode('ascii', 'replace').decode()[:160]}\n{text}")
    return path


def load(path: Path) -> Program:
    return parse(path.read_text(), OPS)


def run_task(task: dict[str, Any]) -> dict[str, Any]:
    """A block of seeds for the pool; stops at the first failure, which is reduced."""
    from tests.sweeps.backends import Counting, prepare

    warnings.simplefilter("ignore")
    prepare(task["backend"])
    backend = Counting(task["backend"], json.loads(task["options"]))

    def judge(program: Program) -> str | None:
        return verdict(program, backend, task["device"], task["calls"])

    for seed in range(task["first"], task["first"] + task["many"]):
        program = grow(from_seed(seed), task["big"])
        try:
            problem = judge(program)
        except Exception as error:
            if LOST not in str(error):
                raise
            return {**task, "status": "pass", "message": f"seed {seed}, eager: {first_line(error)}", "last": True}
        if problem is not None and LOST in problem:
            return {**task, "status": "fail", "message": problem, "seed": seed, "program": program.text(), "last": True}
        if problem is not None:
            until = time.monotonic() + 20
            small = reduce(program, lambda p: time.monotonic() < until and judge(p) is not None)
            message = judge(small) or problem
            return {**task, "status": "fail", "message": message, "seed": seed, "program": small.text()}
    return {**task, "status": "pass", "message": ""}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.generate", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backend", default="fusionc")
    parser.add_argument("--options", default="{}", help="JSON object passed as torch.compile's options")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--calls", type=int, default=2, help="calls of each program, with new values each")
    parser.add_argument("--big", action="store_true", help="up to a million elements")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--stop-after", type=float, default=None, help="start no block after this many seconds")
    parser.add_argument("--show", action="store_true", help="print the program of --seed and stop")
    parser.add_argument("--save", action="store_true", help="keep failing programs in tests/fuzz/corpus")
    args = parser.parse_args(argv)
    if args.show:
        print(grow(from_seed(args.seed), args.big).text(), end="")
        return 0
    same = {name: getattr(args, name) for name in ("backend", "options", "device", "calls", "big")}
    blocks = [
        {**same, "first": first, "many": min(5, args.seed + args.count - first)}
        for first in range(args.seed, args.seed + args.count, 5)
    ]
    results: list[dict[str, Any]] = []
    begin = time.monotonic()

    def on_result(result: dict[str, Any]) -> None:
        results.append(result)
        if result["status"] != "pass":
            print(f"--- seeds from {result['first']}: {result['message']}\n{result.get('program', '')}", flush=True)
            if args.save and "program" in result:
                print(f"kept as {save(parse(result['program'], OPS), result['message'])}")

    run_tasks("tests.fuzz.generate", blocks, on_result, args.jobs, 120.0, 60, args.stop_after, {"OMP_NUM_THREADS": "1"})
    failed = sum(r["status"] != "pass" for r in results)
    programs = sum(r["many"] for r in results)
    print(f"{args.backend}: {programs} programs, {failed} blocks with a failure, {time.monotonic() - begin:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
