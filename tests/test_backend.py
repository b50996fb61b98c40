"""Graphs of one training step: the backward graph's kernels compile beside the forward graph's."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from fusionc import backend, program_cache, record
from fusionc.errors import FallbackWarning
from fusionc.graph.edit import copy_module
from fusionc.partition import partition
from fusionc.targets import triton


def norm(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.layer_norm(x, x.shape[-1:], w).sin()


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def check(f: Callable[..., torch.Tensor] = norm, rows: int = 8, dynamic: bool = False, **options: Any) -> None:
    """Result and gradients are eager's.  (For a GPU that is not there, kernels are compiled and ATen runs.)"""
    torch.manual_seed(0)
    inputs = torch.randn(rows, 32, requires_grad=True), torch.randn(32, requires_grad=True)
    got = torch.compile(f, backend="fusionc", dynamic=dynamic, options={"target": "sm_90", "verify": False, **options})(*inputs)
    want = f(*inputs)
    torch.testing.assert_close(got, want)
    for a, b in zip(torch.autograd.grad(got.sum(), inputs), torch.autograd.grad(want.sum(), inputs), strict=True):
        torch.testing.assert_close(a, b)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """When kernels start to compile, and are asked for."""
    found: list[str] = []
    start = triton.start

    def watched(cx: Any, *more: Any) -> Any:
        found.append(f"start {cx.record.stage}")
        finish = start(cx, *more)

        def end() -> Any:
            found.append(f"end {cx.record.stage}")
            return finish()

        return end

    monkeypatch.setattr(triton, "start", watched)
    return found


@pytest.mark.cross
@pytest.mark.parametrize("dynamic", [False, True])
def test_both_graphs_compile_side_by_side(dynamic: bool, said: list[str]) -> None:
    with record.collect() as graphs:
        check(dynamic=dynamic)
    assert said == ["start forward", "start backward", "end forward", "end backward"]
    assert [g.stage for g in graphs] == ["forward", "backward"] and all(g.kernels for g in graphs)
    assert all(0 < g.timings["compile"] <= g.timings["total"] for g in graphs)


@pytest.mark.cross
def test_settings_of_the_thread_that_runs_backward_do_not_matter(said: list[str]) -> None:
    x, w = torch.randn(8, 32, requires_grad=True), torch.randn(32, requires_grad=True)
    with torch.autocast("cpu", torch.float16):
        got = torch.compile(norm, backend="fusionc", options={"target": "sm_90", "verify": False})(x, w)
        want = norm(x, w)
    torch.testing.assert_close(torch.autograd.grad(got.sum(), x), torch.autograd.grad(want.sum(), x))
    assert said == ["start forward", "start backward", "end forward", "end backward"]


@pytest.mark.cross
def test_another_backward_graph_is_compiled_anew(said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def other(self: Any, *args: Any, **more: Any) -> Any:
        forward, gm = partition(*args, **more)
        self._gm = copy_module(gm)
        node = self._gm.graph.find_nodes(op="call_function", target=torch.ops.aten.mul.Tensor)[0]
        node.target = torch.ops.aten.div.Tensor
        return forward, gm

    monkeypatch.setattr(backend._Backward, "partition", other)
    check()
    assert said == ["start forward", "start backward", "end forward", "start backward", "end backward"]


@pytest.mark.cross
@pytest.mark.parametrize("strict", [False, True])
def test_trouble_with_what_nobody_asked_for_is_nobodys(strict: bool, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    start, failing = triton.start, [True]

    def fails(cx: Any, *more: Any) -> Any:
        if cx.record.stage == "backward" and failing:
            failing.clear()
            raise MemoryError
        return start(cx, *more)

    monkeypatch.setattr(triton, "start", fails)
    with record.collect() as graphs, warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        check(strict=strict)
    assert not failing and [g.stage for g in graphs] == ["forward", "backward"] and not any(g.fallbacks for g in graphs)


@pytest.mark.parametrize("cause", ["a cpu", "no key", "no key of the backward graph", "the forward graph failed"])
def test_nothing_is_begun_without_reason(cause: str, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[Any] = []
    begin = backend._Backward.begin

    def watched(self: Any, forward: Any) -> None:
        begin(self, forward)
        begun.append(self._begun)

    monkeypatch.setattr(backend._Backward, "begin", watched)
    if cause == "the forward graph failed":
        monkeypatch.setattr(triton, "start", lambda *args: 1 / 0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FallbackWarning)
            check()
        assert begun == []
        return
    if cause == "no key of the backward graph":
        make_key = program_cache.make_key
        monkeypatch.setattr(program_cache, "make_key", lambda gm, config, stage, *more: 1 / 0 if stage == "backward" else
                            make_key(gm, config, stage, *more))  # fmt: skip
    check(**{"a cpu": {"target": "auto"}, "no key": {"cache": False}}.get(cause, {}))
    assert begun == [None]


def test_what_was_begun_is_stored_as_any_other(fresh_cache: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, for a graph for a GPU that is not there is not stored."""
    monkeypatch.setattr(backend, "_ALONE", ())
    taken: list[bool] = []
    take_over = backend._Backward.take_over

    def watched(self: Any, graph: Any) -> None:
        before = graph.steps
        take_over(self, graph)
        taken.append(graph.steps is not before)

    monkeypatch.setattr(backend._Backward, "take_over", watched)
    for _ in range(2):
        torch._dynamo.reset()
        with record.collect() as graphs:
            check(target="cpp")
    assert taken == [True], "once; the second time both come from the cache, without AOTAutograd"
    assert [g.cache for g in graphs] == ["hit, without AOTAutograd"] * 2
