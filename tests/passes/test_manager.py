"""The manager: order, records, user passes by pattern and by find, disabling, failures, verification, dumps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fusionc.config import Config
from fusionc.errors import FallbackWarning, StrictError, VerifyError
from fusionc.graph import edit
from fusionc.graph.facts import Facts
from fusionc.graph.text import parse, show
from fusionc.passes import PIPELINE, pipeline, run_passes
from fusionc.passes.base import Approximate, Exact, Match, Pass, Reassociates, Refuse
from fusionc.passes.describe import PARTS, markdown, rows
from fusionc.passes.manager import run

TEXT = """
%x: f64[2, 3] = input
%s: f64[2, 3] = aten.sigmoid(%x)
%m: f64[2, 3] = aten.mul(%x, %s)
%n: f64[2, 3] = aten.neg(%m)
return (%n)
"""


class Silu(Pass):
    """x·σ(x) is silu."""

    name, exactness = "silu", Reassociates(rtol=1e-6)

    def pattern(x: Any) -> Any:
        return x * torch.sigmoid(x)

    def check(self, match: Match, facts: Facts) -> Refuse | None:
        if match.x.name == "forbidden":
            return Refuse("x is forbidden", match.x)
        return None

    def replace(x: Any) -> Any:
        return torch.nn.functional.silu(x)


class Broken(Pass):
    name, exactness = "broken", Exact()

    def find(self, facts: Facts) -> Iterator[Match]:
        for node in facts.gm.graph.find_nodes(op="call_function", target=torch.ops.aten.neg.default):
            yield Match({"node": node}, (node,))

    def replace(self, match: Match, facts: Facts) -> None:
        match.node.replace_all_uses_with(match.node.args[0])
        raise RuntimeError("half way")


class Wrong(Broken):
    """Keeps the graph running but records a layout that is not so."""

    name = "wrong"

    def replace(self, match: Match, facts: Facts) -> None:
        match.node.meta["val"] = edit.fake_empty(match.node.meta["val"], (6,))


class Rough(Silu):
    name, exactness = "rough", Approximate("for the test")


def test_pattern_pass() -> None:
    gm, records = run_passes(parse(TEXT), "graph", Config(passes=(Silu(),), verify=True))
    assert "\n" + show(gm) == """
%x: f64[2, 3] = input
%silu: f64[2, 3] = aten.silu(%x)
%n: f64[2, 3] = aten.neg(%silu)
return (%n)
"""
    assert [(r.name, r.fired) for r in records if r.fired] == [("silu", 1)]
    x = torch.randn(2, 3, dtype=torch.float64)
    torch.testing.assert_close(gm.forward(x)[0], parse(TEXT).forward(x)[0])
    assert next(n for n in gm.graph.nodes if n.name == "silu").meta["fusionc_from"] == ("s", "m")


def test_refusal_is_recorded_once() -> None:
    gm, (record,) = run([(1, Silu())], parse(TEXT.replace("%x", "%forbidden")), "graph")
    assert record.fired == 0
    assert [(r.pass_name, r.reason, r.node) for r in record.refusals] == [("silu", "x is forbidden", "forbidden")]


def test_replacement_of_another_type_is_refused() -> None:
    class Half(Silu):
        name = "half"

        def replace(x: Any) -> Any:
            return torch.nn.functional.silu(x).half()

    gm, (record,) = run([(1, Half())], parse(TEXT), "graph")
    assert "\n" + show(gm) == TEXT and record.fired == 0
    assert [r.reason for r in record.refusals] == ["the replacement has another shape, stride or dtype"]


def test_model_level_pattern_pass() -> None:
    class Model(Silu):
        level = "model"

    class M(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.sigmoid(x).mul(x).neg()

    seen: list[Any] = []

    def backend(gm: Any, inputs: Any) -> Any:
        before = list(gm.graph.nodes)
        new, records = run_passes(gm, "model", Config(passes=(Model(),)), inputs)
        assert list(gm.graph.nodes) == before and new is not gm  # Dynamo's graph is left alone
        seen.append((show(new), records))
        return new.forward

    x = torch.randn(2, 3)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(M(), backend=backend)(x), M()(x))
    assert "silu(" in seen[0][0] and "sigmoid" not in seen[0][0]


def test_a_failing_pass_is_undone_and_named() -> None:
    config = Config(passes=(Silu(), Broken()))
    with pytest.warns(FallbackWarning, match="pass 'broken' failed and was skipped"):
        gm, records = run_passes(parse(TEXT), "graph", config)
    assert "aten.silu" in show(gm) and "aten.neg" in show(gm)
    record = next(r for r in records if r.name == "broken")
    assert record.fired == 0 and [r.reason for r in record.refusals] == ["failed: RuntimeError: half way"]
    assert [r.position for r in records] == sorted(r.position for r in records)
    with pytest.raises(StrictError, match="'broken' failed"):
        run_passes(parse(TEXT), "graph", Config(passes=(Broken(),), strict=True))


def test_verification_names_the_pass() -> None:
    with pytest.raises(VerifyError, match="after pass wrong"):
        run_passes(parse(TEXT), "graph", Config(passes=(Wrong(),), verify=True))


def test_disable_and_approximate() -> None:
    left = [item.name for _, item in pipeline("graph", Config(disable=("cse", "reinplace")))]
    assert "strip" in left and not {"cse", "reinplace"} & set(left)
    names = [item.name for _, item in pipeline("graph", Config(passes=(Rough(),)))]
    assert "rough" in names  # named by the user: it runs
    from fusionc.passes.manager import named_approximate

    assert not named_approximate(Rough(), Config())


def test_texts_only_for_a_dump(tmp_path: Any) -> None:
    for dump in (None, str(tmp_path)):
        _, records = run_passes(parse(TEXT), "graph", Config(passes=(Silu(),), dump=dump))
        for record in records:
            assert (record.before is not None) == (record.after is not None) == bool(dump and record.fired)
    record = next(r for r in records if r.fired)
    assert "sigmoid" in record.before and "silu" in record.after


def test_pipeline_is_ordered_and_described() -> None:
    positions = [step.position for step in PIPELINE]
    assert positions == sorted(positions) and all(step.word for step in PIPELINE)
    for row in rows():
        assert tuple(row.parts) == PARTS and all(row.parts.values()), row.name
        assert row.summary
    assert markdown().count("\n") == len(rows()) + 2
