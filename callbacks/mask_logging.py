"""Logs how the masks change during training."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor

from sparsify.callbacks.throughput import cost
from sparsify.common.errors import SparsifyError
from sparsify.masking.layer import masked_layers
from sparsify.masking.sharded_rows import mask_ranks, metrics, retained_norms
from sparsify.models.perplexity import mean_loss
from sparsify.models.token_batch import TokenBatch, split_batch

Ranks = Mapping[str, Tensor]
Table = dict[str, dict[str, Tensor]]
WHOLE = "whole model"


class MaskLogging(Callback):
    """Logs the following, every ``every_n_steps`` optimizer steps, per layer and over all layers:

    - ``flips``: the share of groups whose hard mask changed since the last log;
    - ``distance``: the share of groups whose hard mask differs from that at the start, the prior;
    - ``retained_norm``: the l1 norm of the kept weights, relative to that of the largest weights of
      every group (Fang et al. 2024, figure 6);
    - the masker's own metrics of its distribution, such as entropy and largest probability;
    - over all layers only, ``soft_hard_gap``: cross-entropy of the last batch's targets under its
      drawn mask, minus that under the hard mask, in nats.

    All are computed on the device and fetched in one transfer.

    Args:
        every_n_steps: optimizer steps between two logs.
        per_layer: also log each layer by itself.

    Attributes:
        looks: step, tokens, seconds and what was logged over all layers, for the result file.
    """

    def __init__(self, every_n_steps: int = 50, per_layer: bool = True) -> None:
        if every_n_steps < 1:
            raise SparsifyError(
                f"masks.every_n_steps is {every_n_steps}; it must be 1 or more: with more than the "
                "run has, masks are not logged"
            )
        self.every_n_steps = every_n_steps
        self.per_layer = per_layer
        self.looks: list[dict[str, float]] = []
        self._first: dict[str, Tensor] = {}
        self._last: dict[str, Tensor] = {}

    @torch.no_grad()
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        now = _ranks(pl_module)
        if not self._first:
            self._first = self._last = now
        if not _shapes(self._first) == _shapes(self._last) == _shapes(now):
            raise SparsifyError(
                "the checkpoint's callbacks.MaskLogging holds masks of other layers than this run "
                "has: it is damaged; resume from another checkpoint"
            )

    @torch.no_grad()
    def on_train_batch_end(
        self,
        trainer: Any,
        pl_module: Any,
        outputs: Any,
        batch: Tensor | TokenBatch,
        batch_idx: int,
    ) -> None:
        if trainer.global_step % self.every_n_steps or not pl_module.ends_step(batch_idx):
            return
        if not pl_module.learns or not self._first:
            return
        now = _ranks(pl_module)
        table = _table(pl_module, {"flips": (now, self._last), "distance": (now, self._first)})
        self._last = now
        if pl_module.task_loss is not None:
            # Computed like the loss of the step: over the targets only, at the same precision.
            with trainer.precision_plugin.forward_context():
                hard = mean_loss(pl_module.window_losses(batch), split_batch(batch)[1])
            table[WHOLE]["soft_hard_gap"] = pl_module.task_loss - hard
        for name, value in table[WHOLE].items():  # for the progress bar, and for early stopping
            pl_module.log(f"masks/{name}", value, prog_bar=name == "flips", logger=False)
        numbers = _fetch(table if self.per_layer else {WHOLE: table[WHOLE]})
        whole = numbers.pop(WHOLE)
        at = {"step": trainer.global_step, **cost(trainer, pl_module)}
        self.looks = [*(look for look in self.looks if look["step"] < at["step"]), at | whole]
        logged = {f"masks/{name}": value for name, value in whole.items()}
        for name, row in numbers.items():
            logged |= {f"layers/{name}/{metric}": value for metric, value in row.items()}
        for logger in trainer.loggers:
            # Straight to the loggers: Lightning would log them again at every step until the next.
            logger.log_metrics(logged, step=trainer.global_step - 1)

    @torch.no_grad()
    def describe(self, pl_module: Any) -> dict[str, Any] | None:
        """Metrics of the present masks for a result file: over all layers, and of each layer under
        ``layers``; None if nothing is masked.
        """
        if not masked_layers(pl_module.lm):
            return None
        moved = {"distance": (_ranks(pl_module), self._first)} if self._first else {}
        numbers = _fetch(_table(pl_module, moved))
        return {**numbers.pop(WHOLE), "layers": numbers}

    def state_dict(self) -> dict[str, Any]:
        return {"first": self._first, "last": self._last, "looks": self.looks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._first, self._last = state_dict["first"], state_dict["last"]
        self.looks = state_dict["looks"]


def _table(pl_module: Any, moved: Mapping[str, tuple[Ranks, Ranks]]) -> Table:
    """All metrics by layer, and over all layers under the key ``WHOLE``.

    Args:
        pl_module: the module.
        moved: two sets of masks for each metric name; their difference is the metric.
    """
    layers = masked_layers(pl_module.lm)
    norms, rows = retained_norms(layers), metrics(layers)
    table: Table = {
        name: {metric: _changed(now[name], then[name]) for metric, (now, then) in moved.items()}
        | {"retained_norm": _ratio(norms[name])}
        | rows[name]
        for name in layers
    }
    groups = {
        name: math.prod(layer.masker.shape) / layer.masker.pattern.m
        for name, layer in layers.items()
    }
    total, every = sum(groups.values()), list(table.values())
    whole = {}
    for metric in (m for m in every[0] if all(m in row for row in every)):
        parts = [row[metric] * (groups[name] / total) for name, row in table.items()]
        whole[metric] = torch.stack(parts).sum()
    whole["retained_norm"] = _ratio(torch.stack(list(norms.values())).sum(0))
    return table | {WHOLE: whole}


def _fetch(table: Table) -> dict[str, dict[str, float]]:
    """Fetch all numbers from the device in one transfer."""
    values = [value.float() for row in table.values() for value in row.values()]
    numbers = iter(torch.stack(values).tolist())
    return {name: {metric: next(numbers) for metric in row} for name, row in table.items()}


def _ratio(norms: Tensor) -> Tensor:
    return norms[0] / norms[1].clamp(min=torch.finfo(norms.dtype).tiny)


def _ranks(pl_module: Any) -> dict[str, Tensor]:
    """Each layer's hard mask as one rank per group: a quarter of a byte per weight for 2:4."""
    return {name: mask_ranks(layer) for name, layer in masked_layers(pl_module.lm).items()}


def _shapes(ranks: Mapping[str, Any]) -> dict[str, Any]:
    return {name: getattr(rank, "shape", None) for name, rank in ranks.items()}


def _changed(now: Tensor, before: Tensor) -> Tensor:
    return (now != before.to(now.device)).float().mean()
