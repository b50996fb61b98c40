"""Settings of every test: verification on, a cache of the run's own, one thread, fixed seeds, nothing left compiled."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before torch is imported. Test processes run side by side, one a core.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["FUSIONC_VERIFY"] = "1"
for _name in ("FUSIONC_DUMP", "FUSIONC_TARGET"):
    os.environ.pop(_name, None)


@pytest.fixture(scope="session", autouse=True)
def _cache_of_this_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """All processes of one run share one cache folder that starts empty; the user's own is never touched."""
    base = tmp_path_factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        base = base.parent
    patch = pytest.MonkeyPatch()
    patch.setenv("FUSIONC_CACHE", str(base / "fusionc-cache"))
    patch.setenv("XDG_CACHE_HOME", str(base / "xdg-cache"))
    yield
    patch.undo()


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    """Same random numbers for every test in any order; compiled code and warnings do not reach the next test."""
    if "torch" in sys.modules:
        import torch

        torch.manual_seed(0)
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    yield
    if "torch._dynamo" in sys.modules:
        sys.modules["torch"]._dynamo.reset()
    if "fusionc.errors" in sys.modules:
        sys.modules["fusionc.errors"].reset_warnings()


@pytest.fixture
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder for this test alone."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("FUSIONC_CACHE", str(folder))
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    wanted = [item for item in items if item.get_closest_marker("gpu")]
    if wanted:
        import torch

        if not torch.cuda.is_available():
            for item in wanted:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
