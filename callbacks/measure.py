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
    """The scores of the test texts, cut to the batches that Lightning's test reads."""
    data = trainer.datamodule
    data.setup("test")
    batches = zip(data.test_names, data.test_dataloader(), strict=True)
    return measure(trainer, pl_module, _read(trainer, batches, trainer.limit_test_batches))


def measure_validation(trainer: Any, pl_module: Any) -> dict[str, Score]:
    """The scores of the validation texts, cut to the batches that Lightning's validation reads."""
    data = trainer.datamodule
    batches = zip(data.validation_names, data.val_dataloader(), strict=True)
    return measure(trainer, pl_module, _read(trainer, batches, trainer.limit_val_batches))


def _read(
    trainer: Any, loaders: Iterable[tuple[str, Any]], limit: int | float
) -> dict[str, Iterable[Any]]:
    """The first batches of each text, so many or this share of them; none of a text that has no
    batch left.
    """
    found: dict[str, Iterable[Any]] = {}
    for name, loader in loaders:
        whole = len(loader)
        count = min(limit, whole) if isinstance(limit, int) else int(limit * whole)
        if count:
            batches = loader if count == whole else islice(loader, count)
            found[name] = tracked(batches, f"measuring {name}", trainer)
    return found
