"""The direct launcher, with the driver's function planted."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fusionc.runtime import cuda_driver, launch
from fusionc.runtime.binaries import in_folder

PTX = ".visible .entry k(\n\t.param .u64 .ptr k_param_0\n)"


@pytest.mark.parametrize("way", ["fixed", "aligned", "variable"])
def test_threads_do_not_mix_their_arguments(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second thread that launches the same kernel in the middle of a launch must not change its arguments."""
    inside, other_done = threading.Event(), threading.Event()
    seen: dict[int, int] = {}

    def driver(*args: Any) -> int:
        stream, params = args[8], args[9]
        if stream == 1:
            inside.set()
            other_done.wait(0.2)  # the other thread gets the chance to do harm
        seen[stream] = ctypes.c_uint64.from_address(params[0]).value
        return 0

    monkeypatch.setattr(launch, "_driver", lambda: driver)
    monkeypatch.setattr(cuda_driver, "current_context", lambda: None)
    meta = SimpleNamespace(num_warps=4, shared=0, num_ctas=1)
    handle = SimpleNamespace(metadata=meta, function=7)
    built = launch.Compiled("k", "sm_90", {"ptx": PTX}, 0, 0, 0, 0.0, {}, handle)
    made: Any = launch._cuda_launcher(built, ["*fp32"], None if way == "variable" else 3)

    def run(stream: int) -> None:
        if way == "variable":
            made(3, stream, 16 * stream)
        elif way == "aligned":
            assert made.aligned(stream, [16 * stream])
        else:
            made(stream, 16 * stream)

    def other() -> None:
        assert inside.wait(10)
        run(2)
        other_done.set()

    thread = threading.Thread(target=other)
    thread.start()
    run(1)
    thread.join()
    assert seen == {1: 16, 2: 32}


def test_jobs_beside_run_while_the_caller_works_and_keep_their_order() -> None:
    gone_on = threading.Event()

    def late() -> str:
        assert gone_on.wait(20)
        return "late"

    def broken() -> None:
        raise ValueError("no")

    counted: list[int] = []
    wait = launch.compile_beside([late, broken, lambda: "quick"], lambda: counted.append(1))
    gone_on.set()  # the caller was not held up
    first, second, third = wait.result()
    assert (first, third) == ("late", "quick") and isinstance(second, ValueError) and len(counted) == 3


def test_batches_together_run_no_more_jobs_than_there_are_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_slots", threading.BoundedSemaphore(2))
    guard, running, most = threading.Lock(), [0], [0]

    def job() -> None:
        with guard:
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(0.02)
        with guard:
            running[0] -= 1

    other = threading.Thread(target=launch.compile_many, args=([job] * 6, 3))
    other.start()
    launch.compile_many([job] * 6, 3)
    other.join()
    assert most == [2] and running == [0]


class Handle(SimpleNamespace):
    """A kernel as Triton keeps it; its own way of loading counts."""

    def _init_handles(self) -> None:
        self.whole += 1
        if self.metadata.shared > 200:
            raise RuntimeError("out of resource: shared memory")
        self.module, self.function, self._run = "theirs", "their function", lambda *args: ("launched", *args)


@pytest.fixture
def loading(monkeypatch: pytest.MonkeyPatch) -> Any:
    import triton

    calls: list[tuple[Any, ...]] = []

    def load(*args: Any) -> tuple[Any, ...]:
        calls.append(args)
        return "ours", "our function", 40, 0, 256

    monkeypatch.setattr(triton, "__version__", "3.6.0")
    monkeypatch.setattr(cuda_driver, "most_shared", lambda: 200)
    monkeypatch.setattr(cuda_driver, "load", load)
    monkeypatch.setattr(cuda_driver, "tritons", lambda: calls.append(("Triton's driver",)))

    def made(shared: int = 100, warps: int = 4, **asm: bytes) -> Handle:
        return Handle(name="k", kernel=b"binary", asm=asm or {"cubin": b"binary"}, module=None, function=None, _run=None,
                      n_regs=None, n_spills=None, metadata=SimpleNamespace(shared=shared, num_warps=warps), whole=0)  # fmt: skip

    return SimpleNamespace(calls=calls, made=made)


def test_loading_leaves_tritons_launcher_for_later(loading: Any) -> None:
    handle = loading.made()
    launch.load_binary(handle)
    assert loading.calls == [("k", b"binary", 100)] and handle.whole == 0
    assert (handle.module, handle.function, handle.n_regs, handle.n_spills) == ("ours", "our function", 40, 0)
    kept = handle._run
    assert kept(1, 2) == ("launched", 1, 2) and handle.whole == 1 and handle.function == "their function"
    assert kept(3) == ("launched", 3) and handle.whole == 1, "the binary is loaded again at each launch"


@pytest.mark.parametrize("given", [{"shared": 201}, {"warps": 16}, {"hsaco": b"binary"}], ids=str)
def test_what_does_not_fit_is_tritons_to_load_or_refuse(loading: Any, given: dict[str, Any]) -> None:
    handle = loading.made(**given)
    if "shared" in given:
        with pytest.raises(RuntimeError, match="shared memory"):
            launch.load_binary(handle)
        assert loading.calls == [("Triton's driver",)]
    else:
        launch.load_binary(handle)
        assert handle.module == "theirs"


def test_later_versions_load_themselves(loading: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    monkeypatch.setattr(triton, "__version__", "3.7.1")
    handle = loading.made()
    launch.load_binary(handle)
    assert loading.calls == [("Triton's driver",)] and handle.module == "theirs"


def test_tritons_driver_is_made_once_and_for_all_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by a whole batch of kernels that are the first to load one, in a graph's folder."""
    import triton
    from triton import knobs
    from triton.runtime import driver
    from triton.runtime.cache import get_cache_manager

    made: list[str] = []

    def create() -> Any:
        time.sleep(0.1)
        made.append(get_cache_manager("0" * 64).cache_dir)
        return SimpleNamespace()

    class Loaded(Handle):
        def _init_handles(self) -> None:
            driver.active  # noqa: B018
            super()._init_handles()

    monkeypatch.setattr(sys.modules["triton.runtime.driver"], "_create_driver", create)
    monkeypatch.setattr(driver, "_active", None)
    monkeypatch.setattr(driver, "_default", None)
    monkeypatch.setattr(triton, "__version__", "3.7.1")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    given = {"name": "k", "asm": {"cubin": b""}, "module": None, "metadata": SimpleNamespace(shared=0, num_warps=4), "whole": 0}
    with knobs.cache.scope(), in_folder(str(tmp_path / "graph")):
        jobs = [functools.partial(launch.load_binary, Loaded(**given)) for _ in range(4)]
        assert launch.compile_many(jobs, workers=4) == [None] * 4
    assert [Path(folder).parent.name for folder in made] == ["triton"]


@pytest.mark.parametrize("said", [None, "0", "1"])
def test_only_the_interpreters_setting_is_put_back(said: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import knobs

    if said is None:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    else:
        monkeypatch.setenv("TRITON_INTERPRET", said)
    before, hook = knobs.runtime.interpret, object()
    monkeypatch.setattr(knobs.runtime, "add_stages_inspection_hook", None)
    for on in (True, False):
        with launch._interpreting(on):
            assert knobs.runtime.interpret is on
            knobs.runtime.add_stages_inspection_hook = hook  # type: ignore[assignment]
        assert knobs.runtime.add_stages_inspection_hook is hook, "another thread's"
        assert knobs.runtime.interpret == before and os.environ.get("TRITON_INTERPRET") == said
        assert "interpret" not in vars(knobs.runtime)
