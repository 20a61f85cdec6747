"""Learn masks from draws in one process or in several: all cases in one launch.

torchrun --nproc_per_node 2 population_run.py TEXT OUT
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparsify import SparseCausalLM, TextDataModule
from sparsify.common.ranks import leave_process_group
from sparsify.masking.inject import hard_masks
from sparsify.masking.layer import masked_layers
from sparsify.masking.registry import make_strategy
from sparsify.masking.sharded_rows import whole
from tests.conftest import quiet_trainer, word_tokenizer
from tests.tiny_models import FAMILIES

# Micro-batches whose traffic is counted; every operation is slower under its eyes.
COUNTED = range(2, 4)


@dataclass(frozen=True)
class Case:
    """One run; ``accumulate`` micro-batches a step on each rank."""

    parallel: str
    estimator: str
    steps: int
    accumulate: int = 1
    family: str = "llama"
    include: str | None = None

    def __str__(self) -> str:
        return f"{self.parallel} {self.estimator} {self.family} {self.include or ''}".rstrip()


CASES = [
    Case("ddp", "residual", 100),
    Case("ddp", "leave_one_out", 10, accumulate=2),
    Case("ddp", "control_variate", 2, accumulate=2),
    Case("ddp", "mean_gradient", 10),
    # With the output head, which belongs to no decoder block.
    Case("fsdp", "residual", 20, include="*"),
    Case("fsdp", "leave_one_out", 5, family="gpt2"),
    Case("fsdp", "control_variate", 20),
    Case("fsdp", "mean_gradient", 20),
]


class Traffic(TorchDispatchMode):
    """Counts the bytes of all tensors that collectives are given, to send or to fill."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.namespace == "c10d":
            tensors = [x for x in tree_leaves(args) if isinstance(x, torch.Tensor)]
            self.bytes += sum(x.nbytes for x in tensors)
        return func(*args, **kwargs or {})


class Watch(Callback):
    """Keeps what was logged and learned, and counts what the steps sent."""

    def __init__(self) -> None:
        self.traffic: list[int] = []
        self.found: dict[str, Any] = {}

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:  # type: ignore[no-untyped-def]
        if batch_idx in COUNTED:
            self.mode = Traffic()
            self.mode.__enter__()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:  # type: ignore[no-untyped-def]
        if batch_idx in COUNTED:
            self.mode.__exit__(None, None, None)
            self.traffic.append(self.mode.bytes)
            list(hard_masks(module.lm))  # as callbacks do: what was gathered is sharded again

    def on_train_end(self, trainer, module) -> None:  # type: ignore[no-untyped-def]
        average = module.strategy.average
        self.found = {
            "logits": {
                name: whole(layer.masker.logits_OI).clone()
                for name, layer in masked_layers(module.lm).items()
            },
            "masks": dict(hard_masks(module.lm)),
            "average": [] if average is None else average.sums.tolist(),
            "logged": {
                name: float(value)
                for name, value in trainer.callback_metrics.items()
                if "advantage" in name
            },
            "traffic": self.traffic,
        }


def learn(case: Case, text: str, folder: Path, ranks: int = 1) -> dict[str, Any]:
    """What this process ends with; alone it goes through the micro-batches of two."""
    strategy = make_strategy("maskpro", estimator=case.estimator, prior="magnitude", strength=2.0)
    strategy.lr = 10.0
    model = FAMILIES[case.family]()
    module = SparseCausalLM.from_model(
        model,
        word_tokenizer(),
        strategy,
        include=case.include,
        optimizer=lambda params: torch.optim.SGD(params, lr=20.0),
    )
    watch = Watch()
    trainer = quiet_trainer(
        folder,
        devices=ranks,
        strategy="auto" if ranks == 1 else case.parallel,
        accumulate_grad_batches=case.accumulate * (2 if ranks == 1 else 1),
        max_steps=case.steps,
        max_epochs=-1,
        log_every_n_steps=1000,
        callbacks=[watch],
    )
    trainer.fit(module, datamodule=TextDataModule(train=text, block_size=16, batch_size=1))
    return watch.found


def main(text: str, out: str) -> None:
    torch.set_num_threads(1)
    found = {str(case): learn(case, text, Path(out).parent, ranks=2) for case in CASES}
    torch.save(found, f"{out}.{torch.distributed.get_rank()}")
    leave_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
