"""Which folder Triton looks for binaries in and writes them to: a choice of each compilation, not of the process.

Triton has one setting for everything that a process compiles.  A graph's kernels belong into the cache of its options
while, in other threads, kernels of operators and of other people compile into Triton's own folder.  So the folder is a
context variable, which a cache manager of ours reads (Triton's ``knobs.cache.manager_class``); threads that compile for
somebody run in a copy of his context (`launch.compile_many`).  Without a folder the manager is Triton's.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import threading
import uuid
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

__all__ = ["current", "in_folder", "in_tritons", "quick_keys"]

_folder: ContextVar[str | None] = ContextVar("fusionc_triton_folder", default=None)
_quick: ContextVar[bool] = ContextVar("fusionc_quick_keys", default=False)
_guard = threading.Lock()  # of installing: two classes, and one of them would pass for somebody else's


@contextlib.contextmanager
def in_folder(folder: str | os.PathLike[str] | None) -> Iterator[None]:
    """Binaries of what this context compiles with Triton live in ``folder``; None: where they would without this.

    Whoever gave Triton a cache manager of his own keeps it, and his folders.
    """
    if folder is not None and _installed():
        token = _folder.set(os.fspath(folder))
        try:
            yield
        finally:
            _folder.reset(token)
    else:
        yield


@contextlib.contextmanager
def in_tritons() -> Iterator[None]:
    """Files of what this context makes with Triton live where Triton keeps its own, also inside `in_folder`."""
    token = _folder.set(None)
    try:
        yield
    finally:
        _folder.reset(token)


def current() -> str | None:
    """The folder that what compiles now goes to; None where somebody's own cache manager decides that."""
    from triton import knobs

    if knobs.cache.manager_class not in (None, _manager()):
        return None
    return _folder.get() or str(knobs.cache.dir)


def _installed() -> bool:
    from triton import knobs

    with _guard:
        if knobs.cache.manager_class is None:
            knobs.cache.manager_class = _manager()
        return knobs.cache.manager_class is _manager()


@contextlib.contextmanager
def quick_keys() -> Iterator[None]:
    """Keys of what this context compiles name Triton's libraries by version, size and time of change: 2 ms.

    Triton reads all of them, 0.35 to 0.5 s that the first kernel of a process waits for; others' kernels keep its keys.
    """
    from triton.runtime import cache

    with _guard:
        theirs: Any = getattr(cache, "triton_key", None)
        if theirs is not None and not hasattr(theirs, "by_content"):

            @functools.wraps(theirs)
            def key() -> str:
                quick = _libraries() if _quick.get() else None
                return theirs() if quick is None else quick

            for name in ("cache_info", "cache_clear"):  # it is a function that remembers
                if hasattr(theirs, name):
                    setattr(key, name, getattr(theirs, name))
            key.by_content = theirs  # type: ignore[attr-defined]
            cache.triton_key = key
    token = _quick.set(True)
    try:
        yield
    finally:
        _quick.reset(token)


@functools.cache
def _libraries() -> str | None:
    """A digest of Triton's files as the file system describes them; None where they are no files."""
    import triton

    root = os.path.dirname(os.path.abspath(triton.__file__))
    found = hashlib.sha256(triton.__version__.encode())
    count = 0
    with contextlib.suppress(OSError):
        for folder, folders, files in os.walk(root):
            folders[:] = sorted(f for f in folders if f not in _NO_COMPILER)
            for name in sorted(files):
                if name.endswith((".py", ".so", ".pyd", ".bc")):
                    about = os.stat(os.path.join(folder, name))
                    found.update(f"{folder[len(root):]}/{name} {about.st_size} {about.st_mtime_ns}\n".encode())
                    count += 1
    return found.hexdigest() if count else None


_NO_COMPILER = ("__pycache__", "include", "tools", "profiler")


@functools.cache
def _manager() -> Any:
    from triton.runtime.cache import FileCacheManager

    class FolderOfContext(FileCacheManager):
        """Triton's manager of files, in the folder of the context that asks."""

        def __init__(self, key: str, override: bool = False, dump: bool = False) -> None:
            folder = _folder.get()
            if folder is None or override or dump:
                super().__init__(key, override=override, dump=dump)
                return
            self.key = key
            self.cache_dir = os.path.join(folder, key)
            self.lock_path = os.path.join(self.cache_dir, "lock")
            os.makedirs(self.cache_dir, exist_ok=True)

        def put(self, data: Any, filename: str, binary: bool = True) -> str:
            """As Triton's, of each of a kernel's eight files, without a folder made and removed around it."""
            place = os.path.join(self.cache_dir, filename)
            fresh = f"{place}.{uuid.uuid4().hex}"
            content = data if isinstance(data, bytes) else str(data)
            mode = "wb" if isinstance(content, bytes) else "w"
            try:
                file = open(fresh, mode)  # noqa: SIM115
            except FileNotFoundError:  # somebody empties the cache
                os.makedirs(self.cache_dir, exist_ok=True)
                file = open(fresh, mode)  # noqa: SIM115
            try:
                with file:
                    file.write(content)
                os.replace(fresh, place)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(fresh)
                raise
            return place

    return FolderOfContext
