"""Measures, after a validation, how much the masks of each decoder block cost."""

from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from rich.table import Table

from sparsify.callbacks.evaluate_and_export import console, describe_run
from sparsify.callbacks.measure import measure
from sparsify.common.console import Progress, tracked
from sparsify.common.errors import SparsifyError
from sparsify.common.files import write_json
from sparsify.common.run_folder import run_folder
from sparsify.models.perplexity import OVERALL, Score
from sparsify.results.plots import plot_sensitivity
from sparsify.results.result import describe_protocol, make_result, pattern_text
from sparsify.results.sensitivity import SENSITIVITY_SCHEMA, Sensitivity, measure_sensitivity

SPLIT = "validation"


class MeasureSensitivity(Callback):
    """Measures the cases of :mod:`sparsify.results.sensitivity` on the validation text, and writes
    them to ``sensitivity.json`` and ``sensitivity.png`` in the run's folder.
    """

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        check(trainer, pl_module)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if isinstance(trainer.progress_bar_callback, Progress):
            trainer.progress_bar_callback.finish()
        names = trainer.datamodule.validation_names
        loaders = trainer.datamodule.val_dataloader()

        def scores() -> dict[str, Score]:
            parts = zip(names, loaders, trainer.num_val_batches, strict=True)
            return measure(
                trainer, pl_module, {name: islice(some, int(n)) for name, some, n in parts}
            )

        def watch(cases: Sequence[frozenset[str]]) -> Iterable[frozenset[str]]:
            return tracked(cases, "measuring blocks", trainer)

        sensitivity = measure_sensitivity(pl_module.lm, scores, watch)
        if trainer.is_global_zero:
            _report(trainer, pl_module, sensitivity)


def check(trainer: Any, pl_module: Any) -> None:
    """Refuse what can be measured neither by block nor by layer.

    Raises:
        SparsifyError: the strategy masks nothing or changes base weights, or there is no text.
    """
    strategy = pl_module.strategy
    name = type(strategy).__name__
    if not strategy.effect.prunes:
        raise SparsifyError(
            f"{name} masks nothing, so there is nothing to measure; take another --strategy"
        )
    if strategy.effect.changes_base:
        raise SparsifyError(
            f"the base weights of {name} are {strategy.effect.weights}, so that a "
            "dense block would not be that of the base model; take a strategy that only "
            "chooses masks, or its setting for that"
        )
    if not trainer.datamodule.validation_names:
        raise SparsifyError(
            "there is no validation text, but blocks must not be chosen on the test text; "
            "give --data.validation FILE"
        )
    if not trainer.limit_val_batches:
        raise SparsifyError(
            f"limit_val_batches is {trainer.limit_val_batches}, so that nothing is measured; "
            "give --trainer.limit_val_batches a number above 0, or leave it out"
        )


def _report(trainer: Any, pl_module: Any, sensitivity: Sensitivity) -> None:
    result = make_result(
        describe_run(trainer, pl_module),
        describe_protocol(
            pl_module.masked.base, pl_module.scored_dtype, trainer.datamodule.describe(SPLIT), SPLIT
        ),
        sensitivity.pruned,
    )
    del result["scores"]
    path = run_folder(trainer) / "sensitivity.json"
    write_json(path, result | {"schema": SENSITIVITY_SCHEMA} | sensitivity.describe())
    title = f"{type(pl_module.strategy).__name__} {pattern_text(result['run'])}"
    title = f"{title} on {pl_module.masked.base.name}"
    out = console(trainer)
    out.print(_block_table(sensitivity, f"{title}: {SPLIT} perplexity"), _other_table(sensitivity))
    out.print(f"result in {path}", soft_wrap=True)
    _plot(sensitivity, f"{title}, {SPLIT} text", path.with_suffix(".png"), out)


def _plot(sensitivity: Sensitivity, title: str, path: Path, out: Any) -> None:
    try:
        plot_sensitivity(sensitivity, title, path)
    except ImportError:
        out.print(r"no figure, as Matplotlib is missing: pip install 'sparsify-llm\[plot]'")
    else:
        out.print(f"figure in {path}", soft_wrap=True)


def _block_table(sensitivity: Sensitivity, title: str) -> Table:
    table = Table(title=title)
    table.add_column("block", justify="right")
    for column in ("pruned alone", "nats more", "dense alone", "nats less"):
        table.add_column(column, justify="right")
    for number, block in enumerate(sensitivity.blocks):
        table.add_row(
            str(number),
            f"{block.alone_pruned[OVERALL].perplexity:.3f}",
            f"{block.loss_increase:.4f}",
            f"{block.alone_dense[OVERALL].perplexity:.3f}",
            f"{block.loss_decrease:.4f}",
        )
    return table


def _other_table(sensitivity: Sensitivity) -> Table:
    table = Table("kept dense")
    for column in ("perplexity", "nats less"):
        table.add_column(column, justify="right")
    for name, scores in {
        "none": sensitivity.pruned,
        **sensitivity.kept_dense,
        "all": sensitivity.dense,
    }.items():
        score = scores[OVERALL]
        less = sensitivity.pruned[OVERALL].loss - score.loss
        table.add_row(name, f"{score.perplexity:.3f}", f"{less:.4f}")
    return table
