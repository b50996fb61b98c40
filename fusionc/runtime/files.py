"""File operations of the cache in one small layer, and private copies of binaries.

Every file operation of the cache goes through ``FileApi``, so that tests can make the n-th one fail.  Binaries are
loaded from a private copy of exactly the bytes that were hashed: nobody can swap or truncate them in between, and a
cache folder that is deleted under a running process takes nothing from it.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from pathlib import Path

EXCLUSIVE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class FileApi:
    """The file operations; all raise OSError.  Links are never followed by ``stat``; folders are made 0700."""

    def open(self, path: str, flags: int, mode: int = 0o600, dir_fd: int | None = None) -> int:
        return os.open(path, flags, mode, dir_fd=dir_fd)

    def read(self, fd: int, size: int) -> bytes:
        return os.read(fd, size)

    def write(self, fd: int, data: memoryview) -> int:
        return os.write(fd, data)

    def fsync(self, fd: int) -> None:
        os.fsync(fd)

    def close(self, fd: int) -> None:
        os.close(fd)

    def rename(self, old: str, new: str, dir_fd: int) -> None:
        os.rename(old, new, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)

    def unlink(self, name: str, dir_fd: int) -> None:
        os.unlink(name, dir_fd=dir_fd)

    def mkdir(self, name: str, dir_fd: int | None = None) -> None:
        os.mkdir(name, 0o700, dir_fd=dir_fd)

    def fstat(self, fd: int) -> os.stat_result:
        return os.fstat(fd)

    def stat(self, name: str, dir_fd: int | None = None) -> os.stat_result:
        return os.stat(name, dir_fd=dir_fd, follow_symlinks=False)

    def listdir(self, fd: int) -> list[str]:
        return os.listdir(fd)

    def touch(self, fd: int) -> None:
        os.utime(fd)

    def flock(self, fd: int) -> None:
        import fcntl

        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def now(self) -> float:
        return time.time()


_copies: dict[str, Path] = {}
_copies_mutex = threading.Lock()


def private_copy(data: bytes) -> tuple[str, int]:
    """``data`` in a file that nobody else can reach: ``(path, descriptor to close when loaded)``.

    On Linux an anonymous file (it also survives a wiped temp folder and never litters); elsewhere, or where those may
    not be executed, see ``private_file``.  Raises OSError.
    """
    flags = os.MFD_CLOEXEC
    try:
        fd = os.memfd_create("fusionc", flags | 0x10)  # MFD_EXEC: newer kernels ask for it, older do not know it
    except OSError:
        fd = os.memfd_create("fusionc", flags)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
    except BaseException:
        os.close(fd)
        raise
    return f"/proc/self/fd/{fd}", fd


def private_file(data: bytes) -> str:
    """``data`` as a 0500 file in a new 0700 folder; the caller removes both.  Raises OSError."""
    import tempfile

    path = os.path.join(tempfile.mkdtemp(prefix="fusionc-"), "binary.so")
    fd = os.open(path, EXCLUSIVE, 0o500)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
    finally:
        os.close(fd)
    return path


def lasting_copy(data: bytes) -> Path:
    """The path of a private copy of ``data`` that stays for the life of this process.  Raises OSError."""
    digest = hashlib.sha256(data).hexdigest()
    with _copies_mutex:
        if digest not in _copies:
            try:
                _copies[digest] = Path(private_copy(data)[0])  # the descriptor stays open on purpose
            except (OSError, AttributeError):
                import atexit
                import shutil

                path = private_file(data)
                atexit.register(shutil.rmtree, os.path.dirname(path), ignore_errors=True)
                _copies[digest] = Path(path)
        return _copies[digest]
