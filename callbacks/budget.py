"""Measures, in the place of a validation, and chooses the patterns that meet a budget."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from lightning.pytorch import Callback
from torch import Tensor

from sparsify.callbacks.evaluate_and_export import EvaluateAndExport, console
from sparsify.callbacks.find import find
from sparsify.callbacks.sensitivity import SPLIT, check
from sparsify.common.console import Progress, tracked
from sparsify.common.errors import SparsifyError
from sparsify.common.run_folder import run_folder
from sparsify.masking.select import decoder_blocks
from sparsify.models.token_batch import split_batch
from sparsify.results.budget import report
from sparsify.results.budget.bank import Bank
from sparsify.results.budget.goal import Goal
from sparsify.results.budget.measure import SCORES, Scores, spread
from sparsify.results.budget.prefix import Batch, Prefix
from sparsify.results.budget.search import Search
from sparsify.results.budget.units import Choice, make_units
from sparsify.results.result import describe_protocol
from sparsify.training.build import calibrate

T = TypeVar("T")
LEAST = 2  # windows: of one, no error can be told
MORE = 4  # times as many windows for a whole choice as for a change


class MeasureBudget(Callback):
    """Finds the choice that a goal asks for, and writes it to a new ``version_N`` in the run's
    folder, or to ``--output.folder``. What was measured is kept in the folder itself, for all.

    Args:
        goal: what is asked for.
        words: of the command line, for the command to run next.
    """

    def __init__(self, goal: Goal, words: Sequence[str]) -> None:
        self.goal, self.words = goal, words

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        check(trainer, pl_module)
        if trainer.world_size > 1:
            raise SparsifyError(
                f"{trainer.world_size} processes: a budget is measured by one; give "
                "--trainer.devices 1"
            )
        output = find(trainer, EvaluateAndExport)
        if output.folder is not None and not output.overwrite:
            report.check_free(Path(output.folder))

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if isinstance(trainer.progress_bar_callback, Progress):
            trainer.progress_bar_callback.finish()
        goal, masked, out = self.goal, pl_module.masked, console(trainer)
        own = find(trainer, EvaluateAndExport).folder
        root = Path(own) if own else run_folder(trainer)
        root.mkdir(parents=True, exist_ok=True)
        bank = Bank(masked, lambda: calibrate(pl_module, trainer))
        stored = masked.base.stored_dtype.itemsize
        units = make_units(masked.layers, goal, stored, pl_module.device)

        def watch(items: Sequence[T], title: str) -> Iterable[T]:
            return tracked(items, title, trainer)

        def losses(batch: Batch) -> Tensor:
            return _window_losses(trainer, pl_module, batch.to(pl_module.device))

        context = {
            "base": masked.base.hash,
            "dtype": pl_module.scored_dtype,
            "device": pl_module.device.type,
        }
        scores = Scores(root / SCORES, context, bank)
        blocks = decoder_blocks(masked.model)
        few = Prefix(blocks, self._windows(trainer, 1), losses)
        many = Prefix({}, self._windows(trainer, MORE), losses)  # whole choices: no block is equal
        if min(_count(few), _count(many)) < LEAST:
            raise SparsifyError(
                f"the validation text has {_count(many)} window(s), and a budget compares choices "
                f"over at least {LEAST}; give more text, or a smaller --data.block_size"
            )
        for pattern in goal.patterns:
            if pattern is not None:
                bank.add(pattern)

        def together(choice: Choice) -> Tensor:
            return scores(bank.calibrated(units.patterns(choice)), many)

        found = Search(
            units,
            goal,
            lambda choice: scores(bank.masks(units.patterns(choice)), few),
            lambda choice: scores(bank.masks(units.patterns(choice)), many),
            together,
            watch,
        ).run()
        text = trainer.datamodule.describe(SPLIT)
        about = {
            "protocol": describe_protocol(masked.base, pl_module.scored_dtype, text, SPLIT),
            "strategy": pl_module.strategy.describe(),
            "windows": {"changes": _count(few), "choices": _count(many)},
            "measured": scores.measured,
        }
        given = pl_module.selection.overrides.describe()
        folder = root if own else report.next_version(root)
        path = folder / report.OVERRIDES
        words = report.fit_words(self.words, folder)
        if masked.base.permutation is not None:  # fit would search orders for the chosen patterns
            masked.base.permutation.write(folder)
            words = [*report.without(words, "model.permute"), f"--model.permute={folder}"]
        report.write_overrides(path, units, found, goal, given)
        report.write_record(folder / report.RECORD, units, found, goal, about)
        title = f"{type(pl_module.strategy).__name__} on {masked.base.name}"
        limit = f"{goal.name} {goal.limit:g}"
        out.print(
            report.choice_table(units, found, f"{title}, {limit}: {SPLIT} text"),
            report.pattern_counts(units, found),
        )
        try:
            report.draw_frontier(folder / report.PICTURE, units, found, goal, f"{title}, {limit}")
        except ImportError:
            out.print(r"no figure, as Matplotlib is missing: pip install 'sparsify-llm\[plot]'")
        out.print(f"result in {folder}", soft_wrap=True)
        out.print(f"next: {report.next_command(words, path)}", soft_wrap=True, markup=False)

    def _windows(self, trainer: Any, more: int) -> list[Batch]:
        loaders = trainer.datamodule.val_dataloader()
        size = loaders[0].batch_size
        return spread((b for loader in loaders for b in loader), more * self.goal.windows, size)


def _count(prefix: Prefix) -> int:
    return sum(len(split_batch(batch)[0]) for batch in prefix.batches)


def _window_losses(trainer: Any, pl_module: Any, batch: Batch) -> Tensor:
    """The mean loss of each window over its targets, ``[B]``."""
    with trainer.precision_plugin.val_step_context():
        losses_BT = pl_module.window_losses(batch)
    _, targets_BT = split_batch(batch)
    if targets_BT is None:
        return losses_BT.double().mean(1)
    predicted = targets_BT[:, 1:]
    total: Tensor = losses_BT.double().masked_fill(~predicted, 0).sum(1)
    return total / predicted.sum(1)
