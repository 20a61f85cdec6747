"""Measures perplexity of texts under the hard masks."""

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

from sparsify.common.console import tracked
from sparsify.models.perplexity import PerplexityMeter, Score
from sparsify.models.token_batch import split_batch
from sparsify.training.guards import finite_scores


def measure(trainer: Any, pl_module: Any, batches: Mapping[str, Iterable[Any]]) -> dict[str, Score]:
    """The scores of named texts under the hard masks, in the trainer's precision; empty without
    texts.
    """
    meter = PerplexityMeter(batches, pl_module.device)
    for name, some in batches.items():
        for batch in some:
            batch = batch.to(pl_module.device)
            with trainer.precision_plugin.val_step_context():
                losses_BT = pl_module.window_losses(batch)
            tokens_BT, targets_BT = split_batch(batch)
            meter.update(name, losses_BT, targets_BT, tokens_BT)
    return finite_scores(meter, pl_module) if batches else {}


def measure_test(trainer: Any, pl_module: Any) -> dict[str, Score]:
    """The scores of the test texts."""
    data = trainer.datamodule
    data.setup("test")
    batches = zip(data.test_names, data.test_dataloader(), strict=True)
    return measure(trainer, pl_module, _watched(trainer, dict(batches)))


def measure_validation(trainer: Any, pl_module: Any) -> dict[str, Score]:
    """The scores of the validation texts, cut to the batches that Lightning's validation reads."""
    data, limit = trainer.datamodule, trainer.limit_val_batches
    batches = {
        name: islice(loader, limit if isinstance(limit, int) else int(limit * len(loader)))
        for name, loader in zip(data.validation_names, data.val_dataloader(), strict=True)
    }
    return measure(trainer, pl_module, _watched(trainer, batches))


def _watched(trainer: Any, batches: Mapping[str, Iterable[Any]]) -> dict[str, Iterable[Any]]:
    return {name: tracked(some, f"measuring {name}", trainer) for name, some in batches.items()}
