"""How strongly the queries of an attention sublayer couple to its keys, from the weights alone.

Source: "Data-Free Pruning of Self-Attention Layers in LLMs" (Gate-Norm, arXiv 2512.20636): rank by the Frobenius norm of
the product of the query and key projections, drop the lowest.  The paper leaves heads, bias, norm gain, GQA and RoPE open;
the three definitions here are ours (q_h, k_h: the head's projection with the norm's gain folded in and one more column for
the bias, s: the scale of the scores):

    layer   ‖Σ_h s·q_hᵀ k_h‖      the product of the whole matrices, the most literal reading
    heads   (Σ_h ‖s·q_hᵀ k_h‖²)^½  no cancellation between heads, which is what the scores see
    rope    the same, averaged over uniform phases of the rotation: only the rows' norms matter

None of them needs a d × d product where the heads are narrower than d: ‖AᵀB‖² = ⟨AAᵀ, BBᵀ⟩.
A low score predicts attention weights that are nearly uniform, not an output that is nearly zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

METHODS = ("layer", "heads", "rope")
_CHUNK = {"cpu": 1 << 20}  # elements folded at a time: on a CPU what stays in its cache, elsewhere what fills it
_LARGE = 1 << 26
_SMALL = 1 << 22  # elements up to which float64 costs nothing worth saving


@dataclass(frozen=True)
class Projection:
    """Rows of one projection by head: ``weight`` [out, d], ``rows`` [heads, head_dim] picks its rows, ``bias`` [out]."""

    weight: Tensor
    rows: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True)
class Coupling:
    """What the scores of one sublayer are made of.

    ``key.rows`` has one line per query head (GQA: repeated lines). ``gain``, ``shift`` [d]: of the norm that feeds both.
    ``partner`` [head_dim]: RoPE rotates dimension i with dimension partner[i]; -1 where nothing is rotated; None: no RoPE.
    """

    query: Projection
    key: Projection
    scale: float = 1.0
    gain: Tensor | None = None
    shift: Tensor | None = None
    partner: Tensor | None = None


def folded(p: Projection, gain: Tensor | None, shift: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[out, d + 1]: weight times gain, and the bias (with what the norm's shift adds to it) as last column. [out, d] where
    there is neither bias nor shift: a column of zeros adds nothing to a score."""
    weight = p.weight.detach().to(dtype)
    if p.bias is None and shift is None:
        return weight if gain is None else weight * gain.detach().to(dtype)
    bias = torch.zeros(weight.shape[0], dtype=dtype, device=weight.device)
    if p.bias is not None:
        bias = bias + p.bias.detach().to(dtype)
    if shift is not None:
        bias = bias + weight @ shift.detach().to(dtype)
    if gain is not None:
        weight = weight * gain.detach().to(dtype)
    return torch.cat([weight, bias[:, None]], 1)


def score(c: Coupling, method: str = "layer") -> float:
    """The score of one sublayer: "layer" (S1), "heads" (S2) or "rope" (S3; without RoPE the same as S2)."""
    if method not in METHODS:
        raise ValueError(f"no score named {method!r}; there are {', '.join(METHODS)}")
    dtype = torch.float64 if c.query.weight.numel() <= _SMALL else torch.float32
    if method == "layer":
        query, key = _sides(c, c.query, c.key, dtype)
        square = _layer(query, key, c.query.rows.to(query.device), c.key.rows.to(query.device))
    else:
        square = 0.0
        chunk = _CHUNK.get(c.query.weight.device.type, _LARGE)
        some = max(1, chunk // (c.query.rows.shape[1] * c.query.weight.shape[1]))  # heads at a time
        for qrows, krows in zip(c.query.rows.split(some), c.key.rows.split(some)):
            a, b = _sides(c, _picked(c.query, qrows), _picked(c.key, krows), dtype)
            a, b = a.view(*qrows.shape, -1), b.view(*krows.shape, -1)
            square += _product(a, b) if method == "heads" or c.partner is None else _rotated(a, b, c.partner)
    return abs(c.scale) * math.sqrt(max(square, 0.0))


def _sides(c: Coupling, query: Projection, key: Projection, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Both, folded, with a bias column on both if either has one."""
    a, b = (folded(p, c.gain, c.shift, dtype) for p in (query, key))
    wide = max(a.shape[1], b.shape[1])
    return tuple(m if m.shape[1] == wide else torch.nn.functional.pad(m, (0, 1)) for m in (a, b))  # type: ignore[return-value]


def _picked(p: Projection, rows: Tensor) -> Projection:
    flat = rows.flatten()
    first = int(flat[0])
    if bool((flat == torch.arange(first, first + len(flat))).all()):  # one block of the weight: no copy
        picked: Any = slice(first, first + len(flat))
    else:
        picked = flat.to(p.weight.device)
    return Projection(p.weight.detach()[picked], rows, None if p.bias is None else p.bias.detach()[picked])


def _layer(query: Tensor, key: Tensor, qrows: Tensor, krows: Tensor) -> float:
    # Heads that share keys: (Σ q_h)ᵀ k, so their queries are added up first.
    kept, group = torch.unique(krows, dim=0, return_inverse=True)
    a = query[qrows]  # heads, head_dim, d
    a = torch.zeros(len(kept), *a.shape[1:], dtype=a.dtype, device=a.device).index_add_(0, group, a).flatten(0, 1)
    b = key[kept].flatten(0, 1)
    if 2 * len(a) <= a.shape[1]:
        return float(((a @ a.T) * (b @ b.T)).sum(dtype=torch.float64))
    return sum(float((part.T @ b).square().sum(dtype=torch.float64)) for part in a.split(1024, dim=1))


def _product(a: Tensor, b: Tensor) -> float:
    return float(((a @ a.mT) * (b @ b.mT)).sum(dtype=torch.float64))


def _rotated(a: Tensor, b: Tensor, partner: Tensor) -> float:
    partner = partner.to(a.device)
    turned, still = (found.nonzero()[:, 0] for found in (partner >= 0, partner < 0))
    # partial rotation: the rest is a plain product, and the mixed terms average to 0
    total = _product(a[:, still], b[:, still]) if len(still) else 0.0
    q, k = (torch.linalg.vector_norm(m, dim=2).double().square() for m in (a, b))
    mates = partner[turned]
    pairs = (q[:, turned] + q[:, mates]) * (k[:, turned] + k[:, mates])  # each pair twice
    return total + 0.25 * float(pairs.sum())


def residual_cosine(x: Tensor, y: Tensor) -> float:
    """LLM-Drop's score of a sublayer that makes x + y of x: 1 − mean over tokens of cos(x, x + y); x, y [..., d]."""
    x, y = x.double().reshape(-1, x.shape[-1]), y.double().reshape(-1, y.shape[-1])
    return 1.0 - float(torch.nn.functional.cosine_similarity(x, x + y, dim=-1).mean())
