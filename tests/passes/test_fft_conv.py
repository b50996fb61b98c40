"""Long convolutions and their gradients by Fourier transform: text, values, rounding, the cost rule, every refusal, opt-in."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import fusionc
from fusionc.config import Config
from fusionc.errors import OptionError
from fusionc.graph.facts import Facts
from fusionc.graph.text import parse
from fusionc.ops import load
from fusionc.passes import pipeline
from fusionc.passes.fft_conv import FftConv, Rates, costs
from tests.passes.helpers import check_values, refusals, rewritten

load("fft_conv")
SIZE = ShapeEnv().create_unbacked_symint()


def text(x: str = "2, 3, 70", w: str = "3, 1, 70", b: str = "None", groups: int = 3, padding: int = 69, out: str = "2, 3, 139",
         stride: int = 1, dilation: int = 1, dtype: str = "f64", transposed: bool = False) -> str:  # fmt: skip
    return f"""
%x: {dtype}[{x}] = input
%w: {dtype}[{w}] = input
%b: f64[3] = input
%y: {dtype}[{out}] = aten.convolution(%x, %w, {b}, [{stride}], [{padding}], [{dilation}], {transposed}, [0], {groups})
return (%y)
"""


def backward(grad: str = "2, 3, 139", x: str = "2, 3, 70", w: str = "3, 1, 70", groups: int = 3, padding: int = 69,
             stride: int = 1, dilation: int = 1, transposed: bool = False, dtypes: str = "f64, f64, f64",
             mask: str = "True, True, True", read: str = "dx, dw, db") -> str:  # fmt: skip
    of, places = {"dx": x, "dw": w, "db": w.split(",")[0]}, ("dx", "dw", "db")
    dt = dtypes.split(", ")
    kinds = ", ".join(f"f64[{of[name]}]" if there == "True" else "?" for name, there in zip(places, mask.split(", ")))
    window = f"[{stride}], [{padding}], [{dilation}], {transposed}, [0], {groups}"
    lines = [f"%{name}: f64[{of[name]}] = getitem(%p, {places.index(name)})" for name in read.split(", ")]
    return f"""
%g: {dt[0]}[{grad}] = input
%x: {dt[1]}[{x}] = input
%w: {dt[2]}[{w}] = input
%p: ({kinds}) = aten.convolution_backward(%g, %x, %w, [{of["db"]}], {window}, [{mask}])
{chr(10).join(lines)}
return ({", ".join(f"%{name}" for name in read.split(", "))})
"""


@pytest.fixture
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    dear = (1.0, 1.0)  # seconds a product
    monkeypatch.setattr("fusionc.passes.fft_conv._RATES", {"cpu": Rates(dear, dear, dear, 1e-9, 1e-9, 1e-9)})


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
def test_text_of_the_gradients() -> None:
    assert rewritten(FftConv(), backward()).splitlines()[4:] == [
        "%fft_conv_backward: (f64[2, 3, 70], f64[3, 1, 70]) = fusionc.fft_conv_backward(%g, %x, %w, 69, 3, [True, True])",
        "%sum_1: f64[3] = aten.sum.dim_IntList(%g, [0, 2])",
        "%dx: f64[2, 3, 70] = getitem(%fft_conv_backward, 0)",
        "%dw: f64[3, 1, 70] = getitem(%fft_conv_backward, 1)",
        "return (%dx, %dw, %sum_1)"]  # fmt: skip


@pytest.mark.usefixtures("cheap")
@pytest.mark.parametrize("mask", ["True, True, True", "False, True, False"])
def test_a_gradient_that_is_not_read_is_not_computed(mask: str) -> None:
    assert rewritten(FftConv(), backward(read="dw", mask=mask)).splitlines()[4:] == [
        "%fft_conv_backward: (?, f64[3, 1, 70]) = fusionc.fft_conv_backward(%g, %x, %w, 69, 3, [False, True])",
        "%dw: f64[3, 1, 70] = getitem(%fft_conv_backward, 1)",
        "return (%dw)"]  # fmt: skip


@pytest.mark.usefixtures("cheap")
@pytest.mark.parametrize("given", [
    {}, {"read": "dx"}, {"read": "dw, db"}, {"read": "dx, dw", "mask": "True, True, False"}, {"padding": 0, "grad": "2, 3, 1"},
    {"padding": 12, "grad": "2, 3, 25"}, {"x": "1, 3, 33", "grad": "1, 3, 102"},
    {"w": "3, 3, 40", "groups": 1, "padding": 39, "grad": "2, 3, 109"},
    {"w": "5, 3, 64", "groups": 1, "padding": 5, "grad": "2, 5, 17"},
], ids=str)  # fmt: skip
def test_values_of_the_gradients(given: dict[str, object]) -> None:
    check_values(FftConv(), backward(**given), fired=1, exact=False)  # type: ignore[arg-type]


@pytest.mark.usefixtures("cheap")
@given(st.tuples(*(st.integers(1, most) for most in (3, 4, 4, 90))), st.integers(32, 70), st.integers(0, 69), st.booleans(),
       st.sampled_from(["dx", "dw", "dx, dw", "dw, db", "dx, dw, db"]))  # fmt: skip
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_shapes(sizes: tuple[int, ...], taps: int, padding: int, deep: bool, read: str) -> None:
    batch, channels, outputs, size = sizes
    out = size + 2 * padding - taps + 1
    assume(out > 0 and padding < taps)
    x, outputs = f"{batch}, {channels}, {size}", channels if deep else outputs
    w, y, groups = f"{outputs}, {1 if deep else channels}, {taps}", f"{batch}, {outputs}, {out}", channels if deep else 1
    check_values(FftConv(), text(x=x, w=w, groups=groups, padding=padding, out=y), fired=1, exact=False)
    check_values(FftConv(), backward(grad=y, x=x, w=w, groups=groups, padding=padding, read=read), fired=1, exact=False)


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


@pytest.mark.usefixtures("cheap")
@pytest.mark.parametrize("given, reason", [
    ({"stride": 2, "grad": "2, 3, 70"}, "transposed, strided or dilated"),
    ({"dilation": 2, "grad": "2, 3, 70"}, "transposed, strided or dilated"),
    ({"transposed": True, "padding": 0}, "transposed, strided or dilated"),
    ({"x": "2, 6, 70", "w": "3, 2, 70"}, "its groups are neither one nor the channels"),
    ({"padding": 70, "grad": "2, 3, 141"}, "the padding is as long as the kernel"),
    ({"dtypes": "f32, f64, f64"}, "not of one floating dtype"),
    ({"dtypes": "f64, f64, f32"}, "not of one floating dtype"),
    ({"read": "db"}, "neither the input's nor the filter's gradient is read"),
], ids=str)  # fmt: skip
def test_refusals_of_the_gradients(given: dict[str, object], reason: str) -> None:
    facts = Facts(parse(backward(**given)))  # type: ignore[arg-type]  # some of these ATen refuses as well: not verified
    (match,) = FftConv().find(facts)
    refused = FftConv().check(match, facts)
    assert refused is not None and f"{refused.reason} ({refused.node})" == f"{reason} (p)"


@pytest.mark.usefixtures("cheap")
@pytest.mark.parametrize("node, change, reason", [
    ("x", lambda n: n.meta.update(val=torch.empty(SIZE, 3, 70, device="meta")), "a size is symbolic"),
    ("p", lambda n: n.meta.update(val=(torch.empty(2, 70, 3).mT, *n.meta["val"][1:])),
     "no figures for this device, or a result is not contiguous"),
    ("g", lambda n: n.meta.update(val=n.meta["val"].to("meta")), "no figures for this device, or a result is not contiguous"),
    ("dx", lambda n: setattr(n, "target", torch.ops.aten.neg.default),
     "the gradients are read as a whole, or one that is not computed is"),
    ("p", lambda n: setattr(n, "args", (*n.args[:10], [False, True, True])),
     "the gradients are read as a whole, or one that is not computed is"),
])  # fmt: skip
def test_refusals_of_odd_values(node: str, change: Callable[[Node], None], reason: str) -> None:
    gm = parse(backward())
    change(next(n for n in gm.graph.nodes if n.name == node))
    facts = Facts(gm)
    (match,) = FftConv().find(facts)
    refused = FftConv().check(match, facts)
    assert refused is not None and refused.reason == reason


def test_refused_where_it_is_not_cheaper() -> None:
    for graph in (text(x="1, 3, 40", w="3, 1, 32", padding=31, out="1, 3, 71"),
                  backward(grad="1, 3, 71", x="1, 3, 40", w="3, 1, 32", padding=31),
                  text(x="0, 3, 70", out="0, 3, 139"), backward(grad="0, 3, 139", x="0, 3, 70")):  # fmt: skip
        (reason,) = refusals(FftConv(), graph)
        assert reason.startswith("the transforms would take 0.") and "the direct way 0" in reason


def test_short_kernels_are_not_looked_at() -> None:
    assert refusals(FftConv(), text(w="3, 1, 7", padding=6, out="2, 3, 76")) == []
    assert refusals(FftConv(), backward(grad="2, 3, 76", w="3, 1, 7", padding=6)) == []


@pytest.mark.parametrize("kind, x, weight, padding, groups, parts, cheaper", [  # each was measured
    ("cpu", (4, 64, 4096), (64, 1, 4096), 4095, 64, ["result"], True),
    ("cpu", (4, 64, 4096), (64, 1, 4096), 4095, 64, ["input", "weight"], True),
    ("cpu", (4, 64, 2048), (64, 1, 64), 63, 64, ["result"], True),
    ("cpu", (4, 64, 2048), (64, 1, 64), 63, 64, ["weight"], True),
    ("cpu", (4, 64, 2048), (64, 1, 64), 63, 64, ["input"], False),  # the library is fast at this one
    ("cpu", (4, 64, 2048), (64, 1, 4), 3, 64, ["result"], False),
    ("cpu", (4, 16, 512), (16, 16, 512), 511, 1, ["input", "weight"], True),
    ("cpu", (16, 64, 512), (64, 64, 64), 32, 1, ["input", "weight"], True),
    ("cpu", (1, 256, 1024), (256, 256, 128), 127, 1, ["result"], False),  # the filters' transforms outweigh the rest
    ("cpu", (1, 256, 1024), (256, 256, 128), 127, 1, ["input", "weight"], False),
    ("cuda", (4, 256, 8192), (256, 1, 512), 256, 256, ["result"], True),
    ("cuda", (4, 256, 4096), (256, 1, 64), 32, 256, ["result"], False),
], ids=str)  # fmt: skip
def test_cost_rule(kind: str, x: tuple[int, ...], weight: tuple[int, ...], padding: int, groups: int, parts: list[str],
                   cheaper: bool) -> None:
    direct, transformed = costs(kind, x, weight, padding, groups, parts)
    assert (transformed < 0.5 * direct) == cheaper


def test_the_threads_of_the_host_say_nothing_about_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    graph = text(x="4, 256, 8192", w="256, 1, 512", padding=256, out="4, 256, 8193", groups=256, dtype="f32")
    facts = Facts(parse(graph.replace("] =", "]@cuda =")))
    (match,) = FftConv().find(facts)
    assert FftConv().check(match, facts) is None


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
def test_whole_backend_with_a_kernel_made_by_a_network(train: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fusionc.passes.fft_conv._CALLS", 0.0)  # whatever the number of threads
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(8, 8, 65, padding=32, groups=8), Continuous())
    x = torch.randn(2, 8, 256)
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
    stages = ["forward", "backward"] if train else ["inference"]
    records = fusionc.report()[-len(stages):]
    assert [g.stage for g in records] == stages
    assert all(p.fired == 2 for g in records for p in g.passes if p.name == "fft_conv")
