"""The bits of numbers."""

import torch
from torch import Tensor

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(values: Tensor) -> Tensor:
    """The same bytes as integers: equal where every bit is, and zero for +0.0 alone.

    Operations on floats may change the bits of a NaN, and on fp16 and bf16 some do; those on
    integers do not.
    """
    return values.contiguous().view(_INTEGERS[values.element_size()])
