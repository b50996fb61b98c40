"""Weights for each example: on the CPU 1×1 becomes a batched product, on a GPU an operator; values, every refusal, CondConv."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import fusionc
from fusionc.graph.facts import Facts
from fusionc.graph.text import parse
from fusionc.passes.per_example_conv import PerExampleConv
from tests.passes.helpers import check_values, refusals, rewritten


class OnGpu(PerExampleConv):
    kernels = ("cpu",)
    dtypes = (torch.float64,)


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


KERNEL = """
%x: f64[3, 4, 5, 6] = input
%r: f64[3, 2] = input
%e: f64[2, 180] = input  # static
%b: f64[15] = input
%m: f64[3, 180] = aten.mm(%r, %e)
%xv: f64[1, 12, 5, 6] = aten.view(%x, [1, 12, 5, 6])
%wv: f64[15, 4, 3, 3] = aten.view(%m, [15, 4, 3, 3])
%y: f64[1, 15, 5, 6] = aten.convolution(%xv, %wv, %b, [1, 1], [1, 1], [1, 1], False, [0, 0], 3)
%p: f64[15, 1, 5, 6]{30, 450, 6, 1} = aten.permute(%y, [1, 0, 2, 3])
%z: f64[3, 5, 5, 6] = aten.view(%p, [3, 5, 5, 6])
%a: f64[3, 5, 5, 6] = aten.silu(%z)
return (%a)
"""


def test_text_of_kernels() -> None:
    assert rewritten(OnGpu(), KERNEL).splitlines()[8:] == [
        '%per_example_conv: f64[1, 15, 5, 6] = fusionc.per_example_conv(%xv, %wv, %b, [1, 1], [1, 1], [1, 1], 3, "silu")',
        "%permute: f64[15, 1, 5, 6] = aten.permute(%per_example_conv, [1, 0, 2, 3])",
        "%view: f64[3, 5, 5, 6] = aten.view(%permute, [3, 5, 5, 6])",
        "return (%view)",
    ]
    check_values(OnGpu(), KERNEL, fired=1, exact=False)


def test_what_a_kernel_that_follows_takes_in_is_left_to_it() -> None:
    text = KERNEL.replace("return (%a)", "%s: f64[3, 5, 5, 6] = aten.mul(%a, %x1)\nreturn (%s)").replace(
        "%r: f64", "%x1: f64[3, 5, 5, 6] = input\n%r: f64")  # fmt: skip
    found = rewritten(OnGpu(), text).splitlines()
    assert found[9:12] == [
        '%per_example_conv: f64[1, 15, 5, 6] = fusionc.per_example_conv(%xv, %wv, None, [1, 1], [1, 1], [1, 1], 3, "")',
        "%view: f64[15, 1, 1] = aten.view(%b, [15, 1, 1])",
        "%add: f64[1, 15, 5, 6] = aten.add(%per_example_conv, %view)",
    ]
    assert any("= aten.silu(%z)" in line for line in found)
    check_values(OnGpu(), text, fired=1, exact=False)


@pytest.mark.parametrize("changes", [
    {"return (%a)": "return (%a, %p)"}, {"aten.silu(%z)": "aten.sin(%z)"}, {"%wv, %b": "%wv, None"}, {"aten.silu": "aten.relu"},
    {"[1, 1], [1, 1], [1, 1], False": "[2, 1], [0, 1], [1, 1], False", "5, 6] =": "2, 6] =", "5, 5, 6])": "5, 2, 6])",
     "3, 4, 2, 6]": "3, 4, 5, 6]", "1, 12, 2, 6]": "1, 12, 5, 6]", "{30, 450, 6, 1}": "{12, 180, 6, 1}",
     "15, 1, 5, 6]": "15, 1, 2, 6]"},
], ids=["read-elsewhere", "no-activation", "no-bias", "relu", "strided"])  # fmt: skip
def test_values_of_kernels(changes: dict[str, str]) -> None:
    text = KERNEL
    for old, new in changes.items():
        text = text.replace(old, new)
    found = "".join(line for line in rewritten(OnGpu(), text).splitlines() if "fusionc.per_example_conv" in line)
    assert ('"silu")' in found) == (len(changes) == 1 and "%wv, %b" in changes or len(changes) > 1)
    check_values(OnGpu(), text, fired=1, exact=False)


@pytest.mark.parametrize("text, reason", [
    (KERNEL.replace("%wv: f64[15, 4, 3, 3] = aten.view(%m, [15, 4, 3, 3])\n", "").replace(
        "%b: f64[15] = input", "%b: f64[15] = input\n%wv: f64[15, 4, 3, 3] = input  # static"),
     "the weights are no example's own"),
    (MIXED, "not of one dtype"), (LAST, "not contiguous"), (KERNEL.replace("f64", "f32"), "no kernel of ours for this dtype"),
], ids=["frozen", "dtypes", "channels-last", "float32"])  # fmt: skip
def test_refusals_of_kernels(text: str, reason: str) -> None:
    assert refusals(OnGpu(), text) == [f"{reason} (y)"]


def test_transposed() -> None:
    text = KERNEL.replace("[1, 1], False", "[1, 1], True").replace("[15, 4, 3, 3]", "[12, 5, 3, 3]")
    assert refusals(OnGpu(), text) == ["transposed (y)"]


@pytest.mark.parametrize("item", [OnGpu(), PerExampleConv()])
def test_batches_of_unknown_size(item: PerExampleConv) -> None:
    gm = parse(CONV)
    x, conv = (next(n for n in gm.graph.nodes if n.name == name) for name in ("x", "y"))
    size = ShapeEnv().create_unbacked_symint()
    conv.args = (*conv.args[:8], x)
    conv.args[0].meta["val"] = torch.empty(1, size, 5, 6, dtype=torch.float64, device="meta")
    (match,) = item.find(Facts(gm))
    refused = item.check(match, Facts(gm))
    assert refused is not None and refused.reason == "a size is symbolic"


class CondConv(nn.Module):
    """As in timm: experts mixed by a routing for each example, the batch folded into groups."""

    def __init__(self, kernel: int, bias: bool = True, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(4, 6 * 4 // groups * kernel * kernel) / 4)
        self.biases = nn.Parameter(torch.randn(4, 6)) if bias else None
        self.route, self.kernel, self.stride, self.groups = nn.Linear(4, 4), kernel, stride, groups

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        routing = torch.sigmoid(self.route(x.mean((2, 3))))
        weight = torch.matmul(routing, self.experts).view(b * 6, c // self.groups, self.kernel, self.kernel)
        bias = torch.matmul(routing, self.biases).view(b * 6) if self.biases is not None else None
        out = nn.functional.conv2d(x.reshape(1, b * c, h, w), weight, bias, self.stride, self.kernel // 2, 1, b * self.groups)
        return torch.relu(out.permute([1, 0, 2, 3]).view(b, 6, out.shape[-2], out.shape[-1]))


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


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pipeline's pass does on the CPU what it does on a GPU."""
    monkeypatch.setattr(PerExampleConv, "kernels", OnGpu.kernels)
    monkeypatch.setattr(PerExampleConv, "dtypes", OnGpu.dtypes)
    torch._dynamo.reset()
    torch.manual_seed(0)


@pytest.mark.parametrize("kernel, stride, groups", [(1, 1, 1), (3, 1, 1), (3, 2, 1), (5, 2, 2)])
@pytest.mark.parametrize("bias", [True, False])
def test_cond_conv_on_a_gpu(kernel: int, stride: int, groups: int, bias: bool, on_gpu: None) -> None:
    model = CondConv(kernel, bias, stride, groups).double().eval()
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(5, 4, 7, 6, dtype=torch.float64).contiguous(memory_format=layout)
        with torch.no_grad():
            found = torch.compile(model, backend="fusionc", options={"cache": False, "strict": True})(x)
            torch.testing.assert_close(found, model(x), rtol=1e-12, atol=1e-12)
        calls = [c.op for c in fusionc.report()[-1].calls]
        assert calls.count("fusionc.per_example_conv.default") == 1 and "aten.convolution.default" not in calls
        torch._dynamo.reset()


@pytest.mark.parametrize("kernel", [1, 3])
def test_cond_conv_trains_on_a_gpu(kernel: int, on_gpu: None) -> None:
    model, x = CondConv(kernel).double(), torch.randn(5, 4, 7, 6, dtype=torch.float64)
    x.requires_grad_()
    model(x).square().sum().backward()
    wanted = [*model.parameters(), x]
    expected = [p.grad.clone() for p in wanted]  # type: ignore[union-attr]
    for p in wanted:
        p.grad = None
    torch.compile(model, backend="fusionc", options={"cache": False})(x).square().sum().backward()
    torch.testing.assert_close([p.grad for p in wanted], expected, rtol=1e-10, atol=1e-10)
    calls = [{c.op for c in record.calls} for record in fusionc.report()[-2:]]
    assert "fusionc.per_example_conv.default" in calls[0] and "aten.convolution_backward.default" in calls[1]


def test_batches_of_any_size(on_gpu: None) -> None:
    model = CondConv(3).double().eval()
    compiled = torch.compile(model, backend="fusionc", dynamic=True, options={"cache": False})
    with torch.no_grad():
        for b in (5, 3):
            x = torch.randn(b, 4, 7, 6, dtype=torch.float64)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-12, atol=1e-12)
    record = next(p for p in fusionc.report()[-1].passes if p.name == "per_example_conv")
    assert record.fired == 0 and [each.reason for each in record.refusals] == ["a size is symbolic"]
