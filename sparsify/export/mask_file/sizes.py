"""Computes how many bytes the codes of masks take, as a reader of an index must know.

Nothing here needs PyTorch, so that a mask file can be shown without waiting for its import.
"""

from functools import cache

WORD_BITS = 62  # words are computed in int64


@cache
def word_size(base: int) -> tuple[int, int]:
    """(bits, digits) of a word: of 8 to 62 bits, with the fewest bits per digit; among equals the
    shortest.

    Args:
        base: 2 to 2**62.
    """
    sizes = []
    for digits in range(1, WORD_BITS + 1):
        bits = max(8, (base**digits - 1).bit_length())
        if bits <= WORD_BITS:
            sizes.append((bits, digits))
    return min(sizes, key=lambda size: (size[0] / size[1], size[0]))


def code_bytes(count: int, base: int) -> int:
    """The number of bytes that ``encode`` makes of ``count`` digits."""
    if base == 1:
        return 0
    bits, digits = word_size(base)
    return -(-(-(-count // digits) * bits) // 8)


def positions_bytes(count: int, universe: int) -> int:
    """The number of bytes that ``encode_positions`` makes of ``count`` positions."""
    if count == 0:
        return 0
    low_bits = low_width(count, universe)
    return code_bytes(count, 2**low_bits) + bitmap_bytes(count, universe)


def delta_bytes(changed: int, groups: int, candidates: int) -> int:
    """The number of bytes that ``encode_delta`` makes."""
    return positions_bytes(changed, groups) + code_bytes(changed, candidates - 1)


def low_width(count: int, universe: int) -> int:
    """The number of low bits of a position that are stored as they are."""
    return (universe // count).bit_length() - 1


def bitmap_bytes(count: int, universe: int) -> int:
    """The number of bytes that the bitmap of the high bits takes."""
    return -(-(count + (universe >> low_width(count, universe)) + 1) // 8)
