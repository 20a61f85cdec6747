"""Seconds of the Makefile's targets in a fresh clone of this repository, one after the other::

    python benchmarks/make_times.py --folder fresh --save benchmarks/results
    python benchmarks/make_times.py --folder fresh --targets demo test docs

``.venv/ready``, the installation, comes first. The machine should do nothing else. What a target
prints goes to ``FOLDER/TARGET.log``; the saved file is written after each of them.
"""

import argparse
import os
import subprocess
import time
from datetime import date
from pathlib import Path
from typing import Any

from kept_runs import save

from sparsify.common.machine import cpu_name

ROOT = Path(__file__).resolve().parent.parent
READY = ".venv/ready"
TARGETS = ("demo", "test", "docs", "compare")


def seconds(target: str, clone: Path, log: Path) -> float:
    """How long ``make TARGET`` takes; one that fails ends everything."""
    start = time.perf_counter()
    with log.open("w", encoding="utf-8") as file:
        done = subprocess.run(["make", target], cwd=clone, stdout=file, stderr=subprocess.STDOUT)
    if done.returncode:
        raise SystemExit(f"make {target} ended with status {done.returncode}: see {log}")
    return round(time.perf_counter() - start, 1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="for the clone; it must be new")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=TARGETS)
    parser.add_argument("--save", type=Path, help="folder for a JSON file of all results")
    args = parser.parse_args()
    args.folder.mkdir(parents=True)
    clone = args.folder / "clone"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=clone, check=True, capture_output=True, text=True
    )
    taken: dict[str, float] = {}
    results: dict[str, Any] = {
        "date": str(date.today()),
        "commit": commit.stdout.strip(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "seconds": taken,
    }
    for target in (READY, *args.targets):
        taken[target] = seconds(target, clone, args.folder / f"{Path(target).name}.log")
        print(f"make {target}: {taken[target]} s", flush=True)
        save(results, args.save, "make_times")


if __name__ == "__main__":
    main()
