"""Learns from the dense model: from its predictions (Hinton et al., 2015, arXiv 1503.02531) and
from the outputs of its blocks (Romero et al., 2015, arXiv 1412.6550).

Shapes: B windows, T tokens, V vocabulary, D features of a block's output, N tokens of a piece.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsify.common.errors import SparsifyError
from sparsify.masking.schedule import Schedule
from sparsify.models.perplexity import mean_loss

# Probabilities are made for so many logits at once: 64 MB in fp32.
AT_ONCE = 1 << 24


@dataclass(frozen=True)
class Distillation:
    """How a run learns from the dense model; ``--model.distillation.*``.

    The loss is ``(1 - weight) * cross-entropy + weight * temperature**2 * KL(dense || sparse)``,
    with both distributions at this temperature, plus ``hidden`` times the sum over decoder blocks
    of ``|h - h_dense|**2 / |h_dense|**2``, where h holds a block's outputs; the last
    block's is taken after the final norm. The divergence is the mean over the tokens that predict
    targets; the squares are sums over the same tokens. The square of the temperature keeps the size
    of the divergence's gradient.

    Args:
        weight: from 0 (no divergence) to 1 (no cross-entropy). The default is what the strategy
            advises, or else 0.
        temperature: divides the logits of both models; by default as the strategy advises, or 1.
        hidden: the weight of the blocks' outputs, or a schedule of it over the run; by default as
            the strategy advises, or 0.
    """

    weight: float | None = None
    temperature: float | None = None
    hidden: float | Schedule | None = None

    def __post_init__(self) -> None:
        weight, temperature, hidden = self.weight or 0, self._temperature, self.hidden
        ends = (hidden.start, hidden.end) if isinstance(hidden, Schedule) else (hidden or 0,)
        if not (0 <= weight <= 1 and temperature > 0 and all(end >= 0 for end in ends)):
            raise SparsifyError(
                f"distillation weight={weight}, temperature={temperature}, hidden={hidden}; "
                "the weight must lie between 0 and 1, the temperature above 0, and hidden must not "
                "be negative: --model.distillation.weight 0.5 --model.distillation.temperature 1 "
                "--model.distillation.hidden 0"
            )

    @property
    def numbers(self) -> tuple[float, float, float]:
        """Weight, temperature and hidden at one time (:meth:`at`); 0, 1 and 0 if not given."""
        if isinstance(self.hidden, Schedule):
            raise RuntimeError("hidden is a schedule: ask at() for its value")
        return self.weight or 0.0, self._temperature, self.hidden or 0.0

    @property
    def _temperature(self) -> float:
        return 1.0 if self.temperature is None else self.temperature

    def at(self, progress: float) -> "Distillation":
        """The settings when this share of the steps is over, from 0 to 1."""
        if isinstance(self.hidden, Schedule):
            return Distillation(self.weight, self.temperature, self.hidden.at(progress))
        return self

    def most(self) -> "Distillation":
        """The settings of the first or of the last step, whichever takes more work."""
        return max(self.at(0.0), self.at(1.0), key=lambda settings: settings.numbers)

    def over(self, advice: "Distillation") -> "Distillation":
        """These settings, and where there are none, those of ``advice``; all are given then."""
        settings = Distillation(0.0, 1.0, 0.0)
        for part in (advice, self):
            given = {name: value for name, value in vars(part).items() if value is not None}
            settings = replace(settings, **given)
        return settings

    @property
    def needs_dense(self) -> bool:
        """Whether the dense model has to run."""
        return bool(self.weight or self.hidden)

    def mix(
        self,
        task_loss: Tensor,
        logits_BTV: Tensor,
        dense_BTV: Tensor,
        targets_BT: Tensor | None,
        blocks: Sequence[Tensor] = (),
        dense_blocks: Sequence[Tensor] = (),
    ) -> Tensor:
        """The loss, 0-d, nats.

        Args:
            task_loss: mean cross-entropy over the targets.
            logits_BTV: the sparse model's logits.
            dense_BTV: the dense model's logits.
            targets_BT: bool, ``[B, T]``, which tokens are targets; None if all are.
            blocks: the outputs of the sparse model's blocks, each ``[B, T, D]``.
            dense_blocks: the outputs of the dense model's blocks.
        """
        weight, temperature, hidden = self.numbers
        loss = (1 - weight) * task_loss if weight < 1 else task_loss.new_zeros(())
        if weight:
            divergence_BT = divergence(logits_BTV, dense_BTV, temperature)
            loss = loss + weight * temperature**2 * mean_loss(divergence_BT, targets_BT)
        if hidden:
            pairs = zip(blocks, dense_blocks, strict=True)
            errors = [relative_error(block, dense, targets_BT) for block, dense in pairs]
            loss = loss + hidden * torch.stack(errors).sum()
        return loss


def divergence(logits_BTV: Tensor, dense_BTV: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(dense || sparse) of every next token, fp32, in nats: ``[B, T - 1]``. The token after the
    last is not known, so its distribution is left out.

    For backward it keeps one tensor of the logits' size and type; fp32 probabilities are made piece
    by piece.
    """
    return cast(Tensor, cast(Any, _Divergence).apply(logits_BTV, dense_BTV, temperature))


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_BTV: Tensor, dense_BTV: Tensor, temperature: float) -> Tensor:
        windows, tokens, words = logits_BTV.shape
        found_BT = logits_BTV.new_empty(windows, tokens - 1, dtype=torch.float32)
        slope_BTV = torch.zeros_like(logits_BTV)
        step = max(1, AT_ONCE // words)
        for window in range(windows):
            for start in range(0, tokens - 1, step):
                some = window, slice(start, min(start + step, tokens - 1))
                sparse_NV, dense_NV = (
                    F.log_softmax(values[some].float() / temperature, -1)
                    for values in (logits_BTV, dense_BTV)
                )
                wanted_NV = dense_NV.exp()
                found_BT[some] = (wanted_NV * (dense_NV - sparse_NV)).sum(-1)
                slope_BTV[some] = sparse_NV.exp_().sub_(wanted_NV).div_(temperature)
        ctx.save_for_backward(slope_BTV)
        return found_BT

    @staticmethod
    def backward(ctx: Any, grad_BT: Tensor) -> tuple[Any, ...]:
        (slope_BTV,) = ctx.saved_tensors
        return slope_BTV * F.pad(grad_BT, (0, 1)).to(slope_BTV.dtype)[..., None], None, None


def relative_error(block_BTD: Tensor, dense_BTD: Tensor, targets_BT: Tensor | None) -> Tensor:
    """``|h - h_dense|**2 / |h_dense|**2`` over the outputs that predict targets, 0-d.

    Both squares are summed over tokens. In large models a few tokens have outputs a thousand times
    as large as all others (Sun et al., 2024, arXiv 2402.17762), on which the rest depends: a sum
    lets them count as much as they weigh. Dividing token by token instead made masks of SmolLM2
    worse (perplexity 126 where this gave 103).
    """
    counted_BT = None if targets_BT is None else targets_BT[:, 1:]
    return cast(
        Tensor, cast(Any, _RelativeError).apply(block_BTD[:, :-1], dense_BTD[:, :-1], counted_BT)
    )


class _RelativeError(torch.autograd.Function):
    """For backward it keeps nothing but what it is given, which others keep anyway."""

    @staticmethod
    def forward(
        ctx: Any, block_BTD: Tensor, dense_BTD: Tensor, counted_BT: Tensor | None
    ) -> Tensor:
        error_BT = (block_BTD.float() - dense_BTD).square().sum(-1)
        size_BT = dense_BTD.float().square().sum(-1)
        if counted_BT is not None:
            error_BT, size_BT = (x.masked_fill(~counted_BT, 0) for x in (error_BT, size_BT))
        size = size_BT.sum().clamp(min=torch.finfo(torch.float32).tiny)
        ctx.save_for_backward(block_BTD, dense_BTD, counted_BT, size)
        return error_BT.sum() / size

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        block_BTD, dense_BTD, counted_BT, size = ctx.saved_tensors
        slope_BTD = (block_BTD.float() - dense_BTD).mul_(2 * grad / size)
        if counted_BT is not None:
            slope_BTD.masked_fill_(~counted_BT[..., None], 0)
        return slope_BTD.to(block_BTD.dtype), None, None
