"""Rows that lie across memory: the copy, how far new strides go, and each refusal."""

from __future__ import annotations

import pytest
import torch

import fusionc.record
from fusionc.passes.row_major import RowMajor
from tests.passes.helpers import check_values, refusals, rewritten

PASS = RowMajor()
TEXT = """
%x: f32[2, 256, 512] = input
%p: f32[512, 256] = input
%w: f32[256] = input
%m: f32[1024, 256] = input
%t: f32[2, 512, 256]{131072, 1, 512} = aten.permute(%x, [0, 2, 1])
%h: f32[2, 512, 256]{131072, 1, 512} = aten.add(%t, %p)
%n: (f32[2, 512, 256], f32[2, 512, 1], f32[2, 512, 1]) = aten.native_layer_norm(%h, [256], %w, %w, 1e-05)
%n0: f32[2, 512, 256] = getitem(%n, 0)
%v: f32[2, 512, 256] = aten.view(%m, [2, 512, 256])
%g: f32[2, 512, 256]{131072, 1, 512} = aten.add(%h, %v)
%o: (f32[2, 512, 256], f32[2, 512, 1], f32[2, 512, 1]) = aten.native_layer_norm(%g, [256], %w, %w, 1e-05)
%o0: f32[2, 512, 256] = getitem(%o, 0)
%y: f32[2, 512, 256] = aten.mul(%o0, %n0)
%s: f32[2, 512, 1] = aten.amax(%g, [2], True)
return (%y, %s)
"""


def test_the_stream_behind_is_row_major() -> None:
    done = rewritten(PASS, TEXT)
    assert """
%h: f32[2, 512, 256]{131072, 1, 512} = aten.add(%t, %p)
%clone: f32[2, 512, 256] = aten.clone(%h, memory_format=torch.contiguous_format)
%n: (f32[2, 512, 256], f32[2, 512, 1], f32[2, 512, 1]) = aten.native_layer_norm(%clone, [256], %w, %w, 1e-05)
""" in done
    assert "%g: f32[2, 512, 256] = aten.add(%clone, %v)" in done
    check_values(PASS, TEXT, fired=1)


@pytest.mark.parametrize("text, expected", [
    (TEXT.replace("(%y, %s)", "(%y, %s, %h)"), ["it leaves the graph or is written (h)"]),
    (TEXT.replace("(%y, %s)", "(%y, %s, %g)"), ["its layout leaves the graph (g)"]),
    (TEXT.replace("%s: f32[2, 512, 1] = aten.amax(%g, [2], True)", "%r: f32[4] = aten.as_strided(%g, [4], [1])\n"
        "%s: f32[4] = aten.neg(%r)"),
     ["a reader looks at strides (r)"]),
    (TEXT.replace("%v: f32[2, 512, 256] =", "%u: f32[2, 256, 512] =").replace("(%m, [2, 512, 256])", "(%m, [2, 256, 512])\n"
        "%v: f32[2, 512, 256]{131072, 1, 512} = aten.permute(%u, [0, 2, 1])"),
     ["another operand lies across the rows too (g)"]),
])  # fmt: skip
def test_refusals(text: str, expected: list[str]) -> None:
    got = refusals(PASS, text)
    assert got[:1] == expected


@pytest.mark.parametrize("text", [
    TEXT.replace("512", "51").replace("131072", "13056").replace("1024", "102"),  # small
    TEXT.replace("%g: f32[2, 512, 256]{131072, 1, 512} = aten.add(%h, %v)", "%g: f32[2, 512, 256] = aten.neg(%v)"),
])  # fmt: skip
def test_not_worth_it(text: str) -> None:
    """Small tensors, and values that only the norm reads: they never reach memory."""
    assert "clone" not in rewritten(PASS, text) and refusals(PASS, text) == []


def test_end_to_end() -> None:
    torch.manual_seed(0)
    conv, norms = torch.nn.Conv1d(8, 128, 3, padding=1), [torch.nn.LayerNorm(128) for _ in range(3)]
    lines = [torch.nn.Linear(128, 128) for _ in range(2)]

    def model(x: torch.Tensor) -> torch.Tensor:
        h = torch.nn.functional.gelu(conv(x)).permute(0, 2, 1) + 1
        for norm, line in zip(norms, lines):
            h = h + line(norm(h))
        return norms[-1](h)

    x = torch.randn(2, 8, 512)
    with torch.no_grad(), fusionc.record.collect() as records:
        got = torch.compile(model, backend="fusionc", options={"cache": False, "verify": True})(x)
        want = model(x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert got.stride() == want.stride()
    assert [p.fired for p in records[0].passes if p.name == "row_major"] == [1]
