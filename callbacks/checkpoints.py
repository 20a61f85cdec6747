"""Keeps what a run has learned."""

from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Checkpoint

from sparsify.run_folder import run_folder


class Checkpoints(Checkpoint):
    """Keeps ``checkpoints/last.ckpt`` in the run's folder up to date.

    It is saved every few steps, and at the end before the export.

    To keep more than the last one, add Lightning's ModelCheckpoint under ``trainer.callbacks``.

    Args:
        every_n_steps: optimizer steps between two saves.
    """

    def __init__(self, every_n_steps: int = 100) -> None:
        self.every_n_steps = every_n_steps
        self._saved_at = -1

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if pl_module.ends_step(batch_idx) and trainer.global_step % self.every_n_steps == 0:
            self.save(trainer)

    def save(self, trainer: Any) -> Path:
        """Save this step, if that has not been done, and tell where."""
        path = run_folder(trainer) / "checkpoints" / "last.ckpt"
        if self._saved_at != trainer.global_step:
            trainer.save_checkpoint(path, weights_only=False)
            self._saved_at = trainer.global_step
        return path
