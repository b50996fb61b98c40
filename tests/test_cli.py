"""The command line, repros and their reduction, and the progress bar."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import fusionc
from fusionc import cli, dump, explanation, progress, record, repro
from fusionc.config import Config
from fusionc.errors import FusioncError
from fusionc.record import GraphRecord, PassRecord

REAL = importlib.util.find_spec("fusionc.compiler") is not None
TEXT = importlib.util.find_spec("fusionc.graph.text") is not None
aten = torch.ops.aten


@pytest.fixture
def backend(monkeypatch):
    """A stand-in for the compiler that turns every aten.cos into sin: something to find."""

    def wrong(gm, example_inputs, **kwargs):
        for n in list(gm.graph.nodes):
            if n.target in (torch.cos, aten.cos.default):
                n.target = {torch.cos: torch.sin, aten.cos.default: aten.sin.default}[n.target]
        gm.recompile()
        record.remember(GraphRecord("g"))
        return gm.forward

    monkeypatch.setattr(explanation, "_backend", lambda: wrong)
    torch._dynamo.reset()


def run(capsys, *argv: str) -> tuple[int, str]:
    status = cli.main(argv)
    done = capsys.readouterr()
    return status, done.out + done.err


def run_json(capsys, *argv: str):
    status = cli.main([*argv, "--json"])
    return status, json.loads(capsys.readouterr().out)


# explain


MODELS = """
import torch
def build():
    return torch.nn.Linear(4, 4), (torch.ones(2, 4),)
def f(x, y):
    return x + y
class M(torch.nn.Module):
    def forward(self, x):
        return x * 2
constant = 3
"""


@pytest.fixture
def models(tmp_path, monkeypatch):
    (tmp_path / "cli_models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    sys.modules.pop("cli_models", None)


@pytest.mark.parametrize(
    "arguments",
    [
        ["cli_models:build"],
        ["cli_models:f", "--input", "2x3", "--input", "2x3:float64"],
        ["cli_models:M", "--input", "3:int64"],
        ["cli_models:build", "--option", "verify=True", "--option", "dump=None"],  # as Python writes them
    ],
)
def test_explain(capsys, models, backend, arguments):
    status, value = run_json(capsys, "explain", *arguments, "--no-grad")
    assert status == 0 and len(value["graphs"]) == 1
    status, text = run(capsys, "explain", *arguments)
    assert status == 0 and text.startswith("fusionc: 1 graph")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no_such_module:f"], "no module 'no_such_module'"),
        (["cli_models"], "MODULE:CALLABLE"),
        (["cli_models:g"], "has no 'g'"),
        (["cli_models:constant"], "not callable"),
        (["cli_models:f"], "needs arguments (x, y)"),
        (["torch.nn:Linear", "--input", "2x3"], "needs arguments (in_features, out_features)"),
        (["cli_models:f", "--input", "axb"], "2x16:float32"),
        (["cli_models:f", "--input", "3:float33"], "2x16:float32"),
        (["cli_models:f", "--option", "dmp=1"], "Did you mean 'dump'"),
        (["cli_models:f", "--option", "dump"], "KEY=VALUE"),
        (["cli_models:f", "--mode", "fast"], "'max-autotune'"),
    ],
)
def test_explain_errors(capsys, models, backend, arguments, message):
    status, text = run(capsys, "explain", *arguments)
    assert status == 2 and message in text
    status, value = run_json(capsys, "explain", *arguments)
    assert status == 2 and message in value["error"]


# dumps, passes, cache, env


def test_diff(capsys, tmp_path):
    for name, text in (("a", "one\ntwo\n"), ("b", "one\ntwo\n"), ("c", "one\nthree\n")):
        g = GraphRecord("G", input_text=text, timings={name: 1.0}, passes=[PassRecord(1, "p")])
        dump.write_graph(g, Config(dump=str(tmp_path / name)))
    dump.write_graph(GraphRecord("H"), Config(dump=str(tmp_path / "c")))
    a, b, c = (str(tmp_path / n) for n in "abc")
    assert run(capsys, "diff", a, b) == (0, "the dumps are equal (but for times)\n")
    status, text = run(capsys, "diff", a, c)
    assert status == 1 and "-two\n+three" in text and "g1_H" in text
    status, value = run_json(capsys, "diff", a, c)
    assert status == 1 and not value["equal"] and "g0_G/00_input.graph" in value["changed"]
    status, text = run(capsys, "diff", a, str(tmp_path))
    assert status == 2 and "is not a dump" in text


def test_passes(capsys):
    status, rows = run_json(capsys, "passes")
    assert status == 0 and [r["position"] for r in rows] == sorted(r["position"] for r in rows)
    status, text = run(capsys, "passes", "cse")
    assert status == 0 and "Legality" in text and "Exactness" in text
    status, text = run(capsys, "passes", "csex")
    assert status == 2 and "Did you mean 'cse'" in text


def test_cache(capsys, tmp_path):
    from fusionc.runtime.cache import Cache

    folder = str(tmp_path / "cache")
    Cache(folder).put("kernel", {"a": 1}, {"text": "x"})
    status, value = run_json(capsys, "cache", "list", "--dir", folder)
    assert status == 0 and len(value["entries"]) == 1
    assert run(capsys, "cache", "path", "--dir", folder) == (0, value["root"] + "\n")
    name = value["entries"][0]["name"]
    status, value = run_json(capsys, "cache", "show", name[:8], "--dir", folder)
    assert status == 0 and value[0]["key"] == {"a": 1}
    assert run(capsys, "cache", "show", "zz", "--dir", folder)[0] == 1
    assert run(capsys, "cache", "verify", "--dir", folder)[0] == 0
    out = str(tmp_path / "out.tar")
    assert run_json(capsys, "cache", "export", out, "--dir", folder)[1]["count"] == 1
    assert run_json(capsys, "cache", "import", out, "--dir", str(tmp_path / "other"))[1]["count"] == 1
    assert run_json(capsys, "cache", "prune", "--dir", folder)[0] == 0
    assert run_json(capsys, "cache", "clear", "--dir", folder)[1]["removed"] >= 1
    assert run(capsys, "cache", "export", "--dir", folder)[0] == 2
    assert run(capsys, "cache", "clear", "all", "--dir", folder)[0] == 2
    (tmp_path / "bad.tar").write_bytes(b"not a tar" * 200)
    status, text = run(capsys, "cache", "import", str(tmp_path / "bad.tar"), "--dir", folder)
    assert status == 2 and "not a cache export" in text


def test_env(capsys, monkeypatch):
    status, value = run_json(capsys, "env")
    assert status == 0 and value["torch"] and value["config"]["mode"] == "default"
    monkeypatch.setenv("FUSIONC_TARGET", "nonsense")
    status, value = run_json(capsys, "env")
    assert status == 0 and "invalid" in value["config"]


@pytest.mark.parametrize("command", ["explain", "opt", "lower", "check", "reduce", "diff", "passes", "cache", "env"])
def test_every_command_has_help_and_json(capsys, command):
    with pytest.raises(SystemExit) as e:
        cli.main([command, "--help"])
    assert e.value.code == 0 and "--json" in capsys.readouterr().out


def test_bad_graph_file(capsys, tmp_path):
    for command in ("opt", "lower"):
        assert run(capsys, command, str(tmp_path / "none.graph"))[0] == 2
        (tmp_path / "bad.graph").write_text("this is no graph (")
        assert run(capsys, command, str(tmp_path / "bad.graph"))[0] == 2


def graph_file(tmp_path):
    from fusionc.graph.text import show

    gm = make_fx(lambda x: (x.cos() + x.cos()).relu(), tracing_mode="fake")(torch.ones(4, 8))
    (tmp_path / "g.graph").write_text(show(gm))
    return str(tmp_path / "g.graph")


@pytest.mark.skipif(not TEXT, reason="fusionc.graph.text does not exist yet")
def test_opt(capsys, tmp_path):
    file = graph_file(tmp_path)
    status, value = run_json(capsys, "opt", file, "--pass", "cse")
    assert status == 0 and value["passes"][0]["fired"] == 1 and value["graph"].count("aten.cos") == 1
    status, text = run(capsys, "opt", file, "--diff")
    assert status == 0 and re.search(r"^-.*cos", text, re.MULTILINE)
    status, text = run(capsys, "opt", file, "--pass", "nonsense")
    assert status == 2 and "cse" in text


@pytest.mark.skipif(not (REAL and TEXT), reason="fusionc.compiler does not exist yet")
def test_lower(capsys, tmp_path):
    status, value = run_json(capsys, "lower", graph_file(tmp_path), "--target", "cpp")
    assert status == 0 and value["kernels"][0]["source"]


# repros


def chain(length: int = 12):
    def f(x, y):
        for i in range(length):
            x = aten.cos(x) if i == length // 2 else aten.tanh(aten.add(x, y))
        return x, aten.mul(x, y), aten.sigmoid(y)

    return make_fx(f)(torch.ones(3, 4), torch.ones(3, 4))


def test_repro_text_is_a_program(tmp_path):
    gm = chain()
    path = tmp_path / "repro.py"
    path.write_text(
        repro.repro_source(gm, [torch.ones(3, 4), torch.ones(3, 4).t().contiguous().t()], {"target": "cpp"})
    )
    again, specs, options = repro.load(path)
    assert options == {"target": "cpp"} and specs[1] == repro.Spec("float32", (3, 4), (1, 3))
    inputs = repro.make_inputs(specs)
    assert inputs[1].stride() == (1, 3)
    torch.testing.assert_close(again(*inputs), gm(*inputs))
    assert [n.target for n in again.graph.nodes][2:-1] == [n.target for n in gm.graph.nodes][2:-1]


def test_repro_inputs():
    specs = [
        repro.spec_of(t) for t in (torch.ones(3).unsqueeze(1).expand(3, 4), torch.ones(2, dtype=torch.bool), 3, None)
    ]
    a, b, c, d = repro.make_inputs(specs)
    assert a.shape == (3, 4) and a.stride() == (1, 0) and b.dtype == torch.bool and (c, d) == (3, None)
    assert torch.equal(a, repro.make_inputs(specs)[0])
    with pytest.raises(FusioncError, match="type str"):
        repro.spec_of("x")


def test_repro_keeps_constants(tmp_path):
    class M(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("small", torch.tensor([[1.0, 2.0]]))
            self.register_buffer("large", torch.ones(400))

        def forward(self, x):
            return (x * self.small).sum(-1) + self.large

    path = tmp_path / "repro.py"
    path.write_text(repro.repro_source(torch.fx.symbolic_trace(M()), [torch.ones(400, 1)]))
    gm, _, _ = repro.load(path)
    assert torch.equal(gm.small, torch.tensor([[1.0, 2.0]])) and gm.large.shape == (400,)


def test_repro_keeps_calls_without_inputs(tmp_path):
    gm = make_fx(lambda x: aten.add(x, aten.rand([3], device="cpu")) + aten.full([3], 2.0, device="cpu"))(torch.ones(3))
    path = tmp_path / "repro.py"
    path.write_text(repro.repro_source(gm, [torch.ones(3)]))
    again, _, _ = repro.load(path)
    assert [n.target for n in again.graph.nodes] == [n.target for n in gm.graph.nodes]


def test_compare_finds_the_fault(backend):
    assert "output 0 differs" in repro.compare(chain(), [repro.spec_of(torch.ones(3, 4))] * 2)[0]
    good = make_fx(lambda x: aten.tanh(x))(torch.ones(3))
    assert repro.compare(good, [repro.spec_of(torch.ones(3))]) == []


def test_reduce(backend, tmp_path, capsys):
    path = tmp_path / "repro.py"
    path.write_text(repro.repro_source(chain(), [torch.ones(3, 4)] * 2))
    status, value = run_json(capsys, "reduce", str(path))
    gm, specs, _ = repro.load(tmp_path / "repro.min.py")
    assert status == 0 and value["nodes_after"] == 3
    assert [n.op for n in gm.graph.nodes] == ["placeholder", "call_function", "output"]
    assert repro.fails(gm, specs)


def test_reduce_of_a_good_graph(backend, tmp_path, capsys):
    path = tmp_path / "repro.py"
    path.write_text(repro.repro_source(make_fx(lambda x: aten.tanh(x))(torch.ones(3)), [torch.ones(3)]))
    status, text = run(capsys, "reduce", str(path))
    assert status == 2 and "does not fail" in text
    path.write_text("x = 1\n")
    status, text = run(capsys, "reduce", str(path))
    assert status == 2 and "not a repro" in text


def test_check(capsys, tmp_path):
    path = tmp_path / "repro.py"
    for code, expected in (
        ("print('fine')", 0),
        ("raise SystemExit(1)", 1),
        ("import os; os.kill(os.getpid(), 11)", 1),
    ):
        path.write_text(code)
        status, value = run_json(capsys, "check", str(path))
        assert status == expected and value["ok"] == (expected == 0)
    assert "killed by signal 11" in run(capsys, "check", str(path))[1]
    path.write_text("import time; time.sleep(60)")
    status, text = run(capsys, "check", str(path), "--timeout", "0.5")
    assert status == 1 and "did not finish" in text
    assert run(capsys, "check", str(tmp_path / "none.py"))[0] == 2


@pytest.mark.skipif(not REAL, reason="fusionc.compiler does not exist yet")
def test_repro_runs_by_itself(tmp_path):
    path = tmp_path / "repro.py"
    path.write_text(repro.repro_source(chain(), [torch.ones(3, 4)] * 2))
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "eager and fusionc agree\n"), done.stderr


def test_version_and_terminals_without_unicode(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"fusionc {fusionc.__version__}\n"
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-m", "fusionc.cli", "passes", "fft_conv"], capture_output=True, env=env, check=False)
    assert done.returncode == 0 and done.stdout.isascii() and b"fft_conv" in done.stdout, done.stderr


@pytest.mark.skipif(not REAL, reason="fusionc.compiler does not exist yet")
def test_repro_whose_eager_fails_compares_nothing(capsys):
    gm = make_fx(lambda x, i: x[i])(torch.ones(3), torch.tensor([0]))
    specs = [repro.spec_of(torch.ones(3)), repro.Spec("float32", (2,), (1,))]
    assert repro.main(gm, specs) == 1 and "nothing was compared: eager fails" in capsys.readouterr().out
    assert not repro.fails(gm, specs) and not repro.fails_alone(gm, specs)


# progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_silent_when_short_or_not_a_terminal(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress.progress("compiling", 3) as p:
        p.advance("k00")
    assert sys.stderr.getvalue() == ""
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(progress, "DELAY_SECONDS", 0.0)
    with progress.progress("compiling", 3) as p:
        p.advance("k00")
    assert sys.stderr.getvalue() == "" and p.done == 1


def test_progress_shows(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    with progress.progress("compiling", 3, True) as p:
        p.advance("k00 [bold]evil")
        with progress.progress("inner", 3, True) as q:  # a second bar cannot be live: it stays away
            q.advance("x")
    text = sys.stderr.getvalue()
    assert "compiling" in text and "[bold]evil" in text


def test_progress_with_a_closed_terminal(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress.progress("compiling", 3, True) as p:
        terminal.close()
        p.advance("k00")


def test_progress_passes_errors_on():
    with pytest.raises(ValueError, match="mine"), progress.progress("x", 1, True):
        raise ValueError("mine")
