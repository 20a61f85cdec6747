"""Advances the strategy's schedules."""

from typing import Any

from lightning.pytorch import Callback


class Annealing(Callback):
    """Sets scheduled values before every step, from its number only, so resuming needs no state."""

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        pl_module.strategy.anneal(trainer.global_step / trainer.estimated_stepping_batches)
