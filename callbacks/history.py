"""Records the validations of a run for its result file, whatever logger it has."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback

from sparsify.callbacks.measure import measure_validation
from sparsify.callbacks.throughput import cost
from sparsify.models.perplexity import OVERALL, Score, score_metrics


class History(Callback):
    """Records the perplexity of every validation, with what training had cost by then.

    ``--trainer.val_check_interval`` sets how often a run validates.

    Args:
        at_start: also validate before the first step, under the masks that learning starts from.

    Attributes:
        validations: step, tokens, seconds, loss and perplexity over all texts, in the order of
            measurement.
    """

    def __init__(self, at_start: bool = False) -> None:
        self.at_start = at_start
        self.validations: list[dict[str, Any]] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if self.at_start and trainer.global_step == 0 and pl_module.learns:
            self.measure(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.state.fn == "fit":
            # In one entry with the perplexity, so that dashboards can draw one over the other.
            for name, value in cost(trainer, pl_module).items():
                pl_module.log(f"run/{name}", float(value))

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        # A sanity check reads a few batches only.
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._add(trainer, pl_module, pl_module.scores)

    def measure(self, trainer: Any, pl_module: Any) -> None:
        """Measure the validation texts, if the run has any, and log the scores."""
        if not trainer.limit_val_batches or not trainer.datamodule.validation_names:
            return
        scores = measure_validation(trainer, pl_module)
        metrics = score_metrics("val", scores)
        metrics |= {f"run/{name}": value for name, value in cost(trainer, pl_module).items()}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)
        self._add(trainer, pl_module, scores)

    def _add(self, trainer: Any, pl_module: Any, scores: Mapping[str, Score]) -> None:
        if OVERALL not in scores:
            return
        score, step = scores[OVERALL], trainer.global_step if pl_module.learns else 0
        numbers = {"loss": score.loss, "perplexity": score.perplexity}
        former = [row for row in self.validations if row["step"] < step]
        self.validations = [*former, {"step": step, **cost(trainer, pl_module), **numbers}]

    def state_dict(self) -> dict[str, Any]:
        return {"validations": self.validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.validations = state_dict["validations"]
