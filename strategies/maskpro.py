"""MaskPro: learn which weights to keep by policy gradients (Sun et al., ICLR 2026,
arXiv 2506.12876).

Every weight has one logit. A group's mask is sampled from the softmax of its logits: N draws,
without replacement. The logits then move along the scores of the sampled masks, each times how much
better than expected its mask did. Data flow of a step: the strategy runs the model under draws,
without a graph, and keeps only numbers: (draw, advantage). The optimizer makes the masks again from
the draws, layer by layer and some rows at a time, and moves the logits in place. The only stored
tensors of the model's size are the weights, the logits, and the ranks of the initial mask.

Shapes: O out, I in, G groups, M group size.
"""

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparsify.calibration.prior import StartsFromPrior, favour
from sparsify.common.errors import SparsifyError
from sparsify.masking.effect import Effect
from sparsify.masking.masker import Draw
from sparsify.masking.pattern import NMPattern
from sparsify.masking.plackett_luce import mean_mask
from sparsify.masking.run import Run
from sparsify.masking.strategy import SparsityStrategy
from sparsify.strategies.logit_masker import InitialMask, LogitMasker, MeanMask
from sparsify.strategies.policy_gradient import MovingAverage, PolicyGradient, Term, coefficients

# A weight below this share of its group's largest counts as this share, since log(0) is infinite.
LEAST_SHARE = 1e-3
WITH_GRADIENTS = ("control_variate", "mean_gradient")


class MaskPro(StartsFromPrior[LogitMasker]):
    """Learns masks over frozen weights from losses alone, or with one gradient at the mean mask.

    An estimator estimates the gradient of the expected loss. Below, f is the loss under a draw m, s
    is the score of m, and d is the moving average, over past steps, of the terms before it in the
    brackets. The first three are unbiased:

    - ``residual`` (the paper's): (f - f0 - d) s, where f0 is the loss under the initial mask on the
      same batch. Two forward passes; the authors' code never changes its batches, and saves one.
    - ``leave_one_out``: K draws on one batch; each loss is compared with the mean of the others.
      K forward passes, and no baseline that goes stale as the masks leave the initial one.
    - ``control_variate``: (f - f(mean) - g (m - mean) - d) s + g d mean / d logits, where g is the
      gradient with respect to the mask at the mean mask (MuProp: Gu et al., ICLR 2016); two forward
      passes, one backward, and a gradient buffer of the logits' size.
    - ``mean_gradient``: g d mean / d logits alone: one forward pass and one backward. It has no
      sampling noise, but assumes that the loss is linear between the mean and the samples.

    The first two move the logits in place by plain gradient descent at the rate ``lr``; the run's
    learning-rate schedule applies, its ``optimizer`` is not used. The other two compute gradients,
    which that optimizer then uses.

    The defaults are the paper's, for 10,000 steps of 32 x 128 tokens on seven billion weights.
    ``docs/maskpro.md`` tells how to choose ``strength`` and ``lr`` for other runs.

    Args:
        prior: the initial mask: a one-shot strategy by name or as an object, a mask file or an
            exported folder.
        strength: the logit at which kept weights start (the paper's C); dropped ones start at 0.
        grading: adds ``grading * log(|weight| / largest of its group)`` to the first logits, so
            that draws first try the changes that matter least to the layer's output; the paper has
            0. A weight that the prior drops in favour of a smaller one counts as just smaller than
            that one: only ``strength`` then favours the prior's choice.
        lr: the rate of the plain gradient descent, logits per nat.
        estimator: how the gradient is estimated.
        draws: K, for ``leave_one_out``.
        memory: the share of the moving average that is left after each micro-batch.
    """

    def __init__(
        self,
        prior: SparsityStrategy | str = "sparsegpt",
        strength: float = 10.0,
        grading: float = 0.0,
        lr: float = 50.0,
        estimator: Literal[
            "residual", "leave_one_out", "control_variate", "mean_gradient"
        ] = "residual",
        draws: int = 2,
        memory: float = 0.99,
    ) -> None:
        super().__init__(prior)
        if strength <= 0 or grading < 0:
            raise SparsifyError(
                f"strength={strength}, grading={grading}; the strength must be positive, and the "
                "grading not negative, for learning to start from the prior's mask"
            )
        if draws < 2 or not 0 <= memory < 1:
            raise SparsifyError(
                f"draws={draws}, memory={memory}; leaving one out takes at least 2 draws, and the "
                "memory of the average lies in [0, 1)"
            )
        self.strength, self.grading, self.lr, self.estimator = strength, grading, lr, estimator
        self.draws, self.memory = draws, memory
        self.effect = Effect(
            without_gradients=estimator not in WITH_GRADIENTS,
            exchanges_draws=estimator != "mean_gradient",
        )
        averages = estimator in ("residual", "control_variate")
        self.average = MovingAverage(memory) if averages else None
        self._terms: list[list[Term]] = []

    def make_masker(self, name: str, shape: tuple[int, int], pattern: NMPattern) -> LogitMasker:
        if self.estimator in WITH_GRADIENTS:
            mean_mask(torch.zeros(1, pattern.m), pattern)  # refuses patterns with too many sets
        return LogitMasker(name, shape, pattern)

    def start(
        self, masker: LogitMasker, weight_OI: Tensor, prior_OI: Tensor, row0: int = 0
    ) -> None:
        logits_OI = masker.logits_OI.data.copy_(prior_OI).mul_(self.strength)
        if self.grading:
            size_OI = favour(weight_OI.detach().float(), prior_OI, masker.pattern).abs()
            size_OGM = masker.pattern.groups(size_OI)
            largest_OG = size_OGM.amax(-1, keepdim=True)
            share_OGM = size_OGM / largest_OG.clamp(min=torch.finfo(torch.float32).tiny)
            logits_OI += self.grading * share_OGM.clamp(min=LEAST_SHARE).log().flatten(-2)
        masker.initial_OG.data.copy_(masker.pattern.rank(prior_OI))

    def loss(self, run: Run) -> Tensor:
        return getattr(self, f"_{self.estimator}")(run)

    def _residual(self, run: Run) -> Tensor:
        draw = run.draw()
        at_start = run(InitialMask(draw.seed, draw.step, draw.index), grad=False).loss
        loss = run(draw, grad=False).loss
        self._terms.append([Term(draw, loss - at_start)])
        return loss

    def _leave_one_out(self, run: Run) -> Tensor:
        draws = [run.draw(k, self.draws) for k in range(self.draws)]
        losses = torch.stack([run(draw, grad=False).loss for draw in draws])
        advantages = (losses - losses.mean()) / (self.draws - 1)
        self._terms.append([Term(*pair) for pair in zip(draws, advantages, strict=True)])
        return losses.mean()

    def _control_variate(self, run: Run) -> Tensor:
        draw = run.draw()
        slopes: list[Tensor] = []
        at_mean = run(MeanMask(draw.seed, draw.step, draw.index, slopes)).loss
        loss = run(draw, grad=False).loss
        term = Term(draw, loss - at_mean.detach(), slopes)
        if at_mean.requires_grad:
            at_mean.register_hook(term.scale.append)
        self._terms.append([term])
        return at_mean

    def _mean_gradient(self, run: Run) -> Tensor:
        draw = run.draw()
        return run(MeanMask(draw.seed, draw.step, draw.index)).loss

    def optimizer(
        self,
        params: list[nn.Parameter],
        maskers: Mapping[LogitMasker, Tensor],
        default: Callable[[list[nn.Parameter]], Optimizer],
    ) -> Optimizer:
        if self.estimator in WITH_GRADIENTS:
            return default(params)
        return PolicyGradient(list(maskers), self._take, self.lr)

    def before_step(self, maskers: Mapping[LogitMasker, Tensor]) -> None:
        """Add the draws' scores to the gradients that backward found at the mean mask."""
        if self.estimator == "control_variate":
            terms = self._take()
            for masker in maskers:
                if masker.logits_OI.grad is not None:
                    masker.add_scores(masker.logits_OI.grad, terms)

    def _take(self) -> list[tuple[Draw, Tensor]]:
        """The draws of the step that is ending, each with its score's 0-d factor; forgets them."""
        taken = coefficients(self._terms, self.average)
        self._terms.clear()
        return taken

    def metrics(self) -> dict[str, Tensor]:
        """Mean and standard deviation of past advantages; a good ``lr`` depends on their scale."""
        if self.average is None:
            return {}
        return dict(zip(("advantage", "advantage_std"), self.average.moments(), strict=True))
