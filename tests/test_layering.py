"""The shape of the package, read from its imports: who may import whom, and that ``import fusionc`` stays cheap."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent / "fusionc"
ORDER = ("ops", "graph", "removal", "decomposition", "passes", "ir", "schedule", "codegen", "runtime")
DRIVERS = {"targets"}  # the top level in a folder of its own: joins all packages for one target, may import everything
LEAVES = {"errors", "config", "record", "accuracy"}  # plain data and errors: every package may import them
FILES = sorted(ROOT.rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Absolute dotted names that a file imports, at any depth, with line numbers; relative ones are resolved."""
    package = ["fusionc", *path.relative_to(ROOT).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module, node.lineno
            if module == "fusionc":
                for alias in node.names:
                    yield f"fusionc.{alias.name}", node.lineno


def faults(path: Path) -> list[str]:
    """What is wrong with the imports of one file."""
    parts = path.relative_to(ROOT).parts
    here = parts[0] if len(parts) > 1 else ""
    found = []
    for name, line in imports(path):
        where = f"{'/'.join(('fusionc', *parts))}:{line} imports {name}"
        if name == "torch._inductor" or name.startswith("torch._inductor."):
            found.append(f"{where}: nothing of fusionc uses Inductor")
        if not here or here in DRIVERS or not name.startswith("fusionc."):
            continue
        there = name.split(".")[1]
        if there in ORDER:
            if ORDER.index(there) > ORDER.index(here):
                found.append(f"{where}: {here} is to the left of {there}")
        elif there not in LEAVES:
            found.append(f"{where}: packages import only {', '.join(sorted(LEAVES))} of the top level")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_left(path: Path) -> None:
    assert faults(path) == []


def test_every_package_has_a_place() -> None:
    packages = {p.parent.relative_to(ROOT).parts[0] for p in ROOT.glob("*/**/__init__.py")}
    packages |= {p.parent.name for p in ROOT.glob("*/*.py")}
    assert packages <= set(ORDER) | DRIVERS, "name the new package in ORDER, and in ARCHITECTURE's list"


def test_no_module_hides_a_public_name() -> None:
    # Importing fusionc.report would bind the module over the function fusionc.report().
    import fusionc

    modules = {p.stem for p in ROOT.glob("*.py")} | {p.name for p in ROOT.iterdir() if p.is_dir()}
    assert not modules & {name.lower() for name in fusionc.__all__ if name != "Config"}


def test_public_names_resolve() -> None:
    import fusionc

    for name in fusionc.__all__:
        assert getattr(fusionc, name) is not None
    with pytest.raises(AttributeError, match="public names"):
        fusionc.no_such_thing  # noqa: B018


def test_import_is_cheap() -> None:
    heavy = "('torch', 'triton', 'sympy', 'networkx', 'rich', 'numpy')"
    code = f"""import sys, fusionc, fusionc.config, fusionc.errors, fusionc.record
print([m for m in {heavy} if m in sys.modules])"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent, check=True)
    assert done.stdout.strip() == "[]"


def test_no_traces_of_a_machine() -> None:
    # A path or address of somebody's machine in a source means that it works there only.
    words = ("/home/", "/work/", "/root/", "localhost:")
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        assert not [w for w in words if w in text], path
