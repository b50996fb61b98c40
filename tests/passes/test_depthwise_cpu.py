"""Depthwise convolutions on the CPU as calls of our kernel: text, each refusal, the rule of sizes, whole models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusionc.passes.depthwise_cpu import DepthwiseCPU, worth
from fusionc.record import collect
from tests.passes.helpers import apply, refusals, rewritten

ITEM = DepthwiseCPU()


def graph(
    x: str = "f32[2, 4, 9, 20]",
    w: str = "f32[4, 1, 11, 11]",
    y: str = "f32[2, 4, 9, 20]",
    args: str = "[1, 1], [5, 5], [1, 1]",
    groups: int = 4,
    after: str = "aten.gelu(%y)",
    b: str = "f32[4]",
    end: str = "%g",
) -> str:
    return f"""
%x: {x} = input
%w: {w} = input  # static
%b: {b} = input  # static
%y: {y} = aten.convolution(%x, %w, %b, {args}, False, [0, 0], {groups})
%g: {y} = {after}
return ({end})
"""


def test_text_and_second_run() -> None:
    text = rewritten(ITEM, graph())
    assert 'fusionc.depthwise_cpu(%x, %w, %b, [1, 1], [5, 5], [1, 1], "gelu")' in text and "convolution" not in text
    assert text.count(" = ") == 4
    gm, _ = apply(ITEM, graph())
    assert apply(ITEM, gm)[1].fired == 0


@pytest.mark.parametrize(
    "after, name, lines",
    [
        ("aten.relu(%y)", '"relu"', 4),
        ("aten.silu(%y)", '"silu"', 4),
        ("aten.sin(%y)", '""', 5),
        ('aten.gelu(%y, approximate="tanh")', '"gelu_tanh"', 4),
    ],
)
def test_activations(after: str, name: str, lines: int) -> None:
    text = rewritten(ITEM, graph(after=after))
    assert f"{name})" in text and text.count(" = ") == lines


def test_value_read_elsewhere_stays() -> None:
    text = rewritten(ITEM, graph(end="%g, %y"))
    assert '""' in text and "gelu" in text


def test_rows() -> None:
    text = rewritten(
        ITEM, graph("f32[2, 4, 40]", "f32[4, 1, 17]", "f32[2, 4, 40]", "[1], [8], [1]").replace("[0, 0]", "[0]")
    )
    assert text.count("aten.unsqueeze") == 2 and '[1, 1], [0, 8], [1, 1], "gelu"' in text and "squeeze.dim" in text


LAST = "f32[2, 4, 9, 20]{720, 1, 80, 4}"
REFUSED: dict[str, dict[str, Any]] = {
    "not of one floating dtype of at most 32 bits": {"b": "f64[4]"},
    "the filter is too large": {"w": "f32[4, 1, 65, 1]", "args": "[1, 1], [32, 0], [1, 1]"},
    "strided and dilated at once": {"w": "f32[4, 1, 3, 3]", "y": "f32[2, 4, 4, 9]", "args": "[2, 2], [1, 1], [2, 2]"},
    "the library is as fast": {"x": LAST, "y": LAST, "w": "f32[4, 1, 3, 3]", "args": "[1, 1], [1, 1], [1, 1]"},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refusals(reason: str) -> None:
    assert refusals(ITEM, graph(**REFUSED[reason])) == [f"{reason} (y)"]


def test_symbolic_width_is_refused_and_symbolic_batch_is_not() -> None:
    layer, x = nn.Conv2d(3, 3, 11, padding=5, groups=3).eval(), torch.randn(4, 3, 9, 20)
    for dim, count in ((3, 0), (0, 1)):
        torch._dynamo.reset()
        torch._dynamo.mark_dynamic(x := x.clone(), dim)
        with torch.no_grad(), collect() as records:
            torch.testing.assert_close(torch.compile(layer, backend="fusionc")(x), layer(x), rtol=1e-4, atol=1e-4)
        (record,) = [p for r in records for p in r.passes if p.name == "depthwise_cpu"]
        assert record.fired == count and [r.reason for r in record.refusals] == ["a size is symbolic"] * (1 - count)


def test_part_of_another_tensor_is_copied() -> None:
    text = rewritten(ITEM, graph(x="f32[2, 4, 9, 20]{1440, 180, 20, 1}"))
    assert "aten.clone(%x, memory_format=" in text and "fusionc.depthwise_cpu(%clone" in text

    layer, x = nn.Conv2d(4, 4, 11, padding=5, groups=4).eval(), torch.randn(2, 8, 9, 20)
    for part in (lambda t: t[:, 2:6], lambda t: t[:, ::2], lambda t: t[:, :4].flip(3).transpose(2, 3).transpose(2, 3)):
        torch._dynamo.reset()
        f = lambda t, part=part: layer(part(t)).sin()  # noqa: E731
        with torch.no_grad(), collect() as records:
            torch.testing.assert_close(torch.compile(f, backend="fusionc")(x), f(x), rtol=1e-4, atol=1e-4)
        assert _calls(records) == ["fusionc.depthwise_cpu.default"]


def test_not_depthwise() -> None:
    assert refusals(ITEM, graph(w="f32[4, 2, 11, 11]", groups=2)) == []
    assert apply(ITEM, graph(w="f32[4, 2, 11, 11]", groups=2))[1].fired == 0


def test_rule_of_sizes() -> None:
    assert worth((31, 31), (2, 2), 7, False) and worth((3, 3), (1, 1), 56, False) and worth((13, 13), (1, 1), 7, True)
    assert not worth((1, 1), (1, 1), 56, False) and not worth((7, 7), (1, 1), 56, True) and not worth((3, 3), (2, 2), 56, False)
    assert not worth((31, 31), (1, 1), 56, True) and not worth((7, 7), (1, 1), 14, False)


@pytest.mark.parametrize("last", [False, True])
def test_whole_model(last: bool) -> None:
    """Compiled, with its BatchNorm, against float64; the second process-like start comes from the cache."""
    torch.manual_seed(0)
    layout = torch.channels_last if last else torch.contiguous_format
    model = nn.Sequential(nn.Conv2d(5, 5, 13, padding=6, groups=5, bias=False), nn.BatchNorm2d(5), nn.GELU()).eval()
    model[1].running_mean.normal_()
    x = torch.randn(2, 5, 18, 20).to(memory_format=layout)
    with torch.no_grad():
        exact = model.double()(x.double())
        eager = model.float()(x)
        for _ in range(2):
            torch._dynamo.reset()
            with collect() as records:
                found = torch.compile(model, backend="fusionc")(x)
            assert _calls(records) in (["fusionc.depthwise_cpu.default"], [])  # nothing is compiled the second time
            assert found.stride() == eager.stride()
            assert (found - exact).norm() <= 2 * (eager - exact).norm() + 1e-7 * exact.norm()


def _calls(records: list[Any]) -> list[str]:
    return [call.op for record in records for call in record.calls]


def test_training_uses_the_kernel_and_keeps_gradients() -> None:
    torch._dynamo.reset()
    layer = nn.Conv2d(3, 3, 11, padding=5, groups=3)
    x = torch.randn(2, 3, 12, 18, requires_grad=True)

    def step(f: Any) -> list[Tensor]:
        loss = nn.functional.gelu(f(x)).square().sum()
        return list(torch.autograd.grad(loss, [x, *layer.parameters()]))

    with collect() as records:
        found = step(torch.compile(layer, backend="fusionc"))
    torch.testing.assert_close(found, step(layer), rtol=1e-4, atol=1e-4)
    assert "fusionc.depthwise_cpu.default" in _calls(records)
