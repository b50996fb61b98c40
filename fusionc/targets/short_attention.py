"""`fusionc::short_attention` on a GPU: which tile, and the launch."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..codegen.templates.short_attention import TEXT, Tile, tiles
from ..ops.short_attention import KEYS, WIDTHS, added, reference
from ..runtime.device import properties
from ..runtime.templates import POINTER, Template, template
from ..runtime.tune import Wanted, agree, choose, stand_ins
from .skinny import dependent, generation

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
Bias = tuple[torch.dtype, tuple[int, ...], tuple[int, ...]]  # dtype, sizes, strides


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, bias: Tensor | None = None,
              mask: Tensor | None = None, safe: bool = True) -> Tensor:  # fmt: skip
    """See `ops.short_attention`; ATen where the kernel does not apply or is slower."""
    biases = added(bias, mask)
    if not _fits(q, k, v, causal, biases):
        return reference(q, k, v, scale, causal, bias, mask, safe)
    batch, heads, queries, width = q.shape
    out = torch.empty((batch, queries, heads, width), dtype=q.dtype, device=q.device)
    plan = _plan_of(q, k, v, scale, causal, biases, safe)
    stream = torch._C._cuda_getCurrentRawStream(q.device.index)

    def run(tile: Tile | None) -> Tensor:
        return compute(tile, out, q, k, v, *plan.in_order(biases))

    def compute(tile: Tile | None, out: Tensor, q: Tensor, k: Tensor, v: Tensor, *ordered: Tensor) -> Tensor:
        if tile is None:
            first, second = (*ordered, None, None)[:2]
            return reference(q, k, v, scale, causal, first, second, safe)
        plan.kernel(tile).launch(plan.programs(tile), stream, q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(),
                                 *[x.data_ptr() for x in ordered])  # fmt: skip
        return out.transpose(1, 2)

    def check(tile: Tile | None) -> bool:
        if tile is None:
            return True
        ordered = plan.in_order(biases)
        floats = stand_ins(q, k, v, *(x for x in ordered if x.dtype != torch.bool))
        made = [*floats, *(x for x in ordered if x.dtype == torch.bool)]  # floats stand first there
        got = compute(tile, torch.empty_like(out), *made)
        want = compute(None, out, *made)
        return agree(*(torch.where(x.isnan(), 0, x) for x in (got, want)))  # rows without any key

    return run(choose(plan.key, plan.tiles, run, device=q.device, prepare=plan.prepare, check=check if biases else None))


def wanted(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, bias: Tensor | None = None,
           mask: Tensor | None = None, safe: bool = True) -> Wanted | None:  # fmt: skip
    """What `attention` will choose from, by tensors without data; None where that is ATen."""
    biases = added(bias, mask)
    if not _fits(q, k, v, causal, biases, data=False):
        return None
    plan = _plan_of(q, k, v, scale, causal, biases, safe)
    return Wanted(plan.key, plan.tiles, plan.prepare)


def _plan_of(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, biases: Sequence[Tensor], safe: bool) -> _Plan:
    batch, heads, queries, width = q.shape
    return _plan(q.dtype, batch, heads, k.shape[1], queries, k.shape[2], width, scale, causal,
                 (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3]), q.device,
                 tuple((b.dtype, tuple(b.shape), b.stride()) for b in biases), safe)  # fmt: skip


class _Plan:
    """Everything about one shape of the operator but the tile."""

    def __init__(self, dtype: torch.dtype, batch: int, heads: int, shared: int, queries: int, keys: int, width: int,
                 scale: float, causal: bool, strides: tuple[int, ...], device: torch.device, biases: tuple[Bias, ...] = (),
                 safe: bool = True) -> None:  # fmt: skip
        self.device, self.early = device, dependent(device)
        self.batch, self.rows, self.queries = batch, heads, queries
        # floats first: the kernel begins its sum with the first of them
        self.order = sorted(range(len(biases)), key=lambda i: biases[i][0] == torch.bool)
        ordered = [biases[i] for i in self.order]
        self.period = math.lcm(*(sizes[0] for _, sizes, _ in ordered))
        self.constants: tuple[tuple[str, Any], ...] = constants(
            heads, shared, queries, keys, width, scale, causal, strides, ordered, safe, batch, self.early)
        self.kinds = (*(POINTER[dtype],) * 4, *(POINTER[kind] for kind, _, _ in ordered))
        repeated = batch // self.period if biases else 1
        # the last candidate is the library
        self.tiles = (*tiles(batch * heads, queries, properties(device).processors, repeated), None)
        what = [dtype, batch, heads, shared, queries, keys, width, causal]
        for kind, sizes, steps in ordered:  # whether rows are aligned and close together decides how fast they are read
            what += [kind, sizes, [step if step < 2 else math.gcd(step, 8) for step in steps[2:]]]
        self.key = f"short_attention {' '.join(map(str, what))}{'' if safe or not biases else ' nan'}"
        self._kernels: dict[Tile, Template] = {}

    def in_order(self, biases: Sequence[Tensor]) -> list[Tensor]:
        """As the kernel takes them."""
        return [biases[i] for i in self.order]

    def programs(self, tile: Tile) -> int:
        """How many are launched."""
        return -(-self.queries // tile.queries) * self.rows * self.period * -(-(self.batch // self.period) // tile.each)

    def kernel(self, tile: Tile) -> Template:
        found = self._kernels.get(tile)
        if found is None:
            found = self._kernels[tile] = template(
                TEXT, "short", self.kinds, (*self.constants, *tiled(tile)), self.device, tile.warps, dependent=self.early)
        return found

    def prepare(self, tile: Tile | None) -> None:
        """Compile it."""
        if tile is not None:
            self.kernel(tile).prepare()


_plan = functools.lru_cache(maxsize=1024)(_Plan)


def constants(heads: int, shared: int, queries: int, keys: int, width: int, scale: float, causal: bool,
              strides: tuple[int, ...], biases: Sequence[Bias], safe: bool, batch: int,
              early: bool) -> tuple[tuple[str, Any], ...]:  # fmt: skip
    """The kernel's constants but those of a tile; ``strides`` of batch, head and row of q, k and v; floats of ``biases``
    first."""
    found: dict[str, Any] = {f"x{i}": None for i in range(len(biases), 2)}
    found |= {"H": heads, "HKV": shared, "L": queries, "S": keys, "D": width, "SCALE": scale, "CAUSAL": causal}
    found |= dict(zip("QB QH QN KB KH KN VB VH VN".split(), strides))
    for i in range(2):
        kind, sizes, steps = biases[i] if i < len(biases) else (None, (1, 1, 1, 1), (0, 0, 0, 0))
        moves = [0 if size == 1 else step for size, step in zip(sizes, steps)]
        found |= {f"ADDED{i}": 0 if kind is None else 2 if kind == torch.bool else 1, f"P{i}": sizes[0]}
        found |= {f"{name}{i}": move for name, move in zip(("XB", "XH", "XL", "XN"), moves)}
        found[f"WIDTH{i}"] = keys if sizes[3] == 1 else sizes[3]
    found |= {"SAFE": safe and bool(biases), "BATCH": batch, "PERIOD": math.lcm(*(sizes[0] for _, sizes, _ in biases))}
    return (*found.items(), ("PDL", early), ("BS", max(16, 1 << (keys - 1).bit_length())))


def tiled(tile: Tile) -> tuple[tuple[str, Any], ...]:
    """The constants of a tile."""
    return ("EACH", tile.each), ("STAGES", min(2, tile.each)), ("BM", tile.queries)


def _fits(q: Tensor, k: Tensor, v: Tensor, causal: bool, biases: Sequence[Tensor], data: bool = True) -> bool:
    """Types, layouts and alignment that the kernel assumes; see `skinny.fits` for ``data``."""
    width = q.shape[3]
    if q.dtype not in (torch.bfloat16, torch.float16) or width not in WIDTHS or torch.version.hip:
        return False
    if not 1 <= k.shape[2] <= KEYS or k.shape[1] == 0 or q.shape[1] % k.shape[1] or causal and q.shape[2] != k.shape[2]:
        return False
    if v.shape != k.shape or k.shape[3] != width or q.numel() == 0 or k.shape[0] != q.shape[0]:
        return False
    bits = 0
    for t in (q, k, v):
        if t.dtype is not q.dtype or t.stride(3) != 1:
            return False
        bits |= t.data_ptr() if data else 0
        for size, step in zip(t.shape[:3], t.stride()[:3]):
            bits |= step * 2 if size > 1 else 0
            if size * step >= 1 << 31:
                return False
    for b in biases:
        if not _reads(b, q, k):
            return False
        bits |= b.data_ptr() if data else 0
    return not bits & 15 and generation(q.device) >= 80


def _reads(bias: Tensor, q: Tensor, k: Tensor) -> bool:
    """The kernel can read it."""
    if bias.dim() != 4 or bias.dtype not in (*_FLOATS, torch.bool) or bias.numel() == 0 or bias.device != q.device:
        return False
    p, h, rows, columns = bias.shape
    if q.shape[0] % p or h not in (1, q.shape[1]) or rows not in (1, q.shape[2]) or 1 < columns < k.shape[2]:
        return False
    return all(size * step < 1 << 31 for size, step in zip(bias.shape[1:], bias.stride()[1:]))
