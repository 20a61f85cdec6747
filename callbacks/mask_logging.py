"""Shows how the masks move."""

from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor

from sparsify.distributed.rows import mask_ranks, metrics
from sparsify.inject import masked_layers


class MaskLogging(Callback):
    """Logs, every ``every_n_steps`` optimizer steps, per layer and over all:

    - ``flips``: the share of groups whose hard mask changed since the last look;
    - ``distance``: the share of groups whose hard mask differs from the one at the start, the
      prior;
    - what the masker tells of its distribution, such as entropy and largest probability;
    - over all only, ``soft_hard_gap``: loss of the last batch under its draw minus under the hard
      mask, nats.

    All are computed on the device and fetched together, once a look.

    Args:
        every_n_steps: optimizer steps between two looks.
        per_layer: also log each layer by itself.
    """

    def __init__(self, every_n_steps: int = 50, per_layer: bool = True) -> None:
        self.every_n_steps = every_n_steps
        self.per_layer = per_layer
        self._first: dict[str, Tensor] = {}
        self._last: dict[str, Tensor] = {}

    @torch.no_grad()
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if not self._first:
            self._first = self._last = _ranks(pl_module)

    @torch.no_grad()
    def on_train_batch_end(
        self,
        trainer: Any,
        pl_module: Any,
        outputs: Any,
        batch: Tensor,
        batch_idx: int,
    ) -> None:
        if trainer.global_step % self.every_n_steps or not pl_module.ends_step(batch_idx):
            return
        if not pl_module.learns or not self._first:
            return
        now = _ranks(pl_module)
        table = {
            name: {
                "flips": _changed(now[name], self._last[name]),
                "distance": _changed(now[name], self._first[name]),
            }
            for name in now
        }
        for name, row in metrics(masked_layers(pl_module.lm)).items():
            table[name] |= row
        self._last = now
        weights = {name: ranks.numel() for name, ranks in now.items()}
        total = sum(weights.values())
        found: dict[str, Tensor] = {}
        for metric in next(iter(table.values())):
            shares = (row[metric] * (weights[name] / total) for name, row in table.items())
            found[f"masks/{metric}"] = torch.stack(list(shares)).sum()
        if pl_module.task_loss is not None:
            hard = pl_module.window_losses(batch).mean()
            found["masks/soft_hard_gap"] = pl_module.task_loss - hard
        for name, value in found.items():  # for the progress bar, and callbacks that stop a run
            pl_module.log(name, value, prog_bar=name == "masks/flips", logger=False)
        if self.per_layer:
            for name, row in table.items():
                found |= {f"layers/{name}/{metric}": value for metric, value in row.items()}
        if trainer.loggers:
            # Straight to the loggers, once: Lightning would repeat them until the next look.
            numbers = torch.stack([value.float() for value in found.values()]).tolist()
            for logger in trainer.loggers:
                logger.log_metrics(
                    dict(zip(found, numbers, strict=True)), step=trainer.global_step - 1
                )

    def state_dict(self) -> dict[str, Any]:
        return {"first": self._first, "last": self._last}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._first, self._last = state_dict["first"], state_dict["last"]


def _ranks(pl_module: Any) -> dict[str, Tensor]:
    """Each layer's hard mask as a rank a group: a quarter of a byte a weight for 2:4."""
    return {name: mask_ranks(layer) for name, layer in masked_layers(pl_module.lm).items()}


def _changed(now: Tensor, before: Tensor) -> Tensor:
    return (now != before.to(now.device)).float().mean()
