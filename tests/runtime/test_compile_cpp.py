"""C++ text to addresses: values, units, the cache in front, one OpenMP pool, and compilers that fail (F8)."""

from __future__ import annotations

import ctypes
import os
import stat
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from fusionc.errors import CompileError
from fusionc.runtime import compile_cpp
from fusionc.runtime.cache import SCHEMA, Cache
from fusionc.runtime.compile_cpp import BuildResult, build, find_compiler, load_library

ENV = {"test": 1}
PRELUDE = "#include <stdint.h>\nstatic inline float twice(float x) { return 2 * x; }\n"
TEXT = """extern "C" void {symbol}(void** p, const int64_t* n) {{
  const float* x = (const float*)p[0];
  float* y = (float*)p[1];
#pragma omp parallel for simd
  for (int64_t i = 0; i < n[0]; i++) y[i] = twice(x[i]) + {add}.0f;
}}
"""

try:
    find_compiler()
except CompileError:
    pytest.skip("no C++ compiler on this machine", allow_module_level=True)


@pytest.fixture(autouse=True)
def _failed_sources_in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tmp").mkdir(mode=0o700)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))


def _text(symbol: str, add: int = 1) -> tuple[str, str]:
    return symbol, TEXT.format(symbol=symbol, add=add)


def _call(address: int, x: torch.Tensor) -> torch.Tensor:
    y = torch.empty_like(x)
    function = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)(address)
    pointers = (ctypes.c_void_p * 2)(x.data_ptr(), y.data_ptr())
    sizes = (ctypes.c_int64 * 1)(x.numel())
    function(ctypes.addressof(pointers), ctypes.addressof(sizes))
    return y


def _check(result: BuildResult, adds: dict[str, int]) -> None:
    x = torch.randn(1000)
    assert result.errors == {} and set(result.addresses) == set(adds)
    for symbol, add in adds.items():
        assert torch.equal(_call(result.addresses[symbol], x), 2 * x + add), symbol


def test_cold_then_from_cache(tmp_path: Path) -> None:
    sources = [_text(f"cold_{n}", n) for n in range(5)]
    adds = {f"cold_{n}": n for n in range(5)}
    cold = build(sources, Cache(tmp_path / "c"), ENV, PRELUDE)
    assert cold.from_cache == set() and cold.units == 1, "small kernels share one translation unit"
    _check(cold, adds)
    warm = build(sources, Cache(tmp_path / "c"), ENV, PRELUDE)
    assert warm.from_cache == set(adds) and warm.units == 0
    _check(warm, adds)
    assert warm.addresses == cold.addresses, "the same library is loaded once"
    assert len(list((tmp_path / "c" / f"v{SCHEMA}" / "blob").iterdir())) == 1
    more = build([*sources, _text("cold_9", 9)], Cache(tmp_path / "c"), ENV, PRELUDE)
    assert more.from_cache == set(adds), "only what is new is compiled"
    _check(more, {**adds, "cold_9": 9})


@pytest.mark.parametrize("change", ["text", "prelude", "env"])
def test_whatever_shapes_the_code_is_in_the_key(tmp_path: Path, change: str) -> None:
    cache = Cache(tmp_path / "c")
    build([_text("key")], cache, ENV, PRELUDE)
    sources = [_text("key", 7 if change == "text" else 1)]
    env = {"test": 2} if change == "env" else ENV
    prelude = PRELUDE.replace("2 * x", "x + x") if change == "prelude" else PRELUDE
    again = build(sources, cache, env, prelude)
    assert again.from_cache == set()
    _check(again, {"key": 7 if change == "text" else 1})


def test_units_are_balanced_bounded_and_deterministic() -> None:
    texts = {f"k{n}": "x" * (1000 * n) for n in range(1, 9)}
    units = compile_cpp._chunks(texts, 4)
    assert units == compile_cpp._chunks(dict(reversed(texts.items())), 4)
    assert len(units) == 4 and sorted(sum(units, [])) == sorted(texts)
    sizes = [sum(len(texts[s]) for s in unit) for unit in units]
    assert max(sizes) - min(sizes) <= 2000
    assert len(compile_cpp._chunks({"a": "x", "b": "y"}, 4)) == 1
    assert compile_cpp._chunks({}, 4) == []


def test_one_bad_kernel_fails_alone(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "c")
    sources = [_text("fine"), ("broken", "int broken( {\n"), ("absent", "static int other;"), _text("fine2", 2)]
    result = build(sources, cache, ENV, PRELUDE)
    assert set(result.errors) == {"broken", "absent"}
    error = result.errors["broken"]
    assert isinstance(error, CompileError) and error.kernel == "broken"
    assert "broken.cpp:1" in str(error) and "error:" in str(error)
    assert error.dump is not None and "int broken( {" in Path(error.dump).read_text()
    assert stat.S_IMODE(os.stat(os.path.dirname(error.dump)).st_mode) == 0o700
    assert 'does not define extern "C" absent' in str(result.errors["absent"])
    result.errors.clear()
    _check(result, {"fine": 1, "fine2": 2})
    again = build(sources, cache, ENV, PRELUDE)
    assert again.from_cache == {"fine", "fine2"} and set(again.errors) == {"broken", "absent"}


def test_an_undefined_function_is_found_at_once_not_at_the_first_call(tmp_path: Path) -> None:
    text = 'extern "C" void nowhere(); extern "C" void undefined_call() { nowhere(); }'
    result = build([("undefined_call", text)], Cache(tmp_path / "c"), ENV)
    assert "could not be loaded" in str(result.errors["undefined_call"])


def test_kept_sources_are_bounded(tmp_path: Path) -> None:
    paths = [compile_cpp.keep_source(f"k{n}", "text") for n in range(40)]
    assert 0 < sum(p is not None and os.path.exists(p) for p in paths) <= 16


@pytest.mark.parametrize("symbol", ["", "1a", "a b", 'a"', "a\n", "a" * 200, "ä"])
def test_bad_symbols_are_refused(symbol: str) -> None:
    with pytest.raises(ValueError, match="not an identifier"):
        build([(symbol, "")], Cache(enabled=False), ENV)


def test_two_texts_for_one_symbol_are_refused() -> None:
    with pytest.raises(ValueError, match="two different texts"):
        build([_text("twin", 1), _text("twin", 2)], Cache(enabled=False), ENV)


def test_works_without_a_disk_cache() -> None:
    cache = Cache(enabled=False)
    _check(build([_text("nodisk"), _text("nodisk")], cache, ENV, PRELUDE), {"nodisk": 1})
    assert build([_text("nodisk")], cache, ENV, PRELUDE).from_cache == {"nodisk"}
    assert build([], cache, ENV).addresses == {}


def test_nothing_is_left_in_the_temp_folder(tmp_path: Path) -> None:
    build([_text("tidy")], Cache(tmp_path / "c"), ENV, PRELUDE)
    assert list((tmp_path / "tmp").iterdir()) == []


def test_one_openmp_runtime_is_in_the_process() -> None:
    """In a process of its own: kernel and ATen run on the same threads of the same library."""
    code = """
import ctypes, os, torch
from fusionc.runtime.cache import Cache
from fusionc.runtime.compile_cpp import build, torch_openmp
torch.set_num_threads(3)
threads = lambda: len(os.listdir("/proc/self/task"))
libraries = lambda: {l.split()[-1] for l in open("/proc/self/maps") if "gomp" in l or "iomp" in l or "/libomp" in l}
torch.randn(1 << 20).exp().sum()
before, loaded = threads(), libraries()
text = '''#include <stdint.h>
#include <omp.h>
extern "C" void count(void** p, const int64_t* n) { int64_t t = 0;
#pragma omp parallel reduction(+ : t)
t += 1;
*(int64_t*)p[0] = t; }'''
result = build([("count", text)], Cache(enabled=False), {})
out, n = torch.zeros(1, dtype=torch.int64), (ctypes.c_int64 * 1)(0)
p = (ctypes.c_void_p * 1)(out.data_ptr())
ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)(result.addresses["count"])(ctypes.addressof(p), ctypes.addressof(n))
print(out.item(), threads() - before, libraries() == loaded, torch_openmp() in loaded)
"""
    if not sys.platform.startswith("linux") or compile_cpp.torch_openmp() is None:
        pytest.skip("needs Linux and a torch with OpenMP")
    env = {**os.environ, "OMP_NUM_THREADS": "3"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=_repository())
    if "clang" in compile_cpp.compiler_identity():
        pytest.skip("clang brings its own runtime")
    assert done.stdout.split() == ["3", "0", "True", "True"], done.stderr


def test_vector_math_links(tmp_path: Path) -> None:
    prelude = '#include <stdint.h>\nextern "C" {\n#pragma omp declare simd notinbranch\nfloat expf(float);\n}\n'
    text = TEXT.format(symbol="vexp", add=0).replace("twice(x[i])", "expf(x[i])")
    result = build([("vexp", text)], Cache(tmp_path / "c"), ENV, prelude)
    x = torch.tensor([0.0, -0.0, 1.0, float("nan"), float("inf"), float("-inf"), 88.0, -104.0] * 9)
    torch.testing.assert_close(_call(result.addresses["vexp"], x), x.exp(), equal_nan=True)


def test_nan_inf_and_signed_zero_survive_the_flags(tmp_path: Path) -> None:
    text = TEXT.format(symbol="exact", add=0).replace("twice(x[i]) + 0.0f", "x[i] != x[i] ? -1.0f : x[i] * 1.0f")
    result = build([("exact", text)], Cache(tmp_path / "c"), ENV, PRELUDE)
    y = _call(result.addresses["exact"], torch.tensor([float("nan"), float("inf"), -0.0, 1e-45] * 9))
    assert torch.equal(y, torch.tensor([-1.0, float("inf"), -0.0, 1e-45] * 9)) and torch.signbit(y[2])


# -- F8, compile part: compilers that fail ------------------------------------------------------------------------------


def _fake_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    path = tmp_path / "fake-g++"
    path.write_text(f'#!/bin/sh\nif [ "$1" = --version ]; then echo fake; exit 0; fi\n{body}\n')
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("sleep 60 & sleep 60", "did not finish within"),
        ("kill -9 $$", "ended with -9"),
        ("kill -6 $$", "ended with -6"),
        ("echo 'fatal error: no space' >&2; exit 1", "fatal error: no space"),
        ("exit 0", "could not be run"),
        ('while [ "$1" != -o ]; do shift; done; echo junk > "$2"', "could not be loaded"),
        ("head -c 200000 /dev/zero | tr '\\0' x >&2; exit 1", "xxx"),
    ],
)
def test_f8_compilers_that_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, message: str) -> None:
    _fake_compiler(tmp_path, monkeypatch, body)
    result = build([_text("f8")], Cache(tmp_path / "c"), ENV, PRELUDE, timeout=1.0)
    assert result.addresses == {} and message in str(result.errors["f8"]) and len(str(result.errors["f8"])) < 5000
    monkeypatch.delenv("CXX")
    _check(build([_text("f8")], Cache(tmp_path / "c"), ENV, PRELUDE), {"f8": 1})


def test_f8_no_compiler_says_how_to_install_one_but_the_cache_still_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build([_text("shipped")], Cache(tmp_path / "c"), ENV, PRELUDE)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    result = build([_text("shipped"), _text("unknown")], Cache(tmp_path / "c"), ENV, PRELUDE)
    assert result.from_cache == {"shipped"} and set(result.errors) == {"unknown"}
    assert "Install one" in str(result.errors["unknown"]) and "CXX" in str(result.errors["unknown"])
    with pytest.raises(CompileError, match="apt install"):
        find_compiler()


def test_another_compiler_compiles_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = find_compiler()[0]
    build([_text("tool")], Cache(tmp_path / "c"), ENV, PRELUDE)
    _fake_compiler(tmp_path, monkeypatch, f'exec "{real}" "$@"')
    result = build([_text("tool")], Cache(tmp_path / "c"), ENV, PRELUDE)
    assert result.from_cache == set()
    _check(result, {"tool": 1})


def test_cxx_may_carry_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    real = find_compiler()[0]
    monkeypatch.setenv("CXX", f"{real} -DX=1")
    assert find_compiler() == [real, "-DX=1"]
    monkeypatch.setenv("CXX", "no-such-compiler-anywhere")
    assert find_compiler()[0] != "no-such-compiler-anywhere"


def test_f8_no_temp_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    result = build([_text("notmp")], Cache(tmp_path / "c"), ENV, PRELUDE)
    assert "Set TMPDIR" in str(result.errors["notmp"])


def test_a_foreign_or_broken_library_in_the_cache_is_built_anew(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "c")
    key = compile_cpp.kernel_key(*_text("foreign"), ENV, PRELUDE)
    tool = compile_cpp.compiler_identity()
    for data in (b"", b"\x7fELF" + bytes(100), b"not a library"):
        cache.put("kernel", key, {"symbol": "foreign", "compiler": tool}, {"unit.so": data})
        result = build([_text("foreign")], cache, ENV, PRELUDE)
        assert result.from_cache == set()
        _check(result, {"foreign": 1})


def test_a_corrupted_library_is_never_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build([_text("flip")], Cache(tmp_path / "c"), ENV, PRELUDE)
    (file,) = (tmp_path / "c" / f"v{SCHEMA}" / "blob").iterdir()
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    monkeypatch.setattr(compile_cpp, "_libraries", {})
    result = build([_text("flip")], Cache(tmp_path / "c"), ENV, PRELUDE)
    assert result.from_cache == set()
    _check(result, {"flip": 1})


def _anonymous_files() -> set[str]:
    """Open memfd descriptors of this process (others' tests may keep some)."""
    if not os.path.isdir("/proc/self/fd"):
        return set()
    return {e.name for e in os.scandir("/proc/self/fd") if os.path.lexists(e.path) and "memfd" in os.readlink(e.path)}


def test_loading_keeps_libraries_apart_and_no_descriptor_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loader knows libraries by path: the same descriptor number must not give the first one again."""
    cache = Cache(tmp_path / "c")
    before = _anonymous_files()
    results = [build([_text(f"apart_{n}", n)], cache, ENV, PRELUDE) for n in range(4)]
    for n, result in enumerate(results):
        _check(result, {f"apart_{n}": n})
    cache.close()
    assert _anonymous_files() <= before


def test_without_anonymous_files_a_private_temp_file_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memfd(data: bytes) -> tuple[str, int]:
        raise OSError("not here")

    monkeypatch.setattr(compile_cpp, "private_copy", no_memfd)
    _check(build([_text("nomemfd")], Cache(tmp_path / "c"), ENV, PRELUDE), {"nomemfd": 1})
    assert list((tmp_path / "tmp").iterdir()) == []
    with pytest.raises(OSError):
        load_library(b"not a library")


def test_an_exported_cache_serves_another_folder(tmp_path: Path) -> None:
    source, target = Cache(tmp_path / "a"), Cache(tmp_path / "b")
    build([_text("travel")], source, ENV, PRELUDE)
    source.export_tar(tmp_path / "t.tar")
    assert tarfile.is_tarfile(tmp_path / "t.tar") and target.import_tar(tmp_path / "t.tar") == (2, [])
    assert build([_text("travel")], target, ENV, PRELUDE).from_cache == {"travel"}


# -- two processes at once ----------------------------------------------------------------------------------------------

_CHILD = """
import os, sys, time
from fusionc.runtime.cache import Cache
from fusionc.runtime.compile_cpp import build, torch_openmp
torch_openmp()
print("ready", flush=True)
sys.stdin.readline()
text = 'extern "C" void both_%d(void**, const long*) {}'
result = build([("both_%d" % n, text % n) for n in range(6)], Cache(sys.argv[1]), {"test": 1})
assert len(result.addresses) == 6 and not result.errors
print(len(result.from_cache))
"""


def _repository() -> str:
    return str(Path(__file__).resolve().parents[2])


def test_two_processes_compile_the_same_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = find_compiler()[0]
    _fake_compiler(tmp_path, monkeypatch, f'echo run >> "{tmp_path}/log"; exec "{real}" "$@"')
    command = [sys.executable, "-W", "error::UserWarning:fusionc", "-c", _CHILD, str(tmp_path / "c")]
    children = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=_repository())
        for _ in range(2)
    ]
    for child in children:
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
    taken = []
    for child in children:
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.flush()
    for child in children:
        out, _ = child.communicate(timeout=120)
        assert child.returncode == 0
        taken.append(int(out))
    assert sorted(taken) == [0, 6], "one compiled, the other waited and loaded"
    assert (tmp_path / "log").read_text() == "run\n"
    assert Cache(tmp_path / "c").verify() == []
