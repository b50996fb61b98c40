"""The correctness probes of tests/sweeps/probes.py under fusionc (reliability goal G6)."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator

import pytest
import torch

from tests.sweeps.backends import Counting, prepared
from tests.sweeps.probes import PROBES, Probe, run_probe

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("fusionc.backend") is None, reason="the backend does not exist yet"),
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    with prepared("fusionc"):
        yield


@pytest.mark.parametrize("item", PROBES.values(), ids=PROBES.keys())
def test_probe(item: Probe) -> None:
    problem = run_probe(item, Counting("fusionc"))
    if item.dynamo_bug is not None:
        if problem is not None:
            pytest.xfail(f"Dynamo's bug {item.dynamo_bug}; no backend can repair it: {problem}")
        return
    assert problem is None, problem


class _Forgets(Counting):
    """Runs graphs on copies of their inputs, so that nothing is ever written to the caller's tensors."""

    def __call__(self, gm: torch.fx.GraphModule, example_inputs: list[object]) -> Callable[..., object]:
        self.graphs += 1
        return lambda *args: gm(*(a.clone() if isinstance(a, torch.Tensor) else a for a in args))


def test_probes_notice_a_wrong_backend() -> None:
    forgets = _Forgets("eager")
    assert "result" in (run_probe(PROBES["issue_198033_foreach_add_reads_itself"], forgets) or "")
    assert "shares memory" in (run_probe(PROBES["input_returned_as_is"], forgets) or "")
    right = Counting("eager")
    assert run_probe(PROBES["issue_198033_foreach_add_reads_itself"], right) is None
    assert run_probe(PROBES["input_returned_as_is"], right) is None
