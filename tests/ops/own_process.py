"""Tests of kernels in Triton's interpreter: parts of Triton's library are made for it only when imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def interpreted(file: str, *arguments: str) -> None:
    """Run a test file of this checkout as a program, in a process that has Triton for the interpreter; it must succeed."""
    module = ".".join(Path(file).resolve().relative_to(ROOT).with_suffix("").parts)
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True, env=env, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
