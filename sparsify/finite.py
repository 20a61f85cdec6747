"""Notices a loss that is not finite, without waiting for the device at every step."""

from typing import Any

import torch
from torch import Tensor

from sparsify.errors import SparsifyError


class FiniteWatch:
    """Remembers on the device since which optimizer step the loss is not finite."""

    def __init__(self) -> None:
        self._since: Tensor | None = None

    def watch(self, loss: Tensor, trainer: Any) -> None:
        """Take note of a 0-d loss; look at the note where Lightning fetches metrics anyway."""
        step, every = trainer.global_step, trainer.log_every_n_steps
        if self._since is None:
            self._since = torch.full((), -1, device=loss.device)
        starts = ~loss.isfinite() & (self._since < 0)
        self._since = torch.where(starts, step, self._since)
        if every and (step + 1) % every == 0:
            self.check(trainer)

    def check(self, trainer: Any) -> None:
        """Stop the run on every rank if the loss of one was not finite.

        Raises:
            SparsifyError: it was not; the step is named.
        """
        since = -1 if self._since is None else int(self._since)
        if not trainer.strategy.reduce_boolean_decision(since >= 0, all=False):
            return
        when = f"since optimizer step {since}" if since >= 0 else "on another rank"
        raise SparsifyError(
            f"the loss is not finite {when}; checkpoints from before it are intact: resume from "
            "one with a lower learning rate (--model.optimizer.init_args.lr), or look at that "
            "step's data"
        )
