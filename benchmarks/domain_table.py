"""Masks for one domain: a general mask, one learned from scratch on the domain's text alone, and
one learned there from the general mask on (MaskLLM, Fang et al., 2024, table 5).

On the embedded model, for each of its three texts, or some of them (``--domains python``)::

    python benchmarks/domain_table.py --folder work --seeds 0 1 2 --save benchmarks/results

On SmolLM2-135M for Python source, from the general mask that ``real_models.py`` has learned and
exported; WikiText-2 tells what the domain's masks lose elsewhere::

    python benchmarks/domain_table.py --folder work --model smollm2 --general EXPORT --wikitext FILE

``scratch`` starts as the general mask did, from a one-shot mask, on SmolLM2 calibrated with the
domain's text; ``one shot`` is this start. Results are kept in the folder; a run that was stopped is
resumed.
"""

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from embedded_table import SEEDED
from kept_runs import check_protocol, exported, fit, learn_in, save, slim, spread
from rich.console import Console
from rich.table import Table
from smollm2 import RECIPES, cut_wikitext, fetch_model

DOMAINS = ("shakespeare", "bible", "python")
LEARNERS = ("selfmask", "maskllm")
SAVED = "--strategy=sparsify.calibration.prior.SavedMasks"
PRIOR = "--model.strategy.init_args.prior"


def embedded_runs(strategy: str, domain: str, general: Path) -> dict[str, list[str]]:
    learn = [f"--strategy={strategy}", f"--data.train=embedded:{domain}", *embedded_data()]
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
    # The recipes' rates are for 240 steps. MaskLLM's falls with the cube root of their number.
    rate = f"--model.optimizer.init_args.lr={0.001 * (240 / args.steps) ** (1 / 3):.2g}"
    learn = [
        f"--config={RECIPES / f'smollm2_{args.strategy}.yaml'}",
        *data,
        "--data.validation=embedded:python",
        *learn_in(args.precision),
        f"--trainer.max_steps={args.steps}",
        f"--trainer.val_check_interval={args.steps // 2}",
        *([rate] if args.strategy == "maskllm" else []),
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


Rows = dict[str, dict[str, list[dict[str, Any]]]]


def table(rows: Rows, title: str) -> Table:
    """Each cell is the perplexity of a domain under the mask that is for it."""
    domains = list(next(iter(rows.values())))
    out = Table(title=title, min_width=len(title) + 4)
    for column in ("mask", *domains, *(["average"] if len(domains) > 1 else []), "steps"):
        out.add_column(column, justify="left" if column == "mask" else "right")
    for name, results in rows.items():
        found = {
            domain: [run["scores"][domain]["perplexity"] for run in runs]
            for domain, runs in results.items()
        }
        averages = [sum(values) / len(values) for values in zip(*found.values(), strict=True)]
        cells = [*found.values(), *([averages] if len(domains) > 1 else [])]
        steps = results[domains[0]][0]["run"]["steps"]
        out.add_row(name, *(spread(values, 2) for values in cells), str(steps or ""))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="for the runs")
    parser.add_argument("--model", choices=("embedded", "smollm2"), default="embedded")
    parser.add_argument("--strategy", choices=LEARNERS, default="selfmask", help="which learns")
    parser.add_argument("--domains", nargs="+", choices=DOMAINS, default=DOMAINS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--general", type=Path, help="SmolLM2's general mask: an exported folder")
    parser.add_argument("--wikitext", type=Path, help="WikiText-2 text, to be measured beside")
    parser.add_argument("--steps", type=int, default=100, help="of learning on SmolLM2")
    parser.add_argument(
        "--precision", default="32-true", help="of learning on SmolLM2, not of the test"
    )
    parser.add_argument("--only", nargs="+", help="these masks")
    parser.add_argument("--save", type=Path, help="folder for a JSON file of all results")
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    args.folder = args.folder.resolve()
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.model == "smollm2" and args.general is None:
        parser.error("--model smollm2 needs --general, the exported folder of a general mask")
    rows: Rows = {}
    for seed in args.seeds:
        for (name, domain), result in results(args, seed):
            rows.setdefault(name, {}).setdefault(domain, []).append(slim(result))
    check_protocol([run for row in rows.values() for runs in row.values() for run in runs])
    title = f"Perplexity of each domain under its mask, {args.model}, {args.strategy}"
    Console(width=120).print(table(rows, title))
    save(rows, args.save, f"domain_{args.model}_{args.strategy}")


def results(
    args: argparse.Namespace, seed: int
) -> Iterator[tuple[tuple[str, str], dict[str, Any]]]:
    """((mask, domain), result) of all runs with one seed."""
    seeds = [f"--{part}.seed={seed}" for part in SEEDED]
    if args.model == "embedded":
        domains = tuple(args.domains)
        shared = {"dense": ["--strategy=dense"], "general": [f"--strategy={args.strategy}"]}
        for name, options in shared.items():
            result = fit(f"{name}, seed {seed}", [*options, *seeds, *embedded_data()], args.folder)
            yield from (((name, domain), result) for domain in domains)
        general = exported(f"general, seed {seed}", args.folder)
        runs = {domain: embedded_runs(args.strategy, domain, general) for domain in domains}
    else:
        runs = {"python": smollm2_runs(args.general.resolve(), args)}
    for domain, masks in runs.items():
        for name, options in masks.items():
            if not args.only or name in args.only:
                run = f"{name}, {domain}, seed {seed}"
                yield (name, domain), fit(run, [*options, *seeds], args.folder)


if __name__ == "__main__":
    main()
