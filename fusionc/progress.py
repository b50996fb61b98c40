"""A progress bar for compilations that take long enough to wonder about.

Nothing is shown before two seconds have passed, nor where standard error is not a terminal, so short compilations,
logs and tests stay clean.  Showing progress is never worth an error: any trouble with the terminal turns it off.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from typing import Any

DELAY_SECONDS = 2.0


class Progress:
    """Counts finished pieces of work, whether it is `shown` or not. Safe to advance from several threads."""

    def __init__(self, title: str, total: int | None) -> None:
        self.title, self.total, self.done = title, total, 0
        self._last = ""
        self._lock = threading.Lock()
        self._bar: Any = None
        self._task: Any = None
        self._ended = False

    @contextlib.contextmanager
    def shown(self, setting: bool | str = "auto") -> Iterator[None]:
        """Show it meanwhile, as `progress` does."""
        timer: threading.Timer | None = None
        if setting is True:
            self._show()
        elif setting == "auto" and sys.stderr is not None and sys.stderr.isatty():
            timer = threading.Timer(DELAY_SECONDS, self._show)
            timer.daemon = True
            timer.start()
        try:
            yield
        finally:
            if timer is not None:
                timer.cancel()
            self._close()

    def advance(self, what: str = "", count: int = 1) -> None:
        """``count`` more pieces are done; ``what`` names the one that was just finished."""
        with self._lock:
            self.done += count
            self._last = what
            if self._bar is not None:
                self._attempt(lambda: self._bar.update(self._task, completed=self.done, what=what))

    def _show(self) -> None:
        """Open the bar (called by the timer)."""
        with self._lock:
            if not self._ended:
                self._attempt(self._open)

    def _open(self) -> None:
        # imported late: most compilations are over before a bar is due
        from rich.console import Console
        from rich.markup import escape
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (
            TextColumn(f"fusionc {escape(self.title)}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            # names come from the user's model: never read them as markup
            TextColumn("{task.fields[what]}", markup=False),
        )
        bar = Bar(*columns, console=Console(stderr=True), transient=True)
        self._task = bar.add_task("", total=self.total, completed=self.done, what=self._last)
        bar.start()  # raises when another bar is live: then only the outer one shows
        self._bar = bar

    def _close(self) -> None:
        with self._lock:
            self._ended = True
            if self._bar is not None:
                self._attempt(self._bar.stop)

    def _attempt(self, do: Any) -> None:
        try:
            do()
        except Exception:  # noqa: BLE001 - see the module's docstring
            self._bar = None


@contextlib.contextmanager
def progress(title: str, total: int | None = None, setting: bool | str = "auto") -> Iterator[Progress]:
    """``with progress("compiling", 12) as p: p.advance("k03 rmsnorm")``.

    ``setting`` is ``Config.progress``: "auto" (a terminal, after ``DELAY_SECONDS``), True (at once) or False (never).
    """
    p = Progress(title, total)
    with p.shown(setting):
        yield p
