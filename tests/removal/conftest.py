"""Each test starts without compiled code and with every warning still to be given."""

from __future__ import annotations

import pytest
import torch

from fusionc.errors import reset_warnings


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    reset_warnings()
