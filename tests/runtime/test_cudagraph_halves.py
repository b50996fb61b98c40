"""Large results are made by plain calls after the replay: where a Program may be cut, and that the runner does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fusionc.codegen.program import Alloc, Assign, Call, Free, Launch, Program, Step, View, Wrote
from fusionc.ir.expr import index
from fusionc.record import GraphRecord
from fusionc.runtime import cudagraph
from fusionc.runtime.cudagraph import Runner
from fusionc.runtime.cudagraph_halves import Halves, cut, halves
from tests.runtime.test_cudagraph import FakeGpu, run

aten = torch.ops.aten
SQUARE = ((index(4), index(4)), (index(4), index(1)))
NAMES = {"op_mm": aten.mm.default._op, "op_relu": aten.relu.default._op, "op_split": aten.split.Tensor._op,
         "op_view": aten.view.default._op}  # fmt: skip


def program(steps: list[Step], *results: str) -> Program:
    p = Program(("a0", "a1"))
    for name, op in NAMES.items():
        p.constant(name, op)
    p.constant("k_tanh", lambda buffers, sizes, stream: buffers[0].tanh_())
    p.constant("k_copy", lambda buffers, sizes, stream: buffers[1].copy_(buffers[0]))
    p.steps, p.results, p.uses_stream = steps, results, True
    return p


def launch(kernel: str, *buffers: str) -> Launch:
    return Launch(kernel, buffers, (), "triton")


RELU, MM = Call("c0", "op_relu", "a0"), Call("c1", "op_mm", "c0, a1")
VIEW = View("v2", "c1", (index(2), index(8)), (index(8), index(1)), index(0))
OUT = Alloc("b3", *SQUARE, torch.float32, torch.device("cpu"))
PRODUCT = [RELU, MM, Free(("c0", "a1")), VIEW, Free(("c1",))]
OTHER = Call("c5", "op_mm", "a1, a1")
SOFTCAP = [RELU, MM, Free(("c0", "a1")), launch("k_tanh", "c1")]


def test_before_the_product() -> None:
    found = halves(program(PRODUCT, "v2"), 1)
    assert found is not None and (found.early, found.late) == ((), (0,))
    assert found.head.steps == [RELU] and found.head.results == ("a1", "c0") == found.tail.arguments
    assert found.tail.steps == [MM, VIEW] and found.tail.results == ("v2",)


def test_the_shortest_half_that_makes_the_result() -> None:
    assert halves(program(SOFTCAP, "c1"), 1) is None
    found = cut(program(SOFTCAP, "c1"), [0])
    assert found is not None and found.tail.steps == [MM, SOFTCAP[-1]]


def test_small_results_stay_with_the_first_half() -> None:
    found = halves(program([OTHER, *PRODUCT], "v2", "a0", "c5", "v2"), 1)
    assert found is not None and found.early == (1, 2) and found.late == (0, 3)
    assert found.head.results == ("a0", "c5", "a1", "c0")


@pytest.mark.parametrize("steps, results", [
    ([RELU, MM, VIEW], ("v2", "c0")),  # the product reads what leaves too: it might be written
    ([RELU, Call("c1", "op_view", "c0, [2, 8]")], ("c1",)),  # may be a view
    ([RELU, Call("c1", "op_split", "c0, 2"), Assign("c2", "c1[0]")], ("c2",)),
    ([RELU, OUT, launch("k_copy", "c0", "b3"), Wrote(("a0",))], ("b3",)),
    ([MM], ("c1",)),  # nothing to record
    ([RELU, MM, View("v2", "a0", *SQUARE, index(0))], ("v2",)),
])  # fmt: skip
def test_what_is_not_cut(steps: list[Step], results: tuple[str, ...]) -> None:
    assert halves(program(steps, *results), 1) is None


def test_not_with_unknown_sizes() -> None:
    p = program(PRODUCT, "v2")
    p.sizes = (("s0", "a0.size(0)"),)
    assert halves(p, 1) is None


def runner_of(p: Program, build: bool = True) -> Runner:
    space = {"empty": torch.empty_strided, "view": torch.as_strided, "current_stream": lambda: 0,
             "restride": lambda *a: a[0], "wrote": lambda *a: None}  # fmt: skip

    def compiled(part: Program) -> Callable[[list[Any]], Any]:
        return part.compile(space, "test")

    return Runner(compiled(p), p, GraphRecord("g"), False, FakeGpu(), compiled if build else None)


@pytest.mark.parametrize("steps, results, expected", [
    (PRODUCT, ("v2",), lambda x, w: (torch.mm(x.relu(), w).view(2, 8),)),
    (SOFTCAP, ("c1",), lambda x, w: (torch.mm(x.relu(), w).tanh(),)),
    ([OTHER, *PRODUCT], ("a0", "v2", "c5", "v2"),
     lambda x, w: (x, torch.mm(x.relu(), w).view(2, 8), w @ w, torch.mm(x.relu(), w).view(2, 8))),
    ([RELU, OUT, launch("k_copy", "c0", "b3")], ("b3",), lambda x, w: (x.relu(),)),
])  # fmt: skip
def test_replays(monkeypatch: pytest.MonkeyPatch, steps: list[Step], results: tuple[str, ...], expected: Any) -> None:
    monkeypatch.setattr(cudagraph, "LARGE", 1)
    p, w = program(steps, *results), torch.randn(4, 4)
    runner = runner_of(p)
    if "c5" in results:  # what else leaves is not large
        monkeypatch.setattr(type(runner), "_large", property(lambda self: [1], lambda self, value: None), raising=False)
    kept = []
    for _ in range(8):
        x = torch.randn(4, 4)
        kept.append((x, run(runner, x, w)))
    for x, out in kept:
        for a, b in zip(out, expected(x, w), strict=True):
            assert torch.equal(a, b)
    assert runner.counts == {"plain": 2, "recordings": 1, "replays": 6}
    assert f"{int('c5' in results)} results copied" in runner.record.cudagraph
    late = {out[-1].data_ptr() for _, out in kept}
    assert len(late) == len(kept)


def test_without_a_builder_and_for_small_results_everything_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    for build in (True, False):
        monkeypatch.setattr(cudagraph, "LARGE", 1 << 20 if build else 1)
        runner = runner_of(program(PRODUCT, "v2"), build)
        x, w = torch.randn(4, 4), torch.randn(4, 4)
        for _ in range(4):
            (out,) = run(runner, x, w)
        assert torch.equal(out, torch.mm(x.relu(), w).view(2, 8)) and "1 results copied" in runner.record.cudagraph


def test_type_of_the_cut() -> None:
    assert isinstance(cut(program(PRODUCT, "v2"), [0]), Halves) and cut(program(PRODUCT, "v2", "a0"), [0, 1]) is None
