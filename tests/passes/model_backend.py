"""Model passes on what Dynamo captures, for the tests of passes that derive weights."""

from __future__ import annotations

from typing import Any

import torch

from fusionc.passes import recipes
from fusionc.passes.manager import run_passes
from fusionc.runtime.weights import DerivedWeights


class ModelBackend:
    """Runs the model passes on Dynamo's graph and then the graph as it is, derived weights rebuilt from their recipes."""

    def __init__(self) -> None:
        self.gm: Any = None
        self.records: dict[str, Any] = {}
        self.weights: Any = None

    def __call__(self, gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        gm, records = run_passes(gm, "model", None, inputs)
        self.gm, self.records = gm, {r.name: r for r in records}
        derived = gm.meta.get("fusionc_derived", ())
        self.weights = DerivedWeights(derived)
        for each, value in zip(derived, self.weights.resolve(inputs)):
            node = next(n for n in gm.graph.find_nodes(op="placeholder") if n.target == each.name)
            recorded = node.meta["example_value"]
            assert (
                recorded.shape == value.shape and recorded.stride() == value.stride() and recorded.dtype == value.dtype
            )
            again = recipes.rebuild(each.recipe, len(each.sources))([inputs[i].detach() for i in each.sources])
            assert torch.equal(again, value) and again.stride() == value.stride()
        return lambda *args: gm.forward(*args, *self.weights.resolve(args))
