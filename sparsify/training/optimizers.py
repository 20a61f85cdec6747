"""Makes the optimizer of what a strategy learns, and its learning-rate schedule."""

import math
from typing import Any

from torch.optim import AdamW, Optimizer

from sparsify.common.errors import SparsifyError
from sparsify.masking.masked_model import MaskedModel
from sparsify.masking.schedule import Schedule
from sparsify.training.checkpoints.new_settings import MakeOptimizer, OwnSchedule, keep_settings

ADAMW: dict[str, Any] = {"lr": 5e-4, "weight_decay": 0.1, "betas": [0.9, 0.95]}


def adamw(params: Any) -> Optimizer:
    """AdamW with this package's defaults."""
    return AdamW(params, **ADAMW)


def make(masked: MaskedModel, params: list[Any], factory: MakeOptimizer) -> Optimizer:
    """Make the optimizer of what a strategy learns.

    Args:
        masked: the model, which has the strategy and the maskers.
        params: the Parameters that are learned.
        factory: makes the optimizer that the user chose; a strategy may bring its own instead.

    Raises:
        SparsifyError: the optimizer refuses its settings.
    """
    try:
        return masked.strategy.optimizer(params, masked.maskers, factory)
    except SparsifyError:
        raise
    except (ValueError, TypeError) as error:
        raise SparsifyError(
            f"the optimizer refuses its settings: {error}; mend --model.optimizer.init_args"
        ) from error


def configure(module: Any, params: list[Any], steps: float) -> dict[str, Any]:
    """Make what ``configure_optimizers`` returns to Lightning.

    Args:
        module: the LightningModule.
        params: the Parameters that are learned.
        steps: how many optimizer steps the run takes.

    Raises:
        SparsifyError: the optimizer refuses its settings, or the run has no end.
    """
    optimizer = make(module.masked, params, module.make_optimizer)
    keep_settings(optimizer, module.make_optimizer)
    if not 1 <= steps < math.inf:
        raise SparsifyError(
            f"a run of {steps} optimizer steps: schedules need an end, at step 1 or later; "
            "give --trainer.max_steps"
        )
    decay = Schedule(1.0, module.lr_final, "cosine")

    def factor(step: int) -> float:
        warmup = min(1.0, (step + 1) / (module.warmup_steps + 1))
        return warmup * decay.at(step / steps)

    schedule = {"scheduler": OwnSchedule(optimizer, factor), "interval": "step"}
    return {"optimizer": optimizer, "lr_scheduler": schedule}
