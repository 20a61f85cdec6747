"""Tiny models of other families than the one in ``conftest``."""

import torch
from transformers import (
    DbrxConfig,
    DbrxForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from tests.conftest import SIZES, tiny_llama


def tied_llama() -> LlamaForCausalLM:
    """The tiny Llama with its output head tied to its embedding."""
    config = tiny_llama().config
    config.tie_word_embeddings = True
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return LlamaForCausalLM(config).eval()


def tiny_qwen2() -> Qwen2ForCausalLM:
    """Two blocks with biases, not zero, at query, key and value."""
    return _randomised(Qwen2ForCausalLM, Qwen2Config(**SIZES | {"intermediate_size": 48}))


def tiny_gpt2() -> GPT2LMHeadModel:
    """Two blocks of ``Conv1D``, some square, with biases that are not zero, and a tied head."""
    config = GPT2Config(
        vocab_size=64,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=32,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=0,
    )
    return _randomised(GPT2LMHeadModel, config)


def tiny_opt() -> OPTForCausalLM:
    """Two blocks with biases everywhere, learned positions and a tied head."""
    config = OPTConfig(
        vocab_size=64,
        hidden_size=32,
        ffn_dim=64,
        word_embed_proj_dim=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        init_std=0.2,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=0,
    )
    return _randomised(OPTForCausalLM, config)


def tiny_gemma3() -> Gemma3ForCausalLM:
    """Three blocks that are called differently: attention to 4 tokens, to all, and to 4."""
    sizes = SIZES | {
        "num_hidden_layers": 3,
        "head_dim": 8,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "pad_token_id": None,
    }
    return _randomised(Gemma3ForCausalLM, Gemma3TextConfig(**sizes))


def _randomised(kind: type[PreTrainedModel], config: object) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = kind(config).eval()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.data.normal_(std=0.3)
    return model


FAMILIES = {
    "llama": tiny_llama,
    "tied llama": tied_llama,
    "qwen2": tiny_qwen2,
    "gpt2": tiny_gpt2,
    "opt": tiny_opt,
    "gemma3": tiny_gemma3,
}


def tiny_mamba() -> MambaForCausalLM:
    """Two blocks that read the weight of ``dt_proj`` and never call it."""
    config = MambaConfig(
        vocab_size=64,
        hidden_size=32,
        state_size=4,
        num_hidden_layers=2,
        time_step_rank=4,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return _randomised(MambaForCausalLM, config)


def tiny_mixtral() -> MixtralForCausalLM:
    """Two blocks whose four experts are held as stacks of matrices."""
    return _randomised(
        MixtralForCausalLM, MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)
    )


def tiny_dbrx() -> DbrxForCausalLM:
    """Two blocks whose four experts are held as one matrix, and one of its kinds transposed."""
    config = DbrxConfig(
        vocab_size=64,
        d_model=32,
        n_layers=2,
        n_heads=4,
        max_seq_len=32,
        initializer_range=0.2,
        attn_config={"kv_n_heads": 2, "rope_theta": 10000.0},
        ffn_config={"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    )
    return _randomised(DbrxForCausalLM, config)


def tiny_falcon() -> FalconForCausalLM:
    """Two blocks of Falcon's own linear class, with biases."""
    config = FalconConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        bias=True,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=0,
    )
    return _randomised(FalconForCausalLM, config)


def tiny_qwen2_moe() -> Qwen2MoeForCausalLM:
    """Two blocks of four experts, a shared one and its gate."""
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    config = Qwen2MoeConfig(**SIZES, **sizes, shared_expert_intermediate_size=32)
    return _randomised(Qwen2MoeForCausalLM, config)


def tiny_gpt_oss() -> GptOssForCausalLM:
    """Two blocks of four experts, stored as ``[E, in, out]``, with biases."""
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "pad_token_id": 0}
    config = GptOssConfig(**SIZES, **sizes, layer_types=["full_attention"] * 2)
    return _randomised(GptOssForCausalLM, config)
