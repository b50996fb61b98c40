"""Shared by the pass tests: graphs from text, values on real inputs, before against after in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule

from fusionc.graph.text import parse, show
from fusionc.graph.verify import mutations, verify
from fusionc.passes.base import Pass
from fusionc.passes.manager import run
from fusionc.runtime.weights import DerivedWeights


def apply(item: Pass, text: str | GraphModule, stage: str = "inference") -> tuple[GraphModule, Any]:
    """Run one pass on a graph (text), verified; returns the graph and the pass record."""
    gm = parse(text) if isinstance(text, str) else text
    before = mutations(gm)
    gm, (record,) = run([(1, item)], gm, "graph", None, stage=stage, static=gm.meta.get("fusionc_static", ()))
    verify(gm, f"after {item.name}", before)
    return gm, record


def rewritten(item: Pass, text: str, stage: str = "inference") -> str:
    """The graph's text after the pass."""
    return "\n" + show(apply(item, text, stage)[0])


def refusals(item: Pass, text: str, stage: str = "inference") -> list[str]:
    """``reason (node)`` of each refusal."""
    return [f"{each.reason} ({each.node})" for each in apply(item, text, stage)[1].refusals]


def inputs_for(gm: GraphModule, seed: int = 0) -> list[Any]:
    """Random inputs of the recorded layouts; integers are 0, so that they index anything."""
    rng = torch.Generator().manual_seed(seed)
    made: list[Any] = []
    for node in gm.graph.find_nodes(op="placeholder"):
        if node.name.startswith("derived_"):
            continue
        like = node.meta["val"]
        if not isinstance(like, torch.Tensor):
            made.append(like)
            continue
        real = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype)
        if like.dtype.is_floating_point:
            real.copy_(torch.randn(like.shape, generator=rng, dtype=torch.float64))
        else:
            real.zero_()
        made.append(real)
    return made


def call(gm: GraphModule, inputs: list[Any]) -> tuple[Any, list[Any]]:
    """(outputs, inputs after the call), on copies; derived weights are supplied."""
    mine = [x.clone() if isinstance(x, torch.Tensor) else x for x in inputs]
    extra = DerivedWeights(gm.meta.get("fusionc_derived", ())).resolve(mine)
    with torch.no_grad():
        return gm.forward(*mine, *extra), mine


def check_values(item: Pass, text: str, fired: int | None = None, exact: bool = True) -> GraphModule:
    """Same outputs and same written inputs before and after; a second run changes nothing."""
    old = parse(text)
    new, record = apply(item, text)
    if fired is not None:
        assert record.fired == fired, record
    for seed in range(2):
        inputs = inputs_for(old, seed)
        expected, found = call(old, inputs), call(new, inputs)
        if exact:
            torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
        else:
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    once = show(new)
    again, record = apply(item, new)
    assert record.fired == 0 and show(again) == once
    return new
