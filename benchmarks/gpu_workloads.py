"""The workloads of the GPU baselines (see ``benchmarks/README.md``), in bfloat16 unless they say otherwise.

Sizes: "full" is what the baselines measured, "quick" has the same structure at about an eighth of the work, "tiny" runs
on a CPU in well under a second.  Everything is built directly on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import models
from .common import Case, randint, randn

BF16 = torch.bfloat16


@dataclass(frozen=True)
class Where:
    """Device and size of a run, with the helpers that depend on them."""

    device: str
    size: str

    def pick(self, full: int, quick: int, tiny: int) -> int:
        return {"full": full, "quick": quick, "tiny": tiny}[self.size]

    @property
    def tiny(self) -> bool:
        return self.size == "tiny"

    def x(self, *shape: int, seed: int, grad: bool = False, dtype: torch.dtype = BF16) -> Tensor:
        return randn(*shape, seed=seed, device=self.device, dtype=dtype, grad=grad)

    def tokens(self, high: int, *shape: int, seed: int) -> Tensor:
        return randint(high, shape, seed, self.device)

    @contextmanager
    def building(self) -> Iterator[None]:
        """Parameters are made on the device and in bfloat16 at once."""
        before = torch.get_default_dtype()
        torch.set_default_dtype(BF16)
        torch.manual_seed(0)
        try:
            with torch.device(self.device):
                yield
        finally:
            torch.set_default_dtype(before)


@dataclass(frozen=True)
class Workload:
    """``weight`` orders the runs (long ones first); ``limit_ms`` is the physical limit at full size where it is known."""

    name: str
    build: Callable[[Where], Case]
    limit_ms: float | None = None
    weight: int = 1


def _gelu_chain(x: Tensor, w: Tensor, b: Tensor, r: Tensor) -> Tensor:
    return F.gelu(x * w + b) + r


def gelu_chain(w: Where) -> Case:
    n = w.pick(8192, 2048, 32)
    return Case(
        _gelu_chain, lambda s: (w.x(n, n, seed=s), w.x(n, seed=s + 1), w.x(n, seed=s + 2), w.x(n, n, seed=s + 3))
    )


def residual_rmsnorm(w: Where) -> Case:
    rows, width = w.pick(16384, 2048, 8), w.pick(4096, 4096, 32)
    with w.building():
        module = models.ResidualRMSNorm(width)
    return Case(module, lambda s: (w.x(rows, width, seed=s), w.x(rows, width, seed=s + 1)))


def norm_train(make: Callable[[int], nn.Module]) -> Callable[[Where], Case]:
    def build(w: Where) -> Case:
        rows, width = w.pick(16384, 2048, 8), w.pick(4096, 4096, 32)
        with w.building():
            module = make(width)
            for p in module.parameters():
                nn.init.normal_(p, 1.0, 0.1)
        return Case(
            module,
            lambda s: (w.x(rows, width, seed=s, grad=True), w.x(rows, width, seed=s + 1)),
            train=True,
            cotangent=True,
        )

    return build


def _softmax(x: Tensor) -> Tensor:
    return torch.softmax(x, -1)


def softmax_long(w: Where) -> Case:
    rows, width = w.pick(4096, 512, 4), w.pick(65536, 65536, 512)
    return Case(_softmax, lambda s: (w.x(rows, width, seed=s),))


def lm_head_ce(w: Where) -> Case:
    rows, width, words = w.pick(8192, 1024, 8), w.pick(4096, 4096, 32), w.pick(128256, 128256, 100)
    with w.building():
        module = models.HeadLoss(width, words)
    # float64 logits, their softmax and its gradient would be 8.4 GB each: fine on 139 GB, and the loss is worth it.
    return Case(module, lambda s: (w.x(rows, width, seed=s, grad=True), w.tokens(words, rows, seed=s + 1)), train=True)


def mlp(rows: int) -> Callable[[Where], Case]:
    def build(w: Where) -> Case:
        width, inner = w.pick(4096, 4096, 32), w.pick(14336, 14336, 64)
        with w.building():
            module = models.SwiGLUBlock(width, inner)
        count = min(rows, w.pick(rows, 1024, 16))
        return Case(module, lambda s: (w.x(1, count, width, seed=s),))

    return build


def _llama(w: Where, layers: int) -> nn.Module:
    with w.building():
        if w.tiny:
            return models.llama(models.LLAMA_TINY)
        return models.llama(models.LLAMA_1B, num_hidden_layers=w.pick(layers, 4, 2))


def llama_decode(w: Where) -> Case:
    model = _llama(w, 16)
    decode = models.Decode(model, w.pick(1024, 1024, 32), w.pick(512, 512, 8))
    return Case(decode, lambda s: (w.tokens(model.config.vocab_size, 1, 1, seed=s),), reset=decode.reset)


def llama_prefill(w: Where) -> Case:
    model = _llama(w, 16)
    shape = (w.pick(4, 1, 2), w.pick(2048, 1024, 16))
    return Case(models.Logits(model), lambda s: (w.tokens(model.config.vocab_size, *shape, seed=s),))


def llama_train(w: Where) -> Case:
    model = _llama(w, 8).train()
    shape = (w.pick(4, 1, 2), w.pick(2048, 1024, 16))
    case = Case(models.TrainLoss(model), lambda s: (w.tokens(model.config.vocab_size, *shape, seed=s),), train=True)
    if w.size == "full":  # float64 attention scores and logits of all layers, kept for the backward, are over 139 GB
        case.reference_dtype = torch.float32
    return case


def moe(batch: int, length: int) -> Callable[[Where], Case]:
    def build(w: Where) -> Case:
        with w.building():
            module = models.qwen3_moe(w.pick(4, 2, 2), tiny=w.tiny)
        words = 256 if w.tiny else 32000
        shape = (batch if length == 1 else w.pick(batch, 1, 2), min(length, w.pick(length, 1024, 16)))
        return Case(module, lambda s: (w.tokens(words, *shape, seed=s),), prepare_reference=models.loop_over_experts)

    return build


def bert(w: Where) -> Case:
    with w.building():
        module = models.bert(2, 64, 4) if w.tiny else models.bert(w.pick(12, 4, 1))
    shape = (w.pick(32, 8, 2), w.pick(128, 128, 16))
    return Case(module, lambda s: (w.tokens(1000, *shape, seed=s),))


def gpt2(w: Where) -> Case:
    with w.building():
        module = models.gpt2(2, 64, 4, 256) if w.tiny else models.gpt2(w.pick(12, 4, 1))
    shape = (1, w.pick(128, 128, 16))
    return Case(module, lambda s: (w.tokens(256, *shape, seed=s),))


def _images(w: Where, module: nn.Module, count: int, channels: int, side: int, last: bool) -> Case:
    layout = torch.channels_last if last else torch.contiguous_format
    module = module.eval().to(memory_format=layout)
    return Case(module, lambda s: (w.x(count, channels, side, side, seed=s).to(memory_format=layout),))


def _lively_norms(module: nn.Module) -> nn.Module:
    """Batch norms with statistics as after training: the fresh ones (mean 0, variance 1) would hide a wrong fold."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.running_mean, 0.0, 0.1)
            nn.init.uniform_(part.running_var, 0.5, 1.5)
            nn.init.uniform_(part.weight, 0.5, 1.0)
            nn.init.normal_(part.bias, 0.0, 0.1)
    return module


def resnet50(w: Where) -> Case:
    with w.building():
        module = _lively_norms(models.ResNet((1, 1, 1, 1)) if w.tiny else models.ResNet())
    return _images(w, module, w.pick(64, 16, 2), 3, w.pick(224, 224, 32), last=True)


def convnext(w: Where) -> Case:
    with w.building():
        module = models.ConvNeXt((1, 1, 1, 1), (8, 16, 16, 16)) if w.tiny else models.ConvNeXt()
    return _images(w, module, w.pick(64, 16, 2), 3, w.pick(224, 224, 32), last=True)


def large_kernel(size: int, last: bool) -> Callable[[Where], Case]:
    def build(w: Where) -> Case:
        width = w.pick(256, 256, 4)
        with w.building():
            module = _lively_norms(models.LargeKernelBlock(width, size))
        return _images(w, module, w.pick(32, 4, 1), width, w.pick(56, 56, 14), last)

    return build


def small_images(w: Where) -> Case:
    """float32 in, float16 out: 64 images of 60 to 66 rows."""
    count, width = w.pick(64, 64, 4), w.pick(120, 120, 8)
    module = models.SmallImages().to(w.device)
    inputs = lambda s: tuple(  # noqa: E731
        w.x(60 + i % 7, width, 3, seed=s * 100 + i, dtype=torch.float32) for i in range(count)
    )
    return Case(module, inputs)


def alibi(w: Where) -> Case:
    batch, heads, length, width = w.pick(4, 1, 1), w.pick(16, 16, 2), w.pick(2048, 2048, 16), w.pick(64, 64, 8)
    with torch.device(w.device):
        module = models.ALiBi(heads, length).to(BF16)
    return Case(module, lambda s: tuple(w.x(batch, heads, length, width, seed=3 * s + i) for i in range(3)))


WORKLOADS: tuple[Workload, ...] = (
    Workload("gelu_chain", gelu_chain, 0.094),
    Workload("residual_rmsnorm", residual_rmsnorm, 0.125),
    Workload("layernorm_train", norm_train(nn.LayerNorm), 0.156),
    Workload("rmsnorm_train", norm_train(models.RMSNorm), 0.156),
    Workload("softmax_65536", softmax_long, 0.250),
    Workload("lm_head_ce_train", lm_head_ce, 32.7, 3),
    Workload("mlp_1", mlp(1), 0.082),
    Workload("mlp_16", mlp(16), 0.082),
    Workload("mlp_8192", mlp(8192), 3.65),
    Workload("llama_decode", llama_decode, 0.575, 5),
    Workload("llama_prefill", llama_prefill, None, 6),
    Workload("llama_train", llama_train, None, 7),
    Workload("moe_prefill", moe(4, 2048), 4.7, 5),
    Workload("moe_decode", moe(8, 1), 0.5, 5),
    Workload("bert", bert, 0.9, 4),
    Workload("gpt2", gpt2, 0.06, 4),
    Workload("resnet50", resnet50, 0.9, 4),
    Workload("convnext", convnext, 0.9, 4),
    Workload("largekernel_31_nchw", large_kernel(31, False), 0.74, 3),
    Workload("largekernel_31_nhwc", large_kernel(31, True), 0.74, 3),
    Workload("largekernel_13_nchw", large_kernel(13, False), 0.13, 2),
    Workload("largekernel_7_nhwc", large_kernel(7, True), 0.04, 2),
    Workload("small_images", small_images, 0.003, 2),
    Workload("alibi_attention", alibi, 0.087, 2),
)
