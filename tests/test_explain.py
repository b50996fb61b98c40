"""explain() with a stand-in backend, so that it is tested apart from the compiler; and once with the real one."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest
import torch

from fusionc import explanation, record
from fusionc.explanation import Explanation, explain, explain_with
from fusionc.record import CallRecord, GraphRecord, GroupRecord, KernelRecord, PassRecord, Refusal

REAL = importlib.util.find_spec("fusionc.backend") is not None


@pytest.fixture
def seen(monkeypatch):
    """Options that the stand-in backend was given, one entry for each graph."""
    given: list[dict] = []

    def backend(gm, example_inputs, **kwargs):
        given.append(kwargs)
        names = [n.name for n in gm.graph.nodes]
        record.remember(GraphRecord("g", calls=[CallRecord(n, n, "stand-in") for n in names]))
        return gm.forward

    monkeypatch.setattr(explanation, "_backend", lambda: backend)
    torch._dynamo.reset()
    return given


def f(x):
    return x.relu() + 1


def test_collects_graphs_and_runs_each_time(seen):
    for _ in range(12):  # more often than Dynamo's recompile limit of 8
        found = explain(f, torch.ones(3))
        assert len(found.graphs) == 1 and not found.breaks
    assert "stand-in" in str(found)
    json.dumps(found.to_json())


def test_compiled_before(seen):
    torch.compile(f, backend="eager")(torch.ones(3))
    assert len(explain(f, torch.ones(3)).graphs) == 1


def test_module_with_keywords(seen):
    class M(torch.nn.Module):
        def forward(self, x, *, scale):
            return x * scale

    assert len(explain(M(), torch.ones(3), scale=torch.ones(3)).graphs) == 1


def test_options_reach_the_backend(seen):
    explain_with(f, [torch.ones(3)], mode="max-autotune", options={"target": "cpp"})
    assert seen == [{"mode": "max-autotune", "options": {"target": "cpp"}}]


def test_graph_breaks_are_told(seen):
    def broken(x):
        y = x + 1
        torch._dynamo.graph_break()
        return y * 2

    found = explain(broken, torch.ones(3))
    assert len(found.graphs) == 2 and sum(found.breaks.values()) == 1
    assert "graph breaks" in str(found)


def test_errors_of_the_function_are_raised(seen):
    def bad(x):
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        explain(bad, torch.ones(3))
    assert not record._collectors


def test_nothing_compiled(seen):
    assert "nothing was compiled" in str(explain(lambda: 3))


def test_text():
    g = GraphRecord(
        "Block",
        passes=[PassRecord(3, "fold", refusals=[Refusal("fold", "not constant", f"n{i}") for i in range(30)])],
        groups=[GroupRecord("norm", ["pow_1", "mean_1"], "k00_rmsnorm", "reduction")],
        kernels=[KernelRecord("k00_rmsnorm", nodes=["pow_1"], measured_us=3.25, bytes_read=8)],
        fallbacks=["sort is not lowered"],
    )
    text = str(Explanation([g]))
    for part in (
        "Block",
        "norm: reduction",
        "pow_1 mean_1",
        "not constant",
        "… 10 more",
        "3.25",
        "sort is not lowered",
    ):
        assert part in text


def test_kernels_named_by_hash_get_words():
    def made(*kernels):
        groups = [GroupRecord(f"group{i}", nodes, f"k_{i:020x}") for i, nodes in enumerate(kernels)]
        g = GraphRecord("g", groups=groups, kernels=[KernelRecord(x.kernel, symbol=x.kernel) for x in groups])
        record.name_kernels(g)
        assert [x.kernel for x in g.groups] == [k.name for k in g.kernels]
        assert g.kernels[0].symbol == f"k_{0:020x}" and g.kernels[0].nodes == kernels[0]
        return [k.name for k in g.kernels]

    assert made(["gelu", "native_layer_norm_2", "getitem_1"], ["gelu_1", "native_layer_norm"]) == [
        "gelu_layer_norm",
        "gelu_layer_norm_1",
    ]
    assert made(["add", "mul", "add_1", "exp", "sub", "neg"]) == ["add_mul_exp_and_2_more"]
    assert made(["getitem"], ["view_1"]) == ["getitem", "view"]


def test_session_report_is_bounded():
    record.forget()
    for i in range(record.KEPT_GRAPHS + 5):
        record.remember(GraphRecord(str(i)))
    assert [g.name for g in record.report()] == [str(i) for i in range(5, record.KEPT_GRAPHS + 5)]
    record.forget()


def test_collectors_are_independent():
    with record.collect() as a, record.collect() as b:
        record.remember(GraphRecord("x"))
        assert len(a) == len(b) == 1
    record.remember(GraphRecord("y"))
    assert len(a) == 1 and not record._collectors
    record.forget()


def test_import_is_cheap():
    code = (
        "import sys, fusionc, fusionc.cli; fusionc.explain; assert not {'torch', 'rich', 'networkx'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(not REAL, reason="fusionc.backend does not exist yet")
def test_real_backend():
    torch._dynamo.reset()
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU())
    with torch.no_grad():
        found = explain(model, torch.randn(4, 8))
    assert [g.stage for g in found.graphs] == ["inference"]
    assert "gelu" in found.graphs[0].kernels[0].name and found.graphs[0].kernels[0].name in str(found)
    found = explain(model, torch.randn(4, 8))
    assert [g.stage for g in found.graphs] == ["forward", "backward"]
    assert all(p.grad is None for p in model.parameters())
