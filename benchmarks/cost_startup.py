"""CPU seconds that commands take to start, each in processes of its own."""

import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cost_files import TINY, random_masks, write
from measuring import Contestant, in_turns

from sparsify import NMPattern

FILE = "masks.nmask"
COMMANDS = {
    "sparsify --version": ["-m", "sparsify", "--version"],
    "sparsify --help": ["-m", "sparsify", "--help"],
    "sparsify mask show": ["-m", "sparsify", "mask", "show", FILE],
    "import torch": ["-c", "import torch"],
    "import sparsify": ["-c", "import sparsify"],
    "sparsify fit --help": ["-m", "sparsify", "fit", "--help"],
}


def of_children() -> float:
    """CPU seconds of the processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def starting(words: list[str], folder: Path) -> Contestant:
    command = [sys.executable, *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    settings = {"cwd": folder, "env": environment, "stdout": subprocess.DEVNULL}
    return lambda _: lambda: subprocess.run(command, check=True, **settings)


def measure(quick: bool, rounds: int) -> dict[str, Any]:
    """Of each command; the mask file that is shown has one small block."""
    pattern, names = NMPattern(2, 4), list(COMMANDS)[: 1 if quick else None]
    with TemporaryDirectory() as folder:
        write(Path(folder) / FILE, random_masks(pattern, *TINY), pattern)
        contestants = {name: starting(COMMANDS[name], Path(folder)) for name in names}
        times = in_turns(contestants, rounds, of_children)
    rows = {name: {"seconds": statistics.median(t), "times": t} for name, t in times.items()}
    return {"rows": rows}
