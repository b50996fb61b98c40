"""Few rows times the matrices of their groups: the rewrite, equal values, each refusal."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fusionc.graph.text import parse
from fusionc.passes.grouped_rows import GroupedRows
from fusionc.passes.manager import run
from tests.passes.helpers import apply, call, refusals, rewritten

PASS = GroupedRows(devices=("cpu",))
TEXT = """
%x: bf16[6, 16] = input
%w: bf16[3, 8, 16] = input  # static
%ends: i32[3] = input
%wt: bf16[3, 16, 8]{128, 1, 16} = aten.transpose.int(%w, -2, -1)
%y: bf16[6, 8] = aten._grouped_mm(%x, %wt, %ends)
return (%y)
"""


def test_rewrite() -> None:
    text = rewritten(PASS, TEXT)
    assert "%grouped_rows: bf16[6, 8] = fusionc.grouped_rows(%x, %w, %ends)\n" in text
    assert "_grouped_mm" not in text and "transpose" not in text


def test_a_matrix_that_is_turned_otherwise() -> None:
    text = TEXT.replace("aten.transpose.int(%w, -2, -1)", "aten.permute(%w, [0, 2, 1])")
    text = rewritten(PASS, text)
    assert "= aten.transpose.int(%wt, 1, 2)\n" in text and "fusionc.grouped_rows(%x, %transpose, %ends)" in text


@pytest.mark.parametrize("how", ["transpose", "permute"])
def test_equal_values(how: str) -> None:
    text = TEXT
    if how == "permute":
        text = text.replace("aten.transpose.int(%w, -2, -1)", "aten.permute(%w, [0, 2, 1])")
    x, w = torch.randn(6, 16).bfloat16(), torch.randn(3, 8, 16).bfloat16()
    inputs = [x, w, torch.tensor([2, 2, 6], dtype=torch.int32)]
    old, (new, record) = parse(text), apply(PASS, text)
    assert record.fired == 1
    made, want = (call(gm, inputs)[0][0] for gm in (new, old))
    torch.testing.assert_close(made, want)
    torch.testing.assert_close(made.float(), torch.cat([x[:2].float() @ w[0].float().T, x[2:].float() @ w[2].float().T]),
                               rtol=2e-2, atol=2e-2)  # fmt: skip


@pytest.mark.parametrize(
    "text, reason",
    [
        (TEXT.replace("[6, ", "[600, "), "it has more than 512 rows (y)"),
        (TEXT.replace("%ends)", "%ends, None, torch.bfloat16)"),
         "it has a bias, another type of result, or no groups of rows (y)"),
        (TEXT.replace("{128, 1, 16} = aten.transpose.int(%w, -2, -1)", " = aten.reshape(%w, [3, 16, 8])"),
         "its matrices are not stored densely by rows, or rows are not multiples of 16 bytes (y)"),
        (TEXT.replace("[3, 8, 16]", "[8, 16]").replace("[3, 16, 8]{128, 1, 16}", "[16, 8]{1, 16}").replace("[6, 8]", "[3, 6, 8]"),
         "its groups are not groups of rows (y)"),
    ],
)  # fmt: skip
def test_refusals(text: str, reason: str) -> None:
    assert refusals(PASS, text) == [reason]


def test_refuses_sizes_that_are_not_known() -> None:
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    gm = parse(TEXT)
    mode = FakeTensorMode(shape_env=ShapeEnv())
    sizes: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC, DimDynamic.STATIC])
    for node in gm.graph.nodes:
        if node.name == "x":
            node.meta["val"] = mode.from_tensor(torch.randn(6, 16).bfloat16(), symbolic_context=sizes)
    _, (record,) = run([(1, PASS)], gm, "graph", None, stage="inference")
    assert [r.reason for r in record.refusals] == ["its sizes are not known"]


def test_refuses_a_type_without_a_kernel() -> None:
    gm = parse(TEXT)
    for node in gm.graph.nodes:
        if node.name == "x":
            node.meta["val"] = node.meta["val"].double()
    _, (record,) = run([(1, PASS)], gm, "graph", None, stage="inference")
    assert [r.reason for r in record.refusals] == ["its type has no kernel"]


def test_a_second_run_changes_nothing() -> None:
    assert rewritten(PASS, TEXT) == rewritten(PASS, apply(PASS, TEXT)[0])


def test_refuses_a_result_with_wider_rows() -> None:
    gm = parse(TEXT)
    (y,) = [n for n in gm.graph.nodes if n.name == "y"]
    y.meta["val"] = y.meta["val"].new_empty_strided((6, 8), (16, 1))
    _, (record,) = run([(1, PASS)], gm, "graph", None, stage="inference")
    assert [r.reason for r in record.refusals] == ["its result is not stored densely"]


def test_refuses_training_and_leaves_other_devices_alone() -> None:
    assert refusals(PASS, TEXT, stage="forward") == ["its gradients read what it reads (y)"]
    assert apply(GroupedRows(), TEXT)[1].fired == 0
