"""Dumps of a real model: the same in every process, and programs in them that run by themselves."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

MODEL = '''
import sys
import torch
from torch import nn
from torch.nn import functional as F

class Block(nn.Module):
    def __init__(self, d=32, heads=2):
        super().__init__()
        self.heads, self.norm = heads, nn.LayerNorm(d)
        self.q, self.k, self.v, self.o = (nn.Linear(d, d, bias=False) for _ in range(4))
        self.up, self.gate, self.down = nn.Linear(d, 48), nn.Linear(d, 48), nn.Linear(48, d)

    def forward(self, x):
        b, s, d = x.shape
        h = self.norm(x)
        q, k, v = (f(h).view(b, s, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        a = (q @ k.transpose(-1, -2) / 4).softmax(-1) @ v
        x = x + self.o(a.transpose(1, 2).reshape(b, s, d))
        h = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))

class TinyModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.block, self.head = nn.Embedding(20, 32), Block(), nn.Linear(32, 20)

    def forward(self, ids):
        return self.head(self.block(self.embedding(ids)))

def step(model, ids):
    return F.cross_entropy(model(ids).flatten(0, 1), ids.flatten())

torch.manual_seed(0)
model, ids = TinyModel(), torch.randint(0, 20, (2, 8))
for target in sys.argv[2:]:
    torch._dynamo.reset()
    options = {"target": target, "dump": f"{sys.argv[1]}/{target}"}
    with torch.no_grad():
        found = torch.compile(model, backend="fusionc", options=options)(ids)
        torch.testing.assert_close(found, model(ids), rtol=1e-4, atol=1e-4)
    if target == "cpp":
        loss = torch.compile(step, backend="fusionc", options=options)(model, ids)
        loss.backward()
        torch.testing.assert_close(loss, step(model, ids), rtol=1e-4, atol=1e-4)
        import fusionc, json, pathlib
        pathlib.Path(sys.argv[1], "records.json").write_text(json.dumps([g.to_json() for g in fusionc.report()]))
'''

LONG = '''
import sys
import torch

x, w = torch.randn(2, 4, 512), torch.randn(4, 1, 512)
torch.compile(lambda x: torch.nn.functional.conv1d(x, w, None, padding=511, groups=4), backend="fusionc",
              options={"fft_conv": True, "dump": sys.argv[1]})(x)
'''

RUN_ALL = """
import contextlib, io, runpy, sys
for path in sys.argv[1:]:
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            runpy.run_path(path, run_name="__main__")
        status = None
    except SystemExit as e:
        status = e.code
    if status:
        print(path, status, said.getvalue(), sep="\\n")
        sys.exit(1)
print("all ran")
"""

TARGETS = ("cpp", "interpret", "sm_90")


@pytest.fixture(scope="module")
def dumps(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same dumps by two processes with different hash seeds: ``folder/target/…``."""
    folder = tmp_path_factory.mktemp("dumps")
    (folder / "model.py").write_text(MODEL)
    running, roots = [], [folder / "a", folder / "b"]
    for seed, root in zip(("1", "2"), roots, strict=True):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT), "FUSIONC_VERIFY": "0"}
        command = [sys.executable, str(folder / "model.py"), str(root), *TARGETS]
        running.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    for process in running:
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said
    return roots


def tree(root: Path) -> dict[str, str]:
    return {str(p.relative_to(root)): p.read_text() for p in sorted(root.rglob("*")) if p.is_file()}


def run(*arguments: object) -> str:
    """Run Python; it must succeed. What it printed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.mark.parametrize("target", TARGETS)
def test_two_processes_write_the_same(dumps: list[Path], target: str) -> None:
    a, b = (tree(root / target) for root in dumps)
    assert a.keys() == b.keys()
    assert {p for p in a if a[p] != b[p]} <= {"timings.tsv", "run.log"}


def test_what_a_dump_says(dumps: list[Path]) -> None:
    root = dumps[0] / "cpp"
    graphs = sorted(p.name for p in root.iterdir() if p.is_dir())
    assert graphs == ["g0_TinyModel", "g1_step_forward", "g2_step_backward"]
    summary = (root / "SUMMARY.txt").read_text()
    assert "3 graphs" in summary and "aten.mm" in summary and "softmax" in summary
    page = (root / "report.html").read_text()
    assert "g0 TinyModel" in page and "<svg" in page and "Roofline" in page and "softmax" in page
    assert "model.py:" in page  # the user's lines
    for path, text in tree(root).items():
        assert str(dumps[0].parent) not in text, f"{path} names a folder of this machine"
        if path != "run.log":
            assert not re.search(r"\b0x[0-9a-f]{6,}", text) or path.endswith((".cpp", "kernel.py", ".html")), path


def test_kernels_have_predictions_and_places(dumps: list[Path]) -> None:
    graphs = json.loads((dumps[0] / "records.json").read_text())
    assert [g["stage"] for g in graphs] == ["inference", "forward", "backward"]
    for g in graphs:
        assert g["peak_gbs"] > 0 and g["peak_gflops"] > 0
        names = {k["name"] for k in g["kernels"]}
        assert all(group["kernel"] in names and group["nodes"] for group in g["groups"])
        for k in g["kernels"]:
            assert k["nodes"] and k["predicted_us"] is not None and k["uses"] >= 1 and not k["name"].startswith("k_")


def test_programs_of_a_dump_run(dumps: list[Path]) -> None:
    root = dumps[0] / "cpp"
    kernels = sorted(root.glob("g*/k*/kernel.py"))
    assert len(kernels) >= 12
    said = run(kernels[0])
    assert "largest error" in said and "us a launch" in said
    assert "eager and fusionc agree" in run(root / "g0_TinyModel" / "repro.py")
    rest = [*kernels[2::2], *sorted(root.glob("g*/program.py")), root / "g2_step_backward" / "repro.py"]
    assert "all ran" in run("-c", RUN_ALL, *rest)


def test_programs_of_gpu_dumps_run(dumps: list[Path]) -> None:
    spilled = []
    for target in ("interpret", "sm_90"):
        (graph,) = (dumps[0] / target).glob("g0_*")
        kernels = sorted(graph.glob("k*/kernel.py"))
        assert kernels and not list(graph.glob("k*/kernel.cpp"))
        for path in kernels:
            text = path.read_text()
            assert "@triton.jit" in text
            noted = re.search(r"# sm_90: (\d+) registers, (\d+) bytes spilled, (\d+) bytes of shared memory", text)
            assert (noted is not None) == (target == "sm_90")
            if noted:
                assert int(noted.group(1)) > 0
                spilled.append(int(noted.group(2)))
        programs = [graph / "program.py"] if target == "interpret" else []
        assert "all ran" in run("-c", RUN_ALL, *kernels[:4], *programs)
    assert not any(spilled)


def test_an_edited_kernel_is_what_runs(dumps: list[Path], tmp_path: Path) -> None:
    """kernel.py is for trying things: a wrong kernel is called wrong."""
    path = next(p for p in sorted((dumps[0] / "cpp").glob("g0*/k*/kernel.py")) if "softmax" in str(p))
    text = path.read_text()
    source = text.index("SOURCE")
    broken = tmp_path / "kernel.py"
    broken.write_text(text[:source] + re.sub(r"(\bout0\[[^\]]*\]\s*=\s*)", r"\g<1>1.5f * ", text[source:]))
    assert broken.read_text() != text
    done = subprocess.run(
        [sys.executable, str(broken)], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 1 and "WRONG" in done.stdout, done.stdout + done.stderr


def test_programs_that_call_operators_of_ours_run(tmp_path: Path) -> None:
    """``fusionc::*`` is registered operator by operator, in the process that compiles by the pass that inserts the call."""
    run("-c", LONG, tmp_path / "d")
    (program,) = (tmp_path / "d").glob("g0_*/program.py")
    assert "torch.ops.fusionc.fft_conv.default" in program.read_text()
    assert "all ran" in run("-c", RUN_ALL, program)


@pytest.mark.gpu
def test_programs_of_a_dump_run_on_the_gpu(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(MODEL.replace("TinyModel(), torch", "TinyModel().cuda(), torch").replace(
        "(0, 20, (2, 8))", "(0, 20, (2, 8), device='cuda')"))  # fmt: skip
    run(tmp_path / "model.py", tmp_path / "d", "auto")
    (graph,) = (tmp_path / "d" / "auto").glob("g0_*")
    said = run(sorted(graph.glob("k*/kernel.py"))[0])
    assert "registers" in said and "us a launch" in said and "WRONG" not in said
    rest = [*sorted(graph.glob("k*/kernel.py")), graph / "program.py", graph / "repro.py"]
    assert "all ran" in run("-c", RUN_ALL, *rest)


def test_a_repro_leaves_out_no_pass_that_it_does_not_know() -> None:
    from fusionc.artifacts import repro_text
    from fusionc.config import Config
    from fusionc.graph.text import parse

    class Mine:
        name = "mine"

    config = Config.parse(None, {"passes": [Mine()], "disable": ["mine", "cse"]})
    gm = parse("%x: f32[2] = input\n%y: f32[2] = aten.sin(%x)\nreturn (%y)\n")
    text = repro_text(gm, [n.meta["val"] for n in gm.graph.nodes if n.op == "placeholder"], config)
    assert "OPTIONS = {'disable': ['cse']}" in text
