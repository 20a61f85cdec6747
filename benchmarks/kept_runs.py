"""Runs of the command line whose results are kept: a benchmark that was stopped goes on."""

import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sparsify.common.files import write_json

Rows = dict[str, list[dict[str, Any]]]  # results by a row's name, one for each seed

# Steps between checkpoints. It divides no usual number of steps, so that the last one is saved at
# the end, after the last validation, and holds that too.
EVERY = 37

_RUNNING: defaultdict[Path, threading.Lock] = defaultdict(threading.Lock)


class Run(NamedTuple):
    """A run of a benchmark.

    Attributes:
        name: of what the folder keeps.
        weight: about how long it takes, in any unit.
        make: gives its result.
    """

    name: str
    weight: float
    make: Callable[[], dict[str, Any]]


def share_cores(jobs: int) -> None:
    """Give each run one core, where several run at a time."""
    if jobs > 1:
        os.environ["OMP_NUM_THREADS"] = "1"


def run_all(runs: Sequence[Run], folder: Path, jobs: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and result of each run as it ends, ``jobs`` at a time; a line for each tells what is
    left.
    """
    work = {run.name: run.weight for run in runs if not is_kept(run.name, folder)}
    done, start = 0.0, time.monotonic()
    with ThreadPoolExecutor(jobs) as pool:
        started = {pool.submit(run.make): run.name for run in runs}
        try:
            for ended, job in enumerate(as_completed(started), 1):
                result, name = job.result(), started[job]
                done += work.get(name, 0)
                minutes = (time.monotonic() - start) / 60 * (sum(work.values()) - done)
                left = f"about {minutes / done:.0f} minutes left" if done else "kept"
                print(f"{ended} of {len(runs)} runs, {left}: {name}", flush=True)
                yield name, result
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def fit(name: str, options: list[str], folder: Path, aloud: bool = True) -> dict[str, Any]:
    """The result of one ``sparsify fit``: of an earlier one of this name, where the folder has it;
    a run that was stopped is resumed, and tested if it only learned. Unless ``aloud``, what it
    prints goes to a file beside it.
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


def learn_in(precision: str) -> list[str]:
    """Options of a run that learns in this precision; :func:`fit` tests it in float32."""
    untested = ["--output.enabled=false", f"--checkpoint.every_n_steps={EVERY}"]
    return [f"--trainer.precision={precision}", *(untested if precision != "32-true" else [])]


def overrides(name: str, options: list[str], folder: Path, aloud: bool = True) -> Path:
    """The overrides that ``sparsify budget`` writes; the first option is the budget. Budgets of one
    name share measurements.
    """
    root = _root(name, folder)
    done = root / f"overrides_{options[0].partition('=')[2]}.yaml"
    with _RUNNING[root]:
        if not done.exists():
            root.mkdir(parents=True, exist_ok=True)
            place = [f"--output.folder={root.resolve()}", "--output.overwrite=true"]
            words = ["budget", *options, *place]
            _sparsify(f"{name}, {options[0]}", words, root, aloud)
            (root / "overrides.yaml").rename(done)
    return done.resolve()


def from_budgets(
    options: list[str], searches: dict[str, list[str]], folder: Path, aloud: bool = True
) -> list[str]:
    """The options, in which what each search chose takes the place of its name in braces."""
    for word, search in searches.items():
        if f"--config={{{word}}}" in options:
            chosen = overrides(word, search, folder, aloud)
            options = [option.replace(f"{{{word}}}", str(chosen)) for option in options]
    return options


def downstream(
    name: str, options: list[str], folder: Path, aloud: bool = True, file: str = "downstream.json"
) -> dict[str, Any]:
    """What ``sparsify eval`` says of the export of the run of this name; what it wrote to ``file``
    before, where that is there.
    """
    export = exported(name, folder)
    path = export.with_name(file)
    if not path.exists():
        words = ["eval", str(export), f"--out={path}", *options]
        _sparsify(f"{name}, tasks", words, _root(name, folder), aloud)
    report = json.loads(path.read_text())
    return {part: report[part] for part in ("date", "versions", "protocol", "results", "mean")}


def accuracies(report: dict[str, Any], kind: str) -> list[str]:
    """Accuracy and standard error of each task and of their mean, in percent, from what
    :func:`downstream` gives; ``kind`` is sparse or dense.
    """
    each = [row[kind] for row in report["results"].values()]
    return list(map(percent, [*each, report["mean"][kind]]))


def percent(estimate: dict[str, float]) -> str:
    return f"{100 * estimate['value']:.1f} ± {100 * estimate['stderr']:.1f}"


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
    return folder / name.replace(", ", "-").replace(" ", "_").replace(":", "_")


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


def slim(result: dict[str, Any]) -> dict[str, Any]:
    """The result without what is known of single layers, which is most of it."""
    masks = result["masks"]  # None of a model without masks
    return result | {"masks": masks and {k: v for k, v in masks.items() if k != "layers"}}


def save(results: dict[str, Any], folder: Path | None, name: str) -> None:
    """Write the results to ``folder/name-DATE.json``, where a folder is given."""
    if folder is not None:
        path = saved_today(folder, name)
        write_json(path, results)
        print(f"saved {path}", flush=True)


def saved_today(folder: Path, name: str) -> Path:
    return folder / f"{name}-{date.today()}.json"


def read_rows(files: Iterable[Path]) -> Rows:
    """The rows of results files; of two with one name and seed, the later file's."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for file in files:
        for name, rows in json.loads(file.read_text(encoding="utf-8")).items():
            for row in rows if isinstance(rows, list) else [rows]:
                found.setdefault(name, {})[row["run"]["seed"]] = row
    return {name: list(rows.values()) for name, rows in found.items()}


def check_kept(kept: Rows, protocol: dict[str, Any]) -> None:
    """Stop if kept rows were measured in another way than this protocol's."""
    for name, rows in kept.items():
        for row in rows:
            if unequal := list(differences(row["protocol"], protocol)):
                raise SystemExit(
                    f"the kept row {name!r} was measured under another protocol: "
                    f"{'; '.join(unequal)}. Give the same model and texts, or leave its file out"
                )


def differences(there: Any, here: Any, path: str = "") -> Iterator[str]:
    """Where two values, which may be nested, are not equal."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in {**there, **here}:
            yield from differences(there.get(key), here.get(key), f"{path}.{key}".strip("."))
    elif there != here:
        yield f"{path} is {there} there and {here} here"


def spread(values: list[float], digits: int) -> str:
    """The mean, with the standard deviation where there are several."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"
