"""The dump tree from hand-made records: what is in it, that it is deterministic, and that it cannot hurt its user."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
import warnings
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fusionc import dump, html
from fusionc.config import Config
from fusionc.errors import FallbackWarning, reset_warnings
from fusionc.record import CallRecord, GraphRecord, GroupRecord, KernelRecord, PassRecord, Refusal

EVIL = '../../<script>alert(1)</script>"\n\u202e'


def sample(name: str = "LlamaBlock", layers: int = 2) -> GraphRecord:
    edges, groups, calls, kernels = [], [], [], []
    previous = "x"
    for i in range(layers):
        edges += [(previous, f"pow_{i}"), (f"pow_{i}", f"mean_{i}"), (f"mean_{i}", f"mul_{i}"), (previous, f"mul_{i}")]
        edges += [(f"mul_{i}", f"mm_{i}"), (f"w_{i}", f"mm_{i}"), (f"mm_{i}", f"silu_{i}"), (f"silu_{i}", f"out_{i}")]
        nodes = [f"pow_{i}", f"mean_{i}", f"mul_{i}"]
        groups.append(GroupRecord(f"norm_{i}", nodes, "k00_rmsnorm", "reduction", [previous], [f"mul_{i}"]))
        groups.append(GroupRecord(f"act_{i}", [f"silu_{i}"], "k01_silu", "pointwise", [f"mm_{i}"], [f"silu_{i}"]))
        calls.append(CallRecord(f"mm_{i}", "aten.mm.default"))
        previous = f"out_{i}"
    calls.append(CallRecord("sort_0", "aten.sort.default", "no lowering for sort"))
    here = os.path.join(os.getcwd(), "tests", "model.py")
    for k, (kname, us) in enumerate((("k00_rmsnorm", 12.5), ("silu", None))):
        kernels.append(
            KernelRecord(
                kname, f"fusionc_{k}", "for i in 64:\n  out[i] = silu(in[i])", '{"tile": 64}', "void f() {}\n", "cpp",
                [f"n{k}"], [f"{here}:{12 + k}", "/usr/lib/python3/site-packages/torch/nn/functional.py:3"], 4096, 2048,
                9000, us, 14.25, bool(k), "print('kernel runs')\n", layers, [('{"tile": 32}', 20.0, 21.5)],
            )
        )  # fmt: skip
    kernels[1].name = "k01_silu"
    passes = [
        PassRecord(1, "fold_conv_bn", "model", 0, [Refusal("fold_conv_bn", "training mode", "bn1")] * 2, 0.1),
        PassRecord(4, "horizontal_matmul", "graph", 1, [], 0.2, "a\nb\nc", "a\nx < y\nc"),
        PassRecord(5, "nothing", "graph"),
    ]
    return GraphRecord(
        name, "inference", f"x = placeholder  # {here}:3\n", "final", passes, groups, kernels, calls,
        ["generator state at 0x7f0011223344 is not supported"], "print('program runs')", "print('repro runs')",
        {"passes": 0.3, "codegen": 0.1}, edges, device="cpu", peak_gbs=20.0, peak_gflops=100.0,
    )  # fmt: skip


def tree(root: Path) -> dict[str, str]:
    return {str(p.relative_to(root)): p.read_text() for p in sorted(root.rglob("*")) if p.is_file()}


def make(root: Path, *graphs: GraphRecord) -> dict[str, str]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        for g in graphs:
            assert dump.write_graph(g, Config(dump=str(root))) is not None
    return tree(root)


def test_tree(tmp_path):
    files = make(tmp_path / "d", sample())
    assert {p for p in files if not p.startswith("g0")} == {
        ".fusionc-dump", "SUMMARY.txt", "report.html", "config.json", "timings.tsv", "run.log",
    }  # fmt: skip
    inside = {p.removeprefix("g0_LlamaBlock/") for p in files if p.startswith("g0_LlamaBlock/")}
    kernel = {"kernel.loop", "plan.json", "kernel.py", "kernel.cpp", "tuning.tsv"}
    assert inside == {
        "00_input.graph", "04_horizontal_matmul.graph", "final.graph", "passes.tsv", "refusals.txt", "groups.txt",
        "program.py", "repro.py",
        *(f"{k}/{f}" for k in ("k00_rmsnorm", "k01_silu") for f in kernel),
    }  # fmt: skip
    assert "no lowering for sort" in files["SUMMARY.txt"] and "horizontal_matmul ×1" in files["SUMMARY.txt"]
    assert files["g0_LlamaBlock/refusals.txt"].startswith("01 fold_conv_bn\n  bn1: training mode\n")
    assert "14.25" in files["timings.tsv"]


def test_no_run_dependent_text(tmp_path):
    files = make(tmp_path / "d", sample())
    for path, text in files.items():
        if path not in ("timings.tsv", "run.log"):
            assert os.getcwd() not in text, path
            assert str(tmp_path) not in text and "0x7f" not in text, path
            assert "14.2" not in text and "21.5" not in text, f"a measured time in {path}"
    assert "tests/model.py:3" in files["g0_LlamaBlock/00_input.graph"]


def test_python_files_run(tmp_path):
    make(tmp_path / "d", sample())
    for path in ("program.py", "repro.py", "k00_rmsnorm/kernel.py"):
        done = subprocess.run([sys.executable, tmp_path / "d/g0_LlamaBlock" / path], capture_output=True, text=True)
        assert done.returncode == 0 and "runs" in done.stdout


def test_two_processes_differ_only_in_times(tmp_path):
    code = (
        "import sys; sys.path[:0] = ['.', 'tests']; import test_dump as t, time; from fusionc import dump\n"
        "from fusionc.config import Config\n"
        "for g in (t.sample(), t.sample('Other', 90)):\n"
        "    g.timings['codegen'] = time.time(); dump.write_graph(g, Config(dump=sys.argv[1]))\n"
    )
    for seed in ("0", "1"):
        env = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", code, tmp_path / seed], env=env, check=True)
    a, b = tree(tmp_path / "0"), tree(tmp_path / "1")
    assert a.keys() == b.keys() and any(p.startswith("g1_Other/") for p in a)
    assert {p for p in a if a[p] != b[p]} <= {"timings.tsv", "run.log"}


def test_old_dump_is_removed_and_nothing_else(tmp_path):
    root = tmp_path / "d"
    code = (
        "import sys; sys.path[:0] = ['.', 'tests']; import test_dump as t; from fusionc import dump\n"
        "from fusionc.config import Config\n"
        "for n in sys.argv[2:]: dump.write_graph(t.sample(n), Config(dump=sys.argv[1]))\n"
    )
    subprocess.run([sys.executable, "-c", code, root, "One", "Two"], check=True)
    (root / "mine.txt").write_text("keep")
    (root / "g7_mine").mkdir()
    (root / "g7_mine" / "file").write_text("keep")
    subprocess.run([sys.executable, "-c", code, root, "Three"], check=True)
    assert sorted(p.name for p in root.iterdir() if p.name.startswith("g")) == ["g0_Three", "g7_mine"]
    assert (root / "mine.txt").exists()


def test_folder_with_other_files_is_left_as_it_is(tmp_path):
    root = tmp_path / "d"
    (root / "g0_LlamaBlock").mkdir(parents=True)
    (root / "g0_LlamaBlock" / "passes.tsv").write_text("the user's")
    root.chmod(0o755)
    files = make(root, sample())
    assert files["g0_LlamaBlock/passes.tsv"] == "the user's" and "g0_LlamaBlock_1/passes.tsv" in files
    assert stat.S_IMODE(root.stat().st_mode) == 0o755


def test_private(tmp_path):
    make(tmp_path / "d", sample())
    assert stat.S_IMODE((tmp_path / "d").stat().st_mode) == 0o700


def test_second_process_gets_its_own_folder(tmp_path):
    root = tmp_path / "d"
    make(root, sample())
    code = (
        "import sys; sys.path[:0] = ['.', 'tests']; import test_dump as t; from fusionc import dump\n"
        "from fusionc.config import Config\n"
        "dump.write_graph(t.sample('Rank1'), Config(dump=sys.argv[1]))\n"
    )
    subprocess.run([sys.executable, "-c", code, root], check=True)
    assert (root / "p2" / "g0_Rank1").is_dir() and (root / "g0_LlamaBlock").is_dir()


@pytest.mark.skipif(os.name != "posix", reason="posix files")
def test_trouble_is_one_warning(tmp_path):
    reset_warnings()
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    config = Config(dump=str(blocked / "d"))
    with pytest.warns(FallbackWarning, match="could not write the dump") as seen:
        assert dump.write_graph(sample(), config) is None
        assert dump.write_graph(sample(), config) is None
        dump.log(config, "x")
        dump.refresh(config)
    assert len([w for w in seen if w.category is FallbackWarning]) == 1
    reset_warnings()


def test_no_dump_wanted():
    assert dump.write_graph(sample(), Config()) is None


def test_log_and_refresh(tmp_path):
    g = sample()
    config = Config(dump=str(tmp_path / "d"))
    dump.write_graph(g, config)
    dump.log(config, "one\ntwo")
    g.kernels[0].measured_us = 777.125
    dump.refresh(config)
    assert "one two\n" in (tmp_path / "d/run.log").read_text()
    assert "777.125" in (tmp_path / "d/timings.tsv").read_text()


def test_symlinks_are_not_followed(tmp_path):
    root, outside = tmp_path / "d", tmp_path / "outside"
    root.mkdir()
    outside.write_text("keep")
    for name in ("SUMMARY.txt", "report.html", "timings.tsv"):
        (root / name).symlink_to(outside)
        (root / f".{name}.tmp").symlink_to(outside)
    make(root, sample())
    assert outside.read_text() == "keep"
    assert not (root / "SUMMARY.txt").is_symlink()


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.attributes: set[str] = set()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes |= {k for k, _ in attrs}
        if tag not in ("meta", "br", "path", "rect", "circle"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_hostile_names(tmp_path):
    g = sample(EVIL, 1)
    g.fallbacks.append(EVIL)
    g.calls.append(CallRecord(EVIL, EVIL, EVIL))
    g.edges.append((EVIL, "mm_0"))
    g.groups[0].name = g.kernels[0].name = g.groups[0].kernel = g.kernels[0].source = EVIL
    g.kernels[0].origins = [EVIL]
    g.passes[1].name = g.passes[0].refusals[0].reason = g.passes[1].after = EVIL
    g.device = EVIL
    g.input_text = "surrogate \ud800"
    files = make(tmp_path / "d", g)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d"]
    page = files["report.html"]
    tags = Tags()
    tags.feed(page)
    assert not tags.open and "script" not in tags.tags and not any(a.startswith("on") for a in tags.attributes)
    assert "src" not in tags.attributes
    assert all(re.fullmatch(r"[A-Za-z0-9_./-]+", p) for p in files)


def test_report_is_self_contained(tmp_path):
    page = make(tmp_path / "d", sample())["report.html"]
    assert not re.search(r"https?://|url\(|@import|<script|<link|<img", page)
    assert "default-src 'none'" in page
    for expected in ("rmsnorm", "horizontal_matmul", "+x &lt; y", "training mode", "no lowering for sort", "<svg"):
        assert expected in page


def test_large_graph_is_condensed_and_capped():
    text = html.graph_section(sample("Big", 40), "g0_Big")
    assert "each group is one box" in text
    text = html.graph_section(sample("Huge", 200), "g0_Huge")
    assert "Only the first 160 of" in text and text.count("<rect") == 160


def test_odd_graphs():
    assert "empty" in html.graph_section(GraphRecord("nothing"), "g0")
    g = GraphRecord("cycle", edges=[("a", "b"), ("b", "a")], kernels=[KernelRecord("k", predicted_us=0.0)])
    assert "<rect" in html.graph_section(g, "g0")
    one = KernelRecord("k", bytes_read=8, predicted_us=1e-9, flops=10**18)
    assert "Roofline" in html.graph_section(GraphRecord("x", kernels=[one]), "g0")


def test_long_diff_is_cut():
    lines = html.diff_lines("", "\n".join(map(str, range(5000))))
    assert len(lines) == html.MAX_DIFF_LINES + 1 and "more lines" in lines[-1]


def test_clean():
    here = os.getcwd()
    assert dump.clean(f"{here}/a/b.py:3 x") == "a/b.py:3 x"
    assert dump.clean("/opt/env/lib/site-packages/torch/nn/f.py:3") == "torch/nn/f.py:3"
    assert dump.clean('File "/home/u/model.py", line 3') == 'File "model.py", line 3'
    assert dump.clean("<f at 0x7fabc>") == "<f>"
    assert dump.clean("x = a / b // c.py 0x7fffffff") == "x = a / b // c.py 0x7fffffff"
    assert dump.clean("/tmp/fusionc_ab12/k.so") == "k.so"


def test_summary_with_times():
    text = dump.summary([sample()], measured=True)
    assert "14.2" in text and "cached" in text
    assert "14.2" not in dump.summary([sample()])
