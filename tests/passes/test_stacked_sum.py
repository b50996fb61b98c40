"""Sums over a stacked axis: every spelling, values, every refusal; selective kernels (SK, LSK) in few kernels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fusionc
from fusionc.passes.stacked_sum import StackedSum
from tests.passes.helpers import apply, check_values, refusals, rewritten

SELECT = """
%a: f64[2, 3, 4, 5] = input
%b: f64[2, 3, 4, 5] = input
%w: f64[2, 2, 3, 1, 1] = input
%cat: f64[2, 6, 4, 5] = aten.cat([%a, %b], 1)
%view: f64[2, 2, 3, 4, 5] = aten.view(%cat, [2, 2, 3, 4, 5])
%plain: f64[2, 3, 4, 5] = aten.sum.dim_IntList(%view, [1])
%mul: f64[2, 2, 3, 4, 5] = aten.mul(%view, %w)
%sum: f64[2, 3, 4, 5] = aten.sum.dim_IntList(%mul, [1])
return (%plain, %sum)
"""
UNSQUEEZED = """
%a: f64[3, 5] = input
%b: f64[3, 5] = input
%c: f64[3, 5] = input
%v: f64[5] = input
%ua: f64[3, 1, 5] = aten.unsqueeze(%a, 1)
%ub: f64[3, 1, 5] = aten.unsqueeze(%b, -2)
%uc: f64[3, 1, 5] = aten.unsqueeze(%c, 1)
%cat: f64[3, 3, 5] = aten.cat([%ua, %ub, %uc], 1)
%one: f64[3, 3, 5] = aten.add(%cat, 2.0)
%two: f64[3, 3, 5] = aten.div(%one, %v)
%sum: f64[3, 1, 5] = aten.sum.dim_IntList(%two, [-2], True)
return (%sum)
"""


def test_text() -> None:
    assert rewritten(StackedSum(), SELECT) == """
%a: f64[2, 3, 4, 5] = input
%b: f64[2, 3, 4, 5] = input
%w: f64[2, 2, 3, 1, 1] = input
%add: f64[2, 3, 4, 5] = aten.add(%a, %b)
%select: f64[2, 3, 1, 1]{6, 1, 1, 1} = aten.select.int(%w, 1, 0)
%mul_1: f64[2, 3, 4, 5] = aten.mul(%a, %select)
%select_1: f64[2, 3, 1, 1]{6, 1, 1, 1} = aten.select.int(%w, 1, 1)
%mul_2: f64[2, 3, 4, 5] = aten.mul(%b, %select_1)
%add_1: f64[2, 3, 4, 5] = aten.add(%mul_1, %mul_2)
return (%add, %add_1)
"""


@pytest.mark.parametrize("text, fired", [
    (SELECT, 2), (UNSQUEEZED, 1), (UNSQUEEZED.replace("aten.div(%one, %v)", "aten.sub(%one, %cat)"), 1),
    (SELECT.replace("%w: f64[2, 2, 3, 1, 1]", "%w: f64[4, 5]"), 2),
    (SELECT.replace("%w: f64[2, 2, 3, 1, 1]", "%w: f64[1, 3, 1, 1]"), 2),
    (SELECT.replace("return (%plain", "return (%mul"), 1),
], ids=["select", "unsqueezed", "twice", "broadcast", "same for all", "read elsewhere"])  # fmt: skip
def test_values(text: str, fired: int) -> None:
    check_values(StackedSum(), text, fired=fired, exact=False)


HALF = UNSQUEEZED.replace("f64", "f16")


@pytest.mark.parametrize("text, found", [
    (HALF, "a longer sum in half precision is rounded once, additions each time (sum_1)"),
    (UNSQUEEZED.replace("[-2], True)", "[-2], True, dtype=torch.float32)").replace("%sum: f64", "%sum: f32"),
     "the sum has another dtype than its terms (sum_1)"),
    (UNSQUEEZED.replace("%v: f64[5]", "%v: f32[5]"), "a part is not contiguous or has another dtype (v)"),
    (UNSQUEEZED.replace("%c: f64[3, 5]", "%c: f64[3, 5]{1, 3}").replace("%uc: f64[3, 1, 5]", "%uc: f64[3, 1, 5]{1, 15, 3}"),
     "a part is not contiguous or has another dtype (c)"),
], ids=["half", "dtype", "mixed", "strides"])  # fmt: skip
def test_refusals(text: str, found: str) -> None:
    assert refusals(StackedSum(), text) == [found]


@pytest.mark.parametrize("old, new", [
    ("%cat: f64[3, 3, 5] = aten.cat([%ua, %ub, %uc], 1)", "%cat: f64[3, 3, 5] = input"),  # no stack
    ("aten.unsqueeze(%a, 1)", "aten.view(%a, [3, 1, 5])"),  # a cat of something else
    ("%sum: f64[3, 1, 5] = aten.sum.dim_IntList(%two, [-2], True)", "%sum: f64[] = aten.sum.dim_IntList(%two, None)"),
], ids=str)
def test_not_looked_at(old: str, new: str) -> None:
    text = UNSQUEEZED.replace(old, new)
    if "= input" in new:
        lines = [n for n in text.strip().split("\n") if n != new and not n.startswith(("%u", "%a", "%b", "%c:"))]
        text = "\n".join(["", new, *lines, ""])
    assert apply(StackedSum(), text)[1].fired == 0 and refusals(StackedSum(), text) == []


class SelectiveKernel(nn.Module):
    """Two depthwise branches, mixed by a softmax over branches for each channel (SKNet)."""

    def __init__(self, c: int = 16) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c, c, 3, padding=d, dilation=d, groups=c, bias=False), nn.BatchNorm2d(c), nn.ReLU())
            for d in (1, 2))  # fmt: skip
        self.squeeze = nn.Sequential(nn.Conv2d(c, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.out = nn.Conv2d(4, 2 * c, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.stack([b(x) for b in self.branches], 1)
        weights = self.out(self.squeeze(y.sum(1).mean((2, 3), keepdim=True))).view(x.shape[0], 2, -1, 1, 1).softmax(1)
        return (y * weights).sum(1)


class LargeSelectiveKernel(nn.Module):
    """A chain of two depthwise convolutions, mixed by weights for each pixel (LSKNet)."""

    def __init__(self, c: int = 16) -> None:
        super().__init__()
        self.near = nn.Conv2d(c, c, 5, padding=2, groups=c)
        self.far = nn.Conv2d(c, c, 7, padding=9, groups=c, dilation=3)
        self.one, self.two = nn.Conv2d(c, c // 2, 1), nn.Conv2d(c, c // 2, 1)
        self.squeeze, self.out = nn.Conv2d(2, 2, 7, padding=3), nn.Conv2d(c // 2, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        near = self.near(x)
        a, b = self.one(near), self.two(self.far(near))
        both = torch.cat([a, b], 1)
        maps = torch.cat([both.mean(1, keepdim=True), both.max(1, keepdim=True)[0]], 1)
        weights = self.squeeze(maps).sigmoid()
        return x * self.out(a * weights[:, 0].unsqueeze(1) + b * weights[:, 1].unsqueeze(1))


@pytest.mark.parametrize("model, kernels, convolutions", [
    (SelectiveKernel(), 4, 4), (LargeSelectiveKernel(), 6, 6),
], ids=["SK", "LSK"])  # fmt: skip
def test_selective_kernels_fuse(model: nn.Module, kernels: int, convolutions: int) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x = model.double().eval(), torch.randn(2, 16, 12, 11, dtype=torch.float64)
    with torch.no_grad():
        found = torch.compile(model, backend="fusionc", options={"cache": False})(x)
        torch.testing.assert_close(found, model(x), rtol=1e-10, atol=1e-10)
    record = fusionc.report()[-1]
    assert sum(k.uses for k in record.kernels) <= kernels
    assert [c.op for c in record.calls].count("aten.convolution.default") == convolutions == len(record.calls)


def test_values_added_to_themselves_are_not_taken_apart() -> None:
    """2⁴⁰ ways down to an input, and no stack there; with a stack nothing is rewritten."""
    for first in ("%x0: f64[2, 3] = aten.mul(%x, %x)", "%x0: f64[2, 3] = aten.cat([%u, %u], 0)"):
        lines = ["%x: f64[2, 3] = input", "%v: f64[3] = input", "%u: f64[1, 3] = aten.unsqueeze(%v, 0)", first]
        lines += [f"%x{i + 1}: f64[2, 3] = aten.add(%x{i}, %x{i})" for i in range(40)]
        lines += ["%s: f64[3] = aten.sum.dim_IntList(%x40, [0])", "return (%s)"]
        assert apply(StackedSum(), "\n" + "\n".join(lines) + "\n")[1].fired == 0
