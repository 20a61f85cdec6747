"""Masks for one domain: a general mask, one learned from scratch on the domain's text alone, and
one learned there from the general mask on (MaskLLM, Fang et al., 2024, table 5).

On the embedded model, for each of its three texts, or some of them (``--domains python``)::

    python benchmarks/domain_table.py --folder work --save benchmarks/results

On SmolLM2-135M for Python source, from the general mask that ``smollm2_table.py`` has learned and
exported; WikiText-2 tells what the domain's masks lose elsewhere::

    python benchmarks/domain_table.py --folder work --model smollm2 --general EXPORT --wikitext FILE

``scratch`` starts as the general mask did, from a one-shot mask, on SmolLM2 calibrated with the
domain's text; ``one shot`` is this start. Results are kept in the folder; a run that was stopped is
resumed.
"""

import argparse
import json
import os
import statistics
from pathlib import Path
from typing import Any

from kept_runs import check_protocol, exported, fit, save
from rich.console import Console
from rich.table import Table
from smollm2_table import RECIPE, cut_wikitext, fetch_model

DOMAINS = ("shakespeare", "bible", "python")
SAVED = "--strategy=sparsify.calibration.prior.SavedMasks"
PRIOR = "--model.strategy.init_args.prior"


def embedded_runs(domain: str, general: Path) -> dict[str, list[str]]:
    learn = ["--strategy=maskllm", f"--data.train=embedded:{domain}", *embedded_data()]
    return {
        "one shot": ["--strategy=magnitude", *embedded_data()],
        "scratch": learn,
        "transfer": [*learn, f"{PRIOR}={general}"],
    }


def embedded_data() -> list[str]:
    texts = json.dumps([f"embedded:{name}" for name in DOMAINS])
    return [f"--data.validation={texts}", f"--data.test={texts}"]


def smollm2_runs(general: Path, args: argparse.Namespace) -> dict[str, list[str]]:
    data = [
        f"--model.name_or_path={fetch_model(args.folder)}",
        "--data.train=embedded:python",
        "--data.block_size=512",
        "--data.eval_batch_size=4",
        "--model.calibration.samples=64",
    ]
    test = {"python": {"path": "embedded:python"}}
    if args.wikitext is not None:
        test["wikitext"] = {"path": str(cut_wikitext(args.wikitext, args.folder))}
    data.append(f"--data.test={json.dumps(test)}")
    # The recipe's rate is for 240 steps; it falls with the cube root of their number.
    learn = [
        f"--config={RECIPE}",
        *data,
        "--data.validation=embedded:python",
        f"--trainer.max_steps={args.steps}",
        f"--trainer.val_check_interval={args.steps // 2}",
        f"--model.optimizer.init_args.lr={0.001 * (240 / args.steps) ** (1 / 3):.2g}",
    ]
    return {
        "dense": ["--strategy=dense", *data],
        "general": [SAVED, f"--model.strategy.path={general}", *data],
        "one shot": [
            "--strategy=sparsify.calibration.prior.MasksOnly",
            "--model.strategy.strategy=sparsify.strategies.sparsegpt.SparseGPT",
            "--model.strategy.strategy.update_weights=true",
            *data,
        ],
        "scratch": learn,
        "transfer": [*learn, f"{PRIOR}={general}"],
    }


def table(rows: dict[str, dict[str, dict[str, Any]]], title: str) -> Table:
    """Each cell is the perplexity of a domain under the mask that is for it."""
    domains = list(next(iter(rows.values())))
    out = Table(title=title, min_width=len(title) + 4)
    for column in ("mask", *domains, *(["average"] if len(domains) > 1 else []), "steps"):
        out.add_column(column, justify="left" if column == "mask" else "right")
    for name, results in rows.items():
        found = [result["scores"][domain]["perplexity"] for domain, result in results.items()]
        average = [f"{statistics.mean(found):.2f}"] if len(domains) > 1 else []
        steps = next(iter(results.values()))["run"]["steps"]
        out.add_row(name, *(f"{value:.2f}" for value in found), *average, str(steps or ""))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="for the runs")
    parser.add_argument("--model", choices=("embedded", "smollm2"), default="embedded")
    parser.add_argument("--domains", nargs="+", choices=DOMAINS, default=DOMAINS)
    parser.add_argument("--general", type=Path, help="SmolLM2's general mask: an exported folder")
    parser.add_argument("--wikitext", type=Path, help="WikiText-2 text, to be measured beside")
    parser.add_argument("--steps", type=int, default=100, help="of learning on SmolLM2")
    parser.add_argument("--only", nargs="+", help="these masks; then there is no table")
    parser.add_argument("--save", type=Path, help="folder for a JSON file of all results")
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    args.folder = args.folder.resolve()
    args.folder.mkdir(parents=True, exist_ok=True)
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    if args.model == "embedded":
        domains = tuple(args.domains)
        shared = {"dense": ["--strategy=dense"], "general": ["--strategy=maskllm"]}
        for name, options in shared.items():
            result = fit(name, [*options, *embedded_data()], args.folder)
            rows[name] = dict.fromkeys(domains, result)
        general = exported("general", args.folder)
        runs = {domain: embedded_runs(domain, general) for domain in domains}
    elif args.general is None:
        parser.error("--model smollm2 needs --general, the exported folder of a general mask")
    else:
        domains = ("python",)
        runs = {"python": smollm2_runs(args.general.resolve(), args)}
    for domain in domains:
        for name, options in runs[domain].items():
            if args.only and name not in args.only:
                continue
            result = fit(f"{name}, {domain}", options, args.folder)
            rows.setdefault(name, {})[domain] = result
    if args.only:
        return
    check_protocol([result for results in rows.values() for result in results.values()])
    Console(width=100).print(table(rows, f"Perplexity of each domain under its mask, {args.model}"))
    save(rows, args.save, f"domain_{args.model}")


if __name__ == "__main__":
    main()
