"""N:M patterns: at most N nonzero weights in every group of M consecutive inputs of a row.

Functions that make tensors import PyTorch themselves: reading a pattern need not wait for it.
"""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from sparsify.common.errors import SparsifyError
from sparsify.masking.by_shape import by_shape

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

MAX_M = 16


@dataclass(frozen=True)
class NMPattern:
    """Keep ``n`` of every ``m`` consecutive weights along the input dimension.

    A *candidate* is a set of ``n`` kept positions in a group. Candidates are numbered in the order
    of ``itertools.combinations`` (for 2:4: 1100, 1010, 1001, 0110, 0101, 0011, position 0 on the
    left). A candidate's number is called its rank.

    Shapes: O out, I in, G groups = I / m, M group size, K candidates.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 1 <= self.n < self.m <= MAX_M:
            raise SparsifyError(
                f"pattern '{self.n}:{self.m}': N:M keeps N of every M weights and needs "
                f"1 <= N < M <= {MAX_M}; write for instance '2:4'"
            )

    @classmethod
    def parse(cls, text: str | NMPattern) -> NMPattern:
        """Read ``'N:M'``.

        Raises:
            SparsifyError: the text is not two integers around one colon, or they are out of range.
        """
        if isinstance(text, NMPattern):
            return text
        match = re.fullmatch(r"\s*(\d{1,9})\s*:\s*(\d{1,9})\s*", str(text))
        if match is None:
            raise SparsifyError(
                f"pattern {text!r}: expected two integers as 'N:M' "
                "(N weights kept of every M), for instance '2:4'"
            )
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def candidates(self) -> int:
        """The number of candidates, ``C(m, n)``."""
        return math.comb(self.m, self.n)

    @property
    def density(self) -> float:
        """The share of weights that are kept."""
        return self.n / self.m

    @property
    def within_two_four(self) -> bool:
        """Whether at most 2 of every aligned 4 are kept, which is all that GPUs multiply sparse."""
        # Four aligned weights lie in one group of 4, 8 and so on, or in at most two other groups.
        return self.n == 1 or (self.n == 2 and self.m % 4 == 0)

    def table(self, device: torch.device | str = "cpu") -> Tensor:
        """All candidates in order: bool ``[K, M]``, True = kept."""
        import torch

        return torch.from_numpy(_table(self.n, self.m)).to(device)

    def groups(self, values_OI: Tensor) -> Tensor:
        """View ``[O, I]`` as ``[O, G, M]``."""
        return values_OI.unflatten(-1, (-1, self.m))

    @by_shape
    def top(self, scores_OI: Tensor) -> Tensor:
        """Keep the ``n`` largest scores of every group. Of equal scores the lower index is kept;
        NaN counts as the largest.

        Args:
            scores_OI: any real dtype, ``[O, I]``.

        Returns:
            bool ``[O, I]`` with exactly ``n`` True in every group.
        """
        import torch

        # Compare every pair of positions once, and keep a position if fewer than n beat it. For
        # groups of at most 16 this is several times faster than sorting.
        scores_OI = scores_OI.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
        columns = [column.contiguous() for column in self.groups(scores_OI).unbind(-1)]
        beaten_by = [torch.zeros_like(column, dtype=torch.int8) for column in columns]
        for i, j in itertools.combinations(range(self.m), 2):
            later_wins = columns[j] > columns[i]
            beaten_by[i] += later_wins
            beaten_by[j] += ~later_wins
        return torch.stack([count < self.n for count in beaten_by], -1).flatten(-2)

    def rank(self, mask_OI: Tensor, trusted: bool = False) -> Tensor:
        """Find the rank of every group's candidate.

        Args:
            mask_OI: bool ``[O, I]``.
            trusted: skip the check, which would wait for the device.

        Returns:
            ``[O, G]``; uint8 if all ranks fit, otherwise int16.

        Raises:
            SparsifyError: a group does not hold exactly ``n`` kept weights.
        """
        import torch

        groups = self.groups(mask_OI.to(torch.bool)).view(torch.uint8)
        dtype = torch.uint8 if self.m <= 8 else torch.int32
        bits = torch.zeros(groups.shape[:-1], dtype=dtype, device=groups.device)
        for position, kept in enumerate(groups.unbind(-1)):
            bits.add_(kept, alpha=1 << position)
        table = torch.from_numpy(_rank_of_bits(self.n, self.m)).to(groups.device)
        ranks = table.index_select(0, bits.flatten().int()).view(bits.shape)
        if not trusted and ranks.numel() and ranks.min() < 0:
            row, group = (ranks < 0).nonzero()[0].tolist()
            raise SparsifyError(
                f"row {row}, group {group} keeps {int(groups[row, group].sum())} weights; "
                f"a {self} mask keeps exactly {self.n} of {self.m}"
            )
        return ranks.to(self.rank_dtype)

    def unrank(self, rank_OG: Tensor) -> Tensor:
        """The mask of candidates given by rank: bool ``[O, I]`` from integers ``[O, G]``."""
        kept = self.table(rank_OG.device).index_select(0, rank_OG.flatten().int())
        return kept.view(*rank_OG.shape[:-1], -1)

    @property
    def rank_dtype(self) -> torch.dtype:
        """The smallest integer type that holds every rank."""
        import torch

        return torch.uint8 if self.candidates <= 256 else torch.int16

    def holds(self, weight_OI: Tensor) -> bool:
        """Whether at most ``n`` values of every group are nonzero."""
        return bool((self.groups(weight_OI != 0).sum(-1) <= self.n).all())


# Arrays are kept, not tensors, which would stay those of the mode in which they are first asked
# for, such as a plan's without values.
@cache
def _table(n: int, m: int) -> np.ndarray:
    import numpy as np

    kept = np.array(list(itertools.combinations(range(m), n)))
    table = np.zeros((len(kept), m), dtype=bool)
    np.put_along_axis(table, kept, True, axis=1)
    return table


@cache
def _rank_of_bits(n: int, m: int) -> np.ndarray:
    """The rank for each set of kept positions (bit i = position i); -1 if it is not N of them."""
    import numpy as np

    ranks = np.full(2**m, -1, dtype=np.int16)
    ranks[_table(n, m) @ (1 << np.arange(m))] = np.arange(math.comb(m, n))
    return ranks


TWO_FOUR = NMPattern(2, 4)
