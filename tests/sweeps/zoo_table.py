"""The architectures of the zoo sweep: Hugging Face models with small random configurations.

One row per architecture; sizes are chosen so that eager takes milliseconds and every layer kind of the architecture
occurs.  ``train`` rows also run a backward pass; rows without it either need data-dependent control flow when training
(mixture of experts on CPU) or add nothing to a row that has it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

_TEXT: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
_GQA: dict[str, Any] = {**_TEXT, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
_NO_DROPOUT: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_ENCODER: dict[str, Any] = {**_TEXT, **_NO_DROPOUT}
_SEQ2SEQ: dict[str, Any] = {
    "vocab_size": 97,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
}
_PATCHES: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    **_NO_DROPOUT,
}
_SPEECH: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "conv_dim": (32, 32, 32),
    "conv_stride": (5, 4, 2),
    "conv_kernel": (10, 8, 4),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "hidden_dropout": 0.0,
    "activation_dropout": 0.0,
    "attention_dropout": 0.0,
    "feat_proj_dropout": 0.0,
    "final_dropout": 0.0,
    "layerdrop": 0.0,
    "apply_spec_augment": False,
    "mask_time_prob": 0.0,
    "ctc_zero_infinity": True,
}


@dataclass(frozen=True)
class Row:
    """One architecture: ``config`` and ``model`` are classes of transformers, ``inputs`` a kind of ``zoo.inputs``."""

    name: str
    family: str
    config: str
    model: str
    inputs: str
    fields: dict[str, Any] = field(default_factory=dict)
    train: bool = False


ROWS: tuple[Row, ...] = (
    # decoders
    Row("llama", "decoder", "LlamaConfig", "LlamaForCausalLM", "tokens", _GQA, True),
    Row("mistral", "decoder", "MistralConfig", "MistralForCausalLM", "tokens", {**_GQA, "sliding_window": 8}, True),
    Row("qwen2", "decoder", "Qwen2Config", "Qwen2ForCausalLM", "tokens", _GQA, True),
    Row("qwen3", "decoder", "Qwen3Config", "Qwen3ForCausalLM", "tokens", {**_GQA, "head_dim": 8}, True),
    Row(
        "gemma2", "decoder", "Gemma2Config", "Gemma2ForCausalLM", "tokens", {**_GQA, "head_dim": 8, "sliding_window": 8}
    ),
    Row("phi", "decoder", "PhiConfig", "PhiForCausalLM", "tokens", {**_GQA, "num_key_value_heads": 4}, True),
    Row(
        "gpt2",
        "decoder",
        "GPT2Config",
        "GPT2LMHeadModel",
        "tokens",
        {
            "vocab_size": 97,
            "n_positions": 64,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        True,
    ),
    Row("gpt_neox", "decoder", "GPTNeoXConfig", "GPTNeoXForCausalLM", "tokens", _TEXT, True),
    Row(
        "opt",
        "decoder",
        "OPTConfig",
        "OPTForCausalLM",
        "tokens",
        {
            "vocab_size": 97,
            "hidden_size": 32,
            "ffn_dim": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 32,
            "dropout": 0.0,
            "pad_token_id": 0,
        },
        True,
    ),
    Row(
        "bloom",
        "decoder",
        "BloomConfig",
        "BloomForCausalLM",
        "tokens",
        {"vocab_size": 97, "hidden_size": 32, "n_layer": 2, "n_head": 4, "pad_token_id": 0},
    ),
    Row(
        "falcon",
        "decoder",
        "FalconConfig",
        "FalconForCausalLM",
        "tokens",
        {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0},
    ),
    # encoders
    Row("bert", "encoder", "BertConfig", "BertForMaskedLM", "tokens", _ENCODER, True),
    Row("roberta", "encoder", "RobertaConfig", "RobertaForMaskedLM", "tokens", _ENCODER, True),
    Row("electra", "encoder", "ElectraConfig", "ElectraForMaskedLM", "tokens", {**_ENCODER, "embedding_size": 16}),
    Row("albert", "encoder", "AlbertConfig", "AlbertForMaskedLM", "tokens", {**_ENCODER, "embedding_size": 16}),
    Row("mpnet", "encoder", "MPNetConfig", "MPNetForMaskedLM", "tokens", _ENCODER),
    Row(
        "deberta_v2",
        "encoder",
        "DebertaV2Config",
        "DebertaV2ForMaskedLM",
        "tokens",
        {**_ENCODER, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
    ),
    Row(
        "distilbert",
        "encoder",
        "DistilBertConfig",
        "DistilBertForMaskedLM",
        "tokens",
        {
            "vocab_size": 97,
            "dim": 32,
            "hidden_dim": 64,
            "n_layers": 2,
            "n_heads": 4,
            "max_position_embeddings": 64,
            "dropout": 0.0,
            "attention_dropout": 0.0,
        },
        True,
    ),
    # encoder and decoder
    Row(
        "t5",
        "encoder-decoder",
        "T5Config",
        "T5ForConditionalGeneration",
        "pairs",
        {
            "vocab_size": 97,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 64,
            "num_layers": 2,
            "num_heads": 4,
            "dropout_rate": 0.0,
            "pad_token_id": 0,
            "decoder_start_token_id": 0,
        },
        True,
    ),
    Row("bart", "encoder-decoder", "BartConfig", "BartForConditionalGeneration", "pairs", _SEQ2SEQ, True),
    Row("marian", "encoder-decoder", "MarianConfig", "MarianMTModel", "pairs", _SEQ2SEQ),
    # mixture of experts
    Row(
        "mixtral",
        "mixture of experts",
        "MixtralConfig",
        "MixtralForCausalLM",
        "tokens",
        {**_GQA, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    Row(
        "qwen3_moe",
        "mixture of experts",
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        "tokens",
        {**_GQA, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
    # vision
    Row("vit", "vision", "ViTConfig", "ViTForImageClassification", "image", _PATCHES, True),
    Row("deit", "vision", "DeiTConfig", "DeiTForImageClassification", "image", _PATCHES),
    Row(
        "swin",
        "vision",
        "SwinConfig",
        "SwinForImageClassification",
        "image",
        {
            "image_size": 32,
            "patch_size": 4,
            "embed_dim": 16,
            "depths": [2, 2],
            "num_heads": [2, 4],
            "window_size": 4,
            "drop_path_rate": 0.0,
            **_NO_DROPOUT,
        },
    ),
    Row(
        "convnext",
        "vision",
        "ConvNextConfig",
        "ConvNextForImageClassification",
        "image",
        {"image_size": 32, "hidden_sizes": [16, 32], "depths": [1, 2], "num_stages": 2, "drop_path_rate": 0.0},
        True,
    ),
    Row(
        "resnet",
        "vision",
        "ResNetConfig",
        "ResNetForImageClassification",
        "image",
        {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 2], "layer_type": "basic"},
        True,
    ),
    Row(
        "segformer",
        "vision",
        "SegformerConfig",
        "SegformerForSemanticSegmentation",
        "image",
        {
            "num_encoder_blocks": 2,
            "depths": [1, 1],
            "sr_ratios": [4, 1],
            "hidden_sizes": [16, 32],
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "num_attention_heads": [1, 2],
            "mlp_ratios": [2, 2],
            "decoder_hidden_size": 16,
            "drop_path_rate": 0.0,
            "classifier_dropout_prob": 0.0,
            **_NO_DROPOUT,
        },
    ),
    # audio
    Row(
        "wav2vec2", "audio", "Wav2Vec2Config", "Wav2Vec2ForCTC", "wave", {**_SPEECH, "num_feat_extract_layers": 3}, True
    ),
    Row("hubert", "audio", "HubertConfig", "HubertForCTC", "wave", {**_SPEECH, "num_feat_extract_layers": 3}),
    Row(
        "whisper",
        "audio",
        "WhisperConfig",
        "WhisperForConditionalGeneration",
        "spectrum",
        {**_SEQ2SEQ, "num_mel_bins": 8, "max_source_positions": 32, "max_target_positions": 32},
        True,
    ),
    # state space
    Row(
        "mamba",
        "state space",
        "MambaConfig",
        "MambaForCausalLM",
        "tokens",
        {"vocab_size": 97, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 2, "pad_token_id": 0},
        True,
    ),
    Row(
        "mamba2",
        "state space",
        "Mamba2Config",
        "Mamba2ForCausalLM",
        "tokens",
        {
            "vocab_size": 97,
            "hidden_size": 32,
            "num_heads": 8,
            "head_dim": 8,
            "state_size": 8,
            "n_groups": 1,
            "chunk_size": 8,
            "num_hidden_layers": 2,
            "pad_token_id": 0,
        },
    ),
)
BY_NAME = {row.name: row for row in ROWS}
