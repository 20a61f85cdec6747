"""Runs of the command line whose results are kept: a benchmark that was stopped goes on."""

import json
import statistics
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import torch


def fit(name: str, options: list[str], folder: Path) -> dict[str, Any]:
    """The result of one ``sparsify fit``: of an earlier one of this name, where the folder has it;
    a run that was stopped is resumed.
    """
    root = _root(name, folder)
    if (result := _newest(root, "result.json")) is not None:
        return json.loads(result.read_text())
    print(f"\n== {name}", flush=True)
    root.mkdir(parents=True, exist_ok=True)
    command = "fit"
    if (checkpoint := _newest(root, "checkpoints/last.ckpt")) is not None:
        options = [f"--ckpt_path={checkpoint.resolve()}"]
        command = "export" if _is_trained(checkpoint) else "fit"
    subprocess.run([sys.executable, "-m", "sparsify", command, *options], check=True, cwd=root)
    return fit(name, options, folder)


def from_export(options: list[str], word: str, name: str, folder: Path) -> list[str]:
    """The options, in which the export of the run of this name takes the place of ``{word}``."""
    if not any(f"{{{word}}}" in option for option in options):
        return options
    export = str(exported(name, folder))
    return [option.replace(f"{{{word}}}", export) for option in options]


def exported(name: str, folder: Path) -> Path:
    """The export of the run of this name."""
    export = _newest(_root(name, folder), "export")
    if export is None:
        raise SystemExit(f"this row starts from the export of {name!r}: run that first")
    return export


def _root(name: str, folder: Path) -> Path:
    """Where the run of this name is kept."""
    return folder / name.replace(", ", "-").replace(" ", "_")


def _newest(root: Path, what: str) -> Path | None:
    found = root.glob(f"runs/*/*/{what}")
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def _is_trained(checkpoint: Path) -> bool:
    """Whether only the test and the export are left."""
    content = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    steps = content["hyper_parameters"]["config"]["trainer"]["max_steps"]
    return content["global_step"] >= steps


def check_protocol(results: list[dict[str, Any]]) -> None:
    """Stop if the results were measured in different ways."""
    if len({json.dumps(result["protocol"], sort_keys=True) for result in results}) != 1:
        raise SystemExit("these results were measured under different protocols; clear the folder")


def save(results: Any, folder: Path | None, name: str) -> None:
    """Write the results to ``folder/name-DATE.json``, where a folder is given."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}-{date.today()}.json"
        path.write_text(json.dumps(results, indent=2) + "\n")
        print(f"saved {path}")


def spread(values: list[float], digits: int) -> str:
    """The mean, with the standard deviation where there are several."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"
