"""What the finder reads out of real models: heads, gain, shift, bias, scale and rotary pairs, against the modules by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fusionc.removal.capture import captured
from fusionc.removal.scores import score

from .models import inputs, make

HALVES, NEIGHBOURS = [4, 5, 6, 7, 0, 1, 2, 3], [1, 0, 3, 2, 5, 4, 7, 6]


def modules(model: Any, kind: str) -> dict[str, Any]:
    """Queries and keys [heads, 8, 32] with biases [heads, 8] of layer 3, and the norm that feeds them."""
    layer = next(m for path, m in model.named_modules() if path.endswith((".3", "h.3")) and hasattr(m, "forward"))
    names = dict(layer.named_modules())

    def split(weight: Tensor, heads: int) -> Tensor:
        return weight.detach().double().view(heads, 8, *weight.shape[1:])

    if kind in ("Llama", "Gemma", "Cohere", "GPTJ"):
        a = names["attn" if kind == "GPTJ" else "self_attn"]
        q, k = split(a.q_proj.weight, 4), split(a.k_proj.weight, len(a.k_proj.weight) // 8)
        norm = names["ln_1" if kind == "GPTJ" else "input_layernorm"]
        return {"q": q, "k": k, "norm": norm, "plus": kind == "Gemma"}
    if kind == "Phi3":
        w = names["self_attn"].qkv_proj.weight
        return {"q": split(w[:32], 4), "k": split(w[32:48], 2), "norm": names["input_layernorm"]}
    if kind == "GPT2":
        w, b = names["attn"].c_attn.weight.T, names["attn"].c_attn.bias
        return {"q": split(w[:32], 4), "k": split(w[32:64], 4), "qb": split(b[:32], 4), "kb": split(b[32:64], 4),
                "norm": names["ln_1"]}  # fmt: skip
    assert kind == "GPTNeoX"
    fused = names["attention"].query_key_value
    w, b = (t.detach().double().view(4, 24, *t.shape[1:]) for t in (fused.weight, fused.bias))
    return {"q": w[:, :8], "k": w[:, 8:16], "qb": b[:, :8], "kb": b[:, 8:16], "norm": names["input_layernorm"]}


@pytest.mark.parametrize("kind, partner", [
    ("Llama", HALVES), ("Gemma", HALVES), ("Phi3", HALVES), ("Cohere", NEIGHBOURS), ("GPT2", None),
    ("GPTJ", [1, 0, 3, 2, -1, -1, -1, -1]), ("GPTNeoX", [1, 0, -1, -1, -1, -1, -1, -1])])  # fmt: skip
def test_score_equals_dense_product_of_the_modules(kind: str, partner: list[int] | None) -> None:
    torch._dynamo.reset()
    model = make(kind)
    with captured(model, inputs(kind)) as finder:
        c = finder.coupling(finder.sublayers()[3])
        found = {method: score(c, method) for method in ("layer", "heads")}
        pairs = None if c.partner is None else c.partner.tolist()
    m = modules(model, kind)
    gain = m["norm"].weight.detach().double() + (1 if m.get("plus") else 0)
    shift = getattr(m["norm"], "bias", None)

    def folded(w: Tensor, b: Tensor | None) -> Tensor:
        bias = torch.zeros(w.shape[:2], dtype=torch.float64) if b is None else b
        bias = bias if shift is None else bias + w @ shift.detach().double()
        return torch.cat([w * gain, bias[..., None]], 2)

    q, k = folded(m["q"], m.get("qb")), folded(m["k"], m.get("kb"))
    products = 8**-0.5 * q.mT @ k.repeat_interleave(len(q) // len(k), 0)
    assert found["layer"] == pytest.approx(float(products.sum(0).norm()), rel=1e-6)
    assert found["heads"] == pytest.approx(float(products.norm()), rel=1e-6)
    assert pairs == partner


def test_a_long_cache_costs_no_memory() -> None:
    """Row numbers of keys that come out of a cache of a million positions: they repeat, and are not written out."""
    from fusionc.removal.rows import reshaped

    ids = torch.arange(128, dtype=torch.int32).expand(32, 40, 1, 1 << 20, 128)
    wide = reshaped(ids.expand(32, 40, 2, 1 << 20, 128), (32, 80, 1 << 20, 128))
    assert wide.shape == (32, 80, 1 << 20, 128) and wide.untyped_storage().nbytes() <= 4 * 128
    assert wide[3, 7, 5].tolist() == list(range(128))
    x = torch.arange(24).view(2, 3, 4)
    for shape in ((6, 4), (-1,), (2, 12), (4, 3, 2), (2, 1, 3, 4, 1)):
        assert torch.equal(reshaped(x, shape), x.reshape(shape))
        assert torch.equal(reshaped(x[:1].expand(2, 3, 4), shape), x[:1].expand(2, 3, 4).reshape(shape))
        assert torch.equal(reshaped(x[..., :1].expand(2, 3, 4), shape), x[..., :1].expand(2, 3, 4).reshape(shape))
    with pytest.raises(ValueError, match="do not fit"):
        reshaped(x, (5, 5))
