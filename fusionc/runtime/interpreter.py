"""Triton's interpreter for one kernel on CPU tensors, without TRITON_INTERPRET in the environment.

Triton's interpreter (3.6–3.7) lacks a few things, which are supplied while our kernel runs and taken back afterwards:

- reductions and scans with a combine function of our own run element by element in Python: here the same function is
  applied to whole halves;
- fp32 → bf16 truncates: here it rounds to nearest even, as on every GPU;
- `tl.dot` multiplies the bit patterns of bf16 (triton issue 11584): here their values;
- the device library (`libdevice`) is missing: here torch computes it;
- a comparison of two numbers becomes floats in a block: here it stays bits;
- `range` over a size fails with numpy 2.4 and later: one-element arrays are integers again.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

lock = threading.RLock()  # triton's interpreter patches module globals: one kernel at a time

_LIBRARY = {
    **{n: n for n in ("exp", "exp2", "expm1", "log1p", "log10", "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh")},
    **{n: n for n in ("asinh", "acosh", "atanh", "erfc", "lgamma", "pow", "atan2", "fmod", "trunc")},
    "nearbyint": "round",
}


class DeviceLibrary:
    """Stands for `triton.language.extra.libdevice` inside an interpreted module."""

    def __getattr__(self, name: str) -> Any:
        if name == "fmod":  # torch's vectorised one gives NaN for quotients beyond 2^53

            def fn(a: Any, b: Any) -> Any:
                return torch.from_numpy(np.asarray(np.fmod(a.numpy(), b.numpy())))
        else:
            fn = getattr(torch, _LIBRARY[name])

        def call(*args: Any) -> Any:
            import triton.language as tl
            from triton.runtime.interpreter import TensorHandle

            arrays = [torch.from_numpy(np.array(a.handle.data)) for a in args]
            out = fn(*arrays).numpy()
            scalar = args[0].dtype
            kind = tl.block_type(scalar, list(out.shape)) if any(a.type.is_block() for a in args) else scalar
            return tl.tensor(TensorHandle(out, scalar), kind)

        return call


def _combine(op: Any, left: list[np.ndarray], right: list[np.ndarray], kinds: list[Any]) -> list[np.ndarray]:
    parts = [op.to_tensor(x, k) for x, k in zip(left + right, kinds + kinds, strict=True)]
    out = op.combine_fn.fn(*parts)
    return [t.handle.data for t in (out if isinstance(out, tuple) else (out,))]


def _reduce(self: Any, input: Any) -> list[Any]:
    """Pairwise reduction of whole halves along the axis."""
    kinds = [t.dtype for t in input]
    arrays = [t.handle.data for t in input]
    axis = self.axis
    if axis is None:
        arrays, axis = [a.reshape(-1) for a in arrays], 0
    arrays = [np.moveaxis(a, axis, 0) for a in arrays]
    while len(arrays[0]) > 1:
        even = len(arrays[0]) // 2 * 2
        merged = _combine(self, [a[0:even:2] for a in arrays], [a[1:even:2] for a in arrays], kinds)
        arrays = [np.concatenate([m, a[even:]]).astype(a.dtype) for m, a in zip(merged, arrays, strict=True)]
    out = []
    for a, kind in zip(arrays, kinds, strict=True):
        a = np.moveaxis(a, 0, axis)
        out.append(self.to_tensor(a if self.keep_dims else a.squeeze(axis), kind))
    return out


def _scan(self: Any, input: Any) -> list[Any]:
    """Inclusive scan by doubling distances along the axis."""
    kinds = [t.dtype for t in input]
    arrays = [np.moveaxis(t.handle.data, self.axis, 0).copy() for t in input]
    distance = 1
    while distance < len(arrays[0]):
        # whole arrays, because the interpreter wants powers of two; the first `distance` elements stay as they are
        shifted = [np.concatenate([a[:distance], a[:-distance]]) for a in arrays]
        merged = _combine(self, shifted, arrays, kinds)
        arrays = [np.concatenate([a[:distance], m[distance:]]).astype(a.dtype) for a, m in zip(arrays, merged)]
        distance *= 2
    return [self.to_tensor(np.moveaxis(a, 0, self.axis), k) for a, k in zip(arrays, kinds, strict=True)]


@contextlib.contextmanager
def repaired() -> Iterator[None]:
    """Triton's interpreter with the repairs above; hold `lock`."""
    import triton.language as tl
    from triton.runtime import interpreter

    convert, patch = interpreter._convert_float, interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.reshape(())))

    def convert_float(data: Any, src: Any, dst: Any, mode: Any) -> Any:
        if src == tl.float32 and dst == tl.bfloat16:
            rounded = torch.from_numpy(np.array(data, dtype=np.float32)).to(torch.bfloat16)
            return rounded.view(torch.int16).numpy().view(np.uint16)
        if src == tl.bfloat16 and dst == tl.float32:
            return (np.asarray(data).astype(np.uint32) << 16).view(np.float32)
        return convert(data, src, dst, mode)

    def numbers(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle(convert_float(handle.data, tl.bfloat16, tl.float32, None), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *more: Any) -> Any:
        return dot(self, numbers(a), numbers(b), d, *more)

    def create_splat(self: Any, kind: Any, number: Any) -> Any:
        out = splat(self, kind, number)
        if number.data.dtype != np.bool_ or out.data.dtype == np.bool_:
            return out
        return interpreter.TensorHandle(out.data.astype(np.bool_), tl.int1)  # it says that it is of its operands' type

    dot, splat = interpreter.InterpreterBuilder.create_dot, interpreter.InterpreterBuilder.create_splat
    changes = [
        (interpreter, "_convert_float", convert_float),
        (interpreter.InterpreterBuilder, "create_dot", create_dot),
        (interpreter.InterpreterBuilder, "create_splat", create_splat),
        (interpreter, "_patch_lang_tensor", patch_lang_tensor),
        (interpreter.ReduceOps, "generic_reduce", _reduce),
        (interpreter.ScanOps, "generic_scan", _scan),
    ]
    saved = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    for owner, name, value in changes:
        setattr(owner, name, value)
    try:
        with np.errstate(all="ignore"):
            yield
    finally:
        for owner, name, value in saved:
            setattr(owner, name, value)
