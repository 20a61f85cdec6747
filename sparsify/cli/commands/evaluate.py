"""``sparsify eval``."""

from pathlib import Path
from typing import Literal

from sparsify.cli.commands.output import Format, check_free, say, say_json, say_written
from sparsify.common.choices import PAPER_TASKS, Device, Dtype
from sparsify.common.errors import SparsifyError


def evaluate(
    folder: Path,
    base: str | None = None,
    tasks: str = ",".join(PAPER_TASKS),
    include_path: Path | None = None,
    metric: str = "acc",
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int | Literal["auto"] = 8,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    out: Path | None = None,
    format: Format = "table",
) -> None:
    """Score an exported folder and its dense model on tasks of lm-evaluation-harness.

    Args:
        folder: what sparsify export or fit wrote, or a run's folder.
        base: the dense model; the manifest's if it is not given, and none measures the sparse model
            alone.
        tasks: names of tasks, groups or tags, with commas between them.
        include_path: a folder with the YAML files of tasks of your own.
        metric: reported of each task that has it; of others their first one.
        num_fewshot: examples in context; each task's own number (0 for the default tasks) if it is
            not given.
        limit: measure only the first examples of each task.
        batch_size: requests at once; auto, on cuda, takes what fits.
        device: cpu or cuda.
        dtype: of the weights; auto is the type in which the masks were made.
        out: the JSON file; if it is not given, downstream.json in the run's folder, or
            FOLDER.downstream.json beside an export elsewhere.
        format: table or json.
    """
    from sparsify.common.files import write_json
    from sparsify.results.downstream import Settings, find_export, notes, table
    from sparsify.results.downstream import evaluate as measure

    export = find_export(folder)
    out = report_path(export) if out is None else out
    if export.resolve() in out.resolve().parents:
        raise SparsifyError(
            f"--out {out}: an exported folder stays as it was written; name a file outside {export}"
        )
    check_free(out)
    names = tuple(filter(None, map(str.strip, tasks.split(","))))
    settings = Settings(names, include_path, metric, num_fewshot, limit, batch_size, device, dtype)
    report = measure(export, base, settings)
    try:
        write_json(out, report)
    finally:  # a disk that is full by now must not lose what was measured
        if format == "json":
            say_json(report)
        else:
            for part in (table(report), *notes(report)):
                say(part)
    if format == "table":
        say_written(out)


def report_path(export: Path) -> Path:
    """Outside the export, whose files are checked as they are."""
    export = export if export.name else export.resolve()  # "." has no name
    if (export.parent / "result.json").is_file():
        return export.parent / "downstream.json"
    return export.with_name(f"{export.name}.downstream.json")
