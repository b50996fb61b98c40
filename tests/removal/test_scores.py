"""The weight scores against dense float64 products, their invariances, and what they can and cannot see."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch

from fusionc.removal.scores import METHODS, Coupling, Projection, residual_cosine, score


def coupling(heads: int = 4, kv: int = 2, width: int = 6, d: int = 20, bias: bool = True, norm: bool = True,
             pairing: str = "halves", seed: int = 0) -> Coupling:  # fmt: skip
    g = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    rows = torch.arange(kv * width).view(kv, width).repeat_interleave(heads // kv, 0)
    half = width // 2
    partner = {"none": None, "halves": torch.tensor([(i + half) % width for i in range(width)]),
               "neighbours": torch.tensor([i ^ 1 for i in range(width)]),
               "partial": torch.tensor([1, 0, *[-1] * (width - 2)])}[pairing]  # fmt: skip
    return Coupling(Projection(random(heads * width, d), torch.arange(heads * width).view(heads, width),
                               random(heads * width) if bias else None),
                    Projection(random(kv * width, d), rows, random(kv * width) if bias else None), 0.37,
                    1 + 0.3 * random(d) if norm else None, random(d) if norm else None, partner)  # fmt: skip


def dense(c: Coupling, method: str) -> float:
    """Products of d × d, the rotation averaged over the four quarter turns of every pair (exact for a second moment)."""

    def matrix(p: Projection) -> torch.Tensor:
        b = torch.zeros(len(p.weight), dtype=torch.float64) if p.bias is None else p.bias
        b = b if c.shift is None else b + p.weight @ c.shift
        w = p.weight if c.gain is None else p.weight @ torch.diag(c.gain)
        return torch.cat([w, b[:, None]], 1)[p.rows]

    q, k = matrix(c.query), matrix(c.key)
    if method == "layer":
        return float((c.scale * sum(a.T @ b for a, b in zip(q, k))).norm())
    if method == "heads" or c.partner is None:
        return math.sqrt(sum(float((c.scale * a.T @ b).norm()) ** 2 for a, b in zip(q, k)))
    pairs = [(i, int(j)) for i, j in enumerate(c.partner) if j > i]
    total, turns = 0.0, list(itertools.product(range(4), repeat=len(pairs)))
    for quarter in turns:
        r = torch.eye(q.shape[1], dtype=torch.float64)
        for (i, j), n in zip(pairs, quarter):
            cos, sin = math.cos(n * math.pi / 2), math.sin(n * math.pi / 2)
            r[i, i] = r[j, j] = cos
            r[i, j], r[j, i] = -sin, sin
        total += sum(float((c.scale * a.T @ r @ b).norm()) ** 2 for a, b in zip(q, k))
    return math.sqrt(total / len(turns))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pairing", ["none", "halves", "neighbours", "partial"])
@pytest.mark.parametrize("kv", [1, 2, 4])
@pytest.mark.parametrize("plain", [False, True])
def test_equals_dense_product(method: str, pairing: str, kv: int, plain: bool) -> None:
    for d in (20, 60):  # both ways to compute the layer product
        c = coupling(kv=kv, d=d, bias=not plain, norm=not plain, pairing=pairing)
        assert score(c, method) == pytest.approx(dense(c, method), rel=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_float32_path(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fusionc.removal.scores._SMALL", 0)
    c = coupling(width=16, d=80)
    found = score(c, method)
    monkeypatch.undo()
    assert found == pytest.approx(score(c, method), rel=1e-6) and found != score(c, method)


@pytest.mark.parametrize("method", METHODS)
def test_invariances(method: str) -> None:
    c = coupling()
    before = score(c, method)
    q, k = c.query, c.key
    assert q.bias is not None and k.bias is not None and c.gain is not None
    scaled = replace(
        c, query=replace(q, weight=q.weight * 8, bias=q.bias * 8), key=replace(k, weight=k.weight / 8, bias=k.bias / 8)
    )
    assert score(scaled, method) == pytest.approx(before, rel=1e-12)
    # gain moved from the norm into the weights (the shift is what the norm adds after its gain)
    moved = replace(c, gain=None, shift=None,
                    query=replace(q, weight=q.weight * c.gain, bias=q.bias + q.weight @ c.shift),
                    key=replace(k, weight=k.weight * c.gain, bias=k.bias + k.weight @ c.shift))  # fmt: skip
    assert score(moved, method) == pytest.approx(before, rel=1e-12)
    if method != "rope":  # an orthogonal change of basis inside each head
        basis = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3)))[0]

        def turn(p: Projection, heads: int) -> Projection:
            return replace(p, weight=(basis @ p.weight.view(heads, 6, -1)).reshape(p.weight.shape),
                           bias=(p.bias.view(heads, 6) @ basis.T).reshape(-1))  # type: ignore[union-attr]  # fmt: skip

        assert score(replace(c, query=turn(q, 4), key=turn(k, 2)), method) == pytest.approx(before, rel=1e-12)


def test_unknown_method() -> None:
    with pytest.raises(ValueError, match="no score named"):
        score(coupling(), "rows")


def test_residual_cosine() -> None:
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    assert residual_cosine(x, 0 * x) == pytest.approx(0, abs=1e-12)
    assert residual_cosine(x, 3 * x) == pytest.approx(0, abs=1e-6)
    assert residual_cosine(x, -2 * x) == pytest.approx(2, abs=1e-6)
