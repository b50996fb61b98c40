"""``fusionc::linear_cross_entropy``: the last linear layer and cross entropy, a chunk of tokens at a time.

The logits of T tokens over V words are the largest tensor of a language model's training step (2.1 GB in bfloat16 for
8192 × 128256; eager and Inductor hold it, its float32 copy or its gradient at once). Here the logits of one chunk live
in one buffer: a matmul fills it, one kernel takes the loss and writes the gradient over the logits, two matmuls turn
that into the chunk's rows of dx and its share of dW. So the gradients are made in the *forward*, for an incoming
gradient of 1; the backward multiplies them by the incoming gradient (nothing to do where it is 1). Three matmuls as
before, and no more memory than the gradients and one chunk.

Chunks cost one read and one write of dW each, because the matmul adds to it, and one more rounding of dW to its dtype:
few chunks, see ``chunk_rows``.

Source: Liger Kernel (arXiv 2410.10989) for the gradient in the forward; ``specs/quant_moe_training.md`` §11.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .fake import register_fake

_library = torch.library.Library("fusionc", "FRAGMENT")
_library.define(
    "linear_cross_entropy(Tensor x, Tensor weight, Tensor? bias, Tensor target, int ignore_index, bool mean, "
    "float label_smoothing, ScalarType dtype, bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "linear_cross_entropy_backward(Tensor grad, Tensor dx, Tensor dw, Tensor db) -> (Tensor, Tensor, Tensor)"
)


def linear_cross_entropy(x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None, *,
                         ignore_index: int = -100, reduction: str = "mean", label_smoothing: float = 0.0,
                         dtype: torch.dtype | None = None) -> Tensor:  # fmt: skip
    """``F.cross_entropy(F.linear(x, weight, bias).to(dtype), target)``, a scalar of ``dtype`` (default: that of x).

    x [T, K], weight [V, K], bias [V] of one floating dtype, target [T] int64. Raises ValueError for another reduction
    than "mean" and "sum", and IndexError on a CPU for a target that is neither ``ignore_index`` nor a word (NaN on a GPU).
    The gradients are computed at once, wherever gradients are enabled and an argument requires one.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(
            f"reduction={reduction!r}: the gradient is made before it is asked for, so only 'mean' and 'sum'"
        )
    wanted = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (x, weight, bias)]
    return torch.ops.fusionc.linear_cross_entropy(x, weight, bias, target, ignore_index, reduction == "mean",
                                                  label_smoothing, dtype or x.dtype, wanted)[0]  # fmt: skip


def chunk_rows(tokens: int, width: int, accumulates: bool) -> int:
    """Tokens of one chunk: its logits take at most half of W's memory, but matmuls get 2048 rows to work on.

    ``accumulates``: a gradient of W is made, which each chunk reads, writes and rounds: then there are at most 8 (measured
    error of dW in bfloat16 against eager's: 1.33 for 2 chunks, 1.55 for 4, 1.72 for 8, 1.85 for 16). Chunks are of equal
    size, in steps of 128.
    """
    most = max(2048, width // 2 if accumulates else 0)
    count = max(1, -(-tokens // most))
    count = min(8, count) if accumulates else count
    return min(tokens, -(-tokens // (128 * count)) * 128)


def padded(words: int) -> int:
    """Width of the logits in memory: cuBLAS has its fast kernels for multiples of 8; logits and gradients of what is
    added are 0."""
    return -(-words // 64) * 64 if words % 8 else words


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, ignore_index: int, mean: bool,
             label_smoothing: float, dtype: torch.dtype, wanted: Sequence[bool]) -> tuple[Tensor, ...]:  # fmt: skip
    """(loss, dx, dw, db); gradients that are not wanted are empty."""
    with torch.amp.autocast(x.device.type, enabled=False):
        target = target.to(torch.int64).contiguous()  # the kernel counts on it
        if target.data_ptr() & 15:  # labels[:, 1:] of a single text, say: a copy costs less than a launch through Triton
            target = target.clone()
        tokens, width = x.shape
        words = weight.shape[0]
        wide = torch.promote_types(x.dtype, torch.float32)
        rows = chunk_rows(tokens, width, wanted[1])
        full = padded(words)
        weights = weight if full == words else F.pad(weight, (0, 0, 0, full - words))
        biases = bias if bias is None or full == words else F.pad(bias, (0, full - words))
        buffer = x.new_empty((rows, full))
        losses = x.new_empty(tokens, dtype=wide)
        count = (target != ignore_index).sum().to(wide) if mean else None
        scale = count.reciprocal() if count is not None else x.new_ones((), dtype=wide)
        others = (wanted[0], False, wanted[2])
        loss, dx, _, db = _fake(x, weight, bias, target, ignore_index, mean, label_smoothing, dtype, others)
        dw = weights.new_empty(weights.shape if wanted[1] else (0,))
        bias_sum = torch.zeros_like(db, dtype=wide)
        if tokens == 0:
            dw.zero_()
        score = _kernels().rows if x.device.type == "cuda" else _rows_plain
        for start in range(0, tokens, rows or 1):
            part = x[start : start + rows]
            logits = buffer[: part.shape[0]]
            span = slice(start, start + part.shape[0])
            if biases is None:
                torch.mm(part, weights.t(), out=logits)
            else:
                torch.addmm(biases, part, weights.t(), out=logits)
            score(logits[:, :words], target[span], scale, losses[span], ignore_index, label_smoothing, any(wanted))
            if wanted[0]:
                torch.mm(logits, weights, out=dx[span])
            if wanted[1] and start == 0:
                torch.mm(logits.t(), part, out=dw)
            elif wanted[1]:
                torch.addmm(dw, logits.t(), part, out=dw)
            if wanted[2]:
                bias_sum += logits[:, :words].sum(0, dtype=wide)
        if wanted[2]:
            db.copy_(bias_sum)
        total = losses.sum()
        loss.copy_(total if count is None else total / count)
        return loss, dx, dw[:words], db


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, ignore_index: int, mean: bool,
          label_smoothing: float, dtype: torch.dtype, wanted: Sequence[bool]) -> tuple[Tensor, ...]:  # fmt: skip
    """Results of ``_forward``, not filled."""
    return (
        x.new_empty((), dtype=dtype),
        x.new_empty(x.shape if wanted[0] else (0,)),
        weight.new_empty(weight.shape if wanted[1] else (0,)),
        weight.new_empty((weight.shape[0],) if wanted[2] else (0,)),
    )


def _rows_plain(logits: Tensor, target: Tensor, scale: Tensor, losses: Tensor, ignore_index: int, label_smoothing: float,
                gradient: bool) -> None:  # fmt: skip
    """What the kernel computes, in plain formulas: ``losses`` filled, ``logits`` overwritten by their gradient · scale."""
    words = logits.shape[1]
    wide = logits.to(losses.dtype)
    used = target != ignore_index
    known = torch.where(used, target, 0)[:, None]
    lse = wide.logsumexp(1)
    loss = lse - wide.gather(1, known)[:, 0]
    if label_smoothing:
        loss = (1 - label_smoothing) * loss + label_smoothing * (lse - wide.mean(1))
    losses.copy_(torch.where(used, loss, 0))
    if gradient:
        slope = (wide - lse[:, None]).exp_()
        if label_smoothing:
            slope -= label_smoothing / words
        slope.scatter_add_(1, known, slope.new_full((1, 1), label_smoothing - 1).expand_as(known))
        logits.copy_(slope.mul_(scale).masked_fill_(~used[:, None], 0))


def _kernels() -> Any:
    """The launchers, imported at the first call on a GPU."""
    return importlib.import_module("fusionc.runtime.linear_cross_entropy")


def _backward(grad: Tensor, dx: Tensor, dw: Tensor, db: Tensor) -> tuple[Tensor, ...]:
    """The gradients times the incoming one: in their own memory if this backward is the last one that needs them."""
    if torch._C._autograd._get_current_graph_task_keep_graph():  # also true outside of a backward
        return tuple(torch.empty_like(t) if t.numel() == 0 else (t * grad).to(t.dtype) for t in (dx, dw, db))
    if grad.device.type == "cuda":
        for t in (dx, dw, db):
            _kernels().scale(t, grad)
    elif grad.item() != 1:
        for t in (dx, dw, db):
            t.mul_(grad)
    return dx.detach(), dw.detach(), db.detach()  # tensors of their own: autograd then keeps them without a copy


def _fake_backward(grad: Tensor, dx: Tensor, dw: Tensor, db: Tensor) -> tuple[Tensor, ...]:
    return torch.empty_like(dx), torch.empty_like(dw), torch.empty_like(db)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.wanted = inputs[8]
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])


def _differentiate(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    clear = getattr(ctx, "maybe_clear_saved_tensors", None)  # unless this graph is kept
    if clear is not None:
        clear()
    found = torch.ops.fusionc.linear_cross_entropy_backward(grad, *saved)
    dx, dw, db = (t if wanted else None for t, wanted in zip(found, ctx.wanted, strict=True))
    return dx, dw, db, None, None, None, None, None, None


def _no_second(ctx: Any, *_: Any) -> Any:
    raise NotImplementedError("fusionc::linear_cross_entropy has no second derivative")


_library.impl("linear_cross_entropy", _forward, "CompositeExplicitAutograd")
_library.impl("linear_cross_entropy_backward", _backward, "CompositeExplicitAutograd")
register_fake("fusionc::linear_cross_entropy", _fake, _library)
register_fake("fusionc::linear_cross_entropy_backward", _fake_backward, _library)
torch.library.register_autograd("fusionc::linear_cross_entropy", _differentiate, setup_context=_setup, lib=_library)
torch.library.register_autograd("fusionc::linear_cross_entropy_backward", _no_second, setup_context=lambda *_, **__: None,
                                lib=_library)  # fmt: skip
