"""``fusionc::grouped_rows``: groups of a few rows, each times a matrix of its own, as tokens times their experts.

x [R, K] with dense rows, in groups one after the other: group e ends before row ``ends[e]`` (int32 [E], not falling, at
most R).  weight [E, N, K], as a linear layer stores it.  Returns [R, N], contiguous, in x's dtype: row r of group e is
x[r] weight[e]ᵀ.  Rows behind the last group are not written.  (Where N is no multiple of 8 ATen pads the rows of its
result; the pass does not make such calls.)

The kernel takes 16 bits; the rest, and a CPU, is computed by ATen.
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from . import late
from .fake import register_fake

ROWS = 512  # of all groups together; with more the library's tiles are full

_library = torch.library.Library("fusionc", "FRAGMENT")
_library.define("grouped_rows(Tensor x, Tensor weight, Tensor ends) -> Tensor")


def reference(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """The operator in ATen."""
    return torch.ops.aten._grouped_mm.default(x, weight.transpose(1, 2), ends)  # type: ignore[no-any-return]


def _shape(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[1]))


_library.impl("grouped_rows", reference, "CPU")
_library.impl(
    "grouped_rows",
    late(lambda: importlib.import_module("fusionc.targets.grouped_rows").grouped_rows, "grouped_rows", reference),
    "CUDA",
)
register_fake("fusionc::grouped_rows", _shape, _library)
