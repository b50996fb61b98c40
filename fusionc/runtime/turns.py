"""Whose work comes first, where threads compile for somebody who waits and for somebody who may never ask.

What is compiled `later` begins when no other work waits for its turn and nothing is being measured (`first`): the less
compiles while kernels race, the better, and a race's outcome is kept on disk.  Once Python ends it does not begin at all.
"""

from __future__ import annotations

import concurrent.futures.thread  # noqa: F401  what it does when Python ends comes after `_end` only if it is there first
import contextlib
import os
import threading
from collections.abc import Iterator
from contextvars import ContextVar

__all__ = ["Turn", "first", "later"]

_PATIENCE_SECONDS = 20.0  # nothing may keep what is asked for in the end from being done
_later: ContextVar[bool] = ContextVar("fusionc_later", default=False)
_changed = threading.Condition()
_others = 0  # pieces of work that come first and have not begun, and measurements
_over = False  # Python ends


class Turn:
    """One piece of work of this context, which is waiting until it has begun."""

    def __init__(self) -> None:
        self._comes_first = not _later.get()
        self._counted = False
        if self._comes_first:
            self._count(True)

    def wait(self) -> None:
        """Return when it may begin.  Raises RuntimeError if it is not to begin any more."""
        if self._comes_first:
            return
        with _changed:
            _changed.wait_for(lambda: not _others or _over, _PATIENCE_SECONDS)
            if _over:
                raise RuntimeError("Python ends")

    def end(self) -> None:
        """It has begun, or never will: others need not wait for it."""
        self._count(False)

    def _count(self, on: bool) -> None:
        global _others
        with _changed:
            _others += on - self._counted
            self._counted = on
            if not _others:
                _changed.notify_all()


@contextlib.contextmanager
def first() -> Iterator[None]:
    """Nothing of what comes later begins meanwhile."""
    turn = Turn()
    turn._count(True)
    try:
        yield
    finally:
        turn.end()


@contextlib.contextmanager
def later() -> Iterator[None]:
    """What this context starts meanwhile comes after everything else."""
    token = _later.set(True)
    try:
        yield
    finally:
        _later.reset(token)


def _end() -> None:
    global _over
    with _changed:
        _over = True
        _changed.notify_all()


def _after_fork() -> None:
    global _changed, _others
    _changed, _others = threading.Condition(), 0  # the child has none of the threads


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
with contextlib.suppress(AttributeError, RuntimeError):  # before Python waits for threads; functions of `atexit` run after
    threading._register_atexit(_end)  # type: ignore[attr-defined]
