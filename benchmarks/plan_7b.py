"""What strategies would cost on a model of LLaMA-2-7B's shapes, as ``sparsify plan`` computes it::

    python benchmarks/plan_7b.py --save benchmarks/results

One device, bfloat16 (float32 where weights train), windows of 4,096 tokens, gradient checkpointing;
learning as long as MaskLLM's paper: 2,000 steps of 256 windows. One-shot strategies are calibrated
on 128 windows. Nothing is measured, and nothing downloaded.
"""

import argparse
import json
import os
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

from embedded_table import NO_TEACHER
from kept_runs import save
from real_rows import CONFIGS, SAME_TEACHER
from rich.console import Console
from rich.table import Table

from sparsify.common.version import version

SHAPES = CONFIGS / "shapes" / "llama2_7b"
GPU = "A100 80GB SXM"
GIB = 2**30
LEARN = [
    "--data.batch_size=1",
    "--trainer.max_steps=2000",
    "--trainer.accumulate_grad_batches=256",
    "--model.gradient_checkpointing=true",
]
SMALL = ["--model.strategy.dtype=bfloat16"]  # scores
TRAIN = ["--model.dtype=float32", "--trainer.precision=bf16-mixed"]
# In the order in which they are shown.
RUNS: dict[str, list[str]] = {
    "wanda": ["--strategy=wanda"],
    "sparsegpt, updated": ["--strategy=sparsegpt", "--model.strategy.update_weights=true"],
    "admm": ["--strategy=admm"],
    "swaps": ["--strategy=swaps"],
    "selfmask": ["--strategy=selfmask", *SMALL, *LEARN],
    "selfmask, scores in float32": ["--strategy=selfmask", *LEARN],
    "selfmask, no teacher": ["--strategy=selfmask", *SMALL, *LEARN, *NO_TEACHER],
    "maskllm": ["--strategy=maskllm", *LEARN],
    "maskllm, distilled": ["--strategy=maskllm", *LEARN, *SAME_TEACHER],
    "sr_ste, distilled": ["--strategy=sr_ste", *LEARN, "--model.distillation.weight=0.5", *TRAIN],
}
COMMON = [
    "--model.dtype=bfloat16",
    "--data.block_size=4096",
    "--model.calibration.samples=128",
    "--trainer.accelerator=cuda",
]


def plan(name: str) -> dict[str, Any]:
    """Peak bytes of the run of this row, and its GPU-hours at 40 % of the GPU's peak."""
    command = [sys.executable, "-m", "sparsify", "plan", f"--model.name_or_path={SHAPES}"]
    command += [*COMMON, *RUNS[name], "--format=json"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found = json.loads(done.stdout)["tries"][0]
    hours = found["time"]["gpus"][GPU]
    return {
        "options": [*COMMON, *RUNS[name]],
        "peak": found["peak"],
        "phase": found["phase"],
        "tokens_a_step": found["time"]["tokens_a_step"],
        "utilisation": found["time"]["utilisation"],
        "seconds_a_step": hours["step"],
        "hours": hours["hours"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--save", type=Path, help="folder for a JSON file of all results")
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    table = Table(title=f"LLaMA-2-7B's shapes, one {GPU}, computed")
    for column in ("strategy", "peak GiB", "highest in", "seconds a step", "GPU-hours"):
        table.add_column(column, justify="left" if column == "strategy" else "right")
    rows = {}
    for name in args.only:
        row = rows[name] = plan(name)
        step = f"{row['seconds_a_step']:,.0f}" if row["seconds_a_step"] else ""
        cells = f"{row['peak'] / GIB:.1f}", row["phase"], step, f"{row['hours']:,.2f}"
        table.add_row(name, *cells)
    Console(width=100).print(table)
    versions = {package: version(package) for package in ("sparsify", "torch", "transformers")}
    content = {"date": f"{date.today()}", "versions": versions, "gpu": GPU, "rows": rows}
    save(content, args.save, "plan_7b")


if __name__ == "__main__":
    main()
