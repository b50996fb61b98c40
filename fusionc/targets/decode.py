"""`fusionc::decode_attention` and `fusionc::decode_attention_update` on a GPU: ranges of the cache, scratch, launch."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..codegen.templates.decode_attention import TEXT, ranges, warps
from ..ops import decode_attention as op
from ..runtime.counters import zeros
from ..runtime.device import properties
from ..runtime.templates import POINTER, Template, template
from ..runtime.tune import Wanted
from .skinny import dependent, generation


def decode_attention(q: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, chained: bool) -> Tensor:
    """See `ops.decode_attention`."""
    if not _fits(q, key, value, mask, None, None, q, q):
        return op.attention(q, key, value, mask, scale)
    return _run(q, q, q, None, None, key, value, None, mask, scale, chained)


def decode_attention_update(q: Tensor, k: Tensor, v: Tensor, cos: Tensor | None, sin: Tensor | None, key: Tensor,
                            value: Tensor, index: Tensor, mask: Tensor | None, scale: float, chained: bool) -> Tensor:
    """See `ops.decode_attention`."""
    if not _fits(q, key, value, mask, cos, sin, k, v) or index.dtype is not torch.int64 or index.numel() != 1:
        return op.update(q, k, v, cos, sin, key, value, index, mask, scale)
    return _run(q, k, v, cos, sin, key, value, index, mask, scale, chained)


def _run(q: Tensor, k: Tensor, v: Tensor, cos: Tensor | None, sin: Tensor | None, key: Tensor, value: Tensor,
         index: Tensor | None, mask: Tensor | None, scale: float, chained: bool) -> Tensor:  # fmt: skip
    batch, heads, _, width = q.shape
    groups = key.shape[1]
    kernel, count = _kernel_of(q, k, v, cos, key, value, index is not None, mask, scale, chained)
    device = q.device.index
    stream = torch._C._cuda_getCurrentRawStream(device)
    out = torch.empty((batch, 1, heads, width), dtype=q.dtype, device=q.device)
    spare = out.data_ptr()
    part, counters = out, out
    if count > 1:
        part = torch.empty(batch * groups * count * (16 * width + 32), dtype=torch.float32, device=q.device)
        counters = zeros(batch * groups, q.device, stream)
    kernel.launch(
        batch * groups * count, stream, q.data_ptr(), k.data_ptr(), v.data_ptr(),
        spare if cos is None else cos.data_ptr(), spare if sin is None else sin.data_ptr(), key.data_ptr(),
        value.data_ptr(), spare if index is None else index.data_ptr(), spare if mask is None else mask.data_ptr(),
        spare, part.data_ptr(), counters.data_ptr(),
    )  # fmt: skip
    return out


def wanted(q: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, chained: bool) -> Wanted | None:
    """What `decode_attention` will compile, by tensors without data; None where that is ATen."""
    if not _fits(q, key, value, mask, None, None, q, q, data=False):
        return None
    return _wanted(_kernel_of(q, q, q, None, key, value, False, mask, scale, chained)[0])


def wanted_update(q: Tensor, k: Tensor, v: Tensor, cos: Tensor | None, sin: Tensor | None, key: Tensor, value: Tensor,
                  index: Tensor, mask: Tensor | None, scale: float, chained: bool) -> Wanted | None:  # fmt: skip
    """The same for `decode_attention_update`."""
    if not _fits(q, key, value, mask, cos, sin, k, v, data=False) or index.dtype is not torch.int64 or index.numel() != 1:
        return None
    return _wanted(_kernel_of(q, k, v, cos, key, value, True, mask, scale, chained)[0])


def _wanted(kernel: Template) -> Wanted:
    return Wanted(f"decode {kernel.kinds} {kernel.constants}", (kernel,), Template.prepare)


def _kernel_of(q: Tensor, k: Tensor, v: Tensor, cos: Tensor | None, key: Tensor, value: Tensor, update: bool,
               mask: Tensor | None, scale: float, chained: bool) -> tuple[Template, int]:  # fmt: skip
    batch, heads, _, width = q.shape
    m = (0, 0, 0) if mask is None else _mask_strides(mask)
    return _kernel(
        q.dtype, heads, key.shape[1], width, key.shape[2], scale, update, cos is not None,
        None if mask is None else mask.dtype, batch,
        (q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
         0 if cos is None or cos.shape[0] == 1 else cos.stride(0), *key.stride()[:3], *value.stride()[:3], *m),
        chained and dependent(q.device), q.device,
    )  # fmt: skip


@functools.lru_cache(maxsize=1024)
def _kernel(dtype: torch.dtype, heads: int, groups: int, width: int, length: int, scale: float, update: bool, rope: bool,
            mask: torch.dtype | None, batch: int, strides: tuple[int, ...], chained: bool,
            device: torch.device) -> tuple[Template, int]:  # fmt: skip
    """The kernel and its number of ranges."""
    count, rows, step = ranges(batch * groups, length, width, properties(device).processors)
    p = POINTER[dtype]
    kinds = (p, p, p, p, p, p, p, "*i64", p if mask is None else POINTER[mask], p, "*fp32", "*i32")
    names = "QB QH KNB KNH VNB VNH CB KB KH KS VB VH VS MB MH MS".split()
    wide = max(n * step for n, step in zip((batch, groups, length) * 2, strides[7:13])) >= 1 << 30
    constants: tuple[tuple[str, Any], ...] = (
        ("H", heads), ("HKV", groups), ("D", width), ("S", length), ("SCALE", scale), ("UPDATE", update),
        ("ROPE", rope), ("MASK", 0 if mask is None else 1 if mask is torch.bool else 2), *zip(names, strides),
        ("WIDE", wide), ("PDL", chained), ("SPLITS", count), ("ROWS", rows), ("BS", step),
    )  # fmt: skip
    return template(TEXT, "decode", kinds, constants, device, warps(width, count, rows, step), 2, chained, exact=True), count


def _mask_strides(mask: Tensor) -> tuple[int, int, int]:
    return (0 if mask.shape[0] == 1 else mask.stride(0), 0 if mask.shape[1] == 1 else mask.stride(1), mask.stride(3))


def _fits(q: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, cos: Tensor | None, sin: Tensor | None,
          k: Tensor, v: Tensor, data: bool = True) -> bool:  # fmt: skip
    """Types, layouts and alignment that the kernel assumes; see `skinny.fits` for ``data``."""
    width = q.shape[3]
    if q.dtype not in (torch.bfloat16, torch.float16) or width not in (16, 32, 64, 128, 256) or torch.version.hip:
        return False
    bits = 0
    for t in (q, key, value, k, v, cos, sin):
        if t is not None:
            if t.dtype is not q.dtype or t.stride(3) != 1 or t.shape[3] != width:
                return False
            bits |= t.data_ptr() if data else 0
            for size, step in zip(t.shape[:3], t.stride()[:3]):
                bits |= step * 2 if size > 1 else 0
    if mask is not None:
        if mask.dtype not in (torch.bool, q.dtype, torch.float32):
            return False
        bits |= mask.data_ptr() if data else 0
    return q.shape[1] // key.shape[1] <= 16 and not bits & 15 and generation(q.device) >= 80
