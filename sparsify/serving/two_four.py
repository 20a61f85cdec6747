"""2:4, the one pattern that GPUs multiply, and which others fit within it."""

from sparsify.masking.pattern import NMPattern

TWO_FOUR = NMPattern(2, 4)


def is_two_four(pattern: NMPattern) -> bool:
    """Whether at most 2 of every aligned 4 are kept, as 1:4 and 2:8 do too."""
    # Four aligned weights lie in one group of 4, 8 and so on, or in at most two other groups.
    return pattern.n == 1 or (pattern.n == 2 and pattern.m % 4 == 0)
