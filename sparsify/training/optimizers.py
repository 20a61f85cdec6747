"""The optimizer of what a strategy learns, and its learning rate's way."""

import math
from typing import Any

from torch.optim import AdamW, Optimizer

from sparsify.common.errors import SparsifyError
from sparsify.masking.schedule import Schedule
from sparsify.training.checkpoints.new_settings import OwnSchedule, keep_settings

ADAMW: dict[str, Any] = {"lr": 5e-4, "weight_decay": 0.1, "betas": [0.9, 0.95]}


def adamw(params: Any) -> Optimizer:
    """AdamW with the defaults of a run."""
    return AdamW(params, **ADAMW)


def configure(module: Any, params: list[Any], steps: float) -> dict[str, Any]:
    """What Lightning asks of ``configure_optimizers``.

    Args:
        module: the LightningModule.
        params: what is learned.
        steps: optimizer steps of the run.

    Raises:
        SparsifyError: the optimizer refuses its settings, or the run has no end.
    """
    try:
        optimizer = module.strategy.optimizer(params, module.masked.maskers, module.make_optimizer)
    except SparsifyError:
        raise
    except (ValueError, TypeError) as error:
        raise SparsifyError(
            f"the optimizer refuses its settings: {error}; mend --model.optimizer.init_args"
        ) from error
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
