"""A random torch program as a value that prints, parses and runs.

Programs are data and not Python text, so that a failing one can be kept as a small file in ``corpus/`` and replayed
without executing anything but the operators of ``rules.OPS``.  The text form has one line per input and per step:

    in x0 float32 [3, 7] transposed normal 12
    t0 = exp x0 {}
    t1 = sum t0 {"dim": 1, "keepdim": true}
    out t1 x0
    grad
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

DTYPES = ("float32", "float64", "bfloat16", "float16", "int64", "int32", "uint8", "bool")
LAYOUTS = ("contiguous", "transposed", "sliced", "expanded", "offset", "channels", "shared")
VALUES = ("normal", "special", "extreme", "weight")
FLAGS = ("grad", "dynamic", "module", "inference", "autocast", "automatic")
_NAME = re.compile(r"[a-z][a-z0-9]*\Z")


@dataclass(frozen=True)
class Input:
    """One input tensor, made from its description alone."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    layout: str = "contiguous"
    values: str = "normal"
    seed: int = 0

    def make(self) -> torch.Tensor:
        """The tensor, on the CPU."""
        shape = list(self.shape)
        if self.layout == "transposed":
            return self._fill(shape[::-1]).permute(tuple(reversed(range(len(shape)))))
        if self.layout == "sliced" and shape:
            return self._fill([*shape[:-1], 2 * shape[-1]])[..., ::2]
        if self.layout == "expanded" and shape:
            return self._fill([1, *shape[1:]]).expand(shape)
        if self.layout == "channels" and len(shape) == 4:
            return self._fill(shape).contiguous(memory_format=torch.channels_last)
        if self.layout == "offset":
            count = 1
            for size in shape:
                count *= size
            return self._fill([count + 1])[1:].view(shape)
        return self._fill(shape)

    def _fill(self, shape: Sequence[int]) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        dtype = getattr(torch, self.dtype)
        if dtype is torch.bool:
            return torch.rand(shape, generator=generator) > 0.5
        if not dtype.is_floating_point:
            low = 0 if dtype is torch.uint8 else -5
            out = torch.randint(low, 6, shape, generator=generator).to(dtype)
            if self.values == "extreme":
                ends = torch.tensor([torch.iinfo(dtype).min, torch.iinfo(dtype).max], dtype=dtype)
                out.view(-1)[:2] = ends[: min(2, out.numel())]
            return out
        out = torch.randn(shape, generator=generator, dtype=torch.float64)
        if self.values == "weight" and out.numel():  # so that a layer's results are of its input's size
            out /= (out.numel() // out.shape[0]) ** 0.5
        out = out.to(dtype)
        if self.values == "special":
            special = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 0.0], dtype=dtype)
            where = torch.randperm(out.numel(), generator=generator)[: special.numel()]
            out.view(-1)[where] = special[: where.numel()]
        return out


@dataclass(frozen=True)
class Step:
    """``name = op(*args, **params)``; args are names of inputs and earlier steps, params are JSON values."""

    name: str
    op: str
    args: tuple[str, ...]
    params: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Program:
    """Inputs, steps and the names of the results.

    ``grad`` also asks for gradients of the float inputs, ``dynamic`` is compiled with symbolic sizes, ``automatic`` with
    those that Dynamo makes symbolic after they have changed, and ``module`` is a module that holds the inputs made as
    weights. ``inference`` and ``autocast`` are called inside these contexts of torch's.
    """

    inputs: tuple[Input, ...]
    steps: tuple[Step, ...]
    outputs: tuple[str, ...]
    grad: bool = False
    dynamic: bool = False
    module: bool = False
    inference: bool = False
    autocast: bool = False
    automatic: bool = False

    def make(self, salt: int = 0, sizes: Mapping[int, int] | None = None) -> list[torch.Tensor]:
        """Fresh input tensors; other values for another ``salt``, other shapes where ``sizes`` maps their sizes."""
        made = []
        for item in self.inputs:
            shape = tuple((sizes or {}).get(n, n) for n in item.shape)
            tensor = dataclasses.replace(item, seed=item.seed + salt, shape=shape).make()
            if item.layout == "shared" and made and made[0].dtype == tensor.dtype:
                storage = made[0].untyped_storage()
                if tensor.nbytes <= storage.nbytes():  # memory of the first input
                    tensor.set_(storage, 0, tensor.shape, tensor.stride())
            made.append(tensor)
        return [t.requires_grad_(self.grad and t.is_floating_point()) for t in made]

    def weights(self) -> list[int]:
        """Positions of the inputs that a ``module`` program holds as parameters and buffers."""
        return [i for i, item in enumerate(self.inputs) if self.module and item.values == "weight"]

    def function(self, ops: dict[str, Callable[..., Any]], wide: bool = False) -> Callable[..., tuple[Any, ...]]:
        """A torch function of the inputs. ``wide`` computes in float64 whatever float dtype a step asks for."""

        def params(step: Step) -> dict[str, Any]:
            out = dict(step.params)
            if "dtype" in out:
                dtype = getattr(torch, out["dtype"])
                out["dtype"] = torch.float64 if wide and dtype.is_floating_point else dtype
            return out

        names = tuple(item.name for item in self.inputs)
        plan = tuple((step.name, ops[step.op], step.args, params(step)) for step in self.steps)
        results = self.outputs

        def run(*tensors: torch.Tensor) -> tuple[Any, ...]:
            env = dict(zip(names, tensors, strict=True))
            for name, op, args, kwargs in plan:
                env[name] = op(*[env[arg] for arg in args], **kwargs)
            return tuple([env[name] for name in results])

        return run

    def text(self) -> str:
        """The program's text form, which ``parse`` reads."""
        lines = [f"in {i.name} {i.dtype} {list(i.shape)} {i.layout} {i.values} {i.seed}" for i in self.inputs]
        lines += [f"{s.name} = {s.op} {' '.join(s.args)} {json.dumps(s.params)}" for s in self.steps]
        lines.append("out " + " ".join(self.outputs))
        lines += [flag for flag in FLAGS if getattr(self, flag)]
        return "\n".join(lines) + "\n"


def parse(text: str, ops: Any) -> Program:
    """The program of a text; raises ValueError with the line for anything that ``Program.text`` does not write."""
    inputs: list[Input] = []
    steps: list[Step] = []
    outputs: tuple[str, ...] = ()
    flags: set[str] = set()
    known: set[str] = set()
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.split("#")[0].strip()
        if not line:
            continue
        try:
            if line in FLAGS:
                flags.add(line)
            elif line.startswith("out "):
                outputs = tuple(line.split()[1:])
                _require(known.issuperset(outputs), "an output that is not defined")
            elif line.startswith("in "):
                head, rest = line.split("[", 1)
                sizes, tail = rest.split("]", 1)
                _, name, dtype = head.split()
                layout, values, seed = tail.split()
                _require(dtype in DTYPES and layout in LAYOUTS and values in VALUES, "an unknown word")
                shape = tuple(int(size) for size in sizes.split(",") if size.strip())
                inputs.append(Input(_name(name), dtype, shape, layout, values, int(seed)))
                known.add(name)
            else:
                name, rest = line.split(" = ", 1)
                head, brace, params = rest.partition("{")
                op, *args = head.split()
                _require(op in ops, f"an unknown operator {op!r}")
                _require(known.issuperset(args), "an argument that is not defined")
                steps.append(Step(_name(name), op, tuple(args), json.loads(brace + params)))
                known.add(name)
        except ValueError as error:
            raise ValueError(f"line {number} of a fuzz program, {raw!r}: {error}") from None
    return Program(tuple(inputs), tuple(steps), outputs, **dict.fromkeys(flags, True))


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(f"has {what}")


def _name(name: str) -> str:
    _require(_NAME.match(name) is not None, "a name that is not lower-case letters and digits")
    return name
