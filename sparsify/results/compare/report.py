"""One HTML file that holds all of a comparison, its figures and its style. Needs Matplotlib."""

import base64
import json
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from statistics import fmean
from typing import Any

from jinja2 import Environment, FileSystemLoader

from sparsify.models.perplexity import OVERALL
from sparsify.results.compare.answer import answers
from sparsify.results.compare.comparison import Comparison
from sparsify.results.compare.drawing import letter
from sparsify.results.compare.figures import Picture, cost_pictures, learning_pictures
from sparsify.results.compare.mask_figures import (
    difference_picture,
    move_pictures,
    norm_pictures,
    sensitivity_pictures,
)
from sparsify.results.compare.planned import HEADLINE_GPU, Planned
from sparsify.results.compare.rows import COSTS, Row
from sparsify.results.compare.settings import differing
from sparsify.results.compare.verdict import CAUTION, RULE, show_cost, spread

DIGITS = {"tokens": 0, "seconds": 0, "memory": 2}
MOST_FIGURES = 8  # outside the fold
PLANNED_GPUS = (HEADLINE_GPU, "H100 SXM")


def render(comparison: Comparison, title: str, planned: Planned | None = None) -> str:
    """The page.

    Args:
        comparison: what it shows.
        title: its heading.
        planned: what the rows would cost on a larger model.
    """
    rows = comparison.rows
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["base64"] = lambda text: base64.b64encode(text.encode()).decode()
    pictures = [
        *cost_pictures(comparison),
        *learning_pictures(comparison),
        *move_pictures(rows),
        *norm_pictures(rows),
        difference_picture(rows),
        *sensitivity_pictures(rows),
    ]
    figures, more = in_view(pictures)
    return environment.get_template("report.html.jinja").render(
        title=title,
        comparison=comparison,
        rows=[_row(number, row, comparison.texts) for number, row in enumerate(rows)],
        texts=comparison.texts,
        answers=answers(comparison, planned),
        planned=planned,
        gpus=PLANNED_GPUS,
        figures=figures,
        more=more,
        protocol=json.dumps(comparison.protocol, indent=2),
        rule=RULE,
        caution=CAUTION,
        settings=_settings(rows),
        origins=_origins(rows),
        date=datetime.now(timezone.utc).date().isoformat(),
    )


def in_view(pictures: Sequence[Picture]) -> tuple[list[Picture], list[Picture]]:
    """The first pictures that say something, as many as a reader looks at; and all others."""
    chosen = [one for one in pictures if one.reading][:MOST_FIGURES]
    return chosen, [one for one in pictures if one not in chosen]


def _row(number: int, row: Row, texts: list[str]) -> dict[str, Any]:
    return {
        "letter": letter(number),
        "label": row.label,
        "changes": row.changes,
        "pattern": row.settings["pattern"],
        "covered": "" if row.covered is None else f"{row.covered:.1%}",
        "perplexities": [spread(row.perplexities(text)) for text in texts],
        "costs": [_cost(row, what) for what in COSTS],
        "spread": row.spread,
    }


def _cost(row: Row, what: str) -> str:
    costs = row.costs(what)
    if not costs:
        return "not known"
    if min(costs) == max(costs):
        return show_cost(what, costs[0])
    return spread(costs, 1 if what == "seconds" and fmean(costs) < 10 else DIGITS[what])


def _settings(rows: list[Row]) -> dict[str, list[str]]:
    """What differs between rows, one entry for every row."""
    told = [row.settings for row in rows]
    return {name: [one.get(name, "") for one in told] for name in differing(told)}


def _origins(rows: list[Row]) -> list[list[str]]:
    """Of every run: where it lies, when and with what it was made."""
    return [
        [
            row.label,
            str(run.record.get("seed")),
            f"{run.losses()[OVERALL]:.5f}",
            str(run.result.get("date", ""))[:16],
            str(run.record.get("device", "")),
            ", ".join(f"{name} {v}" for name, v in run.result.get("versions", {}).items()),
            str(run.path.parent),
        ]
        for row in rows
        for run in row.runs
    ]
