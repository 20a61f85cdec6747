"""Holds one logit per weight; gives masks sampled from the logits, the mean mask, and scores.

A group's mask is sampled from the softmax of its logits, N times without replacement
(``sparsify.masking.plackett_luce``).

Shapes: O out, I in, G groups, M group size; if the layer is sharded, O counts the rows of this
process.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from sparsify.masking import noise
from sparsify.masking.certainty import describe_distribution
from sparsify.masking.layer import local_rows
from sparsify.masking.masker import Draw, Masker
from sparsify.masking.pattern import NMPattern
from sparsify.masking.plackett_luce import MAX_SETS, mask_probabilities, mean_mask, score, sets_of
from sparsify.masking.sharded_rows import first_row

# Make masks and scores for this many weights at once: some 40 MB of temporary tensors.
AT_ONCE = 1 << 20


@dataclass(frozen=True)
class InitialMask(Draw):
    """Stands for the mask that learning started from; nothing is sampled."""


@dataclass(frozen=True)
class MeanMask(Draw):
    """Stands for the mean of all masks; the loss then has a gradient with respect to the mask.

    Attributes:
        slopes: backward appends one number per layer: the slope of the loss at the mean mask, in
            the direction of this draw's sample. Their sum is a control variate of the draw's loss.
            None if they are not needed.
    """

    slopes: list[Tensor] | None = field(default=None, compare=False)


class _Slope(torch.autograd.Function):
    """The identity on the mean mask; backward stores the gradient times (sample - mean)."""

    @staticmethod
    def forward(ctx: Any, mean_OI: Tensor, sample_OI: Tensor, slopes: list[Tensor]) -> Tensor:
        ctx.save_for_backward(mean_OI, sample_OI)
        ctx.slopes = slopes
        return mean_OI.view_as(mean_OI)

    @staticmethod
    def backward(ctx: Any, grad_OI: Tensor) -> tuple[Any, ...]:
        mean_OI, sample_OI = ctx.saved_tensors
        ctx.slopes.append((grad_OI * (sample_OI.to(grad_OI.dtype) - mean_OI)).sum())
        return grad_OI, None, None


class LogitMasker(Masker):
    """Holds one logit for each weight, and the initial mask as one rank per group."""

    logits_OI: Tensor
    initial_OG: Tensor

    def __init__(self, name: str, shape: tuple[int, int], pattern: NMPattern) -> None:
        super().__init__(name, shape, pattern)
        self.logits_OI = nn.Parameter(torch.zeros(shape, dtype=self.learned_dtype))
        ranks = torch.zeros(shape[0], shape[1] // pattern.m, dtype=pattern.rank_dtype)
        self.initial_OG = nn.Parameter(ranks, requires_grad=False)

    def keys(self, draw: Draw, rows: slice, row0: int = 0) -> Tensor:
        """The logits of some rows plus the draw's Gumbel noise. The draw's mask keeps the N largest
        of each group (Gumbel-top-k: Kool et al., 2019).
        """
        logits = local_rows(self.logits_OI.detach())[rows]
        start = row0 + rows.start
        count, columns = logits.shape
        gumbel = noise.gumbel(draw.key(self.name), count, columns, start, logits.device)
        return gumbel.add_(logits)

    def sampled_mask(self, draw: Draw, row0: int = 0) -> Tensor:
        """The mask of a draw, bool ``[O, I]``."""
        mask = torch.empty_like(self.logits_OI, dtype=torch.bool)
        for rows in _chunks(mask):
            mask[rows] = self.pattern.top(self.keys(draw, rows, row0))
        return mask

    def mask(self, draw: Draw, row0: int = 0) -> Tensor:
        if isinstance(draw, InitialMask):
            return self.pattern.unrank(self.initial_OG)
        if not isinstance(draw, MeanMask):
            return self.sampled_mask(draw, row0)
        mean_OI = mean_mask(self.logits_OI, self.pattern)
        if torch.is_grad_enabled() and draw.slopes is not None:
            sampled = self.sampled_mask(draw, row0)
            mean_OI = cast(Any, _Slope).apply(mean_OI, sampled, draw.slopes)
        return mean_OI

    def sample(self, weight_OI: Tensor, draw: Draw, row0: int = 0) -> tuple[Tensor, Tensor]:
        if not isinstance(draw, MeanMask):
            return super().sample(weight_OI, draw, row0)
        # Round the mask before the product, so that no fp32 product takes memory.
        masked_OI = weight_OI * self.mask(draw, row0).to(weight_OI.dtype)
        return masked_OI, self.penalty(masked_OI)

    @torch.no_grad()
    def scores(
        self, terms: list[tuple[Draw, Tensor]], row0: int = 0
    ) -> Iterator[tuple[slice, Tensor]]:
        """Yield (rows, sum of coefficient times score, ``[rows, I]``), some rows at a time."""
        logits_OI = local_rows(self.logits_OI.detach())
        for rows in _chunks(logits_OI):
            logits = logits_OI[rows]
            total = torch.zeros_like(logits)
            for draw, coefficient in terms:
                total += coefficient * score(logits, self.keys(draw, rows, row0), self.pattern)
            yield rows, total

    @torch.no_grad()
    def add_scores(
        self, to_OI: Tensor, terms: list[tuple[Draw, Tensor]], alpha: float = 1.0
    ) -> None:
        """Add alpha times the sum of coefficient times score, in place.

        Args:
            to_OI: the logits or their gradient, sharded or not.
            terms: draws and their coefficients, 0-d.
            alpha: the factor of the sum.
        """
        for rows, total in self.scores(terms, first_row(to_OI)):
            local_rows(to_OI)[rows].add_(total, alpha=alpha)

    def hard_mask(self, weight_OI: Tensor, row0: int = 0) -> Tensor:
        return self.pattern.top(self.logits_OI)

    def metrics(self) -> dict[str, Tensor]:
        """``margin``: by how much a group's smallest kept logit exceeds its largest dropped one, on
        average. Also how sure the distribution is, if there are not too many candidates.
        """
        logits_OI, n = local_rows(self.logits_OI.detach()), self.pattern.n
        few, table_KM = sets_of(self.pattern) <= MAX_SETS, self.pattern.table(logits_OI.device)
        found: dict[str, Tensor] = {}
        # A process that holds no row must return the same names; its values then do not count.
        for rows in list(_chunks(logits_OI)) or [slice(0, 0)]:
            share = (rows.stop - rows.start) / max(1, len(logits_OI))
            groups = self.pattern.groups(logits_OI[rows]).sort(-1, descending=True).values
            part = {"margin": (groups[..., n - 1] - groups[..., n]).mean()}
            if few:
                part |= describe_distribution(
                    mask_probabilities(logits_OI[rows], self.pattern), table_KM
                )
            found = {name: found.get(name, 0) + share * value for name, value in part.items()}
        return found


def _chunks(tensor_OI: Tensor) -> Iterator[slice]:
    """Slices of rows with about ``AT_ONCE`` elements each."""
    rows, columns = tensor_OI.shape
    at_once = max(1, AT_ONCE // columns)
    for start in range(0, rows, at_once):
        yield slice(start, min(start + at_once, rows))
