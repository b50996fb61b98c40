"""The race and the memory of ``choose``, with planted times: no GPU and no real clock."""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fusionc.runtime import tune

CPU = torch.device("cpu")


class Planted:
    """Times with noise around planted ones; counts the samples that each candidate cost."""

    def __init__(self, ms: Sequence[float | None], noise: float = 0.0, seed: int = 0):
        self.ms, self.noise, self.random, self.taken = ms, noise, random.Random(seed), [0] * len(ms)

    def __call__(self, candidates: Sequence[int], n: int) -> dict[int, list[float]]:
        out: dict[int, list[float]] = {}
        for c in candidates:
            base = self.ms[c]
            self.taken[c] += n
            out[c] = [] if base is None else [base * (1 + self.noise * self.random.random()) for _ in range(n)]
        return out

    def sampler(self, launches: Sequence[Callable[[], Any]], device: torch.device) -> tune.Sampler:
        return self


def run_race(planted: Planted, deadline: float = 1.0) -> list[int]:
    order, _ = tune.race(range(len(planted.ms)), planted, deadline=deadline, clock=lambda: 0.0)
    return order


@pytest.fixture(autouse=True)
def stand_ins(tmp_path: Path) -> Iterator[None]:
    tune.forget()
    tune.configure("default", str(tmp_path / "cache"))
    yield
    tune.forget()


@pytest.fixture
def measurable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "_possible", lambda device: True)


@pytest.mark.parametrize("seed", range(20))
def test_race_finds_the_fastest_through_noise(seed: int) -> None:
    assert run_race(Planted([1.0, 0.9, 0.7, 0.95, 2.0, 0.8], 0.1, seed))[0] == 2


@pytest.mark.parametrize("seed", range(20))
def test_noise_does_not_replace_the_first(seed: int) -> None:
    assert run_race(Planted([1.0, 0.99, 1.0, 0.985], 0.02, seed))[0] == 0


def test_hopeless_ones_cost_three_samples_and_close_ones_the_most() -> None:
    planted = Planted([1.0, 5.0, 0.9, 0.901], 0.02)
    run_race(planted)
    assert planted.taken[1] == 3 and planted.taken[2] == 39 and planted.taken[0] <= 12


def test_race_stops_at_the_deadline_and_survives_candidates_without_samples() -> None:
    planted = Planted([1.0, None, 0.9])
    assert run_race(planted, deadline=-1.0) == [2, 0]
    assert planted.taken == [3, 3, 3]
    assert run_race(Planted([None, None])) == []


def choose(key: str, candidates: list[Any], planted: Planted, **more: Any) -> Any:
    return tune.choose(key, candidates, more.pop("run", lambda c: None), device=CPU, sampler=planted.sampler, **more)


def test_winner_is_remembered_in_the_process_and_on_disk(measurable: None, tmp_path: Path) -> None:
    planted = Planted([1.0, 0.5, 0.7])
    assert choose("k", ["a", "b", "c"], planted) == "b"
    spent = sum(planted.taken)
    assert choose("k", ["a", "b", "c"], planted) == "b" and sum(planted.taken) == spent
    assert [(o.key, o.winner) for o in tune.history()] == [("k", 1)]
    tune.forget()
    tune.configure(cache=str(tmp_path / "cache"))
    assert choose("k", ["a", "b", "c"], planted) == "b" and sum(planted.taken) == spent
    assert (
        choose("k", ["a", "b", "d"], planted) == "b" and sum(planted.taken) > spent
    )  # other candidates: measured anew


def test_only_the_likeliest_are_tried(measurable: None) -> None:
    planted = Planted([1.0, 0.8, 0.5])
    assert choose("k", ["a", "b", "c"], planted, most=2) == "b" and planted.taken[2] == 0
    tune._memory.clear()
    assert choose("k", ["a", "b", "c"], Planted([0.5, 0.8, 1.0]), most=2) == "b", "from the disk"
    tune._memory.clear()
    assert choose("k", ["a", "b", "c"], planted, most=3) == "c", "another question"
    assert tune.history()[0].ms[2] is None
    tune.configure("max")
    assert choose("l", ["a", "b", "c"], planted, most=2) == "c"


@pytest.mark.parametrize("trouble", ["wrong", "raises", "does not build"])
def test_the_others_are_tried_where_the_likeliest_are_of_no_use(measurable: None, trouble: str) -> None:
    asked: list[str] = []

    def run(c: str) -> None:
        asked.append(c)
        if trouble == "raises" and c in "ab":
            raise RuntimeError("no")

    def prepare(c: str) -> None:
        if trouble == "does not build" and c in "ab":
            raise RuntimeError("no")

    found = choose("k", ["a", "b", "c", "d"], Planted([1.0, 0.8, 0.7, 0.4]), run=run, prepare=prepare, most=2,
                   check=lambda c: trouble != "wrong" or c in "cd")  # fmt: skip
    (outcome,) = tune.history()
    assert found == "d" and outcome.proven and set(outcome.failed) == {0, 1}
    assert asked[-1] == "d" and ("a" in asked) == (trouble != "does not build")


def test_what_could_not_be_looked_at_comes_before_what_is_less_likely(measurable: None) -> None:
    def check(c: str) -> bool:
        raise MemoryError

    assert choose("k", ["a", "b", "c"], Planted([1.0, 0.8, 0.5]), check=check, most=2) == "b"


@pytest.mark.parametrize(
    "damage", ['{"index":7,"name":"b"}', '{"index":true,"name":"b"}', '{"index":0,"name":"b"}', "{}"]
)
def test_senseless_entries_are_misses(measurable: None, damage: str) -> None:
    cache = tune._cache()
    key = tune._entry_key("k", ["'a'", "'b'"], 2, CPU)
    assert key is not None
    cache.put(tune.KIND, key, json.loads(damage))
    planted = Planted([1.0, 0.5])
    assert choose("k", ["a", "b"], planted) == "b" and sum(planted.taken) > 0


def test_failing_candidates_lose_only_themselves(measurable: None) -> None:
    def run(c: str) -> None:
        if c == "raises":
            raise RuntimeError("out of resources\nsecond line")

    planted = Planted([1.0, 0.1, 0.2, 0.5])
    found = choose("k", ["a", "raises", "wrong", "good"], planted, run=run, check=lambda c: c != "wrong")
    assert found == "good"
    assert tune.history()[0].failed == {1: "RuntimeError: out of resources", 2: "gives other results"}


def test_all_failing_gives_the_first(measurable: None) -> None:
    def run(c: str) -> None:
        raise RuntimeError(c)

    assert choose("k", ["a", "b"], Planted([1.0, 0.5]), run=run) == "a"
    assert choose("l", ["a", "b"], Planted([1.0, 0.5]), check=lambda c: False) == "a"


def test_what_nothing_proves_is_not_kept(measurable: None) -> None:
    def run(c: str) -> None:
        if c == "raises":
            raise RuntimeError(c)

    found = choose("k", ["raises", "a", "b"], Planted([1.0, 1.0, 0.5]), run=run, check=lambda c: False)
    assert found == "a", "the first that runs"
    key = tune._entry_key("k", ["'raises'", "'a'", "'b'"], 3, CPU)
    assert key is not None and tune._cache().get(tune.KIND, key) is None


def test_a_check_that_cannot_run_leaves_the_fastest(measurable: None) -> None:
    def check(c: str) -> bool:
        if c == "b":
            return False
        raise RuntimeError("no memory")

    assert choose("k", ["a", "b", "c"], Planted([1.0, 0.2, 0.5]), check=check) == "c"


def test_values_to_check_by() -> None:
    x = torch.full((2, 3, 4, 5), float("nan"), dtype=torch.float16).to(memory_format=torch.channels_last)
    before = torch.get_rng_state()
    y, none, z = tune.stand_ins(x, None, torch.zeros(7))
    assert y.dtype == x.dtype and y.stride() == x.stride() and none is None and z.std() > 0.1
    for t in (torch.zeros(64, 256)[:, :96], torch.zeros(8, 1, 64).expand(8, 4, 64), torch.zeros(3, 0, 2)):
        assert tune.stand_ins(t)[0].stride() == t.stride() and tune.stand_ins(t)[0].shape == t.shape
    assert torch.equal(torch.get_rng_state(), before) and torch.equal(tune.stand_ins(x)[0], y)
    assert tune.agree(y, y.float() * 1.01) and not tune.agree(y, y * 1.05) and not tune.agree(x, y)


def test_preparation_failures_exclude(measurable: None) -> None:
    def prepare(c: str) -> None:
        if c == "b":
            raise ValueError("does not compile")

    assert choose("k", ["a", "b", "c"], Planted([1.0, 0.1, 0.5]), prepare=prepare) == "c"


def test_compiling_takes_nothing_of_the_time_for_measuring(measurable: None, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(tune, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def prepare(c: str) -> None:
        now[0] += 100.0

    assert choose("k", ["a", "b"], Planted([1.0, 0.5]), prepare=prepare, seconds=2.0) == "b"


def test_a_broken_sampler_costs_a_warning(measurable: None) -> None:
    def broken(launches: Any, device: torch.device) -> tune.Sampler:
        raise RuntimeError("no events")

    with pytest.warns(Warning, match="could not compare"):
        assert tune.choose("broken", ["a", "b"], lambda c: None, device=CPU, sampler=broken) == "a"


def test_no_time_left_keeps_the_first(measurable: None) -> None:
    started: list[str] = []
    planted = Planted([1.0, 0.1])
    assert choose("k", ["a", "b"], planted, run=started.append, seconds=-1.0) == "a"
    assert started == ["a"] and tune.history()[0].failed == {1: "no time left"}


def test_nothing_is_measured_where_it_cannot_be(measurable: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(c: str) -> None:
        raise AssertionError("must not run")

    planted = Planted([1.0, 0.5])
    monkeypatch.setattr(tune, "_capturing", lambda device: True)
    assert choose("k", ["a", "b"], planted, run=run) == "a"
    monkeypatch.setattr(tune, "_capturing", lambda device: False)
    assert choose("k", ["a"], planted, run=run) == "a"
    tune.configure("off")
    assert choose("k", ["a", "b"], planted, run=run) == "a"
    tune.configure("default")
    assert choose("k", ["a", "b"], planted) == "b"  # none of the above was remembered


def test_possible_only_with_real_cuda_tensors() -> None:
    cuda = torch.device("cuda", 0)
    assert tune._possible(cuda) and not tune._possible(CPU)
    with FakeTensorMode():
        assert not tune._possible(cuda)


def test_candidates_with_addresses_stay_in_memory(measurable: None) -> None:
    objects = [object(), object()]
    planted = Planted([1.0, 0.5])
    assert choose("k", objects, planted) is objects[1]
    assert tune._cache().entries(tune.KIND) == []


def test_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    tune.forget()
    for text, want in (("off", "off"), ("0", "off"), ("max", "max"), ("", "default"), ("nonsense", "default")):
        monkeypatch.setenv("FUSIONC_TUNE", text)
        assert tune.level() == want
    tune.configure("max")
    monkeypatch.setenv("FUSIONC_TUNE", "off")
    assert tune.level() == "max"
    with pytest.raises(ValueError, match="tuning level"):
        tune.configure("loud")


class Machine:
    """A host and a GPU in virtual seconds: what is queued runs in order, once the host has queued it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.host = self.gpu = 0.0
        self.slept: list[float] = []
        machine = self

        class Event:
            def __init__(self, enable_timing: bool = False) -> None:
                self.at = 0.0

            def record(self) -> None:
                machine.run(1e-6, 0.0)
                self.at = machine.gpu

            def query(self) -> bool:
                return self.at <= machine.host

            def elapsed_time(self, other: Any) -> float:
                return 1e3 * (other.at - self.at)

        def sleep(cycles: int) -> None:
            self.slept.append(cycles / 2e9)
            self.run(1e-6, cycles / 2e9)

        def synchronize(device: torch.device) -> None:
            self.host = max(self.host, self.gpu)

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "_sleep", sleep)
        monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
        monkeypatch.setattr(tune.time, "perf_counter", lambda: self.host)

    def run(self, host: float, gpu: float) -> None:
        self.host += host
        self.gpu = max(self.gpu, self.host) + gpu


@pytest.mark.parametrize("slow", [5e-6, 40e-6, 300e-6])
def test_samples_are_the_gpus_time_however_slow_the_host(monkeypatch: pytest.MonkeyPatch, slow: float) -> None:
    machine = Machine(monkeypatch)
    launches = [lambda: machine.run(slow, 6e-6), lambda: machine.run(3 * slow, 5e-6)]
    sample = tune.cuda_sampler(launches, CPU, cold=False)
    for n in (3, 9, 27):
        for c, times in sample([0, 1], n).items():
            assert len(times) == n
            # (between the events the host takes a microsecond for the second one)
            assert statistics.median(times) == pytest.approx([6e-3, 5e-3][c], abs=1e-6), (n, c)
    assert max(machine.slept) <= 0.03 and len(machine.slept) <= 8


def test_a_slow_first_call_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)
    pauses = iter([0.1])
    sample = tune.cuda_sampler([lambda: machine.run(next(pauses, 1e-5), 5e-6)], CPU, cold=False)
    for n in (3, 9, 27):
        assert statistics.median(sample([0], n)[0]) == pytest.approx(5e-3, abs=1e-6)
    assert sum(machine.slept) < 0.1, machine.slept


def test_a_host_that_is_never_ahead_and_a_launch_that_fails_end(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)

    def waits() -> None:
        torch.cuda.synchronize(CPU)
        machine.run(1e-6, 5e-6)

    def fails() -> None:
        raise RuntimeError("no")

    found = tune.cuda_sampler([waits, fails], CPU, cold=False)([0, 1], 200)
    assert len(found[0]) == 200 and found[1] == []
    assert sum(machine.slept) < 0.1 and len(machine.slept) <= 8
