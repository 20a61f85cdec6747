"""What must not move: losses of learned strategies and masks of one-shot ones, embedded model.

python -m tests.golden        # rewrites assets/golden.json; say in CHANGELOG.md why
"""

import csv
import hashlib
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lightning.pytorch.loggers import CSVLogger
from transformers import AutoModelForCausalLM, AutoTokenizer

import sparsify
from sparsify.common.machine import cpu_name
from sparsify.data import TextDataModule

ONE_SHOT = (
    "admm",
    "dsnot",
    "gblm",
    "magnitude",
    "pruner_zero",
    "ria",
    "sparsegpt",
    "swaps",
    "wanda",
)
LEARNED = ("maskllm", "maskpro", "selfmask", "sr_ste")
STEPS = (1, 5, 20)
FILE = Path(__file__).parent / "assets" / "golden.json"
EMBEDDED = Path(sparsify.__file__).parent / "models" / "embedded"


def machine() -> dict[str, Any]:
    """What figures depend on beside the code: elsewhere sums are added in another order."""
    kind = torch.backends.cpu.get_cpu_capability()
    return {"torch": torch.__version__, "cpu": kind, "name": cpu_name()}


def figures() -> dict[str, Any]:
    """All of them, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return {
            "masks": {name: _digest(_run(name, 0)) for name in ONE_SHOT},
            "losses": {name: _losses(name) for name in LEARNED},
        }
    finally:
        torch.set_num_threads(threads)


def _run(name: str, steps: int, **trainer: Any) -> sparsify.Sparsified:
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    text = EMBEDDED / "text" / "shakespeare" / "validation.jsonl.gz"
    data = TextDataModule(train=text, block_size=64, batch_size=2)
    settings = {"accelerator": "cpu", "enable_progress_bar": False} | trainer
    return sparsify.sparsify(
        model,
        name,
        data,
        tokenizer,
        steps=max(steps, 1),
        trainer=settings,
        seed=0,
        calibration=sparsify.Calibration(samples=8, cache=False),
    )


def _digest(done: sparsify.Sparsified) -> str:
    digest = hashlib.sha256()
    for name, mask_OI in sorted(done.masks().items()):
        digest.update(name.encode() + mask_OI.to(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _losses(name: str) -> dict[str, float]:
    with TemporaryDirectory() as folder:
        logger = CSVLogger(folder, flush_logs_every_n_steps=1)
        _run(name, max(STEPS), logger=logger, log_every_n_steps=1)
        with (Path(logger.log_dir) / "metrics.csv").open(encoding="utf-8") as lines:
            rows = [row for row in csv.DictReader(lines) if row.get("train/loss")]
    assert len(rows) == max(STEPS)
    return {str(step): float(rows[step - 1]["train/loss"]) for step in STEPS}


if __name__ == "__main__":
    FILE.write_text(json.dumps({"machine": machine()} | figures(), indent=2) + "\n")
