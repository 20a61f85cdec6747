"""Policy gradients: each draw's advantage times its mask's score.

Each process of a run makes draws of its own and sends their values to the others. From the numbers
that name a draw, every process makes the masks of all draws again, and adds up all their scores.
All processes add them in the order of the draws' indices. A single process would go through the
micro-batches in the same order, so what is learned is the same to the last bit.

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
        draw: the draw.
        advantage: its loss minus the loss it is compared with, nats, 0-d.
        slopes: what a control variate subtracts from the advantage, one per layer; backward adds
            them.
        scale: by what backward's gradients were scaled, such as 1 / micro-batches of a step, 0-d;
            backward adds it.
    """

    draw: Draw
    advantage: Tensor
    slopes: list[Tensor] = field(default_factory=list)
    scale: list[Tensor] = field(default_factory=list)

    def value(self) -> Tensor:
        """The advantage minus the slopes, 0-d."""
        if not self.slopes:
            return self.advantage
        return self.advantage - torch.stack(self.slopes).sum() / self.scale[0]


class MovingAverage(nn.Module):
    """Subtracts the mean of past values from each new value.

    Args:
        memory: the share of the average that is left when a new value enters it.
    """

    sums: Tensor

    def __init__(self, memory: float) -> None:
        super().__init__()
        self.memory = memory
        # Sums of weights, values and squares. Values divided by weights give the right mean from
        # the first step on. The paper's starts at zero, which no longer matters after 10,000 steps.
        self.register_buffer("sums", torch.zeros(3, dtype=torch.float32))

    def remove(self, value: Tensor) -> Tensor:
        """Subtract the mean of earlier values, then add this value to them; returns 0-d."""
        mean, _ = self.moments()
        now = torch.stack([torch.ones_like(value), value, value.square()]).to(self.sums)
        self.sums.mul_(self.memory).add_(now, alpha=1 - self.memory)
        return value - mean

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of past values, 0-d; zero before the first value."""
        weight, total, squares = self.sums.unbind()
        mean, square = total / weight.clamp(min=1e-30), squares / weight.clamp(min=1e-30)
        return mean, (square - mean.square()).clamp(min=0).sqrt()


@torch.no_grad()
def coefficients(
    micro_batches: list[list[Term]], average: MovingAverage | None = None
) -> list[tuple[Draw, Tensor]]:
    """Collect all ranks' draws of one step, in the order of their indices.

    Args:
        micro_batches: this rank's terms; every other rank has as many.
        average: the average of past values; the values of all ranks enter it.

    Returns:
        Each draw and the factor of its score, 0-d; the same on every rank.
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
                # Divide by ranks, since backward's gradients are averaged over the ranks too.
                factor = term.scale[0] / ranks if term.scale else 1 / (len(micro_batches) * ranks)
                index = term.draw.index + (peer - rank) * len(terms)
                found.append((replace(term.draw, index=index), value * factor))
    return found


class PolicyGradient(Optimizer):
    """Plain gradient descent on logits along the scores of the draws of a step.

    Args:
        maskers: the maskers whose logits are learned.
        take: gives the draws of the step and their coefficients.
        lr: the learning rate, logits per nat.
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
        """Take one step; the closure runs the micro-batches."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        terms = self.take()
        for masker in self.maskers:
            masker.add_scores(masker.logits_OI, terms, alpha=-self.param_groups[0]["lr"])
        return loss
