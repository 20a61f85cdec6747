"""Perplexity against the bytes of the masked layers: one pattern for all of them, a pattern for
each within a budget, permuted channels, and both::

    python benchmarks/bytes_table.py --folder work --save benchmarks/results
    python benchmarks/bytes_table.py --folder work --model smollm2 --c4 FILE --wikitext FILE

``sparsify budget`` chooses on validation text; what is shown is ``sparsify fit`` on the test text.
Budgets are found with ``--by``, of the embedded model for permuted channels too, and what they
chose is then fit with ``--strategy``. Results are kept in the folder; what it holds is not run
again.
"""

import argparse
import math
import os
from pathlib import Path
from typing import Any

from embedded_table import ALLOWED, SEEDED
from kept_runs import check_protocol, exported, fit, overrides, save, slim
from rich.console import Console
from rich.table import Table
from smollm2 import BY_MODULE, data_options, fetch_model

from sparsify.export.manifest import manifest_patterns, sound_manifest
from sparsify.results.budget.units import stored_bytes

UNIFORM = ("6:8", "5:8", "2:4")
KEPT = (0.75, 0.625, 0.5)
PERMUTE = {"": [], ", permuted": ["--model.permute=all"]}
# Changes are measured layer by layer on the embedded model, for which that takes minutes.
SEARCH = {"embedded": ["--unit=layer", "--windows=16", "--rounds=1"], "smollm2": BY_MODULE}
# Whether patterns are chosen anew for permuted channels; on SmolLM2 that would take another hour.
ANEW = {"embedded": True, "smollm2": False}
HALF = 2  # bytes a value of the packed weights that are counted


def kept_bytes(export: Path, shapes: dict[str, tuple[int, int]]) -> tuple[int, float]:
    """Bytes and kept share of the layers of these shapes; those that were left dense are not in the
    export's manifest.
    """
    own = manifest_patterns(export)
    kept = sum(
        math.prod(shape) * (own[name].density if name in own else 1)
        for name, shape in shapes.items()
    )
    size = sum(stored_bytes(shape, HALF, own.get(name)) for name, shape in shapes.items())
    return size, kept / sum(map(math.prod, shapes.values()))


def runs(args: argparse.Namespace, common: list[str]) -> dict[str, dict[str, Any]]:
    results: dict[str, dict[str, Any]] = {}
    shapes: dict[str, tuple[int, int]] = {}
    common = [*common, "--trainer.limit_val_batches=0"]  # which a search reads all the same
    plain = [f"--strategy={args.strategy}", *common]
    for order, permute in PERMUTE.items():
        rows = {f"{pattern}{order}": [f"--model.pattern={pattern}"] for pattern in UNIFORM}
        for kept in KEPT:
            options = [f"--kept={kept}", f"--strategy={args.by}", *SEARCH[args.model]]
            options += [ALLOWED, f"--trainer.precision={args.precision}", *common]
            anew = order if ANEW[args.model] else ""
            chosen = overrides(f"budget{anew}", [*options, *PERMUTE[anew]], args.folder)
            rows[f"budget {kept}{order}"] = [f"--config={chosen}"]
        for name, own in rows.items():
            run = f"{args.strategy}, {name}"
            result = fit(run, [*plain, *own, *permute], args.folder)
            export = exported(run, args.folder)
            if not shapes:  # one pattern for all: no layer is left dense
                masked = sound_manifest(export).layers
                shapes = {layer: about.shape for layer, about in masked.items()}
            size, share = kept_bytes(export, shapes)
            results[name] = {"bytes": size, "kept": share, "budget_by": args.by, **slim(result)}
    size = sum(stored_bytes(shape, HALF, None) for shape in shapes.values())
    dense = fit("dense", ["--strategy=dense", *common], args.folder)
    return {"dense": {"bytes": size, "kept": 1.0, **slim(dense)}, **results}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="for the runs")
    parser.add_argument("--model", choices=list(SEARCH), default="embedded")
    parser.add_argument("--strategy", default="wanda", help="which masks the chosen patterns")
    parser.add_argument("--by", default="wanda", help="which one-shot strategy chooses patterns")
    parser.add_argument(
        "--precision",
        default="32-true",
        help="of the measurements that choose; bf16-mixed is faster on GPUs and newer CPUs",
    )
    parser.add_argument("--c4", type=Path, help="SmolLM2: C4 as JSONL; the default is the hub's")
    parser.add_argument("--wikitext", type=Path, help="SmolLM2: WikiText-2 text")
    parser.add_argument("--save", type=Path, help="folder for a JSON file of all results")
    args = parser.parse_args()
    args.folder = args.folder.resolve()
    args.folder.mkdir(parents=True, exist_ok=True)
    common = ["--logger=csv", *(f"--{part}.seed=0" for part in SEEDED)]
    if args.model == "smollm2":
        common += [f"--model.name_or_path={fetch_model(args.folder)}"]
        # Budgets are chosen on held-out C4.
        common += data_options(args, ("wikitext",))
    os.environ["HF_HUB_OFFLINE"] = "1"
    results = runs(args, common)
    check_protocol(list(results.values()))
    table = Table(title=f"{args.strategy} on {args.model}")
    for column in ("patterns", "kept", "MiB", "test perplexity"):
        table.add_column(column, justify="left" if column == "patterns" else "right")
    for name, row in results.items():
        perplexity = row["scores"]["overall"]["perplexity"]
        cells = f"{100 * row['kept']:.1f} %", f"{row['bytes'] / 2**20:.2f}", f"{perplexity:.2f}"
        table.add_row(name, *cells)
    Console(width=100).print(table)
    save(results, args.save, f"bytes_{args.model}_{args.strategy}")


if __name__ == "__main__":
    main()
