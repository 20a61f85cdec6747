"""What ``sparsify eval`` leaves: all that was measured and how, as JSON, and its table."""

import platform
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from sparsify.common.file_hashes import hash_file
from sparsify.common.version import version
from sparsify.export.manifest import MANIFEST
from sparsify.export.mask_file.index import FILE_NAME, open_index
from sparsify.results.downstream.harness import TaskScores
from sparsify.results.downstream.paired import Estimate, Metric, difference, mean

DOWNSTREAM_SCHEMA = "sparsify.downstream/1"
PACKAGES = ("sparsify", "lm_eval", "transformers", "torch", "datasets")

Scores = Mapping[str, TaskScores]


def make_report(
    folder: Path,
    manifest: Mapping[str, Any],
    protocol: Mapping[str, Any],
    dense: Scores | None,
    sparse: Scores,
) -> dict[str, Any]:
    """All of it as plain values.

    Args:
        folder: the exported one.
        manifest: its content.
        protocol: the settings that all tasks share.
        dense: by task; None where the dense model was not measured.
        sparse: of the same tasks.
    """
    masks = open_index(folder).digest if (folder / FILE_NAME).is_file() else None
    results = {
        task: _result(protocol["metric"], None if dense is None else dense[task], scores)
        for task, scores in sparse.items()
    }
    return {
        "schema": DOWNSTREAM_SCHEMA,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {name: version(name) for name in PACKAGES}
        | {"python": platform.python_version()},
        "protocol": {
            **protocol,
            "base": manifest["base"],
            "masks": masks,
            "manifest": hash_file(folder / MANIFEST),
            "tasks": {task: scores.protocol for task, scores in sparse.items()},
        },
        "results": results,
        "mean": _means(protocol["metric"], results),
        "warnings": {
            kind: {task: each.warnings for task, each in scores.items() if each.warnings}
            for kind, scores in (("dense", dense or {}), ("sparse", sparse))
        },
    }


def _result(asked: str, dense: TaskScores | None, sparse: TaskScores) -> dict[str, Any]:
    """A task's row: the metric asked for, or else the task's first."""
    name = asked if asked in sparse.metrics else next(iter(sparse.metrics))
    measured = {"dense": dense, "sparse": sparse}
    result: dict[str, Any] = {
        "metric": name,
        "higher_is_better": sparse.metrics[name].higher_is_better,
        "examples": sparse.protocol["examples"],
    }
    for kind, scores in measured.items():
        if scores is not None:
            result[kind] = _plain(scores.metrics[name])
            result[kind]["metrics"] = {key: _plain(m) for key, m in scores.metrics.items()}
    if dense is not None:
        result["difference"] = asdict(difference(dense.metrics[name], sparse.metrics[name]))
    return result


def _plain(metric: Metric) -> dict[str, Any]:
    return {"value": metric.value, "stderr": metric.stderr}


def _means(asked: str, results: Mapping[str, Any]) -> dict[str, Any] | None:
    """Over the tasks that have the metric asked for; None where none has."""
    rows = {task: row for task, row in results.items() if row["metric"] == asked}
    if not rows:
        return None
    found: dict[str, Any] = {"metric": asked, "tasks": list(rows)}
    for kind in ("dense", "sparse", "difference"):
        estimates = [
            Estimate(row[kind]["value"], row[kind]["stderr"])
            for row in rows.values()
            if kind in row
        ]
        if estimates:
            found[kind] = asdict(mean(estimates))
    return found


def table(report: Mapping[str, Any]) -> Table:
    """The report for a reader; :func:`notes` belong below it."""
    kinds = [
        kind
        for kind in ("dense", "sparse", "difference")
        if all(kind in row for row in report["results"].values())
    ]
    columns = ("task", "metric", "n", *kinds)
    found = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for column in columns:
        words = column in ("task", "metric")
        found.add_column(
            column, justify="left" if words else "right", no_wrap=not words, overflow="fold"
        )
    for task, row in report["results"].items():
        metric = row["metric"] + (" (lower is better)" if row["higher_is_better"] is False else "")
        cells = (_cell(kind, row[kind]) for kind in kinds)
        found.add_row(task, metric, str(row["examples"]), *cells)
    means = report["mean"]
    if means and len(means["tasks"]) > 1:
        found.add_section()
        label = f"mean of {len(means['tasks'])} tasks"
        cells = (_cell(kind, means[kind]) for kind in kinds)
        found.add_row(label, means["metric"], "", *cells)
    return found


def _cell(kind: str, estimate: Mapping[str, Any]) -> str:
    error = "" if estimate["stderr"] is None else f" ± {estimate['stderr']:.4f}"
    sign = "+" if kind == "difference" else ""
    return f"{estimate['value']:{sign}.4f}{error}"


def notes(report: Mapping[str, Any]) -> list[str]:
    """What the table's numbers mean, and how they were measured: a line each."""
    protocol, results = report["protocol"], report["results"]
    lines = ["n: examples; ±: one standard error"]
    methods = {task: row["difference"]["method"] for task, row in results.items() if "dense" in row}
    if methods:
        lines[0] += "; difference: sparse less dense, paired over the examples"
    if unpaired := [task for task, method in methods.items() if method != "paired"]:
        lines[0] += f" (taken as independent in {', '.join(unpaired)})"
    shots = sorted({task["num_fewshot"] for task in protocol["tasks"].values()})
    first = f" after {' '.join(protocol['bos'])}" if "bos" in protocol else ""
    limit = "" if protocol["limit"] is None else f"the first {protocol['limit']} examples, "
    lines += [
        f"{limit}{' or '.join(map(str, shots))} examples in context, {protocol['dtype']} on "
        f"{protocol['device']}, batches of {protocol['batch_size']}, at most "
        f"{protocol['max_length']} tokens{first}, lm_eval {report['versions']['lm_eval']}",
        f"base {protocol['base']['name']} {protocol['base']['hash'][:12]}, masks "
        f"{(protocol['masks'] or 'none')[:12]}",
    ]
    # What one input causes, it causes in both models.
    warned = {
        f"warning, {task}, {count} times: {message}": None
        for tasks in report["warnings"].values()
        for task, counts in tasks.items()
        for message, count in counts.items()
    }
    return lines + list(warned)
