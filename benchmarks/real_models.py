"""Compare strategies on SmolLM2-135M and on a small mixture of experts; each runs through the
command line itself::

    python benchmarks/real_models.py --model smollm2 --folder work --save benchmarks/results
    python benchmarks/real_models.py --model smollm2 --folder work --c4 c4.jsonl --wikitext wiki.txt
    python benchmarks/real_models.py --model moe --folder work --save benchmarks/results

``smollm2.py`` tells where SmolLM2 and its texts come from. The mixture is that of ``moe_model.py``,
in ``FOLDER/moe``; it is trained where it is not there, and measured on the embedded text.

Results are kept in the folder: what it holds is not run again, and a run that was stopped goes on.
The saved file, written after every run, is enough to go on elsewhere: rows of ``--keep FILE``, and
of today's file, are not run again. They must be of the same protocol, for which the dense model is
measured first. What does not lie in that file must be taken along: a trained mixture, since another
one is another model, and what ``selfmask`` exported (``--selfmask``), from which a row starts.

``--tasks`` adds accuracies on the two-choice and cloze questions that ``continuation_tasks.py``
makes of the test texts (``'.[eval]'``), of the exports that the folder holds.
"""

import argparse
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

from continuation_tasks import embedded_texts, write_tasks
from domain_table import DOMAINS, embedded_data
from embedded_table import GAP, SEEDED, WITHOUT_SEED, table
from kept_runs import (
    Rows,
    Run,
    accuracies,
    check_kept,
    downstream,
    fit,
    from_budgets,
    from_export,
    is_kept,
    learn_in,
    percent,
    read_rows,
    run_all,
    save,
    saved_today,
    share_cores,
    slim,
)
from real_rows import BUDGETS, MOE, ONE_SHOT, OWN_STEPS, SMOLLM2, STEPS
from rich.console import Console
from rich.table import Table
from smollm2 import data_options, fetch_model, texts

from sparsify.data import Source
from sparsify.models.base import EMBEDDED_FOLDER

RUNS = {"smollm2": SMOLLM2, "moe": MOE}
TITLES = {"smollm2": "SmolLM2-135M", "moe": "a small mixture of experts"}
CHOICES = 2
LOOKS = 6  # validations of a learned row after the one at its start


def base(args: argparse.Namespace) -> Path:
    """The model's file or folder; it is made if it is not there."""
    if args.model == "smollm2":
        return fetch_model(args.folder)
    folder: Path = args.folder / "moe"
    if not (folder / "config.json").exists():
        script = Path(__file__).with_name("moe_model.py")
        subprocess.run([sys.executable, str(script), str(folder)], check=True)
    return folder


def common(args: argparse.Namespace) -> list[str]:
    """The options of all rows: the model and its texts."""
    model = [f"--model.name_or_path={args.base}", "--logger=csv"]
    if args.model == "smollm2":
        return [*model, *data_options(args, ("wikitext", "c4"))]
    # As files, since a run without text that is named is meant for the embedded model alone.
    train = [str(EMBEDDED_FOLDER / "text" / text / "train.jsonl.gz") for text in DOMAINS]
    return [*model, f"--data.train={json.dumps(train)}", *embedded_data(), "--data.block_size=256"]


def steps(name: str, args: argparse.Namespace) -> int:
    """How many a row learns."""
    return 0 if name in ONE_SHOT else args.steps or OWN_STEPS.get(name, STEPS[args.model])


def weight(name: str, args: argparse.Namespace) -> float:
    """About how long a row takes, in units of a one-shot row."""
    return max(1.0, steps(name, args) / (12 if args.model == "smollm2" else 50))


def learning(count: int, precision: str) -> list[str]:
    """Options of a row that learns, and whose course is to be drawn."""
    return [
        *learn_in(precision),
        f"--trainer.max_steps={count}",
        f"--trainer.val_check_interval={max(1, count // LOOKS)}",
        "--trainer.check_val_every_n_epoch=null",
        "--history.at_start=true",
        "--masks.per_layer=false",
    ]


def run_name(name: str, seed: int, args: argparse.Namespace) -> str:
    learned = f", {count} steps" if (count := steps(name, args)) else ""
    return f"{name}{learned}, seed {seed}"


def run(name: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """The result of a row with one seed; what it starts from is made first."""
    options, aloud = RUNS[args.model][name], args.jobs == 1
    if any("{selfmask}" in option for option in options):
        if args.selfmask is None:
            run("selfmask", seed, args)
            start = run_name("selfmask", seed, args)
            options = from_export(options, "selfmask", start, args.folder)
        else:
            options = [option.replace("{selfmask}", str(args.selfmask)) for option in options]
    precision = f"--trainer.precision={args.precision}"
    searches = {word: [*search, precision, *common(args)] for word, search in BUDGETS.items()}
    options = from_budgets(options, searches, args.folder, aloud)
    # A config's settings come first, so that the common ones win.
    options = [*options, *common(args), *(f"--{part}.seed={seed}" for part in SEEDED)]
    count = steps(name, args)
    options += learning(count, args.precision) if count else ["--trainer.limit_val_batches=0"]
    result = fit(run_name(name, seed, args), options, args.folder, aloud)
    if args.tasks and name != "dense":
        result["tasks"] = ask(name, seed, args)
    return result


def ask(name: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Accuracies of a row's export and of the dense model."""
    options = [
        f"--base={args.base}",
        f"--include_path={args.folder / 'tasks'}",
        f"--tasks={','.join(args.tasks)}",
        f"--limit={args.questions}",
    ]
    file, aloud = f"downstream-{args.questions}.json", args.jobs == 1
    return downstream(run_name(name, seed, args), options, args.folder, aloud, file)


def left_to_run(kept: Rows, args: argparse.Namespace) -> list[tuple[str, int]]:
    """(row, seed) that was asked for, and that no kept row answers."""
    found = []
    for seed in args.seeds:
        for name in args.only or RUNS[args.model]:
            if name in WITHOUT_SEED and seed != args.seeds[0]:
                continue
            rows = [row for row in kept.get(name, []) if row["run"]["seed"] == seed]
            if not rows:
                found.append((name, seed))
            elif args.tasks and name != "dense" and "tasks" not in rows[0]:
                if is_kept(run_name(name, seed, args), args.folder):
                    found.append((name, seed))
                else:
                    print(f"no questions for {name!r}: its export is not in {args.folder}")
    return found


def check_steps(kept: Rows, args: argparse.Namespace) -> None:
    for name, rows in kept.items():
        for row in rows:
            if name in RUNS[args.model] and row["run"]["steps"] != steps(name, args):
                raise SystemExit(
                    f"the kept row {name!r} learned for {row['run']['steps']} steps, and here it "
                    f"would be {steps(name, args)}: give --steps, or leave its file out"
                )


def united(kept: Rows, new: Rows, order: list[str]) -> Rows:
    """The rows of both, by seed; new ones take the place of kept ones."""
    found: Rows = {}
    for name in [*order, *(name for name in kept if name not in order)]:
        rows = {row["run"]["seed"]: row for row in [*kept.get(name, []), *new.get(name, [])]}
        if rows:
            found[name] = [rows[seed] for seed in sorted(rows)]
    return found


def task_table(results: Rows) -> Table | None:
    """Accuracies with one standard error, of each row's first seed; None if none was asked."""
    asked = {name: rows[0]["tasks"] for name, rows in results.items() if "tasks" in rows[0]}
    if not asked:
        return None
    first = next(iter(asked.values()))
    out = Table("strategy", *first["results"], "mean", "mean less dense's", title="Accuracy, %")
    out.add_row("dense", *accuracies(first, "dense"))
    for name, report in asked.items():
        less = percent(report["mean"]["difference"])
        out.add_row(name, *accuracies(report, "sparse"), less)
    return out


def sources(args: argparse.Namespace) -> dict[str, Source]:
    """The test texts."""
    if args.model == "moe":
        return embedded_texts()
    return {name: Source(**settings) for name, settings in texts(args)[1].items()}


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=list(RUNS), required=True)
    parser.add_argument("--folder", type=Path, required=True, help="for the model and the runs")
    parser.add_argument("--c4", type=Path, help="SmolLM2: C4 as JSONL; the default is the hub's")
    parser.add_argument("--wikitext", type=Path, help="SmolLM2: WikiText-2 text, likewise")
    parser.add_argument("--only", nargs="+", metavar="ROW", help="run these; kept ones are shown")
    parser.add_argument("--steps", type=int, help="of learned rows, to try them")
    parser.add_argument(
        "--precision",
        default="32-true",
        help="of learning and budgets, not of tests; bf16-mixed is faster on GPUs and newer CPUs",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--selfmask", type=Path, help="what that row exported elsewhere")
    parser.add_argument("--tasks", action="store_true", help="ask questions too")
    parser.add_argument("--questions", type=int, default=300, help="at most so many of each task")
    parser.add_argument("--jobs", type=int, default=1, help="so many at a time, a core for each")
    parser.add_argument("--keep", type=Path, help="an earlier results file")
    parser.add_argument("--save", type=Path, help="folder for the results file")
    args = parser.parse_args(words)
    if unknown := set(args.only or ()) - set(RUNS[args.model]):
        rows = ", ".join(map(repr, RUNS[args.model]))
        parser.error(f"--only: {args.model} has no row {', '.join(unknown)}; its rows are {rows}")
    args.folder = args.folder.resolve()
    args.selfmask = args.selfmask and args.selfmask.resolve()
    return args


def main() -> None:
    args = arguments()
    share_cores(args.jobs)
    if args.model == "moe":
        os.environ["HF_HUB_OFFLINE"] = "1"
    name = f"real_models_{args.model}"
    today = [saved_today(args.save, name)] if args.save else []
    earlier = [args.keep] if args.keep else []
    results = read_rows([*earlier, *(file for file in today if file.exists())])
    check_steps(results, args)
    args.folder.mkdir(parents=True, exist_ok=True)
    args.base = base(args)
    if args.tasks:
        args.tasks = write_tasks(args.folder / "tasks", sources(args), CHOICES)
    rows = left_to_run(results, args)
    if rows and results:
        check_kept(results, run("dense", args.seeds[0], args)["protocol"])
    names = {run_name(*row, args): row[0] for row in rows}
    runs = [
        Run(run_name(*row, args), weight(row[0], args), partial(run, *row, args)) for row in rows
    ]
    for ended, result in run_all(runs, args.folder, args.jobs):
        check_kept(results, result["protocol"])
        results = united(results, {names[ended]: [slim(result)]}, list(RUNS[args.model]))
        save(results, args.save, name)
    show(results, f"Test perplexity of {TITLES[args.model]}, 2:4")


def show(results: Rows, title: str) -> None:
    console = Console(width=max(160, Console().width))
    console.print(table(results, title))
    print(GAP)
    if (asked := task_table(results)) is not None:
        console.print(asked)
        print("±: one standard error over the questions")


if __name__ == "__main__":
    main()
