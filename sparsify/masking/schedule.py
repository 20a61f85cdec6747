"""Values that change as a run proceeds."""

import math
from dataclasses import dataclass
from typing import Literal

from sparsify.common.errors import SparsifyError


@dataclass(frozen=True)
class Schedule:
    """A value that goes from ``start`` at the first step to ``end`` after the last.

    Attributes:
        start: the value at progress 0.
        end: the value at progress 1.
        shape: ``linear``, ``cosine`` (half a wave) or ``exponential`` (both ends positive).
    """

    start: float
    end: float
    shape: Literal["linear", "cosine", "exponential"] = "linear"

    def __post_init__(self) -> None:
        if self.shape not in (shapes := ("linear", "cosine", "exponential")):
            raise SparsifyError(f"a schedule's shape is {self.shape!r}; it is one of {shapes}")
        if self.shape == "exponential" and not (self.start > 0 and self.end > 0):
            raise SparsifyError(
                f"an exponential schedule goes from {self.start} to {self.end}; both must be above "
                "0, as it never reaches 0: give a small number, or the shape linear or cosine"
            )

    def at(self, progress: float) -> float:
        """The value at ``progress`` = step / steps, which is held within 0 and 1."""
        t = min(max(progress, 0.0), 1.0)
        if self.shape == "exponential":
            return self.start * (self.end / self.start) ** t
        if self.shape == "cosine":
            t = (1 - math.cos(math.pi * t)) / 2
        return self.start + (self.end - self.start) * t
