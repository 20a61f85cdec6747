"""lm-evaluation-harness: finding its tasks, and one model's scores on one of them.

The only file that knows the harness' own interfaces.
"""

import hashlib
import json
import math
import random
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsify.common.errors import SparsifyError
from sparsify.data.windows import window_start
from sparsify.results.downstream.paired import Metric
from sparsify.results.downstream.quiet import collected_warnings, quiet_harness

# Means have a closed form, whatever this is; 0 would turn that off too. Of other metrics 1,000
# draws give the standard error within some 2 %.
BOOTSTRAP_DRAWS = 1000

BatchSize = int | Literal["auto"]


@dataclass(frozen=True)
class TaskScores:
    """What one model reached on one task.

    Attributes:
        metrics: by name, ``acc``, or ``exact_match,strict-match`` where answers are filtered.
        protocol: what the task was: its version, the hash of its configuration, examples in
            context, the examples asked and how many there are, and the hash of all examples with
            their prompts.
        warnings: what the harness warned of, numbers left out, and how often.
    """

    metrics: dict[str, Metric]
    protocol: dict[str, Any]
    warnings: dict[str, int]


def find_tasks(
    names: Sequence[str], include_path: Path | None, num_fewshot: int | None
) -> dict[str, Any]:
    """The harness' tasks with their data; groups are taken apart into theirs.

    Args:
        names: of tasks, groups or tags.
        include_path: a folder with the YAML files of further tasks.
        num_fewshot: examples in context; None takes each task's own number, or 0.

    Raises:
        SparsifyError: the harness is not installed, there is no such task, its data cannot be
            loaded, or its number of examples is fixed.
    """
    with quiet_harness():
        manager = _manager(names, include_path)
        tasks: dict[str, Any] = {}
        for name in names:
            tasks |= _load(manager, name)
    for name, task in tasks.items():
        own = task.get_config("num_fewshot")
        if num_fewshot is not None and own == 0 != num_fewshot:
            raise SparsifyError(
                f"--num_fewshot {num_fewshot}: {name} is defined with 0 examples in context, which "
                "the harness does not change; leave the option or the task out"
            )
        task.set_config("num_fewshot", (own or 0) if num_fewshot is None else num_fewshot)
    return tasks


def _manager(names: Sequence[str], include_path: Path | None) -> Any:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise SparsifyError(
            f"sparsify eval needs a package that is not installed ({error}): "
            "pip install 'sparsify-llm[eval]'"
        ) from error
    if include_path is None:
        return TaskManager()
    if not include_path.is_dir():
        raise SparsifyError(
            f"--include_path {include_path} is not a folder; name the one with the tasks' YAML "
            "files"
        )
    own = TaskManager(include_path=str(include_path), include_defaults=False)
    # The harness' own 14,000 tasks take seconds to list.
    everything = set(names) <= set(own.all_tasks)
    return own if everything else TaskManager(include_path=str(include_path))


def _load(manager: Any, name: str) -> dict[str, Any]:
    if name not in manager.all_tasks:
        like = get_close_matches(name, manager.all_tasks, 5)
        hint = f"the nearest names are {', '.join(like)}" if like else "no name is near to it"
        raise SparsifyError(
            f"--tasks {name}: there is no such task; {hint}. Tasks of your own are found with "
            "--include_path DIR"
        )
    try:
        return dict(manager.load([name])["tasks"])
    # A task is somebody's configuration, code and data: it may fail in any way.
    except Exception as error:
        raise SparsifyError(
            f"--tasks {name}: the task could not be loaded ({_reason(error)}). Tasks of the "
            "harness need data of the Hugging Face hub: run it once with a network and without "
            "HF_HUB_OFFLINE, after which they are kept, or give tasks of your own with "
            "--include_path DIR"
        ) from error


def _reason(error: Exception) -> str:
    """The first line of its message; of an assertion without one, what was asserted."""
    if said := str(error).strip():
        return said.splitlines()[0]
    return traceback.extract_tb(error.__traceback__)[-1].line or type(error).__name__


class Model:
    """A model as the harness asks it.

    Args:
        model: on its device.
        tokenizer: its own.
        batch_size: requests at once; ``auto`` takes what fits the device.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: BatchSize
    ) -> None:
        with quiet_harness():
            from lm_eval.models.huggingface import HFLM

            self._lm: Any = HFLM(
                pretrained=model, tokenizer=tokenizer, batch_size=batch_size, backend="causal"
            )

    @property
    def bos(self) -> list[str]:
        """The special tokens before a request, where the tokenizer puts any before a text."""
        start = window_start(self._lm.tokenizer)
        asked = self._lm.tok_encode("a")[: len(start)] == start  # older versions left them out
        return list(self._lm.tokenizer.convert_ids_to_tokens(start)) if asked else []

    @property
    def max_length(self) -> int:
        """The most tokens that it reads; of longer requests the start is cut off."""
        return int(self._lm.max_length)

    def answer(self, name: str, task: Any, limit: int | None) -> TaskScores:
        """Ask it a task's examples, the first ``limit`` of them.

        Raises:
            SparsifyError: the harness cannot run the task, or it reports no number.
        """
        with quiet_harness(), collected_warnings() as warnings:
            try:
                result = self._evaluate(name, task, limit)
            except (ValueError, AssertionError) as error:
                raise SparsifyError(
                    f"--tasks {name}: the harness cannot run it ({_reason(error)}); leave it out"
                ) from error
        samples = result["samples"][name]
        metrics = _metrics(name, result, samples)
        if not metrics:
            raise SparsifyError(f"--tasks {name}: the task reports no number; leave it out")
        return TaskScores(metrics, _protocol(name, result, samples), warnings)

    def _evaluate(self, name: str, task: Any, limit: int | None) -> Any:
        """As the harness' ``simple_evaluate``, which would list all installed packages too."""
        from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
        from lm_eval.evaluator import evaluate

        random.seed(DEFAULT_RANDOM_SEED)
        np.random.seed(DEFAULT_OTHER_SEED)
        torch.manual_seed(DEFAULT_OTHER_SEED)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
        return evaluate(
            self._lm, {"tasks": {name: task}}, limit=limit, bootstrap_iters=BOOTSTRAP_DRAWS
        )


def _metrics(name: str, result: Any, samples: list[dict[str, Any]]) -> dict[str, Metric]:
    values = result["results"][name]
    better = result["higher_is_better"][name]
    metrics = {}
    for key, value in values.items():
        metric, comma, chosen = key.partition(",")
        if not comma or metric.endswith("_stderr") or not _is_number(value):
            continue
        error = values.get(f"{metric}_stderr,{chosen}")
        metrics[metric if chosen == "none" else key] = Metric(
            float(value),
            float(error) if _is_number(error) else None,
            better.get(metric),
            _examples(metric, value, [s for s in samples if s["filter"] == chosen]),
        )
    return metrics


def _examples(metric: str, value: float, samples: list[dict[str, Any]]) -> list[float] | None:
    """The values whose mean ``value`` is, in the order of the examples; None if it is no mean."""
    found = [s.get(metric) for s in sorted(samples, key=lambda s: s["doc_id"])]
    numbers = [float(number) for number in found if number is not None and _is_number(number)]
    if not numbers or len(numbers) < len(found):
        return None
    return numbers if math.isclose(sum(numbers) / len(numbers), value, abs_tol=1e-12) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number | np.bool_)


def _protocol(name: str, result: Any, samples: list[dict[str, Any]]) -> dict[str, Any]:
    config = json.dumps(result["configs"][name], sort_keys=True, default=str)
    # What the harness itself calls a task's hash when it writes its results.
    asked = "".join(s["doc_hash"] + s["prompt_hash"] + s["target_hash"] for s in samples)
    counts = result["n-samples"][name]
    return {
        "version": result["versions"][name],
        "config_hash": hashlib.sha256(config.encode()).hexdigest(),
        "num_fewshot": result["n-shot"][name],
        "examples": counts["effective"],
        "available": counts["original"],
        "examples_hash": hashlib.sha256(asked.encode()).hexdigest(),
    }
