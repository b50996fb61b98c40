"""C++ text to callable addresses: the system compiler, few translation units, the cache in front.

Kernels include no torch header, so a cold kernel costs about 0.1 s of compiler.  Missing kernels are spread over as
many translation units as there are cores and compiled side by side; every kernel's cache entry names the library that
holds it, so a warm start loads one library per unit, not one per kernel.  A unit that does not build is retried kernel
by kernel: only the guilty one fails.

OpenMP: torch's CPU threads live in the OpenMP runtime that torch has loaded (its own libgomp file).  A second runtime
would mean a second pool fighting for the same cores, so kernels are linked against that very file.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import itertools
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from time import perf_counter
from typing import Any

from fusionc.errors import CompileError
from fusionc.runtime.cache import KERNEL, Cache
from fusionc.runtime.cores import available
from fusionc.runtime.files import private_copy, private_file

MAX_UNITS = 4
MIN_UNIT_BYTES = 4000  # starting a compiler costs about as much as this much kernel text
TIMEOUT_SECONDS = 120.0
_KEPT_FAILURES = 16
_SYMBOL = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_LIBRARY = "unit.so"

# No -ffast-math, ever: NaN, Inf and signed zeros are results.  Without errno and traps the compiler may use vector
# instructions for sqrt and keep branches out of loops.  Contraction to FMA only drops a rounding.
_FLAGS = (
    "-O3",
    "-march=native",
    "-std=c++17",
    "-fPIC",
    "-shared",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-pipe",
    "-w",
)
_INSTALL = (
    "no C++ compiler was found (looked for $CXX, g++, clang++ and c++). Install one (Debian and Ubuntu: apt install "
    "g++; Fedora: dnf install gcc-c++; conda: conda install -c conda-forge gxx) or set CXX to its path"
)


@dataclass
class BuildResult:
    """``addresses`` of the kernels that can be called, ``errors`` for the others, and what it took."""

    addresses: dict[str, int] = field(default_factory=dict)
    errors: dict[str, CompileError] = field(default_factory=dict)
    from_cache: set[str] = field(default_factory=set)
    units: int = 0
    seconds: float = 0.0


# -- the tools ---------------------------------------------------------------------------------------------------------


def find_compiler() -> list[str]:
    """The C++ compiler as the start of a command: ``$CXX`` (it may carry arguments), then g++, clang++, c++.

    Raises CompileError that says how to install one.
    """
    for name in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        words = shlex.split(name) if name else []
        found = shutil.which(words[0]) if words else None
        if found:
            return [found, *words[1:]]
    raise CompileError("<any>", None, _INSTALL)


@lru_cache(maxsize=8)
def _version(compiler: tuple[str, ...]) -> str:
    try:
        done = subprocess.run(
            [*compiler, "--version"], capture_output=True, timeout=30, check=False, stdin=subprocess.DEVNULL
        )
        lines = done.stdout.decode("utf-8", "replace").splitlines()
        return lines[0][:200] if done.returncode == 0 and lines else "unknown"
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def compiler_identity() -> str:
    """Command and version of the compiler in one line; "" where there is none."""
    try:
        compiler = find_compiler()
    except CompileError:
        return ""
    return f"{' '.join([os.path.basename(compiler[0]), *compiler[1:]])}: {_version(tuple(compiler))}"


@lru_cache(maxsize=1)
def torch_openmp() -> str | None:
    """Path of the OpenMP runtime that torch runs on in this process, or None where it cannot be told."""
    if not sys.platform.startswith("linux"):
        return None
    import torch  # noqa: F401  (loads its runtime)

    try:
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
            loaded = {line.split(None, 5)[5].strip() for line in maps if "omp" in line and line.count("/") > 0}
    except OSError:
        return None
    known = re.compile(r"lib(gomp|iomp5|omp)[-.0-9a-z]*\.so[.0-9]*")
    found = sorted(path for path in loaded if known.fullmatch(os.path.basename(path)))
    # With several loaded, the one inside torch's own folder is the one whose threads ATen uses.
    return next((path for path in found if "torch" in path), found[0] if found else None)


def _link_flags(compiler: Sequence[str]) -> list[str]:
    """Libraries, torch's OpenMP runtime first so that ``-fopenmp`` adds no other.

    libgomp does not speak clang's dialect of OpenMP calls; there clang brings its own runtime, with a pool of its own.
    """
    flags = ["-Wl,--as-needed"] if sys.platform.startswith("linux") else []
    omp = torch_openmp()
    clang = "clang" in os.path.basename(compiler[0]) or "clang" in _version(tuple(compiler)).lower()
    if omp is not None and not (clang and "gomp" in os.path.basename(omp)):
        flags.append(omp)
    return [*flags, "-lm"]  # glibc's libm names libmvec itself


# -- loading -----------------------------------------------------------------------------------------------------------

_libraries: dict[str, ctypes.CDLL] = {}  # sha256 -> library; never closed: kernels may be running, pointers are out
_serial = itertools.count()
_mutex = threading.Lock()


def load_library(data: bytes, digest: str | None = None) -> ctypes.CDLL:
    """Load the shared library ``data`` from a private copy; once per content and process.  Raises OSError."""
    digest = digest or hashlib.sha256(data).hexdigest()
    with _mutex:
        if digest not in _libraries:
            _libraries[digest] = _dlopen(data)
        return _libraries[digest]


def _dlopen(data: bytes) -> ctypes.CDLL:
    try:
        path, fd = private_copy(data)
    except (OSError, AttributeError):
        path, fd = "", -1
    if fd >= 0:
        try:
            # The loader knows libraries by name and would hand out an old one when a descriptor number comes round
            # again: "/" and "/./" spell a counter into the path.
            serial = "".join("/./" if bit == "1" else "/" for bit in f"{next(_serial):b}")
            return ctypes.CDLL(path.replace("/fd/", f"/fd{serial}/"), mode=os.RTLD_LOCAL | os.RTLD_NOW)
        except OSError:
            pass  # a policy against executing anonymous files: try a real one
        finally:
            os.close(fd)
    path = private_file(data)
    try:
        return ctypes.CDLL(path, mode=os.RTLD_LOCAL | os.RTLD_NOW)
    finally:
        shutil.rmtree(os.path.dirname(path), ignore_errors=True)


def _address(library: ctypes.CDLL, symbol: str) -> int | None:
    try:
        return ctypes.cast(getattr(library, symbol), ctypes.c_void_p).value
    except AttributeError:
        return None


# -- building ----------------------------------------------------------------------------------------------------------


def kernel_key(symbol: str, text: str, env_key: Mapping[str, Any], prelude: str = "") -> dict[str, Any]:
    """The cache key of one kernel: its exact text, the text in front of it, and everything else that shapes code.

    The compiler is not in it, so that a shipped cache serves machines without one; where there is one, ``build`` takes
    an entry only if it was made by the same compiler.
    """
    return {
        "env": dict(env_key),
        "flags": list(_FLAGS),
        "language": "cpp",
        "openmp": os.path.basename(torch_openmp() or ""),
        "prelude": _hash(prelude),
        "symbol": symbol,
        "text": _hash(text),
    }


@lru_cache(maxsize=64)
def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def build(
    sources: Sequence[tuple[str, str]],
    cache: Cache,
    env_key: Mapping[str, Any],
    prelude: str = "",
    timeout: float = TIMEOUT_SECONDS,
    done: Callable[[str, int], Any] | None = None,
) -> BuildResult:
    """Make every ``(symbol, text)`` callable: from the cache, else compiled together with ``prelude`` in front.

    A text defines ``extern "C"`` ``symbol`` and may define other things only as ``static`` names of its own.  The
    result has each symbol in ``addresses`` or in ``errors``; nothing is raised for kernels that do not build.  Raises
    ValueError for a symbol that is not an identifier, or that is given two texts.  ``done(symbol, count)`` is called
    (from any thread) whenever ``count`` more kernels are settled, ``symbol`` being one of them.
    """
    start = perf_counter()
    texts: dict[str, str] = {}
    for symbol, text in sources:
        if not _SYMBOL.fullmatch(symbol) or texts.setdefault(symbol, text) != text:
            raise ValueError(f"kernel symbol {symbol[:80]!r} is not an identifier or stands for two different texts")
    result = BuildResult()
    keys = {symbol: kernel_key(symbol, text, env_key, prelude) for symbol, text in texts.items()}
    tool = compiler_identity()
    missing = _load_cached(list(texts), keys, cache, tool, result)
    if missing and not tool:
        result.errors.update({symbol: CompileError(symbol, None, _INSTALL) for symbol in missing})
    elif missing:
        if done is not None and len(missing) < len(texts):
            done("", len(texts) - len(missing))
        # Another process may be at the same batch: wait a little for its results rather than compile twice.
        with cache.lock(KERNEL, {"batch": [keys[symbol] for symbol in missing]}):
            missing = _load_cached(missing, keys, cache, tool, result)
            _compile_missing({s: texts[s] for s in missing}, keys, cache, tool, prelude, timeout, result, done)
    result.seconds = perf_counter() - start
    return result


def load_cached(
    hashes: Mapping[str, str], cache: Cache, env_key: Mapping[str, Any], prelude: str = ""
) -> dict[str, int]:
    """Addresses of those kernels that the cache has, by symbol; ``hashes`` are the SHA-256 of their texts."""
    result = BuildResult()
    like = kernel_key("", "", env_key, prelude)
    keys = {symbol: {**like, "symbol": symbol, "text": text} for symbol, text in hashes.items()}
    _load_cached(list(hashes), keys, cache, compiler_identity(), result)
    return result.addresses


def _load_cached(
    symbols: Iterable[str], keys: Mapping[str, Mapping[str, Any]], cache: Cache, tool: str, result: BuildResult
) -> list[str]:
    """Load what the cache has, made by ``tool`` if there is one here, into ``result``; the symbols that are left."""
    missing = []
    for symbol in symbols:
        found = cache.blobs(KERNEL, keys[symbol])
        known = found is not None and (not tool or found[0].get("compiler") == tool)
        digest = found[1].get(_LIBRARY) if found is not None and known else None
        address = None
        if digest is not None:
            library = _libraries.get(digest)
            if library is None:
                data = cache.blob_bytes(digest)
                with contextlib.suppress(OSError):  # another machine's library, say: build our own
                    library = load_library(data, digest) if data is not None else None
            address = _address(library, symbol) if library is not None else None
        if address is None:
            missing.append(symbol)
        else:
            result.addresses[symbol] = address
            result.from_cache.add(symbol)
    return missing


def _compile_missing(
    texts: Mapping[str, str],
    keys: Mapping[str, Mapping[str, Any]],
    cache: Cache,
    tool: str,
    prelude: str,
    timeout: float,
    result: BuildResult,
    done: Callable[[str, int], Any] | None = None,
) -> None:
    cores = _cores()
    units = _chunks(texts, cores)
    if not units:
        return
    compiler = find_compiler()
    libraries = _link_flags(compiler)
    try:
        folder = tempfile.mkdtemp(prefix="fusionc-build-")  # mode 0700
    except OSError as error:
        note = f"no temporary folder to compile in: {error}. Set TMPDIR to a folder that can be written"
        result.errors.update({symbol: CompileError(symbol, None, note) for symbol in texts})
        return
    try:

        def attempt(job: tuple[int, list[str]]) -> tuple[list[str], bytes | None, str, str]:
            number, symbols = job
            source = _unit_text(prelude, symbols, texts)
            data, message = _run([*compiler, *_FLAGS], libraries, os.path.join(folder, f"u{number}"), source, timeout)
            if done is not None and (data is not None or len(symbols) == 1):
                done(symbols[0], len(symbols))
            return symbols, data, message, source

        with ThreadPoolExecutor(max_workers=cores) as pool:
            tried = list(pool.map(attempt, enumerate(units)))
            single = [[s] for symbols, data, _, _ in tried if data is None and len(symbols) > 1 for s in symbols]
            again = list(pool.map(attempt, enumerate(single, len(units))))
        result.units += len(units) + len(single)
        for symbols, data, message, source in [t for t in tried if t[1] is not None or len(t[0]) == 1] + again:
            _publish(symbols, data, message, source, keys, cache, tool, result)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _publish(
    symbols: Sequence[str],
    data: bytes | None,
    message: str,
    source: str,
    keys: Mapping[str, Mapping[str, Any]],
    cache: Cache,
    tool: str,
    result: BuildResult,
) -> None:
    library = None
    if data is not None:
        try:
            library = load_library(data)
        except OSError as error:
            message = f"the compiled library could not be loaded: {error}"
    for symbol in symbols:
        address = _address(library, symbol) if library is not None else None
        if address is None or data is None:
            if library is not None:
                message = f'the text does not define extern "C" {symbol}'
            result.errors[symbol] = CompileError(symbol, keep_source(symbol, source), message)
        else:
            result.addresses[symbol] = address
            cache.put(KERNEL, keys[symbol], {"symbol": symbol, "compiler": tool}, {_LIBRARY: data})


def _cores() -> int:
    """Units of text that are compiled side by side."""
    return min(MAX_UNITS, available())


def _chunks(texts: Mapping[str, str], cores: int) -> list[list[str]]:
    """Symbols in at most ``cores`` units of about equal size; the same input gives the same units."""
    total = sum(len(text) for text in texts.values())
    count = max(1, min(cores, len(texts), -(-total // MIN_UNIT_BYTES)))
    units: list[list[str]] = [[] for _ in range(count)]
    sizes = [0] * count
    for symbol in sorted(texts, key=lambda s: (-len(texts[s]), s)):
        least = sizes.index(min(sizes))
        units[least].append(symbol)
        sizes[least] += len(texts[symbol])
    return [sorted(unit) for unit in units if unit]


def _unit_text(prelude: str, symbols: Sequence[str], texts: Mapping[str, str]) -> str:
    """One translation unit; ``#line`` makes the compiler name the kernel in its messages."""
    parts = ['#line 1 "prelude"\n', prelude, "\n"]
    for symbol in symbols:
        parts += [f'#line 1 "{symbol}.cpp"\n', texts[symbol], "\n"]
    return "".join(parts)


def _run(
    command: Sequence[str], libraries: Sequence[str], stem: str, source: str, timeout: float
) -> tuple[bytes | None, str]:
    """Compile one unit: ``(library, "")`` or ``(None, what went wrong)``."""
    try:
        Path(f"{stem}.cpp").write_text(source, encoding="utf-8")
        # Its own session: on a timeout the compiler's children go with it.  English messages, whatever the locale.
        with subprocess.Popen(
            [*command, f"{stem}.cpp", "-o", f"{stem}.so", *libraries],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            cwd=os.path.dirname(stem),
            env={**os.environ, "LC_ALL": "C", "TMPDIR": os.path.dirname(stem)},
            start_new_session=True,
        ) as process:
            try:
                _, raw = process.communicate(timeout=timeout)
            except BaseException as error:
                with contextlib.suppress(OSError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                if isinstance(error, subprocess.TimeoutExpired):
                    return None, f"the compiler did not finish within {timeout:g} s"
                raise
        if process.returncode == 0:
            return Path(f"{stem}.so").read_bytes(), ""
        return None, _first_errors(raw.decode("utf-8", "replace")) or f"the compiler ended with {process.returncode}"
    except (OSError, ValueError) as error:
        return None, f"the compiler could not be run: {error}"


def _first_errors(text: str, lines: int = 12) -> str:
    found = text.splitlines()
    first = next((i for i, line in enumerate(found) if "error" in line or "undefined" in line), 0)
    return "\n".join(line[:300] for line in found[first : first + lines])


_kept: list[str] = []


def keep_source(symbol: str, source: str) -> str | None:
    """Write ``source`` where the user can look at it (the newest few stay); its path, or None."""
    try:
        path = os.path.join(tempfile.mkdtemp(prefix="fusionc-failed-"), f"{symbol}.cpp")
        Path(path).write_text(source, encoding="utf-8")
    except (OSError, ValueError):
        return None
    _kept.append(path)
    while len(_kept) > _KEPT_FAILURES:
        shutil.rmtree(os.path.dirname(_kept.pop(0)), ignore_errors=True)
    return path
