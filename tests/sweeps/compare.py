"""When is a compiled result as good as eager's?

Two float programs that compute the same thing differ in rounding, so equality asks too much, and a fixed tolerance is
both too loose (a wrong element in a small tensor passes) and too strict (an ill-conditioned operator fails although
both answers are equally good).  The rule used everywhere here: same dtypes, shapes, NaN and Inf positions; integers
equal; floats either close to eager at torch's usual tolerance, or no further from a float64 run of eager than twice
eager's own distance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

# (rtol, atol) of torch.testing.assert_close; float64 has no better oracle than itself
TOLERANCE: dict[torch.dtype, tuple[float, float]] = {
    torch.float16: (1e-3, 1e-5),
    torch.bfloat16: (1.6e-2, 1e-5),
    torch.float32: (1.3e-6, 1e-5),
    torch.float64: (1e-7, 1e-7),
    torch.complex32: (1e-3, 1e-5),
    torch.complex64: (1.3e-6, 1e-5),
    torch.complex128: (1e-7, 1e-7),
}
EAGER_FACTOR = 2.0


def copy_tensor(tensor: torch.Tensor, storages: dict[int, Any] | None = None) -> torch.Tensor:
    """A leaf with the same strides, offset, flags and values in storage of its own.

    Tensors copied with one ``storages`` dict that shared storage share it again.  Sparse and other tensors without
    plain storage are cloned.
    """
    source = tensor.detach()
    plain = source.layout is torch.strided and not source.is_nested and not source.is_quantized
    if not plain or type(source) not in (torch.Tensor, torch.nn.Parameter):
        return source.clone().requires_grad_(tensor.requires_grad)
    storages = {} if storages is None else storages
    storage = source.untyped_storage()
    key = storage._cdata
    if key not in storages:
        storages[key] = storage.clone()
    out = torch.empty(0, dtype=source.dtype, device=source.device)
    out.set_(storages[key], source.storage_offset(), source.shape, source.stride())
    if source.is_conj():
        out = torch._conj(out)
    if source.is_neg():
        out = torch._neg_view(out)
    return out.requires_grad_(tensor.requires_grad)


def copy_tree(tree: Any) -> Any:
    """``copy_tensor`` over every tensor of a nested value, keeping which tensors share storage and which are one."""
    storages: dict[int, Any] = {}
    done: dict[int, torch.Tensor] = {}

    def one(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in done:
            done[id(tensor)] = copy_tensor(tensor, storages)
        return done[id(tensor)]

    return pytree.tree_map_only(torch.Tensor, one, tree)


_WIDER = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex32: torch.complex128,
    torch.complex64: torch.complex128,
}


def widen_tree(tree: Any) -> Any:
    """The nested value with float tensors as float64 and complex ones as complex128, detached and copied."""

    def one(tensor: torch.Tensor) -> torch.Tensor:
        copy = copy_tensor(tensor).detach()
        return copy.to(_WIDER.get(copy.dtype, copy.dtype)).requires_grad_(tensor.requires_grad)

    return pytree.tree_map_only(torch.Tensor, one, tree)


def leaves(tree: Any) -> list[Any]:
    """The leaves of a nested result that carry values: tensors (dense, resolved, detached) and Python numbers."""
    out: list[Any] = []
    for leaf in pytree.tree_leaves(tree):
        if isinstance(leaf, torch.Tensor):
            leaf = leaf.detach()
            if leaf.is_nested:
                out.extend(leaf.unbind())
                continue
            if leaf.layout is not torch.strided:
                leaf = leaf.to_dense()
            out.append(leaf.resolve_conj().resolve_neg())
        elif isinstance(leaf, int | float | complex | bool):
            out.append(leaf)
    return out


def _number(value: Any) -> torch.Tensor:
    return value if isinstance(value, torch.Tensor) else torch.tensor(value)


def _first(mask: torch.Tensor) -> tuple[int, ...]:
    return tuple(int(i) for i in mask.nonzero()[0])


def _floats(
    got: torch.Tensor, want: torch.Tensor, oracle: Callable[[], torch.Tensor | None], factor: float
) -> str | None:
    """Compare two float or complex tensors of one dtype and shape; None when ``got`` is as good as ``want``."""
    wide = torch.complex128 if want.dtype.is_complex else torch.float64
    rtol, atol = TOLERANCE.get(want.dtype, (1e-1, 1e-2))  # fp8: compared only roughly
    a, b = got.to(wide), want.to(wide)
    for name, test in (("NaN", torch.isnan), ("Inf", torch.isinf)):
        differ = test(a) != test(b)
        if bool(differ.any()):
            where = _first(differ)
            return f"{name} at different positions, first {where}: {got[where].item()} for eager's {want[where].item()}"
    if not want.dtype.is_complex:
        differ = torch.isinf(a) & (a != b)
        if bool(differ.any()):
            return f"Inf of the other sign at {_first(differ)}"
    finite = torch.isfinite(b)
    distance = torch.where(finite, a - b, torch.zeros_like(a)).abs()
    bad = distance > atol + rtol * torch.where(finite, b, torch.zeros_like(b)).abs()
    if not bool(bad.any()):
        return None
    where = _first(bad)
    text = f"at {where} {got[where].item()} for eager's {want[where].item()}, {int(bad.sum())} of {bad.numel()} differ"
    reference = oracle()
    if reference is None:
        return text + " (no float64 reference)"
    if reference.shape != want.shape:
        return text + f" (the float64 reference has shape {tuple(reference.shape)})"
    reference = reference.to(wide)
    finite = finite & torch.isfinite(reference)
    zero = torch.zeros_like(reference)
    mine = torch.where(finite, a - reference, zero).abs()
    theirs = torch.where(finite, b - reference, zero).abs()
    bad = mine > torch.clamp(atol + rtol * torch.where(finite, reference, zero).abs(), min=factor * theirs.max())
    if not bool(bad.any()):
        return None
    return text + f"; error against float64 {float(mine.max()):.3g}, eager's {float(theirs.max()):.3g}"


def compare(
    got: Any,
    want: Any,
    oracle: Callable[[], Any] | None = None,
    signed_zeros: bool = False,
    values: bool = True,
    factor: float = EAGER_FACTOR,
) -> str | None:
    """None when ``got`` is as good a result as eager's ``want``, else one line that says what differs.

    got, want     nested values of tensors and numbers, of one structure; strides are not compared
    oracle        called at most once, only on a difference: the same result from float64 eager (or raises)
    signed_zeros  also require that zeros have eager's sign
    values        False for results that are uninitialised memory: only dtypes, shapes and devices are compared
    factor        how many times eager's worst error against the oracle is allowed
    """
    ours, theirs = leaves(got), leaves(want)
    if len(ours) != len(theirs):
        return f"{len(ours)} results for eager's {len(theirs)}"
    reference: list[Sequence[Any] | None] = []

    def oracle_leaf(index: int) -> torch.Tensor | None:
        if not reference:
            try:
                computed = leaves(oracle()) if oracle is not None else None
            except Exception:  # an operator without a float64 form has no oracle
                computed = None
            reference.append(computed if computed is not None and len(computed) == len(theirs) else None)
        return _number(reference[0][index]) if reference[0] is not None else None

    for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if isinstance(a, torch.Tensor) != isinstance(b, torch.Tensor) or (
            not isinstance(b, torch.Tensor) and type(a) is not type(b)
        ):
            return f"result {index} is a {type(a).__name__}, eager's a {type(b).__name__}"
        a, b = _number(a), _number(b)
        if a.dtype != b.dtype or a.shape != b.shape or a.device != b.device:
            return (
                f"result {index} is {a.dtype} {tuple(a.shape)} {a.device}, "
                f"eager's {b.dtype} {tuple(b.shape)} {b.device}"
            )
        if a.numel() == 0 or not values:
            continue
        if b.dtype.is_floating_point or b.dtype.is_complex:
            problem = _floats(a, b, lambda index=index: oracle_leaf(index), factor)  # type: ignore[misc]
            if problem is None and signed_zeros and not b.dtype.is_complex:
                differ = (a == 0) & (b == 0) & (torch.signbit(a) != torch.signbit(b))
                problem = f"zero of the other sign at {_first(differ)}" if bool(differ.any()) else None
        else:
            differ = a != b
            problem = None
            if bool(differ.any()):
                where = _first(differ)
                problem = f"at {where} {a[where].item()} for eager's {b[where].item()}"
        if problem is not None:
            return f"result {index}: {problem}"
    return None
