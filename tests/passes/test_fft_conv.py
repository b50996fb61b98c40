"""Long convolutions by Fourier transform: values against float64, rounding, the cost rule, every refusal, opt-in."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fusionc
from fusionc.config import Config
from fusionc.errors import OptionError
from fusionc.ops import load
from fusionc.passes import pipeline
from fusionc.passes.fft_conv import FftConv, costs
from tests.passes.helpers import check_values, refusals, rewritten

load("fft_conv")


def text(x: str = "2, 3, 70", w: str = "3, 1, 70", b: str = "None", groups: int = 3, padding: int = 69, out: str = "2, 3, 139",
         stride: int = 1, dilation: int = 1, dtype: str = "f64", transposed: bool = False) -> str:  # fmt: skip
    return f"""
%x: {dtype}[{x}] = input
%w: {dtype}[{w}] = input
%b: f64[3] = input
%y: {dtype}[{out}] = aten.convolution(%x, %w, {b}, [{stride}], [{padding}], [{dilation}], {transposed}, [0], {groups})
return (%y)
"""


@pytest.fixture
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fusionc.passes.fft_conv._RATES", {"cpu": (1.0, 1e-9)})  # seconds a product


@pytest.mark.usefixtures("cheap")
def test_text() -> None:
    assert rewritten(FftConv(), text(b="%b")).splitlines()[4:] == [
        "%fft_conv: f64[2, 3, 139] = fusionc.fft_conv(%x, %w, %b, 69, 3)", "return (%fft_conv)"]  # fmt: skip


@pytest.mark.usefixtures("cheap")
@pytest.mark.parametrize("given", [
    {}, {"b": "%b"}, {"padding": 0, "out": "2, 3, 1"}, {"padding": 12, "out": "2, 3, 25"}, {"x": "1, 3, 33", "out": "1, 3, 102"},
    {"w": "3, 3, 40", "groups": 1, "padding": 39, "out": "2, 3, 109", "b": "%b"},
    {"w": "5, 3, 64", "groups": 1, "padding": 5, "out": "2, 5, 17"},
], ids=str)  # fmt: skip
def test_values(given: dict[str, object]) -> None:
    check_values(FftConv(), text(**given), fired=1, exact=False)  # type: ignore[arg-type]


@pytest.mark.usefixtures("cheap")
@pytest.mark.parametrize("given, reason", [
    ({"stride": 2, "out": "2, 3, 70"}, "transposed, strided or dilated"),
    ({"dilation": 2, "out": "2, 3, 70"}, "transposed, strided or dilated"),
    ({"transposed": True, "padding": 0, "out": "2, 3, 139"}, "transposed, strided or dilated"),
    ({"x": "2, 6, 70", "w": "3, 2, 70"}, "its groups are neither one nor the channels"),
    ({"w": "6, 1, 70", "out": "2, 6, 139"}, "its groups are neither one nor the channels"),
    ({"padding": 70, "out": "2, 3, 141"}, "the padding is as long as the kernel"),
    ({"b": "%b", "dtype": "f32"}, "not of one floating dtype"),
], ids=str)  # fmt: skip
def test_refusals(given: dict[str, object], reason: str) -> None:
    assert refusals(FftConv(), text(**given)) == [f"{reason} (y)"]  # type: ignore[arg-type]


def test_refused_where_it_is_not_cheaper() -> None:
    (reason,) = refusals(FftConv(), text(x="1, 3, 40", w="3, 1, 32", padding=31, out="1, 3, 71"))
    assert "of the direct time" in reason


def test_short_kernels_are_not_looked_at() -> None:
    assert refusals(FftConv(), text(w="3, 1, 7", padding=6, out="2, 3, 76")) == []


def test_cost_rule() -> None:
    for length, taps, cheaper in ((4096, 4096, True), (4096, 64, True), (4096, 4, False), (64, 8, False)):
        direct, transformed = costs("cpu", (4, 64, length), (64, 1, taps), length, 64)
        assert (transformed < 0.5 * direct) == cheaper, (length, taps)
    for length, taps, cheaper in ((8192, 512, True), (4096, 64, False)):  # measured on an H200: 4.5 times faster, slower
        direct, transformed = costs("cuda", (4, 256, length), (256, 1, taps), length, 256)
        assert (transformed < 0.5 * direct) == cheaper, (length, taps)


@pytest.mark.parametrize("length, taps", [(512, 512), (1024, 100)])
def test_rounding_in_norm_is_no_worse_than_eagers_doubled(length: int, taps: int) -> None:
    rng = torch.Generator().manual_seed(0)
    x, w = torch.randn(2, 8, length, generator=rng), torch.randn(8, 1, taps, generator=rng)
    exact = nn.functional.conv1d(x.double(), w.double(), padding=taps - 1, groups=8)
    direct = nn.functional.conv1d(x, w, padding=taps - 1, groups=8)
    found = torch.ops.fusionc.fft_conv(x, w, None, taps - 1, 8)
    assert (found - exact).norm() <= 2 * (direct - exact).norm()


def test_rounding_is_relative_to_the_largest_value_of_a_row() -> None:
    # why the pass is not on by default
    rng = torch.Generator().manual_seed(0)
    x, w = torch.randn(1, 4, 512, generator=rng), torch.randn(4, 1, 512, generator=rng)
    x[..., 400] = 1e4
    exact = nn.functional.conv1d(x.double(), w.double(), padding=511, groups=4)[..., :400]  # causal: the spike is not seen
    direct = nn.functional.conv1d(x, w, padding=511, groups=4)[..., :400]
    found = torch.ops.fusionc.fft_conv(x, w, None, 511, 4)[..., :400]
    assert (found - exact).norm() > 20 * (direct - exact).norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_transformed_in_float32(dtype: torch.dtype) -> None:
    rng = torch.Generator().manual_seed(0)
    x, w = torch.randn(2, 4, 128, generator=rng).to(dtype), (torch.randn(4, 1, 128, generator=rng) / 11).to(dtype)
    exact = nn.functional.conv1d(x.double(), w.double(), padding=127, groups=4)
    found = torch.ops.fusionc.fft_conv(x, w, None, 127, 4)
    assert found.dtype == dtype and (found - exact).norm() <= 1.01 * (exact.to(dtype) - exact).norm()


def test_only_if_asked_for() -> None:
    def there(**options: object) -> bool:
        return any(isinstance(p, FftConv) for _, p in pipeline("graph", Config.parse(None, options)))

    assert not there() and not there(fft_conv=False) and there(fft_conv=True)
    with pytest.raises(OptionError, match="fft_conv"):
        Config.parse(None, {"fft_conv": "yes"})


class Continuous(nn.Module):
    """A kernel as long as the sequence, made by a small network of the positions (CKConv)."""

    def __init__(self, length: int = 256, channels: int = 8) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, channels))
        self.register_buffer("at", torch.linspace(-1, 1, length)[:, None])

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.net(self.at).t().unsqueeze(1)
        return torch.relu(nn.functional.conv1d(x, kernel, None, 1, kernel.shape[2] - 1, 1, x.shape[1])[..., : x.shape[2]])


@pytest.mark.parametrize("train", [False, True])
def test_whole_backend_with_a_kernel_made_by_a_network(train: bool) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x = Continuous(), torch.randn(2, 8, 256)
    compiled = torch.compile(model, backend="fusionc", options={"fft_conv": True, "cache": False})
    with torch.set_grad_enabled(train):
        found = compiled(x)
        torch.testing.assert_close(found, model(x), rtol=1e-4, atol=1e-4)
    if train:
        found.sum().backward()
        grads = [p.grad.clone() for p in model.parameters()]  # type: ignore[union-attr]
        model.zero_grad()
        model(x).sum().backward()
        torch.testing.assert_close(grads, [p.grad for p in model.parameters()], rtol=1e-3, atol=1e-3)
    records = [g for g in fusionc.report()[-2:] if g.stage != "backward"]
    assert any(p.fired for p in records[-1].passes if p.name == "fft_conv")
