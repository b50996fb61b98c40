"""Mean and variance as two reductions: the rewrite, its values, each refusal, and what grouping makes of it."""

from __future__ import annotations

import pytest
import torch

from fusionc.passes.two_step_variance import TwoStepVariance
from fusionc.record import collect
from tests.passes.helpers import check_values, refusals, rewritten

PASS = TwoStepVariance(("cpu",))
TEXT = """
%x: f32[2, 8, 32, 40]{10240, 1, 320, 8} = input
%v: (f32[1, 8, 1, 1], f32[1, 8, 1, 1]) = aten.var_mean.correction(%x, [0, 2, 3], correction=0, keepdim=True)
%a: f32[1, 8, 1, 1] = getitem(%v, 0)
%b: f32[1, 8, 1, 1] = getitem(%v, 1)
return (%a, %b)
"""


def test_statistics_of_channels() -> None:
    found = rewritten(PASS, TEXT)
    assert "var_mean" not in found
    assert [line.split(" = ")[1].split("(")[0] for line in found.strip().splitlines()[1:-1]] == \
        ["aten.mean.dim", "aten.sub", "aten.mul", "aten.sum.dim_IntList", "aten.div"]  # fmt: skip
    check_values(PASS, TEXT.replace("f32", "f64"), fired=1, exact=False)


def test_without_the_reduced_dimensions() -> None:
    text = TEXT.replace(", keepdim=True", "").replace("f32[1, 8, 1, 1]", "f32[8]").replace("correction=0", "correction=1")
    assert rewritten(PASS, text).count("aten.squeeze.dims") == 2
    check_values(PASS, text.replace("f32", "f64"), fired=1, exact=False)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("name", ["var", "std"])
def test_one_result_alone(name: str, keep: bool) -> None:
    text = f"""
%x: f32[40000] = input
%v: f32[{"1" if keep else ""}] = aten.{name}.correction(%x, [0], correction=1, keepdim={keep})
return (%v)
"""
    found = rewritten(PASS, text)
    assert f"aten.{name}" not in found and ("aten.sqrt" in found) == (name == "std")
    check_values(PASS, text.replace("f32", "f64"), fired=1, exact=False)


@pytest.mark.parametrize(
    "text, reason",
    [
        (TEXT.replace("f32", "f16"), "neither float32 nor float64 (v)"),
        (TEXT.replace("return (%a, %b)", "return (%v, %a, %b)"), "its results leave together (v)"),
        (TEXT.replace("correction=0", "correction=2560"), "there are fewer values than degrees of freedom taken off (v)"),
        (TEXT.replace("{10240, 1, 320, 8}", ""), "its rows keep the device busy (v)"),
        (TEXT.replace("2, 8, 32, 40", "2, 8, 8, 8").replace("{10240, 1, 320, 8}", "{512, 1, 64, 8}"),
         "its rows keep the device busy (v)"),
    ],
)  # fmt: skip
def test_refusals(text: str, reason: str) -> None:
    assert refusals(PASS, text) == [reason]


def test_a_gpu_is_the_only_device_by_default() -> None:
    assert "var_mean" in rewritten(TwoStepVariance(), TEXT)


def test_batch_norm_is_three_kernels_that_fill_a_gpu() -> None:
    """Cross-compiled: partial sums of the mean, of the squares, and the normalisation; no value is stored twice."""
    x = torch.randn(4, 16, 64, 64).bfloat16().to(memory_format=torch.channels_last)
    norm = torch.nn.BatchNorm2d(16).bfloat16()
    torch._dynamo.reset()
    with collect() as records:
        options = {"target": "sm_90", "cache": False, "passes": [PASS]}
        torch.compile(lambda x: norm(x).relu(), backend="fusionc", options=options)(x)
    names = [k.name for r in records for k in r.kernels]
    assert [n.rpartition("_")[2] for n in names if "part" in n] == ["part0", "part1", "part0", "part1"]
    assert len(names) <= 6, names


def test_values_of_a_training_step() -> None:
    torch.manual_seed(0)
    norm, x = torch.nn.BatchNorm2d(16), torch.randn(4, 16, 64, 64).to(memory_format=torch.channels_last)
    want = torch.nn.functional.batch_norm(x.double(), None, None, norm.weight.double(), norm.bias.double(), True)
    torch._dynamo.reset()
    found = torch.compile(norm, backend="fusionc", options={"passes": [PASS], "cache": False})(x + 0)
    torch.testing.assert_close(found.double(), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * x.var((0, 2, 3)), rtol=1e-4, atol=1e-5)
