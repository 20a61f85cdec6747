"""Measure an exported folder and its dense model on the same tasks, one after the other."""

import gc
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from transformers import PreTrainedModel

from sparsify.common.choices import EMBEDDED, PAPER_TASKS, Dtype
from sparsify.common.errors import SparsifyError
from sparsify.export.manifest import MANIFEST, Manifest, read_manifest, sound_manifest
from sparsify.models.base import load_model, load_tokenizer
from sparsify.results.downstream.harness import BatchSize, Model, TaskScores, find_tasks
from sparsify.results.downstream.report import make_report
from sparsify.serving.verify.base_check import wrong_base

NO_BASE = "none"

Scores = dict[str, TaskScores]


@dataclass(frozen=True)
class Settings:
    """How models are measured.

    Attributes:
        tasks: names of the harness' tasks, groups or tags.
        include_path: a folder with the YAML files of further tasks.
        metric: reported of every task that has it; of others their first.
        num_fewshot: examples in context; None takes each task's own number, or 0.
        limit: measure only the first examples of each task.
        batch_size: requests at once.
        device: where the models run.
        dtype: of the weights; ``auto`` is the type in which the masks were made.
    """

    tasks: tuple[str, ...] = PAPER_TASKS
    include_path: Path | None = None
    metric: str = "acc"
    num_fewshot: int | None = None
    limit: int | None = None
    batch_size: BatchSize = 8
    device: Literal["cpu", "cuda"] = "cpu"
    dtype: Dtype = "auto"

    def __post_init__(self) -> None:
        if not self.tasks:
            raise SparsifyError("--tasks names no task; give one at least")
        for name in ("limit", "batch_size"):
            value = getattr(self, name)
            if isinstance(value, int) and value < 1:
                raise SparsifyError(f"--{name} {value}: it must be 1 or more")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise SparsifyError(f"--num_fewshot {self.num_fewshot}: it must be 0 or more")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise SparsifyError("--device cuda: PyTorch finds no CUDA device; use --device cpu")
        if self.batch_size == "auto" and self.device == "cpu":
            raise SparsifyError(
                "--batch_size auto tries sizes until a device's memory is full, and needs "
                "--device cuda; give a number"
            )


def find_export(folder: Path) -> Path:
    """The exported folder that a path names: itself, or a run's ``export``.

    Raises:
        SparsifyError: neither holds a manifest.
    """
    for found in (folder, folder / "export"):
        if (found / MANIFEST).is_file():
            return found
    raise SparsifyError(
        f"{folder} holds no {MANIFEST}, so nothing says which dense model it came from; name a "
        "folder that sparsify export or fit wrote (or use lm_eval itself for other models)"
    )


def evaluate(folder: Path, base: str | None, settings: Settings) -> dict[str, Any]:
    """Measure both models.

    Args:
        folder: an exported one.
        base: the dense model; None takes the one that the manifest names, ``none`` measures the
            sparse model alone.
        settings: how.

    Returns:
        the report (``sparsify.downstream/1``).

    Raises:
        SparsifyError: the manifest is damaged, the base is another model or cannot be found, or a
            task cannot be used.
    """
    manifest, content = sound_manifest(folder), read_manifest(folder)
    dense_name = _base_name(folder, base, content)
    tasks = find_tasks(settings.tasks, settings.include_path, settings.num_fewshot)
    dtype = cast(Dtype, manifest.base_dtype if settings.dtype == "auto" else settings.dtype)
    dense = None
    if dense_name is not None:
        model = _load_base(dense_name, manifest, dtype)
        dense, _ = _measure("dense", model, dense_name, tasks, settings)
        del model
        gc.collect()  # the two are never in memory together
        torch.cuda.empty_cache()
    model = load_model(str(folder), dtype, "")
    sparse, windows = _measure("sparse", model, str(folder), tasks, settings)
    protocol = {
        "metric": settings.metric,
        "limit": settings.limit,
        "batch_size": settings.batch_size,
        "dtype": dtype,
        "device": settings.device,
        **windows,
    }
    return make_report(folder, content, protocol, dense, sparse)


def _base_name(folder: Path, given: str | None, content: dict[str, Any]) -> str | None:
    if given == NO_BASE:
        return None
    if given is not None:
        return given
    name = str(content["base"].get("name"))
    # A record keeps the last part of a local path; with an owner it is the hub's.
    if name == EMBEDDED or "/" in name:
        return name
    raise SparsifyError(
        f"{folder}: its base is {name!r}, and the manifest does not say where that is; give the "
        "dense model with --base MODEL, or --base none to measure the sparse model alone"
    )


def _load_base(name: str, manifest: Manifest, dtype: Dtype) -> PreTrainedModel:
    """The dense model, which has the manifest's hash in the type in which masks were made."""
    model = load_model(name, cast(Dtype, manifest.base_dtype), "--base")
    if (problem := wrong_base(name, model, manifest)) is not None:
        raise SparsifyError(f"{problem}; give the model that was pruned with --base MODEL")
    return model if dtype == manifest.base_dtype else load_model(name, dtype, "--base")


def _measure(
    kind: str, model: PreTrainedModel, name: str, tasks: dict[str, Any], settings: Settings
) -> tuple[Scores, dict[str, Any]]:
    """The scores by task; and the most tokens that the model reads, with the special ones that
    come first, if there are any.
    """
    model.to(cast(Any, settings.device))
    option = "--base" if kind == "dense" else ""
    asked = Model(model, load_tokenizer(name, option), settings.batch_size)
    scores = {}
    for at, (task, content) in enumerate(tasks.items(), 1):
        print(f"{kind}: {task} ({at} of {len(tasks)})", file=sys.stderr)
        scores[task] = asked.answer(task, content, settings.limit)
    bos = asked.bos
    return scores, {"max_length": asked.max_length} | ({"bos": bos} if bos else {})
