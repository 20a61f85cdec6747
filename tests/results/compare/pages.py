"""Runs as they lie on disk, with all that a report draws."""

import json
import math
from pathlib import Path
from typing import Any

import torch

from sparsify.export.mask_file import write_masks
from sparsify.masking.pattern import NMPattern
from sparsify.models.permutation_file import Permutation
from tests.results.compare.made import DENSE, MAGNITUDE, MASKLLM, SRSTE, result, write

LAYERS = [f"model.layers.{block}.mlp.{kind}" for block in range(3) for kind in ("up", "down")]


def learning(end: float) -> dict[str, Any]:
    """A run's history."""
    looks = []
    for step in (25, 50, 75, 100):
        t = step / 100
        spent = {"step": step, "tokens": 10 * step, "seconds": 0.6 * step}
        shares = {"flips": 0.1 - t / 20, "distance": t / 5, "retained_norm": 1 - t / 20}
        known = {"max_probability": (1 + t) / 2, "sample_change": (1 - t) / 4}
        looks.append(
            spent | shares | known | {"loss": end + 1 - t, "perplexity": math.exp(end + 1 - t)}
        )
    keys = ("step", "tokens", "seconds")
    return {
        "validation": [{k: look[k] for k in (*keys, "loss", "perplexity")} for look in looks],
        "masks": [
            {k: v for k, v in look.items() if k not in ("loss", "perplexity")} for look in looks
        ],
    }


def make_runs(folder: Path) -> Path:
    """Three seeds of two strategies, dense and magnitude, with masks, histories, sensitivity."""
    for name, strategy, loss, weights in (
        ("maskllm", MASKLLM, 3.3, "frozen"),
        ("sr_ste", SRSTE, 3.1, "trained"),
        ("magnitude", MAGNITUDE, 4.1, "frozen"),
        ("dense", DENSE, 3.0, "frozen"),
    ):
        learns = strategy in (MASKLLM, SRSTE)
        for seed in range(3 if learns else 1):
            content = result(strategy, loss + seed / 100, seed, weights=weights)
            content["history"] = learning(loss) if learns else {"validation": [], "masks": []}
            if strategy == DENSE:
                content["masks"] = None
                content["history"]["validation"] = [
                    {"step": 0, "tokens": 0, "seconds": 0.0, "loss": 3.0, "perplexity": 20.1}
                ]
            else:
                norms = {layer: {"retained_norm": 0.9 + k / 100} for k, layer in enumerate(LAYERS)}
                content["masks"] = {"distance": 0.1, "retained_norm": 0.95, "layers": norms}
            run = folder / name / f"version_{seed}"
            write(run, content)
            (run / "config.yaml").write_text("data: {seed: 0}")
            if strategy != DENSE:
                write_export(run / "export", seed=len(name))
    blocks = [{"loss_increase": 0.1 * b, "loss_decrease": 0.05 * b} for b in range(1, 4)]
    measured = json.loads((folder / "magnitude/version_0/result.json").read_text())
    found = {key: measured[key] for key in ("run", "protocol")}
    found |= {"schema": "sparsify.sensitivity/1", "blocks": blocks}
    (folder / "sensitivity/version_0").mkdir(parents=True)
    (folder / "sensitivity/version_0/sensitivity.json").write_text(json.dumps(found))
    return folder


def write_export(
    folder: Path, seed: int, width: int = 8, permutation: Permutation | None = None
) -> None:
    """An export's masks, and nothing else of it."""
    folder.mkdir()
    (folder / "sparsity_manifest.json").write_text("{}")
    pattern = NMPattern(2, 4)
    generator = torch.Generator().manual_seed(seed)
    masks = {name: pattern.top(torch.rand(8, width, generator=generator)) for name in LAYERS}
    write_masks(
        folder / "masks.nmask", masks, dict.fromkeys(LAYERS, pattern), "h", permutation=permutation
    )
