"""What a budget's search leaves: overrides, a record, a picture and a table."""

import math
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table

from sparsify.common import yaml_text
from sparsify.common.errors import SparsifyError
from sparsify.common.files import write_json
from sparsify.common.replace import whole_file
from sparsify.masking.overrides import DENSE
from sparsify.models.layer_names import family
from sparsify.models.permutation_file import FILE as ORDERS
from sparsify.results.budget.goal import LIMITS, Goal, Pattern
from sparsify.results.budget.measure import SCORES, check_ours
from sparsify.results.budget.search import SURE, Found, Point, cheaper_and_better
from sparsify.results.budget.units import Units, describe

BUDGET_SCHEMA = "sparsify.budget/1"
FILES = OVERRIDES, RECORD, PICTURE = "overrides.yaml", "budget.json", "frontier.svg"
COPY = "fit_"  # begins the name of a config's copy
OPTIONS = {"patterns", "unit", "windows", "rounds", "tokens", *LIMITS}
CHOSEN, LINE, UNIFORM = "#b5442e", "#2f6690", "#555555"


def write_overrides(
    path: Path, units: Units, found: Found, goal: Goal, given: Mapping[str, str]
) -> None:
    """Write the chosen patterns as settings that ``fit`` takes.

    Args:
        path: the file.
        units: their layers.
        found: holds the choice.
        goal: for the comment on top.
        given: the user's own overrides, which stay in front.
    """
    own = {name: str(p or DENSE) for name, p in units.patterns(found.chosen.choice).items()}
    about = f"# sparsify budget --{goal.name} {goal.limit:g}\n"
    text = about + yaml.safe_dump({"model": {"overrides": dict(given) | own}}, sort_keys=False)
    with whole_file(path) as file:
        file.write(text.encode())


def write_record(
    path: Path, units: Units, found: Found, goal: Goal, about: Mapping[str, Any]
) -> None:
    """Write all that was measured.

    Args:
        path: the file.
        units: their layers and costs.
        found: the measurements.
        goal: what was asked for.
        about: the protocol, and how it was run.
    """
    content = {
        "schema": BUDGET_SCHEMA,
        **about,
        "goal": {
            goal.name: goal.limit,
            "patterns": [str(p or DENSE) for p in goal.patterns],
            "unit": goal.unit,
            "sure": SURE,
        },
        "units": [
            {
                "name": name,
                "layers": list(layers),
                "weights": weights,
                "bytes": {str(p or DENSE): n for p, n in sizes.items()},
                "cost": {str(p or DENSE): n for p, n in costs.items()},
                "alone": {str(p or DENSE): loss for p, loss in alone.items()},
            }
            for (name, layers), weights, sizes, costs, alone in zip(
                units.layers.items(),
                units.weights,
                units.sizes,
                units.costs,
                found.alone,
                strict=True,
            )
        ],
        "chosen": _point(found.chosen, units),
        "final": _point(found.final, units),
        "frontier": [_point(point, units) for point in found.points],
    }
    write_json(path, content)


def _point(point: Point, units: Units) -> dict[str, Any]:
    return {
        "kind": point.kind,
        "bytes": units.size(point.choice),
        "kept": units.kept(point.choice),
        "cost": units.cost(point.choice),
        "perplexity_ratio": point.ratio,
        "loss_increase": point.increase,
        "standard_error": point.error,
        "predicted_increase": point.predicted,
        "patterns": describe(point.choice),
    }


def draw_frontier(path: Path, units: Units, found: Found, goal: Goal, title: str) -> None:
    """Draw perplexity against kept bytes: all joint runs, the best of them as a line, the uniform
    patterns by name, and the chosen one.

    Raises:
        ImportError: Matplotlib is not installed.
    """
    # Not through pyplot, whose windows and global state nothing here needs.
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure = Figure(figsize=(7.0, 4.6), layout="constrained")
    axes = figure.subplots()
    size = {point.choice: units.size(point.choice) for point in found.points}
    whole = sum(max(of.values()) for of in units.sizes)

    def places(points: Sequence[Point]) -> tuple[list[float], list[float]]:
        return [units.size(p.choice) / whole for p in points], [p.ratio for p in points]

    line = cheaper_and_better(found.points, size)
    others = [p for p in found.points if p.kind != "uniform" and p not in line]
    even = [p for p in found.points if p.kind == "uniform"]
    axes.plot(*places(others), ".", color=LINE, alpha=0.3, markersize=5)
    axes.plot(*places(line), ".-", color=LINE, linewidth=1.5, label="best choices that were run")
    axes.plot(*places(even), "s", color=UNIFORM, markersize=6, label="one pattern for all")
    for point in even:
        text = str(point.choice[0] or DENSE)
        axes.annotate(
            text,
            (units.size(point.choice) / whole, point.ratio),
            (6, 4),
            fontsize=9,
            textcoords="offset points",
        )
    axes.plot(*places([found.final]), "*", color=CHOSEN, markersize=15, label="chosen")
    if goal.name == "max_perplexity_ratio":
        axes.axhline(goal.limit, color=CHOSEN, linewidth=0.8, linestyle="--")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.2, 1.5, 2.0, 3.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("bytes of the masked layers, as a share of dense")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0%}"))
    axes.set_ylabel("perplexity, as a multiple of dense")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.set_title(title, loc="left", fontsize=11)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path)


def choice_table(units: Units, found: Found, title: str) -> Table:
    """How many units have each pattern, and what the whole costs and loses."""
    table = Table(title=title)
    for column in ("", "kept", "MiB", "perplexity / dense", "predicted"):
        table.add_column(column, justify="left" if not column else "right")
    even = [p for p in found.points if p.kind == "uniform"]
    for name, point in [(str(p.choice[0] or DENSE), p) for p in even] + [("chosen", found.final)]:
        table.add_row(
            name,
            f"{units.kept(point.choice):.1%}",
            f"{units.size(point.choice) / 2**20:.2f}",
            f"{point.ratio:.3f} ± {SURE * point.error * point.ratio:.3f}",
            f"{math.exp(point.predicted):.3f}",
        )
    return table


def pattern_counts(units: Units, found: Found) -> Table:
    """The chosen patterns, by kind of unit and pattern."""
    patterns: dict[str, dict[Pattern, int]] = {}
    for name, pattern in zip(units.layers, found.chosen.choice, strict=True):
        own = patterns.setdefault(family(f"{name}.").rstrip("."), {})
        own[pattern] = own.get(pattern, 0) + 1
    columns = sorted(
        {p for own in patterns.values() for p in own}, key=lambda p: -(p.density if p else 1)
    )
    table = Table("chosen", *(str(p or DENSE) for p in columns))
    for name, own in patterns.items():
        table.add_row(name, *(str(own.get(p, "")) for p in columns))
    return table


def check_free(folder: Path) -> None:
    """Refuse a folder with results. Measurements of an earlier start may be there, and go on.

    Raises:
        SparsifyError: a file would be replaced.
    """
    check_ours(folder / SCORES)
    for path in (*(folder / name for name in (*FILES, ORDERS)), *folder.glob(f"{COPY}*.yaml")):
        if path.exists():
            raise SparsifyError(
                f"{path} exists, and stays; give another --output.folder, or "
                "--output.overwrite true"
            )


def next_version(root: Path) -> Path:
    """Make the next folder ``version_N``."""
    taken = [folder.name.removeprefix("version_") for folder in root.glob("version_*")]
    number = max((int(name) + 1 for name in taken if name.isdecimal()), default=0)
    (folder := root / f"version_{number}").mkdir()
    return folder


def fit_words(words: Sequence[str], folder: Path) -> list[str]:
    """Those of the words after ``sparsify budget`` that ``fit`` takes too. A config that holds
    others is copied to the folder without them.
    """
    kept: list[str] = []
    for word in without(words, *OPTIONS, "output"):
        flag = "--config=" if word.startswith("--config=") else ""
        path = word.removeprefix(flag)
        named = flag or kept[-1:] in (["--config"], ["-c"])
        if named and os.path.exists(path):  # a config may also be given as JSON
            word = f"{flag}{_fit_config(Path(path), folder)}"
        kept.append(word)
    return kept


def _fit_config(config: Path, folder: Path) -> Path:
    settings = yaml_text.load(config.read_text(encoding="utf-8"))
    taken = {key: value for key, value in settings.items() if key not in {*OPTIONS, "output"}}
    if taken == settings:
        return config
    copy = folder / f"{COPY}{config.stem}.yaml"
    with whole_file(copy) as file:
        file.write(yaml.safe_dump(taken, sort_keys=False).encode())
    return copy


def without(words: Sequence[str], *options: str) -> list[str]:
    """A command line without these options, and those that they group; nor their values."""
    kept, drop = [], False
    for word in words:
        if word.startswith("-"):
            flag = word.partition("=")[0].lstrip("-")
            drop = any(flag == option or flag.startswith(f"{option}.") for option in options)
        if not drop:
            kept.append(word)
    return kept


def next_command(words: Sequence[str], overrides: Path) -> str:
    """The command that makes the chosen model."""
    return shlex.join(["sparsify", "fit", *words, "--config", str(overrides)])
