"""Adds to a run in Weights & Biases what is not a metric: keys to group runs by, a table of layers,
and the masks or the model as an artifact.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.trainer.states import TrainerFn

from sparsify.calibration.prior import SavedMasks
from sparsify.callbacks.evaluate_and_export import EvaluateAndExport
from sparsify.common.files import read_json
from sparsify.common.run_folder import run_folder
from sparsify.data.splits import Split
from sparsify.export.manifest import MANIFEST, read_manifest
from sparsify.export.mask_file.file import read_masks
from sparsify.export.mask_file.index import FILE_NAME
from sparsify.masking.registry import short_name, strategy_name
from sparsify.models.layer_names import block_and_kind, block_number
from sparsify.results.result import describe_protocol, pattern_text

RESULT = "result.json"
SHORT = 12  # how many digits of a hash are shown


class WandbRecord(Callback):
    """If the run logs to Weights & Biases, adds at its start keys to group and filter runs by, and
    after an export a table of the layers and an artifact of type ``model``.

    Args:
        artifact: what to upload of an export: its ``masks`` and manifest, the ``full`` folder with
            all weights (both with the result file), or ``none``.
    """

    def __init__(self, artifact: Literal["masks", "full", "none"] = "masks") -> None:
        self.artifact = artifact

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self._start(trainer, pl_module, "test")

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        self._start(trainer, pl_module, "test")

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._start(trainer, pl_module, "validation")

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._finish(trainer)

    def on_test_end(self, trainer: Any, pl_module: Any) -> None:
        self._finish(trainer)

    def _start(self, trainer: Any, pl_module: Any, split: Split) -> None:
        run = wandb_run(trainer)
        if run is None:
            return
        keys = describe_for_groups(trainer, pl_module, split)
        run.config.update(keys, allow_val_change=True)
        tags = (keys["strategy"], keys["pattern"])
        run.tags = tuple(dict.fromkeys([*(run.tags or ()), *tags]))
        for metric in ("val/perplexity", "val/loss"):
            # The last value is that of the exported model; the lowest shows if it was once better.
            run.define_metric(metric, step_metric="trainer/global_step", summary="min,last")

    def _finish(self, trainer: Any) -> None:
        run = wandb_run(trainer)
        folder = next(
            (c.exported for c in trainer.callbacks if isinstance(c, EvaluateAndExport)), None
        )
        if run is None or folder is None:
            return
        path = run_folder(trainer) / RESULT
        result: dict[str, Any] = read_json(path)
        if layers := (result.get("masks") or {}).get("layers"):
            _log_layers(run, layers, trainer.global_step)
        if self.artifact != "none":
            _log_artifact(run, folder, path, result, self.artifact == "full")


def wandb_run(trainer: Any) -> Any | None:
    """The Weights & Biases run of rank zero; None on other ranks, or without such a logger."""
    if not trainer.is_global_zero:
        return None
    loggers = (logger for logger in trainer.loggers if isinstance(logger, WandbLogger))
    logger = next(loggers, None)
    return None if logger is None else logger.experiment


def describe_for_groups(trainer: Any, pl_module: Any, split: Split) -> dict[str, Any]:
    """The flat keys by which runs are grouped and filtered, and the whole protocol.

    Two runs with the same ``protocol`` used the same base model and text, and measured alike.
    """
    strategy = pl_module.strategy
    protocol = describe_protocol(
        pl_module.masked.base, pl_module.scored_dtype, trainer.datamodule.describe(split), split
    )
    fits = trainer.state.fn == TrainerFn.FITTING  # fit measures whole texts at its end
    limit = "limit_test_batches" if split == "test" else "limit_val_batches"
    protocol["limit_batches"] = 1.0 if fits else getattr(trainer, limit)
    overrides = pl_module.selection.overrides.describe()
    pattern = pattern_text({"pattern": str(pl_module.selection.pattern), "overrides": overrides})
    return {
        "strategy": strategy_name(type(strategy)),
        "pattern": pattern if strategy.effect.prunes else "dense",
        "weights": strategy.effect.weights,
        "seed": pl_module.seed,
        **_keys_of_protocol(protocol),
        "lineage": describe_lineage(trainer, strategy),
    }


def keys_of_result(result: Mapping[str, Any]) -> dict[str, Any]:
    """The same keys, but for the lineage, of a run of ``fit`` that has ended, from its result."""
    run, protocol = result["run"], dict(result["protocol"])
    del protocol["windows"]  # the rest says how many there are
    return {
        "strategy": short_name(run["strategy"]["class"]),
        "pattern": pattern_text(run),
        "weights": run["strategy"]["weights"],
        "seed": run["seed"],
        **_keys_of_protocol(protocol | {"limit_batches": 1.0}),
    }


def _keys_of_protocol(protocol: Mapping[str, Any]) -> dict[str, Any]:
    base, text = protocol["base"], json.dumps(protocol, sort_keys=True)
    return {
        "base": base["name"],
        "base_hash": base["hash"][:SHORT],
        "protocol": hashlib.sha256(text.encode()).hexdigest()[:SHORT],
        "protocol_detail": protocol,
    }


def describe_lineage(trainer: Any, strategy: Any) -> dict[str, str]:
    """What the run starts from: a checkpoint, as ``logger/run/checkpoints/file``, and saved masks
    with their digest.
    """
    lineage = {}
    if trainer.ckpt_path:
        lineage["checkpoint"] = "/".join(Path(trainer.ckpt_path).parts[-4:])
    for part in strategy.modules():
        if isinstance(part, SavedMasks):
            lineage |= {"masks": part.path, "masks_digest": part.digest}
    return lineage


def layer_table(
    layers: Mapping[str, Mapping[str, float]],
) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of a table of layers.

    Args:
        layers: the metrics by qualified layer name; a layer may lack some.

    Returns:
        The columns ``block`` (its number; None outside the blocks), ``kind``, ``layer`` and one for
        each metric; and a row for each layer.
    """
    metrics = list(dict.fromkeys(metric for row in layers.values() for metric in row))
    rows: list[list[Any]] = []
    for layer, row in layers.items():
        _, kind = block_and_kind(layer)
        rows.append([block_number(layer), kind, layer, *(row.get(metric) for metric in metrics)])
    return ["block", "kind", "layer", *metrics], rows


def _log_layers(run: Any, layers: Mapping[str, Mapping[str, float]], step: int) -> None:
    import wandb

    columns, rows = layer_table(layers)
    table = wandb.Table(columns=[*columns], data=rows)
    run.log({"layers": table, "trainer/global_step": step})


def _log_artifact(
    run: Any, folder: Path, result_file: Path, result: Mapping[str, Any], full: bool
) -> None:
    import wandb

    metadata = _describe_export(folder, result)
    config = dict(run.config)
    name = "-".join(str(config[key]) for key in ("base", "strategy", "pattern"))
    artifact = wandb.Artifact(
        re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII)[:128], type="model", metadata=metadata
    )
    artifact.add_file(str(result_file), name=RESULT)
    if full:  # uploaded from its place: a copy of all weights would fill the disk
        artifact.add_dir(str(folder), policy="immutable", skip_cache=True)
    else:
        for file in (folder / MANIFEST, folder / FILE_NAME):
            if file.is_file():  # a dense model has no masks
                artifact.add_file(str(file))
    aliases = ["latest", run.id, *([metadata["digest"][:SHORT]] if metadata["digest"] else [])]
    run.log_artifact(artifact, aliases=aliases)


def _describe_export(folder: Path, result: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata by which an export can be found again."""
    manifest = read_manifest(folder)
    masks = folder / FILE_NAME
    index = read_masks(masks).index if masks.is_file() else None
    return {
        "base": manifest["base"]["name"],
        "base_hash": manifest["base"]["hash"],
        "pattern": result["run"]["pattern"],
        "overrides": result["run"]["overrides"],
        "dtype": manifest["dtype"],
        "digest": "" if index is None else index.digest,
        "lineage": manifest["strategy"],
        "protocol": result["protocol"],
        "scores": result["scores"],
    }
