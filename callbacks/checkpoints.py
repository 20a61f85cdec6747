"""Saves checkpoints of a run."""

import sys
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO

from sparsify.common.errors import DiskFull, SparsifyError
from sparsify.common.files import disk_full
from sparsify.common.folder_lock import FolderLock
from sparsify.common.ranks import together
from sparsify.common.run_folder import run_folder
from sparsify.training.checkpoints.files import (
    FOLDER,
    LAST,
    WholeFileIO,
    complete,
    partial_path,
    remove,
    remove_partials,
    step_of,
    step_path,
    steps_in,
)


class Checkpoints(Checkpoint):
    """Keeps the newest checkpoints in ``checkpoints`` in the run's folder, the last one also under
    the name ``last.ckpt``.

    A checkpoint is saved every ``every_n_steps`` steps, and one at the end, before the export. A
    run that is killed while it saves leaves the former checkpoint or the new one, whole. If the
    disk is full, the run warns and goes on, and tries the next save as usual.

    To keep other checkpoints, add Lightning's ModelCheckpoint under ``trainer.callbacks``.

    Args:
        every_n_steps: optimizer steps between two saves.
        keep: how many to keep; with two or more, there is another if the disk damages one.

    Attributes:
        last: the newest checkpoint that this run has saved, if any.
    """

    def __init__(self, every_n_steps: int = 100, keep: int = 2) -> None:
        if keep < 1:
            raise SparsifyError(f"checkpoint.keep is {keep}; it must be 1 or more")
        if every_n_steps < 1:
            raise SparsifyError(
                f"checkpoint.every_n_steps is {every_n_steps}; it must be 1 or more: with more "
                "than the run has, only its end is saved"
            )
        self.every_n_steps = every_n_steps
        self.keep = keep
        self.last: Path | None = None
        self._saved_at = -1
        self._lock: FolderLock | None = None
        self._kept: list[Path] | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if isinstance(trainer.strategy.checkpoint_io, AsyncCheckpointIO):
            raise SparsifyError(
                "AsyncCheckpointIO: a checkpoint has to be on the disk before it takes its place; "
                "leave this plugin out"
            )
        if stage == "fit" and not trainer.fast_dev_run:
            with together():
                if trainer.is_global_zero:
                    self._lock = FolderLock(run_folder(trainer))
        # Leave any other plugin of the user in place.
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = WholeFileIO()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._release()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._release()

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not pl_module.ends_step(batch_idx) or trainer.global_step % self.every_n_steps:
            return
        try:
            self.save(trainer)
        except DiskFull as error:
            if trainer.is_global_zero:
                print(
                    f"WARNING: {error}; the run goes on, and saves again after "
                    f"{self.every_n_steps} more steps",
                    file=sys.stderr,
                )

    def save(self, trainer: Any) -> Path:
        """Save this step, unless that was done already, and return the path. Every rank must call
        this.

        Raises:
            DiskFull: on every rank, if there is no space; the former checkpoints are unchanged.
        """
        folder = run_folder(trainer) / FOLDER
        if self._saved_at != trainer.global_step:
            self._write(trainer, folder)
            self._saved_at = trainer.global_step
            self.last = folder / LAST
        return folder / LAST

    def _write(self, trainer: Any, folder: Path) -> None:
        place = step_path(folder, trainer.global_step)
        partial = partial_path(place)
        if trainer.is_global_zero:
            remove_partials(folder)
        trainer.strategy.barrier()
        failure: DiskFull | None = None
        try:
            with disk_full(folder):
                trainer.save_checkpoint(partial, weights_only=False)
        except DiskFull as error:
            failure = error
            trainer.strategy.barrier()  # the other ranks wait for it in save_checkpoint
        if trainer.is_global_zero and failure is None:
            try:
                with disk_full(folder):
                    complete(partial, place)
            except DiskFull as error:
                failure = error
        if trainer.strategy.reduce_boolean_decision(failure is not None, all=False):
            if trainer.is_global_zero:
                remove_partials(folder)
            raise DiskFull(
                f"the checkpoint of step {trainer.global_step} was not saved: "
                f"{failure or 'the disk of another rank is full'}"
            ) from failure
        if trainer.is_global_zero:
            self._prune(trainer, place)

    def _prune(self, trainer: Any, newest: Path) -> None:
        """Once this run has saved ``keep`` checkpoints, remove all others, whatever their step: an
        earlier run may have left its own in this folder.
        """
        if self._kept is None:
            self._kept = _former(trainer.ckpt_path, newest)
        self._kept = [*(path for path in self._kept if path != newest), newest][-self.keep :]
        if len(self._kept) < self.keep:
            return  # checkpoints of another run are better than none
        for path in steps_in(newest.parent):
            if path not in self._kept:
                remove(path)


def _former(resumed: Any, newest: Path) -> list[Path]:
    """The checkpoints up to the one that this run was resumed from, oldest first; none if that is
    in another folder.
    """
    if resumed is None or Path(resumed).resolve().parent != newest.parent.resolve():
        return []
    at = step_of(Path(resumed).resolve()) or 0
    return [path for path in reversed(steps_in(newest.parent)) if (step_of(path) or 0) <= at]
