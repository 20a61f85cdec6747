"""What sparsify costs on one thread of a CPU: time, memory and bytes, in one command::

    python benchmarks/cost.py --save benchmarks/results --figure docs/images/cost.svg
    python benchmarks/cost.py --from benchmarks/results/cost-DATE.json --figure docs/images/cost.svg

What a part compares takes turns in one process, round by round, after one round that does not
count; medians of CPU seconds are compared. The parts:

    steps    a step of each strategy that learns, against dense forward and backward; bytes a weight
    oneshot  Wanda and SparseGPT, against plain implementations; bytes a weight
    files    bits a weight of mask files, seconds to write and read them
    startup  CPU seconds until a command has ended, in processes of its own
    growth   exponents of time over width, tokens and layers

``--quick`` goes through all on tiny sizes, in which most of the time is that of Python: its figures
mean nothing.
"""

import argparse
import json
import platform
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cost_files
import cost_growth
import cost_oneshot
import cost_startup
import cost_steps
import torch
from cost_figure import draw
from kept_runs import save
from rich.console import Console
from rich.table import Table

from sparsify.common.machine import cpu_name

PARTS: dict[str, Callable[..., dict[str, Any]]] = {
    "steps": cost_steps.measure,
    "oneshot": cost_oneshot.measure,
    "files": cost_files.measure,
    "startup": cost_startup.measure,
    "growth": cost_growth.measure,
}
ROUNDS, QUICK_ROUNDS = 5, 2


def table(part: str, rows: dict[str, dict[str, Any]]) -> Table:
    """The numbers and words of a part; not its lists."""
    keys = dict.fromkeys(
        key for row in rows.values() for key in row if isinstance(row[key], float | str)
    )
    out = Table(part)
    for key in keys:
        out.add_column(key.replace("_", " "), justify="right")
    for name, row in rows.items():
        cells = (row.get(key, "") for key in keys)
        out.add_row(name, *(c if isinstance(c, str) else f"{c:.3f}" for c in cells))
    return out


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All parts, each printed when it is known."""
    rounds = args.rounds or (QUICK_ROUNDS if args.quick else ROUNDS)
    packages = ("sparsify-llm", "torch", "transformers", "numpy")
    result: dict[str, Any] = {
        "date": str(date.today()),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "versions": {p: version(p) for p in packages} | {"python": platform.python_version()},
        "rounds": rounds,
        "quick": args.quick,
    }
    for part in args.only:
        more = (args.model, args.text, args.samples, args.window) if part == "oneshot" else ()
        result[part] = PARTS[part](args.quick, rounds, *more)
        Console(width=max(150, Console().width)).print(table(part, result[part]["rows"]))
    return result


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to try it")
    parser.add_argument("--rounds", type=int, help=f"{ROUNDS}, or {QUICK_ROUNDS} with --quick")
    parser.add_argument("--model", default="embedded", help="of oneshot")
    parser.add_argument("--text", help="of oneshot; the default is the embedded text")
    parser.add_argument("--samples", type=int, default=64, help="windows of oneshot")
    parser.add_argument("--window", type=int, default=256, help="tokens of a window of oneshot")
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="for cost-DATE.json")
    parser.add_argument("--from", type=Path, dest="file", metavar="FILE", help="measure nothing")
    parser.add_argument("--figure", type=Path, metavar="FILE.svg")
    args = parser.parse_args(words)
    if args.rounds is not None and args.rounds < 1:
        parser.error(
            f"--rounds {args.rounds}: a median needs at least 1; leave it out for {ROUNDS}"
        )
    torch.set_num_threads(1)
    if args.file is None:
        result = measure(args)
        save(result, args.save, "cost")
    else:
        result = json.loads(args.file.read_text(encoding="utf-8"))
    if args.figure is not None:
        draw(result, args.figure)


if __name__ == "__main__":
    main()
