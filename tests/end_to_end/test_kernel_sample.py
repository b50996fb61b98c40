"""A sample of ``tests.sweeps.kernels``: the Triton kernels of one small model build everywhere and run in the interpreter."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("transformers")

from tests.sweeps import kernels

pytestmark = [pytest.mark.cross, pytest.mark.interpret]


@pytest.fixture
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
    yield
    patch.undo()


def test_kernels_of_a_model(own_cache: None) -> None:
    found = {(k["symbol"], k["loop"]): k for k in kernels.harvest({"name": "gpt2", "direction": "infer"})}
    assert len(found) >= 5
    for key in sorted(found)[:4]:
        assert kernels.judge(found[key]) == ""


def test_a_wrong_kernel_is_found(own_cache: None) -> None:
    """The judge must be able to fail: a kernel whose text adds 2 where its loop IR adds 1."""
    import torch

    from fusionc import record

    with record.collect() as made:
        torch.compile(lambda x: x + 1, backend="fusionc", options={"target": "sm_90", "cache": False})(torch.randn(64))
    (found,) = [k for graph in made for k in graph.kernels]
    entry = {"symbol": found.symbol, "plan": found.plan_json, "loop": found.loop_text, "source": found.source}
    assert kernels.judge(entry) == ""
    changed = entry["source"].replace("1.0", "2.0")
    assert changed != entry["source"] and "interpreter" in kernels.judge({**entry, "source": changed})
