"""Ends a run: measures the model on the test text, and exports it."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console
from rich.table import Table

from sparsify.callbacks.checkpoints import Checkpoints
from sparsify.callbacks.find import find
from sparsify.callbacks.graceful_stop import GracefulStop
from sparsify.callbacks.history import History
from sparsify.callbacks.mask_logging import MaskLogging
from sparsify.callbacks.measure import measure_test
from sparsify.callbacks.throughput import Throughput, cost
from sparsify.common.console import Progress
from sparsify.common.errors import DiskFull, SparsifyError
from sparsify.common.files import full_disk, write_json
from sparsify.common.machine import cpu_name, device_name
from sparsify.common.printable import SafeConsole
from sparsify.common.ranks import together
from sparsify.common.run_folder import run_folder
from sparsify.common.seal import sealed
from sparsify.common.secrets import redacted
from sparsify.export.folder import export
from sparsify.export.target import check_target, check_writable
from sparsify.models.perplexity import Score, score_metrics
from sparsify.results.result import describe_protocol, make_result, pattern_text


class EvaluateAndExport(Callback):
    """After training, measures test perplexity under the hard masks, writes the result file, and
    exports the model. After ``validate`` and ``test``, writes the result file.

    Args:
        folder: where to export to; the default is ``export`` in the run's folder.
        overwrite: replace an earlier export there.
        enabled: False ends a run without evaluation and export.

    Attributes:
        exported: the folder of this run's export; None before it is written.
    """

    def __init__(
        self, folder: str | None = None, overwrite: bool = False, enabled: bool = True
    ) -> None:
        self.folder = folder
        self.overwrite = overwrite
        self.enabled = enabled
        self.exported: Path | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.exported = None
        # Refuse an existing folder before the work, not after it.
        if trainer.fast_dev_run or getattr(trainer, "sensing", False):
            return
        with together():
            if trainer.is_global_zero:
                check_writable(run_folder(trainer) / "result.json")
                if self.enabled and (stage == "fit" or _exporting(trainer)):
                    check_target(self._target(trainer), self.overwrite, pl_module.name_or_path)

    def _target(self, trainer: Any) -> Path:
        return Path(self.folder) if self.folder is not None else run_folder(trainer) / "export"

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.fast_dev_run:
            return
        find(trainer, Throughput).stop()  # its own on_train_end may come later
        pl_module.check_finite()  # as does the module's
        checkpoint, unsaved = _save(trainer)
        find(trainer, GracefulStop).end_at_once()  # all is saved
        try:
            if self.enabled:
                self._evaluate_and_export(trainer, pl_module)
        except SparsifyError as error:
            kept = f"the run is saved: sparsify export --ckpt_path {checkpoint}"
            lost = str(unsaved or "no checkpoint was asked for")
            raise SparsifyError(f"{error} ({kept if checkpoint else lost})") from error
        if unsaved:
            done = "exported all the same" if self.enabled else "lost since the former checkpoint"
            raise SparsifyError(f"{unsaved}; what was learned is {done}") from unsaved

    def _evaluate_and_export(self, trainer: Any, pl_module: Any) -> None:
        if isinstance(trainer.progress_bar_callback, Progress):
            trainer.progress_bar_callback.finish()
        # A run often ends within an epoch, after which Lightning would have validated.
        if pl_module.validated_at != trainer.global_step:
            find(trainer, History).measure(trainer, pl_module)
        self._finish(trainer, pl_module, "test", measure_test(trainer, pl_module))

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING and not getattr(trainer, "sensing", False):
            self._report(trainer, pl_module, "validation", pl_module.scores)

    def on_test_end(self, trainer: Any, pl_module: Any) -> None:
        if _exporting(trainer):
            self._finish(trainer, pl_module, "test", pl_module.scores)
        else:
            self._report(trainer, pl_module, "test", pl_module.scores)

    def _finish(self, trainer: Any, pl_module: Any, split: str, scores: dict[str, Score]) -> None:
        result = self._report(trainer, pl_module, split, scores)
        _log(trainer, split, scores, result)
        folder = self._target(trainer)
        record = {key: result[key] for key in ("date", "versions", "run", "protocol", "scores")}
        windows_BT, measuring = pl_module.test_windows(), pl_module.measuring
        export(pl_module.masked, folder, record, self.overwrite, windows_BT, measuring)
        self.exported = folder
        if trainer.is_global_zero:
            console(trainer).print(f"exported to {folder}", soft_wrap=True)

    def _report(
        self, trainer: Any, pl_module: Any, split: str, scores: dict[str, Score]
    ) -> dict[str, Any]:
        result = make_result(
            describe_run(trainer, pl_module),
            describe_protocol(
                pl_module.masked.base,
                pl_module.scored_dtype,
                trainer.datamodule.describe(split),
                split,
            ),
            scores,
        )
        result["history"] = {
            "validation": find(trainer, History).validations,
            "masks": find(trainer, MaskLogging).looks,
        }
        result["masks"] = find(trainer, MaskLogging).describe(pl_module)
        if trainer.is_global_zero:
            name = "result.json" if split == "test" else f"result-{split}.json"
            path = run_folder(trainer) / name
            unwritten = _unwritten(path, result)
            if scores:
                console(trainer).print(_table(result, scores))
            else:
                about = f"no {split} text was read, so nothing was measured; give --data.{split}"
                console(trainer).print(about, soft_wrap=True)
            if unwritten is None:
                console(trainer).print(f"result in {path}", soft_wrap=True)
            else:  # the export, on another disk maybe, still happens
                print(f"WARNING: {path} was not written: {unwritten}", file=sys.stderr)
        return result


def _log(trainer: Any, split: str, scores: dict[str, Score], result: dict[str, Any]) -> None:
    """Log the final numbers of a run, under the same names for every strategy."""
    names = ("tokens", "seconds", "peak_memory_gib")
    metrics = {f"run/{name}": float(result["run"][name]) for name in names}
    masks = result["masks"] or {}
    metrics |= {f"masks/{name}": value for name, value in masks.items() if name != "layers"}
    for logger in trainer.loggers:
        logger.log_metrics(metrics | score_metrics(split, scores), step=trainer.global_step)


def _unwritten(path: Path, result: dict[str, Any]) -> str | None:
    """Write a result; return None, or if the disk is full, the reason."""
    try:
        write_json(path, sealed(redacted(result)))
    except OSError as error:
        if full_disk(error) is None:
            raise
        return error.strerror or str(error)
    return None


def _exporting(trainer: Any) -> bool:
    return bool(getattr(trainer, "exporting", False))


def _save(trainer: Any) -> tuple[Path | None, DiskFull | None]:
    """Save the last state if the run keeps checkpoints; return its path, and the error if the disk
    is full.
    """
    try:
        callbacks = (c for c in trainer.callbacks if isinstance(c, Checkpoints))
        return next((c.save(trainer) for c in callbacks), None), None
    except DiskFull as error:
        return None, error


def describe_run(trainer: Any, pl_module: Any) -> dict[str, Any]:
    """Describe the run for a result file."""
    device, now = pl_module.device, cost(trainer, pl_module)
    distils = pl_module.distillation.needs_dense and pl_module.learns
    prunes = pl_module.strategy.effect.prunes
    permutation, searched = pl_module.masked.base.permutation, pl_module.searched
    return {
        "strategy": pl_module.strategy.describe(),
        "pattern": str(pl_module.selection.pattern) if prunes else "dense",
        "overrides": pl_module.selection.overrides.describe() if prunes else {},
        "sparsity": pl_module.masked.sparsity(),
        "coverage": pl_module.masked.coverage().describe(),
        "calibration": pl_module.calibrated,
        "distillation": asdict(pl_module.distillation) if distils else None,
        "seed": pl_module.seed,
        "steps": pl_module.steps if pl_module.learns else 0,
        "tokens": now["tokens"],
        "seconds": round(now["seconds"], 1),
        "peak_memory_gib": round(find(trainer, Throughput).peak_memory() / 2**30, 3),
        "device": device_name(device),
        **({"cpu": cpu_name(), "threads": torch.get_num_threads()} if device.type == "cpu" else {}),
        **({} if permutation is None else {"permutation": permutation.describe() | searched}),
        "processes": trainer.world_size,
        "command": _command(trainer),
    }


def _command(trainer: Any) -> str:
    """The command that made the record; if it is not ``fit``, costs come from the checkpoint."""
    return "export" if _exporting(trainer) else str(trainer.state.fn.value)


def _table(result: dict[str, Any], scores: dict[str, Score]) -> Table:
    strategy = result["run"]["strategy"]["class"].rpartition(".")[2]
    table = Table(
        title=f"{strategy} {pattern_text(result['run'])}: {result['protocol']['split']} perplexity"
    )
    table.add_column("text")
    for column in ("perplexity", "nats a token", "windows"):
        table.add_column(column, justify="right")
    for name, score in scores.items():
        table.add_row(name, f"{score.perplexity:.3f}", f"{score.loss:.4f}", str(score.windows))
    return table


def console(trainer: Any) -> Console:
    """A console that prints nothing if the trainer shows no progress."""
    return SafeConsole(quiet=trainer.progress_bar_callback is None)
