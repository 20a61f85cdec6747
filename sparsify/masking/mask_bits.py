"""Masks as one bit a weight.

Shapes: O out, I in, J = I / 8, rounded up.
"""

from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

_EIGHT = 8


def pack(mask_OI: Tensor) -> Tensor:
    """Eight weights as one byte, the first as its lowest bit: uint8 ``[O, J]`` from bool."""
    rows, columns = mask_OI.shape
    mask_OI = pad(mask_OI.to(torch.uint8), (0, -columns % _EIGHT))
    bytes_OJ = torch.zeros(rows, mask_OI.shape[1] // _EIGHT, dtype=torch.uint8).to(mask_OI.device)
    for bit, kept_OJ in enumerate(mask_OI.unflatten(1, (-1, _EIGHT)).unbind(-1)):
        bytes_OJ.add_(kept_OJ, alpha=1 << bit)
    return bytes_OJ


def unpack(bytes_OJ: Tensor, columns: int) -> Tensor:
    """The mask of ``columns`` weights a row: bool ``[O, I]``."""
    # A lookup of eight bool values as one int64 is faster than eight shifts.
    table = torch.from_numpy(_bytes()).to(bytes_OJ.device)
    found = table.index_select(0, bytes_OJ.flatten().int()).view(torch.bool)
    rows, count = bytes_OJ.shape
    return found.view(rows, _EIGHT * count)[:, :columns]


@cache  # an array: a tensor would stay one of the mode in which it is first asked for
def _bytes() -> np.ndarray:
    """The eight bits of every byte, as eight bool values that are read as one int64."""
    every = np.arange(256, dtype=np.uint8)[:, None]
    return np.unpackbits(every, axis=1, bitorder="little").view(np.int64).squeeze(1)
