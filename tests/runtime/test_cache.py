"""The cache on a good day: round trips, keys, upkeep, shipping."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import pytest

from fusionc.runtime import cache as cache_module
from fusionc.runtime.cache import KERNEL, PROGRAM, SCHEMA, Cache, FileApi, default_base, key_digest, open_cache
from fusionc.runtime.environment import cpu_fingerprint, environment_key, source_fingerprint

KEY = {"structure": "y = x + 1", "shape": [2, 3], "dtype": "float32"}
PAYLOAD = {"plan": {"tile": 32, "order": ["i", "j"]}, "µs": 1.5, "none": None}


def test_round_trip_across_objects_and_kinds(tmp_path: Path) -> None:
    first = Cache(tmp_path / "c")
    assert first.get(KERNEL, KEY) is None
    assert first.put(KERNEL, KEY, PAYLOAD, {"unit.so": b"\x7fELF", "empty": b""})
    second = Cache(tmp_path / "c")
    assert second.get(KERNEL, KEY) == PAYLOAD
    assert second.get(PROGRAM, KEY) is None, "namespaces are apart"
    assert second.blob(KERNEL, KEY, "unit.so") == b"\x7fELF"
    assert second.blob(KERNEL, KEY, "empty") == b""
    assert second.blob(KERNEL, KEY, "other") is None
    assert (first.stats.misses, first.stats.puts, second.stats.hits, second.stats.misses) == (1, 1, 1, 1)
    found = second.blobs(KERNEL, KEY)
    assert found is not None and second.blob_bytes(found[1]["unit.so"]) == b"\x7fELF"
    assert second.blob_bytes("../../etc/passwd") is None


def test_modes_names_and_content_are_as_promised(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        Cache(tmp_path / "a" / "c").put(KERNEL, KEY, PAYLOAD, {"so": b"1"})
    finally:
        os.umask(old)
    root = tmp_path / "a" / "c" / f"v{SCHEMA}"
    for folder in (root.parent, root, root / "kernel", root / "blob", tmp_path / "a"):
        assert folder.stat().st_mode & 0o777 == 0o700, folder
    (file,) = (root / "kernel").iterdir()
    assert file.name == key_digest(KEY) + ".json" and file.stat().st_mode & 0o777 == 0o600
    line = file.read_text()
    assert line.count("\n") == 1 and json.loads(line)["entry"]["payload"] == PAYLOAD


def test_put_replaces_and_get_is_a_fresh_copy(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "c")
    cache.put(KERNEL, KEY, {"a": [1]})
    got = cache.get(KERNEL, KEY)
    assert got is not None
    got["a"].append(2)
    assert cache.get(KERNEL, KEY) == {"a": [1]}
    cache.put(KERNEL, KEY, {"b": 2})
    assert cache.get(KERNEL, KEY) == {"b": 2}


@pytest.mark.parametrize("payload", [{"x": float("nan")}, {"x": {1}}, {"x": b"1"}])
def test_put_refuses_what_json_cannot_hold(tmp_path: Path, payload: dict) -> None:
    with pytest.raises((TypeError, ValueError)):
        Cache(tmp_path / "c").put(KERNEL, KEY, payload)


@pytest.mark.parametrize("kind", ["", "blob", "lock", "../up", "A", "a/b", "a" * 40])
def test_bad_kinds_are_refused(tmp_path: Path, kind: str) -> None:
    with pytest.raises(ValueError, match="namespace"):
        Cache(tmp_path / "c").get(kind, KEY)


def test_bad_binary_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="name of a binary"):
        Cache(tmp_path / "c").put(KERNEL, KEY, {}, {"../x": b""})


def test_oversized_entries_are_not_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "MAX_ENTRY", 1000)
    cache = Cache(tmp_path / "c")
    assert not cache.put(KERNEL, KEY, {"x": "y" * 2000})
    assert cache.get(KERNEL, KEY) is None


def test_memory_only(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    cache = Cache(tmp_path / "c", enabled=False)
    assert not cache.put(KERNEL, KEY, PAYLOAD, {"so": b"12"})
    assert cache.get(KERNEL, KEY) == PAYLOAD and cache.blob(KERNEL, KEY, "so") == b"12"
    assert cache.root is None and not (tmp_path / "c").exists() and not recwarn.list
    assert cache.entries() == [] and cache.prune() == 0 and cache.verify() == []
    with cache.lock(KERNEL, KEY) as held:
        assert not held
    cache.clear()
    assert cache.get(KERNEL, KEY) is None


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "_MEMORY_BYTES", 10_000)
    cache = Cache(enabled=False)
    for number in range(100):
        cache.put(KERNEL, {"n": number}, {"x": "y" * 1000})
    assert cache.get(KERNEL, {"n": 99}) is not None and cache.get(KERNEL, {"n": 0}) is None
    assert cache._memory_size == sum(map(len, cache._memory.values())) <= 10_000


def test_binary_is_a_checked_private_copy(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "c")
    data = os.urandom(5000)
    cache.put(KERNEL, KEY, {}, {"so": data})
    path = cache.binary(KERNEL, KEY, "so")
    assert path is not None and path.read_bytes() == data
    for file in (tmp_path / "c").rglob("*"):  # the copy does not care what becomes of the folder
        if file.is_file():
            file.write_bytes(b"")
    assert path.read_bytes() == data
    assert cache.binary(KERNEL, KEY, "so") is None


def test_default_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_base() == tmp_path / "fusionc"
    assert Cache().root == tmp_path / "fusionc" / f"v{SCHEMA}"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_base() == tmp_path / "home" / ".cache" / "fusionc"
    assert open_cache(tmp_path / "x") is open_cache(str(tmp_path / "x"))
    assert open_cache(False).root is None


def test_folder_for_others(tmp_path: Path) -> None:
    path = Cache(tmp_path / "c").folder("triton")
    assert path is not None and path.is_dir() and path.stat().st_mode & 0o777 == 0o700


def test_lock_excludes_within_and_across_objects(tmp_path: Path) -> None:
    one, two = Cache(tmp_path / "c"), Cache(tmp_path / "c")
    with one.lock(KERNEL, KEY) as held:
        assert held
        with two.lock(KERNEL, KEY, timeout=0.05) as again:
            assert not again
        with two.lock(KERNEL, {"other": 1}, timeout=0.05) as other:
            assert other
    with two.lock(KERNEL, KEY, timeout=0.05) as held:
        assert held
    assert list((tmp_path / "c" / f"v{SCHEMA}" / "lock").iterdir()) == []
    assert two.stats.lock_timeouts == 1


def test_lock_passes_from_thread_to_thread(tmp_path: Path) -> None:
    cache, inside, seen = Cache(tmp_path / "c"), [], []

    def work() -> None:
        with cache.lock(KERNEL, KEY) as held:
            inside.append(1)
            seen.append((held, len(inside)))
            inside.pop()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert seen == [(True, 1)] * 8


class Clock(FileApi):
    """Time that tests move."""

    shift = 0.0

    def now(self) -> float:
        return super().now() + self.shift


def test_prune_takes_the_least_recently_used(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "c", max_bytes=10 * 4096)
    for number in range(12):
        cache.put(KERNEL, {"n": number}, {"n": number})
        os.utime(tmp_path / "c" / f"v{SCHEMA}" / "kernel" / (key_digest({"n": number}) + ".json"), (0, 1000 + number))
    assert cache.get(KERNEL, {"n": 0}) is not None, "a hit makes it recently used"
    assert cache.prune() == 4
    left = [n for n in range(12) if cache.get(KERNEL, {"n": n}) is not None]
    assert left == [0, *range(5, 12)]
    assert cache.prune(0) == 8 and cache.entries() == []


def test_prune_with_the_clock_set_back_and_same_second_writes(tmp_path: Path) -> None:
    clock = Clock()
    cache = Cache(tmp_path / "c", max_bytes=10 * 4096, api=clock)
    for number in range(12):
        cache.put(KERNEL, {"n": number}, {})
    clock.shift = -(10**7)  # all files are now "from the future"
    assert cache.prune() == 4 and len(cache.entries()) == 8


def test_put_prunes_by_itself(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "c", max_bytes=200_000)
    for number in range(30):
        cache.put(KERNEL, {"n": number}, {"x": "y" * 15_000})
    assert sum(e.size for e in cache.entries()) < 300_000 and cache.stats.evicted > 0


def test_litter_of_dead_processes_is_swept(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "c")
    cache.put(KERNEL, KEY, {})
    root = tmp_path / "c" / f"v{SCHEMA}"
    (root / "lock").mkdir(mode=0o700, exist_ok=True)
    old = [root / "kernel" / ".tmp-1-ab", root / "lock" / "kernel-dead"]
    new = root / "kernel" / ".tmp-2-cd"
    for path in (*old, new):
        path.write_bytes(b"half")
    for path in old:
        os.utime(path, (1, 1))
    with cache.lock(KERNEL, {"long": 1}) as held:
        (mine,) = [p for p in (root / "lock").iterdir() if p != old[1]]
        os.utime(mine, (1, 1))
        assert held and cache.prune() == 2 and mine.exists(), "a lock that is held is no litter"
    assert new.exists() and not any(path.exists() for path in old) and cache.get(KERNEL, KEY) == {}


def test_first_put_of_a_process_sweeps_after_an_hour(tmp_path: Path) -> None:
    Cache(tmp_path / "c").put(KERNEL, KEY, {})
    root = tmp_path / "c" / f"v{SCHEMA}"
    (root / "kernel" / ".tmp-1-ab").write_bytes(b"")
    os.utime(root / "kernel" / ".tmp-1-ab", (1, 1))
    Cache(tmp_path / "c").put(KERNEL, KEY, {})
    assert (root / "kernel" / ".tmp-1-ab").exists(), "swept less than an hour ago"
    os.utime(root / ".pruned", (1, 1))
    Cache(tmp_path / "c").put(KERNEL, KEY, {})
    assert not (root / "kernel" / ".tmp-1-ab").exists()


def test_entries_show_verify_clear(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "c")
    cache.put(KERNEL, KEY, PAYLOAD, {"so": b"1"})
    cache.put(PROGRAM, KEY, {"steps": []})
    assert sorted(e.kind for e in cache.entries()) == ["blob", "kernel", "program"]
    assert [e.kind for e in cache.entries(PROGRAM)] == ["program"]
    shown = cache.show(key_digest(KEY)[:8])
    assert sorted(e["kind"] for e in shown) == ["kernel", "program"] and shown[0]["key"] == KEY
    assert cache.verify() == []
    file = tmp_path / "c" / f"v{SCHEMA}" / "kernel" / (key_digest(KEY) + ".json")
    file.write_bytes(file.read_bytes().replace(b"32", b"33"))
    (problem,) = cache.verify(repair=False)
    assert "hash" in problem and file.exists()
    assert len(cache.verify()) == 1 and not file.exists() and cache.verify() == []
    assert cache.clear() == 2 and cache.entries() == []
    assert cache.as_dict()["corrupt"] == 1


def test_export_import(tmp_path: Path) -> None:
    source, target = Cache(tmp_path / "a"), Cache(tmp_path / "b")
    source.put(KERNEL, KEY, PAYLOAD, {"so": b"123"})
    source.put(PROGRAM, KEY, {"steps": [1]})
    assert source.export_tar(tmp_path / "one.tar") == 3
    assert source.export_tar(tmp_path / "two.tar") == 3
    assert (tmp_path / "one.tar").read_bytes() == (tmp_path / "two.tar").read_bytes()
    assert target.import_tar(tmp_path / "one.tar") == (3, [])
    assert target.get(KERNEL, KEY) == PAYLOAD and target.blob(KERNEL, KEY, "so") == b"123"
    plans = Cache(tmp_path / "p")
    assert plans.import_tar(tmp_path / "one.tar", binaries=False) == (2, [])
    assert plans.get(KERNEL, KEY) == PAYLOAD and plans.blob(KERNEL, KEY, "so") is None


def test_import_stops_at_the_size_limit(tmp_path: Path) -> None:
    source = Cache(tmp_path / "a")
    source.put(KERNEL, KEY, PAYLOAD, {"so": b"1" * 5000})
    source.export_tar(tmp_path / "t.tar")
    taken, refused = Cache(tmp_path / "b", max_bytes=1000).import_tar(tmp_path / "t.tar")
    assert taken == 0 and "larger" in refused[0]


def test_import_of_something_else_raises(tmp_path: Path) -> None:
    (tmp_path / "t.tar").write_bytes(b"no tar")
    with pytest.raises(tarfile.TarError):
        Cache(tmp_path / "b").import_tar(tmp_path / "t.tar")


def test_environment_key() -> None:
    key = environment_key()
    assert key == environment_key("cpu") and {"python", "torch", "isa", "machine", "device"} <= set(key)
    target = environment_key("sm_90")
    assert target["device"] == "sm_90" and {"triton", "cuda", "hip"} <= set(target)
    key["python"] = "changed"
    assert environment_key()["python"] != "changed", "callers get their own copy"


def test_cpu_fingerprint_sees_flags_not_speed(tmp_path: Path) -> None:
    def of(text: str) -> str:
        (tmp_path / "cpuinfo").write_text(text)
        return cpu_fingerprint(str(tmp_path / "cpuinfo"))

    base = of("vendor_id\t: A\ncpu MHz\t: 1000\nflags\t: avx2 fma\n\nflags : none\n")
    assert base == of("vendor_id\t: A\ncpu MHz\t: 2000\nflags\t: fma avx2\n\n")
    assert base != of("vendor_id\t: A\ncpu MHz\t: 1000\nflags\t: avx2 fma avx512f\n\n")
    assert cpu_fingerprint(str(tmp_path / "none"))


def test_source_fingerprint_is_of_the_named_packages() -> None:
    assert source_fingerprint() == source_fingerprint()
    assert source_fingerprint(("runtime",)) != source_fingerprint(("ir",)) != source_fingerprint()


def test_import_is_cheap() -> None:
    """Warm start is counted: neither torch nor what only upkeep needs may come in with the module."""
    code = (
        "import sys, fusionc.runtime.cache as c; print([m for m in ('torch', 'tarfile', 'tempfile', 'ctypes', 'triton')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code + " if m in sys.modules])"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
