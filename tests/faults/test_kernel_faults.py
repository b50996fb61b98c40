"""Faults of kernels: no compiler, kernels that do not build or do not launch, hostile names, wrong options.

Each: the right answer, and one message that says what happened and what to do.
"""

from __future__ import annotations

import ast
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fusionc
from fusionc.codegen import cpp as renderer
from fusionc.errors import FallbackWarning, OptionError, StrictError
from fusionc.targets import cpp


@pytest.fixture(autouse=True)
def _cold(fresh_cache: Path) -> None:
    """Nothing compiled before helps."""


def two_kernels(x: torch.Tensor, w: torch.Tensor, counter: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A kernel, a matmul, another kernel, and an input that is written to."""
    h = torch.softmax(x, -1) * 2
    counter.add_(1)
    h = h @ w
    return torch.nn.functional.silu(h) + h.sum(-1, keepdim=True), h.mean()


def check(times: int = 2, **options: Any) -> list[str]:
    """Compile and call; the results must be eager's. Returns the texts of fusionc's warnings."""
    x, w = torch.randn(16, 24), torch.randn(24, 8)
    mine, theirs = torch.zeros(3), torch.zeros(3)
    compiled = torch.compile(two_kernels, backend="fusionc", options=options)
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        for _ in range(times):
            found, expected = compiled(x, w, mine), two_kernels(x, w, theirs)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
            assert torch.equal(mine, theirs)
    return [str(c.message) for c in caught if issubclass(c.category, FallbackWarning)]


def test_without_faults_there_is_no_warning() -> None:
    assert check() == []


@pytest.mark.parametrize("cxx", ["", "/no/such/compiler", "no-such-compiler -O2"])
def test_missing_compiler(cxx: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", cxx)
    said = check()
    assert len(said) == 1
    assert "no C++ compiler was found" in said[0] and "CXX" in said[0] and "ATen" in said[0]
    record = fusionc.report()[-1]
    assert not record.kernels and record.fallbacks and all(c.reason for c in record.calls if "softmax" in c.op)


def test_compiler_that_always_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tool = tmp_path / "g++"
    tool.write_text("#!/bin/sh\necho 'error: out of cheese' >&2\nexit 1\n")
    tool.chmod(0o755)
    monkeypatch.setenv("CXX", str(tool))
    said = check()
    assert len(said) == 1 and "out of cheese" in said[0] and "kernels k_" in said[0]
    listed = [f.split(" ") for f in fusionc.report()[-1].fallbacks if f.startswith("kernel ")]
    assert len(listed) > 1 and all(words[1].rstrip(":") == words[3] for words in listed), "each with its own reason"


def break_source(monkeypatch: pytest.MonkeyPatch, which: Callable[[Any], bool]) -> list[str]:
    """Make the source of chosen kernels invalid C++; returns the list of their symbols, which fills up."""
    broken: list[str] = []
    render = renderer.render

    def bad(kernel: Any, plan: Any, symbol: str) -> str:
        text = render(kernel, plan, symbol)
        if which(kernel):
            broken.append(symbol)
            return text.replace("{", "{ this is not C++;", 1)
        return text

    monkeypatch.setattr(cpp.cpp, "render", bad)
    return broken


def test_kernel_that_does_not_build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = break_source(monkeypatch, lambda kernel: "exp" in kernel.text and "max" in kernel.text)  # the softmax
    said = check(dump=str(tmp_path / "d"))
    assert len(broken) == 1 and len(said) == 1
    assert broken[0] in said[0] and str(tmp_path / "d") in said[0] and "ATen" in said[0]
    kept = [word.strip(".;") for word in said[0].split() if word.endswith((".cpp.", ".cpp"))]
    assert kept and "not C++" in Path(kept[0]).read_text()
    record = fusionc.report()[-1]
    assert record.kernels, "the other kernels stay"
    assert any("softmax" in c.op and "could not be built" in c.reason for c in record.calls)
    assert not any("softmax" in n for k in record.kernels for n in k.nodes)
    summary = (tmp_path / "d" / "SUMMARY.txt").read_text()
    assert broken[0] in summary and "/tmp" not in summary


def test_strict_makes_a_kernel_that_does_not_build_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = break_source(monkeypatch, lambda kernel: True)
    with pytest.raises(Exception, match="could not be built") as caught:
        check(strict=True)
    assert broken and any(isinstance(e, StrictError) for e in chain(caught.value))


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those behind it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def break_launch(monkeypatch: pytest.MonkeyPatch, fails: Callable[[int], bool]) -> list[int]:
    """Make chosen launches (counted from 0) raise."""
    launches: list[int] = []
    compile_all = cpp.compile_all

    def compile_broken(cx: Any, kernels: Any) -> Any:
        functions, problems = compile_all(cx, kernels)

        def wrap(f: Callable[..., int]) -> Callable[..., int]:
            def launch(*args: int) -> int:
                launches.append(len(launches))
                if fails(launches[-1]):
                    raise RuntimeError("the device said no")
                return f(*args)

            return launch

        return {symbol: wrap(f) for symbol, f in functions.items()}, problems

    monkeypatch.setattr(cpp, "compile_all", compile_broken)
    return launches


@pytest.mark.parametrize(
    "fails", [lambda n: True, lambda n: n == 0, lambda n: n == 1, lambda n: n % 2 == 1], ids=["all", "0", "1", "odd"]
)
def test_kernel_that_does_not_launch(fails: Callable[[int], bool], monkeypatch: pytest.MonkeyPatch) -> None:
    launches = break_launch(monkeypatch, fails)
    said = check(times=3)
    assert len(launches) >= 6
    assert len(said) == 1 and "the device said no" in said[0] and "k_" in said[0] and "FUSIONC_DUMP" in said[0]


@pytest.mark.gpu
def test_kernel_that_does_not_launch_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from fusionc.targets import triton

    start = triton.start

    def start_broken(cx: Any, kernels: Any, uses: Any = None) -> Any:
        def broken(*args: Any) -> None:
            raise RuntimeError("the device said no")

        problems = start(cx, kernels, uses)()[1]
        return lambda: (dict.fromkeys(kernels, broken), problems)

    monkeypatch.setattr(triton, "start", start_broken)
    x, w = torch.randn(16, 24, device="cuda"), torch.randn(24, 8, device="cuda")
    compiled = torch.compile(two_kernels, backend="fusionc")
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        for _ in range(4):  # a CUDA graph may be captured after some calls
            mine, theirs = (torch.zeros(3, device="cuda") for _ in range(2))
            found, expected = compiled(x, w, mine), two_kernels(x, w, theirs)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
            assert torch.equal(mine, theirs)
    assert any("the device said no" in str(c.message) for c in caught)


def test_launch_failure_in_training_and_with_dynamic_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    break_launch(monkeypatch, lambda n: True)
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.GELU())
    compiled = torch.compile(model, backend="fusionc", dynamic=True)
    for rows in (3, 5, 9):
        x, y = (torch.randn(rows, 8).requires_grad_() for _ in range(2))
        y.data.copy_(x.data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FallbackWarning)
            compiled(x).square().sum().backward()
        grads = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        model(y).square().sum().backward()
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(grads, [p.grad for p in model.parameters()], rtol=1e-4, atol=1e-5)
        model.zero_grad()


def test_launch_failure_of_a_kernel_that_reads_a_constant(monkeypatch: pytest.MonkeyPatch) -> None:
    break_launch(monkeypatch, lambda n: True)
    x = torch.randn(5, 3)
    with pytest.warns(FallbackWarning, match="could not be launched"), torch.no_grad():
        got = torch.compile(lambda x: x[[0, -1]] * 2, backend="fusionc")(x)
    torch.testing.assert_close(got, x[[0, -1]] * 2)


def test_strict_makes_a_launch_failure_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    break_launch(monkeypatch, lambda n: True)
    compiled = torch.compile(torch.nn.functional.silu, backend="fusionc", options={"strict": True})
    with pytest.raises(StrictError, match="could not be launched: RuntimeError: the device said no"), torch.no_grad():
        compiled(torch.ones(3))


def test_errors_of_the_user_pass_through() -> None:
    def pick(x: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
        return x[i] * 2

    compiled = torch.compile(pick, backend="fusionc")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        assert compiled(torch.arange(4.0), torch.tensor([3, 1])).tolist() == [6.0, 2.0]
        with pytest.raises(IndexError, match="out of range"):
            compiled(torch.arange(4.0), torch.tensor([3, 4]))
        assert compiled(torch.arange(4.0), torch.tensor([0, -1])).tolist() == [0.0, 6.0]


def test_interrupts_pass_through(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_all = cpp.compile_all

    def interrupted(*args: int) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(
        cpp, "compile_all", lambda cx, kernels: (dict.fromkeys(kernels, interrupted), compile_all(cx, kernels)[1])
    )
    with pytest.raises(KeyboardInterrupt):
        check()


HOSTILE = [
    'a");import os;os.system("touch canary")#',
    "class", "__import__", "int main() { }", "x\ny", "\u202eevil", "é" * 300, "../../../canary", "'''", '"""', "*/ int x; /*",
]  # fmt: skip


def test_hostile_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    class Inner(nn.Module):
        def __init__(self, k: int) -> None:
            super().__init__()
            for n, name in enumerate(HOSTILE):
                if "." not in name:
                    self.register_parameter(name, nn.Parameter(torch.full((8,), float(n + k))))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for p in self.parameters(recurse=False):
                x = torch.sigmoid(x * p) + p
            return x.softmax(-1)

    Inner.__name__ = Inner.__qualname__ = HOSTILE[0]
    model = nn.Sequential()
    for k, name in enumerate(HOSTILE):
        if "." not in name:
            model.add_module(name, Inner(k))
    x = torch.randn(4, 8)
    dump = tmp_path / "dump"
    with torch.no_grad():
        found = torch.compile(model, backend="fusionc", options={"dump": str(dump)})(x)
        torch.testing.assert_close(found, model(x), rtol=1e-4, atol=1e-5)
    compiled = torch.compile(model, backend="fusionc", options={"dump": str(dump)})
    compiled(x).sum().backward()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "dump"]
    files = [p for p in dump.rglob("*") if p.is_file()]
    assert any(p.name == "program.py" for p in files) and any(p.name == "kernel.cpp" for p in files)
    for path in files:
        text = path.read_text()
        assert dump in path.resolve().parents
        if path.suffix == ".py":
            calls = {
                n.func.attr
                for n in ast.walk(ast.parse(text))
                if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)
            }
            assert "system" not in calls and "canary" not in text
        elif path.suffix == ".cpp":
            assert "canary" not in text and "evil" not in text and text.isascii()
        else:
            assert "\u202e" not in text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target": "sm_12"}, "sm_90"),
        ({"tarqet": "cpp"}, "target"),
        ({"weights": 3}, "checked"),
        ({"verify": -1}, "verify"),
        ({"passes": ["strip"]}, "passes"),
        ({"disable": [1]}, "disable"),
        ({"strict": "yes"}, "strict"),
        ({3: 4}, "option"),
        ([("target", "cpp")], "dictionary"),
    ],
)
def test_malformed_options(options: Any, words: str) -> None:
    with pytest.raises(Exception, match=words) as caught:
        torch.compile(lambda x: x + 1, backend="fusionc", options=options)(torch.ones(2))
    assert any(isinstance(e, (OptionError, TypeError, AttributeError, ValueError)) for e in chain(caught.value))


def test_malformed_mode_and_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    from fusionc.config import Config

    with pytest.raises(OptionError, match="max-autotune"):
        Config.parse("fast")
    monkeypatch.setenv("FUSIONC_TARGET", "toaster")
    with pytest.raises(OptionError, match="FUSIONC_TARGET"):
        Config.parse()
    assert os.environ["FUSIONC_TARGET"] == "toaster"
