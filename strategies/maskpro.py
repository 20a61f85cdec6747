"""MaskPro: learn which weights to keep by policy gradients (Sun et al., ICLR 2026,
arXiv 2506.12876).

Each group's mask is drawn by N draws without replacement from the softmax of one logit a weight.
The logits follow the score of the masks that were drawn, times how much better they did than
expected. Data flow of a step: the strategy runs the model under draws, without a graph, and notes
(draw, advantage), which are numbers; the optimizer makes the masks again from the draws, layer by
layer and some rows at a time, and moves the logits in place. Nothing of the model's size is kept
but the weights, the logits, and the ranks of the initial mask.

Shapes: O out, I in, G groups, M group size.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from sparsify import noise
from sparsify.errors import SparsifyError
from sparsify.masked_linear import MaskedLinear
from sparsify.masker import Draw, Masker
from sparsify.pattern import NMPattern
from sparsify.plackett_luce import mean_mask, score
from sparsify.prior import StartsFromPrior, favour
from sparsify.strategy import Run, SparsityStrategy

# Weights whose masks and scores are made at once: some 40 MB of temporaries.
AT_ONCE = 1 << 20
# Of its group's largest weight: what is smaller counts as this, so that zeros have a logarithm.
LEAST_SHARE = 1e-3
WITH_GRADIENTS = ("control_variate", "mean_gradient")


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
        self.logits_OI = nn.Parameter(torch.zeros(shape))
        ranks = torch.zeros(shape[0], shape[1] // pattern.m, dtype=pattern.rank_dtype)
        self.initial_OG = nn.Parameter(ranks, requires_grad=False)

    def keys(self, draw: Draw, rows: slice, row0: int = 0) -> Tensor:
        """The logits of some rows plus the draw's Gumbel noise; the N largest of a group are kept
        (Gumbel-top-k: Kool et al., 2019).
        """
        logits = self.logits_OI.detach()[rows]
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

    def sample(self, weight_OI: Tensor, draw: Draw, row0: int = 0) -> tuple[Tensor, Tensor]:
        none = weight_OI.new_zeros((), dtype=torch.float32)
        if isinstance(draw, MeanMask):
            mean_OI = mean_mask(self.logits_OI, self.pattern)
            if torch.is_grad_enabled() and draw.slopes is not None:
                sampled = self.sampled_mask(draw, row0)
                mean_OI = cast(Any, _Slope).apply(mean_OI, sampled, draw.slopes)
            return weight_OI * mean_OI.to(weight_OI.dtype), none
        if isinstance(draw, InitialMask):
            mask = self.pattern.unrank(self.initial_OG)
        else:
            mask = self.sampled_mask(draw, row0)
        return torch.where(mask, weight_OI, weight_OI.new_zeros(())), none

    @torch.no_grad()
    def scores(
        self, terms: list[tuple[Draw, Tensor]], row0: int = 0
    ) -> Iterator[tuple[slice, Tensor]]:
        """Yield the sum of coefficient times score, some rows at a time: (rows, ``[rows, I]``)."""
        for rows in _chunks(self.logits_OI):
            logits = self.logits_OI.detach()[rows]
            total = torch.zeros_like(logits)
            for draw, coefficient in terms:
                total += coefficient * score(logits, self.keys(draw, rows, row0), self.pattern)
            yield rows, total

    def hard_mask(self, weight_OI: Tensor, row0: int = 0) -> Tensor:
        return self.pattern.top(self.logits_OI)

    def metrics(self) -> dict[str, Tensor]:
        """How far the logits of kept weights lie above those of dropped ones, on average."""
        groups = self.pattern.groups(self.logits_OI.detach()).sort(-1, descending=True).values
        n = self.pattern.n
        return {"margin": (groups[..., n - 1] - groups[..., n]).mean()}


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
            for rows, total in masker.scores(terms):
                masker.logits_OI[rows].sub_(total, alpha=self.param_groups[0]["lr"])
        return loss


class MaskPro(StartsFromPrior):
    """Learns masks over frozen weights from losses alone, or with one gradient at the mean mask.

    The estimators of the gradient of the expected loss; f is the loss under a draw m, s its score,
    d the moving average of what stands before it in past steps. The first three are unbiased:

    - ``residual``: (f - f0 - d) s, with f0 the loss under the initial mask on the same batch (the
      paper's); two forward passes, of which the authors' code saves one by never changing its
      batches.
    - ``leave_one_out``: of K draws on one batch, each one's loss against the mean of the others';
      K forward passes, and nothing that ages as the masks leave the initial one.
    - ``control_variate``: (f - f(mean) - g (m - mean) - d) s + g d mean / d logits, where g is the
      gradient with respect to the mask at the mean mask (MuProp: Gu et al., ICLR 2016); two forward
      passes, one backward, and a gradient buffer of the logits' size.
    - ``mean_gradient``: g d mean / d logits alone: one forward pass and one backward. It takes the
      loss for linear between the mean and the samples, and is free of their noise.

    The first two move the logits by plain gradient descent at the rate ``lr``, in place; the
    Trainer's schedule applies to it, its ``optimizer`` is not used. The others have gradients, and
    leave them to that optimizer.

    The defaults are the paper's, for 10,000 steps of 32 x 128 tokens on seven billion weights.
    ``docs/maskpro.md`` tells how to choose ``strength`` and ``lr`` for others.

    Args:
        prior: the initial mask: a one-shot strategy by name or as an object, a mask file or an
            exported folder.
        strength: the logit at which kept weights start (the paper's C); dropped ones start at 0.
        grading: adds ``grading * log(|weight| / largest of its group)`` to the first logits: draws
            then try first what changes the layer's output least; 0 is the paper's. What the prior
            drops for something smaller counts as just smaller than what it keeps: ``strength`` is
            then all that holds the prior's choice.
        lr: of the plain gradient descent, logits a nat.
        estimator: of the gradient.
        draws: K of ``leave_one_out``.
        memory: share of the past that a micro-batch leaves in the moving average.
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
        averages = estimator in ("residual", "control_variate")
        self.average = MovingAverage(memory) if averages else None
        self._terms: list[list[Term]] = []

    @property
    def without_gradients(self) -> bool:
        return self.estimator not in WITH_GRADIENTS

    def make_masker(self, name: str, shape: tuple[int, int], pattern: NMPattern) -> LogitMasker:
        if self.estimator in WITH_GRADIENTS:
            mean_mask(torch.zeros(1, pattern.m), pattern)  # refuses patterns with too many sets
        return LogitMasker(name, shape, pattern)

    def start(
        self, masker: Masker, weight_OI: Tensor, prior_OI: Tensor | None, row0: int = 0
    ) -> None:
        masker, prior_OI = cast(LogitMasker, masker), cast(Tensor, prior_OI)
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
        layers: Mapping[str, MaskedLinear],
        default: Callable[[list[nn.Parameter]], Optimizer],
    ) -> Optimizer:
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise SparsifyError(
                f"{dist.get_world_size()} processes: draws and losses are not exchanged between "
                "them yet; run one process (--trainer.devices 1)"
            )
        if self.estimator in WITH_GRADIENTS:
            return default(params)
        return PolicyGradient(_maskers(layers), self._take, self.lr)

    def before_step(self, layers: Mapping[str, MaskedLinear]) -> None:
        """Complete the gradients of the mean mask with the scores of the draws."""
        if self.estimator == "control_variate":
            terms = self._take()
            for masker in _maskers(layers):
                for rows, total in masker.scores(terms):
                    cast(Tensor, masker.logits_OI.grad)[rows] += total

    @torch.no_grad()
    def _take(self) -> list[tuple[Draw, Tensor]]:
        """The draws of the step that ends, and the factors of their scores, 0-d."""
        micro_batches, taken = len(self._terms), []
        for term in (term for terms in self._terms for term in terms):
            value = term.value()
            if self.average is not None:
                value = self.average.remove(value)
            factor = term.scale[0] if term.scale else 1 / micro_batches
            taken.append((term.draw, value * factor))
        self._terms.clear()
        return taken

    def metrics(self) -> dict[str, Tensor]:
        """Mean and standard deviation of past advantages: the scale that ``lr`` belongs to."""
        if self.average is None:
            return {}
        return dict(zip(("advantage", "advantage_std"), self.average.moments(), strict=True))


def _maskers(layers: Mapping[str, MaskedLinear]) -> list[LogitMasker]:
    """Each once, however many layers share it."""
    maskers = {id(layer.masker): layer.masker for layer in layers.values()}
    return [cast(LogitMasker, masker) for masker in maskers.values()]


def _chunks(tensor_OI: Tensor) -> Iterator[slice]:
    """Rows of some ``AT_ONCE`` elements."""
    rows, columns = tensor_OI.shape
    at_once = max(1, AT_ONCE // columns)
    for start in range(0, rows, at_once):
        yield slice(start, min(start + at_once, rows))
