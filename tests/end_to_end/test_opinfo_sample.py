"""A sample of the OpInfo sweep in each CI run, and the sweep's own tests: it must notice wrong and dying backends."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.sweeps import opinfo
from tests.sweeps.compare import compare, copy_tree

HERE = "tests.end_to_end.test_opinfo_sample"
ROOT = Path(__file__).resolve().parents[2]


def sweep(table: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own: torch's operator database changes global settings when imported."""
    command = [sys.executable, "-m", "tests.sweeps.opinfo", "--out", str(table), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


def mischief(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
    """A backend that adds one to the first element of ``exp``, kills its process on ``atan`` and is right otherwise."""
    names = " ".join(str(node.target) for node in gm.graph.nodes)
    if "atan" in names:
        os.kill(os.getpid(), signal.SIGSEGV)

    def run(*args: Any) -> Any:
        out = gm(*args)
        if "exp" in names:
            out[0].view(-1)[0].add_(1)
        return out

    return run


@pytest.mark.skipif(importlib.util.find_spec("fusionc.backend") is None, reason="the backend does not exist yet")
def test_sample_of_operators(tmp_path: Path) -> None:
    table = tmp_path / "table.tsv"
    arguments = "--every 25 --offset 7 --samples 1 --dtypes float32,bfloat16,int64 --check-baseline --timeout 60"
    done = sweep(table, *arguments.split())
    assert done.returncode == 0, done.stdout + done.stderr
    rows = opinfo.read_table(table).values()
    assert sum(row["status"] == "pass" for row in rows) >= 50


def test_sweep_notices_wrong_results_and_crashes(tmp_path: Path) -> None:
    table = tmp_path / "table.tsv"
    done = sweep(
        table, "--backend", f"{HERE}:mischief", "--ops", "exp,neg,atan,nn.functional.dropout", "--samples", "1"
    )
    rows = {row["op"]: row for row in opinfo.read_table(table).values()}
    assert {op: row["status"] for op, row in rows.items()} == {
        "exp": "fail",
        "neg": "pass",
        "atan": "crash",
        "nn.functional.dropout": "pass",
    }, done.stdout + done.stderr
    assert done.returncode == 1
    assert "SIGSEGV" in rows["atan"]["message"]
    assert "eager's" in rows["exp"]["message"]
    # random operators reach the backend although OpInfo wraps them in something that Dynamo refuses
    assert (rows["nn.functional.dropout"]["vacuous"], rows["nn.functional.dropout"]["graphs"]) == ("0", "1")


def test_baseline_may_only_shrink() -> None:
    def row(op: str, status: str) -> dict[str, str]:
        return {"op": op, "dtype": "float32", "direction": "forward", "status": status, "message": "why"}

    baseline = {("listed", "float32", "forward"): {}, ("mended", "float32", "forward"): {}}
    rows = [row("listed", "fail"), row("mended", "pass"), row("fresh", "crash"), row("fine", "pass")]
    new, fixed = opinfo.against_baseline(rows, baseline)
    assert new == ["fresh float32 forward: crash: why"]
    assert fixed == ["mended float32 forward: pass"]


@pytest.mark.parametrize(
    ("got", "want", "says"),
    [
        (torch.tensor([1.0, float("nan")]), torch.tensor([1.0, 2.0]), "NaN at different positions"),
        (torch.tensor([float("inf")]), torch.tensor([-float("inf")]), "Inf of the other sign"),
        (torch.tensor([1.0]), torch.tensor([1.0], dtype=torch.float64), "float32"),
        (torch.ones(2, 1), torch.ones(2), "(2, 1)"),
        (torch.tensor([1, 2]), torch.tensor([1, 3]), "at (1,) 2 for eager's 3"),
        ([torch.ones(1)], [torch.ones(1), torch.ones(1)], "1 results for eager's 2"),
        (torch.tensor([0.0]), torch.tensor([-0.0]), "zero of the other sign"),
        (torch.tensor([1.001]), torch.tensor([1.0]), "eager's 1.0"),
    ],
)
def test_compare_says_what_differs(got: Any, want: Any, says: str) -> None:
    problem = compare(got, want, lambda: want, signed_zeros=True)
    assert problem is not None
    assert says in problem


def test_compare_allows_what_is_as_good_as_eager() -> None:
    exact = torch.tensor([1.0], dtype=torch.float64)
    assert compare(torch.tensor([1.0015]), torch.tensor([1.001]), lambda: exact) is None  # twice eager's error
    assert compare(torch.tensor([1.003]), torch.tensor([1.001]), lambda: exact) is not None


def test_copies_keep_strides_offsets_and_sharing() -> None:
    base = torch.arange(24.0).requires_grad_()
    tree = [base.detach()[1:13].view(3, 4).t(), base.detach()[5:9], torch.ones(3, 1).expand(3, 5), base]
    copied = copy_tree(tree)
    assert [t.stride() for t in copied] == [t.stride() for t in tree]
    assert [t.storage_offset() for t in copied] == [t.storage_offset() for t in tree]
    copied[1].fill_(-1)
    assert int((copied[0] == -1).sum()) == 4
    assert int((tree[0] == -1).sum()) == 0
    assert copied[3].requires_grad
    assert copied[3].is_leaf
