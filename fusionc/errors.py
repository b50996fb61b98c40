"""The errors and warnings of fusionc.

Each says what was being done, on what, what was found and what to do next.  A compiled model should keep running when
the compiler cannot do its best, so most trouble is a ``FallbackWarning`` given once; errors are for wrong options,
broken invariants under verification, and ``options={"strict": True}``.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Iterator

_MAX_WARNED = 4096


class FusioncError(Exception):
    """Base of all errors that fusionc raises on purpose."""


class OptionError(FusioncError, ValueError):
    """An option, mode or environment variable that fusionc does not know or cannot use."""


class VerifyError(FusioncError):
    """A stage handed on something that breaks an invariant.

    ``where`` names the stage and node or kernel, ``found`` says what is wrong, ``hint`` what to do next.
    """

    def __init__(self, where: str, found: str, hint: str = "") -> None:
        self.where, self.found, self.hint = where, found, hint
        super().__init__(f"{where}: {found}" + (f" ({hint})" if hint else ""))


class CompileError(FusioncError):
    """The source of one kernel did not build or did not launch.

    ``kernel`` is its name, ``dump`` the folder with its source where one was written, ``detail`` what the tool said.
    """

    def __init__(self, kernel: str, dump: str | None = None, detail: str = "") -> None:
        self.kernel, self.dump, self.detail = kernel, dump, detail
        where = f"its source is in {dump}" if dump else "set FUSIONC_DUMP=<folder> to keep its source"
        super().__init__(f"kernel {kernel} could not be compiled; {where}." + (f"\n{detail}" if detail else ""))


class LoadError(CompileError):
    """A kernel was compiled but could not be brought onto the device, while a CUDA graph was recorded, say: try once more."""


class StrictError(FusioncError):
    """Something fell back to ATen or eager while ``options={"strict": True}`` forbids it."""


class StaleDecision(FusioncError):
    """Weights lack the property that the graph was rewritten for; the caller runs the graph as it was."""


class FallbackWarning(UserWarning):
    """fusionc did something slower than hoped; the results are right."""


_lock = threading.Lock()
_warned: set[str] = set()


_mood = threading.local()  # of this thread: .strict, .quiet


def warn_once(key: str, message: str) -> None:
    """Give ``message`` as a ``FallbackWarning`` the first time that ``key`` is seen in this process."""
    with _lock:
        if getattr(_mood, "quiet", False) or key in _warned or len(_warned) >= _MAX_WARNED:
            return
        _warned.add(key)
    warnings.warn(message, FallbackWarning, stacklevel=3)


def quietly() -> contextlib.AbstractContextManager[None]:
    """This thread gives no warning meanwhile, and remembers none: for work whose result may not be wanted."""
    return _meanwhile("quiet")


def strictly() -> contextlib.AbstractContextManager[None]:
    """What falls back in this thread meanwhile (`fell_back`) is an error."""
    return _meanwhile("strict")


@contextlib.contextmanager
def _meanwhile(mood: str) -> Iterator[None]:
    before = getattr(_mood, mood, False)
    setattr(_mood, mood, True)
    try:
        yield
    finally:
        setattr(_mood, mood, before)


def fell_back(operator: str, cause: Exception, instead: str) -> None:
    """An operator's kernel raised, and other means do its work: a warning once, or a StrictError inside of `strictly`."""
    what = f"fusionc's kernel of {operator} does not run here ({type(cause).__name__}: {cause})"
    if getattr(_mood, "strict", False):
        raise StrictError(what) from cause
    warn_once(f"{operator}:{type(cause).__name__}", f"{what}; {instead}. Please report this")


def reset_warnings() -> None:
    """Forget which warnings were given (for tests and ``torch._dynamo.reset``)."""
    with _lock:
        _warned.clear()
