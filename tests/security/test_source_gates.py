"""S7: what fusionc's own sources may not do.  Parsed, not grepped, so that prose may name what code may not use."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "fusionc"
FILES = sorted(PACKAGE.rglob("*.py"))

MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
NETWORK = {"socket", "http", "urllib", "ftplib", "requests", "smtplib"}
CALLS = {"eval", "exec", "compile", "os.system", "os.popen", "yaml.load", "torch.load", "os.execv", "os.execvp"}
# The generated Program is Python text that codegen has just written from its own IR, in memory, on every start; it is
# run in the one place named here and nowhere else.  `compile` gives it a file name for tracebacks.  The command line
# imports the module that its user names.
ALLOWED = {("exec", "codegen/program.py"), ("compile", "codegen/program.py"), ("importlib.import_module", "cli.py")}


def _name(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_name(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def _findings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            for name in names:
                if name.split(".")[0] in MODULES | NETWORK:
                    yield node.lineno, f"import {name}"
                if name.startswith("torch._inductor"):
                    yield node.lineno, f"import {name}"
        elif isinstance(node, ast.Call):
            called = _name(node.func)
            if called in CALLS or called.removeprefix("builtins.") in CALLS or called.split(".")[0] in MODULES:
                yield node.lineno, called.removeprefix("builtins.")
            if called in ("__import__", "importlib.import_module") and not isinstance(node.args[0], ast.Constant):
                yield node.lineno, called
            for keyword in node.keywords:
                if keyword.arg == "shell" and not (
                    isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                ):
                    yield node.lineno, "shell=True"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_s7_no_forbidden_call_or_import(path: Path) -> None:
    where = path.relative_to(PACKAGE).as_posix()
    found = [f"line {line}: {what}" for line, what in _findings(ast.parse(path.read_text(encoding="utf-8")))
             if (what, where) not in ALLOWED]  # fmt: skip
    assert not found, f"fusionc/{where}: {found}"


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from pickle import loads",
        "import torch._inductor.config",
        "from torch._inductor import config",
        "import os\nos.system('x')",
        "eval('1')",
        "exec('1')",
        "import builtins\nbuiltins.exec('1')",
        "subprocess.run('x', shell=True)",
        "subprocess.run('x', shell=flag)",
        "torch.load(path)",
        "yaml.load(text)",
        "importlib.import_module(name)",
        "import socket",
    ],
)
def test_the_gate_sees(text: str) -> None:
    assert list(_findings(ast.parse(text)))


@pytest.mark.parametrize(
    "text", ["model.eval()", "re.compile('x')", "torch.compile(f)", "run(c, shell=False)", "x = 'eval(1)'"]
)
def test_the_gate_lets_through(text: str) -> None:
    assert not list(_findings(ast.parse(text)))
