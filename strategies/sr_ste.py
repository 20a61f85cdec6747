"""SR-STE: train all weights while a mask keeps the largest ones (Zhou et al., ICLR 2021,
"Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch", arXiv 2102.04010).
Settings also give plain STE, and ASP (Mishra et al., 2021, arXiv 2104.08378).

Let ``m(W)`` be the mask of the N largest magnitudes of each group. The forward pass uses
``m(W) o W``. The gradient goes to W as if there were no mask, so that dropped weights learn and can
come back. The paper adds ``lambda (1 - m) o W`` to the gradient. Here the optimizer steps first,
then ``W -= lr lambda (1 - m(W)) o W``. Under SGD this is the paper's rule to first order. Adam
divides gradients by their size, so that a term in the gradient would cause no decay there.

Shapes: O out, I in.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from sparsify.calibration.prior import StartsFromPrior, favour
from sparsify.common.errors import SparsifyError
from sparsify.masking.effect import Effect
from sparsify.masking.layer import local_rows
from sparsify.masking.masker import Draw, FixedMasker, Masker
from sparsify.masking.pattern import NMPattern
from sparsify.masking.strategy import SparsityStrategy


class MagnitudeMasker(Masker):
    """Keeps the weights that are largest now; dropped ones get gradients too (straight-through)."""

    def sample(self, weight_OI: Tensor, draw: Draw, row0: int = 0) -> tuple[Tensor, Tensor]:
        masked_OI = self.harden(weight_OI, row0)
        # w + (0 - w) is +0.0 and w + (w - w) is w, to the last bit.
        return weight_OI + (masked_OI - weight_OI).detach(), self.penalty(masked_OI)

    def hard_mask(self, weight_OI: Tensor, row0: int = 0) -> Tensor:
        return self.pattern.top(weight_OI.abs())


class SRSTE(StartsFromPrior[Masker]):
    """Trains all weights of the model; the masks always keep the weights that are largest now.

    Args:
        prior: gives the first masks: a strategy by name or as an object, a mask file or an exported
            folder; None starts from magnitude's. With ``refresh`` ``every_step``, weights that the
            prior drops are first made smaller than those that it keeps.
        decay: lambda, of dropped weights, which keeps masks from flipping back and forth; 0 is
            plain STE. What counts is lambda times the sum of the learning rate over the run.
            This is 2 to 6 in the paper (2e-4, SGD with a rate falling from 0.1, 1e5 to 6e5 steps),
            and 5.5 with this default over 2,000 steps at a rate that falls from 5e-4 to a tenth.
        refresh: ``every_step`` lets the mask follow the weights; ``never`` keeps the first mask,
            which is ASP: dropped weights get neither a gradient nor this decay.
    """

    effect = Effect(weights="trained")

    def __init__(
        self,
        prior: SparsityStrategy | str | None = None,
        decay: float = 10.0,
        refresh: Literal["every_step", "never"] = "every_step",
    ) -> None:
        super().__init__(prior)
        if decay < 0 or refresh not in ("every_step", "never"):
            raise SparsifyError(
                f"decay={decay}, refresh={refresh!r}; the decay must not be negative (0 is none), "
                "and masks are refreshed 'every_step' or 'never'"
            )
        self.decay = decay
        self.refresh = refresh

    def make_masker(self, name: str, shape: tuple[int, int], pattern: NMPattern) -> Masker:
        kind = FixedMasker if self.refresh == "never" else MagnitudeMasker
        return kind(name, shape, pattern)

    def start(self, masker: Masker, weight_OI: Tensor, prior_OI: Tensor, row0: int = 0) -> None:
        if self.refresh == "never":
            masker.set_mask(prior_OI)
        elif self.prior is not None:
            weight_OI.data.copy_(favour(weight_OI, prior_OI, masker.pattern))

    @torch.no_grad()
    def after_step(self, maskers: Mapping[Masker, Tensor], lr: float) -> None:
        """Shrink the dropped weights by ``lr * decay``.

        Raises:
            SparsifyError: that share is more than the whole weight.
        """
        if self.refresh == "never":
            return
        share = lr * self.decay
        if share > 1:
            raise SparsifyError(
                f"decay={self.decay:g} at a learning rate of {lr:g} takes {share:g} times a "
                f"dropped weight in one step; give --model.strategy.decay {1 / lr:g} or less"
            )
        for masker, weight_OI in maskers.items():
            rows_OI = local_rows(weight_OI.data)
            rows_OI.sub_(rows_OI.masked_fill(masker.hard_mask(rows_OI), 0), alpha=share)
