"""The benchmark commands at tiny sizes: they run, and their checks catch a wrong backend. No times are asserted."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # `benchmarks` is a folder of the checkout, not part of the installed package
    sys.path.insert(0, str(ROOT))

from benchmarks import (  # noqa: E402
    common,
    compile_time,
    conv,
    conv_models,
    cpu,
    gpu,
    gpu_models,
    gpu_workloads,
    host_cost,
    removal,
)
from benchmarks.common import Case  # noqa: E402


@pytest.fixture(autouse=True)
def clean():
    threads, omp = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    yield
    torch.set_num_threads(threads)
    if omp is None:
        os.environ.pop("OMP_NUM_THREADS", None)
    else:
        os.environ["OMP_NUM_THREADS"] = omp
    torch._dynamo.reset()


def test_cpu_command_writes_what_it_prints(tmp_path, capsys):
    path = tmp_path / "cpu.json"
    arguments = ["--tiny", "--only", "softmax", "mlp", "--backends", "eager,floor", "--rounds", "2", "--turn", "0.001"]
    assert cpu.main([*arguments, "--json", str(path)]) == 0
    result = json.loads(path.read_text())
    assert [r["name"] for r in result["rows"]] == ["mlp_swiglu", "softmax", "softmax_train"]
    for row in result["rows"]:
        assert row["backends"]["floor"]["check"]["ok"]
        assert len(row["backends"]["floor"]["rounds_ms"]) == 2
    assert result["geomean"]["floor over eager"]["count"] == 3
    assert "softmax_train" in capsys.readouterr().out


@pytest.mark.slow
def test_conv_command_writes_what_it_prints(tmp_path, capsys):
    path = tmp_path / "conv.json"
    arguments = [
        "--device",
        "cpu",
        "--tiny",
        "--sizes",
        "3",
        "--kinds",
        "conv-train",
        "--peers",
        "eager",
        "--jobs",
        "2",
    ]
    assert conv.main([*arguments, "--repeat-ms", "1", "--json", str(path)]) == 0
    result = json.loads(path.read_text())
    assert [(r["layout"], r["check"]["ok"]) for r in result["block"]] == [("nchw", True), ("nhwc", True)]
    assert [r["point"] for r in result["grid"]] == [[3, 4, 9, "nchw"], [3, 4, 9, "nhwc"]] and result["wrong"] == 0
    assert "conv-train" in capsys.readouterr().out


def test_conv_tables_compare_with_the_best_of_both_layouts():
    rows = [{"kind": "block", "size": 7, "layout": layout, "backend": b, "ms": ms, "check": {"ok": True, "ratio": 1.0}}
            for layout, b, ms in (("nchw", "eager", 3.0), ("nhwc", "eager", 2.0), ("nchw", "fusionc", 0.5),
                                  ("nhwc", "fusionc", 1.0))]  # fmt: skip
    lines = conv.block_table(rows, ["eager", "fusionc"]).splitlines()
    assert [line.split("|")[-2].strip() for line in lines[2:]] == ["4", "2"]
    for inductor, best in (({}, "2"), ({"inductor": 1.5}, "1.5")):
        rows = [{"point": [7, 64, 14, layout], "ms": {"eager": e, "fusionc": 1.0} | inductor, "check": {"ratio": 1.0}}
                for layout, e in (("nchw", 3.0), ("nhwc", 2.0))]  # fmt: skip
        head, _, line = ([cell.strip() for cell in line.split("|")] for line in conv.grid_table(rows).splitlines())
        assert [cell for name, cell in zip(head, line, strict=True) if name in ("best / nchw", "/ nhwc")] == [best, best]


def test_every_cpu_workload_is_named_once_and_there_are_enough():
    names = [w.name for w in cpu.WORKLOADS]
    assert len(names) == len(set(names)) >= 14
    assert {w.group for w in cpu.WORKLOADS} == {"model", "pointwise"}


def test_a_wrong_backend_is_caught_and_a_broken_one_reported(monkeypatch):
    workload = next(w for w in cpu.WORKLOADS if w.name == "softmax")
    real = common.compiled

    def fake(fn, spec):
        if spec == "wrong":
            return lambda *a: fn(*a) + 1e-6
        if spec == "broken":
            raise RuntimeError("no such thing\nsecond line")
        return real(fn, spec)

    monkeypatch.setattr(common, "compiled", fake)
    row = cpu.measure(workload, ["eager", "wrong", "broken"], "tiny", 1, 0.001)
    assert row["backends"]["eager"]["check"]["ok"]
    assert not row["backends"]["wrong"]["check"]["ok"]
    assert row["backends"]["broken"]["error"] == "RuntimeError: no such thing"
    assert cpu.ratio(row, "eager", "broken") is None


def graph(kernels=1, fallbacks=()):
    from fusionc.record import GraphRecord, KernelRecord

    return GraphRecord("g", kernels=[KernelRecord("k")] * kernels, fallbacks=list(fallbacks))


WHOLE = "whole graph: AttributeError: module has no attribute 'Slot'"


@pytest.mark.parametrize("new", [[graph(fallbacks=[WHOLE])], [graph(), graph(0, [WHOLE])], [graph(0)], []])
def test_a_run_that_fell_back_to_aten_is_no_figure_of_fusionc(new, monkeypatch, capsys):
    # It is right and as fast as eager: once, a table of such rows came with a geometric mean.
    old = [graph()]  # an earlier workload's kernels must not vouch for this one
    kept = list(old)

    def fake(fn, spec):
        kept.extend(new if spec == "fusionc" else [])
        return fn

    real = common.records
    monkeypatch.setattr(common, "records", lambda spec: list(kept) if spec == "fusionc" else real(spec))
    monkeypatch.setattr(common, "compiled", lambda fn, spec: lambda *a: fake(fn, spec) and fn(*a))
    workload = next(w for w in cpu.WORKLOADS if w.name == "softmax")
    row = cpu.measure(workload, ["eager", "fusionc"], "tiny", 1, 0.001)
    assert row["backends"]["fusionc"]["error"].startswith("NOT COMPILED")
    assert "ms" not in row["backends"]["fusionc"]
    assert cpu.summary([row], ["eager", "fusionc"]) == {}
    cpu.print_rows([row], ["eager", "fusionc"])
    assert "NOT COMPILED" in capsys.readouterr().out


def test_kernels_recorded_since_then_count_as_compiled():
    assert common.not_compiled(None) is None
    assert common.counts("inductor", []) is None
    found = {"graphs": 1, "kernels": 2, "templates": 0, "whole": []}
    assert common.not_compiled(found) is None
    assert common.not_compiled(found | {"kernels": 0, "templates": 1}) is None
    assert common.not_compiled(found | {"kernels": 0}).startswith("NOT COMPILED")
    assert common.not_compiled(found | {"whole": [WHOLE]}).endswith(WHOLE)


def test_compile_time_discards_a_run_that_fell_back(monkeypatch):
    class Child:
        returncode, pid = 0, -1

        def __init__(self, *a, **k):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *a):
            return None

        def communicate(self, timeout=None):
            return compile_time.MARK + json.dumps({"total_s": 1.0, "not_compiled": "NOT COMPILED: x"}) + "\n", ""

    monkeypatch.setattr(compile_time.subprocess, "Popen", Child)
    result = compile_time.spawn([], {}, 1.0)
    assert result["error"] == "NOT COMPILED: x" and "total_s" not in result


def test_check_sees_shape_dtype_count_and_nonfinite_values():
    ref = [torch.tensor([1.0, math.inf, math.nan], dtype=torch.float64)]
    eager = [ref[0].float()]
    assert common.check(eager, eager, ref).ok
    assert not common.check([torch.tensor([1.0, math.nan, math.nan])], eager, ref).ok
    assert not common.check([torch.tensor([1.0, -math.inf, math.nan])], eager, ref).ok
    assert not common.check([eager[0].half()], eager, ref).ok
    assert not common.check([], eager, ref).ok
    assert not common.check([eager[0][:2]], eager, ref).ok


def test_reference_keeps_float64_through_casts_in_the_model():
    def model(x):
        return torch.softmax(x.float(), -1, dtype=torch.float32).to(x.dtype)

    case = Case(model, lambda s: (common.randn(4, 8, seed=s, device="cpu", dtype=torch.bfloat16),))
    inputs = case.inputs(0)
    (got,) = common.reference(case, inputs)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, torch.softmax(inputs[0].double(), -1), rtol=0, atol=0)


def test_interleave_gives_each_candidate_every_round():
    seen = []

    def call(name):
        return lambda i: (seen.append(name), 0.5)[1]

    result = common.interleave({"a": call("a"), "b": call("b")}, rounds=3, seconds_per_turn=0.5)
    assert result == {"a": [0.5] * 3, "b": [0.5] * 3}
    assert seen[4:] == ["a", "b", "b", "a", "a", "b"]  # after two estimating calls each: turns rotate


def test_geomean_and_ratio_ignore_what_is_missing():
    assert common.geomean([2.0, 8.0]) == pytest.approx(4.0)
    assert common.geomean([]) is None
    row = {"backends": {"a": {"rounds_ms": [2.0, 4.0, 9.0]}, "b": {"rounds_ms": [1.0, 4.0, 3.0]}}}
    assert cpu.ratio(row, "a", "b") == 2.0


def test_compile_time_child_splits_the_first_call():
    result = compile_time.child("train", "floor", 1, "small", 1)
    assert {k for k, _, _ in result["compilers"]} == {"forward", "backward"}
    assert result["aot_s"] > 0 and result["dynamo_s"] > 0
    parts = result["dynamo_s"] + result["aot_s"] + result["compiler_s"] + result["run_s"]
    assert parts == pytest.approx(result["total_s"])
    assert result["max_difference"] == 0.0


def test_compile_time_command_reports_a_child_that_fails(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(compile_time, "spawn", lambda arguments, environment, limit: {"error": "no compiler"})
    path = tmp_path / "c.json"
    assert compile_time.main(["--only", "inference", "--backends", "floor", "--no-slope", "--json", str(path)]) == 1
    assert "no compiler" in capsys.readouterr().out
    assert compile_time.slope([(4, 1.0), (8, 1.4), (16, 2.2)]) == pytest.approx(0.1)


@pytest.mark.parametrize(
    "name", ["gelu_chain", "layernorm_train", "lm_head_ce_train", "small_images", "alibi_attention"]
)
def test_gpu_workloads_run_without_a_gpu(name, tmp_path, capsys):
    gpu.child(name, ["eager", "floor"], "cpu", "tiny", 1, str(tmp_path / "lock"))
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith(gpu.MARK)]
    results = [json.loads(x[len(gpu.MARK) :]) for x in lines]
    assert [r["backend"] for r in results] == ["eager", "eager", "floor", "floor"]
    assert "ms" in results[-1] and results[-1]["check"]["ok"]


def test_gpu_workloads_have_distinct_names():
    sets = (gpu_workloads.WORKLOADS, gpu_models.MODELS, conv_models.CONV_MODELS, conv_models.OTHER)
    names = [w.name for some in sets for w in some]
    assert len(names) == len(set(names)) == 24 + 20 + 2 * 8 and list(gpu.workloads()) == names


@pytest.mark.parametrize("name", [w.name for w in (*conv_models.CONV_MODELS, *conv_models.OTHER[:3])])
def test_convolutional_networks_run_without_a_gpu_and_stay_finite(name):
    where = gpu_workloads.Where("cpu", "tiny")
    if not name.startswith(("convnext", "replknet", "unireplknet")):
        pytest.importorskip("timm")
    case = gpu.workloads()[name].build(where)
    inputs = case.inputs(1)
    (out,), (ref,) = common.step(case, case.fn, inputs), common.reference(case, inputs)
    assert out.shape == (2, 1000) and out.dtype == torch.bfloat16 and not case.fn.training
    assert 0.02 < ref.std() < 20  # neither dying out nor growing
    assert (out - ref).norm() < 0.25 * ref.norm()
    for norm in (m for m in case.fn.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        assert norm.running_var.min() > 0 and norm.running_mean.abs().max() > 0


def test_gpu_command_survives_a_failing_workload_and_goes_on(tmp_path, capsys):
    path = tmp_path / "g.json"
    arguments = ["--device", "cpu", "--tiny", "--only", "softmax", "--json", str(path), "--resume"]
    more = ["--backends", "eager,nosuchbackend", "--logs", str(tmp_path / "logs")]
    assert gpu.main([*arguments, *more]) == 1
    (row,) = json.loads(path.read_text())["rows"]
    assert "ms" in row["backends"]["eager"]
    assert "nosuchbackend" in row["backends"]["nosuchbackend"]["error"]
    assert "FAIL" in capsys.readouterr().out
    assert gpu.main([*arguments, "--backends", "eager,floor", "--warm", "--svg", str(tmp_path / "g.svg")]) == 0
    (row,) = json.loads(path.read_text())["rows"]
    assert set(row["backends"]) == {"eager", "nosuchbackend", "floor"} and row["backends"]["floor"]["warm_s"] > 0
    assert ">softmax_65536<" in (tmp_path / "g.svg").read_text()
    before = path.read_text()
    assert gpu.main([*arguments, "--backends", "eager,floor", "--budget", "0"]) == 0  # nothing is left to do
    assert json.loads(path.read_text())["rows"] == json.loads(before)["rows"]
    assert gpu.main(["--render", str(path), "--backends", "eager,floor"]) == 0


def test_gpu_command_out_of_time_asks_to_go_on(tmp_path, capsys):
    path = tmp_path / "g.json"
    arguments = ["--device", "cpu", "--tiny", "--only", "gelu", "--backends", "eager", "--budget", "0"]
    assert gpu.main([*arguments, "--json", str(path)]) == 1
    assert "go on with --resume" in capsys.readouterr().out
    assert json.loads(path.read_text())["rows"][0]["backends"] == {}


def test_gpu_command_measures_first_calls_alone(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FUSIONC_VERIFY", "0")  # which compiles everything anew
    path = tmp_path / "g.json"
    arguments = ["--device", "cpu", "--tiny", "--only", "softmax", "--json", str(path), "--compile-only"]
    assert gpu.main([*arguments, "--backends", "eager,fusionc"]) == 0
    (row,) = json.loads(path.read_text())["rows"]
    (ours,) = row["backends"].values()
    assert ours["compile_s"] > 0 and ours["warm_s"] > 0 and "ms" not in ours
    assert ours["hits"]["programs"] == {"miss": 1, "stored": 1} and ours["warm_hits"]["programs"] == {"hit": 1}
    assert "ok" in capsys.readouterr().out


def verdict(ms, **more):
    check = {"ok": True, "ratio": 1.0, "error": 0.0, "eager_error": 0.0, "note": ""}
    return {"ms": ms, "compile_s": 12.3, "warm_s": 2.0, "peak_gb": 1.0, "check": check, **more}


def test_a_process_that_finds_no_memory_tries_again():
    done, cleaned = [], []

    def work():
        done.append(1)
        if len(done) < 3:
            raise MemoryError
        return "made"

    assert gpu.with_patience(work, MemoryError, lambda: cleaned.append(1), pause=0) == "made" and len(cleaned) == 2
    with pytest.raises(MemoryError):
        gpu.with_patience(lambda: [done.clear(), work()], MemoryError, lambda: None, tries=2, pause=0)
    with pytest.raises(ZeroDivisionError):
        gpu.with_patience(lambda: 1 / 0, MemoryError, lambda: None, pause=0)


def test_gpu_table_stays_short():
    backends = ["eager", "inductor", "inductor:reduce-overhead", "fusionc"]
    rows = [
        {"name": w.name, "limit_ms": 1.0, "backends": dict.fromkeys(backends, verdict(1.234, error="e" * 500))}
        for w in gpu_workloads.WORKLOADS
    ]
    assert len(gpu.compact_table(rows, backends)) <= 10_000


def test_gpu_table_says_what_the_goals_ask():
    backends = ["eager", "inductor", "inductor:reduce-overhead", "fusionc"]
    wrong = {"check": {"ok": False, "ratio": 9.0, "error": 0.5, "eager_error": 0.1, "note": "output 0"}}
    times = {"a": (4.0, 2.0, 3.0, 1.0), "b": (1.0, 4.0, 2.0, 1.5), "c": (4.0, 0.1, 2.0, 2.0)}
    rows = [{"name": n, "limit_ms": 0.5, "backends": dict(zip(backends, map(verdict, t)))} for n, t in times.items()]
    rows[2]["backends"]["inductor"] |= wrong  # what was wrong is no peer
    text = gpu.compact_table(rows, backends)
    assert "slower than the best peer by more than 3 %: b 0.67" in text
    assert f"fusionc is {common.cell(common.geomean([2.0, 2.0 / 1.5, 1.0]))}× Inductor's better mode" in text
    assert "c inductor: WRONG" in text and "cold compile" in text and "warm compile" in text
    line = next(t for t in text.splitlines() if t.startswith("| a "))
    assert [c.strip() for c in line.split("|")][7:10] == ["2", "50", "1"]
    svg = gpu.plot(rows, backends, "title <&>")
    assert svg.count("<rect") == 1 + 3 + 9 and "title &lt;&amp;&gt;" in svg
    __import__("xml.dom.minidom").dom.minidom.parseString(svg)


def test_host_cost_measures_three_ways(tmp_path):
    path = tmp_path / "h.json"
    arguments = ["--device", "cpu", "--backends", "eager,floor", "--lengths", "1", "2", "--batches", "2"]
    assert host_cost.main([*arguments, "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert set(rows[1]["us"]) == {"call", "backend", "program"}


@pytest.mark.slow
def test_removal_counts_and_compares(tmp_path):
    pytest.importorskip("transformers")
    path = tmp_path / "removal.json"
    removal.main(["--device", "cpu", "--shape", "tiny", "--prompt", "16", "--batch", "2", "--context", "8", "--rounds", "1",
                  "--json", str(path)])  # fmt: skip
    result = json.loads(path.read_text())
    assert [r["layers"] for r in result["score"]] == [6, 6] and {r["name"] for r in result["speed"]} == {
        "prefill",
        "decode",
    }
    for row in result["speed"]:
        assert set(row["ms"]) == {f"{a} {b}" for a in ("whole", "pruned") for b in ("eager", "fusionc")}
        assert max(row["against_eager"].values()) < 1e-4 and row["graphs"]["pruned"]["kernels"] > 0
    whole, pruned = result["memory"]["cache"]
    before, after = result["memory"]["parameters"]
    assert pruned * 6 == whole * 4 and result["memory"]["freed"] == before - after > 0


def test_first_call_says_where_the_main_thread_was():
    arguments = ["gelu_chain", "--device", "cpu", "--size", "tiny", "--least", "0", "--only", "fusionc/"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.first_call", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr
    first, *rest = done.stdout.splitlines()
    assert first.startswith("gelu_chain, fusionc: first call ")
    seconds = {line.split()[1]: float(line.split()[0]) for line in rest if line.startswith("  ")}
    assert seconds["fusionc/backend.py:fusionc"] >= seconds["fusionc/compiler.py:compile_steps"] > 0


def test_commands_start_from_the_checkout():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.cpu", "--list"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and "smollm2_decode" in done.stdout
