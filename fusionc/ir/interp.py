"""Run a Kernel with torch on the CPU: the oracle that every renderer is compared with.

Every node becomes one tensor with a dimension for each loop and each axis variable, of length 1 where the node does
not depend on it, so a kernel costs a handful of torch calls however large it is.  Nothing is fused, reordered or
approximated: values are computed in the dtypes the IR declares (or all floats in float64 with `upcast`, to tell
rounding from wrong).  An index outside its buffer raises IndexError instead of reading something.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .expr import Const, Expr, FloorDiv, Index, Load, Mod, Op, Reduce, Scan, Size, Var, flat, index
from .loop import Kernel, evaluate

TORCH_DTYPE = {
    "b1": torch.bool,
    "u8": torch.uint8,
    "i8": torch.int8,
    "i16": torch.int16,
    "i32": torch.int32,
    "i64": torch.int64,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "f32": torch.float32,
    "f64": torch.float64,
}
_CHUNK = 1 << 22  # points evaluated at once


def run(
    kernel: Kernel, buffers: dict[str, Tensor], sizes: dict[str, int] | None = None, *, upcast: bool = False
) -> None:
    """Execute `kernel` on `buffers` (1-D CPU tensors by buffer name), writing its "out" and "inout" buffers in place.

    `sizes` gives the value of each Size by name.  With `upcast` all float arithmetic happens in float64 and casts
    between float dtypes do nothing; outputs may then be float64 tensors.  Raises IndexError for an access outside a
    buffer and KeyError for a missing buffer or size.
    """
    sizes = sizes or {}
    loops = [evaluate(v.extent, sizes) for v in kernel.loops]
    axis = [evaluate(v.extent, sizes) for v in kernel.axis]
    if any(n == 0 for n in loops):
        return
    parts = 1 if kernel.part is None else evaluate(kernel.part.extent, sizes)
    boxes = list(_shares(loops, parts)) if kernel.columns else _chunks(loops, math.prod(axis))
    for share, box in enumerate(boxes):
        frame = Frame(kernel, buffers, sizes, box, axis, upcast, share)
        # all values before all writes: an "inout" buffer is read at the point that writes it
        writes = [(s.buffer, *frame.store(s.index, s.value, True, s.inner)) for s in kernel.stores]
        writes += [(s.buffer, *frame.store(s.index, s.value, False, True)) for s in kernel.columns]
        for name, where, value in writes:
            buffers[name][where] = value.to(buffers[name].dtype)


def _chunks(loops: list[int], inner: int) -> Iterator[list[range]]:
    """Boxes that cover the loops, each of about _CHUNK points."""
    steps = list(loops)
    for k in range(len(steps)):
        rest = math.prod(steps[:k]) * math.prod(steps[k + 1 :]) * max(inner, 1)
        if rest * steps[k] > _CHUNK:
            steps[k] = max(1, _CHUNK // rest)
    pieces = [[range(lo, min(lo + s, n)) for lo in range(0, n, s)] for n, s in zip(loops, steps, strict=True)]
    return (list(box) for box in itertools.product(*pieces))


def _shares(loops: list[int], parts: int) -> Iterator[list[range]]:
    """The loops of every part: the points whose flat position is p modulo `parts`; several loops are masked later."""
    for p in range(parts):
        yield [range(p, loops[0], parts)] if len(loops) == 1 else [range(m) for m in loops]


class Frame:
    """Values of all nodes on one box of the loops."""

    def __init__(
        self,
        kernel: Kernel,
        buffers: dict[str, Tensor],
        sizes: dict[str, int],
        box: list[range],
        axis: list[int],
        upcast: bool,
        share: int = 0,
    ):
        self.buffers, self.sizes, self.upcast = buffers, sizes, upcast
        self.shape = [len(r) for r in box] + axis
        self.rows = len(box)
        self.memo: dict[int, Tensor] = {}
        self.kernel = kernel
        for d, v in enumerate(kernel.loops + kernel.axis):
            r = box[d] if d < self.rows else range(axis[d - self.rows])
            shape = [1] * len(self.shape)
            shape[d] = len(r)
            self.memo[v.uid] = (torch.arange(len(r), dtype=torch.int64) * r.step + r.start).reshape(shape)
        if kernel.part is not None:
            self.memo[kernel.part.uid] = self.full(share, "i64")

    def dtype(self, name: str) -> torch.dtype:
        return torch.float64 if self.upcast and name in ("f16", "bf16", "f32") else TORCH_DTYPE[name]

    def store(self, at: Index, value: Expr, rows: bool, inner: bool) -> tuple[Tensor, Tensor]:
        """Flat positions and values of a store once a point of the loops (`rows`) and of the axis (`inner`)."""
        shape = [n if (rows if d < self.rows else inner) else 1 for d, n in enumerate(self.shape)]
        where, what = self(at).expand(shape).reshape(-1), self(value).expand(shape).reshape(-1)
        return where, what

    def full(self, value: object, dtype: str) -> Tensor:
        return torch.full([1] * len(self.shape), value, dtype=self.dtype(dtype))  # type: ignore[arg-type]

    def __call__(self, e: Expr) -> Tensor:
        out = self.memo.get(e.uid)
        if out is None:
            # an explicit stack: expressions of long chains are deeper than Python's recursion limit
            stack = [e]
            while stack:
                node = stack[-1]
                missing = [c for c in node.children() if c.uid not in self.memo]
                if missing:
                    stack.extend(missing)
                else:
                    stack.pop()
                    if node.uid not in self.memo:
                        self.memo[node.uid] = self.evaluate(node)
            out = self.memo[e.uid]
        return out

    def evaluate(self, e: Expr) -> Tensor:
        if isinstance(e, Index):
            total = self.full(0, "i64")
            for m, c in e.terms:
                part = self.full(c, "i64")
                for a in m:
                    part = part * self(a)
                total = total + part
            return total
        if isinstance(e, Const):
            return self.full(e.value, e.dtype)
        if isinstance(e, Size):
            return self.full(self.sizes[e.name], "i64")
        if isinstance(e, FloorDiv):
            return torch.div(self(e.dividend), self(e.divisor), rounding_mode="floor")
        if isinstance(e, Mod):
            return torch.remainder(self(e.dividend), self(e.divisor))
        if isinstance(e, Load):
            return self.load(e)
        if isinstance(e, Op):
            return self.op(e)
        if isinstance(e, Reduce):
            return self.reduce(e)
        if isinstance(e, Scan):
            dim = self.rows + self.kernel.axis.index(e.var)
            body = self(e.body)
            body = body.expand([self.shape[d] if d == dim else n for d, n in enumerate(body.shape)])
            if e.kind in ("sum", "prod"):
                fn = torch.cumsum if e.kind == "sum" else torch.cumprod
                return fn(body, dim, dtype=self.dtype(e.dtype))
            return (torch.cummax if e.kind == "max" else torch.cummin)(body, dim).values
        if isinstance(e, Var):
            raise KeyError(f"variable {e.name} is neither a loop nor an axis of the kernel")
        raise TypeError(f"no evaluation for {type(e).__name__}")

    def load(self, e: Load) -> Tensor:
        data = self.buffers[e.buffer]
        at = self(e.index)
        if e.guard is not None:
            assert e.other is not None
            guard = self(e.guard)
            at, guard = torch.broadcast_tensors(at, guard)
            at = torch.where(guard, at, 0)
            if not bool(guard.any()):
                return self.full(e.other.value, e.dtype)
        if at.numel() and (int(at.min()) < 0 or int(at.max()) >= data.numel()):
            span = f"{int(at.min())}..{int(at.max())}"
            raise IndexError(f"load {e!r} reads elements {span} of {e.buffer}, which has {data.numel()}")
        value = data[at].to(self.dtype(e.dtype))
        if e.guard is not None and e.other is not None:
            value = torch.where(guard, value, self.full(e.other.value, e.dtype))
        return value

    def op(self, e: Op) -> Tensor:
        args = [self(a) for a in e.args]
        if e.name == "cast":
            return args[0].to(self.dtype(e.dtype))
        if e.name == "check_index":
            i, n = args
            i = torch.where(i < 0, i + n, i)
            if i.numel() and bool(((i < 0) | (i >= n)).any()):
                raise IndexError(f"{e!r}: index {int(i.min())}..{int(i.max())} is outside the size {int(n.max())}")
            return i
        out = _OPS[e.name](*args)
        return out.to(self.dtype(e.dtype))

    def reduce(self, e: Reduce) -> Tensor:
        body = self(e.body)
        if self.kernel.is_column_sum(e):
            body = body.expand(self.shape[: self.rows] + list(body.shape[self.rows :]))
            part = self.kernel.part
            if part is not None and self.rows > 1:
                mine = self(flat(self.kernel.loops) % part.extent - index(part)) == 0
                body = torch.where(mine, body, torch.zeros_like(body))
            return body.sum(list(range(self.rows)), keepdim=True, dtype=self.dtype(e.dtype))
        keep = list(body.shape[: self.rows])
        body = body.expand(keep + self.shape[self.rows :]).reshape([*keep, math.prod(self.shape[self.rows :])])
        dtype = self.dtype(e.dtype)
        if body.shape[-1] == 0 and e.kind in ("max", "min", "argmax", "argmin"):
            out = self.full(0, e.dtype)
        elif e.kind in ("sum", "prod"):
            out = getattr(torch, e.kind)(body, -1, dtype=dtype)
        elif e.kind in ("max", "min"):
            out = torch.amax(body, -1) if e.kind == "max" else torch.amin(body, -1)
        elif e.kind in ("any", "all"):
            out = getattr(torch, e.kind)(body, -1)
        else:
            body = body.to(torch.uint8) if body.dtype == torch.bool else body
            out = torch.argmax(body, -1) if e.kind == "argmax" else torch.argmin(body, -1)
        return out.to(dtype).reshape(keep + [1] * len(self.kernel.axis))


def _sign(x: Tensor) -> Tensor:
    return torch.where(torch.isnan(x), x, torch.sign(x)) if x.is_floating_point() else torch.sign(x)


def _divide(mode: str) -> Callable[[Tensor, Tensor], Tensor]:
    def fn(a: Tensor, b: Tensor) -> Tensor:
        if a.is_floating_point():
            return torch.div(a, b, rounding_mode=mode)
        a, b = torch.broadcast_tensors(a, b)
        return torch.div(a, torch.where(b == 0, 1, b), rounding_mode=mode)

    return fn


def _mod(a: Tensor, b: Tensor) -> Tensor:
    return torch.remainder(a, b if a.is_floating_point() else torch.where(b == 0, 1, b))


def _fmod(a: Tensor, b: Tensor) -> Tensor:
    return torch.fmod(a, b if a.is_floating_point() else torch.where(b == 0, 1, b))


def _words(text: str) -> list[str]:
    return text.split()


_SAME_AS_TORCH = """
neg sqrt rsqrt exp exp2 expm1 log log1p log2 log10 sin cos tan asin acos atan sinh cosh tanh asinh acosh atanh erf erfc
lgamma sigmoid floor ceil round trunc isnan isinf signbit atan2 copysign pow eq ne lt le gt ge add sub mul
"""
_OPS: dict[str, Callable[..., Tensor]] = {
    **{name: getattr(torch, name) for name in _words(_SAME_AS_TORCH)},
    "abs": torch.abs,
    "sign": _sign,
    "not": torch.bitwise_not,
    "div": torch.true_divide,
    "floordiv": _divide("floor"),
    "truncdiv": _divide("trunc"),
    "mod": _mod,
    "fmod": _fmod,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "fmax": torch.fmax,
    "fmin": torch.fmin,
    "and": torch.bitwise_and,
    "or": torch.bitwise_or,
    "xor": torch.bitwise_xor,
    "shl": torch.bitwise_left_shift,
    "shr": torch.bitwise_right_shift,
    "where": torch.where,
}
