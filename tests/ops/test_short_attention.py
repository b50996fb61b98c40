"""The kernel of `short_attention` in Triton's interpreter against the operator in ATen, and built for Hopper.

The kernel runs in a process of its own: parts of Triton's library are made for the interpreter only when imported.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fusionc.ops
from fusionc.codegen.templates.short_attention import TEXT, tiles

HERE = Path(__file__).resolve()


@pytest.mark.interpret
def test_kernel() -> None:
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(HERE)], capture_output=True, text=True, env=env, cwd=HERE.parents[2])
    assert done.returncode == 0, done.stderr[-3000:]


def test_operator_is_well_formed() -> None:
    fusionc.ops.load("short_attention")
    q, k = torch.randn(2, 4, 5, 16), torch.randn(2, 2, 5, 16)
    torch.library.opcheck(torch.ops.fusionc.short_attention.default, (q, k, k, 0.25, True),
                          test_utils=("test_schema", "test_faketensor"))
    out = torch.ops.fusionc.short_attention(q, k, k, 0.25, True)
    assert out.shape == q.shape and out.transpose(1, 2).is_contiguous()


@pytest.mark.cross
@pytest.mark.parametrize("keys, width, causal", [(128, 64, True), (256, 128, False), (200, 64, True)])
def test_kernel_builds_for_hopper_without_spills(keys: int, width: int, causal: bool) -> None:
    from triton.backends.compiler import GPUTarget

    from fusionc.runtime.templates import Template

    for tile in {*tiles(12, keys, 132), *tiles(384, keys, 132)}:
        step = 3 * 12 * width
        constants = {"H": 12, "HKV": 12, "L": keys, "S": keys, "D": width, "SCALE": 0.125, "CAUSAL": causal, "QB": keys * step,
                     "QH": width, "QN": step, "KB": keys * step, "KH": width, "KN": step, "VB": keys * step, "VH": width,
                     "VN": step, "PDL": True, "BM": tile.queries, "BS": 1 << (keys - 1).bit_length()}  # fmt: skip
        kernel = Template(TEXT, "short", ("*bf16",) * 4, tuple(constants.items()), torch.device("cpu"), tile.warps)
        built = kernel.build(GPUTarget("cuda", 90, 32), usage=True)
        ptx = built.asm["ptx"]
        assert built.spills == 0 and ptx.index("griddepcontrol.wait") < ptx.index("ld.global"), tile
        assert built.shared <= 200 << 10


def _kernel() -> None:
    from fusionc.ops.short_attention import reference
    from fusionc.runtime import interpreter, launch

    module = launch.load_module(TEXT, interpret=True)
    half = torch.float16  # of bfloat16 the interpreter multiplies bit patterns
    #  B  H HKV  L   S   D  causal BM
    for b, h, g, n, s, d, causal, bm in (
        (2, 3, 3, 20, 20, 16, True, 16),
        (1, 4, 2, 33, 33, 32, True, 32),
        (1, 4, 1, 24, 70, 16, False, 16),
        (2, 2, 2, 64, 64, 16, False, 32),
    ):
        qkv = torch.randn(b, max(n, s), (h + 2 * g) * d).to(half)
        q, k, v = (t.unflatten(-1, (-1, d)).transpose(1, 2) for t in qkv.split([h * d, g * d, g * d], -1))
        q, k, v = q[:, :, :n], k[:, :, :s], v[:, :, :s]
        out = torch.full((b, n, h, d), float("nan"), dtype=half)
        names = "QB QH QN KB KH KN VB VH VN".split()
        strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
        with interpreter.lock, interpreter.repaired(), launch._interpreting(True):
            module.short[(b * h * -(-n // bm), 1, 1)](
                q, k, v, out, H=h, HKV=g, L=n, S=s, D=d, SCALE=0.3, CAUSAL=causal, **dict(zip(names, strides)), PDL=False,
                BM=bm, BS=max(16, 1 << (s - 1).bit_length()))
        want = reference(q.double(), k.double(), v.double(), 0.3, causal)
        error = (out.transpose(1, 2).double() - want).norm() / want.norm()
        assert error < 2e-3, (error, b, h, n, s)


if __name__ == "__main__":
    torch.manual_seed(0)
    _kernel()
