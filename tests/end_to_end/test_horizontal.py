"""Many small tensors in one launch, end to end, in Triton's interpreter; the bounds on launches are exact."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fusionc import rescue
from fusionc.backend import fusionc
from fusionc.record import GraphRecord, collect

pytestmark = pytest.mark.interpret


def run(fn: Callable[..., Any], *args: Any, calls: int = 1, **options: Any) -> tuple[Any, GraphRecord]:
    torch._dynamo.reset()
    dynamic = options.pop("dynamic", False)
    options = {"target": "interpret", "verify": True, "cache": False, "strict": False, **options}
    f = torch.compile(fn, backend=fusionc, dynamic=dynamic, options=options)
    with torch.no_grad(), collect() as records:
        for _ in range(calls):
            got = f(*args)
    assert not records[0].fallbacks, records[0].fallbacks
    return got, records[0]


def same(got: Any, want: Any) -> None:
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)
        assert g.stride() == w.stride() and g.dtype == w.dtype


def launches(record: GraphRecord) -> int:
    return sum(k.uses for k in record.kernels)


def images(xs: list[torch.Tensor], scale: torch.Tensor) -> list[torch.Tensor]:
    return [((x * scale - 0.1) / 0.7).clamp(0, 1).half() for x in xs]


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_images_of_different_sizes() -> None:
    xs, scale = [rand(5 + k % 3, 8, 3, seed=k) for k in range(7)], rand(3)
    got, record = run(images, xs, scale)
    same(got, images(xs, scale))
    assert launches(record) == 1 and len(record.groups) == 7
    assert record.kernels[0].name.startswith("many_")
    assert all(g.kernel == record.kernels[0].name for g in record.groups)


def test_results_are_independent_tensors() -> None:
    xs, scale = [rand(16, 8, 3, seed=k) for k in range(5)], rand(3)
    got, _ = run(images, xs, scale)
    want = images(xs, scale)
    assert len({g.untyped_storage().data_ptr() for g in got}) == 1  # one allocation
    got[1].zero_()
    assert got[0]._version == 0 and got[1]._version == 1 and not any(g._is_view() for g in got)
    got[2].requires_grad_().mul(2).sum().backward()
    same([got[k].detach() for k in (0, 2, 3, 4)], [want[k] for k in (0, 2, 3, 4)])


def test_a_small_result_that_is_kept_keeps_no_large_one() -> None:
    def f(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return a.exp(), b.sin(), c + 1

    a, b, c = rand(70, 300), rand(3, seed=1), rand(5, 2, seed=2)
    got, record = run(f, a, b, c)
    same(got, f(a, b, c))
    assert launches(record) == 1, "still one launch"
    sizes = [g.untyped_storage().nbytes() for g in got]
    assert sizes[0] == a.nbytes and sizes[1] == sizes[2] < 1 << 16


@pytest.mark.parametrize("dynamic", [False, True])
def test_what_as_strided_looks_into_begins_with_its_storage(dynamic: bool) -> None:
    """`fill_diagonal_` of a changed input: its functional form names positions in the storage of a kernel's result."""

    def f(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        places = x.take(x.clamp(0, 26))
        x.copy_(x.flip(0))
        x.fill_diagonal_(4)
        return x.narrow(-1, 2, 1), places.amax(), y.tril()

    x, y = torch.randint(-5, 6, (3, 3, 3), generator=torch.Generator().manual_seed(0)), rand(3, 3)
    mine, theirs = x.permute(2, 1, 0).clone(), x.permute(2, 1, 0).clone()
    got, record = run(f, mine, y, dynamic=dynamic)
    same(got, f(theirs, y))
    assert torch.equal(mine, theirs)
    assert dynamic or any(k.name.startswith("many_") for k in record.kernels)


def test_a_place_in_storage_that_is_no_number() -> None:
    """Sizes are known again after the first call, where an input begins is not."""

    def f(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = x.index_select(-1, torch.tensor([0, 0]))
        x.unbind(0)[-1].mul_(2)
        return x[..., 1::2], y.reshape(-1)[1:]

    torch._dynamo.reset()
    compiled = torch.compile(f, backend=fusionc, options={"target": "interpret", "cache": False, "strict": True})
    for shape in ((8, 4, 3, 8), (3, 4, 3, 3), (5, 2, 4, 5)):
        x, z = rand(2, *shape)[1], rand(2, *shape)[1]
        with torch.no_grad():
            same(compiled(x), f(z))
        assert torch.equal(x, z)


def test_a_chain_for_each_image() -> None:
    def f(xs: list[torch.Tensor]) -> list[torch.Tensor]:
        return [torch.softmax(x, -1).sum(0).exp() for x in xs]

    xs = [rand(4 + k, 6, seed=k) for k in range(4)]
    got, record = run(f, xs)
    same(got, f(xs))
    assert launches(record) == 2  # rows, then columns


def test_what_depends_stays_behind() -> None:
    def f(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, ...]:
        first = a.sum(0)
        second = (first.sum() + b).sum(1)
        return first, second

    a, b = rand(6, 10), rand(5, 4, seed=1)
    got, record = run(f, a, b)
    same(got, f(a, b))
    assert launches(record) == len(record.groups) >= 2


def test_different_kinds_in_one_launch() -> None:
    def f(xs: list[torch.Tensor], ys: list[torch.Tensor], z: torch.Tensor) -> list[torch.Tensor]:
        return [x.exp() * 2 for x in xs] + [torch.relu(y) > 0.5 for y in ys] + [z + 1]

    xs = [rand(3 + k, 5, seed=k, dtype=torch.float16) for k in range(3)]
    ys = [rand(7, k + 2, seed=9 + k).t() for k in range(3)]
    z = torch.arange(11)
    got, record = run(f, xs, ys, z)
    same(got, f(xs, ys, z))
    assert launches(record) == 1


def test_empty_tensors_are_left_out() -> None:
    xs, scale = [rand(4, 8, 3), rand(0, 8, 3), rand(5, 8, 3, seed=1)], rand(3)
    got, record = run(images, xs, scale)
    same(got, images(xs, scale))
    assert launches(record) == 1 and len(record.groups) == 2


def test_dynamic_sizes_stay_apart() -> None:
    xs, scale = [rand(4 + k, 8, 3, seed=k) for k in range(3)], rand(3)
    got, record = run(images, xs, scale, dynamic=True)
    same(got, images(xs, scale))
    assert launches(record) == len(record.groups)


def test_a_shared_input_and_a_view_of_it() -> None:
    def f(x: torch.Tensor) -> list[torch.Tensor]:
        return [x[k] * (k + 1.0) for k in range(3)] + [x[0].sum()[None], x.sum(1)[:2, 0]]

    x = rand(4, 5, 6)
    got, _ = run(f, x)
    same(got, f(x))


def test_can_be_switched_off() -> None:
    xs, scale = [rand(4 + k, 8, 3, seed=k) for k in range(3)], rand(3)
    _, record = run(images, xs, scale, disable=["horizontal_launch"])
    assert launches(record) == 3


def test_large_ones_stay_apart() -> None:
    xs = [torch.empty(1 << 22) for k in range(2)]

    def f(xs: list[torch.Tensor]) -> list[torch.Tensor]:
        return [x + 1 for x in xs]

    torch._dynamo.reset()
    with torch.no_grad(), collect() as records:
        torch.compile(f, backend=fusionc, options={"target": "sm_90", "cache": False})(xs)
    assert launches(records[0]) == 2


def test_a_launch_that_fails_is_made_good(monkeypatch: pytest.MonkeyPatch) -> None:
    from fusionc.runtime import launch

    xs, scale = [rand(5 + k % 3, 8, 3, seed=k) for k in range(5)], rand(3)

    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no launches today")

    monkeypatch.setattr(launch, "interpret", broken)
    seen: list[int] = []
    compute = rescue.compute
    monkeypatch.setattr(rescue, "compute", lambda *a: (seen.append(1), compute(*a)))
    with pytest.warns(UserWarning, match="could not be launched"):
        got, _ = run(images, xs, scale)
    same(got, images(xs, scale))
    assert len(seen) == 5


def test_one_that_cannot_be_built_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    from fusionc.codegen.triton import Unrenderable
    from fusionc.targets import many

    def refuse(*args: Any) -> None:
        raise Unrenderable("not today")

    monkeypatch.setattr(many, "render_many", refuse)
    xs, scale = [rand(5 + k, 8, 3, seed=k) for k in range(3)], rand(3)
    with pytest.warns(UserWarning, match="could not be built"):
        got, record = run(images, xs, scale)
    same(got, images(xs, scale))
    assert launches(record) == 3


@pytest.mark.parametrize("fails", [False, True])
def test_bundles_and_other_kernels_compile_side_by_side(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The records stay in order, bundles first; members of one that cannot be built are kernels like the others."""
    from fusionc.codegen.triton import Unrenderable
    from fusionc.targets import many

    def both(xs: list[torch.Tensor], scale: torch.Tensor, rows: torch.Tensor) -> list[torch.Tensor]:
        return [*images(xs, scale), torch.softmax(rows, -1)]

    if fails:
        monkeypatch.setattr(many, "render_many", lambda *args: (_ for _ in ()).throw(Unrenderable("not today")))
    xs, scale, rows = [rand(5 + k, 8, 3, seed=k) for k in range(3)], rand(3), rand(4, 4096)
    monkeypatch.setattr(many, "SMALL_US", 0.01)  # the softmax is too long to share a launch
    with pytest.warns(UserWarning, match="could not be built") if fails else contextlib.nullcontext():
        got, record = run(both, xs, scale, rows)
    same(got, both(xs, scale, rows))
    assert launches(record) == (4 if fails else 2)
    assert [k.symbol[0] for k in record.kernels] == (["k"] * len(record.kernels) if fails else ["m", "k"])


def test_warm_start(fresh_cache: Any) -> None:
    xs, scale = [rand(5 + k % 3, 8, 3, seed=k) for k in range(5)], rand(3)
    _, first = run(images, xs, scale, cache=True, verify=False)
    assert first.cache == "stored"
    got, second = run(images, xs, scale, cache=True, verify=False)
    same(got, images(xs, scale))
    assert second.cache.startswith("hit")
    assert launches(second) == 1
