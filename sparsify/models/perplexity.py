"""Token perplexity, and the result file that every later command reads.

Perplexity follows the usual protocol of pruning papers: windows of equal length without overlap,
the mean cross-entropy over the L - 1 targets of each (of instruction data those in responses), and
the exponential of the mean over windows.
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
MAX_LOSS = 700.0  # nats a token; exp(710) is above all float64


def token_losses(logits_BTV: Tensor, tokens_BT: Tensor) -> Tensor:
    """Cross-entropy of every next token in fp32, nats: ``[B, T - 1]``."""
    targets = tokens_BT[:, 1:]
    flat = F.cross_entropy(
        logits_BTV[:, :-1].flatten(0, 1).float(), targets.flatten(), reduction="none"
    )
    return flat.view(targets.shape)


def mean_loss(losses_BT: Tensor, targets_BT: Tensor | None) -> Tensor:
    """The mean over the tokens that are targets, 0-d; 0 with a graph where there is none.

    Args:
        losses_BT: from :func:`token_losses`.
        targets_BT: bool, ``[B, T]``, for all tokens of the windows; None where all are targets.
    """
    if targets_BT is None:
        return losses_BT.mean()
    predicted = targets_BT[:, 1:]
    return losses_BT.masked_fill(~predicted, 0).sum() / predicted.sum().clamp(min=1)


@dataclass(frozen=True)
class Score:
    """Perplexity of one text.

    Attributes:
        loss: mean cross-entropy a token, nats.
        perplexity: its exponential.
        windows: how many windows with targets were measured.
        targets: how many tokens were predicted.
    """

    loss: float
    perplexity: float
    windows: int
    targets: int


class NotFinite(SparsifyError):
    """A score that is not finite, and so none.

    Attributes:
        tokens_T: the first window whose loss is not finite, where that is known.
    """

    def __init__(self, message: str, tokens_T: Tensor | None = None) -> None:
        super().__init__(message)
        self.tokens_T = tokens_T


class _FirstOdd:
    """The first window of a text whose loss is not finite, found without a synchronisation."""

    def __init__(self) -> None:
        self._seen = 0
        self.number: Tensor | None = None  # counted from 1; 0 as long as there is none
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
    """Collects window losses of named texts on the device; only :meth:`scores` synchronises."""

    def __init__(self, names: Iterable[str], device: torch.device) -> None:
        self.names = list(names)
        # torchmetrics' MeanMetric drops losses that are not numbers, and sums in fp32.
        zero = torch.zeros((), dtype=torch.float64, device=device)
        self._sums = dict.fromkeys(self.names, zero)
        # Tensors where they depend on what the targets are.
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
        """Add the windows of one batch; those without target do not count.

        Args:
            name: of the text.
            losses_BT: from :func:`token_losses`.
            targets_BT: bool, which tokens are targets; None where all are.
            tokens_BT: the windows themselves, to name one whose loss is not finite.
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
        """The score of every text, and over all windows as ``overall``.

        Raises:
            NotFinite: a score is not finite; the text and the first such window are named.
            SparsifyError: no token of a text is a target.
        """
        result = {}
        for name in self.names:
            windows, targets = int(self._windows[name]), int(self._targets[name])
            if not windows:
                raise SparsifyError(
                    f"{name}: none of its windows has a target of the loss, and perplexity is of "
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
                "exponential, the perplexity, is no finite number any more; look at the base model"
            )
        return Score(loss, math.exp(loss), windows, targets)


def score_metrics(split: str, scores: Mapping[str, Score]) -> dict[str, float]:
    """Scores under the names of a dashboard: ``split/loss`` overall, ``split/text/loss`` each."""
    metrics: dict[str, float] = {}
    for name, score in scores.items():
        where = split if name == OVERALL else f"{split}/{name}"
        metrics |= {f"{where}/loss": score.loss, f"{where}/perplexity": score.perplexity}
    return metrics
