"""Ends a run cleanly on Ctrl-C, SIGTERM or SIGUSR1."""

import copy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from lightning.pytorch.trainer.states import TrainerFn

from sparsify.callbacks.checkpoints import Checkpoints
from sparsify.callbacks.find import find
from sparsify.common import signals


class GracefulStop(Callback):
    """When a signal asks a run to end, saves what it has learned and says how to go on.

    A training step is finished first, and a validation is broken off between two batches. Anything
    else ends at once, as it has nothing to save. A second signal ends the run at once in any case.

    A signal may reach only some of the ranks. So all ranks check together, and stop at the same
    place: at the end of an optimizer step, or after a batch of a validation that follows one. They
    communicate over a group of their CPUs, so that no device has to wait.
    """

    def __init__(self) -> None:
        self._group: Any = None
        self._begun = False  # whether training has begun
        self._breaks_off = False  # whether a checkpoint is being saved within a validation
        self._looks: dict[str, Any] | None = None  # the validation loop's state at the step's end

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if not signals.active():
            return
        self._begun = True
        if trainer.world_size > 1 and self._group is None:
            self._group = dist.new_group(backend="gloo")
        signals.hold()

    def end_at_once(self) -> None:
        """From now on end at once when a signal comes, as what was learned is saved.

        Raises:
            Interrupted: a signal has come already.
        """
        if signals.active():
            signals.release()

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if signals.active() and pl_module.ends_step(batch_idx):
            self._looks = copy.deepcopy(trainer.fit_loop.epoch_loop.val_loop.state_dict())
            self._stop_if_asked(trainer)

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        if not (signals.active() and self._begun and trainer.state.fn == TrainerFn.FITTING):
            return
        # Within an accumulated step there is nothing to resume from yet.
        if pl_module.ends_step(trainer.fit_loop.epoch_loop.batch_idx):
            self._stop_if_asked(trainer)

    def _stop_if_asked(self, trainer: Any) -> None:
        signum = self._asked_of_any()
        if signum is None:
            return
        stop = signals.stop(signum)
        stop.advice = f"after step {trainer.global_step}; no checkpoint was asked for"
        if keeps := next((c for c in trainer.callbacks if isinstance(c, Checkpoints)), None):
            path = self._save(trainer, keeps)
            left = trainer.max_steps < 0 or trainer.global_step < trainer.max_steps
            way = "resume with sparsify fit" if left else "go on with sparsify export"
            stop.advice = f"after step {trainer.global_step}; {way} --ckpt_path {path}"
        raise stop

    def _save(self, trainer: Any, keeps: Checkpoints) -> Path:
        self._breaks_off = trainer.validating
        try:
            return keeps.save(trainer)
        finally:
            self._breaks_off = False

    def _asked_of_any(self) -> int | None:
        own = signals.asked() or 0
        if self._group is None:
            return own or None
        numbers = torch.tensor([own], dtype=torch.int32)
        dist.all_reduce(numbers, dist.ReduceOp.MAX, group=self._group)
        return int(numbers.item()) or None

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """In a checkpoint that is saved within a validation, restore the loops' state from the end
        of the step before. Otherwise Lightning would resume within the validation, without the
        losses measured so far.
        """
        if not self._breaks_off:
            return
        saved = checkpoint["loops"]["fit_loop"]
        progress = copy.deepcopy(saved["epoch_loop.batch_progress"])
        for which in ("total", "current"):
            progress[which]["completed"] -= 1
        saved["epoch_loop.batch_progress"] = progress
        for key, value in (self._looks or {}).items():
            saved[f"epoch_loop.val_loop.{key}"] = value

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        if not isinstance(exception, signals.Interrupted) or trainer.state.fn != TrainerFn.FITTING:
            return
        last = find(trainer, Checkpoints).last
        if not self._begun:
            exception.advice = "before the first step; start the same command again"
            if pl_module.calibration.cache:
                exception.advice += ": blocks that were calibrated are in the cache"
        elif last is not None and "step" not in exception.advice:
            exception.advice = (
                f"in the test or the export; go on with sparsify export --ckpt_path {last}"
            )
