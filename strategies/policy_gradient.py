"""Learning from the values of draws: what came of each, against what was expected, times its score.

The processes of a run form a population: each makes draws of its own, tells the others their
values, and follows the scores of all draws of all processes, whose masks it makes again from their
numbers. All add up in one order, that of the draws' indices, which is also the order in which a
single process would have gone through all micro-batches: what is learned is the same to the last
bit.

Shapes: O out, I in; R ranks, A micro-batches of a step and rank, K draws of a micro-batch.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparsify.common.ranks import gather, rank_and_size
from sparsify.masking.masker import Draw
from sparsify.strategies.logit_masker import LogitMasker


@dataclass(frozen=True)
class Term:
    """One draw's part in a step.

    Attributes:
        draw: whose score.
        advantage: of its loss over another one, nats, 0-d.
        slopes: what a control variate takes off the advantage, by layer, from backward.
        scale: what backward's gradients were scaled by, such as one over the micro-batches of a
            step, 0-d; also from backward.
    """

    draw: Draw
    advantage: Tensor
    slopes: list[Tensor] = field(default_factory=list)
    scale: list[Tensor] = field(default_factory=list)

    def value(self) -> Tensor:
        """The advantage less the slopes, 0-d."""
        if not self.slopes:
            return self.advantage
        return self.advantage - torch.stack(self.slopes).sum() / self.scale[0]


class MovingAverage(nn.Module):
    """Takes the mean of past values off each value.

    Args:
        memory: share of the past that a new value leaves.
    """

    sums: Tensor

    def __init__(self, memory: float) -> None:
        super().__init__()
        self.memory = memory
        # Of weights, values and squares: divided by that of the weights, the mean is right from the
        # first step on. In the paper it starts at zero, which 10,000 steps forget.
        self.register_buffer("sums", torch.zeros(3))

    def remove(self, value: Tensor) -> Tensor:
        """The value less the mean of those before it, 0-d; then it is one of them."""
        mean, _ = self.moments()
        now = torch.stack([torch.ones_like(value), value, value.square()]).to(self.sums)
        self.sums.mul_(self.memory).add_(now, alpha=1 - self.memory)
        return value - mean

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the past, 0-d; zero before the first value."""
        weight, total, squares = self.sums.unbind()
        mean, square = total / weight.clamp(min=1e-30), squares / weight.clamp(min=1e-30)
        return mean, (square - mean.square()).clamp(min=0).sqrt()


@torch.no_grad()
def coefficients(
    micro_batches: list[list[Term]], average: MovingAverage | None = None
) -> list[tuple[Draw, Tensor]]:
    """The draws of a step of all ranks, in the order of their indices.

    Args:
        micro_batches: this rank's terms; there are as many on every other rank.
        average: of the values of the past, which takes in those of all ranks.

    Returns:
        Each draw and the factor of its score, 0-d, on every rank the same.
    """
    if not micro_batches:
        return []
    rank, ranks = rank_and_size()
    values = [torch.stack([term.value() for term in terms]) for terms in micro_batches]
    values_RAK = gather(torch.stack(values))
    found = []
    for terms, values_RK in zip(micro_batches, values_RAK.unbind(1), strict=True):
        for peer, values_K in enumerate(values_RK):
            for term, value in zip(terms, values_K, strict=True):
                if average is not None:
                    value = average.remove(value)
                # Backward's gradients, too, are averaged over the ranks.
                factor = term.scale[0] / ranks if term.scale else 1 / (len(micro_batches) * ranks)
                index = term.draw.index + (peer - rank) * len(terms)
                found.append((replace(term.draw, index=index), value * factor))
    return found


class PolicyGradient(Optimizer):
    """Plain gradient descent on logits along the scores of the draws of a step.

    Args:
        maskers: whose logits.
        take: gives the draws of the step and their coefficients.
        lr: logits a nat.
    """

    def __init__(
        self,
        maskers: list[LogitMasker],
        take: Callable[[], list[tuple[Draw, Tensor]]],
        lr: float,
    ) -> None:
        super().__init__([masker.logits_OI for masker in maskers], {"lr": lr})
        self.maskers, self.take = maskers, take

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One step; the closure goes through the micro-batches."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        terms = self.take()
        for masker in self.maskers:
            masker.add_scores(masker.logits_OI, terms, alpha=-self.param_groups[0]["lr"])
        return loss
