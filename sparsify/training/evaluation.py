"""Validation and test, always under the hard masks, which are the ones that are exported.

Shapes: B windows, T tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from sparsify.masking.masked_model import MaskedModel
from sparsify.masking.masker import Masking
from sparsify.models.perplexity import PerplexityMeter, Score, score_metrics, token_losses
from sparsify.models.token_batch import TokenBatch, split_batch
from sparsify.training.guards import finite_scores


class Evaluation(LightningModule):
    """The part of a LightningModule that measures a masked model.

    Attributes:
        scores: the scores of the last validation or test, by text and overall.
        validated_at: the optimizer step of the last validation; -1 before the first.
        dtype_name: the type of the base weights, as the user gave it.
    """

    scores: dict[str, Score]
    validated_at = -1
    dtype_name: str
    _meter: PerplexityMeter

    @property
    def masked(self) -> MaskedModel:
        """The model with its masked layers, once it is built."""
        raise NotImplementedError

    @property
    def scored_dtype(self) -> str:
        """The type in which scores are computed, for a reader."""
        mixed = self._trainer is not None and self.trainer.precision == "bf16-mixed"
        return self.dtype_name + (", bf16-mixed" if mixed else "")

    def window_losses(self, batch: Tensor | TokenBatch, masking: Masking = "hard") -> Tensor:
        """Losses of all next tokens, targets and others, nats, ``[B, T - 1]``, without a graph."""
        tokens_BT, masked = split_batch(batch)[0], self.masked
        with torch.no_grad(), masked.scope.use(masking):
            logits_BTV = masked.model(input_ids=tokens_BT, use_cache=False).logits
            return token_losses(logits_BTV, tokens_BT)

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Set the masks and the precision with which scores are measured; no graph is built."""
        precision = nullcontext()
        if self._trainer is not None:
            precision = cast(Any, self.trainer).precision_plugin.val_step_context()
        with precision, self.masked.hard():
            yield

    def test_windows(self) -> Tensor | None:
        """A batch of the test text, int64 ``[B, T]``; None without a test text."""
        data = None if self._trainer is None else cast(Any, self.trainer).datamodule
        if data is None or not data.test_names:
            return None
        return split_batch(next(iter(data.test_dataloader()[0])))[0]

    def on_validation_epoch_start(self) -> None:
        names = cast(Any, self.trainer).datamodule.validation_names
        self._meter = PerplexityMeter(names, self.device)

    def on_test_epoch_start(self) -> None:
        self._meter = PerplexityMeter(cast(Any, self.trainer).datamodule.test_names, self.device)

    def validation_step(
        self, batch: Tensor | TokenBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        name, (tokens_BT, targets_BT) = self._meter.names[dataloader_idx], split_batch(batch)
        self._meter.update(name, self.window_losses(batch), targets_BT, tokens_BT)

    def test_step(
        self, batch: Tensor | TokenBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.validation_step(batch, batch_idx, dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        self.validated_at = self.trainer.global_step
        self._log_scores("val")

    def on_test_epoch_end(self) -> None:
        self._log_scores("test")

    def _log_scores(self, split: str) -> None:
        self.scores = finite_scores(self._meter, self)
        for name, value in score_metrics(split, self.scores).items():
            self.log(name, value, prog_bar=name == f"{split}/perplexity")
