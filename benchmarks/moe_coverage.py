"""Which share of the parameters of known mixtures of experts is N:M, from their shapes alone.

python benchmarks/moe_coverage.py
"""

from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM

from sparsify.masking.masked_model import MaskedModel
from sparsify.masking.registry import make_strategy
from sparsify.models.base import BaseModel

# By name: Transformers' model type, and what its config.json says of shapes.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Mixtral-8x7B": (
        "mixtral",
        {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
        | {"num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8}
        | {"vocab_size": 32000},
    ),
    "OLMoE-1B-7B": (
        "olmoe",
        {"hidden_size": 2048, "intermediate_size": 1024, "num_hidden_layers": 16}
        | {"num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 64}
        | {"vocab_size": 50304},
    ),
    "Qwen3-30B-A3B": (
        "qwen3_moe",
        {"hidden_size": 2048, "moe_intermediate_size": 768, "num_hidden_layers": 48}
        | {"num_attention_heads": 32, "num_key_value_heads": 4, "num_experts": 128}
        | {"vocab_size": 151936, "head_dim": 128},
    ),
    "gpt-oss-120b": (
        "gpt_oss",
        {"hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 36}
        | {"num_attention_heads": 64, "num_key_value_heads": 8, "num_local_experts": 128}
        | {"vocab_size": 201088, "head_dim": 64},
    ),
}


def main() -> None:
    table = Table()
    columns = ("model", "parameters, billions", "N:M of all, %", "without experts, %")
    for column in columns:
        table.add_column(column, justify="left" if column == "model" else "right")
    for name, (kind, shapes) in MODELS.items():
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shapes))
        count = sum(parameter.numel() for parameter in model.parameters())
        base = BaseModel(model, name, torch.float32, "")
        masked = MaskedModel(base, make_strategy("magnitude"))
        others = sum(layer.weight.numel() for layer in masked.layers.values() if not layer.experts)
        shares = (f"{100 * share:.1f}" for share in (masked.coverage().model, others / count))
        table.add_row(name, f"{count / 1e9:.1f}", *shares)
    Console().print(table)


if __name__ == "__main__":
    main()
