"""Tiny configurations of every causal language model that transformers offers, by name.

The names are transformers' model types; a suffix ("falcon-alibi") names a variant. Fields that most
architectures share come from `SHARED`, where a configuration has them; `SPECIAL` has the others.
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCAB = 320
DROP = object()  # marks a shared field that an architecture must not get

SHARED: dict[str, Any] = {
    "hidden_size": 64, "n_embd": 64, "d_model": 64, "intermediate_size": 96, "ffn_dim": 96,
    "ffn_hidden_size": 96, "expert_ffn_hidden_size": 32, "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_hidden_layers": 4, "n_layer": 4, "num_layers": 4, "n_layers": 4,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_key_value_heads": 2,
    "num_kv_heads": 2, "head_dim": 16, "vocab_size": VOCAB, "sliding_window": 16,
    "max_position_embeddings": 600, "n_positions": 600, "n_ctx": 600,
    "n_routed_experts": 4, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
    "n_group": 2, "topk_group": 1, "n_shared_experts": 1, "zero_expert_num": 1, "moe_topk": 2,
    "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
    "v_head_dim": 16, "first_k_dense_replace": 1,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
    "depth": 2, "encoder_layers": 2, "image_size": 32, "patch_size": 16, "out_hidden_size": 64,
    "encoder_attention_heads": 4, "encoder_ffn_dim": 96, "num_heads": 4,
}  # fmt: skip

_LINEAR_THEN_FULL = ["linear_attention", "full_attention"] * 2
_MAMBA_HEADS = {
    "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1,
    "mamba_expand": 2, "mamba_chunk_size": 16,
}  # fmt: skip
_LATENT = {"head_dim": 8, "num_key_value_heads": 4}  # latent attention has one width of its own
_DECODER = {"is_decoder": True}

SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {**_MAMBA_HEADS, "attn_layer_indices": [1, 3]},
    "bart": {"encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 4,
             "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96,
             "is_encoder_decoder": False, **_DECODER},
    "bert": _DECODER,
    "cohere2": {"sliding_window_pattern": 2},
    "cpmant": {"dim_head": 16, "dim_ff": 96, "prompt_length": 4, "segment_types": 4},
    "ctrl": {"dff": 96},
    "dbrx": {"n_layers": 3, "max_seq_len": 600,
             "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
             "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2}},
    "exaone4": {"sliding_window_pattern": 2},
    "falcon": {"new_decoder_architecture": True, "alibi": False, "head_dim": DROP},
    "falcon-alibi": {"new_decoder_architecture": False, "multi_query": False, "alibi": True,
                     "bias": True, "num_kv_heads": 4, "head_dim": DROP},
    "falcon-mq": {"new_decoder_architecture": False, "multi_query": True, "alibi": False,
                  "head_dim": DROP},
    "falcon_h1": {**_MAMBA_HEADS, "mamba_d_ssm": 128},
    "falcon_mamba": {"state_size": 8},
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3_text": {"query_pre_attn_scalar": 16, "sliding_window_pattern": 2},
    "gemma3n_text": {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB,
                     "laurel_rank": 8, "num_kv_shared_layers": 1, "altup_num_inputs": 2,
                     "layer_types": ["sliding_attention", "full_attention"] * 2,
                     "activation_sparsity_pattern": [0.0] * 4},
    "gemma4_text": {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB,
                    "num_kv_shared_layers": 0},
    "gemma4_unified_text": {"num_kv_shared_layers": 0},
    "gpt_bigcode": {"multi_query": True},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "num_heads": 4, "window_size": 16},
    "gpt_neox": {"rotary_pct": 0.25},
    "gptj": {"rotary_dim": 8},
    "granite": {"embedding_multiplier": 12.0, "residual_multiplier": 0.22,
                "attention_multiplier": 0.1, "logits_scaling": 4.0},
    "granitemoehybrid": {**_MAMBA_HEADS, "shared_intermediate_size": 32,
                         "layer_types": ["mamba", "attention"] * 2},
    "granitemoeshared": {"shared_intermediate_size": 32},
    "hunyuan_v1_moe": {"moe_topk": [2] * 4},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
              "expert_layer_offset": 1, "use_mamba_kernels": False, "mamba_d_state": 8,
              "num_local_experts": DROP, "num_experts": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2, "block_auto_adjust_ff_dim": False},
    "llama-dynamic": {"max_position_embeddings": 64, "rope_parameters": {
        "rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}},
    "llama-tied": {"tie_word_embeddings": True},
    "llama4_text": {"attention_chunk_size": 16, "intermediate_size_mlp": 96},
    "mamba": {"state_size": 8, "expand": 2, "n_layer": DROP, "num_layers": DROP},
    "mamba2": {"state_size": 8, "num_heads": 8, "n_groups": 1, "chunk_size": 16, "expand": 2},
    "minimax": {"layer_types": _LINEAR_THEN_FULL, "block_size": 16},
    "mistral": {"sliding_window": None},
    "mistral-sliding": {"sliding_window": 16},
    "mixtral": {"sliding_window": None},
    "modernbert-decoder": {"global_attn_every_n_layers": 2,
                           "local_attention": 32},
    "mpt": {"max_seq_len": 600, "expansion_ratio": 2},
    "openai-gpt": {},
    "opt": {"word_embed_proj_dim": 64, "do_layer_norm_before": True},
    "opt-350m": {"word_embed_proj_dim": 32, "do_layer_norm_before": False},
    "phi3": {"sliding_window": 16},
    "phi3-longrope": {"sliding_window": None, "original_max_position_embeddings": 64,
                      "rope_parameters": {
                          "rope_type": "longrope", "rope_theta": 10000.0,
                          "short_factor": [1.0] * 8, "long_factor": [4.0] * 8,
                          "original_max_position_embeddings": 64}},
    "qwen2-swa": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2},
    "qwen2_moe": {"decoder_sparse_step": 1},
    "qwen3_moe": {"decoder_sparse_step": 1, "mlp_only_layers": [0]},
    "qwen3_next": {"layer_types": _LINEAR_THEN_FULL, "linear_num_key_heads": 2,
                   "linear_num_value_heads": 4, "linear_key_head_dim": 16,
                   "linear_value_head_dim": 16, "partial_rotary_factor": 0.5},
    "recurrent_gemma": {"lru_width": 64, "attention_window_size": 16,
                        "block_types": ["recurrent", "recurrent", "attention"]},
    "roberta": _DECODER,
    "rwkv": {"attention_hidden_size": 64, "context_length": 600},
    "stablelm-parallel": {"use_parallel_residual": True, "qk_layernorm": True},
    "whisper": {"decoder_layers": 2, "decoder_attention_heads": 4, **_DECODER},
    "xglm": {"attention_heads": 4},
    "xlm": {"emb_dim": 64, "n_words": VOCAB},
    "xlm-roberta": _DECODER,
    "reformer": {"is_decoder": True, "attn_layers": ["local", "local"], "axial_pos_embds": False,
                 "hidden_size": 64, "feed_forward_size": 96, "num_attention_heads": 4,
                 "attention_head_size": 16},
    "plbart": {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_layers": 2,
               "decoder_layers": 2, "is_encoder_decoder": False, **_DECODER},
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "zamba2": {"mamba_d_state": 8, "mamba_ngroups": 1, "n_mamba_heads": 8, "mamba_headdim": 16,
               "chunk_size": 16, "attention_head_dim": 32, "attention_hidden_size": 128,
               "num_mem_blocks": 1, "use_mem_rope": False, "use_mamba_kernels": False,
               "num_key_value_heads": 4, "head_dim": DROP,
               "layers_block_type": ["mamba", "hybrid"] * 2},
    "xlnet": {"d_inner": 96},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
    "zamba": {"attention_head_dim": 32, "attention_hidden_size": 128, "mamba_d_state": 8,
              "n_mamba_heads": 2, "use_mamba_kernels": False, "num_hidden_layers": 6,
              "attn_layer_period": 3, "attn_layer_offset": 2, "head_dim": DROP,
              "layers_block_type": ["mamba", "mamba", "hybrid"] * 2},
}  # fmt: skip
SPECIAL["deepseek_v2-nolora"] = {"q_lora_rank": None}
for _name in (
    "deepseek_v2", "deepseek_v2-nolora", "deepseek_v3", "deepseek_v32", "glm4_moe_lite",
    "glm_moe_dsa", "longcat_flash", "minicpm3", "youtu",
):  # fmt: skip
    SPECIAL[_name] = {**SPECIAL.get(_name, {}), **_LATENT}

NAMES = sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *SPECIAL})


def model_type(name: str) -> str:
    """The transformers model type of a name."""
    return name if name in CONFIG_MAPPING else name.partition("-")[0]


def tiny(name: str) -> PretrainedConfig:
    """Return a configuration of about 100,000 weights."""
    return _shrunk(CONFIG_MAPPING[model_type(name)], SPECIAL.get(name, {}))


def _shrunk(kind: type[PretrainedConfig], special: dict[str, Any]) -> PretrainedConfig:
    usual = kind()
    shared = {
        field: value
        for field, value in SHARED.items()
        if _has(usual, field)
        and field not in special
        and field not in getattr(kind, "attribute_map", {})  # another name of a field
        and not (field == "sliding_window" and usual.sliding_window is None)
    }
    parts = {}
    for key in kind.sub_configs:  # of a multimodal model: each part is shrunk by itself
        part = getattr(usual, key, None)
        if part is not None and key not in special:
            parts[key] = _shrunk(type(part), SPECIAL.get(part.model_type, {})).to_dict()
    return kind(**shared, **parts, **{k: v for k, v in special.items() if v is not DROP})


def _has(config: PretrainedConfig, field: str) -> bool:
    try:
        return hasattr(config, field)
    except Exception:  # of a field that differs from layer to layer there is no single value
        return False


# transformers cannot make, save or run these with the configuration that they get here.
NOT_MADE = frozenset(
    {
        "blt", "cohere_compass_text", "dots3_note", "dots3_note_text", "emu3", "gemma3n",
        "gemma4_assistant", "gemma4_unified_assistant", "mllama", "musicgen",
        "musicgen_melody", "prophetnet", "qwen4_exp", "qwen4_exp_text", "xlnet", "xlstm",
    }
)  # fmt: skip
