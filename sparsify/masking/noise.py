"""Counter-based noise: each number is computed from its position alone, so no generator state is
stored.

A mask's noise depends only on (seed, step, draw, layer, row, column). So backward can make it
again, a resumed run continues with the numbers that it would have had anyway, and a process that
holds some rows of a layer makes the noise of just these rows.

The generator hashes 32-bit counters in wrapping int32 arithmetic. On a CPU this is five times
faster than 64-bit products, for which there is no vector instruction before AVX-512. Shapes: O out
(rows), E elements of a row.
"""

import hashlib
import math

import torch
from torch import Tensor

_BITS = 23  # (2**23 - 1 + 0.5) / 2**23 is below 1 in fp32; with 24 bits it would round to 1
# A CPU makes this many numbers at once, so that they stay in its cache for all steps of the hash.
_IN_CACHE = 1 << 16


def fold(*words: int | str) -> Tensor:
    """Hash integers and names into a key: a 0-d int64 tensor on CPU. Operations on any device
    accept it without waiting for a copy.
    """
    digest = hashlib.blake2b(repr(words).encode(), digest_size=8).digest()
    return torch.tensor(int.from_bytes(digest, "little", signed=True))


def _mix_(x: Tensor, spare: Tensor) -> Tensor:
    """Map int32 numbers one to one, in place, so that nearby ones become unrelated: xor-shifts
    (logical) and odd multipliers. ``spare`` is scratch memory of the same shape.
    """
    for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97), (15, None)):
        torch.bitwise_right_shift(x, shift, out=spare)
        x.bitwise_xor_(spare.bitwise_and_((1 << (32 - shift)) - 1))
        if factor is not None:
            x.mul_(factor)
    return x


def uniform(
    key: Tensor, rows: int, elements: int, row0: int = 0, device: torch.device | str = "cpu"
) -> Tensor:
    """Uniform numbers, strictly between 0 and 1.

    Args:
        key: 0-d int64, from :func:`fold`.
        rows: O, how many rows to make.
        elements: E, how many numbers a row has.
        row0: the index of the first row.

    Returns:
        fp32 ``[O, E]``: rows ``row0 .. row0 + rows`` of the unlimited rows that the key defines.
    """
    row = torch.arange(row0, row0 + rows, device=device, dtype=torch.int32)[:, None]
    column = torch.arange(elements, device=device, dtype=torch.int32)
    first = _mix_(row + (key >> 32).int(), torch.empty_like(row))
    # Two rows whose `first` differ in low bits only would hold the same numbers in another order;
    # adding `second` makes them different.
    second = _mix_(first ^ key.int(), torch.empty_like(row))
    out = torch.empty(rows, elements, device=device)
    at_once = rows
    if out.device.type == "cpu" and not torch.compiler.is_compiling():
        at_once = min(rows, max(1, _IN_CACHE // elements))
    spare = torch.empty(at_once, elements, device=device, dtype=torch.int32)
    for start in range(0, rows, at_once):
        some = slice(start, min(start + at_once, rows))
        bits = column ^ first[some]
        room = spare[: len(bits)]
        _mix_(_mix_(bits, room).add_(second[some]), room)
        bits.bitwise_right_shift_(32 - _BITS).bitwise_and_(2**_BITS - 1)
        out[some].copy_(bits).add_(0.5).mul_(2.0**-_BITS)
    return out


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


def round_to_bfloat16(values: Tensor, key: Tensor, row0: int = 0) -> Tensor:
    """Round up or down at random, so that the mean is the value (stochastic rounding: Gupta et al.,
    2015, arXiv 1502.02551).

    Args:
        values: finite fp32, ``[O, E]``.
        key, row0: as for :func:`uniform`.

    Returns:
        bfloat16 ``[O, E]``.
    """
    chance = uniform(key, *values.shape, row0, values.device).mul_(1 << 16).int()
    # A bfloat16 number is the upper half of an fp32 one: a carry out of the lower half rounds up.
    bits = chance.add_(values.contiguous().view(torch.int32)).bitwise_and_(-(1 << 16))
    return bits.view(torch.float32).bfloat16()
