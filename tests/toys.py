"""A causal language model of any architecture that transformers knows, at toy size and with random weights.

Configs are shrunk by the names of their keys: the same names mean the same sizes almost everywhere. What needs more
than that is a line in SPECIAL.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

VOCAB = 96
SIZES: dict[str, int] = {
    **dict.fromkeys(("vocab_size", "decoder_vocab_size", "unpadded_vocab_size", "vocab_size_per_layer_input"), VOCAB),
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "embedding_size", "emb_dim", "embedding_dim", "lru_width"), 32
    ),
    **dict.fromkeys(("word_embed_proj_dim", "input_embedding_size", "output_embedding_size", "dim_model_base"), 32),
    **dict.fromkeys(("attention_hidden_size", "mamba_d_ssm"), 64),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads", "swa_num_attention_heads"), 4),
    **dict.fromkeys(("num_decoder_attention_heads", "num_encoder_attention_heads", "linear_num_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads", "num_query_groups"), 2),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2),
    **dict.fromkeys(("head_dim", "d_head", "kv_channels", "dim_head", "d_kv", "swa_head_dim", "global_head_dim"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim", "attention_head_size"), 8),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "index_head_dim"), 8),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "o_lora_rank"), 16),
    "index_n_heads": 8,  # with few, scores that are all zero tie, and which token is chosen is chance
    "qk_head_dim": 16,
    **dict.fromkeys(("intermediate_size", "n_inner", "decoder_ffn_dim", "encoder_ffn_dim", "ffn_dim", "d_ff"), 48),
    **dict.fromkeys(("ffn_hidden_size", "dff", "d_inner", "dim_ff", "feed_forward_size", "mlp_dim"), 48),
    **dict.fromkeys(("intermediate_size_mlp", "dense_intermediate_size"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 24),
    **dict.fromkeys(("shared_intermediate_size", "moe_shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("shared_experts_intermediate_size", "router_hidden_size"), 24),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks"), 2),
    **dict.fromkeys(("decoder_layers", "encoder_layers", "num_decoder_layers", "num_encoder_layers", "depth"), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "model_max_length"), 128),
    **dict.fromkeys(("context_length", "max_target_positions", "max_source_positions"), 128),
    "original_max_position_embeddings": 64,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group"), 1),
    "zero_expert_num": 2,
    **dict.fromkeys(("sliding_window", "attention_window_size", "sliding_window_size", "local_attention"), 16),
    **dict.fromkeys(("attention_chunk_size", "window_size"), 16),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads"), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_headdim"), 16),
    **dict.fromkeys(("mamba_dt_rank", "time_step_rank", "gated_norm_rank", "laurel_rank", "adapter_rank"), 4),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size"), 8),
    **dict.fromkeys(("hidden_size_per_layer_input", "index_topk"), 8),
    "hidden_size_global": 32,
    "rotary_dim": 8,
    "query_pre_attn_scalar": 8,
    "floor_scale": 64,
    "n_groups": 1,
    "image_size": 8,
    "patch_size": 4,
}
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "sep_token_id": 3, "cls_token_id": 4}
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_QWEN4 = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8}
SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 50, "encoder_hash_byte_group_size": [3]},
    "cohere_compass_text": {"rope_parameters": dict.fromkeys(("full_attention", "sliding_attention"), _ROPE)},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 48},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "falcon_h1": {"mamba_d_ssm": 32},
    "gemma3n_text": {
        "intermediate_size": [48] * 4,
        "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0],
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"head_dim": 16},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": {**_QWEN4, "indexer_compress_ratio": 2},
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "lsh"], "hash_seed": 1, "num_buckets": 2},
    "roc_bert": {"shape_vocab_size": VOCAB, "pronunciation_vocab_size": VOCAB},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
}


# Models of text and more whose other parts need packages of their own or cannot be shrunk by name.
TEXT_PART = {"dots3_note": "dots3_note_text", "gemma3n": "gemma3n_text", "qwen4_exp": "qwen4_exp_text"}


def config(name: str, **changes: Any) -> Any:
    """A config of the architecture that transformers registers under `name`."""
    from transformers import CONFIG_MAPPING

    name = TEXT_PART.get(name, name)
    kind = CONFIG_MAPPING[name]
    made = kind(**(_shrunk(kind().to_dict()) | SPECIAL.get(name, {}) | changes))
    return made


def model(name: str, attention: str = "sdpa", **changes: Any) -> Any:
    """Random weights, the same each time; in evaluation mode. Norms and biases are not at their start values, where a
    fault in them would not show."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(config(name, **changes), attn_implementation=attention)
    return perturbed(made.float().eval())


def save(name: str, folder: Path) -> None:
    """A folder that AutoModelForCausalLM loads, as of a checkpoint of that architecture."""
    from transformers import AutoModelForCausalLM

    made = model(name, "eager")
    made.save_pretrained(folder)
    if type(made.config) not in AutoModelForCausalLM._model_mapping:
        config(name).save_pretrained(folder)  # the model was made from its text part


def perturbed(module: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return module


def _shrunk(tree: dict[str, Any]) -> dict[str, Any]:
    """The keys of a default config that have to be smaller, and their small values."""
    kept = _layers(tree)
    made: dict[str, Any] = {}
    for key, value in tree.items():
        if (small := _small(key, value, kept)) is not None:
            made[key] = small
    if tree.get("kv_lora_rank") and "num_key_value_heads" in made:
        made["num_key_value_heads"] = made["num_attention_heads"]  # latent attention has a key a query head
    return made


def _layers(tree: dict[str, Any]) -> list[int]:
    """Of the layers, the first of each kind, at least two: their indices."""
    kinds = [tree[key] for key in ("layer_types", "layers_block_type", "block_types") if tree.get(key)]
    other = [tree[key] for key in ("mlp_layer_types", "indexer_types", "no_rope_layers") if tree.get(key)]
    if not kinds and not other:
        return [0, 1]
    rows = list(zip(*kinds, *other, strict=False))
    first = {row: index for index, row in reversed(list(enumerate(rows)))}
    return sorted({0, 1, *first.values()})


_PER_LAYER = ("layer_types", "layers_block_type", "block_types", "mlp_layer_types", "indexer_types", "no_rope_layers")


def _small(key: str, value: Any, kept: list[int]) -> Any:
    if isinstance(value, dict) and ("model_type" in value):
        return _shrunk(value)
    if key in _PER_LAYER and isinstance(value, list):
        return [value[i] for i in kept]
    if key in ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "num_blocks"):
        return len(kept)
    if key in ("is_decoder", "causal"):
        return True  # encoders that can be run as decoders
    if key in IDS:
        return None if value is None else IDS[key]
    if key in SIZES and isinstance(value, int) and not isinstance(value, bool):
        return min(value, SIZES[key])
    return None
