"""Settings of calibration: how much text it reads, and on which activations."""

from dataclasses import dataclass
from typing import Literal

from sparsify.common.errors import SparsifyError


@dataclass(frozen=True)
class Calibration:
    """Settings of layerwise calibration.

    Args:
        samples: number of windows of training text, each of the data's block size.
        seed: chooses the windows.
        activations: whether the blocks before a block are pruned or dense when its statistics are
            collected.
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
