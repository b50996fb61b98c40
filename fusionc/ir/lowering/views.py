"""Views as index maps, and their inverses for grouping."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch.fx import Node

from ..expr import ONE, ZERO, Index, index, nonnegative
from ..sizes import Unsupported, position, size_index, sizes_index
from ..value import Context, Idx, Value, normalize_dim, reshape_index, view
from .registry import register, shape_of

Partial = tuple["Index | None", ...]


def _identity_forward(node: Node, idx: Partial) -> Partial | None:
    return idx


@register(["aten.alias.default", "aten.detach.default", "aten.lift_fresh.default"], "view", forward=_identity_forward)
def _alias(ctx: Context, node: Node, x: Value, **_: Any) -> Value:
    return x


def _reshape_forward(node: Node, idx: Partial) -> Partial | None:
    if any(i is None for i in idx):
        return None
    return reshape_index(idx, shape_of(node.args[0]), shape_of(node))  # type: ignore[arg-type]


@register(
    ["aten.view.default", "aten._unsafe_view.default", "aten.reshape.default", "aten._reshape_alias.default"],
    "view",
    forward=_reshape_forward,
)
def _reshape(ctx: Context, node: Node, x: Value, *_: Any, **__: Any) -> Value:
    shape = shape_of(node)
    return view(x, shape, lambda idx: reshape_index(idx, shape, x.shape))


def permutation(node: Node) -> list[int]:
    """Output dimension d is input dimension permutation[d]."""
    name = node.target.overloadpacket.__name__  # type: ignore[union-attr]
    rank = len(node.meta["val"].shape)
    if name == "permute":
        return [normalize_dim(d, rank) for d in node.args[1]]  # type: ignore[union-attr,arg-type]
    perm = list(range(rank))
    if rank >= 1:
        a, b = (0, 1) if name == "t" else (node.args[1], node.args[2])
        if name == "t" and rank < 2:
            return perm
        a, b = normalize_dim(a, rank), normalize_dim(b, rank)  # type: ignore[arg-type]
        perm[a], perm[b] = perm[b], perm[a]
    return perm


def _permute_forward(node: Node, idx: Partial) -> Partial | None:
    return tuple([idx[p] for p in permutation(node)])


@register(["aten.permute.default", "aten.transpose.int", "aten.t.default"], "view", forward=_permute_forward)
def _permute(ctx: Context, node: Node, x: Value, *_: Any) -> Value:
    perm = permutation(node)
    inverse = [perm.index(d) for d in range(len(perm))]
    return view(x, shape_of(node), lambda idx: tuple([idx[d] for d in inverse]))


def _unsqueeze_forward(node: Node, idx: Partial) -> Partial | None:
    d = normalize_dim(node.args[1], len(idx) + 1)  # type: ignore[arg-type]
    return idx[:d] + (ZERO,) + idx[d:]


@register("aten.unsqueeze.default", "view", forward=_unsqueeze_forward)
def _unsqueeze(ctx: Context, node: Node, x: Value, dim: int) -> Value:
    d = normalize_dim(dim, len(x.shape) + 1)
    return view(x, shape_of(node), lambda idx: idx[:d] + idx[d + 1 :])


def _squeezed(node: Node) -> list[int]:
    """Input dimensions that survive."""
    shape = shape_of(node.args[0])  # type: ignore[arg-type]
    if len(node.args) == 1:
        drop = set(range(len(shape)))
    else:
        dims = node.args[1]
        drop = {normalize_dim(d, len(shape)) for d in (dims if isinstance(dims, (list, tuple)) else [dims])}
    return [d for d, s in enumerate(shape) if not (d in drop and s is ONE)]


def _squeeze_forward(node: Node, idx: Partial) -> Partial | None:
    return tuple([idx[d] for d in _squeezed(node)])


@register(["aten.squeeze.default", "aten.squeeze.dim", "aten.squeeze.dims"], "view", forward=_squeeze_forward)
def _squeeze(ctx: Context, node: Node, x: Value, *_: Any) -> Value:
    keep = _squeezed(node)
    rank = len(x.shape)

    def remap(idx: Idx) -> Idx:
        out = [ZERO] * rank
        for i, d in zip(idx, keep, strict=True):
            out[d] = i
        return tuple(out)

    return view(x, shape_of(node), remap)


def _expand_forward(node: Node, idx: Partial) -> Partial | None:
    src, dst = shape_of(node.args[0]), shape_of(node)  # type: ignore[arg-type]
    lead = len(dst) - len(src)
    out: list[Index | None] = [None] * lead
    for i, s, d in zip(idx, src, dst[lead:], strict=True):
        out.append(None if s is ONE and d is not ONE else i)
    return tuple(out)


@register("aten.expand.default", "view", forward=_expand_forward)
def _expand(ctx: Context, node: Node, x: Value, *_: Any, **__: Any) -> Value:
    n = len(x.shape)

    def remap(idx: Idx) -> Idx:
        tail = idx[len(idx) - n :] if n else ()
        return tuple([ZERO if s is ONE else i for s, i in zip(x.shape, tail, strict=True)])

    return view(x, shape_of(node), remap)


def _clamp(i: Any, size: Any, default: Any) -> Any:
    """Python's slice semantics for one bound, without adding guards on symbolic sizes."""
    if i is None:
        return default
    if isinstance(i, int) and isinstance(size, int):
        return max(0, min(size, i + size if i < 0 else i))
    if isinstance(i, int) and i >= 2**62:
        return size
    if isinstance(i, int) and i < 0:
        return size + i
    if not isinstance(i, int) and not nonnegative(size_index(i)):
        raise Unsupported("slice from a position that may be negative")
    return i


@register("aten.slice.Tensor", "view")
def _slice(
    ctx: Context, node: Node, x: Value, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> Value:
    src: Node = node.args[0]  # type: ignore[assignment]
    d = normalize_dim(dim, len(x.shape))
    size = src.meta["val"].shape[d]
    raw = node.args[2] if len(node.args) > 2 else node.kwargs.get("start")
    raw = raw.meta["val"] if isinstance(raw, Node) else raw
    lo = sizes_index([_clamp(raw, size, 0)])[0]
    if not isinstance(step, int):
        raise Unsupported("slice with a symbolic step")
    return view(x, shape_of(node), lambda idx: idx[:d] + (idx[d] * step + lo,) + idx[d + 1 :])


@register("aten.select.int", "view")
def _select(ctx: Context, node: Node, x: Value, dim: int, at: Any) -> Value:
    d = normalize_dim(dim, len(x.shape))
    where = position(at, x.shape[d])
    return view(x, shape_of(node), lambda idx: idx[:d] + (where,) + idx[d:])


@register("aten.flip.default", "gather", loose=(0,))
def _flip(ctx: Context, node: Node, x: Value, dims: list[int]) -> Value:
    ds = {normalize_dim(d, len(x.shape)) for d in dims}
    return view(
        x,
        x.shape,
        lambda idx: tuple([s - 1 - i if d in ds else i for d, (i, s) in enumerate(zip(idx, x.shape, strict=True))]),
    )


@register("aten.diagonal.default", "view")
def _diagonal(ctx: Context, node: Node, x: Value, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Value:
    a, b = normalize_dim(dim1, len(x.shape)), normalize_dim(dim2, len(x.shape))

    def remap(idx: Idx) -> Idx:
        it = iter(idx[:-1])
        k = idx[-1]
        return tuple(
            [k + max(-offset, 0) if d == a else k + max(offset, 0) if d == b else next(it) for d in range(len(x.shape))]
        )

    return view(x, shape_of(node), remap)


def _shifted(d: int, by: Index, idx: Idx) -> Idx:
    return idx[:d] + (idx[d] + by,) + idx[d + 1 :]


def _picked(d: int, at: Index, idx: Idx) -> Idx:
    return idx[:d] + (at,) + idx[d:]


def _split_sizes(node: Node) -> list[Any]:
    return [v.shape for v in node.meta["val"]]


@register(["aten.split.Tensor", "aten.split_with_sizes.default", "aten.unsafe_split.Tensor"], "view")
def _split(ctx: Context, node: Node, x: Value, sizes: Any, dim: int = 0) -> tuple[Value, ...]:
    d = normalize_dim(dim, len(x.shape))
    outs: list[Value] = []
    lo = ZERO
    for piece in _split_sizes(node):
        shape = sizes_index(piece)
        outs.append(view(x, shape, partial(_shifted, d, lo)))
        lo = lo + shape[d]
    return tuple(outs)


@register("aten.unbind.int", "view")
def _unbind(ctx: Context, node: Node, x: Value, dim: int = 0) -> tuple[Value, ...]:
    d = normalize_dim(dim, len(x.shape))
    shape = x.shape[:d] + x.shape[d + 1 :]
    return tuple([view(x, shape, partial(_picked, d, index(k))) for k in range(len(node.meta["val"]))])


@register("aten.unfold.default", "view")
def _unfold(ctx: Context, node: Node, x: Value, dim: int, size: int, step: int) -> Value:
    if not isinstance(step, int) or not len(x.shape):
        raise Unsupported("unfold of a scalar or with a symbolic step")
    d = normalize_dim(dim, len(x.shape))
    return view(x, shape_of(node), lambda idx: idx[:d] + (idx[d] * step + idx[-1],) + idx[d + 1 : -1])
