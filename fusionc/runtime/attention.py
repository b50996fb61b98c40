"""Launches the kernels of ``fusionc::attention`` (text: ``codegen/templates/attention.py``) on a GPU.

Tile sizes are chosen by measurement at the first call with given shapes. On CPU tensors the same kernels run in Triton's
interpreter, for tests; the operator itself uses its reference there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..codegen.templates import attention as template
from . import cuda_driver, interpreter, launch, tune
from .binaries import in_folder
from .launch import Compiled, load_module


@dataclass(frozen=True)
class Tile:
    """Queries and keys of one step, warps, stages of the pipeline."""

    queries: int
    keys: int
    warps: int
    stages: int


_SMALL = Tile(16, 16, 4, 1)
_FALLBACK = Tile(32, 32, 4, 1)  # fits where the others ask for too much shared memory
# By padded head size (the larger of q's and v's): first the default.
_FORWARD = {
    64: (Tile(64, 64, 4, 3), Tile(128, 64, 4, 3), Tile(128, 128, 8, 3)),
    128: (Tile(64, 64, 4, 3), Tile(128, 128, 8, 2), Tile(128, 64, 8, 3)),
    256: (Tile(128, 64, 8, 2), Tile(64, 32, 4, 2)),
}
_BACKWARD_Q = {
    64: (Tile(64, 64, 4, 3), Tile(64, 64, 4, 2), Tile(128, 64, 8, 2)),
    128: (Tile(64, 64, 4, 2), Tile(128, 64, 8, 2)),
    256: (Tile(32, 32, 4, 2), Tile(64, 32, 8, 2)),
}
_BACKWARD_KV = {
    64: (Tile(64, 64, 4, 2), Tile(64, 128, 8, 2), Tile(32, 64, 4, 2)),
    128: (Tile(32, 64, 4, 2), Tile(32, 128, 8, 2)),
    256: (Tile(32, 64, 8, 2), Tile(32, 32, 8, 2)),
}
_OPERAND = {64: (Tile(64, 64, 4, 2),), 128: (Tile(32, 64, 4, 2),), 256: (Tile(32, 32, 4, 1),)}


_NAMES = {"torch.bfloat16": "bf16", "torch.float16": "fp16", "torch.float32": "fp32", "torch.float64": "fp64",
          "torch.bool": "i1", "torch.uint8": "u8"}  # fmt: skip


def axes_of(x: Tensor) -> str:
    """The axes of "bhqk" that an operand varies with."""
    return "".join(a for a, n in zip("bhqk", x.shape) if n != 1)


def constants(d: int, e: int, group: int, queries: int, keys: int, tile: Tile) -> dict[str, int | bool]:
    """The compile-time arguments of a kernel."""
    return {"GROUP": group, "D": d, "E": e, "DP": _padded(d), "EP": _padded(e), "EVEN_Q": queries % tile.queries == 0,
            "EVEN_K": keys % tile.keys == 0, "BM": tile.queries, "BN": tile.keys}  # fmt: skip


def ast_source(fn: Any, kinds: Sequence[str], divisible: Sequence[bool], fixed: dict[str, int | bool]) -> Any:
    """What Triton compiles: run-time arguments of these kinds in order, and constants by name."""
    from triton.compiler import ASTSource

    given = iter(zip(kinds, divisible, strict=True))
    signature, attrs = {}, {}
    for i, name in enumerate(fn.arg_names):
        if name in fixed:
            signature[name] = "constexpr"
            continue
        signature[name], on = next(given)
        if on:
            attrs[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=fn, signature=signature, constexprs=fixed, attrs=attrs)


class _Prepared:
    """One kernel for one set of shapes and strides: its numbers, and a launcher for each tile that was tried."""

    def __init__(self, name: str, score: str, q: Tensor, k: Tensor, v: Tensor, operands: Sequence[Tensor],
                 strided: Sequence[Tensor], pointers: Sequence[Tensor], which: int | None) -> None:  # fmt: skip
        self.name, self.device = name, q.device
        self.axes = tuple(axes_of(x) for x in operands)
        self.batch, self.heads, self.queries, width = q.shape
        self.shared, self.keys, depth = v.shape[1:]
        self.shape = width, depth, self.heads // self.shared, self.queries, self.keys
        self.which = self.axes[which] if which is not None else ""
        numbers = [n for x in strided for n in x.stride()[:3]]
        for i in template.used(score, len(operands)):
            numbers += [n for n, a in zip(operands[i].stride(), "bhqk") if a in self.axes[i]]
        numbers += [self.batch] * (which is not None and {"q", "k"} <= set(self.which))
        numbers += [self.heads, self.queries, self.keys]
        self.module = load_module(template.source(score, self.axes, which), interpret=q.device.type != "cuda")
        self.all = tuple(numbers)
        # Strides of 1 are constants, so that a tile of a bias is read in whole lines.
        names = getattr(self.module, name).arg_names[len(pointers) :] if q.device.type == "cuda" else []
        self.ones = {n: 1 for n, x in zip(names, numbers) if x == 1 and n[0] in "sx"}
        self.numbers = tuple(x for n, x in zip(names, numbers) if n not in self.ones)
        self.kinds = [*[f"*{_NAMES.get(str(x.dtype)) or 'i' + str(8 * x.itemsize)}" for x in pointers],
                      *["i32" if abs(n) < 1 << 31 else "i64" for n in self.numbers]]  # fmt: skip
        self.divisible = [*[x.data_ptr() % 16 == 0 for x in pointers], *[n % 16 == 0 for n in self.numbers]]
        size = max(_padded(width), _padded(depth))
        table = {"forward": _FORWARD, "backward_q": _BACKWARD_Q, "backward_kv": _BACKWARD_KV}.get(name, _OPERAND)
        self.tiles = table[next(n for n in (64, 128, 256) if size <= n)]
        if self.device.type == "cuda":
            properties = torch.cuda.get_device_properties(self.device)
            if getattr(properties, "shared_memory_per_block_optin", 0) < 200_000:  # smaller than Hopper's
                self.tiles = (*self.tiles, _FALLBACK)
        words = [str(tuple(x.shape)) for x in (q, k, v)] + [str(q.dtype), *self.axes, score]
        self.key = f"attention {name} {' '.join(words)}"
        self.launchers: dict[Tile, Callable[..., None]] = {}

    def grid(self, tile: Tile) -> int:
        """Number of programs."""
        rows, columns = -(-self.queries // tile.queries), -(-self.keys // tile.keys)
        if self.name == "backward_kv":
            return columns * self.batch * self.shared
        if {"q", "k"} <= set(self.which):
            return rows * columns * (self.batch if "b" in self.which else 1) * (self.heads if "h" in self.which else 1)
        return (columns if "k" in self.which else rows) * self.batch * self.heads

    def launcher(self, tile: Tile) -> Callable[..., None]:
        """``f(stream, *pointers, *numbers)``, compiled at the first call."""
        found = self.launchers.get(tile)
        if found is None:
            started = time.perf_counter()
            fixed = constants(*self.shape, tile)
            with torch.cuda.device(self.device), in_folder(tune.binaries()):
                source = ast_source(getattr(self.module, self.name), self.kinds, self.divisible, {**self.ones, **fixed})
                options = {"num_warps": tile.warps, "num_stages": tile.stages}
                built = launch.compile_source(source, cuda_driver.target(), options)
                launch.load_binary(built)
                compiled = Compiled(self.name, "", dict(built.asm), built.n_regs, built.n_spills, built.metadata.shared,
                                    time.perf_counter() - started, {}, built)  # fmt: skip
                grid = self.grid(tile)
                found = launch._cuda_launcher(compiled, self.kinds, grid) or self._slow(built, grid, fixed)
            self.launchers[tile] = found
        return found

    def interpret(self, tensors: Sequence[Tensor]) -> None:
        """Run in Triton's interpreter."""
        with interpreter.lock, launch._loading, interpreter.repaired(), launch._interpreting(True):
            fn = getattr(self.module, self.name)
            fn[(self.grid(_SMALL),)](*tensors, *self.all, **constants(*self.shape, _SMALL))

    def _slow(self, built: Any, grid: int, fixed: dict[str, int | bool]) -> Callable[..., None]:
        """Through Triton's own launcher, where a direct launch is not possible."""
        pointers = len(self.kinds) - len(self.numbers)
        rest = *self.all, *fixed.values()

        def call(stream: int, *args: Any) -> None:
            head = None, None, None, *args[:pointers], *rest
            built.run(grid, 1, 1, stream, built.function, built.packed_metadata, *head)

        return call


_prepared: dict[Any, _Prepared] = {}


def _run(name: str, score: str, q: Tensor, k: Tensor, v: Tensor, operands: Sequence[Tensor], strided: Sequence[Tensor],
         pointers: Sequence[Tensor], which: int | None = None) -> None:  # fmt: skip
    """Launch a kernel with the tile that is fastest here. Its arguments: ``pointers``, the operands it uses, numbers."""
    tensors = [*pointers, *[operands[i] for i in template.used(score, len(operands))]]
    arguments = [x.data_ptr() for x in tensors]
    key = (name, score, which, q.device, *[(x.dtype, x.shape, x.stride()) for x in (*strided, *operands)],
           *[a % 16 == 0 for a in arguments])  # fmt: skip
    p = _prepared.get(key)
    if p is None:
        if len(_prepared) >= 1024:
            _prepared.clear()
        p = _prepared[key] = _Prepared(name, score, q, k, v, operands, strided, tensors, which)
    if q.device.type != "cuda":
        return p.interpret(tensors)
    if torch.cuda.current_device() != q.device.index:
        with torch.cuda.device(q.device):
            return _start(p, arguments)
    return _start(p, arguments)


def _start(p: _Prepared, arguments: Sequence[int]) -> None:
    stream = torch._C._cuda_getCurrentRawStream(p.device.index)
    numbers, launchers = p.numbers, p.launchers

    def run(tile: Tile) -> None:
        (launchers.get(tile) or p.launcher(tile))(stream, *arguments, *numbers)

    run(tune.choose(p.key, p.tiles, run, device=p.device, prepare=p.launcher))


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _padded(n: int) -> int:
    return max(16, 1 << (n - 1).bit_length())


def attention(q: Tensor, k: Tensor, v: Tensor, operands: Sequence[Tensor], score: str) -> tuple[Tensor, Tensor]:
    """``fusionc::attention`` on a GPU; see ``ops/attention.py``."""
    q, k, v = _rows(q), _rows(k), _rows(v)
    batch, heads, queries, _ = q.shape
    out = q.new_empty((batch, heads, queries, v.shape[-1]))
    lse = q.new_empty((batch, heads, 2, queries), dtype=torch.float32)
    if out.numel() == 0 or k.shape[2] == 0:
        return out.zero_(), lse.zero_()  # as a product over nothing
    _run("forward", score, q, k, v, operands, (q, k, v), (q, k, v, out, lse))
    return out, lse


def attention_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
                       operands: Sequence[Tensor], score: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v, contiguous, and δ."""
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    delta = q.new_empty(q.shape[:3], dtype=torch.float32)
    if dq.numel() == 0 or dk.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_(), delta.zero_()
    grad, q, k, v, out, lse = _rows(grad), _rows(q), _rows(k), _rows(v), out.contiguous(), lse.contiguous()
    strided = grad, q, k, v
    _run("backward_q", score, q, k, v, operands, strided, (*strided, out, lse, delta, dq))
    _run("backward_kv", score, q, k, v, operands, strided, (*strided, lse, delta, dk, dv))
    return dq, dk, dv, delta


def attention_operand_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor,
                               operands: Sequence[Tensor], score: str, which: int) -> Tensor:  # fmt: skip
    """Gradient of one operand, contiguous, in its dtype."""
    x, axes, name = operands[which], axes_of(operands[which]), f"operand{which}"
    tile = "q" in axes and "k" in axes
    rows = k.shape[2] if "k" in axes else q.shape[2]
    made = x.new_empty(x.shape) if tile else q.new_empty((*q.shape[:2], rows), dtype=torch.float32)
    if q.numel() == 0 or k.numel() == 0:
        return x.new_zeros(x.shape)
    strided = _rows(grad), _rows(q), _rows(k), _rows(v)
    pointers = (*strided, lse.contiguous(), delta.contiguous(), made)
    _run(name, score, *strided[1:], operands, strided, pointers, which)
    if tile:
        return made
    parts = made[:, :, None, :] if "k" in axes else made[..., None]
    return parts.sum_to_size(x.shape).to(x.dtype).contiguous()
