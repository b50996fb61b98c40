"""S1–S3: hostile cache entries, folders of others, links and devices.  Nothing runs, nothing hangs, all is a miss."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import random
import socket
import stat
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fusionc.errors import FallbackWarning, reset_warnings
from fusionc.runtime.cache import KERNEL, MAX_ENTRY, SCHEMA, Cache, canonical, key_digest

KEY = {"structure": "y = x + 1"}
PAYLOAD = {"plan": {"tile": 32}}
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="needs chown or mknod")


@pytest.fixture(autouse=True)
def _fresh_warnings() -> Iterator[None]:
    reset_warnings()
    yield
    reset_warnings()


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "canary"
    yield path
    assert not path.exists(), "something in a cache entry was executed"


def _file(base: Path, kind: str = "kernel", key: dict = KEY) -> Path:
    return base / f"v{SCHEMA}" / kind / (key_digest(key) + ".json")


def _signed(body: bytes) -> bytes:
    """``body`` with a right hash around it: the attacker can compute hashes too."""
    return b'{"sha256":"' + hashlib.sha256(body).hexdigest().encode() + b'","entry":' + body + b"}\n"


def _body(payload: str = "{}", binaries: str = "{}", tail: str = "") -> bytes:
    head = f'{{"schema":{SCHEMA},"kind":"kernel","key":{canonical(KEY)},"binaries":'
    return f'{head}{binaries},"payload":{payload}{tail}}}'.encode()


class _Payload:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple:
        return (os.mkdir, (str(self.canary),))


def _hostile(canary: Path) -> dict[str, bytes]:
    run = f"__import__('os').mkdir({str(canary)!r})"
    return {
        "pickle": pickle.dumps(_Payload(canary)),
        "signed pickle": _signed(pickle.dumps(_Payload(canary))),
        "python": run.encode(),
        "deep list": _signed(_body('{"a":' + "[" * 200_000 + "]" * 200_000 + "}")),
        "deep object": _signed(_body('{"a":' * 100_000 + "1" + "}" * 100_000)),
        "unclosed": _signed(_body("[" * 1_000_000)),
        "long number": _signed(_body('{"a":' + "9" * 1_000_000 + "}")),
        "payload a list": _signed(_body("[1]")),
        "payload a string": _signed(_body(json.dumps(run))),
        "payload null": _signed(_body("null")),
        "unknown field": _signed(_body(tail=',"code":' + json.dumps(run))),
        "second key": _signed(_body(tail=',"key":{"structure":"other"},"more":1')),
        "binaries a list": _signed(_body(binaries="[]")),
        "binary outside": _signed(_body(binaries='{"so":["../../../etc/passwd",1]}')),
        "binary name a path": _signed(_body(binaries='{"../so":["' + "a" * 64 + '",1]}')),
        "binary size negative": _signed(_body(binaries='{"so":["' + "a" * 64 + '",-1]}')),
        "binary size true": _signed(_body(binaries='{"so":["' + "a" * 64 + '",true]}')),
        "binary three long": _signed(_body(binaries='{"so":["' + "a" * 64 + '",1,1]}')),
        "schema true": _signed(_body().replace(b'"schema":1', b'"schema":true')),
        "schema other": _signed(_body().replace(b'"schema":1', b'"schema":99')),
        "kind other": _signed(_body().replace(b'"kind":"kernel"', b'"kind":"program"')),
        "not utf-8": _signed(b"\xff\xfe" + _body()),
        "nul": b"\0" * 5000,
        "empty": b"",
        "only the frame": _signed(b""),
        "two lines": _signed(_body()) * 2,
        "upper case hash": _signed(_body()).replace(*(lambda h: (h, h.upper()))(_signed(_body())[11:75])),
    }


@pytest.mark.parametrize("name", sorted(_hostile(Path("x"))))
def test_s1_hostile_entry_is_a_miss(tmp_path: Path, canary: Path, name: str) -> None:
    cache = Cache(tmp_path / "c")
    cache.put(KERNEL, KEY, PAYLOAD)
    file = _file(tmp_path / "c")
    file.write_bytes(_hostile(canary)[name])
    start = time.process_time()
    assert cache.get(KERNEL, KEY) is None and cache.blob(KERNEL, KEY, "so") is None
    assert cache.show(key_digest(KEY)) == []
    assert time.process_time() - start < 5
    assert not file.exists()
    assert cache.put(KERNEL, KEY, PAYLOAD) and cache.get(KERNEL, KEY) == PAYLOAD


def test_s1_a_huge_entry_is_not_even_read(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "c")
    cache.put(KERNEL, KEY, PAYLOAD)
    file = _file(tmp_path / "c")
    with open(file, "r+b") as stream:
        stream.truncate(MAX_ENTRY * 1000)  # sparse
    assert cache.get(KERNEL, KEY) is None and not file.exists()


def _random_json(rng: random.Random, depth: int = 3) -> Any:
    kind = rng.randrange(8 if depth else 6)
    if kind == 6:
        return [_random_json(rng, depth - 1) for _ in range(rng.randrange(4))]
    if kind == 7:
        return {rng.choice(["key", "kind", "schema", "so", "x"]): _random_json(rng, depth - 1) for _ in range(3)}
    return [None, True, -1, 1e308, "a" * rng.randrange(70), 10**30][kind]


def _random_entries(tmp_path: Path, count: int) -> None:
    rng, cache = random.Random(0), Cache(tmp_path / "c")
    cache.put(KERNEL, KEY, PAYLOAD)
    file = _file(tmp_path / "c")
    good = file.read_bytes()
    for _ in range(count):
        choice = rng.randrange(3)
        if choice == 0:
            fields = {
                n: _random_json(rng) for n in ("schema", "kind", "key", "binaries", "payload") if rng.random() < 0.9
            }
            data = _signed(json.dumps(fields).encode())
        elif choice == 1:
            data = _signed(_body(json.dumps(_random_json(rng)), json.dumps(_random_json(rng))))
        else:
            data = bytearray(good)
            for _ in range(rng.randrange(1, 20)):
                data[rng.randrange(len(data))] = rng.randrange(256)
        file.write_bytes(data)
        file.chmod(0o600)
        got = cache.get(KERNEL, KEY)
        assert got is None or type(got) is dict
        if got is None:
            assert not file.exists()
    assert cache.put(KERNEL, KEY, PAYLOAD)


def test_s1_random_entries(tmp_path: Path, canary: Path) -> None:
    _random_entries(tmp_path, 1000)


@pytest.mark.slow
def test_s1_ten_thousand_random_entries(tmp_path: Path, canary: Path) -> None:
    _random_entries(tmp_path, 10_000)


# -- S2: folders that others can write to ------------------------------------------------------------------------------


def _refused(cache: Cache, what: str) -> None:
    with pytest.warns(FallbackWarning, match=what) as caught:
        assert not cache.put(KERNEL, KEY, PAYLOAD)
        cache.put(KERNEL, {"n": 2}, PAYLOAD)
    assert len(caught) == 1 and cache.get(KERNEL, KEY) == PAYLOAD and cache.root is None


@pytest.mark.parametrize("where", ["c", f"c/v{SCHEMA}", f"c/v{SCHEMA}/kernel"])
@pytest.mark.parametrize("mode", [0o777, 0o770, 0o720, 0o702, 0o1777])
def test_s2_writable_by_others(tmp_path: Path, where: str, mode: int) -> None:
    Cache(tmp_path / "c").put(KERNEL, KEY, {"planted": True})
    (tmp_path / where).chmod(mode)
    _refused(Cache(tmp_path / "c"), "may be written by others")


def test_s2_parent_writable_by_everybody(tmp_path: Path) -> None:
    (tmp_path / "shared" / "mine").mkdir(parents=True)
    (tmp_path / "shared").chmod(0o777)
    _refused(Cache(tmp_path / "shared" / "mine" / "c"), "may be written by everybody")


def test_s2_a_sticky_parent_is_fine(tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    (tmp_path / "tmp").chmod(0o1777)  # like /tmp: others cannot replace what is ours
    cache = Cache(tmp_path / "tmp" / "c")
    assert cache.put(KERNEL, KEY, PAYLOAD) and cache.get(KERNEL, KEY) == PAYLOAD


@root_only
@pytest.mark.parametrize("where", ["c", f"c/v{SCHEMA}", f"c/v{SCHEMA}/kernel"])
def test_s2_owned_by_another_user(tmp_path: Path, where: str) -> None:
    Cache(tmp_path / "c").put(KERNEL, KEY, {"planted": True})
    os.chown(tmp_path / where, 12345, 12345)
    _refused(Cache(tmp_path / "c"), "belongs to user 12345")


@pytest.mark.parametrize("where", ["c", f"c/v{SCHEMA}", f"c/v{SCHEMA}/kernel"])
def test_s2_symbolic_link(tmp_path: Path, where: str) -> None:
    Cache(tmp_path / "c").put(KERNEL, KEY, {"planted": True})
    (tmp_path / where).rename(tmp_path / "elsewhere")
    (tmp_path / where).symlink_to(tmp_path / "elsewhere")
    _refused(Cache(tmp_path / "c"), "is a link")


# -- S3: entries that are not plain files ------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["symlink", "dangling", "fifo", "socket", "hard link", "device", "owner", "mode"])
@pytest.mark.parametrize("kind", ["kernel", "blob"])
def test_s3_only_plain_files_of_this_user(tmp_path: Path, what: str, kind: str) -> None:
    cache = Cache(tmp_path / "c")
    cache.put(KERNEL, KEY, PAYLOAD, {"so": b"binary"})
    folder = tmp_path / "c" / f"v{SCHEMA}" / kind
    (file,) = folder.iterdir()
    victim = tmp_path / "victim"
    victim.write_bytes(file.read_bytes())
    victim.chmod(0o600)
    file.unlink()
    if what in ("device", "owner") and os.geteuid() != 0:
        pytest.skip("needs root")
    if what == "symlink":
        file.symlink_to(victim)
    elif what == "dangling":
        file.symlink_to(tmp_path / "nowhere")
    elif what == "fifo":
        os.mkfifo(file)
    elif what == "socket":
        where = os.getcwd()
        os.chdir(folder)  # the name of a socket must be short
        try:
            socket.socket(socket.AF_UNIX).bind("s")
        finally:
            os.chdir(where)
        (folder / "s").rename(file)
    elif what == "hard link":
        os.link(victim, file)
    elif what == "device":
        try:
            os.mknod(file, 0o600 | stat.S_IFCHR, os.makedev(1, 5))  # /dev/zero
        except OSError:
            pytest.skip("no mknod here")
    else:
        file.write_bytes(victim.read_bytes())
        if what == "owner":
            os.chown(file, 12345, 12345)
        else:
            file.chmod(0o666)
    before = victim.read_bytes()
    start = time.monotonic()
    if kind == "kernel":
        assert cache.get(KERNEL, KEY) is None
    else:
        assert cache.blob(KERNEL, KEY, "so") is None
    assert time.monotonic() - start < 5, "a FIFO or device must not hold us up"
    cache.put(KERNEL, KEY, PAYLOAD, {"so": b"binary"})
    assert cache.get(KERNEL, KEY) == PAYLOAD and cache.blob(KERNEL, KEY, "so") == b"binary"
    assert victim.read_bytes() == before and stat.S_ISREG(os.lstat(file).st_mode)
    assert not (tmp_path / "nowhere").exists()


def test_s3_a_planted_lock_link_is_not_followed(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "c")
    with cache.lock(KERNEL, KEY):
        (name,) = [p.name for p in (tmp_path / "c" / f"v{SCHEMA}" / "lock").iterdir()]
    (tmp_path / "c" / f"v{SCHEMA}" / "lock" / name).symlink_to(tmp_path / "target")
    with cache.lock(KERNEL, KEY, timeout=0.1) as held:
        assert not held
    assert not (tmp_path / "target").exists()


# -- import of a hostile tar -------------------------------------------------------------------------------------------


def _tar(path: Path, members: list[tuple[tarfile.TarInfo, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for info, data in members:
            info.size = len(data) if info.type == tarfile.REGTYPE else 0
            tar.addfile(info, io.BytesIO(data))
    return path


def test_import_refuses_everything_but_good_entries(tmp_path: Path, canary: Path) -> None:
    good = _signed(_body('{"ok":1}'))
    name = f"kernel/{key_digest(KEY)}.json"

    def link(kind: bytes, name: str, target: str) -> tuple[tarfile.TarInfo, bytes]:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, target
        return info, b""

    bad = [
        (tarfile.TarInfo("../../evil"), b"x"),
        (tarfile.TarInfo("/abs/evil"), b"x"),
        (tarfile.TarInfo(f"kernel/../{'a' * 64}.json"), good),
        (tarfile.TarInfo(f"lock/{'a' * 64}"), b"x"),
        (tarfile.TarInfo(f"kernel/{'a' * 64}.json"), good),
        (tarfile.TarInfo(f"program/{key_digest(KEY)}.json"), good),
        (tarfile.TarInfo(f"blob/{'a' * 64}"), b"not that content"),
        (tarfile.TarInfo(name), pickle.dumps(_Payload(canary))),
        link(tarfile.SYMTYPE, name, "/etc/passwd"),
        link(tarfile.LNKTYPE, f"blob/{'b' * 64}", "/etc/passwd"),
        link(tarfile.CHRTYPE, f"blob/{'c' * 64}", ""),
        link(tarfile.DIRTYPE, "kernel", ""),
    ]
    cache = Cache(tmp_path / "c")
    taken, refused = cache.import_tar(_tar(tmp_path / "t.tar", [*bad, (tarfile.TarInfo(name), good)]))
    assert taken == 1 and len(refused) == len(bad)
    assert cache.get(KERNEL, KEY) == {"ok": 1}
    assert [e.kind for e in cache.entries()] == ["kernel"] and cache.verify() == []
    outside = {p.name for p in tmp_path.iterdir()} - {"c", "t.tar"}
    assert outside == set()


def test_import_refuses_compressed_tars(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "bomb.tar.gz", "w:gz") as tar:
        info = tarfile.TarInfo(f"blob/{'a' * 64}")
        info.size = 1 << 20
        tar.addfile(info, io.BytesIO(bytes(1 << 20)))
    with pytest.raises(tarfile.TarError):
        Cache(tmp_path / "c").import_tar(tmp_path / "bomb.tar.gz")
