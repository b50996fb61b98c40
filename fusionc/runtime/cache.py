"""The disk cache: kernels and whole Programs as checked JSON, binaries by their hash.

Why it looks the way it does: compile caches fail in the field through races, half-written files, shared folders, full
disks and keys that forget an input.  So an entry is one JSON line that carries its own SHA-256 and its own key; it is
published by exclusive temp file, fsync and rename; it is read without a lock and without following links; and *any*
trouble is a miss, counted, that repairs itself.  Nothing read from disk is ever executed as Python.  Binaries are
hashed and then loaded from a private copy of exactly the bytes that were hashed, so nobody can swap or truncate them
in between.  A folder that others may write to is not used at all; a disk that is read-only, full or gone leaves a
cache that lives in memory, with one warning.

On disk: ``<root>/v<SCHEMA>/<kind>/<sha256 of the key>.json``, ``…/blob/<sha256 of the content>``, ``…/lock/<…>``.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import stat
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fusionc.errors import warn_once
from fusionc.runtime.environment import environment_key, source_fingerprint
from fusionc.runtime.files import EXCLUSIVE, FileApi, lasting_copy

__all__ = ["Cache", "Entry", "FileApi", "Stats", "environment_key", "key_digest", "open_cache", "source_fingerprint"]

SCHEMA = 1
KERNEL, PROGRAM = "kernel", "program"
MAX_BYTES = 2 << 30
MAX_ENTRY = 16 << 20  # one JSON entry; bounds time and memory that a hostile file can cost
MAX_BLOB = 256 << 20
_MEMORY_BYTES = 256 << 20
_STALE_SECONDS = 3600.0  # temp and lock files of dead processes; also how often LRU times are refreshed
_DISK_ERRORS = 3  # failed writes after which the disk is left alone

_KIND = re.compile(r"[a-z][a-z0-9_]{0,31}")
_SHA = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
_HEAD, _MIDDLE, _TAIL = b'{"sha256":"', b'","entry":', b"}\n"
_PERSISTENT = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.ELOOP}
_DIR_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_READ_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # NONBLOCK: a planted FIFO must not hang us


@dataclass
class Stats:
    """Counters of one Cache.  ``errors`` are file operations that failed; ``corrupt`` files that did not check."""

    hits: int = 0
    misses: int = 0
    puts: int = 0
    errors: int = 0
    corrupt: int = 0
    evicted: int = 0
    lock_timeouts: int = 0


@dataclass(frozen=True)
class Entry:
    """One file of the cache: ``kind`` is the namespace or "blob", ``used`` the time of last use in seconds."""

    kind: str
    name: str
    size: int
    used: float


class _Foreign(Exception):
    """A file or folder that is not plainly ours; the text says what and where."""


def canonical(value: object) -> str:
    """``value`` as JSON with sorted keys and no spaces.  Raises TypeError or ValueError for what JSON cannot hold."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def key_digest(key: Mapping[str, Any]) -> str:
    """The file name of ``key``: SHA-256 of its canonical JSON, in hex."""
    return hashlib.sha256(canonical(key).encode()).hexdigest()


def _encode(kind: str, key_text: str, payload: Mapping[str, Any], binaries: Mapping[str, tuple[str, int]]) -> bytes:
    rest = json.dumps(payload, separators=(",", ":"), allow_nan=False)
    body = f'{_opening(kind, key_text)}{canonical(binaries)},"payload":{rest}}}'.encode()
    return _HEAD + hashlib.sha256(body).hexdigest().encode() + _MIDDLE + body + _TAIL


def _opening(kind: str, key_text: str) -> str:
    return f'{{"schema":{SCHEMA},"kind":"{kind}","key":{key_text},"binaries":'


def _decode(data: bytes, kind: str, key_text: str | None = None) -> dict[str, Any]:
    """The entry in ``data`` after every check; ValueError says which one failed.  Bounded by the size of ``data``."""
    start = len(_HEAD) + 64 + len(_MIDDLE)
    if not (data.startswith(_HEAD) and data[len(_HEAD) + 64 : start] == _MIDDLE and data.endswith(_TAIL)):
        raise ValueError("the file is not a cache entry")
    body = memoryview(data)[start : -len(_TAIL)]
    if hashlib.sha256(body).hexdigest().encode() != data[len(_HEAD) : len(_HEAD) + 64]:
        raise ValueError("the content does not have the hash that it states")
    if key_text is not None and not data.startswith(_opening(kind, key_text).encode(), start):
        raise ValueError("the entry is for another schema, kind or key")
    try:
        entry = json.loads(bytes(body))
    except (RecursionError, MemoryError) as error:
        raise ValueError(f"the JSON is not reasonable: {type(error).__name__}") from None
    if not isinstance(entry, dict) or set(entry) != {"schema", "kind", "key", "binaries", "payload"}:
        raise ValueError("the entry does not have the fields schema, kind, key, binaries, payload")
    if type(entry["schema"]) is not int or entry["schema"] != SCHEMA or entry["kind"] != kind:
        raise ValueError("the entry is of another schema or kind")
    if not isinstance(entry["key"], dict) or not isinstance(entry["payload"], dict):
        raise ValueError("key and payload must be objects")
    binaries = entry["binaries"]
    if not isinstance(binaries, dict) or not all(_is_reference(n, r) for n, r in binaries.items()):
        raise ValueError("binaries must map names to [sha256, size]")
    return entry


def _is_reference(name: object, ref: object) -> bool:
    return (
        isinstance(name, str)
        and _NAME.fullmatch(name) is not None
        and isinstance(ref, list)
        and len(ref) == 2
        and isinstance(ref[0], str)
        and _SHA.fullmatch(ref[0]) is not None
        and type(ref[1]) is int
        and 0 <= ref[1] <= MAX_BLOB
    )


def default_base() -> Path | None:
    """``$XDG_CACHE_HOME/fusionc`` or ``~/.cache/fusionc``; None where there is no home folder."""
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(xdg):  # the XDG specification: relative values are to be ignored
        return Path(xdg) / "fusionc"
    home = os.path.expanduser("~")
    return Path(home) / ".cache" / "fusionc" if os.path.isabs(home) else None


class Cache:
    """A content-addressed store of JSON payloads and binaries.

    ``root`` is the folder that will hold ``v<SCHEMA>/`` (None: the user's cache folder); ``enabled=False`` keeps all in
    memory and touches no disk.  No method but ``put`` with a payload that is not JSON, ``export_tar`` and
    ``import_tar`` raises; the disk may do what it likes.  Threads may share a Cache, processes may share its folder.
    """

    def __init__(
        self,
        root: str | os.PathLike[str] | None = None,
        enabled: bool = True,
        max_bytes: int = MAX_BYTES,
        api: FileApi | None = None,
    ) -> None:
        self.api = api if api is not None else FileApi()
        base = Path(root) if root is not None else (default_base() if enabled else None)
        self.base = Path(os.path.abspath(base)) if base is not None and enabled else None
        self.max_bytes = max_bytes
        self.stats = Stats()
        self._mutex = threading.RLock()
        self._folders: dict[str, int] = {}  # kind -> open descriptor; "" is the root
        self._memory: dict[tuple[str, str], bytes] = {}
        self._memory_size = 0
        self._absent: set[str] = set()  # kinds whose folder can be neither found nor made
        self._off = None if self.base else ("the cache is switched off" if not enabled else "there is no home folder")
        self._unwritable: str | None = None
        self._write_errors = 0
        self._since_prune: int | None = None

    # -- reading and writing entries ---------------------------------------------------------------------------

    @property
    def root(self) -> Path | None:
        """The folder in use (it may not exist yet), or None for a cache in memory."""
        return self.base / f"v{SCHEMA}" if self.base is not None and self._off is None else None

    def get(self, kind: str, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """The payload that was put under ``key``, or None.  It is a fresh copy; callers validate what is in it."""
        entry = self._entry(kind, key)
        if entry is None:
            self.stats.misses += 1
            return None
        self.stats.hits += 1
        payload: dict[str, Any] = entry["payload"]
        return payload

    def put(
        self, kind: str, key: Mapping[str, Any], payload: Mapping[str, Any], binaries: Mapping[str, bytes] | None = None
    ) -> bool:
        """Store ``payload`` (JSON types only, no NaN) and ``binaries``; True when they reached the disk.

        Raises TypeError or ValueError for a payload, kind or name that cannot be stored: a fault of the caller.
        """
        _check_kind(kind)
        refs: dict[str, tuple[str, int]] = {}
        for name, data in (binaries or {}).items():
            if not _NAME.fullmatch(name):
                raise ValueError(f"{name!r} cannot be the name of a binary: letters, digits, '_', '.' and '-' only")
            refs[name] = (hashlib.sha256(data).hexdigest(), len(data))
        key_text = canonical(key)
        entry = _encode(kind, key_text, payload, refs)
        if len(entry) > MAX_ENTRY or any(size > MAX_BLOB for _, size in refs.values()):
            return False
        self.stats.puts += 1
        stored = True
        # Binaries first: an entry must never name a binary that was not yet there.
        for name, (digest, _) in refs.items():
            data = (binaries or {})[name]
            if self._read("blob", digest, MAX_BLOB) != data:
                stored = self._store("blob", digest, data) and stored
        stored = self._store(kind, hashlib.sha256(key_text.encode()).hexdigest() + ".json", entry) and stored
        self._maybe_prune(len(entry) + sum(size for _, size in refs.values()))
        return stored

    def blob(self, kind: str, key: Mapping[str, Any], name: str) -> bytes | None:
        """The binary ``name`` of an entry, checked against the hash in the entry; None is a miss."""
        entry = self._entry(kind, key)
        ref = entry["binaries"].get(name) if entry else None
        return self._blob(ref[0]) if ref else None

    def blobs(self, kind: str, key: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]] | None:
        """Payload and ``{name: sha256}`` in one read; ``blob_bytes(sha256)`` gives the bytes.  Counts as a get."""
        entry = self._entry(kind, key)
        if entry is None:
            self.stats.misses += 1
            return None
        self.stats.hits += 1
        return entry["payload"], {name: ref[0] for name, ref in entry["binaries"].items()}

    def blob_bytes(self, digest: str) -> bytes | None:
        """The bytes whose SHA-256 is ``digest``, or None; a file with other content is removed."""
        return self._blob(digest) if _SHA.fullmatch(digest) else None

    def binary(self, kind: str, key: Mapping[str, Any], name: str) -> Path | None:
        """A path of the checked binary that may be dlopened or imported, or None.

        The path is a private copy of the bytes that were hashed and stays valid for the life of this process.
        """
        data = self.blob(kind, key, name)
        if data is None:
            return None
        try:
            return lasting_copy(data)
        except OSError:
            self.stats.errors += 1
            return None

    def _entry(self, kind: str, key: Mapping[str, Any]) -> dict[str, Any] | None:
        _check_kind(kind)
        key_text = canonical(key)
        name = hashlib.sha256(key_text.encode()).hexdigest() + ".json"
        data = self._read(kind, name, MAX_ENTRY)
        if data is None:
            return None
        try:
            return _decode(data, kind, key_text)
        except ValueError:
            self._discard(kind, name)
            return None

    def _blob(self, digest: str) -> bytes | None:
        data = self._read("blob", digest, MAX_BLOB)
        if data is not None and hashlib.sha256(data).hexdigest() != digest:
            self._discard("blob", digest)
            return None
        return data

    def _read(self, kind: str, name: str, limit: int) -> bytes | None:
        """Content of one file on disk, else of memory, else None.  Not yet checked."""
        folder = self._folder(kind)
        if folder is not None:
            try:
                return self._read_file(folder, name, limit)
            except FileNotFoundError:
                pass
            except _Foreign:
                self._discard(kind, name)
            except OSError as error:
                self.stats.errors += 1
                if error.errno == errno.ELOOP:  # a symbolic link
                    self._discard(kind, name)
                elif error.errno == errno.ESTALE:
                    self._close_folders()
        return self._memory.get((kind, name))

    def _read_file(self, folder: int, name: str, limit: int) -> bytes:
        api = self.api
        fd = api.open(name, _READ_FLAGS, dir_fd=folder)
        try:
            info = api.fstat(fd)
            if not stat.S_ISREG(info.st_mode) or info.st_nlink > 1 or info.st_size > limit:
                raise _Foreign(f"{name} is not a plain file of a reasonable size")
            if info.st_uid not in (os.geteuid(), 0) or info.st_mode & 0o022:
                raise _Foreign(f"{name} belongs to another user or may be written by others")
            parts: list[bytes] = []
            left = info.st_size + 1  # one more: a file that grows under our hands shows
            while left > 0 and (part := api.read(fd, left)):
                parts.append(part)
                left -= len(part)
            if abs(api.now() - info.st_mtime) > _STALE_SECONDS:  # the LRU clock, coarse so that a hit costs no write
                with contextlib.suppress(OSError):
                    api.touch(fd)
            return parts[0] if len(parts) == 1 else b"".join(parts)
        finally:
            self._close(fd)

    def _store(self, kind: str, name: str, data: bytes) -> bool:
        """Publish one file; on any trouble keep it in memory.  True when it is on disk."""
        for attempt in range(2):
            folder = self._folder(kind) if self._unwritable is None else None
            if folder is None:
                break
            try:
                self._write_file(folder, name, data)
                self._write_errors = 0
                return True
            except OSError as error:
                self.stats.errors += 1
                if error.errno in (errno.ENOENT, errno.ESTALE) and attempt == 0:
                    self._close_folders()  # the folder was deleted while in use: make it again, once
                    continue
                if error.errno == errno.EISDIR:
                    self._discard(kind, name)
                self._write_errors += 1
                if error.errno in _PERSISTENT or self._write_errors >= _DISK_ERRORS:
                    self._unwritable = f"{error.strerror or error}"
                    self._warn(f"cannot be written to ({self._unwritable})")
                break
        with self._mutex:
            if (kind, name) not in self._memory:
                self._memory_size += len(data)
            self._memory[kind, name] = data
            while self._memory_size > _MEMORY_BYTES:
                self._memory_size -= len(self._memory.pop(next(iter(self._memory))))
        return False

    def _write_file(self, folder: int, name: str, data: bytes) -> None:
        api = self.api
        temp = f".tmp-{os.getpid()}-{os.urandom(8).hex()}"
        try:
            fd = api.open(temp, EXCLUSIVE, 0o600, dir_fd=folder)
            try:
                view = memoryview(data)
                while view:
                    view = view[api.write(fd, view) :]
                api.fsync(fd)
            finally:
                api.close(fd)
            api.rename(temp, name, folder)
        except BaseException:
            with contextlib.suppress(OSError):  # cleaning up must never be what fails
                api.unlink(temp, folder)
            raise

    def _discard(self, kind: str, name: str) -> None:
        """Remove a file that did not check, so that the next put repairs it."""
        self.stats.corrupt += 1
        with self._mutex:
            gone = self._memory.pop((kind, name), None)
            self._memory_size -= len(gone) if gone is not None else 0
        folder = self._folder(kind)
        if folder is None:
            return
        try:
            self.api.unlink(name, folder)
        except OSError:
            with contextlib.suppress(OSError):  # a folder under the name of a file: move it out of the way
                self.api.rename(name, f".tmp-bad-{os.urandom(8).hex()}", folder)

    # -- the folder ----------------------------------------------------------------------------------------------

    def _folder(self, kind: str) -> int | None:
        """Descriptor of ``<root>/<kind>``, made and checked on first use; None while the disk is not usable."""
        fd = self._folders.get(kind)
        if fd is not None or self._off is not None:
            return fd
        with self._mutex:
            try:
                if "" not in self._folders:
                    self._folders[""] = self._open_root()
                if kind in self._absent:
                    return None
                if kind not in self._folders:
                    self._folders[kind] = self._open_folder(kind, self._folders[""], str(self.root))
                return self._folders[kind]
            except _Foreign as error:
                self._off = str(error)
                self._warn(f"is not used: {error}")
            except OSError as error:
                self.stats.errors += 1
                if error.errno in _PERSISTENT and "" in self._folders:  # what is there may still be read
                    self._absent.add(kind)
                    self._unwritable = f"{error.strerror}"
                    self._warn(f"cannot be written to ({self._unwritable})")
                elif error.errno in _PERSISTENT:
                    self._off = f"{error.strerror}"
                    self._warn(f"cannot be used ({self._off})")
                elif error.errno in (errno.ENOENT, errno.ESTALE):
                    self._close_folders()
            return None

    def _open_root(self) -> int:
        assert self.base is not None
        parent, name = os.path.split(str(self.base))
        parent = os.path.realpath(parent)  # links above our own folder are the administrator's business
        self._make_parents(parent)
        above = parent
        while True:
            info = self.api.stat(above)
            if info.st_mode & stat.S_IWOTH and not info.st_mode & stat.S_ISVTX:
                raise _Foreign(f"{above} may be written by everybody")
            if above == os.path.dirname(above):
                break
            above = os.path.dirname(above)
        outer = self.api.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            base = self._open_folder(name, outer, parent)
        finally:
            self._close(outer)
        try:
            return self._open_folder(f"v{SCHEMA}", base, str(self.base))
        finally:
            self._close(base)

    def _make_parents(self, path: str) -> None:
        missing = []
        while True:
            try:
                self.api.stat(path)
                break
            except FileNotFoundError:
                missing.append(path)
                path = os.path.dirname(path)
        for each in reversed(missing):
            with contextlib.suppress(FileExistsError):
                self.api.mkdir(each)

    def _open_folder(self, name: str, outer: int, where: str) -> int:
        try:
            fd = self.api.open(name, _DIR_FLAGS, dir_fd=outer)
        except FileNotFoundError:
            with contextlib.suppress(FileExistsError):
                self.api.mkdir(name, dir_fd=outer)
            fd = self.api.open(name, _DIR_FLAGS, dir_fd=outer)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENOTDIR):
                raise _Foreign(f"{os.path.join(where, name)} is a link or not a folder") from None
            raise
        try:
            info = self.api.fstat(fd)
            if info.st_uid not in (os.geteuid(), 0):
                raise _Foreign(f"{os.path.join(where, name)} belongs to user {info.st_uid}")
            if info.st_mode & 0o022:
                raise _Foreign(f"{os.path.join(where, name)} may be written by others (mode {info.st_mode & 0o777:o})")
        except BaseException:
            self._close(fd)
            raise
        return fd

    def folder(self, name: str) -> Path | None:
        """A checked folder of ours for another program's cache (Triton's, say), or None."""
        _check_kind(name)
        return self.root / name if self._folder(name) is not None and self.root is not None else None

    def close(self) -> None:
        """Close the folder's descriptors.  The cache stays usable: they are opened again when needed."""
        self._close_folders()

    def _close_folders(self) -> None:
        with self._mutex:
            folders, self._folders = self._folders, {}
        for fd in folders.values():
            self._close(fd)

    def _close(self, fd: int) -> None:
        """Close what was only read from: there is nothing that an error could tell."""
        with contextlib.suppress(OSError):
            self.api.close(fd)

    def __del__(self) -> None:
        try:
            self._close_folders()
        except Exception:  # the interpreter may be half torn down
            return

    def _warn(self, what: str) -> None:
        warn_once(
            f"cache:{self.base}",
            f"the fusionc cache {self.base} {what}; compiled code is kept in memory only. Name another folder with "
            f"options={{'cache': <folder>}} or FUSIONC_CACHE, or switch it off with FUSIONC_CACHE=0.",
        )

    # -- one lock per key, only against double work ------------------------------------------------------------------

    @contextlib.contextmanager
    def lock(self, kind: str, key: Mapping[str, Any], timeout: float = 10.0) -> Iterator[bool]:
        """Hold the lock of ``key``; yields False where it could not be had within ``timeout`` seconds.

        The caller goes on either way: the lock saves double work, it does not protect anything.
        """
        name = f"{kind}-{key_digest(key)}"
        fd = self._acquire(name, timeout)
        try:
            yield fd is not None
        finally:
            if fd is not None:
                folder = self._folder("lock")
                with contextlib.suppress(OSError):
                    if folder is not None:
                        self.api.unlink(name, folder)
                self._close(fd)

    def _acquire(self, name: str, timeout: float) -> int | None:
        folder = self._folder("lock") if self._unwritable is None else None
        end, pause = time.monotonic() + timeout, 0.001
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        while folder is not None:
            try:
                fd = self.api.open(name, flags, 0o600, dir_fd=folder)
            except OSError:
                self.stats.errors += 1
                return None
            try:
                self.api.flock(fd)
                if self.api.stat(name, folder).st_ino == self.api.fstat(fd).st_ino:
                    return fd
                error: OSError | None = None  # the holder before us removed the file: try with the new one
            except OSError as failure:
                error = failure
            self._close(fd)
            if error is not None and error.errno not in (errno.EAGAIN, errno.EACCES, errno.ENOENT):
                self.stats.errors += 1  # no locks on this file system
                return None
            if time.monotonic() >= end:
                self.stats.lock_timeouts += 1
                return None
            if error is not None:
                time.sleep(pause)
                pause = min(pause * 2, 0.05)
        return None

    # -- upkeep: what `fusionc cache …` calls ------------------------------------------------------------------------

    def entries(self, kind: str | None = None) -> list[Entry]:
        """All files, newest use first; ``kind`` limits to one namespace ("blob" for binaries)."""
        kinds = [k for k in self._kinds() if k != "lock" and kind in (None, k)]
        found = [e for k in kinds for e in self._scan(k) if not e.name.startswith(".")]
        return sorted(found, key=lambda e: (-e.used, e.kind, e.name))

    def show(self, prefix: str) -> list[dict[str, Any]]:
        """The checked entries whose file name starts with ``prefix`` (hex digits), as dicts."""
        shown = []
        for entry in self.entries():
            if entry.kind != "blob" and entry.name.startswith(prefix):
                with contextlib.suppress(ValueError):
                    data = self._read(entry.kind, entry.name, MAX_ENTRY)
                    if data is not None:
                        shown.append(_decode(data, entry.kind))
        return shown

    def verify(self, repair: bool = True) -> list[str]:
        """Check every file; one sentence for each that is bad.  ``repair`` removes them."""
        problems = []
        for entry in self.entries():
            problem = self._problem(entry)
            if problem is not None:
                problems.append(f"{entry.kind}/{entry.name}: {problem}")
                if repair:
                    self._discard(entry.kind, entry.name)
        return problems

    def _problem(self, entry: Entry) -> str | None:
        folder = self._folder(entry.kind)
        if folder is None:
            return None
        try:
            data = self._read_file(folder, entry.name, MAX_BLOB if entry.kind == "blob" else MAX_ENTRY)
            return _content_problem(entry.kind, entry.name, data)
        except FileNotFoundError:
            return None  # somebody pruned it
        except (OSError, _Foreign) as error:
            return str(error)

    def prune(self, max_bytes: int | None = None) -> int:
        """Remove litter of dead processes, then the least recently used files beyond ``max_bytes``; the number removed.

        Files "used" in the future (the clock was set back) go first.
        """
        limit = self.max_bytes if max_bytes is None else max_bytes
        now, total, removed = self.api.now(), 0, 0
        files: list[tuple[float, int, Entry]] = []
        for kind in self._kinds():
            for entry in self._scan(kind):
                if entry.name.startswith(".") or kind == "lock":
                    if abs(now - entry.used) > _STALE_SECONDS:
                        removed += self._remove_litter(entry)
                    continue
                size = max(4096, entry.size)  # a small file takes a block
                total += size
                files.append((entry.used if entry.used < now + _STALE_SECONDS else 0.0, size, entry))
        if total > limit:
            for _, size, entry in sorted(files, key=lambda f: (f[0], f[2].kind, f[2].name)):
                if total <= limit * 4 // 5:  # some room, so that the next put does not prune again
                    break
                total -= size
                removed += self._remove(entry)
                self.stats.evicted += 1
        return removed

    def clear(self) -> int:
        """Remove every file of this schema; the number removed.  Other schemas and other folders are not touched."""
        with self._mutex:
            self._memory.clear()
            self._memory_size = 0
        return sum(self._remove(entry) for kind in self._kinds() for entry in self._scan(kind))

    def _kinds(self) -> list[str]:
        root = self._folder("")
        if root is None:
            return []
        try:
            return sorted(k for k in self.api.listdir(root) if _KIND.fullmatch(k) and self._folder(k) is not None)
        except OSError:
            self.stats.errors += 1
            return []

    def _scan(self, kind: str) -> list[Entry]:
        folder, found = self._folder(kind), []
        if folder is None:
            return []
        try:
            for name in self.api.listdir(folder):
                if kind == "lock" or name.startswith(".tmp-") or _SHA.fullmatch(name.removesuffix(".json")):
                    with contextlib.suppress(FileNotFoundError):
                        info = self.api.stat(name, folder)
                        found.append(Entry(kind, name, info.st_size, info.st_mtime))
        except OSError:
            self.stats.errors += 1
        return found

    def _remove(self, entry: Entry) -> int:
        folder = self._folder(entry.kind)
        try:
            if folder is not None:
                self.api.unlink(entry.name, folder)
                return 1
        except FileNotFoundError:
            pass
        except OSError:
            self.stats.errors += 1
        return 0

    def _remove_litter(self, entry: Entry) -> int:
        """Remove an old temp file, or an old lock file that nobody holds."""
        if entry.kind != "lock" or entry.name.startswith("."):
            return self._remove(entry)
        fd = self._acquire(entry.name, 0.0)
        if fd is None:
            return 0
        removed = self._remove(entry)
        self._close(fd)
        return removed

    def _maybe_prune(self, size: int) -> None:
        """Prune in a process's first put if nobody did for an hour, then once per eighth of the size limit."""
        root = self._folder("") if self._unwritable is None else None
        if root is None:
            return
        if self._since_prune is None:
            self._since_prune = 0
            try:
                fd = self.api.open(".pruned", _READ_FLAGS | os.O_CREAT, 0o600, dir_fd=root)
                try:
                    # Size 0 and age 0 look alike for a new file: then there is nothing old to prune either.
                    if abs(self.api.now() - self.api.fstat(fd).st_mtime) < _STALE_SECONDS:
                        return
                    self.api.touch(fd)
                finally:
                    self._close(fd)
            except OSError:
                self.stats.errors += 1
                return
        else:
            self._since_prune += size
            if self._since_prune < self.max_bytes // 8:
                return
            self._since_prune = 0
        self.prune()

    # -- shipping a tuned cache --------------------------------------------------------------------------------------

    def export_tar(self, path: str | os.PathLike[str]) -> int:
        """Write every file that checks into the tar ``path`` (same content, same bytes); the number written."""
        import io
        import tarfile

        count = 0
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for entry in sorted(self.entries(), key=lambda e: (e.kind != "blob", e.kind, e.name)):
                folder = self._folder(entry.kind)
                if folder is None or self._problem(entry) is not None:
                    continue
                with contextlib.suppress(OSError, _Foreign):
                    data = self._read_file(folder, entry.name, MAX_BLOB)
                    if _content_problem(entry.kind, entry.name, data) is None:
                        member = tarfile.TarInfo(f"{entry.kind}/{entry.name}")
                        member.size, member.mode = len(data), 0o600
                        tar.addfile(member, io.BytesIO(data))
                        count += 1
        return count

    def import_tar(self, path: str | os.PathLike[str], binaries: bool = True) -> tuple[int, list[str]]:
        """Take over the entries of a tar made by ``export_tar``; ``(number taken, sentences about what was refused)``.

        Nothing is unpacked by name: a member is read, checked like any entry, and written under the name of its own
        hash.  Links, folders, other names and wrong hashes are refused.  Binaries are machine code: import them only
        from whom you would take a program (``binaries=False`` takes plans alone; binaries are then built anew).
        Raises OSError or tarfile.TarError for a file that cannot be read as a tar.
        """
        import tarfile

        taken, refused, total = 0, [], 0
        with tarfile.open(path, "r:") as tar:  # no compression: the size of the file bounds the work
            for member in tar:
                kind, _, name = member.name.partition("/")
                limit = MAX_BLOB if kind == "blob" else MAX_ENTRY
                shown = ascii(member.name[:120])
                if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.size > limit:
                    refused.append(f"{shown}: not a plain file of a reasonable size")
                    continue
                if kind == "lock" or not _KIND.fullmatch(kind) or not _SHA.fullmatch(name.removesuffix(".json")):
                    refused.append(f"{shown}: not the name of a cache entry")
                    continue
                total += member.size
                if total > self.max_bytes:
                    refused.append(f"{shown}: larger than the whole cache may be; the rest was left")
                    break
                stream = tar.extractfile(member)
                data = stream.read(limit + 1) if stream is not None else b""
                problem = _content_problem(kind, name, data)
                if problem is not None:
                    refused.append(f"{shown}: {problem}")
                elif binaries or kind != "blob":
                    taken += self._store(kind, name, data)
        return taken, refused

    def as_dict(self) -> dict[str, Any]:
        """State for reports: folder, counters, and why the disk is not used where it is not."""
        root = str(self.root) if self.root else None
        return {"root": root, "off": self._off or self._unwritable, **asdict(self.stats)}


def _check_kind(kind: str) -> None:
    if not _KIND.fullmatch(kind) or kind in ("blob", "lock"):
        raise ValueError(f"{kind!r} cannot be a namespace of the cache: a-z, 0-9 and '_' only, not 'blob' or 'lock'")


def _content_problem(kind: str, name: str, data: bytes) -> str | None:
    """Why ``data`` may not stand under ``kind/name``, or None."""
    if kind == "blob":
        return None if hashlib.sha256(data).hexdigest() == name else "the content does not have the hash of its name"
    if len(data) > MAX_ENTRY:
        return "the entry is too large"
    try:
        key = _decode(data, kind)["key"]
        return None if key_digest(key) + ".json" == name else "the name is not the hash of the key"
    except (ValueError, RecursionError) as error:
        return str(error)


_opened: dict[str, Cache] = {}


def open_cache(setting: bool | str | os.PathLike[str] = True) -> Cache:
    """The process-wide Cache for ``options["cache"]``: True = the user's folder, False = memory only, else a folder."""
    name = str(setting) if not isinstance(setting, bool) else f"{setting}:{default_base()}"
    if name not in _opened:
        _opened[name] = Cache(None if isinstance(setting, bool) else setting, enabled=setting is not False)
    return _opened[name]
