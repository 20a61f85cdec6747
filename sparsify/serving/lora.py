"""Reads a LoRA adapter as PEFT saves it; PEFT itself is not needed.

Shapes: O out, I in, R rank.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparsify.common.errors import SparsifyError
from sparsify.common.files import read_json
from sparsify.common.values import short

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_KEY = re.compile(r"base_model\.model\.(?P<layer>.+)\.lora_(?P<side>[AB])\.weight")

# Settings that say where the adapter was and how it was trained, but not what it computes.
_OF_TRAINING = {
    *("auto_mapping", "peft_version", "task_type", "inference_mode", "revision"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("lora_dropout", "eva_config", "qalora_group_size", "megatron_core", "fan_in_fan_out"),
}
_READ = {
    *("peft_type", "base_model_name_or_path", "bias", "init_lora_weights"),
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"),
}
# Other ways to begin also change the weights of the base, so that the adapter is not its own.
_BEGINNINGS = (None, True, False, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True)
class LowRank:
    """What an adapter adds to the weight of one layer: ``scale * B A``."""

    a_RI: Tensor
    b_OR: Tensor
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        return self.b_OR.shape[0], self.a_RI.shape[1]

    def product_OI(self) -> Tensor:
        """In float32."""
        return self.scale * (self.b_OR.float() @ self.a_RI.float())


class LoraAdapter(Mapping[str, LowRank]):
    """A LoRA adapter, by the qualified names of the layers; each is read when it is asked for.

    Args:
        folder: holds ``adapter_config.json`` and ``adapter_model.safetensors``.

    Attributes:
        base_name: the model on which it says that it was trained; empty if it does not say.

    Raises:
        SparsifyError: the files are missing or damaged, or the adapter is more than products of two
            matrices beside linear layers.
    """

    def __init__(self, folder: Path) -> None:
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).is_file():
                raise SparsifyError(
                    f"{folder} holds no {name}; name the folder of an adapter that PEFT saved "
                    "(pickle files, .bin, can run code and are not read)"
                )
        self._folder, self._config = folder, _read_config(folder)
        self.base_name = str(self._config.get("base_model_name_or_path") or "")
        self._keys = self._find()

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, layer: str) -> LowRank:
        keys = self._keys[layer]
        try:
            with safe_open(self._folder / WEIGHTS, framework="pt") as file:
                a_RI, b_OR = file.get_tensor(keys["A"]), file.get_tensor(keys["B"])
        except (OSError, SafetensorError) as error:
            raise self._unreadable(error) from error
        if a_RI.ndim != 2 or b_OR.ndim != 2 or a_RI.shape[0] != b_OR.shape[1]:
            raise SparsifyError(
                f"{self._folder}: {layer} has matrices {tuple(a_RI.shape)} and "
                f"{tuple(b_OR.shape)}, which are not [r, in] and [out, r] of one r; only linear "
                "layers can be merged"
            )
        if not bool(a_RI.isfinite().all() and b_OR.isfinite().all()):
            raise SparsifyError(
                f"{self._folder}: {layer} holds values that are not finite; train it again"
            )
        return LowRank(a_RI, b_OR, self._scale(layer, a_RI.shape[0]))

    def _find(self) -> dict[str, dict[str, str]]:
        """The key of both matrices, by layer."""
        try:
            with safe_open(self._folder / WEIGHTS, framework="pt") as file:
                keys = list(file.keys())
        except (OSError, SafetensorError) as error:
            raise self._unreadable(error) from error
        found: dict[str, dict[str, str]] = {}
        for key in keys:
            if (match := _KEY.fullmatch(key)) is None:
                raise SparsifyError(
                    f"{self._folder}: {WEIGHTS} holds {key}, which is no LoRA matrix of a linear "
                    "layer; adapters of embeddings, DoRA, and what was trained whole beside the "
                    "adapter are not merged: train without them"
                )
            found.setdefault(match["layer"], {})[match["side"]] = key
        for layer, sides in found.items():
            if len(sides) != 2:
                raise SparsifyError(
                    f"{self._folder}: of {layer} there is only lora_{next(iter(sides))}; the file "
                    "is not whole: save the adapter again"
                )
        if not found:
            raise SparsifyError(f"{self._folder}: {WEIGHTS} holds no LoRA matrices; save it again")
        return found

    def _scale(self, layer: str, rank: int) -> float:
        """The factor of a layer's product, by PEFT's rules."""
        config = self._config
        stated = self._of_layer("rank_pattern", layer, config["r"])
        if stated != rank:
            raise SparsifyError(
                f"{self._folder}: {layer} has rank {rank}, and {CONFIG} says {stated}; the files "
                "are of two adapters: save it again"
            )
        alpha = self._of_layer("alpha_pattern", layer, config["lora_alpha"])
        return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))

    def _of_layer(self, patterns: str, layer: str, otherwise: float) -> float:
        """The number of the first pattern that the layer's name ends with."""
        numbers: dict[str, float] = self._config.get(patterns) or {}
        for pattern, number in numbers.items():
            if re.match(rf"(.*\.)?({pattern})$", layer):
                return number
        return otherwise

    def _unreadable(self, error: Exception) -> SparsifyError:
        return SparsifyError(
            f"{self._folder / WEIGHTS} is not readable ({error}); save the adapter again"
        )


def _read_config(folder: Path) -> dict[str, Any]:
    """The settings, of which none is unknown."""
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict):
        raise SparsifyError(f"{folder / CONFIG}: not a JSON object; save the adapter again")

    def refuse(key: str, rule: str) -> None:
        raise SparsifyError(f"{folder / CONFIG}: {key} is {short(config.get(key))}; {rule}")

    if config.get("peft_type") != "LORA":
        refuse("peft_type", "only LORA can be merged: train such an adapter")
    if config.get("bias", "none") != "none":
        refuse("bias", "biases are not merged: train with bias='none'")
    if config.get("init_lora_weights") not in _BEGINNINGS:
        refuse(
            "init_lora_weights",
            "it changes the base too: train with one of true, gaussian, orthogonal or eva",
        )
    for key in ("r", "lora_alpha"):
        if not _is_number(config.get(key)):
            refuse(key, "it must be a positive number: save the adapter again")
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(key) or {}
        if not isinstance(patterns, dict) or not all(map(_is_number, patterns.values())):
            refuse(key, "it must give a positive number to each name: save the adapter again")
        try:
            for pattern in patterns:
                re.compile(pattern)
        except re.error as error:
            refuse(key, f"{error}: save the adapter again")
    for key in config.keys() - _READ - _OF_TRAINING:
        if config[key]:
            refuse(key, "sparsify merge does not know what that adds: train without it")
    return config


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf  # type: ignore[operator]
