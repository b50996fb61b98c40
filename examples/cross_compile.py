"""Read the GPU code of a model on a machine that has no GPU.

``target="sm_90"`` (H100, H200; also sm_80, sm_100, gfx942) makes fusionc plan and write Triton for that GPU and run
the call in ATen. The records of the compilation hold everything needed to build each kernel for real: Triton and the
assembler inside its wheel need no GPU and no CUDA installation.

    python examples/cross_compile.py [sm_80|sm_90|sm_100|gfx942]
"""

from __future__ import annotations

import json
import sys
import tempfile

import torch

import fusionc
from fusionc.ir.text import parse_kernel
from fusionc.runtime.launch import cross_compile
from fusionc.schedule.plan import Plan


def add_and_normalise(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Residual, RMSNorm and SiLU: x, residual [rows, columns], weight [columns] -> [rows, columns]."""
    x = x + residual
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight
    return torch.nn.functional.silu(x)


def main(target: str = "sm_90", rows: int = 4096, columns: int = 2048) -> dict[str, dict[str, int]]:
    """Build each kernel for ``target``; print and return its registers, spilled bytes and shared memory."""
    inputs = torch.randn(rows, columns), torch.randn(rows, columns), torch.randn(columns)
    with tempfile.TemporaryDirectory() as folder:
        # The call itself is answered by ATen: nothing here can run what was generated.
        options = {"target": target, "dump": folder}
        torch.compile(add_and_normalise, backend="fusionc", options=options)(*inputs)

    found: dict[str, dict[str, int]] = {}
    for record in fusionc.report()[-1].kernels:
        plan = Plan.from_dict(json.loads(record.plan_json))
        kernel = parse_kernel(record.loop_text)
        built = cross_compile(record.source, record.symbol, kernel, plan, target)
        found[record.name] = {"registers": built.registers, "spills": built.spills, "shared": built.shared}
        print(f"--- {record.name}: the Triton text\n{record.source}")
        assembly = built.asm.get("ptx") or built.asm.get("amdgcn") or ""
        # The memory instructions tell most: .v4 means 16 bytes a thread, as wide as the hardware goes.
        memory = [s for s in map(str.strip, assembly.splitlines()) if "ld.global" in s or "st.global" in s
                  or "global_load" in s or "buffer_load" in s]
        print(f"--- {record.name}: {len(assembly.splitlines())} lines of assembly; its loads and stores")
        print("\n".join(memory[:8]))
        print(f"--- {record.name}: {target}, {plan.warps} warps, {built.registers} registers a thread, "
              f"{built.spills} bytes spilled, {built.shared} bytes of shared memory, built in {built.seconds:.1f} s\n")
    return found


if __name__ == "__main__":
    main(*sys.argv[1:2])
