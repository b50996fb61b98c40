"""Workers compile into the folder that is asked for, under the name that this process looks for; and never are in the way."""

from __future__ import annotations

import importlib.util
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fusionc.codegen.triton import render
from fusionc.runtime import compile_worker, compile_workers, launch
from fusionc.runtime.binaries import in_folder
from fusionc.runtime.device import known
from fusionc.schedule.rules_triton import default_plan
from tests.codegen import kernels

GPU = GPUTarget("cuda", 90, 32)
OPTIONS = {"num_warps": 4, "num_stages": 1, **launch.UNCHECKED}
TEXT = """
import triton
import triton.language as tl


@triton.jit
def helper(x):
    return x * 2.0


@triton.jit
def double(x, y, N: tl.constexpr, WORD: tl.constexpr, FACTOR: tl.constexpr):
    i = tl.arange(0, 64)
    if WORD == "plus":
        tl.store(y + i, helper(tl.load(x + i, mask=i < N)) + FACTOR, mask=i < N)
"""


def source(text: str = TEXT, factor: Any = 0.1) -> ASTSource:
    return ASTSource(
        fn=launch.load_module(text).double,
        signature={"x": "*fp32", "y": "*fp32", "N": "constexpr", "WORD": "constexpr", "FACTOR": "constexpr"},
        constexprs={"N": 60, "WORD": "plus", "FACTOR": factor},
        attrs={(0,): [["tt.divisibility", 16]], (1,): [["tt.divisibility", 16]]},
    )


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """One worker that is ready."""
    monkeypatch.setattr(compile_workers, "_free", queue.SimpleQueue())
    monkeypatch.setattr(compile_workers, "_home", 0)
    monkeypatch.setattr(compile_workers, "_team", [])
    monkeypatch.setattr(compile_workers, "_busy", 0)
    monkeypatch.setattr(compile_workers, "_waiting", 0)
    monkeypatch.setenv("FUSIONC_WORKERS", "1")
    compile_workers.start()
    worker = compile_workers._free.get(timeout=60)
    compile_workers._free.put(worker)
    yield compile_workers._free
    worker.stop()


def metadata(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*.json") if not p.name.startswith("__grp__"))


def test_what_a_worker_compiled_is_found_here(workers: Any, tmp_path: Path) -> None:
    assert compile_workers.compile_elsewhere(source(), GPU, OPTIONS, str(tmp_path))
    (made,) = metadata(tmp_path)
    stamp = made.stat().st_mtime_ns
    with in_folder(str(tmp_path)), compile_worker.pairs_apart():
        found = triton.compile(source(), target=GPU, options=OPTIONS)
    assert metadata(tmp_path) == [made] and made.stat().st_mtime_ns == stamp, "it was compiled again"
    assert found.asm["cubin"] and "__nv" not in found.asm["llir"]
    other = tmp_path / "other"
    assert compile_workers.compile_elsewhere(source(factor=0.2), GPU, OPTIONS, str(other)) and len(metadata(other)) == 1


@pytest.mark.parametrize("case", [kernels.layernorm(64, 768, "bf16"), kernels.dynamic_axis(8, 1000)], ids=lambda c: c.name)
def test_generated_kernels_go_through_workers(case: kernels.Case, workers: Any, tmp_path: Path,
                                              monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """Dynamic sizes and the launch that starts early as well: the names agree, so this process only reads."""
    told: list[bool] = []
    whole = compile_workers.compile_elsewhere
    monkeypatch.setattr(compile_workers, "compile_elsewhere", lambda *a: told.append(whole(*a)))
    plan = default_plan(case.kernel, case.sizes, known("sm_90"))
    text = launch.early_start(render(case.kernel, plan, "k0"), "k0", GPU)
    with in_folder(str(tmp_path)):
        built = launch.cross_compile(text, "k0", case.kernel, plan, "sm_90")
    assert told == [True] and len(metadata(tmp_path)) == 1 and built.asm["cubin"]


def test_workers_that_have_ended_are_replaced_and_others_are_kept(workers: Any) -> None:
    worker = workers.get()
    workers.put(worker)
    compile_workers.start()
    assert compile_workers._team == [worker]
    worker.stop()
    compile_workers.start()
    other = compile_workers._free.get(timeout=60)
    assert other is not worker and compile_workers._team == [other]
    other.stop()


def test_nothing_is_left_of_workers_that_have_ended(workers: Any, tmp_path: Path) -> None:
    """No zombie and no open pipe, also where nobody asks for them any more; and others do the work."""
    worker = workers.get()
    workers.put(worker)
    os.kill(worker.process.pid, signal.SIGKILL)
    end = time.monotonic() + 10
    while not worker.process.stdout.closed and time.monotonic() < end:
        time.sleep(0.01)
    assert worker.process.stdin.closed and worker.process.stdout.closed and not Path(f"/proc/{worker.process.pid}").exists()
    other = compile_workers.Worker()
    assert other.ready()
    workers.put(other)
    assert compile_workers.compile_elsewhere(source(), GPU, OPTIONS, str(tmp_path)) and workers.qsize() == 1
    other.stop()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_has_no_workers(workers: Any, tmp_path: Path) -> None:
    """It waits for nobody, although its parent held the lock, and keeps no worker alive that its parent has left."""
    worker = workers.get()
    workers.put(worker)
    with compile_workers._guard:
        child = os.fork()
        if child == 0:
            left = compile_workers._team or not worker.process.stdin.closed or not compile_workers._free.empty()
            os._exit(1 if left or compile_workers._guard.locked() else 0)
    assert os.waitpid(child, 0)[1] == 0
    assert compile_workers.compile_elsewhere(source(), GPU, OPTIONS, str(tmp_path)), "the parent's goes on"


@pytest.mark.parametrize("what", ["always_compile", "override", "dump_ir", "listener", "hook"])
def test_what_this_process_wants_of_triton_is_done_by_it(what: str, workers: Any, tmp_path: Path) -> None:
    from triton import knobs

    with knobs.compilation.scope(), knobs.runtime.scope():
        if what == "hook":
            knobs.runtime.add_stages_inspection_hook = lambda *a: ("", "")
        else:
            setattr(knobs.compilation, what, (lambda **k: None) if what == "listener" else True)
        assert not compile_workers.compile_elsewhere(source(), GPU, OPTIONS, str(tmp_path))
    assert compile_workers.compile_elsewhere(source(), GPU, OPTIONS, str(tmp_path))


def test_what_others_compile_meanwhile_is_no_hook(workers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with compile_worker.pairs_apart():  # as any thread of this process does around Triton's compiler
        assert compile_workers.compile_elsewhere(source(), GPU, OPTIONS, str(tmp_path))
    monkeypatch.setattr(triton.knobs.runtime, "add_stages_inspection_hook", lambda *a: ("", ""))
    with compile_worker.pairs_apart():
        assert not compile_workers.compile_elsewhere(source(factor=0.2), GPU, OPTIONS, str(tmp_path))


def test_another_triton_writes_nothing_under_this_ones_names(workers: Any, tmp_path: Path,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """As after an upgrade of the package below a process that runs."""
    monkeypatch.setattr(triton, "__version__", "0.1")
    assert not compile_workers.compile_elsewhere(source(), GPU, OPTIONS, str(tmp_path)) and not metadata(tmp_path)


def test_a_relative_folder_is_this_processs(workers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert compile_workers.compile_elsewhere(source(), GPU, OPTIONS, "made") and len(metadata(tmp_path / "made")) == 1


def test_many_open_files() -> None:
    import resource

    if 0 <= resource.getrlimit(resource.RLIMIT_NOFILE)[0] < 1200:
        pytest.skip("no descriptors beyond 1023")
    held = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        worker = compile_workers.Worker()
        assert worker.process.stdout.fileno() > 1023 and worker.ready()
        worker.stop()
    finally:
        for fd in held:
            os.close(fd)


@pytest.mark.parametrize("case", ["path", "nothing", "frozen"])
def test_unusual_interpreters(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Objects in sys.path, which Python passes over; programs that hold an interpreter would be started again and again."""
    if case == "path":
        monkeypatch.setattr(sys, "path", [*sys.path, Path("/")])
        worker = compile_workers.Worker()
        assert worker.ready()
        assert b"FUSIONC_WORKERS=0" in Path(f"/proc/{worker.process.pid}/environ").read_bytes().split(b"\0")
        worker.stop()
        return
    monkeypatch.setenv("FUSIONC_WORKERS", "3")
    monkeypatch.setattr(sys, *(("executable", None) if case == "nothing" else ("frozen", True)), raising=False)
    assert compile_workers.count() == 0


def test_an_error_is_left_to_this_process(workers: Any, tmp_path: Path) -> None:
    wrong = TEXT.replace("tl.store(", "tl.nothing(")
    assert not compile_workers.compile_elsewhere(source(wrong), GPU, OPTIONS, str(tmp_path))
    assert compile_workers.compile_elsewhere(source(), GPU, OPTIONS, str(tmp_path)), "the worker goes on"


def test_a_worker_that_has_ended_is_dropped(workers: Any, tmp_path: Path) -> None:
    worker = workers.get()
    workers.put(worker)
    os.kill(worker.process.pid, signal.SIGKILL)
    worker.process.wait(10)
    assert not compile_workers.compile_elsewhere(source(), GPU, OPTIONS, str(tmp_path))
    assert workers.empty() and worker.process.stdin.closed


def test_a_worker_that_says_nothing_is_ended(workers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = workers.get()
    workers.put(worker)
    os.kill(worker.process.pid, signal.SIGSTOP)
    monkeypatch.setattr(compile_workers, "_ANSWER_SECONDS", 0.2)
    assert not compile_workers.compile_elsewhere(source(), GPU, OPTIONS, str(tmp_path))
    assert worker.process.poll() is not None and workers.empty()


def test_only_plain_values_are_told(workers: Any, tmp_path: Path) -> None:
    import triton.language as tl

    assert not compile_workers.compile_elsewhere(source(factor=tl.float32), GPU, OPTIONS, str(tmp_path))
    assert not compile_workers.compile_elsewhere(source(factor=(1, 2)), GPU, OPTIONS, str(tmp_path))
    assert not workers.empty()


def test_trouble_with_workers_is_nobodys(workers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> bool:
        raise AttributeError("another Triton")

    monkeypatch.setattr(compile_workers, "compile_elsewhere", broken)
    with in_folder(str(tmp_path)):
        assert launch.compile_source(source(), GPU, {"num_warps": 4}).asm["cubin"]


def test_who_finds_all_at_work_waits_for_one(workers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ask, together = compile_workers.Worker.ask, threading.Barrier(2, timeout=30)

    def slow(self: Any, job: Any) -> str:
        if job["constants"][-1][-1] == 1.0:
            together.wait()  # the other one comes now
            time.sleep(0.2)
        return ask(self, job)

    monkeypatch.setattr(compile_workers.Worker, "ask", slow)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(compile_workers.compile_elsewhere, source(factor=1.0), GPU, OPTIONS, str(tmp_path))
        together.wait()
        assert workers.empty() and compile_workers._busy == 1
        assert compile_workers.compile_elsewhere(source(factor=2.0), GPU, OPTIONS, str(tmp_path)) and first.result()
    assert compile_workers._busy == 0 and len(metadata(tmp_path)) == 2


def test_no_more_wait_than_are_at_work(workers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = workers.get()
    monkeypatch.setattr(compile_workers, "_busy", 1)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(compile_workers._take)
        while not compile_workers._waiting:
            time.sleep(0.001)
        assert compile_workers._take() is None and not first.done()
        workers.put(worker)
        assert first.result() is worker and compile_workers._waiting == 0 and compile_workers._busy == 2
    workers.put(worker)


def test_nobody_waits_for_long(workers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = workers.get()
    monkeypatch.setattr(compile_workers, "_PATIENCE_SECONDS", 0.2)
    for busy in (0, 1):  # nobody has it; somebody does not give it back
        monkeypatch.setattr(compile_workers, "_busy", busy)
        assert not compile_workers.compile_elsewhere(source(), GPU, OPTIONS, str(tmp_path))
    workers.put(worker)


@pytest.mark.parametrize(
    ("word", "cores", "wanted"), [("", 2, 0), ("", 8, 6), ("", 16, 12), ("", 128, 12), ("3", 2, 3), ("0", 64, 0)]
)
def test_how_many(word: str, cores: int, wanted: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSIONC_WORKERS", word)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert compile_workers.count() == wanted


@pytest.mark.parametrize(("ranks", "wanted"), [("1", 12), ("4", 6), ("8", 0), ("", 12), ("0", 12)])
def test_ranks_share_the_cores(ranks: str, wanted: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FUSIONC_WORKERS", raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(32)), raising=False)
    assert compile_workers.count() == wanted


def test_a_worker_ends_with_its_input_and_when_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = compile_workers.Worker()
    assert worker.ready()
    worker.process.stdin.close()
    assert worker.process.wait(10) == 0
    worker.stop()
    read, write = os.pipe()
    monkeypatch.setattr(compile_worker, "IDLE_SECONDS", 0.1)
    with open(read, "rb", buffering=0) as stream:
        begun = time.monotonic()
        assert compile_worker._line(stream) is None and time.monotonic() - begun < 5
        os.write(write, b'{"a"')
        os.write(write, b": 1}\n")
        assert compile_worker._line(stream) == b'{"a": 1}\n'
        os.close(write)
        assert compile_worker._line(stream) is None


def test_a_worker_needs_no_torch() -> None:
    """Its start would take seconds and gigabytes."""
    code = "import sys, json; import triton, triton.compiler, triton.backends.compiler; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "False"


# -- pairs of 16-bit integers, which ptxas adds up wrongly -----------------------------------------------------------

PAD = """
import triton
import triton.language as tl


@triton.jit
def pad(x, y):
    i = tl.arange(0, 256)
    inside = (i % 6 - 1 >= 0) & (i % 6 - 1 < 3)
    v = tl.load(x + (i // 6 * 3 + i % 6 - 1), mask=(i < 102) & inside, other=0.0)
    tl.store(y + i, tl.where(inside, v, 0.0), mask=i < 102)
"""


def pad() -> ASTSource:
    return ASTSource(fn=launch.load_module(PAD).pad, signature={"x": "*fp32", "y": "*fp32"}, constexprs={}, attrs={})


def test_pairs_become_two_operations() -> None:
    text = "\tmov.b32 \t%r2, 16711935;\n\tadd.s16x2 \t%r3, %r1, %r2;\n\tmin.u16x2 %r5, %r3, %r2;\n\tadd.f16x2 \t%r4, %r1, %r2;\n"
    made = compile_worker.apart(text)
    assert "16x2" not in made.replace("add.f16x2", "") and "add.f16x2 \t%r4, %r1, %r2;" in made
    assert "add.s16 %one0, %one0, %one1;" in made and "mov.b32 {%one1, %two1}, %r2;" in made
    assert "min.u16 %two0, %two0, %two1;" in made and "mov.b32 %r5, {%one0, %two0};" in made
    assert compile_worker.apart("\tadd.s32 \t%r3, %r1, %r2;\n") == "\tadd.s32 \t%r3, %r1, %r2;\n"


def test_small_indices_are_no_pairs_for_the_assembler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the first line fails, LLVM does not make pairs of these any more: is `pairs_apart` still needed?"""
    with in_folder(str(tmp_path / "plain")):
        assert "add.s16x2" in triton.compile(pad(), target=GPU, options=OPTIONS).asm["ptx"]
    monkeypatch.setattr(compile_workers, "compile_elsewhere", lambda *a: False)
    with in_folder(str(tmp_path / "ours")):
        assert "16x2" not in launch.compile_source(pad(), GPU, {"num_warps": 4, "num_stages": 1}).asm["ptx"]


def test_workers_take_pairs_apart(workers: Any, tmp_path: Path) -> None:
    assert compile_workers.compile_elsewhere(pad(), GPU, OPTIONS, str(tmp_path))
    (text,) = [p.read_text() for p in tmp_path.rglob("*.ptx")]
    assert "%one0" in text and "16x2" not in text


def test_hooks_of_others_stay(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[int] = []

    def theirs(*args: Any) -> Any:
        seen.append(len(args))
        return None if args else ("key", "digest")

    monkeypatch.setattr(triton.knobs.runtime, "add_stages_inspection_hook", theirs)
    with compile_worker.pairs_apart(), compile_worker.pairs_apart(), in_folder(str(tmp_path)):
        assert triton.knobs.runtime.add_stages_inspection_hook() == ("keypairs_apart", "digestpairs_apart")
        assert "16x2" not in triton.compile(pad(), target=GPU, options=OPTIONS).asm["ptx"]
    assert triton.knobs.runtime.add_stages_inspection_hook is theirs and 5 in seen


def test_hooks_that_others_set_and_put_back_meanwhile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two copies of the module, say: the one that ends last finds the other's hook, which has ended, or leaves it behind."""
    runtime = triton.knobs.runtime
    monkeypatch.setattr(runtime, "add_stages_inspection_hook", None)
    spec = importlib.util.spec_from_file_location("second_compile_worker", compile_worker.__file__)
    assert spec is not None and spec.loader is not None
    second = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(second)
    one, two = compile_worker.pairs_apart(), second.pairs_apart()
    one.__enter__()
    two.__enter__()
    one.__exit__(None, None, None)
    assert runtime.add_stages_inspection_hook is second._hook
    two.__exit__(None, None, None)
    for k, copy in enumerate((compile_worker, second, compile_worker)):
        with copy.pairs_apart(), in_folder(str(tmp_path / str(k))):
            assert "16x2" not in triton.compile(pad(), target=GPU, options=OPTIONS).asm["ptx"]
    assert runtime.add_stages_inspection_hook is None
