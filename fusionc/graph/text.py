"""FX graphs as text, one node a line, and back.

    %x: f32[2, 16, 64] = input
    %w: f32[64, 64] = input  # static
    %t: f32[64, 64]{1, 64} = aten.t(%w)
    %mm: f32[32, 64] = aten.mm(%v, %t)  # model.py:12
    return (%mm)

Strides stand in braces where the tensor is not contiguous, ``@cuda:0`` where it is not on the CPU. Printing is a
function of the graph alone: names are ASCII, sizes may be symbols (``s0``), no paths, no addresses. ``parse`` reads the
text of ATen graphs without evaluating anything: a small reader over Python's own syntax tree, and operators come from
``torch.ops.aten``, ``prims`` and ``fusionc`` only.
"""

from __future__ import annotations

import ast
import json
import math
import operator
import re
from collections.abc import Collection, Mapping
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from fusionc.errors import FusioncError

from .edit import safe_name
from .facts import value

DTYPES: dict[torch.dtype, str] = {
    torch.float64: "f64", torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16",
    torch.int64: "i64", torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8", torch.bool: "b8",
    torch.complex32: "c32", torch.complex64: "c64", torch.complex128: "c128",
    torch.uint16: "u16", torch.uint32: "u32", torch.uint64: "u64",
    torch.float8_e4m3fn: "f8e4m3", torch.float8_e5m2: "f8e5m2",
}
_BY_NAME = {name: kind for kind, name in DTYPES.items()}
_NAMESPACES = ("aten", "prims", "fusionc")
_WORDS: dict[str, Any] = {"None": None, "True": True, "False": False, "inf": math.inf, "nan": math.nan}
_TORCH = (torch.dtype, torch.memory_format, torch.layout)
_MAX_TEXT = 64_000_000


class ParseError(FusioncError, ValueError):
    """The text is not a graph that can be read; says the line."""


# printing


def show(gm: GraphModule, static: Collection[int] | None = None) -> str:
    """The graph as text; inputs at the positions ``static`` (default ``gm.meta["fusionc_static"]``) are marked.

    Ends with a newline.
    """
    names = _names(gm.graph)
    lines, position, marked = [], 0, set(gm.meta.get("fusionc_static", ()) if static is None else static)
    for node in gm.graph.nodes:
        if node.op == "output":
            results = ", ".join(_argument(part, names) for part in _as_tuple(node.args[0]))
            lines.append(f"return ({results})")
            continue
        kind = _kind(value(node))
        left = f"%{names[node]}" + (f": {kind}" if kind else "")
        note = where(node)
        if node.op == "placeholder":
            right = "input"
            if position in marked:
                note = "static"
            position += 1
        else:
            right = call(node, names)
        lines.append(f"{left} = {right}" + (f"  # {note}" if note else ""))
    return "\n".join(lines) + "\n"


graph_text = show


def call(node: Node, names: Mapping[Node, str] | None = None) -> str:
    """``aten.add(%a, %b)`` of one node."""
    names = names or _names(node.graph)
    parts = [_argument(given, names) for given in node.args]
    parts += [f"{safe_name(name)}={_argument(given, names)}" for name, given in node.kwargs.items()]
    if node.op == "get_attr":
        return f"attr({json.dumps(str(node.target))})"
    return f"{target_name(node)}({', '.join(parts)})"


def target_name(node: Node) -> str:
    """The operator as printed: namespace and name, and the overload unless it is ``default`` or ``Tensor``."""
    target = node.target
    if node.op == "call_method":
        return f"method.{safe_name(str(target))}"
    if node.op == "call_module":
        return f"module.{safe_name(str(target))}"
    if isinstance(target, torch._ops.OpOverload):
        base = target._schema.name.replace("::", ".")
        return base if target is _default_overload(base) else f"{base}.{target._overloadname}"
    module, name = getattr(target, "__module__", "") or "", getattr(target, "__name__", type(target).__name__)
    if module in ("_operator", "operator"):
        return "getitem" if target is operator.getitem else f"operator.{name}"
    module = {"torch._C._nn": "torch.nn.functional", "": "torch"}.get(module, module)
    if "VariableFunctions" in getattr(target, "__qualname__", ""):
        module = "torch"
    return ".".join(safe_name(part) for part in (*module.split("."), name))


def where(node: Node) -> str:
    """The user's file and line that the node came from (``model.py:12``), or ""."""
    stack = node.meta.get("stack_trace")
    if not isinstance(stack, str):
        return ""
    found = re.findall(r'File "([^"\n]+)", line (\d+)', stack)
    if not found:
        return ""
    path, line = found[-1]
    base = re.split(r"[/\\]", path)[-1]
    return re.sub(r"[^ -~]", "_", f"{base}:{line}")


def _names(graph: Graph) -> dict[Node, str]:
    found: dict[Node, str] = {}
    used: set[str] = set()
    for node in graph.nodes:
        base = name = safe_name(node.name)
        count = 1
        while name in used:
            name, count = f"{base[:55]}_{count}", count + 1
        used.add(name)
        found[node] = name
    return found


def _as_tuple(found: Any) -> Any:
    return tuple(found) if isinstance(found, (list, tuple)) else (found,)


def _size(size: Any) -> str:
    return str(getattr(getattr(size, "node", None), "expr", size))


def _kind(found: Any) -> str:
    if isinstance(found, torch.Tensor):
        name = DTYPES.get(found.dtype, safe_name(str(found.dtype).split(".")[-1]))
        text = f"{name}[{', '.join(map(_size, found.shape))}]"
        if found.layout == torch.strided:
            if not _contiguous(found):
                text += f"{{{', '.join(map(_size, found.stride()))}}}"
        else:
            text += f"@{safe_name(str(found.layout))}"
        return text + (f"@{found.device}" if found.device.type != "cpu" else "")
    if isinstance(found, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return f"sym({_size(found)})"
    if isinstance(found, (list, tuple)):
        return f"({', '.join(_kind(part) or '?' for part in found)})"
    return ""


def _contiguous(found: torch.Tensor) -> bool:
    """Row-major by its numbers, without a guard; strides of dimensions of size 1 do not count."""
    expected: Any = 1
    for size, step in zip(reversed(found.shape), reversed(found.stride())):
        if isinstance(size, int) and size == 1:
            continue
        if _size(step) != _size(expected):
            return isinstance(size, int) and size == 0
        expected = expected * size
    return True


def _argument(given: Any, names: Mapping[Node, str]) -> str:
    if isinstance(given, Node):
        return f"%{names[given]}"
    if isinstance(given, bool) or given is None or isinstance(given, int):
        return repr(given)
    if isinstance(given, float):
        return repr(given)
    if isinstance(given, complex):
        return f"complex({_argument(given.real, names)}, {_argument(given.imag, names)})"
    if isinstance(given, str):
        return json.dumps(given)
    if isinstance(given, tuple):
        return f"({', '.join(_argument(part, names) for part in given)}{',' if len(given) == 1 else ''})"
    if isinstance(given, list):
        return f"[{', '.join(_argument(part, names) for part in given)}]"
    if isinstance(given, dict):
        return "{" + ", ".join(f"{json.dumps(str(k))}: {_argument(v, names)}" for k, v in given.items()) + "}"
    if isinstance(given, slice):
        return f"slice({', '.join(_argument(part, names) for part in (given.start, given.stop, given.step))})"
    if isinstance(given, torch.dtype):
        return f"torch.{str(given).split('.')[-1]}"
    if isinstance(given, (torch.memory_format, torch.layout)):
        return str(given)
    if isinstance(given, torch.device):
        return f"device({json.dumps(str(given))})"
    if isinstance(given, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return f"sym({json.dumps(_size(given))})"
    return f"<{safe_name(type(given).__name__)}>"


@lru_cache(maxsize=None)
def _default_overload(base: str) -> Any:
    """The overload that a name without one means: ``default``, but ``Tensor`` where default is for Python numbers."""
    found: Any = torch.ops
    for part in base.split("."):
        found = getattr(found, part, None)
        if found is None:
            return None
    overloads = found.overloads()
    if "Tensor" in overloads and ("default" not in overloads or not any(
            "Tensor" in str(argument.type) for argument in found.default._schema.arguments)):
        return found.Tensor
    return found.default if "default" in overloads else None


# reading


def parse(text: str, sizes: Mapping[str, int] | None = None) -> GraphModule:
    """A GraphModule from the text of an ATen graph, with fake values in ``meta["val"]``.

    ``sizes`` gives numbers for symbolic sizes; a graph with symbols that have no number is refused. Positions marked
    ``# static`` are put into ``meta["fusionc_static"]``. Raises ParseError, which names the line.
    """
    from torch._subclasses import FakeTensorMode

    if len(text) > _MAX_TEXT:
        raise ParseError(f"the text has {len(text)} characters; at most {_MAX_TEXT} are read")
    graph = Graph()
    nodes: dict[str, Node] = {}
    mode = FakeTensorMode()
    static, done, position = [], False, 0
    for number, line in enumerate(text.splitlines(), 1):
        body, _, note = line.partition("  # ")
        body = body.strip()
        if not body or body.startswith("#"):
            continue
        try:
            if done:
                raise ParseError("something follows the return line")
            if body.startswith("return "):
                graph.output(_read(body[7:], nodes, sizes))
                done = True
                continue
            name, node = _line(body, graph, nodes, mode, sizes or {})
            if name in nodes:
                raise ParseError(f"%{name} is defined twice")
            nodes[name] = node
            if node.op == "placeholder":
                if note.strip() == "static":
                    static.append(position)
                position += 1
        except ParseError as error:
            raise ParseError(f"line {number}: {error}") from None
        except (SyntaxError, RecursionError, ValueError, TypeError, OverflowError) as error:
            raise ParseError(f"line {number}: cannot be read ({type(error).__name__})") from None
    if not done:
        raise ParseError("there is no return line")
    gm = GraphModule(torch.nn.Module(), graph)
    gm.meta["fusionc_static"] = frozenset(static)
    return gm


_LINE = re.compile(r"%([A-Za-z0-9_]+)(?:: (.*?))? = (.*)")


def _line(body: str, graph: Graph, nodes: Mapping[str, Node], mode: Any, sizes: Mapping[str, int]) -> tuple[str, Node]:
    found = _LINE.fullmatch(body)
    if found is None:
        raise ParseError("expected `%name: type = operator(...)`")
    name, kind, right = found.groups()
    if right == "input":
        node = graph.placeholder(safe_name(name))
    else:
        node = _call(right, graph, nodes, sizes)
        node._rename(safe_name(name))
    if kind:
        node.meta["val"] = _value(kind, mode, sizes)
    return name, node


def _tree(text: str) -> ast.expr:
    return ast.parse(re.sub(r'("(?:[^"\\]|\\.)*")|%', lambda m: m.group(1) or "_v_", text).strip(), mode="eval").body


def _call(text: str, graph: Graph, nodes: Mapping[str, Node], sizes: Mapping[str, int]) -> Node:
    tree = _tree(text)
    if not isinstance(tree, ast.Call):
        raise ParseError("expected an operator and its arguments")
    args = tuple(_argument_of(part, nodes, sizes) for part in tree.args)
    kwargs = {str(part.arg): _argument_of(part.value, nodes, sizes) for part in tree.keywords if part.arg}
    if len(kwargs) != len(tree.keywords):
        raise ParseError("** is not allowed")
    return graph.call_function(_target(_dotted(tree.func)), args, kwargs)


def _dotted(tree: ast.expr) -> str:
    parts = []
    while isinstance(tree, ast.Attribute):
        parts.append(tree.attr)
        tree = tree.value
    if not isinstance(tree, ast.Name):
        raise ParseError("the operator is not a dotted name")
    return ".".join([tree.id, *reversed(parts)])


_OPERATORS = {name: getattr(operator, name) for name in
              ("add", "sub", "mul", "floordiv", "mod", "neg", "truediv", "pow", "eq", "ne", "lt", "le", "gt", "ge")}


def _target(name: str) -> Any:
    if name == "getitem":
        return operator.getitem
    parts = name.split(".")
    if parts[0] == "operator" and len(parts) == 2 and parts[1] in _OPERATORS:
        return _OPERATORS[parts[1]]
    if parts[0] not in _NAMESPACES or len(parts) not in (2, 3) or any(part.startswith("__") for part in parts):
        raise ParseError(f"{name} is not an operator of {', '.join(_NAMESPACES)}")
    if parts[0] == "fusionc":
        import_module("fusionc.ops").load(parts[1])
    packet = getattr(getattr(torch.ops, parts[0]), parts[1], None)
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        raise ParseError(f"there is no operator {name}")
    if len(parts) == 2:
        found = _default_overload(name)
    else:
        found = getattr(packet, parts[2], None) if parts[2] in packet.overloads() else None
    if not isinstance(found, torch._ops.OpOverload):
        raise ParseError(f"{name} has no such overload; it has {', '.join(packet.overloads())}")
    return found


def _read(text: str, nodes: Mapping[str, Node], sizes: Mapping[str, int] | None = None) -> Any:
    found = _argument_of(_tree(text), nodes, sizes or {})
    return found if isinstance(found, (list, tuple)) else (found,)


def _argument_of(tree: ast.expr, nodes: Mapping[str, Node], sizes: Mapping[str, int]) -> Any:
    if isinstance(tree, ast.Constant):
        if tree.value is None or isinstance(tree.value, (bool, int, float, str)):
            return tree.value
    elif isinstance(tree, ast.Name):
        if tree.id in _WORDS:
            return _WORDS[tree.id]
        if tree.id.startswith("_v_"):
            if tree.id[3:] not in nodes:
                raise ParseError(f"%{tree.id[3:]} is used before it is defined")
            return nodes[tree.id[3:]]
    elif isinstance(tree, ast.UnaryOp) and isinstance(tree.op, ast.USub):
        inner = _argument_of(tree.operand, nodes, sizes)
        if isinstance(inner, (int, float)) and not isinstance(inner, bool):
            return -inner
    elif isinstance(tree, (ast.List, ast.Tuple)):
        made = [_argument_of(part, nodes, sizes) for part in tree.elts]
        return made if isinstance(tree, ast.List) else tuple(made)
    elif isinstance(tree, ast.Attribute):
        name = _dotted(tree)
        found = getattr(torch, tree.attr, None) if name.count(".") == 1 and name.startswith("torch.") else None
        if isinstance(found, _TORCH):
            return found
    elif isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name) and not tree.keywords:
        return _made(tree.func.id, [_argument_of(part, nodes, sizes) for part in tree.args], sizes)
    raise ParseError("an argument is none of node, number, string, list, torch constant")


def _made(name: str, parts: list[Any], sizes: Mapping[str, int]) -> Any:
    if name == "device" and len(parts) == 1 and isinstance(parts[0], str):
        try:
            return torch.device(parts[0])
        except RuntimeError:
            raise ParseError(f"there is no device {parts[0][:40]!r}") from None
    if name == "complex" and len(parts) == 2 and all(isinstance(part, (int, float)) for part in parts):
        return complex(*parts)
    if name == "slice" and len(parts) == 3:
        return slice(*parts)
    if name == "sym" and len(parts) == 1 and isinstance(parts[0], str):
        return _number(parts[0], sizes)
    raise ParseError(f"{name[:40]!r} is not something an argument can be")


_TENSOR = re.compile(r"([a-z0-9]+)\[([^\]]*)\](?:\{([^}]*)\})?(?:@([a-z]+(?::\d+)?))?")


def _value(kind: str, mode: Any, sizes: Mapping[str, int]) -> Any:
    if kind.startswith("sym(") and kind.endswith(")"):
        return _number(kind[4:-1], sizes)
    if kind.startswith("(") and kind.endswith(")"):
        return tuple(_value(part, mode, sizes) if part != "?" else None for part in _split(kind[1:-1]))
    found = _TENSOR.fullmatch(kind)
    if found is None or found.group(1) not in _BY_NAME:
        raise ParseError(f"{kind[:60]!r} is not a type")
    shape = [_number(part, sizes) for part in _split(found.group(2))]
    strides = None if found.group(3) is None else [_number(part, sizes) for part in _split(found.group(3))]
    if any(size < 0 or size > 1 << 40 for size in (*shape, *(strides or ()))) or len(shape) > 64:
        raise ParseError("a size is out of bounds")
    if strides is not None and len(strides) != len(shape):
        raise ParseError("there are not as many strides as sizes")
    place = _made("device", [found.group(4) or "cpu"], sizes)
    dtype = _BY_NAME[found.group(1)]
    try:
        plain = torch.empty(shape, dtype=dtype, device="meta") if strides is None else \
            torch.empty_strided(shape, strides, dtype=dtype, device="meta")
    except RuntimeError:
        raise ParseError("torch has no tensor of that size") from None
    return torch._subclasses.FakeTensor(mode, plain, place)


def _split(text: str) -> list[str]:
    """Parts between commas that are not inside brackets."""
    parts, depth, last = [], 0, 0
    for index, char in enumerate(text):
        depth += (char in "([{") - (char in ")]}")
        if char == "," and depth == 0:
            parts.append(text[last:index].strip())
            last = index + 1
    parts.append(text[last:].strip())
    return [part for part in parts if part]


def _number(text: str, sizes: Mapping[str, int]) -> int:
    """A size: a number, a symbol of ``sizes``, or +, −, *, //, % of these."""
    def walk(tree: ast.expr) -> int:
        if isinstance(tree, ast.Constant) and type(tree.value) is int:
            return tree.value
        if isinstance(tree, ast.Name):
            if tree.id in sizes:
                return int(sizes[tree.id])
            raise ParseError(f"size {tree.id} is symbolic; give it a number (sizes={{{tree.id!r}: …}})")
        if isinstance(tree, ast.UnaryOp) and isinstance(tree.op, ast.USub):
            return -walk(tree.operand)
        if isinstance(tree, ast.BinOp):
            for kind, function in ((ast.Add, operator.add), (ast.Sub, operator.sub), (ast.Mult, operator.mul),
                                   (ast.FloorDiv, operator.floordiv), (ast.Mod, operator.mod)):
                if isinstance(tree.op, kind):
                    left, right = walk(tree.left), walk(tree.right)
                    if right == 0 and kind in (ast.FloorDiv, ast.Mod):
                        raise ParseError("division by zero in a size")
                    return int(function(left, right))
        raise ParseError(f"{text[:60]!r} is not a size")

    return walk(ast.parse(text.strip(), mode="eval").body)
