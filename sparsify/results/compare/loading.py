"""Finds and reads the results of runs."""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from sparsify.common.errors import SparsifyError
from sparsify.common.seal import KEY, is_altered
from sparsify.common.values import LARGEST_NUMBER
from sparsify.export.manifest import MANIFEST
from sparsify.results.result import RESULT_SCHEMA, UNSEALED_SCHEMA, check, check_plain
from sparsify.results.sensitivity import SENSITIVITY_SCHEMA
from sparsify.training.checkpoints.files import FOLDER

RESULT = "result.json"
CONFIG = "config.yaml"
SENSITIVITY = "sensitivity.json"
# The entries of a run's record that decide its masks.
MASKS = ("strategy", "pattern", "overrides", "distillation", "seed", "steps")


@dataclass(frozen=True)
class Run:
    """One result file.

    Attributes:
        path: the file's path.
        result: its content.
        config: the settings of the command line, from the config file beside it; None if there is
            none, or it cannot be read.
        sensitivity: the sensitivity of its masks, block by block, if it was measured.
    """

    path: Path
    result: dict[str, Any]
    config: dict[str, Any] | None
    sensitivity: dict[str, Any] | None = None

    @property
    def record(self) -> dict[str, Any]:
        """What was done."""
        return self.result["run"]

    @property
    def protocol(self) -> dict[str, Any]:
        """How it was measured."""
        return self.result["protocol"]

    @property
    def calibration(self) -> dict[str, Any]:
        """The record of its calibration; empty if there was none."""
        return self.record.get("calibration") or {}

    @property
    def is_fit(self) -> bool:
        """Whether ``sparsify fit`` wrote it, rather than a later measurement or export of that run.

        Older results do not say; one that began from a checkpoint does not count as a fit.
        """
        command = self.record.get("command")
        return command == "fit" if command else self.told("ckpt_path") is None

    def told(self, path: str) -> Any:
        """A setting of the configuration by its dotted path; None if it has no such setting."""
        value: Any = self.config
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def losses(self) -> dict[str, float]:
        """The loss of every text, and overall, nats a token."""
        return {text: score["loss"] for text, score in self.result["scores"].items()}


def load_runs(paths: Iterable[Path]) -> tuple[list[Run], list[str]]:
    """All results below some paths, with what ``sparsify sensitivity`` left there of the same
    masks, and remarks on what is amiss; a file that is named twice is read once.

    Args:
        paths: result files, run folders, or folders of runs.

    Raises:
        SparsifyError: a path holds no result, or a file is not one.
    """
    files: dict[Path, Path] = {}
    sensitivities: list[dict[str, Any]] = []
    open_ended: dict[Path, Path] = {}
    for path in paths:
        found = [path] if path.is_file() else sorted(_below(path, RESULT))
        sensitivities += map(_read_sensitivity, sorted(_below(path, SENSITIVITY)))
        if not found:
            reason = f"holds no {RESULT}" if path.is_dir() else "does not exist"
            raise SparsifyError(
                f"{path} {reason}; name the folder of a run that has ended, or one that holds some"
            )
        for file in found:
            files.setdefault(file.resolve(), file)
        for checkpoints in sorted(_below(path, FOLDER)):
            folder = checkpoints.parent
            if not (folder / RESULT).exists() and any(checkpoints.glob("*")):
                open_ended.setdefault(folder.resolve(), folder)
    runs = [_read(file) for file in files.values()]
    own = (next((s for s in sensitivities if _same_masks(s, run)), None) for run in runs)
    runs = [replace(run, sensitivity=found) for run, found in zip(runs, own, strict=True)]
    return runs, [*_unreadable(runs), *_interrupted(runs, open_ended)]


def _below(folder: Path, name: str) -> Iterator[Path]:
    """The files and folders of this name, outside of exports."""
    for place, folders, files in os.walk(folder):
        if MANIFEST in files:  # an export: what lies in it is a model's
            folders.clear()
        elif name in files or name in folders:
            yield Path(place) / name


def _unreadable(runs: Sequence[Run]) -> list[str]:
    files = [run.path.with_name(CONFIG) for run in runs if run.config is None]
    return [
        f"{file} cannot be read as settings, and counts as missing."
        for file in files
        if file.exists()
    ]


def _interrupted(runs: Sequence[Run], folders: Mapping[Path, Path]) -> list[str]:
    """Remarks on runs without a result, except those that another run here resumed."""
    fits = [run for run in runs if run.record.get("command") in (None, "fit")]
    origins = [Path(str(path)).resolve() for run in fits if (path := run.told("ckpt_path"))]
    return [
        f"{folder} has checkpoints but no {RESULT}: it did not end, or wrote none; go on "
        f"with `sparsify fit --ckpt_path {folder}`."
        for place, folder in folders.items()
        if not any(origin.is_relative_to(place) for origin in origins)
    ]


def _read_sensitivity(file: Path) -> dict[str, Any]:
    """The file's content; empty if it is unusable, since a comparison does not depend on it."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        check_plain(content)
        _ = content["protocol"]["base"]["hash"], content["run"].get
        _ = [(block["loss_increase"], block["loss_decrease"]) for block in content["blocks"]]
        return content if content["schema"] == SENSITIVITY_SCHEMA else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _same_masks(sensitivity: Mapping[str, Any], run: Run) -> bool:
    """Whether the measurement was of this run's masks and base model."""
    if not sensitivity or sensitivity["protocol"]["base"]["hash"] != run.protocol["base"]["hash"]:
        return False
    return all(sensitivity["run"].get(key) == run.record.get(key) for key in MASKS)


def _read(file: Path) -> Run:
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SparsifyError(
            f"{file} cannot be read ({error}); name a run's {RESULT} or its folder"
        ) from error
    schema = result.get("schema") if isinstance(result, dict) else None
    if schema not in (RESULT_SCHEMA, UNSEALED_SCHEMA):
        raise SparsifyError(
            f"{file} is no result: its schema is {schema!r} instead of {RESULT_SCHEMA!r}; name a "
            f"run's {RESULT} or its folder"
        )
    try:
        if is_altered(result) or (schema == RESULT_SCHEMA and KEY not in result):
            raise SparsifyError(
                f"{file} is not as it was written: its hash is of other content, or gone; write it "
                "again with `sparsify export --ckpt_path FILE`, or leave this run out"
            )
        check(result)
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SparsifyError(
            f"{file} lacks what a result holds ({type(error).__name__}: {error}); write it again "
            "with `sparsify export --ckpt_path FILE`"
        ) from error
    for text, score in result["scores"].items():
        if not (0 <= score["loss"] < math.inf and 0 <= score["perplexity"] <= LARGEST_NUMBER):
            raise SparsifyError(
                f"{file}: the loss of {text} is {score['loss']} and its perplexity "
                f"{score['perplexity']}, and what is negative or not a finite number cannot be "
                "ranked; leave this run out"
            )
        if score["loss"] > math.log(LARGEST_NUMBER):
            raise SparsifyError(
                f"{file}: the loss of {text} is {score['loss']}, which no model has; leave this "
                "run out"
            )
    return Run(file, result, _read_config(file.with_name(CONFIG)))


def _read_config(file: Path) -> dict[str, Any] | None:
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
        check_plain(config)
    except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError):
        return None
    return config if isinstance(config, dict) else None
