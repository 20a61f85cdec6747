"""Counter-based noise: every number is a pure function of where it stands, so nothing needs to be stored.

A mask's noise depends on (seed, step, draw, layer, row, column) alone. Backward can make it again, a resumed run
continues with the numbers it would have had, and a shard of a layer makes exactly its own rows.

The mixer is a 32-bit finaliser (shifts and multiplications by odd constants below 2**31, so that every product fits a
signed 64-bit integer, on any device and under a compiler). Shapes: O out (rows), E elements of a row.
"""

import math
import zlib
from typing import TypeVar

import torch
from torch import Tensor

Number = TypeVar("Number", int, Tensor)
_MASK = 0xFFFFFFFF
_BITS = 23  # (2**23 - 1 + 0.5) / 2**23 is below 1 in fp32; with 24 bits it would round to 1


def _mix(x: Number) -> Number:
    """Permute the integers below 2**32 so that nearby ones become unrelated. Python's integers or int64 tensors."""
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & _MASK
    x = ((x ^ (x >> 15)) * 0x735A2D97) & _MASK
    return x ^ (x >> 15)


def fold(*words: int | str) -> Tensor:
    """Hash integers and names into a key: a 0-d int64 tensor below 2**32 on CPU."""
    key = 0x9E3779B9
    for word in words:
        number = zlib.crc32(word.encode()) if isinstance(word, str) else word
        for part in (number & _MASK, (number >> 32) & _MASK):
            key = _mix((key + part) & _MASK)
    return torch.tensor(key)


def uniform(key: Tensor, rows: int, elements: int, row0: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """Uniform numbers, strictly between 0 and 1.

    Args:
        key: 0-d int64 below 2**32, from :func:`fold`.
        rows: O, the number of rows to make.
        elements: E, the numbers in a row.
        row0: the first row's number in the whole tensor.

    Returns:
        fp32 ``[O, E]``: rows ``row0 .. row0 + rows`` of the endless tensor that belongs to the key.
    """
    # Two rows whose `first` share their high bits would repeat one another in another order; `second` parts them.
    row = torch.arange(row0, row0 + rows, device=device)[:, None]
    first = _mix((row + key) & _MASK)
    second = _mix(first ^ 0x5BD1E995)
    bits = _mix((_mix(torch.arange(elements, device=device) ^ first) + second) & _MASK)
    return ((bits >> (32 - _BITS)).float() + 0.5) * 2.0**-_BITS


def gumbel(key: Tensor, rows: int, elements: int, row0: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """Standard Gumbel numbers ``-log(-log u)``, fp32 ``[O, E]``; arguments as :func:`uniform`."""
    return uniform(key, rows, elements, row0, device).log_().neg_().log_().neg_()


def normal(key: Tensor, rows: int, elements: int, row0: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """Standard normal numbers (Box and Muller, 1958), fp32 ``[O, E]``; arguments as :func:`uniform`."""
    u = uniform(key, rows, 2 * elements, row0, device)
    radius = (-2 * u[:, :elements].log()).sqrt_()
    return radius * torch.cos(2 * math.pi * u[:, elements:])
