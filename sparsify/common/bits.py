"""Compares numbers by their bits."""

import torch
from torch import Tensor

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(values: Tensor) -> Tensor:
    """View a tensor's bytes as integers. Two are equal if all their bits are; only +0.0 gives 0.

    Operations on floats may change the bits of a NaN, as some on fp16 and bf16 do; operations on
    integers do not.
    """
    return values.contiguous().view(_INTEGERS[values.element_size()])
