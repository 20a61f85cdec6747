"""Holds ``sparsify plan`` to the peak resident memory of real runs on CPU.

For each strategy: two steps of ``sparsify fit`` in a process of its own, with nothing cached, no
logger and no export, whose ``ru_maxrss`` is what was measured; and the plan for the same settings::

    python benchmarks/plan_memory.py MODEL --text train.jsonl --save benchmarks/results

The C library's allocator is told to take tensors from the system one by one and to give them back
(MALLOC_MMAP_THRESHOLD_, MALLOC_TRIM_THRESHOLD_, MALLOC_ARENA_MAX), so that the peak is of what
lives, not of gaps between.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

from sparsify.cli.commands.plan import read
from sparsify.common.version import version
from sparsify.training.plan import make_plan

STRATEGIES = ("selfmask", "maskllm", "maskpro", "sparsegpt")
MALLOC = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 20),
}


def measure(strategy: str, words: list[str], text: Path) -> int:
    """Peak resident bytes of a run of two steps.

    Args:
        strategy: its name.
        words: other options, those that are planned with too.
        text: of training and calibration.
    """
    options = {
        "data.train": text,
        "trainer.max_steps": 2,
        "trainer.logger": "false",
        "trainer.enable_checkpointing": "false",
        "trainer.enable_progress_bar": "false",
        "trainer.limit_val_batches": 0,
        "output.enabled": "false",
    }
    words = [*words, *(f"--{name}={value}" for name, value in options.items())]
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | MALLOC | {"SPARSIFY_CACHE": f"{folder}/cache"}
        run = subprocess.Popen(
            [sys.executable, "-m", "sparsify", "fit", "--strategy", strategy, *words],
            cwd=folder,
            env=environment,
        )
        _, status, usage = os.wait4(run.pid, 0)
    if status:
        raise SystemExit(f"{strategy}: the run ended with status {status}")
    return usage.ru_maxrss * 1024


def compare(strategy: str, words: list[str], text: Path) -> dict[str, Any]:
    """Bytes as predicted and measured; arguments as of :func:`measure`."""
    predicted = make_plan(read(["--strategy", strategy, *words]).settings).best
    measured = measure(strategy, words, text)
    print(f"{strategy}: {predicted.total / measured:.3f}", flush=True)
    return {
        "predicted": predicted.total,
        "measured": measured,
        "ratio": round(predicted.total / measured, 4),
        "phase": predicted.phase,
        "parts": predicted.parts,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--block_size", type=int, default=512)
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--save", type=Path)
    words = parser.parse_args()
    options = {
        "model.name_or_path": words.model.resolve(),
        "model.calibration.samples": words.samples,
        "data.block_size": words.block_size,
        "data.batch_size": words.batch_size,
        "trainer.accelerator": "cpu",
    }
    given = [f"--{name}={value}" for name, value in options.items()]
    text = words.text.resolve()
    results = {strategy: compare(strategy, given, text) for strategy in STRATEGIES}
    content = {
        "date": date.today().isoformat(),
        "model": words.model.name,
        "text": words.text.name,
        "settings": {
            "dtype": "float32",
            "steps": 2,
            **{name: getattr(words, name) for name in ("block_size", "batch_size", "samples")},
        },
        "malloc": MALLOC,
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "versions": {name: version(name) for name in ("sparsify", "torch", "transformers")}
        | {"python": platform.python_version()},
        "bytes": results,
    }
    print(json.dumps(content, indent=2))
    if words.save:
        file = words.save / f"plan_memory-{content['date']}.json"
        file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
