"""One logit a weight: masks drawn from them, their mean, and their scores.

Each group's mask is drawn by N draws without replacement from the softmax of its logits
(``sparsify.masking.plackett_luce``).

Shapes: O out, I in, G groups, M group size; where the layer is sharded, O are the rows of this
process.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from sparsify.masking import noise
from sparsify.masking.certainty import describe_distribution
from sparsify.masking.layer import local_rows
from sparsify.masking.masker import Draw, Masker
from sparsify.masking.pattern import NMPattern
from sparsify.masking.plackett_luce import MAX_SETS, mask_probabilities, mean_mask, score, sets_of

# Weights whose masks and scores are made at once: some 40 MB of temporaries.
AT_ONCE = 1 << 20


@dataclass(frozen=True)
class InitialMask(Draw):
    """No sample, but the mask that learning started from."""


@dataclass(frozen=True)
class MeanMask(Draw):
    """No sample, but the mean of all, where the loss has a gradient with respect to the mask.

    Attributes:
        slopes: takes from backward, for each layer, the loss's slope at the mean mask in the
            direction of the sample of this draw; their sum is a control variate of its loss. None
            where nobody asks for it.
    """

    slopes: list[Tensor] | None = field(default=None, compare=False)


class _Slope(torch.autograd.Function):
    """The identity on the mean mask; notes the gradient's product with (sample - mean)."""

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
    """One logit for each weight, and the initial mask as a rank a group."""

    logits_OI: Tensor
    initial_OG: Tensor

    def __init__(self, name: str, shape: tuple[int, int], pattern: NMPattern) -> None:
        super().__init__(name, shape, pattern)
        self.logits_OI = nn.Parameter(torch.zeros(shape, dtype=self.learned_dtype))
        ranks = torch.zeros(shape[0], shape[1] // pattern.m, dtype=pattern.rank_dtype)
        self.initial_OG = nn.Parameter(ranks, requires_grad=False)

    def keys(self, draw: Draw, rows: slice, row0: int = 0) -> Tensor:
        """The logits of some rows plus the draw's Gumbel noise; the N largest of a group are kept
        (Gumbel-top-k: Kool et al., 2019).
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
        # Rounded before the product, which then takes no room in fp32.
        masked_OI = weight_OI * self.mask(draw, row0).to(weight_OI.dtype)
        return masked_OI, self.penalty(masked_OI)

    @torch.no_grad()
    def scores(
        self, terms: list[tuple[Draw, Tensor]], row0: int = 0
    ) -> Iterator[tuple[slice, Tensor]]:
        """Yield the sum of coefficient times score, some rows at a time: (rows, ``[rows, I]``)."""
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
            alpha: of the sum.
        """
        for rows, total in self.scores(terms, first_row(to_OI)):
            local_rows(to_OI)[rows].add_(total, alpha=alpha)

    def hard_mask(self, weight_OI: Tensor, row0: int = 0) -> Tensor:
        return self.pattern.top(self.logits_OI)

    def metrics(self) -> dict[str, Tensor]:
        """How far the logits of kept weights lie above those of dropped ones, on average; and where
        the candidates are not too many, how sure the distribution is.
        """
        logits_OI, n = local_rows(self.logits_OI.detach()), self.pattern.n
        few, table_KM = sets_of(self.pattern) <= MAX_SETS, self.pattern.table(logits_OI.device)
        found: dict[str, Tensor] = {}
        # A process may hold no row; what it tells then does not count, but its names do.
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


def first_row(values_OI: Tensor) -> int:
    """The number in the whole tensor of the first row that this process holds."""
    if not isinstance(values_OI, DTensor):
        return 0
    mesh, placements = values_OI.device_mesh, values_OI.placements
    return int(compute_local_shape_and_global_offset(values_OI.shape, mesh, placements)[1][0])


def _chunks(tensor_OI: Tensor) -> Iterator[slice]:
    """Rows of some ``AT_ONCE`` elements."""
    rows, columns = tensor_OI.shape
    at_once = max(1, AT_ONCE // columns)
    for start in range(0, rows, at_once):
        yield slice(start, min(start + at_once, rows))
