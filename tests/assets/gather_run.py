"""Learn masks on two ranks that gather masked weights, and plainly under the same draws.

torchrun --nproc_per_node 2 gather_run.py FOLDER
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from torch.optim import SGD

import sparsify.training.module
from sparsify import SparseCausalLM, TextDataModule
from sparsify.callbacks.annealing import Annealing
from sparsify.common.ranks import leave_process_group
from sparsify.masking.distillation import Distillation
from sparsify.masking.in_place import InPlaceMomentum
from sparsify.masking.inject import hard_masks
from sparsify.masking.layer import masked_layers
from sparsify.masking.sharded_rows import whole
from sparsify.strategies.maskllm import MaskLLM
from sparsify.strategies.maskpro import MaskPro
from sparsify.strategies.selfmask import SelfMask
from sparsify.training.parallel.fsdp import Sharded
from tests.assets.shard_run import odd_llama
from tests.conftest import quiet_trainer, tiny_llama, word_tokenizer

STEPS = 6
#: by name: settings of the module, and of the Trainer
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "simple": ({}, {}),
    "clipped": ({"gradient_checkpointing": True}, {"gradient_clip_val": 0.01}),
    "accumulated": ({}, {"accumulate_grad_batches": 2}),
    "distilled": ({"distillation": Distillation(0.5)}, {}),
    "validated": ({}, {"val_check_interval": 2, "limit_val_batches": 1}),
    "odd rows": ({"exclude": "*down_proj"}, {}),
    "mean mask": ({"optimizer": partial(SGD, lr=1.0)}, {}),
    "bf16": ({}, {}),
    "own": ({}, {"accumulate_grad_batches": 2}),
    "in place": ({"optimizer": partial(InPlaceMomentum, lr=0.01)}, {"accumulate_grad_batches": 2}),
}


class Traffic:
    """Counts the bytes of the tensors that collectives gather, and reduce."""

    def __init__(self) -> None:
        self.bytes = {"gather": 0, "reduce": 0}
        # The first names are of torch 2.13, the second of those before.
        for kind, size, names in (
            ("gather", "output_tensor", ("all_gather_single", "all_gather_into_tensor")),
            ("reduce", "input", ("reduce_scatter_single", "reduce_scatter_tensor")),
        ):
            name = next(name for name in names if hasattr(dist, name))
            setattr(dist, name, self.counted(kind, size, getattr(dist, name)))

    def counted(self, kind: str, size: str, call: Any) -> Any:
        def count(*args: Any, **kwargs: Any) -> Any:
            self.bytes[kind] += (kwargs[size] if size in kwargs else args[kind == "reduce"]).nbytes
            return call(*args, **kwargs)

        return count


class Note(Callback):
    """Keeps what was learned at the end."""

    def on_train_end(self, trainer, module) -> None:  # type: ignore[no-untyped-def]
        self.learned = {
            f"{name}.{key}": whole(p).clone()
            for name, layer in masked_layers(module.lm).items()
            for key, p in layer.masker.named_parameters()
        }
        self.masks = dict(hard_masks(module.lm))
        self.loss = float(module.task_loss)
        self.left = [
            name
            for name, p in module.lm.named_parameters()
            if ".masker." not in name and p.grad is not None
        ]


def run(gather: str, name: str, text: Path, traffic: Traffic) -> dict[str, Any]:
    """One case; what is learned, and the bytes of its steps."""
    options, settings = CASES[name]
    model = odd_llama() if name == "odd rows" else tiny_llama()
    if name == "bf16":
        model = model.bfloat16()
    strategy = MaskLLM(prior="magnitude")
    if name == "own":
        strategy = SelfMask("magnitude", lr=0.02)
    if name == "mean mask":
        strategy = MaskPro(prior="magnitude", strength=1.0, estimator="mean_gradient")
    module = SparseCausalLM.from_model(model, word_tokenizer(), strategy, gather=gather, **options)
    note = Note()
    data = TextDataModule(
        train=str(text), validation=str(text), block_size=16, batch_size=2, eval_batch_size=4
    )
    trainer = quiet_trainer(
        text.parent,
        devices=2,
        strategy=Sharded(),
        max_steps=STEPS,
        callbacks=[Annealing(), note],
        **settings,
    )
    before = dict(traffic.bytes)
    trainer.fit(module, datamodule=data)
    moved = {kind: count - before[kind] for kind, count in traffic.bytes.items()}
    return {
        "learned": note.learned,
        "masks": note.masks,
        "loss": note.loss,
        "left": note.left,
        "moved": moved,
    }


def main(folder: str) -> None:
    torch.set_num_threads(1)
    traffic = Traffic()
    # The plain way, but under one draw for all ranks.
    own = sparsify.training.module.data_parallel
    out: dict[str, Any] = {}
    for name in CASES:
        for gather in ("plain", "masked"):
            sparsify.training.module.data_parallel = (
                (lambda _: (0, 1)) if gather == "plain" else own
            )
            out[f"{gather} {name}"] = run(gather, name, Path(folder) / "train.txt", traffic)
    torch.save(out, Path(folder) / f"rank.{dist.get_rank()}")
    leave_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
