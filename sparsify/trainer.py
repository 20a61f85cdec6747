"""Lightning's Trainer with one more entry point."""

from typing import Any

import torch.distributed as dist
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch import Trainer as LightningTrainer


class Trainer(LightningTrainer):
    """A Trainer that can also export a checkpoint; everything else is Lightning's.

    Attributes:
        exporting: whether ``export`` is at work.
        restores: whether a checkpoint is about to be loaded, so that nothing that it holds needs to
            be computed.
    """

    exporting = False
    restores = False

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        # Lightning tells nobody before it loads the checkpoint, and by then the model is built.
        self.restores = kwargs.get("ckpt_path") is not None
        return super()._run(*args, **kwargs)

    def export(
        self, model: LightningModule, datamodule: LightningDataModule, ckpt_path: str | None = None
    ) -> None:
        """Test a checkpoint and write its model as a Hugging Face folder.

        Args:
            model: the module.
            datamodule: its data.
            ckpt_path: the checkpoint, by convention ``last.ckpt`` of the run; without one the
                strategy's starting masks are exported.
        """
        self.exporting = True
        self.test(model, datamodule=datamodule, ckpt_path=ckpt_path, verbose=False)


def data_parallel(trainer: Any) -> tuple[int, int]:
    """(rank, number of ranks) of this process among those that see different data."""
    strategy = None if trainer is None else trainer.strategy
    sampler = getattr(strategy, "distributed_sampler_kwargs", None)
    return (sampler["rank"], sampler["num_replicas"]) if sampler else (0, 1)


def leave_process_group() -> None:
    """End a run of several processes together; Lightning leaves it to the interpreter's exit.

    There, a backend's threads may still be at work, and the process is aborted.
    """
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
