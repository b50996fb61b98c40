"""Launches the kernels of ``fusionc::attention`` (text: ``codegen/templates/attention.py``) on a GPU.

Tile sizes are chosen by measurement at the first call with given shapes. On CPU tensors the same kernels run in Triton's
interpreter, for tests; the operator itself uses its reference there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..codegen.templates import attention as template
from . import interpreter
from .launch import _interpreting, _loading, load_module


@dataclass(frozen=True)
class Tile:
    """Queries and keys of one step, warps, stages of the pipeline."""

    queries: int
    keys: int
    warps: int
    stages: int


_SMALL = (Tile(16, 16, 4, 1),)
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


def axes_of(x: Tensor) -> str:
    """The axes of "bhqk" that an operand varies with."""
    return "".join(a for a, n in zip("bhqk", x.shape) if n != 1)


class _Call:
    """Arguments that all kernels of one call share."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, operands: Sequence[Tensor], score: str):
        self.q, self.k, self.v = (_rows(x) for x in (q, k, v))
        self.score, self.operands = score, operands
        self.axes = tuple(axes_of(x) for x in operands)
        self.batch, self.heads, self.queries, self.width = q.shape
        self.shared, self.keys, self.depth = v.shape[1:]
        self.padded = max(16, _power(self.width)), max(16, _power(self.depth))
        taken: list[Any] = []
        for i in template.used(score, len(operands)):
            x = operands[i]
            taken += [x, *[n for n, a in zip(x.stride(), "bhqk") if a in self.axes[i]]]
        self.taken = taken

    def strides(self, *tensors: Tensor) -> list[int]:
        return [n for x in (*tensors, self.q, self.k, self.v) for n in x.stride()[:3]]

    def module(self, which: int | None = None) -> ModuleType:
        return _module(self.score, self.axes, which, self.q.device.type != "cuda")

    def launch(self, name: str, table: dict[int, tuple[Tile, ...]], grid: Callable[[Tile], tuple[int, ...]],
               arguments: Sequence[Any], which: int | None = None) -> None:  # fmt: skip
        """Run kernel ``name`` with the tile that is fastest here."""
        fn = getattr(self.module(which), name)
        sizes = [*self.taken, self.heads, self.queries, self.keys]
        shape = {"GROUP": self.heads // self.shared, "D": self.width, "E": self.depth, "DP": self.padded[0],
                 "EP": self.padded[1]}  # fmt: skip

        def options(tile: Tile) -> dict[str, Any]:
            return {**shape, "EVEN_Q": self.queries % tile.queries == 0, "EVEN_K": self.keys % tile.keys == 0,
                    "BM": tile.queries, "BN": tile.keys, "num_warps": tile.warps, "num_stages": tile.stages}  # fmt: skip

        def run(tile: Tile) -> None:
            fn[grid(tile)](*arguments, *sizes, **options(tile))

        def prepare(tile: Tile) -> None:
            fn.warmup(*arguments, *sizes, grid=grid(tile), **options(tile))

        if self.q.device.type != "cuda":
            with interpreter.lock, _loading, interpreter.repaired(), _interpreting(True):
                run(_SMALL[0])
            return
        candidates = table[next(n for n in (64, 128, 256) if max(self.padded) <= n)]
        words = f"{tuple(self.q.shape)} {tuple(self.k.shape)} {self.depth} {self.q.dtype} {self.axes} {self.score}"
        run(_choose(f"attention {name} {words}", candidates, run, self.q.device, prepare))


def _choose(key: str, candidates: Sequence[Tile], run: Callable[[Tile], None], device: torch.device,
            prepare: Callable[[Tile], None]) -> Tile:  # fmt: skip
    from .tune import choose

    return choose(key, candidates, run, device=device, prepare=prepare)


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _power(n: int) -> int:
    return 1 << (n - 1).bit_length()


@functools.lru_cache(maxsize=256)
def _module(score: str, axes: tuple[str, ...], which: int | None, interpret: bool) -> ModuleType:
    return load_module(template.source(score, axes, which), interpret=interpret)


def attention(q: Tensor, k: Tensor, v: Tensor, operands: Sequence[Tensor], score: str) -> tuple[Tensor, Tensor]:
    """``fusionc::attention`` on a GPU; see ``ops/attention.py``."""
    c = _Call(q, k, v, operands, score)
    out = q.new_empty((c.batch, c.heads, c.queries, c.depth))
    lse = q.new_empty((c.batch, c.heads, 2, c.queries), dtype=torch.float32)
    if out.numel() == 0 or c.keys == 0:
        return out.fill_(float("nan")), lse.fill_(float("nan"))
    c.launch("forward", _FORWARD, lambda t: (-(-c.queries // t.queries), c.batch * c.heads),
             [c.q, c.k, c.v, out, lse, *c.strides()])  # fmt: skip
    return out, lse


def attention_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
                       operands: Sequence[Tensor], score: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v, contiguous, and δ."""
    c, grad = _Call(q, k, v, operands, score), _rows(grad)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    delta = q.new_empty(q.shape[:3], dtype=torch.float32)
    if dq.numel() == 0 or dk.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_(), delta.zero_()
    out, lse = out.contiguous(), lse.contiguous()
    c.launch("backward_q", _BACKWARD_Q, lambda t: (-(-c.queries // t.queries), c.batch * c.heads),
             [grad, c.q, c.k, c.v, out, lse, delta, dq, *c.strides(grad)])  # fmt: skip
    c.launch("backward_kv", _BACKWARD_KV, lambda t: (-(-c.keys // t.keys), c.batch * c.shared),
             [grad, c.q, c.k, c.v, lse, delta, dk, dv, *c.strides(grad)])  # fmt: skip
    return dq, dk, dv, delta


def attention_operand_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor,
                               operands: Sequence[Tensor], score: str, which: int) -> Tensor:  # fmt: skip
    """Gradient of one operand, contiguous, in its dtype."""
    c, grad, x = _Call(q, k, v, operands, score), _rows(grad), operands[which]
    arguments = [grad, c.q, c.k, c.v, lse.contiguous(), delta.contiguous()]
    name, axes = f"operand{which}", c.axes[which]
    if "q" in axes and "k" in axes:
        made = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        count = (c.batch if "b" in axes else 1) * (c.heads if "h" in axes else 1)
        c.launch(name, _OPERAND, lambda t: (-(-c.queries // t.queries), -(-c.keys // t.keys), count),
                 [*arguments, made, *c.strides(grad), c.batch], which)  # fmt: skip
        return made
    rows = c.keys if "k" in axes else c.queries
    parts = q.new_empty((c.batch, c.heads, rows), dtype=torch.float32)
    c.launch(name, _OPERAND, lambda t: (-(-rows // (t.keys if "k" in axes else t.queries)), c.batch * c.heads),
             [*arguments, parts, *c.strides(grad)], which)  # fmt: skip
    parts = parts[:, :, None, :] if "k" in axes else parts[..., None]
    return parts.sum_to_size(x.shape).to(x.dtype).contiguous()
