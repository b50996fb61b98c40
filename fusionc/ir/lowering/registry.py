"""The table from ATen operator to lowering, and what grouping needs to know of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from ..expr import Const, Expr, Index
from ..ops import cast, compute_dtype
from ..sizes import Unsupported, size_index, sizes_index
from ..value import Context, Value, const, from_index

DTYPE_NAME = {
    torch.bool: "b1",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.float32: "f32",
    torch.float64: "f64",
}
TORCH_DTYPE = {v: k for k, v in DTYPE_NAME.items()}


@dataclass(frozen=True)
class Lowering:
    """How one operator becomes Values.

    kind      "view" (index map only), "pointwise", "create" (no tensor is read), "gather" (indirect or piecewise reads
              through `loose` arguments), "reduce" (result has one element per row), "row" (reduces and also returns whole rows),
              "scan"
    fn        (ctx, node, *args, **kwargs) -> Value or tuple of Values; raises Unsupported
    dims      for reduce, row and scan: node -> dimensions reduced, of the node's first tensor argument
    forward   for views: (node, index of the input's element) -> index of the output's element that reads it, with None for
              dimensions that broadcast; or None where the map is not one-to-one
    loose     argument positions that are not read at the node's own (broadcast) index
    domain    for reduce: node -> shape it runs over, where that is not its first tensor argument's
    windowed  for gather: an element is made of many of the operand's, so that one such operator within another is a text that
              grows as their windows' product
    """

    kind: str
    fn: Callable[..., Any]
    dims: Callable[[Node], tuple[int, ...]] | None = None
    forward: Callable[[Node, tuple], tuple | None] | None = None
    loose: tuple[int, ...] = ()
    domain: Callable[[Node], tuple] | None = None
    windowed: bool = False

    def over(self, node: Node) -> tuple[Index, ...]:
        """Shape that a reducing node runs over: its first operand's, unless it says otherwise."""
        return self.domain(node) if self.domain is not None else shape_of(node.args[0])  # type: ignore[arg-type]


LOWERINGS: dict[Any, Lowering] = {}


def register(names: str | Sequence[str], kind: str, **extra: Any) -> Callable[[Callable], Callable]:
    """Register a lowering under one or more names such as "aten.add.Tensor"; unknown names are skipped (older torch)."""

    def wrap(fn: Callable) -> Callable:
        for name in [names] if isinstance(names, str) else names:
            namespace, packet, overload = name.split(".")
            try:
                target = getattr(getattr(getattr(torch.ops, namespace), packet), overload)
            except AttributeError:
                continue
            LOWERINGS[target] = Lowering(kind, fn, **extra)
        return fn

    return wrap


def lookup(node: Node) -> Lowering | None:
    return LOWERINGS.get(node.target) if node.op == "call_function" else None


def shape_of(node: Node) -> tuple[Index, ...]:
    """Sizes of a node's value; of several results, those of the first."""
    val = node.meta["val"]
    return sizes_index((val[0] if isinstance(val, (tuple, list)) else val).shape)


def dtype_of(node: Node) -> str:
    """Short dtype name of a node's value.  Raises Unsupported for dtypes outside the IR (complex, fp8, …)."""
    name = DTYPE_NAME.get(node.meta["val"].dtype)
    if name is None:
        raise Unsupported(f"dtype {node.meta['val'].dtype}")
    return name


def scalar(ctx: Context, x: Any, dtype: str) -> Expr:
    """A Python number, symbolic integer or Value without dimensions as an expression of `dtype`."""
    if isinstance(x, Value):
        return cast(x.at(()), dtype)
    if isinstance(x, Index):
        return cast(x, dtype)
    if isinstance(x, (bool, int, float)):
        return Const(x, compute_dtype(dtype)) if dtype not in ("f16", "bf16") else cast(Const(x, "f32"), dtype)
    if isinstance(x, torch.SymInt):
        return cast(size_index(x), dtype)
    raise Unsupported(f"scalar {type(x).__name__}")


def as_value(ctx: Context, x: Any, dtype: str) -> Value:
    """An operand as a Value: tensors as they are, numbers as 0-d values of compute precision."""
    if isinstance(x, Value):
        return x
    if isinstance(x, Index):
        return from_index(ctx, x)
    if isinstance(x, (bool, int, float)):
        return const(ctx, x, compute_dtype(dtype))
    if isinstance(x, torch.SymInt):
        return from_index(ctx, size_index(x))
    raise Unsupported(f"operand {type(x).__name__}")


def result_type(*operands: Any) -> str:
    """Dtype name torch promotes these FX operands (nodes and numbers) to."""
    vals = [o.meta["val"] if isinstance(o, Node) else o for o in operands]
    vals = [v for v in vals if v is not None]
    out: Any = vals[0]
    if len(vals) == 1:
        t = out.dtype if isinstance(out, torch.Tensor) else torch.result_type(torch.empty(0, dtype=torch.bool), out)
    else:
        t = _promote(vals)
    name = DTYPE_NAME.get(t)
    if name is None:
        raise Unsupported(f"dtype {t}")
    return name


def _promote(vals: list[Any]) -> torch.dtype:
    tensors = [v for v in vals if isinstance(v, torch.Tensor)]
    first = tensors[0].dtype if tensors else None
    if first is not None and len(tensors) == len(vals) and all(t.dtype == first for t in tensors):
        return first
    from torch._prims_common import ELEMENTWISE_TYPE_PROMOTION_KIND, elementwise_dtypes

    clean = [float(v) if isinstance(v, torch.SymFloat) else 1 if isinstance(v, torch.SymInt) else v for v in vals]
    compute, _ = elementwise_dtypes(*clean, type_promotion_kind=ELEMENTWISE_TYPE_PROMOTION_KIND.NO_OPMATH)
    return compute
