"""Tiny random vision-language models, with an image for each."""

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from tests.conftest import SIZES

IMAGE, VIDEO, START, END = 63, 62, 61, 60  # token ids
_TEXT = SIZES | {"pad_token_id": None}
_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}
_QWEN_TEXT = _TEXT | {
    "head_dim": 8,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
}
_QWEN_TOWER = {
    "depth": 2,
    "hidden_size": 32,
    "out_hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 4,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
_QWEN3_TOWER = _QWEN_TOWER | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
_QWEN_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
_BETWEEN = {"image_token_index": IMAGE, "boi_token_index": START, "eoi_token_index": END}

# By model type.
VISION: dict[str, dict[str, Any]] = {
    # Its vision tower holds more weights than its text decoder.
    "llava": {
        "text_config": _TEXT | {"model_type": "llama"},
        "vision_config": _TOWER
        | {"model_type": "clip_vision_model", "patch_size": 8, "num_hidden_layers": 6},
        "image_token_index": IMAGE,
        "vision_feature_layer": -1,
    },
    "qwen2_5_vl": _QWEN_TOKENS
    | {
        "text_config": _QWEN_TEXT,
        "vision_config": _QWEN_TOWER | {"window_size": 16, "fullatt_block_indexes": [1]},
    },
    "qwen3_vl": _QWEN_TOKENS | {"text_config": _QWEN_TEXT, "vision_config": _QWEN3_TOWER},
    "gemma3": _BETWEEN
    | {
        "text_config": _TEXT
        | {
            "head_dim": 8,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        "vision_config": _TOWER | {"vision_use_head": False},
        "mm_tokens_per_image": 4,
    },
    "mistral3": {
        "text_config": _TEXT | {"model_type": "mistral"},
        "vision_config": _TOWER | {"model_type": "pixtral"},
        "image_token_index": IMAGE,
        "vision_feature_layer": -1,
        "spatial_merge_size": 2,
    },
}

# Of its text decoder alone there is a class too.
QWEN3_5: dict[str, Any] = _QWEN_TOKENS | {
    "text_config": _QWEN_TEXT
    | {
        "rope_parameters": _QWEN_TEXT["rope_parameters"] | {"partial_rotary_factor": 1.0},
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "vision_config": _QWEN3_TOWER | {"deepstack_visual_indexes": []},
}
# Two of its four blocks run only if there is an image.
MLLAMA: dict[str, Any] = {
    "text_config": _TEXT
    | {
        "num_hidden_layers": 4,
        "cross_attention_layers": [1, 3],
        "bos_token_id": 0,
        "pad_token_id": 0,
    },
    "vision_config": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_global_layers": 1,
        "attention_heads": 4,
        "image_size": 16,
        "patch_size": 4,
        "max_num_tiles": 1,
        "vision_output_dim": 64,
        "intermediate_layers_indices": [0],
        "supported_aspect_ratios": [[1, 1]],
    },
    "image_token_index": IMAGE,
}


def tiny_vision(kind: str) -> PreTrainedModel:
    """A random model of a type; norms stay ones, as they are made."""
    settings = VISION | {"qwen3_5": QWEN3_5, "mllama": MLLAMA}
    config = AutoConfig.for_model(kind, **settings[kind], tie_word_embeddings=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForImageTextToText.from_config(config).eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data.normal_(std=0.2)
    return model


def image_inputs(kind: str) -> dict[str, Tensor]:
    """Text with an image of 16 x 16 pixels, as a model's processor would make it."""
    generator = torch.Generator().manual_seed(1)
    tokens_BT = torch.tensor([[3, 5, START, *[IMAGE] * 4, END, 7, 9]])
    inputs = {"input_ids": tokens_BT}
    if "qwen" in kind:
        inputs["pixel_values"] = torch.randn(16, 2 * 3 * 4 * 4, generator=generator)
        inputs["image_grid_thw"] = torch.tensor([[1, 4, 4]])
        inputs["mm_token_type_ids"] = (tokens_BT == IMAGE).long()
    else:
        inputs["pixel_values"] = torch.randn(1, 3, 16, 16, generator=generator)
    if kind == "gemma3":
        inputs["token_type_ids"] = (tokens_BT == IMAGE).long()
    if kind == "mistral3":
        inputs["image_sizes"] = torch.tensor([[16, 16]])
    return inputs
