"""A few steps of training the tiny model, with all that is needed to take them again by hand.

Shapes: O out, I in, M group size.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from sparsify import Calibration, SparseCausalLM, SparsityStrategy, TextDataModule
from sparsify.callbacks.annealing import Annealing
from sparsify.training.build import calibrate
from tests.conftest import quiet_trainer, tiny_llama

Array = np.ndarray[Any, np.dtype[np.float64]]
WINDOWS = torch.randint(0, 64, (8, 16), generator=torch.Generator().manual_seed(1))
BETAS, EPS = (0.9, 0.95), 1e-8


class Steps(Callback):
    """Keeps the values before each step and after the last, and each step's gradients and batch."""

    def __init__(self) -> None:
        self.values: list[dict[str, Array]] = []
        self.gradients: list[dict[str, Array]] = []
        self.batches: list[Tensor] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.values.append(values(pl_module))
        self.gradients.append(
            {
                n: p.grad.double().numpy().copy()
                for n, p in pl_module.named_parameters()
                if p.grad is not None
            }
        )

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Tensor, batch_idx: int
    ) -> None:
        self.batches.append(batch)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.values.append(values(pl_module))


def values(module: SparseCausalLM) -> dict[str, Array]:
    """All Parameters in float64."""
    return {n: p.detach().double().numpy().copy() for n, p in module.named_parameters()}


def built(
    strategy: SparsityStrategy,
    tokenizer: PreTrainedTokenizerFast,
    model: PreTrainedModel | None = None,
    **options: Any,
) -> SparseCausalLM:
    """A module at its start."""
    options = {"calibration": Calibration(samples=8, cache=False)} | options
    module = SparseCausalLM.from_model(model or tiny_llama(), tokenizer, strategy, **options)
    module.configure_model()
    calibrate(module, windows=lambda: WINDOWS)
    return module


def sgd(lr: float) -> Callable[[Any], torch.optim.Optimizer]:
    """Plain gradient descent."""
    return lambda params: torch.optim.SGD(params, lr=lr)


def adamw(lr: float, weight_decay: float = 0.1) -> Callable[[Any], torch.optim.Optimizer]:
    """AdamW as the module has it by default."""
    return lambda params: torch.optim.AdamW(
        params, lr=lr, betas=BETAS, eps=EPS, weight_decay=weight_decay
    )


def train(module: SparseCausalLM, text: Path, folder: Path, steps: int = 4) -> Steps:
    """Train from where the module is."""
    taken = Steps()
    trainer = quiet_trainer(folder, max_steps=steps, callbacks=[Annealing(), taken])
    data = TextDataModule(train=str(text / "train.txt"), block_size=16, batch_size=4)
    trainer.fit(module, datamodule=data)
    assert len(taken.gradients) == steps
    return taken


def rate(lr: float, step: int, steps: int = 4) -> float:
    """The module's schedule: half a cosine to a tenth."""
    return lr * (0.1 + 0.45 * (1 + math.cos(math.pi * step / steps)))


class HandAdamW:
    """AdamW (Loshchilov and Hutter, 2019) for one Parameter, in float64."""

    def __init__(self, weight_decay: float = 0.1) -> None:
        self.weight_decay, self.t = weight_decay, 0
        self.m: Any = 0.0
        self.v: Any = 0.0

    def step(self, value: Array, gradient: Array, lr: float) -> Array:
        self.t += 1
        self.m = BETAS[0] * self.m + (1 - BETAS[0]) * gradient
        self.v = BETAS[1] * self.v + (1 - BETAS[1]) * gradient**2
        m, v = self.m / (1 - BETAS[0] ** self.t), self.v / (1 - BETAS[1] ** self.t)
        return value - lr * self.weight_decay * value - lr * m / (np.sqrt(v) + EPS)


def largest(weight_OI: Array, n: int = 2, m: int = 4) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """The mask of the n largest magnitudes, group by group; ties keep the lower index."""
    mask = np.zeros(weight_OI.shape, bool)
    for row in range(weight_OI.shape[0]):
        for start in range(0, weight_OI.shape[1], m):
            order = sorted(range(m), key=lambda i: (-abs(weight_OI[row, start + i]), i))
            mask[row, [start + i for i in order[:n]]] = True
    return mask
