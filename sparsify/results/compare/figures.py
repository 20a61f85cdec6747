"""Draws a report's figures of losses and costs; other figures share its line chart.

Needs Matplotlib.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from sparsify.results.compare.caveats import cost_caveats
from sparsify.results.compare.comparison import Comparison
from sparsify.results.compare.curves import Curve, curve, thinned
from sparsify.results.compare.drawing import (
    INK,
    chart,
    cost_axis,
    count_axis,
    loss_axis,
    others,
    quiet,
    reference,
    row_name,
)
from sparsify.results.compare.focus import looks
from sparsify.results.compare.readings import read_costs, read_learning
from sparsify.results.compare.rows import COSTS, Row
from sparsify.results.compare.verdict import frontier, show_cost, spread

MOST_NUMBERS = 16  # so many points of a curve are in the table beneath a drawing
UNITS = {"tokens": "tokens", "seconds": "seconds", "memory": "peak GiB"}


@dataclass(frozen=True)
class Picture:
    """One figure of a report.

    Attributes:
        title: what it shows.
        about: how to read it, and what is not in it.
        svg: the drawing; empty if there is nothing to draw.
        columns: the headings of the numbers.
        numbers: the drawn values as text.
        reading: what the drawing says, in one sentence; empty if the data support none.
    """

    title: str
    about: str
    svg: str = ""
    columns: list[str] = field(default_factory=list)
    numbers: list[list[str]] = field(default_factory=list)
    reading: str = ""


def cost_pictures(comparison: Comparison) -> list[Picture]:
    """One picture per cost: the final test perplexity of every row over that cost."""
    return [_ends(comparison, cost) for cost in COSTS]


def learning_pictures(comparison: Comparison) -> list[Picture]:
    """Validation perplexity over tokens and seconds."""
    pictures = []
    caveats, refused = cost_caveats(comparison.rows)
    texts = _validation_texts(comparison.rows)
    for over in ("tokens", "seconds"):
        title = f"Validation perplexity over {over}"
        if len(texts) > 1:
            reason = f"The runs were told different validation texts: {'; '.join(sorted(texts))}."
            pictures.append(Picture(title, f"{reason} Their perplexities do not compare."))
            continue
        if over in refused:
            pictures.append(Picture(title, caveats[over]))
            continue
        about = (
            "Of the hard masks, while learning; the line is the mean over seeds, the band spans "
            f"them. The {over} of calibration come first, so that lines start where learning does."
        )
        curves = curves_of(comparison.rows, "validation", "perplexity", over)
        absent = {row.label for row in comparison.rows if not row.is_dense}
        absent -= {comparison.rows[one.number].label for one in curves}
        if absent:
            names = "; ".join(sorted(absent))
            about += f" Not measured on validation text, or at unknown cost: {names}."
        drawn = lines(title, about, comparison.rows, curves, over, "perplexity")
        pictures.append(replace(drawn, reading=read_learning(comparison, over)))
    return pictures


def _validation_texts(rows: Sequence[Row]) -> set[str]:
    """What the configurations say of validation, since results hold the test's protocol alone."""
    told = [
        (
            run.told("data.validation") or "the model's own",
            run.told("trainer.limit_val_batches") if run.is_fit else None,
        )
        for row in rows
        for run in row.samples
        if run.config is not None
    ]
    return {str(text) if most is None else f"{text} ({most} batches)" for text, most in told}


def curves_of(rows: Sequence[Row], part: str, value: str, over: str) -> list[Curve]:
    """The curves of all rows that have such values."""
    found = (curve(number, row, part, value, over) for number, row in enumerate(rows))
    return [one for one in found if one is not None]


def lines(
    title: str, about: str, rows: Sequence[Row], curves: Sequence[Curve], over: str, what: str
) -> Picture:
    """Draw curves; the dense row is a dashed line across, a row of one point a marker. Of many, a
    few are in colour, and the others grey.

    Args:
        title: what the picture shows.
        about: how to read it.
        rows: all rows.
        curves: the curves to draw.
        over: the x axis.
        what: the y axis.
    """
    if not any(not rows[one.number].is_dense for one in curves):
        return Picture(title, f"No run recorded this. {about}")
    logarithmic = what == "perplexity"
    own = looks(rows, [one.number for one in curves if not rows[one.number].is_dense])
    with chart() as (axes, svg):
        for one in curves:
            if rows[one.number].is_dense:
                reference(axes, one.mean[-1])
                continue
            look = own[one.number]
            if look is None:
                axes.plot(one.x, one.mean, **quiet())
                continue
            label = row_name(one.number, rows[one.number].label)
            axes.plot(one.x, one.mean, markevery=max(1, len(one.x) // 6), label=label, **look)
            if one.seeds > 1:
                axes.fill_between(one.x, one.low, one.high, color=look["color"], alpha=0.22, lw=0)
        others(axes, list(own.values()).count(None))
        if logarithmic:
            loss_axis(axes, [value for one in curves for value in (*one.low, *one.high)])
        count_axis(axes)
        axes.set_xlabel(over)
        axes.set_ylabel(what)
        drawing = svg()
    apart = [over] if over in ("step", "block") else ["step", over]
    return Picture(
        title,
        about,
        drawing,
        ["row", *apart, "mean", "least", "most", "seeds"],
        [numbers for one in curves for numbers in _numbers(rows[one.number], one, over)],
    )


def _numbers(row: Row, one: Curve, over: str) -> Iterable[list[str]]:
    every = list(zip(one.steps, one.x, one.mean, one.low, one.high, strict=True))
    for step, x, *values in thinned(every, MOST_NUMBERS):
        spent = [] if over in ("step", "block") else [f"{x:,.0f}"]
        shown = [f"{value:,.4g}" for value in values]
        yield [row.label, f"{step:,}", *spent, *shown, str(one.seeds)]


def _ends(comparison: Comparison, cost: str) -> Picture:
    rows, split = comparison.rows, comparison.protocol.get("split", "test")
    title = f"{str(split).capitalize()} perplexity over {UNITS[cost]}"
    caveats, refused = cost_caveats(rows)
    if cost in refused:
        return Picture(title, caveats[cost])
    drawn = [n for n, row in enumerate(rows) if not row.is_dense and row.costs(cost)]
    about = (
        "Where every row ended; bars span its seeds. A thin line joins the rows that none of their "
        "kind beats at the same or a lower cost: solid where the base weights are kept, dotted "
        "where weights change too; costs that range widely are on a logarithmic axis. "
        + caveats.get(cost, "")
    )
    if not drawn:
        return Picture(title, f"No run recorded this. {about}")
    with chart() as (axes, svg):
        for verdict in comparison.verdicts:
            best = frontier(verdict.rows, cost)
            front = [(row.cost(cost), row.perplexity) for row in best]
            kind = "-" if verdict.rows[0].keeps_base else ":"
            axes.plot(*zip(*front, strict=True), kind, color=INK, lw=0.9, drawstyle="steps-post")
        own = looks(rows, drawn)
        for number, look in own.items():
            _point(axes, number, rows[number], cost, look)
        others(axes, list(own.values()).count(None))
        every = [value for n in drawn for value in rows[n].perplexities()]
        dense = [row.perplexity for row in rows if row.is_dense]
        for value in dense[:1]:
            reference(axes, value)
        loss_axis(axes, every + dense)
        axes.margins(x=0.08, y=0.1)
        cost_axis(axes, [price for n in drawn for price in rows[n].costs(cost)])
        axes.set_xlabel(UNITS[cost] + ("" if cost == "memory" else ", calibration included"))
        axes.set_ylabel("perplexity")
        drawing = svg()
    numbers = [
        [
            rows[n].label,
            show_cost(cost, rows[n].cost(cost) or 0.0),
            spread(rows[n].perplexities(), 3),
            rows[n].spread,
        ]
        for n in drawn
    ]
    columns, reading = ["row", UNITS[cost], "perplexity", ""], read_costs(comparison, cost)
    return Picture(title, about, drawing, columns, numbers, reading)


def _point(axes: Any, number: int, row: Row, cost: str, look: dict[str, Any] | None) -> None:
    """Draw where a row ended; without a look of its own it is a grey dot."""
    values, costs = row.perplexities(), row.costs(cost)
    x, y = sum(costs) / len(costs), row.perplexity
    if look is None:
        axes.plot([x], [y], **quiet() | {"markersize": 6})
        return
    across, up = [[x - min(costs)], [max(costs) - x]], [[y - min(values)], [max(values) - y]]
    axes.errorbar([x], [y], up, across, fmt="none", color=look["color"], elinewidth=1.2)
    look |= {"linestyle": "none", "markersize": 7}
    axes.plot([x], [y], label=row_name(number, row.label), **look)
