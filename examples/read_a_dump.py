"""What a dump holds and how to read it: every stage of a compilation as files, some of which run by themselves.

    python examples/read_a_dump.py [folder]
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn


class Head(nn.Module):
    """RMSNorm, a projection and a softmax: [rows, 256] -> [rows, 64]."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(256))
        self.linear = nn.Linear(256, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight
        return self.linear(x).mul(0.5).softmax(-1)


def show(path: Path, root: Path, lines: int = 14) -> None:
    """Print the start of a file."""
    text = path.read_text(encoding="utf-8").splitlines()
    print(f"--- {path.relative_to(root)}")
    print("\n".join(text[:lines] + ([f"    … {len(text) - lines} more lines"] if len(text) > lines else [])) + "\n")


def main(folder: str | None = None) -> list[str]:
    """Compile with a dump, show its main files and run one kernel by itself. Returns the names of the files."""
    root = Path(folder or tempfile.mkdtemp(prefix="fusionc-dump-"))
    torch.manual_seed(0)
    model = Head()
    with torch.no_grad():
        torch.compile(model, backend="fusionc", options={"dump": str(root)})(torch.randn(32, 256))
    files = sorted(p for p in root.rglob("*") if p.is_file())

    print(f"{root} holds {len(files)} files\n")
    show(root / "SUMMARY.txt", root, 40)  # one screen; start here
    graph = next(root.glob("g0_*"))
    show(graph / "00_input.graph", root)  # the graph as torch hands it over, one node a line
    show(graph / "groups.txt", root)  # which nodes became one kernel, and which stay library calls
    show(graph / "refusals.txt", root)  # which rewrites did not apply, where, and why
    kernel = next(graph.glob("k00_*"))
    show(kernel / "kernel.loop", root, 30)  # what it computes: loops over buffers, with exact indices
    show(kernel / "plan.json", root)  # how: tiles, order, threads; changing it never changes results

    # kernel.py makes random inputs, runs the kernel, compares with the loop interpreter and times it.
    done = subprocess.run([sys.executable, str(kernel / "kernel.py")], capture_output=True, text=True, check=False)
    print(f"--- python {kernel.relative_to(root)}/kernel.py\n{done.stdout}{done.stderr}")
    if done.returncode:
        raise SystemExit("kernel.py failed")
    print(f"Open {root}/report.html in a browser for the same with pictures.")
    return [str(p.relative_to(root)) for p in files]


if __name__ == "__main__":
    main(*sys.argv[1:2])
