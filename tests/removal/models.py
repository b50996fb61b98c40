"""Small random models of the usual families: six attention sublayers each."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from fusionc.config import Config
from fusionc.passes.manager import run_passes
from fusionc.removal.capture import call, logits

SHAPE = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 6}
WIDE = SHAPE | {"intermediate_size": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DECODERS = ("Llama", "Mistral", "Qwen2", "GPT2", "GPTNeoX", "Falcon", "FalconNew", "Phi", "OPT")
ENCODERS = ("Bert", "ViT")
_KV = WIDE | {"num_key_value_heads": 2}
_GPT = {"vocab_size": 64, "n_embd": 32, "n_head": 4, "n_layer": 6, "n_positions": 64} | {
    k: v for k, v in WIDE.items() if k.endswith("token_id")
}
_IMAGE = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 6, "image_size": 16, "patch_size": 4}
_SEQ = {"vocab_size": 64, "d_model": 32, "encoder_layers": 3, "decoder_layers": 3, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}  # fmt: skip
# Families that nobody listed: name → (model, configuration, its arguments)
MORE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "StableLm": ("StableLmForCausalLM", "StableLmConfig", _KV | {"use_parallel_residual": True}),
    "Gemma": ("GemmaForCausalLM", "GemmaConfig", _KV | {"head_dim": 8}),
    "Cohere": ("CohereForCausalLM", "CohereConfig", _KV),
    "Mpt": ("MptForCausalLM", "MptConfig", {"vocab_size": 64, "d_model": 32, "n_heads": 4, "n_layers": 6, "max_seq_len": 64}),
    "Bloom": ("BloomForCausalLM", "BloomConfig", {k: v for k, v in _GPT.items() if "n_" not in k}
              | {"hidden_size": 32, "n_head": 4, "n_layer": 6}),
    "GPTJ": ("GPTJForCausalLM", "GPTJConfig", _GPT | {"rotary_dim": 4}),
    "Phi3": ("Phi3ForCausalLM", "Phi3Config", _KV),
    "Granite": ("GraniteForCausalLM", "GraniteConfig", _KV | {"residual_multiplier": 0.5}),
    "GPTBigCode": ("GPTBigCodeForCausalLM", "GPTBigCodeConfig", _GPT),
    "Mixtral": ("MixtralForCausalLM", "MixtralConfig", _KV | {"num_local_experts": 4}),
    "OpenAIGPT": ("OpenAIGPTLMHeadModel", "OpenAIGPTConfig", {k: v for k, v in _GPT.items() if "token" not in k}),
    "Roberta": ("RobertaForMaskedLM", "RobertaConfig", SHAPE | {"intermediate_size": 48, "max_position_embeddings": 64}),
    "DistilBert": ("DistilBertForMaskedLM", "DistilBertConfig",
                   {"vocab_size": 64, "dim": 32, "n_heads": 4, "n_layers": 6, "hidden_dim": 48, "max_position_embeddings": 64}),
    "MPNet": ("MPNetForMaskedLM", "MPNetConfig", SHAPE | {"intermediate_size": 48, "max_position_embeddings": 64}),
    "DeiT": ("DeiTForImageClassification", "DeiTConfig", _IMAGE | {"intermediate_size": 48}),
    "Beit": ("BeitForImageClassification", "BeitConfig",
             _IMAGE | {"intermediate_size": 48, "use_relative_position_bias": True}),
    # these refuse
    "Qwen3": ("Qwen3ForCausalLM", "Qwen3Config", _KV | {"head_dim": 8}),
    "Olmo2": ("Olmo2ForCausalLM", "Olmo2Config", _KV),
    "Gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", _KV | {"head_dim": 8}),
    "Gemma2": ("Gemma2ForCausalLM", "Gemma2Config", _KV | {"head_dim": 8}),
    "Albert": ("AlbertForMaskedLM", "AlbertConfig",
               SHAPE | {"intermediate_size": 48, "embedding_size": 16, "max_position_embeddings": 64}),
    "Bart": ("BartForConditionalGeneration", "BartConfig", _SEQ | {"max_position_embeddings": 64}),
    "Whisper": ("WhisperForConditionalGeneration", "WhisperConfig",
                _SEQ | {"max_source_positions": 16, "max_target_positions": 16, "num_mel_bins": 8, "pad_token_id": 0,
                        "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}),
}  # fmt: skip


def make(kind: str, seed: int = 0) -> Any:
    """A model in eval mode, float32, with random weights (biases and gains too)."""
    t = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if kind in ("Llama", "Mistral", "Qwen2"):
        model = getattr(t, f"{kind}ForCausalLM")(getattr(t, f"{kind}Config")(**WIDE, num_key_value_heads=2))
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
    elif kind in MORE:
        name, config, given = MORE[kind]
        model = getattr(t, name)(getattr(t, config)(**given))
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
    if kind in ("ViT", "DeiT", "Beit"):
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=g)}
    ids = torch.randint(3, 64, (2, 9), generator=g)
    if kind == "Whisper":
        sound = torch.randn(2, 8, 32, generator=g)
        return {"input_features": sound, "decoder_input_ids": ids, "use_cache": False}
    if kind in ("T5", "Bart"):
        return {"input_ids": ids, "decoder_input_ids": ids, "use_cache": False}
    plain = ("Bert", "Roberta", "DistilBert", "MPNet", "Albert", "OpenAIGPT")
    return {"input_ids": ids} if kind in plain else {"input_ids": ids, "use_cache": False}


def zeroed(model: Any, layers: tuple[int, ...]) -> Any:
    """Eager oracle: the attention output projections of these layers set to zero, which needs the names of the families."""
    names = ("attention.output.dense", "o_proj", "c_proj", "attention.dense", "self_attention.dense", "self_attn.dense")
    names += ("out_proj", "out_lin", "attn.o")
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


class Backend:
    """Runs the model-level pipeline with the option and then the graph as it is: no other rounding than eager's."""

    def __init__(self, what: Any, **options: Any) -> None:
        self.config = Config.parse(None, {"remove_attention": what, "verify": True, "strict": True,
                                          "disable": ["plain_attention", "causal_mask", "grouped_heads"]} | options)  # fmt: skip

    def __call__(self, gm: torch.fx.GraphModule, given: list[Any]) -> Any:
        self.inputs = given
        self.gm, records = run_passes(gm, "model", self.config, given)
        (self.record,) = [r for r in records if r.name == "remove_attention"]
        return self.gm.forward

    @property
    def reasons(self) -> list[str]:
        return [r.reason for r in self.record.refusals]

    @property
    def attentions(self) -> int:
        live = copy.deepcopy(self.gm.graph)
        live.eliminate_dead_code()
        return sum("scaled_dot" in str(n.target) or "softmax" in str(n.target) for n in live.nodes)


def run(backend: Backend, model: Any, *args: Any, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return logits(torch.compile(model, backend=backend, dynamic=False)(*args, **kwargs))
