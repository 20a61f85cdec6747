"""Supervised fine-tuning of a sparse model with TRL: what becomes of its zeros.

The embedded model is pruned by Wanda at 2:4 and exported. From there it is fine-tuned three times,
on prompts and responses made of the embedded text: with ``KeepZeros``, without it, and as a LoRA
adapter, which is merged in PEFT's way and by ``sparsify merge``. Needs ``pip install trl peft``,
and takes about two minutes on one core::

    python benchmarks/sft_zeros.py --save benchmarks/results

Losses are in nats a token of held-out responses. "zeros" is the share of the export's zeros that
are exactly zero after saving and loading again.
"""

import argparse
import gzip
import json
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from kept_runs import save
from peft import LoraConfig
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from trl import SFTConfig, SFTTrainer

from sparsify import KeepZeros, sparsify
from sparsify.common.machine import cpu_name
from sparsify.export.exchange.apply import apply_masks
from sparsify.export.manifest import manifest_patterns
from sparsify.export.mask_file.file import read_masks
from sparsify.masking.linear import maskable
from sparsify.models.base import load_base
from sparsify.serving.merge import merge
from sparsify.serving.verify import verify

TEXTS = Path(__file__).parents[1] / "sparsify" / "models" / "embedded" / "text"
KINDS = {
    "shakespeare": "Write on as Shakespeare would.",
    "bible": "Write on as in the Bible.",
    "python": "Complete this Python source.",
}
PROMPT, RESPONSE = 200, 280  # characters
STEPS, ROWS, HELD_OUT = 50, 800, 48


def instructions(split: str, count: int) -> list[dict[str, str]]:
    """Rows of a prompt, which says what to do and gives the begin of a passage, and the rest of the
    passage; equally many of each text.
    """
    rows = []
    for kind, asked in KINDS.items():
        with gzip.open(TEXTS / kind / f"{split}.jsonl.gz", "rt", encoding="utf-8") as lines:
            text = "".join(json.loads(line)["text"] for line in lines)
        step = len(text) // (count // len(KINDS))
        for at in range(0, len(text) - step + 1, step):
            begin, end = text[at : at + PROMPT], text[at + PROMPT : at + PROMPT + RESPONSE]
            rows.append({"prompt": f"### {asked}\n{begin}\n### Answer:\n", "completion": end})
    return rows


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, tokenizer: Any) -> float:
    """Nats a token of the responses."""
    total = tokens = 0.0
    for row in instructions("validation", HELD_OUT):
        prompt, response = (tokenizer(row[key])["input_ids"] for key in ("prompt", "completion"))
        ids = torch.tensor([prompt + response])
        labels = torch.tensor([[-100] * len(prompt) + response])
        total += float(model.eval()(input_ids=ids, labels=labels).loss) * len(response)
        tokens += len(response)
    return total / tokens


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32")


def prune(folder: Path) -> float:
    """Export the embedded model with Wanda's masks; the dense model's loss."""
    base = load_base("embedded", "float32")
    dense = held_out_loss(base.model, base.tokenizer)
    texts = [{"text": row["prompt"] + row["completion"]} for row in instructions("train", ROWS)]
    quiet = {"enable_progress_bar": False, "accelerator": "cpu", "devices": 1}
    result = sparsify(base.model, "wanda", texts, base.tokenizer, trainer=quiet)
    result.export(folder)
    return dense


def tune(export: Path, out: Path, **options: Any) -> SFTTrainer:
    """Fifty steps of AdamW; what is trained is saved in ``out``."""
    config = SFTConfig(
        str(out / "run"),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-3 if "peft_config" not in options else 5e-3,
        weight_decay=0.1,
        lr_scheduler_type="cosine",
        max_length=256,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_steps=STEPS // 2,
        logging_steps=5,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = SFTTrainer(
        load(export),
        config,
        train_dataset=Dataset.from_list(instructions("train", ROWS)),
        processing_class=AutoTokenizer.from_pretrained(export),
        **options,
    )
    trainer.train()
    trainer.save_model(str(out))
    return trainer


def zeros_left(export: Path, folder: Path) -> float:
    """The share of the export's zeros that are exactly zero in a saved model."""
    before, after = maskable(load(export)), maskable(load(folder))
    found = [
        (after[name].weight[before[name].weight == 0] == 0) for name in manifest_patterns(export)
    ]
    return float(torch.cat(found).double().mean())


def as_export(export: Path, folder: Path, out: Path) -> bool:
    """Give a fine-tuned model a manifest again; whether nothing is wrong with it then."""
    masks = read_masks(export)
    apply_masks(str(folder), masks, masks.patterns, out)
    return verify(out).ok


def measure(work: Path) -> dict[str, Any]:
    export = work / "export"
    dense = prune(export)
    tokenizer = AutoTokenizer.from_pretrained(export)
    rows: dict[str, dict[str, Any]] = {
        "dense, before": {"held_out": dense},
        "sparse, before": {"held_out": held_out_loss(load(export), tokenizer), "zeros": 1.0},
    }

    def add(name: str, model: PreTrainedModel, folder: Path, run: SFTTrainer) -> None:
        losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
        row = {"held_out": held_out_loss(model, tokenizer), "zeros": zeros_left(export, folder)}
        rows[name] = row | {"train_losses": losses}

    for name, callbacks in {"KeepZeros": [KeepZeros(export)], "no callback": []}.items():
        out = work / name
        run = tune(export, out, callbacks=callbacks)
        add(name, load(out), out, run)
        middle = out / "run" / f"checkpoint-{STEPS // 2}"
        rows[name]["zeros_of_the_checkpoint"] = zeros_left(export, middle)
    rows["KeepZeros"]["verified"] = as_export(export, work / "KeepZeros", work / "again")

    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    run = tune(export, work / "adapter", peft_config=lora)
    rows["LoRA, not merged"] = {"held_out": held_out_loss(run.model, tokenizer)}
    run.model.merge_and_unload().save_pretrained(work / "filled")
    merged = merge(export, work / "adapter", work / "merged")
    add("LoRA, merged by PEFT", load(work / "filled"), work / "filled", run)
    add("LoRA, sparsify merge", load(work / "merged"), work / "merged", run)
    rows["LoRA, sparsify merge"]["squared_norm_taken_away"] = merged.whole.taken
    rows["LoRA, sparsify merge"]["verified"] = verify(work / "merged").ok
    return rows


def table(rows: dict[str, dict[str, Any]]) -> Table:
    found = Table(title=f"{STEPS} steps of SFT, nats a token")
    for column in ("", "first training losses", "last", "held out", "zeros left"):
        found.add_column(column, justify="right" if column else "left")
    for name, row in rows.items():
        losses = [f"{loss:.3f}" for loss in row.get("train_losses", [])] or ["", ""]
        zeros = f"{row['zeros']:.2%}" if "zeros" in row else ""
        found.add_row(name, losses[0], losses[-1], f"{row['held_out']:.3f}", zeros)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--save", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    start = time.process_time()
    with tempfile.TemporaryDirectory() as work:
        rows = measure(Path(work))
    Console().print(table(rows))
    packages = ("torch", "transformers", "trl", "peft", "accelerate")
    result = {
        "versions": {name: version(name) for name in packages},
        "cpu": cpu_name(),
        "cpu_seconds": round(time.process_time() - start),
        "steps": STEPS,
        "rows": rows,
    }
    save(result, args.save, "sft_zeros")


if __name__ == "__main__":
    main()
