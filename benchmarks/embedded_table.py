"""Compare strategies on the embedded model; each runs through the command line itself.

Three rows and one seed, which is what ``make demo`` runs, or all rows and several seeds, with the
results as one JSON file, for ``make compare``, which then makes the report of them::

    python benchmarks/embedded_table.py
    python benchmarks/embedded_table.py --all --seeds 0 1 2 --jobs 2 --folder work --save .

Results are kept in the folder; what it holds is not run again. Rows of ``EXTRA`` answer questions
of single pages of the documentation, and run when they are named, into a file of their own::

    python benchmarks/embedded_table.py --only dense "selfmask, 1:4" --save . --name patterns
"""

import argparse
import itertools
import os
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import kept_runs
from kept_runs import (
    Rows,
    check_protocol,
    fit,
    from_budgets,
    from_export,
    save,
    share_cores,
    slim,
    spread,
)
from rich.console import Console
from rich.table import Table

# The weight of block outputs that is best for selfmask is given to other distilled runs too.
DISTILLED = [
    "--model.distillation.weight=1",
    "--model.distillation.hidden.start=0.5",
    "--model.distillation.hidden.end=0",
]
NO_TEACHER = ["--model.distillation.weight=0", "--model.distillation.hidden=0"]
# In the order in which they are shown.
RUNS: dict[str, list[str]] = {
    "dense": ["--strategy=dense"],
    "magnitude": ["--strategy=magnitude"],
    "wanda": ["--strategy=wanda"],
    "ria": ["--strategy=ria"],
    "gblm": ["--strategy=gblm"],
    "pruner_zero": ["--strategy=pruner_zero"],
    "dsnot": ["--strategy=dsnot"],
    "sparsegpt": ["--strategy=sparsegpt"],
    "sparsegpt, updated": ["--strategy=sparsegpt", "--model.strategy.update_weights=true"],
    "admm": ["--strategy=admm"],
    "swaps": ["--strategy=swaps"],
    "swaps, refitted": ["--strategy=swaps", "--model.strategy.refit=true"],
    "wanda, permuted": ["--strategy=wanda", "--model.permute=all"],
    "sparsegpt, permuted": ["--strategy=sparsegpt", "--model.permute=all"],
    "swaps, permuted": ["--strategy=swaps", "--model.permute=all"],
    "wanda, budget": ["--strategy=wanda", "--config={budget}"],
    "maskllm": ["--strategy=maskllm"],
    "maskllm, distilled": ["--strategy=maskllm", *DISTILLED],
    "selfmask": ["--strategy=selfmask"],
    "selfmask, no teacher": ["--strategy=selfmask", *NO_TEACHER],
    "selfmask, budget": ["--strategy=selfmask", "--config={budget}"],
    "proxsparse": ["--strategy=proxsparse"],
    "maskpro": ["--strategy=maskpro"],
    "fixed_mask": ["--strategy=fixed_mask"],
    "sr_ste": ["--strategy=sr_ste"],
    "sr_ste, distilled": ["--strategy=sr_ste", "--model.distillation.weight=0.5"],
    # The weights that selfmask's mask keeps learn on.
    "selfmask, then fixed_mask": [
        "--strategy=fixed_mask",
        "--model.strategy.prior={selfmask}",
        *DISTILLED,
    ],
}
EXTRA: dict[str, list[str]] = {
    "swaps, dense target": ["--strategy=swaps", "--model.strategy.target=dense"],
    **{
        f"sparsegpt, updated, {n} windows": [
            *RUNS["sparsegpt, updated"],
            f"--model.calibration.samples={n}",
        ]
        for n in (8, 32, 512)
    },
    "maskllm, from swaps": ["--strategy=maskllm", "--model.strategy.prior=swaps"],
    "maskllm, from sparsegpt": ["--strategy=maskllm", "--model.strategy.prior=sparsegpt"],
    "maskllm, from wanda": ["--strategy=maskllm", "--model.strategy.prior=wanda"],
    "maskllm, no prior": ["--strategy=maskllm", "--model.strategy.prior=null"],
    **{
        f"maskllm, kappa {kappa}": [
            "--strategy=maskllm",
            f"--model.strategy.kappa.start={kappa}",
            f"--model.strategy.kappa.end={kappa}",
        ]
        for kappa in (1, 100_000)
    },
    **{
        f"maskllm, {n} steps": ["--strategy=maskllm", f"--trainer.max_steps={n}"]
        for n in (10, 30, 100)
    },
    "maskllm, permuted": ["--strategy=maskllm", "--model.permute=all"],
    "selfmask, permuted": ["--strategy=selfmask", "--model.permute=all"],
    **{
        f"{name}, {pattern}": [*RUNS[name], f"--model.pattern={pattern}"]
        for pattern in ("1:4", "4:8")
        for name in ("magnitude", "swaps", "maskllm", "selfmask")
    },
    **{
        f"{name}, 1:4, from swaps": [
            *RUNS[name],
            "--model.pattern=1:4",
            "--model.strategy.prior=swaps",
        ]
        for name in ("maskllm", "selfmask")
    },
    "wanda, 8:16": ["--strategy=wanda", "--model.pattern=8:16"],
    "wanda, budget of 16": ["--strategy=wanda", "--config={budget_16}"],
    "selfmask, budget of 16": ["--strategy=selfmask", "--config={budget_16}"],
    "selfmask, 8:16": ["--strategy=selfmask", "--model.pattern=8:16"],
    "sr_ste, same teacher": ["--strategy=sr_ste", *DISTILLED],
    "maskpro, leave-one-out": [
        "--strategy=maskpro",
        "--model.strategy.estimator=leave_one_out",
    ],
    "maskpro, control variate": [
        "--strategy=maskpro",
        "--model.strategy.estimator=control_variate",
        "--data.batch_size=8",
        "--trainer.max_steps=300",
    ],
}
SEEDED = ("model", "data", "model.calibration")
WITHOUT_SEED = ("dense", "magnitude")  # nothing random enters
# Strategies before the first that learns.
METHODS = tuple(itertools.takewhile(lambda name: name != "maskllm", RUNS))
ONE_SHOT = tuple(name for name in RUNS | EXTRA if name.split(", ")[0] in METHODS)
GAP = "gap closed: share of magnitude's loss over dense, in nats a token, that was learned away"
DEMO = ("dense", "magnitude", "selfmask")
# The course of a run, for the report: five validations, and 15 looks at the masks.
WATCHED = ["--history.at_start=true", "--trainer.check_val_every_n_epoch=null"]
STEPS = {"maskpro": 600, "maskpro, leave-one-out": 600}
STEPS |= {f"maskllm, {n} steps": n for n in (10, 30, 100)}
# In braces, such a word stands for what this search with `sparsify budget` chose; the name of a row
# stands for what that row exported.
SEARCH = ["--kept=0.5", "--unit=layer", "--windows=16", "--rounds=1"]
ALLOWED = "--patterns=[dense,6:8,5:8,2:4,3:8,1:4]"
BUDGETS = {
    "budget": [*SEARCH, "--strategy=wanda", ALLOWED],
    "budget_16": [
        *SEARCH,
        "--strategy=swaps",
        "--patterns=[dense,14:16,12:16,10:16,8:16,6:16,4:16]",
    ],
}


def watched(name: str) -> list[str]:
    """Options of a run whose course is to be drawn."""
    if name in ONE_SHOT:
        return []
    steps = STEPS.get(name, 300)
    looks = ["--masks.per_layer=false", f"--masks.every_n_steps={max(1, steps // 15)}"]
    return [*WATCHED, f"--trainer.val_check_interval={steps // 4}", *looks]


def loss(result: dict[str, Any], text: str = "overall") -> float:
    return result["scores"][text]["loss"]


def gap_closed(result: dict[str, Any], prior: dict[str, Any], dense: dict[str, Any]) -> float:
    """The share of the prior's loss over dense, in nats, that learning took away."""
    return (loss(prior) - loss(result)) / (loss(prior) - loss(dense))


def spent(result: dict[str, Any], what: str) -> float:
    """Tokens or seconds of calibration and training."""
    return result["run"][what] + (result["run"]["calibration"] or {}).get(what, 0)


def table(results: Rows, title: str) -> Table:
    seeds = max(map(len, results.values()))
    out = Table(
        title=title + (f", mean ± standard deviation of {seeds} seeds" if seeds > 1 else "")
    )
    texts = next(iter(results.values()))[0]["scores"]
    columns = ("weights", "steps", "tokens", "seconds", "peak GiB")
    for column in ("strategy", *texts, "gap closed", *columns):
        out.add_column(column, justify="left" if column in ("strategy", "weights") else "right")
    for name, rows in results.items():
        perplexities = [
            spread([row["scores"][text]["perplexity"] for row in rows], 2) for text in texts
        ]
        gap = ""
        if {"dense", "magnitude"} <= set(results):
            dense, prior = results["dense"][0], results["magnitude"][0]
            gap = spread([100 * gap_closed(row, prior, dense) for row in rows], 1) + " %"
        runs = [row["run"] for row in rows]
        # Results of earlier versions may lack it.
        memory = [run["peak_memory_gib"] for run in runs if "peak_memory_gib" in run]
        out.add_row(
            name,
            *perplexities,
            gap,
            runs[0]["strategy"]["weights"],
            str(runs[0]["steps"]),
            f"{spent(rows[0], 'tokens'):,}",
            spread([spent(row, "seconds") for row in rows], 0),
            spread(memory, 2) if memory else "",
        )
    return out


def run_name(name: str, seed: int) -> str:
    return f"{name}, seed {seed}"


def weight(name: str) -> float:
    """About how long a row takes, in units of a one-shot row."""
    return 1 if name in ONE_SHOT else STEPS.get(name, 300) / 50


def run(name: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """The result of a row with one seed; what it starts from is made first."""
    options, aloud = (RUNS | EXTRA)[name], args.jobs == 1
    if any("{selfmask}" in option for option in options):
        run("selfmask", seed, args)
        options = from_export(options, "selfmask", run_name("selfmask", seed), args.folder)
    options = from_budgets(options, BUDGETS, args.folder, aloud)
    options = [*options, "--logger=csv", *(watched(name) if args.all else [])]
    options += [f"--{part}.seed={seed}" for part in SEEDED]
    return fit(run_name(name, seed), options, args.folder, aloud)


def run_all(rows: list[tuple[str, int]], args: argparse.Namespace) -> list[dict[str, Any]]:
    """The results of (row, seed), ``args.jobs`` at a time."""
    runs = [kept_runs.Run(run_name(*row), weight(row[0]), partial(run, *row, args)) for row in rows]
    results = dict(kept_runs.run_all(runs, args.folder, args.jobs))
    return [results[one.name] for one in runs]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--all", action="store_true", help="all rows, not only the demo's three")
    parser.add_argument("--only", nargs="+", choices=list(RUNS | EXTRA), help="these rows")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--jobs", type=int, default=1, help="so many at a time, a core for each")
    parser.add_argument("--folder", type=Path, help="where runs are kept; the default is nowhere")
    parser.add_argument("--save", type=Path, help="folder for a JSON file of all results")
    parser.add_argument("--name", help="of that file, where --only names its rows")
    args = parser.parse_args()
    if args.only and args.save and not args.name:
        parser.error("--only with --save needs --name: a part must not take the place of the whole")
    os.environ["HF_HUB_OFFLINE"] = "1"
    share_cores(args.jobs)
    names = args.only or (list(RUNS) if args.all else DEMO)
    rows = [
        (name, seed)
        for seed in args.seeds
        for name in names
        if name not in WITHOUT_SEED or seed == args.seeds[0]
    ]
    results: Rows = {}
    with tempfile.TemporaryDirectory() as temporary:
        args.folder = (args.folder or Path(temporary)).resolve()
        for (name, _), result in zip(rows, run_all(rows, args), strict=True):
            results.setdefault(name, []).append(slim(result))
    check_protocol([row for rows in results.values() for row in rows])
    title = "Test perplexity of the embedded model"
    Console(width=max(160, Console().width)).print(table(results, title))
    print(GAP)
    save(results, args.save, args.name or "compare")


if __name__ == "__main__":
    main()
