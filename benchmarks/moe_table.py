"""Compare strategies on the mixture of experts that ``moe_model.py`` trains; each runs through the
command line itself, with the embedded text::

    python benchmarks/moe_model.py work/moe
    python benchmarks/moe_table.py work/moe --folder work/moe_runs --save benchmarks/results

Settings are those of the embedded model. Results are kept in the folder; a run that was stopped is
resumed.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from domain_table import DOMAINS, SEEDED, embedded_data
from embedded_table import ONE_SHOT, WITHOUT_SEED, gap_closed, spent
from kept_runs import check_protocol, fit, save, spread
from moe_model import EMBEDDED
from rich.console import Console
from rich.table import Table

CONFIGS = Path(__file__).parents[1] / "configs"
# In the order in which they are shown.
RUNS = ("dense", "magnitude", "wanda", "sparsegpt", "maskllm", "selfmask")


def options(name: str, args: argparse.Namespace, seed: int) -> list[str]:
    # As files, since a run without text that is named is meant for the embedded model alone.
    train = [str(EMBEDDED / "text" / text / "train.jsonl.gz") for text in DOMAINS]
    learn = [
        f"--trainer.max_steps={args.steps}",
        f"--trainer.val_check_interval={max(1, args.steps // 4)}",
        "--trainer.check_val_every_n_epoch=null",
        "--history.at_start=true",
    ]
    return [
        f"--config={CONFIGS / f'{name}.yaml'}",
        f"--model.name_or_path={args.model.resolve()}",
        f"--data.train={json.dumps(train)}",
        *embedded_data(),
        "--logger=csv",
        *([] if name in ONE_SHOT else learn),
        *(f"--{part}.seed={seed}" for part in SEEDED),
    ]


def table(results: dict[str, list[dict[str, Any]]]) -> Table:
    dense, prior = results["dense"][0], results["magnitude"][0]
    texts = list(dense["scores"])
    out = Table(title="Test perplexity of a small mixture of experts")
    columns = ("gap closed", "block weights masked", "steps", "tokens", "seconds", "peak GiB")
    for column in ("strategy", *texts, *columns):
        out.add_column(column, justify="left" if column == "strategy" else "right")
    for name, rows in results.items():
        runs = [row["run"] for row in rows]
        out.add_row(
            name,
            *(spread([row["scores"][text]["perplexity"] for row in rows], 2) for text in texts),
            spread([100 * gap_closed(row, prior, dense) for row in rows], 1) + " %",
            f"{runs[0]['coverage']['blocks']:.1%}",
            str(runs[0]["steps"]),
            f"{spent(rows[0], 'tokens'):,}",
            spread([spent(row, "seconds") for row in rows], 0),
            spread([run["peak_memory_gib"] for run in runs], 2),
        )
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="the folder that moe_model.py wrote")
    parser.add_argument("--folder", type=Path, required=True, help="for the runs")
    parser.add_argument("--only", nargs="+", choices=RUNS, help="these; then there is no table")
    parser.add_argument("--steps", type=int, default=300, help="of learned masks")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--save", type=Path, help="folder for a JSON file of all results")
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    results: dict[str, list[dict[str, Any]]] = {}
    for seed in args.seeds:
        for name in args.only or RUNS:
            if name in WITHOUT_SEED and seed != args.seeds[0]:
                continue
            steps = "" if name in ONE_SHOT else f", {args.steps} steps"
            run = f"{name}{steps}, seed {seed}"
            result = fit(run, options(name, args, seed), args.folder.resolve())
            results.setdefault(name, []).append(result)
    if args.only:
        return
    check_protocol([row for rows in results.values() for row in rows])
    Console(width=max(160, Console().width)).print(table(results))
    print("gap closed: share of magnitude's loss over dense, in nats a token, that is gone")
    print("block weights masked: share of the decoder blocks' matrices and stacks of matrices")
    for rows in results.values():
        for row in rows:
            (row["masks"] or {}).pop("layers", None)
    save(results, args.save, "moe")


if __name__ == "__main__":
    main()
