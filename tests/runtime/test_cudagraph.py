"""The runner's logic with a fake device on the CPU: what is recorded, copied, compared, dropped and refused."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fusionc.codegen.program import Alloc, Call, Carve, Launch, Program, View, Wrote
from fusionc.config import Config
from fusionc.errors import FallbackWarning
from fusionc.ir.expr import index
from fusionc.record import CallRecord, GraphRecord
from fusionc.runtime import cudagraph
from fusionc.runtime.cudagraph import Runner
from fusionc.runtime.cudagraph_device import same_pointers
from fusionc.runtime.cudagraph_rules import dearer, obstacle, wanted, written_arguments

CPU = torch.device("cpu")


class FakeGraph:
    def __init__(self, call: Callable[..., Any], args: list[Any], results: tuple[Any, ...]) -> None:
        self.call, self.args, self.results = call, args, results

    def replay(self) -> None:
        for old, new in zip(self.results, self.call(list(self.args)), strict=True):
            if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                old.untyped_storage().copy_(new.untyped_storage())  # whole, also where elements overlap


class FakeTimer:
    def __init__(self, times: tuple[float, float] | None) -> None:
        self.times = times

    def start(self) -> None: ...
    def stop(self) -> None: ...

    def micros(self) -> tuple[float, float] | None:
        return self.times


class FakeGpu:
    """Addresses are those of CPU tensors; a graph is the call itself, run again on the tensors it was recorded with."""

    kind, index, device = "cpu", 0, CPU

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.same = same_pointers
        self.capturing = self.fail = False
        self.times: list[tuple[float, float] | None] = []
        self.held = self.growth = self.synchronized = 0

    def busy(self) -> bool:
        return self.capturing

    def order(self) -> None: ...

    def reserved(self) -> int:
        return self.held

    def synchronize(self) -> None:
        self.synchronized += 1

    def timer(self) -> FakeTimer:
        return FakeTimer(self.times.pop(0) if self.times else (1000.0, 1000.0))

    def record(self, call: Callable[..., Any], args: list[Any]) -> tuple[Any, Any]:
        if self.fail:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.held += self.growth
        mine, saved = list(args), [a.clone() for a in args]
        results = call(list(args))
        for a, s in zip(mine, saved, strict=True):  # nothing is executed while recording
            if not torch.equal(a, s):
                a.copy_(s)
        for r in results:
            if isinstance(r, torch.Tensor) and not any(r is a or a.data_ptr() == r.data_ptr() for a in mine):
                r.zero_()
        return FakeGraph(call, mine, results), results


def runner_of(f: Callable[..., tuple[Any, ...]], count: int, auto: bool = False) -> tuple[Runner, FakeGpu]:
    program = Program(tuple(f"a{k}" for k in range(count)))
    program.steps.append(Launch("k_0", (), (), "triton"))
    gpu = FakeGpu()

    def call(args: list[Any]) -> Any:
        mine = list(args)
        args.clear()
        with torch.no_grad():
            return f(*mine)

    return Runner(call, program, GraphRecord("g"), auto, gpu), gpu


def run(runner: Runner, *args: Any) -> Any:
    given = list(args)
    out = runner(given)
    assert given == []
    return out


def test_results_stay_and_inputs_may_change() -> None:
    w = torch.randn(4, 4)
    runner, _ = runner_of(lambda x, w: (x @ w, x + 1), 2)
    kept = []
    for _ in range(8):
        x = torch.randn(3, 4)
        kept.append((run(runner, x, w), x))
    for (a, b), x in kept:
        assert torch.equal(a, x @ w) and torch.equal(b, x + 1)
    assert runner.counts == {"plain": 2, "recordings": 1, "replays": 6}
    assert "1 inputs in place" in runner.record.cudagraph and "1 copied" in runner.record.cudagraph


def test_weights_updated_in_place_are_seen_and_replaced_ones_recorded_anew() -> None:
    w = torch.randn(4, 4)
    x = torch.randn(3, 4)
    runner, _ = runner_of(lambda x, w: (x @ w,), 2)
    for _ in range(4):
        run(runner, x, w)
    w.mul_(2)
    assert torch.equal(run(runner, x, w)[0], x @ w)
    other = torch.randn(1024, 1024)[:4, :4]
    assert torch.equal(run(runner, x, other)[0], x @ other)
    w.data = torch.randn(4, 4)
    assert torch.equal(run(runner, x, w)[0], x @ w)


def test_written_inputs_are_never_copied() -> None:
    def step(x: torch.Tensor, cache: torch.Tensor) -> tuple[Any, ...]:
        cache.add_(x)
        return (cache.sum(),)

    runner, _ = runner_of(step, 2)
    caches = [torch.zeros(4), torch.zeros(4)]
    want = [0.0, 0.0]
    for n in range(24):
        which = n // 12
        want[which] += 4 * n
        version = caches[which]._version
        assert run(runner, torch.full((4,), float(n)), caches[which])[0].item() == want[which]
        assert caches[which]._version > version
    assert runner.counts["recordings"] == 2 and runner._written == {1}
    run(runner, torch.ones(4), caches[0])
    assert runner.counts["recordings"] == 2, "the first recording is still there"


def test_aliases_of_inputs_and_among_results() -> None:
    constant = torch.arange(3.0)

    def f(x: torch.Tensor, w: torch.Tensor) -> tuple[Any, ...]:
        y = x * w
        return (w, x[1:], y, y[0], None, 3, constant, x.new_empty(0), x.sum(1, keepdim=True).expand(3, 4))

    runner, _ = runner_of(f, 2)
    runner._constants = [constant]
    w = torch.randn(3, 4)
    for _ in range(5):
        x = torch.randn(3, 4)
        out = run(runner, x, w)
        assert out[0] is w and out[1].data_ptr() == x[1:].data_ptr() and out[6] is constant
        assert torch.equal(out[2], x * w) and out[3].data_ptr() == out[2].data_ptr()
        assert out[4] is None and out[5] == 3 and out[7].numel() == 0
        assert out[8].stride() == (1, 0) and torch.equal(out[8], x.sum(1, keepdim=True).expand(3, 4))
    assert runner.counts["recordings"] == 1


def test_a_small_input_that_begins_to_move_is_copied() -> None:
    runner, _ = runner_of(lambda x: (x + 1,), 1)
    x = torch.zeros(4)
    for _ in range(3):
        run(runner, x)
    kept = [torch.full((4,), float(n)) for n in range(20)]
    for x in kept:
        assert torch.equal(run(runner, x)[0], x + 1)
    assert runner.counts["recordings"] == 2 and runner.last is not None and runner.last.moved == [0]


def test_recordings_are_bounded() -> None:
    big = [torch.zeros(1 << 19) for _ in range(6)]
    runner, _ = runner_of(lambda x: (x[:4] + 1,), 1)
    for x in big[:1] * 3:
        run(runner, x)
    for x in big:
        for _ in range(cudagraph.FEW + 1):
            run(runner, x)
    assert len(runner.kept) <= cudagraph.LIMIT and not runner.off
    runner, _ = runner_of(lambda x, c: (c.add_(x)[:1] + 0,), 2)
    one, moving = torch.ones(1), [torch.zeros(4) for _ in range(40)]
    with pytest.warns(FallbackWarning, match="move too often"):
        for c in moving:
            assert run(runner, one, c)[0].item() == 1
    assert runner.off and not runner.kept and runner.counts["recordings"] <= cudagraph.WASTED + 1


def test_failed_recording_runs_plainly() -> None:
    runner, gpu = runner_of(lambda x: (x + 1,), 1)
    gpu.fail = True
    x = torch.zeros(4)
    with pytest.warns(FallbackWarning, match="recording failed"):
        for _ in range(4):
            assert torch.equal(run(runner, x)[0], x + 1)
    assert runner.record.cudagraph.startswith("not used: recording failed: RuntimeError")
    assert runner.counts["recordings"] == 0


def test_steps_aside_for_a_recording_of_the_user() -> None:
    runner, gpu = runner_of(lambda x: (x + 1,), 1)
    x = torch.zeros(4)
    for _ in range(4):
        run(runner, x)
    gpu.capturing = True
    run(runner, x)
    assert runner.counts["replays"] == 2


def test_refused_inputs() -> None:
    for bad, words in ((3, "number"), (torch.zeros(2).to_sparse(), "plain tensor"), (torch.zeros(2, device="meta"), "lies on")):
        runner, _ = runner_of(lambda x: (1,), 1)
        with pytest.warns(FallbackWarning):
            assert run(runner, bad) == (1,)
        assert words in runner.off


def test_auto_measures() -> None:
    x = torch.zeros(4)

    def after(times: list[tuple[float, float] | None], calls: int = 12) -> Runner:
        runner, gpu = runner_of(lambda x: (x + 1,), 1, auto=True)
        gpu.times = times
        for _ in range(calls):
            assert torch.equal(run(runner, x)[0], x + 1)
        return runner

    assert "is what takes the time" in after([(100, 500), (100, 500)]).off
    assert "nothing" not in after([(10, 10), (10, 10)]).record.cudagraph
    assert "costs the host only" in after([(10, 10), (10, 10)]).off
    fast = after([(500, 510), (500, 510), (50, 60), (50, 60), (50, 60)])
    assert not fast.off and fast.counts["recordings"] == 1 and "60 µs a call, 510 µs without" in fast.record.cudagraph
    slow = after([(500, 510)] * 5)
    assert slow.off.startswith("measured:") and not slow.kept
    assert after([None] * 20).counts["recordings"] == 0


def test_auto_does_not_copy_much_or_take_much() -> None:
    runner, gpu = runner_of(lambda x: (x + 1,), 1, auto=True)
    gpu.times = [(100, 100)] * 9
    big = [torch.zeros(1 << 22) for _ in range(8)]
    for x in big:
        run(runner, x)
    assert "copying inputs and results" in runner.off
    runner, gpu = runner_of(lambda x: (x + 1,), 1, auto=True)
    gpu.growth = cudagraph.AUTO_POOL + 1
    for _ in range(8):
        run(runner, torch.zeros(4))
    assert "too much memory" in runner.off


def test_another_thread_warms_up_first() -> None:
    runner, _ = runner_of(lambda x: (x + 1,), 1)
    x = torch.zeros(4)
    run(runner, x), run(runner, x)
    seen: list[int] = []

    def work() -> None:
        for _ in range(2):
            run(runner, x)
            seen.append(runner.counts["recordings"])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [0, 1]


def test_many_threads() -> None:
    w = torch.randn(8, 8)
    runner, _ = runner_of(lambda x, w: (x @ w,), 2)
    wrong: list[str] = []

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(50):
            x = torch.randn(4, 8, generator=generator)
            if not torch.equal(run(runner, x, w)[0], x @ w):
                wrong.append(f"{seed}")

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong and runner.counts["recordings"] <= 2


def test_errors_of_the_program_pass_through() -> None:
    def fail(x: torch.Tensor) -> tuple[Any, ...]:
        raise IndexError("out of range")

    runner, _ = runner_of(fail, 1)
    with pytest.raises(IndexError, match="out of range"):
        runner([torch.zeros(1)])


def test_after_fork_nothing_is_replayed() -> None:
    runner, _ = runner_of(lambda x: (x + 1,), 1)
    x = torch.zeros(4)
    for _ in range(4):
        run(runner, x)
    cudagraph._after_fork()
    replays = runner.counts["replays"]
    assert torch.equal(run(runner, x)[0], x + 1) and runner.counts["replays"] == replays
    cudagraph._leaked.clear()


def test_options() -> None:
    cuda = torch.device("cuda", 0)
    assert wanted(Config(), "inference", CPU, "cpp") == ("no", "")
    assert wanted(Config(), "inference", cuda, "triton")[0] == "auto"
    for config in (Config(cudagraphs=True), Config(mode="reduce-overhead"), Config(mode="max-autotune")):
        assert wanted(config, "inference", cuda, "triton")[0] == "yes"
        assert "training" in wanted(config, "backward", cuda, "triton")[1]
    assert wanted(Config(cudagraphs=False, mode="reduce-overhead"), "inference", cuda, "triton")[0] == "no"


def test_obstacles() -> None:
    def why(op: str = "aten.mm.default", auto: bool = False, **fields: Any) -> str:
        p = Program(("a0",), **fields)
        p.steps.append(Launch("k_0", ("a0",), (), "triton", scalars=(fields == {} and op == "scalar",)))
        return obstacle(p, GraphRecord("g", calls=[CallRecord("n", op)]), auto)

    assert why() == "" and why(auto=True) == ""
    assert "dynamic" in why(sizes=(("s0", "a0.size(0)"),))
    assert "CPU" in why("scalar")
    assert "waits" in why("aten.nonzero.default") and "waits" in why("aten._local_scalar_dense.default")
    assert "cpu" in why(constants={"device": CPU})
    assert "not one of torch's" in why("mine.op.default", auto=True) and why("mine.op.default") == ""
    empty = Program(("a0",))
    assert "nothing is launched" in obstacle(empty, GraphRecord("g"), False)
    empty.steps.append(Alloc("b1", (index(2),), (index(1),), torch.float32, CPU))
    assert "on the CPU" in obstacle(empty, GraphRecord("g"), False)
    carved = Program(("a0",), steps=[Carve(("b1", "b2"), (8,), (4, 4), (), torch.float32, CPU)])
    assert "on the CPU" in obstacle(carved, GraphRecord("g"), False)


def test_many_results_and_few_launches_run_plainly() -> None:
    assert dearer(1, 1, 1) == "" and dearer(64, 64, 20) == ""
    assert dearer(1, 0, 64) == "copying 0 inputs and 64 results costs more than 1 launches"
    assert dearer(1, 64, 1) != ""
    runner, gpu = runner_of(lambda x: tuple(x + k for k in range(4)), 1)
    runner._own = 4
    x = torch.randn(3)
    for _ in range(5):  # without a warning: the options only said that graphs are welcome
        assert torch.equal(run(runner, x)[3], x + 3)
    assert runner.counts["recordings"] == 0 and "4 results" in runner.record.cudagraph


def test_summary_says_what_became_of_it() -> None:
    from fusionc.dump import summary

    assert "CUDA graph: not used: sizes are dynamic" in summary([GraphRecord("g", cudagraph="not used: sizes are dynamic")])
    assert "CUDA graph" not in summary([GraphRecord("g")])


def test_written_arguments_are_found_through_views() -> None:
    copy_, mm = torch.ops.aten.copy_.default, torch.ops.aten.mm.default
    p = Program(("a0", "a1", "a2"), constants={"op_copy_": copy_._op, "op_mm": mm._op})
    p.steps += [
        View("v1", "a1", (index(2),), (index(1),), index(0)),
        Call("c2", "op_mm", "a0, a2"),
        Call("c3", "op_copy_", "v1, c2"),
    ]
    record = GraphRecord("g", calls=[CallRecord("x", str(copy_)), CallRecord("y", str(mm))])
    assert written_arguments(p, record) == {1}
    p.steps.append(Wrote(("a2",)))
    assert written_arguments(p, record) == {1, 2}


def test_under_torch_compile(monkeypatch: pytest.MonkeyPatch, fresh_cache: Any) -> None:
    """Dynamo and AOTAutograd hand over the same parameter objects at each call: they are recorded in place."""
    made: list[Runner] = []

    def wrap(call: Any, program: Program, record: GraphRecord, *rest: Any) -> Any:
        made.append(Runner(call, program, record, False, FakeGpu()))
        return lambda args: made[-1](args)

    monkeypatch.setattr(cudagraph, "wrap", wrap)
    torch._dynamo.reset()
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 8)).eval()
    compiled = torch.compile(model, backend="fusionc", options={"cache": False}, dynamic=False)
    with torch.no_grad():
        outs = []
        for _ in range(6):
            x = torch.randn(2, 8)
            outs.append((compiled(x), model(x)))
        model[0].weight.mul_(2)
        outs.append((compiled(x), model(x)))
    for got, want in outs:
        torch.testing.assert_close(got, want)
    (runner,) = made
    assert runner.last is not None and len(runner.last.fixed) == 4 and len(runner.last.moved) == 1
