"""Enumerative codes: store numbers below K in close to log2(K) bits each, and sorted positions.

Several digits of base K are combined into one number, which is stored as a word of W bits. W and
the number of digits are chosen to waste least: for 2:4, K = 6, a word of 44 bits holds 17 groups,
0.6471 bits per weight, where log2(6) / 4 is 0.6462. Words follow each other without gaps, lowest
bit first. ``docs/mask_file.md`` defines the bytes. All functions are vectorised and run on CPU;
codes and digits are flat tensors.
"""

import math
from functools import cache

import numpy as np
import torch
from torch import Tensor

from sparsify.export.mask_file.sizes import (
    bitmap_bytes,
    code_bytes,
    low_width,
    positions_bytes,
    word_size,
)

WORDS_A_BLOCK = 8  # so many words are a whole number of bytes
TABLE_SIZE = 2**16


def encode(digits: Tensor, base: int) -> Tensor:
    """Pack digits, integers from 0 to ``base - 1``: uint8 ``[code_bytes]``."""
    if base == 1:
        return torch.empty(0, dtype=torch.uint8)
    bits, count = word_size(base)
    padded = torch.nn.functional.pad(digits, (0, -len(digits) % count)).view(-1, count)
    words = torch.zeros(len(padded), dtype=torch.int64)
    for column in reversed(padded.unbind(-1)):
        words.mul_(base).add_(column)
    return _pack_words(words, bits)[: code_bytes(len(digits), base)]


def decode(code: Tensor, count: int, base: int) -> Tensor:
    """Unpack the ``count`` digits of a code: uint8 if the base fits, else int16 or int64.

    Raises:
        ValueError: :func:`encode` cannot have made these bytes.
    """
    dtype = digit_dtype(base)
    if len(code) != code_bytes(count, base):
        raise ValueError(f"{len(code)} bytes for {count} digits of base {base}")
    if base == 1:
        return torch.zeros(count, dtype=dtype)
    bits, digits = word_size(base)
    words = _unpack_words(code, -(-count // digits), bits)
    # Dividing by a power of the base gives several digits at once; a table splits them.
    at_once = min(digits, max(1, int(math.log(TABLE_SIZE + 0.5, base))))
    columns = []
    for first in range(0, digits, at_once):
        n = min(at_once, digits - first)
        rest = words.div(base**n, rounding_mode="floor")
        part = words.sub_(rest, alpha=base**n)
        columns.append(
            part[:, None].to(dtype) if n == 1 else torch.from_numpy(_split_table(base, n))[part]
        )
        words = rest
    if words.any():
        raise ValueError("a word is larger than its digits can be")
    padded = torch.cat(columns, dim=1).flatten()
    if padded[count:].any():
        raise ValueError("the padding is not zero")
    return padded[:count]


def digit_dtype(base: int) -> torch.dtype:
    """The smallest type that :func:`decode` uses for digits of this base."""
    if base <= 2**8:
        return torch.uint8
    return torch.int16 if base <= 2**15 else torch.int64


def encode_positions(positions: Tensor, universe: int) -> Tensor:
    """Pack increasing integers below ``universe`` as an Elias-Fano code: uint8.

    The code holds their low bits, then a bitmap in which the i-th position sets the bit number
    (high bits + i).

    Source: Elias, Efficient Storage and Retrieval by Content and Address of Static Files, 1974.
    """
    count = len(positions)
    if count == 0:
        return torch.empty(0, dtype=torch.uint8)
    low_bits = low_width(count, universe)
    bitmap = torch.zeros(8 * bitmap_bytes(count, universe), dtype=torch.uint8)
    bitmap[(positions >> low_bits) + torch.arange(count)] = 1
    weights = 2 ** torch.arange(8, dtype=torch.uint8)
    packed = (bitmap.view(-1, 8) * weights).sum(1, dtype=torch.uint8)
    return torch.cat([encode(positions & (2**low_bits - 1), 2**low_bits), packed])


def decode_positions(code: Tensor, count: int, universe: int) -> Tensor:
    """Unpack the positions of a code: int64, increasing.

    Raises:
        ValueError: :func:`encode_positions` cannot have made these bytes.
    """
    if len(code) != positions_bytes(count, universe):
        raise ValueError(f"{len(code)} bytes for {count} positions of {universe}")
    if count == 0:
        return torch.empty(0, dtype=torch.int64)
    low_bits = low_width(count, universe)
    split = code_bytes(count, 2**low_bits)
    low = decode(code[:split], count, 2**low_bits).long()
    bits = (code[split:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    ones = bits.flatten().nonzero().flatten()
    if len(ones) != count:
        raise ValueError(f"{len(ones)} positions where {count} belong")
    positions = (ones - torch.arange(count) << low_bits) | low
    if positions[-1] >= universe or (positions.diff() <= 0).any():
        raise ValueError("positions that do not increase, or lie beyond the end")
    return positions


@cache  # an array: a tensor would stay one of the mode in which it is first asked for
def _split_table(base: int, digits: int) -> np.ndarray:
    """The digits of every number of ``digits`` digits: ``[base**digits, digits]``, lowest first."""
    numbers = np.arange(base**digits)[:, None]
    table = numbers // base ** np.arange(digits) % base
    return table.astype(str(digit_dtype(base)).removeprefix("torch."))


def _pack_words(words: Tensor, bits: int) -> Tensor:
    blocks = torch.nn.functional.pad(words, (0, -len(words) % WORDS_A_BLOCK))
    blocks = blocks.view(-1, WORDS_A_BLOCK)
    packed = torch.empty(len(blocks), bits, dtype=torch.uint8)
    for byte in range(bits):  # 8 words of ``bits`` bits make ``bits`` bytes
        word, offset = divmod(8 * byte, bits)
        value = blocks[:, word] >> offset
        if offset + 8 > bits:
            value |= blocks[:, word + 1] << (bits - offset)
        packed[:, byte] = value & 0xFF
    return packed.flatten()


def _unpack_words(code: Tensor, count: int, bits: int) -> Tensor:
    blocks = torch.nn.functional.pad(code, (0, -len(code) % bits)).view(-1, bits)
    words = torch.zeros(len(blocks), WORDS_A_BLOCK, dtype=torch.int64)
    for byte in range(bits):
        word, offset = divmod(8 * byte, bits)
        value = blocks[:, byte].long()
        words[:, word] |= (value << offset) & (2**bits - 1)
        if offset + 8 > bits:
            words[:, word + 1] |= value >> (bits - offset)
    flat = words.flatten()
    if flat[count:].any():
        raise ValueError("the last bits are not zero")
    return flat[:count]
