"""Triton's folder is that of whoever compiles, also with several at a time, and Triton's own outside."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton import knobs
from triton.runtime.cache import FileCacheManager, get_cache_manager

from fusionc.errors import CompileError
from fusionc.runtime import binaries, cuda_driver, launch, tune
from fusionc.runtime.binaries import in_folder
from fusionc.runtime.launch import compile_beside, compile_many
from fusionc.runtime.templates import Template


def place() -> str:
    """Where a kernel compiled now would be stored."""
    return os.path.dirname(str(get_cache_manager("0" * 64).cache_dir))


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    with knobs.cache.scope():
        yield


def test_the_folder_of_the_context(tmp_path: Path) -> None:
    a, b, triton = (str(tmp_path / n) for n in ("a", "b", "triton"))
    with in_folder(a):
        assert place() == a
        with in_folder(b):
            assert place() == b
        with in_folder(None):
            assert place() == a
        get_cache_manager("1" * 64).put("text", "file")
        assert get_cache_manager("1" * 64).get_file("file")
    assert place() == triton and os.environ["TRITON_CACHE_DIR"] == triton
    assert get_cache_manager("1" * 64).get_file("file") is None


def test_threads_of_a_batch_have_its_folder_and_others_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_slots", threading.BoundedSemaphore(4))  # however few cores there are
    a, b, triton = (str(tmp_path / n) for n in ("a", "b", "triton"))
    both = threading.Barrier(2, timeout=30)

    def job() -> str:
        both.wait()
        return place()

    found: dict[str, Any] = {}

    def other() -> None:
        with in_folder(b):
            found["b"] = compile_many([place, place], workers=2)
        found["outside"] = compile_many([place, place], workers=2)

    with in_folder(a):
        waiting = compile_beside([place])
        thread = threading.Thread(target=other)
        thread.start()
        assert compile_many([job, job], workers=2) == [a, a]
        thread.join()
    assert waiting.result() == [a]
    assert found == {"b": [b, b], "outside": [triton, triton]}


def test_somebody_elses_manager_stays(tmp_path: Path) -> None:
    class Theirs(FileCacheManager):
        pass

    knobs.cache.manager_class = Theirs
    with in_folder(str(tmp_path / "a")):
        assert type(get_cache_manager("0" * 64)) is Theirs and place() == str(tmp_path / "triton")


def test_threads_that_are_the_first_at_a_time_install_one_manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both, original = threading.Barrier(2), binaries._manager.__wrapped__

    def together() -> None:
        with contextlib.suppress(threading.BrokenBarrierError):  # where one waits for the other
            both.wait(0.3)

    @functools.cache
    def made() -> Any:
        together()
        return original()

    def slow() -> Any:
        mine = made()
        together()
        if mine is not made():  # who is remembered is not who is installed
            time.sleep(0.3)
        return mine

    monkeypatch.setattr(binaries, "_manager", slow)
    monkeypatch.setattr(knobs.cache, "manager_class", None)
    found: list[str] = []

    def first() -> None:
        with in_folder(str(tmp_path / "a")):
            found.append(place())

    threads = [threading.Thread(target=first) for _ in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    first()
    assert found == [str(tmp_path / "a")] * 3


def test_files_are_whole_and_nothing_else_is_left(tmp_path: Path) -> None:
    with in_folder(str(tmp_path / "a")):
        manager: Any = get_cache_manager("2" * 64)
        manager.put(b"\0binary", "k.cubin")
        manager.put("text", "k.ptx")
        manager.put("more", "k.ptx")
        manager.put_group("k.json", {"k.ptx": manager.get_file("k.ptx")})
        again: Any = get_cache_manager("2" * 64)
        group = again.get_group("k.json")
    assert Path(group["k.ptx"]).read_text() == "more" and Path(again.get_file("k.cubin")).read_bytes() == b"\0binary"
    assert sorted(p.name for p in Path(again.cache_dir).iterdir()) == ["__grp__k.json", "k.cubin", "k.ptx"]


def test_a_cache_that_is_emptied_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with in_folder(str(tmp_path / "a")):
        manager: Any = get_cache_manager("2" * 64)
    shutil.rmtree(tmp_path / "a")
    assert Path(manager.put(b"binary", "k.cubin")).read_bytes() == b"binary"

    def full(*_: Any) -> None:
        raise OSError("no space")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        manager.put(b"binary", "k.ptx")
    assert [p.name for p in Path(manager.cache_dir).iterdir()] == ["k.cubin"]


def test_kernels_of_operators_live_in_the_cache_of_the_races(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    kernel = Template("", "k", (), (), torch.device("cpu"), 1)
    monkeypatch.setattr(cuda_driver, "target", lambda: None)
    monkeypatch.setattr(Template, "build", lambda self, gpu: seen.append(place()))
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    try:
        for cache in (str(tmp_path / "ours"), False):
            tune.configure(cache=cache)
            with pytest.raises(CompileError):
                kernel.prepare()
            kernel._failure = ""
    finally:
        tune.forget()
    assert seen[0].startswith(str(tmp_path / "ours")) and seen[1] == str(tmp_path / "triton")


def test_our_keys_name_libraries_as_the_file_system_does_and_others_keep_theirs() -> None:
    from triton.runtime import cache

    before = cache.triton_key
    with binaries.quick_keys():
        mine = cache.triton_key()
        inner: list[str] = []
        other = threading.Thread(target=lambda: inner.append(cache.triton_key()))
        other.start()
        other.join()
    assert len(mine) == 64 and mine == binaries._libraries()
    content = getattr(before, "by_content", before)()
    assert inner == [content] and cache.triton_key() == content and content != mine
    assert cache.triton_key.cache_info().currsize == 1
    with binaries.quick_keys():
        assert cache.triton_key.by_content is getattr(before, "by_content", before)  # not one around the other


def test_keys_change_with_a_library_and_are_tritons_without_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import triton
    from triton.runtime import cache

    root = tmp_path / "triton"
    (root / "_C").mkdir(parents=True)
    monkeypatch.setattr(triton, "__file__", str(root / "__init__.py"))
    digest = binaries._libraries.__wrapped__
    assert digest() is None
    library = root / "_C" / "libtriton.so"
    library.write_bytes(b"one")
    first = digest()
    os.utime(library, ns=(1, 1))
    second = digest()
    library.write_bytes(b"three")
    assert len({first, second, digest(), None}) == 4
    monkeypatch.setattr(binaries, "_libraries", lambda: None)
    with binaries.quick_keys():
        assert cache.triton_key() == cache.triton_key.by_content()
    monkeypatch.delattr(cache, "triton_key")  # a Triton that has none
    with binaries.quick_keys():
        assert not hasattr(cache, "triton_key")
