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
from pathlib import Path
from typing import Any

import torch
from kept_runs import save
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM

from sparsify import NMPattern, SparsifyError
from sparsify.calibration.results import computing_cost, is_whole, read_results
from sparsify.cli.main import main as sparsify
from sparsify.common.version import version
from sparsify.export.mask_file.file import read_masks
from sparsify.results.compare import compare
from sparsify.results.compare.loading import load_runs
from sparsify.serving.verify import verify

REFUSED, EQUAL, CHANGED, TRACEBACK = "refused", "equal", "changed a result", "traceback"
STEPS, SAVED_AT = 3, 2
HERE = Path(__file__).resolve().parent
ODD: list[Any] = [None, True, -1, 2**70, math.nan, math.inf, 1.5, "x", "", [], {}, [1], {"a": 1}]


class Files:
    """A tiny run, and what it left."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self.root.mkdir(parents=True, exist_ok=True)
        os.environ["SPARSIFY_CACHE"] = str(self.root / "whole" / "cache")
        self.options = [
            "--strategy=maskllm",
            f"--model.name_or_path={self.root / 'model'}",
            *(
                f"--data.{part}={self.root / 'text.txt'}"
                for part in ("train", "validation", "test")
            ),
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
        embedded = HERE.parent / "sparsify" / "models" / "embedded"
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
    last = max(folder.glob("**/checkpoints/step-*.ckpt"), key=lambda path: path.name)
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


def alike(odd: Any, value: Any) -> bool:
    """Whether a value may stand for another one, so that nothing would be damaged."""
    numbers = all(
        isinstance(one, int | float) and not isinstance(one, bool) for one in (odd, value)
    )
    return type(odd) is type(value) or (numbers and math.isfinite(odd) and 0 <= odd < 2**53)


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
            other = [odd for odd in ODD if not alike(odd, table[key])]
            table[key] = copy.deepcopy(draw.choice(other))


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


# -- reading -------------------------------------------------------------------------------------


def checkpoints(files: Files, folder: Path, draw: random.Random) -> Callable[[], Any]:
    """A run that goes on from a damaged checkpoint ends as the whole one."""
    path = folder / f"step-{SAVED_AT:08}.ckpt"
    shutil.copy(files.of(f"**/step-{SAVED_AT:08}.ckpt"), path)
    damage_checkpoint(path, draw)

    def read() -> Any:
        run(folder / "run", "fit", *files.options, f"--ckpt_path={path}")
        return learned(folder / "run") == learned(files.root / "whole")

    return read


def results(files: Files, folder: Path, draw: random.Random) -> Callable[[], Any]:
    """What a comparison rests on is the same in a damaged result: losses, and what was run."""
    found = files.of("**/result.json")
    shutil.copy(found, folder / "result.json")
    damage_json(folder / "result.json", draw)

    def told(place: Path) -> Any:
        (run,), _ = load_runs([place / "result.json"])
        compare([place / "result.json"]).table(100)  # nothing in it may be a traceback
        record = [run.record[key] for key in ("strategy", "pattern", "steps", "tokens", "sparsity")]
        return run.losses(), record, run.protocol["base"]["hash"]

    def read() -> Any:
        alone = folder / "whole"
        alone.mkdir()
        shutil.copy(found, alone)
        return told(folder) == told(alone)

    return read


def masks(files: Files, folder: Path, draw: random.Random) -> Callable[[], Any]:
    """A damaged mask file is refused, or holds the same masks."""
    found = files.of("**/masks.nmask")
    shutil.copy(found, folder)
    (cut if draw.random() < 0.3 else flip)(folder / "masks.nmask", draw)

    def ranks(path: Path) -> Any:
        held = read_masks(path)
        return {name: held.ranks(name).tolist() for name in held}

    return lambda: ranks(folder / "masks.nmask") == ranks(found)


def exports(files: Files, folder: Path, draw: random.Random) -> Callable[[], Any]:
    """Verify finds a damaged export unsound, or it is of the same weights."""
    found = files.of("**/export")
    shutil.copytree(found, folder / "export")
    damage_folder(folder / "export", draw)

    def read() -> Any:
        if not verify(folder / "export").ok:
            raise SparsifyError("not sound")
        weights = "model.safetensors"
        return (folder / "export" / weights).read_bytes() == (found / weights).read_bytes()

    return read


def caches(files: Files, folder: Path, draw: random.Random) -> Callable[[], Any]:
    """A damaged entry is never used unless it holds the same masks."""
    found = files.of("cache/*")
    shutil.copytree(found, folder / "entry")
    victims = sorted((folder / "entry").iterdir())
    victim = victims[draw.randrange(len(victims))]
    if victim.suffix == ".json" and draw.random() < 0.5:
        damage_json(victim, draw)
    else:
        (cut if draw.random() < 0.3 else flip)(victim, draw)
    patterns = {name: NMPattern(2, 4) for name, _ in stored(found)}

    def told(entry: Path) -> Any:
        masks = {name: r.mask.tolist() for name, r in read_results(entry, patterns)}
        return masks, computing_cost(entry)

    def read() -> Any:
        if not is_whole(folder / "entry", patterns):
            raise SparsifyError("computed again")
        return told(folder / "entry") == told(found)

    return read


def stored(entry: Path) -> Iterator[tuple[str, Path]]:
    """The layers of an entry of the cache, and their files."""
    for path in sorted(entry.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            yield file.metadata()["layer"], path


KINDS = {one.__name__: one for one in (checkpoints, results, masks, exports, caches)}


def one(files: Files, kind: str, number: int, seed: int) -> dict[str, Any]:
    """Damage and read once: what came of it, and where a fault was."""
    folder = files.root / "case"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    found: dict[str, Any] = {"kind": kind, "number": number}
    read = KINDS[kind](files, folder, random.Random(f"{seed} {kind} {number}"))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return found | {"outcome": EQUAL if read() else CHANGED}
    except SparsifyError:
        return found | {"outcome": REFUSED}
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        at = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{type(error).__name__}: {error} ({Path(at.filename).name}:{at.lineno})"
        return found | {"outcome": TRACEBACK, "error": where[:300]}


def damage(folder: Path, count: int, seed: int, kinds: list[str]) -> dict[str, dict[str, int]]:
    """Damage ``count`` files of each kind; how often each outcome came, by kind."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    files = Files(folder)
    kept = files.root / f"seed-{seed}.jsonl"
    rows = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    done = {(row["kind"], row["number"]): row for row in rows}
    for kind in kinds:
        for number in range(count):
            if (kind, number) in done:
                continue
            row = done[kind, number] = one(files, kind, number, seed)
            with kept.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(row) + "\n")
            if row["outcome"] in (CHANGED, TRACEBACK) or number % 100 == 99:
                print(f"{kind} {number + 1}/{count}: {row}", file=sys.__stdout__, flush=True)
    counted = {
        kind: Counter(done[kind, number]["outcome"] for number in range(count)) for kind in kinds
    }
    names = (REFUSED, EQUAL, CHANGED, TRACEBACK)
    return {kind: {name: counts[name] for name in names} for kind, counts in counted.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/damage"))
    parser.add_argument("--save", type=Path)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    args = parser.parse_args()
    started = time.monotonic()
    found = damage(args.folder, args.count, args.seed, args.kinds)
    for kind, counts in found.items():
        print(kind, counts)
    versions = {name: version(name) for name in ("sparsify", "torch", "lightning", "transformers")}
    record = {"count": args.count, "seed": args.seed, "versions": versions, "outcomes": found}
    save(record | {"seconds": round(time.monotonic() - started)}, args.save, "damage")
    faults = sum(counts[CHANGED] + counts[TRACEBACK] for counts in found.values())
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
