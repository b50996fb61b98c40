"""Operators' kernels compiled ahead: which, once each, and nothing where the graph does not say enough."""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule

import fusionc.ops.conv_add_relu
import fusionc.ops.decode_attention
import fusionc.ops.depthwise_conv
import fusionc.ops.grouped_conv
import fusionc.ops.grouped_rows
import fusionc.ops.linear_act
import fusionc.ops.linear_cross_entropy
import fusionc.ops.short_attention
import fusionc.ops.skinny_linear  # noqa: F401
from fusionc import ahead
from fusionc.codegen.templates.few_rows import sibling_tiles
from fusionc.ops.skinny_linear import SIBLING_ROWS
from fusionc.runtime import depthwise_conv, device, grouped_conv, linear_act, per_example_conv, templates, tune
from fusionc.runtime.templates import Template
from fusionc.targets import decode, few_rows, grouped_rows, short_attention, skinny

GPU = torch.device("cuda:0")
ops = torch.ops.fusionc


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """An H200 that is not there, and no memory of earlier choices."""
    for module in (skinny, decode, few_rows, short_attention):
        monkeypatch.setattr(module, "properties", lambda _: device.known("sm_90"))
    monkeypatch.setattr(tune, "_recall", lambda *args: None)
    caches = (skinny.generation, skinny._plan, decode._kernel, few_rows._plan, short_attention._plan)
    for cached in caches:
        cached.cache_clear()
    tune.forget()
    yield
    for cached in caches:
        cached.cache_clear()
    tune.forget()


def graph(*calls: tuple[Any, tuple[Any, ...]]) -> GraphModule:
    """Calls of operators with fake tensors as arguments."""
    g = Graph()

    def node(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        n = g.placeholder(f"a{len(g.nodes)}")
        n.meta["val"] = value
        return n

    made = [(target, tuple(node(a) for a in args)) for target, args in calls]
    g.output(tuple(g.call_function(target, args) for target, args in made))
    return GraphModule(torch.nn.Module(), g)


def fake(*shape: int, dtype: torch.dtype = torch.bfloat16, last: bool = False, where: Any = GPU) -> torch.Tensor:
    with FakeTensorMode():
        t = torch.empty(shape, dtype=dtype, device=where)
        return t.to(memory_format=torch.channels_last) if last else t


def prepared(gm: GraphModule) -> list[tuple[str, Any]]:
    """(kind of plan, candidate) of each job."""
    return [(type(getattr(j.func, "__self__", None)).__module__, j.args[0]) for j in ahead.jobs(gm)]  # type: ignore[attr-defined]


def linear(rows: int, n: int = 4096, where: Any = GPU) -> tuple[Any, tuple[Any, ...]]:
    x, w = fake(rows, 4096, where=where), fake(n, 4096, where=where)
    return ops.skinny_linear.default, (x, w, None, 0.0, False, None, "", None, False)


def test_all_candidates_of_an_operator_once() -> None:
    one, few = prepared(graph(linear(1), linear(1))), prepared(graph(linear(16), linear(16, 1024)))
    assert [kind for kind, _ in one] == ["fusionc.targets.skinny"] * len(one) and len(one) == 2
    assert {kind for kind, _ in few} == {"fusionc.targets.few_rows"}
    assert [c for _, c in few].count(None) == 2, "two shapes, each with the library at its end"


def test_groups_of_rows_are_compiled_without_data() -> None:
    x, weight, ends = fake(64, 2048), fake(128, 1536, 2048), fake(128).to(torch.int32)
    jobs = ahead.jobs(graph((ops.grouped_rows.default, (x, weight, ends))))
    assert [j.args[0] for j in jobs] == list(grouped_rows._plan_of(x, weight).tiles)  # type: ignore[attr-defined]
    assert jobs[-1].args[0] is None and len(jobs) == 3  # type: ignore[attr-defined]


def test_a_layer_that_asks_for_weights_ahead_is_another_kernel() -> None:
    target, (x, w, *rest) = linear(1)
    later = [fake(8192, 4096), fake(8192, 4096)]
    ahead_of = (target, (x, w, *rest[:6], True, None, True, False, later))
    assert len(prepared(graph(linear(1), ahead_of))) == len(prepared(graph(linear(1)))) + 1, "in a chain nothing is chosen"
    constants = {dict(j.func.__self__.kernel(j.args[0]).constants)["OWN"] for j in ahead.jobs(graph(ahead_of))}
    assert constants == {True}


def test_weights_of_another_gpu_are_not_asked_for() -> None:
    target, (x, w, *rest) = linear(1)
    later = [fake(8192, 4096, where="cuda:1"), fake(8192, 4096)]
    (job, *_) = ahead.jobs(graph((target, (x, w, *rest[:6], True, None, True, False, later))))
    constants = dict(job.func.__self__.kernel(job.args[0]).constants)
    assert constants["SHARE0"] == 0 < constants["SHARE1"]


@pytest.mark.parametrize(("width", "inner", "asked"), [(2048, 8192, 12), (4096, 14336, 18), (16384, 53248, 0)])
def test_no_more_is_asked_for_than_stays_in_the_cache(width: int, inner: int, asked: int) -> None:
    """Llama 1B's step is as it was measured; 8B's weights are larger than L2; 405B's first one is, by itself."""
    x, w, later = fake(1, width), fake(width, width), fake(inner, width)
    call = (x, w, None, 0.0, False, None, "", None, True, None, True, False, [later, later])
    for job in ahead.jobs(graph((ops.skinny_linear.default, call))):
        plan, tile = job.func.__self__, job.args[0]
        constants = dict(plan.kernel(tile).constants)
        assert constants["OWN"] and constants["SHARE0"] == constants["SHARE1"]
        assert constants["SHARE0"] * 2 * plan.grid(tile) >> 20 == asked


def test_depthwise_convolutions_are_compiled_without_data(monkeypatch: pytest.MonkeyPatch) -> None:
    x, taps, bias = fake(32, 64, 28, 28, last=True), fake(7, 7, 64), fake(64)
    jobs = ahead.jobs(graph((ops.depthwise_conv.default, (x, taps, bias, [1, 1], [3, 3], [1, 1], "gelu"))))
    shape, _ = depthwise_conv._call(*depthwise_conv._facts(x, taps, bias), 1, 1, 3, 3, 1, 1, "gelu")
    assert [j.args[0] for j in jobs] == list(depthwise_conv.candidates(shape, 32))[:2]  # type: ignore[attr-defined]
    tune.configure("max")
    jobs = ahead.jobs(graph((ops.depthwise_conv.default, (x, taps, bias, [1, 1], [3, 3], [1, 1], "gelu"))))
    assert [j.args[0] for j in jobs] == list(depthwise_conv.candidates(shape, 32))  # type: ignore[attr-defined]

    started: list[templates.Template] = []
    monkeypatch.setattr(templates.Template, "prepare", lambda self: started.append(self))
    for how in [*depthwise_conv.candidates(shape, 32), ("turned", 0, "toeplitz", 2, False, 32, 32, 64, 4, 2)]:
        depthwise_conv.prepare(how, shape, 32, torch.bfloat16, torch.float32, torch.device("cpu"))
    assert [t.name for t in started[-4:]] == ["turn", "pack", "conv", "turn"]
    assert started[0].kinds == ("*bf16", "*bf16", "*fp32", "*bf16", "i32")
    for how in depthwise_conv.weight_candidates(shape, 32):
        depthwise_conv.prepare_weight(how, shape, 32, torch.device("cpu"))
    assert [t.name for t in started[-3:]] == ["turn", "turn", "weight"]


def test_linear_layers_with_an_activation() -> None:
    x, w, b = fake(50176, 96), fake(384, 96), fake(384)
    jobs = ahead.jobs(graph((ops.linear_act.default, (x, w, None, b, "gelu")), (ops.linear_act.default, (x, w, None, b, "gelu"))))
    assert [j.args[0] for j in jobs] == list(linear_act.candidates(50176, 384, 96))[:2]  # type: ignore[attr-defined]


def test_filters_for_each_example(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = fake(1, 8 * 64, 28, 28), fake(8 * 128, 64, 3, 3)
    jobs = ahead.jobs(graph((ops.per_example_conv.default, (x, w, None, [1, 1], [1, 1], [1, 1], 8, "silu"))))
    shape = per_example_conv.Shape(8, 64, 128, (28, 28), (3, 3), (1, 1), (1, 1), (1, 1), torch.bfloat16, False, "silu")
    assert [j.args[0] for j in jobs] == list(per_example_conv.candidates(shape))  # type: ignore[attr-defined]
    started: list[templates.Template] = []
    monkeypatch.setattr(templates.Template, "prepare", lambda self: started.append(self))
    for how in (("library",), ("turned", True, 64, 64, 64, 4, 4), ("direct", True, 64, 64, 64, 4, 3)):
        per_example_conv.prepare(how, shape, GPU)
    assert [t.name for t in started] == ["finish", "turn", "turn", "turned", "direct"]


def test_grouped_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = fake(8, 96, 28, 28, last=True), fake(64, 24, 3, 3)
    jobs = ahead.jobs(graph((ops.grouped_conv.default, (x, w, fake(64), [2, 2], [1, 1], [1, 1], 4, "relu"))))
    shape = grouped_conv.Shape(8, 4, 24, 16, (28, 28), (3, 3), (2, 2), (1, 1), (1, 1), (216, 9, 1), torch.bfloat16, True, "relu")
    assert [j.args[0] for j in jobs] == list(grouped_conv.candidates(shape))  # type: ignore[attr-defined]
    started: list[templates.Template] = []
    monkeypatch.setattr(templates.Template, "prepare", lambda self: started.append(self))
    for how in grouped_conv.candidates(shape)[:2]:
        grouped_conv.prepare(how, shape, GPU)
    assert [t.name for t in started] == ["finish", "grouped"]


def test_siblings_of_many_rows() -> None:
    def candidates(rows: int, *heights: int) -> list[Any]:
        first, *more = (fake(n, 64) for n in heights)
        found = few_rows.wanted(fake(rows, 64), first, None, None, "", None, more, True, False)
        return [] if found is None else list(found.candidates)

    assert candidates(300, 128, 128, 64) == [*sibling_tiles(300, 320, 64, 64, 132), None]
    assert candidates(SIBLING_ROWS, 128, 64) and not candidates(SIBLING_ROWS + 1, 128, 64)
    assert candidates(1 << 15, 1 << 15, (1 << 15) - 64) and not candidates(1 << 15, 1 << 15, 1 << 15), "places of 32 bits"


def test_short_attention_is_known_by_its_strides() -> None:
    q = fake(1, 12, 128, 64)
    made = prepared(graph((ops.short_attention.default, (q, q, q, 0.125, True))))
    assert made and {kind for kind, _ in made} == {"fusionc.targets.short_attention"}


def test_short_attention_with_a_bias_and_a_mask() -> None:
    qkv = fake(2048, 49, 3, 3, 32).permute(2, 0, 3, 1, 4)
    bias, mask = fake(64, 3, 49, 56), fake(1, 1, 1, 49, dtype=torch.bool)
    for given in ((bias,), (bias, mask), (mask, bias), (None, mask)):
        gm = graph((ops.short_attention.default, (*qkv.unbind(0), 0.125, False, *given)))
        made = [c for _, c in prepared(gm)]
        repeated = {tile.each for tile in made if tile is not None}
        assert made[-1] is None and repeated == {1, 2, 4, 8}, given
        tile = made[0]
        plan = ahead.jobs(gm)[0].func.__self__  # type: ignore[attr-defined]
        floats, bools = (any(x is wanted for x in given) for wanted in (bias, mask))
        assert plan.kernel(tile).kinds[4:] == ("*bf16",) * floats + ("*i1",) * bools
        assert plan.programs(tile) == 2048 * 3
        assert plan.programs(dataclasses.replace(tile, each=4)) == 512 * 3
    for wrong in (fake(3, 3, 49, 49), fake(64, 3, 49, 48), fake(64, 3, 49, 49, dtype=torch.float64), fake(64, 2, 49, 49)):
        assert ahead.jobs(graph((ops.short_attention.default, (*qkv.unbind(0), 0.125, False, wrong)))) == []


def test_decoding_has_one_kernel() -> None:
    q, cache, mask = fake(1, 32, 1, 64), fake(1, 8, 512, 64), fake(1, 1, 1, 512, dtype=torch.bool)
    new, rope, at = fake(1, 8, 1, 64), fake(1, 1, 1, 64), fake(1, dtype=torch.int64)
    update = (ops.decode_attention_update.default, (q, new, new, rope, rope, cache, cache, at, mask, 0.125, False))
    (job,) = ahead.jobs(graph(update, update))
    assert job.args[0].name == "decode"  # type: ignore[attr-defined]
    assert len(ahead.jobs(graph((ops.decode_attention.default, (q, cache, cache, None, 0.125, False))))) == 1
    narrow = fake(1, 32, 1, 24)
    assert ahead.jobs(graph((ops.decode_attention.default, (narrow, cache, cache, None, 0.125, False)))) == []


def compiled_by(gm: GraphModule, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that the jobs of a graph compile."""
    found: list[str] = []
    monkeypatch.setattr(Template, "prepare", lambda self: found.append(self.name))
    for job in ahead.jobs(gm):
        job()
    return found


def test_residual_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    x, w, z = fake(2, 64, 8, 8, last=True), fake(128, 64, 1, 1, last=True), fake(2, 128, 8, 8, last=True)
    args = (x, w, fake(128), z, [1, 1], [0, 0], [1, 1])
    gm = graph((ops.conv_add_relu.default, args), (ops.conv_add_relu_over.default, args))
    assert compiled_by(gm, monkeypatch) == ["pointwise"] * 2, "each tile once, for both operators"
    other = (fake(2, 64, 8, 8, last=True), fake(128, 64, 3, 3, last=True), fake(128), z, [1, 1], [1, 1], [1, 1])
    assert compiled_by(graph((ops.conv_add_relu.default, other)), monkeypatch) == []


def test_cross_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w, target = fake(64, 32), fake(1000, 32), fake(64, dtype=torch.int64)
    args = (x, w, None, target, -100, True, 0.0, torch.float32, [True, True, False])
    assert compiled_by(graph((ops.linear_cross_entropy.default, args)), monkeypatch) == ["cross_entropy_rows"]
    back = (fake(dtype=torch.float32), fake(64, 32), fake(1000, 32), fake(0))
    found = compiled_by(graph((ops.linear_cross_entropy_backward.default, back)), monkeypatch)
    assert found == ["scale_in_place"] * 2, "not for the gradient that nobody wants"


def test_a_result_that_the_library_makes_the_other_way_round(monkeypatch: pytest.MonkeyPatch) -> None:
    args = (fake(128, 768), fake(50257, 768), None, 0.0, False, None, "", None, False)
    assert compiled_by(graph((ops.skinny_linear.default, args)), monkeypatch) == ["few_rows", "few_rows", "turn"]
    more = (fake(200, 768), *args[1:])
    assert compiled_by(graph((ops.skinny_linear.default, more)), monkeypatch) == ["turn"], "too many rows for a kernel of ours"


def test_only_what_the_first_call_will_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    gm = graph(linear(1))
    monkeypatch.setattr(tune, "_recall", lambda *args: 1)
    assert len(ahead.jobs(gm)) == 1, "the winner is known"
    monkeypatch.setattr(tune, "_recall", lambda *args: None)
    tune.configure("off")
    assert len(ahead.jobs(gm)) == 1, "nothing is measured"


def test_nothing_for_the_cpu_for_other_operators_and_for_unknown_arguments() -> None:
    assert ahead.jobs(graph(linear(1, where="cpu"))) == []
    assert ahead.jobs(graph((operator.add, (fake(3), fake(3))))) == []
    gm = graph(linear(1))
    for n in gm.graph.find_nodes(op="placeholder"):
        del n.meta["val"]
    assert ahead.jobs(gm) == []
    ahead.start(gm)()


def test_a_kernel_that_does_not_compile_is_left_to_the_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Any, tile: Any) -> None:
        raise ValueError("no compiler")

    monkeypatch.setattr(skinny._Plan, "prepare", broken)
    ahead.start(graph(linear(1)))()
