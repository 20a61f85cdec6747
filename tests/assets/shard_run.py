"""Learn masks of a tiny model in one process or in several, and save what was learned.

torchrun --nproc_per_node 2 shard_run.py STRATEGY TEXT OUT
"""

import os
import sys
from pathlib import Path

import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import ModelParallelStrategy

from sparsify import SparseCausalLM, TextDataModule
from sparsify.callbacks.annealing import Annealing
from sparsify.inject import hard_masks, whole_layers
from sparsify.registry import make_strategy
from sparsify.trainer import leave_process_group
from tests.conftest import quiet_trainer, tiny_llama, word_tokenizer


class Save(Callback):
    """Writes the whole logits, the hard masks and the losses of the run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.losses: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:  # type: ignore[no-untyped-def]
        if module.learns:
            self.losses.append(module.task_loss)

    def on_train_end(self, trainer, module) -> None:  # type: ignore[no-untyped-def]
        learned = {
            f"{name}.{key}": p.detach().clone()
            for name, layer in whole_layers(module.lm)
            for key, p in layer.masker.named_parameters()
        }
        masks = dict(hard_masks(module.lm))
        out = {"learned": learned, "masks": masks, "losses": torch.tensor(self.losses)}
        torch.save(out, f"{self.path}.{trainer.global_rank}")


def main(strategy: str, text: str, out: str) -> None:
    torch.set_num_threads(1)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    module = SparseCausalLM.from_model(tiny_llama(), word_tokenizer(), make_strategy(strategy))
    trainer = quiet_trainer(
        Path(out).parent,
        devices=ranks,
        strategy=ModelParallelStrategy(data_parallel_size=ranks, tensor_parallel_size=1)
        if ranks > 1
        else "auto",
        accumulate_grad_batches=1 if ranks > 1 else 2,
        max_steps=5,
        callbacks=[Annealing(), Save(Path(out))],
    )
    trainer.fit(module, datamodule=TextDataModule(train=text, block_size=16, batch_size=2))
    leave_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
