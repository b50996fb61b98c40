"""Results that are copied into inputs at the end: written there by their kernel where that is safe, and only there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fusionc.backend import fusionc
from fusionc.record import GraphRecord, collect

Tensors = list[torch.Tensor]


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def check(fn: Callable[..., Any], make: Callable[[], Tensors], target: str = "cpp", calls: int = 2) -> GraphRecord:
    """Eager and compiled on equal arguments, which `fn` changes; the record of the compilation."""
    torch._dynamo.reset()
    f = torch.compile(fn, backend=fusionc, dynamic=False, options={"target": target, "verify": True, "cache": False})
    mine, theirs = make(), make()
    versions = [t._version for t in mine]
    with torch.no_grad(), collect() as records:
        for _ in range(calls):
            got, want = f(*mine), fn(*theirs)
    for g, w in zip(mine, theirs, strict=True):
        torch.testing.assert_close(g, w)
    if want is not None:
        torch.testing.assert_close(got, want)
    for before, g, w in zip(versions, mine, theirs, strict=True):
        assert (g._version > before) == (w._version > before)  # caches of weights see the same writes
    assert not records[0].fallbacks, records[0].fallbacks
    return records[0]


def copies(record: GraphRecord) -> int:
    return sum("copy_" in c.op for c in record.calls)


@pytest.mark.parametrize("target", ["cpp", pytest.param("interpret", marks=pytest.mark.interpret)])
def test_update(target: str) -> None:
    def f(p: torch.Tensor, g: torch.Tensor, m: torch.Tensor) -> None:
        m.mul_(0.9).add_(g, alpha=0.1)
        p.sub_(m * 0.01)

    record = check(f, lambda: [rand(6, 5), rand(6, 5, seed=1), rand(6, 5, seed=2)], target)
    assert copies(record) == 0 and not record.calls


@pytest.mark.parametrize("target", ["cpp", pytest.param("interpret", marks=pytest.mark.interpret)])
def test_a_value_written_to_two_inputs(target: str) -> None:
    """Equal values are one node, which can be in one place only."""

    def f(p: torch.Tensor, q: torch.Tensor, x: torch.Tensor) -> None:
        torch.mul(x, 2, out=p)
        torch.mul(x, 2, out=q)

    record = check(f, lambda: [rand(6, 5), rand(6, 5, seed=1), rand(6, 5, seed=2)], target)
    assert copies(record) == 1


def test_a_value_that_leaves_is_no_alias() -> None:
    def f(p: torch.Tensor) -> torch.Tensor:
        q = p * 2
        p.copy_(q)
        return q

    check(f, lambda: [rand(4, 4)])
    p = rand(4, 4)
    with torch.no_grad():
        out = torch.compile(f, backend=fusionc, options={"target": "cpp", "cache": False})(p)
    out.zero_()
    assert p.abs().sum() > 0


def test_a_later_reader_keeps_the_copy() -> None:
    def f(p: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        old = p.clone()
        p.mul_(2)
        return x @ old

    check(f, lambda: [rand(4, 4), rand(4, 4, seed=1)])


def test_reading_another_element_keeps_the_copy() -> None:
    def f(p: torch.Tensor) -> None:
        p.copy_(p.flip(0) + 1)

    record = check(f, lambda: [rand(40, 3)])
    assert copies(record) == 1

    def g(p: torch.Tensor) -> None:
        p.copy_(p.t() + 1)

    assert copies(check(g, lambda: [rand(9, 9)])) == 1


def test_reductions_and_broadcasts_keep_the_copy() -> None:
    def f(p: torch.Tensor) -> None:
        p.copy_(torch.softmax(p, -1))

    assert copies(check(f, lambda: [rand(8, 16)])) == 1


def test_another_layout_keeps_the_copy() -> None:
    def f(p: torch.Tensor, x: torch.Tensor) -> None:
        p.copy_(x + 1)

    assert copies(check(f, lambda: [rand(3, 5).t(), rand(5, 3, seed=1)])) <= 1
    assert copies(check(f, lambda: [torch.zeros(4, 6)[:, :3], rand(4, 3, seed=1)])) == 1


def test_inputs_that_share_memory() -> None:
    def f(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        out = q * 3
        p.add_(1)
        return out

    def make() -> Tensors:
        base = rand(12)
        return [base[:8], base[4:]]

    check(f, make)


def test_written_twice() -> None:
    def f(p: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        p.add_(x)
        y = p * 2
        p.mul_(y)
        return y

    check(f, lambda: [rand(5, 5), rand(5, 5, seed=1)])


@pytest.mark.parametrize(
    "options",
    [{"foreach": True}, {"foreach": False}, {"foreach": True, "amsgrad": True, "weight_decay": 0.1}],
    ids=["foreach", "loop", "amsgrad"],
)
@pytest.mark.parametrize("target", ["cpp", pytest.param("interpret", marks=pytest.mark.interpret)])
def test_adam(target: str, options: dict[str, Any]) -> None:
    shapes = [(16, 8), (8,), (5, 3, 2), (), (1,), (33,)]

    def train(compiled: bool) -> tuple[list[torch.nn.Parameter], list[dict[str, Any]], list[GraphRecord]]:
        torch._dynamo.reset()
        parameters = [torch.nn.Parameter(rand(*s, seed=k)) for k, s in enumerate(shapes)]
        optimizer = torch.optim.Adam(parameters, lr=0.05, **options)

        def step() -> None:
            optimizer.step()

        run = step
        with collect() as records:
            for call in range(4):
                for k, p in enumerate(parameters):
                    p.grad = rand(*p.shape, seed=10 * call + k)
                if call == 1 and compiled:
                    run = torch.compile(
                        step, backend=fusionc, options={"target": target, "cache": False, "verify": True}
                    )
                run()
        return parameters, [optimizer.state[p] for p in parameters], list(records)

    want, want_state, _ = train(False)
    got, got_state, records = train(True)
    for a, b, x, y in zip(got, want, got_state, want_state, strict=True):
        torch.testing.assert_close(a, b)
        assert a._version >= b._version  # AOTAutograd counts too
        for name in y:
            torch.testing.assert_close(x[name], y[name])
    (record,) = records
    assert not record.calls and not record.fallbacks
    if target == "interpret":
        assert sum(k.uses for k in record.kernels) <= 3


def test_warm_start(fresh_cache: Any) -> None:
    def f(p: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        p.sub_(g * 0.5)
        return p.sum()

    said = []
    for _ in range(2):
        torch._dynamo.reset()
        run = torch.compile(f, backend=fusionc, dynamic=False, options={"target": "cpp", "verify": False})
        mine, theirs, g = rand(6, 5), rand(6, 5), rand(6, 5, seed=1)
        with torch.no_grad(), collect() as records:
            for _ in range(3):
                before = mine._version
                got, want = run(mine, g), f(theirs, g)
                assert mine._version > before
                torch.testing.assert_close(got, want)
        torch.testing.assert_close(mine, theirs)
        said.append(records[0].cache)
    assert said[0] == "stored" and said[1].startswith("hit")


@pytest.mark.parametrize("place", ["steps", "rows"])
@pytest.mark.parametrize("write", ["select", "slice", "diagonal", "view"])
def test_a_view_of_a_changed_input_lies_in_the_input(write: str, place: str) -> None:
    """AOTAutograd makes it again from where the graph's result lies, which must be the place of the input."""

    def f(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        half = x.shape[1] // 2
        if write == "select":
            x[0] = 1
        elif write == "slice":
            x[:, 1:] += 1
            x[1:] *= 2
        elif write == "diagonal":
            x.diagonal().add_(1)
        else:
            x[half:][0] = 1
        return x[:, half:], x[half:]

    def make(rows: int, columns: int) -> torch.Tensor:
        if place == "steps":
            return rand(rows, 2 * columns + 1)[:, 1::2]
        return rand(rows + 5, columns + 2)[5:, 2:]

    torch._dynamo.reset()
    g = torch.compile(f, backend=fusionc, options={"cache": False})
    for rows, columns in ((8, 6), (9, 17), (6, 4)):
        mine, theirs = make(rows, columns), make(rows, columns)
        with torch.no_grad():
            got, want = g(mine), f(theirs)
        torch.testing.assert_close(got, want)
        for a, b in zip(got, want, strict=True):
            assert (a.stride(), a.storage_offset()) == (b.stride(), b.storage_offset())
            assert a.untyped_storage().data_ptr() == mine.untyped_storage().data_ptr()


@pytest.mark.parametrize("dynamic", [False, True])
def test_as_strided_after_a_write(dynamic: bool) -> None:
    """It counts from the beginning of the storage, of which the input is a part, and may read what the input is not."""

    def f(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x.as_strided((2, 2), (1, 4), 3).add_(1)
        x[1] = 0
        y = torch.select_scatter(x, x[2], 0, 0)[1:]
        return x.as_strided((2, 2), (1, 4), 3) + 1, y.as_strided((2, 2), (1, 1), 0) * 2

    torch._dynamo.reset()
    g = torch.compile(f, backend=fusionc, dynamic=dynamic, options={"cache": False})
    mine, theirs = rand(5, 13)[:, 1::2], rand(5, 13)[:, 1::2]
    with torch.no_grad():
        torch.testing.assert_close(g(mine), f(theirs))
    torch.testing.assert_close(mine, theirs)
