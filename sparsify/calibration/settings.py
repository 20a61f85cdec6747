"""How much text calibration reads, and under which activations."""

from dataclasses import dataclass
from typing import Literal

from sparsify.common.errors import SparsifyError


@dataclass(frozen=True)
class Calibration:
    """Settings of layerwise calibration.

    Args:
        samples: windows of training text, each of the data's block size.
        seed: chooses them.
        activations: what the statistics of a block are collected on: the output of the blocks
            before it as they were pruned, or as they were dense.
        offload: keep the activations of all windows in main memory, not on the device.
        cache: keep results on disk, and take them from there when the base model, the text, the
            strategy and its settings are the same.
    """

    samples: int = 128
    seed: int = 0
    activations: Literal["pruned", "dense"] = "pruned"
    offload: bool = False
    cache: bool = True

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise SparsifyError(f"calibration samples={self.samples}; it must be at least 1")
