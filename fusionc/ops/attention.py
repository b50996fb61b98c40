"""fusionc::attention: softmax over keys of any function of the scores, times values, without the scores in memory.

Math       z[b,h,i,j] = score(s, i, j, operands…)      s = Σ_d q[b,h,i,d] k[b,h/g,j,d]      g query heads share a key head
           out = softmax_j(z) v       lse = log₂ Σ_j exp(z)   (kept for the backward)
Shapes     q [B, H, Q, D]; k [B, H/g, K, D]; v [B, H/g, K, E]; operands [B|1, H|1, Q|1, K|1]; score as in ``score.py``
           → out [B, H, Q, E] contiguous, of q's dtype; lse [B, H, 2, Q] float32, summed along the 2
Backward   with p = exp(z - lse), δ = Σ_e dout·out:  dz = p (dout vᵀ - δ);  ds = dz ∂z/∂s;  dq = ds k;  dk = dsᵀ q;
           dv = pᵀ dout;  an operand's gradient is dz ∂z/∂operand, summed to its shape
Source     FlashAttention-2 (Dao, arXiv 2307.08691) for the order of computation on the GPU

A row in which no key has a finite score is NaN, as in eager. Elements of v at masked places are not read where whole
tiles are skipped: a NaN there does not spread as it does in eager's 0·NaN.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import fell_back
from .fake import register_fake
from .score import LOG2E, K, Q, S, T, Term, as_float, evaluate, gradient, load, parse

_LIBRARY = torch.library.Library("fusionc", "FRAGMENT")
_LIBRARY.define("attention(Tensor q, Tensor k, Tensor v, Tensor[] operands, str score) -> (Tensor, Tensor)")
_LIBRARY.define("attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
                "Tensor[] operands, str score) -> (Tensor, Tensor, Tensor, Tensor)")  # fmt: skip
_LIBRARY.define("attention_operand_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor lse, Tensor delta, "
                "Tensor[] operands, str score, int which) -> Tensor")  # fmt: skip


def kind_of(dtype: torch.dtype) -> str:
    """The kind of a score expression's operand: "f", "b" or "i"."""
    return "f" if dtype.is_floating_point else "b" if dtype == torch.bool else "i"


# -- reference --------------------------------------------------------------------------------------------------------


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _shared(x: Tensor, heads: int) -> Tensor:
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def _leaves(q: Tensor, k: Tensor, operands: Sequence[Tensor]) -> dict[Term, Tensor]:
    wide = _wide(q)
    s = q.to(wide) @ _shared(k, q.shape[1]).to(wide).transpose(-1, -2)
    leaves = {S: s, Q: torch.arange(q.shape[2], device=q.device)[:, None], K: torch.arange(k.shape[2], device=q.device)}
    leaves.update({load(i, kind_of(x.dtype)): x for i, x in enumerate(operands)})
    return leaves


def _reference(q: Tensor, k: Tensor, v: Tensor, operands: Sequence[Tensor], score: str) -> tuple[Tensor, Tensor]:
    leaves = _leaves(q, k, operands)
    z = evaluate(as_float(parse(score)), leaves, _wide(q)).expand(leaves[S].shape)
    out = torch.softmax(z, -1) @ _shared(v, q.shape[1]).to(z.dtype)
    top = z.amax(-1).clamp(-3.4e38 / LOG2E, 3.4e38 / LOG2E)
    rest = torch.exp(z - top[..., None]).sum(-1).log()
    return out.to(q.dtype).contiguous(), (torch.stack((top + rest, torch.zeros_like(rest)), 2) * LOG2E).float()


def _reference_gradient(term: Term, wrt: Term, leaves: dict[Term, Tensor], grad: Tensor, v: Tensor,
                        delta: Tensor) -> tuple[Tensor, Tensor]:  # fmt: skip
    wide = leaves[S].dtype
    z = evaluate(term, leaves, wide).expand(leaves[S].shape)
    p = torch.softmax(z, -1)
    dz = p * (grad.to(wide) @ v.to(wide).transpose(-1, -2) - delta[..., None])
    return p, evaluate(gradient(term, wrt), {**leaves, T: dz}, wide).expand(z.shape)


def _reference_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
                        operands: Sequence[Tensor], score: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    heads, shared, wide = q.shape[1], k.shape[1], _wide(q)
    leaves, full = _leaves(q, k, operands), _shared(v, heads)
    delta = (grad.to(wide) * out.to(wide)).sum(-1)
    p, ds = _reference_gradient(as_float(parse(score)), S, leaves, grad, full, delta)

    def to_shared(x: Tensor) -> Tensor:
        return x.unflatten(1, (shared, heads // shared)).sum(2)

    dq = ds @ _shared(k, heads).to(wide)
    dk = to_shared(ds.transpose(-1, -2) @ q.to(wide))
    dv = to_shared(p.transpose(-1, -2) @ grad.to(wide))
    return (*(x.to(like.dtype).contiguous() for x, like in ((dq, q), (dk, k), (dv, v))), delta.float())  # type: ignore[return-value]


def _reference_operand(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor,
                       operands: Sequence[Tensor], score: str, which: int) -> Tensor:  # fmt: skip
    leaves, x = _leaves(q, k, operands), operands[which]
    _, found = _reference_gradient(as_float(parse(score)), load(which, "f"), leaves, grad, _shared(v, q.shape[1]),
                                   delta.to(_wide(q)))  # fmt: skip
    return found.sum_to_size(x.shape).to(x.dtype).contiguous()


# -- what the dispatcher knows ----------------------------------------------------------------------------------------


def _fake(q: Tensor, k: Tensor, v: Tensor, operands: Sequence[Tensor], score: str) -> tuple[Tensor, Tensor]:
    b, h, n, _ = q.shape
    return q.new_empty((b, h, n, v.shape[-1])), q.new_empty((b, h, 2, n), dtype=torch.float32)


def _fake_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, operands: Sequence[Tensor],
                   score: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return (q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), q.new_empty(q.shape[:3], dtype=torch.float32))


def _fake_operand(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, operands: Sequence[Tensor],
                  score: str, which: int) -> Tensor:  # fmt: skip
    return operands[which].new_empty(operands[which].shape)


def _on_gpu(name: str, reference: Any) -> Any:
    """The launcher of the kernels, imported at the first call: a compilation that only inserts calls needs none.

    A kernel that does not build on some GPU costs memory and time, with one warning, not the answer.
    """

    def call(*args: Any) -> Any:
        try:
            return getattr(importlib.import_module("fusionc.runtime.attention"), name)(*args)
        except torch.OutOfMemoryError:
            raise
        except Exception as e:  # noqa: BLE001 - whatever Triton or the driver say
            fell_back(name, e, "the scores are computed in memory instead")
            return reference(*args)

    return call


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, operands, score = inputs
    ctx.score, ctx.wanted = score, [x.requires_grad for x in operands]
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, *output, *operands)


def _backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    q, k, v, out, lse, *operands = ctx.saved_tensors
    ops = torch.ops.fusionc
    dq, dk, dv, delta = ops.attention_backward(grad, q, k, v, out, lse, operands, ctx.score)
    others = [ops.attention_operand_backward(grad, q, k, v, lse, delta, operands, ctx.score, i) if wanted else None
              for i, wanted in enumerate(ctx.wanted)]  # fmt: skip
    return dq, dk, dv, others, None


for _name, _cpu, _meta in (("attention", _reference, _fake), ("attention_backward", _reference_backward, _fake_backward),
                           ("attention_operand_backward", _reference_operand, _fake_operand)):  # fmt: skip
    _LIBRARY.impl(_name, _cpu, "CPU")
    _LIBRARY.impl(_name, _on_gpu(_name, _cpu), "CUDA")
    register_fake(f"fusionc::{_name}", _meta, _LIBRARY)
torch.library.register_autograd("fusionc::attention", _backward, setup_context=_keep, lib=_LIBRARY)
