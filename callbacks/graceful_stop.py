"""Ends a run cleanly on Ctrl-C."""

import signal
import sys
from typing import Any

from lightning.pytorch import Callback

from sparsify.callbacks.checkpoints import Checkpoints
from sparsify.callbacks.find import find


class GracefulStop(Callback):
    """At the first Ctrl-C: finish the optimizer step, save a checkpoint, say how to resume.

    At the second: stop at once.

    Attributes:
        stopped: whether the run was stopped this way.
    """

    def __init__(self) -> None:
        self.stopped = False
        self._asked = False
        self._former: Any = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._former = signal.signal(signal.SIGINT, self._ask)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._restore()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._restore()

    def _restore(self) -> None:
        if self._former is not None:
            signal.signal(signal.SIGINT, self._former)
            self._former = None

    def _ask(self, signum: int, frame: Any) -> None:
        self._asked = True
        self._restore()
        print("\nfinishing this step and saving; Ctrl-C again stops at once", file=sys.stderr)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Any rank may have been asked; all must agree, or the others would wait for ever.
        asked = trainer.strategy.reduce_boolean_decision(self._asked, all=False)
        if not (asked and pl_module.ends_step(batch_idx)) or self.stopped:
            return
        self.stopped = True
        trainer.should_stop = True
        path = find(trainer, Checkpoints).save(trainer)
        if trainer.is_global_zero:
            say = f"stopped after step {trainer.global_step}; resume with"
            print(f"{say} sparsify fit --ckpt_path {path}", file=sys.stderr)
