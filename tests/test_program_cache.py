"""Compiled graphs on disk: what goes in comes out the same, and nothing else gets in."""

from __future__ import annotations

import copy
import json
import operator
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fusionc import program_cache, warm
from fusionc.codegen import program as prog
from fusionc.codegen.program_json import Invalid, NotCacheable, bind, check_text, decode, describe, encode
from fusionc.config import Config
from fusionc.ir.expr import Size, floordiv, index, mod
from fusionc.passes.recipes import rebuild
from fusionc.record import collect

aten = torch.ops.aten
S = Size("s7", 2)
ADD = aten.add.Tensor._op


def launcher(*args: Any) -> int:
    """Stands for a kernel."""
    return 0


def sample() -> prog.Program:
    """A program with every kind of step."""
    p = prog.Program(("a0", "a1"), (("s7", "a0.size(0)"),))
    n = index(S)
    p.steps += [
        prog.Expect("a0", (n, index(4)), (index(4), index(1))),
        prog.Alloc("b1", (n * 2 + 1, floordiv(n, index(3)), mod(n, index(5))), (index(1),) * 3,
                   torch.float32, torch.device("cpu")),
        prog.Launch("k_00", ("a0", "b1"), (S,), "cpp", True, "add, relu", (False, False)),
        prog.View("v2", "b1", (n,), (index(1),), index(0)),
        prog.Call("c3", p.constant("op_add", ADD), "v2, a1, alpha=-2, other=[1, (2.5, None)], x=float('inf')"),
        prog.Assign("c4", "c3[0]"),
        prog.Free(("a0", "b1")),
    ]
    p.results = ("c4", "None", "2*s7 + 1", "v2")
    p.constants["k_00"] = launcher
    p.constant("contiguous", torch.contiguous_format)
    return p


OPERATORS = {id(ADD): "aten::add.Tensor"}
KERNELS = {"k_00": launcher}


def encoded() -> dict[str, Any]:
    return json.loads(json.dumps(encode(sample(), OPERATORS, KERNELS)))


def test_round_trip() -> None:
    again = decode(encoded(), KERNELS)
    assert again.text() == sample().text()
    assert again.constants["op_add"] is ADD
    assert again.constants["k_00"] is launcher


def test_round_trip_of_buffers_on_a_gpu() -> None:
    """Each step that is read back has a device object of its own."""
    gpu, one = torch.device("cuda:0"), (index(1),)
    p = prog.Program(("a0",))
    p.steps += [prog.Alloc(name, (index(4),), one, torch.float32, gpu) for name in ("b1", "b2")]
    p.steps.append(prog.Carve(("b3", "b4"), (8,), (), (((4,), (1,), 0), ((4,), (1,), 4)), torch.float32, torch.device("cuda:0")))
    p.steps.append(prog.Call("c5", p.constant("op_add", ADD), f"a0, {p.constant('device', torch.device('cuda:0'))}"))
    p.results = ("b1", "b2", "b3", "b4", "c5")
    assert decode(json.loads(json.dumps(encode(p, OPERATORS, {}))), {}).text() == p.text()
    assert "device_1" not in p.text()
    assert p.constant("device", torch.device("cuda:1")) == "device_1"


@pytest.mark.parametrize(
    "value",
    [torch.float32, torch.device("cpu"), torch.strided, torch.channels_last, operator.add, torch.sym_max],
    ids=lambda v: getattr(v, "__name__", str(v)),
)
def test_constants(value: Any) -> None:
    assert bind(json.loads(json.dumps(describe(value, {})))) == value


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.int64, torch.complex64])
def test_tensor_constants(dtype: torch.dtype) -> None:
    for shape in ((), (3,), (2, 0), (2, 3)):
        value = torch.randn(shape).to(dtype)
        torch.testing.assert_close(bind(describe(value, {})), value, rtol=0, atol=0)


def test_no_description() -> None:
    for value in (object(), launcher, torch.randn(10_000), torch.randn(3, requires_grad=True), torch.Generator()):
        with pytest.raises(NotCacheable):
            describe(value, {})
    with pytest.raises(NotCacheable):
        describe(ADD, {id(ADD): "mylib::add"})


@pytest.mark.parametrize(
    "described",
    [
        ["op", "os::system"],
        ["op", "aten::no_such_operator"],
        ["op", "aten::from_file"],
        ["op", "aten::__class__"],
        ["op", "aten::add.Tensor; import os"],
        ["dtype", "Tensor"],
        ["device", "cpu; x"],
        ["object", "layout:float32"],
        ["function", "os", "system"],
        ["function", "operator", "methodcaller"],
        ["function", "torch", "load"],
        ["tensor", "float32", [10**9], ""],
        ["tensor", "float32", [2], "00"],
        ["tensor", "float32", "x", "zz"],
        ["kernel", "x"],
        [],
        None,
        {"op": "aten::add"},
        ["op", ["aten::add"]],
    ],
    ids=str,
)
def test_hostile_constants(described: Any) -> None:
    with pytest.raises(Exception):  # noqa: B017 - any error is a miss
        bind(described)


def changed() -> Iterator[dict[str, Any]]:
    """Programs as JSON, each with one thing wrong."""
    base = encoded()
    for name in base:
        less = dict(base)
        del less[name]
        yield less
        for value in (None, 7, "x", [[]], {"x": 1}, [None] * 1000):
            if value != base[name]:
                yield {**base, name: value}
    yield {**base, "more": 1}
    yield {**base, "arguments": ["a0", "a1", "x); import os; ("]}
    yield {**base, "arguments": ["a0", "op_add"]}
    yield {**base, "sizes": [["s7", "__import__('os').getpid()"]]}
    yield {**base, "sizes": [["s7", "9**9**9"]]}
    yield {**base, "sizes": [["s7", "'x' * 10**9"]]}
    yield {**base, "symbols": {"s7": "2"}}
    yield {**base, "symbols": {"os": 2}}
    for result in ("a0.__class__", "().__class__", "open('x')", "lambda: 0", "[x for x in a0]", "a0; b1", "(yield)", "x9",
                   "f'{a0}'", "call", "__builtins__", "a0 if a1 else v2", "a0.__init__", "args.pop"):  # fmt: skip
        yield {**base, "results": [result]}
    for step in (["Exec", "x"], ["Call", "c9", "exec", "'x'", ""], ["Call", "c9", "op_add", "a0) + op_add(a1\n    import os", ""],
                 ["Call", "c9", "op_add", "**a0", ""], ["Call", "op_add", "op_add", "a0", ""], ["Assign", "c9", "[a0] * 10**12"],
                 ["Assign", "c9", "'x' * 3"], ["Assign", "c9.x", "a0"], ["Assign", "empty", "a0"],
                 ["Free", ["a0, b1\n    import os"]],
                 ["View", "v9", "b1", "x", [1], 0], ["View", "v9", "b1", [{"size": "s9"}], [1], 0],
                 ["View", "v9", "b1", [{"sum": [[1, [{"sum": []}]] * 50]}], [1], 0], ["View", "v9", "b1", [10**30], [1], 0],
                 ["Launch", "k_99", ["a0"], [], "cpp", False, "", []],
                 ["Launch", "k_00", ["a0"], [], "cpp", False, "x\n    import os", 1],
                 ["Alloc", "b9", [1], [1], "float32", {"device": "cpu"}],
                 ["Alloc", "b9", [1], [1], {"dtype": "Tensor"}, {"device": "cpu"}],
                 "Free", [], None, [["Free"], ["a0"]]):  # fmt: skip
        yield {**base, "steps": [step]}
    deep: Any = 1
    for _ in range(200):
        deep = {"div": [deep, 2]}
    yield {**base, "steps": [["View", "v9", "a0", [deep], [1], 0]]}
    yield {**base, "results": ["(" * 300 + "a0" + ")" * 300, "-" * 5000 + "s7"]}


def test_hostile_programs() -> None:
    count = 0
    for data in changed():
        count += 1
        try:
            text = decode(data, KERNELS).text()
        except Exception:  # noqa: BLE001 - any error is a miss
            continue
        # what reads back may only be a harmless program: empty lists where there were steps, say
        check_text(text, {"op_add": ADD, "k_00": launcher, **bound(data)})
        assert "import" not in text.replace("# ", ""), text
    assert count > 70


def bound(data: dict[str, Any]) -> dict[str, Any]:
    return {name: bind(d) for name, d in data["constants"].items()}


@pytest.mark.parametrize(
    "text",
    [
        "import os",
        "def call(args):\n    import os\n    return ()",
        "def call(args):\n    return ()\ncall([])",
        "@index_error\ndef call(args):\n    return ()",
        "def call(args=index_error('x')):\n    return ()",
        "def call(args):\n    global args\n    return ()",
        "def call(args):\n    while 1:\n        args.clear()\n    return ()",
        "def call(args):\n    args.append(1)\n    return ()",
        "def call(args):\n    a = args\n    a.clear.__self__\n    return ()",
        "def call(args):\n    return (args[empty()],)",
        "def call(args, *more):\n    return (more,)",
        "x" * 5_000_000,
    ],
)
def test_hostile_texts(text: str) -> None:
    with pytest.raises(Invalid):
        check_text(text, {})


def test_recipes() -> None:
    parts = [torch.randn(3, 4), torch.randn(5, 4)]
    t = ["aten::t", [], None]
    made = rebuild(["concatenate", 1, False, [[t], [t]]], 2)(parts)
    torch.testing.assert_close(made, torch.cat([p.t() for p in parts], 1))
    for bad in (None, [], ["x"], ["concatenate"],
                ["concatenate", 2, False, [[t], [t]]], ["concatenate", 1, False, [[t]]],
                ["concatenate", 1, False, [[["aten::mul", [], None]], []]],
                ["concatenate", 1, False, [[["aten::t", [{}], None]], []]],
                ["concatenate", 1, False, [[["aten::t", [], "load"]], []]], ["fold_batch_norm", [True] * 6, "x", 0, 1, False],
                ["fold_batch_norm", [True, False], "0x1p-10", 0, 1, False]):  # fmt: skip
        with pytest.raises((ValueError, TypeError)):
            rebuild(bad, 2)


# -- through the compiler ---------------------------------------------------------------------------------------------


@pytest.fixture
def compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Compile as a new process would, without the short cut around AOTAutograd."""
    monkeypatch.setattr(warm.Warm, "load", lambda self: None)

    def fresh(model: Any, **options: Any) -> Any:
        torch._dynamo.reset()
        program_cache.stats.clear()
        return torch.compile(model, backend="fusionc", options={"verify": False, "cache": str(tmp_path / "cache"), **options})

    return fresh


class Block(torch.nn.Module):
    """Sibling matmuls, a reduction, a library call with keywords, a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = torch.nn.Linear(8, 12, bias=False), torch.nn.Linear(8, 12, bias=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = torch.nn.functional.silu(self.gate(x)) * self.up(x)
        return y.softmax(-1) + torch.tensor([0.5] * 12), torch.sort(y, descending=True)[0].cumsum(-1)


def test_graph_is_found_again(compiled: Callable[..., Any]) -> None:
    model, x = Block().eval(), torch.randn(5, 8)
    with torch.no_grad(), collect() as records:
        want = model(x)
        cold = compiled(model)(x)
        assert program_cache.stats["stored"] == 1, dict(program_cache.stats)
        found = compiled(model)(x)
        assert program_cache.stats["hit"] == 1, dict(program_cache.stats)
        torch.testing.assert_close(cold, want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found, cold, rtol=0, atol=0)
    first, second = records
    assert (first.cache, second.cache) == ("stored", "hit")
    assert [k.symbol for k in second.kernels] == [k.symbol for k in first.kernels]
    assert [k.name for k in second.kernels] == [k.name for k in first.kernels]
    assert second.calls == first.calls and second.groups == first.groups
    assert [(p.name, p.fired) for p in second.passes] == [(p.name, p.fired) for p in first.passes]
    assert all(k.from_cache for k in second.kernels)


def test_lost_binary_is_built_from_loop_ir(compiled: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Block().eval(), torch.randn(5, 8)
    with torch.no_grad():
        want = compiled(model)(x)
        from fusionc.targets import cpp

        monkeypatch.setattr(cpp, "load_all", lambda cx, hashes, loops: {})
        torch.testing.assert_close(compiled(model)(x), want, rtol=0, atol=0)
    assert program_cache.stats["hit"] == 1


def test_training_graphs(compiled: Callable[..., Any]) -> None:
    base, x = Block(), torch.randn(5, 8)
    seen = []
    for _ in range(2):
        model = copy.deepcopy(base)
        compiled(model)(x)[0].square().sum().backward()
        seen.append([p.grad for p in model.parameters()])
    assert program_cache.stats["hit"] == 2, dict(program_cache.stats)
    torch.testing.assert_close(seen[0], seen[1], rtol=0, atol=0)


@pytest.mark.parametrize("warm_start", [False, True])
def test_graphs_of_other_guards_are_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warm_start: bool) -> None:
    """The operators, inputs and magnitudes are equal; whether the pieces are one or two is known from a guard alone."""
    if not warm_start:
        monkeypatch.setattr(warm.Warm, "load", lambda self: None)

    def fn(x: torch.Tensor, n: int) -> torch.Tensor:
        return x.split(n)[0] * 2

    x = torch.randn(6, 4)
    for _ in range(2):
        for n in (7, 4):
            torch._dynamo.reset()
            run = torch.compile(fn, backend="fusionc", dynamic=True, options={"verify": False, "cache": str(tmp_path)})
            torch.testing.assert_close(run(x, n), fn(x, n))


def test_reasons_are_in_the_record(compiled: Callable[..., Any]) -> None:
    with torch.no_grad(), collect() as records:
        compiled(lambda x: x.sin(), verify=True)(torch.randn(3))
        compiled(lambda x: x.sin(), cache=False)(torch.randn(3))
    assert [r.cache for r in records] == [
        "not cached: a dump or verification needs every stage to run",
        "not cached: the cache is switched off",
    ]


def test_hostile_entries_are_misses(compiled: Callable[..., Any], tmp_path: Path) -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        return x.sin().sum(-1)

    x = torch.randn(3, 4)
    compiled(f)(x)
    folder = tmp_path / "cache"
    cache = program_cache.cache_of(Config(cache=str(folder)))
    (path,) = (folder / "v1" / "program").glob("*.json")
    entry = json.loads(path.read_text())["entry"]
    key, good = entry["key"], entry["payload"]
    (kernel,) = good["kernels"]
    bad: list[dict[str, Any]] = [{**good, name: value} for name in good for value in (None, 3, "x", {"a": []}, [1])
                                 if (name, value) not in ()]  # fmt: skip
    bad += [
        {**good, "kernels": [{**kernel, "loop": kernel["loop"] + " "}]},
        {**good, "kernels": [{**kernel, "symbol": "system"}]},
        {**good, "kernels": [{**kernel, "source": "../../x"}]},
        {**good, "program": {**good["program"], "steps": []}},
        {**good, "derived": [["d", [0], ["concatenate", 1, False, []], None, []]]},
        {**good, "record": {**good["record"], "kernels": [{"name": "x"}]}},
    ]
    for payload in bad:
        cache.put("program", key, payload)
        torch.testing.assert_close(compiled(f)(x), f(x))
        assert program_cache.stats["hit"] == 0, str(payload)[:200]
    compiled(f)(x)
    assert program_cache.stats["hit"] == 1


def test_the_key_holds_every_module_that_shapes_a_program() -> None:
    """A new top-level module must be named there, or here as one that changes no Program."""
    from fusionc import program_cache

    harmless = """__init__ ahead cli config dump errors explanation html kernel_plans modules progress record repro
        standalone""".split()
    home = Path(program_cache.__file__).parent
    assert {p.stem for p in home.glob("*.py")} - set(harmless) == set(program_cache._SHAPING)
