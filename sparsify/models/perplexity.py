"""Token perplexity, by the usual protocol of pruning papers.

A text is cut into windows of equal length without overlap. The loss of a window is the mean
cross-entropy over its T - 1 targets (for instruction data, over those in responses); perplexity is
the exponential of the mean loss over windows.
Shapes: B windows, T tokens, V vocabulary.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsify.common.errors import SparsifyError

OVERALL = "overall"
MAX_LOSS = 700.0  # nats per token; exp(710) overflows float64


def token_losses(logits_BTV: Tensor, tokens_BT: Tensor) -> Tensor:
    """Cross-entropy of every next token, fp32, in nats: ``[B, T - 1]``."""
    targets = tokens_BT[:, 1:]
    flat = F.cross_entropy(
        logits_BTV[:, :-1].flatten(0, 1).float(), targets.flatten(), reduction="none"
    )
    return flat.view(targets.shape)


def mean_loss(losses_BT: Tensor, targets_BT: Tensor | None) -> Tensor:
    """The mean loss over the tokens that are targets, 0-d; without targets it is 0, with zero
    gradients.

    Args:
        losses_BT: from :func:`token_losses`.
        targets_BT: bool, ``[B, T]``, True at targets; None if all tokens are.
    """
    if targets_BT is None:
        return losses_BT.mean()
    predicted = targets_BT[:, 1:]
    return losses_BT.masked_fill(~predicted, 0).sum() / predicted.sum().clamp(min=1)


@dataclass(frozen=True)
class Score:
    """Perplexity of one text.

    Attributes:
        loss: mean cross-entropy per token, nats.
        perplexity: its exponential.
        windows: how many windows with targets were measured.
        targets: how many tokens were predicted.
    """

    loss: float
    perplexity: float
    windows: int
    targets: int


class NotFinite(SparsifyError):
    """A perplexity is not finite.

    Attributes:
        tokens_T: the tokens of the first window whose loss is not finite, if they are known.
    """

    def __init__(self, message: str, tokens_T: Tensor | None = None) -> None:
        super().__init__(message)
        self.tokens_T = tokens_T


class _FirstOdd:
    """Finds the first window of a text whose loss is not finite, without a synchronisation."""

    def __init__(self) -> None:
        self._seen = 0
        self.number: Tensor | None = None  # counted from 1; 0 while all are finite
        self.tokens_T: Tensor | None = None

    def update(self, losses_B: Tensor, tokens_BT: Tensor | None) -> None:
        odd_B = ~losses_B.isfinite()
        first = odd_B.int().argmax()
        if self.number is None:
            self.number = torch.zeros_like(first)
        news = odd_B.any() & (self.number == 0)
        self.number = torch.where(news, first + self._seen + 1, self.number)
        if tokens_BT is not None:
            before = tokens_BT[0] if self.tokens_T is None else self.tokens_T
            self.tokens_T = torch.where(news, tokens_BT[first], before)
        self._seen += len(losses_B)


class PerplexityMeter:
    """Sums the window losses of named texts on the device; only :meth:`scores` synchronises."""

    def __init__(self, names: Iterable[str], device: torch.device) -> None:
        self.names = list(names)
        # Not torchmetrics' MeanMetric, which drops NaN losses and sums in fp32.
        zero = torch.zeros((), dtype=torch.float64, device=device)
        self._sums = dict.fromkeys(self.names, zero)
        # Tensors once a batch comes with targets, as their number is then known on the device only.
        self._targets: dict[str, int | Tensor] = dict.fromkeys(self.names, 0)
        self._windows: dict[str, int | Tensor] = dict.fromkeys(self.names, 0)
        self._odd = {name: _FirstOdd() for name in self.names}

    def update(
        self,
        name: str,
        losses_BT: Tensor,
        targets_BT: Tensor | None = None,
        tokens_BT: Tensor | None = None,
    ) -> None:
        """Add the windows of one batch; windows without a target do not count.

        Args:
            name: name of the text.
            losses_BT: from :func:`token_losses`.
            targets_BT: bool, which tokens are targets; None if all are.
            tokens_BT: tokens of the windows, to report one whose loss is not finite.
        """
        if targets_BT is None:
            losses_B = losses_BT.double().mean(1)
            self._sums[name] = self._sums[name] + losses_B.sum()
            self._windows[name] += losses_BT.shape[0]
            self._targets[name] += losses_BT.numel()
            self._odd[name].update(losses_B, tokens_BT)
            return
        predicted = targets_BT[:, 1:]
        counts = predicted.sum(1)
        losses_B = losses_BT.double().masked_fill(~predicted, 0).sum(1) / counts.clamp(min=1)
        self._sums[name] = self._sums[name] + losses_B.sum()
        self._odd[name].update(losses_B, tokens_BT)
        self._windows[name] = self._windows[name] + (counts > 0).sum()
        self._targets[name] = self._targets[name] + counts.sum()

    def scores(self) -> dict[str, Score]:
        """The score of every text, and under ``overall`` that over all windows.

        Raises:
            NotFinite: a score is not finite; the message names the text and the window.
            SparsifyError: a text has no targets.
        """
        result = {}
        for name in self.names:
            windows, targets = int(self._windows[name]), int(self._targets[name])
            if not windows:
                raise SparsifyError(
                    f"{name}: none of its windows has a target of the loss, and perplexity is over "
                    "targets: add text whose responses are long enough, or remove it"
                )
            result[name] = self._score(name, windows, targets)
        windows = sum(score.windows for score in result.values())
        loss = sum(score.loss * score.windows for score in result.values()) / windows
        targets = sum(score.targets for score in result.values())
        result[OVERALL] = Score(loss, math.exp(loss), windows, targets)
        return result

    def _score(self, name: str, windows: int, targets: int) -> Score:
        loss, odd = self._sums[name].item() / windows, self._odd[name]
        if not math.isfinite(loss):
            raise NotFinite(
                f"{name}: the loss of window {int(cast(Tensor, odd.number))} is not finite, so "
                "there is no perplexity",
                odd.tokens_T,
            )
        if loss > MAX_LOSS:
            raise NotFinite(
                f"{name}: a loss of {loss:.4g} nats a token is above {MAX_LOSS:.0f}, where its "
                "exponential, the perplexity, is no longer finite; look at the base model"
            )
        return Score(loss, math.exp(loss), windows, targets)


def score_metrics(split: str, scores: Mapping[str, Score]) -> dict[str, float]:
    """Scores as metrics: ``split/loss`` over all texts, ``split/text/loss`` for each text."""
    metrics: dict[str, float] = {}
    for name, score in scores.items():
        where = split if name == OVERALL else f"{split}/{name}"
        metrics |= {f"{where}/loss": score.loss, f"{where}/perplexity": score.perplexity}
    return metrics
