"""Launches the C++ depthwise convolution: which variant for which sizes, built once, called through ctypes.

Fixed rules, measured on an EPYC with AVX-512: tiles that divide the image; a vector no wider than the rows are long; strips
of rows whose copy stays within half of a core's second-level cache.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..codegen.cpp_prelude import PRELUDE
from ..codegen.templates.depthwise_cpp import Variant, text
from ..ops.layout import is_last, layout_of, out_sizes
from . import tune
from .compile_cpp import build
from .environment import environment_key

_SCRATCH = 512 * 1024  # bytes of copied rows
_NARROW = 8  # columns of contiguous images up to which a vector holds channels
_lock = threading.Lock()
_functions: dict[Variant, Callable[..., int]] = {}


def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int],
              dilation: Sequence[int], activation: str) -> Tensor:  # fmt: skip
    """x [N, C, H, W] contiguous or channels-last, weight [C, 1, kh, kw], bias [C] → [N, C, H', W'] of x's layout.

    Raises CompileError where the kernel cannot be built and MemoryError where scratch memory is out.
    """
    n, channels, height, width = x.shape
    last, layout = is_last(x), layout_of(x)
    x, weight = x if last else x.contiguous(), weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    kernel = (weight.shape[2], weight.shape[3])
    rows, columns = out_sizes((height, width), kernel, stride, padding, dilation)
    out = torch.empty((n, channels, rows, columns), dtype=x.dtype, memory_format=layout)
    if out.numel() == 0:
        return out
    kinds = (str(x.dtype)[6:], str((x if bias is None else bias).dtype)[6:])
    chosen = variant(*kinds, kernel, tuple(stride), tuple(dilation), last, activation, rows, columns)
    strip = strip_rows(chosen, rows, width + 2 * padding[1])
    failed = _function(chosen)(x.data_ptr(), weight.data_ptr(), None if bias is None else bias.data_ptr(), out.data_ptr(),
                               n, channels, height, width, rows, columns, *padding, strip)  # fmt: skip
    if failed:
        raise MemoryError("no memory for a depthwise convolution's scratch rows")
    return out


@functools.lru_cache(maxsize=512)
def variant(dtype: str, bias: str, kernel: Any, stride: Any, dilation: Any, last: bool, activation: str, rows: int,
            columns: int) -> Variant:  # fmt: skip
    """The tile for these sizes of the result."""
    if last or columns <= _NARROW:
        width = min((t for t in (14, 12, 10, 8, 7, 6, 5, 4, 3, 2, 1) if t <= columns), key=lambda t: (-(-columns // t) * t, -t))
        return Variant(dtype, bias, kernel, stride, dilation, "last" if last else "channels", activation, 16, 1, width)
    lanes = 8 if columns <= 8 else 16
    share = -(-rows // dilation[0])  # rows of one remainder
    tile = min((r for r in (8, 7, 6, 5, 4, 3, 2, 1) if r <= share), key=lambda r: (-(-share // r) * r + (8 - r) // 3, -r))
    return Variant(dtype, bias, kernel, stride, dilation, "rows", activation, lanes, tile, 1)


def strip_rows(chosen: Variant, rows: int, width: int) -> int:
    """Rows of the result to make at a time."""
    row = 4 * (width + 16) * (1 if chosen.layout == "rows" else chosen.lanes)
    halo = (chosen.kernel[0] - 1) * chosen.dilation[0]
    fit = (_SCRATCH // row - halo) // chosen.stride[0]
    least = max(8, halo, chosen.rows * chosen.dilation[0])
    return min(rows, max(fit, least))


def _function(chosen: Variant) -> Callable[..., int]:
    found = _functions.get(chosen)
    if found is None:
        with _lock:
            result = build([(chosen.symbol, text(chosen))], tune._cache(), environment_key("cpu"), PRELUDE)
            if chosen.symbol in result.errors:
                raise result.errors[chosen.symbol]
            kinds = [ctypes.c_void_p] * 4 + [ctypes.c_int64] * 9
            found = _functions[chosen] = ctypes.CFUNCTYPE(ctypes.c_int, *kinds)(result.addresses[chosen.symbol])
    return found
