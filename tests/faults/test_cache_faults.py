"""Faults F1–F7 of the cache: whatever the disk does, the answer is right or a miss, and the next run repairs itself."""

from __future__ import annotations

import copy
import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fusionc.errors import FallbackWarning, reset_warnings
from fusionc.runtime.cache import KERNEL, SCHEMA, Cache, FileApi, key_digest

KEY = {"structure": "y = x + 1", "shape": [2, 3]}
PAYLOAD = {"plan": {"tile": 32}, "text": "for i in 0..3"}
BINARIES = {"unit.so": b"\x7fELF and more"}
ERRORS = (errno.ENOSPC, errno.EIO, errno.EACCES, errno.EROFS, errno.EMFILE, errno.ESTALE, errno.EBUSY)


@pytest.fixture(autouse=True)
def _fresh_warnings() -> Iterator[None]:
    reset_warnings()
    yield
    reset_warnings()


def _entry_file(root: Path) -> Path:
    return root / f"v{SCHEMA}" / "kernel" / (key_digest(KEY) + ".json")


# -- F1: truncated at every length, every byte flipped ----------------------------------------------------------------


def test_f1_every_truncation_and_every_flipped_byte_is_a_miss(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    payload = {"rows": list(range(500))}
    cache.put(KERNEL, KEY, payload)
    file = _entry_file(tmp_path)
    whole = file.read_bytes()
    assert len(whole) > 1800
    mode = os.O_WRONLY | os.O_CREAT | os.O_TRUNC

    def case(data: bytes) -> None:
        fd = os.open(file, mode, 0o600)
        os.write(fd, data)
        os.close(fd)
        assert cache.get(KERNEL, KEY) is None
        assert not file.exists(), "a file that does not check is removed"

    for length in range(len(whole)):
        case(whole[:length])
    rng = random.Random(1)
    for at in range(len(whole)):
        case(whole[:at] + bytes([whole[at] ^ (1 << rng.randrange(8))]) + whole[at + 1 :])
    case(whole + b"\n")
    case(whole + whole)
    assert cache.stats.corrupt == 2 * len(whole) + 2
    assert cache.put(KERNEL, KEY, payload) and cache.get(KERNEL, KEY) == payload


def test_f1_every_truncation_of_a_binary_is_a_miss(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    data = bytes(range(200))
    cache.put(KERNEL, KEY, PAYLOAD, {"so": data})
    (file,) = (tmp_path / f"v{SCHEMA}" / "blob").iterdir()
    for length in range(len(data)):
        file.write_bytes(data[:length])
        file.chmod(0o600)
        assert cache.blob(KERNEL, KEY, "so") is None and not file.exists()
    cache.put(KERNEL, KEY, PAYLOAD, {"so": data})
    file.write_bytes(data[::-1])
    cache.put(KERNEL, KEY, PAYLOAD, {"so": data})
    assert cache.blob(KERNEL, KEY, "so") == data, "a put repairs a bad binary of the right size"


# -- F2: the n-th file operation fails ---------------------------------------------------------------------------------


class Faulty(FileApi):
    """Operation number ``at`` (and all later ones if ``forever``) fails with ``code``."""

    def __init__(self, at: int, code: int, forever: bool = False) -> None:
        self.at, self.code, self.forever, self.count = at, code, forever, 0

    def _step(self) -> None:
        self.count += 1
        if self.count == self.at or (self.forever and self.count > self.at):
            raise OSError(self.code, os.strerror(self.code))

    def close(self, fd: int) -> None:
        super().close(fd)  # as on Linux: the descriptor is gone even where close reports an error
        self._step()


def _wrap(name: str) -> Any:
    real = getattr(FileApi, name)

    def step(self: Faulty, *args: Any, **kwargs: Any) -> Any:
        self._step()
        return real(self, *args, **kwargs)

    return step


for _name in (
    "open",
    "read",
    "write",
    "fsync",
    "rename",
    "unlink",
    "mkdir",
    "fstat",
    "stat",
    "listdir",
    "touch",
    "flock",
):
    setattr(Faulty, _name, _wrap(_name))


def _scenario(root: Path, api: FileApi) -> None:
    """A compile with a cold cache, then one with a warm one."""
    cache = Cache(root, api=api)
    try:
        assert cache.get(KERNEL, KEY) in (None, PAYLOAD)
        with cache.lock(KERNEL, KEY, timeout=0.01):
            cache.put(KERNEL, KEY, PAYLOAD, BINARIES)
        assert cache.get(KERNEL, KEY) in (None, PAYLOAD)
        assert cache.blob(KERNEL, KEY, "unit.so") in (None, BINARIES["unit.so"])
        cache.prune()
        cache.entries()
    finally:
        cache.close()


def _check_nothing_broken(root: Path) -> None:
    clean = Cache(root)
    assert clean.verify(repair=False) == [], "nothing half-written under a final name"
    assert clean.get(KERNEL, KEY) in (None, PAYLOAD)
    assert clean.put(KERNEL, KEY, PAYLOAD, BINARIES), "the next run repairs itself"
    assert clean.get(KERNEL, KEY) == PAYLOAD and clean.blob(KERNEL, KEY, "unit.so") == BINARIES["unit.so"]
    clean.close()


def _anomalies(tmp_path: Path, forever: bool) -> int:
    cases = 0
    for code in ERRORS:
        at = 0
        while True:
            at += 1
            reset_warnings()
            root = tmp_path / f"{code}-{at}"
            api = Faulty(at, code, forever)
            before = len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                _scenario(root, api)
            assert len(caught) <= 1 and all(w.category is FallbackWarning for w in caught)
            _check_nothing_broken(root)
            if before:
                assert len(os.listdir("/proc/self/fd")) == before, f"descriptor leaked at operation {at}"
            shutil.rmtree(root)
            cases += 1
            if api.count < at:
                break
    return cases


def test_f2_the_nth_operation_fails_once(quick_disk: Path) -> None:
    assert _anomalies(quick_disk, forever=False) > 30 * len(ERRORS)


def test_f2_all_operations_fail_from_the_nth_on(quick_disk: Path) -> None:
    assert _anomalies(quick_disk, forever=True) > 30 * len(ERRORS)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_f2_a_disk_that_cannot_be_written_leaves_a_memory_cache(tmp_path: Path, code: int) -> None:
    class Unwritable(FileApi):
        def write(self, fd: int, data: memoryview) -> int:
            raise OSError(code, os.strerror(code))

    Cache(tmp_path).put(KERNEL, {"old": 1}, PAYLOAD)
    cache = Cache(tmp_path, api=Unwritable())
    with pytest.warns(FallbackWarning, match=r"cannot be written.*memory only") as caught:
        for number in range(20):
            assert not cache.put(KERNEL, {"n": number}, {"n": number})
    assert len(caught) == 1, "one warning"
    assert all(cache.get(KERNEL, {"n": n}) == {"n": n} for n in range(20))
    assert cache.get(KERNEL, {"old": 1}) == PAYLOAD, "what is there can still be read"


@pytest.fixture
def quick_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder where fsync costs nothing: the loops below sync a thousand times."""
    memory = Path("/dev/shm")
    path = Path(tempfile.mkdtemp(dir=memory if os.access(memory, os.W_OK) else tmp_path))
    yield path
    shutil.rmtree(path)


# -- F3: the real thing ------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "disk"
    path.mkdir(mode=0o700)
    tool = shutil.which("mount")
    command = [tool or "mount", "-t", "tmpfs", "-o", "size=64k,mode=0700", "tmpfs", str(path)]
    if os.geteuid() != 0 or tool is None or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("mounting needs root and a kernel that lets it")
    yield path
    subprocess.run(["umount", "-l", str(path)], capture_output=True, check=False)


def test_f3_full_disk(small_disk: Path) -> None:
    cache = Cache(small_disk / "c")
    with pytest.warns(FallbackWarning, match="cannot be written") as caught:
        for number in range(20):
            cache.put(KERNEL, {"n": number}, {"x": str(number) * 9000})
    assert len(caught) == 1
    assert all(cache.get(KERNEL, {"n": n}) == {"x": str(n) * 9000} for n in range(20))
    assert not list(small_disk.rglob(".tmp-*")) and Cache(small_disk / "c").verify() == []


def test_f3_read_only_disk(small_disk: Path) -> None:
    Cache(small_disk / "c").put(KERNEL, KEY, PAYLOAD, {"so": b"1"})
    if subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], capture_output=True).returncode != 0:
        pytest.skip("cannot remount")
    cache = Cache(small_disk / "c")
    assert cache.get(KERNEL, KEY) == PAYLOAD and cache.blob(KERNEL, KEY, "so") == b"1"
    with pytest.warns(FallbackWarning) as caught:
        with cache.lock(KERNEL, KEY):
            cache.put(KERNEL, {"new": 1}, PAYLOAD)
    assert len(caught) == 1 and cache.get(KERNEL, {"new": 1}) == PAYLOAD
    with pytest.warns(FallbackWarning):
        fresh = Cache(small_disk / "other")
        fresh.put(KERNEL, KEY, PAYLOAD)
    assert fresh.get(KERNEL, KEY) == PAYLOAD and fresh.root is None


def test_f3_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("fusionc.runtime.cache.os.path.expanduser", lambda path: path)
    cache = Cache()
    assert cache.root is None and not cache.put(KERNEL, KEY, PAYLOAD) and cache.get(KERNEL, KEY) == PAYLOAD


@pytest.mark.parametrize("where", ["c", "c/v1", "c/v1/kernel"])
def test_f3_folder_replaced_by_a_file(tmp_path: Path, where: str) -> None:
    path = tmp_path / where
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("not a folder")
    cache = Cache(tmp_path / "c")
    with pytest.warns(FallbackWarning, match="fusionc cache") as caught:
        cache.put(KERNEL, KEY, PAYLOAD, BINARIES)
    assert len(caught) == 1 and cache.get(KERNEL, KEY) == PAYLOAD and path.read_text() == "not a folder"


def test_f3_entry_replaced_by_a_folder(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.put(KERNEL, KEY, PAYLOAD)
    file = _entry_file(tmp_path)
    file.unlink()
    file.mkdir()
    (file / "inner").write_text("x")
    assert cache.get(KERNEL, KEY) is None
    assert cache.put(KERNEL, KEY, PAYLOAD) and cache.get(KERNEL, KEY) == PAYLOAD and file.is_file()


def test_f3_folder_deleted_while_in_use(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    cache = Cache(tmp_path / "c")
    cache.put(KERNEL, KEY, PAYLOAD, BINARIES)
    shutil.rmtree(tmp_path / "c")
    assert cache.get(KERNEL, KEY) is None
    with cache.lock(KERNEL, KEY):
        assert cache.put(KERNEL, KEY, PAYLOAD, BINARIES)
    assert Cache(tmp_path / "c").get(KERNEL, KEY) == PAYLOAD and not recwarn.list
    shutil.rmtree(tmp_path / "c")
    assert cache.prune() == 0 and cache.entries() == [] and cache.clear() == 0


# -- F4: kill -9 -------------------------------------------------------------------------------------------------------

_WRITER = """
import sys
from fusionc.runtime.cache import Cache
cache = Cache(sys.argv[1])
print("ready", flush=True)
for number in range(10**6):
    n = number % 10
    cache.put("kernel", {"n": n}, {"n": n, "text": "x" * 20000}, {"so": bytes([n]) * 100000})
"""


def _kill_writers(tmp_path: Path, times: int) -> None:
    rng = random.Random(0)
    for _ in range(times):
        with subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(tmp_path / "c")], stdout=subprocess.PIPE, cwd=_repository()
        ) as child:
            assert child.stdout is not None and child.stdout.readline() == b"ready\n"
            time.sleep(rng.random() * 0.03)
            child.send_signal(signal.SIGKILL)
        cache = Cache(tmp_path / "c")
        assert cache.verify(repair=False) == []
        for n in range(10):
            got = cache.get(KERNEL, {"n": n})
            assert got is None or got == {"n": n, "text": "x" * 20000}
            assert cache.blob(KERNEL, {"n": n}, "so") == (None if got is None else bytes([n]) * 100000)
        cache.close()
    for temp in (tmp_path / "c").rglob(".tmp-*"):
        os.utime(temp, (1, 1))
    cache.prune()
    assert not list((tmp_path / "c").rglob(".tmp-*")), "no growing litter"


def _repository() -> str:
    return str(Path(__file__).resolve().parents[2])


def test_f4_kill_during_writes(tmp_path: Path) -> None:
    _kill_writers(tmp_path, 8)


@pytest.mark.slow
def test_f4_kill_during_writes_200_times(tmp_path: Path) -> None:
    _kill_writers(tmp_path, 200)


# -- F5: many processes, one folder ------------------------------------------------------------------------------------

_WORKER = """
import sys, time
from fusionc.runtime.cache import Cache
cache = Cache(sys.argv[1])
start = time.monotonic()
for n in range(int(sys.argv[2])):
    key = {"n": n}
    got = cache.get("kernel", key)
    if got is None:
        with cache.lock("kernel", key, timeout=5.0):
            got = cache.get("kernel", key)
            if got is None:
                cache.put("kernel", key, {"n": n, "x": "y" * 3000}, {"so": b"%d" % n * 1000})
    got = cache.get("kernel", key)
    assert got == {"n": n, "x": "y" * 3000}, got
    assert cache.blob("kernel", key, "so") == b"%d" % n * 1000
assert time.monotonic() - start < 60
print(cache.stats.puts, cache.stats.corrupt, cache.stats.errors)
"""


def _race(tmp_path: Path, processes: int, keys: int) -> None:
    command = [sys.executable, "-W", "error", "-c", _WORKER, str(tmp_path / "c"), str(keys)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, cwd=_repository()) for _ in range(processes)]
    puts = 0
    for each in running:
        out, _ = each.communicate(timeout=300)
        assert each.returncode == 0
        mine, corrupt, failed = map(int, out.split())
        assert corrupt == failed == 0
        puts += mine
    assert puts == keys, "the lock saves double work"
    assert Cache(tmp_path / "c").verify() == [] and not list((tmp_path / "c").rglob(".tmp-*"))


def test_f5_processes_share_a_cold_folder(tmp_path: Path) -> None:
    _race(tmp_path, 4, 25)


@pytest.mark.slow
def test_f5_sixteen_processes_fifty_keys(tmp_path: Path) -> None:
    _race(tmp_path, 16, 50)


_HOLDER = """
import sys, time
from fusionc.runtime.cache import Cache
with Cache(sys.argv[1]).lock("kernel", {"n": 1}) as held:
    print(held, flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("blow", [signal.SIGSTOP, signal.SIGKILL])
def test_f5_a_stopped_or_killed_holder_stops_nobody(tmp_path: Path, blow: signal.Signals) -> None:
    command = [sys.executable, "-c", _HOLDER, str(tmp_path / "c")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=_repository()) as child:
        try:
            assert child.stdout is not None and child.stdout.readline() == b"True\n"
            child.send_signal(blow)
            if blow == signal.SIGKILL:
                child.wait()
            cache = Cache(tmp_path / "c")
            with cache.lock(KERNEL, {"n": 1}, timeout=0.2) as held:
                assert held is (blow == signal.SIGKILL), "a dead process holds nothing, a stopped one is not waited for"
                assert cache.put(KERNEL, {"n": 1}, PAYLOAD)
            assert cache.get(KERNEL, {"n": 1}) == PAYLOAD
        finally:
            child.kill()


# -- F6: many entries --------------------------------------------------------------------------------------------------


def _crowd(tmp_path: Path, count: int) -> None:
    cache = Cache(tmp_path, max_bytes=count * 4096 // 2)
    cache.put(KERNEL, KEY, PAYLOAD)
    folder = tmp_path / f"v{SCHEMA}" / "kernel"
    for number in range(count):
        (folder / f"{number:064x}.json").touch(0o600)
    assert cache.prune() == pytest.approx(count * 6 // 10, abs=3)
    assert len(os.listdir(folder)) <= count // 2


def test_f6_prune_with_many_entries(tmp_path: Path) -> None:
    _crowd(tmp_path, 2000)


@pytest.mark.slow
def test_f6_prune_with_a_hundred_thousand_entries(tmp_path: Path) -> None:
    _crowd(tmp_path, 100_000)


# -- F7: every field of a key counts -----------------------------------------------------------------------------------

_FULL_KEY: dict[str, Any] = {
    "source": "a" * 64,
    "plan_schema": 1,
    "env": {"torch": "2.13.0", "triton": "3.7.1", "driver": 12080, "capability": [9, 0], "device": "H200", "isa": "x"},
    "dtype": ["float32", "int64"],
    "strides": ["contiguous", "channels_last"],
    "alignment": 16,
    "config": {"deterministic": True, "mode": "default", "threads": None, "rtol": 1.0},
}


def _changes(value: Any) -> Iterator[Any]:
    """``value`` with one leaf changed, for each leaf, and with one leaf left out or added."""
    if isinstance(value, dict):
        for name in value:
            for changed in _changes(value[name]):
                yield {**value, name: changed}
            yield {k: v for k, v in value.items() if k != name}
        yield {**value, "one_more": 0}
    elif isinstance(value, list):
        for at in range(len(value)):
            for changed in _changes(value[at]):
                yield [*value[:at], changed, *value[at + 1 :]]
        yield value[::-1] if value[::-1] != value else [*value, 0]
    elif isinstance(value, bool) or value is None:
        yield not value
        yield "True"
    elif isinstance(value, (int, float)):
        yield value + 1
        yield str(value)
    else:
        yield value + " "


def test_f7_every_field_of_the_key_counts(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.put(KERNEL, _FULL_KEY, PAYLOAD)
    changed = list(_changes(_FULL_KEY))
    assert len(changed) > 35
    for key in changed:
        assert cache.get(KERNEL, key) is None, key
    assert cache.get(KERNEL, copy.deepcopy(_FULL_KEY)) == PAYLOAD, "a hit for the unchanged twin"
    assert cache.get(KERNEL, dict(reversed(_FULL_KEY.items()))) == PAYLOAD, "the order of fields does not count"


def test_f7_an_entry_under_the_name_of_another_key_is_a_miss(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.put(KERNEL, {"other": 1}, PAYLOAD)
    source = tmp_path / f"v{SCHEMA}" / "kernel" / (key_digest({"other": 1}) + ".json")
    source.rename(_entry_file(tmp_path))
    assert cache.get(KERNEL, KEY) is None and cache.stats.corrupt == 1
