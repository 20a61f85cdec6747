"""Runs of the command line whose results are kept: a benchmark that was stopped goes on."""

import json
import statistics
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any


def fit(name: str, options: list[str], folder: Path) -> dict[str, Any]:
    """The result of one ``sparsify fit``: of an earlier one of this name, where the folder has it;
    a run that was stopped is resumed.
    """
    root = folder / name.replace(", ", "-").replace(" ", "_")
    if results := sorted(root.glob("runs/*/*/result.json")):
        return json.loads(results[-1].read_text())
    print(f"\n== {name}", flush=True)
    root.mkdir(parents=True, exist_ok=True)
    if checkpoints := sorted(root.glob("runs/*/*/checkpoints/last.ckpt")):
        options = [f"--ckpt_path={checkpoints[-1].resolve()}"]
    command = [sys.executable, "-m", "sparsify", "fit", *options]
    subprocess.run(command, check=True, cwd=root)
    return json.loads(sorted(root.glob("runs/*/*/result.json"))[-1].read_text())


def exported(name: str, folder: Path) -> Path:
    """The model that the run of this name exported."""
    root = folder / name.replace(", ", "-").replace(" ", "_")
    return sorted(root.glob("runs/*/*/export"))[-1]


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
