"""The CPU workloads of ``benchmarks.cpu``: what each computes, at which size, in float32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import models
from .common import Case, randint, randn

F32 = torch.float32


@dataclass(frozen=True)
class Workload:
    """``group`` is "model" or "pointwise" (pointwise work and reductions: the subset with a geometric mean of its own)."""

    name: str
    group: str
    build: Callable[[str], Case]


def pick(size: str, full: int, quick: int, tiny: int) -> int:
    """A dimension for each of the three sizes."""
    return {"full": full, "quick": quick, "tiny": tiny}[size]


def _x(*shape: int, seed: int, grad: bool = False) -> Tensor:
    return randn(*shape, seed=seed, device="cpu", dtype=F32, grad=grad)


def _smollm2(size: str) -> tuple[nn.Module, str]:
    if size == "tiny":
        return models.llama(models.LLAMA_TINY), "tiny random"
    return models.smollm2(None if size == "full" else 4)


def smollm2_decode(size: str) -> Case:
    """One token, batch 1, static cache of 256 positions with 128 filled."""
    model, note = _smollm2(size)
    decode = models.Decode(model, *((256, 128) if size != "tiny" else (32, 8)))
    vocabulary = model.config.vocab_size
    return Case(decode, lambda s: (randint(vocabulary, (1, 1), s, "cpu"),), reset=decode.reset, note=note)


def smollm2_prefill(size: str) -> Case:
    """128 tokens, batch 1, logits of the last."""
    model, note = _smollm2(size)
    length = pick(size, 128, 128, 8)
    return Case(
        models.Logits(model, last=True), lambda s: (randint(model.config.vocab_size, (1, length), s, "cpu"),), note=note
    )


def bert(size: str) -> Case:
    """2 layers of BERT base, 4×128 tokens."""
    model = models.bert(2) if size != "tiny" else models.bert(1, 64, 4)
    shape = (pick(size, 4, 1, 1), pick(size, 128, 128, 16))
    return Case(model, lambda s: (randint(1000, shape, s, "cpu"),))


def gpt2(size: str) -> Case:
    """2 layers of GPT-2 small with a head of 8192 words, 2×128 tokens."""
    model = models.gpt2(2, vocabulary=8192) if size != "tiny" else models.gpt2(1, 64, 4, 256)
    shape = (pick(size, 2, 1, 1), pick(size, 128, 128, 16))
    return Case(model, lambda s: (randint(256, shape, s, "cpu"),))


def vit(size: str) -> Case:
    """2 layers of ViT base, 2 images of 224×224."""
    image = pick(size, 224, 224, 32)
    model = models.vit(2, image=image) if size != "tiny" else models.vit(1, 64, 4, image)
    return Case(model, lambda s: (_x(pick(size, 2, 1, 1), 3, image, image, seed=s),))


def convnext(size: str) -> Case:
    """2 ConvNeXt blocks, 96 channels, 4 × 56×56."""
    torch.manual_seed(0)
    width, side = pick(size, 96, 96, 8), pick(size, 56, 28, 8)
    model = nn.Sequential(*[models.ConvNeXtBlock(width) for _ in range(2)]).eval()
    return Case(model, lambda s: (_x(pick(size, 4, 2, 1), width, side, side, seed=s),))


def mlp(size: str) -> Case:
    """RMSNorm + SwiGLU of SmolLM2's widths, 512 tokens."""
    torch.manual_seed(0)
    width, rows = pick(size, 576, 576, 32), pick(size, 512, 128, 8)
    return Case(models.SwiGLUBlock(width, width * 8 // 3).eval(), lambda s: (_x(rows, width, seed=s),))


def _rows(size: str, rows: int = 4096, width: int = 2048) -> tuple[int, int]:
    return pick(size, rows, rows // 4, 8), pick(size, width, width, 32)


def _norm(make: Callable[[int], nn.Module], train: bool) -> Callable[[str], Case]:
    def build(size: str) -> Case:
        rows, width = _rows(size)
        torch.manual_seed(0)
        module = make(width)
        for p in module.parameters():
            nn.init.normal_(p, 1.0, 0.1)
        if not train:
            return Case(module, lambda s: (_x(rows, width, seed=s),))
        return Case(
            module,
            lambda s: (_x(rows, width, seed=s, grad=True), _x(rows, width, seed=s + 1000)),
            train=True,
            cotangent=True,
        )

    return build


def _softmax(x: Tensor) -> Tensor:
    return torch.softmax(x, -1)


def softmax(size: str) -> Case:
    rows, width = _rows(size, 2048, 4096)
    return Case(_softmax, lambda s: (_x(rows, width, seed=s),))


def softmax_train(size: str) -> Case:
    rows, width = _rows(size, 2048, 4096)
    inputs = lambda s: (_x(rows, width, seed=s, grad=True), _x(rows, width, seed=s + 1000))  # noqa: E731
    return Case(_softmax, inputs, train=True, cotangent=True)


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, target)


def cross_entropy(size: str, train: bool = False) -> Case:
    """512 tokens over SmolLM2's 49152 words."""
    rows, width = _rows(size, 512, 49152)
    return Case(
        _cross_entropy, lambda s: (_x(rows, width, seed=s, grad=train), randint(width, (rows,), s, "cpu")), train=train
    )


def cross_entropy_train(size: str) -> Case:
    return cross_entropy(size, train=True)


def _gelu_chain(x: Tensor, w: Tensor, b: Tensor, r: Tensor) -> Tensor:
    return F.gelu(x * w + b) + r


def gelu_chain(size: str) -> Case:
    rows, width = _rows(size)

    def inputs(s: int) -> tuple[Tensor, ...]:
        s *= 4
        return _x(rows, width, seed=s), _x(width, seed=s + 1), _x(width, seed=s + 2), _x(rows, width, seed=s + 3)

    return Case(_gelu_chain, inputs)


class _NormSilu(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = models.RMSNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.norm(x))


WORKLOADS: tuple[Workload, ...] = (
    Workload("smollm2_decode", "model", smollm2_decode),
    Workload("smollm2_prefill", "model", smollm2_prefill),
    Workload("bert", "model", bert),
    Workload("gpt2", "model", gpt2),
    Workload("vit", "model", vit),
    Workload("convnext", "model", convnext),
    Workload("mlp_swiglu", "model", mlp),
    Workload("layernorm", "pointwise", _norm(nn.LayerNorm, False)),
    Workload("layernorm_train", "pointwise", _norm(nn.LayerNorm, True)),
    Workload("rmsnorm", "pointwise", _norm(models.RMSNorm, False)),
    Workload("rmsnorm_train", "pointwise", _norm(models.RMSNorm, True)),
    Workload("softmax", "pointwise", softmax),
    Workload("softmax_train", "pointwise", softmax_train),
    Workload("cross_entropy", "pointwise", cross_entropy),
    Workload("cross_entropy_train", "pointwise", cross_entropy_train),
    Workload("gelu_chain", "pointwise", gelu_chain),
    Workload("rmsnorm_silu", "pointwise", _norm(_NormSilu, False)),
)
