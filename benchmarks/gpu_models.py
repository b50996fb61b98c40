"""Twenty further models for `benchmarks.gpu --models`: Hugging Face and timm, inference and training, random weights.

They are other families than those of the table (`gpu_workloads.py`), at published shapes where that is not too long to
measure, so that a compiler tuned to the table shows it.  bfloat16, dropout off (its random numbers differ by backend),
convolutional networks channels-last.  timm is needed for the rows that name it, transformers for the others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import models
from .common import Case
from .gpu_workloads import Where, Workload

_TINY: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}


class Pairs(nn.Module):
    """An encoder and decoder's last hidden state."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, target: Tensor) -> Tensor:
        return self.model(input_ids=tokens, decoder_input_ids=target, use_cache=False).last_hidden_state


class MaskedLoss(nn.Module):
    """A masked language model's loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        return self.model(input_ids=tokens, labels=labels).loss


class ClassLoss(nn.Module):
    """An image classifier's cross entropy in float32."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.model(images).float(), labels)


def _hf(w: Where, config: str, model: str, fields: dict[str, Any], tiny: dict[str, Any], **more: Any) -> nn.Module:
    """A transformers model by the names of its classes, in evaluation mode."""
    import transformers

    with w.building():
        made = getattr(transformers, config)(**{**fields, **(tiny if w.tiny else {})})
        return models.lively(getattr(transformers, model)(made, **more))


def _tokens(w: Where, module: nn.Module, batch: int, length: int, words: int, train: bool = False) -> Case:
    shape = (w.pick(batch, max(1, batch // 8), 2), w.pick(length, length, 16))
    return Case(module, lambda s: (w.tokens(words, *shape, seed=s),), train=train)


def distilbert(w: Where) -> Case:
    tiny = {"dim": 64, "n_heads": 4, "n_layers": 2, "hidden_dim": 128}
    module = _hf(w, "DistilBertConfig", "DistilBertModel", {}, tiny)
    return _tokens(w, models.Hidden(module, cached=False), 32, 128, 1000)


def deberta(w: Where) -> Case:
    fields = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
              "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 256}  # fmt: skip
    module = _hf(w, "DebertaV2Config", "DebertaV2Model", fields, _TINY)
    return _tokens(w, models.Hidden(module, cached=False), 8, 256, 1000)


def t5(w: Where) -> Case:
    tiny = {"d_model": 64, "num_layers": 2, "num_heads": 4, "d_ff": 128, "d_kv": 16}
    module = Pairs(_hf(w, "T5Config", "T5Model", {}, tiny))
    batch, length = w.pick(16, 2, 2), w.pick(128, 128, 16)
    return Case(
        module, lambda s: (w.tokens(1000, batch, length, seed=s), w.tokens(1000, batch, length // 2, seed=s + 1))
    )


def opt(w: Where) -> Case:
    tiny = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "ffn_dim": 128,
        "word_embed_proj_dim": 64,
    }
    module = _hf(w, "OPTConfig", "OPTForCausalLM", {"word_embed_proj_dim": 768}, tiny)
    return _tokens(w, models.Logits(module), 4, 512, 1000)


def gemma2(w: Where) -> Case:
    fields = {"vocab_size": 32000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 8,
              "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "sliding_window": 512,
              "attn_implementation": "eager"}  # fmt: skip
    tiny = _TINY | {"vocab_size": 256, "num_key_value_heads": 2, "head_dim": 16}
    return _tokens(w, models.Logits(_hf(w, "Gemma2Config", "Gemma2ForCausalLM", fields, tiny)), 2, 1024, 256)


_QWEN3: dict[str, Any] = {"vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
                          "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
                          "tie_word_embeddings": True, "attn_implementation": "sdpa"}  # fmt: skip
_QWEN3_TINY = _TINY | {"vocab_size": 256, "num_key_value_heads": 2, "head_dim": 16}


def qwen3(w: Where) -> Case:
    return _tokens(w, models.Logits(_hf(w, "Qwen3Config", "Qwen3ForCausalLM", _QWEN3, _QWEN3_TINY)), 2, 1024, 256)


def qwen3_decode(w: Where) -> Case:
    batch = w.pick(8, 8, 2)
    model = _hf(w, "Qwen3Config", "Qwen3ForCausalLM", _QWEN3, _QWEN3_TINY)
    decode = models.Decode(model, w.pick(1024, 1024, 32), w.pick(512, 512, 8), batch)
    return Case(decode, lambda s: (w.tokens(256, batch, 1, seed=s),), reset=decode.reset)


def qwen3_train(w: Where) -> Case:
    fields = _QWEN3 | {"num_hidden_layers": 8, "vocab_size": 32000}
    model = _hf(w, "Qwen3Config", "Qwen3ForCausalLM", fields, _QWEN3_TINY).train()
    return _tokens(w, models.TrainLoss(model), 2, 1024, 256, train=True)


def whisper_encoder(w: Where) -> Case:
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    fields = {"d_model": 512, "encoder_layers": 6, "encoder_attention_heads": 8, "encoder_ffn_dim": 2048}
    tiny = {"d_model": 64, "encoder_attention_heads": 4, "encoder_ffn_dim": 128, "max_source_positions": 20}
    with w.building():
        config = WhisperConfig(**fields | (tiny if w.tiny else {}))
        module = models.lively(WhisperEncoder(config))
    batch, frames = w.pick(8, 2, 2), 2 * config.max_source_positions
    return Case(
        models.Hidden(module, name="input_features", cached=False),
        lambda s: (w.x(batch, config.num_mel_bins, frames, seed=s),),
    )


def clip_vision(w: Where) -> Case:
    fields = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
    fields |= {"image_size": w.pick(224, 224, 32), "patch_size": 16}
    module = _hf(w, "CLIPVisionConfig", "CLIPVisionModel", fields, _TINY)
    images, side = w.pick(32, 4, 2), w.pick(224, 224, 32)
    module = models.Hidden(module, name="pixel_values", cached=False)
    return Case(module, lambda s: (w.x(images, 3, side, side, seed=s),))


def bert_train(w: Where) -> Case:
    fields = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    module = MaskedLoss(_hf(w, "BertConfig", "BertForMaskedLM", fields, _TINY).train())
    shape = (w.pick(32, 4, 2), w.pick(128, 128, 16))
    return Case(module, lambda s: (w.tokens(1000, *shape, seed=s), w.tokens(1000, *shape, seed=s + 1)), train=True)


def gpt2_train(w: Where) -> Case:
    fields = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    tiny = {"n_embd": 64, "n_head": 4, "n_layer": 2, "vocab_size": 256}
    model = _hf(w, "GPT2Config", "GPT2LMHeadModel", fields, tiny).train()
    return _tokens(w, models.TrainLoss(model), 8, 512, 256, train=True)


def timm_model(
    name: str, images: int, train: bool = False, last: bool = True, sized: bool = False
) -> Callable[[Where], Case]:
    """A timm network; ``last``: channels-last, ``sized``: its constructor takes the image's side."""

    def build(w: Where) -> Case:
        import timm

        side = w.pick(224, 224, 64)
        with w.building():
            module = timm.create_model(name, pretrained=False, **({"img_size": side} if sized else {}))
            module = models.lively(module)
        layout = torch.channels_last if last else torch.contiguous_format
        module = module.to(memory_format=layout).train(train)
        count = w.pick(images, max(2, images // 8), 2)

        def inputs(s: int) -> tuple[Tensor, ...]:
            x = w.x(count, 3, side, side, seed=s).to(memory_format=layout)
            return (x, w.tokens(1000, count, seed=s + 1)) if train else (x,)

        return Case(ClassLoss(module) if train else module, inputs, train=train)

    return build


MODELS: tuple[Workload, ...] = (
    Workload("distilbert", distilbert),
    Workload("deberta_v2", deberta),
    Workload("t5_small", t5),
    Workload("opt_125m", opt),
    Workload("gemma2", gemma2),
    Workload("qwen3", qwen3),
    Workload("qwen3_decode_8", qwen3_decode),
    Workload("whisper_encoder", whisper_encoder),
    Workload("clip_vision", clip_vision),
    Workload("efficientnet_b0", timm_model("efficientnet_b0", 64)),
    Workload("mobilenetv3_large", timm_model("mobilenetv3_large_100", 64)),
    Workload("regnety_032", timm_model("regnety_032", 64)),
    Workload("densenet121", timm_model("densenet121", 32)),
    Workload("deit_small", timm_model("deit_small_patch16_224", 64, last=False, sized=True)),
    Workload("mixer_b16", timm_model("mixer_b16_224", 32, last=False, sized=True)),
    Workload("swin_tiny", timm_model("swin_tiny_patch4_window7_224", 32, last=False, sized=True)),
    Workload("bert_train", bert_train),
    Workload("gpt2_train", gpt2_train),
    Workload("qwen3_train", qwen3_train),
    Workload("resnet18_train", timm_model("resnet18", 64, train=True)),
)
