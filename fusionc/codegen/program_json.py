"""A Program as JSON and back: what the disk cache holds of a compiled graph.

Nothing read back is trusted.  Steps are rebuilt from plain values (an unknown step, field or type is an error), the
constants that the text names are looked up from descriptions in closed tables, the text is rendered anew from the
steps, and `check_text` then parses that text and accepts only the few forms that a Program is made of: no attribute,
call or name outside of a short list.  `encode` runs the whole way back before it answers, so that whatever a later
change of the steps breaks is "not cacheable" when it is stored and not an error when it is loaded.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import importlib
import re
import typing
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from ..ir.expr import FloorDiv, Index, Mod, Size, floordiv, index, mod
from . import program as prog

NAMESPACES = ("aten", "prims", "fusionc")  # of operators: those whose meaning is that of a version of torch or of us
_STEPS: dict[str, Any] = {cls.__name__: cls for cls in typing.get_args(prog.Step)}
_DENIED = frozenset({"from_file", "save"})  # touch files; no graph of ours holds them
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,79}")
_OPERATOR = re.compile(r"([a-z_]{1,20})::([A-Za-z0-9_]{1,80})(?:\.([A-Za-z0-9_]{1,60}))?")
_MAX_DEPTH, _MAX_TEXT, _MAX_INT = 24, 4_000_000, 1 << 62
_MAX_TENSOR = 4096  # bytes of a constant tensor

_DTYPES = {str(v)[6:]: v for v in vars(torch).values() if isinstance(v, torch.dtype)}
_OBJECTS: dict[str, Any] = {
    f"{type(v).__name__}:{str(v)[6:]}": v for v in vars(torch).values() if isinstance(v, (torch.layout, torch.memory_format))
}
_FUNCTIONS: dict[str, tuple[Any, tuple[str, ...]]] = {}


class NotCacheable(Exception):
    """This Program has no description; the text says why."""


class Invalid(ValueError):
    """The JSON is not a Program of ours."""


def _function_table() -> dict[str, tuple[Any, tuple[str, ...]]]:
    import math
    import operator

    if not _FUNCTIONS:
        arithmetic = """add sub mul truediv floordiv mod neg pos abs eq ne lt le gt ge and_ or_ xor not_ lshift rshift pow
            getitem""".split()
        _FUNCTIONS["operator"] = (operator, tuple(arithmetic))
        _FUNCTIONS["math"] = (math, ("ceil", "floor", "sqrt", "trunc"))
        _FUNCTIONS["torch"] = (torch, ("sym_max", "sym_min", "sym_float", "sym_int", "sym_not", "sym_ite", "sym_sum"))
    return _FUNCTIONS


# -- constants --------------------------------------------------------------------------------------------------------


def describe(value: Any, operators: Mapping[int, str]) -> list[Any]:
    """A constant as JSON.  `operators` maps id(callable) to the operator's qualified name.  Raises NotCacheable."""
    name = operators.get(id(value))
    if name is not None:
        found = _OPERATOR.fullmatch(name)
        if found is None or found.group(1) not in NAMESPACES:
            raise NotCacheable(f"operator {name} is not one of torch's")
        return ["op", name]
    if isinstance(value, torch.dtype):
        return ["dtype", str(value)[6:]]
    if isinstance(value, torch.device):
        return ["device", str(value)]
    if isinstance(value, (torch.layout, torch.memory_format)):
        return ["object", f"{type(value).__name__}:{str(value)[6:]}"]
    if isinstance(value, torch.Tensor):
        return _describe_tensor(value)
    for module, (home, names) in _function_table().items():
        given = getattr(value, "__name__", None)
        if given in names and getattr(home, given) is value:
            return ["function", module, given]
    raise NotCacheable(f"a constant of type {type(value).__name__} has no description")


def _describe_tensor(value: torch.Tensor) -> list[Any]:
    plain = type(value) is torch.Tensor and value.device.type == "cpu" and value.layout is torch.strided
    if not plain or value.requires_grad or not value.is_contiguous() or value.nbytes > _MAX_TENSOR or value.is_conj():
        raise NotCacheable("a constant tensor of the graph is large or special")
    with _disable_current_modes():  # AOTAutograd calls under a fake mode
        data = bytes(value.detach().reshape(-1).view(torch.uint8).tolist()) if value.numel() else b""
    return ["tensor", str(value.dtype)[6:], list(value.shape), data.hex()]


def bind(described: Any) -> Any:
    """The constant for a description made by `describe`.  Raises Invalid."""
    match described:
        case ["op", str(name)]:
            found = _OPERATOR.fullmatch(name)
            if found is None or found.group(1) not in NAMESPACES or found.group(2) in _DENIED:
                raise Invalid("not the name of an operator that a program may call")
            if found.group(1) == "fusionc":
                importlib.import_module("fusionc.ops").load(found.group(2))
            packet = getattr(getattr(torch.ops, found.group(1)), found.group(2), None)
            overload = getattr(packet, found.group(3) or "default", None)
            if not isinstance(overload, torch._ops.OpOverload):
                raise Invalid(f"operator {name} is not known here")
            return getattr(overload, "_op", overload)
        case ["dtype", str(name)] if name in _DTYPES:
            return _DTYPES[name]
        case ["device", str(name)] if re.fullmatch(r"[a-z]{2,12}(:[0-9]{1,3})?", name):
            return torch.device(name)
        case ["object", str(name)] if name in _OBJECTS:
            return _OBJECTS[name]
        case ["function", str(module), str(name)] if name in _function_table().get(module, (None, ()))[1]:
            return getattr(_FUNCTIONS[module][0], name)
        case ["tensor", str(dtype), list(shape), str(data)] if dtype in _DTYPES and len(data) <= 2 * _MAX_TENSOR:
            raw = bytearray(bytes.fromhex(data))
            if len(shape) > 16 or not all(type(n) is int and 0 <= n <= _MAX_TENSOR for n in shape):
                raise Invalid("a constant tensor has a wrong shape")
            with _disable_current_modes():
                if not raw:
                    return torch.empty(shape, dtype=_DTYPES[dtype])
                return torch.frombuffer(raw, dtype=_DTYPES[dtype]).clone().reshape(shape)
    raise Invalid("a constant has no valid description")


# -- values of steps --------------------------------------------------------------------------------------------------


def _encode_value(value: Any, sizes: dict[str, int]) -> Any:
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, (tuple, list)):
        return [_encode_value(v, sizes) for v in value]
    if isinstance(value, Index):
        if value.is_const:
            return value.value
        return {"sum": [[c, [_encode_value(a, sizes) for a in m]] for m, c in value.terms]}
    if isinstance(value, Size):
        sizes[value.name] = value.lower
        return {"size": value.name}
    if isinstance(value, (FloorDiv, Mod)):
        both = [_encode_value(value.dividend, sizes), _encode_value(value.divisor, sizes)]
        return {"div" if isinstance(value, FloorDiv) else "mod": both}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value)[6:]}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    raise NotCacheable(f"a step holds a {type(value).__name__}")


def _decode_value(data: Any, sizes: Mapping[str, Size], depth: int = 0) -> Any:
    if data is None or isinstance(data, (bool, str)):
        return data
    if isinstance(data, int):
        if abs(data) > _MAX_INT:
            raise Invalid("a number is out of range")
        return data
    if depth > _MAX_DEPTH:
        raise Invalid("a value is nested too deeply")
    if isinstance(data, list):
        return tuple([_decode_value(v, sizes, depth + 1) for v in data])
    match data:
        case {"size": str(name)} if name in sizes:
            return sizes[name]
        case {"dtype": str(name)} if name in _DTYPES:
            return _DTYPES[name]
        case {"device": name}:
            return bind(["device", name])
        case {"sum": list(terms)} if len(terms) <= 1000:
            total = index(0)
            for c, factors in terms:
                part = index(_integer(c))
                if len(factors) > 16:
                    raise Invalid("a product is too long")
                for a in factors:
                    part = part * _index(a, sizes, depth + 1)
                total = total + part
            return total
        case {"div": [a, b]}:
            return floordiv(_index(a, sizes, depth + 1), _index(b, sizes, depth + 1))
        case {"mod": [a, b]}:
            return mod(_index(a, sizes, depth + 1), _index(b, sizes, depth + 1))
    raise Invalid("a step holds a value of no known kind")


def _integer(data: Any) -> int:
    if type(data) is not int or abs(data) > _MAX_INT:
        raise Invalid("not an integer in range")
    return data


def _index(data: Any, sizes: Mapping[str, Size], depth: int = 0) -> Index:
    found = _decode_value(data, sizes, depth)
    if isinstance(found, (bool, str)) or found is None or isinstance(found, tuple):
        raise Invalid("not a size")
    return index(found)


_INDEX_FIELDS = {"size", "stride"}  # tuples of Index; "offset" is one Index


def _decode_step(data: Any, sizes: Mapping[str, Size]) -> Any:
    if not isinstance(data, list) or not data or not isinstance(data[0], str) or data[0] not in _STEPS:
        raise Invalid("not a step")
    cls = _STEPS[data[0]]
    fields = dataclasses.fields(cls)
    if len(data) != len(fields) + 1:
        raise Invalid(f"a {data[0]} has other fields")
    values: dict[str, Any] = {}
    for f, raw in zip(fields, data[1:], strict=True):
        if f.name in _INDEX_FIELDS:
            if not isinstance(raw, list) or len(raw) > 64:
                raise Invalid("not a list of sizes")
            values[f.name] = tuple([index(n) if type(n) is int else _index(n, sizes) for n in raw])
        elif f.name == "offset":
            values[f.name] = _index(raw, sizes)
        else:
            values[f.name] = _decode_value(raw, sizes)
    return cls(**values)


# -- programs ---------------------------------------------------------------------------------------------------------


def encode(program: prog.Program, operators: Mapping[int, str], kernels: Mapping[str, Any]) -> dict[str, Any]:
    """The Program as JSON.  `kernels` are the names of constants that are launchers; they are bound at load time.

    Raises NotCacheable with the reason.
    """
    sizes: dict[str, int] = {}
    text = program.text()  # before the constants are listed: rendering binds dtypes and devices
    steps = []
    for step in program.steps:
        if type(step).__name__ not in _STEPS:
            raise NotCacheable(f"step {type(step).__name__} has no description")
        steps.append([type(step).__name__, *[_encode_value(getattr(step, f.name), sizes) for f in dataclasses.fields(step)]])
    return {
        "arguments": list(program.arguments),
        "sizes": [list(pair) for pair in program.sizes],
        "symbols": sizes,
        "steps": steps,
        "results": list(program.results),
        "uses_stream": program.uses_stream,
        "text": _sha(text),  # so that what reads back otherwise is found out by the reader, and costs the writer nothing
        "constants": {n: describe(v, operators) for n, v in program.constants.items() if n not in kernels},
    }


def decode(data: Any, kernels: Mapping[str, Any]) -> prog.Program:
    """The Program for JSON made by `encode`, its text checked; `kernels` are its launchers by name.

    Raises Invalid, or another exception for values of wrong types: any exception means that `data` is of no use.
    """
    wanted = {"arguments", "sizes", "symbols", "steps", "results", "uses_stream", "text", "constants"}
    if not isinstance(data, dict) or set(data) != wanted or type(data["uses_stream"]) is not bool:
        raise Invalid("not a program")
    symbols = data["symbols"]
    if not isinstance(symbols, dict) or not all(re.fullmatch(r"s[0-9]{1,9}", n) for n in symbols):
        raise Invalid("not size symbols")
    sizes = {name: Size(name, _integer(lower)) for name, lower in symbols.items()}
    program = prog.Program(
        tuple(_text(a) for a in data["arguments"]),
        tuple((_text(a), _text(b)) for a, b in data["sizes"]),
        [_decode_step(step, sizes) for step in data["steps"]],
        tuple(_text(r) for r in data["results"]),
        {},
        data["uses_stream"],
    )
    for name, described in data["constants"].items():
        if not _NAME.fullmatch(name):
            raise Invalid("not the name of a constant")
        program.constants[name] = bind(described)
    program.constants.update(kernels)
    text = program.text()
    if _sha(text) != data["text"]:
        raise Invalid("the program does not read back as it was")
    check_text(text, program.constants)
    return program


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise Invalid("not a text")
    return value


# -- the text ---------------------------------------------------------------------------------------------------------

# What `compiler._namespace` gives to every Program; a name here means that the text may call it.
HELPERS = frozenset("empty allocate split carve wrote view restride index_error current_stream float slice".split())
_METHODS = frozenset("data_ptr size stride storage_offset item clear".split())
_OPERATIONS = (ast.Add, ast.Sub, ast.Mult, ast.FloorDiv, ast.Mod)


def check_text(text: str, constants: Mapping[str, Any], helpers: frozenset[str] = HELPERS) -> None:
    """Raise Invalid unless `text` is `def call(args)` made of the forms that steps render to, over known names."""
    if len(text) > _MAX_TEXT:
        raise Invalid("the text is too long")
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as e:
        raise Invalid(f"the text is not Python: {e}") from None
    match tree.body:
        case [
            ast.FunctionDef(
                name="call",
                args=ast.arguments(posonlyargs=[], args=[one], vararg=None, kwonlyargs=[], kwarg=None, defaults=[]),
                body=body,
                decorator_list=[],
                returns=None,
            )
        ] if one.arg == "args" and one.annotation is None:
            _Checker(constants, helpers).block(body)
        case _:
            raise Invalid("the text is not one function")


class _Checker:
    def __init__(self, constants: Mapping[str, Any], helpers: frozenset[str]) -> None:
        self.known = {"args", *constants, *helpers}
        self.fixed = frozenset(self.known)
        self.callable = {*helpers, *(n for n, v in constants.items() if callable(v))}

    def block(self, body: list[ast.stmt]) -> None:
        for s in body:
            match s:
                case ast.Assign(targets=[ast.Name(id=name)], value=value):
                    self.value(value)
                    self.bound(name)
                case ast.Assign(targets=[ast.Tuple(elts=names)], value=ast.Name(id="args")):
                    for n in names:
                        if not isinstance(n, ast.Name):
                            raise Invalid("an argument is not a name")
                        self.bound(n.id)
                case ast.Assign(targets=[ast.Tuple(elts=names)], value=ast.Call(func=ast.Name(id="split" | "carve")) as call):
                    self.value(call)
                    for n in names:
                        if not isinstance(n, ast.Name):
                            raise Invalid("a buffer is not a name")
                        self.bound(n.id)
                case ast.Expr(value=ast.Call() as call):
                    self.value(call)
                case ast.If(test=test, body=inner, orelse=[]):
                    self.value(test)
                    self.block(inner)
                case ast.Delete(targets=names) if all(isinstance(n, ast.Name) for n in names):
                    pass
                case ast.Return(value=ast.Tuple() as value):
                    self.value(value)
                case _:
                    raise Invalid(f"a program has no statement of kind {type(s).__name__}")

    def bound(self, name: str) -> None:
        if not _NAME.fullmatch(name) or name in self.fixed and name != "stream":
            raise Invalid(f"{name[:40]!r} cannot be assigned")
        self.known.add(name)

    def value(self, e: ast.expr, depth: int = 0) -> None:
        if depth > _MAX_DEPTH:
            raise Invalid("an expression is nested too deeply")
        deeper = depth + 1
        match e:
            case ast.Name(id=name):
                if name not in self.known:
                    raise Invalid(f"the name {name[:40]!r} is not known")
            case ast.Constant(value=v):
                if not (v is None or isinstance(v, (bool, int, float, str))) or isinstance(v, str) and len(v) > 200:
                    raise Invalid("a literal of no known kind")
            case ast.Tuple(elts=parts) | ast.List(elts=parts):
                for part in parts:
                    self.value(part, deeper)
            case ast.Dict(keys=keys, values=values) if all(isinstance(k, ast.Constant) for k in keys):
                for part in values:
                    self.value(part, deeper)
            case ast.UnaryOp(op=ast.USub(), operand=part):
                self.value(part, deeper)
            case ast.BinOp(left=left, op=op, right=right) if isinstance(op, _OPERATIONS):
                if any(isinstance(side, ast.Constant) and not isinstance(side.value, int) for side in (left, right)):
                    raise Invalid("arithmetic is on integers")  # "x" * 10**12 would be memory
                self.value(left, deeper)
                self.value(right, deeper)
            case ast.Compare(left=left, ops=[ast.NotEq()], comparators=[right]):
                self.value(left, deeper)
                self.value(right, deeper)
            case ast.Subscript(value=ast.Name() as base, slice=ast.Constant(value=int()) | ast.Name() as place):
                self.value(base, deeper)
                self.value(place, deeper)
            case ast.Call(func=func, args=args, keywords=keywords):
                match func:
                    case ast.Name(id=name):
                        if name not in self.callable:
                            raise Invalid(f"{name[:40]!r} cannot be called")
                    case ast.Attribute(value=ast.Name() as base, attr=attr) if attr in _METHODS:
                        self.value(base, deeper)
                    case _:
                        raise Invalid("a call of no known kind")
                for part in args:
                    self.value(part, deeper)
                for k in keywords:
                    if k.arg is None:
                        raise Invalid("a call unpacks a dictionary")
                    self.value(k.value, deeper)
            case _:
                raise Invalid(f"a program has no expression of kind {type(e).__name__}")
