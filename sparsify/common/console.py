"""The progress bar of the command line, and what a run prints beside it."""

from collections.abc import Iterable
from typing import Any, TypeVar

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from rich.progress import track

from sparsify.common.printable import SafeConsole

T = TypeVar("T")


class Progress(RichProgressBar):
    """Lightning's bar without the version and the number of epochs: a run is measured in steps."""

    def _get_train_description(self, current_epoch: int) -> str:
        return f"Epoch {current_epoch}".ljust(len(self.validation_description))

    def finish(self) -> None:
        """Close the bar, so that what is printed next stands below it."""
        self._stop_progress()

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics


def tell(lines: Iterable[str], trainer: Any) -> None:
    """Print lines as they are, if the trainer shows its progress at all."""
    if trainer is not None and trainer.progress_bar_callback and trainer.is_global_zero:
        for line in lines:
            SafeConsole().print(line, soft_wrap=True, markup=False, emoji=False, highlight=False)


def tracked(items: Iterable[T], description: str, trainer: Any) -> Iterable[T]:
    """Iterate over ``items`` with a bar of the time left, if the trainer shows bars at all."""
    shown = trainer is not None and trainer.progress_bar_callback and trainer.is_global_zero
    return track(items, description, transient=True) if shown else items
