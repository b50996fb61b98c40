"""When the rows of a reduction are too few to keep a GPU busy: the rule that passes and grouping share."""

from __future__ import annotations

from typing import Any

import torch

FEW_ROWS, LONG_AXIS = 32, 16384
# Where memory runs along the rows (statistics of channels-last images) a program takes 16 or 32 of them side by side.
FEW_COLUMNS, LONG_COLUMNS = 512, 2048


def scarce(rows: int, length: int, columns: bool) -> bool:
    """Is a reduction of so many rows of this length to be split over programs?

    Of a shorter axis one program makes less than the launch of a second kernel would cost. H200, statistics of
    64×64×112×112 channels-last: 64 columns are four programs, which took the whole of 16 ms.
    """
    if columns and rows <= FEW_COLUMNS and length >= LONG_COLUMNS:
        return True
    return rows < FEW_ROWS and length >= LONG_AXIS


def along_rows(like: Any, dims: Any) -> bool:
    """Does the memory of a tensor run along dimensions that are not reduced?"""
    if not isinstance(like, torch.Tensor) or not like.dim():
        return False
    reduced = {d % like.dim() for d in dims}
    known = [(size, step, d) for d, (size, step) in enumerate(zip(like.shape, like.stride())) if isinstance(step, int)]
    fixed = [(step, d) for size, step, d in known if step > 0 and not (isinstance(size, int) and size == 1)]
    return bool(fixed) and min(fixed)[1] not in reduced
