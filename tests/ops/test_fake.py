"""Operators' results for fake tensors are registered, by torch's own function where its insides have changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fusionc.ops.fake import register_fake


@pytest.mark.parametrize("changed", [False, True])
def test_fake_results(changed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    library = torch.library.Library(f"fusionc_test_{changed}", "FRAGMENT")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: torch.cat([x, x]), "CompositeExplicitAutograd")
    if changed:
        asked: list[str] = []
        public = torch.library.register_fake
        monkeypatch.setattr(torch._library.simple_registry, "singleton", None)
        monkeypatch.setattr(torch.library, "register_fake", lambda name, made, lib: asked.append(name))
        register_fake("fusionc_test_True::twice", twice, library)
        assert asked == ["fusionc_test_True::twice"]
        monkeypatch.undo()
        public("fusionc_test_True::twice", twice, lib=library)
    else:
        register_fake("fusionc_test_False::twice", twice, library)
    with FakeTensorMode():
        x = torch.empty(3, 4)
        made = getattr(torch.ops, f"fusionc_test_{changed}").twice(x)
    assert made.shape == (6, 4)


def twice(x: torch.Tensor) -> Any:
    return x.new_empty((2 * x.shape[0], *x.shape[1:]))


def test_an_operator_is_registered_once() -> None:
    library = torch.library.Library("fusionc_test_once", "FRAGMENT")
    library.define("twice(Tensor x) -> Tensor")
    register_fake("fusionc_test_once::twice", twice, library)
    with pytest.raises(RuntimeError):
        register_fake("fusionc_test_once::twice", twice, library)
