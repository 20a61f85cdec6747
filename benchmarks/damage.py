"""Damage files in many ways, read each, and count what comes of it.

    python benchmarks/damage.py --folder runs/damage --count 1000 --save benchmarks/results

One tiny run is made. Then each kind of file that it leaves is damaged again and again: bits are
flipped, the file is cut, and where it has fields these are removed or replaced by something else.
What is read must be refused with a message or be equal to what was there, up to fields on which no
result depends. Anything else is a fault: accepted with another result, or a traceback. Each case
follows from the seed, the kind and its number alone. Stopped, this goes on where it was.
"""

import argparse
import copy
import json
import logging
import math
import os
import random
import shutil
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from kept_runs import save
from transformers import LlamaConfig, LlamaForCausalLM

from sparsify import SparsifyError
from sparsify.calibration.cache import read_results
from sparsify.cli import main as sparsify
from sparsify.compare import compare
from sparsify.masks.file import read_masks
from sparsify.verify import verify

REFUSED, EQUAL, CHANGED, TRACEBACK = "refused", "equal", "changed a result", "traceback"
STEPS, SAVED_AT = 3, 2
HERE = Path(__file__).resolve().parent
Case = tuple[Path, random.Random]
ODD: list[Any] = [None, True, -1, 2**70, math.nan, math.inf, 1.5, "x", "", [], {}, [1], {"a": 1}]


class Files:
    """A tiny run, and what it left."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self.root.mkdir(parents=True, exist_ok=True)
        self.options = [
            "--strategy=maskllm",
            f"--model.name_or_path={self.root / 'model'}",
            *(f"--data.{part}={self.root / 'text.txt'}" for part in ("train", "validation", "test")),
            "--data.block_size=16",
            "--data.batch_size=4",
            "--model.calibration.samples=8",
            "--model.optimizer.init_args.lr=0.1",
            "--trainer.accelerator=cpu",
            "--trainer.enable_progress_bar=false",
            "--trainer.limit_val_batches=0",
            "--trainer.limit_test_batches=2",
            "--trainer.logger=false",
            f"--trainer.max_steps={STEPS}",
        ]
        if not (self.root / "whole" / "runs").exists():
            self._make()

    def _make(self) -> None:
        embedded = HERE.parent / "sparsify" / "embedded"
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (self.root / "model").mkdir(exist_ok=True)
            shutil.copy(embedded / name, self.root / "model")
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 4096}
        config = LlamaConfig(**sizes, **heads, max_position_embeddings=32, eos_token_id=0)
        LlamaForCausalLM(config).save_pretrained(self.root / "model")
        words = random.Random(0).choices(["the", "king", "of", "a", "and", "sea", "is"], k=1500)
        (self.root / "text.txt").write_text(" ".join(words), encoding="utf-8")
        run(self.root / "whole", "fit", *self.options, f"--checkpoint.every_n_steps={SAVED_AT}")

    def of(self, what: str) -> Path:
        """The one path below the whole run that a glob finds."""
        return next(iter(sorted((self.root / "whole").glob(what))))


def run(folder: Path, *words: str) -> None:
    """Run the command line in this process, in a folder.

    Raises:
        SparsifyError: it was refused.
    """
    folder.mkdir(parents=True, exist_ok=True)
    before = Path.cwd()
    os.chdir(folder)
    try:
        sparsify(list(words))
    except SystemExit as stop:
        if stop.code == 2:
            raise SparsifyError("refused") from stop
        raise
    finally:
        os.chdir(before)


def learned(folder: Path) -> Any:
    """What a run ended with: all that was learned, and its scores."""
    (last,) = folder.glob("**/checkpoints/step-*.ckpt") or [None]
    checkpoint = torch.load(last, weights_only=True)
    (result,) = folder.glob("**/result.json")
    content = json.loads(result.read_text())
    tensors = {name: value.tolist() for name, value in checkpoint["state_dict"].items()}
    return tensors, content["scores"], content["run"]["tokens"], content["run"]["strategy"]


# -- damage --------------------------------------------------------------------------------------


def flip(path: Path, draw: random.Random) -> None:
    """Flip one to three bits."""
    content = bytearray(path.read_bytes())
    for _ in range(draw.randint(1, 3)):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def cut(path: Path, draw: random.Random) -> None:
    """Cut the end off."""
    os.truncate(path, draw.randrange(path.stat().st_size))


def places(table: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) within tables and lists."""
    items = table.items() if isinstance(table, dict) else enumerate(table)
    for key, value in list(items):
        yield table, key
        if isinstance(value, dict | list):
            yield from places(value)


def alter(content: Any, draw: random.Random) -> None:
    """Remove or replace a field, one near the root as often as one deep within."""
    for _ in range(draw.choice((1, 1, 1, 2))):
        found = list(places(content))
        if draw.random() < 0.4:
            found = [(content, key) for key in content]
        table, key = draw.choice(found)
        if draw.random() < 0.4:
            del table[key]
        elif isinstance(table[key], torch.Tensor):
            table[key] = draw.choice(
                [
                    table[key].to(torch.float64),
                    table[key].flatten()[:-1],
                    torch.full_like(table[key], math.nan) if table[key].is_floating_point() else 3,
                    None,
                ]
            )
        else:
            table[key] = copy.deepcopy(draw.choice(ODD))


def damage_checkpoint(path: Path, draw: random.Random) -> None:
    how = draw.random()
    if how < 0.6:
        content = torch.load(path, weights_only=True)
        alter(content, draw)
        torch.save(content, path)
    (flip if how > 0.8 else cut if how > 0.6 else lambda path, draw: None)(path, draw)


def damage_json(path: Path, draw: random.Random) -> None:
    how = draw.random()
    if how < 0.7:
        content = json.loads(path.read_text())
        alter(content, draw)
        path.write_text(json.dumps(content))
    elif how < 0.85:
        cut(path, draw)
    else:
        flip(path, draw)


def damage_folder(folder: Path, draw: random.Random) -> None:
    """Damage one of the files, whichever it is, or remove it."""
    path = draw.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
    how = draw.random()
    if how < 0.15:
        path.unlink()
    elif path.suffix == ".json":
        damage_json(path, draw)
    else:
        (cut if how < 0.5 else flip)(path, draw)
