"""Tuning of generated kernels without a GPU: planted times, real plans, real cache, outputs by Triton's interpreter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fusionc.codegen import triton as codegen
from fusionc.config import Config
from fusionc.errors import CompileError, LoadError
from fusionc.ir.loop import Kernel
from fusionc.runtime import launch
from fusionc.runtime.device import known
from fusionc.schedule.plan import Plan
from fusionc.schedule.rules_triton import default_plan
from fusionc.targets import triton, tune_triton
from fusionc.targets.triton import Part
from tests.codegen import kernels
from tests.schedule.test_space import pointwise, rows

H200 = known("sm_90")
CPU = torch.device("cpu")


class Made:
    """A kernel that runs in the interpreter (or does nothing), with planted spills."""

    def __init__(self, source: str, part: Part, plan: Plan, spills: int = 0):
        self.source, self.part, self.plan, self.spills = source, part, plan, spills

    def compile(self) -> Any:
        return SimpleNamespace(spills=self.spills)

    def launch(self, data: Sequence[Any], sizes: dict[str, int]) -> None:
        launch.interpret(self.source, self.part.symbol, self.part.kernel, self.plan, data, sizes)


class FakeRig(tune_triton.Rig):
    """Times are planted by plan; everything else is real, on the CPU."""

    def __init__(self, times: dict[str, float], wrong: tuple[str, ...] = (), broken: tuple[str, ...] = ()):
        super().__init__(CPU, 50 << 20)
        self.times, self.wrong, self.broken = times, wrong, broken
        self.raced: list[list[str]] = []

    def here(self) -> Any:
        return torch.no_grad()

    def kernel(self, source: str, p: Part, plan: Plan) -> Any:
        if plan.to_json() in self.broken:
            raise RuntimeError("does not compile")
        return Made(source, p, plan)

    def race(self, e: Any, alive: Sequence[int], deadline: float) -> Any:
        self.raced.append([e.plans[i].to_json() for i in alive])
        ms = {i: self.times.get(e.plans[i].to_json(), 5.0) for i in alive}
        return sorted(alive, key=lambda i: (ms[i], i)), ms

    def agrees(self, e: Any, rule: Any, other: Any) -> bool:
        return other.plan.to_json() not in self.wrong


def part(kernel: Kernel, symbol: str = "k_0") -> Part:
    plan = default_plan(kernel, {}, H200)
    return Part(symbol, kernel, plan, codegen.render(kernel, plan, symbol))


@pytest.fixture
def cx(tmp_path: Path) -> Any:
    return SimpleNamespace(config=Config(cache=str(tmp_path / "cache")), hints={}, device=CPU, waiting=None)


def run(cx: Any, p: Part, rig: FakeRig, uses: dict[str, int] | None) -> tuple[tune_triton.Session, dict[str, Any]]:
    session = tune_triton.Session(cx, H200, uses, rig)
    session.consider([p])
    bound: dict[str, Any] = {p.symbol: Made(p.source, p, p.plan)}
    for job in session.jobs():
        try:
            job()
        except RuntimeError:
            pass
    session.measure(bound)
    return session, bound


def others(kernel: Kernel) -> list[str]:
    from fusionc.schedule import space

    return [p.to_json() for p in space.candidates(kernel, default_plan(kernel, {}, H200), {}, H200)[1:]]


def test_the_fastest_wins_and_the_next_process_measures_nothing(cx: Any) -> None:
    k = pointwise(1 << 26)
    best = others(k)[2]
    rig, p = FakeRig({best: 1.0}), part(k)
    session, bound = run(cx, p, rig, {"k_0": 1})
    assert p.plan.to_json() == best and bound["k_0"].plan == p.plan and p.source == codegen.render(k, p.plan, "k_0")
    assert len(rig.raced) == 1 and len(rig.raced[0]) == 4
    assert [(t, us) for t, _, us in session.tuning["k_0"]][3] == (best, 1000.0)
    for uses in (None, {"k_0": 1}):
        again, rig = part(k), FakeRig({})
        later, _ = run(cx, again, rig, uses)
        assert again.plan == p.plan and again.source == p.source and rig.raced == []
        assert later.tuning == session.tuning


def test_wrong_broken_and_spilling_candidates_lose_only_themselves(cx: Any) -> None:
    k = pointwise(1 << 26)
    wrong, broken, good = others(k)[:3]
    rig, p = FakeRig({wrong: 1.0, broken: 0.5, good: 2.0}, (wrong,), (broken,)), part(k)
    run(cx, p, rig, {"k_0": 1})
    assert p.plan.to_json() == good and broken not in rig.raced[0]


def test_small_kernels_and_off_are_left_alone(cx: Any) -> None:
    small, large = part(pointwise(1 << 12), "k_1"), part(pointwise(1 << 26), "k_0")
    session = tune_triton.Session(cx, H200, {"k_0": 1, "k_1": 1}, FakeRig({}))
    session.consider([small, large])
    assert [e.part.symbol for e in session.entries] == ["k_0"]
    middle = part(pointwise(1 << 21), "k_1")
    for uses, want in ((1, ["k_0"]), (24, ["k_0", "k_1"])):  # many uses add up
        session = tune_triton.Session(cx, H200, {"k_0": 1, "k_1": uses}, FakeRig({}))
        session.consider([middle, large])
        assert [e.part.symbol for e in session.entries] == want
    for config, uses in ((Config(tune="off", cache=cx.config.cache), {"k_0": 1}), (cx.config, None)):
        session = tune_triton.Session(SimpleNamespace(config=config, hints={}, device=CPU, waiting=None), H200, uses, FakeRig({}))  # type: ignore[arg-type]
        session.consider([large])
        assert session.entries == [] and session.jobs() == []


def test_nothing_is_measured_while_a_cuda_graph_is_recorded(cx: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    rig = FakeRig({})
    rig.device = torch.device("cuda", 0)
    session = tune_triton.Session(cx, H200, {"k_0": 1}, rig)
    session.consider([part(pointwise(1 << 26))])
    assert session.entries == [] and session.jobs() == []


def test_all_candidates_together_are_bounded(cx: Any) -> None:
    parts = [part(rows(1 << (10 + i), 4096), f"k_{i}") for i in range(8)]
    session = tune_triton.Session(cx, H200, {p.symbol: 9 for p in parts}, FakeRig({}))
    session.consider(parts)
    assert len(session.jobs()) == tune_triton.EFFORT["default"].total
    assert session.entries[0].part.symbol == "k_7"  # what costs most comes first


def test_a_part_without_time_is_not_tried_again(cx: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tune_triton.EFFORT, "default", tune_triton.Effort(8, 32, -1.0, 2.0, 20.0))
    k, rig = pointwise(1 << 26), FakeRig({})
    p = part(k)
    rule = p.plan
    run(cx, p, rig, {"k_0": 1})
    assert rig.raced == [] and p.plan == rule
    monkeypatch.undo()
    run(cx, part(k), rig, {"k_0": 1})
    assert rig.raced == []


def test_candidates_are_built_while_operators_kernels_take_turns_with_them(cx: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tune_triton.EFFORT, "default", tune_triton.Effort(8, 32, -1.0, 2.0, 20.0))
    for done in (False, True):
        cx.waiting = SimpleNamespace(done=done)
        session = tune_triton.Session(cx, H200, {"k_0": 1}, FakeRig({}))
        session.consider([part(pointwise(1 << 26))])
        jobs = session.jobs()
        for job in jobs:
            job()
        (entry,) = session.entries
        assert len(jobs) > 1 and all(k is not None for k in entry.kernels[1:]) != done


@pytest.mark.parametrize("plan", [{"xblock": 3}, {"warps": 5}, {"target": "cpp"}, {"xblock": "64"}, {"more": 1}])
def test_senseless_entries_are_misses(cx: Any, plan: dict[str, Any]) -> None:
    from dataclasses import asdict

    k = pointwise(1 << 26)
    p = part(k)
    rule, session = p.plan, tune_triton.Session(cx, H200, None, FakeRig({}))
    cache, key = session._cache(), session._key(k, p.plan, {})
    cache.put(tune_triton.KIND, key, {"plan": {**asdict(rule), "xblock": 256, "warps": 2}, "tried": []})
    session.consider([p])
    assert p.plan.xblock == 256 and session.rules == {"k_0": rule}
    session.restore(p)
    assert p.plan == rule and p.source == codegen.render(k, rule, "k_0")
    cache.put(tune_triton.KIND, key, {"plan": {**asdict(rule), **plan}, "tried": []})
    session = tune_triton.Session(cx, H200, None, FakeRig({}))
    session.consider([p])
    assert p.plan == rule and session.rules == {}


def test_the_real_check_tells_right_from_wrong() -> None:
    rig = tune_triton.Rig(CPU, 0)
    k = rows(4, 64)
    p = part(k)
    other = Plan("triton", xblock=2, rblock=16, warps=1)
    wrong = codegen.render(k, other, "k_0").replace("range(0, 64,", "range(0, 48,")
    e = tune_triton.Entry(p, {}, [p.plan, other], 1.0)
    rule = Made(p.source, p, p.plan)
    assert rig.agrees(e, rule, Made(codegen.render(k, other, "k_0"), p, other))  # type: ignore[arg-type]
    assert "48" in wrong and not rig.agrees(e, rule, Made(wrong, p, other))  # type: ignore[arg-type]


@pytest.mark.parametrize("case", kernels.cases(), ids=lambda c: c.name)
def test_data_fit_every_kernel(case: kernels.Case) -> None:
    rig = tune_triton.Rig(CPU, 0)
    plan = default_plan(case.kernel, case.sizes, H200)
    e = tune_triton.Entry(Part("k_0", case.kernel, plan, ""), case.sizes, [plan], 1.0)
    data = rig.data(e)
    rig.fill(e, data)
    for t, b in zip(data, case.kernel.buffers, strict=True):
        assert isinstance(t, torch.Tensor) != b.scalar
        if isinstance(t, torch.Tensor) and b.kind == "in" and not t.dtype.is_floating_point and t.dtype != torch.bool:
            assert not t.any()  # an index of any table
        if isinstance(t, torch.Tensor) and b.kind == "out" and t.dtype.is_floating_point:
            assert t.isnan().all()  # nothing that a kernel leaves out looks right


def test_same() -> None:
    x = torch.randn(100, generator=torch.Generator().manual_seed(0))
    x[3], x[4] = float("nan"), float("inf")
    assert tune_triton.same(x, x.clone()) and tune_triton.same(x * (1 + 1e-6), x)
    for i, v in ((0, 9.0), (0, float("nan")), (3, 0.0), (4, float("-inf"))):
        y = x.clone()
        y[i] = v
        assert not tune_triton.same(y, x)
    i = torch.arange(4)
    assert tune_triton.same(i, i.clone()) and not tune_triton.same(i, i + 1)


def test_a_kernel_that_could_not_be_loaded_is_tried_once_more(cx: Any) -> None:
    parts = [part(pointwise(64), symbol) for symbol in ("k_0", "k_1", "k_2")]
    wrong, tried = CompileError("k_1"), []
    bound: dict[str, Any] = {p.symbol: SimpleNamespace(compile=lambda p=p: tried.append(p.symbol) or "built") for p in parts}
    results: list[Any] = [LoadError("k_0"), wrong, "built before"]
    cx.record = SimpleNamespace(timings={})
    triton._settle(cx, tune_triton.Session(cx, H200, None, FakeRig({})), parts, bound, results)
    assert results == ["built", wrong, "built before"] and tried == ["k_0"]
