"""A sample of the Hugging Face zoo in each CI run, and a check of the table itself."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from tests.sweeps import zoo
from tests.sweeps.zoo_table import ROWS

NEEDS_BACKEND = pytest.mark.skipif(
    importlib.util.find_spec("fusionc.backend") is None, reason="the backend does not exist yet"
)


@NEEDS_BACKEND
@pytest.mark.parametrize(
    ("names", "more"),
    [("qwen3,t5,convnext,mamba", []), ("gpt2,whisper", ["--train-only"])],
    ids=["forward", "backward"],
)
def test_sample_of_architectures(names: str, more: list[str], tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    out = tmp_path / "zoo.json"
    status = zoo.main(["--names", names, "--jobs", "1", "--out", str(out), *more])
    results = json.loads(out.read_text())
    assert status == 0, "\n".join(f"{r['name']} {r['direction']}: {r['message']}" for r in results if r["message"])
    assert [r["thrown"] for r in results] == [0] * len(results)


def test_table_covers_what_is_promised() -> None:
    names = [row.name for row in ROWS]
    assert len(names) == len(set(names))
    assert len(names) >= 30
    assert sum(row.train for row in ROWS) >= 15
    families = {"decoder", "encoder", "encoder-decoder", "mixture of experts", "vision", "audio", "state space"}
    assert {row.family for row in ROWS} == families


def test_judge_allows_twice_eagers_error_and_no_more() -> None:
    exact = {"y": torch.ones(8, dtype=torch.float64)}
    eager = {"y": exact["y"] + 1e-3}
    assert zoo.judge({"y": exact["y"] + 1.9e-3}, eager, exact)[1] == ""
    assert "error" in zoo.judge({"y": exact["y"] + 2.1e-3}, eager, exact)[1]
    assert "not finite" in zoo.judge({"y": exact["y"] * float("nan")}, eager, exact)[1]
    assert "other results" in zoo.judge({}, eager, exact)[1]
    assert "shape" in zoo.judge({"y": exact["y"][:1]}, eager, exact)[1]
