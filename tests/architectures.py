"""Tiny random models of many architectures: what differs from sizes that all of them share."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.conftest import SIZES

_SHARED = SIZES | {"head_dim": 8, "pad_token_id": 1, "bos_token_id": 0}
_SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
_LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
_GPT2 = {"n_embd": 32, "n_head": 4, "n_layer": 2}
_PER_LAYER = _SLIDING | {
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 64,
    "num_hidden_layers": 4,
    "layer_types": [*_SLIDING["layer_types"], *_SLIDING["layer_types"]],
    "num_kv_shared_layers": 2,
}
_MAMBA = {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 4}
_MAMBA_PREFIXED = {
    "mamba_d_state": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 2,
    "mamba_chunk_size": 4,
    "mamba_expand": 2,
}
_DELTA = _LINEAR | {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
# Each class reads the one name of these that it knows.
_MOE = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
}
_LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 4,
    "num_key_value_heads": 4,
}
_INDEXED = {"index_n_heads": 2, "index_head_dim": 8, "index_topk": 4}

# By model type, as the other two.
PLAIN: dict[str, dict[str, Any]] = {
    "apertus": {},
    "arcee": {},
    "biogpt": {},
    "bitnet": {},
    "bloom": {"n_head": 4, "n_layer": 2},
    "codegen": _GPT2 | {"rotary_dim": 4},
    "cohere": {},
    "cohere2": _SLIDING,
    "ctrl": _GPT2 | {"dff": 64},
    "cwm": _SLIDING,
    "diffllama": {},
    "ernie4_5": {},
    "exaone4": _SLIDING,
    "falcon": {"head_dim": None},
    "gemma": {},
    "gemma2": _SLIDING,
    "gemma3_text": _SLIDING,
    "gemma3n_text": _PER_LAYER
    | {
        "intermediate_size": [64] * 4,
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
    },
    "gemma4_text": _PER_LAYER | {"global_head_dim": 16},
    "glm": {},
    "glm4": {},
    "gpt2": _GPT2,
    "gpt_bigcode": _GPT2,
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    "gpt_neox": {},
    "gptj": _GPT2 | {"rotary_dim": 4},
    "granite": {},
    "helium": {},
    # It runs through its blocks several times.
    "hrm_text": {
        "num_key_value_heads": 4,
        "num_layers_per_stack": 2,
        "num_hidden_layers": 12,
        "H_cycles": 2,
        "L_cycles": 2,
    },
    "hunyuan_v1_dense": {},
    "hyperclovax": {},
    "jais2": {},
    "llama": {},
    "minicpm3": _LATENT,
    "ministral": _SLIDING,
    "ministral3": {},
    "mistral": {},
    "modernbert-decoder": {},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 32},
    "nanochat": {},
    "nemotron": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": _SLIDING,
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "persimmon": {},
    "phi": {},
    "phi3": {},
    "qwen2": {},
    "qwen3": {},
    "seed_oss": {},
    "smollm3": {},
    "stablelm": {},
    "starcoder2": {},
    "vaultgemma": _SLIDING,
    "xglm": {"d_model": 32, "attention_heads": 4, "num_layers": 2, "ffn_dim": 64},
    "youtu": _LATENT | {"pad_token_id": None},  # Transformers zeroes its row
}
# Convolutions, states that are carried on, and the like.
HYBRID: dict[str, dict[str, Any]] = {
    "bamba": _MAMBA_PREFIXED | {"attn_layer_indices": [1]},
    "falcon_h1": _MAMBA_PREFIXED | {"mamba_d_ssm": 64},
    "falcon_mamba": {"state_size": 4, "time_step_rank": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_ff_dim": 64},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "mamba": {"state_size": 4, "time_step_rank": 4},
    "mamba2": _MAMBA,
    "olmo_hybrid": _DELTA,
    "qwen3_5_text": _DELTA,
    "recurrent_gemma": {
        "num_hidden_layers": 3,
        "lru_width": 32,
        "attention_window_size": 4,
        "block_types": ["recurrent", "recurrent", "attention"],
    },
    "rwkv": {"attention_hidden_size": 32, "rescale_every": 0},
    "xlstm": {"num_heads": 4},
    "zamba": {
        "layers_block_type": ["mamba", "hybrid"],
        "num_key_value_heads": 4,
        "mamba_d_state": 4,
        "mamba_dt_rank": 4,
        "attention_head_dim": 16,
    },
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "num_mem_blocks": 1,
        "tie_word_embeddings": True,  # and with it the hybrid blocks' weights
        "num_key_value_heads": 4,
        "mamba_d_state": 8,
        "mamba_ngroups": 2,
        "n_mamba_heads": 8,
        "chunk_size": 4,
        "attention_head_dim": 16,
        "adapter_rank": 8,
        "use_shared_attention_adapter": True,
        "use_mem_rope": True,
    },
}
EXPERTS: dict[str, dict[str, Any]] = {
    "afmoe": _MOE | {"num_shared_experts": 1},
    "cohere2_moe": _MOE | _SLIDING | {"num_shared_experts": 1},
    "dbrx": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 32,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10_000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": _MOE | _LATENT | {"n_shared_experts": 1, "first_k_dense_replace": 1},
    "deepseek_v3": _MOE | _LATENT | {"n_group": 2, "first_k_dense_replace": 1},
    "deepseek_v32": _MOE | _LATENT | _INDEXED | {"first_k_dense_replace": 1},
    "dots1": _MOE | _SLIDING | {"n_shared_experts": 1, "first_k_dense_replace": 1},
    "ernie4_5_moe": _MOE | {"moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 1},
    "exaone_moe": _MOE | _SLIDING | {"first_k_dense_replace": 1},
    "flex_olmo": _MOE,
    "glm4_moe": _MOE | {"n_shared_experts": 1, "first_k_dense_replace": 1},
    "glm4_moe_lite": _MOE | _LATENT,
    "glm_moe_dsa": _MOE
    | _LATENT
    | _INDEXED
    | {"mlp_layer_types": ["dense", "sparse"], "indexer_types": ["full", "shared"]},
    "gpt_oss": _MOE | _SLIDING,
    "granitemoe": _MOE,
    "granitemoehybrid": _MOE
    | _MAMBA_PREFIXED
    | {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 16},
    "granitemoeshared": _MOE | {"shared_intermediate_size": 16},
    "hunyuan_v1_moe": _MOE | {"moe_topk": 2},
    "jamba": _MOE
    | {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_d_state": 4,
        "mamba_dt_rank": 4,
    },
    "jetmoe": _MOE | {"kv_channels": 8},
    "kimi_linear": _MOE
    | _LATENT
    | _LINEAR
    | {
        "linear_head_dim": 8,
        "linear_num_heads": 4,
        "mlp_layer_types": ["dense", "sparse"],
    },
    "lfm2_moe": _MOE | {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "llama4_text": _MOE | {"intermediate_size_mlp": 64, "moe_layers": [1]},
    "longcat_flash": _MOE
    | _LATENT
    | {
        "num_layers": 2,
        "ffn_hidden_size": 64,
        "expert_ffn_hidden_size": 16,
        "moe_topk": 2,
        "zero_expert_num": 2,
    },
    "mimo_v2_flash": _MOE | {"v_head_dim": 8},
    "minimax": _MOE | _LINEAR | {"block_size": 4},
    "minimax_m2": _MOE,
    "mixtral": _MOE,
    "nemotron_h": _MOE
    | {
        "layers_block_type": ["mamba", "attention", "moe"],
        "num_hidden_layers": 3,
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "n_groups": 2,
        "chunk_size": 4,
        "moe_shared_expert_intermediate_size": 16,
    },
    "olmoe": _MOE,
    "phimoe": _MOE,
    "qwen2_moe": _MOE,
    "qwen3_5_moe_text": _MOE | _DELTA,
    "qwen3_moe": _MOE,
    "qwen3_next": _MOE | _DELTA,
    "solar_open": _MOE,
    # Each block also hands its router's states to the next.
    "zaya": _MOE | {"num_experts_per_tok": 1, "router_hidden_size": 16},
}
ARCHITECTURES = PLAIN | HYBRID | EXPERTS


def tiny(kind: str) -> PreTrainedModel:
    """A random model of a type; weights are large enough to matter, and biases not zero."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = _SHARED | ARCHITECTURES[kind]
        known = {name: value for name, value in sizes.items() if value is not None}
        config = AutoConfig.for_model(kind, **known)
        model = AutoModelForCausalLM.from_config(config).eval()
        for parameter in model.parameters():
            if parameter.ndim > 1 or not parameter.any():
                parameter.data.normal_(std=0.2)
    return model
