"""Token perplexity, and the result file that every later command reads.

Perplexity follows the usual protocol of pruning papers: windows of equal length without overlap,
the mean cross-entropy over the L - 1 targets of each (of instruction data those in responses), and
the exponential of the mean over windows.
Shapes: B windows, T tokens, V vocabulary.
"""

import json
import math
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsify.errors import SparsifyError
from sparsify.version import version

RESULT_SCHEMA = "sparsify.result/1"
OVERALL = "overall"


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

    def update(self, name: str, losses_BT: Tensor, targets_BT: Tensor | None = None) -> None:
        """Add the windows of one batch, from :func:`token_losses`; those without target do not
        count.
        """
        if targets_BT is None:
            self._sums[name] = self._sums[name] + losses_BT.double().mean(1).sum()
            self._windows[name] += losses_BT.shape[0]
            self._targets[name] += losses_BT.numel()
            return
        predicted = targets_BT[:, 1:]
        counts = predicted.sum(1)
        sums = losses_BT.double().masked_fill(~predicted, 0).sum(1)
        self._sums[name] = self._sums[name] + (sums / counts.clamp(min=1)).sum()
        self._windows[name] = self._windows[name] + (counts > 0).sum()
        self._targets[name] = self._targets[name] + counts.sum()

    def scores(self) -> dict[str, Score]:
        """The score of every text, and over all windows as ``overall``.

        Raises:
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
            loss = self._sums[name].item() / windows
            result[name] = Score(loss, math.exp(loss), windows, targets)
        windows = sum(score.windows for score in result.values())
        loss = sum(score.loss * score.windows for score in result.values()) / windows
        targets = sum(score.targets for score in result.values())
        result[OVERALL] = Score(loss, math.exp(loss), windows, targets)
        return result


def score_metrics(split: str, scores: Mapping[str, Score]) -> dict[str, float]:
    """Scores under the names of a dashboard: ``split/loss`` overall, ``split/text/loss`` each."""
    metrics: dict[str, float] = {}
    for name, score in scores.items():
        where = split if name == OVERALL else f"{split}/{name}"
        metrics |= {f"{where}/loss": score.loss, f"{where}/perplexity": score.perplexity}
    return metrics


def make_result(
    run: Mapping[str, Any], protocol: Mapping[str, Any], scores: Mapping[str, Score]
) -> dict[str, Any]:
    """A result with all that is needed to know which others it may be compared with.

    Args:
        run: what was done: strategy, pattern, steps, tokens, seconds.
        protocol: how it was measured; results of different protocols never share a column.
        scores: from :meth:`PerplexityMeter.scores`.
    """
    packages = ("sparsify", "torch", "lightning", "transformers")
    return {
        "schema": RESULT_SCHEMA,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {name: version(name) for name in packages}
        | {"python": platform.python_version()},
        "run": dict(run),
        # A run that was told to measure a part of the text has measured another text.
        "protocol": {**protocol, "windows": {name: s.windows for name, s in scores.items()}},
        "scores": {name: asdict(score) for name, score in scores.items()},
    }


def pattern_text(run: Mapping[str, Any]) -> str:
    """The pattern of a result's run, for a title."""
    return f"{run['pattern']} with overrides" if run.get("overrides") else str(run["pattern"])


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write indented JSON so that a reader sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)
