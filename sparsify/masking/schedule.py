"""Values that change as a run proceeds."""

import math
from dataclasses import dataclass
from typing import Literal


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

    def at(self, progress: float) -> float:
        """The value at ``progress`` = step / steps, which is held within 0 and 1."""
        t = min(max(progress, 0.0), 1.0)
        if self.shape == "exponential":
            return self.start * (self.end / self.start) ** t
        if self.shape == "cosine":
            t = (1 - math.cos(math.pi * t)) / 2
        return self.start + (self.end - self.start) * t
