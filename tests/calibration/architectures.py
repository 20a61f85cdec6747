"""Tiny random models of many architectures, whose blocks are called in many ways."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.conftest import SIZES

_MAMBA = {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 4}
_MAMBA_PREFIXED = {
    "mamba_d_state": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 2,
    "mamba_chunk_size": 4,
    "mamba_expand": 2,
}
_MOE = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
_SLIDING = ["sliding_attention", "full_attention"]
_LINEAR = ["linear_attention", "full_attention"]
_DELTA = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "head_dim": 8,
    "layer_types": _LINEAR,
}
_PER_LAYER = {
    "head_dim": 8,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 64,
    "num_hidden_layers": 4,
    "layer_types": [*_SLIDING, *_SLIDING],
    "sliding_window": 4,
    "num_kv_shared_layers": 2,
}

# By model type; all have SIZES besides.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "bamba": _MAMBA_PREFIXED | {"attn_layer_indices": [1]},
    "bloom": {"n_head": 4, "n_layer": 2},
    "cohere2": {"layer_types": _SLIDING, "sliding_window": 4},
    "deepseek_v3": _MOE
    | {
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "num_key_value_heads": 4,
    },
    "falcon_h1": _MAMBA_PREFIXED | {"mamba_d_ssm": 64, "head_dim": 8},
    "gemma3_text": {"head_dim": 8, "layer_types": _SLIDING, "sliding_window": 4},
    "gemma3n_text": _PER_LAYER
    | {
        "intermediate_size": [64] * 4,
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
    },
    "gemma4_text": _PER_LAYER | {"global_head_dim": 16},
    "glm_moe_dsa": _MOE
    | {
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "num_key_value_heads": 4,
        "index_n_heads": 2,
        "index_head_dim": 8,
        "index_topk": 4,
        "mlp_layer_types": ["dense", "sparse"],
        "indexer_types": ["full", "shared"],
    },
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 2},
    "gpt_oss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 8,
        "layer_types": _SLIDING,
        "sliding_window": 4,
    },
    # It runs through its blocks several times.
    "hrm_text": {
        "head_dim": 8,
        "num_key_value_heads": 4,
        "num_layers_per_stack": 2,
        "num_hidden_layers": 12,
        "H_cycles": 2,
        "L_cycles": 2,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_ff_dim": 64},
    "llama": {},
    "mamba2": _MAMBA,
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "nemotron_h": _MOE
    | {
        "layers_block_type": ["mamba", "attention", "moe"],
        "num_hidden_layers": 3,
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "n_groups": 2,
        "chunk_size": 4,
        "head_dim": 8,
        "n_routed_experts": 4,
        "moe_shared_expert_intermediate_size": 16,
    },
    "olmo2": {},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32, "pad_token_id": 1},
    "phi": {},
    "qwen3_moe": _MOE | {"num_experts": 4, "head_dim": 8},
    "qwen3_next": _DELTA | _MOE | {"num_experts": 4, "shared_expert_intermediate_size": 16},
    "recurrent_gemma": {
        "num_hidden_layers": 3,
        "lru_width": 32,
        "attention_window_size": 4,
        "block_types": ["recurrent", "recurrent", "attention"],
        "head_dim": 8,
    },
    # Between two blocks the model halves what the first returned.
    "rwkv": {"attention_hidden_size": 32, "rescale_every": 1, "num_hidden_layers": 3},
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
    # Each block also hands its router's states to the next.
    "zaya": {
        "moe_intermediate_size": 16,
        "num_experts": 4,
        "head_dim": 8,
        "router_hidden_size": 16,
    },
}

# Their experts are of classes of their own, which the hooks on the others do not know.
OWN_EXPERTS: dict[str, dict[str, Any]] = {
    "jetmoe": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "kv_channels": 8,
        "num_key_value_heads": 4,
    },
    "llama4_text": {
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 1,
        "intermediate_size_mlp": 64,
        "head_dim": 8,
    },
}


def tiny(kind: str) -> PreTrainedModel:
    """A random model of a type, with weights that are large enough to matter."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **(SIZES | (ARCHITECTURES | OWN_EXPERTS)[kind]))
        model = AutoModelForCausalLM.from_config(config).eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data.normal_(std=0.2)
    return model
