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
    """Have a run that is asked to end save what it has learned, and say how to go on.

    A training step is finished first, a validation is broken off between two batches, and all else
    ends at once, as it has nothing to save. A second signal ends at once in any case.

    Of several ranks each may be asked alone. They look together, so that all stop at the same
    place: at the end of every optimizer step, never within, and after every batch of a validation.
    They do so over a group of the CPUs, and no device waits for it.
    """

    def __init__(self) -> None:
        self._group: Any = None
        self._begun = False  # whether training has
        self._breaks_off = False  # whether a checkpoint is saved in the midst of a validation
        self._looks: dict[str, Any] | None = None  # the validation loop's state at the step's end

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if not signals.active():
            return
        self._begun = True
        if trainer.world_size > 1 and self._group is None:
            self._group = dist.new_group(backend="gloo")
        signals.hold()

    def end_at_once(self) -> None:
        """What was learned is saved: from now on do not wait.

        Raises:
            Interrupted: a signal has come.
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
        if signals.active() and self._begun and trainer.state.fn == TrainerFn.FITTING:
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
        trainer.training = True  # a checkpoint says by this whether it can be resumed
        try:
            return keeps.save(trainer)
        finally:
            if self._breaks_off:
                trainer.validating = True
            self._breaks_off = False

    def _asked_of_any(self) -> int | None:
        own = signals.asked() or 0
        if self._group is None:
            return own or None
        numbers = torch.tensor([own], dtype=torch.int32)
        dist.all_reduce(numbers, dist.ReduceOp.MAX, group=self._group)
        return int(numbers.item()) or None

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Have the loops of a checkpoint that is saved in a validation say what they said at the
        end of the step before; Lightning would go on in the midst of the validation, without what
        was measured.
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
