"""Weights for each example: 1×1 becomes a batched product; values, every refusal, and CondConv as it is written."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fusionc
from fusionc.passes.per_example_conv import PerExampleConv
from tests.passes.helpers import check_values, refusals, rewritten

CONV = """
%x: f64[3, 4, 5, 6] = input
%w: f64[3, 20] = input
%b: f64[15] = input
%xv: f64[1, 12, 5, 6] = aten.view(%x, [1, 12, 5, 6])
%wv: f64[15, 4, 1, 1] = aten.view(%w, [15, 4, 1, 1])
%y: f64[1, 15, 5, 6] = aten.convolution(%xv, %wv, %b, [1, 1], [0, 0], [1, 1], False, [0, 0], 3)
%z: f64[3, 5, 5, 6] = aten.view(%y, [3, 5, 5, 6])
return (%z)
""".replace("[3, 20]", "[15, 4]")


def test_text() -> None:
    assert rewritten(PerExampleConv(), CONV) == """
%x: f64[3, 4, 5, 6] = input
%w: f64[15, 4] = input
%b: f64[15] = input
%xv: f64[1, 12, 5, 6] = aten.view(%x, [1, 12, 5, 6])
%wv: f64[15, 4, 1, 1] = aten.view(%w, [15, 4, 1, 1])
%view: f64[3, 5, 4] = aten.view(%wv, [3, 5, 4])
%view_1: f64[3, 4, 30] = aten.view(%xv, [3, 4, 30])
%bmm: f64[3, 5, 30] = aten.bmm(%view, %view_1)
%view_2: f64[1, 15, 5, 6] = aten.view(%bmm, [1, 15, 5, 6])
%view_3: f64[15, 1, 1] = aten.view(%b, [15, 1, 1])
%add: f64[1, 15, 5, 6] = aten.add(%view_2, %view_3)
%z: f64[3, 5, 5, 6] = aten.view(%add, [3, 5, 5, 6])
return (%z)
"""


def test_values() -> None:
    check_values(PerExampleConv(), CONV, fired=1, exact=False)
    check_values(PerExampleConv(), CONV.replace("%wv, %b, [1", "%wv, None, [1"), fired=1, exact=False)


STRIDED = CONV.replace("[1, 1], [0, 0], [1, 1]", "[2, 2], [0, 0], [1, 1]").replace("5, 5, 6]", "5, 3, 3]").replace(
    "15, 5, 6]", "15, 3, 3]")  # fmt: skip
LARGE = CONV.replace("[15, 4]", "[15, 36]").replace("15, 4, 1, 1", "15, 4, 3, 3").replace("[0, 0], [1, 1]", "[1, 1], [1, 1]")
LAST = (CONV.replace("%xv: f64[1, 12, 5, 6] = aten.view(%x, [1, 12, 5, 6])", "%xv: f64[1, 12, 5, 6]{360, 1, 72, 12} = input")
        .replace("%y: f64[1, 15, 5, 6]", "%y: f64[1, 15, 5, 6]{450, 1, 90, 15}")
        .replace("%z: f64[3, 5, 5, 6]", "%z: f64[3, 5, 5, 6]{5, 1, 90, 15}"))  # fmt: skip
MIXED = CONV.replace("%b: f64[15]", "%b: f32[15]")


@pytest.mark.parametrize("text, reason", [
    (STRIDED, "transposed, strided or padded"), (LARGE, "larger kernels are faster in the library"), (LAST, "not contiguous"),
    (MIXED, "not of one dtype"),
], ids=["strided", "large", "channels-last", "dtypes"])  # fmt: skip
def test_refusals(text: str, reason: str) -> None:
    assert refusals(PerExampleConv(), text) == [f"{reason} (y)"]


def test_not_looked_at() -> None:
    depthwise = CONV.replace("15", "12").replace("[12, 4]", "[12, 1]").replace("12, 4, 1, 1", "12, 1, 1, 1").replace(
        "False, [0, 0], 3", "False, [0, 0], 12").replace("[3, 5, 5, 6]", "[3, 4, 5, 6]")  # fmt: skip
    assert refusals(PerExampleConv(), depthwise) == [] and "bmm" not in rewritten(PerExampleConv(), depthwise)


class CondConv(nn.Module):
    """As in timm: experts mixed by a routing for each example, the batch folded into groups."""

    def __init__(self, kernel: int, bias: bool = True) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(4, 6 * 4 * kernel * kernel) / 4)
        self.biases = nn.Parameter(torch.randn(4, 6)) if bias else None
        self.route, self.kernel = nn.Linear(4, 4), kernel

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        routing = torch.sigmoid(self.route(x.mean((2, 3))))
        weight = torch.matmul(routing, self.experts).view(b * 6, c, self.kernel, self.kernel)
        bias = torch.matmul(routing, self.biases).view(b * 6) if self.biases is not None else None
        out = nn.functional.conv2d(x.reshape(1, b * c, h, w), weight, bias, 1, self.kernel // 2, 1, b)
        return torch.relu(out.permute(1, 0, 2, 3).view(b, 6, h, w))


@pytest.mark.parametrize("kernel, fired", [(1, 1), (3, 0)])
@pytest.mark.parametrize("bias", [True, False])
def test_cond_conv(kernel: int, fired: int, bias: bool) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x = CondConv(kernel, bias).double().eval(), torch.randn(5, 4, 7, 6, dtype=torch.float64)
    with torch.no_grad():
        found = torch.compile(model, backend="fusionc", options={"cache": False})(x)
        torch.testing.assert_close(found, model(x), rtol=1e-12, atol=1e-12)
    record = fusionc.report()[-1]
    assert next(p for p in record.passes if p.name == "per_example_conv").fired == fired
    assert sum(c.op == "aten.bmm.default" for c in record.calls) == fired
    assert sum(c.op == "aten.convolution.default" for c in record.calls) == 1 - fired
    # routing's mean, its sigmoid, and what follows the product are kernels; mixing and routing are products of matrices
    assert len(record.kernels) <= 4


def test_cond_conv_trains() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x = CondConv(1).double(), torch.randn(5, 4, 7, 6, dtype=torch.float64)
    model(x).sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]  # type: ignore[union-attr]
    model.zero_grad()
    torch.compile(model, backend="fusionc", options={"cache": False})(x).sum().backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], expected, rtol=1e-10, atol=1e-10)
