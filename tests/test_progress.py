"""The progress bar: wired to the kernel compile loop, silent where it should be, harmless when it fails."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fusionc.progress import Progress, progress


def two(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return (x.softmax(-1) @ w).relu().sum(-1)


@pytest.mark.parametrize("target", ["cpp", "sm_90"])
def test_kernels_are_counted(
    target: str, monkeypatch: pytest.MonkeyPatch, fresh_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bars: list[Progress] = []
    shown = Progress.shown

    @contextlib.contextmanager
    def watched(self: Progress, setting: bool | str = "auto") -> Iterator[None]:
        assert setting == "auto"
        with shown(self, setting):
            bars.append(self)
            yield

    monkeypatch.setattr(Progress, "shown", watched)
    with torch.no_grad():
        torch.compile(two, backend="fusionc", options={"target": target})(torch.randn(4, 8), torch.randn(8, 4))
    (bar,) = bars
    assert bar.total == bar.done == 2
    assert capsys.readouterr().err == ""  # not a terminal


def test_a_bar_is_shown_when_asked_for(capfd: pytest.CaptureFixture[str], fresh_cache: Path) -> None:
    with progress("compiling [b]kernels[/b]", 3, True) as p:
        p.advance("[red]k0")
        p.advance(count=2)
    assert p.done == 3
    with progress("never", 3, False) as p:
        p.advance()
    assert "never" not in capfd.readouterr().err


def test_trouble_with_the_terminal_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    import rich.console

    def broken(*args: Any, **kwargs: Any) -> None:
        raise OSError("no terminal")

    monkeypatch.setattr(rich.console, "Console", broken)
    with progress("compiling", 2, True) as p:
        p.advance("a")
        p.advance("b")
    assert p.done == 2
