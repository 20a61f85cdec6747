"""Makes result files of runs that never ran."""

import copy
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparsify.results.compare.loading import Run
from sparsify.results.compare.rows import Row, make_rows
from sparsify.results.result import UNSEALED_SCHEMA

STRATEGIES = "sparsify.strategies"
MASKLLM = f"{STRATEGIES}.maskllm.MaskLLM"
MAGNITUDE = f"{STRATEGIES}.magnitude.Magnitude"
DENSE = f"{STRATEGIES}.dense.Dense"
SRSTE = f"{STRATEGIES}.sr_ste.SRSTE"
WANDA = f"{STRATEGIES}.wanda.Wanda"

PROTOCOL = {
    "metric": "token perplexity",
    "split": "test",
    "base": {"name": "embedded", "hash": "c3f59e483b27aa", "dtype": "float32"},
    "data": {
        "block_size": 256,
        "sources": {"a": {"file": "a.txt", "sha256": "1"}, "b": {"file": "b.txt", "sha256": "2"}},
    },
    "windows": {"a": 10, "b": 10, "overall": 20},
}


def result(
    strategy: str = MASKLLM,
    loss: float = 3.0,
    seed: int = 0,
    settings: dict[str, Any] | None = None,
    weights: str = "frozen",
    protocol: dict[str, Any] | None = None,
    **run: Any,
) -> dict[str, Any]:
    """A result of two texts around this loss; ``run`` replaces parts of the run's record."""
    dense = strategy == DENSE
    learns = strategy in (MASKLLM, SRSTE)
    losses = {"a": loss + 0.1, "b": loss - 0.1, "overall": loss}
    return {
        "schema": UNSEALED_SCHEMA,
        "date": "2026-11-22T07:31:54+00:00",
        "versions": {"torch": "2.13.0"},
        "run": {
            "strategy": {
                "class": strategy,
                "weights": weights,
                "settings": {"seed": seed} | (settings or {}),
            },
            "pattern": "dense" if dense else "2:4",
            "overrides": {},
            "sparsity": 0.0 if dense else 0.5,
            "calibration": None,
            "distillation": None,
            "seed": seed,
            "steps": 100 if learns else 0,
            "tokens": 1000 if learns else 0,
            "seconds": 60.0 if learns else 0.0,
            "peak_memory_gib": 1.0,
            "device": "cpu",
        }
        | run,
        "protocol": copy.deepcopy(protocol or PROTOCOL),
        "scores": {
            name: {"loss": one, "perplexity": math.exp(one), "windows": 10, "targets": 100}
            for name, one in losses.items()
        },
    }


def write(folder: Path, content: dict[str, Any]) -> Path:
    """The result file of a run folder."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "result.json"
    file.write_text(json.dumps(content))
    return file


def row(losses: Sequence[float], strategy: str = MASKLLM, **more: Any) -> Row:
    """A row of one run for each loss, with the seeds 0, 1, ...; cost lists go by seed."""
    runs = []
    for seed, loss in enumerate(losses):
        own = {
            key: value[seed] if isinstance(value, list) else value for key, value in more.items()
        }
        runs.append(Run(Path(f"{seed}/result.json"), result(strategy, loss, seed, **own), {}))
    rows, _ = make_rows(runs)
    (one,) = rows
    return one
