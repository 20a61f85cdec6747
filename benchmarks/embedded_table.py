"""Compare strategies on the embedded model; each runs through the command line itself.

One seed, which is what ``make demo`` runs, or several, and the results as one JSON file::

    python benchmarks/embedded_table.py
    python benchmarks/embedded_table.py --seeds 0 1 2 --save benchmarks/results
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

STRATEGIES = ("dense", "magnitude", "maskllm")


def run(strategy: str, seed: int, folder: Path) -> dict[str, Any]:
    """The result of one `sparsify fit`; what learns nothing is the same for every seed."""
    print(f"\n== sparsify fit --strategy {strategy}  (seed {seed})", flush=True)
    command = [sys.executable, "-m", "sparsify", "fit", "--strategy", strategy, "--logger", "csv"]
    command += [
        f"--model.seed={seed}",
        f"--data.seed={seed}",
        f"--trainer.default_root_dir={folder}",
    ]
    subprocess.run(command, check=True, cwd=folder, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    newest = max(folder.glob("runs/*/*/result.json"), key=lambda path: path.stat().st_mtime)
    return json.loads(newest.read_text())


def loss(result: dict[str, Any], text: str = "overall") -> float:
    return result["scores"][text]["loss"]


def gap_closed(result: dict[str, Any], prior: dict[str, Any], dense: dict[str, Any]) -> float:
    """The share of the prior's loss over dense, in nats, that learning took away."""
    return (loss(prior) - loss(result)) / (loss(prior) - loss(dense))


def spread(values: list[float], digits: int) -> str:
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def table(results: dict[str, list[dict[str, Any]]]) -> Table:
    dense, prior = results["dense"][0], results["magnitude"][0]
    texts = list(dense["scores"])
    seeds = max(map(len, results.values()))
    title = "Test perplexity of the embedded model" + (
        f", mean ± standard deviation of {seeds} seeds" if seeds > 1 else ""
    )
    out = Table(title=title)
    for column in ("strategy", *texts, "gap closed", "sparsity", "steps", "seconds"):
        out.add_column(column, justify="left" if column == "strategy" else "right")
    for name, rows in results.items():
        perplexities = [
            spread([row["scores"][text]["perplexity"] for row in rows], 2) for text in texts
        ]
        gap = spread([100 * gap_closed(row, prior, dense) for row in rows], 1) + " %"
        run = rows[0]["run"]
        seconds = spread([row["run"]["seconds"] for row in rows], 0)
        out.add_row(
            name, *perplexities, gap, f"{100 * run['sparsity']:.0f} %", str(run["steps"]), seconds
        )
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--save", type=Path, help="folder for a JSON file of all results")
    args = parser.parse_args()
    results: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for strategy in STRATEGIES:
            seeds = args.seeds if strategy == "maskllm" else args.seeds[:1]
            results[strategy] = [run(strategy, seed, Path(folder)) for seed in seeds]
    Console(width=max(120, Console().width)).print(table(results))
    print(
        "gap closed: share of magnitude's loss over dense, in nats a token, that was learned away"
    )
    if args.save is not None:
        args.save.mkdir(parents=True, exist_ok=True)
        path = args.save / f"embedded_table-{date.today()}.json"
        path.write_text(json.dumps(results, indent=2) + "\n")
        print(f"saved {path}")


if __name__ == "__main__":
    main()
