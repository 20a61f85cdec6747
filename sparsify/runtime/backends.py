"""What runs N:M sparse products, and which layers each of them takes.

Shapes: O out, I in.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from sparsify.pattern import NMPattern

TWO_FOUR = NMPattern(2, 4)
_HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Backend:
    """One implementation of sparse products.

    Attributes:
        name: as it stands in tables.
        tiles: by type of the weight, what O and I must be multiples of.
    """

    name: str
    tiles: Mapping[torch.dtype, tuple[int, int]]

    def takes(
        self, shape: tuple[int, int], dtype: torch.dtype, pattern: NMPattern = TWO_FOUR
    ) -> bool:
        """Whether it can run a layer of such a weight ``(O, I)``; what keeps at most 2 of every
        aligned 4 is 2:4, so 1:4 and 2:8 are too.
        """
        if (tile := self.tiles.get(dtype)) is None or not _is_two_four(pattern):
            return False
        return not (shape[0] % tile[0] or shape[1] % tile[1])


CUSPARSELT = Backend(
    "cusparselt",
    {
        **dict.fromkeys(_HALVES, (16, 16)),
        **dict.fromkeys((torch.int8, torch.float8_e4m3fn), (32, 32)),
    },
)
#: PyTorch has it on compute capability 8.x alone.
CUTLASS = Backend("cutlass", {**dict.fromkeys(_HALVES, (32, 64)), torch.int8: (16, 128)})
BACKENDS = (CUSPARSELT, CUTLASS)


def eligible(
    shape: tuple[int, int], dtype: torch.dtype, pattern: NMPattern = TWO_FOUR
) -> list[str]:
    """The names of the backends that take such a layer."""
    return [backend.name for backend in BACKENDS if backend.takes(shape, dtype, pattern)]


def _is_two_four(pattern: NMPattern) -> bool:
    # Four in a row lie in one group of 4 or 8, and in no more than two of any other size.
    return pattern.n == 1 or (pattern.n == 2 and pattern.m % 4 == 0)
