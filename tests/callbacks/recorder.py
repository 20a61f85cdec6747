"""Runs the tiny model and keeps what is logged."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import sparsify
from sparsify.callbacks.annealing import Annealing
from sparsify.masking.inject import hard_masks


class Recorder(DummyLogger):
    """Keeps every logged number by name and optimizer step, counted from one."""

    def __init__(self) -> None:
        super().__init__()
        self.logged: dict[str, dict[int, float]] = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        for name, value in metrics.items():
            self.logged.setdefault(name, {})[step + 1] = value


class Snapshots(Callback):
    """Keeps masks, batch and scheduled values after every optimizer step; step 0 is the start."""

    def __init__(self) -> None:
        self.masks: dict[int, dict[str, torch.Tensor]] = {}
        self.state: dict[int, dict[str, torch.Tensor]] = {}
        self.batches: dict[int, torch.Tensor] = {}
        self.values: dict[int, dict[str, float]] = {}

    def _take(self, trainer: Trainer, module: LightningModule) -> None:
        self.masks[trainer.global_step] = {
            name: mask.clone() for name, mask in hard_masks(module.lm)
        }
        state = module.lm.state_dict().items()
        self.state[trainer.global_step] = {name: value.clone() for name, value in state}
        self.values[trainer.global_step] = dict(module.strategy.values)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._take(trainer, pl_module)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: torch.Tensor,
        batch_idx: int,
    ) -> None:
        self._take(trainer, pl_module)
        self.batches[trainer.global_step] = batch.clone()


def run(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    text: Path,
    folder: Path,
    callbacks: Sequence[Callback],
    strategy: str = "maskllm",
    steps: int = 6,
    **trainer: Any,
) -> tuple[Recorder, Snapshots]:
    """Train for some steps at a rate that moves the masks."""
    recorder, snapshots = Recorder(), Snapshots()
    train = str(text / "train.txt")
    data = sparsify.TextDataModule(train=train, validation=train, block_size=16, batch_size=4)
    settings = {
        "callbacks": [Annealing(), *callbacks, snapshots],
        "logger": recorder,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
        "default_root_dir": folder,
    }
    sparsify.sparsify(
        model,
        strategy,
        data,
        tokenizer,
        steps=steps,
        trainer=settings | trainer,
        optimizer=lambda params: torch.optim.Adam(params, lr=0.1),
    )
    return recorder, snapshots
