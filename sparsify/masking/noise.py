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
from collections.abc import Iterator

import torch
from torch import Tensor

from sparsify.masking.by_shape import by_shape

_BITS = 23  # those of a fp32 number's fraction
# A CPU makes this many numbers at once, so that they stay in its cache for all steps of the hash.
_IN_CACHE = 1 << 17


def _int(value: int) -> Tensor:
    """A constant that operations need not convert first, which takes a fifth of their time."""
    return torch.tensor(value, dtype=torch.int32)


_SHIFTS = {shift: (_int(shift), _int((1 << (32 - shift)) - 1)) for shift in (15, 16)}
_FACTORS = _int(0x21F0AAAD), _int(0x735A2D97)
# Steps of Kronecker sequences: 2**16 over the golden ratio, the plastic number and its square, odd.
_GOLDEN, _PLASTIC, _PLASTIC_SQUARED, _LOWER = 40503, 49471, 37345, (1 << 16) - 1
_TO_FRACTION, _FRACTION, _ONE = _int(32 - _BITS), _int(2**_BITS - 1), _int(0x3F800000)


def fold(*words: int | str) -> Tensor:
    """Hash integers and names into a key: a 0-d int64 tensor on CPU. Operations on any device
    accept it without waiting for a copy.
    """
    digest = hashlib.blake2b(repr(words).encode(), digest_size=8).digest()
    return torch.tensor(int.from_bytes(digest, "little", signed=True))


def _xor_shift_(x: Tensor, spare: Tensor, shift: int) -> Tensor:
    """Xor int32 numbers with themselves shifted right (logically), in place. ``spare`` is scratch
    memory of the same shape.
    """
    places, kept = _SHIFTS[shift]
    torch.bitwise_right_shift(x, places, out=spare)
    return x.bitwise_xor_(spare.bitwise_and_(kept))


def _multiply_(x: Tensor, spare: Tensor) -> Tensor:
    """What :func:`_mix_` does after its first xor-shift."""
    for factor in _FACTORS:
        _xor_shift_(x.mul_(factor), spare, 15)
    return x


def _mix_(x: Tensor, spare: Tensor) -> Tensor:
    """Map int32 numbers one to one, in place, so that nearby ones become unrelated: xor-shifts and
    odd multipliers.
    """
    return _multiply_(_xor_shift_(x, spare, 16), spare)


def _pieces(
    key: Tensor,
    rows: int,
    elements: int,
    row0: int,
    device: torch.device | str,
    out: Tensor | None = None,
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Make uniform numbers some rows at a time: on a CPU what its cache holds, else all.

    Yields which rows, their numbers, and scratch memory of the same shape.

    Args:
        key, rows, elements, row0, device: as for :func:`uniform`.
        out: where to make them, ``[O, E]``; by default each piece overwrites the one before.
    """
    row = torch.arange(row0, row0 + rows, device=device, dtype=torch.int32)[:, None]
    column = torch.arange(elements, device=device, dtype=torch.int32)
    first = _mix_(row + (key >> 32).int(), torch.empty_like(row))
    # Two rows whose `first` differ in low bits only would hold the same numbers in another order;
    # adding `second` makes them different.
    second = _mix_(first ^ key.int(), torch.empty_like(row))
    # A number's bits are mix(mix(column ^ first) + second). The inner mix begins with a xor-shift,
    # which can be taken of rows and of columns apart: (a ^ b) >> s is (a >> s) ^ (b >> s).
    for part in (first, column):
        _xor_shift_(part, torch.empty_like(part), 16)
    at_once = max(1, rows)
    if column.device.type == "cpu" and not torch.compiler.is_compiling():
        at_once = min(at_once, max(1, _IN_CACHE // elements))
    spare = torch.empty(min(rows, at_once), elements, device=device, dtype=torch.int32)
    room = torch.empty_like(spare, dtype=torch.float32) if out is None else out
    for start in range(0, rows, at_once):
        some = slice(start, min(start + at_once, rows))
        made = room[: some.stop - start] if out is None else out[some]
        bits, scratch = made.view(torch.int32), spare[: len(made)]
        torch.bitwise_xor(column, first[some], out=bits)
        _mix_(_multiply_(bits, scratch).add_(second[some]), scratch)
        # Make the first 23 bits the fraction of a number in [1, 2): no conversion is needed. The
        # difference (bits + 0.5) / 2**23 is exact.
        bits.bitwise_right_shift_(_TO_FRACTION).bitwise_and_(_FRACTION).bitwise_or_(_ONE)
        yield some, made.sub_(1 - 0.5 * 2.0**-_BITS), scratch.view(torch.float32)


@by_shape
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
    out = torch.empty(rows, elements, dtype=torch.float32, device=device)
    for _ in _pieces(key, rows, elements, row0, device, out):
        pass
    return out


@by_shape
def gumbel(
    key: Tensor, rows: int, elements: int, row0: int = 0, device: torch.device | str = "cpu"
) -> Tensor:
    """Standard Gumbel numbers ``-log(-log u)``, fp32 ``[O, E]``; arguments as :func:`uniform`."""
    out = torch.empty(rows, elements, dtype=torch.float32, device=device)
    for _, u, _ in _pieces(key, rows, elements, row0, device, out):
        u.log_().neg_().log_().neg_()
    return out


def gumbel_pieces(
    key: Tensor, rows: int, elements: int, row0: int = 0, device: torch.device | str = "cpu"
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """The same some rows at a time: on a CPU what its cache holds, else all.

    Yields which rows, their numbers, and scratch memory of the same shape: both to be overwritten
    at will, and valid until the next piece is made.
    """
    for some, u, scratch in _pieces(key, rows, elements, row0, device):
        yield some, u.log_().neg_().log_().neg_(), scratch


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
    rows, elements = values.shape
    return _carried(values, uniform(key, rows, elements, row0, values.device).mul_(1 << 16).int())


def dither_to_bfloat16(values: Tensor, key: Tensor, count: int, row0: int = 0) -> Tensor:
    """The same for a sum that is rounded after every addition, in far fewer operations: what a
    number is rounded by runs evenly through all values as ``count`` does (a Kronecker sequence), so
    that errors of one number cancel even better than random ones.

    Args:
        values, key, row0: as for :func:`round_to_bfloat16`; one key for all additions.
        count: how many additions came before.
    """
    rows, elements = values.shape
    start = int(key) + count * _GOLDEN
    down = torch.arange(row0, row0 + rows, dtype=torch.int32, device=values.device).mul_(_PLASTIC)
    along = torch.arange(elements, dtype=torch.int32, device=values.device).mul_(_PLASTIC_SQUARED)
    chance = down.add_(start & _LOWER)[:, None].add(along).bitwise_and_(_LOWER)
    return _carried(values, chance)


def _carried(values: Tensor, chance: Tensor) -> Tensor:
    """Fp32 as bfloat16, which is its upper half: a carry out of the lower half rounds up. The
    chances, int32 below 2**16, are overwritten.
    """
    bits = chance.add_(values.contiguous().view(torch.int32)).bitwise_and_(~_LOWER)
    return bits.view(torch.float32).bfloat16()
