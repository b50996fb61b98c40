"""Results written past the caches: compiled functions compute the same, and their dumps say so and run by themselves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fusionc.backend import fusionc
from fusionc.targets import cpp

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A last cache of 4 KiB."""
    monkeypatch.setattr(cpp, "stream_bytes", lambda: 4096)


def norm(x: Tensor, w: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w)


def relu(x: Tensor, w: Tensor) -> Tensor:
    return F.relu(x * w)  # the mask for the backward pass is a second result


def softmax(x: Tensor, w: Tensor) -> Tensor:
    return (x * w).softmax(-1)


def over_rows(x: Tensor, w: Tensor) -> Tensor:
    return (x * w).softmax(0)


def turned(x: Tensor, w: Tensor) -> Tensor:
    return (x * w).T.contiguous()


@pytest.mark.parametrize("fn", [norm, relu, softmax, over_rows, turned])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_values_and_gradients(fn: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype, tmp_path: Path) -> None:
    given = torch.randn(64, 192).to(dtype), torch.randn(192).to(dtype)
    cotangent = torch.randn_like(fn(*given))

    def run(f: Callable[[Tensor, Tensor], Tensor], to: torch.dtype) -> list[Tensor]:
        x, w = (t.to(to, copy=True).requires_grad_() for t in given)
        y = f(x, w)
        y.backward(cotangent.to(to))
        assert x.grad is not None and w.grad is not None
        return [y.detach(), x.grad, w.grad]

    compiled = torch.compile(fn, backend=fusionc, dynamic=False, options={"cache": False, "dump": str(tmp_path)})
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float64: 1e-10}[dtype]
    for found, expected in zip(run(compiled, dtype), run(fn, torch.float64), strict=True):
        scale = float(expected.abs().max())
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance * scale)
    assert any(json.loads(p.read_text())["stream"] for p in tmp_path.glob("g*/k*/plan.json"))


def test_a_dumped_kernel_that_streams_runs_by_itself(tmp_path: Path) -> None:
    options = {"cache": False, "dump": str(tmp_path)}
    torch.compile(norm, backend=fusionc, dynamic=False, options=options)(torch.randn(64, 192), torch.randn(192))
    (kernel,) = tmp_path.glob("g0*/k*/kernel.py")
    (program,) = tmp_path.glob("g0*/program.py")
    assert "fc_stream(out0" in kernel.read_text()
    for path in (kernel, program):
        done = subprocess.run([sys.executable, path], capture_output=True, text=True, timeout=120, check=False,
                              env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr


def test_a_part_of_a_tensor_of_unknown_size() -> None:
    """The loops have constant bounds, what they read has not."""
    from fusionc.record import collect

    torch._dynamo.reset()
    x = torch.randn(70, 200)
    with collect() as records:
        got = torch.compile(lambda x: x[:64, :192] * 2, backend=fusionc, dynamic=True, options={"cache": False})(x)
    assert torch.equal(got, x[:64, :192] * 2) and not records[0].fallbacks
    assert json.loads(records[0].kernels[0].plan_json)["stream"]
