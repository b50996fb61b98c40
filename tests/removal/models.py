"""Small random models of the usual families: six attention sublayers each."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fusionc.removal.capture import call, logits

SHAPE = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 6}
WIDE = SHAPE | {"intermediate_size": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DECODERS = ("Llama", "Mistral", "Qwen2", "GPT2", "GPTNeoX", "Falcon", "FalconNew", "Phi", "OPT")
ENCODERS = ("Bert", "ViT")


def make(kind: str, seed: int = 0) -> Any:
    """A model in eval mode, float32, with random weights (biases and gains too)."""
    t = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if kind in ("Llama", "Mistral", "Qwen2", "Qwen3"):
        extra = {"head_dim": 8} if kind == "Qwen3" else {}
        model = getattr(t, f"{kind}ForCausalLM")(getattr(t, f"{kind}Config")(**WIDE, num_key_value_heads=2, **extra))
    elif kind == "GPT2":
        model = t.GPT2LMHeadModel(t.GPT2Config(vocab_size=64, n_embd=32, n_head=4, n_layer=6, n_positions=64, **ids))
    elif kind == "GPTNeoX":
        model = t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**WIDE, max_position_embeddings=64))
    elif kind == "Phi":
        model = t.PhiForCausalLM(t.PhiConfig(**WIDE))
    elif kind == "Falcon":
        model = t.FalconForCausalLM(t.FalconConfig(**SHAPE, **ids))
    elif kind == "FalconNew":
        model = t.FalconForCausalLM(t.FalconConfig(**SHAPE, **ids, new_decoder_architecture=True, num_kv_heads=2))
    elif kind == "OPT":
        model = t.OPTForCausalLM(
            t.OPTConfig(**SHAPE, **ids, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=64)
        )
    elif kind == "Bert":
        model = t.BertForMaskedLM(t.BertConfig(**SHAPE, intermediate_size=48, max_position_embeddings=64))
    elif kind == "ViT":
        small = {k: v for k, v in SHAPE.items() if k != "vocab_size"}
        model = t.ViTForImageClassification(t.ViTConfig(**small, intermediate_size=48, image_size=16, patch_size=4))
    else:
        config = t.T5Config(
            vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=4, decoder_start_token_id=0
        )
        model = t.T5ForConditionalGeneration(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(0.2 * torch.randn_like(p))
    return model.eval()


def inputs(kind: str, seed: int = 1) -> dict[str, Any]:
    """One batch for ``make(kind)``."""
    g = torch.Generator().manual_seed(seed)
    if kind == "ViT":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=g)}
    ids = torch.randint(3, 64, (2, 9), generator=g)
    if kind == "T5":
        return {"input_ids": ids, "decoder_input_ids": ids, "use_cache": False}
    return {"input_ids": ids} if kind == "Bert" else {"input_ids": ids, "use_cache": False}


def zeroed(model: Any, layers: tuple[int, ...]) -> Any:
    """Eager oracle: the attention output projections of these layers set to zero, which needs the names of the families."""
    names = ("attention.output.dense", "o_proj", "c_proj", "attention.dense", "self_attention.dense", "self_attn.dense")
    names += ("out_proj",)
    with torch.no_grad():
        for n in layers:
            found = [(path, m) for path, m in model.named_modules()
                     if f".{n}." in path and any(path.endswith(s) for s in names) and "mlp" not in path
                     and isinstance(getattr(m, "weight", None), torch.Tensor)]  # fmt: skip
            assert len(found) == 1, [p for p, _ in found]
            for p in found[0][1].parameters():
                p.zero_()
    return model


def values(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """The model's logits (or last hidden state) in eager, without gradients."""
    with torch.no_grad():
        return logits(call(model, batch))
