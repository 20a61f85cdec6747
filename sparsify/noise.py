"""Counter-based noise: every number is a pure function of where it stands, so nothing needs to be
stored.

A mask's noise depends on (seed, step, draw, layer, row, column) alone. Backward can make it again,
a resumed run continues with the numbers it would have had, and a shard of a layer makes exactly its
own rows.

The generator hashes 32-bit counters in wrapping int32 arithmetic: on a CPU five times faster than
64-bit products, which have no vector instruction before AVX-512. Shapes: O out (rows), E elements
of a row.
"""

import hashlib
import math

import torch
from torch import Tensor

_BITS = 23  # (2**23 - 1 + 0.5) / 2**23 is below 1 in fp32; with 24 bits it would round to 1


def fold(*words: int | str) -> Tensor:
    """Hash integers and names into a key: a 0-d int64 tensor on CPU, which any device takes without
    waiting.
    """
    digest = hashlib.blake2b(repr(words).encode(), digest_size=8).digest()
    return torch.tensor(int.from_bytes(digest, "little", signed=True))


def _mix(x: Tensor) -> Tensor:
    """Permute int32 so that nearby numbers become unrelated: xor-shifts (logical) and odd
    multipliers.
    """
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x21F0AAAD
    x = (x ^ ((x >> 15) & 0x1FFFF)) * 0x735A2D97
    return x ^ ((x >> 15) & 0x1FFFF)


def uniform(
    key: Tensor, rows: int, elements: int, row0: int = 0, device: torch.device | str = "cpu"
) -> Tensor:
    """Uniform numbers, strictly between 0 and 1.

    Args:
        key: 0-d int64, from :func:`fold`.
        rows: O, the number of rows to make.
        elements: E, the numbers in a row.
        row0: the first row's number in the whole tensor.

    Returns:
        fp32 ``[O, E]``: rows ``row0 .. row0 + rows`` of the endless tensor that belongs to the key.
    """
    row = torch.arange(row0, row0 + rows, device=device, dtype=torch.int32)[:, None]
    column = torch.arange(elements, device=device, dtype=torch.int32)
    first = _mix(row + (key >> 32).int())
    # Rows whose `first` differ in low bits only would hold the same numbers in another order;
    # `second` parts them.
    second = _mix(first ^ key.int())
    bits = _mix(_mix(column ^ first) + second)
    return (((bits >> (32 - _BITS)) & (2**_BITS - 1)).float() + 0.5).mul_(2.0**-_BITS)


def gumbel(
    key: Tensor, rows: int, elements: int, row0: int = 0, device: torch.device | str = "cpu"
) -> Tensor:
    """Standard Gumbel numbers ``-log(-log u)``, fp32 ``[O, E]``; arguments as :func:`uniform`."""
    return uniform(key, rows, elements, row0, device).log_().neg_().log_().neg_()


def normal(
    key: Tensor, rows: int, elements: int, row0: int = 0, device: torch.device | str = "cpu"
) -> Tensor:
    """Standard normal numbers (Box and Muller, 1958), fp32 ``[O, E]``; arguments as
    :func:`uniform`.
    """
    u = uniform(key, rows, 2 * elements, row0, device)
    radius = (-2 * u[:, :elements].log()).sqrt_()
    return radius * torch.cos(2 * math.pi * u[:, elements:])
