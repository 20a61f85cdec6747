"""Which channels of a model can be put in another order, found from its structure."""

from typing import Any

import torch
from torch import Tensor, nn

from sparsify.models.permutation import Kind, Part, Place


def permutable(model: nn.Module) -> tuple[dict[str, Part], dict[str, str]]:
    """The parts of a model that can be permuted by name, and why others cannot."""
    found: Any = model
    weights = dict(model.named_parameters())
    config = found.config
    heads = config.num_key_value_heads
    hidden = torch.arange(config.hidden_size)[None]
    parts: dict[str, Part] = {}
    residual: list[tuple[str, int]] = [("model.embed_tokens.weight", 1), ("model.norm.weight", 0)]
    inputs: list[str] = []
    for name, block in found.model.layers.named_children():
        path = f"model.layers.{name}"
        size = block.mlp.down_proj.in_features
        places = [
            (f"{path}.mlp.{x}_proj", axis) for x, axis in (("gate", 0), ("up", 0), ("down", 1))
        ]
        at = torch.arange(size)[None]
        parts[f"{path}.mlp"] = _part(
            f"{path}.mlp", "mlp", size, 1, (f"{path}.mlp.down_proj",), places, [at] * 3, weights
        )
        size, wide = block.self_attn.v_proj.out_features, block.self_attn.o_proj.in_features
        at = torch.arange(size)[None]
        grouped = torch.arange(wide).view(heads, wide // size, -1).transpose(0, 1).reshape(-1, size)
        places = [(f"{path}.self_attn.v_proj", 0), (f"{path}.self_attn.o_proj", 1)]
        parts[f"{path}.self_attn"] = _part(
            f"{path}.self_attn",
            "heads",
            size,
            heads,
            (f"{path}.self_attn.o_proj",),
            places,
            [at, grouped],
            weights,
        )
        inputs += [
            f"{path}.{x}"
            for x in (
                "self_attn.q_proj",
                "self_attn.k_proj",
                "self_attn.v_proj",
                "mlp.gate_proj",
                "mlp.up_proj",
            )
        ]
        residual += [
            (f"{path}.{x}.weight", 0)
            for x in (
                "self_attn.o_proj",
                "mlp.down_proj",
                "input_layernorm",
                "post_attention_layernorm",
            )
        ]
        residual += [(f"{path}.{x}.bias", 0) for x in ("self_attn.o_proj", "mlp.down_proj")]
    inputs.append("lm_head")
    residual += [(f"{name}.weight", 1) for name in inputs]
    parts["residual"] = Part(
        "residual",
        "residual",
        config.hidden_size,
        1,
        tuple(inputs),
        tuple(Place(name, axis, hidden) for name, axis in residual if name in weights),
    )
    return parts, {}


def _part(
    name: str,
    kind: Kind,
    size: int,
    runs: int,
    inputs: tuple[str, ...],
    layers: list[tuple[str, int]],
    at: list[Tensor],
    weights: dict[str, Any],
) -> Part:
    places = []
    for (layer, axis), index in zip(layers, at, strict=True):
        places.append(Place(f"{layer}.weight", axis, index))
        if axis == 0 and f"{layer}.bias" in weights:
            places.append(Place(f"{layer}.bias", 0, index))
    return Part(name, kind, size, runs, inputs, tuple(places))
