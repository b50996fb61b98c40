"""Kernels that do not run: the reference computes the result, with one warning."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fusionc.errors import CompileError
from fusionc.ops import late


def test_a_kernel_that_does_not_build_costs_no_answer() -> None:
    def find() -> Any:
        def kernel(x: int) -> int:
            raise CompileError("one_row", None, "out of resource: shared memory")

        return kernel

    run = late(find, "an_operator", lambda x: x + 1)
    with pytest.warns(UserWarning, match="an_operator does not run here"):
        assert run(1) == 2
    assert run(2) == 3


def test_memory_is_the_callers_matter() -> None:
    def kernel(x: int) -> int:
        raise torch.OutOfMemoryError("no memory")

    with pytest.raises(torch.OutOfMemoryError):
        late(lambda: kernel, "an_operator", lambda x: x)(1)
