"""Tables 1 and 2 and figures 4, 5, 6 and 8 of MaskLLM's paper (Fang et al., NeurIPS 2024), made
again on the embedded model; its table 5 is ``domain_table.py``, its table 6 part of ``cost.py``::

    python benchmarks/paper_table.py --folder runs/compare --jobs 2 --save benchmarks/results

Each row is a row of ``embedded_table.py`` with one seed, and its run is kept in the same folder.
Accuracies are those of the tasks that ``continuation_tasks.py`` writes; they need ``'.[eval]'``.
``docs/draw_paper.py`` draws the figures.
"""

import argparse
import os
from pathlib import Path
from typing import Any

from continuation_tasks import embedded_texts, write_tasks
from embedded_table import run_all, run_name
from kept_runs import accuracies, check_protocol, downstream, exported, save, share_cores
from rich.console import Console
from rich.table import Table

from sparsify.export.mask_file.file import read_masks
from sparsify.results.mask_diff import diff_matrix

SEED = 0
METHODS = ("magnitude", "sparsegpt, updated", "wanda", "maskllm", "selfmask")
# A prior's own row, if there is one, and the row that learns from it.
PRIORS: dict[str, tuple[str | None, str]] = {
    "magnitude": ("magnitude", "maskllm"),
    "sparsegpt": ("sparsegpt, updated", "maskllm, from sparsegpt"),
    "wanda": ("wanda", "maskllm, from wanda"),
    "none": (None, "maskllm, no prior"),
}
# Rows by the windows of 256 tokens that they have read; a step reads eight.
SAMPLES = {
    "sparsegpt, updated": {
        **{n: f"sparsegpt, updated, {n} windows" for n in (8, 32)},
        128: "sparsegpt, updated",
        512: "sparsegpt, updated, 512 windows",
    },
    "maskllm": {**{8 * n: f"maskllm, {n} steps" for n in (10, 30, 100)}, 2400: "maskllm"},
}
KAPPA = {"1": "maskllm, kappa 1", "100 to 500": "maskllm", "100,000": "maskllm, kappa 100000"}
MASKS = ("magnitude", "wanda", "sparsegpt", "maskllm, from sparsegpt", "maskllm", "selfmask")
TASKS = ("continue_bible", "continue_python", "continue_shakespeare")


def rows() -> list[str]:
    """All rows of ``embedded_table.py`` that are needed."""
    samples = [name for some in SAMPLES.values() for name in some.values()]
    priors = [name for pair in PRIORS.values() for name in pair if name]
    return list(dict.fromkeys(["dense", *METHODS, *MASKS, *priors, *samples, *KAPPA.values()]))


def ask(name: str, folder: Path) -> dict[str, Any]:
    """What ``sparsify eval`` says of a row's export, beside the dense model."""
    if not (tasks := folder / "tasks").exists():
        write_tasks(tasks, embedded_texts())
    options = [f"--include_path={tasks}", f"--tasks={','.join(TASKS)}"]
    return downstream(run_name(name, SEED), options, folder)


def differences(folder: Path) -> dict[str, Any]:
    """The share of weights whose state differs between the masks of every two rows."""
    masks = {name: read_masks(exported(run_name(name, SEED), folder)) for name in MASKS}
    return diff_matrix(masks).to_dict()["shares"]  # type: ignore[no-any-return]


def tables(results: dict[str, dict[str, Any]], scores: dict[str, dict[str, Any]]) -> list[Table]:
    def perplexity(name: str | None) -> str:
        return "" if name is None else f"{results[name]['scores']['overall']['perplexity']:.2f}"

    dense = scores[METHODS[0]]
    first = Table("method", "perplexity", *dense["results"], "mean", title="Table 1")
    first.add_row("dense", perplexity("dense"), *accuracies(dense, "dense"))
    for name in METHODS:
        first.add_row(name, perplexity(name), *accuracies(scores[name], "sparse"))
    second = Table("prior", "its own mask", "learned from it", title="Table 2, maskllm")
    for prior, pair in PRIORS.items():
        second.add_row(prior, *map(perplexity, pair))
    fourth = Table("row", "windows read", "perplexity", title="Figure 4")
    for row, some in SAMPLES.items():
        for windows, name in some.items():
            fourth.add_row(row, str(windows), perplexity(name))
    return [first, second, fourth]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="for the runs")
    parser.add_argument("--jobs", type=int, default=1, help="so many at a time, a core for each")
    parser.add_argument("--save", type=Path, help="folder for a JSON file of all results")
    args = parser.parse_args()
    args.folder, args.all = args.folder.resolve(), True
    os.environ["HF_HUB_OFFLINE"] = "1"
    share_cores(args.jobs)
    names = rows()
    found = run_all([(name, SEED) for name in names], args)
    check_protocol(found)
    results = dict(zip(names, found, strict=True))
    scores = {name: ask(name, args.folder) for name in METHODS}
    for table in tables(results, scores):
        Console(width=140).print(table)
    save(
        {
            "runs": results,
            "downstream": scores,
            "priors": PRIORS,
            "samples": SAMPLES,
            "kappa": KAPPA,
            "differences": differences(args.folder),
        },
        args.save,
        "paper",
    )


if __name__ == "__main__":
    main()
