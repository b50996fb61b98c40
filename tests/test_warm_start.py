"""The second start: Dynamo's graph finds its Programs without AOTAutograd, and the answers stay those of eager."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from fusionc import program_cache, warm
from fusionc.record import collect


class Net(torch.nn.Module):
    """Sibling matmuls (derived weights), a norm and an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(16)
        self.q, self.k, self.out = torch.nn.Linear(16, 24), torch.nn.Linear(16, 8), torch.nn.Linear(24, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        return x + self.out(torch.nn.functional.gelu(self.q(y)) * self.k(y).mean(-1, keepdim=True))


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """`start(model, **torch.compile's arguments)`: compile as a new process would, on one cache folder."""

    def fresh(model: Any, options: dict[str, Any] | None = None, **more: Any) -> Any:
        torch._dynamo.reset()
        warm.stats.clear()
        program_cache.stats.clear()
        given = {"verify": False, "cache": str(tmp_path / "cache"), **(options or {})}
        return torch.compile(model, backend="fusionc", options=given, **more)

    yield fresh


def reasons() -> list[str]:
    return [k for k in warm.stats if k.startswith("not")]


def twice(start: Callable[..., Any], model: Any, *args: Any, context: Callable[[], Any] = torch.no_grad, **more: Any) -> Any:
    """Run cold, then warm; the warm start must be a hit and both answers eager's.  Returns the warm callable."""
    with context():
        want = model(*copy.deepcopy(args))
        cold = start(model, **more)(*copy.deepcopy(args))
        assert warm.stats["stored"] == 1, dict(warm.stats)
        with collect() as records:
            again = start(model, **more)
            found = again(*copy.deepcopy(args))
    assert warm.stats["hit"] == 1 and not warm.stats["miss"], dict(warm.stats)
    assert records and all(r.cache.startswith("hit") for r in records)
    torch.testing.assert_close(cold, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found, cold, rtol=0, atol=0)
    return again


def test_inference(start: Callable[..., Any]) -> None:
    model = Net().eval()
    x = torch.randn(4, 16)
    again = twice(start, model, x)
    with torch.no_grad():
        for p in model.parameters():  # derived weights follow after a warm start too
            p.mul_(1.5)
        torch.testing.assert_close(again(x), model(x), rtol=1e-4, atol=1e-5)
        other = Net().eval()
        model.load_state_dict(other.state_dict(), assign=True)
        torch.testing.assert_close(again(x), other(x), rtol=1e-4, atol=1e-5)


def test_conv_bn_is_folded_again(start: Callable[..., Any]) -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU()).eval()
    model[1].running_mean.normal_()
    x = torch.randn(2, 3, 8, 8)
    again = twice(start, model, x)
    with torch.no_grad():
        model[1].running_var.mul_(3)
        torch.testing.assert_close(again(x), model(x), rtol=1e-4, atol=1e-5)


def test_large_means_are_another_program(start: Callable[..., Any]) -> None:
    """Whether BatchNorm is folded into the next layer depends on its statistics."""
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 4)).eval()
    other, x = copy.deepcopy(model), torch.randn(4, 8) + 20
    other[0].running_mean.fill_(20)
    twice(start, model, x)
    with torch.no_grad():
        torch.testing.assert_close(start(other)(x), other(x), rtol=1e-5, atol=1e-5)
    assert warm.stats["miss"] == 1


def test_two_instances_of_the_class(start: Callable[..., Any]) -> None:
    one, two = Net().eval(), Net().eval()
    x = torch.randn(4, 16)
    twice(start, one, x)
    with torch.no_grad():
        torch.testing.assert_close(start(two)(x), two(x), rtol=1e-4, atol=1e-5)
    assert warm.stats["hit"] == 1  # names and values of parameters are not in the key


def test_constant_tensor_and_number(start: Callable[..., Any]) -> None:
    twice(start, lambda x: (x * torch.tensor(2.5) + float("inf")).clamp(max=3.0), torch.randn(5))


def test_mutated_input(start: Callable[..., Any]) -> None:
    def step(cache: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        cache[:, 2:4].copy_(x)
        return cache.sum(-1)

    with torch.no_grad():
        start(step)(torch.zeros(3, 8), torch.randn(3, 2))
        assert warm.stats["stored"] == 1, dict(warm.stats)
        again = start(step)
        mine, other, x = torch.zeros(3, 8), torch.zeros(3, 8), torch.randn(3, 2)
        version = mine._version
        torch.testing.assert_close(again(mine, x), step(other, x))
    assert warm.stats["hit"] == 1
    torch.testing.assert_close(mine, other)
    assert mine._version > version


def test_input_that_is_returned(start: Callable[..., Any]) -> None:
    def step(cache: torch.Tensor, x: torch.Tensor) -> Any:
        cache.add_(1)
        return cache, x * 2

    with torch.no_grad():
        start(step)(torch.zeros(3), torch.randn(3))
        again = start(step)
        mine = torch.zeros(3)
        found = again(mine, torch.ones(3))
    assert found[0] is mine and mine.tolist() == [1, 1, 1]
    assert warm.stats["hit"] == 1 or reasons()


def test_dynamic_shapes(start: Callable[..., Any]) -> None:
    model = Net().eval()
    with torch.no_grad():
        for run in range(2):
            compiled = start(model, dynamic=True)
            for n in (6, 7, 5):
                x = torch.randn(n, 16)
                torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
            assert warm.stats["hit" if run else "stored"] == 1, dict(warm.stats)
        torch._dynamo.reset()


def gradients(model: torch.nn.Module, compiled: Any, x: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    x = x.clone().requires_grad_()
    compiled(x).square().sum().backward()
    return [x.grad, *[p.grad.clone() for p in model.parameters()]]  # type: ignore[list-item, union-attr]


@pytest.mark.parametrize("dynamic", [False, True])
def test_training(start: Callable[..., Any], dynamic: bool) -> None:
    model = Net()
    x = torch.randn(4, 16)
    want = gradients(model, model, x)
    cold = gradients(model, start(model, dynamic=dynamic), x)
    assert warm.stats["stored"] == 1, dict(warm.stats)
    again = start(model, dynamic=dynamic)
    found = gradients(model, again, x)
    assert warm.stats["hit"] == 1, dict(warm.stats)
    for a, b, c in zip(want, cold, found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(c, b, rtol=0, atol=0)
    # gradients in another layout than the results have, twice through one graph
    y = again(x.clone().requires_grad_())
    y.backward(torch.ones(16, 4).t(), retain_graph=True)
    y.backward(torch.ones(4, 16))
    # with dynamic=True Dynamo asks a backend first with a float that tracing then tells it to specialise: one miss
    assert warm.stats["hit"] == 1 and warm.stats["miss"] <= int(dynamic)
    with pytest.raises(RuntimeError, match="double backward"):
        z = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(again(z).sum(), z, create_graph=True)
        g.sum().backward()


def test_training_with_statistics_and_frozen_parts(start: Callable[..., Any]) -> None:
    """BatchNorm writes buffers inside the graph; some parameters take no gradient; one result is an index."""

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.bn, self.b = torch.nn.Linear(6, 6), torch.nn.BatchNorm1d(6), torch.nn.Linear(6, 3)
            self.a.weight.requires_grad_(False)

        def forward(self, x: torch.Tensor) -> Any:
            y = self.b(self.bn(self.a(x)).relu())
            return y.square().mean(), y.argmax(-1), y.detach() * 2

    torch.manual_seed(0)
    base = Model()
    x = torch.randn(8, 6)
    results = []
    for kind in ("eager", "cold", "warm"):
        model = copy.deepcopy(base)
        run = model if kind == "eager" else start(model)
        loss, index, plain = run(x)
        loss.backward()
        assert not index.requires_grad and not plain.requires_grad
        results.append([loss.detach(), index, plain, *[p.grad for p in model.parameters() if p.requires_grad], *model.buffers()])
        assert model.a.weight.grad is None
    assert warm.stats["hit"] == 1 or reasons(), dict(warm.stats)
    for more in results[1:]:
        torch.testing.assert_close(more, results[0], rtol=1e-4, atol=1e-5)


def test_autocast(start: Callable[..., Any]) -> None:
    model = Net().eval()
    x = torch.randn(4, 16)

    def context() -> Any:
        return torch.autocast("cpu", torch.bfloat16)

    with torch.no_grad(), context():
        cold = start(model)(x)
        assert warm.stats["stored"] == 1, dict(warm.stats)
        again = start(model)(x)
        assert warm.stats["hit"] == 1
    assert again.dtype == cold.dtype
    torch.testing.assert_close(again, cold, rtol=0, atol=0)
    with torch.no_grad():
        start(model)(x)
    assert warm.stats["miss"] == 1  # without autocast it is another graph


def test_every_part_of_the_key_counts(start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        return x.exp() * 2.0

    x = torch.randn(4, 6)

    def expect(outcome: str, run: Any, *args: Any, context: Any = None, grad: bool = False, **more: Any) -> None:
        compiled = start(run, **more)
        with context or nullcontext(), torch.set_grad_enabled(grad):
            compiled(*args)
        assert warm.stats[outcome] == 1, (outcome, dict(warm.stats))

    expect("miss", f, x)
    expect("hit", f, x)
    expect("hit", f, torch.randn(4, 6))
    expect("miss", lambda x: x.exp() * 2.5, x)
    expect("miss", lambda x: x.exp() * 2, x)  # an integer is another literal
    expect("miss", lambda x: x.expm1() * 2.0, x)
    expect("miss", f, x.double())
    expect("miss", f, torch.randn(4, 5))
    expect("miss", f, torch.randn(6, 4).t())
    expect("miss", f, torch.randn(5, 6)[1:])  # storage offset
    expect("miss", f, x, grad=True)
    expect("miss", f, x.clone().requires_grad_(), grad=True)
    expect("miss", f, x, options={"deterministic": False})
    expect("miss", f, x, options={"disable": ["cse"]})
    torch.use_deterministic_algorithms(True)
    try:
        expect("miss", f, x)
    finally:
        torch.use_deterministic_algorithms(False)
    from fusionc.runtime import environment

    with monkeypatch.context() as patch:
        patch.setattr(environment, "source_fingerprint", lambda packages=(): "0" * 64)
        expect("miss", f, x)
    with monkeypatch.context() as patch:
        real = environment.environment_key
        patch.setattr(environment, "environment_key", lambda device="cpu": {**real(device), "torch": "9.9"})
        expect("miss", f, x)
    expect("hit", f, x)


def test_what_is_not_cached(start: Callable[..., Any]) -> None:
    class Own(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
            return g * 3

    x = torch.randn(4, requires_grad=True)
    for _ in range(2):
        start(lambda x: Own.apply(x).sum())(x).backward()
        assert reasons() and not warm.stats["hit"] and not warm.stats["stored"], dict(warm.stats)
    assert x.grad is not None and x.grad.tolist() == [6.0] * 4
    y = torch.randn(4)
    start(lambda y: (y.view(2, 2), y + 1))(y)  # a view of an input
    assert "not cached: a result is alias_of_input" in warm.stats
    start(lambda y: y * 2, options={"cache": False})(y)
    assert "not cached: the cache is switched off" in warm.stats
    start(lambda y: y * 2, options={"verify": True})(y)
    assert "not cached: a dump or verification needs every stage to run" in warm.stats


def entries(folder: Path, kind: str) -> list[Path]:
    return sorted((folder / "cache" / "v1" / kind).glob("*.json"))


def test_damaged_entries_are_misses(start: Callable[..., Any], tmp_path: Path) -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        return x.sin() + 1

    x = torch.randn(7)
    start(f)(x)
    for kind in ("warm", "program"):
        (path,) = entries(tmp_path, kind)
        path.write_bytes(path.read_bytes()[:-20])
        torch.testing.assert_close(start(f)(x), f(x))
        assert warm.stats["miss"] == 1, kind
        start(f)(x)
        assert warm.stats["hit"] == 1, kind  # repaired


def hostile(entry: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Changed payloads of a "warm" entry, none of which may be used."""
    for name in ("plan", "programs", "derived", "passes"):
        for value in (None, 5, [], {}, "x", [[[[]]]] * 1000):
            if value != entry[name] and (name, value) != ("passes", []):  # a list for the report, which may be empty
                yield {**entry, name: value}
    plan = entry["plan"]
    yield {**entry, "plan": {**plan, "increment": [10**9]}}
    yield {**entry, "plan": {**plan, "outputs": [["input", 99, [], False, False]]}}
    yield {**entry, "plan": {**plan, "outputs": [["other", 0, [], False, False]]}}
    yield {**entry, "plan": {**plan, "autocast_off": 1}}
    key = entry["programs"]["inference"]
    for field in ("environment", "source", "compiler", "options", "target", "device", "stage", "format"):
        yield {**entry, "programs": {"inference": {**key, field: "foreign"}}}
    yield {**entry, "more": 1}


def test_hostile_entries_are_misses(start: Callable[..., Any], tmp_path: Path) -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        return x.sin() + 1

    x = torch.randn(7)
    start(f)(x)
    cache = program_cache.cache_of(warm.Config(cache=str(tmp_path / "cache")))
    (path,) = entries(tmp_path, "warm")
    whole = json.loads(path.read_text())["entry"]
    for payload in hostile(whole["payload"]):
        cache.put("warm", whole["key"], payload)
        torch.testing.assert_close(start(f)(x), f(x))
        assert warm.stats["miss"] == 1 and not warm.stats["hit"], str(payload)[:300]


_SCRIPT = """
import sys, torch
sys.path.insert(0, {home!r})
from test_warm_start import main_job
from fusionc import warm, program_cache
print(*main_job(torch.compile), warm.stats["hit"], program_cache.stats["hit"])
"""


def main_job(compile_it: Callable[..., Any]) -> tuple[float, float, float]:
    """One inference and one training step; three numbers that tell whether they were right."""
    torch.manual_seed(0)
    model, x = Net(), torch.randn(4, 16)
    compiled = compile_it(model, backend="fusionc")
    with torch.no_grad():
        y = compiled(x)
    loss = compiled(x).square().mean()
    loss.backward()
    return float(y.sum()), float(loss), float(model.q.weight.grad.sum())  # type: ignore[arg-type]


def test_another_process(tmp_path: Path) -> None:
    """Two processes, one after the other: the second finds what the first stored, and computes the same numbers."""
    env = {**os.environ, "FUSIONC_CACHE": str(tmp_path / "cache"), "FUSIONC_VERIFY": "0"}
    script = _SCRIPT.format(home=str(Path(__file__).parent))
    first, second = (
        subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True).stdout.split()
        for _ in range(2)
    )
    assert first[3:] == ["0", "0"] and second[3:] == ["2", "3"]
    assert first[:3] == second[:3]


def test_first_process_takes_the_short_cut_too(start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str] = []

    def counted(name: str) -> None:
        real = getattr(warm, name)
        monkeypatch.setattr(warm, name, lambda *args: built.append(name) or real(*args))

    counted("training_callable")
    counted("_inference_callable")
    model = Net()
    x, g = torch.randn(4, 16), torch.randn(4, 16)

    def step(f: Any) -> list[torch.Tensor]:
        model.zero_grad(set_to_none=True)
        y = f(x)
        y.backward(g)
        return [y, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    want, compiled = step(model), start(model)
    y = compiled(x)  # two calls before the backward graph exists
    first = step(compiled)
    assert built == []
    y.backward(g)
    for found in (first, step(compiled), step(compiled)):
        for a, b in zip(found, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert built == ["training_callable"]
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), want[0].detach(), rtol=1e-4, atol=1e-5)
        model.q.weight.mul_(2.0)  # derived weights follow
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    assert built == ["training_callable", "_inference_callable"]


def test_dynamo_leaves_a_compiled_backward_graph_alone(start: Callable[..., Any]) -> None:
    """It runs inside of a compiled function that calls backward(): Dynamo would trace our kernels' launches."""
    model, x = Net(), torch.randn(4, 16)

    def step(x: torch.Tensor) -> torch.Tensor:
        loss = model(x).square().sum()
        torch._dynamo.graph_break()
        loss.backward()
        return loss.detach()

    outer = start(step)
    torch._dynamo.utils.counters.clear()
    for _ in range(3):
        model.zero_grad()
        outer(x)
    found = [p.grad for p in model.parameters()]
    model.zero_grad()
    model(x).square().sum().backward()
    torch.testing.assert_close(found, [p.grad for p in model.parameters()], rtol=1e-4, atol=1e-5)
    told = torch._dynamo.utils.counters["graph_break"]
    breaks = [why for why in told if "CFunctionType" in why or "_reinterpret_tensor" in why]
    assert not breaks, breaks
