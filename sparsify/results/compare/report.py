"""One HTML file that holds all of a comparison, its figures and its style. Needs Matplotlib."""

import base64
import json
from datetime import datetime, timezone
from pathlib import Path
from statistics import fmean
from typing import Any

from jinja2 import Environment, FileSystemLoader

from sparsify.models.perplexity import OVERALL
from sparsify.results.compare.comparison import Comparison
from sparsify.results.compare.drawing import letter
from sparsify.results.compare.figures import cost_pictures, learning_pictures
from sparsify.results.compare.mask_figures import (
    difference_picture,
    move_pictures,
    norm_pictures,
    sensitivity_pictures,
)
from sparsify.results.compare.rows import COSTS, Row
from sparsify.results.compare.settings import differing
from sparsify.results.compare.verdict import CAUTION, RULE, show_cost, spread

DIGITS = {"tokens": 0, "seconds": 0, "memory": 2}


def render(comparison: Comparison, title: str) -> str:
    """The page.

    Args:
        comparison: what it shows.
        title: its heading.
    """
    rows = comparison.rows
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["base64"] = lambda text: base64.b64encode(text.encode()).decode()
    sections = {
        "What it costs": cost_pictures(comparison),
        "Learning": learning_pictures(comparison),
        "How the masks moved": move_pictures(rows),
        "What the masks keep": [*norm_pictures(rows), difference_picture(rows)],
        "Blocks": sensitivity_pictures(rows),
    }
    return environment.get_template("report.html.jinja").render(
        title=title,
        comparison=comparison,
        rows=[_row(number, row, comparison.texts) for number, row in enumerate(rows)],
        texts=comparison.texts,
        sections={name: pictures for name, pictures in sections.items() if pictures},
        protocol=json.dumps(comparison.protocol, indent=2),
        rule=RULE,
        caution=CAUTION,
        settings=_settings(rows),
        origins=_origins(rows),
        date=datetime.now(timezone.utc).date().isoformat(),
    )


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
