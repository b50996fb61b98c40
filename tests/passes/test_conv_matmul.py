"""Patches and 1×1 convolutions as products of matrices: values, text, refusals, the rule of sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fusionc.passes import conv_matmul
from fusionc.passes.conv_matmul import ConvMatmul, form
from tests.passes.helpers import check_values, refusals, rewritten

ITEM = ConvMatmul()


def graph(x: str = "f32[2, 3, 16, 32]{1536, 1, 96, 3}", w: str = "f32[5, 3, 8, 8]", y: str = "f32[2, 5, 2, 4]{40, 1, 20, 5}",
          b: str = "f32[5]", args: str = "[8, 8], [0, 0], [1, 1]", use: str = "%b") -> str:  # fmt: skip
    return f"""
%x: {x} = input
%w: {w} = input  # static
%b: {b} = input  # static
%y: {y} = aten.convolution(%x, %w, {use}, {args}, False, [0, 0], 1)
%z: {y} = aten.sin(%y)
return (%z)
"""


def test_text() -> None:
    assert rewritten(ITEM, graph()).strip().splitlines()[3:-2] == [
        "%permute: f32[2, 16, 32, 3] = aten.permute(%x, [0, 2, 3, 1])",
        "%view: f32[2, 2, 8, 4, 8, 3] = aten.view(%permute, [2, 2, 8, 4, 8, 3])",
        "%permute_1: f32[2, 2, 4, 8, 8, 3]{1536, 768, 24, 96, 3, 1} = aten.permute(%view, [0, 1, 3, 2, 4, 5])",
        "%permute_2: f32[5, 8, 8, 3]{192, 8, 1, 64} = aten.permute(%w, [0, 2, 3, 1])",
        "%clone: f32[2, 2, 4, 8, 8, 3] = aten.clone(%permute_1, memory_format=torch.contiguous_format)",
        "%view_1: f32[16, 192] = aten.view(%clone, [16, 192])",
        "%clone_1: f32[5, 8, 8, 3] = aten.clone(%permute_2, memory_format=torch.contiguous_format)",
        "%view_2: f32[5, 192] = aten.view(%clone_1, [5, 192])",
        "%t: f32[192, 5]{1, 192} = aten.t(%view_2)",
        "%addmm: f32[16, 5] = aten.addmm(%b, %view_1, %t)",
        "%view_3: f32[2, 2, 4, 5] = aten.view(%addmm, [2, 2, 4, 5])",
        "%permute_3: f32[2, 5, 2, 4]{40, 1, 20, 5} = aten.permute(%view_3, [0, 3, 1, 2])",
    ]


ROWS = {"x": "f64[2, 3, 6, 8]", "b": "f64[5]"}
COLUMNS = {"x": "f64[2, 3, 6, 8]{144, 1, 24, 3}", "b": "f64[5]"}
SAME: dict[str, dict[str, Any]] = {
    "one tap": {**ROWS, "w": "f64[5, 3, 1, 1]", "y": "f64[2, 5, 6, 8]", "args": "[1, 1], [0, 0], [1, 1]"},
    "one tap, no bias": {**ROWS, "w": "f64[5, 3, 1, 1]", "y": "f64[2, 5, 6, 8]", "args": "[1, 1], [0, 0], [2, 2]", "use": "None"},
    "one tap, last": {**COLUMNS, "w": "f64[5, 3, 1, 1]", "y": "f64[2, 5, 6, 8]{240, 1, 40, 5}", "args": "[1, 1], [0, 0], [1, 1]"},
    "patches": {**ROWS, "w": "f64[5, 3, 3, 2]", "y": "f64[2, 5, 2, 4]", "args": "[3, 2], [0, 0], [1, 1]"},
    "patches, last": {**COLUMNS, "w": "f64[5, 3, 3, 2]", "y": "f64[2, 5, 2, 4]{40, 1, 20, 5}", "args": "[3, 2], [0, 0], [1, 1]",
                      "use": "None"},
}  # fmt: skip


@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("wanted", ["rows", "columns"])
def test_values(name: str, wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64, whatever the rule says about speed."""
    monkeypatch.setattr(conv_matmul, "form", lambda *_: "rows" if "last" in name else wanted)
    monkeypatch.setattr(conv_matmul, "_HALF", (torch.float64,))
    check_values(ITEM, graph(**SAME[name]), fired=1, exact=False)


@pytest.mark.parametrize("end, alone", [("aten.sin(%y)", False), ("aten.permute(%y, [0, 2, 3, 1])", True)])
def test_bias_alone(end: str, alone: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a kernel that could add the bias follows is told to the rule."""
    asked: list[Any] = []
    monkeypatch.setattr(conv_matmul, "form", lambda *given: asked.append(given[-1]) or "")
    text = graph().replace("aten.sin(%y)", end)
    refusals(ITEM, text if not alone else text.replace("%z: f32[2, 5, 2, 4]{40, 1, 20, 5}", "%z: f32[2, 2, 4, 5]"))
    assert asked == [alone]


REFUSED: dict[str, dict[str, Any]] = {
    "not images of one floating dtype of at most 32 bits": {"b": "f64[5]"},
    "patches do not tile the image": {"x": "f32[2, 3, 17, 32]{1632, 1, 96, 3}"},
    "input and result are not dense in one layout": {"x": "f32[2, 3, 16, 32]{6144, 1, 192, 6}"},
    "the library's convolution is as fast": {"w": "f32[5, 3, 2, 2]", "y": "f32[2, 5, 8, 16]{640, 1, 80, 5}",
                                             "args": "[2, 2], [0, 0], [1, 1]"},
}  # fmt: skip


@pytest.mark.parametrize("reason", REFUSED)
def test_refusals(reason: str) -> None:
    assert refusals(ITEM, graph(**REFUSED[reason])) == [f"{reason} (y)"]


@pytest.mark.parametrize("args", ["[8, 8], [1, 1], [1, 1]", "[4, 4], [0, 0], [1, 1]", "[8, 8], [0, 0], [2, 2]"])
def test_other_convolutions_are_not_looked_at(args: str) -> None:
    sizes = {"[8, 8], [1, 1], [1, 1]": "2, 4", "[4, 4], [0, 0], [1, 1]": "3, 7", "[8, 8], [0, 0], [2, 2]": "1, 3"}[args]
    text = graph("f32[2, 3, 16, 32]", y=f"f32[2, 5, {sizes}]", args=args)
    assert refusals(ITEM, text) == [] and "convolution" in rewritten(ITEM, text)


def test_symbolic_sizes_are_refused() -> None:
    from fusionc.record import collect

    layer, x = torch.nn.Conv2d(3, 5, 8, 8).eval(), torch.randn(4, 3, 16, 32).to(memory_format=torch.channels_last)
    torch._dynamo.reset()
    torch._dynamo.mark_dynamic(x, 0)
    with torch.no_grad(), collect() as records:
        torch.testing.assert_close(torch.compile(layer, backend="fusionc")(x), layer(x), rtol=1e-4, atol=1e-4)
    (record,) = [p for r in records for p in r.passes if p.name == "conv_matmul"]
    assert record.fired == 0 and [r.reason for r in record.refusals] == ["a size is symbolic"]


def test_rule_of_sizes() -> None:
    f32, bf16 = torch.float32, torch.bfloat16
    assert form("cpu", f32, True, 3, (16, 16), 196, False) == form("cpu", f32, True, 384, (2, 2), 49, False) == "rows"
    assert form("cpu", bf16, False, 3, (16, 16), 196, False) == "rows" and not form("cpu", f32, False, 3, (16, 16), 196, False)
    assert not form("cpu", f32, True, 256, (1, 1), 196, True) and not form("cpu", bf16, False, 192, (2, 2), 196, True)
    assert form("cuda", bf16, True, 64, (1, 1), 3136, True) == "rows" and not form("cuda", bf16, True, 64, (1, 1), 3136, False)
    assert form("cuda", bf16, False, 3, (16, 16), 196, False) == "columns"
    assert not form("cuda", bf16, False, 96, (2, 2), 49, False)
    assert not form("cuda", f32, True, 64, (1, 1), 3136, True) and not form("mps", bf16, True, 3, (16, 16), 196, True)
