"""Runs of the command line whose results are kept: a benchmark that was stopped goes on."""

import json
import statistics
import subprocess
import sys
import threading
from collections import defaultdict
from datetime import date
from pathlib import Path
from typing import Any

import torch

_RUNNING: defaultdict[Path, threading.Lock] = defaultdict(threading.Lock)


def fit(name: str, options: list[str], folder: Path, aloud: bool = True) -> dict[str, Any]:
    """The result of one ``sparsify fit``: of an earlier one of this name, where the folder has it;
    a run that was stopped is resumed. Unless ``aloud``, what it prints goes to a file beside it.
    """
    root = _root(name, folder)
    with _RUNNING[root]:  # another thread may have started it
        while (result := _newest(root, "result.json")) is None:
            root.mkdir(parents=True, exist_ok=True)
            command = "fit"
            if (checkpoint := _newest(root, "checkpoints/last.ckpt")) is not None:
                options = [f"--ckpt_path={checkpoint.resolve()}"]
                command = "export" if _is_trained(checkpoint) else "fit"
            _sparsify(name, [command, *options], root, aloud)
    return json.loads(result.read_text())


def overrides(name: str, options: list[str], folder: Path, aloud: bool = True) -> Path:
    """The overrides that ``sparsify budget`` writes; the first option is the budget. Budgets of one
    name share measurements.
    """
    root = _root(name, folder)
    done = root / f"overrides_{options[0].partition('=')[2]}.yaml"
    with _RUNNING[root]:
        if not done.exists():
            root.mkdir(parents=True, exist_ok=True)
            words = ["budget", *options, f"--output.folder={root.resolve()}"]
            _sparsify(f"{name}, {options[0]}", words, root, aloud)
            (root / "overrides.yaml").rename(done)
    return done.resolve()


def is_kept(name: str, folder: Path) -> bool:
    """Whether the run of this name has ended."""
    return _newest(_root(name, folder), "result.json") is not None


def _sparsify(name: str, words: list[str], root: Path, aloud: bool) -> None:
    """One command in this folder, in a process of its own."""
    command = [sys.executable, "-m", "sparsify", *words]
    if aloud:
        print(f"\n== {name}", flush=True)
        subprocess.run(command, check=True, cwd=root)
        return
    log = root / "log.txt"
    with log.open("w") as file:
        code = subprocess.run(command, cwd=root, stdout=file, stderr=file).returncode
    if code:
        raise SystemExit(f"{name} ended with status {code}; it printed {log}")


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
