"""Finds and reads the results of runs."""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from sparsify.errors import SparsifyError
from sparsify.evaluation import OVERALL, RESULT_SCHEMA
from sparsify.manifest import MANIFEST
from sparsify.sensitivity import SENSITIVITY_SCHEMA

RESULT = "result.json"
CONFIG = "config.yaml"
SENSITIVITY = "sensitivity.json"
# What of a run's record decides its masks.
MASKS = ("strategy", "pattern", "overrides", "distillation", "seed", "steps")


@dataclass(frozen=True)
class Run:
    """One result file.

    Attributes:
        path: where it lies.
        result: its content.
        config: what the command line was told, from the file beside it; None where there is none.
        sensitivity: of its masks, block by block, where that was measured.
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
        """What is known of its calibration; empty where there was none."""
        return self.record.get("calibration") or {}

    def losses(self) -> dict[str, float]:
        """The loss of every text, and overall, nats a token."""
        return {text: score["loss"] for text, score in self.result["scores"].items()}


def load_runs(paths: Iterable[Path]) -> list[Run]:
    """All results below some paths, with what ``sparsify sensitivity`` left there of the same
    masks; a file that is named twice is read once.

    Args:
        paths: result files, run folders, or folders of runs.

    Raises:
        SparsifyError: a path holds no result, or a file is not one.
    """
    files: dict[Path, Path] = {}
    sensitivities: list[dict[str, Any]] = []
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
    runs = [_read(file) for file in files.values()]
    own = (next((s for s in sensitivities if _same_masks(s, run)), None) for run in runs)
    return [replace(run, sensitivity=found) for run, found in zip(runs, own, strict=True)]


def _below(folder: Path, name: str) -> Iterator[Path]:
    for place, folders, files in os.walk(folder):
        if MANIFEST in files:  # an export: what lies in it is a model's
            folders.clear()
        elif name in files:
            yield Path(place) / name


def _read_sensitivity(file: Path) -> dict[str, Any]:
    """Its content; nothing of a file that cannot be used, as a comparison does not rest on it."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return content if content["schema"] == SENSITIVITY_SCHEMA else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _same_masks(sensitivity: Mapping[str, Any], run: Run) -> bool:
    """Whether what was measured are the masks of this run, of the same base model."""
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
    if schema != RESULT_SCHEMA:
        raise SparsifyError(
            f"{file} is no result: its schema is {schema!r} instead of {RESULT_SCHEMA!r}; name a "
            f"run's {RESULT} or its folder"
        )
    try:
        run = Run(file, result, _read_config(file.with_name(CONFIG)))
        _check(run)
    except (KeyError, TypeError, AttributeError) as error:
        raise SparsifyError(
            f"{file} lacks what a result holds ({type(error).__name__}: {error}); write it again "
            "with `sparsify export --ckpt_path FILE`"
        ) from error
    return run


def _check(run: Run) -> None:
    """Touch what everything else relies on."""
    record = run.record
    _ = record["strategy"]["class"], record["strategy"]["weights"], record["strategy"]["settings"]
    _ = record["pattern"], record["sparsity"], record["steps"], record["tokens"], record["seconds"]
    _ = run.protocol["base"]["hash"], run.protocol["data"]
    for text, score in run.result["scores"].items():
        if not (math.isfinite(score["loss"]) and math.isfinite(score["perplexity"])):
            raise SparsifyError(
                f"{run.path}: the loss of {text} is {score['loss']}, and what is not a finite "
                "number cannot be ranked; leave this run out"
            )
    _ = run.losses()[OVERALL]


def _read_config(file: Path) -> dict[str, Any] | None:
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return config if isinstance(config, dict) else None
